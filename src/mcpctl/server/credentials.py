"""What an HTTP request says of itself before anything of it is believed: host, origin, address, credential."""

import ipaddress
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from mcpctl.config_keys import Settings
from mcpctl.config_values import Network
from mcpctl.config_values import is_loopback as is_loopback
from mcpctl.errors import Error, UnauthorizedError, UsageError

Headers = Sequence[tuple[bytes, bytes]]
_FORWARDING = re.compile(
    rb"^via$|-via$|forwarded|(client|real|connecting|user)-?ip|(remote|external)-addr|x-(original|host|proxy)|"
    rb"cdn-loop|^cf-|amzn-trace|nginx|varnish|appengine"
)
"""Names of headers that proxies, balancers and content networks add."""
_SCHEMES = ("http", "https")
_QUERY = 256
"""Bytes of a query: decoding costs a thousand times as much, and nobody is known yet."""
_HOPS = 32
"""Addresses that proxies name in one request."""


def header(headers: Headers, name: bytes) -> str | None:
    """The one value of a header; UsageError where it stands there twice."""
    found = [value for key, value in headers if key == name]
    if len(found) > 1:
        raise UsageError(f"the header {name.decode()} stands there {len(found)} times", "send it once")
    return found[0].decode("latin-1") if found else None


def to_origin_form(scope: MutableMapping[str, Any]) -> None:
    """A request target may be a whole URL, whose authority then stands for Host (RFC 9112, section 3.2.2)."""
    raw = scope["path"] = scope["raw_path"].decode("latin-1")  # as it was sent: a proxy's rule for /mcp sees no /%6dcp
    if raw.lower().startswith(("http://", "https://")):
        try:
            target = urlsplit(raw)
        except ValueError:
            raise UsageError("the request's target is no URL", "ask for /mcp") from None
        scope["path"] = target.path
        scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"host"]
        scope["headers"].append((b"host", target.netloc.encode("latin-1", "replace")))


def presented(scope: MutableMapping[str, Any], in_url: Sequence[bytes]) -> tuple[str | None, bytes]:
    """The credential of a request, None where there is none, and its query without that. `in_url`: the names that one
    may have there, if any. Raises as `token` and `refuse_in_url`."""
    query = scope["query_string"]
    parts = query.split(b"&") if in_url and 0 < len(query) <= _QUERY else []
    found = [part.partition(b"=") for part in parts if part.partition(b"=")[0] in in_url]
    if found:
        query = b"&".join(part for part in parts if part.partition(b"=")[0] not in in_url)
    refuse_in_url(query)
    if not found:
        return token(scope["headers"]), query
    if len(found) > 1 or any(name in _CREDENTIALS for name, _ in scope["headers"]):
        raise _two()
    name, _, value = found[0]
    return _checked(name, unquote_to_bytes(value).decode("latin-1")), query


def _checked(name: bytes, value: str) -> str:
    """What is called a session has to be one."""
    if name in (b"x-session-id", b"session_id") and not value.startswith("mcs_"):
        raise UnauthorizedError("no such session")
    return value


def refuse_in_url(query: bytes) -> None:
    """Raise UsageError (400) for a credential in the URL, where logs and histories keep it, or for a long query."""
    if not query:
        return
    if len(query) > _QUERY:
        raise UsageError(f"the query of the URL is longer than {_QUERY} bytes", "send the request without it")
    names = (unquote_to_bytes(part.partition(b"=")[0]).lower() for part in query.split(b"&"))
    if _SECRET.search(unquote_to_bytes(query)) or any(name in _IN_URL for name in names):
        raise UsageError("a token in the URL is not taken", "send it as a header: Authorization: Bearer …")


def token(headers: Headers) -> str | None:
    """The credential of a request: Authorization: Bearer, X-API-Key, or X-Session-ID; None where there is none.

    UsageError (400) for two of them. UnauthorizedError for another scheme.
    """
    found = [(name, value) for name, value in headers if name in _CREDENTIALS]
    if len(found) > 1:
        for name in _CREDENTIALS:
            header(found, name)  # each stands there once
        raise _two()
    if not found:
        return None
    name, value = found[0][0], found[0][1].decode("latin-1")
    if name != b"authorization":
        return _checked(name, value)
    scheme, _, rest = value.partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthorizedError("another scheme than Bearer")
    return rest.strip(" ")


def _two() -> UsageError:
    return UsageError("two credentials in one request", "send Authorization: Bearer … alone")


