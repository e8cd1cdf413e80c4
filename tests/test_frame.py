"""What stands around a statement (its frame, wire and turn) against functions and servers that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterator

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.postgres import frame
from mcpctl.postgres.embedded import Binaries
from mcpctl.postgres.wire import Wire
from site_of_mcpctl import Client, Shop, Site

MakeSite = Callable[..., Site]
_TRAP = """
CREATE FUNCTION run(text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE AS $$BEGIN EXECUTE $1; RETURN 'done'; END$$;
CREATE TABLE written (x int);
GRANT SELECT, INSERT ON written TO shop_reader;
"""
_IN_PLACE_OF_OURS = """do $$declare one record; begin
for one in select * from pg_prepared_statements where not from_sql and name ~ '(snapshot|unlock)$' loop
 execute format('deallocate %I', one.name);
 execute format('prepare %I as select pg_backend_pid(), 2, 3, case current_setting(''transaction_read_only'')
  when ''off'' then run(''insert into written values (1)'') end, set_config(''default_transaction_read_only'', ''off'',
  false)', one.name);
end loop; end$$"""


@pytest.fixture(scope="module")
def trapped(newest: Binaries) -> Iterator[Shop]:
    with site.shop(newest) as found:
        with found.admin() as admin:
            admin.execute(_TRAP)
        yield found


@pytest.fixture
def a(make_site: MakeSite, trapped: Shop) -> Iterator[Client]:
    at = make_site(trapped).start()
    with at.client(at.token()[1]) as client:
        yield client


def test_what_is_prepared_in_place_of_ours_writes_nothing(a: Client, trapped: Shop) -> None:
    """A pipeline is run to its end before anybody sees what its first statement was."""
    for query in ("select 1", f"select run($run${_IN_PLACE_OF_OURS}$run$)", *["select 1"] * 3):
        a.rows(query)
    with trapped.admin() as admin:
        assert admin.execute("SELECT count(*) FROM written").fetchone() == (0,)


def test_what_is_prepared_in_place_of_ours_is_noticed(a: Client) -> None:
    before = a.rows("select pg_backend_pid()")
    a.rows(f"select run($run${_IN_PLACE_OF_OURS}$run$)")
    assert a.rows("select pg_backend_pid()") != before


@pytest.mark.parametrize("query", [
    "select pg_advisory_lock(7), 1 / (count(*) - 1) from (values (1)) x",
    "select run('select pg_advisory_lock(7)'), 1 / (count(*) - 1) from (values (1)) x",
    "select pg_advisory_lock(7), repeat('x', 1000) from generate_series(1, 100000)",
    "select pg_advisory_lock(7), setseed(0.5), pg_sleep(0)",
])  # fmt: skip
def test_an_error_leaves_nothing_and_the_connection_goes_on(a: Client, query: str) -> None:
    """What ends a call early keeps PostgreSQL from the rest of the frame."""
    [[before]] = a.rows("select pg_backend_pid()")
    for _ in range(3):
        a.call("query_database", {"query": query})
        [[after, locks]] = a.rows(
            "select pg_backend_pid(), count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
        )
        assert locks == 0
        assert after == before or "generate_series" in query  # a cancel that comes too late closes it
    seen = [a.rows("select random()") for _ in range(3) if a.call("query_database", {"query": query})]
    assert len({json.dumps(one) for one in seen}) == 3


@pytest.mark.parametrize("text", [frame.SET_LIMITS, frame.WHO_AND_TRACE, frame.UNLOCK_ALL, frame.LOOK])
def test_what_always_runs_is_pg_catalogs_alone(text: bytes) -> None:
    """What is looked for in the path may be anybody's: it would run in each call, and behind an error outside of the
    transaction that is READ ONLY."""
    bare = re.sub(r"'[^']*'|\$\d+", "", text.decode())
    called = re.findall(r"([\w.]+)\s*\(", bare)
    assert [name for name in called if not name.startswith("pg_catalog.")] == []
    assert [name for name in re.findall(r"FROM\s+([\w.]+)", bare) if not name.startswith("pg_catalog.")] == []
    assert re.findall(r"[-+*/<>=~!@#%^&|`?:]", bare) == []


def test_an_operator_in_the_path_is_not_run_by_the_frame(a: Client, trapped: Shop) -> None:
    """`float8 / int4` is not in pg_catalog, so that one of the path would be the best there is."""
    with trapped.admin() as admin:
        admin.execute(
            "CREATE FUNCTION evil(float8, int) RETURNS float8 LANGUAGE plpgsql AS $$BEGIN "
            "PERFORM pg_advisory_lock(4711), set_config('my.own', 'left', false); RETURN 0.5; END$$; "
            "CREATE OPERATOR / (leftarg = float8, rightarg = int, function = evil)"
        )
    for query in ("select 7", "select 1 / (count(*) - count(*)) from products"):
        for _ in range(2):
            a.call("query_database", {"query": query})
            left = a.rows("select current_setting('my.own', true), count(*) from pg_locks where locktype = 'advisory'")
            assert left == [[None, 0]]
    with trapped.admin() as admin:
        admin.execute("DROP OPERATOR / (float8, int); DROP FUNCTION evil")


_LET_IN = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I"
_NOTIFICATION = b"A\0\0\0\x0a\0\0\0\x01\0\0"


async def _with_a_server_of_its_own(flood: bool) -> float:
    """Seconds after which a server that lets in, and then says nothing or too much, is given up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            await reader.read(4096)
            writer.write(_LET_IN)
            while flood:
                writer.write(_NOTIFICATION * 1000)
                await writer.drain()
            await reader.read()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "user": "x", "sslmode": "disable", "gssencmode": "disable"}
    conn = await psycopg.AsyncConnection.connect(**options)
    conn.pgconn.enter_pipeline_mode()
    wire, begun = Wire(conn.pgconn), asyncio.get_running_loop().time()
    if flood:
        async with asyncio.timeout(20):
            while not conn.closed:
                await asyncio.sleep(0.01)
    else:
        with wire.exchange(1 << 20, 1 << 20, 30.0):
            pass
        with pytest.raises(TimeoutError), wire.exchange(1 << 20, 1 << 20, 0.1):
            await wire.result()
    wire.close()
    await conn.close()
    server.close()
    await asyncio.sleep(0.1)
    return asyncio.get_running_loop().time() - begun


def test_a_server_that_talks_without_end_while_nothing_is_asked_is_closed() -> None:
    """libpq keeps each notification: it took a hundred megabytes in two seconds."""
    asyncio.run(_with_a_server_of_its_own(flood=True))


def test_a_short_exchange_ends_in_time_after_a_long_one() -> None:
    assert asyncio.run(_with_a_server_of_its_own(flood=False)) < 10


def test_who_waits_for_a_turn_hears_at_once_that_the_database_is_down(make_site: MakeSite, newest: Binaries) -> None:
    with site.shop(newest) as shop:
        at = make_site(shop, database="    pool: {max_size: 1, wait: 20s}\n").start()
        token = at.token()[1]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(at.client(token)) for _ in range(4)]
            clients[0].rows("select 1")
            running = [site.in_background(one.error, "select pg_sleep(15)") for one in clients]
            site.eventually(lambda: len(shop.backends("state = 'active'")) == 1)
            shop.cluster.stop_server()
            said = [one.result(10) for one in running]
    assert sum("cannot be reached" in one for one in said) >= 2, said


@pytest.mark.skipif(sys.platform != "linux", reason="what the process takes is told on Linux alone")
def test_what_others_take_between_two_statements_of_an_exchange_is_not_libpqs(newest_shop: Shop) -> None:
    """A change of a setting waits between its questions; a thread's stack alone took more than an answer may."""
    cluster = newest_shop.cluster

    async def main() -> list[bytes]:
        dsn = cluster.dsn_for("postgres", cluster.superuser_password, "shop")
        conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        conn.pgconn.enter_pipeline_mode()
        wire, found = Wire(conn.pgconn), []
        with wire.exchange(1 << 20, 1 << 20, 30.0), contextlib.ExitStack() as held:
            for _ in range(3):
                conn.pgconn.send_query_params(b"SELECT 'x' FROM pg_sleep(0.1)", None)
                wire.sync()
                await wire.flush()
                found.append((await wire.command()).get_value(0, 0))
                await wire.synced()
                held.enter_context(mmap.mmap(-1, 32 << 20))
        wire.close()
        await conn.close()
        return found

    assert asyncio.run(main()) == [b"x"] * 3
