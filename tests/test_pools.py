"""Pools: one a token, under one budget, closed when idle, well again by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import site_of_mcpctl as site
from mcpctl import config
from mcpctl.config_keys import Database, Pool
from mcpctl.errors import UnavailableError
from mcpctl.facts import Request
from mcpctl.identity.principal import LOCAL
from mcpctl.keyring import Keyring
from mcpctl.postgres import ping, token_pool
from mcpctl.postgres.login import Login
from mcpctl.postgres.session import Session
from mcpctl.postgres.terminator import Terminator
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.server.parts import running
from site_of_mcpctl import Client, Shop, Site, eventually

NO_KEYS = Keyring(Path("/nonexistent/secret.key"))
MakeSite = Callable[..., Site]


def test_a_full_budget_closes_the_longest_idle_pool_before_it_refuses(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop, extra="limits: {connections: 3}\n", database="    pool: {wait: 700ms}\n").start()
    clients = [at.client(at.token()[1]) for _ in range(4)]
    for client in clients:
        assert client.rows("select 1") == [[1]]
    assert len(shop.backends("application_name LIKE 'mcpctl%'")) <= 3
    closed = [line for line in at.audit() if line["event"] == "pool.closed"]
    assert len(closed) == 2
    sleepers = [
        site.in_background(client.call, "query_database", {"query": "select pg_sleep(1.5)"}) for client in clients[:2]
    ]
    eventually(lambda: len(shop.backends("state = 'active'")) == 2)
    assert "database connections of this server are in use" in clients[2].error("select 1")
    for sleeper in sleepers:
        assert sleeper.result().json()["result"]["isError"] is False
    for client in clients:
        client.http.close()


def test_two_databases_share_a_budget_that_has_room_for_one(make_site: MakeSite, newest_shop: Shop) -> None:
    cluster = newest_shop.cluster
    more = (
        f"  again: {{host: {cluster.host}, port: {cluster.port}, dbname: shop, user: shop_reader,"
        " password_file: shop.password, pool: {wait: 20s}}\nlimits: {connections: 2}\n"
    )
    at = make_site(newest_shop, database="    default: true\n    pool: {wait: 20s}\n", extra=more).start()
    clients = [at.client(at.token()[1]) for _ in range(6)]
    for _ in range(12):
        running = [
            site.in_background(client.call, "query_database", {"query": "select pg_sleep(0.01)", "database": database})
            for client, database in zip(clients, ("shop", "again") * 3, strict=True)
        ]
        answers = [one.result(25).json()["result"] for one in running]
        assert [one["content"] for one in answers if one["isError"]] == []
    for client in clients:
        client.http.close()


def test_a_password_that_is_not_there_is_no_database_that_is_down(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    (at.folder / "shop.password").rename(at.folder / "aside")
    with at.client(at.token()[1]) as a:
        assert "database 'shop' cannot be used: mcpctl's own files are not in order" in a.error("select 1")
        (at.folder / "aside").rename(at.folder / "shop.password")
        assert a.rows("select 1") == [[1]]


def test_a_refused_login_leaves_no_backend(make_site: MakeSite, newest: object) -> None:
    with site.shop(newest) as shop:  # type: ignore[arg-type]
        with shop.admin() as admin:
            admin.execute("ALTER ROLE shop_reader REPLICATION")
        at = make_site(shop).start()
        with at.client(at.token()[1]) as a:
            for _ in range(5):
                assert "is not served: its login is a superuser" in a.error("select 1")
        eventually(lambda: not shop.backends("application_name <> 'mcpctl cut'"), 3)
        eventually(lambda: not shop.backends())  # what is kept to end the others with goes with the next sweep


def test_a_token_is_well_again_after_more_failures_than_calls_may_wait(make_site: MakeSite, newest: object) -> None:
    with site.shop(newest) as shop:  # type: ignore[arg-type]
        at = make_site(shop, database="    pool: {max_waiting: 3}\n").start()
        with at.client(at.token()[1]) as a:
            shop.cluster.stop_server()
            for _ in range(10):
                assert "cannot be reached right now" in a.error("select 1")
            shop.cluster.start_server()
            eventually(lambda: not a.call("query_database", {"query": "select 1"}).json()["result"]["isError"], 3)


def test_each_call_hears_why_the_database_cannot_be_reached(make_site: MakeSite, newest: object) -> None:
    with site.shop(newest) as shop:  # type: ignore[arg-type]
        at = make_site(shop).start()
        with contextlib.ExitStack() as stack:
            token = at.token()[1]
            clients = [stack.enter_context(at.client(token)) for _ in range(6)]
            clients[0].rows("select 1")
            shop.cluster.stop_server()
            for _ in range(5):
                running = [site.in_background(client.error, "select 1") for client in clients]
                assert all("cannot be reached right now" in one.result() for one in running)


def test_large_answers_of_one_take_no_connection_from_another(make_site: MakeSite, newest: object) -> None:
    """The role has no more connections than the budget, so a place is free only once its backend has ended."""
    with site.shop(newest) as shop, contextlib.ExitStack() as stack:  # type: ignore[arg-type]
        with shop.admin() as admin:
            admin.execute("ALTER ROLE shop_reader CONNECTION LIMIT 3")
        at = make_site(shop, database="    pool: {max_size: 2}\n", extra="limits: {connections: 3}\n").start()
        greedy = [stack.enter_context(at.client(at.token()[1])) for _ in range(2)]
        modest = [stack.enter_context(at.client(at.token("bob")[1])) for _ in range(2)]
        enough = threading.Event()

        def take(client: Client, query: str) -> list[str]:
            said = []
            while not enough.is_set():
                said.append(client.call("query_database", {"query": query}).text)
            return said

        taking = [site.in_background(take, client, "select repeat('x', 30000000)") for client in greedy * 2]
        taking += [site.in_background(take, client, "select repeat('x', 5000000)") for client in greedy]
        try:
            for _ in range(5):
                assert [client.rows("select count(*) from orders") for client in modest] == [[[3000]]] * 2
        finally:
            enough.set()
        assert not [text for one in taking for text in one.result(60) if "cannot be reached" in text]


def test_a_host_that_never_answers_takes_nothing_from_the_other_databases(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(64)
        more = (
            f"  hole: {{host: 127.0.0.1, port: {hole.getsockname()[1]}, dbname: shop, user: shop_reader,"
            " password_file: shop.password, required: false}\nlimits: {connections: 4}\n"
        )
        at = make_site(newest_shop, database="    default: true\n", extra=more).start()
        clients = [at.client(at.token()[1]) for _ in range(12)]
        asked = {"query": "select 1", "database": "hole"}
        running = [site.in_background(client.call, "query_database", asked) for client in clients]
        eventually(lambda: select.select([hole], [], [], 0)[0])
        with at.client(at.token("bob")[1]) as b:
            for _ in range(3):
                begun = time.monotonic()
                assert b.rows("select 1") == [[1]]
                assert time.monotonic() - begun < 2
        assert all("cannot be reached" in one.result(20).text for one in running)
        for client in clients:
            client.http.close()


def test_ready_asks_all_databases_at_once_and_holds_nobody_up(make_site: MakeSite, newest_shop: Shop) -> None:
    with contextlib.ExitStack() as stack:
        more = ""
        for number in range(4):
            hole = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            more += f"  hole{number}: {{host: 127.0.0.1, port: {hole.getsockname()[1]}, user: shop_reader}}\n"
        at = make_site(newest_shop, database="    default: true\n", extra=more).start()
        b = stack.enter_context(at.client(at.token("bob")[1]))
        assert b.rows("select 1") == [[1]]
        asking = site.in_background(lambda: httpx.get(f"{at.url[:-4]}/ready", timeout=30))
        begun = time.monotonic()
        slowest = 0.0
        while asking._thread.is_alive():
            call = time.monotonic()
            assert b.rows("select 1") == [[1]]
            slowest = max(slowest, time.monotonic() - call)
        assert asking.result().status_code == 503
        assert time.monotonic() - begun < 5
        assert slowest < 1


@pytest.mark.parametrize(
    ("answer", "takes"),
    [
        (b"R\0\0\0\x08\0\0\0\x0a", True),
        (b"E\0\0\0\x13SFATAL\0C57P03\0\0", False),
        (b"E\0\0\0\x13SFATAL\0C53300\0\0", True),
        (b"HTTP/1.1 400", False),
        (b"", False),
    ],
)
def test_a_server_that_is_starting_takes_no_connections_and_one_that_is_full_does(answer: bytes, takes: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(8) == b"\0\0\0\x08\x04\xd2\x16\x2f":
            writer.write(b"N")
            await reader.readexactly(8)
        writer.write(answer)
        writer.close()

    async def run() -> bool:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await ping.takes_connections(f"host=127.0.0.1 port={port} user=a", 5)

    assert asyncio.run(run()) is takes


def test_a_certificate_that_libpq_takes_is_taken_by_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ssl.create_default_context

    def as_of_3_13(**options: str | None) -> ssl.SSLContext:
        context = usual(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_of_3_13)
    context = ping._context({"sslmode": "verify-full"})
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


def test_of_several_hosts_one_that_takes_connections_is_enough(newest_shop: Shop) -> None:
    cluster = newest_shop.cluster

    def takes(hosts: str) -> bool:
        return asyncio.run(ping.takes_connections(f"host={hosts} port={cluster.port} user=a", 5))

    assert takes(f"/nonexistent,{cluster.host}")
    assert not takes("/nonexistent")


def test_a_pool_forgets_those_who_stopped_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(token_pool, "_LEFT", 5)

    async def room(pool: token_pool.TokenPool) -> None:
        pool.connecting += 1

    async def run() -> None:
        terminator = Terminator(Login("down", Database(host=str(tmp_path), pool=Pool(wait=1.0)), NO_KEYS))
        pool = token_pool.TokenPool(terminator, LOCAL, 1.0, Verdicts(), room)
        await pool.open()
        for _ in range(30):
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await pool.take()
            assert pool._pool.get_stats().get("requests_waiting", 0) <= 7
        await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize("gap", range(16))
def test_who_comes_while_another_is_being_told_why_is_told_too(tmp_path: Path, gap: int) -> None:
    async def full(pool: token_pool.TokenPool) -> None:
        raise UnavailableError("there is no room")

    async def run() -> None:
        pool = token_pool.TokenPool(
            Terminator(Login("down", Database(host=str(tmp_path)), NO_KEYS)), LOCAL, 1.0, Verdicts(), full
        )
        await pool.open()
        asking = [asyncio.create_task(pool.take())]
        for _ in range(gap):  # steps of the event loop, while the first one is on its way out
            await asyncio.sleep(0)
        asking += [asyncio.create_task(pool.take()) for _ in range(2)]
        async with asyncio.timeout(5):
            said = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(problem) for problem in said] == ["there is no room"] * 3
        await pool.close()

    asyncio.run(run())


class _Spoken:
    """libpq's side of a connection, and its closing."""

    wire = None

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours.fileno()
        self.closed = False
        self._ours = ours
        self.pgconn = self.info = self
        self.host, self.hostaddr, self.port = "", "", 0

    def finish(self) -> None:
        self.closed = True
        self._ours.send(b"X")
        self._ours.close()


