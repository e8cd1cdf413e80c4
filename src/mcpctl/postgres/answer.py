"""An answer's rows as they arrive: converted, encoded and counted, until one bound is reached.

What cannot fit is not converted first: a row's text is measured before it becomes objects, and a JSON value or an array
by the elements that it may hold, since each costs many times its text and holds up everybody else meanwhile.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
from psycopg import abc
from psycopg.adapt import Transformer

from mcpctl.postgres.values import Types

_SMALL = 256 << 10
"""Bytes of text up to which all rows of a result are converted at once."""
_ELEMENTS = 100_000
"""Elements that the JSON values and arrays of one row may hold."""
_WHITESPACE = 3
"""How much longer PostgreSQL's text may be than the JSON that is made of it: white space, escapes, hexadecimal."""


@dataclass(frozen=True)
class Bounds:
    """What one statement may take: rows, bytes of rows as JSON, seconds."""

    rows: int
    bytes: int
    seconds: float


@dataclass
class Rows:
    """A bounded answer. `json` is the rows as a JSON array, `note` says why it was cut off and what to do, `types` are
    the OIDs of its columns."""

    columns: list[tuple[str, str]]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    json: bytes = b"[]"
    note: str | None = None
    types: set[int] = field(default_factory=set)


class Answer:
    """Rows as they arrive, until one bound is reached."""

    def __init__(self, types: Types, bounds: Bounds) -> None:
        self._types = types
        self._bounds = bounds
        self._transformer: abc.Transformer | None = None
        self._pieces: list[bytes] = []
        self._size = 2
        self._varying: list[int] = []
        self._nested: list[int] = []
        self.columns: list[tuple[str, str]] | None = None
        self.rows: list[tuple[Any, ...]] = []
        self.note: str | None = None
        self.types: set[int] = set()

    async def take(self, result: Any) -> bool:
        """Add what one result holds; False when no more is wanted."""
        if self._transformer is None:
            self._begin(result)
            self._transformer = Transformer(self._types)
            self._transformer.set_pgresult(result)
        else:
            self._transformer.set_pgresult(result, set_loaders=False)
        room = self._bounds.rows - len(self.rows)
        count = min(result.ntuples, room)
        if self._is_small(result):
            rows = self._transformer.load_rows(0, count, tuple)
            piece = _encode(rows)[1:-1]
            if self._size + len(piece) <= self._bounds.bytes:
                self._keep(rows, piece)
                count = 0
        for row in range(count):
            if not self._add(result, row, self._transformer):
                return False
            await asyncio.sleep(0)
        if result.ntuples > room:
            self.note = _note(f"at {self._bounds.rows} rows")
        return self.note is None

    def _begin(self, result: Any) -> None:
        oids = [result.ftype(column) for column in range(result.nfields)]
        self.types = set(oids)
        self.columns = [
            ((result.fname(column) or b"").decode("utf-8", "replace"), self._types.name(oid))
            for column, oid in enumerate(oids)
        ]
        self._varying = [column for column in range(len(oids)) if result.fsize(column) < 0]
        self._nested = [column for column, oid in enumerate(oids) if self._types.is_nested(oid)]

    def _is_small(self, result: Any) -> bool:
        """Whether all rows can be converted at once."""
        size = marks = 0
        value = result.get_value
        for column in self._varying:
            nested = column in self._nested
            for row in range(result.ntuples):
                text = value(row, column)
                if text is not None:
                    size += len(text)
                    if nested:
                        marks += _marks(text)
            if size > _SMALL or marks > _ELEMENTS // 10:
                return False
        return True

    def _add(self, result: Any, row: int, transformer: abc.Transformer) -> bool:
        """Add one row, if it has room; it is measured before it is converted."""
        size = marks = 0
        for column in self._varying:
            text = result.get_value(row, column)
            if text is not None:
                size += len(text)
                if column in self._nested:
                    marks += _marks(text)
        if marks > _ELEMENTS:
            self.note = _note(f"before a row whose JSON values and arrays may hold more than {_ELEMENTS} elements")
            return False
        if size <= max(_WHITESPACE * (self._bounds.bytes - self._size), _SMALL):
            found = transformer.load_row(row, tuple)
            piece = _encode(found)
            if found is not None and self._size + len(piece) + 1 <= self._bounds.bytes:
                self._keep([found], piece)
                return True
        most = self._bounds.bytes
        self.note = _note(f"before its bytes were more than {most}, the most that an answer may have here")
        return False

    def _keep(self, rows: list[tuple[Any, ...]], piece: bytes) -> None:
        if piece:
            self.rows += rows
            self._pieces.append(piece)
            self._size += len(piece) + 1

    def too_large(self) -> None:
        """The connection was closed under a row that is far too large."""
        self.note = _note("before a row that is far larger than an answer may be")

    def done(self) -> Rows:
        """The answer as it is now."""
        return Rows(
            columns=self.columns or [],
            rows=self.rows,
            json=b"[" + b",".join(self._pieces) + b"]",
            note=self.note,
            types=self.types,
        )


_encode = msgspec.json.Encoder().encode


def _marks(text: bytes) -> int:
    """At least as many as a JSON value or an array has elements."""
    return text.count(b",") + text.count(b"{") + text.count(b"[")


def _note(where: str) -> str:
    return (
        f"The answer was cut off {where}. For the rest: ask for fewer columns or rows (WHERE, LIMIT and OFFSET with an "
        "ORDER BY), aggregate, or take a part of a long value with substr()."
    )
