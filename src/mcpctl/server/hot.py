"""The hot lane: a request whose head is, byte for byte, that of one which was read before, but for two words that every
head has of its own: how long its body is, and whose token it brings.

What the rest of a head says was found good once, and is so for as long as the config is in force. It holds for another
connection, too, since nothing that is asked of a head on the ordinary way depends on more than these:

- its bytes: method, target, version, Host, Origin, what a proxy adds, Accept, Content-Type, the era of the protocol.
  How the headers stand to each other (one length, no chunks, one credential) does not change with the two words, whose
  letters are the plainest there are. What ends a connection, or waits for a 100, is never known;
- the peer's address, which with X-Forwarded-For gives the caller's: a head is known for the peer that sent it;
- the config, the listening address and TLS, which are one `Generation`'s, and those of all its connections.

All else is looked at with each request, by the functions that the ordinary way calls: rates, the token, a lockdown, the
calls at once, and the call. So a token is nothing that is remembered here: neither that it is good nor what it is.
"""

import re
from asyncio import Task
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from mcpctl.server import encoding
from mcpctl.server.express import Route
from mcpctl.server.held import SMALL

_OWN = re.compile(
    rb"\r\n(?:content-length:[\t ]*([0-9]{1,7})|(?:authorization:[\t ]*bearer +|x-api-key:[\t ]*)([0-9A-Za-z_]{1,128}))"
    rb"(?=[\t ]*\r\n)",
    re.IGNORECASE,
)
"""The length of a body, and a credential: letters, digits and underscores, as a token has."""
_LENGTH, _TEXT = 1, 2
_ORDERS = ([_LENGTH], [_LENGTH, _TEXT], [_TEXT, _LENGTH])
_MOST = {_LENGTH: 7, _TEXT: 128}
_END = b"\r\n\r\n"


