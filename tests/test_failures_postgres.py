"""PostgreSQL breaks in every way that it does: no answer is wrong, nothing leaks, the others go on, and the first call
afterwards works."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psycopg
import pytest

import pg
import site_of_mcpctl as site
from site_of_mcpctl import PASSWORD, Client, Shop, Site, eventually, in_background
from under_load import LOST, REACHED, Load

ENDS = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'shop_reader'"


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def frail(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose server may be broken."""
    with site.shop(request.param, settings={"max_connections": "30"}) as found:
        yield found


@pytest.fixture(scope="module")
def at(frail: Shop, newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The frail one is `shop`; `other` is on a server that nothing happens to."""
    host, port = newest_shop.cluster.host, newest_shop.cluster.port
    found = Site(
        tmp_path_factory.mktemp("frail") / "site",
        frail,
        database="    default: true\n    pool: {wait: 5s, max_idle: 2s}\n",
        extra=f"  other: {{host: {host}, port: {port}, dbname: shop, user: shop_reader, password_file: shop.password,"
        " required: false}\nlimits: {statement_timeout: 2s}\n",
    )
    found.start()
    yield found
    found.stop()


@pytest.fixture
def client(at: Site) -> Iterator[Client]:
    with at.client(at.token()[1]) as found:
        assert found.rows("select 'before'") == [["before"]]
        yield found


@contextlib.contextmanager
def under_load(at: Site) -> Iterator[Load]:
    """Callers of both databases: those of the other are never refused, and take no longer."""
    with Load(at, "other", callers=2) as others, Load(at) as load:
        yield load
        load.goes_on()
        others.goes_on()
    others.judge()
    assert not others.refused, others.refused[:3]
    cluster = at.shop.cluster
    load.judge(cluster.host, str(cluster.port), "shop_reader", PASSWORD, "pg_stat_activity", "set_config")


def ready(at: Site) -> bool:
    return site.visit("GET", at.url.removesuffix("/mcp") + "/ready", timeout=5).status_code == 200


def descriptors(at: Site) -> int:
    assert at.process is not None
    return len(os.listdir(f"/proc/{at.process.pid}/fd"))


@pytest.mark.newest
def test_a_new_password_is_read_from_its_file_with_the_next_connection(at: Site, frail: Shop, client: Client) -> None:
    with frail.admin() as admin:
        try:
            admin.execute("ALTER ROLE shop_reader PASSWORD 'the next'")
            (at.folder / "shop.password").write_text("the next\n")
            admin.execute(ENDS)
            assert client.rows("select 'next'") == [["next"]]
        finally:
            (at.folder / "shop.password").write_text(PASSWORD + "\n")
            admin.execute(f"ALTER ROLE shop_reader PASSWORD $${PASSWORD}$$".encode())


@pytest.mark.newest
def test_the_postmaster_killed_under_load(at: Site, frail: Shop) -> None:
    with under_load(at) as load:
        frail.cluster.kill()
        eventually(lambda: load.refused)
        eventually(lambda: not ready(at), 4)
        frail.cluster.start_server()
        eventually(lambda: ready(at), 4)
        load.goes_on()
        nothing = len(load.refused)
        load.goes_on()
        assert len(load.refused) == nothing  # once it is back, nobody is refused any more
    assert load.refused


def test_one_backend_killed_takes_all_of_them_with_it_and_the_next_call_works(at: Site, frail: Shop) -> None:
    with under_load(at) as load:
        victim = eventually(lambda: frail.backends("state = 'active' AND application_name <> 'mcpctl cut'"))[0][0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: load.refused)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_it_is_restarted_twice_under_load(at: Site, frail: Shop, mode: str) -> None:
    with under_load(at) as load:
        for _ in range(2):
            frail.cluster.stop_server(mode)
            frail.cluster.start_server()
            load.goes_on()


@pytest.mark.newest
def test_a_backend_that_is_stopped_ends_at_the_deadline_and_holds_up_nobody(
    at: Site, frail: Shop, client: Client
) -> None:
    running = in_background(client.error, "select pg_sleep(1.5), 'stopped'")
    victim = eventually(lambda: frail.backends("query LIKE '%stopped%' AND state = 'active'"))[0][0]
    os.kill(victim, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert client.rows("select 'beside'") == [["beside"]]
        assert "statement timeout" in running.result(10)
        assert time.monotonic() - begun < 6
    finally:
        os.kill(victim, signal.SIGCONT)
    eventually(lambda: not frail.backends(f"pid = {victim}"))
    assert client.rows("select 'after'") == [["after"]]


@pytest.mark.newest
def test_a_postmaster_that_is_stopped_is_not_ready_and_what_is_open_is_served(
    at: Site, frail: Shop, client: Client
) -> None:
    with contextlib.ExitStack() as stack:
        os.kill(frail.cluster.pid, signal.SIGSTOP)
        stack.callback(os.kill, frail.cluster.pid, signal.SIGCONT)
        assert client.rows("select 'open'") == [["open"]]
        eventually(lambda: not ready(at), 5)
        with at.client(at.token("bob")[1]) as new:
            begun = time.monotonic()
            assert REACHED in new.error("select 'new'")
            assert time.monotonic() - begun < 8
            assert new.rows("select 'other'", database="other") == [["other"]]
    eventually(lambda: ready(at), 5)
    with at.client(at.token("bob")[1]) as new:
        assert new.rows("select 'new'") == [["new"]]


def test_others_have_taken_all_connections(at: Site, frail: Shop, client: Client) -> None:
    with frail.admin() as admin:
        admin.execute("CREATE ROLE hog LOGIN PASSWORD 'hog'; GRANT CONNECT ON DATABASE shop TO hog")
    with contextlib.ExitStack() as stack:

        def refused() -> str:
            """What somebody new is told once the server is full; empty where a place came free meanwhile."""
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    stack.enter_context(contextlib.closing(frail.login("hog", "hog")))
            assert client.rows("select 'open'") == [["open"]]
            with at.client(at.token("bob")[1]) as new:
                result = new.call("query_database", {"query": "select 'new'"}).json()["result"]
            return result["content"][0]["text"] if result["isError"] else ""

        said = eventually(refused)
        assert REACHED in said
        assert "connection slots" not in said
        assert client.rows("select 'other'", database="other") == [["other"]]
    with frail.admin() as admin:
        hogs = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'hog'"
        eventually(lambda: admin.execute(hogs).fetchone() == (0,))
        admin.execute("DROP OWNED BY hog; DROP ROLE hog")
    with at.client(at.token("bob")[1]) as new:
        assert new.rows("select 'new'") == [["new"]]


@pytest.mark.newest
def test_a_server_that_starts_up_is_not_ready(at: Site, frail: Shop, client: Client) -> None:
    """A standby that waits for its primary's WAL before it is consistent answers each login with 57P03."""
    cluster = frail.cluster
    cluster.stop_server()
    data = cluster.folder / "data"
    with_no_hot = {**cluster._settings, "hot_standby": "off"}
    made = data / "standby.signal"
    made.touch()
    owner = data.stat()
    os.chown(made, owner.st_uid, owner.st_gid)
    before, cluster._settings = cluster._settings, with_no_hot
    starting = in_background(cluster.start_server)
    try:
        eventually(lambda: "the database system is" in refusal(frail), 30)
        eventually(lambda: not ready(at), 5)
        said = client.error("select 'starting'")
        assert REACHED in said
        assert "starting" not in said.replace("'starting'", "")
    finally:
        made.unlink()
        cluster.stop_server("immediate")
        with contextlib.suppress(Exception):
            starting.result()
        cluster._settings = before
        cluster.start_server()
    eventually(lambda: ready(at), 5)
    assert client.rows("select 'after'") == [["after"]]


def refusal(shop: Shop) -> str:
    try:
        shop.admin().close()
    except psycopg.OperationalError as problem:
        return str(problem)
    return ""


def test_a_dba_terminates_a_backend_in_the_middle_of_a_call(at: Site, frail: Shop, client: Client) -> None:
    running = in_background(client.error, "select pg_sleep(1.9), 'victim'")
    eventually(lambda: frail.backends("query LIKE '%victim%' AND state = 'active'"))
    with frail.admin() as admin:
        admin.execute(ENDS)
    said = running.result()
    assert "terminating connection due to administrator command" in said or LOST in said
    assert client.rows("select 'after'") == [["after"]]


def test_a_full_disk_is_told_and_is_over_when_there_is_room(at: Site, frail: Shop, client: Client) -> None:
    """PostgreSQL says 53100 for a full disk and 53400 for its own bound on temporary files, in the same way."""
    with frail.admin() as admin:
        for name in ("temp_file_limit", "work_mem"):
            admin.execute(f"ALTER ROLE shop_reader SET {name} = '64kB'".encode())
        admin.execute(ENDS)
        big = "select count(*) from (select x from generate_series(1, 20000) x order by md5(x::text)) s"
        try:
            assert "53400" in client.error(big)
            assert client.rows("select 'small'") == [["small"]]
        finally:
            admin.execute("ALTER ROLE shop_reader RESET temp_file_limit")
        admin.execute(ENDS)
    assert client.rows(big) == [[20000]]
    with frail.admin() as admin:
        admin.execute("ALTER ROLE shop_reader RESET work_mem")


@pytest.mark.parametrize(
    "taken, back",
    [
        ("ALTER ROLE shop_reader PASSWORD 'another'", f"ALTER ROLE shop_reader PASSWORD $${PASSWORD}$$"),
        ("ALTER ROLE shop_reader NOLOGIN", "ALTER ROLE shop_reader LOGIN"),
        ("ALTER DATABASE shop RENAME TO elsewhere", "ALTER DATABASE elsewhere RENAME TO shop"),
        ("ALTER DATABASE shop ALLOW_CONNECTIONS false", "ALTER DATABASE shop ALLOW_CONNECTIONS true"),
    ],
    ids=["password", "login", "renamed", "closed"],
)
def test_what_a_dba_takes_away_is_told_without_names_and_comes_back(
    at: Site, frail: Shop, client: Client, taken: str, back: str
) -> None:
    with psycopg.connect(frail.cluster.dsn, autocommit=True) as admin:
        with contextlib.ExitStack() as stack:
            until = time.monotonic() + 10
            while True:  # mcpctl connects again by itself, and a database in use cannot be renamed
                admin.execute(ENDS)
                try:
                    admin.execute(taken.encode())
                    break
                except psycopg.errors.ObjectInUse:
                    assert time.monotonic() < until
            stack.callback(admin.execute, back.encode())
            admin.execute(ENDS)
            said = client.error("select 'gone'")
            assert REACHED in said
            for name in ("shop_reader", "elsewhere", "password", "login"):
                assert name not in said
            assert client.rows("select 'other'", database="other") == [["other"]]
        assert client.rows("select 'back'") == [["back"]]


def test_a_type_made_anew_is_not_shown_as_the_old_one(frail: Shop, client: Client) -> None:
    text = "select m from moods"
    with frail.admin() as admin:

        def make(kind: str, value: str, column: str = "mood") -> None:
            admin.execute("DROP TABLE IF EXISTS moods; DROP TYPE IF EXISTS mood")
            admin.execute(f"CREATE TYPE mood AS {kind}; CREATE TABLE moods (m {column})".encode())
            admin.execute(f"INSERT INTO moods VALUES ({value}); GRANT SELECT ON moods TO shop_reader".encode())

        try:
            make("ENUM ('glad')", "'{glad}'", "mood[]")
            assert client.rows(text) == [[["glad"]]]
            make("(a int, b text)", "(7, 'x')")
            assert client.rows(text) == [["(7,x)"]]
        finally:
            admin.execute("DROP TABLE IF EXISTS moods; DROP TYPE IF EXISTS mood")


def test_a_database_dropped_and_made_anew_is_asked_as_it_is_now(at: Site, frail: Shop, client: Client) -> None:
    text = "select * from things"
    with frail.admin() as admin:
        admin.execute("CREATE TABLE things AS SELECT 1 AS a; GRANT SELECT ON things TO shop_reader")
        assert client.rows(text) == [[1]]
        admin.execute("DROP TABLE things")
    with psycopg.connect(frail.cluster.dsn, autocommit=True) as admin:
        admin.execute("ALTER DATABASE shop ALLOW_CONNECTIONS false")
        admin.execute(ENDS)
        admin.execute("ALTER DATABASE shop RENAME TO kept")
        try:
            assert REACHED in client.error(text)
            admin.execute("CREATE DATABASE shop TEMPLATE template0")
            with frail.admin() as made:
                made.execute("CREATE TYPE word AS ENUM ('new'); CREATE TABLE things AS SELECT 'new'::word AS b")
                made.execute("GRANT SELECT ON things TO shop_reader")
            assert client.rows(text) == [["new"]]
            admin.execute("DROP DATABASE shop WITH (FORCE)")
            said = client.error(text)
            assert REACHED in said or "terminating connection" in said or LOST in said
        finally:
            admin.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
            admin.execute("ALTER DATABASE kept RENAME TO shop")
            admin.execute("ALTER DATABASE shop ALLOW_CONNECTIONS true")
    again = {"query": "select 'back'"}  # a call may share an attempt to connect that was begun before
    eventually(lambda: not client.call("query_database", again).json()["result"]["isError"])


def test_a_table_altered_between_two_calls_of_one_text_is_answered_as_it_is_now(frail: Shop, client: Client) -> None:
    text = "select * from turns"
    with frail.admin() as admin:
        admin.execute("CREATE TABLE turns (a int, b text); INSERT INTO turns VALUES (1, 'x')")
        admin.execute("GRANT SELECT ON turns TO shop_reader")
        try:
            assert client.ask(text)["rows"] == [[1, "x"]]
            admin.execute("ALTER TABLE turns ALTER a TYPE text USING 'n' || a")
            assert client.ask(text)["rows"] == [["n1", "x"]]
            admin.execute("ALTER TABLE turns DROP COLUMN b")
            assert client.ask(text)["rows"] == [["n1"]]
            admin.execute("ALTER TABLE turns ADD COLUMN c numeric DEFAULT 0.5")
            assert client.ask(text)["rows"] == [["n1", "0.5"]]
            admin.execute("DROP TABLE turns")
            assert "42P01" in client.error(text)
            admin.execute("CREATE VIEW turns AS SELECT name FROM products")
            admin.execute("GRANT SELECT ON turns TO shop_reader")
            assert client.ask(text)["columns"]
        finally:
            admin.execute("DROP VIEW IF EXISTS turns")


def test_nothing_is_left_behind(at: Site, frail: Shop, newest_shop: Shop, client: Client) -> None:
    """After all of the above, once the pools have been idle: no backend, and as many descriptors as at the start, but
    for those of the other server, whose pools may be idle for longer."""
    eventually(lambda: not frail.backends() and descriptors(at) - len(newest_shop.backends()) < 30, 20)
