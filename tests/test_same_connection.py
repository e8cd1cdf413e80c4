"""What one call leaves for the next on its connection: how many rows its text had, and what a statement may take."""

from __future__ import annotations

import asyncio

import pytest

from mcpctl.postgres import statement, verdicts
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.shape import Shape
from mcpctl.postgres.wire import TooLargeError
from site_of_mcpctl import Shop
from test_at_once import BOUNDS, a_pool


def test_a_text_whose_rows_become_more_or_fewer_has_the_right_ones_each_time(newest_shop: Shop) -> None:
    """Few rows come as one result, more of them in pieces, and which it is going to be is known from the last time."""
    bounds = Bounds(100, 100_000, 5.0)

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            with newest_shop.admin() as admin:
                admin.execute("CREATE TABLE amount (n int); GRANT SELECT ON amount TO shop_reader")
                for count in (1, 64, 65, 0, 0, 64, 300, 300, 100, 101, 2, 2, 0):
                    admin.execute("TRUNCATE amount")
                    admin.execute("INSERT INTO amount SELECT generate_series(1, %s)", (count,))
                    for _ in range(2):
                        found = await statement.run(session, "select n from amount order by n", bounds)
                        assert found.rows == [(n,) for n in range(1, min(count, 100) + 1)]
                        assert (found.count, found.note is None) == (min(count, 100), count <= 100)
                admin.execute("DROP TABLE amount")
            await pool.give_back(session)

    asyncio.run(run())


def test_who_asks_for_few_rows_that_have_become_a_flood_is_told_to_ask_again(
    newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "SECONDS", 600.0)

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            with newest_shop.admin() as admin:
                admin.execute("CREATE TABLE grows AS SELECT 'small' AS body; GRANT SELECT ON grows TO shop_reader")
                session = await pool.take()
                for _ in range(2):
                    assert (await statement.run(session, "table grows", BOUNDS)).rows == [("small",)]
                admin.execute("UPDATE grows SET body = repeat('x', 1 << 20)")
                admin.execute("INSERT INTO grows SELECT body FROM grows, generate_series(1, 63)")
                with pytest.raises(TooLargeError, match="far larger than it was") as told:
                    await statement.run(session, "table grows", BOUNDS)
                assert told.value.hint == "ask again"
                await pool.give_back(session)
                session = await pool.take()
                found = await statement.run(session, "table grows", BOUNDS)
                assert (found.count, found.note is not None) == (0, True)
                admin.execute("DROP TABLE grows")
            await pool.give_back(session)

    asyncio.run(run())


def test_what_a_statement_may_take_is_what_its_caller_may(newest_shop: Shop) -> None:
    """However its connection was left, by whoever asked before."""
    asked = "select current_setting('statement_timeout'), current_setting('lock_timeout')"
    lifts = "select lifts('statement_timeout'), lifts('lock_timeout')"

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            for seconds in (5.0, 2.0, 5.0, 5.0, 0.5):
                bounds = Bounds(10, 1000, seconds)
                shown = f"{seconds:g}s" if seconds >= 1 else "500ms"
                for _ in range(2):
                    assert (await statement.run(session, asked, bounds)).rows == [(shown, shown)]
                    assert (await statement.run(session, lifts, bounds)).rows == [("0", "0")]
            assert not session.conn.closed
            await pool.give_back(session)

    with newest_shop.admin() as admin:
        admin.execute(
            "CREATE FUNCTION lifts(text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE "
            "AS $$BEGIN RETURN set_config($1, '0', false); END$$"
        )
    asyncio.run(run())
    with newest_shop.admin() as admin:
        admin.execute("DROP FUNCTION lifts(text)")


def test_a_value_that_cannot_be_read_takes_its_connection_and_nothing_else_with_it(
    newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server may send it that is not PostgreSQL. Whoever is cancelled afterwards waits for no other."""

    def refuse(*_: object) -> None:
        raise ValueError("an int4 that says 77x7777")

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            for _ in range(2):
                await statement.run(session, "select 7", BOUNDS)
            with monkeypatch.context() as patched, pytest.raises(ValueError, match="77x7777"):
                patched.setattr(Shape, "encoded", refuse)
                await statement.run(session, "select 7", BOUNDS)
            assert session.conn.closed
            await pool.give_back(session)
            session = await pool.take()
            assert session.conn.wire is not None
            session.conn.wire.owed = 1  # as if one had been lost all the same
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await statement.run(session, "select pg_sleep(30)", BOUNDS)
            assert session.conn.closed
            await pool.give_back(session)

    asyncio.run(run())
