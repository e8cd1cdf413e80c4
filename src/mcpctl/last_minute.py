"""Who asked how much in the last minute, in slices of five seconds. The clock is passed in."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

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

    def _now(self) -> tuple[int, dict[str | None, Used], list[int]]:
        number = int(self._clock() / _SLICE)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}, [0]))
        return self._slices[-1]

    def call(self, fields: Mapping[str, Any]) -> None:
        """Count a call, by the fields of its audit line."""
        of_token, token = self._now()[1], fields.get("token")
        used = of_token.get(token)
        if used is None:
            used = of_token[token] = Used()
        used.user = fields.get("user")
        used.calls += 1
        if (outcome := fields.get("outcome")) != "ok":
            used.failed += outcome in ("error", "partial", "cut", "cancelled")
            used.refused += outcome in ("refused", "limited")
        used.rows += fields.get("rows") or 0
        used.bytes += fields.get("bytes") or 0
        used.seconds += (fields.get("elapsed_ms") or 0.0) / 1000
        if (address := fields.get("client_ip")) is not None and len(used.addresses) < _ADDRESSES:
            used.addresses.add(address)

    def stranger(self) -> None:
        """Count a credential that was refused."""
        self._now()[2][0] += 1

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
