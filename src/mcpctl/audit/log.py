"""The audit log: append one chained line.

One JSON line an event. `hash` = HMAC-SHA-256(key, prev ‖ the line's bytes before `,"hash"`) in hex, where `prev` is
the hash of the line before (64 zeros before the first) as ASCII. Whoever lacks the key can neither change, remove,
add nor reorder a line without breaking every hash after it. Lines cut off at the very end leave no trace in the file
itself: a process that still runs goes on from where it was, so that the gap shows, also when
another has written on; else a copy elsewhere shows it.

One chain, many writers (workers, commands): an append takes the lock file's lock, looks whether the file's end is
where this writer, or another worker, left it, reads the last line only if not, and writes with one write(2).
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.audit import files, late
from mcpctl.audit.end import End, SharedEnd
from mcpctl.errors import ConfigError, Error, FullError, NotFoundError, UnavailableError, masked

FIRST = "0" * 64
FIELDS = (
    "seq", "time", "happened_at", "event", "request_id", "token", "user", "tenant", "client_ip", "transport", "tool",
    "database", "role", "backend_pid", "statement", "statement_hmac", "relations", "rows", "bytes", "elapsed_ms",
    "outcome", "reason", "key_id", "prev", "hash",
)  # fmt: skip
"""Every key that a line may have, in the order in which they stand. What has no value is left out."""
MORE = "?"
"""Stands among a line's `relations` for what may have been read beside them."""

EVENTS = (
    "auth.ok", "auth.refused", "token.added", "token.revoked", "token.expired", "token.removed", "token.rotated",
    "pool.opened", "pool.closed", "session.opened", "session.closed", "client.registered", "query.cancelled",
    "tool.begun", "tool.called", "tool.refused",
    "user.added", "user.roles", "user.password",
    "user.removed",
    "user.disabled", "user.enabled", "user.linked", "user.unlinked", "tenant.added", "tenant.removed",
    "grant.printed", "grant.added", "grant.removed", "database.registered", "database.unregistered", "config.created",
    "config.database_added", "config.database_removed", "config.database_hardened", "config.database_password",
    "config.key_rotated", "config.certificate_renewed", "config.reloaded", "config.reload_refused",
    "server.started", "server.stopped", "server.locked", "server.unlocked", "token.blocked", "token.unblocked",
    "audit.rotated", "audit.lost", "backup.made", "backup.restored", "doctor.mended",
)  # fmt: skip
_ROOM = 64 << 10
_KNOWN_EVENTS, _KNOWN_FIELDS = frozenset(EVENTS), frozenset(FIELDS)
_SECOND = timedelta(seconds=1)
_MILLISECONDS = tuple(f"{number:03d}Z" for number in range(1000))
"""How a time ends."""
_logger = logging.getLogger("mcpctl.audit")


_REMEMBERED, _SHORT = 1000, 1000
"""Statements whose digests are kept, and the characters of the longest of them."""
_PATIENCE = 0.25
"""Seconds to wait for another writer, who holds the lock for a tenth of a millisecond unless it has stopped."""
Sync = Callable[[int], None]
_fdatasync: Sync = getattr(os, "fdatasync", os.fsync)  # macOS and Windows have only the other


class BusyError(Exception):
    """Another writes a line at this very moment."""


