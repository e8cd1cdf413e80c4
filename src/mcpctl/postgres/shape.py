"""How rows of one shape become JSON; found once for each list of columns.

Where every column is a scalar of PostgreSQL's own, psycopg's C code loads a result as a whole, and what JSON says in
another way than PostgreSQL is mended a column at a time. Everything else, and what turns out not to be UTF-8, goes
through the exact loaders of `values.py`. Both make the same JSON.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import msgspec
from psycopg import BaseConnection, abc, postgres
from psycopg.adapt import AdaptersMap, Loader, Transformer
from psycopg.types.bool import BoolLoader
from psycopg.types.numeric import FloatLoader, IntLoader
from psycopg.types.string import TextLoader

from mcpctl.postgres.values import SAFE_INTEGER, UnknownType, Values, integer, number, timestamp

_encode = msgspec.json.Encoder().encode
_MOST, _LONG = 500, 16 << 10
"""Shapes that are remembered, and bytes of JSON that the columns of one of them have at most."""
Column = Sequence[Any]
Row = Sequence[Any]
Mend = Callable[[Column], "Iterable[Any] | None"]
"""A column as JSON says it; None where it says nothing otherwise."""


def _integers(column: Column) -> Column | None:
    """What a double cannot carry becomes text (I-JSON, RFC 7493)."""
    there = [one for one in column if one is not None] if None in column else column
    if not there or (max(there) <= SAFE_INTEGER and min(there) >= -SAFE_INTEGER):
        return None
    return [None if one is None else integer(one) for one in column]


def _floats(column: Column) -> Column | None:
    """NaN and infinities become texts. A sum is finite only if all that is in it is."""
    there = [one for one in column if one is not None] if None in column else column
    if math.isfinite(sum(there)):
        return None
    return [None if one is None else number(one) for one in column]


_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_START = b"\n0000-00-00 00:00:00"


def _times(column: Column) -> Iterable[Any]:
    """`2026-11-20 12:00:00.5+00` → `2026-11-20T12:00:00.5+00:00`. What is there more than once is mended once."""
    distinct = set(column)
    if len(distinct) > len(column) // 2 and None not in distinct:
        return _mended_times(column)
    distinct.discard(None)
    there = list(distinct)
    found: dict[str | None, str | None] = dict(zip(there, _mended_times(there), strict=True))
    found[None] = None
    return map(found.__getitem__, column)


def _mended_times(column: Sequence[str]) -> list[str]:
    """All at once where all are of the first one's form."""
    zone = column[0][19:].lstrip(".0123456789") if column else ""
    if len(zone) == 3:
        text = "\n" + "\n".join(column) + "\n"
        if text.encode().translate(_DIGITS).count(_START) == len(column):
            found = text[1:].replace(" ", "T").split(zone + "\n")
            if len(found) == len(column) + 1:  # so each begins as a time does, and ends with this zone
                zone += ":00"
                return [one + zone for one in found[:-1]]
    return list(map(timestamp, column))


_TEXT: tuple[type[Loader], Mend | None] = (TextLoader, None)
_EXACT: dict[str, tuple[type[Loader], Mend | None]] = {
    "int2": (IntLoader, None), "int4": (IntLoader, None), "oid": (IntLoader, None), "bool": (BoolLoader, None),
    "int8": (IntLoader, _integers), "float4": (FloatLoader, _floats), "float8": (FloatLoader, _floats),
    "timestamp": (TextLoader, _times), "timestamptz": (TextLoader, _times),
}  # fmt: skip
"""All others of the plain ones are texts in JSON, too."""


class _Quick:
    """psycopg's own loaders, which its C code stands in for."""

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(types=postgres.types)
        for info in postgres.types:
            self.adapters.register_loader(info.oid, _EXACT.get(info.name, _TEXT)[0])


_quick = cache(_Quick)


@dataclass(slots=True)
class _On:
    """The same on a connection, whose loaders need not ask by name what UTF-8 is."""

    connection: BaseConnection[Any]
    adapters: AdaptersMap