class Reply:
    """An answer that is to be written."""

    __slots__ = ("body", "headers", "request_id", "status")

    def __init__(self, status: int, body: bytes, request_id: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.status = status
        self.body = body
        self.request_id = request_id
        self.headers = headers

    def lines(self) -> bytes:
        """Its headers, as they are sent."""
        if not self.body:
            all_of_it = (*encoding.headers(b"", self.request_id), *self.headers)
            return b"".join(b"%b: %b\r\n" % header for header in all_of_it)
        own = encoding.lines(len(self.body), self.request_id)
        return own + b"".join([b"%b: %b\r\n" % header for header in self.headers]) if self.headers else own


class Asking(Protocol):
    """Who asks on a connection, until he is answered: see door.py:Visitor."""

    answering: "Task[Any] | None"
    """The task that his call runs in."""
    gone: Callable[[], bool]
    """Whether he has gone, which ends that task."""
    flow: FlowControl
    """Whether he has not read what was written before, so that the next answer has to wait (`write_long`)."""

    def know(self, token: str | None) -> None:
        """Take note that his token is valid, and that no limit refuses him."""

    def write(self, reply: Reply) -> bool:
        """Write an answer of one piece; whether the connection goes on."""

    async def write_long(self, reply: Reply, wanted: Callable[[], bool]) -> bool:
        """Write one when those before it have left, and each further piece only while it is `wanted`; whether all of it
        left and the connection goes on."""


class Again(Protocol):
    """An app that answers a further request with a head that it has read. `looked`: whether it has looked at the files
    since the last of them had come; set to False by whoever hands it another. Those that have come by one turn of the
    event loop are answered after it, so that one look is behind all of them."""

    looked: bool

    async def again(self, found: "Found", text: str | None, body: bytes, asking: Asking) -> bool | str:
        """Answer a request with this credential and body; what `Asking.write` says, or False where he has gone. Where
        it has to go the ordinary way, the number under which it was counted."""


class Generation(Protocol):
    """One reading of the config. `busy`: the tasks that answer something in it, and what they were asked for."""

    busy: dict["Task[Any]", str]

    @property
    def in_force(self) -> bool:
        """Whether it still is."""


@dataclass(slots=True, repr=False)
class Found:
    """What a head has said, but for its credential: the client's address, and the headers as both lanes see them.
    `most`: the bytes that a body may have. `routed`: see `Express.route`; None where nobody was let in with that head,
    so that all that is known is how to refuse. `credential`: whether it had one, None where nobody looks at it. `base`:
    what clients call the server by, where it was asked for. `more` are headers of each answer."""

    app: Again
    address: str | None
    headers: list[tuple[bytes, bytes]]
    most: int
    routed: Route | None = None
    credential: bool | None = None
    base: str | None = None
    more: Sequence[tuple[bytes, bytes]] = ()


class Apart:
    """A head, taken apart: the pieces around its own two words, and which of these stand between them."""

    __slots__ = ("head", "order", "pieces")

    def __init__(self, head: bytes, pieces: tuple[bytes, ...], order: list[int]) -> None:
        self.head = head
        self.pieces = pieces
        self.order = order

    @classmethod
    def of(cls, data: bytes) -> "Apart | None":
        """The head that a request begins with, where it is small, says how long the body is, and has one credential at
        most."""
        end = data.find(_END) + len(_END)
        if not len(_END) <= end <= SMALL:
            return None
        head, pieces, order, at = data[:end], [], [], 0
        for one in _OWN.finditer(head):
            kind = one.lastindex or 0
            start, end = one.span(kind)
            pieces.append(head[at:start])
            order.append(kind)
            at = end
        return cls(head, (*pieces, head[at:]), order) if order in _ORDERS else None


class Lane:
    """A head that is known."""

    __slots__ = ("_first", "_further", "found", "generation", "pieces", "size")

    def __init__(self, apart: Apart, found: Found, generation: Generation) -> None:
        self.pieces = apart.pieces
        self.size = len(apart.head)
        self.found = found
        self.generation = generation
        self._first = apart.pieces[0]
        self._further = [
            (kind, _MOST[kind] + len(piece), piece) for kind, piece in zip(apart.order, apart.pieces[1:], strict=True)
        ]

    @classmethod
    def of(cls, apart: Apart, found: Found, generation: Generation) -> "Lane | None":
        """That of a head, but where its credential is not one of its own two words: it would count for the next."""
        if found.credential is not None and found.credential != (_TEXT in apart.order):
            return None
        return cls(apart, found, generation)

    def read(self, data: bytes) -> tuple[str | None, int, int] | None:
        """(credential, bytes of the body, where it begins) of a request with that head; None where it is another."""
        if not data.startswith(self._first):
            return None
        at, text, length = len(self._first), None, b""
        for kind, most, piece in self._further:
            end = data.find(piece, at, at + most)
            if end < 0:
                return None
            if kind == _LENGTH:
                length = data[at:end]
            else:
                text = data[at:end]
            at = end + len(piece)
        if not length.isdigit() or (text is not None and not text.replace(b"_", b"").isalnum()):
            return None
        return text.decode("ascii") if text is not None else None, int(length), at


class Lanes:
    """The heads of those who were let in, of all connections of a process: so many, and so many bytes of them. The one
    that was looked for least recently goes first."""

    def __init__(self, most: int = 1000, most_bytes: int = 1 << 20) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._lanes: OrderedDict[tuple[str | None, tuple[bytes, ...]], Lane] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lanes)

    def find(self, peer: str | None, apart: Apart) -> Lane | None:
        """What is known of this head, if this peer sends it."""
        lane = self._lanes.get((peer, apart.pieces))
        if lane is None:
            return None
        if not lane.generation.in_force:
            self._forget()
            return None
        self._lanes.move_to_end((peer, apart.pieces))
        return lane

    def keep(self, peer: str | None, lane: Lane) -> None:
        """Keep one for the peer that sent it; none of an earlier reading of the config any more."""
        if self._lanes and next(iter(self._lanes.values())).generation is not lane.generation:
            self._forget()
        before = self._lanes.pop((peer, lane.pieces), None)
        self._bytes += lane.size - (before.size if before is not None else 0)
        self._lanes[peer, lane.pieces] = lane
        while len(self._lanes) > self._most or self._bytes > self._most_bytes:
            self._bytes -= self._lanes.popitem(last=False)[1].size

    def _forget(self) -> None:
        self._lanes.clear()
        self._bytes = 0
