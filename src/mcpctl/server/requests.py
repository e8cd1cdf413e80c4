"""HTTP/1.1 as it comes: one request at a time, a whole head and then its body, through llhttp.

uvicorn's protocol gives its parser all that comes. Here the parser has no byte that is not of the request which is
answered next: it is bounded what one request may cost before anybody looks at it.
"""

import asyncio
import re
import secrets
from enum import Enum, auto
from typing import Any

import httptools
from mcp_types import INVALID_REQUEST
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mcpctl.server import encoding
from mcpctl.server.held import SMALL

_HEAD, _LINES = 16 << 10, 100
"""Bytes of a request's head, and lines: each costs a hundred times its bytes."""
_VERSIONS = ([b"HTTP/1.1"], [b"HTTP/1.0"])
_UPGRADE = re.compile(rb"\r\nupgrade:[\t\x20-\x7e\x80-\xff]*(?=\r\n)", re.IGNORECASE)
"""To what is not spoken here (RFC 9110, section 7.8): passed over, since the parser would take no body behind it."""
_PIECE, _CHUNKED_PIECE = 64 << 10, 4 << 10
"""Bytes of a body that the parser has at once: a millisecond of work, in the worst case."""
_OVERHEAD, _PART = 4 << 10, 8
"""Bytes that chunks may take beside a body, and beyond an eighth of it: those of tiny ones, and what stands behind the
last of them."""
_EMPTY = 16
"""Bytes of empty lines before a request."""


class Reading(Enum):
    """How far the request has come that is read."""

    HEAD = auto()
    BODY = auto()
    WHOLE = auto()
    """Until it is answered nothing further is read as HTTP."""


class Out:
    """A connection as answers are written to it: a head waits for what follows, so that one packet has both."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing
        self.is_head = False

    def write(self, data: bytes) -> None:
        if self.is_head:
            self._head, self.is_head = data, False
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data if head else data)

    def flush(self) -> None:
        """Write a head that nothing follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _NotTakenError(Exception):
    """Why a request is refused that the parser would take."""


