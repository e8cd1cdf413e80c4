"""Rows that psycopg's C code loads as a whole are the same JSON as those that the exact loaders make cell by cell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import pg
import site_of_mcpctl as site
from mcpctl.postgres.answer import Answer, Bounds, Rows
from mcpctl.postgres.shape import Loaders, Types

WIDE = Bounds(100_000, 1 << 24, 10.0)
COLUMNS = {
    "int8": ["0", "NULL", "9007199254740991", "9007199254740992", "-9007199254740992", "-9223372036854775808"],
    "int4": ["1", "-2147483648", "NULL"],
    "float8": ["1.5", "-0.0", "1e300", "NULL", "0.1"],
    "float4": ["1.5", "NULL", "'NaN'"],
    "double precision": ["'Infinity'", "'-Infinity'", "1"],
    "numeric": ["1.10", "'NaN'", "NULL", "123456789012345678901234567890.5"],
    "bool": ["true", "false", "NULL"],
    "text": ["''", "'a\"b\\c'", "'é 日本 😀'", "NULL", "E'\\n\\t\\x01'"],
    "timestamptz": [
        "'2026-11-28 08:00:00.5+00'", "'infinity'", "NULL", "'0044-03-15 12:00:00+00 BC'", "'12026-01-01 00:00:00+00'",
    ],
    "timestamp": ["'2026-11-28 08:00:00'", "'-infinity'", "'1999-12-31 23:59:59.999999'"],
    "date": ["'2026-11-28'", "'infinity'", "NULL"],
    "uuid": ["'00000000-0000-0000-0000-000000000001'", "NULL"],
    "interval": ["'1 day 2 hours'", "NULL"],
    "inet": ["'10.0.0.1/8'", "NULL"],
    "name": ["'x'"],
    "oid": ["4294967295", "NULL"],
}  # fmt: skip
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "Europe/Amsterdam")


@pytest.fixture(scope="module")
def connection() -> Iterator[psycopg.Connection[Any]]:
    with site.shop(pg.supported()[-1]) as shop, shop.admin() as found:
        yield found


def _answer(result: Any, *, plain: bool, on: psycopg.Connection[Any] | None = None) -> Rows:
    types = Types()
    if not plain:
        types.plain.clear()
    answer = Answer(types, WIDE, Loaders(on))
    assert asyncio.run(answer.take(result))
    assert answer.shape is not None
    assert answer.shape.plain is plain
    return answer.done()


def _same(connection: psycopg.Connection[Any], query: str) -> bytes:
    result = connection.pgconn.exec_(query.encode())
    assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
    quick, exact = _answer(result, plain=True), _answer(result, plain=False)
    assert quick.json == exact.json
    assert _answer(result, plain=True, on=connection).json == exact.json
    assert quick.columns == exact.columns
    assert quick.count == exact.count == result.ntuples
    assert quick.rows == [tuple(row) for row in json.loads(quick.json)]
    return quick.json


@pytest.mark.parametrize("kind", COLUMNS)
def test_each_type_alone_in_every_order_of_its_values(connection: psycopg.Connection[Any], kind: str) -> None:
    values = COLUMNS[kind]
    for first in range(len(values)):
        rows = ", ".join(f"(({value})::{kind})" for value in values[first:] + values[:first])
        _same(connection, f"SELECT * FROM (VALUES {rows}) v (a)")
        _same(connection, f"SELECT ({values[first]})::{kind} AS a, ({values[first]})::{kind} AS b")


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("several", [1, 2, 7, 300])
def test_values_that_are_there_more_than_once_and_between_others(
    connection: psycopg.Connection[Any], kind: str, several: int
) -> None:
    """Also where each stands for itself alone, and between texts that look like times."""
    values = [f"({value})::{kind}" for value in COLUMNS[kind]]
    picked = " ".join(f"WHEN {at} THEN {value}" for at, value in enumerate(values))
    for modulus in range(1, len(values) + 1):
        _same(
            connection,
            f"SELECT '2026-11-28 08:00:00+00' AS b, CASE i / {several} % {modulus} {picked} END AS a, 'x\"' || i AS c, "
            "'2026-11-28 08:00:00.5+00'::timestamptz + (i % 5) * interval '1 day' AS t, i * 3002399751580331::int8 AS n"
            " FROM generate_series(0, 299) i",
        )


def test_a_time_that_all_rows_have_beside_texts_that_hold_it(connection: psycopg.Connection[Any]) -> None:
    time = "'2026-11-28 08:00:00.5'::timestamp"
    for a in ("'x'", f"{time}::text", f"'\"' || {time}", f"{time} || '\"'", f"'\\\"' || {time}", f"'\",\"' || {time}"):
        for t in (time, f"{time}::timestamptz", "now()", "'infinity'::timestamp", "NULL::timestamp", f"{time}, {time}"):
            for n in ("1", "i * 3002399751580331::int8", "now() + i * interval '1 day'"):
                _same(connection, f"SELECT {t} AS t, {n} AS n, {a} AS a, {t} AS u FROM generate_series(1, 5) i")
                once = f"CASE i WHEN 2 THEN {a} ELSE 'x' END"
                _same(connection, f"SELECT {once} AS a, {t} AS t, {n} AS n FROM generate_series(1, 5) i")


def test_columns_of_nothing_but_null(connection: psycopg.Connection[Any]) -> None:
    for kind in COLUMNS:
        made = _same(connection, f"SELECT NULL::{kind} AS a, 1 AS b FROM generate_series(1, 3)")
        assert made == b"[[null,1],[null,1],[null,1]]"


@pytest.mark.parametrize("zone", ZONES)
def test_many_times_in_each_zone_and_across_a_change_of_the_clock(
    connection: psycopg.Connection[Any], zone: str
) -> None:
    connection.execute(f"SET TimeZone = '{zone}'")  # type: ignore[arg-type]
    connection.execute("SET DateStyle = 'ISO, YMD'")
    made = _same(
        connection,
        "SELECT i, '1890-01-01'::timestamptz + i * interval '37 days 5 hours 0.25 seconds' AS t, "
        "'2026-01-01'::timestamp + i * interval '1.000001 seconds' AS u, i * 3000000000000::int8 AS n "
        "FROM generate_series(1, 3000) i",
    )
    assert b"T" in made
    for style in ("SQL, DMY", "German", "Postgres"):
        connection.execute(f"SET DateStyle = '{style}'")  # type: ignore[arg-type]
        _same(connection, "SELECT now() + i * interval '1 hour' AS t FROM generate_series(1, 20) i")


def test_what_is_not_utf_8_is_replaced_as_ever(connection: psycopg.Connection[Any]) -> None:
    connection.execute("CREATE DATABASE raw ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    info = connection.info
    dsn = psycopg.conninfo.make_conninfo(info.dsn, password=info.password, dbname="raw")
    with psycopg.connect(dsn, client_encoding="SQL_ASCII", autocommit=True) as raw:
        made = _same(raw, "SELECT E'a\\xff' AS t, 1 AS n UNION ALL SELECT 'b', 2")
    assert "a\ufffd".encode() in made


def test_rows_that_were_small_are_not_measured_and_bounds_hold_all_the_same(
    connection: psycopg.Connection[Any],
) -> None:
    result = connection.pgconn.exec_(b"SELECT i, repeat('x', 100) FROM generate_series(1, 500) i")
    answer = Answer(Types(), Bounds(100_000, 20_000, 10.0), trusted=True)
    assert not asyncio.run(answer.take(result))
    found = answer.done()
    assert len(found.json) <= 20_000
    assert 100 < found.count < 500
    assert len(found.rows) == found.count
    assert found.note is not None
    assert not found.even


def test_what_is_made_of_many_is_measured_whatever_it_was_like_before(connection: psycopg.Connection[Any]) -> None:
    for kind in ("json", "int[]"):
        many = f"('[' || repeat('[],', 500000) || '[]]')::{kind}" if kind == "json" else "array_fill(1, '{500000}')"
        result = connection.pgconn.exec_(f"SELECT {many} AS a".encode())
        assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
        answer = Answer(Types(), WIDE, trusted=True)
        assert not asyncio.run(answer.take(result))
        assert "more than 100000 elements" in (answer.note or "")


def test_a_shape_of_long_names_is_not_kept(connection: psycopg.Connection[Any]) -> None:
    """PostgreSQL has 63 bytes for a name. A database that somebody has brought may send any number."""
    for name, kept in ((b"n" * 63, True), (b"n" * 100_000, False)):
        types, result = Types(), connection.pgconn.make_empty_result(psycopg.pq.ExecStatus.TUPLES_OK)
        result.set_attributes([psycopg.pq.PGresAttDesc(name, 0, 0, 0, 25, -1, 0)])
        assert types.shape(result).columns == [(name.decode(), "text")]
        assert bool(types._shapes) is kept


def test_loaders_are_ready_for_the_columns_that_came_last_and_for_no_others(
    connection: psycopg.Connection[Any],
) -> None:
    types, loaders = Types(), Loaders(connection)
    words = "SELECT n AS a, n || 'é' AS b FROM (VALUES (1), (2), (NULL)) v (n)"
    times = "SELECT now() AS a, 'x' AS b FROM generate_series(1, 3)"

    def ask(query: str) -> tuple[bytes, Any]:
        result = connection.pgconn.exec_(query.encode())
        answer = Answer(types, WIDE, loaders)
        assert asyncio.run(answer.take(result))
        used = answer._quick
        answer.rest()
        assert used is not None
        return answer.done().json, used

    try:
        first, ready = ask(words)
        assert ready.pgresult is None  # else an idle connection would keep its last rows
        assert json.loads(first) == [[1, "1é"], [2, "2é"], [None, None]]
        assert ask(words) == (first, ready)
        assert ask("SELECT 7 AS a, 'seven' AS b")[0] == b'[[7,"seven"]]'  # the same columns
        other, of_times = ask(times)
        assert of_times is not ready
        assert [row[1] for row in json.loads(other)] == ["x"] * 3
        assert ask(words)[0] == first
        connection.execute("SET client_encoding = 'SQL_ASCII'")
        assert ask(words)[1] is not ask(words)[1]
        assert ask(words)[0] == first
    finally:
        connection.execute("SET client_encoding = 'UTF8'")
