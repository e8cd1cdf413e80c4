"""The listening socket, and how long a silent visitor may stay at it.

Whoever opens connections and says nothing must not take the descriptors that a revocation needs: of the files, of the
control socket, of the connections to PostgreSQL.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, ClassVar

from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from mcpctl.server.crowd import Crowd
from mcpctl.server.exchange import PIECE
from mcpctl.server.held import SMALL, Budget
from mcpctl.server.hot import Apart, Lane, Lanes, Reply
from mcpctl.server.requests import Reading, Requests
from mcpctl.shared_counters import source

log = logging.getLogger("mcpctl.http")
_TURNS = 16
"""Pieces of a body that may still be taken up before an answer."""
_NEWCOMERS = 16
"""Descriptors for those for whom others have to go, whose own are free only when the event loop comes to it."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_AT_ONCE_SECONDS, _MOMENT = 0.05, 0.01
_ANSWERED = object()
"""What was seen last of somebody who was answered since."""
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
        self.conn = conn
        self.source = source(address[0])
        self.patience = asyncio.get_running_loop().call_later(patience, self.abort)

    def abort(self) -> None:
        """Have asyncio find that he has gone, and close the socket, which is its own."""
        with contextlib.suppress(OSError):  # he has, by himself
            self.conn.shutdown(socket.SHUT_RDWR)


def _crowd(whose: Mapping[int, str | None]) -> list[int]:
    """The descriptors of the one who has most of them, in their order."""
    most = [who for who, _ in Counter(whose.values()).most_common(1)]
    return [number for number, who in whose.items() if who in most]


