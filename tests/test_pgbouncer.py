"""PgBouncer before PostgreSQL: what holds in session mode, and that nobody is served in transaction mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

import site_of_mcpctl as site
from bouncer import bouncer
from mcpctl import config, private_file
from mcpctl.facts import Request
from mcpctl.server.parts import running
from site_of_mcpctl import Shop, Site, eventually, in_background
from test_cutting import STUBBORN, UNENDING

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def pooled(newest: object) -> Iterator[Shop]:
    """A shop behind PgBouncer; the pooler does not depend on PostgreSQL's version."""
    with site.shop(newest) as found:  # type: ignore[arg-type]
        with found.admin() as admin:
            admin.execute(STUBBORN)
            admin.execute("GRANT EXECUTE ON FUNCTION stubborn() TO shop_reader")
        yield found


def behind(
    make_site: MakeSite, shop: Shop, port: int, extra: str = "user: shop_reader, password_file: shop.password"
) -> Site:
    """A site whose default database is reached through the pooler."""
    more = f"  pooled: {{host: 127.0.0.1, port: {port}, dbname: shop, default: true, pool: {{wait: 5s}}, {extra}}}\n"
    return make_site(shop, database="    required: false\n", extra=more)


def test_in_session_mode_each_token_has_backends_of_its_own_and_they_are_ended(
    make_site: MakeSite, pooled: Shop
) -> None:
    with bouncer(pooled.cluster, "session") as port:
        at = behind(make_site, pooled, port)
        assert "through a pooler" in at.run("database", "test", "pooled").stdout
        at.start()
        id, text = at.token()
        with at.client(text) as a, at.client(at.token("bob")[1]) as b:
            [[pid]] = a.rows("select pg_backend_pid()")
            assert b.rows("select pg_backend_pid()") != [[pid]]
            assert a.rows("select pg_backend_pid(), current_setting('application_name') like 'mcpctl%'") == [
                [pid, True]
            ]
            assert a.rows("show default_transaction_read_only") == [["on"]]
            running = in_background(a.call, "query_database", {"query": UNENDING})
            eventually(lambda: pooled.backends("state = 'active' AND query LIKE '%stubborn%'"))
            done = at.run("token", "revoke", id)
            assert "0 backends left" in done.stdout + done.stderr
            assert not pooled.backends(f"pid = {pid}")
            assert running.result().status_code == 401
            assert b.rows("select 'b'") == [["b"]]


def test_what_the_pooler_has_passed_on_is_left_to_who_has_it(make_site: MakeSite, pooled: Shop) -> None:
    with bouncer(pooled.cluster, "session", default_pool_size=2) as port:
        at = behind(make_site, pooled, port).start()
        id, text = at.token()
        dsn = f"host=127.0.0.1 port={port} dbname=shop user={site.READER}"
        with at.client(text) as a, psycopg.connect(dsn, password=site.PASSWORD, autocommit=True) as other:
            [[pid]] = a.rows("select pg_backend_pid()")  # with the one that ends the others, all there are
            waiting = in_background(other.execute, "select pg_backend_pid() from pg_sleep(1)")
            done = at.run("token", "revoke", id)
            assert "0 backends left" in done.stdout + done.stderr
            assert waiting.result().fetchone() == (pid,)


def test_where_the_pooler_has_no_place_for_what_ends_the_others_nobody_is_served(
    make_site: MakeSite, pooled: Shop
) -> None:
    with bouncer(pooled.cluster, "session", default_pool_size=1) as port:
        at = behind(make_site, pooled, port).start()
        with at.client(at.token()[1]) as client:
            begun = time.monotonic()
            assert "cannot be reached right now" in client.error("select 1")
            assert time.monotonic() - begun < 12


@pytest.mark.parametrize("settings", [{}, {"server_round_robin": 1}], ids=["newest first", "in turn"])
def test_in_transaction_mode_nobody_is_served_and_it_is_said_why(
    make_site: MakeSite, pooled: Shop, settings: dict[str, int]
) -> None:
    with bouncer(pooled.cluster, "transaction", **settings) as port:
        at = behind(make_site, pooled, port).start()
        with at.client(at.token()[1]) as client:
            assert "pool_mode transaction" in client.error("select 1")
            assert client.rows("select 1", database="shop") == [[1]]
        done = at.run("database", "test", "pooled", check=False)
        assert done.returncode == 1
        assert "pool_mode transaction" in done.stdout


@pytest.mark.parametrize("settings", [{}, {"ignore_startup_parameters": "options"}], ids=["refuses", "drops"])
def test_a_users_own_login_does_not_go_through_a_pooler(
    make_site: MakeSite, pooled: Shop, settings: dict[str, str]
) -> None:
    with bouncer(pooled.cluster, "session", **settings) as port:
        at = behind(make_site, pooled, port, "roles: per_user")
        user = "carol" if settings else "dave"
        at.user(user)
        private_file.create(at.folder / "admin.dsn", f"pooled: {at.admin_dsn()}\n".encode())
        at.run("user", "grant", user, "--database", "pooled", "--table", "public.orders", "--access", "read", "--apply")
        at.start()
        with at.client(at.token(user)[1]) as client:
            said = client.error("select 1")
            assert "a pooler stands before it" in said or "cannot be reached right now" in said
            assert ("a pooler" in said) == bool(settings)
        done = at.run("database", "test", "pooled", check=False)
        assert (done.returncode, "a pooler stands before it" in done.stdout) == (1, bool(settings))


def test_a_connection_that_a_pooler_gives_another_backend_is_served_no_more(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    """As PgBouncer does that is told another pool_mode while connections are open."""
    at = make_site(newest_shop)

    async def main() -> None:
        async with running(config.load(at.config, at.limits), files=False) as core:

            async def ask() -> str:
                request = Request("r", None, "stdio")
                local = core.authenticator.local()
                return (await core.calls.call(local, "query_database", {"query": "select 'it'"}, request)).text

            assert "it" in await ask()
            [session] = [one for pool in core.pools.all for one in pool.sessions.values()]
            session.number = b"1"
            assert "pool_mode transaction" in await ask()
            assert session.conn.closed
            assert "it" in await ask()

    asyncio.run(main())