def test_who_leaves_waits_until_the_backend_has_ended() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        session = Session(_Spoken(ours), None, 1, "", "")  # type: ignore[arg-type]
        leaving = asyncio.create_task(session.leave())
        with theirs:
            theirs.send(b"a last word")
            assert await asyncio.to_thread(theirs.recv, 2) == b"X"
            assert not leaving.done()
        await leaving
        ours, theirs = socket.socketpair()
        session = Session(_Spoken(ours), None, 1, "", "")  # type: ignore[arg-type]
        with theirs:
            await asyncio.wait_for(session.leave(), 5)  # it never ends: enough is enough

    asyncio.run(run())


def test_a_call_waits_for_room_in_a_full_budget_and_gets_it(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop, extra="limits: {connections: 2}\n").start()
    with at.client(at.token()[1]) as a, at.client(at.token()[1]) as b, at.client(at.token()[1]) as c:
        sleeper = site.in_background(a.rows, "select pg_sleep(0.5)")
        eventually(lambda: shop.backends("state = 'active'"))
        waiting = [site.in_background(client.rows, "select 2") for client in (b, c)]
        assert [one.result() for one in waiting] == [[[2]], [[2]]]
        sleeper.result()


@pytest.mark.newest
@pytest.mark.parametrize("lane", ["express", "sdk"])
def test_a_call_that_waits_for_room_gets_that_of_a_client_who_went_away(
    make_site: MakeSite, shop: Shop, lane: str
) -> None:
    at = make_site(shop, extra="limits: {connections: 2}\n").start()
    _, text = at.token()
    params = {"name": "query_database", "arguments": {"query": "select pg_sleep(50)"}}
    if lane == "sdk":
        params["_meta"] = {"zzz": 1}  # type: ignore[assignment]
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    headers = {"Authorization": f"Bearer {text}", "Accept": "application/json"}
    with at.client(at.token("bob")[1]) as b:
        leaving = site.in_background(lambda: httpx.post(at.url, json=asked, headers=headers, timeout=2))
        eventually(lambda: shop.backends("query LIKE '%pg_sleep(50)%' AND state = 'active'"))
        begun = time.monotonic()
        assert b.rows("select 2") == [[2]]
        assert time.monotonic() - begun < 10
    with pytest.raises(httpx.ReadTimeout):
        leaving.result()


