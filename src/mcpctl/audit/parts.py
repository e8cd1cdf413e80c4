"""The audit log's files, as `verify` and all that reads the log choose them and read their lines: one choice for both,
so that nobody is answered from other files than those that were proved.
"""

import contextlib
import glob
import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mcpctl import private_file
from mcpctl.audit import files
from mcpctl.errors import Error, NotFoundError

CHUNK = 1 << 20
LONGEST = 16 << 20
"""Bytes of a line beyond which it is none of ours: a statement has 1 MiB at most."""
HEAD = re.compile(rb'\{"seq":([0-9]{1,18}),"time":"([0-9TZ:.-]{20,32})"')
_PACKED = b"\x1f\x8b"
_LOOKS = 100
"""At the names beside the log, until no name is gone before its file is open."""


class UnreadError(Error):
    """One of the log's files cannot be unpacked to its end. `name` is the file's."""

    name = ""


@dataclass
class Part:
    """One of the log's files, open, up to where it ended when all of them were looked at.

    `seq` and `mark` are number and text of the line that it is known by: the middle one of its first three, so that no
    single line that was changed, added or moved changes the order of the files. `time` is the latest of these three,
    and `first` the text of the first.
    """

    path: Path
    fd: int
    size: int
    packed: bool
    half: bytes = b""
    count: int = 0
    seq: int = 0
    mark: bytes = b""
    first: bytes = b""
    time: bytes = b""

    @property
    def name(self) -> str:
        return files.shown(self.path.name)

    def lines(self) -> Iterator[bytes]:
        """Its whole lines, without their ends, the last also where it lacks its own; `count` is then how many, and
        `half` what stands behind the last. Of a line that is longer than any of ours comes the beginning, as the
        last."""
        rest, self.count, self.half = b"", 0, b""
        for chunk in self.chunks():
            whole = (rest + chunk).split(b"\n")
            rest = whole.pop()
            self.count += len(whole)
            yield from whole
            if len(rest) > LONGEST:
                self.count += 1
                yield rest
                return
        if line := files.without_end(rest):
            self.count += 1
            yield line
        else:
            self.half = rest

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, unpacked."""
        if self.packed:
            yield from self._unpacked()
            return
        done = 0
        while done < self.size and (chunk := files.read_at(self.fd, min(CHUNK, self.size - done), done)):
            done += len(chunk)
            yield chunk

    def _unpacked(self) -> Iterator[bytes]:
        os.lseek(self.fd, 0, os.SEEK_SET)
        try:
            with os.fdopen(os.dup(self.fd), "rb") as file, gzip.GzipFile(fileobj=file) as unpacked:
                while chunk := unpacked.read1(CHUNK):
                    yield chunk
        except (OSError, EOFError, zlib.error) as problem:
            unread = UnreadError(f"{files.shown(self.path)} cannot be unpacked: {problem}", "restore it from a backup")
            unread.name = self.name
            raise unread from None

    def is_placed(self) -> bool:
        """Find its place in the chain; whether it has any line of the log."""
        heads = [(head, line) for line in islice(self.lines(), 3) if (head := HEAD.match(line))]
        if not heads:
            return False
        found = sorted((int(head[1]), line) for head, line in heads)
        self.seq, self.mark = found[len(found) // 2]
        self.first = heads[0][1]
        self.time = max(head[2] for head, _ in heads)
        return True


@dataclass
class Chosen:
    """The files in the order of the chain, without copies (`copies`: a name, and whose beginning or copy it is). Of
    `forks` two begin alike and differ at a line: both are among the files. `unread` are names with the reason,
    `strangers` hold no line of the log."""

    parts: list[Part] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    forks: list[tuple[Part, Part, int]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def opened(path: Path, stack: contextlib.ExitStack, unread: list[tuple[str, str]]) -> list[Part]:
    """All the log's files, each once, open until the stack is closed; `unread` gets those that cannot be."""
    parts: dict[int, Part] = {}
    failed: dict[str, str] = {}

    def add(one: Path, fd: int) -> None:
        about = os.fstat(fd)
        if about.st_ino in parts:
            os.close(fd)
            return
        stack.callback(os.close, fd)
        if stat.S_ISREG(about.st_mode):
            packed = one != path and files.read_at(fd, 2, 0) == _PACKED
            parts[about.st_ino] = Part(one, fd, about.st_size, packed)
        else:
            failed[files.shown(one.name)] = "it is no file"

    with contextlib.suppress(NotFoundError):
        add(path, private_file.open_checked(path, os.O_RDONLY))
    for _ in range(_LOOKS):
        failed.clear()
        gone = False
        for one in sorted(path.parent.glob(glob.escape(path.name) + "[.-]*")):
            if one.suffix == ".lock":
                continue
            try:
                add(one, os.open(one, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)))
            except FileNotFoundError:
                gone = True
            except OSError as problem:
                failed[files.shown(one.name)] = "it is a symbolic link" if one.is_symlink() else str(problem.strerror)
        if not gone:
            break  # else what was packed just now has another name, which this look may not have seen
    unread += failed.items()
    return list(parts.values())


def choose(parts: list[Part], path: Path, unread: list[tuple[str, str]]) -> Chosen:
    """The files in the order of the chain; the one at `path` is the last, whatever it holds."""
    found, known = Chosen(unread=unread), dict[bytes, Part]()
    for part in sorted(parts, key=lambda one: (one.path != path, one.packed, -one.size)):
        try:
            if not part.is_placed() and part.path != path:
                found.strangers += [part.name] if part.size else []
                continue
            begun = next((one for one in known.values() if part.mark and one.first == part.mark), None)
            other = begun or known.setdefault(part.mark or part.name.encode(), part)  # `begun`: of a copy of one line
            if other is part:
                continue
            line, longer = _compared(other, part)
        except UnreadError as problem:
            unread.append((problem.name, problem.message))
            continue
        if line:
            found.forks.append((other, part, line))
        elif longer:
            known[part.mark] = part
            found.copies.append((other.name, part.name))
        else:
            found.copies.append((part.name, other.name))
    forks = [part for _, part, _ in found.forks]
    found.parts = sorted([*known.values(), *forks], key=lambda one: (one.path == path, one.seq))
    return found


def _compared(one: Part, other: Part) -> tuple[int, bool]:
    """The first line in which two files differ, 0 where one is the beginning of the other; and whether the other is
    longer."""
    line, left, right = 1, b"", b""
    lefts, rights = one.chunks(), other.chunks()
    while True:
        left, right = left or next(lefts, b""), right or next(rights, b"")
        size = min(len(left), len(right))
        if not size:
            return 0, bool(right)
        pairs = enumerate(zip(left, right, strict=False))
        same = size if left[:size] == right[:size] else next(at for at, (a, b) in pairs if a != b)
        line += left.count(b"\n", 0, same)
        if same < size:
            return line, False
        left, right = left[size:], right[size:]
