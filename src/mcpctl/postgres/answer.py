"""An answer's rows as they arrive: converted, encoded and counted, until one bound is reached.

What cannot fit is not converted first: a row's text is measured before it becomes objects, and a JSON value or an array
by the elements that it may hold, since each costs many times its text and holds up everybody else meanwhile.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from psycopg import abc
from psycopg.adapt import Transformer

from mcpctl.postgres.shape import Loaders, Shape, Types

_SMALL = 256 << 10
"""Bytes of text up to which all rows of a result are converted at once."""
_ELEMENTS = 100_000
"""Elements that the JSON values and arrays of one row may hold."""
_EVEN = 1 << 10
"""Bytes of JSON that a small row has at most, on the average of a result."""
_HEAVY = 64 << 10
_WHITESPACE = 3
"""How much longer PostgreSQL's text may be than the JSON that is made of it: white space, escapes, hexadecimal."""


@dataclass(slots=True)
class Bounds:
    """What one statement may take: rows, bytes of rows as JSON, seconds."""

    rows: int
    bytes: int
    seconds: float


class Rows(msgspec.Struct, eq=False):
    """A bounded answer. `json` is the rows as a JSON array, `count` how many, `note` says why it was cut off and what
    to do, `shape` is that of its columns (None where no result came), `even`: no row of it was large."""

    count: int
    json: bytes
    note: str | None
    shape: Shape | None
    even: bool

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """The same as plain values, read from the JSON: whoever sends it on as it is does not need them."""
        return _decode(self.json)

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(name, type) of each column."""
        return [] if self.shape is None else self.shape.columns


class Answer:
    """Rows as they arrive, until one bound is reached. `trusted`: the text's rows were small when it ran last, so that
    plain ones are measured only when they have been loaded."""

    def __init__(self, types: Types, bounds: Bounds, loaders: Loaders | None = None, *, trusted: bool = False) -> None:
        self._types = types
        self._loaders = loaders or Loaders()
        self._bounds = bounds
        self._trusted = trusted
        self._quick: abc.Transformer | None = None
        self._exact: abc.Transformer | None = None
        self._pieces: list[bytes] = []
        self._size = 2
        self._even = True
        self.heavy = False
        """Whether much was made of the last result, which is ours and not libpq's."""
        self.shape: Shape | None = None
        self._count = 0
        self.note: str | None = None

    async def take(self, result: Any) -> bool:
        """Add what one result holds; False when no more is wanted."""
        shape = self.shape
        if shape is None:
            shape = self.shape = self._types.shape(result)
            if shape.plain:
                self._quick = self._loaders.of(shape, result)
        elif not result.ntuples:  # the end of what came in pieces
            return self.note is None
        elif self._quick is not None:
            self._quick.set_pgresult(result, set_loaders=False)
        self.heavy = False
        room = self._bounds.rows - self._count
        count = min(result.ntuples, room)
        if count and self._is_small(shape, result, count) and self._add_all(shape, result, count):
            count = 0
        for row in range(count):
            self._even, self.heavy = False, True
            if not self._add(shape, result, row):
                return False
            await asyncio.sleep(0)
        if result.ntuples > room:
            self.note = _note(f"at {self._bounds.rows} rows")
        return self.note is None

    def _is_small(self, shape: Shape, result: Any, count: int) -> bool:
        """Whether so many rows can be converted at once."""
        if self._trusted and shape.plain:  # what is made of many costs many times its text
            return True
        size = marks = 0
        value = result.get_value
        for column in shape.varying:
            nested = column in shape.nested
            for row in range(count):
                text = value(row, column)
                if text is not None:
                    size += len(text)
                    if nested:
                        marks += _marks(text)
            if size > _SMALL or marks > _ELEMENTS // 10:
                return False
        return True

    def _add_all(self, shape: Shape, result: Any, count: int) -> bool:
        """Add so many rows at once, if there is room for them."""
        piece = self._encoded(shape, result, count)[1:-1]
        self.heavy = len(piece) > _HEAVY
        if self._size + len(piece) > self._bounds.bytes:
            return False
        self._even = self._even and len(piece) <= _EVEN * count
        self._keep(count, piece)
        return True

    def _encoded(self, shape: Shape, result: Any, count: int) -> bytes:
        """So many rows as a JSON array."""
        if self._quick is not None:
            try:
                return shape.encoded(self._quick.load_rows(0, count, tuple))
            except UnicodeDecodeError:  # of a database whose encoding is SQL_ASCII
                self._quick = None
        return _encode(self._exactly(result).load_rows(0, count, tuple))

    def _exactly(self, result: Any) -> abc.Transformer:
        """The loaders of `values.py`, ready for this result."""
        if self._exact is None:
            self._exact = Transformer(self._types)
            self._exact.set_pgresult(result)
        elif self._exact.pgresult is not result:
            self._exact.set_pgresult(result, set_loaders=False)
        return self._exact

    def _add(self, shape: Shape, result: Any, row: int) -> bool:
        """Add one row, if it has room; it is measured before it is converted."""
        size = marks = 0
        for column in shape.varying:
            text = result.get_value(row, column)
            if text is not None:
                size += len(text)
                if column in shape.nested:
                    marks += _marks(text)
        if marks > _ELEMENTS:
            self.note = _note(f"before a row whose JSON values and arrays may hold more than {_ELEMENTS} elements")
            return False
        if size <= max(_WHITESPACE * (self._bounds.bytes - self._size), _SMALL):
            found = self._exactly(result).load_row(row, tuple)
            piece = _encode(found)
            if found is not None and self._size + len(piece) + 1 <= self._bounds.bytes:
                self._keep(1, piece)
                return True
        most = self._bounds.bytes
        self.note = _note(f"before its bytes were more than {most}, the most that an answer may have here")
        return False

    def _keep(self, count: int, piece: bytes) -> None:
        if piece:
            self._count += count
            self._pieces += (b",", piece) if self._pieces else (piece,)
            self._size += len(piece) + 1

    def too_large(self) -> None:
        """The connection was closed under a row that is far too large."""
        self._even = False
        self.note = _note("before a row that is far larger than an answer may be")

    def rest(self) -> None:
        """Let go of what came last: nothing more will."""
        self._loaders.rest()

    def done(self) -> Rows:
        """The answer as it is now."""
        json = b"".join((b"[", *self._pieces, b"]"))
        return Rows(self._count, json, self.note, self.shape, self._even)


def whole(types: Types, loaders: Loaders, bounds: Bounds, result: Any) -> Rows | None:
    """What `Answer` makes of the one result of a trusted text, where its rows can be converted at once and all have
    room; else None, and nothing was taken."""
    shape, count = types.shape(result), result.ntuples
    if not shape.plain or count > bounds.rows:
        return None
    json = b"[]"
    if count:
        try:
            json = shape.encoded(loaders.of(shape, result).load_rows(0, count, tuple))
        except UnicodeDecodeError:  # of a database whose encoding is SQL_ASCII
            return None
        finally:
            loaders.rest()
        if len(json) > bounds.bytes:
            return None
    return Rows(count, json, None, shape, len(json) - 2 <= _EVEN * count)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[tuple[Any, ...]]).decode


def _marks(text: bytes) -> int:
    """At least as many as a JSON value or an array has elements."""
    return text.count(b",") + text.count(b"{") + text.count(b"[")


def _note(where: str) -> str:
    return (
        f"The answer was cut off {where}. For the rest: ask for fewer columns or rows (WHERE, LIMIT and OFFSET with an "
        "ORDER BY), aggregate, or take a part of a long value with substr()."
    )
