"""The audit log's files: the one that is written, those that were moved away, their lines, and what comes next."""

import contextlib
import glob
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mcpctl import private_file
from mcpctl.errors import ConfigError, ConflictError, Error, NotFoundError

_DIGEST = re.compile("[0-9a-f]{64}")
BEGINNING = b'{"seq":'
"""How every line begins."""
_FIRST_LOOK = 64 << 10
_CHUNK = 4 << 20


Ours = Callable[[bytes], bool]
"""Whether a line is one of this very log, by its key."""


def open_moved(path: Path) -> int | None:
    """A file that was moved away, whatever group may read it by now; None where it cannot be the log of before."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def end_of(path: Path, ours: "Ours" = lambda line: True) -> "tuple[int, str] | None":
    """Number and hash of the last line of a file that was moved away; None where there is none of ours."""
    fd = open_moved(path)
    if fd is None:
        return None
    try:
        return last_line(fd, os.fstat(fd).st_size, path, ours)[0]
    except ConfigError:
        return None
    finally:
        os.close(fd)


def older(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that the log was before, the last first; and by name those beside them that cannot be read as such:
    packed ones, and others."""
    beside = [one for one in path.parent.glob(glob.escape(path.name) + "[.-]*") if one.suffix != ".lock"]
    ends = {one: end for one in beside if (end := end_of(one)) is not None}
    return sorted(ends, key=lambda one: ends[one], reverse=True), sorted(set(beside) - set(ends))


def read_at(fd: int, size: int, start: int) -> bytes:
    """Up to so many bytes from there on."""
    os.lseek(fd, start, os.SEEK_SET)  # pread(2) is POSIX's alone
    return os.read(fd, size)


def last_line(fd: int, size: int, path: Path, ours: "Ours" = lambda line: True) -> "tuple[tuple[int, str] | None, int]":
    """Number and hash of the last whole line, and where it ends; what stands behind it is the half of one. Raises
    ConfigError where it is none of a log, or `ours` says no."""
    tail, start = b"", size
    while start > 0 and tail[: tail.rfind(b"\n") + 1].rstrip(b"\n").count(b"\n") < 1:
        step = min(start, max(_FIRST_LOOK, len(tail)))
        start -= step
        tail = read_at(fd, step, start) + tail
    whole = tail.rfind(b"\n") + 1
    half = tail[whole:]
    if not (half.startswith(BEGINNING) or BEGINNING.startswith(half)):
        raise ConfigError(f"{path} does not end with a line of mcpctl's", "is it the right file? it is left as it is")
    line = tail[:whole].rstrip(b"\n").rpartition(b"\n")[2]
    if not line:
        return None, start + whole
    found = _parse(line)
    seq, digest = found.get("seq"), found.get("hash")
    if type(seq) is not int or seq < 1 or not isinstance(digest, str) or not (_DIGEST.fullmatch(digest) and ours(line)):
        raise ConfigError(
            f"the last line of {path} is not one of mcpctl's", "move the file away; the log goes on in a new one"
        )
    return (seq, digest), start + whole


