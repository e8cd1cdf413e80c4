"""What goes into the audit log, how much of it, and what happens when it cannot be written."""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from mcpctl.audit.log import AuditLog, BusyError
from mcpctl.errors import Error, LimitedError, UnavailableError
from mcpctl.metrics import REFUSED
from mcpctl.shared_counters import source

log = logging.getLogger("mcpctl.audit")
_calls = logging.getLogger("mcpctl.calls")
_sql = logging.getLogger("mcpctl.sql")
AGAIN = 3600.0
"""Seconds after which a credential's use from an address is noted once more."""
MINUTE = 60.0
STRANGERS_IN_FULL = 3
"""Refusals of one address (of IPv6, one /64) with a wrong credential in a minute that are written in full; one line
counts the others."""
_CREDENTIALS = 10_000
Count = Callable[[str, Mapping[str, Any], "bool | None"], None]
Greeted = OrderedDict[tuple[str | None, str | None], float]
"""When the use of a credential from an address was noted last."""
_MOMENT, _PATIENCE = 0.001, 0.25
"""Seconds after which lines are tried again that were put off, and for which they may be."""
LATE = 1000
"""Lines that are kept while the log cannot be written, the newest; of older ones only their number is."""


@dataclass
class Late:
    """What a process has not been able to write yet: `lines` in order, and of lines that never will be written since
    when, until when and how many."""

    lines: deque[tuple[str, dict[str, Any]]] = field(default_factory=deque)
    lost: tuple[str, str, int] | None = None


@dataclass
class _Stranger:
    """What one address had refused in a minute. `named`: some of it had the form of a token, and its checksum."""

    since: float
    written: int = 0
    others: int = 0
    named: bool = False


