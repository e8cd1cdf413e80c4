"""The hot lane: a request whose head is, byte for byte, that of one which was let in on the same connection before.

What its head says has been found good, and counts for as long as the config is in force. All else is looked at with
each request, by the same functions: rates, the token, a lockdown, the calls at once, and the call.
"""

import re
from asyncio import Task
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mcpctl.server import encoding
from mcpctl.server.express import Call, Route

_LENGTH = re.compile(rb"\r\ncontent-length:[\t ]*([0-9]{1,7})[\t ]*(?=\r\n)", re.IGNORECASE)
_DIGITS = 7


@dataclass(slots=True)
class Reply:
    """An answer that is to be written. `wanted`: whether the rest of a long one may still leave."""

    status: int
    body: bytes
    request_id: str
    headers: Sequence[tuple[bytes, bytes]] = ()
    wanted: Callable[[], bool] = lambda: True

    def lines(self) -> bytes:
        """Its headers, as they are sent."""
        if self.body and not self.headers:
            return encoding.lines(len(self.body), self.request_id)
        all_of_it = (*encoding.headers(self.body, self.request_id), *self.headers)
        return b"".join(b"%b: %b\r\n" % header for header in all_of_it)


Write = Callable[[Reply], Awaitable[bool]]
"""Writes an answer; whether all of it left and the connection goes on."""


class Again(Protocol):
    """An app that answers a further call of a head that it has let in."""

    def read(self, found: "Found", body: bytes) -> Call | None:
        """The call in a body; None where the request has to go the ordinary way."""

    async def again(
        self, found: "Found", call: Call, task: "Task[Any]", gone: Callable[[], bool], write: Write
    ) -> bool:
        """Answer a call, which runs until that is written; what `write` says, or False where its client has `gone`,
        which ends the task that this runs in."""


class Generation(Protocol):
    """One reading of the config."""

    @property
    def in_force(self) -> bool:
        """Whether it still is."""

    async def again(
        self, found: "Found", call: Call, task: "Task[Any]", gone: Callable[[], bool], write: Write
    ) -> bool:
        """`Again.again`, as a call that runs in it."""


@dataclass(frozen=True, slots=True, repr=False)
class Found:
    """What the head of a request that was let in has said: the client's address, the credential, and the headers as
    both lanes see them. `most`: the bytes that a body may have; `routed`: see `Express.route`."""

    app: Again
    address: str | None
    text: str | None
    headers: list[tuple[bytes, bytes]]
    most: int
    routed: Route


class Lane:
    """What goes this way on a connection."""

    missing = 0
    """Bytes of the body that was asked for last which have not come yet."""

    def __init__(self, before: bytes, behind: bytes, found: Found, generation: Generation) -> None:
        self._before = before
        self._behind = behind
        self._found = found
        self._generation = generation

    @classmethod
    def of(cls, head: bytes, found: Found, generation: Generation) -> "Lane | None":
        """That of a head, where it says how long the body is."""
        lengths = list(_LENGTH.finditer(head))
        if len(lengths) != 1:
            return None
        return cls(head[: lengths[0].start(1)], head[lengths[0].end(1) :], found, generation)

    def body(self, data: bytes) -> bytes | None:
        """What has come of the body of a request with that head; None where it is another, or others follow it."""
        if not data.startswith(self._before) or not self._generation.in_force:
            return None
        start, behind = len(self._before), self._behind
        end = data.find(behind, start, start + _DIGITS + len(behind))
        length = data[start:end] if end > start else b""
        if not length.isdigit() or int(length) > self._found.most:
            return None
        self.missing = int(length) - (len(data) - end - len(behind))
        return data[end + len(behind) :] if self.missing >= 0 else None

    def call(self, body: bytes) -> Call | None:
        """See `Again.read`."""
        return self._found.app.read(self._found, body)

    async def answer(self, call: Call, task: "Task[Any]", gone: Callable[[], bool], write: Write) -> bool:
        """See `Again.again`."""
        return await self._generation.again(self._found, call, task, gone, write)
