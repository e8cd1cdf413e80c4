"""How much one token, one user, one tenant and one address may take: rates, calls at once, budgets.

Rates are GCRA, the token bucket that needs one number: `burst` at once, then `rate` a second. Budgets are of the
running hour and day of UTC, so that it can be said when they end. The clocks are passed in, and so is the store
(shared_counters.py), whose values are judged here: one that cannot be is taken for none.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from ipaddress import ip_address, ip_network
from operator import add
from typing import NamedTuple

from mcpctl.config_keys import Allowance, Budget, Budgets, Kind, Limits
from mcpctl.config_values import Network
from mcpctl.errors import LimitedError
from mcpctl.identity.principal import Principal
from mcpctl.shared_counters import ADDRESSES, KEY, MOST, PRINCIPALS, Counters, Slot, source

WINDOW = 900.0
"""Seconds in which an address's refused credentials are counted, from the first on."""
LINES, LINE_SECONDS = 20, 3.0
"""Lines on strangers that may be written at once, and the seconds until one more may be."""
TOKEN_LINES, TOKEN_LINE_SECONDS = 10, 6.0
"""The same of the lines of one event on one token."""
_HOUR, _DAY = 3600, 86400
_REMEMBERED = 10_000
_MOST = 1 << 60
"""More than anybody can have spent in a day."""
_ENTRIES = tuple(found.name for found in fields(Budget))
_UNITS = ("calls", "rows", "bytes", "seconds of database time")


def gcra(taken: float, now: float, interval: float, burst: int) -> tuple[float, float]:
    """(until when the rate is taken after one more, seconds to wait: 0.0 where it is let in). `taken` is what the last
    call returned. One beyond all that can have been taken is of a clock before a restart, or torn."""
    tolerance = interval * burst
    if not taken <= now + tolerance + interval:
        taken = now
    wait = taken + interval - tolerance - now
    return (taken, wait) if wait > 1e-9 else ((taken if taken > now else now) + interval, 0.0)


def running(stored: int, current: int) -> int:
    """The number of the hour or day that counts. A clock that was stepped back gives nothing back: the later one goes
    on, where it is no more than one ahead."""
    return stored if stored == current + 1 else current


class Rule(NamedTuple):
    """What one token, user, tenant or address may take; seconds. `budgets` are those that are set, each with where it
    stands among calls, rows, bytes and microseconds of the hour, and then of the day."""

    interval: float
    burst: int
    concurrent: int
    bounds: tuple[int | None, int | None, float | None]
    budgets: tuple[tuple[int, int], ...]


def rule(limits: Limits, kind: Kind, named: Allowance | None) -> Rule:
    """What holds for one: its own limits, else those of its kind, else those of all."""
    levels: list[Allowance] = [kind] if named is None else [named, kind]

    def first(name: str) -> float | None:
        return next((found for level in levels if (found := getattr(level, name)) is not None), None)

    def budget(period: str, entry: str) -> int | None:
        budgets = [getattr(level.budgets, period) for level in levels] + [getattr(limits.budgets, period)]
        found = (getattr(one, entry) for one in budgets)
        most: int | None = next((one for one in found if one is not None), None)
        return most * 1_000_000 if most is not None and entry == "database_seconds" else most

    rows, size = first("max_rows"), first("max_bytes")
    every = [budget(period, entry) for period in ("hour", "day") for entry in _ENTRIES]
    return Rule(
        1 / (first("rate") or limits.rate),
        int(first("burst") or limits.burst),
        int(first("concurrent") or limits.concurrent),
        (None if rows is None else int(rows), None if size is None else int(size), first("statement_timeout")),
        tuple((index, most) for index, most in enumerate(every) if most is not None),
    )


@dataclass(slots=True)
class Subject:
    """Somebody who counts for itself. `interval` and `concurrent` are its rule's, at hand. `slot` is where it was
    counted last, which may be another's by now."""

    kind: str
    name: str
    rule: Rule
    table: int
    digest: bytes
    slot: Slot
    interval: float
    concurrent: int

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}" if self.name != "local" else "the local user"


@dataclass(slots=True)
class _Caller:
    """All who count in one call, the address among them, those who have budgets, and the smallest of their bounds.
    Of a process that is alone also where each of them is counted (its rate and what runs), and their slots, which is
    so as long as there were only so many `Counters.moves`."""

    all: tuple[Subject, ...]
    address: Subject | None
    budgeted: tuple[Subject, ...]
    bounds: tuple[int, int, float]
    moves: int = -1
    places: tuple[tuple[Subject, int, int], ...] = ()
    slots: Sequence[Slot] = ()