class Visitor(Requests):
    """Who was let in; he may not stay without asking."""

    patience = 20.0
    """Seconds in which a connection's next request has to have come, its headers whole. Who has been answered and says
    nothing at all is sent away sooner, by uvicorn. Who reads nothing of an answer is sent away at the third look."""
    budget: Budget | None = None
    """What all visitors of the process may have sent together, beyond what is small."""
    here: ClassVar["dict[int, _Coming | Visitor]"] = {}
    """All of the process by their descriptors' numbers, the one that has been there for longest first."""
    crowd: ClassVar[Crowd | None] = None
    """What all workers of the server have, where there are several."""
    source: str | None = None
    ahead = 64 << 10
    """Bytes of further requests that may come before the answer to the one before."""
    _number = -1
    _counted = 0
    _patience: asyncio.TimerHandle | None = None
    _seen: object = None
    _unread: tuple[int, ...] = ()
    lanes: ClassVar[Lanes] = Lanes()
    """The heads that may go the hot way, see hot.py."""
    answering: "asyncio.Task[None] | None" = None
    """What answers a request that went the hot way."""
    _dropped = 0
    _lane: Lane | None = None
    _apart: Apart | None = None
    _peer: str | None = None
    _visited: tuple[object, str] | None = None
    _ends = False
    _answered_at = 0.0
    _dates: ClassVar[tuple[object, bytes]] = (None, b"")

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._gone = asyncio.Event()
        self._said: dict[str, Any] = {}

    @classmethod
    def of(cls, request_bytes: int, patience: float = patience) -> "type[Visitor]":
        """The visitors of one process, whose bodies may be so large."""
        made: type[Visitor] = type(
            "Visitor", (cls,), {"patience": patience, "budget": Budget(0), "here": {}, "lanes": Lanes()}
        )
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
    def turn_back(cls, number: int, conn: socket.socket) -> None:
        """Who was accepted, with a descriptor of that number, has gone before he was a visitor."""
        coming = cls.here.get(number)
        if isinstance(coming, _Coming) and coming.conn is conn:
            coming.patience.cancel()
            del cls.here[number]
            cls._note_crowd()

    @classmethod
    def _note_crowd(cls) -> None:
        if cls.crowd is not None:
            cls.crowd.note(len(cls.here))

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
        known: str | None = self._said.get("known")
        return known

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.answering is None and (self.cycle is None or self.cycle.response_complete)

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self.gone = transport.is_closing
        self._number = transport.get_extra_info("socket").fileno()
        self._peer = self.client[0] if self.client else None
        self.source = source(self._peer) if self._peer else None
        coming = self.here.get(self._number)
        if isinstance(coming, _Coming):
            coming.patience.cancel()
        self.here[self._number] = self  # in the same place
        self.app = functools.partial(self._answered, self.app)
        self._patience = self.loop.call_later(self.patience, self._look)

    def data_received(self, data: bytes) -> None:
        """Bytes came. While an answer is being made there may be some for the next request, and they are kept: uvicorn
        would stop reading, and not see that the client goes away."""
        if self.reading is Reading.HEAD:
            if self._goes_again(data):
                return
            self._end_turn()
        self._unset_keepalive_if_required()
        if self.deaf:
            self._dropped += len(data)
            if self._dropped > _LINGER_BYTES:
                self._gone.set()
            return
        whole = self.reading is Reading.WHOLE
        if whole and (self._ends or (self.answering is None and not self.cycle.keep_alive)):
            return  # no request follows one that said so
        self.waiting += data
        if whole and len(self.waiting) > self.ahead:
            self.transport.abort()
        elif self.turn is None:
            self.feed()
        self._count_waiting()

    # -- the hot lane, see hot.py -----------------------------------------------------------------------------------

    def _goes_again(self, data: bytes) -> bool:
        """Whether that is of a request with a head that is known, which goes this way if the rest of it comes at once.
        Nothing is read and nothing is answered when this is asked."""
        if self.deaf or self._searched or self.gone():
            return False
        data = bytes(self.waiting) + data if self.waiting else data
        lane = self._lane
        if lane is None or not lane.generation.in_force or (asked := lane.read(data)) is None:
            self._apart = apart = Apart.of(data)
            lane = self._lane = self.lanes.find(self._peer, apart) if apart is not None else None
            if lane is None or (asked := lane.read(data)) is None:
                return False
        text, length, start = asked
        missing = length - (len(data) - start)
        if missing < 0 or length > lane.found.most:  # others follow it, or it is large
            return False
        if missing:
            self._unset_keepalive_if_required()
            self.waiting[:] = data
            self._count_waiting()
            if self.turn is None:
                self.turn = self.loop.call_later(_AT_ONCE_SECONDS, self.feed)
            return True
        if self.waiting:
            self.waiting.clear()
            self._count_waiting()
        if self.turn is not None:
            self._end_turn()
        self.reading = Reading.WHOLE
        lane.found.app.looked = False
        self.answering = self.loop.create_task(self._again(lane, text, data, start))
        self.tasks.add(self.answering)
        return True

    def _end_turn(self) -> None:
        """What waits is not left for later."""
        if self.turn is not None:
            self.turn.cancel()
            self.turn = None

    def _keep_head(self) -> None:
        """Let further requests with the head of the last one, which went the ordinary way, go this way: of all
        connections, where it was let in, and else of this one."""
        found, generation = self._said.pop("found", None), self._said.get("generation")
        if found is None or generation is None or not generation.in_force:
            return
        if not self.cycle.keep_alive or self.expect_100_continue:
            return
        apart, self._apart = self._apart, None
        if apart is None or apart.head != self.head:
            apart = Apart.of(self.head)
        self._lane = Lane.of(apart, found, generation) if apart is not None else None
        if self._lane is not None and found.routed is not None:
            self.lanes.keep(self._peer, self._lane)

    def on_message_begin(self) -> None:
        """A request begins that goes the ordinary way."""
        super().on_message_begin()
        self._said = self.scope["state"]
        if self._visited is not None:
            self._said["visited"], self._visited = self._visited, None

    async def _again(self, lane: Lane, text: str | None, data: bytes, start: int) -> None:
        """Answer a request, and take the next one."""
        whole: bool | str = False
        task, busy = self.answering, lane.generation.busy
        if task is None:
            raise TypeError("a call without a task")
        busy[task] = "/mcp"
        try:
            whole = await lane.found.app.again(lane.found, text, data[start:], self)
        except asyncio.CancelledError:  # the client has gone, or the server ends
            log.debug("a call was cancelled before it was answered")
        finally:
            del busy[task]
            self.tasks.discard(task)
            self.answering = None
            if isinstance(whole, str):
                self._visited = (lane.found.app, whole)
                self._goes_ordinarily(data)
            else:
                if not whole:
                    self._ends = True
                    self.transport.close()
                self._answered_again()

    def _goes_ordinarily(self, data: bytes) -> None:
        """Have a request that was begun here go the ordinary way, before what has come meanwhile."""
        self._unset_keepalive_if_required()
        self.reading = Reading.HEAD
        self.waiting[:0] = data
        self.feed()
        self._count_waiting()
        if self._ends:
            self.shutdown()

    def _answered_again(self) -> None:
        """`on_response_complete`, where nothing is left to do most times."""
        if self.waiting or self.flow.read_paused or self.timeout_keep_alive_task is None:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.reading, self._seen, self._answered_at = Reading.HEAD, _ANSWERED, self.loop.time()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, if there was no further call meanwhile. One sets no timer anew."""
        self.timeout_keep_alive_task = None
        left = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self.answering is not None:
            return
        if left < -_AT_ONCE_SECONDS:  # the loop was late, and timers come first: it has yet to read what came in time
            self.timeout_keep_alive_task = self.loop.call_later(_MOMENT, self._leave, self._answered_at)
        elif left > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _leave(self, answered_at: float) -> None:
        """Close it, unless there was a call since that time."""
        if self.answering is not None or self._answered_at != answered_at:
            self.timeout_keep_alive_handler()
        else:
            super().timeout_keep_alive_handler()

    def know(self, token: str | None) -> None:
        """See `Asking.know`."""
        self._said["known"] = token or "local"

    def write(self, reply: Reply) -> bool:
        """See `Asking.write`."""
        if reply.status not in (200, 400):  # who he is has to be found anew
            self._said.pop("known", None)
        goes_on, lines = not self._ends, reply.lines()
        if reply.headers and CLOSE_HEADER in reply.headers:
            goes_on = False
        elif not goes_on:
            lines += b"connection: close\r\n"
        if (dates := self.server_state.default_headers) is not self._dates[0]:
            type(self)._dates = (dates, b"".join(b"%b: %b\r\n" % header for header in dates))
        body = reply.body if len(reply.body) <= PIECE else reply.body[:PIECE]
        self.transport.write(b"%b%b%b\r\n%b" % (STATUS_LINE[reply.status], self._dates[1], lines, body))
        return goes_on

    async def write_long(self, reply: Reply, wanted: Callable[[], bool]) -> bool:
        """See `Asking.write_long`."""
        if self.flow.write_paused:
            await self.flow.drain()
            if self.gone() or not wanted():
                return False
        goes_on, body = self.write(reply), reply.body
        for start in range(PIECE, len(body), PIECE):
            if self.flow.write_paused:
                await self.flow.drain()
            if self.gone() or not wanted():
                return False
            self.transport.write(body[start : start + PIECE])
        return goes_on and not self._ends  # it may have been hung up meanwhile: see `shutdown`

    def shutdown(self) -> None:
        """The server ends, or wants the connection to: when the call that runs has its answer."""
        if self.answering is None:
            super().shutdown()
        else:
            self._ends = True

    # -- the ordinary way --------------------------------------------------------------------------------------------

    async def _answered(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Ask the app. Where it answers before the request's body has come to its end, nothing more is read as HTTP:
        the connection closes behind the answer, after a moment in which what comes is dropped. Closed at once, the
        answer would be lost to a reset (RFC 9112, section 9.6)."""

        async def say(message: Any) -> None:
            start = message["type"] == "http.response.start"
            for _ in range(_TURNS if start else 0):  # of a small body all has come, if not been read
                if self.turn is not None:
                    await asyncio.sleep(0)
            if start and self.reading is Reading.BODY:
                self.deaf = True
                self.waiting.clear()
                self.flow.resume_reading()
                others = [item for item in message["headers"] if item[0] != b"connection"]
                message = {**message, "headers": [*others, CLOSE_HEADER]}
            elif self.deaf and not start and not message.get("more_body", False):
                await send({**message, "more_body": True})
                self.out.flush()
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # all is said; the server may end
                    async with asyncio.timeout(_LINGER_SECONDS):
                        await self._gone.wait()
                message = {**message, "body": b""}
            self.out.is_head = start
            await send(message)

        await app(scope, receive, say)

    def on_response_complete(self) -> None:
        """An answer has left; what has come meanwhile is the next request's."""
        self._seen = _ANSWERED  # also one that began before the last look: its client may ask again
        self._keep_head()
        self.out.flush()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self.reading = Reading.HEAD
        if self.turn is None:
            self.feed()
        if self.waiting or not self.idle:  # a request has come already, or some of it
            self._unset_keepalive_if_required()
        self._count_waiting()

    def _count_waiting(self) -> None:
        """Count what is kept of heads and of further requests; a body's pieces are on their way."""
        if not self._count(0 if self.reading is Reading.BODY else len(self.waiting)):
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

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        if self._patience is not None:
            self._patience.cancel()
        self._end_turn()
        if self.answering is not None:
            self.answering.cancel()
            self.answering.add_done_callback(self.tasks.discard)  # it may not have begun
        if self.here.get(self._number) is self:
            del self.here[self._number]
            self._note_crowd()
        self._gone.set()
        self.waiting.clear()
        self._count(0)
        super().connection_lost(exc)

    def _look(self) -> None:
        """Whether there was a request since the last look, or still is one whose answer is being read."""
        ended = self.idle or (self.cycle is not None and self.cycle.disconnected)
        asked = self.cycle is not self._seen or not ended
        waiting = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        self._unread = (*self._unread[-2:], waiting) if waiting else ()
        stuck = len(self._unread) == 3 and len(set(self._unread)) == 1
        if not asked or stuck:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._patience = self.loop.call_later(self.patience, self._look)
