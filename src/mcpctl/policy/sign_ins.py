"""How often somebody may be wrong about a password. A password can be guessed, which a token cannot; so here, unlike
with tokens, whoever was wrong too often has to wait even with the right one.

Three counts, each of 15 minutes from its first wrong try on, and of all workers together:

- A network (an IPv4 address, of IPv6 one /64) may be wrong `limits.failed_sign_ins` times, whomever it names. Whoever
  tries passwords, or one password with many names, is stopped at that.
- A name may be tried wrongly as often from everywhere together. Beyond that each network may be wrong about that name
  `FEW` times. Nobody is refused because of others: the first tries of a network are always checked, so that no number
  of strangers locks a user out. They can make a user's own typing errors dearer, and nothing else.
- Who is behind the same address as the one who guesses waits as he does, for 15 minutes at most, or uses a token or
  the session that they have: neither of these asks here.

Counted is before the password is checked, else a thousand tries at once would all be the first. What is being checked
counts as wrong until it was right; whoever is refused for that alone is told to come again in a second. Names that
there are not count as those that there are, so that nobody is told by it. All of it stands among the addresses' slots:
names that strangers make up take no token's or user's place.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from mcpctl.errors import LimitedError
from mcpctl.policy.limits import WINDOW
from mcpctl.shared_counters import ADDRESSES, Counters, Slot, source

FEW = 2
"""Wrong tries of one network about a name that is being tried from many."""


class Attempt(NamedTuple):
    """One try that is being checked; where it is counted, by digest."""

    digests: tuple[bytes, ...]
    slots: list[Slot]


class SignIns:
    """The counts, in the store that all workers share. `clock` counts seconds, and is never set back."""

    def __init__(self, most: int, counters: Counters, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._counters = counters
        self._clock = clock

    def begin(self, name: str, address: str | None) -> Attempt:
        """Count one try. Raises LimitedError, and nothing is counted, where there were too many."""
        network = source(address) or "local"
        who = (f"sign-in from {network}", f"sign-in as {name}", f"sign-in as {name} from {network}")
        digests = tuple(map(self._counters.digest, who))
        with self._counters:
            slots = [self._counters.slot(ADDRESSES, digest) for digest in digests]
            everywhere, named, both = slots
            wait = self._wait(everywhere, self._most)
            if not wait and self._wait(named, self._most):
                wait = self._wait(both, min(FEW, self._most))
            if wait:
                raise _too_many(network, wait)
            self._counters.run(slots, 1)
        return Attempt(digests, slots)

    def end(self, attempt: Attempt, *, wrong: bool) -> None:
        """It was checked, or could not be."""
        with self._counters:
            self._counters.run(attempt.slots, -1)
            for digest in attempt.digests if wrong else ():
                slot = self._counters.slot(ADDRESSES, digest)
                until, count = self._failed(slot)
                self._counters.fail(slot, until, count + 1)

    def _failed(self, slot: Slot) -> tuple[float, int]:
        """(the end of the window, wrong tries in it); a window that has ended, or that cannot be, begins anew."""
        until, count = self._counters.failed(slot)
        now = self._clock()
        return (until, count) if now < until <= now + WINDOW else (now + WINDOW, 0)

    def _wait(self, slot: Slot, most: int) -> int:
        """The seconds until there may be one more; 0 where there may be one now."""
        until, count = self._failed(slot)
        if count >= most:
            return math.ceil(until - self._clock())
        return 1 if count + self._counters.running(slot) >= most else 0


def _too_many(network: str, wait: int) -> LimitedError:
    return LimitedError(
        f"too many wrong passwords; again in {wait} s", kind="address", name=network, limit="failed_sign_ins",
        retry_after=wait,
    )  # fmt: skip
