"""Lines of stdin to the remote server, and its answers to stdout: each call on its own, so that none waits for another.

What the client cancels ends: its stream is closed, which is what cancels it there (MCP 2026-07-28), and an older server
is told, too. At the end of stdin everything ends at once.
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, BinaryIO

from mcpctl.bridge import message
from mcpctl.bridge.message import Id, Message, NotAMessageError
from mcpctl.bridge.remote import CONNECT, GOODBYE, LARGEST, Put, Remote

_CANCELLED = "notifications/cancelled"


class Lines:
    """The lines of a file, read on a thread of their own: a pipe cannot be waited for in any other way on all systems.
    One is read ahead. The thread is left behind at the end, as nothing can wake it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = threading.Semaphore(1)
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def _read(self) -> None:
        line = b"begun"
        while line:
            self._wanted.acquire()
            try:
                line = self._line()
            except OSError:  # the terminal is gone
                line = b""
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._came.put_nowait, line)

    def _line(self) -> bytes:
        """The next line; of one that is too long no more than makes it so."""
        line = rest = self._file.readline(LARGEST + 2)
        while len(rest) > LARGEST and not rest.endswith(b"\n"):
            rest = self._file.readline(LARGEST + 2)
        return line

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._came.get()
            if not line:
                return
            yield line
            self._wanted.release()


class Out:
    """stdout, written on a thread of its own: a client that reads nothing must not keep us from hearing that it is
    gone. `gone` is set when it can be written no more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._waiting: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self.gone = asyncio.Event()
        threading.Thread(target=self._write, name="stdout", daemon=True).start()

    async def put(self, line: bytes) -> None:
        """Write a line, and wait until it is written."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.put((line + b"\n", done))
        await done

    def _write(self) -> None:
        while True:
            data, done = self._waiting.get()
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                self._tell(self.gone.set)
            self._tell(partial(_finish, done))

    def _tell(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(what)


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class Pump:
    """Carries the messages of one client to a remote server, and answers them all."""

    def __init__(self, remote: Remote, put: Put) -> None:
        self._remote = remote
        self._put = put
        self._calls: dict[tuple[type, Id], tuple[Message, asyncio.Task[None]]] = {}
        self._all: set[asyncio.Task[None]] = set()
        self._said: asyncio.Task[None] | None = None
        self._modern = False

    async def run(self, lines: AsyncIterator[bytes], gone: asyncio.Event) -> None:
        """Carry until the lines end, or nobody reads the answers any more; then what runs is ended."""
        reading = asyncio.ensure_future(self._read(lines))
        unheard = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({reading, unheard}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            left = {reading, unheard, *self._all}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await self._remote.end()

    async def _read(self, lines: AsyncIterator[bytes]) -> None:
        async for line in lines:
            if not line.strip():
                continue
            try:
                if len(line) > LARGEST:
                    raise NotAMessageError(message.INVALID_REQUEST, f"Invalid request: over {LARGEST >> 20} MiB")
                found = message.read(line)
            except NotAMessageError as problem:
                await self._put(message.error(problem.request, problem.code, problem.said))
                continue
            self._take(found)

    def _take(self, found: Message) -> None:
        if found.method is not None and found.method != _CANCELLED:
            self._modern = found.version is not None
        if found.method == _CANCELLED:
            self._cancel(found)
        elif found.request is None:
            self._said = self._start(self._tell(found, self._said))
        else:
            key = (type(found.request), found.request)
            task = self._start(self._call(found, self._said))
            self._calls[key] = (found, task)
            task.add_done_callback(lambda done: self._forget(key, done))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._all.add(task)
        task.add_done_callback(self._all.discard)
        return task

    def _forget(self, key: tuple[type, Id], done: asyncio.Task[None]) -> None:
        if key in self._calls and self._calls[key][1] is done:
            del self._calls[key]

    async def _call(self, found: Message, before: asyncio.Task[None] | None) -> None:
        """A request goes behind the notifications that were before it: `notifications/initialized` must come first."""
        if before is not None:
            await asyncio.wait({before}, timeout=CONNECT)
        await self._remote.carry(found)

    async def _tell(self, found: Message, before: asyncio.Task[None] | None) -> None:
        await self._call(found, before)
        if found.method == "notifications/initialized" and self._remote.has_session:
            self._start(self._remote.listen())

    def _cancel(self, found: Message) -> None:
        """End a call. Since 2026-07-28 a closed stream says it all, and nothing else is sent; an older server is told
        first, since to many of them a closed stream means nothing."""
        number = message.answerable({"id": found.params.get("requestId")})
        call, task = self._calls.get((type(number), number), (None, None))
        if call is None or task is None:
            if not self._modern:
                self._start(self._remote.carry(found))
        elif call.version is not None:
            task.cancel()
        else:
            told = self._start(self._soon(self._remote.carry(found)))
            told.add_done_callback(lambda _: task.cancel())

    async def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await work
