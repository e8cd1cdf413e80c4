"""Client ID Metadata Documents: a client is known by the https URL of a document that describes it
(draft-ietf-oauth-client-id-metadata-document-02; the MCP authorization specification, "Client Registration").

A stranger names the URL, so it is not asked before it is known where that leads (section 8.6): the host is resolved
once, each of its addresses has to be public, the connection goes to the address that was looked at, and the certificate
has to be the host's. No redirect, no other port, a few KiB and seconds, and a few at once.
"""

import asyncio
import ipaddress
import re
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import httpx2

from mcpctl.config_values import Network
from mcpctl.errors import Error, UnavailableError
from mcpctl.identity import oauth_clients, strict_json, tokens
from mcpctl.identity.oauth_clients import Client
from mcpctl.lookups import Lookups

LARGEST = 16 << 10
"""Bytes. The draft recommends 5 KiB (section 8.7); ours has room for long lists of redirect URIs."""
SECONDS = 5.0
"""For all of it, the resolving too."""
AT_ONCE, WAITING = 16, 64
_SHORTEST, _LONGEST = timedelta(minutes=5), timedelta(hours=24)
"""How long a document is remembered, whatever its headers say: a flow asks for it several times, and we are not to be
used to ask others a thousand times."""
_REMEMBERED = 500
_URL = re.compile(
    r"https://[a-z0-9.-]+(:[0-9]{1,5})?/[A-Za-z0-9._~/!$&'()*+,;=:@%-]+(\?[A-Za-z0-9._~/?!$&'()*+,;=:@%-]*)?"
)
_EMBEDDING = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10"))
)
"""IPv6 that leads to an IPv4 address which it holds (NAT64, 6to4, Teredo), or is out of use."""
_MAX_AGE = re.compile(r"(?:^|[,\s])(?:s-maxage|max-age)=\"?([0-9]{1,9})")
Resolve = Callable[[str, int], Awaitable[list[str]]]

_NO_WAY = (
    "tell the administrator: this server has to reach the client's host; where it cannot, "
    "auth.oauth.metadata_documents: false has clients register instead"
)


class DocumentError(Error):
    """A client's document is not there, or cannot be believed."""

    status = 400


@dataclass(frozen=True, slots=True)
class _Kept:
    client: Client
    until: datetime


def is_url(client_id: str) -> bool:
    """Whether a client_id is the URL of a document."""
    return client_id.startswith("https://")