class Recorder:
    """Writes events. `refuse` is whether a call may be answered while the log cannot be written, `line(about)` whether
    one more line may be that a caller can have as many of as it likes, by all workers: on strangers (None), or on what
    one token did.
    `count(event, fields, written)` hears of each event, and whether its line is in the log; of each refused credential,
    with None there. `greeted` and `late` outlive it where others come after it in its process."""

    def __init__(
        self,
        audit: AuditLog,
        statements: str,
        *,
        refuse: bool,
        clock: Callable[[], float] = monotonic,
        count: Count = lambda event, fields, written: None,
        line: Callable[[str | None], bool] = lambda about: True,
        greeted: Greeted | None = None,
        late: Late | None = None,
    ) -> None:
        self._audit = audit
        self.shared = audit.others is not None
        """Whether other workers write the same log."""
        self._statements = statements
        self._refuse = refuse
        self._clock = clock
        self._count = count
        self._line = line
        self.failing = False
        """Whether the last line could not be written."""
        self._greeted = OrderedDict() if greeted is None else greeted
        self._refused: dict[str | None, _Stranger] = {}
        self._more: dict[tuple[str, str | None], tuple[float, int]] = {}
        self._limited: dict[tuple[str | None, str, str], tuple[float, int, dict[str, Any]]] = {}
        self._minute = self._looked = clock()
        self._uncounted = 0
        self._late = Late() if late is None else late
        self._together: list[tuple[str, dict[str, Any], asyncio.Future[Error | None]]] = []
        """Lines of calls that have ended in this turn of the event loop, and who waits for each."""
        self._until: float | None = None
        """Until when they may be put off, since others write."""

    def note(self, event: str, **fields: Any) -> None:
        """Write a line, or keep it until the log can be written. What must happen anyway (a revocation) uses this."""
        if self._write(event, fields):
            return
        self._late.lines.append((event, {"happened_at": self._audit.time(), **fields}))
        if len(self._late.lines) > LATE:
            self._lose(self._late.lines.popleft()[1]["happened_at"])

    def call(self, event: str, fields: dict[str, Any], trace: str | None = None, refusal: str | None = None) -> None:
        """Write a call's line. Raises UnavailableError where it cannot be, and the config wants calls refused.
        `refusal`: the kind of a refused one, to be counted by."""
        _say(event, fields, trace)
        if refusal is not None:
            self._count(REFUSED, {"reason": refusal}, None)
        if not self._write(event, fields):
            self._lose(self._audit.time())
            if self._refuse:
                raise _no_log()

    def ended(self, event: str, fields: dict[str, Any], trace: str | None = None) -> asyncio.Future[Error | None]:
        """`call`, where others run that may end in the same turn of the event loop: their lines are written together,
        by one lock and one write. When what this returns is done, the line stands, also that of who was cancelled
        meanwhile; its result is what `call` would have raised."""
        _say(event, fields, trace)
        loop = asyncio.get_running_loop()
        if not self._together:
            loop.call_soon(self._write_together)
        written: asyncio.Future[Error | None] = loop.create_future()
        self._together.append((event, fields, written))
        return written

    def _write_together(self, *, at_once: bool = True) -> None:
        """Write the lines of all calls that have ended in this turn. `at_once`: a moment later, where others write at
        this one: who waits for a lock keeps all from their answers, who waits for a turn nobody."""
        together, self._together = self._together, []
        if not together:
            return
        at_once = at_once and (self._until is None or self._clock() < self._until)
        try:
            done = [self._add(*[(event, fields) for event, fields, _ in together], at_once=at_once)] * len(together)
        except BusyError:
            self._together = together
            self._until = self._until or self._clock() + _PATIENCE
            asyncio.get_running_loop().call_later(_MOMENT, self._write_together)
            return
        except Exception:  # a fault of ours in one of them is not the others'
            log.exception("lines of the audit log could not be made together")
            done = [self._alone(event, fields) for event, fields, _ in together]
        self._until = None
        for (_, _, written), stands in zip(together, done, strict=True):
            if not stands:
                self._lose(self._audit.time())
            if not written.done():
                written.set_result(_no_log() if self._refuse and not stands else None)
        for (event, fields, _), stands in zip(together, done, strict=True):
            self._count(event, fields, stands)

    def _alone(self, event: str, fields: dict[str, Any]) -> bool:
        """Write a line that may be none."""
        try:
            return self._add((event, fields))
        except Exception:
            log.exception("a line of the audit log could not be made")
            return False

    def _write(self, event: str, fields: dict[str, Any]) -> bool:
        """Write what was kept, and this line, behind those that wait; whether it was. It is counted."""
        self._write_together(at_once=False)
        written = self._add((event, fields))
        self._count(event, fields, written)
        return written

    def _add(self, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> bool:
        """Write what was kept, and these lines; whether they were. `at_once`: BusyError where others write."""
        try:
            if self._late.lines or self._late.lost:
                self._write_late(at_once=at_once)
            self._audit.add(*lines, at_once=at_once)
        except UnavailableError as problem:
            if not self.failing:
                log.error("%s%s", problem.message, f" ({problem.hint})" if problem.hint else "")
            self.failing = True
        else:
            self.failing = False
        return not self.failing

    @property
    def waiting(self) -> int:
        """How many lines are kept here until the log can be written, also those of which only the number is."""
        return len(self._late.lines) + (self._late.lost[2] if self._late.lost else 0)

    def fault(self) -> str | None:
        """Why a line could not be written now; None where it could."""
        try:
            self._audit.check()
        except UnavailableError as problem:
            return problem.message
        return None

    def _lose(self, when: str) -> None:
        """Count a line that will never be written."""
        since, until, count = self._late.lost or (when, when, 0)
        self._late.lost = (min(since, when), max(until, when), count + 1)

    def _write_late(self, *, at_once: bool = False) -> None:
        while self._late.lines:
            self._audit.add(self._late.lines[0], at_once=at_once)
            self._late.lines.popleft()
        if self._late.lost:
            self._audit.add(("audit.lost", {"reason": _lost(*self._late.lost)}), at_once=at_once)
            self._late.lost = None

    def catch_up(self) -> None:
        """Write what was kept, here and by commands, if the log can be written again."""
        self._write_together(at_once=False)
        try:
            self._audit.catch_up()
            self._write_late()
        except UnavailableError:
            pass  # it was said when it began

    def close(self) -> None:
        """Leave what is still kept beside the log, for the next who can write it: this process ends."""
        self.catch_up()
        left, lost = list(self._late.lines), self._late.lost[2] if self._late.lost else 0
        try:
            while left:
                self._audit.keep(left[0][0], **left[0][1])
                del left[0]
            if self._late.lost:
                self._audit.keep("audit.lost", reason=_lost(*self._late.lost))
        except Error as problem:
            log.error("%d lines are lost to the audit log: %s", len(left) + lost, problem.message)
            self._audit.lose(len(left) + lost)

    def before_call(self) -> None:
        """While the log cannot be written nothing is run, either. Raises UnavailableError as `call` does."""
        if self.failing and self._refuse:
            try:
                self._audit.check()
            except UnavailableError:
                self._lose(self._audit.time())
                raise _no_log() from None
            self.failing = False

    def statement(self, text: str, *, described: bool) -> dict[str, str]:
        """How a statement is kept. What PostgreSQL described no columns of may hold a password: never its text."""
        if self._statements == "off":
            return {}
        if described and self._statements == "full":
            return {"statement": text}
        return {"statement_hmac": self._audit.statement_hmac(text, keep=described)}

    def ran(self, kept: Mapping[str, str], about: Mapping[str, Any], trace: str | None = None) -> None:
        """Say in the server's log that a statement was run, as far as it is `kept`, where the config wants that."""
        if _sql.isEnabledFor(logging.DEBUG):
            hmac = kept.get("statement_hmac")
            said = kept.get("statement") or (f"hmac {hmac}" if hmac else "(audit.statements: off)")
            _sql.debug("request %s: %s", about["request_id"], said, extra=_extra(about, trace))

    def auth_ok(self, token: str | None, user: str | None, address: str | None, **fields: Any) -> None:
        """Once per credential and address (of IPv6, one /64) an hour. Of one that comes from ever new addresses most
        are counted, and each is noted with its next use that there is room for."""
        now = self._clock()
        who = (token, source(address))
        if now - self._greeted.get(who, -AGAIN) < AGAIN or not self._in_full("auth.ok", token):
            return
        if not self._write("auth.ok", {"token": token, "user": user, "client_ip": address, **fields}):
            return
        self._greeted[who] = now
        self._greeted.move_to_end(who)
        while len(self._greeted) > _CREDENTIALS:
            self._greeted.popitem(last=False)

    def auth_refused(
        self, address: str | None, reason: str, *, proven: bool = False, locked: bool = False, **fields: Any
    ) -> None:
        """The first of an address and minute in full, the others counted: see `flush`. Those whose secret was right
        (`proven`) count for their token, and no number of strangers keeps them from the log. `locked`: the credential
        was good, and the server's log, by which addresses are banned, has no line."""
        self._count("auth.refused", {"reason": reason}, None)
        self._look()
        if self._in_full("auth.refused", fields["token"]) if proven else self._stranger(source(address), fields):
            if not self._write("auth.refused", {"client_ip": address, "reason": reason, **fields}):
                self._lose(self._audit.time())
            if not locked:  # the address last: see docs/monitoring.md
                extra = {"about": {"client_ip": address, **fields}}
                log.warning("Unauthorized: %s client=%s", reason, address or "-", extra=extra)

    def of_stranger(self, event: str, **fields: Any) -> None:
        """A line on what anybody can do as often as they like: as many as there is room for, the others counted."""
        self._look()
        if self._in_full(event, None):
            self.note(event, **fields)

    def _in_full(self, event: str, token: str | None) -> bool:
        """Whether one more such line on a token may be written in full, of all workers together; counted where not."""
        if self._line(f"{event} {token}"):
            return True
        since, others = self._more.get((event, token), (self._clock(), 0))
        self._more[event, token] = (since, others + 1)
        return False

    def _stranger(self, who: str | None, fields: Mapping[str, Any]) -> bool:
        """Count a wrong credential; whether it is written in full."""
        found = self._refused.get(who)
        if found is None:
            if len(self._refused) >= _CREDENTIALS:
                self._uncounted += 1
                return False
            found = self._refused[who] = _Stranger(self._clock())
        found.named |= fields.get("token") is not None
        if found.written < STRANGERS_IN_FULL and self._line(None):
            found.written += 1
            return True
        found.others += 1
        return False

    def limited(self, problem: LimitedError, **fields: Any) -> None:
        """A known token's call that was too much: the first in full, of all workers together, the others counted."""
        self._count(REFUSED, {"reason": "budget" if "." in problem.limit else problem.limit}, None)
        self._look()
        if self._line(f"tool.refused {fields.get('token')}"):
            self.note("tool.refused", **fields, outcome="limited", reason=problem.message)
            return
        key = (fields.get("token"), problem.kind, problem.limit)
        since, others, _ = self._limited.get(key, (self._clock(), 0, fields))
        self._limited[key] = (since, others + 1, fields)
        self._count("tool.refused", {**fields, "outcome": "limited"}, None)

    def _look(self) -> None:
        """`flush`, but not for each refusal of a flood."""
        if self._clock() - self._looked >= 1:
            self.flush()

    def flush(self, *, everything: bool = False) -> None:
        """Write one counted line for each address, and for each limit of a token, whose minute is over."""
        now = self._looked = self._clock()
        for key, (since, others, fields) in list(self._limited.items()):
            if everything or (now - since >= MINUTE and self._line(f"tool.refused {key[0]}")):
                del self._limited[key]
                same = {name: fields.get(name) for name in ("token", "user", "tenant", "transport")}
                reason = f"{others} more within a minute, by the {key[2]} limit of the {key[1]}"
                self.note("tool.refused", **same, outcome="limited", reason=reason)
        for (event, token), (since, others) in list(self._more.items()):
            if everything or (now - since >= MINUTE and self._line(f"{event} {token}")):
                del self._more[event, token]
                self.note(event, token=token, reason=f"{others} more within a minute")
        over = [who for who, found in self._refused.items() if everything or now - found.since >= MINUTE]
        for who in sorted(over, key=lambda who: not self._refused[who].named):
            found = self._refused.pop(who)
            if found.others and (self._line(None) or (everything and found.written)):
                self.note("auth.refused", client_ip=who, reason=f"{found.others} more within a minute")
            else:
                self._uncounted += found.others
        if everything or now - self._minute >= MINUTE:
            if self._uncounted and (everything or self._line(None)):
                reason = f"{self._uncounted} more, from other addresses than those that are listed"
                self.note("auth.refused", reason=reason)
                self._uncounted = 0
            self._minute = now


def _say(event: str, fields: Mapping[str, Any], trace: str | None) -> None:
    """Say in the server's log how a call ended, where the config wants that."""
    if _calls.isEnabledFor(logging.DEBUG):
        where, ended, took = fields.get("database") or "-", fields.get("outcome"), fields.get("elapsed_ms")
        _calls.debug("%s %s: %s: %s, %s ms", event, fields["tool"], where, ended, took, extra=_extra(fields, trace))


def _lost(since: str, until: str, count: int) -> str:
    return f"{count} lines could not be written between {since} and {until}"


def _extra(about: Mapping[str, Any], trace: str | None) -> dict[str, Any]:
    """What a line of the server's log knows of its call; the audit line has no trace."""
    return {"about": {**about, "trace_id": trace}}


def _no_log() -> UnavailableError:
    return UnavailableError(
        "the audit log cannot be written, and no call is answered without it",
        "tell the administrator; calls are answered again as soon as it can be",
    )
