"""Is the log whole? Walks the chain through all its files, and names the first line where it breaks.

A line's hash is over the hash before it, so one comparison a line is all that a whole log needs. Only where it fails
the lines behind are looked at, to tell what was done. A line that is authentic (its hash is that of its text and of
the `prev` that it names) was written by somebody with the key, and stands in the wrong place. Any other was changed or
added.
"""

import contextlib
import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mcpctl import private_file
from mcpctl.audit import files
from mcpctl.audit.anchors import Anchor
from mcpctl.audit.log import FIRST, key_id
from mcpctl.audit.parts import Chosen, Part, UnreadError, choose, opened
from mcpctl.errors import ConfigError, ConflictError, NotFoundError

_PATIENCE = 2.0
_TAIL = 75
"""Bytes of `,"hash":"…"}`, with which a line ends."""
_FIRST = FIRST.encode("ascii")


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong. `kind`: changed, removed, added, reordered; missing (what the log began with), cut
    (what it ended with); unread (a whole file). `line` is 0 where it is of no line."""

    kind: str
    file: str
    line: int
    seq: int | None
    reason: str

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line else ""
        return f"{self.file}{line}{f' (seq {self.seq})' if self.seq else ''}: {self.reason}"


@dataclass
class Report:
    """What was found. `anchors` is how many agree, `anchored` the last line that one of them vouches for."""

    files: list[str]
    lines: int = 0
    first: int = 0
    last: int = 0
    hash: str = FIRST
    anchors: int = 0
    anchored: int = 0
    fault: Fault | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Line:
    """What an authentic line says of its place."""

    seq: int
    time: str
    prev: bytes


def _hasher(key: bytes) -> Callable[[bytes, bytes], bytes]:
    """HMAC-SHA-256(key, prev ‖ body) in hex, as RFC 2104 makes it. With both keyed states made once it takes half of
    the time of hmac.digest()."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
    outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def digest(prev: bytes, body: bytes) -> bytes:
        one, two = inner.copy(), outer.copy()
        one.update(prev + body)
        two.update(one.digest())
        return two.hexdigest().encode("ascii")

    return digest


def verify(path: Path, key: bytes, anchors: Collection[Anchor] = (), kept_since: datetime | None = None) -> Report:
    """Walk the log at `path` and the files that it was before. `kept_since`: older lines may be gone, since they are
    removed on purpose. The anchors are to be read before this is called: the log may grow meanwhile, but not shrink.

    Raises NotFoundError where there is no log and no anchor, ConfigError where it is another key's.
    """
    with contextlib.ExitStack() as stack:
        return walk(path, _chosen(path, stack, anchors), key, anchors, kept_since)


def walk(
    path: Path, chosen: Chosen, key: bytes, anchors: Collection[Anchor] = (), kept_since: datetime | None = None
) -> Report:
    """`verify`, of files that were chosen already."""
    through = _Walk(key, anchors, kept_since)
    remarks = [f"not read, since it holds no line of this log: {name}" for name in chosen.strangers]
    remarks += [f"not read, since it begins as {other} does: {name}" for name, other in chosen.copies]
    if chosen.parts and chosen.parts[-1].path != path:
        remarks.append(f"there is no {path.name}, only files that it was before")
    through.report = Report([part.name for part in chosen.parts], remarks=remarks)
    try:
        through.report.fault = _unread(chosen) or through.through(chosen.parts)
    except UnreadError as problem:
        through.report.fault = Fault("unread", problem.name, 0, None, problem.message)
    return through.report


def _chosen(path: Path, stack: contextlib.ExitStack, anchors: Collection[Anchor]) -> Chosen:
    """The files as they are at one moment. The lock is held only as long as that takes."""
    unread: list[tuple[str, str]] = []
    name = path.with_name(path.name + ".lock")
    with contextlib.ExitStack() as held:
        try:
            lock = private_file.open_checked(name, os.O_RDONLY)
            held.callback(os.close, lock)
            private_file.lock(lock, _PATIENCE)
        except NotFoundError:  # of a copy elsewhere there is none, and nobody writes to it
            pass
        except TimeoutError:
            hint = f"try again; if it stays so, a process has stopped while it wrote: fuser -v {name}"
            raise ConflictError(f"another process holds {name}", hint) from None
        found = opened(path, stack, unread)
    chosen = choose(found, path, unread)
    if not (chosen.parts or chosen.unread or anchors):
        raise NotFoundError(f"there is no audit log {path}", "is audit.file right? nothing may have been written yet")
    return chosen


