"""Sign-in by OAuth 2.1, where the server's 401 leads to an authorization server (MCP 2026-07-28, Authorization).

Discovery, registration, PKCE, the checks of state and issuer and the resource indicator are the official SDK's
(`mcp.client.auth`), whose flow we drive by hand: it would send the message itself, one at a time, and its responses
as a whole. What it lacks is here: renewal upon a 401, what a restart needs, the device flow (RFC 8628), and revocation
(RFC 7009). The SDK is imported when it is needed, since that takes longer than the rest of the bridge's start.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx2

from mcpctl.bridge.credentials import RefusedError
from mcpctl.bridge.kept import Kept
from mcpctl.bridge.remote import AwayError
from mcpctl.errors import ConfigError, Error

if TYPE_CHECKING:
    from mcpctl.bridge.flow import Flow

SIGNED_IN = "signed in"
PATIENCE = 600.0
"""Seconds for a person to sign in."""
_REST = 60.0
"""Seconds after a sign-in that failed before another window is opened: a client asks again at once."""
_EARLY = 30.0
"""Seconds before its end that a token is renewed; for a short-lived one a tenth of its life, if that is less."""
_AGAIN = 10.0
"""Seconds until that is tried again where the authorization server was away."""


@dataclass(frozen=True)
class Options:
    """How to sign in. `client_id`: of a client that the authorization server knows; `metadata_url`: of a Client ID
    Metadata Document; `device`: with a code on another device; `port`: where the browser comes back to, 0 for any."""

    client_id: str | None = None
    metadata_url: str | None = None
    device: bool = False
    port: int = 0


class SignIn:
    """A credential that is signed in for, kept, and renewed. `now`: seconds since the epoch."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        kept: Kept,
        options: Options,
        say: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._http = http
        self._kept = kept
        self._options = options
        self._say = say
        self._now = now
        self._lock = asyncio.Lock()
        self._failed: tuple[float, Error] | None = None
        self._not_before = 0.0
        self._record = kept.read() or {}

    @property
    def _token(self) -> str | None:
        if "bearer" in self._record:
            return str(self._record["bearer"])
        found = self._record.get("tokens", {}).get("access_token")
        return found if isinstance(found, str) else None

    async def bearer(self) -> str | None:
        """The token. One that is about to end is renewed first; where that cannot be, it is tried all the same."""
        if self._ending():
            async with self._lock:
                if self._ending():
                    await self._renew_early()
        return self._token

    def _ending(self) -> bool:
        ends, life = self._record.get("expires_at"), self._record.get("tokens", {}).get("expires_in") or 0
        if ends is None or not self._renewable():
            return False
        return bool(self._now() >= max(ends - min(_EARLY, life / 10), self._not_before))

    def _renewable(self) -> bool:
        return bool(self._record.get("tokens", {}).get("refresh_token"))

    async def _renew_early(self) -> None:
        used = self._token
        async with self._kept.alone():
            if self._by_another(used):
                return
            flow = self._flow()
            try:
                if await flow.renew(self._record):
                    self._keep(flow)
                    return
            except Error as problem:
                self._say(f"the sign-in could not be renewed: {problem.message}")
        self._not_before = self._now() + _AGAIN

    def _by_another(self, used: str | None) -> bool:
        """Whether another bridge, which shares what is kept, has another token by now."""
        found = self._kept.read()
        if found is not None:
            self._record = found
        return self._token is not None and self._token != used

    def rotated(self, used: str | None) -> bool:
        try:
            return self._by_another(used)
        except Error:  # it is told when the token itself is refused
            return False

    async def another(self, used: str | None, refused: httpx2.Response) -> None:
        """Renew the token that was refused, or sign in anew. Raises Error. It goes on when the call that needs it is
        cancelled: a client waits less long than a person needs."""
        await asyncio.shield(asyncio.ensure_future(self._another(used, refused)))

    async def _another(self, used: str | None, refused: httpx2.Response) -> None:
        async with self._lock:
            if self._token != used and self._token is not None:
                return
            if self._failed is not None and self._now() - self._failed[0] < _REST:
                raise self._failed[1]
            if "bearer" in self._record:
                raise RefusedError(
                    "the server does not take the token that is kept for it: it is wrong, has expired, or was revoked",
                    f"`mcpctl connect {self._kept.url} --keep-token` keeps a new one",
                )
            try:
                async with self._kept.alone():
                    if not self._by_another(used):
                        await self._anew(refused)
            except AwayError:
                raise
            except Error as problem:
                self._failed = (self._now(), problem)
                raise

    async def _anew(self, refused: httpx2.Response) -> None:
        flow = self._flow()
        if refused.status_code == 401 and self._renewable() and await flow.renew(self._record):
            self._keep(flow)
            return
        await flow.sign_in(self._record, refused)
        self._keep(flow)
        self._say(SIGNED_IN)

    def _flow(self) -> "Flow":
        from mcpctl.bridge.flow import Flow

        return Flow(self._kept.url, self._http, self._options, self._say)

    def _keep(self, flow: "Flow") -> None:
        self._record = flow.record(self._now())
        self._failed = None
        self._kept.write(self._record)


async def sign_out(http: httpx2.AsyncClient, kept: Kept, options: Options, say: Callable[[str], None]) -> bool:
    """End the sign-in there, and forget it here; False where there was none. Raises Error where the authorization
    server did not confirm it: it is forgotten all the same. So is what cannot be read any more."""
    from mcpctl.bridge.flow import Flow

    async with kept.alone():
        try:
            record = kept.read() or {}
        except ConfigError as problem:
            say(problem.message)
            record = {}
        found = kept.forget()
    if record.get("tokens"):
        await Flow(kept.url, http, options, say).revoke(record)
    return found
