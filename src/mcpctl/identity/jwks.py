"""An issuer's metadata and keys: found, checked, kept, and fetched again when they are old or one is unknown.

OpenID Connect Discovery 1.0, section 4; RFC 8414, section 3; RFC 7517.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import InvalidKeyError

from mcpctl.errors import Error, UnauthorizedError, UnavailableError
from mcpctl.identity.fetching import Fetcher, NotThereError

SPACING = timedelta(seconds=30)
"""Between two tries to fetch, whoever asks: a stranger can make up key ids without end."""
GRACE = timedelta(hours=1)
"""How long keys are used beyond their time while the issuer cannot be asked. It makes no new tokens then, and those it
made live for an hour at most as a rule; longer would only help who keeps us from hearing that a key was withdrawn."""
_PATIENCE = 1.0
"""Seconds to wait for new keys while the old ones can still be used."""
_MOST_KEYS = 100
_RSA_BITS = range(2048, 8193)
"""RFC 7518, section 3.3, has the least. The most keeps a check from taking milliseconds."""
_PRIVATE = frozenset(("d", "p", "q", "k"))


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the one algorithm that it may be used with (RFC 8725, section 3.1)."""

    algorithm: str
    public: Any


@dataclass(frozen=True, slots=True)
class _Known:
    at: datetime
    metadata: Mapping[str, Any]
    keys: Mapping[str, Key]


class IssuerKeys:
    """What one issuer says of itself. All of a process's callers share it; `lifetime` is how long its keys hold."""

    def __init__(
        self,
        issuer: str,
        algorithms: Collection[str],
        lifetime: timedelta,
        fetcher: Fetcher,
        now: Callable[[], datetime],
    ) -> None:
        self._issuer = issuer
        self._algorithms = algorithms
        self._lifetime = lifetime
        self._fetcher = fetcher
        self._now = now
        self._known: _Known | None = None
        self._failure: Error | None = None
        self._tried: datetime | None = None
        self._running: asyncio.Task[None] | None = None

    async def find(self, key_id: str, algorithm: str) -> Key:
        """The key of that id. UnauthorizedError where the issuer has none, or one for another algorithm;
        UnavailableError where we cannot know."""
        key = (await self._current()).keys.get(key_id)
        if key is None:
            await self._renew()
            key = self._usable().keys.get(key_id)
        if key is None and self._failure is not None:
            raise self._down(self._failure)
        if key is None:
            raise UnauthorizedError("its issuer has no key of its key id")
        if key.algorithm != algorithm:
            raise UnauthorizedError(f"it says {algorithm}, and its key is for {key.algorithm}")
        return key

    async def endpoint(self, name: str) -> str:
        """The address that the metadata has under that name; UnavailableError where there is none."""
        found = (await self._current()).metadata.get(name)
        if not isinstance(found, str):
            raise UnavailableError(f"the issuer {self._issuer} names no {name}", "it may have none: then leave it out")
        return found

    async def count(self) -> int:
        """How many keys of its that we can use the issuer has; UnavailableError where it cannot be asked."""
        return len((await self._current()).keys)

    async def close(self) -> None:
        """End what is being fetched."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    def age(self) -> timedelta | None:
        """How long ago the keys were fetched; None where they never were."""
        return None if self._known is None else abs(self._now() - self._known.at)

    async def _current(self) -> _Known:
        age = self.age()
        if age is None or age >= self._lifetime:
            await self._renew(_PATIENCE if age is not None and age < self._lifetime + GRACE else None)
        return self._usable()

    def _usable(self) -> _Known:
        age = self.age()
        if self._known is not None and age is not None and age < self._lifetime + GRACE:
            return self._known
        raise self._down(self._failure)

    def _down(self, why: Error | None) -> UnavailableError:
        """A new error each time: one that is raised again and again would keep every place where it was."""
        if why is None:
            return UnavailableError(f"the issuer {self._issuer} was not asked yet", "try again")
        return UnavailableError(why.message, why.hint)

    async def _renew(self, patience: float | None = None) -> None:
        """Fetch all of it, unless that was tried a moment ago; whoever comes meanwhile waits for the same answer."""
        if self._running is None:
            now = self._now()
            if self._tried is not None and timedelta(0) <= now - self._tried < SPACING:
                return
            self._tried = now
            self._running = asyncio.ensure_future(self._fetch())
            self._running.add_done_callback(self._ended)
        done, _ = await asyncio.wait({self._running}, timeout=patience)  # who gives up ends it for nobody else
        for task in done:
            task.result()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running = None

    async def _fetch(self) -> None:
        try:
            metadata = await self._metadata()
            keys = usable(await self._fetcher.get(metadata["jwks_uri"]), self._algorithms)
        except (Error, ValueError) as problem:
            hint = problem.hint if isinstance(problem, Error) else None
            self._failure = UnavailableError(f"cannot reach the issuer {self._issuer}: {problem}", hint)
            return
        self._known = _Known(self._now(), metadata, keys)
        wanted = ", ".join(self._algorithms)
        self._failure = None if keys else UnavailableError(f"the issuer {self._issuer} has no key for {wanted}")

    async def _metadata(self) -> dict[str, Any]:
        """Raises ValueError where it is not that issuer's own (RFC 8414, section 3.3)."""
        first, second = well_known(self._issuer)
        try:
            found = await self._fetcher.get(first)
        except NotThereError:
            found = await self._fetcher.get(second)
        if found.get("issuer") != self._issuer:
            raise ValueError(f"its metadata names another issuer, {str(found.get('issuer'))[:200]!r}")
        if not isinstance(found.get("jwks_uri"), str):
            raise ValueError("its metadata names no jwks_uri")  # noqa: TRY004
        return found


