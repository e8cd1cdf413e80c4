"""The audit log's files: the one that is written, those that were moved away, their lines, and what comes next."""

import contextlib
import errno
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
Ours = Callable[[re.Match[bytes]], bool]
"""Whether a match of FORM is a line of this very log, by its key."""
FORM = re.compile(
    rb'\{"seq":([0-9]{1,18}),"time":"([^"]*)",.*"key_id":"([0-9a-f]{8})","prev":"([0-9a-f]{64})","hash":"([0-9a-f]{64})"\}'
)
"""A whole line: number, time, key_id, prev, hash. What was not written to its end has never this form."""
_FIRST_LOOK = 64 << 10
_FAR = 32 << 20
"""Bytes at a file's end among which its last line is: twice the longest one."""
_CHUNK = 4 << 20


_ASIDE = (
    "if it is the log: mv -n {0} {0}.broken, and it goes on from the last line in there that is right, while "
    "`audit verify` will name what is wrong; else name another audit.file"
)

_RESTORE = (
    "restore audit.key from the backup; if it is lost, move the log and its older files to another folder, and a new "
    "log begins"
)


def shown(name: object) -> str:
    """A file's name as one line of text, whatever characters somebody has put into it."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]


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


class AnotherKeyError(ConfigError):
    """The log's last line was written with another key than the one at hand."""


def end_of(path: Path, key_id: str | None = None) -> "tuple[int, str] | None":
    """Number and hash of a file's last line; None where it has not the form of one. Raises AnotherKeyError where it was
    not written with the key of that id, if one is given."""
    fd = open_moved(path)
    if fd is None:
        return None
    try:
        return last_line(fd, os.fstat(fd).st_size, path, key_id)[0]
    except AnotherKeyError:
        raise
    except ConfigError:
        return None
    finally:
        os.close(fd)


def end_before(path: Path, ours: "Ours", known: int) -> tuple[int, str] | None:
    """Number and hash of the last line that is `ours` in all the files that the log was before; None where there is
    none. Raises ConfigError where a later one, and one behind number `known`, may be in what cannot be read: a log that
    went on from another would be two."""
    end = max(filter(None, (last_of(one, ours) for one in _beside(path))), default=None)
    for one in _beside(path):
        if _packed_from(one, ours) > max(known, end[0] if end else 0):
            name = shown(one)
            raise ConfigError(f"the log has to go on from {name}, which is packed", f"unpack it: gunzip {name}")
    return end


def last_of(path: Path, ours: "Ours") -> tuple[int, str] | None:
    """Number and hash of a file's last line that is `ours`, whatever stands behind it; None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENOENT):  # the log was never a link; what is gone was packed
            return None
        raise ConfigError(
            f"the log may have to go on from {shown(path)}, which cannot be opened: {problem.strerror}",
            "give it to the log's owner, with chown and chmod; the log goes on as soon as its end can be read there",
        ) from None
    try:
        size = os.fstat(fd).st_size
        for look in (_FIRST_LOOK, _FAR) if stat.S_ISREG(os.fstat(fd).st_mode) else ():
            if (found := _last_within(fd, max(0, size - look), size, ours)) is not None:
                return int(found[1]), found[5].decode("ascii")
        if size <= _FAR or _last_within(fd, 0, _FIRST_LOOK, ours) is None:
            return None  # another installation's, or a planted one, which may say any number
    finally:
        os.close(fd)
    raise ConfigError(
        f"the last {_FAR >> 20} MiB of {shown(path)} are no lines of this log",
        "restore it, or move it elsewhere: the log then goes on from what is left, and `audit verify` names the gap",
    )


def _last_within(fd: int, start: int, end: int, ours: "Ours") -> re.Match[bytes] | None:
    part, *lines = read_at(fd, end - start, start).split(b"\n")
    for line in reversed(lines if start else [part, *lines]):
        found = FORM.fullmatch(line.rstrip(b"\0"))
        if found is not None and ours(found):
            return found
    return None


def _packed_from(path: Path, ours: "Ours") -> int:
    """The number of a packed file's first line, if that is `ours`; else 0."""
    import gzip
    import zlib

    fd = open_moved(path)
    if fd is None:
        return 0
    with os.fdopen(fd, "rb") as file, contextlib.suppress(OSError, EOFError, zlib.error):
        found = FORM.fullmatch(gzip.GzipFile(fileobj=file).readline(_FAR).removesuffix(b"\n"))
        return int(found[1]) if found is not None and ours(found) else 0
    return 0


def _beside(path: Path) -> list[Path]:
    return [one for one in path.parent.glob(glob.escape(path.name) + "[.-]*") if one.suffix != ".lock"]