def test_an_idle_pool_is_closed(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, database="    pool: {max_idle: 100ms}\n").start()
    with at.client(at.token()[1]) as a:
        a.rows("select 1")
        eventually(lambda: [line for line in at.audit() if line.get("reason") == "idle"], 15)
        assert a.rows("select 1") == [[1]]


def test_a_database_that_is_down_is_not_a_bad_token_and_comes_back_by_itself(
    make_site: MakeSite, newest: object
) -> None:
    with site.shop(newest) as shop:  # type: ignore[arg-type]
        at = make_site(shop)
        shop.cluster.stop_server()
        at.start()
        ready = at.url.removesuffix("/mcp") + "/ready"
        with at.client(at.token()[1]) as a:
            for _ in range(2):
                eventually(lambda: site.visit("GET", ready).status_code == 503)
                text = a.error("select 1")
                assert "cannot be reached right now" in text
                assert "token is fine" in text
                assert shop.cluster.host not in text
                assert a.call("whoami").status_code == 200
                shop.cluster.start_server()
                eventually(lambda: site.visit("GET", ready).status_code == 200)
                eventually(lambda: not a.call("query_database", {"query": "select 1"}).json()["result"]["isError"])
                running = site.in_background(a.call, "query_database", {"query": "select pg_sleep(60)"})
                eventually(lambda: shop.backends("query LIKE '%sleep%' AND state = 'active'"))
                shop.cluster.stop_server("immediate")
                assert running.result(10).json()["result"]["isError"]
            shop.cluster.start_server()
            eventually(lambda: not a.call("query_database", {"query": "select 1"}).json()["result"]["isError"])
            shop.cluster.restart()
            assert a.rows("select 1") == [[1]]