class Documents:
    """Fetches clients' documents. `allow` are networks that are asked although they are not public."""

    def __init__(
        self,
        allow: Sequence[Network] = (),
        schemes: Sequence[str] = (),
        now: Callable[[], datetime] = tokens.utcnow,
        resolve: Resolve | None = None,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self._allow = allow
        self._schemes = schemes
        self._now = now
        self._resolve = resolve or Lookups()
        self._trusted = trusted
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def find(self, url: str) -> Client:
        """The client that the document at `url` describes. Raises DocumentError."""
        kept = self._kept.get(url)
        if kept is not None and kept.until > self._now():
            self._kept.move_to_end(url)
            return kept.client
        host, port = _checked(url)
        if self._waiting >= WAITING:
            raise DocumentError("too many clients' documents are being read", "try again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(SECONDS), self._turn:
                return await self._fetch(url, host, port)
        except TimeoutError:
            raise DocumentError(f"no answer within {SECONDS:g} s", _NO_WAY) from None
        finally:
            self._waiting -= 1

    async def _fetch(self, url: str, host: str, port: int) -> Client:
        address = await self._public(host, port)
        authority = urlsplit(url).netloc
        there = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        client = httpx2.AsyncClient(
            verify=self._authorities(),
            trust_env=False,  # a proxy of the environment's would resolve the host again
            follow_redirects=False,
            timeout=SECONDS,
        )
        async with client:
            request = client.build_request(
                "GET",
                f"https://{there}{url.removeprefix(f'https://{authority}')}",
                headers={"Host": authority, "Accept": "application/json", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
            )
            try:
                answer = await client.send(request, stream=True)
                try:
                    body = await _body(answer)
                finally:
                    await answer.aclose()
            except (httpx2.HTTPError, httpx2.StreamError, OSError) as problem:
                raise DocumentError(f"it cannot be read: {type(problem).__name__}", _NO_WAY) from None
        found = _read(url, host, body, self._schemes)
        self._keep(url, found, answer.headers.get("cache-control", ""))
        return found

    def _authorities(self) -> ssl.SSLContext:
        """Whom to believe: reading the system's list takes a hundredth of a second."""
        self._trusted = self._trusted or ssl.create_default_context()
        return self._trusted

    async def _public(self, host: str, port: int) -> str:
        """The address to connect to, if all that the host has are public."""
        try:
            addresses = await self._resolve(host, port)
        except UnavailableError as problem:
            raise DocumentError(problem.message, problem.hint) from None
        except (OSError, UnicodeError):  # the second: a label that is empty or too long (RFC 1035, section 2.3.4)
            addresses = []
        if not addresses:
            raise DocumentError("its host cannot be found", _NO_WAY)
        named = [ipaddress.ip_address(one) for one in addresses]
        allowed = [any(one.version == net.version and one in net for net in self._allow) for one in named]
        if not all(ok or is_public(one) for ok, one in zip(allowed, named, strict=True)):
            raise DocumentError("its host is not on the public network")
        if port != 443 and not all(allowed):
            raise DocumentError("its port is not 443")
        return addresses[0]

    def _keep(self, url: str, client: Client, said: str) -> None:
        found = _MAX_AGE.search(said.lower())
        age = timedelta(seconds=int(found[1])) if found and "no-store" not in said.lower() else timedelta()
        self._kept[url] = _Kept(client, self._now() + min(max(age, _SHORTEST), _LONGEST))
        self._kept.move_to_end(url)
        while len(self._kept) > _REMEMBERED:
            self._kept.popitem(last=False)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the public network, and leads to no other by a detour."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.scope_id is not None or any(address in net for net in _EMBEDDING):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _checked(url: str) -> tuple[str, int]:
    """(host, port) of a URL that may be a client_id (section 3), or DocumentError."""
    if len(url) > 500 or not _URL.fullmatch(url):
        raise DocumentError("its client_id is no https URL with a path, in its plainest form")
    parts = urlsplit(url)
    host, _, named = parts.netloc.partition(":")
    port = int(named or 443)
    if any(part in (".", "..") for part in parts.path.lower().replace("%2e", ".").split("/")):
        raise DocumentError("its client_id has dots for a part of its path")
    if not 0 < port < 65536:
        raise DocumentError("its client_id has a port that is none")
    if host.endswith(".") or re.fullmatch(r"[0-9.]+|.*\.(0x)?[0-9a-f]*[0-9]", host):
        raise DocumentError("its client_id names no host, but an address")
    return host, port


async def _body(answer: httpx2.Response) -> bytes:
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if answer.status_code != 200:
        redirects = ", a redirect, which is not followed" if 300 <= answer.status_code < 400 else ""
        raise DocumentError(f"it is answered with status {answer.status_code}{redirects}")
    if kind != "application/json" and not kind.endswith("+json"):
        raise DocumentError("it is not said to be JSON")
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise DocumentError("it is packed, which was not asked for")
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        if len(body) > LARGEST:
            raise DocumentError(f"it is larger than {LARGEST} bytes")
    return bytes(body)


def _read(url: str, host: str, body: bytes, schemes: Sequence[str]) -> Client:
    try:
        said = strict_json.read(body)
    except ValueError as problem:
        raise DocumentError(f"it {problem}") from None
    if said.get("client_id") != url:
        raise DocumentError("its client_id is not its URL")
    if "client_secret" in said or said.get("token_endpoint_auth_method", "none") != "none":
        raise DocumentError("it wants another token_endpoint_auth_method than none")
    if not said.get("client_name"):
        raise DocumentError("it has no client_name")
    try:
        name, redirects, renews = oauth_clients.read(said, schemes)
    except oauth_clients.MetadataError as problem:
        raise DocumentError(problem.message) from None
    return Client(url, name, redirects, host=host, renews=renews)
