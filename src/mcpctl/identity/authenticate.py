"""A presented credential → Principal, or a refusal with its reason.

The order is that of the cost, so that a stranger costs little: the remembered digest of a known id (one keyed BLAKE2),
form and checksum (no hash), whether there is such an id (no hash), and only then Argon2id, on a thread. Too many
refused ones from an address change what a refused one is answered, and nothing else: a right token is always let in.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mcpctl.errors import ConfigError, LockedError, UnauthorizedError
from mcpctl.identity import sessions, tokens
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.identity.sessions import Session
from mcpctl.identity.standing import LOCKED as LOCKED
from mcpctl.identity.standing import Standing
from mcpctl.identity.tokens import Token
from mcpctl.identity.vouched import Visitors, Vouched
from mcpctl.private_file import ABSENT, fingerprint

_ID = slice(4, 12)
"""Where an id stands in a text."""
_REMEMBERED = 10_000
_LENGTH = 63
"""Characters of a token, and of a session's text."""


def _unknown(name: str) -> str:
    """Why an id of a right form opens nothing."""
    return "no such session, or it has ended" if sessions.is_id(name) else "no such token id"


class Authenticator(Standing):
    """Lets in whoever presents a credential that opens something, and remembers which texts have been verified against
    which entry.

    `wrong(address)` notes one more credential that is refused, whatever the reason, and says how long an address's are
    answered 429, 0 for 401.
    """

    def __init__(self, *files: Any, wrong: Callable[[str | None], int] = lambda address: 0, **more: Any) -> None:
        super().__init__(*files, **more)
        self._wrong = wrong
        self.canaries: Container[str] = ()
        self.tripped: Callable[[Token, str | None], None] = lambda token, address: None
        self._key = secrets.token_bytes(32)
        self._verifying: dict[str, asyncio.Lock] = {}
        self._let_in: dict[tuple[str, str | None], tuple[bytes, Principal]] = {}
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="argon2")

    def close(self) -> None:
        """Stop the hashing thread."""
        self._hashing.shutdown(wait=False, cancel_futures=True)

    def local(self) -> Principal:
        """Whoever calls without a token where none is asked for."""
        self.check_lock()
        self.check_local()
        return LOCAL

    def check_local(self) -> None:
        """Raises ConfigError where nobody may come without a token: where there are tenants, or their file is lost.
        Their data is theirs alone, and one login may reach the data of all."""
        paths = (self.tokens.path, self.users.path, self.tenants.path)
        if any(fingerprint(path) != ABSENT for path in paths) and self.tenants.current():
            raise ConfigError(
                "there are tenants here, so nobody is served without a token",
                "for stdio put one into MCPCTL_TOKEN; `mcpctl token add` makes it",
            )

    def again(self, text: str, address: str | None, *, look: bool = True) -> Principal | None:
        """`authenticate` of a text that was let in from that address before, if it would be let in now; None where it
        has to be asked. What is known of a token is made anew with each change of what the files say of it, of its user
        or of its tenant: as long as that is the same, so is what they say. `look`: at the files, and for the lockdown;
        else that was done since this text had come."""
        name = text[_ID]
        if (name, address) not in self._let_in:
            return None
        if look:
            self._look_for_lock()
            self._renew()
        if name in self._signed_in and self.sessions is not None and self.sessions.is_due(self._signed_in[name]):
            return None
        known = self._known.get(name)
        if known is None or self._let_in.get((name, address)) is not known or self.locked or name not in self._active:
            return None
        return self.recognised(text) if self._opens(name) else None

    @staticmethod
    def _is_from(token: Token, principal: Principal, address: str | None) -> bool:
        """Whether a token, and its user's tenant, may come from that address."""
        if not tokens.allows_address(token, address):
            return False
        return principal.within is None or tokens.in_networks(principal.within.allow_ips, address)

    async def authenticate(self, text: str, address: str | None) -> Principal:
        """The principal of a bearer token, or UnauthorizedError with the reason, for the log alone. LockedError where
        it would be let in while the server is locked: a wrong one is wrong then, too, and a canary is one."""
        self._look_for_lock()
        self._renew()
        if self.visitors is not None and self.visitors.takes(text):
            name = await self._ask_issuer(self.visitors, text, address)
            principal = self._known[name][1]
        else:
            principal = self.recognised(text) or await self._prove(text, address)
            name = text[_ID]
        token = self._seen[name]
        if name in self.canaries:
            self.tripped(token, address)
        if not self._opens(name) and (why := self._why_not(token)):
            if isinstance(token, Session) and token.waits_for_renewal(self._now()):
                # At 401 alone its client renews it; and many clients come from one address of their maker's.
                raise UnauthorizedError(why, token_id=name, proven=True)
            raise self._is_over(why, address, name)
        if not self._is_from(token, principal, address):
            raise self._is_over(f"not from this address ({address})", address, name)
        if self.locked:
            raise LockedError(name, token.user)
        if name not in self._active:
            self._active.add(name)
            if token.expires_at is not None and (self._due is None or token.expires_at < self._due):
                self._due = token.expires_at
        if isinstance(token, Session) and self.sessions is not None:
            self.sessions.use(token)
        # Each use of a canary is told; and whom an issuer vouches for is known by more than one text.
        if name not in self.canaries and name in self._known and not isinstance(token, Vouched):
            if len(self._let_in) >= _REMEMBERED:
                self._let_in.clear()
            self._let_in[name, address] = self._known[name]
        return principal

    async def _ask_issuer(self, visitors: Visitors, text: str, address: str | None) -> str:
        """The id of the entry of whom a text stands for by its issuer's word."""
        visitors.know(self._people)
        try:
            found = await visitors.admit(text, address, self._now())
        except UnauthorizedError as problem:
            if problem.proven:  # only over: at 401 alone its client gets another
                raise
            raise self._is_wrong(problem.message, address) from None
        self._look_for_lock()
        self._renew()
        return self._stand(found).id

    async def _prove(self, text: str, address: str | None) -> Principal:
        """The principal of a text that is not remembered."""
        name = tokens.token_id(text) or sessions.session_id(text)
        if name is None:
            raise self._is_wrong("not one of our tokens: form or checksum is wrong", address)
        token = self._seen.get(name)
        if token is None:
            raise self._is_wrong(_unknown(name), address, name)
        return await self._verify(token, text, address, self._digest(text))

    def _is_wrong(self, why: str, address: str | None, name: str | None = None) -> UnauthorizedError:
        """The refusal of a credential that is wrong, and not only over."""
        if wait := self._wrong(address):
            return UnauthorizedError(f"{why}; too many wrong ones", token_id=name, status=429, retry_after=wait)
        return UnauthorizedError(why, token_id=name)

    def _is_over(self, why: str, address: str | None, name: str) -> UnauthorizedError:
        """The refusal of a right secret. It counts and is answered as a wrong one is: else a thief would be told."""
        wait = self._wrong(address)
        return UnauthorizedError(why, token_id=name, status=429 if wait else 401, retry_after=wait, proven=True)

    def recognised(self, text: str | None) -> Principal | None:
        """Who that text was when it was last let in, if anybody. It costs no Argon2id; and what is remembered by
        its digest had the right form and checksum then."""
        if text is None or text[_ID] not in self._known or not text.isascii() or len(text) != _LENGTH:
            return None
        return self._remembered(text[_ID], self._digest(text))

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode("ascii"), key=self._key).digest()

    def _remembered(self, name: str, digest: bytes) -> Principal | None:
        known = self._known.get(name)
        return known[1] if known is not None and secrets.compare_digest(known[0], digest) else None

    async def _verify(self, token: Token, text: str, address: str | None, digest: bytes) -> Principal:
        """The principal of a text that is not remembered: one hash, one at a time for each token, so that what comes
        at once costs one together. A session's costs nothing, and leaves nothing behind: there is no end of them."""
        dear = not isinstance(token, Session)
        async with self._verifying.setdefault(token.id, asyncio.Lock()) if dear else contextlib.nullcontext():
            while True:
                self._look_for_lock()
                self._renew()
                current = self._seen.get(token.id)
                if current is None:
                    raise self._is_wrong(_unknown(token.id), address, token.id)
                if principal := self._remembered(token.id, digest):
                    return principal
                right = await self._compare(current, text)
                if (now := self._seen.get(token.id)) is None or now.hash != current.hash:
                    continue  # it changed while the hash was computed
                if not right:
                    raise self._is_wrong("wrong secret", address, token.id)
                principal = self._principal(now)
                if not isinstance(now, Session) or now.is_current(text):
                    self._known[token.id] = (digest, principal)
                return principal

    async def _compare(self, token: Token, text: str) -> bool:
        """Whether this text is that token or session."""
        if isinstance(token, Session):
            return token.is_current(text) or token.was_current(text, self._now())
        return await asyncio.get_running_loop().run_in_executor(self._hashing, tokens.matches, token, text)
