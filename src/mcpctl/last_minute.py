"""Who asked how much in the last minute, in slices of five seconds. The clock is passed in."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

_SLICE = 5.0
_SLICES = 12
_ADDRESSES = 8
"""Addresses of one credential that are kept, of each slice."""


@dataclass
class Used:
    """What one credential, or all of them, used. `failed` are the calls that ended in an error or were cut."""

    user: str | None = None
    calls: int = 0
    failed: int = 0
    refused: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    addresses: set[str] = field(default_factory=set)

    def add(self, other: "Used") -> None:
        """Add what another slice has."""
        self.user = other.user
        self.calls += other.calls
        self.failed += other.failed
        self.refused += other.refused
        self.rows += other.rows
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.addresses |= other.addresses


class LastMinute:
    """Only credentials that were let in are kept by their id, so there are no more of them than tokens."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._slices: deque[tuple[int, dict[str | None, Used], list[int]]] = deque(maxlen=_SLICES)
        self._of_token: dict[str | None, Used] = {}
        self._begun = self._end = 0.0
        """From when until when the newest slice counts, whose `_of_token` is."""

    def _begin(self, now: float) -> None:
        """Begin the slice of that time, if it is not the newest."""
        number = int(now / _SLICE)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}, [0]))
        self._begun, self._end, self._of_token = number * _SLICE, (number + 1) * _SLICE, self._slices[-1][1]

    def call(
        self,
        token: str | None,
        user: str | None,
        address: str | None,
        outcome: str,
        rows: int = 0,
        size: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Count a call, by what its audit line says."""
        now = self._clock()
        if not self._begun <= now < self._end:
            self._begin(now)
        used = self._of_token.get(token)
        if used is None:
            used = self._of_token[token] = Used()
        used.user = user
        used.calls += 1
        if outcome != "ok":
            used.failed += outcome in ("error", "partial", "cut", "cancelled")
            used.refused += outcome in ("refused", "limited")
        used.rows += rows
        used.bytes += size
        used.seconds += seconds
        if address is not None and len(used.addresses) < _ADDRESSES:
            used.addresses.add(address)

    def stranger(self) -> None:
        """Count a credential that was refused."""
        self._begin(self._clock())
        self._slices[-1][2][0] += 1

    def used(self) -> dict[str | None, Used]:
        """What each credential used, by token id."""
        found: dict[str | None, Used] = {}
        for number, slice_, _ in self._slices:
            if number > int(self._clock() / _SLICE) - _SLICES:
                for token, used in slice_.items():
                    found.setdefault(token, Used()).add(used)
        return found

    def strangers(self) -> int:
        """How many credentials were refused."""
        return sum(count[0] for number, _, count in self._slices if number > int(self._clock() / _SLICE) - _SLICES)
