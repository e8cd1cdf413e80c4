"""The audit log read for a question: all its files, the oldest first, packed ones too. What is missing there or cannot
be read is told, so that nobody takes a hole in the log for a "nobody".
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mcpctl.audit import files
from mcpctl.audit.parts import HEAD, Chosen, Part, choose, opened
from mcpctl.errors import Error, NotFoundError

if TYPE_CHECKING:
    from mcpctl.audit.anchors import Anchor

_COUNTED = re.compile(r"([0-9]{1,9}) more within a minute")
_SHOWN = 8000
_TAIL = 64 << 10
_TOLD = 20
_STEP = timedelta(seconds=5)
"""How far back a line's time may be behind the one before it: they are taken before the log is locked."""
_BEGUN = b'"event":"tool.begun"'
"""Of a call that has a line of its own, which counts, or was killed before it: then this one does."""
_CALL = re.compile(rb'"event":"tool\.(?:begun|called|refused)","request_id":"([^"]*)"')


def counted(line: dict[str, Any]) -> int | None:
    """How many refusals a line stands for that counts them; None where it is of one call."""
    found = _COUNTED.match(str(line.get("reason"))) if str(line.get("event")).endswith(".refused") else None
    return int(found[1]) if found else None


def outcome_of(line: dict[str, Any]) -> str:
    """How a call ended; `begun` where the log does not say that it has."""
    return "begun" if line.get("event") == "tool.begun" else str(line.get("outcome"))


def reason_of(line: dict[str, Any]) -> str:
    """Why a refusal was, without the number of those that are counted."""
    return str(line.get("reason", "no reason")) if counted(line) is None else "more within a minute, counted"


@dataclass
class Tally:
    """How often, how many rows, and when first and last."""

    count: int = 0
    rows: int = 0
    first: str = ""
    last: str = ""

    def add(self, line: dict[str, Any]) -> None:
        """Count a line, or what it counts. When that was is told by those before it that are listed in full."""
        when, rows, many = str(line.get("time", "")), line.get("rows"), counted(line)
        self.count += 1 if many is None else many
        self.rows += rows if isinstance(rows, int) else 0
        if many is not None and self.last:
            return
        self.first = min(self.first or when, when)
        self.last = max(self.last, when)


def shortened(line: dict[str, Any]) -> dict[str, Any]:
    """A line as many of them can be kept: of a long statement the beginning, and how long it is."""
    text = line.get("statement")
    if not isinstance(text, str) or len(text) <= _SHOWN:
        return line
    return {**line, "statement": f"{text[:_SHOWN]}… ({len(text)} characters)"}


