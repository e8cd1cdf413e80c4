"""The audit log read for a question: all its files, the oldest first, packed ones too. What is missing there or cannot
be read is told, so that nobody takes a hole in the log for a "nobody".
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mcpctl import private_file
from mcpctl.audit import files
from mcpctl.errors import NotFoundError

_HEAD = re.compile(rb'\{"seq":([0-9]{1,18}),"time":"([0-9TZ:.-]{20,32})"')
_LONGEST = 16 << 20
"""Bytes of a line beyond which it is none of ours: a statement has 1 MiB at most."""
_SHOWN = 8000
_TAIL = 64 << 10
_TOLD = 20
_UNREADABLE = (OSError, EOFError, zlib.error)
_BEGUN = b'"event":"tool.begun"'
"""Of a call that has a line of its own, or was killed: it counts as no call."""
_PACKED = b"\x1f\x8b"


@dataclass
class Tally:
    """How often, how many rows, and when first and last."""

    count: int = 0
    rows: int = 0
    first: str = ""
    last: str = ""

    def add(self, line: dict[str, Any], count: int = 1) -> None:
        """Count a line."""
        when, rows = str(line.get("time", "")), line.get("rows")
        self.count += count
        self.rows += rows if isinstance(rows, int) else 0
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

    When `lines` has come to its end, `faults` says in words what was missing or could not be read, and `starts` is the
    number and time of the first line that there is: of what was before it nothing is known.
    """

    path: Path
    begin: datetime | None = None
    end: datetime | None = None
    faults: list[str] = field(default_factory=list)
    starts: tuple[int, str] | None = None
    read: int = 0
    _from: bytes = b""
    _to: bytes = b"~"
    _last: tuple[int, bytes] = (0, b"")
    _skipped: bool = False
    _copies: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._from = stamp(self.begin).encode() if self.begin else b""
        self._to = stamp(self.end).encode() if self.end else b"~"

    def lines(self, wanted: Callable[[bytes], bool], decode: Callable[[bytes], Any] = _decoded) -> Iterator[Any]:
        """The lines of that time whose bytes are `wanted`, the oldest first, as dicts or what `decode` makes of them.
        Raises NotFoundError where there is no log at all."""
        with contextlib.ExitStack() as stack:
            for path, file in self._all(stack):
                try:
                    yield from self._of(path.name, file, wanted, decode)
                except _UNREADABLE as problem:
                    self._fault(f"{path.name} cannot be read to its end: {problem}")

    @property
    def missing_before(self) -> str | None:
        """In words, where the log does not reach back as far as was asked."""
        if self.starts is None or self.starts[0] == 1 or self.starts[1].encode() <= self._from or self._skipped:
            return None
        return f"the log here begins with line {self.starts[0]}, of {self.starts[1]}; nothing is known of before"

    def _fault(self, text: str) -> None:
        if len(self.faults) < _TOLD:
            self.faults.append(text)
        elif len(self.faults) == _TOLD:
            self.faults.append("and more of this kind")

    def _all(self, stack: contextlib.ExitStack) -> list[tuple[Path, io.BufferedIOBase]]:
        """Every file of the log, open, since a rotation may rename them meanwhile; the oldest first."""
        now: list[tuple[Path, io.BufferedIOBase]] = []
        with contextlib.suppress(NotFoundError):
            fd = private_file.open_checked(self.path, os.O_RDONLY)
            now = [(self.path, stack.enter_context(_buffered(fd)))]
        found = []
        for path in itertools.chain(*files.older(self.path)):
            try:
                file = _opened(path, stack)
                first = _HEAD.match(file.readline(_LONGEST)) if file is not None else None
            except _UNREADABLE:
                file, first = None, None
            if file is None or first is None:
                self._fault(f"{path.name} cannot be read as a part of the log")
            elif not self._is_before(file):
                file.seek(0)
                found.append((first[2], path, file))
        if not (now or found or self.faults):
            raise NotFoundError(f"there is no audit log {self.path}", "nothing was written yet, or audit.file is wrong")
        return [(path, file) for _, path, file in sorted(found, key=lambda one: one[0])] + now

    def _is_before(self, file: io.BufferedIOBase) -> bool:
        """Whether a file that is not packed ends before the time that is asked for."""
        if not self._from or isinstance(file, gzip.GzipFile):
            return False
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        heads = _HEAD.findall(file.read(_TAIL))
        if not heads or heads[-1][1] >= self._from:
            return False
        self._last = max(self._last, (int(heads[-1][0]), heads[-1][1]))  # where the first line that is read goes on
        self._skipped = True
        return True

    def _of(
        self, name: str, file: io.BufferedIOBase, wanted: Callable[[bytes], bool], decode: Callable[[bytes], Any]
    ) -> Iterator[Any]:
        first, broken, done = b"", 0, 0
        last, before = self._last
        try:
            for line in iter(partial(file.readline, _LONGEST), b""):
                head = _HEAD.match(line)
                if head is None or line[-2:] != b"}\n":
                    broken += line.endswith(b"\n") or len(line) == _LONGEST  # else it is being written just now
                    continue
                number, when = int(head[1]), head[2]
                if not first:
                    first, done = line, self._copies.get(line, 0)
                    self.starts = self.starts or (number, when.decode())
                if number <= done:
                    continue  # in a copy of a file that was read already
                if number != last + 1 and last and when >= self._from and before <= self._to:
                    self._gap(name, last, before.decode(), number, when.decode())
                last, before = number, when
                if not self._from <= when < self._to:
                    continue
                self.read += 1
                if wanted(line) and _BEGUN not in line:
                    try:
                        yield decode(line)
                    except (msgspec.DecodeError, ValueError, RecursionError):
                        broken += 1
        finally:
            self._last = last, before
            if first:
                self._copies[first] = max(last, done)
            if broken:
                self._fault(f"{name}: {broken} lines cannot be read")

    def _gap(self, name: str, last: int, before: str, number: int, when: str) -> None:
        if number > last:
            self._fault(f"lines {last + 1} to {number - 1} are missing, between {before} and {when}")
        else:
            self._fault(f"{name}: after line {last} comes line {number}: the log was begun anew, or tampered with")


def _buffered(fd: int) -> io.BufferedReader:
    return io.BufferedReader(io.FileIO(fd), 1 << 20)


def _opened(path: Path, stack: contextlib.ExitStack) -> io.BufferedIOBase | None:
    """A file that was moved away, whoever may read it by now, and unpacked where it is packed; None for no file."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    file = stack.enter_context(_buffered(fd))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    return stack.enter_context(gzip.GzipFile(fileobj=file)) if file.peek(2)[:2] == _PACKED else file