def without(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that are no credential."""
    return [one for one in headers if one[0] not in _CREDENTIALS]


_CREDENTIALS = (b"authorization", b"x-api-key", b"x-session-id")
_AS_TOKEN = (b"token", b"api_key")
IN_URL = {
    "/mcp": (*_AS_TOKEN, b"session_id"),
    "/sse": (*_AS_TOKEN, b"session_id"),
    "/messages": _AS_TOKEN,  # where session_id is the stream's
    "/messages/": _AS_TOKEN,
}
"""What a credential may be called in the URL, by path, where the config lets it stand there."""
_IN_URL = (b"token", b"access_token", b"api_key", b"apikey", b"authorization", b"bearer")
_SECRET = re.compile(rb"mc[a-z]_")


@dataclass(frozen=True)
class Gatekeeper:
    """Checks Host and Origin, and finds the client's address, by what the config allows."""

    hosts: frozenset[str]
    origins: frozenset[str]
    proxies: tuple[Network, ...]
    authority: str
    proxies_only: bool

    @classmethod
    def of(cls, settings: Settings, host: str, port: int, *, behind_proxy: bool) -> "Gatekeeper":
        """What is allowed for a server that listens there. Loopback's own names are, on loopback."""
        loopback = is_loopback(host)
        hosts = {name.lower() for name in settings.server.allowed_hosts}
        origins = set(settings.server.allowed_origins)
        if settings.server.public_url:
            url = urlsplit(settings.server.public_url)
            hosts.add(url.netloc.lower())
            if url.port is None:
                hosts.add(f"{url.netloc.lower()}:{443 if url.scheme == 'https' else 80}")
            origins.add(f"{url.scheme}://{url.netloc}")
        shown = f"[{host}]" if ":" in host else host
        names = {"localhost", "127.0.0.1", "[::1]", shown} if loopback else {shown}
        ports = ("", f":{port}") if port in (80, 443) else (f":{port}",)  # clients leave out a default port
        hosts |= {f"{name}{part}" for name in names for part in ports}
        if loopback:
            origins |= {f"{scheme}://{name}{part}" for scheme in _SCHEMES for name in names for part in ports}
        proxies = settings.server.trusted_proxies if behind_proxy else ()
        only = behind_proxy and not loopback and settings.server.tls.cert is None
        return cls(frozenset(hosts), frozenset(origins), proxies, f"{shown}:{port}", only)

    def check(self, headers: Headers) -> None:
        """Raise where Host or Origin is none of ours: another site's page, or a name that was bound to us."""
        host = header(headers, b"host")
        if host is None or host.lower() not in self.hosts:
            raise Error(
                f"Host {(host or '').rpartition('@')[2][:100]!r} is none of this server's",
                "add it to server.allowed_hosts",
                status=421,
            )
        origin = header(headers, b"origin")
        if origin is not None and origin not in self.origins:
            raise Error(
                f"Origin {origin[:100]!r} may not ask this server", "add it to server.allowed_origins", status=403
            )

    def address(self, headers: Headers, peer: str | None) -> str | None:
        """The client's address: the peer's, or, behind a trusted proxy, the last of X-Forwarded-For that is none.

        Where plain HTTP is spoken for a proxy's sake, nobody but the proxy is answered. UsageError (400) where a proxy
        says what is no address: its own may be allowed more than the client's.
        """
        peer = _as_one(peer)
        if self.proxies_only and (peer is None or not self._trusted(peer)):
            raise Error("only the proxies of server.trusted_proxies are answered here", status=403)
        if peer is None or not self._trusted(peer):
            return peer
        said = [value for key, value in headers if key == b"x-forwarded-for"]
        if not said:
            raise UsageError("the proxy sent no X-Forwarded-For", "have it name the client's address")
        hops = b",".join(said).decode("latin-1").rsplit(",", _HOPS)
        if len(hops) > _HOPS:
            raise UsageError(
                f"the proxy's X-Forwarded-For has more than {_HOPS} addresses", "have it send the client's"
            )
        for hop in map(_hop, reversed(hops)):
            if hop is None:
                raise UsageError("the proxy's X-Forwarded-For is no address", "have it send the client's address alone")
            if not self._trusted(hop):
                return hop
            peer = hop
        return peer

    def _trusted(self, address: str) -> bool:
        if not self.proxies:
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found.version == item.version and found in item for item in self.proxies)


@lru_cache(maxsize=4096)
def _as_one(address: str | None) -> str | None:
    """An address as it is called everywhere: in its shortest form, and IPv4 that came to an IPv6 socket is IPv4 (RFC
    4291, section 2.5.5.2)."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return address
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def _hop(text: str) -> str | None:
    """An address that a proxy names, also with brackets and a port; None for anything else. A scope id is any text, and
    says nothing here."""
    text = text.strip().strip('"')
    if found := re.fullmatch(r"\[([^]]*)\](:\d+)?|([\d.]+):\d+", text):
        text = found[1] or found[3] or ""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if "%" in text else _as_one(text)


def forwarded(headers: Headers) -> bool:
    """Whether a proxy had the request before us."""
    return any(_FORWARDING.search(key) for key, _ in headers)
