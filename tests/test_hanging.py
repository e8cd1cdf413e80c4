"""A PostgreSQL that hangs (its machine lost power, its cable was cut) holds up nobody who does not ask it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.config_keys import Database, Pool
from mcpctl.errors import UnavailableError
from mcpctl.identity.lockdown import Lockdown
from mcpctl.identity.principal import LOCAL
from mcpctl.keyring import Keyring
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.login import Login
from mcpctl.postgres.terminator import Terminator
from mcpctl.postgres.token_pool import MakeRoom, TokenPool, UnwantedError
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.postgres.wire import ConnectionLostError
from mcpctl.server import watch
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

NO_KEYS = Keyring(Path("/nonexistent/secret.key"))
MakeSite = Callable[..., Site]


@pytest.fixture
def other(newest: object) -> Iterator[Shop]:
    """A second PostgreSQL, which can be frozen."""
    with site.shop(newest) as found:  # type: ignore[arg-type]
        yield found


def _beside(other: Shop, extra: str = "") -> dict[str, str]:
    more = (
        f"  other: {{host: {other.cluster.host}, port: {other.cluster.port}, dbname: shop, user: shop_reader,"
        f" password_file: shop.password, required: false}}\n{extra}"
    )
    return {"database": "    default: true\n", "extra": more}


@contextlib.contextmanager
def _frozen(shop: Shop) -> Iterator[None]:
    """Neither its postmaster nor any of its backends runs, and no connection is closed."""
    shop.close()
    with shop.admin() as admin:
        pids = [
            row[0] for row in admin.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'")
        ]
        own = admin.info.backend_pid
    pids = [shop.cluster.pid, *(pid for pid in pids if pid != own)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _asks(client: Client, query: str, database: str) -> str:
    """The text of the answer, whatever it is."""
    answer = client.call("query_database", {"query": query, "database": database})
    return str(answer.json()["result"]["content"][0]["text"])


def test_backends_that_nobody_can_see_end_take_no_place_of_another_database(
    make_site: MakeSite, newest_shop: Shop, other: Shop
) -> None:
    at = make_site(newest_shop, **_beside(other, "limits: {connections: 4, statement_timeout: 1s}\n")).start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(at.client(at.token()[1])) for _ in range(3)]
        running = [in_background(_asks, client, "select pg_sleep(50)", "other") for client in clients]
        eventually(lambda: len(other.backends("state = 'active'")) == 3)
        with _frozen(other):
            assert all("statement timeout" in one.result() for one in running)
            begun = time.monotonic()
            assert clients[0].rows("select 1") == [[1]]
            assert time.monotonic() - begun < 5
        eventually(lambda: '"rows":[[1]]' in _asks(clients[0], "select 1", "other"), 15)


def test_a_database_that_hangs_once_it_was_reached_slows_no_other_down(
    make_site: MakeSite, newest_shop: Shop, other: Shop
) -> None:
    at = make_site(newest_shop, **_beside(other, "limits: {connections: 6}\n")).start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(at.client(at.token()[1])) for _ in range(6)]
        b = stack.enter_context(at.client(at.token("bob")[1]))
        assert '"rows":[[1]]' in _asks(clients[0], "select 1", "other")
        with _frozen(other):
            running = [in_background(_asks, client, "select 1", "other") for client in clients]
            slowest = 0.0
            for _ in range(10):
                begun = time.monotonic()
                assert b.rows("select 1") == [[1]]
                slowest = max(slowest, time.monotonic() - begun)
            assert slowest < 3
        said = [one.result(60) for one in running]
        assert all("cannot be reached" in text or '"rows":[[1]]' in text for text in said), said


def test_a_server_with_many_pools_on_a_database_that_hangs_stops_in_time(make_site: MakeSite, other: Shop) -> None:
    at = make_site(other).start()
    for _ in range(8):
        with at.client(at.token()[1]) as client:
            assert client.rows("select 1") == [[1]]
    with _frozen(other):
        begun = time.monotonic()
        at.stop()
        assert time.monotonic() - begun < 6


def test_a_connection_whose_caller_left_while_it_was_made_gives_way(make_site: MakeSite, other: Shop) -> None:
    at = make_site(other, extra="limits: {connections: 2}\n").start()
    with at.client(at.token()[1]) as first, at.client(at.token("bob")[1]) as b:
        assert first.rows("select 1") == [[1]]
        impatient = Client(at.url, at.token()[1])
        impatient.http.timeout = httpx.Timeout(0.7)
        os.kill(other.cluster.pid, signal.SIGSTOP)  # new connections wait, and those that are there go on
        try:
            with impatient, pytest.raises(httpx.ReadTimeout):
                impatient.call("query_database", {"query": "select 1"})
            waiting = in_background(b.rows, "select 2")
        finally:
            os.kill(other.cluster.pid, signal.SIGCONT)
        assert waiting.result(15) == [[2]]


def test_what_a_busy_pool_has_to_spare_gives_way_to_a_call_that_waits(make_site: MakeSite, other: Shop) -> None:
    at = make_site(other, extra="limits: {connections: 5}\n").start()
    _, text = at.token()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(at.client(text)) for _ in range(4)]
        b = stack.enter_context(at.client(at.token("bob")[1]))
        running = [in_background(client.rows, "select pg_sleep(0.5)") for client in clients]
        assert [one.result() for one in running] == [[[""]]] * 4
        assert len(other.backends("application_name LIKE 'mcpctl%' AND state = 'idle'")) == 5
        sleeper = in_background(clients[0].call, "query_database", {"query": "select pg_sleep(20)"})
        eventually(lambda: other.backends("query LIKE '%pg_sleep(20)%' AND state = 'active'"))
        begun = time.monotonic()
        assert b.rows("select 1") == [[1]]
        assert time.monotonic() - begun < 10
        at.run("token", "revoke", "--all")
        assert sleeper.result().status_code == 401


def test_what_is_slow_to_close_holds_no_expiry_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SWEEP", 0.1)

    class Held:
        """An authenticator that sees a token expire once the pools are being swept; the pools never end that."""

        def __init__(self) -> None:
            self.sweeping = False
            self.visitors = self.sessions = None
            self.canaries = self
            self.lockdown = Lockdown(Path("/nowhere/tokens.yaml"))
            self.told = asyncio.Event()
            self.ended: Callable[[dict[str, str]], None] = lambda ids: None

        def refresh(self) -> None:
            pass

        look = refresh

        def expired(self) -> list[str]:
            if not self.sweeping:
                return []
            self.told.set()
            return ["ab12cd34"]

        def next_expiry(self) -> float | None:
            return None

        async def sweep(self) -> None:
            self.sweeping = True
            await asyncio.Event().wait()

    async def run() -> None:
        held = Held()
        looking = watch.Watch(held, held, held, None, Path(), lambda: 0)  # type: ignore[arg-type]
        looking._ended = lambda ids: None  # type: ignore[method-assign]
        task = asyncio.create_task(looking.run())
        await asyncio.wait_for(held.told.wait(), 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_what_was_learnt_of_a_database_is_forgotten_when_all_its_connections_were_lost(other: Shop) -> None:
    """It may be another PostgreSQL by then, in which the same OID is another type."""
    told: list[int] = []

    async def run() -> None:
        dsn = other.cluster.dsn_for("postgres", other.cluster.superuser_password, "shop")
        terminator = Terminator(Login("shop", Database(dsn=dsn), NO_KEYS), lambda: told.append(1))
        assert await terminator.ready()
        assert await terminator.ready()
        assert len(told) == 1
        with other.admin() as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mcpctl cut'"
            )
        async with asyncio.timeout(20):
            while len(told) < 2:
                assert await terminator.ready()
        await terminator.close()

    asyncio.run(run())


def test_a_login_that_is_tried_is_the_one_that_asks_though_somebody_needs_it_while_the_old_one_closes(
    newest_shop: Shop,
) -> None:
    class Needed(Terminator):
        async def close(self) -> None:
            await super().close()
            self.begin()
            await asyncio.sleep(0)  # it connects from here on

    async def run() -> None:
        dsn = newest_shop.cluster.dsn_for("postgres", newest_shop.cluster.superuser_password, "shop")
        terminator = Needed(Login("shop", Database(dsn=dsn), NO_KEYS))
        await terminator.try_anew(5.0, "-c statement_timeout=20s")
        with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
            await terminator.try_anew(5.0, "-c statement_timeout=20ms")
        await Terminator.close(terminator)

    asyncio.run(run())


def test_what_ends_backends_is_not_closed_while_the_loop_waits_for_it(other: Shop) -> None:
    """The next client may be given its descriptor's number, which the loop would not take a second time."""

    async def run() -> None:
        dsn = other.cluster.dsn_for("postgres", other.cluster.superuser_password, "shop")
        terminator = Terminator(Login("shop", Database(dsn=dsn), NO_KEYS))
        assert await terminator.ready()
        conn, loop = terminator._conn, asyncio.get_running_loop()
        assert conn is not None
        number, pid = conn.fileno(), await terminator.backend(5.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            asking = asyncio.create_task(terminator.terminate([(0, "")], 0.3))
            while not conn.lock.locked():
                await asyncio.sleep(0)
            closing = asyncio.create_task(terminator.close())
            while not conn.closed:
                await asyncio.sleep(0)
            assert not loop.remove_reader(number)
            assert await asking is None
        finally:
            os.kill(pid, signal.SIGCONT)
        await closing

    asyncio.run(run())


@pytest.mark.parametrize("by", ["its time", "a cancel"])
def test_closing_what_ends_backends_waits_a_second_at_most(other: Shop, by: str) -> None:
    """Also where psycopg waits for five, to cancel for who was cancelled; and where it is cancelled itself."""

    async def run() -> None:
        dsn = other.cluster.dsn_for("postgres", other.cluster.superuser_password, "shop")
        terminator = Terminator(Login("shop", Database(dsn=dsn), NO_KEYS))
        assert await terminator.ready()
        conn = terminator._conn
        assert conn is not None
        with _frozen(other):
            asking = asyncio.create_task(terminator.backend(30.0))
            while not conn.lock.locked():
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.sleep(0.01)
            assert not asking.done()
            begun = time.monotonic()
            closing = asyncio.create_task(terminator.close())
            if by == "a cancel":
                await asyncio.sleep(0.01)
                closing.cancel()
            await asyncio.wait({closing})
            while not conn.closed:
                await asyncio.sleep(0.001)
            assert time.monotonic() - begun < (0.5 if by == "a cancel" else 2.0)
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(run())


async def _room(pool: TokenPool) -> None:
    pool.connecting += 1


@contextlib.asynccontextmanager
async def _pool(shop: Shop, wait: float = 30.0, room: MakeRoom = _room) -> AsyncIterator[TokenPool]:
    """A pool as `Pools` makes it, with room for whoever asks."""
    dsn = shop.cluster.dsn_for("postgres", shop.cluster.superuser_password, "shop")
    login = Login("shop", Database(dsn=dsn, allow_privileged_login=True, pool=Pool(wait=wait)), NO_KEYS)
    pool = TokenPool(Terminator(login), LOCAL, 5.0, Verdicts(), room)
    await pool.open()
    yield pool
    await pool.close()
    await pool.terminator.close()


def test_a_connection_that_is_lost_before_a_word_is_said_is_told_in_words(newest_shop: Shop) -> None:
    async def run() -> None:
        async with _pool(newest_shop) as pool:
            session = await pool.take()
            session.close()
            with pytest.raises(ConnectionLostError, match="the connection to the database was lost"):
                await statement.run(session, "select 1", Bounds(10, 1000, 5.0))
            await pool.give_back(session)

    asyncio.run(run())


def test_who_waits_for_a_connection_that_is_let_go_before_it_was_begun_is_told(newest_shop: Shop) -> None:
    async def run() -> None:
        async with _pool(newest_shop) as pool:
            asking = asyncio.create_task(pool.terminator.ready())
            await asyncio.sleep(0)
            await pool.terminator.close()
            assert await asking is False
            assert await pool.terminator.ready() is True

    asyncio.run(run())


def test_a_pool_that_waits_for_room_is_closed_at_once(newest_shop: Shop) -> None:
    """Whoever closes it may hold what it waits for."""

    async def run() -> None:
        waits = asyncio.Event()

        async def room(pool: TokenPool) -> None:
            waits.set()
            await asyncio.Event().wait()

        async with _pool(newest_shop, room=room) as pool:
            asking = asyncio.create_task(pool.take())
            await waits.wait()
            begun = time.monotonic()
            await pool.close()
            assert time.monotonic() - begun < 0.15  # psycopg's pool was given 0.2 s
            with pytest.raises(UnavailableError, match="the pool was closed meanwhile"):
                await asking

    asyncio.run(run())


def test_who_comes_as_there_was_to_be_room_for_nobody_is_served(newest_shop: Shop) -> None:
    async def run() -> None:
        asked = []

        async def room(pool: TokenPool) -> None:
            asked.append(pool)
            if len(asked) == 1:
                raise UnwantedError("nobody waited")
            await _room(pool)

        async with _pool(newest_shop, room=room) as pool:
            await pool.give_back(await pool.take())
            assert len(asked) == 2

    asyncio.run(run())


@pytest.mark.parametrize("leaves", [False, True])
def test_connections_that_all_lead_to_another_host_are_tried_no_longer_than_a_caller_waits(
    newest_shop: Shop, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    monkeypatch.setattr(Terminator, "elsewhere", lambda self, there: True)

    async def run() -> None:
        async with _pool(newest_shop, wait=0.5 if not leaves else 60.0) as pool:
            asking = asyncio.create_task(pool.take())
            if leaves:
                await asyncio.wait({asking}, timeout=0.2)
                asking.cancel()
            await asyncio.wait({asking}, timeout=20)
            assert asking.done()
            assert asking.cancelled() if leaves else isinstance(asking.exception(), UnavailableError)

    asyncio.run(run())


def test_a_caller_who_left_as_his_connection_came_does_not_use_it(
    newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with _pool(newest_shop) as pool:
            getconn = pool._getconn

            async def swallows() -> object:
                found = await getconn()
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
                return found

            monkeypatch.setattr(pool, "_getconn", swallows)
            leaving = asyncio.create_task(pool.take())
            await asyncio.wait({leaving})
            assert leaving.cancelled()
            assert not pool.out
            monkeypatch.undo()
            session = await pool.take()
            assert len(pool.sessions) == 1
            await pool.give_back(session)

    asyncio.run(run())
