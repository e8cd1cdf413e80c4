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


class Entrance:
    """Takes in those who come to a door; closed as an asyncio server is. Under TLS `tls` makes the connection."""

    def __init__(self, door: Door, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None) -> None:
        self._door = door
        self._protocol = protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._entering: set[asyncio.Task[Any]] = set()
        door.setblocking(False)
        door.listen(_BACKLOG)
        self._loop.add_reader(door.fileno(), self._take)

    def _take(self) -> None:
        """Take in those who are there, and the others their turn before too many of them."""
        for _ in range(_AT_ONCE):
            try:
                conn, _ = self._door.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # nobody is there, or was turned away: the loop comes again where somebody is
            except OSError as problem:
                self._pause(problem)
                return
            task = self._loop.create_task(self._enter(conn))
            self._entering.add(task)
            task.add_done_callback(self._entering.discard)

    def _pause(self, problem: OSError) -> None:
        """Take nobody for a second: the system gives us no further descriptor."""
        log.error("no connection can be accepted: %s", problem)
        self._loop.remove_reader(self._door.fileno())
        self._loop.call_later(_PAUSE, self._again)

    def _again(self) -> None:
        if self._door.fileno() >= 0:
            self._loop.add_reader(self._door.fileno(), self._take)

    async def _enter(self, conn: socket.socket) -> None:
        conn.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._protocol, conn, ssl=self._tls)
        except (OSError, ssl.SSLError) as problem:  # he went away, or speaks no TLS
            log.debug("a connection was not made: %r", problem)
            conn.close()

    def close(self) -> None:
        """Take in nobody any more."""
        if self._door.fileno() >= 0:
            self._loop.remove_reader(self._door.fileno())
        for task in self._entering:
            task.cancel()

    async def wait_closed(self) -> None:
        """Those who were coming have gone."""
        await asyncio.gather(*self._entering, return_exceptions=True)