def older(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that the log was before, the last first; and by name those beside them that cannot be read as such:
    packed ones, and others."""
    beside = _beside(path)
    ends = {one: end for one in beside if (end := end_of(one)) is not None}
    return sorted(ends, key=lambda one: ends[one], reverse=True), sorted(set(beside) - set(ends))


def read_at(fd: int, size: int, start: int) -> bytes:
    """Up to so many bytes from there on."""
    os.lseek(fd, start, os.SEEK_SET)  # pread(2) is POSIX's alone
    return os.read(fd, size)


def without_end(rest: bytes) -> bytes:
    """What stands behind a file's last newline where it is a whole line that lacks only its own; else nothing: the half
    of a line. NUL bytes behind either are what a power failure leaves, of which the length was written and not the
    data."""
    line = rest.rstrip(b"\0")
    return line if FORM.fullmatch(line) else b""


def is_half(rest: bytes) -> bool:
    """Whether a line of the log may have begun so, which a crash has cut short."""
    line = rest.rstrip(b"\0")
    return line.startswith(BEGINNING) or BEGINNING.startswith(line)


def last_line(fd: int, size: int, path: Path, key_id: str | None = None) -> "tuple[tuple[int, str] | None, int]":
    """Number and hash of the last whole line, and where it ends; what stands behind it is the half of one. Raises
    ConfigError where it is none of a log, AnotherKeyError where it is none of that key's."""
    tail, start = b"", size
    while start > 0 and tail[: tail.rfind(b"\n") + 1].rstrip(b"\n").count(b"\n") < 1:
        step = min(start, max(_FIRST_LOOK, len(tail)))
        start -= step
        tail = read_at(fd, step, start) + tail
    whole = tail.rfind(b"\n") + 1
    if not is_half(tail[whole:]):
        raise ConfigError(f"{path} does not end with a line of mcpctl's", _ASIDE.format(path))
    line = without_end(tail[whole:])
    whole += len(line)
    line = line or tail[:whole].rstrip(b"\n").rpartition(b"\n")[2]
    if not line:
        return None, start + whole
    found = parsed(line)
    seq, digest = found.get("seq"), found.get("hash")
    if type(seq) is not int or seq < 1 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(f"the last line of {path} is not one of mcpctl's", _ASIDE.format(path))
    if key_id is not None and found.get("key_id") != key_id:
        raise AnotherKeyError(f"the last line of {path} was written with another audit.key", _RESTORE)
    return (seq, digest), start + whole


def read_back(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines from the last to the first; one that cannot be read comes as {"event": "unreadable"}."""
    return map(parsed, back(private_file.open_checked(path, os.O_RDONLY)))


def read_older(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that `older` found, likewise."""
    fd = open_moved(path)
    return iter(()) if fd is None else map(parsed, back(fd))


def back(fd: int) -> Iterator[bytes]:
    """An open file's lines from the last to the first; then it is closed."""
    try:
        size = os.fstat(fd).st_size
        start, rest, half = size, b"", True
        while start > 0:
            step = min(start, _CHUNK)
            start -= step
            rest, *whole = (read_at(fd, step, start) + rest).split(b"\n")
            if half and whole:
                whole[-1:] = filter(None, [without_end(whole[-1])])  # the half of a line is none
                half = False
            yield from reversed(whole)
            if not start and (not half or (rest := without_end(rest))):
                yield rest
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
    last, done = None, os.fstat(fd).st_size
    with contextlib.suppress(ConfigError):
        last, done = last_line(fd, done, path)
    mark = read_at(fd, 1, done - 1) if done else b"\n"  # another byte where the last line lacks its newline
    return _follow(path, fd, done, mark, last[0] if last else 0, pause)


def _follow(
    path: Path, fd: int, done: int, mark: bytes, seq: int, pause: Callable[[float], None]
) -> Iterator[dict[str, Any]]:
    try:
        while True:
            now = private_file.fingerprint(path)
            about = os.fstat(fd)
            if about.st_size < done or (done and read_at(fd, 1, done - 1) != mark):
                done = 0  # emptied under us: what a crash left half written is not counted in `done`
                missed = list(_since(path, seq)) if seq else []  # written since our last look, and in the copy now
                seq = max([seq, *map(number, missed)])
                yield from reversed(missed)
            whole = _whole_lines(fd, done)  # read after the look at the name: nothing is written to it after its move
            if whole:
                done += len(whole)
                lines = list(map(parsed, whole.removeprefix(b"\n" if mark != b"\n" else b"").split(b"\n")[:-1]))
                mark = b"\n"
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
        if not private_file.is_at(moved, os.fstat(fd)):
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
        if not private_file.is_at(beside, os.fstat(to.fileno())):
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


def parsed(line: bytes) -> dict[str, Any]:
    """A line's fields; {"event": "unreadable"} where it cannot be read."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    return (
        found if isinstance(found, dict) else {"event": "unreadable", "reason": line[:200].decode("utf-8", "replace")}
    )
