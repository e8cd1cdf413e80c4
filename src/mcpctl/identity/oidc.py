"""OpenID Connect as a resource server: the text of a token → whom its issuer vouches for.

Nothing is fetched before the first token comes, so a server starts while its issuer is down. A token that cannot be
good is an UnauthorizedError (401); that an issuer cannot be asked is an UnavailableError (503), and says nothing about
the token.
"""

import contextlib
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from mcpctl.config_sign_in import Oidc
from mcpctl.errors import ConfigError, Error, UnauthorizedError
from mcpctl.identity import signed
from mcpctl.identity.claims import Outside, outside
from mcpctl.identity.fetching import SECONDS, Fetcher
from mcpctl.identity.introspection import Introspection
from mcpctl.identity.jwks import IssuerKeys

REMEMBERED = timedelta(seconds=60)
"""How long an answer is kept at most. What the issuer takes away can be told no later than that where it is asked."""
_MOST = 10_000
_OPAQUE = re.compile(r"[A-Za-z0-9._~+/-]{16,4096}=*")
"""RFC 6750, section 2.1, and not so short that it could be guessed."""
_OURS = re.compile(r"mc[a-z]_[0-9a-z]{8}_", re.IGNORECASE)
"""What is one of mcpctl's own tokens, or was meant to be: those are never shown to an issuer."""


@dataclass(frozen=True, slots=True)
class _Issuer:
    name: str
    config: Oidc
    keys: IssuerKeys
    introspection: Introspection | None
    fetcher: Fetcher

    def asked_about(self, kind: str) -> Introspection | None:
        """Who is asked about such tokens, `jwt` or `opaque`; None for nobody."""
        return self.introspection if self.config.introspection.tokens in (kind, "all") else None


class Issuers:
    """All issuers of the config. One for a process, used on one event loop; `close` it at the end."""

    def __init__(self, config: Mapping[str, Oidc], now: Callable[[], datetime], *, seconds: float = SECONDS) -> None:
        self._now = now
        self._by_url = {str(one.issuer): _made(name, one, now, seconds) for name, one in config.items()}
        self._for_opaque = next((one for one in self._by_url.values() if one.asked_about("opaque")), None)
        self._known: dict[bytes, tuple[datetime, Outside]] = {}
        self._edition = 0

    def takes(self, text: str) -> bool:
        """Whether such a text is for one of them to judge, and for nobody else."""
        if not self._by_url:
            return False
        if signed.is_jwt(text):  # its signature may spell anything; no issuer sees it that has not signed it
            return True
        return self._for_opaque is not None and _OPAQUE.fullmatch(text) is not None and not _OURS.search(text)

    def known(self, text: str) -> Outside | None:
        """Whom a text was found to stand for within the last minute; None where it has to be looked at."""
        found = self._known.get(_digest(text))
        if found is None:
            return None
        until, who = found
        now = self._now()
        return who if until - REMEMBERED <= now < min(until, who.expires_at) else None

    async def verify(self, text: str) -> Outside:
        """Whom a token stands for. Raises UnauthorizedError, UnavailableError."""
        if (known := self.known(text)) is not None:
            return known
        if not self.takes(text):
            raise UnauthorizedError("it is a token of no issuer of the config")
        edition, now = self._edition, self._now()
        issuer, found = await (self._of_jwt(text) if signed.is_jwt(text) else self._of_opaque(text))
        lifetime = timedelta(seconds=issuer.config.introspection.cache) if issuer.introspection else REMEMBERED
        if edition == self._edition:
            self._remember(text, now + lifetime, found)
        return found

    async def _of_jwt(self, text: str) -> tuple[_Issuer, Outside]:
        token = signed.read(text)
        named = token.claims.get("iss")
        issuer = self._by_url.get(named) if isinstance(named, str) else None
        if issuer is None:
            raise UnauthorizedError(f"its issuer (iss) is none of the config: {str(named)[:200]!r}")
        if token.algorithm not in issuer.config.algorithms:
            raise UnauthorizedError(f"{issuer.name}: its alg is none of {', '.join(issuer.config.algorithms)}")
        try:
            signed.check(token, await issuer.keys.find(token.key_id, token.algorithm))
            found = outside(issuer.name, issuer.config, token.claims, self._now(), access=token.access)
            if asked := issuer.asked_about("jwt"):
                fresh = {**token.claims, **await asked.ask(text)}
                found = _same(found, outside(issuer.name, issuer.config, fresh, self._now(), access=True))
        except UnauthorizedError as problem:
            raise UnauthorizedError(f"{issuer.name}: {problem.message}", proven=problem.proven) from None
        return issuer, found

    async def _of_opaque(self, text: str) -> tuple[_Issuer, Outside]:
        issuer = self._for_opaque
        asked = issuer.asked_about("opaque") if issuer is not None else None
        if issuer is None or asked is None:
            raise UnauthorizedError("it is no JWT")
        try:
            claims = await asked.ask(text)
            return issuer, outside(issuer.name, issuer.config, claims, self._now(), access=True)
        except UnauthorizedError as problem:
            raise UnauthorizedError(f"{issuer.name}: {problem.message}", proven=problem.proven) from None

    def _remember(self, text: str, until: datetime, found: Outside) -> None:
        while len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[_digest(text)] = until, found

    async def tried(self) -> int:
        """Ask all issuers, as the first token would: how many keys they have together. A client of ours that is to ask
        about tokens asks about one that nobody has. Raises UnavailableError."""
        count = 0
        for issuer in self._by_url.values():
            count += await issuer.keys.count()
            if issuer.introspection is not None:
                with contextlib.suppress(UnauthorizedError):  # it is not active, and we may ask
                    await issuer.introspection.ask(secrets.token_urlsafe(32))
        return count

    def forget(self) -> None:
        """Look at every token anew."""
        self._edition += 1
        self._known.clear()

    async def close(self) -> None:
        """End what is asked, and let go of the connections."""
        for issuer in self._by_url.values():
            await issuer.keys.close()
            await issuer.fetcher.close()


def _made(name: str, config: Oidc, now: Callable[[], datetime], seconds: float) -> _Issuer:
    try:
        fetcher = Fetcher(config.ca_file, http_on_loopback=config.allow_http_loopback, seconds=seconds)
        lifetime = timedelta(seconds=config.jwks_cache)
        keys = IssuerKeys(str(config.issuer), config.algorithms, lifetime, fetcher, now)
        asked = Introspection(config, keys, fetcher, now) if config.introspection.client_id is not None else None
    except Error as problem:
        raise ConfigError(f"auth.oidc.{name}: {problem.message}", problem.hint) from None
    return _Issuer(name, config, keys, asked, fetcher)


def _same(before: Outside, after: Outside) -> Outside:
    if before.subject != after.subject:
        raise UnauthorizedError("its issuer says that it is somebody else's")
    return after


def _digest(text: str) -> bytes:
    """Of the whole of it: what two tokens have in common says nothing."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
