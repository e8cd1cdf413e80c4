"""Counters that all workers of a server share, and that outlive it: a table of fixed size, mapped into memory.

Two tables of slots, one for principals and one for addresses, so that no number of addresses evicts a principal. A slot
is found by a keyed digest of a name, in a bucket of eight of which the stalest is evicted. The file is allocated in
full before it is mapped, so that a full disk is no SIGBUS. What is read is judged by who reads it (policy/limits.py):
a worker may be killed between two writes. Redis or Valkey would take the place of this class.
"""

import contextlib
import hashlib
import ipaddress
import logging
import mmap
import os
import secrets
import time
from functools import lru_cache
from pathlib import Path
from struct import Struct

from mcpctl import private_file

try:
    import fcntl
except ImportError:  # Windows, where one process serves
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("mcpctl.limits")
PRINCIPALS, ADDRESSES = 0, 1
PLACES = 64
"""Workers that there can be; each counts what runs in it in a place of its own."""
_FORM = b"mcpctl counters 1"
_HEADER = Struct("32s16s")
"""What the file is, and the key of its digests."""
_START = 64
_EIGHT = 8
_BUCKETS = (2048, 1024)
_KEY = 16
_TAT = Struct("d")
_FAILED = Struct("dI")
_SPENT = Struct("II8Q")
_FAILED_AT, _SPENT_AT, _VALUES = 8, 24, 96
_BUCKET = _EIGHT * (_KEY + _VALUES)
_SLOTS = _EIGHT * sum(_BUCKETS)
_RUNNING_AT = _START + _BUCKET * sum(_BUCKETS)
_RUNNING = Struct("H")
_COUNTS = PLACES * _RUNNING.size
SIZE = _RUNNING_AT + _SLOTS * _COUNTS
_PATIENCE = 0.25
"""Seconds to wait for another worker's lock, which is held for microseconds: one that was stopped stops no other."""
_STEP = 60.0
"""Seconds that the clock may have been set by before a start is taken for one after a boot."""
_OPENING = 5.0
"""The same for who opens the file, which another may be making."""


Slot = tuple[int, int]
"""One name's place in a table: where its values are, and where it is counted what runs."""