class AuditLog:
    """Appends to one log. Not for threads; processes may share the file. `spare` is a folder for lines that there is no
    room for beside the log; it is the same for all who write. `others`: what those who share it tell each other."""

    def __init__(
        self, path: Path, key: bytes, now: Callable[[], datetime], sync: Sync = _fdatasync, spare: Path | None = None,
        others: SharedEnd | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.others = others
        self._spare = spare
        self.key = key
        self.key_id = key_id(key)
        self.written: End | None = None
        """Where the chain ended after the last line that this process has written."""
        self.synced = 0
        """The number of the last line of this process's that is known to be on disk."""
        self._now = now
        self._second = self._next = datetime.min.replace(tzinfo=UTC)
        self._stamp = ""
        self._sync = sync
        self._inner, self._outer = _halves(key)
        self._name, self._lock_name = str(path), f"{path}.lock"
        self._late = [str(one) for one in late.places(path, spare)]
        self._lock = -1
        self._lock_inode = 0
        self._file = -1
        self._opened = 0  # its inode; `_end` may be in another: one that was put in its place for a while
        self._end: End | None = None
        self._left: list[int] = []
        self._doubtful = False
        self._named = 0
        self._digests: dict[str, str] = {}
        """Those of statements that came a while ago."""

    def close(self) -> None:
        """Let go of the files."""
        for fd in (self._lock, self._file, *self._left):
            if fd >= 0:
                os.close(fd)
        self._lock = self._file = -1
        self._left = []
        self._end = None
        self._digests.clear()

    def statement_hmac(self, statement: str, *, keep: bool = False) -> str:
        """The keyed digest that stands for a statement whose text is not kept. `keep` it in memory for the next time,
        which must not be where the text may hold a password."""
        known = self._digests.get(statement)
        if known is None:
            known = self._hmac(b"statement\0" + statement.encode("utf-8", "replace"))
            if keep and len(statement) <= _SHORT:
                if len(self._digests) >= _REMEMBERED:
                    self._digests.clear()
                self._digests[statement] = known
        return known

    def _hmac(self, data: bytes) -> str:
        """HMAC-SHA-256 with our key, in hex."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(data)
        outer.update(inner.digest())
        digest: str = outer.hexdigest()
        return digest

    def append(self, event: str, **fields: Any) -> None:
        """Write one line. Raises UnavailableError when it could not be written whole; then nothing was."""
        self.add((event, fields))

    def add(self, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> None:
        """`append` of lines, (event, fields) each, whose fields are together already and stay as they are: all of them
        by one write, or none. `at_once`: raise BusyError where another writes, rather than wait for him."""
        for event, fields in lines:
            if event not in _KNOWN_EVENTS:
                raise ValueError(f"{event} is no audit event")
            if not _KNOWN_FIELDS.issuperset(fields):
                raise ValueError(f"no such audit fields: {sorted(fields.keys() - _KNOWN_FIELDS)}")
        try:  # what `_locked` does, which would cost as much again as the lock
            self._take_lock(at_once=at_once)
            try:
                for place in self._late:
                    if late.is_there(place):
                        self._write_late()
                        break
                now = self.time()
                self._write(*[{**fields, "time": now, "event": event} for event, fields in lines])
            finally:
                private_file.unlock(self._lock)
        except (OSError, Error) as problem:
            raise self._told(problem) from None

    def time(self) -> str:
        """Now, as a line has it."""
        now = self._now()
        if not self._second <= now < self._next:
            self._second = now.replace(microsecond=0)
            self._next = self._second + _SECOND
            self._stamp = stamp(self._second)[:-4]
        return self._stamp + _MILLISECONDS[now.microsecond // 1000]

    def keep(self, event: str, **fields: Any) -> None:
        """Keep a line for the next who can write the log. Raises an Error where not even that is possible."""
        late.keep(self.path, self._spare, event, {"happened_at": self.time(), **fields})

    def lose(self, count: int) -> bool:
        """Have the next who can write the log say that lines were lost; False where nobody will."""
        return late.lose(self.path, self._spare, count)

    def catch_up(self) -> None:
        """Write what commands have kept beside the log. Raises UnavailableError where it cannot be written yet."""
        if any(map(late.is_there, self._late)):
            with self._locked():
                self._write_late()

    def _write_late(self) -> None:
        if any(map(late.is_there, self._late)):
            late.write(self.path, self._spare, lambda: self._find_end().seq, self._append_late)

    def _append_late(self, event: str, fields: dict[str, Any]) -> None:
        if event not in _KNOWN_EVENTS or fields.keys() - _KNOWN_FIELDS:
            event, fields = "audit.lost", {"reason": "a line that was kept for the log is none of mcpctl's"}
        self._write({**fields, "time": self.time(), "event": event})

    def check(self) -> None:
        """Raises UnavailableError where a line could not be appended now."""
        with self._locked():
            self._find_end()
            if self._doubtful:
                self._sync_files([self._file])
            self._check_room()

    def check_key(self) -> None:
        """Raises ConfigError where the log's last line was written with another key, and for nothing else."""
        files.end_of(self.path, self.key_id)

    def _check_room(self) -> None:
        if hasattr(os, "fstatvfs"):
            disk = os.fstatvfs(self._file)
            if disk.f_bavail * disk.f_frsize < _ROOM:
                raise self._full()

    def _full(self) -> Error:
        return FullError(f"the audit log {self.path} cannot be written: the disk is full", "make room")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._take_lock()
            try:
                yield
            finally:
                private_file.unlock(self._lock)
        except (OSError, Error) as problem:
            raise self._told(problem) from None

    def _told(self, problem: OSError | Error) -> Error:
        if isinstance(problem, OSError):
            return self._unwritable(problem)
        if isinstance(problem, UnavailableError):
            return problem
        return UnavailableError(f"the audit log cannot be written: {problem.message}", problem.hint)

    def _take_lock(self, *, at_once: bool = False) -> None:
        while True:
            if self._lock < 0:
                self._lock = private_file.open_checked(Path(self._lock_name), os.O_RDWR | os.O_CREAT)
                self._lock_inode = os.fstat(self._lock).st_ino
            try:
                private_file.lock(self._lock, 0.0 if at_once else _PATIENCE)
            except TimeoutError:
                if at_once:
                    raise BusyError from None
                raise
            try:
                inode = os.stat(self._lock_name).st_ino
            except OSError:
                inode = 0
            if inode == self._lock_inode:
                return
            os.close(self._lock)  # somebody removed it: what the others hold is another one
            self._lock = -1

    def _write(self, *lines: dict[str, Any]) -> None:
        end = self._find_end()
        if self._doubtful:
            self._sync_files([self._file])
        seq, digest, made = end.seq, end.hash, []
        for fields in lines:
            seq += 1
            line, digest = self._line(seq, digest, fields)
            made.append(line)
        data = b"".join(made)
        size = len(data)
        if os.write(self._file, data) != size:  # a full disk takes a part: take it back, so that every line is whole
            os.ftruncate(self._file, end.size)
            raise self._full()
        self._end = self.written = End(end.inode, end.size + size, seq, digest)
        if self.others is not None:
            self.others.tell(self.path, self.key_id, self._end)

    def sync(self) -> None:
        """Return when all that this process has written is on disk. Raises UnavailableError."""
        with self.syncing() as work:  # not under the lock: nobody else waits for the disk
            work()

    @contextlib.contextmanager
    def syncing(self) -> Iterator[Callable[[], None]]:
        """What brings all that is written by now onto the disk, for a thread to do while others append; believed when
        the block ends. Raises UnavailableError; then no line counts as written until a later one has come there."""
        end = self.written
        if end is None or self.synced >= end.seq:
            yield lambda: None
            return
        left, self._left = self._left, []
        try:
            fds = [*left, os.dup(self._file)]  # a rotation may take ours away meanwhile
            try:
                yield lambda: self._sync_files(fds)
            finally:
                for fd in fds:
                    os.close(fd)
        except OSError as problem:
            self._doubtful = True
            raise self._unwritable(problem) from None
        self.synced = max(self.synced, end.seq)

    def _sync_files(self, fds: list[int]) -> None:
        for fd in fds:
            self._sync(fd)
        inode = os.fstat(fds[-1]).st_ino
        if inode != self._named:  # a new file is there after a crash only if its folder knows it (fsync(2))
            private_file._sync_folder(self.path.parent)
            self._named = inode
        self._doubtful = False

    def _unwritable(self, problem: OSError) -> Error:
        if problem.errno in private_file.NO_ROOM:
            return self._full()
        return UnavailableError(
            f"the audit log {self.path} cannot be written: {problem.strerror}", "check its owner, its mode and the disk"
        )

    def rotate(self, reason: str) -> Path | None:
        """Move the file away, to a name that ends with the time, and begin a new one, which goes on from its last hash.
        Returns the new name; None where there is nothing in it. Raises UnavailableError: nothing is lost then."""
        with self._locked():
            last = files.end_of(self.path)
            if last is not None and last != files.last_of(self.path, self._ours):
                raise UnavailableError(
                    f"the last line of {self.path} was not written with the key that we have: nothing was moved",
                    "restore audit.key from the backup; `mcpctl audit verify` says more",
                    exit_code=ConfigError.exit_code,
                )
            self._write_late()
            if not (os.path.lexists(self.path) and self._find_end().size):
                return None
            private_file.refuse_link(self.path)  # only the link would be moved
            self._check_room()
            moved, end = self._free_name(), self._find_end()
            self.path.rename(moved)  # under the lock: nobody else of ours takes the name meanwhile
            self._end = End(self._open().st_ino, 0, end.seq, end.hash)
            stamped = {"time": stamp(self._now()), "event": "audit.rotated", "transport": "cli"}
            self._write({**stamped, "reason": f"{moved.name}{reason}"})
            return moved

    def _free_name(self) -> Path:
        when = self._now().strftime("%Y%m%dT%H%M%SZ")
        for number in range(1, 1000):
            moved = self.path.with_name(f"{self.path.name}.{when}{f'-{number}' if number > 1 else ''}")
            if not (os.path.lexists(moved) or os.path.lexists(f"{moved}.gz")):
                return moved
        raise UnavailableError(f"there is no free name for {self.path}.{when}", "look what fills its folder")

    def _line(self, seq: int, prev: str, fields: dict[str, Any]) -> tuple[bytes, str]:
        """The line of that number behind one of that hash, in printable ASCII alone, and its hash."""
        fields["seq"], fields["key_id"] = seq, self.key_id
        fields["prev"], fields["hash"] = prev, None
        for name in ("statement", "reason"):
            if isinstance(value := fields.get(name), str):
                fields[name] = masked(value)
        body = _as_json(fields)[:-1]
        digest = self._hmac(prev.encode("ascii") + body)  # chain_hash
        return b"".join((body, b',"hash":"', digest.encode("ascii"), b'"}\n')), digest

    def _find_end(self) -> End:
        """The chain's end, under the lock. Opens the file again where it has been moved away."""
        try:
            found = os.stat(self._name)
            self._hear(found.st_ino)
            end = self._end
        except FileNotFoundError:
            end = None
        if end is not None and found.st_size == end.size and found.st_ino == end.inode == self._opened:
            return end
        cut = self._cut()
        found = self._open()
        last, size = self._last_line(found.st_size) if found.st_size else (None, 0)
        if last is None:
            last = files.end_before(self.path, self._ours, self._end.seq if self._end is not None else 0)
        seq, digest = last or (0, FIRST)
        if self._end is not None and (cut or self._end.seq > seq):
            seq, digest = self._end.seq, self._end.hash  # moved away and packed, or cut: we still know where we were
        self._end = End(found.st_ino, size, seq, digest)
        return self._end

    def _hear(self, inode: int) -> None:
        """Go on from where another worker has left the file, as if we had: what was cut off of it shows here, too."""
        told = self.others.of(self.path, self.key_id, inode) if self.others is not None else None
        known = self._end
        if told and (known.inode == inode and known.seq < told.seq if known else self._open().st_ino == inode):
            self._end = told

    def _last_line(self, size: int) -> tuple[tuple[int, str] | None, int]:
        """Number and hash of the file's last line, and where it ends, once what a crash left there is mended."""
        last, end = files.last_line(self._file, size, self.path, self.key_id)
        if end < size:  # it was never acknowledged
            _logger.warning("%s: %d bytes at its end are no whole line, and are cut off", self.path, size - end)
            os.ftruncate(self._file, end)
        if end and files.read_at(self._file, 1, end - 1) != b"\n":
            end += os.write(self._file, b"\n")
        return last, end

    def _cut(self) -> bool:
        """Whether the line that stood last when we looked last is gone from where it stood, although others may have
        written on since. A file that was copied and emptied (copytruncate) begins behind that line."""
        if self._end is None or self._opened != self._end.inode or not self._end.size:
            return False
        mark = b'"' + self._end.hash.encode("ascii") + b'"}\n'
        if files.read_at(self._file, len(mark), max(0, self._end.size - len(mark))) == mark:
            return False
        first = re.match(rb'\{"seq":([0-9]{1,18}),', files.read_at(self._file, 32, 0))
        return first is not None and int(first[1]) <= self._end.seq

    def _open(self) -> os.stat_result:
        """Open the file again; what it is like."""
        opened = private_file.open_checked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        before, self._file = self._file, opened
        found = os.fstat(self._file)
        self._opened = found.st_ino
        if before >= 0:
            if self.written is not None and self.synced < self.written.seq and os.fstat(before).st_ino != found.st_ino:
                self._left.append(before)  # moved away with lines that are not yet known to be on disk
            else:
                os.close(before)
        return found

    def _ours(self, line: re.Match[bytes]) -> bool:
        """Whether a line, which has the form of one, was written with our key."""
        made = chain_hash(self.key, line[4].decode("ascii"), line[0].rpartition(b',"hash":"')[0])
        return made.encode("ascii") == line[5]


@cache
def _quick() -> tuple[Callable[..., Any], Callable[[Any], bytes]]:
    """What makes the plain lines of a server, and writes them: it has msgspec. A command that writes one line does
    without."""
    import msgspec

    line = msgspec.defstruct("_Line", [(name, Any, None) for name in FIELDS], omit_defaults=True)
    return line, msgspec.json.Encoder().encode


def _as_json(values: dict[str, Any]) -> bytes:
    """The values that there are, in the order of FIELDS, in printable ASCII."""
    if "msgspec" in sys.modules:
        line, encode = _quick()
        try:
            data = encode(line(**values))
        except UnicodeEncodeError:  # half of a surrogate pair, which the other has words for
            data = b"\x7f"
        if data.isascii() and 0x7F not in data:
            return data
    ordered = {name: values[name] for name in FIELDS if values.get(name) is not None}
    text = json.dumps(ordered, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")
    return text.encode("ascii")


def chain_hash(key: bytes, prev: str, body: bytes) -> str:
    """The hash of a line: `body` is its bytes before `,"hash"`, `prev` the hash of the line before it."""
    return hmac.new(key, prev.encode("ascii") + body, hashlib.sha256).hexdigest()


def _halves(key: bytes) -> tuple[Any, Any]:
    """The inner and the outer hash of HMAC-SHA-256 (RFC 2104) with the key's part done: a line then costs a copy of
    each, which is half of what the module hmac takes."""
    block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))
    return inner, outer


def key_id(key: bytes) -> str:
    """What a line says of the key that its hash was made with."""
    return hashlib.sha256(key).hexdigest()[:8]


def stamp(when: datetime) -> str:
    """A time as a line has it: RFC 3339 in UTC, to the millisecond."""
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
