"""What one key of auth.oidc cannot say alone."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from mcpctl.config_keys import Auth
from mcpctl.config_sign_in import Oidc
from mcpctl.config_values import is_loopback

BUILT_IN_ROLES = ("mcp-admin", "mcp-developer", "mcp-tools", "mcp-user")
"""A test holds them to policy/roles.py, which is above the config."""


def faults(auth: Auth) -> Iterator[tuple[str, str]]:
    """(key below auth.oidc, what is wrong) of all issuers."""
    seen: dict[str, str] = {}
    opaque: list[str] = []
    for name, one in auth.oidc.items():
        yield from ((f"{name}{key}", text) for key, text in _of_one(one, (*BUILT_IN_ROLES, *auth.roles)))
        if one.issuer is not None and (before := seen.setdefault(one.issuer, name)) != name:
            yield f"{name}.issuer", f"is that of auth.oidc.{before}, too: one issuer stands there once"
        if one.introspection.client_id is not None and one.introspection.tokens != "jwt":
            opaque.append(name)
    for name in opaque[1:]:
        text = f"opaque tokens go to {opaque[0]}: they do not say whose they are, and a second issuer must not see them"
        yield f"{name}.introspection.tokens", f"{text}; say jwt here"


def _of_one(one: Oidc, roles: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if one.issuer is None:
        yield "", "needs issuer, the URL that its tokens have in `iss`"
    elif problem := _plain_http(one.issuer, one.allow_http_loopback):
        yield ".issuer", problem
    if not one.audience:
        yield "", "needs audience: a token for somebody else must not open this server"
    asked = one.introspection
    if (asked.client_id is None) != (asked.client_secret_file is None):
        yield ".introspection", "client_id and client_secret_file go together"
    for outside, role in one.roles.items():
        if role not in roles:
            yield ".roles", f"{outside}: there is no role {role}; there are {', '.join(roles)}"
        elif outside in BUILT_IN_ROLES and outside != role:
            yield ".roles", f"{outside}: is ours by its own name, and cannot stand for {role}"


def _plain_http(issuer: str, allowed: bool) -> str | None:
    parts = urlsplit(issuer)
    if parts.scheme == "https":
        return None
    if not is_loopback(parts.hostname or ""):
        return "needs https: whoever is on the way could put their own keys in the issuer's place"
    return None if allowed else "needs https; on this machine alone, and for tests: allow_http_loopback: true"