def _unread(chosen: Chosen) -> Fault | None:
    """What is wrong with the files themselves."""
    for name, why in chosen.unread:
        return Fault("unread", name, 0, None, f"it cannot be read, and may hold lines: {why}")
    for one, other, line in chosen.forks:
        return Fault("changed", other.name, line, None, f"{one.name} begins alike, and has another line here")
    return None


class _Walk:
    """One walk through the chain."""

    def __init__(self, key: bytes, anchors: Collection[Anchor], kept_since: datetime | None) -> None:
        self.report = Report([])
        self._key_id = key_id(key)
        self._digest = _hasher(key)
        self._anchors = sorted(anchors, key=lambda one: one.seq)
        self._at = 0
        self._kept_since = kept_since

    def _authentic(self, line: bytes) -> _Line | None:
        found = files.FORM.fullmatch(line)
        if found is None or self._digest(found[4], line[:-_TAIL]) != found[5]:
            return None
        return _Line(int(found[1]), found[2].decode("utf-8", "replace"), found[4])

    # -- the chain -----------------------------------------------------------------------------------------------

    def through(self, parts: list[Part]) -> Fault | None:
        """The first fault; None where the chain is whole up to its end, and that is where it should be."""
        digest, lines = self._digest, _all(parts)
        first, prev, seq, waiting = 1, _FIRST, 0, self._next_anchor(0)
        for part, number, line in lines:
            made = digest(prev, line[:-_TAIL])
            if line[-_TAIL:] != b',"hash":"%b"}' % made or not line.startswith(b'{"seq":%d,' % (seq + 1)):
                self._so_far(first, seq, prev)
                begun = self._begin(part, line) if not self.report.lines else None
                if begun is None:
                    return self._diagnose(prev, seq, (part, number, line), lines)
                if isinstance(begun, Fault):
                    return begun
                first, seq, made = begun, begun - 1, line[-66:-2]
                waiting = self._next_anchor(seq)
            prev, seq = made, seq + 1
            if seq == waiting:
                if fault := self._held_against(part, number, seq, prev):
                    self._so_far(first, seq, prev)
                    return fault
                waiting = self._next_anchor(seq)
        self._so_far(first, seq, prev)
        return self._half(parts) or self._end(parts)

    def _so_far(self, first: int, last: int, digest: bytes) -> None:
        self.report.lines, self.report.hash = last - first + 1, digest.decode("ascii")
        if self.report.lines:
            self.report.first, self.report.last = first, last

    def _begin(self, part: Part, line: bytes) -> int | Fault | None:
        """The number that the log may begin with, where older lines were removed on purpose; None where this is not
        what is wrong with its first line."""
        found = self._authentic(line)
        if found is None or found.seq == 1 or self._kept_since is None:
            return None
        if datetime.fromisoformat(found.time) <= self._kept_since:
            return found.seq
        reason = f"the log begins here, at {found.time}, and older lines than that are to be kept"
        return Fault("missing", part.name, 1, found.seq, reason)

    def _diagnose(self, prev: bytes, seq: int, at: "_At", rest: "Iterator[_At]") -> Fault:
        """What was done where the line at `at` does not follow the one before it, number `seq` with the hash `prev`."""
        part, number, line = at
        found = self._authentic(line)
        if found is None:
            kind, reason = self._not_authentic(prev, line, rest)
            return Fault(kind, part.name, number, seq + 1, reason)
        if found.seq > seq + 1:
            kind, reason = self._too_early(seq + 1, found.seq, line, rest)
        elif found.seq == seq + 1:
            kind, reason = "removed", "the line that it was written behind is not the one before it"
        elif found.prev == _FIRST:
            kind, reason = "added", f"a chain begins anew here, behind seq {seq}: was the log removed, and put back?"
        else:
            kind, reason = "added", "a line with this number stands before it already"
        return Fault(kind, part.name, number, seq + 1 if kind in ("removed", "missing") else found.seq, reason)

    def _not_authentic(self, prev: bytes, line: bytes, rest: "Iterator[_At]") -> tuple[str, str]:
        after = next((one for _, _, other in rest if (one := self._authentic(other)) is not None), None)
        if after is not None and after.prev == prev:
            return "added", "it was added by somebody without the key: the chain goes on behind it without it"
        form = files.FORM.fullmatch(line)
        other_key = form[3].decode("ascii") if form is not None and form[3].decode("ascii") != self._key_id else None
        if after is None and not self.report.lines and other_key:
            raise ConfigError(
                f"the log was written with another key: its lines say key_id {other_key}, and audit.key_file holds "
                f"{self._key_id}",
                "restore the key of this log from the backup",
            )
        if line.endswith(b"\r"):
            return "changed", "it ends with CR LF: the file was converted, or it is none of mcpctl's"
        if other_key:
            reason = (
                f"its key_id, {other_key}, is another key's: audit.key was replaced, or somebody without it added it"
            )
            return "changed", reason
        if after is None:
            return "changed", "it was changed, or added by somebody without the key: its hash is not that of its text"
        return "changed", "it was changed: its hash is not that of its text"

    def _too_early(self, wanted: int, seq: int, line: bytes, rest: "Iterator[_At]") -> tuple[str, str]:
        """An authentic line stands where number `wanted` should: is that one gone, or somewhere else?"""
        start, place = b'{"seq":%d,' % wanted, None
        for part, number, other in rest:
            if other == line:
                return "added", f"it stands in its own place, too: {part.name}, line {number}"
            if place is None and other.startswith(start) and self._authentic(other):
                place = f"{part.name}, line {number}"
        if place is not None:
            return "reordered", f"seq {wanted} should stand here, which is found at {place}"
        gone = f"seq {wanted}" if seq == wanted + 1 else f"{seq - wanted} lines, seq {wanted} to {seq - 1},"
        if self.report.lines:
            return "removed", f"{gone} should stand here, and {'is' if seq == wanted + 1 else 'are'} gone"
        return "missing", f"the log begins here, with seq {seq}, and what was written before is not there"

    def _half(self, parts: list[Part]) -> Fault | None:
        """What stands behind the last whole line of a file: a crash leaves the beginning of one."""
        for part in parts:
            if not part.half:
                continue
            if not files.is_half(part.half):
                reason = "it is no line of mcpctl's, and has no end"
                return Fault("added", part.name, part.count + 1, None, reason)
            what = "the half of a line" if part.half.strip(b"\0") else "a row of NUL bytes"
            self.report.remarks.append(f"{part.name} ends with {what}, as a crash or somebody leaves it")
        return None

    # -- what is known from elsewhere ----------------------------------------------------------------------------

    def _next_anchor(self, after: int) -> int:
        """The number of the first line behind that one that there is an anchor of; 0 where there is none."""
        self._at = bisect_right(self._anchors, after, key=lambda one: one.seq)
        return self._anchors[self._at].seq if self._at < len(self._anchors) else 0

    def _held_against(self, part: Part, number: int, seq: int, digest: bytes) -> Fault | None:
        """A line held against the anchors that `_next_anchor` has found."""
        while self._at < len(self._anchors) and (anchor := self._anchors[self._at]).seq == seq:
            if anchor.hash != digest:
                reason = f"another line stood here, says {anchor}: the log was cut off before it, and written on"
                return Fault("changed", part.name, number, seq, reason)
            self._at += 1
            self.report.anchors += 1
            self.report.anchored = seq
        return None

    def _end(self, parts: list[Part]) -> Fault | None:
        last = self.report.last
        name, line = (parts[-1].name, parts[-1].count + 1) if parts else ("the log", 0)
        if not self._anchors and not last:
            return Fault("cut", name, line, 1, "there is no line in it, and a log begins with its first")
        if not self._anchors or self._anchors[-1].seq <= last:
            return None
        far = self._anchors[-1]
        many = "1 line" if far.seq == last + 1 else f"{far.seq - last} lines"
        reason = f"{'the tail' if last else 'all of it'} is cut off: {many} after seq {last}, says {far}"
        return Fault("cut", name, line, last + 1, reason)


_At = tuple[Part, int, bytes]
"""A line and where it stands: its file and its number there."""


def _all(parts: list[Part]) -> Iterator[_At]:
    """All lines of the files."""
    for part in parts:
        for number, line in enumerate(part.lines(), 1):
            yield part, number, line