def well_known(issuer: str) -> tuple[str, str]:
    """Where its metadata is: by OpenID Connect Discovery 1.0, section 4, or else by RFC 8414, section 3.1."""
    parts = urlsplit(issuer)
    path = parts.path.rstrip("/")
    origin = f"{parts.scheme}://{parts.netloc}"
    return f"{origin}{path}/.well-known/openid-configuration", f"{origin}/.well-known/oauth-authorization-server{path}"


def usable(found: Mapping[str, Any], algorithms: Collection[str]) -> dict[str, Key]:
    """The keys of a key set (RFC 7517) that can check what we take, by their ids. What is for encryption, symmetric,
    weak or broken is left out; ValueError for what is no key set, or has two such keys of one id."""
    listed = found.get("keys")
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise ValueError(f"its keys are no list, or more than {_MOST_KEYS}")
    keys: dict[str, Key] = {}
    for one in listed:
        key = _key(one) if isinstance(one, dict) else None
        if key is None or key.algorithm not in algorithms:
            continue
        if one["kid"] in keys:
            raise ValueError("it has two keys of one id")
        keys[one["kid"]] = key
    return keys


def _key(jwk: dict[str, Any]) -> Key | None:
    operations = jwk.get("key_ops", ["verify"])
    for_us = jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations
    if not for_us or not isinstance(jwk.get("kid"), str) or not jwk["kid"] or _PRIVATE & jwk.keys():
        return None  # whose private half is published is anybody's
    try:
        key = _public(jwk)
    except (InvalidKeyError, ValueError, TypeError, KeyError):
        return None
    return key if key is not None and jwk.get("alg", key.algorithm) == key.algorithm else None


def _public(jwk: dict[str, Any]) -> Key | None:
    kind = jwk.get("kty"), jwk.get("crv")
    if kind == ("EC", "P-256"):
        return Key("ES256", ECAlgorithm.from_jwk(jwk))
    if kind == ("OKP", "Ed25519"):
        return Key("EdDSA", OKPAlgorithm.from_jwk(jwk))
    if kind[0] != "RSA" or len(jwk["n"]) > _RSA_BITS.stop:
        return None
    public: Any = RSAAlgorithm.from_jwk(jwk)
    return Key("RS256", public) if public.key_size in _RSA_BITS and public.public_numbers().e < 2**32 else None
