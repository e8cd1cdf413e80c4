"""The listening socket, and how long a silent visitor may stay at it.

Whoever opens connections and says nothing must not take the descriptors that a revocation needs: of the files, of the
control socket, of the connections to PostgreSQL.
"""

import asyncio
import secrets
import socket
from typing import Any

import h11
from mcp_types import INVALID_REQUEST
from uvicorn.protocols.http.h11_impl import H11Protocol

from mcpctl.server import encoding
from mcpctl.server.held import SMALL, Budget

_PIECE = 16 << 10


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

    patience = 20.0
    """Seconds in which a connection's next request has to have come, its headers whole. Who has been answered and says
    nothing at all is sent away sooner, by uvicorn. Who reads nothing of an answer is sent away at the third look."""
    budget: Budget | None = None
    """What all visitors of the process may have sent together, beyond what is small."""
    ahead = 64 << 10
    """Bytes of further requests that may come before the answer to the one before."""
    _counted = 0
    _patience: asyncio.TimerHandle | None = None
    _seen: object = None
    _ahead = 0
    _unread: tuple[int, ...] = ()

    @classmethod
    def of(cls, request_bytes: int, patience: float = patience) -> "type[Visitor]":
        """The visitors of one process, whose bodies may be so large."""
        made: type[Visitor] = type("Visitor", (cls,), {"patience": patience, "budget": Budget(0)})
        made.allow(request_bytes)
        return made

    @classmethod
    def allow(cls, request_bytes: int) -> None:
        """From now on bodies may be so large: the config's `limits.request_bytes`."""
        cls.ahead = request_bytes + Visitor.ahead
        if cls.budget is not None:
            cls.budget.most = Budget.of_visitors(request_bytes).most

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(self.patience, self._look)

    def data_received(self, data: bytes) -> None:
        """Bytes came. While an answer is being made there may be some for the next request, and they are kept: uvicorn
        would stop reading, and not see that the client goes away."""
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # no request follows one that said so
        busy = self.conn.their_state is h11.DONE
        if (busy or self.conn.their_state is h11.IDLE) and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # an empty line that comes before a request (RFC 9112, section 2.2)
            if not data:
                return
        if not busy and len(data) > _PIECE:
            # A quarter of a MiB may come at once, and h11 would take a head of that length (else 16 KiB).
            for start in range(0, len(data), _PIECE):
                if not self.transport.is_closing():
                    self.data_received(data[start : start + _PIECE])
            return
        self._ahead = self._ahead + len(data) if busy else 0
        if self._ahead > self.ahead:
            self.transport.abort()
            return
        super().data_received(data)
        if self.conn.their_state is h11.DONE:
            self.flow.resume_reading()
        if not self._count(len(self.conn._receive_buffer)):
            self.transport.abort()

    def on_response_complete(self) -> None:
        """An answer has left; what has come meanwhile counts as the next request's."""
        self._ahead = 0
        super().on_response_complete()
        self._count(len(self.conn._receive_buffer))

    def _count(self, waiting: int) -> bool:
        """Count the bytes that wait to be a request; whether there is room for them beside the others'."""
        more = max(0, waiting - SMALL) - self._counted
        if self.budget is None or not more:
            return True
        if not self.budget.take(more):
            return False
        self._counted += more
        return True

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the form of every other answer."""
        body = encoding.rpc_error(INVALID_REQUEST, msg)
        headers = [*encoding.headers(body, secrets.token_hex(8)), (b"connection", b"close")]
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the app says of a request that went on like this is not sent
            self.cycle.message_event.set()
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is under way already
            self.transport.abort()
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        if self._patience is not None:
            self._patience.cancel()
        self._count(0)
        super().connection_lost(exc)

    def _look(self) -> None:
        """Whether there was a request since the last look, or still is one whose answer is being read."""
        asked = self.cycle is not None and (self.cycle is not self._seen or not self.cycle.response_complete)
        waiting = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        self._unread = (*self._unread[-2:], waiting) if waiting else ()
        stuck = len(self._unread) == 3 and len(set(self._unread)) == 1
        if not asked or stuck:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._patience = self.loop.call_later(self.patience, self._look)
