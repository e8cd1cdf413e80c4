"""What one key of auth.oauth cannot say alone."""

from collections.abc import Callable, Iterator

from mcpctl import redirect_uris
from mcpctl.config_keys import Settings
from mcpctl.config_values import is_loopback

BUILT_IN = ("mcp:read", "mcp:write", "mcp:admin")
"""A test holds them to policy/scopes.py, which is above the config."""
OFFLINE = "offline_access"
"""Asks for a refresh token, and gives no right (OpenID Connect Core 1.0, section 11)."""
_WEB_ONLY = ("http", "https", "javascript", "data", "file", "blob", "about", "vbscript", "ftp", "mailto", "ws", "wss")


def faults(settings: Settings, check_permission: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """(key below auth.oauth, what is wrong). `check_permission` raises ValueError for a pattern that covers nothing."""
    oauth, server = settings.auth.oauth, settings.server
    if oauth.enabled and server.public_url is None and not is_loopback(server.host):
        yield "enabled", "clients are told whom they speak to: needs server.public_url, unless server.host is loopback"
    if oauth.enabled and (server.public_url or "").startswith("http://") and not _is_local(server.public_url or ""):
        yield "enabled", "passwords and tokens go to server.public_url: needs https"
    if oauth.idle > oauth.lifetime:
        yield "idle", "is above auth.oauth.lifetime"
    if oauth.access_lifetime > oauth.idle:
        yield "access_lifetime", "is above auth.oauth.idle"
    for scheme in oauth.app_schemes:
        if scheme in _WEB_ONLY:
            yield "app_schemes", f"{scheme} is no scheme of an installed program"
    for name, scope in oauth.scopes.items():
        if name.startswith("mcp:") or name in (OFFLINE, "openid"):
            yield f"scopes.{name}", f"mcp:…, {OFFLINE} and openid have a meaning already"
        for pattern in scope.permissions:
            try:
                check_permission(pattern)
            except ValueError as problem:
                yield f"scopes.{name}.permissions", str(problem)
    known = (*BUILT_IN, *oauth.scopes)
    for name in oauth.default_scopes:
        if name not in known:
            yield "default_scopes", f"there is no scope {name}; there are {', '.join(known)}"
    for name, client in oauth.clients.items():
        yield from _of_client(f"clients.{name}", client.redirect_uris, oauth.app_schemes, enabled=oauth.enabled)


def _of_client(
    key: str, uris: tuple[str, ...], schemes: tuple[str, ...], *, enabled: bool
) -> Iterator[tuple[str, str]]:
    if not uris and enabled:
        yield key, "needs redirect_uris: where it is answered"
    for uri in uris:
        try:
            redirect_uris.check(uri, schemes)
        except ValueError as problem:
            yield f"{key}.redirect_uris", f"{uri!r} is not taken; expected {problem}"


def _is_local(url: str) -> bool:
    host = url.partition("://")[2].rpartition("]")
    return is_loopback(host[0].removeprefix("[") or host[2].partition(":")[0])
