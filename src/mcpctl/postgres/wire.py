"""libpq on the event loop: send what is queued, take result after result, and never read more than was asked for.

One `Wire` serves one non-blocking connection in pipeline mode, an exchange at a time. What one cell may make libpq
allocate is bounded here: libpq grows its buffer to the next power of two as soon as it has seen a row's header, long
before the data, so the process's virtual size tells at once (libpq `pqCheckInBufferSpace`).
"""

import asyncio
import contextlib
import ctypes
import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from operator import attrgetter
from typing import Any

from psycopg import pq

from mcpctl.errors import Error

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


_UNASKED = 2 << 20
"""How much libpq may grow for what comes while nothing is asked."""
_UNASKED_READS = 200
"""How often that is read before the connection is closed: libpq keeps each notification for whoever may ask for it."""
COPIES = frozenset(map(int, (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)))
"""The results of a connection on which PostgreSQL has gone over to COPY."""
_WIDENINGS = 4
"""How often libpq's buffer may be doubled for a connection whose answers are long: from 16 to 256 KiB."""
_status = attrgetter("status")
_LOST = "the connection to the database was lost"


class ConnectionLostError(Error):
    """The connection ended in the middle of an exchange. Its message is ours; libpq's names hosts."""

    status = 503


class TooLargeError(Error):
    """One answer of the server would take more memory than it may. The connection has been closed."""


_TOO_LARGE = (
    "one row or value of the answer is far larger than an answer may be; nothing of it was taken",
    "take a part of it with substr(), or ask for its length with octet_length()",
)


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE = 1 << 20


def large_blocks_apart() -> None:
    """Have glibc map each large block by itself, and give it back when it is freed (mallopt(3)).

    Else one that fits into memory freed before does not show in the virtual size, and what a large answer took stays
    taken; and a thread that begins reserves a range of addresses as large as one. Once a process, before the first
    exchange. Where there is no mallopt, nothing is done.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
            mallopt(_M_ARENA_MAX, 1)


def _libpq_sync() -> Callable[[Any], int] | None:
    """libpq's PQsendPipelineSync, which psycopg 3.3 does not offer: PQpipelineSync sends at once, and each of two sends
    wakes the server. None where libpq is older than 17, or nobody can say which library psycopg has loaded."""
    if sys.platform != "linux" or pq.version() < 170000:
        return None
    with open("/proc/self/maps") as maps:
        paths = {line.rsplit(" ", 1)[-1].strip() for line in maps if "/libpq" in line}
    if len(paths) != 1:
        return None
    queue: Any = getattr(ctypes.PyDLL(paths.pop()), "PQsendPipelineSync", None)
    if queue is not None:
        queue.argtypes, queue.restype = (ctypes.c_void_p,), ctypes.c_int
    found: Callable[[Any], int] | None = queue
    return found


_queue_sync = _libpq_sync()


@cache
def _statm(pid: int) -> int:
    """A descriptor of that process's own proc_pid_statm(5), open for as long as it lives; -1 where there is none."""
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY) if sys.platform == "linux" else -1


def _virtual_size(statm: int) -> int:
    """Bytes of this process's address space; 0 where nobody says so."""
    return int(os.pread(statm, 32, 0).split(b" ", 1)[0]) * _PAGE if statm >= 0 else 0


def _waiting(fd: int) -> bool:
    """Whether there are bytes to be read at a socket, as tcp(7) tells. False where nobody says."""
    return fcntl is not None and sys.platform == "linux" and fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) != bytes(4)


