"""What an outside issuer's claims say, once they are proven: whose they are, until when, and which roles.

Pure. The rules are those of RFC 7519, section 4.1, RFC 9068, section 4, and OpenID Connect Core 1.0, section 3.1.3.7.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mcpctl.config_oidc import BUILT_IN_ROLES
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import UnauthorizedError

_LONGEST = 255
"""Characters of a subject (OpenID Connect Core 1.0, section 2), and of other names in a token."""
_SHOWN = 64
_LAST = 253402300799
"""The end of the year 9999, in seconds since 1970."""
_TENANT = re.compile(r"[a-z][a-z0-9-]{0,30}")
_CLIENT = ("azp", "client_id", "cid")
"""Who asked for the token: OpenID Connect Core 1.0, section 2; RFC 9068, section 2.2; Okta."""
_ONLY_IN_ACCESS_TOKENS = ("typ", "scope", "scp", "client_id", "cid", "azpacr", "appidacr", "gty")
"""Keycloak's, which is looked at; RFC 8693, section 4.2; Entra's and Okta's; RFC 9068; Okta's; Entra's; Auth0's."""
_ONLY_IN_ID_TOKENS = ("at_hash", "c_hash", "s_hash")


@dataclass(frozen=True, slots=True)
class Outside:
    """Whom an outside issuer vouches for.

    The identity is (`issuer`, `subject`) and nothing else; `shown` is for people to read, and can change hands. `roles`
    are ours (none: it may do nothing). `as_user` is the user whose login roles and grants a person without a user of
    their own has, by `just_in_time`; None for nobody's. `expires_at` is when the token is taken no longer: its end, and
    the clock skew that is forgiven. `source` is the issuer's name in the config.
    """

    source: str
    issuer: str
    subject: str
    tenant: str | None
    roles: tuple[str, ...]
    as_user: str | None
    expires_at: datetime
    token_id: str | None
    shown: str | None


def outside(source: str, config: Oidc, claims: Mapping[str, Any], now: datetime, *, access: bool = False) -> Outside:
    """Whom these claims are about, or UnauthorizedError with what is wrong with them. Their origin is proven before.
    `access`: it is known that they are those of an access token; else they have to show it."""
    if claims.get("iss") != config.issuer:
        raise UnauthorizedError("its issuer (iss) is another one")
    _check_kind(claims, access)
    _check_audience(config, claims)
    held = _roles(config, claims)
    return Outside(
        source=source,
        issuer=claims["iss"],
        subject=_name(claims, config.user_claim, needed=True) or "",
        tenant=_tenant(config, claims),
        roles=tuple(
            dict.fromkeys(one if one in BUILT_IN_ROLES else config.roles[one] for one in held if _ours(config, one))
        ),
        as_user=next((user for role, user in config.just_in_time.items() if role in held), None),
        expires_at=_end(claims, now, config.clock_skew),
        token_id=_name(claims, "jti") or _name(claims, "uti"),
        shown=_shown(claims, config.name_claim),
    )


def _check_kind(claims: Mapping[str, Any], access: bool) -> None:
    """Other tokens of the same issuer are signed with the same keys, and an ID token's audience may be ours, where our
    audience is a client's id (RFC 8725, sections 3.11 and 3.12)."""
    kind = claims.get("typ", "Bearer")  # Keycloak's: ID, Refresh, Offline, Logout, DPoP, … for the others
    if kind != "Bearer" or str(claims.get("token_type", "Bearer")).lower() != "bearer":
        raise UnauthorizedError("it is no access token for a bearer (typ)")
    if any(name in claims for name in _ONLY_IN_ID_TOKENS) or "events" in claims:
        raise UnauthorizedError("it is an ID token or a notice, and no access token")
    if not access and not any(name in claims for name in _ONLY_IN_ACCESS_TOKENS):
        raise UnauthorizedError("nothing says that it is an access token (typ, scope, scp, client_id), and no ID token")
    if "cnf" in claims:
        raise UnauthorizedError("it is bound to a key (cnf), whose proof is not taken")  # RFC 9449, section 7.1