def stamp(when: datetime) -> str:
    """A time as the log's lines have it: they sort as texts."""
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _decoded(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:  # it refuses half a surrogate pair, which a caller may have sent
        return json.loads(line)


@dataclass
class Reading:
    """One pass over the log from `begin` to before `end` (None: all of it).

    `known` says where the log ended before this began. When `lines` has come to its end, `faults` says in words what
    was missing or could not be read, `remarks` what else is to be known, and `starts` is the number and time of the
    first line that there is: of what was before it nothing is known. `every`: also the `tool.begun` of calls that have
    ended.
    """

    path: Path
    begin: datetime | None = None
    end: datetime | None = None
    known: "Sequence[Anchor]" = ()
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    every: bool = False
    starts: tuple[int, str] | None = None
    read: int = 0
    packed: bool = False
    _from: bytes = b""
    _to: bytes = b"~"
    _last: tuple[int, bytes] = (0, b"")
    _latest: bytes = b""
    _skipped: bool = False
    _open: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._from = stamp(self.begin).encode() if self.begin else b""
        self._to = stamp(self.end).encode() if self.end else b"~"

    def lines(self, wanted: Callable[[bytes], bool], decode: Callable[[bytes], Any] = _decoded) -> Iterator[Any]:
        """The lines of that time whose bytes are `wanted`, in the order of the chain, as dicts or what `decode` makes
        of them. Where the clock was set back, lines behind one of that time count as of that time, too. Calls
        that were begun, and of whose end the log says nothing, come last. Raises NotFoundError where there is no log
        at all."""
        with contextlib.ExitStack() as stack:
            for part in self._needed(self._chosen(stack)):
                try:
                    yield from self._of(part, wanted, decode)
                except Error as problem:
                    self._fault(problem.message)
        for line in self._open.values():
            try:
                yield decode(line)
            except (msgspec.DecodeError, ValueError, RecursionError):
                self._fault("the line of a call that was begun cannot be read")
        self._end_at(self._last[0])

    def lines_back(self) -> Generator[dict[str, Any]]:
        """All lines from the last to the first, as far as they are taken; one that cannot be read is {"event":
        "unreadable"}. Ends before a file that is packed, and `packed` then says so. Close it: what was wrong up to
        there is told then. Raises NotFoundError as `lines` does."""
        with contextlib.ExitStack() as stack:
            after = self.path.name
            for part in reversed(self._chosen(stack)):
                if part.packed:
                    self.packed = True
                    return
                yield from self._back(part, after)
                after = part.name
        number, when = self._last
        if number:
            self.starts = (number, when.decode())
        else:
            self._end_at(0)

    def _back(self, part: Part, after: str) -> Iterator[dict[str, Any]]:
        broken = 0
        try:
            for line in files.back(os.dup(part.fd)):
                head = HEAD.match(line)
                if head is None or line[-1:] != b"}":
                    broken += 1
                else:
                    number, (later, when) = int(head[1]), self._last
                    if not later:
                        self._end_at(number)
                    elif number != later - 1:
                        self._gap(after, number, head[2].decode(), later, when.decode())
                    self._last, after = (number, head[2]), part.name
                yield files.parsed(line)
        finally:
            if broken:
                self._fault(f"{part.name}: {broken} lines cannot be read")

    def _end_at(self, last: int) -> None:
        far = max(self.known, key=lambda one: one.seq, default=None)
        if far is not None and far.seq > last:
            self._fault(f"lines {last + 1} to {far.seq} are missing at its end, says {far}")

    @property
    def missing_before(self) -> str | None:
        """In words, where the log does not reach back as far as was asked."""
        if self.starts is None or self.starts[0] == 1 or self.starts[1].encode() <= self._from or self._skipped:
            return None
        return f"the log here begins with line {self.starts[0]}, of {self.starts[1]}; nothing is known of before"

    def _fault(self, text: str) -> None:
        self._tell(self.faults, text)

    def _tell(self, told: list[str], text: str) -> None:
        if len(told) < _TOLD:
            told.append(text)
        elif len(told) == _TOLD:
            told.append("and more of this kind")

    def _chosen(self, stack: contextlib.ExitStack) -> list[Part]:
        unread: list[tuple[str, str]] = []
        chosen = choose(opened(self.path, stack, unread), self.path, unread)
        self._look_at(chosen)
        return chosen.parts

    def _look_at(self, chosen: Chosen) -> None:
        for name, why in chosen.unread:
            self._fault(f"{name} cannot be read as a part of the log: {why}")
        for name in chosen.strangers:
            self._fault(f"{name} cannot be read as a part of the log")
        for one, other, line in chosen.forks:
            self._fault(f"{one.name} and {other.name} begin alike, and differ from line {line} on: one is made up")
        if not (chosen.parts or self.faults or self.known):
            raise NotFoundError(f"there is no audit log {self.path}", "nothing was written yet, or audit.file is wrong")
        if chosen.parts and chosen.parts[-1].path != self.path:
            self.remarks.append(f"there is no {self.path.name}, only files that it was before")

    def _needed(self, parts: list[Part]) -> Iterator[Part]:
        """Those that are to be read: one is left out where its first lines, its last ones (of a packed one the time of
        the file) and the next file's first ones are all of before the time that is asked for."""
        for part, after in zip(parts, [*parts[1:], None], strict=False):
            old = after is not None and self._from > max(self._latest, part.time, after.time or b"~")
            last = self._end_of(part) if old else None
            if last is None or last[1] >= self._from:
                yield part
                continue
            self._last = max(self._last, last)  # where the first that is read goes on
            self._skipped = True

    def _end_of(self, part: Part) -> tuple[int, bytes] | None:
        """Number of a file's last line (0: not known) and its latest time."""
        if part.packed:
            return 0, stamp(datetime.fromtimestamp(os.fstat(part.fd).st_mtime, UTC)).encode()
        heads = HEAD.findall(files.read_at(part.fd, _TAIL, max(0, part.size - _TAIL)))
        return (int(heads[-1][0]), max(when for _, when in heads)) if heads else None

    def _of(self, part: Part, wanted: Callable[[bytes], bool], decode: Callable[[bytes], Any]) -> Iterator[Any]:
        broken, latest = 0, self._latest
        last, before = self._last
        try:
            for line in part.lines():
                head = HEAD.match(line)
                if head is None or line[-1:] != b"}":
                    broken += 1
                    continue
                number, when = int(head[1]), head[2]
                self.starts = self.starts or (number, when.decode())
                if when > latest:
                    latest = when
                if number != last + 1 and last and latest >= self._from and before <= self._to:
                    self._gap(part.name, last, before.decode(), number, when.decode())
                if when < before:
                    self._set_back(number, before.decode(), when.decode())
                last, before = number, when
                if self._open and _BEGUN not in line and (call := _CALL.search(line)):
                    self._open.pop(call[1], None)
                if latest < self._from or when >= self._to:
                    continue
                self.read += 1
                if wanted(line) and not self._begins(line):
                    try:
                        yield decode(line)
                    except (msgspec.DecodeError, ValueError, RecursionError):
                        broken += 1
        finally:
            self._last, self._latest = (last, before), latest
            if broken:
                self._fault(f"{part.name}: {broken} lines cannot be read")

    def _begins(self, line: bytes) -> bool:
        """Whether a line is kept back, since its call's end may follow, which says more."""
        call = _CALL.search(line) if _BEGUN in line and not self.every else None
        if call is not None:
            self._open[call[1]] = line
        return call is not None

    def _set_back(self, number: int, before: str, when: str) -> None:
        with contextlib.suppress(ValueError):
            if datetime.fromisoformat(before) - datetime.fromisoformat(when) > _STEP:
                self._tell(self.remarks, f"the clock was set back at line {number}, from {before} to {when}")

    def _gap(self, name: str, last: int, before: str, number: int, when: str) -> None:
        if number > last:
            self._fault(f"lines {last + 1} to {number - 1} are missing, between {before} and {when}")
        else:
            self._fault(f"{name}: after line {last} comes line {number}: the log was begun anew, or tampered with")