class Loaders:
    """What loads rows of plain columns, to be mended. On a connection whose texts are UTF-8 it is kept, ready for the
    columns that came last: most calls ask for those again."""

    __slots__ = ("_connection", "_ready", "_shape")

    def __init__(self, connection: BaseConnection[Any] | None = None) -> None:
        self._connection = connection
        self._shape: Shape | None = None
        self._ready: abc.Transformer | None = None

    def of(self, shape: "Shape", result: Any) -> abc.Transformer:
        """That of a result with these columns."""
        ready, connection = self._ready, self._connection
        if connection is None or connection.pgconn.parameter_status(b"client_encoding") != b"UTF8":
            made = Transformer(_quick())
            made.set_pgresult(result)
            return made
        if ready is not None and self._shape is shape:
            ready.set_pgresult(result, set_loaders=False)
            return ready
        ready = Transformer(_On(connection, _quick().adapters))
        ready.set_pgresult(result)
        if len(shape.json) <= _LONG:  # else it is made anew each time, too
            self._ready, self._shape = ready, shape
        return ready

    def rest(self) -> None:
        """Let go of the result that was loaded last."""
        if self._ready is not None:
            self._ready.set_pgresult(None, set_loaders=False)


class Shape:
    """One list of columns: (name, type) each. `varying` are those whose values have no fixed length, `nested` those
    that are made of many, `unknown` the types of which nothing is known. `plain`: every column is a scalar of
    PostgreSQL's own. `json` is the columns as an answer says them."""

    def __init__(self, values: Values, names: Sequence[str], oids: Sequence[int], sizes: Sequence[int]) -> None:
        self.columns = [(name, values.name(oid)) for name, oid in zip(names, oids, strict=True)]
        self.json = _encode([{"name": name, "type": kind} for name, kind in self.columns])
        self.unknown = values.unknown(set(oids))
        self.varying = [column for column, size in enumerate(sizes) if size < 0]
        self.nested = [column for column, oid in enumerate(oids) if values.is_nested(oid)]
        self.plain = all(oid in values.plain for oid in oids)
        mends = [(column, _EXACT.get(values.plain.get(oid, ""), _TEXT)[1]) for column, oid in enumerate(oids)]
        self._mends = [(column, mend) for column, mend in mends if mend is not None]

    def encoded(self, rows: list[tuple[Any, ...]]) -> bytes:
        """Rows, one at least, as a JSON array. A time that all of them have, as now() is, is mended once."""
        mended: Sequence[Row] = rows
        for place, mend in self._mends:
            column = [row[place] for row in rows]
            first = column[0]
            if mend is _times and first is not None and column.count(first) == len(column):
                mended = _with(mended, place, repeat(timestamp(first), len(column)))
            elif (found := mend(column)) is not None:
                mended = _with(mended, place, found)
        return _encode(mended)


def _with(rows: Sequence[Row], place: int, cells: Iterable[Any]) -> Sequence[Row]:
    """Rows with these cells in one column."""
    changed: list[Any] = list(map(list, rows)) if isinstance(rows[0], tuple) else list(rows)
    for row, cell in zip(changed, cells, strict=True):
        row[place] = cell
    return changed


class Types(Values):
    """The types of one database, and the shapes that were made of them."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[tuple[tuple[bytes | None, int], ...], Shape] = {}

    def shape(self, result: Any) -> Shape:
        """That of a result's columns."""
        key = tuple([(result.fname(column), result.ftype(column)) for column in range(result.nfields)])
        found = self._shapes.get(key)
        if found is None:
            names = [(name or b"").decode("utf-8", "replace") for name, _ in key]
            found = Shape(self, names, [oid for _, oid in key], list(map(result.fsize, range(len(key)))))
            if len(found.json) > _LONG:
                return found
            if len(self._shapes) >= _MOST:
                self._shapes.clear()
            self._shapes[key] = found
        return found

    def learn(self, found: UnknownType) -> None:
        """Take note of a type that the catalog was asked about."""
        super().learn(found)
        self._shapes.clear()
