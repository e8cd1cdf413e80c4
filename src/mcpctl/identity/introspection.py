"""Asking an issuer whether a token is good, and whose it is (RFC 7662)."""

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from mcpctl import private_file
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import ConfigError, UnauthorizedError, UnavailableError
from mcpctl.identity.fetching import Fetcher
from mcpctl.identity.jwks import IssuerKeys

_AT_ONCE = 8
_WAITING = 64
_DEAD = "its issuer says that it is not active"
_DEAD_FOR = timedelta(seconds=30)
"""For which that is believed: whoever shows a dead token again and again troubles the issuer no more."""
_MOST = 10_000
_NEVER = datetime.min.replace(tzinfo=UTC)
"""Beyond these a token is answered 503: a stranger who makes up tokens must not reach the issuer through us."""


class Introspection:
    """Asks one issuer, as the client that it knows us as. Raises ConfigError where our secret cannot be read."""

    def __init__(self, config: Oidc, keys: IssuerKeys, fetcher: Fetcher, now: Callable[[], datetime]) -> None:
        if config.introspection.client_id is None or config.introspection.client_secret_file is None:
            hint = "docs/identity-provider.md says how"
            raise ConfigError("introspection needs client_id and client_secret_file", hint)
        self._issuer = config.issuer
        self._client = config.introspection.client_id
        self._secret = _secret(config.introspection.client_secret_file)
        self._keys = keys
        self._fetcher = fetcher
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0
        self._now = now
        self._dead: dict[bytes, datetime] = {}

    async def ask(self, token: str) -> dict[str, Any]:
        """The claims of a token that is good now; UnauthorizedError for one that is not, UnavailableError where the
        issuer cannot be asked."""
        digest = hashlib.sha256(token.encode()).digest()
        if self._now() < self._dead.get(digest, _NEVER):
            raise UnauthorizedError(_DEAD)
        if self._waiting >= _WAITING:
            raise UnavailableError(f"the issuer {self._issuer} is being asked about too many tokens", "try again")
        self._waiting += 1
        try:
            async with self._slots:
                found = await self._answer(token)
        finally:
            self._waiting -= 1
        if found.get("active") is False:
            while len(self._dead) >= _MOST:
                del self._dead[next(iter(self._dead))]
            self._dead[digest] = self._now() + _DEAD_FOR
            raise UnauthorizedError(_DEAD)
        if found.get("active") is not True:
            raise UnavailableError(f"the issuer {self._issuer} does not say whether a token is active (RFC 7662)")
        return {"iss": self._issuer, **found}

    async def _answer(self, token: str) -> dict[str, Any]:
        try:
            url = await self._keys.endpoint("introspection_endpoint")
            form = {"token": token, "token_type_hint": "access_token"}
            return await self._fetcher.post(url, form, self._client, self._secret)
        except UnavailableError as problem:
            if problem.message.startswith("cannot reach"):
                raise
            raise UnavailableError(f"cannot reach the issuer {self._issuer}: {problem.message}", problem.hint) from None


def _secret(path: Any) -> str:
    """The secret in a 0600 file."""
    found = private_file.read(path, limit=4096).data.decode("utf-8", "replace").strip()
    if not found:
        raise ConfigError(f"{path} is empty", "put the client's secret into it, and nothing else")
    return found
