"""libpq on the event loop: how much is read at once, whose growth is counted, and what is still heard at the end."""

from __future__ import annotations

import asyncio
import mmap
import time
from typing import Any

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.postgres.wire import ConnectionLostError, Wire
from site_of_mcpctl import Shop


def test_what_others_take_between_two_questions_of_a_connection_is_not_counted_as_its_answer(newest_shop: Shop) -> None:
    async def ask() -> list[bytes | None]:
        cluster, found = newest_shop.cluster, []
        dsn = cluster.dsn_for(site.READER, site.PASSWORD, "shop")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            pgconn = connection.pgconn
            pgconn.nonblocking = 1
            pgconn.enter_pipeline_mode()
            wire = Wire(pgconn)
            for _ in range(3):
                with wire.exchange(24 << 20, 10 << 20):
                    pgconn.send_query_params(b"select 1", None)
                    pgconn.pipeline_sync()
                    await wire.flush()
                    found.append((await wire.command()).get_value(0, 0))
                    await wire.synced()
                others.append(mmap.mmap(-1, 64 << 20))
            wire.close()
        return found

    others: list[mmap.mmap] = []
    assert asyncio.run(ask()) == [b"1"] * 3


class _Counted:
    """A connection of libpq's, whose reads are counted."""

    def __init__(self, pgconn: Any) -> None:
        self._pgconn = pgconn
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        self.reads += name == "consume_input"
        return getattr(self._pgconn, name)


def test_long_answers_come_in_fewer_reads_once_there_was_one(newest_shop: Shop) -> None:
    rows = b"select i, 'row ' || i from generate_series(1, 5000) i"

    async def ask() -> list[int]:
        cluster, found = newest_shop.cluster, []
        dsn = cluster.dsn_for(site.READER, site.PASSWORD, "shop")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            connection.pgconn.nonblocking = 1
            connection.pgconn.enter_pipeline_mode()
            pgconn: Any = _Counted(connection.pgconn)
            wire = Wire(pgconn)
            for query, wanted in [(b"select 1", 1)] * 3 + [(rows, 5000)] * 4 + [(b"select 1", 1)]:
                with wire.exchange(24 << 20, 10 << 20):
                    pgconn.reads = 0
                    connection.pgconn.send_query_params(query, None)
                    connection.pgconn.pipeline_sync()
                    await wire.flush()
                    await asyncio.sleep(0.1)  # so that all of it is there, or as much as the socket holds
                    assert (await wire.command()).ntuples == wanted
                    await wire.synced()
                    found.append(pgconn.reads)
            wire.close()
        return found

    found = asyncio.run(ask())
    assert [*found[:3], found[-1]] == [1] * 4, found
    assert found[3] >= 5, found
    assert found[6] <= 3, found


def test_the_last_words_are_heard_where_the_end_of_the_connection_is_there_with_them(newest_shop: Shop) -> None:
    async def ask() -> tuple[int, bytes]:
        cluster = newest_shop.cluster
        dsn = cluster.dsn_for(site.READER, site.PASSWORD, "shop")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            pgconn = connection.pgconn
            pgconn.nonblocking = 1
            pgconn.enter_pipeline_mode()
            wire = Wire(pgconn)
            with wire.exchange(24 << 20, 10 << 20):
                pgconn.send_query_params(b"select 1", None)
                pgconn.send_flush_request()
                pgconn.send_query_params(b"select pg_sleep(0.3), pg_terminate_backend(pg_backend_pid())", None)
                pgconn.pipeline_sync()
                await wire.flush()
                await wire.command()
                time.sleep(0.7)  # nobody reads meanwhile
                said = await wire.result()
                with pytest.raises(ConnectionLostError):
                    await wire.commands(2)
                    await wire.synced()
        return said.status, said.error_message

    status, said = asyncio.run(ask())
    assert status == psycopg.pq.ExecStatus.FATAL_ERROR
    assert b"terminating connection" in said
