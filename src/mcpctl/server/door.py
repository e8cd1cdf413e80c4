"""The listening socket, and how long a silent visitor may stay at it.

Whoever opens connections and says nothing must not take the descriptors that a revocation needs: of the files, of the
control socket, of the connections to PostgreSQL.
"""

import asyncio
import contextlib
import functools
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Mapping
from time import monotonic
from typing import Any, ClassVar

import h11
from mcp_types import INVALID_REQUEST
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from mcpctl.server import encoding
from mcpctl.server.held import SMALL, Budget
from mcpctl.shared_counters import source

log = logging.getLogger("mcpctl.http")
_HEAD = 16 << 10
"""Bytes of a request's head."""
_PIECE, _CHUNKED_PIECE = 16 << 10, 1 << 10
"""Bytes of a body that h11 has at once: some milliseconds of work, in the worst case."""
_CHUNKS, _CHUNK = 500, 64
"""A body of more chunks than that has so many bytes in each, on average."""
_TURNS = 16
"""Pieces of a body that may still be taken up before an answer."""
_NEWCOMERS = 16
"""Descriptors for those for whom others have to go, whose own are free only when the event loop comes to it."""
_EMPTY = 16
"""Bytes of empty lines before a request."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_SAID_FOR = 60.0
"""Seconds between two lines on who was turned away."""


class Door(socket.socket):
    """A listening socket that turns away whoever would leave too few descriptors, and before has another go for him.

    asyncio would go on accepting until none is left, and then write thousands of lines a second about it.
    """

    most: int | None = None
    """The number that an accepted connection's descriptor has to be below: a new one gets the lowest free number
    (POSIX), so that many are open."""
    visitors: "type[Visitor] | None" = None
    """Those who have been let in: one of them goes for each that leaves too little room for further ones."""
    turned_away = 0
    """Connections that were closed for want of descriptors: new ones, and those that went for them."""
    _told, _said = 0, -_SAID_FOR

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection; as if there were none, where it has to be turned away."""
        conn, address = super().accept()
        crowded = self.most is not None and conn.fileno() >= self.most - _NEWCOMERS
        if crowded and self.visitors is not None and self.visitors.make_room():
            self._turned_away()
        if self.most is not None and conn.fileno() >= self.most:
            conn.close()
            self._turned_away()
            raise BlockingIOError
        if self.visitors is not None:
            self.visitors.come(conn, address)
        return conn, address

    def _turned_away(self) -> None:
        """Count one, and say so once a minute at most."""
        self.turned_away += 1
        if monotonic() - self._said >= _SAID_FOR:
            more, self._told, self._said = self.turned_away - self._told, self.turned_away, monotonic()
            log.warning("too few file descriptors (ulimit -n): %d connections closed to keep some free", more)


class _Coming:
    """Who has been accepted: in a TLS handshake nobody hears of him, and asyncio would leave him a minute for it."""

    known, idle = None, True

    def __init__(self, conn: socket.socket, address: Any, patience: float) -> None:
        self._conn = conn
        self.source = source(address[0])
        self.patience = asyncio.get_running_loop().call_later(patience, self.abort)

    def abort(self) -> None:
        """Have asyncio find that he has gone, and close the socket, which is its own."""
        with contextlib.suppress(OSError):  # he has, by himself
            self._conn.shutdown(socket.SHUT_RDWR)