def read_back(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines from the last to the first; one that cannot be read comes as {"event": "unreadable"}."""
    return _back(private_file.open_checked(path, os.O_RDONLY))


def read_older(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that `older` found, likewise."""
    fd = open_moved(path)
    return iter(()) if fd is None else _back(fd)


def _back(fd: int) -> Iterator[dict[str, Any]]:
    try:
        size = os.fstat(fd).st_size
        start, rest, half = size, b"", True
        while start > 0:
            step = min(start, _CHUNK)
            start -= step
            rest, *whole = (read_at(fd, step, start) + rest).split(b"\n")
            if half and whole:
                whole.pop()  # what stands behind the last line's end is no line
                half = False
            yield from map(_parse, reversed(whole))
            if not start and not half:
                yield _parse(rest)
    finally:
        os.close(fd)


def follow(path: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """Lines as they are written from now on, for ever; goes over to the new file when the old is moved away.

    From now on: from this call, not from the first look at what it returns.
    """
    try:
        fd = private_file.open_checked(path, os.O_RDONLY)
    except NotFoundError:
        found, _ = older(path)  # moved away just now
        moved = open_moved(found[0]) if found else None
        if moved is None:
            raise
        fd = moved
    size = os.fstat(fd).st_size
    last = None
    with contextlib.suppress(ConfigError):
        last, _ = last_line(fd, size, path)
    return _follow(path, fd, size, last[0] if last else 0, pause)


def _follow(path: Path, fd: int, done: int, seq: int, pause: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    try:
        while True:
            now = private_file.fingerprint(path)
            about = os.fstat(fd)
            if about.st_size < done or (done and read_at(fd, 1, done - 1) != b"\n"):
                done = 0  # emptied under us: what a crash left half written is not counted in `done`
                missed = list(_since(path, seq)) if seq else []  # written since our last look, and in the copy now
                seq = max([seq, *map(number, missed)])
                yield from reversed(missed)
            whole = _whole_lines(fd, done)  # read after the look at the name: nothing is written to it after its move
            if whole:
                done += len(whole)
                lines = list(map(_parse, whole[:-1].split(b"\n")))
                seq = max([seq, *(number(line) for line in lines)])
                yield from lines
            elif now != private_file.ABSENT and now[0] != about.st_ino:
                try:
                    new = private_file.open_checked(path, os.O_RDONLY)
                except NotFoundError:
                    continue
                os.close(fd)
                fd, done = new, 0
                missed = list(_since(path, seq)) if seq else []  # in files that came and went between two looks
                seq = max([seq, *map(number, missed)])
                yield from reversed(missed)
            else:
                pause(0.2)
    finally:
        os.close(fd)


def _since(path: Path, seq: int) -> Iterator[dict[str, Any]]:
    """The lines after that one in the files that were moved away, the last first."""
    for one in older(path)[0]:
        for line in read_older(one):
            if number(line) <= seq:
                return
            yield line


def pack(moved: Path) -> Path | None:
    """Pack a file that was moved away; the packed one takes its place only when the same can be read from it. None
    where another has packed it meanwhile: one does at a time, under the lock of the file itself."""
    packed = moved.with_name(moved.name + ".gz")
    fd = open_moved(moved)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        private_file.lock(fd)
        if not private_file._is(moved, os.fstat(fd)):
            return None
        if os.path.lexists(packed):
            raise ConflictError(f"{packed} exists already", "both are left as they are; remove one of them")
        beside = moved.with_name(f".{packed.name}.tmp")
        beside.unlink(missing_ok=True)  # of a command that was killed
        try:
            _pack(file, moved, beside, packed)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if not private_file.POSIX:
            file.close()  # Windows removes nothing that is open
        moved.unlink()  # under the lock: who waits for it finds it gone
    return packed


def _pack(file: BinaryIO, moved: Path, beside: Path, packed: Path) -> None:
    import gzip
    import shutil

    private_file.create(beside, b"")
    with beside.open("r+b") as to:
        with gzip.GzipFile("", "wb", fileobj=to, mtime=0) as smaller:
            shutil.copyfileobj(file, smaller, _CHUNK)
        to.flush()
        os.fsync(to.fileno())
        file.seek(0)
        to.seek(0)
        with gzip.GzipFile(fileobj=to) as same:
            while chunk := file.read(_CHUNK):
                if same.read(len(chunk)) != chunk:
                    raise Error(f"{packed} cannot be read back", "is the disk in order?")
        shutil.copystat(moved, beside)
        if not private_file._is(beside, os.fstat(to.fileno())):
            raise Error(f"{beside} was replaced by somebody else", f"{moved} is left as it is; try again")
    beside.rename(packed)
    private_file._sync_folder(packed.parent)


def number(line: dict[str, Any]) -> int:
    """A line's `seq`; 0 where it has none."""
    found = line.get("seq")
    return found if isinstance(found, int) else 0


def _whole_lines(fd: int, start: int) -> bytes:
    """The next whole lines from there on; a last one without its end is left for later."""
    data = b""
    while chunk := read_at(fd, _CHUNK, start + len(data)):
        data += chunk
        if b"\n" in chunk:
            break
    return data[: data.rfind(b"\n") + 1]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    return (
        found if isinstance(found, dict) else {"event": "unreadable", "reason": line[:200].decode("utf-8", "replace")}
    )
