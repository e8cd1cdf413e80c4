"""A small answer is taken at once where all of it has come: wherever it has not, or is not as it should be, nothing is
lost, and nothing is taken for what it is not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import pq

import site_of_mcpctl as site
from mcpctl.config_keys import Database
from mcpctl.identity.principal import LOCAL
from mcpctl.keyring import Keyring
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.login import Login
from mcpctl.postgres.said import StatementError
from mcpctl.postgres.session import Session
from mcpctl.postgres.terminator import Terminator
from mcpctl.postgres.token_pool import TokenPool
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.postgres.wire import ConnectionLostError, Wire
from site_of_mcpctl import Shop, eventually

BOUNDS = Bounds(10, 100_000, 5.0)
_READY = b"Z\0\0\0\5"
"""What PostgreSQL says at a sync point."""


def _peeked(there: socket.socket) -> bytes:
    """What has come and was not read yet; nothing at the end."""
    return there.recv(1 << 16, socket.MSG_PEEK)


@contextlib.asynccontextmanager
async def a_pool(shop: Shop) -> AsyncIterator[TokenPool]:
    async def room(pool: TokenPool) -> None:
        pool.connecting += 1

    dsn = shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop")
    login = Login("shop", Database(dsn=dsn), Keyring(Path("/nonexistent/secret.key")))
    pool = TokenPool(Terminator(login), LOCAL, 5.0, Verdicts(), room)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()
        await pool.terminator.close()


class _Libpq:
    """A connection's libpq. The so manieth time that it is asked, it says that a result is not whole yet; it keeps that
    one of its results to itself."""

    def __init__(self, session: Session, late: int = 0, kept: int = 0) -> None:
        assert session.conn.wire is not None
        self.wire: Wire = session.conn.wire
        self.pgconn = session.pgconn
        self.late, self.kept = late, kept
        self.asked = self.given = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pgconn, name)

    def is_busy(self) -> bool:
        self.asked += 1
        if self.asked == self.late:
            asyncio.get_running_loop().call_soon(self.wire._wake)
            return True
        return bool(self.pgconn.is_busy())

    def get_result(self) -> Any:
        self.given += 1
        if self.given == self.kept:
            self.pgconn.get_result()
        return self.pgconn.get_result()

    @contextlib.contextmanager
    def in_place(self, session: Session) -> Iterator[_Libpq]:
        self.wire._pgconn = session.pgconn = self  # type: ignore[assignment]
        try:
            yield self
        finally:
            self.wire._pgconn = session.pgconn = self.pgconn


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an answer comes with the first look, unless libpq says otherwise."""
    wake = Wire._wake

    def late(wire: Wire) -> None:
        if wire._asked and wire._fd >= 0 and not wire._fed:
            with socket.socket(fileno=os.dup(wire._fd)) as there:
                eventually(lambda: not (came := _peeked(there)) or came.count(_READY) >= wire.owed)
        wake(wire)

    monkeypatch.setattr(Wire, "_wake", late)


def test_a_small_answer_is_waited_for_once(newest_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            for _ in range(2):  # judged, and looked at what it reads
                await statement.run(session, "select 7", BOUNDS)
            monkeypatch.delattr(Wire, "result")
            assert (await statement.run(session, "select 7", BOUNDS)).rows == [(7,)]
            monkeypatch.undo()
            await pool.give_back(session)

    asyncio.run(run())


@pytest.mark.parametrize(
    "query, said", [("select 7", None), ("select 7 / (count(*) - 1) from (values (1)) x", "division by zero")]
)
def test_an_answer_of_which_a_part_comes_later_is_the_same(newest_shop: Shop, query: str, said: str | None) -> None:
    async def ask(session: Session) -> None:
        if said is None:
            assert (await statement.run(session, query, BOUNDS)).rows == [(7,)]
        else:
            with pytest.raises(StatementError, match=said):
                await statement.run(session, query, BOUNDS)

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            with contextlib.suppress(StatementError):
                await statement.run(session, query, BOUNDS)
            late, asked = 0, 0
            while asked >= late:
                late += 1
                with _Libpq(session, late).in_place(session) as libpq:
                    await ask(session)
                asked = libpq.asked
                assert (libpq.wire.owed, session.conn.closed) == (0, False), late
            assert late > 10
            await pool.give_back(session)

    asyncio.run(run())


def test_a_conversation_that_is_out_of_step_is_answered_by_nobody(newest_shop: Shop) -> None:
    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            for kept in (9, 11):  # the results of ROLLBACK and of the sync point
                session = await pool.take()
                await statement.run(session, "select 7", BOUNDS)
                with _Libpq(session, kept=kept).in_place(session), pytest.raises(ConnectionLostError):
                    await statement.run(session, "select 7", BOUNDS)
                assert session.conn.closed
                await pool.give_back(session)

    asyncio.run(run())


def test_a_connection_that_has_ended_is_not_at_hand(newest_shop: Shop) -> None:
    """Its end is seen without the event loop, which has not run since it came."""

    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            session = await pool.take()
            await pool.give_back(session)
            assert pool.take_at_hand() is session
            await pool.give_back(session)
            with newest_shop.admin() as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", (session.pid,))
            ends = select.poll()
            ends.register(session.pgconn.socket, select.POLLRDHUP)
            assert ends.poll(20_000)
            session.used -= 1.0  # of one that was used a moment ago the loop is about to hear
            assert pool.take_at_hand() is None
            assert session.pgconn.status == pq.ConnStatus.BAD
            again = await pool.take()
            assert again is not session
            await pool.give_back(again)

    asyncio.run(run())


def test_a_connection_to_another_host_than_that_which_could_end_it_is_not_at_hand(newest_shop: Shop) -> None:
    async def run() -> None:
        async with a_pool(newest_shop) as pool:
            await pool.give_back(session := await pool.take())
            here, pool.terminator.place = pool.terminator.place, ("elsewhere", "192.0.2.1", "5432")
            assert pool.take_at_hand() is None
            assert session.conn.closed
            pool.terminator.place = here

    asyncio.run(run())
