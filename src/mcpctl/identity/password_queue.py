"""Passwords that the server's event loop wants checked: one after the other, behind everything else.

A check takes 64 MiB and some 0.1 s of CPU on purpose, and strangers ask for it. So there is one at a time for each
serving process, in a process that stands back beside it (hashing_apart.py): calls take the processor first. Who
would wait too long is told to come again, before anything is done for them.

That a user is not there, or has no password, costs what a wrong password costs: a hash that nobody's password fits is
checked instead. What can be no password at all (`passwords.normal`) is refused without that. It tells nobody
anything: it follows from what was sent, whoever is named, and a stranger cannot buy hashes with it.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import argon2
from argon2.exceptions import Argon2Error, VerifyMismatchError

from mcpctl.errors import LimitedError, UnavailableError
from mcpctl.identity import passwords
from mcpctl.identity.hashing_apart import HashingApart

PATIENCE = 10.0
"""Seconds that nobody waits beyond for their turn."""
_AT_FIRST, _NEWEST = 0.25, 0.2
"""Seconds that a check is taken to last before there was one, and how much the newest one counts after that."""


class Passwords:
    """Checks passwords. `hasher` has the profile that stored hashes were made with; tests hand in a cheap one. `clock`
    counts seconds."""

    def __init__(
        self,
        hasher: argon2.PasswordHasher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hasher = hasher or HashingApart(passwords.RFC_9106_SECOND)
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "password")
        self._nobodys: str | None = None
        self._seconds = _AT_FIRST
        self._begun: float | None = None
        self.waiting = 0
        """How many are being checked, or wait for it."""

    def close(self) -> None:
        """Stop the thread, and the process; who still waits is not answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if isinstance(self._hasher, HashingApart):
            self._hasher.close()

    async def matches(self, stored: str | None, text: str) -> bool:
        """Whether the text is the password that `stored` is the hash of; never where that is None, at the same cost.

        Raises LimitedError (429, with the seconds to wait) where too many wait already, UnavailableError (503) where
        there is no memory for it.
        """
        secret = passwords.normal(text)
        if secret is None:
            return False
        self._check_room()
        self.waiting += 1
        try:
            check = partial(self._check, stored, secret, self._clock())
            return await asyncio.get_running_loop().run_in_executor(self._thread, check)
        finally:
            self.waiting -= 1

    def _check_room(self) -> None:
        """What a check takes is learnt from those before, the one that is at work among them: a machine that is busy
        lets it wait. Who comes alone is always let in."""
        begun = self._begun
        each = max(self._seconds, 0.0 if begun is None else self._clock() - begun)
        if self.waiting and (self.waiting + 1) * each > PATIENCE:
            raise _too_many(self.waiting * each)

    def _check(self, stored: str | None, secret: bytes, asked: float) -> bool:
        """On the thread. Who was let in, and has waited too long after all, since the machine became slower, is refused
        without a hash: the next in turn may still be there."""
        begun = self._clock()
        if begun - asked > PATIENCE:
            raise _too_many(self.waiting * self._seconds)
        self._begun = begun
        try:
            if self._nobodys is None:  # with the first one, whoever that is
                self._nobodys = _nobodys(self._hasher)
            return self._hasher.verify(self._nobodys if stored is None else stored, secret) and stored is not None
        except VerifyMismatchError:
            return False
        except Argon2Error as problem:
            raise UnavailableError(f"a password could not be checked: {problem}", "has the server 64 MiB?") from None
        finally:
            self._seconds += _NEWEST * (self._clock() - begun - self._seconds)
            self._begun = None


def _nobodys(hasher: argon2.PasswordHasher) -> str:
    """A hash of the hasher's profile that nobody's password fits."""
    return hasher.nobodys() if isinstance(hasher, HashingApart) else hasher.hash(secrets.token_bytes(32))


def _too_many(seconds: float) -> LimitedError:
    wait = max(1, math.ceil(min(seconds, PATIENCE)))
    return LimitedError(
        f"too many sign-ins at once; again in {wait} s",
        kind="server", name="passwords", limit="waiting", retry_after=wait,
    )  # fmt: skip
