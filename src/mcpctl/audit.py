"""The audit log: append one chained line; follow.

One JSON line an event. `hash` = HMAC-SHA-256(key, prev ‖ the line's bytes before `,"hash"`) in hex, where `prev` is
the hash of the line before (64 zeros before the first) as ASCII. Whoever lacks the key can neither change, remove,
add nor reorder a line without breaking every hash after it.

One chain, many writers (workers, commands): an append takes the lock file's lock, looks whether the file's end is
where this writer left it, reads the last line only if not, and writes one line with one write(2).
"""

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.errors import ConfigError, Error, UnavailableError

FIRST = "0" * 64
FIELDS = (
    "seq", "time", "event", "request_id", "token", "user", "tenant", "client_ip", "transport", "tool", "database",
    "role", "backend_pid", "statement", "statement_hmac", "relations", "rows", "bytes", "elapsed_ms", "outcome",
    "reason", "key_id", "prev", "hash",
)  # fmt: skip
"""Every key that a line may have, in the order in which they stand. What has no value is left out."""

EVENTS = (
    "auth.ok", "auth.refused", "token.added", "token.revoked", "token.expired", "token.removed", "token.rotated",
    "pool.opened", "pool.closed", "query.cancelled", "tool.called", "tool.refused", "user.added", "config.created",
    "server.started", "server.stopped",
)  # fmt: skip
_LONGEST_LINE = 8 << 20


@dataclass
class _End:
    """Where the chain ends: the file's identity and size, the last line's number and hash."""

    inode: int
    size: int
    seq: int
    hash: str


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
        try:
            if self._lock < 0:
                lock = self.path.with_name(self.path.name + ".lock")
                self._lock = private_file.open_checked(lock, os.O_RDWR | os.O_CREAT)
            private_file.lock(self._lock)
            try:
                self._write({"time": _stamp(self._now()), "event": event, **fields})
            finally:
                private_file.unlock(self._lock)
        except OSError as problem:
            raise UnavailableError(f"the audit log {self.path} cannot be written: {problem.strerror}") from None
        except Error as problem:
            raise UnavailableError(f"the audit log cannot be written: {problem.message}", problem.hint) from None

    def _write(self, fields: dict[str, Any]) -> None:
        end = self._find_end()
        values = {"seq": end.seq + 1, **fields, "key_id": self.key_id, "prev": end.hash}
        ordered = {name: values[name] for name in FIELDS if values.get(name) is not None}
        body = json.dumps(ordered, ensure_ascii=True, separators=(",", ":")).encode("ascii")[:-1]
        digest = chain_hash(self._key, end.hash, body)
        line = body + b',"hash":"' + digest.encode("ascii") + b'"}\n'
        written = os.write(self._file, line)
        if written != len(line):  # a full disk takes a part: take it back, so that every line there is whole
            os.ftruncate(self._file, end.size)
            raise UnavailableError(f"the audit log {self.path} cannot be written: the disk is full")
        self._end = _End(end.inode, end.size + len(line), end.seq + 1, digest)

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
        if size:
            last, size = _last_line(self._file, size, self.path)
        else:
            last = self._before_rotation()
        seq, digest = (last["seq"], last["hash"]) if last else (0, FIRST)
        if self._end is not None and not found.st_size and self._end.seq > seq:
            seq, digest = self._end.seq, self._end.hash  # moved away and packed: we still know where we were
        self._end = _End(found.st_ino, size, seq, digest)
        return self._end

    def _before_rotation(self) -> dict[str, Any] | None:
        """The last line of the file that was moved away last, so that a new one goes on from it."""
        moved = [path for path in self.path.parent.glob(self.path.name + "[.-]*") if path.suffix not in (".lock", ".gz", ".xz", ".zst")]
        for path in sorted(moved, key=lambda path: path.stat().st_mtime, reverse=True):
            fd = private_file.open_checked(path, os.O_RDONLY)
            try:
                if size := os.fstat(fd).st_size:
                    return _last_line(fd, size, path)[0]
            finally:
                os.close(fd)
        return None


def chain_hash(key: bytes, prev: str, body: bytes) -> str:
    """The hash of a line: `body` is its bytes before `,"hash"`, `prev` the hash of the line before it."""
    return hmac.new(key, prev.encode("ascii") + body, hashlib.sha256).hexdigest()


def _last_line(fd: int, size: int, path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last whole line, and where it ends. What a crash left half written behind it is cut off: its event was
    never acknowledged."""
    start = max(0, size - _LONGEST_LINE)
    os.lseek(fd, start, os.SEEK_SET)
    tail = b""
    while len(tail) < size - start:
        tail += os.read(fd, size - start - len(tail))
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail):
        os.ftruncate(fd, start + whole)
    lines = tail[:whole].rstrip(b"\n").rsplit(b"\n", 1)
    if not lines[-1]:
        return None, start + whole
    try:
        line = json.loads(lines[-1])
        return {"seq": int(line["seq"]), "hash": str(line["hash"])}, start + whole
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"the last line of {path} is not one of mcpctl's", "move the file away; the log goes on in a new one"
        ) from None


def _stamp(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_key(path: Path) -> bytes:
    """The chain's key: 64 hex digits in a 0600 file."""
    data = private_file.read(path, limit=4096).data.strip()
    try:
        key = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{path} does not hold 64 hex digits", "restore it from the backup: the chain needs this very key")
    return key


def new_key() -> bytes:
    """The content of a new key file."""
    return os.urandom(32).hex().encode("ascii") + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines as they stand; one that cannot be read comes as {"event": "unreadable"}."""
    fd = private_file.open_checked(path, os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        for line in file:
            yield _parse(line)


def follow(path: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """Lines as they are written from now on, for ever; goes over to the new file when the old is moved away."""
    fd = private_file.open_checked(path, os.O_RDONLY)
    file = os.fdopen(fd, "rb")
    file.seek(0, os.SEEK_END)
    rest = b""
    try:
        while True:
            data = file.read(1 << 20)
            if data:
                *lines, rest = (rest + data).split(b"\n")
                yield from map(_parse, lines)
                continue
            now = private_file.fingerprint(path)
            if now != private_file.ABSENT and now[0] != os.fstat(file.fileno()).st_ino:
                *lines, rest = (rest + file.read()).split(b"\n")  # written between our read and its move
                yield from map(_parse, lines)
                file.close()
                file = os.fdopen(private_file.open_checked(path, os.O_RDONLY), "rb")
                continue
            pause(0.2)
    finally:
        file.close()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"event": "unreadable", "reason": line[:200].decode("utf-8", "replace")}