class _Connection(h11.Connection):
    """h11's, which takes no body in thousands of tiny chunks: each costs more than a hundred times its bytes."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > _CHUNKS and self._bytes < _CHUNK * self._chunks:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


def _crowd(whose: Mapping[int, str | None]) -> list[int]:
    """The descriptors of the one who has most of them, in their order."""
    most = [who for who, _ in Counter(whose.values()).most_common(1)]
    return [number for number, who in whose.items() if who in most]


class Visitor(H11Protocol):
    """uvicorn's protocol, which lets nobody stay who does not ask."""

    patience = 20.0
    """Seconds in which a connection's next request has to have come, its headers whole. Who has been answered and says
    nothing at all is sent away sooner, by uvicorn. Who reads nothing of an answer is sent away at the third look."""
    budget: Budget | None = None
    """What all visitors of the process may have sent together, beyond what is small."""
    here: ClassVar["dict[int, _Coming | Visitor]"] = {}
    """All of the process by their descriptors' numbers, the one that has been there for longest first."""
    source: str | None = None
    ahead = 64 << 10
    """Bytes of further requests that may come before the answer to the one before."""
    _number = -1
    _counted = 0
    _patience: asyncio.TimerHandle | None = None
    _seen: object = None
    _unread: tuple[int, ...] = ()
    _turn: asyncio.Handle | None = None
    _deaf = False
    _dropped = 0
    _empty = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.conn = _Connection(h11.SERVER, _HEAD)
        self._waiting = bytearray()
        self._gone = asyncio.Event()

    @classmethod
    def of(cls, request_bytes: int, patience: float = patience) -> "type[Visitor]":
        """The visitors of one process, whose bodies may be so large."""
        made: type[Visitor] = type("Visitor", (cls,), {"patience": patience, "budget": Budget(0), "here": {}})
        made.allow(request_bytes)
        return made

    @classmethod
    def allow(cls, request_bytes: int) -> None:
        """From now on bodies may be so large: the config's `limits.request_bytes`."""
        cls.ahead = request_bytes + Visitor.ahead
        if cls.budget is not None:
            cls.budget.most = Budget.of_visitors(request_bytes).most

    @classmethod
    def come(cls, conn: socket.socket, address: Any) -> None:
        """Somebody was accepted, whose `connection_made` is called when TLS, if any, is agreed on."""
        before = cls.here.pop(conn.fileno(), None)  # whose descriptor is free again, so that he has gone
        if isinstance(before, _Coming):
            before.patience.cancel()
        cls.here[conn.fileno()] = _Coming(conn, address, cls.patience)

    @classmethod
    def make_room(cls) -> bool:
        """Have one go who is not known: of the address that has most of those the one that came first. Or, where a
        token has more that wait for their next request than there are unknown ones, of those. Whether there was one."""
        unknown = {number: one.source for number, one in cls.here.items() if not one.known}
        crowd = _crowd({number: one.known for number, one in cls.here.items() if one.known and one.idle})
        if len(crowd) <= len(unknown):
            crowd = _crowd(unknown)
        if crowd:
            cls.here.pop(crowd[0]).abort()
        return bool(crowd)

    @property
    def known(self) -> str | None:
        """Whose token the last request had, if one that is valid, and no limit refused it."""
        return self.scope["state"].get("known") if self.scope is not None else None

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self.source = source(self.client[0]) if self.client else None
        coming = self.here.get(self._number)
        if isinstance(coming, _Coming):
            coming.patience.cancel()
        self.here[self._number] = self  # in the same place
        self.app = functools.partial(self._answered, self.app)
        self.flow.resume_reading = self.resume_reading  # type: ignore[method-assign]
        self._patience = self.loop.call_later(self.patience, self._look)

    def data_received(self, data: bytes) -> None:
        """Bytes came. While an answer is being made there may be some for the next request, and they are kept: uvicorn
        would stop reading, and not see that the client goes away."""
        if self._deaf:
            self._dropped += len(data)
            if self._dropped > _LINGER_BYTES:
                self._gone.set()
            return
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # no request follows one that said so
        self._waiting += data
        if self.conn.their_state is h11.DONE and len(self._waiting) > self.ahead:
            self.transport.abort()
        elif self._turn is None:
            self._feed()
        self._count_waiting()

    def _feed(self) -> None:
        """Give h11 what it may have now: a whole head, or a piece of a body, and the others their turn before the rest.
        Never anything behind the request that is being answered."""
        self._turn = None
        state = self.conn.their_state
        if not self._waiting or self._deaf or self.transport.is_closing() or state is h11.DONE or self._full():
            return
        if state is h11.IDLE and not self._skip_empty_lines():
            return
        size = _PIECE
        if state is h11.IDLE:
            size = _HEAD + 1 - len(self.conn._receive_buffer)
            if (end := self._waiting.find(b"\r\n\r\n")) >= 0:
                size = min(size, end + _CHUNKED_PIECE)
        elif any(name == b"transfer-encoding" for name, _ in self.headers):
            size = _CHUNKED_PIECE
        piece = bytes(self._waiting[:size])
        del self._waiting[:size]
        super().data_received(piece)
        if self._waiting and self.conn.their_state is not h11.DONE:
            self.flow.pause_reading()
            self._turn = self.loop.call_soon(self._feed)
        elif not self._full():
            self.flow.resume_reading()

    def _full(self) -> bool:
        """Whether enough of a body waits for the app, which says when it has taken it: see `resume_reading`."""
        return self.conn.their_state is h11.SEND_BODY and len(self.cycle.body) > HIGH_WATER_LIMIT

    def _skip_empty_lines(self) -> bool:
        """Pass over a few empty lines before a request (RFC 9112, section 2.2); whether anything is left."""
        if self.conn._receive_buffer:
            return True
        found = self._waiting.lstrip(b"\r\n")
        self._empty += len(self._waiting) - len(found)
        self._waiting = found
        if self._empty > _EMPTY:
            self.transport.abort()
            return False
        if found:
            self._empty = 0
        return bool(found)

    def resume_reading(self) -> None:
        """uvicorn wants more of the request: of what has come already, first."""
        if self._waiting and self.conn.their_state is not h11.DONE:
            if self._turn is None:
                self._turn = self.loop.call_soon(self._feed)
        else:
            FlowControl.resume_reading(self.flow)

    async def _answered(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Ask the app. Where it answers before the request's body has come to its end, nothing more is read as HTTP:
        the connection closes behind the answer, after a moment in which what comes is dropped. Closed at once, the
        answer would be lost to a reset (RFC 9112, section 9.6)."""

        async def say(message: Any) -> None:
            start = message["type"] == "http.response.start"
            for _ in range(_TURNS if start else 0):  # of a small body all has come, if not been read
                if self._turn is not None:
                    await asyncio.sleep(0)
            if start and self.conn.their_state is h11.SEND_BODY:
                self._deaf = True
                self._waiting.clear()
                self.flow.resume_reading()
                others = [item for item in message["headers"] if item[0] != b"connection"]
                message = {**message, "headers": [*others, CLOSE_HEADER]}
            elif self._deaf and not start and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # all is said; the server may end
                    async with asyncio.timeout(_LINGER_SECONDS):
                        await self._gone.wait()
                message = {**message, "body": b""}
            await send(message)

        await app(scope, receive, say)

    def on_response_complete(self) -> None:
        """An answer has left; what has come meanwhile is the next request's."""
        super().on_response_complete()
        if self._turn is None:
            self._feed()
        self._count_waiting()

    def _count_waiting(self) -> None:
        """Count what is kept of heads and of further requests; a body's pieces are on their way."""
        kept = 0 if self.conn.their_state is h11.SEND_BODY else len(self._waiting) + len(self.conn._receive_buffer)
        if not self._count(kept):
            self.transport.abort()

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
        if self._turn is not None:
            self._turn.cancel()
        if self.here.get(self._number) is self:
            del self.here[self._number]
        self._gone.set()
        self._waiting.clear()
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
