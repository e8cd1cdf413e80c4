"""libpq on the event loop: send what is queued, take result after result, and never read more than was asked for.

One `Wire` serves one exchange on one non-blocking connection in pipeline mode. What one cell may make libpq allocate
is bounded here: libpq grows its buffer to the next power of two as soon as it has seen a row's header, long before
the data, so the process's virtual size tells at once (libpq `pqCheckInBufferSpace`).
"""

import asyncio
import ctypes
import os
import sys
from functools import cache
from typing import Any

from psycopg import pq

from mcpctl.errors import Error

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


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


@cache
def _statm(pid: int) -> int:
    """A descriptor of that process's own proc_pid_statm(5), open for as long as it lives."""
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY)


def _virtual_size() -> int:
    """Bytes of this process's address space; 0 where there is no /proc."""
    if sys.platform != "linux":
        return 0
    return int(os.pread(_statm(os.getpid()), 32, 0).split(b" ", 1)[0]) * _PAGE


class Wire:
    """One exchange. `async with` adds and removes the loop's reader; `cap` bounds libpq's growth in bytes, `at_once`
    what one row may make it grow by."""

    def __init__(self, pgconn: pq.abc.PGconn, cap: int, at_once: int) -> None:
        self._pgconn = pgconn
        self._cap = cap
        self._at_once = at_once
        self._full = False
        self._grown = 0
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._fd = pgconn.socket

    def __enter__(self) -> "Wire":
        self._loop.add_reader(self._fd, self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Before the socket is closed: its number may be another's at once."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
        self._fd = -1

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def grown(self) -> int:
        """Bytes by which libpq has grown so far; it never shrinks."""
        return self._grown

    async def _ready(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def flush(self) -> None:
        """Send all that is queued, reading meanwhile, so that neither side waits for the other for ever."""
        if not self._flush():
            return
        self._loop.add_writer(self._fd, self._wake)
        try:
            while self._flush():
                await self._ready()
                self._consume()
        finally:
            if self._fd >= 0:
                self._loop.remove_writer(self._fd)

    def _flush(self) -> bool:
        try:
            return bool(self._pgconn.flush())
        except Exception as problem:
            self._let_go()
            raise ConnectionLostError("the connection to the database was lost") from problem

    def _consume(self) -> None:
        """Read what has come, watching how libpq's buffer grows."""
        before = _virtual_size()
        try:
            self._pgconn.consume_input()
        except Exception as problem:
            self._let_go()
            raise ConnectionLostError("the connection to the database was lost") from problem
        self._count(_virtual_size() - before)
        self._refuse_if_full()

    def _busy(self) -> bool:
        self._refuse_if_full()
        before = _virtual_size()
        busy = bool(self._pgconn.is_busy())
        self._count(_virtual_size() - before)
        if busy:  # else a result is whole that came before what is too large: it is taken first
            self._refuse_if_full()
        return busy

    def _count(self, more: int) -> None:
        """Add to what libpq has grown by."""
        self._grown += max(0, more)
        self._full = self._full or self._grown > self._cap or more > self._at_once

    def _refuse_if_full(self) -> None:
        """Close the connection under what is too large."""
        if self._full:
            self._let_go()
            self._pgconn.finish()
            raise TooLargeError(*_TOO_LARGE)

    async def result(self) -> Any:
        """The next result, or None at the end of a command's results (PQgetResult)."""
        while self._busy():
            await self._ready()
            self._consume()
        return self._pgconn.get_result()

    async def command(self) -> Any:
        """The one result of a command that has one, with the None behind it taken."""
        result = await self.result()
        if result is not None:
            while await self.result() is not None:
                pass
        return result

    async def sync(self) -> None:
        """The result that stands for a sync point."""
        result = await self.result()
        if result is None or result.status != pq.ExecStatus.PIPELINE_SYNC:
            raise ConnectionLostError("the conversation with the database is out of step")