class Limiter:
    """All limits, over one store. `clock` counts seconds and is never set back, `wall` is that of UTC.

    `visit` is for whoever comes, before it is known who; `enter` and `leave` are around a call, `check` before it and
    `charge` after it. Whatever is too much raises LimitedError.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._clock = clock
        self._wall = wall
        self._networks = sorted(
            ((ip_network(name), own) for name, own in limits.addresses.named.items()), key=lambda one: -one[0].prefixlen
        )
        kinds = (limits.tokens, limits.users, limits.tenants, limits.addresses)
        levels = [level for kind in kinds for level in (kind, *kind.named.values())]
        budgets = [limits.budgets, *(level.budgets for level in levels)]
        self.budgets = any(one != Budgets() for one in budgets)
        """Whether anybody has a budget, so that one has to be looked for."""
        bounds = [(level.max_rows, level.max_bytes, level.statement_timeout) for level in levels]
        self._bounds = any(one != (None, None, None) for one in bounds)
        """Whether anybody's answers are bounded more than all are."""
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._callers: dict[tuple[str | None, ...], _Caller] = {}

    # -- who counts --------------------------------------------------------------------------------------------------

    def _subject(self, kind: str, name: str) -> Subject:
        found = self._subjects.get((kind, name))
        if found is None:
            if len(self._subjects) > _REMEMBERED:
                self._subjects.clear()
            table = ADDRESSES if kind == "address" else PRINCIPALS
            group: Kind = getattr(self._limits, "addresses" if kind == "address" else f"{kind}s")
            own, shown = group.named.get(name), name
            if kind == "address":
                network, own = self._of_network(name)
                shown = source(name) or name
                if network is not None and network.version == 6 and network.prefixlen > 64:
                    shown = str(network)  # else it would count for all of its /64, by the limits of one
            digest, its = self._counters.digest(f"{kind}:{shown}"), rule(self._limits, group, own)
            found = self._subjects[kind, name] = Subject(
                kind, shown, its, table, digest, self._counters.nowhere(digest), its.interval, min(its.concurrent, MOST)
            )
        return found

    def _of_network(self, address: str) -> tuple[Network | None, Allowance | None]:
        """The most specific network with limits of its own that an address is in, and those."""
        try:
            found = ip_address(address)
        except ValueError:
            return None, None
        return next((one for one in self._networks if found in one[0]), (None, None))

    def _of(self, principal: Principal, address: str | None) -> _Caller:
        who = (principal.token, principal.user, principal.tenant, address)
        found = self._callers.get(who)
        if found is None:
            if len(self._callers) > _REMEMBERED:
                self._callers.clear()
            names = {"user": principal.user, "tenant": principal.tenant, "address": address}
            known = [self._subject(kind, name) for kind, name in names.items() if name is not None]
            every = (self._subject("token", principal.token or "local"), *known)
            visitor = known[-1] if address is not None else None
            budgeted = tuple(one for one in every if one.rule.budgets)
            bounds = _smallest([one.rule.bounds for one in every])
            found = self._callers[who] = _Caller(every, visitor, budgeted, bounds)
        return found

    # -- rates, and calls at once --------------------------------------------------------------------------------------

    def visit(self, address: str | None) -> None:
        """Count one request of an address against its rate."""
        if address is None:
            return
        subject, wait, counters = self._subjects.get(("address", address)), 0.0, self._counters
        if subject is None:
            subject = self._subject("address", address)
        now = self._clock()
        if not counters.alone:
            counters.hold()
        try:
            slot = subject.slot
            if slot.gone or not (counters.alone or counters.memory[slot.key : slot.key + KEY] == slot.digest):
                slot = subject.slot = counters.slot(subject.table, subject.digest)
            taken = counters.times[slot.until]
            if taken <= now:
                taken = now + subject.interval
            else:
                taken, wait = gcra(taken, now, subject.interval, subject.rule.burst)
            counters.times[slot.until] = taken
        finally:
            if not counters.alone:
                counters.let_go()
        if wait:
            raise _too_fast(subject, wait)

    def enter(self, principal: Principal, address: str | None, *, visited: bool) -> Sequence[Slot]:
        """Count one call against the rates of all who count, and against what they may have running; what `leave`
        takes. Nothing is counted where one of them says no. `visited`: the address has paid its rate."""
        caller = self._callers.get((principal.token, principal.user, principal.tenant, address))
        if caller is None:
            caller = self._of(principal, address)
        counters, now, paid = self._counters, self._clock(), caller.address if visited else None
        if counters.alone and (caller.moves == counters.moves or self._settled(caller)):
            return self._enter_alone(caller, now, paid)
        memory, times, counts, alone = counters.memory, counters.times, counters.counts, counters.alone
        slots: list[Slot] = []
        rates: list[tuple[int, float]] = []
        if not alone:
            counters.hold()
        try:
            for subject in caller.all:
                slot = subject.slot
                if slot.gone or not (alone or memory[slot.key : slot.key + KEY] == slot.digest):
                    slot = subject.slot = counters.slot(subject.table, subject.digest)
                if subject is not paid:
                    taken = times[slot.until]
                    if taken <= now:  # gcra's answer, where nothing is taken
                        taken = now + subject.interval
                    else:
                        taken, wait = gcra(taken, now, subject.interval, subject.rule.burst)
                        if wait:
                            raise _too_fast(subject, wait)
                    rates.append((slot.until, taken))
                if (counts[slot.runs] if alone else counters.running(slot)) >= subject.concurrent:
                    raise _too_many(subject)
                slots.append(slot)
            for at, until in rates:
                times[at] = until
            counters.run(slots, 1)
        finally:
            if not alone:
                counters.let_go()
        return slots

    def _settled(self, caller: _Caller) -> bool:
        """Find all who count in a caller's calls, unless they have no room beside each other."""
        counters = self._counters
        for subject in caller.all:
            subject.slot = counters.slot(subject.table, subject.digest)
        if any(subject.slot.gone for subject in caller.all):
            return False
        caller.places = tuple((subject, subject.slot.until, subject.slot.runs) for subject in caller.all)
        caller.slots = tuple(subject.slot for subject in caller.all)
        caller.moves = counters.moves
        return True

    def _enter_alone(self, caller: _Caller, now: float, paid: Subject | None) -> Sequence[Slot]:
        """`enter`, where it is known where they are, and no other worker counts there."""
        times, counts = self._counters.times, self._counters.counts
        rates: list[tuple[int, float]] = []
        for subject, until, runs in caller.places:
            if subject is not paid:
                taken = times[until]
                if taken <= now:
                    taken = now + subject.interval
                else:
                    taken, wait = gcra(taken, now, subject.interval, subject.rule.burst)
                    if wait:
                        raise _too_fast(subject, wait)
                rates.append((until, taken))
            if counts[runs] >= subject.concurrent:
                raise _too_many(subject)
        for until, taken in rates:
            times[until] = taken
        for _, _, runs in caller.places:
            counts[runs] += 1
        return caller.slots

    def leave(self, slots: Sequence[Slot]) -> None:
        """The call that entered has ended."""
        self._counters.run(slots, -1)

    # -- budgets -----------------------------------------------------------------------------------------------------

    def check(self, principal: Principal, address: str | None) -> None:
        """Raise LimitedError where a budget is used up."""
        if not self.budgets:
            return
        subjects = self._of(principal, address).budgeted
        if not subjects:
            return
        now = self._wall()
        hour, day = int(now // _HOUR), int(now // _DAY)
        with self._counters:
            for subject in subjects:
                spent = self._spent(subject, hour, day)
                for index, most in subject.rule.budgets:
                    if spent[2 + index] >= most:
                        raise _used_up(subject, index, most, spent, now)

    def charge(self, principal: Principal, address: str | None, *, rows: int, size: int, seconds: float) -> None:
        """Charge one call that has ended to all budgets."""
        if not self.budgets:
            return
        subjects = self._of(principal, address).budgeted
        if not subjects:
            return
        now, micros = self._wall(), round(seconds * 1_000_000)
        cost = (0, 0, 1, rows, size, micros, 1, rows, size, micros)
        hour, day = int(now // _HOUR), int(now // _DAY)
        with self._counters:
            for subject in subjects:
                spent = self._spent(subject, hour, day)
                self._counters.spend(subject.slot, tuple(map(add, spent, cost)))

    def _spent(self, subject: Subject, hour: int, day: int) -> tuple[int, ...]:
        """What was spent in the running hour and day, behind their numbers; `subject.slot` is where it stands."""
        slot, counters = subject.slot, self._counters
        if counters.memory[slot.key : slot.key + KEY] != slot.digest:
            slot = subject.slot = counters.slot(subject.table, subject.digest)
        spent = counters.spent(slot)
        if max(spent) > _MOST:
            spent = (*spent[:2], *[0] * 8)
        if spent[0] == hour and spent[1] == day:
            return spent
        nothing, hour, day = (0, 0, 0, 0), running(spent[0], hour), running(spent[1], day)
        of_hour, of_day = spent[2:6] if spent[0] == hour else nothing, spent[6:] if spent[1] == day else nothing
        return (hour, day, *of_hour, *of_day)

    # -- one answer ----------------------------------------------------------------------------------------------------

    def smallest(
        self, principal: Principal, address: str | None, rows: int, size: int, seconds: float
    ) -> tuple[int, int, float]:
        """Rows, bytes and statement time of one answer: the smallest of what is given and of all who count."""
        if not self._bounds:
            return rows, size, seconds
        own_rows, own_size, own_seconds = self._of(principal, address).bounds
        return min(rows, own_rows), min(size, own_size), min(seconds, own_seconds)

    # -- strangers -----------------------------------------------------------------------------------------------------

    def wrong(self, address: str | None) -> int:
        """Note one more refused credential of an address: 0, or where there were too many, the seconds until a refusal
        is 401 again. A credential that is let in never asks here."""
        if address is None:
            return 0
        subject, now, most = self._subject("address", address), self._clock(), self._limits.failed_sign_ins
        with self._counters:
            slot = self._counters.slot(subject.table, subject.digest)
            until, count = self._counters.failed(slot)
            if not now < until <= now + WINDOW:
                until, count = now + WINDOW, 0
            if count < most:
                self._counters.fail(slot, until, count + 1)
        return math.ceil(until - now) if count >= most else 0

    def line(self, about: str | None) -> bool:
        """Whether one more line may be written, of all workers together: on strangers (None), or about what a token
        did."""
        seconds, most = (LINE_SECONDS, LINES) if about is None else (TOKEN_LINE_SECONDS, TOKEN_LINES)
        digest = self._counters.digest(f"lines on {about or 'strangers'}")
        with self._counters:
            slot = self._counters.slot(PRINCIPALS, digest)
            until, wait = gcra(self._counters.taken(slot), self._clock(), seconds, most)
            self._counters.take(slot, until)
        return not wait


def _smallest(bounds: Iterable[tuple[int | None, int | None, float | None]]) -> tuple[int, int, float]:
    rows, sizes, seconds = zip(*bounds, strict=True)
    return min(one or _MOST for one in rows), min(one or _MOST for one in sizes), min(one or _MOST for one in seconds)


def _too_fast(subject: Subject, wait: float) -> LimitedError:
    seconds = max(1, math.ceil(wait))
    rate = f"{1 / subject.rule.interval:g} a second, and {subject.rule.burst} at once"
    return LimitedError(
        f"too many calls: {rate}, are the limit of {subject}; again in {seconds} s",
        kind=subject.kind, name=subject.name, limit="rate", retry_after=seconds,
    )  # fmt: skip


def _too_many(subject: Subject) -> LimitedError:
    return LimitedError(
        f"too many calls at the same time: {subject.rule.concurrent} are the limit of {subject}; again when one has "
        "ended",
        kind=subject.kind, name=subject.name, limit="concurrent", retry_after=1,
    )  # fmt: skip


def _used_up(subject: Subject, index: int, most: int, spent: tuple[int, ...], now: float) -> LimitedError:
    day, entry = divmod(index, len(_ENTRIES))
    end = (spent[day] + 1) * (_DAY if day else _HOUR)
    had = spent[2 + index]
    if _ENTRIES[entry] == "database_seconds":
        most, had = most // 1_000_000, had // 1_000_000
    period = "day" if day else "hour"
    return LimitedError(
        f"the budget of {subject} is used up: {had} of {most} {_UNITS[entry]} this {period}, "
        f"until {time.strftime('%H:%M', time.gmtime(end))} UTC",
        kind=subject.kind, name=subject.name, limit=f"{period}.{_ENTRIES[entry]}",
        retry_after=max(1, math.ceil(end - now)),
    )  # fmt: skip