class Counters:
    """The tables. Held (`with counters:`) while something is read and written back; alone in its process, for free.

    `path` None: in this process's memory alone. `place` is this worker's number, of `workers`; `booted` when the clock
    began that its times are of.
    """

    def __init__(
        self, path: Path | None = None, *, place: int = 0, workers: int = 1, booted: float | None = None
    ) -> None:
        self._place = place * _RUNNING.size
        self._workers = Struct(f"{workers}H")
        self._fd = -1
        self._map = mmap.mmap(-1, SIZE) if path is None or fcntl is None else self._open(path)
        self._locks = self._fd >= 0 and fcntl is not None and workers > 1
        if self._map[:32] != _FORM.ljust(32, b"\0"):
            self._map[: _HEADER.size] = _HEADER.pack(_FORM, secrets.token_bytes(16))
        self._salt = self._map[32:48]
        self._forget_times(time.time() - time.monotonic() if booted is None else booted)
        places = memoryview(self._map)[_RUNNING_AT:].cast("H")
        places[place::PLACES] = memoryview(bytes(2 * _SLOTS)).cast("H")  # whoever had the place before is dead
        places.release()

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)

    def _open(self, path: Path) -> mmap.mmap:
        """The file, mapped; made anew where it is none of this form. Memory alone where there is no room for it."""
        try:
            self._fd = _file(path)
            return mmap.mmap(self._fd, SIZE)
        except OSError as problem:
            log.warning("%s cannot be made (%s): each worker counts for itself", path, problem.strerror)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        return mmap.mmap(-1, SIZE)

    def _forget_times(self, booted: float) -> None:
        """Of another boot of the machine the times say nothing, not even which slot is the stalest."""
        before: float = _TAT.unpack_from(self._map, _HEADER.size)[0]
        if abs(before - booted) < _STEP:
            return
        _TAT.pack_into(self._map, _HEADER.size, booted)
        if before == 0.0:  # it is new
            return
        for bucket in range(_START, _RUNNING_AT, _BUCKET):
            for at in range(bucket + _EIGHT * _KEY, bucket + _BUCKET, _VALUES):
                self._map[at : at + _SPENT_AT] = bytes(_SPENT_AT)

    def __enter__(self) -> None:
        if not self._locks:
            return
        until = 0.0
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                now = time.monotonic()
                until = until or now + _PATIENCE
                if now > until:
                    return  # its holder was stopped: a count may be lost, and no call is
                os.sched_yield()

    def __exit__(self, *_: object) -> None:
        if self._locks:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def digest(self, name: str) -> bytes:
        """The key of a name. Nobody who does not know the file can have two names meet in one bucket."""
        return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=_KEY, key=self._salt).digest()

    def slot(self, table: int, digest: bytes) -> Slot:
        """The slot of a name; an empty one, or the stalest of its bucket, where it has none yet."""
        bucket = int.from_bytes(digest[:4], "little") % _BUCKETS[table] + table * _BUCKETS[0]
        keys = _START + bucket * _BUCKET
        values = keys + _EIGHT * _KEY
        found = self._map.find(digest, keys, values)
        index = (found - keys) // _KEY
        if found < 0 or (found - keys) % _KEY:
            index = min(range(_EIGHT), key=lambda one: _TAT.unpack_from(self._map, values + one * _VALUES)[0])
            at = values + index * _VALUES
            self._map[at : at + _VALUES] = bytes(_VALUES)
            self._map[keys + index * _KEY : keys + (index + 1) * _KEY] = digest
        return values + index * _VALUES, _RUNNING_AT + (bucket * _EIGHT + index) * _COUNTS

    # -- a slot's values: the end of what a rate has taken, failed sign-ins, what was spent of budgets ----------------

    def taken(self, slot: Slot) -> float:
        """Until when its rate is taken, as `take` has written it; 0.0 at first."""
        found: float = _TAT.unpack_from(self._map, slot[0])[0]
        return found

    def take(self, slot: Slot, until: float) -> None:
        """Note until when its rate is taken, which is also how fresh the slot is."""
        _TAT.pack_into(self._map, slot[0], until)

    def failed(self, slot: Slot) -> tuple[float, int]:
        """(the end of the window, failed sign-ins within it)."""
        until, count = _FAILED.unpack_from(self._map, slot[0] + _FAILED_AT)
        return until, count

    def fail(self, slot: Slot, until: float, count: int) -> None:
        """Note failed sign-ins."""
        _FAILED.pack_into(self._map, slot[0] + _FAILED_AT, until, count)

    def spent(self, slot: Slot) -> tuple[int, ...]:
        """(the hour's number, the day's, then calls, rows, bytes and microseconds of the hour, and of the day)."""
        return _SPENT.unpack_from(self._map, slot[0] + _SPENT_AT)

    def spend(self, slot: Slot, values: tuple[int, ...]) -> None:
        """Note what was spent, in the same order."""
        _SPENT.pack_into(self._map, slot[0] + _SPENT_AT, *values)

    def running(self, slot: Slot) -> int:
        """How many calls of its run, in all workers."""
        return sum(self._workers.unpack_from(self._map, slot[1]))

    def run(self, slot: Slot, by: int) -> None:
        """Note that so many more, or fewer, run in this worker."""
        at = slot[1] + self._place
        (count,) = _RUNNING.unpack_from(self._map, at)
        _RUNNING.pack_into(self._map, at, min(max(count + by, 0), 0xFFFF))


def _file(path: Path) -> int:
    """A descriptor of the file in its full size. Another form or size, or one that was left half made, is replaced as a
    whole: what others have mapped must not shrink under them. Raises OSError where there is no room, ConfigError where
    it breaks a rule of `private_file`."""
    while True:
        fd = private_file.open_checked(path, os.O_RDWR | os.O_CREAT)
        try:
            private_file.lock(fd, _OPENING)
            about, now = os.fstat(fd), os.stat(path)
            if (about.st_ino, about.st_dev) == (now.st_ino, now.st_dev):
                if about.st_size == 0:
                    _fill(fd)
                elif about.st_size != SIZE or os.pread(fd, 32, 0) != _FORM.ljust(32, b"\0"):
                    log.warning("%s is of another form, or torn: what it counted begins anew", path)
                    _replace(path)
                    continue
                else:
                    _allocate(fd)  # a copy may have holes
                private_file.unlock(fd)
                done, fd = fd, -1
                return done
        except FileNotFoundError:
            continue
        finally:
            if fd >= 0:
                os.close(fd)


def _fill(fd: int) -> None:
    try:
        _allocate(fd)
    except OSError:
        os.ftruncate(fd, 0)
        raise
    os.pwrite(fd, _HEADER.pack(_FORM, secrets.token_bytes(16)), 0)


def _allocate(fd: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, SIZE)
    elif os.fstat(fd).st_size < SIZE:
        os.pwrite(fd, bytes(SIZE), 0)


def _replace(path: Path) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            _fill(fd)
        finally:
            os.close(fd)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@lru_cache(10_000)
def source(address: str | None) -> str | None:
    """Who counts as one: an IPv4 address, or an IPv6 network of the size that one customer is given."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return address
