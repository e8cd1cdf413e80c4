"""The listening socket, and how long a silent visitor may stay at it.

Whoever opens connections and says nothing must not take the descriptors that a revocation needs: of the files, of the
control socket, of the connections to PostgreSQL.
"""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_PATIENCE = 20.0
"""Seconds in which a connection's next request has to have come, its headers whole. Who has been answered and says
nothing at all is sent away sooner, by uvicorn."""


class Door(socket.socket):
    """A listening socket that turns away whoever would leave too few descriptors.

    asyncio would go on accepting until none is left, and then write thousands of lines a second about it.
    """

    most: int | None = None
    """The number that an accepted connection's descriptor has to be below: a new one gets the lowest free number
    (POSIX), so that many are open."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection; as if there were none, where it has to be turned away."""
        conn, address = super().accept()
        if self.most is not None and conn.fileno() >= self.most:
            conn.close()
            raise BlockingIOError
        return conn, address


class Visitor(H11Protocol):
    """uvicorn's protocol, which lets nobody stay who does not ask."""

    _patience: asyncio.TimerHandle | None = None
    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(_PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Whether there was a request since the last look, or still is one."""
        asked = self.cycle is not None and (self.cycle is not self._seen or not self.cycle.response_complete)
        if not asked:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._patience = self.loop.call_later(_PATIENCE, self._look)