def _check_audience(config: Oidc, claims: Mapping[str, Any]) -> None:
    found = claims.get("aud")
    audiences = {found} if isinstance(found, str) else set(_texts(found, "aud"))
    if audiences.isdisjoint(config.audience):
        raise UnauthorizedError(f"it is for somebody else: its audience (aud) has none of {', '.join(config.audience)}")
    client = next((claims[name] for name in _CLIENT if name in claims), None)
    if config.clients and not (isinstance(client, str) and client in config.clients):
        raise UnauthorizedError("the client that asked for it (azp) is none of the config's clients")
    if not config.clients and len(audiences) > 1:
        raise UnauthorizedError("it has several audiences (aud), and the config names no clients (azp) for it")


def _end(claims: Mapping[str, Any], now: datetime, skew: float) -> datetime:
    """When it ends, with the skew. Raises where that is over, or where it has not begun."""
    seconds = now.timestamp()
    end, begin, made = (_time(claims, name) for name in ("exp", "nbf", "iat"))
    if end is None:
        raise UnauthorizedError("it has no end (exp)")
    if seconds >= end + skew:
        raise UnauthorizedError("it has expired (exp)", proven=True)  # its issuer's, ours, and only over
    if max(begin or 0, made or 0) > seconds + skew:
        raise UnauthorizedError("it is from the future (nbf, iat): look at the clocks")
    return datetime.fromtimestamp(min(end, _LAST - skew), UTC) + timedelta(seconds=skew)


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    """A NumericDate (RFC 7519, section 2); None where there is none."""
    if name not in claims:
        return None
    found = claims[name]
    if type(found) not in (int, float) or not math.isfinite(found) or not 0 <= found <= _LAST:
        raise UnauthorizedError(f"its {name} is no time in seconds")
    return float(found)


def _name(claims: Mapping[str, Any], name: str, *, needed: bool = False) -> str | None:
    """A short text in printable ASCII; None where there is none."""
    found = claims.get(name)
    if found is None and not needed:
        return None
    if not (isinstance(found, str) and 0 < len(found) <= _LONGEST and found.isascii() and found.isprintable()):
        raise UnauthorizedError(f"its {name} is missing, or no text of {_LONGEST} ASCII characters at most")
    return found


def _tenant(config: Oidc, claims: Mapping[str, Any]) -> str | None:
    if config.tenant_claim is None:
        return None
    found = list(at(claims, config.tenant_claim))
    if len(found) != 1 or not isinstance(found[0], str) or not _TENANT.fullmatch(found[0]):
        raise UnauthorizedError(f"its {config.tenant_claim} names no tenant")
    return found[0]


def _ours(config: Oidc, role: str) -> bool:
    return role in BUILT_IN_ROLES or role in config.roles


def _roles(config: Oidc, claims: Mapping[str, Any]) -> tuple[str, ...]:
    """The issuer's roles for it, as far as they mean something here."""
    found: dict[str, None] = {}
    for path in config.roles_claims:
        for one in at(claims, path):
            found.update(dict.fromkeys([one] if isinstance(one, str) else _texts(one, path)))
    return tuple(one for one in found if _ours(config, one) or one in config.just_in_time)


def at(claims: Mapping[str, Any], path: str) -> Iterator[Any]:
    """What stands at a path such as `resource_access.*.roles`; nothing where the way there ends. A path with `://` in
    it is the name of one claim."""
    places: list[Any] = [claims]
    for name in [path] if "://" in path else path.split("."):
        inner = [place for place in places if isinstance(place, Mapping)]
        if name == "*":
            places = [value for place in inner for value in place.values()]
        else:
            places = [place[name] for place in inner if name in place]
    return (place for place in places if place is not None)


def _texts(found: Any, name: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UnauthorizedError(f"its {name} is no text and no list of texts")
    return found


def _shown(claims: Mapping[str, Any], path: str) -> str | None:
    """A name on one line, without what moves a cursor or turns a line round."""
    found = next(at(claims, path), None)
    if not isinstance(found, str):
        return None
    clean = "".join(one for one in found[: 4 * _SHOWN] if unicodedata.category(one)[0] not in "CZ" or one == " ")
    return clean.strip()[:_SHOWN] or None
