"""Counters that all workers of a server share, and that outlive it: a table of fixed size, in memory that they share.

Two tables of slots, one for principals and one for addresses, so that no number of addresses evicts a principal. A slot
is found by a keyed digest of a name, in a bucket of eight. Of these the one is evicted whose values end first: what
a rate has taken in seconds, wrong sign-ins in minutes, what was spent of a budget at the end of the day, and one in
which calls run last of all. The memory has no file, so that nobody can cut it under a worker; what is counted is saved
beside now and then. What is read is judged by who reads it (policy/limits.py): a worker may be killed between two
writes. Redis or Valkey would take the place of this class.
"""

import contextlib
import hashlib
import ipaddress
import logging
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import IO

from mcpctl import private_file
from mcpctl.errors import NotFoundError
from mcpctl.shared_table import Table

try:
    import fcntl
except ImportError:  # Windows, where one process serves
    fcntl = None  # type: ignore[assignment]

_TAKE, _LET_GO = (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN) if fcntl is not None else (0, 0)
log = logging.getLogger("mcpctl.limits")
PRINCIPALS, ADDRESSES = 0, 1
KEY = 16
"""Bytes of the digest that a name is found by."""
PLACES = 64
"""Workers that there can be; each counts what runs in it in a place of its own."""
SAVED_EVERY = 5.0
"""Seconds after which what is counted is saved: so much of it a power cut may forget."""
_FORM = b"mcpctl counters 2"
_HEADER = Struct("<32s16sd")
"""What the file is, the key of its digests, and when the clock began."""
_START = 0
_EIGHT = 8
_BUCKETS = (2048, 1024)
_DAY = 86400
_FAILED = Struct("dI")
_SPENT = Struct("II8Q")
_FAILED_AT, _SPENT_AT, _VALUES = 8, 24, 96
_RECORD = Struct(f"<B{KEY}s{_VALUES}s")
"""A slot in the file: its table, digest and values."""
_BUCKET = _EIGHT * (KEY + _VALUES)
_SLOTS = _EIGHT * sum(_BUCKETS)
_RUNNING_AT = _START + _BUCKET * sum(_BUCKETS)
MOST = 0xFFFF
"""Calls of one name that can be counted as running in a worker."""
_COUNTS = PLACES * 2
"""Bytes in which it is counted what of one name runs: 16 bits a worker."""
SIZE = _RUNNING_AT + _SLOTS * _COUNTS
_PATIENCE = 0.25
"""Seconds to wait for another worker's lock, which is held for microseconds: one that was stopped stops no other."""
_STEP = 60.0
"""Seconds that the clock may have been set by before a start is taken for one after a boot."""
_WITHOUT = 10.0
"""Seconds to go on without the lock after that."""


@dataclass(slots=True)
class Slot:
    """One name's place in a table: where its digest stands, that digest, and where its values are, all in bytes; which
    of `Counters.times` is the end of what its rate has taken, and which of `Counters.counts` is its first. `gone`: this
    process has given it to another name, or has not found it yet; another worker's doing it does not say."""

    key: int
    digest: bytes
    values: int
    until: int
    runs: int
    gone: bool = False


