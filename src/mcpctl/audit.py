"""The audit log: append one chained line; follow.

One JSON line an event. `hash` = HMAC-SHA-256(key, prev ‖ the line's bytes before `,"hash"`) in hex, where `prev` is
the hash of the line before (64 zeros before the first) as ASCII. Whoever lacks the key can neither change, remove,
add nor reorder a line without breaking every hash after it. Lines cut off at the very end leave no trace in the file
itself: a process that still runs goes on from where it was, so that the gap shows; else a copy elsewhere shows it.

One chain, many writers (workers, commands): an append takes the lock file's lock, looks whether the file's end is
where this writer left it, reads the last line only if not, and writes one line with one write(2).
"""

import contextlib
import glob
import hashlib
import hmac
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.errors import ConfigError, Error, NotFoundError, UnavailableError

FIRST = "0" * 64
FIELDS = (
    "seq", "time", "event", "request_id", "token", "user", "tenant", "client_ip", "transport", "tool", "database",
    "role", "backend_pid", "statement", "statement_hmac", "relations", "rows", "bytes", "elapsed_ms", "outcome",
    "reason", "key_id", "prev", "hash",
)  # fmt: skip
"""Every key that a line may have, in the order in which they stand. What has no value is left out."""

EVENTS = (
    "auth.ok", "auth.refused", "token.added", "token.revoked", "token.expired", "token.removed", "token.rotated",
    "pool.opened", "pool.closed", "query.cancelled", "tool.called", "tool.refused", "user.added", "user.roles",
    "user.removed",
    "user.disabled", "user.enabled", "tenant.added", "tenant.removed",
    "grant.printed", "grant.added", "grant.removed", "database.registered", "database.unregistered", "config.created",
    "config.database_added", "config.database_removed", "config.database_hardened", "config.key_rotated",
    "server.started", "server.stopped",
)  # fmt: skip
_DIGEST = re.compile("[0-9a-f]{64}")
_BEGINNING = b'{"seq":'
_FIRST_LOOK = 64 << 10
_CHUNK = 4 << 20
_ROOM = 64 << 10


@dataclass
class _End:
    """Where the chain ends: the file's identity and size, the last line's number and hash."""

    inode: int
    size: int
    seq: int
    hash: str


_PATIENCE = 0.25
"""Seconds to wait for another writer, who holds the lock for a tenth of a millisecond unless it has stopped."""