def test_calls_take_turns_on_the_connections_that_there_are(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, database="    pool: {max_size: 2}\n").start()
    token = at.token()[1]

    def ask(number: int) -> set[int]:
        with at.client(token) as client:
            return {client.rows(f"select {number}, pg_backend_pid(), pg_sleep(0.005)")[0][1] for _ in range(10)}

    asking = [site.in_background(ask, number) for number in range(12)]
    assert len(set[int]().union(*(one.result() for one in asking))) == 2


def test_who_once_waited_for_a_new_connection_does_not_have_the_others_wait_there_too(
    make_site: MakeSite, newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come at once, while there is no connection yet, and each asks again as soon as it is answered."""
    at = make_site(newest_shop, database="    pool: {max_size: 2}\n")
    borrowed = 0
    lent = token_pool.TokenPool._lent

    async def counted(pool: token_pool.TokenPool) -> Session:
        nonlocal borrowed
        borrowed += 1
        return await lent(pool)

    monkeypatch.setattr(token_pool.TokenPool, "_lent", counted)

    async def main() -> None:
        async with running(config.load(at.config, at.limits), files=False) as core:
            local = core.authenticator.local()

            async def ask() -> None:
                for _ in range(20):
                    request = Request("r", None, "http")
                    answer = await core.calls.call(local, "query_database", {"query": "select 1"}, request)
                    assert not answer.is_error, answer.text

            await asyncio.gather(*(ask() for _ in range(12)))

    asyncio.run(main())
    assert borrowed < 2 * 12


def test_a_connection_that_is_never_idle_is_replaced_at_the_end_of_its_life(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, database="    pool: {max_size: 1, max_lifetime: 1s}\n").start()
    with at.client(at.token()[1]) as client:
        first = client.rows("select pg_backend_pid()")
        eventually(lambda: client.rows("select pg_backend_pid()") != first, 5)


def test_who_stops_waiting_for_a_turn_takes_no_connection_from_the_others(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, database="    pool: {max_size: 1}\n").start()
    token = at.token()[1]
    with at.client(token) as busy, at.client(token) as a:
        sleeping = site.in_background(busy.call, "query_database", {"query": "select pg_sleep(1)"})
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(1)%' AND state = 'active'"))
        for _ in range(5):
            with at.client(token) as hasty, contextlib.suppress(httpx.TimeoutException):
                hasty.http.timeout = httpx.Timeout(0.05)
                hasty.rows("select 1")
        assert a.rows("select 1") == [[1]]
        assert sleeping.result().json()["result"]["isError"] is False
