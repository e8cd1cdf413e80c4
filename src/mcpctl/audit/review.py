"""What happened in a time, beside what is usual: how each token was used in it and in as long a time before."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from mcpctl.audit.reading import Reading, counted, reason_of, stamp
from mcpctl.audit.usage import source

MOST = 10_000
"""Tokens, and reasons of refusals, that are told apart; what comes after is one."""
OTHERS = "(others)"
TIMES = 5
"""From how many times as much on a use is unusual."""
FEW_CALLS, FEW_ROWS, FEW_REFUSED = 100, 10_000, 10
"""Below so many nothing is unusual, since chance does as much."""
ENOUGH = 100
"""Calls before from which on the hours in which there were none say something."""
_MOST_PLACES = 1000


class _Line(msgspec.Struct):
    """What is wanted of a line: far quicker than all of it."""

    event: str
    time: str
    token: str | None = None
    user: str | None = None
    client_ip: str | None = None
    rows: int | None = None
    reason: str | None = None


@dataclass
class Period:
    """How one token was used: `hours` are its calls by the hour of the day, UTC, `places` its addresses."""

    calls: int = 0
    refused: int = 0
    rows: int = 0
    hours: list[int] = field(default_factory=lambda: [0] * 24)
    places: set[str] = field(default_factory=set)

    def add(self, line: _Line) -> None:
        """Count a call, or those that the line stands for."""
        many = _many(line)
        self.calls += many
        self.refused += many if line.event == "tool.refused" else 0
        self.rows += line.rows or 0
        if (hour := line.time[11:13]).isdigit():
            self.hours[int(hour) % 24] += many
        if line.client_ip is not None and len(self.places) < _MOST_PLACES:
            self.places.add(source(line.client_ip))


@dataclass
class Use:
    """A token's use in the time that is asked for, and before."""

    user: str | None = None
    before: Period = field(default_factory=Period)
    now: Period = field(default_factory=Period)

    def unusual(self) -> list[str]:
        """In words, what is unusual about it."""
        return list(self._unusual()) if self.now.calls else []

    def _unusual(self) -> Iterator[str]:
        now, before = self.now, self.before
        if not before.calls:
            yield "not used before"
        else:
            if now.calls >= max(FEW_CALLS, TIMES * before.calls):
                yield f"{now.calls / before.calls:.0f} times the calls"
            if now.rows >= max(FEW_ROWS, TIMES * before.rows):
                yield f"{now.rows / before.rows:.0f} times the rows" if before.rows else "rows, where there were none"
            hours = [hour for hour in range(24) if now.hours[hour] and not before.hours[hour]]
            if hours and before.calls >= ENOUGH:
                yield f"at new hours: {', '.join(f'{hour:02}' for hour in hours)} UTC"
            if new := len(now.places - before.places):
                yield f"{new} new addresses"
        if now.refused >= FEW_REFUSED and now.refused * 10 > now.calls:
            yield f"{now.refused} calls refused"


@dataclass
class Review:
    """What there is to look at. `events` are all but calls and the use of credentials, `refusals` those of calls and of
    credentials, by their reason."""

    tokens: dict[str, Use] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, line: _Line, *, now: bool) -> None:
        """Take in one line."""
        if line.event in ("tool.called", "tool.refused", "tool.begun") and line.token is not None:
            key = line.token if line.token in self.tokens or len(self.tokens) < MOST else OTHERS
            use = self.tokens.setdefault(key, Use())
            use.user = line.user or use.user
            (use.now if now else use.before).add(line)
        if not now:
            return
        if line.event.endswith(".refused"):
            reason = reason_of({"event": line.event, "reason": line.reason or "no reason"})
            known = reason in self.refusals or len(self.refusals) < MOST
            self.refusals[reason if known else OTHERS] += _many(line)
        elif not line.event.startswith("tool.") and line.event != "auth.ok":
            self.events[line.event] += 1


def look(reading: Reading, middle: datetime) -> Review:
    """What the log says: what is from `middle` on is looked at, what `reading` has before it is the usual."""
    review, since = Review(), stamp(middle)
    decoder = msgspec.json.Decoder(_Line)
    for line in reading.lines(lambda line: True, decoder.decode):
        review.add(line, now=line.time >= since)
    return review


def _many(line: _Line) -> int:
    found = counted({"event": line.event, "reason": line.reason})
    return 1 if found is None else found