class AuditLog:
    """Appends to one log. Not for threads; processes may share the file."""

    def __init__(self, path: Path, key: bytes, now: Callable[[], datetime]) -> None:
        self.path = path
        self._key = key
        self.key_id = hashlib.sha256(key).hexdigest()[:8]
        self._now = now
        self._lock = -1
        self._file = -1
        self._end: _End | None = None

    def close(self) -> None:
        """Let go of the files."""
        for fd in (self._lock, self._file):
            if fd >= 0:
                os.close(fd)
        self._lock = self._file = -1
        self._end = None

    def statement_hmac(self, statement: str) -> str:
        """The keyed digest that stands for a statement whose text is not kept."""
        return hmac.new(self._key, b"statement\0" + statement.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def append(self, event: str, **fields: Any) -> None:
        """Write one line. Raises UnavailableError when it could not be written whole; then nothing was."""
        if event not in EVENTS:
            raise ValueError(f"{event} is no audit event")
        if unknown := fields.keys() - set(FIELDS):
            raise ValueError(f"no such audit fields: {sorted(unknown)}")
        with self._locked():
            self._write({"time": _stamp(self._now()), "event": event, **fields})

    def check(self) -> None:
        """Raises UnavailableError where a line could not be appended now."""
        with self._locked():
            self._find_end()
            if hasattr(os, "fstatvfs"):
                disk = os.fstatvfs(self._file)
                if disk.f_bavail * disk.f_frsize < _ROOM:
                    raise self._full()

    def _full(self) -> Error:
        return UnavailableError(f"the audit log {self.path} cannot be written: the disk is full", "make room")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._take_lock()
            try:
                yield
            finally:
                private_file.unlock(self._lock)
        except OSError as problem:
            raise UnavailableError(
                f"the audit log {self.path} cannot be written: {problem.strerror}",
                "check its owner, its mode and the disk",
            ) from None
        except UnavailableError:
            raise
        except Error as problem:
            raise UnavailableError(f"the audit log cannot be written: {problem.message}", problem.hint) from None

    def _take_lock(self) -> None:
        path = self.path.with_name(self.path.name + ".lock")
        while True:
            if self._lock < 0:
                self._lock = private_file.open_checked(path, os.O_RDWR | os.O_CREAT)
            private_file.lock(self._lock, _PATIENCE)
            if private_file.fingerprint(path)[0] == os.fstat(self._lock).st_ino:
                return
            os.close(self._lock)  # somebody removed it: what the others hold is another one
            self._lock = -1

    def _write(self, fields: dict[str, Any]) -> None:
        end = self._find_end()
        line, digest = self._line(end, fields)
        written = os.write(self._file, line)
        if written != len(line):  # a full disk takes a part: take it back, so that every line there is whole
            os.ftruncate(self._file, end.size)
            raise self._full()
        self._end = _End(end.inode, end.size + len(line), end.seq + 1, digest)

    def _line(self, end: _End, fields: dict[str, Any]) -> tuple[bytes, str]:
        """The line that comes next, in printable ASCII alone, and its hash."""
        values = {"seq": end.seq + 1, **fields, "key_id": self.key_id, "prev": end.hash}
        ordered = {name: values[name] for name in FIELDS if values.get(name) is not None}
        text = json.dumps(ordered, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")
        body = text.encode("ascii")[:-1]
        digest = chain_hash(self._key, end.hash, body)
        return body + b',"hash":"' + digest.encode("ascii") + b'"}\n', digest

    def _find_end(self) -> _End:
        """The chain's end, under the lock. Opens the file again where it has been moved away."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            found = None
        here = found is not None and (found.st_ino, found.st_size)
        if self._file >= 0 and self._end is not None and here == (self._end.inode, self._end.size):
            return self._end
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._file = private_file.open_checked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        found = os.fstat(self._file)
        size = found.st_size
        last = None
        if size:
            last, size = _last_line(self._file, size, self.path)
            if size < found.st_size:
                os.ftruncate(self._file, size)  # what a crash left half written was never acknowledged
        if last is None:
            last = self._before_rotation()
        seq, digest = last or (0, FIRST)
        if self._end is not None and self._end.seq > seq:
            seq, digest = self._end.seq, self._end.hash  # moved away and packed, or cut: we still know where we were
        self._end = _End(found.st_ino, size, seq, digest)
        return self._end

    def _before_rotation(self) -> "tuple[int, str] | None":
        """Where the files that were moved away end, so that a new one goes on from there."""
        files, _ = older(self.path)
        return end_of(files[0]) if files else None


def _open_moved(path: Path) -> int | None:
    """A file that was moved away, whatever group may read it by now; None where it cannot be the log of before."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def end_of(path: Path) -> "tuple[int, str] | None":
    """Number and hash of the last line of a file that was moved away; None where there is none of ours."""
    fd = _open_moved(path)
    if fd is None:
        return None
    try:
        return _last_line(fd, os.fstat(fd).st_size, path)[0]
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


def chain_hash(key: bytes, prev: str, body: bytes) -> str:
    """The hash of a line: `body` is its bytes before `,"hash"`, `prev` the hash of the line before it."""
    return hmac.new(key, prev.encode("ascii") + body, hashlib.sha256).hexdigest()


def _read_at(fd: int, size: int, start: int) -> bytes:
    os.lseek(fd, start, os.SEEK_SET)  # pread(2) is POSIX's alone
    return os.read(fd, size)


def _last_line(fd: int, size: int, path: Path) -> "tuple[tuple[int, str] | None, int]":
    """Number and hash of the last whole line, and where it ends; what stands behind it is the half of one."""
    tail, start = b"", size
    while start > 0 and tail[: tail.rfind(b"\n") + 1].rstrip(b"\n").count(b"\n") < 1:
        step = min(start, max(_FIRST_LOOK, len(tail)))
        start -= step
        tail = _read_at(fd, step, start) + tail
    whole = tail.rfind(b"\n") + 1
    half = tail[whole:]
    if not (half.startswith(_BEGINNING) or _BEGINNING.startswith(half)):
        raise ConfigError(f"{path} does not end with a line of mcpctl's", "is it the right file? it is left as it is")
    line = tail[:whole].rstrip(b"\n").rpartition(b"\n")[2]
    if not line:
        return None, start + whole
    found = _parse(line)
    seq, digest = found.get("seq"), found.get("hash")
    if type(seq) is not int or seq < 1 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(
            f"the last line of {path} is not one of mcpctl's", "move the file away; the log goes on in a new one"
        )
    return (seq, digest), start + whole


def _stamp(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_key(path: Path) -> bytes:
    """The chain's key: 64 hex digits in a 0600 file."""
    try:
        data = private_file.read(path, limit=4096).data.strip()
    except NotFoundError as problem:
        hint = "restore it from the backup; for a new installation, `mcpctl init` makes it"
        raise ConfigError(problem.message, hint) from None
    try:
        key = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            f"{path} does not hold 64 hex digits", "restore it from the backup: the chain needs this very key"
        )
    return key


def installation(key: bytes) -> str:
    """What marks things elsewhere as this installation's: it stays as long as the key does, which is never dropped."""
    return hmac.digest(key, b"mcpctl installation", "sha256").hex()[:12]


def new_key() -> bytes:
    """The content of a new key file."""
    return os.urandom(32).hex().encode("ascii") + b"\n"


def read_back(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines from the last to the first; one that cannot be read comes as {"event": "unreadable"}."""
    return _back(private_file.open_checked(path, os.O_RDONLY))


def read_older(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that `older` found, likewise."""
    fd = _open_moved(path)
    return iter(()) if fd is None else _back(fd)


def _back(fd: int) -> Iterator[dict[str, Any]]:
    try:
        size = os.fstat(fd).st_size
        start, rest = size, b""
        while start > 0:
            step = min(start, _CHUNK)
            start -= step
            rest, *whole = (_read_at(fd, step, start) + rest).split(b"\n")
            if start + step == size and whole and not whole[-1]:
                whole.pop()  # what stands behind the last line's end is no line
            yield from map(_parse, reversed(whole))
            if not start:
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
        files, _ = older(path)  # moved away just now
        moved = _open_moved(files[0]) if files else None
        if moved is None:
            raise
        fd = moved
    size = os.fstat(fd).st_size
    last = None
    with contextlib.suppress(ConfigError):
        last, _ = _last_line(fd, size, path)
    return _follow(path, fd, size, last[0] if last else 0, pause)


def _follow(path: Path, fd: int, done: int, seq: int, pause: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    try:
        while True:
            now = private_file.fingerprint(path)
            about = os.fstat(fd)
            if about.st_size < done or (done and _read_at(fd, 1, done - 1) != b"\n"):
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


def number(line: dict[str, Any]) -> int:
    """A line's `seq`; 0 where it has none."""
    found = line.get("seq")
    return found if isinstance(found, int) else 0


def _whole_lines(fd: int, start: int) -> bytes:
    """The next whole lines from there on; a last one without its end is left for later."""
    data = b""
    while chunk := _read_at(fd, _CHUNK, start + len(data)):
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