class Counters:
    """The tables. Held (`with counters:`) while something is read and written back; alone in its process, for free.

    Made before the workers are forked, each of which then takes its place (`as_worker`). `path`: the file that they
    come from and are saved in; None, or a system without fork: in memory alone. `booted`: when the clock began that
    its times are of. `told` and `unwritten` are tables that lie beside, of whom Process and Canaries keep out.

    `memory`, `times` and `counts` are the same memory as bytes, as times and as counts of what runs, for those who read
    and write several slots at once: by index, which costs a fifth of a call. `alone`: there is no other worker, so
    that nothing has to be held, and the first of a slot's counts is all that runs.
    """

    def __init__(self, path: Path | None = None, *, workers: int = 1, booted: float | None = None) -> None:
        self._path = path if fcntl is not None else None
        self._place = 0
        self.moves = 0
        """How often this process has given a slot to a name. As often as before: none is `gone` since."""
        self.alone = workers == 1
        self._workers = Struct(f"{workers}H")
        self.memory = mmap.mmap(-1, SIZE)
        self.times = memoryview(self.memory).cast("d")
        self.counts = memoryview(self.memory)[_RUNNING_AT:].cast("H")
        self._lock = _lock_file() if workers > 1 and fcntl is not None else None
        self._lock_fd = self._lock.fileno() if self._lock is not None else -1
        self.told, self.unwritten = Table(self), Table(self)
        self._without_until = 0.0
        self._booted = time.time() - time.monotonic() if booted is None else booted
        self._salt = secrets.token_bytes(16)
        self._slots: dict[bytes, Slot] = {}
        self._saved: bytes | None = None
        self._written = private_file.ABSENT
        self._failing = False
        if self._path is not None:
            self._load(self._path)

    def as_worker(self, place: int) -> None:
        """This process is the worker of that number, and whoever was it before is dead."""
        self._place = place
        self.counts[place::PLACES] = memoryview(bytes(2 * _SLOTS)).cast("H")

    def close(self) -> None:
        """Save what is counted, whatever the file is by now, and let go of it."""
        self._saved = None
        self.save()
        self.times.release()
        self.counts.release()
        self.memory.close()
        if self._lock is not None:
            self._lock.close()
            self._lock_fd = -1

    def _load(self, path: Path) -> None:
        """What was saved. Of another boot of the machine the times say nothing, not even which slot is the stalest."""
        try:
            data = private_file.read(path).data
        except NotFoundError:
            return
        form, salt, booted = _HEADER.unpack_from(data.ljust(_HEADER.size, b"\0"))
        if form != _FORM.ljust(32, b"\0") or (len(data) - _HEADER.size) % _RECORD.size:
            log.warning("%s is of another form, or torn: what it counted begins anew", path)
            return
        self._salt = salt
        for table, digest, values in _RECORD.iter_unpack(data[_HEADER.size :]):
            at = self.slot(min(table, 1), digest).values
            times = values[:_SPENT_AT] if abs(booted - self._booted) < _STEP else bytes(_SPENT_AT)
            self.memory[at : at + _VALUES] = times + values[_SPENT_AT:]

    def copy(self) -> bytes:
        """The tables as they are now, for `save`."""
        with self:
            return self.memory[:_RUNNING_AT]

    def save(self, tables: bytes | None = None) -> None:
        """Save what is counted, if there is anything new, or the file is not the one that was written: what a copy
        says, which may be on another thread. Where it cannot be, it is said once, and tried again the next time."""
        tables = tables or self.copy()
        if self._path is None:
            return
        if tables == self._saved and private_file.fingerprint(self._path) == self._written:
            return
        found = [_HEADER.pack(_FORM, self._salt, self._booted)]
        for bucket in range(_START, _RUNNING_AT, _BUCKET):
            for index in range(_EIGHT):
                key, at = bucket + index * KEY, bucket + _EIGHT * KEY + index * _VALUES
                if any(tables[key : key + KEY]):
                    table = bucket >= _START + _BUCKETS[0] * _BUCKET
                    found.append(_RECORD.pack(table, tables[key : key + KEY], tables[at : at + _VALUES]))
        try:
            _replace(self._path, b"".join(found))
        except OSError as problem:
            if not self._failing:
                log.warning("%s cannot be saved (%s): a restart may forget budgets", self._path, problem.strerror)
            self._failing = True
        else:
            self._saved, self._written, self._failing = tables, private_file.fingerprint(self._path), False

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def hold(self) -> None:
        """Keep the other workers out until `let_go`."""
        if self._lock is None or (self._without_until and self._without_until > time.monotonic()):
            return
        until = 0.0
        while True:
            try:
                fcntl.lockf(self._lock_fd, _TAKE)
                return
            except BlockingIOError:
                now = time.monotonic()
                until = until or now + _PATIENCE
                if now > until:  # its holder was stopped: a count may be lost, and no call is
                    self._without_until = now + _WITHOUT
                    return
                os.sched_yield()

    def let_go(self) -> None:
        """Let them in again."""
        if self._lock is not None:
            fcntl.lockf(self._lock_fd, _LET_GO)

    def digest(self, name: str) -> bytes:
        """The key of a name. Nobody who does not know the file can have two names meet in one bucket."""
        return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=KEY, key=self._salt).digest()

    def slot(self, table: int, digest: bytes) -> Slot:
        """The slot of a name; an empty one, or that of least worth in its bucket, where it has none yet."""
        known = self._slots.get(digest)
        if known is None or self.memory[known.key : known.key + KEY] != digest:
            if len(self._slots) >= _SLOTS and not self.alone:  # another worker puts out what is remembered here
                self._slots.clear()
            known = self._slots[digest] = self._find(table, digest)
        return known

    def nowhere(self, digest: bytes) -> Slot:
        """What a name has that has not been looked up: a place that is another's, as after an eviction."""
        found = _place(0, 0, digest)
        found.gone = True
        return found

    def _find(self, table: int, digest: bytes) -> Slot:
        bucket = int.from_bytes(digest[:4], "little") % _BUCKETS[table] + table * _BUCKETS[0]
        keys = _START + bucket * _BUCKET
        found = self.memory.find(digest, keys, keys + _EIGHT * KEY)
        index = (found - keys) // KEY
        if found < 0 or (found - keys) % KEY:
            slot = min((_place(bucket, one, digest) for one in range(_EIGHT)), key=self._worth)
            before = self._slots.pop(self.memory[slot.key : slot.key + KEY], None)
            if before is not None:
                before.gone = True
            self.moves += 1
            runs = _RUNNING_AT + 2 * slot.runs
            self.memory[slot.key : slot.key + KEY] = bytes(KEY)  # before the counts: see `run`
            self.memory[runs : runs + _COUNTS] = bytes(_COUNTS)
            self.memory[slot.values : slot.values + _VALUES] = bytes(_VALUES)
            self.memory[slot.key : slot.key + KEY] = digest
            return slot
        return _place(bucket, index, digest)

    def _worth(self, slot: Slot) -> tuple[bool, float, bool]:
        """Whether calls run in a slot, until when its values say something, and whether it is anybody's: the least goes
        first."""
        midnight = (self.spent(slot)[1] + 1) * _DAY - self._booted
        until = max(self.taken(slot), self.failed(slot)[0], midnight)
        return self.running(slot) > 0, until, any(self.memory[slot.key : slot.key + KEY])

    # -- a slot's values: the end of what a rate has taken, failed sign-ins, what was spent of budgets ----------------

    def taken(self, slot: Slot) -> float:
        """Until when its rate is taken, as `take` has written it; 0.0 at first."""
        return self.times[slot.until]

    def take(self, slot: Slot, until: float) -> None:
        """Note until when its rate is taken."""
        self.times[slot.until] = until

    def failed(self, slot: Slot) -> tuple[float, int]:
        """(the end of the window, failed sign-ins within it)."""
        until, count = _FAILED.unpack_from(self.memory, slot.values + _FAILED_AT)
        return until, count

    def fail(self, slot: Slot, until: float, count: int) -> None:
        """Note failed sign-ins."""
        _FAILED.pack_into(self.memory, slot.values + _FAILED_AT, until, count)

    def spent(self, slot: Slot) -> tuple[int, ...]:
        """(the hour's number, the day's, then calls, rows, bytes and microseconds of the hour, and of the day)."""
        return _SPENT.unpack_from(self.memory, slot.values + _SPENT_AT)

    def spend(self, slot: Slot, values: tuple[int, ...]) -> None:
        """Note what was spent, in the same order."""
        _SPENT.pack_into(self.memory, slot.values + _SPENT_AT, *values)

    def running(self, slot: Slot) -> int:
        """How many calls of its run, in all workers."""
        return sum(self._workers.unpack_from(self.memory, _RUNNING_AT + 2 * slot.runs))

    def run(self, slots: Iterable[Slot], by: int) -> None:
        """Note that so many more, or fewer, of each run in this worker; nothing of one whose place is another's by
        now. Fewer without holding: no other worker writes there, but to take the place."""
        memory, counts, place = self.memory, self.counts, self._place
        if self.alone:
            for slot in slots:
                if not slot.gone:
                    with_these = counts[slot.runs] + by
                    if 0 <= with_these <= MOST:
                        counts[slot.runs] = with_these
            return
        for slot in slots:
            if memory[slot.key : slot.key + KEY] == slot.digest:
                count = counts[slot.runs + place] + by
                if 0 <= count <= MOST:
                    counts[slot.runs + place] = count
                    if memory[slot.key : slot.key + KEY] != slot.digest:  # taken between: of who has it none runs here
                        counts[slot.runs + place] = 0


def _place(bucket: int, index: int, digest: bytes) -> Slot:
    keys = _START + bucket * _BUCKET
    values = keys + _EIGHT * KEY + index * _VALUES
    return Slot(keys + index * KEY, digest, values, values // 8, (bucket * _EIGHT + index) * PLACES)


def _lock_file() -> IO[bytes]:
    """A file of nobody's. A record lock on it is a process's own, and ends with it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("mcpctl limits"), "r+b")
    return tempfile.TemporaryFile()


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
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