class Wire:
    """The way of one connection to the event loop, from its first exchange to its end. What comes while nothing is
    asked is read at once: mostly it is the server's goodbye."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._asked = False
        self._cap = self._at_once = self._unasked = 0
        self._statm = _statm(os.getpid())
        self._size = -1
        self._full = self._late = self._fed = False
        self._until = self._due = inf
        self._widenings = 0 if pgconn.ssl_in_use else _WIDENINGS  # TLS may hold back that it is the end
        self._timer: asyncio.TimerHandle | None = None
        self.grown = 0
        """Bytes by which libpq has grown in this exchange; it never shrinks."""
        self._back: list[Any] = []
        """Results that `result` has still to give."""
        self.owed = 0
        """Sync points of which nobody has taken the result."""
        self._fd = pgconn.socket
        self._loop.add_reader(self._fd, self._wake)
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(self._fd, select.POLLIN)

    def exchange(self, cap: int, at_once: int, seconds: float = inf) -> "Wire":
        """Begin an exchange, which ends with the `with` block: `cap` bounds libpq's growth in bytes, `at_once` what one
        row may make it grow by. After so many seconds whoever waits for the server hears a TimeoutError."""
        if self._fd < 0 or self._back:
            raise ConnectionLostError(_LOST)
        self._cap, self._at_once = cap, at_once
        self.grown = self._unasked = 0
        self._full = self._late = self._fed = False
        self._size = -1  # what the others took since the last exchange is not this one's
        self._until = self._loop.time() + seconds
        if self._until < self._due:
            if self._timer is not None:  # that of a longer one
                self._timer.cancel()
            self._look_at(self._until)
        return self

    def __enter__(self) -> "Wire":
        self._asked = True
        return self

    def __exit__(self, *_: object) -> None:
        self._asked = False
        self._waiter = None  # of who was cancelled
        self._until = inf

    def _look(self) -> None:
        """Whether the exchange's time is over. The timer outlives it: a call costs none of its own."""
        self._timer, self._due = None, inf
        if self._until == inf:
            return
        if self._loop.time() < self._until:
            self._look_at(self._until)
            return
        self._late = True
        self._wake()

    def _look_at(self, due: float) -> None:
        self._timer, self._due = self._loop.call_at(due, self._look), due

    def close(self) -> None:
        """Let go of the loop. Before the socket is closed: its number may be another's at once."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
        self._fd = -1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
        elif not self._asked and self._fd >= 0:
            self._cap = self._at_once = _UNASKED
            self._unasked += 1
            with contextlib.suppress(ConnectionLostError, TooLargeError):
                if self._unasked > _UNASKED_READS:
                    self._refuse()
                self._read()
                self._busy()
                self.see()

    @property
    def open(self) -> bool:
        """Whether the event loop has not heard yet that it has ended."""
        return self._fd >= 0

    @property
    def quiet(self) -> bool:
        """Whether it is as it was after the last exchange: nothing has come since, and not its end. False where nobody
        can say so without reading."""
        return self._fd >= 0 and self._poll is not None and not self._poll.poll(0)

    async def come(self) -> None:
        """Wait until something comes, and read it."""
        await self.coming()
        self.came()

    def coming(self) -> asyncio.Future[None]:
        """What is done when something has come, which is then to be read: see `came`."""
        if self._late:
            raise TimeoutError
        if self._fd < 0:
            raise ConnectionLostError(_LOST)
        self._waiter = self._loop.create_future()
        return self._waiter

    def came(self) -> None:
        """Read what has come."""
        self._waiter = None
        if self._late:
            raise TimeoutError
        if self._fd < 0:
            raise ConnectionLostError(_LOST)
        self._consume(more=self._fed)

    def sync(self, *, last: bool = False) -> None:
        """Queue a sync point, where libpq can; else, or where it is the `last`, what is queued is sent with it."""
        if last or _queue_sync is None:
            self._pgconn.pipeline_sync()
        elif not _queue_sync(self._pgconn.pgconn_ptr):  # type: ignore[attr-defined]
            raise ConnectionLostError(_LOST)
        self.owed += 1

    async def flush(self) -> None:
        """Send all that is queued, reading meanwhile, so that neither side waits for the other for ever."""
        self.forget_size()  # an exchange may have slept since its last results
        if self.sent():
            return
        self._loop.add_writer(self._fd, self._wake)
        try:
            while not self.sent():
                await self.come()
                self._count()
                if self._full:
                    self._refuse()
        finally:
            if self._fd >= 0:
                self._loop.remove_writer(self._fd)

    def sent(self) -> bool:
        """Send what can be sent at once; whether that was all."""
        try:
            return not self._pgconn.flush()
        except Exception as problem:
            self.close()
            raise ConnectionLostError(_LOST) from problem

    def _consume(self, *, more: bool = False) -> None:
        """Read what has come, as much of it as libpq's buffer takes; where more was to come, the buffer may be doubled
        for what is left. How it grows for a row is seen with the next look whether a result is whole."""
        self._fed = True
        self._size = _virtual_size(self._statm)
        try:
            self._pgconn.consume_input()
            if more and self._widenings and _waiting(self._fd):  # else this may read the end, and its reason be lost
                self._widenings -= 1
                self._pgconn.consume_input()
        except Exception as problem:
            self.close()
            raise ConnectionLostError(_LOST) from problem

    def _read(self) -> None:
        """Read what has come, and no more once it was too much."""
        self._consume()
        self._count()
        if self._full:
            self._refuse()

    def _busy(self) -> bool:
        """Whether the next result is not whole. Only what is not makes libpq grow, but for what it has read already:
        `_size` is what the process took before, -1 where something of ours may have grown since."""
        if self._full:
            self._refuse()
        if self._size < 0:
            self._size = _virtual_size(self._statm)
        if not self._pgconn.is_busy():
            return False
        self._count()
        if self._full:
            self._refuse()
        return True

    def _count(self) -> None:
        """Add to what libpq has grown by."""
        before, self._size = self._size, _virtual_size(self._statm)
        more = max(0, self._size - before)
        self.grown += more
        self._full = self._full or self.grown > self._cap or more > self._at_once

    def _refuse(self) -> None:
        """Close the connection under what is too large."""
        self.close()
        self._pgconn.finish()
        raise TooLargeError(*_TOO_LARGE)

    def forget_size(self) -> None:
        """What the process has grown by since the last result is not libpq's."""
        self._size = -1

    async def result(self) -> Any:
        """The next result, or None at the end of a command's results (PQgetResult)."""
        if self._late:
            raise TimeoutError
        if self._back:
            return self._back.pop(0)
        if self._fd < 0:  # libpq would say None for ever, without anybody else's turn between
            raise ConnectionLostError(_LOST)
        while not self._fed or self._busy():
            await self.come()
        found = self._pgconn.get_result()
        if found is not None and found.status == pq.ExecStatus.FATAL_ERROR:
            self.see()
        if found is not None and found.status in COPIES:  # and libpq says so for ever, too
            raise ConnectionLostError("PostgreSQL went over to COPY, which nobody has asked for")
        return found

    def whole(self) -> bool:
        """Whether libpq's next result is whole by now, and may be taken without `result`, which counts what is not.
        Whoever finds that it did not go well has to `see`."""
        odd = self._back or self._late or self._full or self._size < 0 or not self._fed
        return not (odd or self._pgconn.is_busy())

    def at_once(self, statuses: Sequence[int], count: int) -> list[Any] | None:
        """The next `count` results, where all of them are `whole` by now: those with these statuses, and between them
        the None that is the end of a command's. Else None, and `result` gives what has come of them."""
        if not self.whole():
            return None
        found: list[Any] = []
        add, busy, get = found.append, self._pgconn.is_busy, self._pgconn.get_result
        for _ in range(count):
            if found and busy():
                break
            add(get())
        else:
            with contextlib.suppress(AttributeError):  # None where a result should be
                if tuple(map(_status, found[::2])) == statuses and not any(found[1::2]):
                    return found
        self.see()
        self._back = found
        return None

    def give_back(self, found: list[Any]) -> None:
        """Have `result` give what `at_once` has found."""
        self._back = found

    def see(self) -> None:
        """Let go of a socket that libpq has closed by itself."""
        if self._pgconn.status != pq.ConnStatus.OK:
            self.close()

    async def commands(self, count: int) -> list[Any]:
        """The one result of each of so many commands of ours, with the None behind it taken; None for one without."""
        found = []
        busy, get = self._pgconn.is_busy, self._pgconn.get_result
        for _ in range(count):
            result = await self.result()
            found.append(result)
            if result is not None and (self._back or busy() or get() is not None):  # mostly all of it is there
                while await self.result() is not None:
                    pass
        return found

    async def command(self) -> Any:
        """The one result of a command that has one, with the None behind it taken."""
        return (await self.commands(1))[0]

    async def synced(self) -> None:
        """The result that stands for a sync point."""
        result = await self.result()
        if result is None or result.status != pq.ExecStatus.PIPELINE_SYNC:
            raise ConnectionLostError("the conversation with the database is out of step")
        self.owed -= 1
