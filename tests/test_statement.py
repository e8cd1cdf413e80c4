"""One statement: bounded, read-only, and nothing of it left behind. Over HTTP, on the oldest and the newest version."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import pg
import site_of_mcpctl as site
from mcpctl.postgres import verdicts
from mcpctl.postgres.embedded import Binaries
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("statement") / "site", shop).start()
    yield found
    found.stop()


@pytest.fixture
def a(served: Site) -> Iterator[Client]:
    with served.client(served.token()[1]) as client:
        yield client


LEFTOVERS = {
    "a setting of the session": "select set_config('search_path', 'nowhere', false)",
    "statement_timeout": "select set_config('statement_timeout', '0', false)",
    "default_transaction_read_only": "select set_config('default_transaction_read_only', 'off', false)",
    "the role": "select set_config('role', 'none', false)",
    "a setting that it made up": "select set_config('app.tenant', 'mine', false)",
    "one under another spelling": """select U&"\\0073et_config"('app.tenant', 'mine', false)""",
    "one in a text that XML runs": "select query_to_xml('table view_with_setting', true, true, '')",
    "one in a text that a text search runs": "select ts_rewrite('a'::tsquery, $$select 'a'::tsquery, 'b'::tsquery "
    "from set_config('app.tenant', 'mine', false)$$)",
    "one made by a function": "select make_setting()",
    "one made by a function with SET": "select make_local_setting()",
    "one made by a view": "table view_with_setting",
    "one made by an operator": "select 1 +! 2",
    "one made by an aggregate": "select sum_with_setting(1)",
    "one made by a row policy": "select * from guarded",
    "one made before an error": "select 1 / (length(set_config('app.tenant', 'mine', false)) - 4)",
    "one made by a plan": "explain select make_setting_immutable()",
    "one under a comment": "select set_config('app.tenant', 'mine', false); -- done;",
    "what others see of it": "select set_config('application_name', 'somebody else', false)",
    "an advisory lock": "select pg_advisory_lock(4711), pg_advisory_lock_shared(4712)",
    "a prepared statement made by a function": "select make_prepared()",
    "a deallocation by a function": "select drop_prepared()",
    "a temporary table of EXPLAIN ANALYZE": "explain analyze create temporary table left_over as select 1",
    "a held cursor made by a function": "select make_cursor()",
    "a listener made by a function": "select make_listener()",
    "an error in the middle": "select 1/0 from (select pg_advisory_lock(4713)) x",
}
_STATE = """
select (select count(*) from pg_prepared_statements), (select count(*) from pg_cursors),
  (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
  (select count(*) from pg_listening_channels()), (select count(*) from pg_class where relpersistence = 't'),
  current_setting('search_path'), current_setting('statement_timeout'),
  current_setting('default_transaction_read_only'), current_setting('transaction_read_only'), current_user::text,
  current_setting('app.tenant', true), current_setting('application_name')
"""


_SETTERS = """
CREATE FUNCTION make_setting_immutable() RETURNS int LANGUAGE plpgsql IMMUTABLE
  AS $$BEGIN PERFORM set_config('app.tenant', 'mine', false); RETURN 1; END$$;
CREATE FUNCTION make_local_setting() RETURNS int LANGUAGE plpgsql SET app.tenant = 'mine' AS $$BEGIN RETURN 1; END$$;
CREATE VIEW view_with_setting AS SELECT set_config('app.tenant', 'mine', false);
CREATE FUNCTION add_with_setting(a int, b int) RETURNS int LANGUAGE plpgsql
  AS $$BEGIN PERFORM set_config('app.tenant', 'mine', false); RETURN a + b; END$$;
CREATE OPERATOR +! (FUNCTION = add_with_setting, LEFTARG = int, RIGHTARG = int);
CREATE AGGREGATE sum_with_setting(int) (SFUNC = add_with_setting, STYPE = int, INITCOND = '0');
CREATE TABLE guarded AS SELECT 1 AS id;
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
CREATE POLICY guard ON guarded USING (length(set_config('app.tenant', 'mine', false)) > 0);
GRANT SELECT ON guarded, view_with_setting TO shop_reader;
"""


@pytest.fixture(scope="session")
def traps(shop: Shop) -> None:
    """Functions that a careless owner may have left about, and that the reader may run."""
    bodies = {
        "make_prepared": "EXECUTE 'PREPARE mine AS SELECT 1'",
        "drop_prepared": "EXECUTE 'DEALLOCATE ALL'",
        "make_cursor": "EXECUTE 'DECLARE mine CURSOR WITH HOLD FOR SELECT 1'",
        "make_listener": "EXECUTE 'LISTEN mine'",
        "make_setting": "PERFORM set_config('app.tenant', 'mine', false)",
    }
    with shop.admin() as admin:
        for name, body in bodies.items():
            admin.execute(
                f"CREATE OR REPLACE FUNCTION {name}() RETURNS int LANGUAGE plpgsql AS $$BEGIN {body}; RETURN 1; END$$"  # type: ignore[arg-type]
            )
        admin.execute(_SETTERS)


@pytest.mark.parametrize("what", LEFTOVERS)
@pytest.mark.usefixtures("traps")
def test_nothing_that_a_call_makes_outlives_it(a: Client, what: str) -> None:
    before = a.rows(_STATE)
    for _ in range(2):  # judged anew, and remembered
        a.call("query_database", {"query": LEFTOVERS[what]})
        assert a.rows(_STATE) == before
    assert a.rows("select transaction_read_only from (select current_setting('transaction_read_only') "
                  "as transaction_read_only) x") == [["on"]]  # fmt: skip


KEEPING = (
    "select count(*) from orders;",
    "with late as (select * from orders where id > 5) select * from late where id = (select max(id) from orders)",
    "select random(), now(), gen_random_uuid()",
    "table monthly_revenue -- all of it",
    "values (1), (2) ; ",
    "select",
)


@pytest.mark.newest
def test_a_connection_that_is_closed_early_takes_no_others_descriptor(served: Site, a: Client) -> None:
    """Whoever comes meanwhile gets its number."""
    enough = threading.Event()

    def visit(token: str) -> int:
        answered = 0
        while not enough.is_set():
            with served.client(token) as new:
                assert new.rows("select 1") == [[1]]
            answered += 1
        return answered

    visiting = [in_background(visit, served.token("bob")[1]) for _ in range(3)]
    try:
        for _ in range(8):
            rows = a.rows(
                "select i, case when i < 100 then 'a' else repeat('x', 60000000) end from generate_series(1, 101) i"
            )
            assert len(rows) == 96
    finally:
        enough.set()
    assert all(one.result() for one in visiting)


def test_the_last_words_of_a_connection_reach_the_caller(a: Client) -> None:
    said = a.error("select pg_terminate_backend(pg_backend_pid())")
    assert "terminating connection due to administrator command" in said
    assert "57P01" in said
    assert a.rows("select 1") == [[1]]


@pytest.mark.parametrize("query", KEEPING)
def test_a_question_that_leaves_nothing_keeps_its_connection(a: Client, query: str) -> None:
    backend = a.rows("select pg_backend_pid()")
    for _ in range(2):
        a.rows(query)
        assert a.rows("select pg_backend_pid()") == backend


def test_a_new_connection_comes_once_the_backend_of_the_last_has_gone(newest: Binaries, make_site: MakeSite) -> None:
    """Each call may leave something, and the role has as many connections as the budget."""
    with site.shop(newest) as own:
        with own.admin() as admin:
            admin.execute("ALTER ROLE shop_reader CONNECTION LIMIT 2")
        at = make_site(own, extra="limits: {connections: 2}\n").start()
        with at.client(at.token()[1]) as a:
            for _ in range(100):
                a.rows("select set_config('app.tenant', 'mine', false)")
        at.stop()


def test_a_type_that_is_made_anew_is_known_under_the_same_text(a: Client, shop: Shop) -> None:
    query = "select 'fine'::mood_of_today as m, array['fine'::mood_of_today] as l"
    with shop.admin() as admin:
        for _ in range(2):
            admin.execute("DROP TYPE IF EXISTS mood_of_today")
            admin.execute("CREATE TYPE mood_of_today AS ENUM ('fine')")
            answer = a.call("query_database", {"query": query}).json()["result"]["structuredContent"]
            assert answer["columns"] == [
                {"name": "m", "type": "mood_of_today"},
                {"name": "l", "type": "mood_of_today[]"},
            ]
            assert answer["rows"] == [["fine", ["fine"]]]


def test_a_seed_does_not_outlive_its_call(a: Client) -> None:
    drawn = []
    for _ in range(2):
        a.rows("select setseed(0.5)::text")
        drawn.append(a.rows("select random()"))
    assert drawn[0] != drawn[1]
    seeded = "select random() from (select setseed(0.5)) x"
    assert a.rows(seeded) == a.rows(seeded)


@pytest.mark.usefixtures("traps")
def test_what_one_token_leaves_no_other_can_use(served: Site, a: Client) -> None:
    with served.client(served.token("bob")[1]) as b:
        mine = a.rows("select pg_backend_pid()")
        assert b.rows("select pg_backend_pid()") != mine
        a.rows("select make_prepared()")
        for one in (a, b):
            assert one.rows("select name from pg_prepared_statements where name not like 'mcpctl %'") == []
            assert one.error("execute mine")


WRITES = {
    "insert into products (name) values ('x') returning id": "cannot execute INSERT in a read-only transaction",
    "update products set name = 'x' returning id": "cannot execute UPDATE in a read-only transaction",
    "delete from order_items returning 1": "cannot execute DELETE in a read-only transaction",
    "with gone as (delete from orders returning *) select * from gone": "read-only transaction",
    "select nextval('products_id_seq')": "",
    "select * into copy_of from products": "PostgreSQL describes no columns",
    "insert into products (name) values ('x')": "PostgreSQL describes no columns",
    "truncate orders": "PostgreSQL describes no columns",
    "drop table orders": "PostgreSQL describes no columns",
    "create table x (y int)": "PostgreSQL describes no columns",
    "alter table orders add x int": "PostgreSQL describes no columns",
    "set transaction read write": "PostgreSQL describes no columns",
    "begin read write": "PostgreSQL describes no columns",
    "commit": "PostgreSQL describes no columns",
    "do $$ begin delete from orders; end $$": "PostgreSQL describes no columns",
    "copy orders to stdout": "PostgreSQL describes no columns",
    "copy orders from stdin": "PostgreSQL describes no columns",
    "select 1; drop table orders": "cannot insert multiple commands",
    "commit; drop table orders": "cannot insert multiple commands",
    "select lo_create(0)": "permission denied",
    "select pg_read_file('/etc/passwd')": "permission denied",
    "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'postgres'": "terminate",
    "select pg_logical_emit_message(false, 'a', 'b')": "permission denied",
    "select pg_export_snapshot()": "permission denied",
}


@pytest.mark.parametrize("query", WRITES)
def test_what_would_write_is_refused_and_changes_nothing(shop: Shop, a: Client, query: str) -> None:
    count = "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM products), (SELECT count(*) FROM pg_class)"
    with shop.admin() as admin:
        before = admin.execute(count).fetchall()  # type: ignore[arg-type]
        assert WRITES[query] in a.error(query)
        assert admin.execute(count).fetchall() == before  # type: ignore[arg-type]


def test_a_failure_says_what_postgresql_says_and_never_where_it_runs(shop: Shop, served: Site, a: Client) -> None:
    text = a.error("select nam from products")
    assert text.splitlines()[0] == 'column "nam" does not exist'
    assert "SQLSTATE: 42703" in text
    assert "Position: 8" in text
    for query in ("select nam from products", "select * from nowhere.x", "select 'x'::int", "select pg_read_file('x')"):
        text = a.error(query)
        for secret in (site.PASSWORD, shop.cluster.host, "5432", site.READER):
            assert secret not in text


def test_a_known_question_is_remembered_and_asked_again_in_the_same_words(a: Client) -> None:
    for _ in range(3):
        assert a.rows("select count(*) from customers") == [[500]]


def test_rows_beyond_the_limit_are_cut_off_and_it_says_so(a: Client) -> None:
    found = a.ask("select g from generate_series(1, 100000) g")
    assert (found["row_count"], found["truncated"]) == (1000, True)
    assert "LIMIT and OFFSET" in found["note"]
    assert found["rows"][-1] == [1000]
    exact = a.ask("select g from generate_series(1, 1000) g")
    assert (exact["row_count"], exact["truncated"]) == (1000, False)
    few = a.ask("select g from generate_series(1, 1000) g", limit=7)
    assert (few["row_count"], few["truncated"]) == (7, True)
    assert a.rows("select 1") == [[1]]


def test_bytes_beyond_the_limit_are_cut_off_between_rows(a: Client) -> None:
    found = a.ask("select repeat('x', 300000) from generate_series(1, 10)")
    assert (found["row_count"], found["truncated"]) == (3, True)
    found = a.ask("select repeat('x', 2000000)")
    assert (found["row_count"], found["truncated"]) == (0, True)


def _memory(at: Site) -> int:
    """The server's peak memory in bytes."""
    assert at.process is not None
    status = Path(f"/proc/{at.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the server's peak memory is read from /proc")
@pytest.mark.parametrize("way", ["socket", "tcp", "tls"])
def test_a_cell_of_a_gigabyte_and_ten_million_rows_cost_little_memory_and_nobody_waits(
    make_site: MakeSite, certificates: Path, way: str
) -> None:
    binaries = next((found for found in pg.supported() if not found.bundled), None)
    if way == "tls" and binaries is None:
        pytest.skip("the PostgreSQL of the wheel is built without TLS, and the system has none")
    options: dict[str, object] = {"tcp": way != "socket"}
    whole = way == ("socket" if binaries is None else "tls")  # the others have a tenth of it, which is too much as well
    if way == "tls":
        options["ssl"] = (certificates / "cert.pem", certificates / "key.pem")
    with site.shop(binaries or pg.supported()[-1], **options) as shop:
        lines = "limits: {statement_timeout: 60s}\n"
        database = f"    sslmode: verify-full\n    sslrootcert: {certificates / 'ca.pem'}\n" if way == "tls" else ""
        at = make_site(shop, extra=lines, database=database, tcp=way != "socket").start(anew=True)
        with at.client(at.token()[1]) as a, at.client(at.token("bob")[1]) as b:
            assert a.rows("select ssl from pg_stat_ssl where pid = pg_backend_pid()") == [[way == "tls"]]
            assert httpx.get(f"{at.url.removesuffix('/mcp')}/ready").status_code == 200
            assert b.rows("select 1") == [[1]]
            before = _memory(at)
            slowest = 0.0
            for query in (
                f"select repeat('x', {1_000_000_000 if whole else 100_000_000})",
                f"select g, md5(g::text) from generate_series(1, {10_000_000 if whole else 1_000_000}) g",
            ):
                running = in_background(a.call, "query_database", {"query": query})
                while running._thread.is_alive():
                    begun = time.monotonic()
                    assert b.rows("select 1") == [[1]]
                    slowest = max(slowest, time.monotonic() - begun)
                    time.sleep(0.02)
                answer = running.result().json()["result"]
                said = answer["content"][0]["text"]
                assert "far larger than an answer may be" in said or '"truncated":true' in said, said[:300]
            assert _memory(at) - before < 60 << 20
            assert slowest < 2
            assert a.rows("select 1") == [[1]]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the server's peak memory is read from /proc")
def test_a_large_value_of_any_kind_costs_little_memory_and_holds_nobody_up(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop).start(anew=True)
    with at.client(at.token()[1]) as a, at.client(at.token("bob")[1]) as b:
        for query, cut in (
            ("select ('[' || repeat('{},', 2500000) || '{}]')::json", True),
            ("select ('[' || repeat('1,', 500000) || '1]')::jsonb", True),
            ("select array_fill('{}'::json, array[1000000])", True),
            ("select array_agg(g) from generate_series(1, 1900000) g", True),
            ("select repeat('x', 15500000)", True),
            ("select repeat('x', 1000000) from generate_series(1, 1000)", True),
            ("select case when g < 100 then 'x' else repeat('x', 1000000) end from generate_series(1, 200) g", True),
            ("select ('[' || repeat('{},', 30000) || '{}]')::json", False),
            ("select array_agg(g) from generate_series(1, 50000) g", False),
            ("select repeat('x', 1000000)", False),
        ):
            assert a.rows("select 1") == b.rows("select 1")
            before, slowest = _memory(at), 0.0
            running = in_background(a.call, "query_database", {"query": query})
            while running._thread.is_alive():
                begun = time.monotonic()
                assert b.rows("select 1") == [[1]]
                slowest = max(slowest, time.monotonic() - begun)
                time.sleep(0.005)
            said = running.result().json()["result"]["content"][0]["text"]
            assert ("far larger than an answer may be" in said or '"truncated":true' in said) == cut, (
                query,
                said[:300],
            )
            assert _memory(at) - before < 60 << 20, query
            assert slowest < 1, query


def test_rows_before_one_that_is_too_large_are_kept(a: Client) -> None:
    for large in ("to_jsonb(array_fill(1, array[200000]))", "to_jsonb(repeat('x', 1500000))"):
        answer = a.ask(f"select case when g < 20 then to_jsonb(g) else {large} end from generate_series(1, 30) g")
        assert (answer["row_count"], answer["truncated"]) == (19, True)
        assert answer["rows"] == [[g] for g in range(1, 20)]


@pytest.mark.newest
def test_groups_of_rows_before_one_that_is_never_read_are_kept(a: Client) -> None:
    for size in (9_000_000, 30_000_000):
        for number, kept in ((17, 16), (40, 32)):
            query = f"select case when g = {number} then repeat('z', {size}) else 'a' end from generate_series(1, 99) g"
            for _ in range(2):
                answer = a.ask(query)
                assert (answer["row_count"], answer["truncated"]) == (kept, True), (size, number)
        first = f"select case when g = 5 then repeat('z', {size}) else 'a' end from generate_series(1, 99) g"
        for _ in range(2):
            assert "nothing of it was taken" in a.error(first)


def test_a_statement_ends_at_its_time_and_the_connection_works_on(make_site: MakeSite, shop: Shop) -> None:
    with shop.admin() as admin:
        admin.execute(
            "CREATE OR REPLACE FUNCTION never_ends() RETURNS int LANGUAGE plpgsql AS $$BEGIN LOOP BEGIN "
            "PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END$$"
        )
    at = make_site(shop, extra="limits: {statement_timeout: 500ms}\n").start()
    with at.client(at.token()[1]) as a:
        assert "statement timeout" in a.error("select pg_sleep(60)")
        assert a.rows("select 1") == [[1]]
        begun = time.monotonic()
        assert "statement timeout" in a.error("select never_ends()")
        assert time.monotonic() - begun < 4
        eventually(lambda: not shop.backends("query LIKE '%never_ends%'"), 2)
        assert a.rows("select 1") == [[1]]


def test_a_statement_of_5_mb_is_refused_before_it_is_read(a: Client) -> None:
    answer = a.call("query_database", {"query": "select '" + "x" * 5_000_000 + "'"})
    assert answer.status_code == 413
    assert "1048576" in answer.json()["error"]["message"]


def test_the_relations_of_a_question_are_in_the_audit_log(served: Site, a: Client) -> None:
    a.rows("select count(*) from orders join customers on customers.id = customer_id")
    a.rows("select * from monthly_revenue limit 1")
    lines = [line for line in served.audit() if line["event"] == "tool.called"]
    assert lines[-2]["relations"] == ["public.customers", "public.orders"]
    assert {"public.monthly_revenue", "public.orders", "public.order_items"} <= set(lines[-1]["relations"])
    assert lines[-1]["role"] == site.READER
    assert lines[-1]["statement"] == "select * from monthly_revenue limit 1"


def test_what_a_function_reads_and_what_is_no_table_is_in_the_audit_log_too(
    served: Site, shop: Shop, a: Client
) -> None:
    with shop.admin() as admin:
        admin.execute(
            "CREATE TABLE IF NOT EXISTS kinds AS SELECT 'x'::text AS kind; CREATE SEQUENCE IF NOT EXISTS numbers;"
            "CREATE OR REPLACE FUNCTION kind() RETURNS text LANGUAGE plpgsql STABLE PARALLEL SAFE"
            " AS $$BEGIN RETURN (SELECT kind FROM kinds); END$$;"
            "GRANT SELECT ON kinds, numbers TO shop_reader; GRANT USAGE ON SCHEMA pg_toast TO shop_reader"
        )
        query = "SELECT reltoastrelid::regclass::text FROM pg_class WHERE relname = 'kinds'"
        toast = (admin.execute(query).fetchone() or [""])[0]
        admin.execute(f"GRANT SELECT ON {toast} TO shop_reader".encode())
    questions = {
        "select word from ts_stat('select to_tsvector(kind) from kinds')": "public.kinds",
        "select kind()": "public.kinds",
        f"select count(*) from {toast}": "public.kinds",
        "select last_value from numbers": "public.numbers",
    }
    for query, relation in questions.items():
        for _ in range(2):
            a.rows(query)
            assert served.audit()[-1]["relations"] == [relation], query


def test_a_verdict_is_believed_for_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(verdicts, "monotonic", lambda: now[0])
    known = verdicts.Verdicts()
    for text in (b"a text", b"a long one" * 200):
        now[0] = 0
        key, found = known.of("a", text)
        assert found is None
        known.remember(key, verdict := verdicts.Verdict(True, ("public.replaced",), True))
        now[0] = 4
        assert known.of("a", text) == (key, verdict)
        assert known.of("another", text)[1] is None
        now[0] = 6
        assert known.of("a", text) == (key, None)


def test_a_password_typed_into_sql_is_not_in_the_audit_log(served: Site, a: Client) -> None:
    for query in (
        "alter role shop_reader password 'hunter2hunter2'",
        "alter role shop_reader passwort 'hunter2hunter2'",
        "select 1; alter role shop_reader password 'hunter2hunter2'",
        "alter role shop_reader password 'hunter2hunter2",
        "alter role shop_reader password 'hunter2hunter2\0'",
        "select 'hunter2hunter2'::int",
    ):
        a.error(query)
        assert "statement_hmac" in served.audit()[-1]
        assert a.call("explain_query", {"query": query, "analyze": True}).json()["result"]["isError"]
        assert "statement_hmac" in served.audit()[-1]
    assert b"hunter2" not in (served.folder / "audit.jsonl").read_bytes()
