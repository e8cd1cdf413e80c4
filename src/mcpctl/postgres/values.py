"""PostgreSQL's values as JSON's, by the contract's table.

Integers are JSON integers up to ±(2^53−1) and texts beyond (I-JSON, RFC 7493); numeric is text, so that every digit
arrives; NaN and Infinity are texts; bytea is base64; dates and times are ISO 8601 where it can say them; json is
JSON, arrays are arrays; everything else is PostgreSQL's own text.
"""

import base64
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from psycopg import postgres
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.types import TypeInfo
from psycopg.types.array import register_array

SAFE_INTEGER = 2**53 - 1
DEEPEST = 100
"""Levels of nesting up to which a json value arrives as JSON."""


class _Text(Loader):
    def load(self, data: Buffer) -> str:
        return str(data, "utf-8", "replace")


def integer(found: int) -> int | str:
    """An integer that a double carries, else its text."""
    return found if -SAFE_INTEGER <= found <= SAFE_INTEGER else str(found)


class _Integer(Loader):
    def load(self, data: Buffer) -> int | str:
        return integer(int(bytes(data)))


def number(found: float) -> float | str:
    """A finite number, else its name as PostgreSQL says it."""
    return found if math.isfinite(found) else "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"


class _Float(Loader):
    def load(self, data: Buffer) -> float | str:
        return number(float(bytes(data)))


class _Bool(Loader):
    def load(self, data: Buffer) -> bool:
        return bytes(data) == b"t"


class _Bytea(Loader):
    """base64 (RFC 4648) of either of PostgreSQL's text forms: a statement may switch `bytea_output` itself."""

    def load(self, data: Buffer) -> str:
        raw = bytes(data)
        if raw.startswith(b"\\x"):
            return base64.b64encode(bytes.fromhex(raw[2:].decode("ascii"))).decode("ascii")
        plain = re.sub(rb"\\(\\|[0-3][0-7]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 8)]), raw)
        return base64.b64encode(plain).decode("ascii")


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d+)?)([+-]\d\d(?::\d\d)?)?")


def timestamp(text: str) -> str:
    """`2026-11-20 12:00:00.5+00` → `2026-11-20T12:00:00.5+00:00`; BC, infinity and odd zones stay as they are."""
    found = _MOMENT.fullmatch(text)
    if not found:
        return text
    day, time, zone = found.groups()
    return f"{day}T{time}{_zone(zone)}"


class _Timestamp(Loader):
    def load(self, data: Buffer) -> str:
        return timestamp(str(data, "utf-8", "replace"))


class _TimeTz(Loader):
    _ISO = re.compile(r"(\d\d:\d\d:\d\d(?:\.\d+)?)([+-]\d\d(?::\d\d)?)")

    def load(self, data: Buffer) -> str:
        text = str(data, "utf-8", "replace")
        found = self._ISO.fullmatch(text)
        return f"{found[1]}{_zone(found[2])}" if found else text


def _zone(zone: str | None) -> str:
    if not zone:
        return ""
    return zone if ":" in zone else f"{zone}:00"


def _json_integer(text: str) -> int | str:
    return int(text) if len(text) <= 16 and abs(int(text)) <= SAFE_INTEGER else text


def _json_float(text: str) -> float | str:
    """A number that a double carries without loss, or its text."""
    number = float(text)
    try:
        return number if math.isfinite(number) and Decimal(repr(number)) == Decimal(text) else text
    except ArithmeticError:  # its exponent is beyond Decimal's
        return text


_decode = json.JSONDecoder(parse_int=_json_integer, parse_float=_json_float).decode


class _Json(Loader):
    """JSON as JSON. A number that a double cannot carry is a text, as for integers and numeric; so is all of a value
    that is nested deeper than clients and libraries can be trusted with."""

    def load(self, data: Buffer) -> Any:
        text = str(data, "utf-8", "replace")
        if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
            return text
        try:
            found = _decode(text)
        except (ValueError, RecursionError):
            return text
        return _without_surrogates(found) if "\\u" in text else found


def _depth(text: str) -> int:
    """How deep a JSON text is nested."""
    deepest = depth = 0
    for mark in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _without_surrogates(value: Any) -> Any:
    """`json` (not jsonb) keeps lone surrogates, which UTF-8 cannot say: U+FFFD stands for them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value


_LOADERS: dict[str, type[Loader]] = {
    "int2": _Integer, "int4": _Integer, "int8": _Integer, "oid": _Integer,
    "float4": _Float, "float8": _Float, "bool": _Bool, "bytea": _Bytea,
    "timestamp": _Timestamp, "timestamptz": _Timestamp, "timetz": _TimeTz,
    "json": _Json, "jsonb": _Json,
}  # fmt: skip


@dataclass(frozen=True)
class UnknownType:
    """A type that is not PostgreSQL's own: what the catalog says of it."""

    oid: int
    name: str
    element: int
    delimiter: str


class Values:
    """Names and converters by type OID, for one database. Learns the types that the database has made."""

    connection = None

    def __init__(self) -> None:
        self.plain: dict[int, str] = {}
        """The scalars of PostgreSQL's own: {OID: type's name}."""
        self.adapters = AdaptersMap(types=postgres.types)
        self.adapters.register_loader(0, _Text)
        self._names: dict[int, str] = {}
        for info in postgres.types:
            self.adapters.register_loader(info.oid, _LOADERS.get(info.name, _Text))
            self._names[info.oid] = info.regtype
            if info.name not in ("json", "jsonb", "bytea", "timetz"):
                self.plain[info.oid] = info.name
            if info.array_oid:
                self._names[info.array_oid] = f"{info.regtype}[]"
                register_array(info, self.adapters)

    def unknown(self, oids: set[int]) -> set[int]:
        """Those of which nothing is known yet."""
        return oids - self._names.keys()

    def is_nested(self, oid: int) -> bool:
        """Whether a value is made of many: JSON, or an array."""
        name = self.name(oid)
        return name in ("json", "jsonb") or name.endswith("[]")

    def name(self, oid: int) -> str:
        """The type's SQL name."""
        return self._names.get(oid, "unknown")

    def learn(self, found: UnknownType) -> None:
        """Take note of a type that the catalog was asked about."""
        self._names[found.oid] = found.name
        if found.element:
            info = TypeInfo(found.name.removesuffix("[]"), found.element, found.oid, delimiter=found.delimiter)
            if found.element not in self._names:
                self.adapters.register_loader(found.element, _Text)
            register_array(info, self.adapters)
        else:
            self.adapters.register_loader(found.oid, _Text)
