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
from datetime import datetime
from pathlib import Path
from time import monotonic

from mcpctl.errors import Error, UnauthorizedError, UnavailableError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.principal import Principal
from mcpctl.identity.tenants import Tenant
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
        tenant_path: Path | None = None,
        *,
        now: Callable[[], datetime] = tokens.utcnow,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.tokens = tokens.token_file(token_path)
        self.users = users.user_file(user_path)
        self.tenants = tenants.tenant_file(tenant_path or user_path.with_name("tenants.yaml"))
        self.ended: Callable[[dict[str, str]], None] = lambda ids: None
        self._now = now
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._known: dict[str, tuple[bytes, Principal]] = {}
        self._seen: dict[str, Token] = {}
        self._editions: dict[str, int] = {}
        self._edition = 0
        self._verifying: dict[str, asyncio.Lock] = {}
        self._people: Mapping[str, users.User] = {}
        self._active: set[str] = set()
        self._places: Mapping[str, Tenant] = {}
        self._alone: frozenset[str] = frozenset()
        self._versions = (-1, -1, -1)
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
            places = self.tenants.current()
        except Error as problem:
            raise UnavailableError(problem.message, problem.hint) from None
        versions = (self.tokens.version, self.users.version, self.tenants.version)
        if versions == self._versions:
            return
        before, self._seen, self._versions = self._seen, dict(entries), versions
        narrowed = self._note_people(people, places)
        for name, old in before.items():
            new = entries.get(name)
            why = narrowed.get(new.user or "") if new is not None else None
            if new is old and why is None:
                continue
            if new is None or new.rights != old.rights or why is not None:
                self._known.pop(name, None)
                self._edition += 1
                self._editions[name] = self._edition  # kept when it is gone: an id that comes back is another edition
            elif name in self._known:  # its times or its note: the same secret still opens it
                self._known[name] = (self._known[name][0], self._principal(new))
        over = {
            name: why
            for name in self._active
            if (why := self._why_over(before.get(name), entries.get(name), narrowed)) is not None
        }
        self._active.difference_update(over)
        if over:
            self.ended(over)

    def _note_people(self, people: Mapping[str, users.User], places: Mapping[str, Tenant]) -> dict[str, str]:
        """Take note of the users and tenants; whose rights have become fewer, and why. Who has more is remembered with
        it."""
        before, self._people = self._people, people
        moved = {name for name, old in self._places.items() if places.get(name) is not old}
        new = places.keys() - self._places.keys()
        self._places = places
        alone, self._alone = self._alone, tenants.alone(places)
        outside = {name for name, old in before.items() if old.tenant in moved and name in people}
        inside = {name for name, old in before.items() if old.tenant in new and name in people}
        differ = {name for name in before.keys() | people.keys() if people.get(name) is not before.get(name)}
        changed = {*people} if alone != self._alone else outside | inside | differ
        if not changed and alone == self._alone:
            return {}
        for name, (digest, principal) in list(self._known.items()):
            if principal.user not in changed and (principal.user is not None or alone == self._alone):
                continue
            if (principal.user is None or principal.user in people) and (token := self._seen.get(name)) is not None:
                self._known[name] = (digest, self._principal(token))
            else:  # who comes back under that name is somebody else
                del self._known[name]
        found = {name: people[name].narrowed(before[name]) for name in changed & before.keys() & people.keys()}
        found |= dict.fromkeys(outside, "its user's tenant changed")
        if more := self._alone - alone:
            there = {name for name, one in places.items() if one.database in more}
            strangers = {name for name, one in people.items() if one.tenant not in there}
            found |= dict.fromkeys({"", *strangers}, f"{', '.join(sorted(more))} is a tenant's alone now")
        return {name: why for name, why in found.items() if why is not None}

    def _why_over(self, old: Token | None, new: Token | None, narrowed: Mapping[str, str]) -> str | None:
        """Why what a token has open must end, now that its entry is `new`; None where it need not. `narrowed`: whose
        user's rights have become fewer."""
        if new is None:
            return "removed"
        if new.status(self._now()) == "revoked":
            return "revoked"
        if new.user is not None and new.user not in self._people:
            return "its user is gone"
        if old is not None and old.rights != new.rights:
            return "changed"
        return narrowed.get(new.user or "")

    def expired(self) -> list[str]:
        """Ids of tokens in use whose time is over; each is told once."""
        now = self._now()
        over = [name for name in self._active if self._seen[name].status(now) == "expired"]
        self._active.difference_update(over)
        return over

    def still_valid(self, principal: Principal) -> bool:
        """Whether what was opened as this principal may go on: its token is there, with the same rights, is neither
        expired nor revoked, and its user is there."""
        if principal.token is None:
            return True
        token = self._seen.get(principal.token)
        return (
            token is not None and principal.edition == self._editions.get(token.id, 0) and self._why_not(token) is None
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
        principal = self._remembered(name, digest) or await self._verify(token, text, address, digest)
        token = self._seen[name]
        if why := self._why_not(token):
            raise UnauthorizedError(why, token_id=name)
        if not tokens.allows_address(token, address):
            raise UnauthorizedError(f"not from this address ({address})", token_id=name)
        self._active.add(name)
        return principal

    def _remembered(self, name: str, digest: bytes) -> Principal | None:
        known = self._known.get(name)
        return known[1] if known is not None and secrets.compare_digest(known[0], digest) else None

    async def _verify(self, token: Token, text: str, address: str | None, digest: bytes) -> Principal:
        """The principal of a text that is not remembered: one hash, one at a time for each token, so that what comes
        at once is counted like what comes in turn."""
        who = (token.id, address or "")
        async with self._verifying.setdefault(token.id, asyncio.Lock()):
            while True:
                self.refresh()
                current = self._seen.get(token.id)
                if current is None:
                    raise UnauthorizedError("no such token id", token_id=token.id)
                if principal := self._remembered(token.id, digest):
                    return principal
                wait = self._attempts.wait(who, self._clock())
                if wait > 0:
                    raise UnauthorizedError(
                        "too many wrong secrets", token_id=token.id, status=429, retry_after=int(wait) + 1
                    )
                loop = asyncio.get_running_loop()
                right = await loop.run_in_executor(self._hashing, tokens.matches, current, text)
                if (now := self._seen.get(token.id)) is None or now.hash != current.hash:
                    continue  # it changed while the hash was computed
                if not right:
                    self._attempts.failed(who, self._clock())
                    raise UnauthorizedError("wrong secret", token_id=token.id)
                self._known[token.id] = (digest, self._principal(now))
                return self._known[token.id][1]

    def _why_not(self, token: Token) -> str | None:
        """Why a token opens nothing now; None where it does."""
        status = token.status(self._now())
        if status in ("expired", "revoked"):
            return f"the token is {status}"
        if token.user is not None and token.user not in self._people:
            return f"its user {token.user} is gone"
        if token.user is not None and self._people[token.user].created_at > token.created_at:
            return f"it was given to another {token.user}, who is gone"
        if token.user is not None and self._people[token.user].disabled_at is not None:
            return f"its user {token.user} is disabled"
        tenant = self._people[token.user].tenant if token.user is not None else None
        if tenant is not None and tenant not in self._places:
            return f"its tenant {tenant} is gone"
        return None

    def _principal(self, token: Token) -> Principal:
        user = self._people.get(token.user or "")
        return Principal(
            token=token.id,
            user=token.user,
            pool=hashlib.sha256(token.hash.encode()).hexdigest(),
            databases=token.databases,
            permissions=token.permissions,
            expires_at=token.expires_at,
            edition=self._editions.get(token.id, 0),
            roles=user.roles if user is not None else None,
            grants=user.grants if user is not None else {},
            tenant=user.tenant if user is not None else None,
            within=self._places.get(user.tenant or "") if user is not None else None,
            closed=tenants.alone(self._places, but=user.tenant if user is not None else None),
        )