class Requests(HttpToolsProtocol):
    """uvicorn's protocol, whose parser gets one request at a time."""

    deaf = False
    """Nothing that comes is read any more."""
    head = b""
    """That of the last request, as it came, if it is small: nobody counts it."""
    reading = Reading.HEAD
    turn: asyncio.Handle | None = None
    """When the rest of what came is looked at."""
    _empty = 0
    _searched = 0
    _left: int | None = None
    _overhead = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.parser = httptools.HttpRequestParser(self)  # one without uvicorn's leniency
        self.waiting = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there."""
        super().connection_made(transport)
        self.out = Out(transport)
        self.flow.resume_reading = self.resume_reading  # type: ignore[method-assign]

    def feed(self) -> None:
        """Give the parser what it may have now: a whole head, and a piece of a body, and the others their turn before
        the rest. Never anything behind the request that is being answered."""
        self.turn = None
        if not self.waiting or self.deaf or self.transport.is_closing() or self._full():
            return
        if self.reading is Reading.HEAD and (head := self._head()):
            self._parse(head)
        if self.reading is Reading.BODY and self.waiting:
            self._feed_body()
        if self.waiting and self.reading is Reading.BODY:
            self.flow.pause_reading()
            self.turn = self.loop.call_soon(self.feed)
        elif not self._full():
            FlowControl.resume_reading(self.flow)

    def _feed_body(self) -> None:
        """Give the parser a piece, which may not be far larger than what it holds: each tiny chunk costs a hundred
        times its bytes."""
        piece = self._taken(_CHUNKED_PIECE if self._left is None else min(self._left, _PIECE))
        self._overhead += len(piece)
        self._parse(piece)
        if self.reading is Reading.BODY and self._left is None and self._overhead > _OVERHEAD:
            self.send_400_response("the chunks are too small")

    def _taken(self, size: int) -> bytes:
        piece = bytes(self.waiting[:size])
        del self.waiting[:size]
        return piece

    def _head(self) -> bytes:
        """The next request's head, if all of it is there."""
        if not self._searched and not self._skip_empty_lines():
            return b""
        end = self.waiting.find(b"\r\n\r\n", max(0, self._searched - 3)) + 4
        self._searched = len(self.waiting)
        if end > _HEAD or (end < 4 and self._searched > _HEAD):
            self.send_400_response(f"the head of a request is {_HEAD} bytes at most")
        elif end < 4:
            if not self.waiting[:1].isalpha() or b"\n\n" in self.waiting:
                self.send_400_response("this is no HTTP")
        elif self.waiting.count(b"\n", 0, end) > _LINES:
            self.send_400_response(f"the head of a request has {_LINES} lines at most")
        elif (version := self.waiting[: self.waiting.find(b"\r\n")].split(b" ")[2:]) not in _VERSIONS:
            other = len(version) == 1 and version[0].startswith(b"HTTP/")
            self._turn_away("HTTP/1.1 is spoken here", status=505 if other else 400)
        else:
            self._searched = 0
            head = self._taken(end)
            self.head = head if end <= SMALL else b""
            return _UPGRADE.sub(b"", head)
        return b""

    def _parse(self, data: bytes) -> None:
        """Have the parser call what follows here."""
        behind = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # CONNECT, which is answered as any request
            behind = True
        except httptools.HttpParserError as problem:
            behind = self.reading is Reading.WHOLE
            if not behind:
                self._refuse(problem)
        if behind:  # whoever sends a request behind a body in chunks asks once more
            self.cycle.keep_alive = False
            self.waiting.clear()

    def _full(self) -> bool:
        """Whether enough of a body waits for the app, which says when it has taken it: see `resume_reading`."""
        return self.reading is Reading.BODY and len(self.cycle.body) > HIGH_WATER_LIMIT

    def _skip_empty_lines(self) -> bool:
        """Pass over a few empty lines before a request (RFC 9112, section 2.2); whether anything is left."""
        found = self.waiting.lstrip(b"\r\n")
        self._empty += len(self.waiting) - len(found)
        self.waiting = found
        if self._empty > _EMPTY:
            self.transport.abort()
            return False
        if found:
            self._empty = 0
        return bool(found)

    def resume_reading(self) -> None:
        """uvicorn wants more of the request: of what has come already, first."""
        if self.waiting and self.reading is not Reading.WHOLE:
            if self.turn is None:
                self.turn = self.loop.call_soon(self.feed)
        else:
            FlowControl.resume_reading(self.flow)

    # -- what the parser finds -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.reading is not Reading.HEAD:
            raise _NotTakenError("a further request behind a body in chunks")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, without white space around it (RFC 9110, section 5.5); those behind a body count for nothing."""
        if self.reading is Reading.HEAD:
            name, value = name.lower(), value.strip(b" \t")
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole: the app is asked."""
        version = self.parser.get_http_version()
        coding, lengths, hosts = [], [], 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                lengths.append(value)
            elif name == b"transfer-encoding":
                coding.append(value)
        if hosts > 1 or (not hosts and version == "1.1"):
            raise _NotTakenError(f"Host stands there {hosts} times")
        if coding and (coding[0].lower() != b"chunked" or version != "1.1"):
            raise _NotTakenError("Transfer-Encoding is not chunked")
        self._left = None if coding else int(lengths[0]) if lengths else 0
        self.reading, self._overhead = Reading.BODY, 0
        path, _, query = self.url.partition(b"?")
        self.scope |= {
            "http_version": version,
            "method": self.parser.get_method().decode("ascii"),
            "path": path.decode("latin-1"),
            "raw_path": path,
            "query_string": query,
        }
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.out,  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and version == "1.1" and self._left != 0,
            keep_alive=version == "1.1" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        if self._left is not None:
            self._left -= len(body)
        self._overhead -= len(body) + len(body) // _PART
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request has come."""
        super().on_message_complete()
        self.reading = Reading.WHOLE

    # -- what is no request ------------------------------------------------------------------------------------------

    def _refuse(self, problem: httptools.HttpParserError) -> None:
        """Answer what the parser does not take (RFC 9110, section 9.1: a method that is unknown is 501)."""
        if isinstance(problem, httptools.HttpParserInvalidMethodError):
            self._turn_away("there is no such method", status=501)
        else:
            why = problem.__context__ if isinstance(problem.__context__, _NotTakenError) else problem
            self.send_400_response(f"this is no HTTP request that is taken: {why}")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and end the connection."""
        self._turn_away(msg, status=400)

    def _turn_away(self, msg: str, *, status: int) -> None:
        """`send_400_response`, in the form of every other answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # what the app says of a request that went on like this is not sent
            self.cycle.message_event.set()
        body = encoding.rpc_error(INVALID_REQUEST, msg)
        headers = [*encoding.headers(body, secrets.token_hex(8)), CLOSE_HEADER]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        self.transport.close()
