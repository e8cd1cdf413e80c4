"""Who comes to a door is taken in, on any event loop: libuv would not ask the door whom to let in."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from mcpctl.server.door import Door

log = logging.getLogger("mcpctl.http")
_BACKLOG, _AT_ONCE, _PAUSE = 2048, 16, 1.0
_MOMENT, _FEW = 0.001, 4
"""Seconds for which others may come first, and how many are taken then whom they have left."""


class Entrance:
    """Takes in those who come to a door; closed as an asyncio server is. Under TLS `tls` makes the connection. Where
    another worker has fewer visitors, it may come first, for a moment: else the one that wakes first has all who come
    together, and the others nothing to do."""

    def __init__(self, door: Door, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None) -> None:
        self._door = door
        self._protocol = protocol
        self._tls = tls
        self._paused: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._entering: set[asyncio.Task[Any]] = set()
        door.setblocking(False)
        door.listen(_BACKLOG)
        self._loop.add_reader(door.fileno(), self._take)

    def _take(self) -> None:
        """Take in those who are there, and the others their turn before too many of them."""
        for _ in range(_AT_ONCE):
            if self._gives_way():
                self._pause(_MOMENT, self._late)
                return
            if not self._took():
                return

    def _gives_way(self) -> bool:
        visitors = self._door.visitors
        return visitors is not None and visitors.crowd is not None and visitors.crowd.has_more(len(visitors.here))

    def _late(self) -> None:
        """Take in some whom no other worker has taken."""
        self._again()
        for _ in range(_FEW):
            if not self._took():
                return

    def _took(self) -> bool:
        """Take in one; False where nobody is there, or nobody can be taken."""
        try:
            conn, _ = self._door.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # nobody is there, or was turned away: the loop comes again where somebody is
        except OSError as problem:  # the system gives us no further descriptor
            log.error("no connection can be accepted: %s", problem)
            self._pause(_PAUSE, self._again)
            return False
        task = self._loop.create_task(self._enter(conn))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)
        return True

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        """Take nobody for so long."""
        self._loop.remove_reader(self._door.fileno())
        self._paused = self._loop.call_later(seconds, then)

    def _again(self) -> None:
        self._paused = None
        self._loop.add_reader(self._door.fileno(), self._take)

    async def _enter(self, conn: socket.socket) -> None:
        conn.setblocking(False)
        number, visitors = conn.fileno(), self._door.visitors
        try:
            await self._loop.connect_accepted_socket(self._protocol, conn, ssl=self._tls)
        except (OSError, ssl.SSLError) as problem:  # he went away, or speaks no TLS
            log.debug("a connection was not made: %r", problem)
            conn.close()
            if visitors is not None:
                visitors.turn_back(number, conn)

    def close(self) -> None:
        """Take in nobody any more."""
        if self._paused is not None:
            self._paused.cancel()
        if self._door.fileno() >= 0:
            self._loop.remove_reader(self._door.fileno())
        for task in self._entering:
            task.cancel()

    async def wait_closed(self) -> None:
        """Those who were coming have gone."""
        await asyncio.gather(*self._entering, return_exceptions=True)
