"""A presented credential → Principal, or a refusal with its reason.

The order is that of the cost, so that a stranger costs little: form and checksum (no hash), a known id (no hash),
the remembered digest (one keyed BLAKE2), and only then Argon2id, on a thread, and limited per id and address.
"""

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from time import monotonic

from mcpctl.errors import Error, UnauthorizedError, UnavailableError
from mcpctl.identity import tokens, users
from mcpctl.identity.principal import Principal
from mcpctl.identity.tokens import Token

WRONG_SECRETS = 10
"""Wrong secrets that one address may try on one id in WINDOW before it is answered 429 without a hash."""
WINDOW = 900.0
_REMEMBERED_OFFENDERS = 10_000


class _Attempts:
    """Wrong secrets by (id, address), bounded; the clock is passed in."""

    def __init__(self) -> None:
        self._failed: OrderedDict[tuple[str, str], list[float]] = OrderedDict()

    def wait(self, who: tuple[str, str], now: float) -> float:
        """Seconds until this one may try again; 0 for now."""
        times = [when for when in self._failed.get(who, ()) if now - when < WINDOW]
        if not times:
            self._failed.pop(who, None)
        return 0.0 if len(times) < WRONG_SECRETS else WINDOW - (now - times[-WRONG_SECRETS])

    def failed(self, who: tuple[str, str], now: float) -> None:
        self._failed.setdefault(who, []).append(now)
        self._failed[who] = self._failed[who][-WRONG_SECRETS:]
        self._failed.move_to_end(who)
        while len(self._failed) > _REMEMBERED_OFFENDERS:
            self._failed.popitem(last=False)


class Authenticator:
    """Knows the token and user files, and which texts have been verified against which entry.

    `ended` is called with {id: why} for the tokens in use that a reload found gone, revoked or changed, before the
    request that noticed is answered. In use is what has been let in and not ended since.
    """

    def __init__(
        self,
        token_path: Path,
        user_path: Path,
        *,
        now: Callable[[], datetime] = tokens.utcnow,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.tokens = tokens.token_file(token_path)
        self.users = users.user_file(user_path)
        self.ended: Callable[[dict[str, str]], None] = lambda ids: None
        self._now = now
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._known: dict[str, tuple[bytes, Token, Principal]] = {}
        self._seen: dict[str, Token] = {}
        self._people: Mapping[str, users.User] = {}
        self._active: set[str] = set()
        self._versions = (-1, -1)
        self._attempts = _Attempts()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="argon2")

    def close(self) -> None:
        """Stop the hashing thread."""
        self._hashing.shutdown(wait=False, cancel_futures=True)

    def refresh(self) -> None:
        """Take note of what the files say now. Raises UnavailableError while one is broken (law 3: fail closed)."""
        try:
            entries = self.tokens.current()
            people = self.users.current()
        except Error as problem:
            raise UnavailableError(problem.message, problem.hint) from None
        versions = (self.tokens.version, self.users.version)
        if versions == self._versions:
            return
        before, self._seen, self._versions, self._people = self._seen, dict(entries), versions, people
        for name, old in before.items():
            if entries.get(name) is not old:
                self._known.pop(name, None)
        over = {name: reason for name in self._active if (reason := self._why_over(before.get(name), entries.get(name)))}
        for name in over:
            self._active.discard(name)
        if over:
            self.ended(over)

    def _why_over(self, old: Token | None, new: Token | None) -> str | None:
        """Why what a token has open must end, now that its entry is `new`; None where it need not."""
        if new is None:
            return "removed"
        if new.revoked_at is not None and new.revoked_at <= self._now():
            return "revoked"
        if new.user is not None and new.user not in self._people:
            return "its user is gone"
        if old is not None and old is not new and _rights(old) != _rights(new):
            return "changed"
        return None

    def expired(self) -> list[str]:
        """Ids of tokens in use whose time is over; each is told once."""
        now = self._now()
        over = [name for name in self._active if self._seen[name].status(now) in ("expired", "revoked")]
        self._active.difference_update(over)
        for name in over:
            self._known.pop(name, None)
        return over

    def still_valid(self, principal: Principal) -> bool:
        """Whether a principal still has what it had: its token lives, with the same secret, user and limits."""
        if principal.token is None:
            return True
        token = self._seen.get(principal.token)
        return (
            token is not None
            and token.status(self._now()) not in ("expired", "revoked")
            and (token.user is None or token.user in self._people)
            and _principal(replace(token, expires_at=principal.expires_at)) == principal
        )

    def next_expiry(self) -> float | None:
        """Seconds until the next token in use expires; None when none does."""
        ends = [end for name in self._active if (end := self._seen[name].expires_at) is not None]
        return max(0.0, (min(ends) - self._now()).total_seconds()) if ends else None

    async def authenticate(self, text: str, address: str | None) -> Principal:
        """The principal of a bearer token, or UnauthorizedError with the reason, for the log alone."""
        self.refresh()
        name = tokens.token_id(text)
        if name is None:
            raise UnauthorizedError("not one of our tokens: form or checksum is wrong")
        token = self._seen.get(name)
        if token is None:
            raise UnauthorizedError("no such token id", token_id=name)
        digest = hashlib.blake2b(text.encode("ascii"), key=self._key).digest()
        known = self._known.get(name)
        if known is None or known[1] is not token or not secrets.compare_digest(known[0], digest):
            await self._verify(token, text, address)
            if self._seen.get(name) is not token:  # changed while the hash was computed
                return await self.authenticate(text, address)
            known = self._known[name] = (digest, token, _principal(token))
        self._check(token, address)
        self._active.add(name)
        return known[2]

    async def _verify(self, token: Token, text: str, address: str | None) -> None:
        who = (token.id, address or "")
        wait = self._attempts.wait(who, self._clock())
        if wait > 0:
            raise UnauthorizedError(
                "too many wrong secrets", token_id=token.id, status=429, retry_after=int(wait) + 1
            )
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._hashing, tokens.matches, token, text):
            self._attempts.failed(who, self._clock())
            raise UnauthorizedError("wrong secret", token_id=token.id)

    def _check(self, token: Token, address: str | None) -> None:
        status = token.status(self._now())
        if status in ("expired", "revoked"):
            raise UnauthorizedError(f"the token is {status}", token_id=token.id)
        if token.user is not None and token.user not in self._people:
            raise UnauthorizedError(f"its user {token.user} is gone", token_id=token.id)
        if not tokens.allows_address(token, address):
            raise UnauthorizedError(f"not from this address ({address})", token_id=token.id)


def _rights(token: Token) -> tuple[object, ...]:
    return (token.hash, token.user, token.databases, token.permissions, token.allow_ips)


def _principal(token: Token) -> Principal:
    return Principal(
        token=token.id,
        user=token.user,
        pool=hashlib.sha256(token.hash.encode()).hexdigest(),
        databases=token.databases,
        permissions=token.permissions,
        expires_at=token.expires_at,
    )
