"""What `harden` takes from PUBLIC: attacks of a role with SELECT alone, before and after, on a cluster of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

import pg
import site_of_mcpctl as site
from mcpctl.postgres import harden
from mcpctl.postgres.embedded import Cluster

VERSIONS = pg.oldest_and_newest()
EXTENSIONS = ("dblink", "pg_prewarm", "xml2")
ANALYST, PASSWORD = "analyst", "the-analysts-own-secret"
OWNER = "shopkeeper"
ACLS = "SELECT oid::regprocedure::text, proacl::text FROM pg_proc ORDER BY oid"
Connection = psycopg.Connection[tuple[Any, ...]]


class Attack(NamedTuple):
    """A plain SELECT. `until`: the last major version whose read-only transaction lets it through by itself."""

    statement: str
    extension: str = ""
    until: int = 99


EMIT = "pg_logical_emit_message(false, 'mcpctl', 'written')"
ATTACKS = [
    Attack(f"SELECT {EMIT}"),
    Attack("SELECT pg_logical_emit_message(false, 'mcpctl', 'written'::bytea)"),
    Attack("SELECT pg_logical_emit_message(true, 'mcpctl', 'written')"),
    Attack(f"EXPLAIN ANALYZE SELECT {EMIT}"),
    Attack(f"SELECT * FROM ts_stat($$SELECT to_tsvector({EMIT}::text)$$)"),
    Attack(f"SELECT id FROM customers WHERE id = 1 AND {EMIT} IS NOT NULL"),
    Attack("SELECT pg_export_snapshot()"),
    Attack("SELECT lo_get(4242)"),
    Attack("SELECT lo_get(4242, 0, 6)"),
    Attack("SELECT loread(lo_open(4242, 262144), 6)"),
    Attack("SELECT lo_create(0)", until=15),
    Attack("SELECT lo_creat(-1)", until=15),
    Attack("SELECT lo_from_bytea(0, 'written')", until=15),
    Attack("SELECT lo_put(4242, 0, 'written')", until=15),
    Attack("SELECT lowrite(lo_open(4242, 131072), 'written')", until=15),
    Attack("SELECT lo_truncate(lo_open(4242, 131072), 0)", until=15),
    Attack("SELECT lo_unlink(4242)", until=15),
    Attack("SELECT pg_read_file('PG_VERSION')"),  # somebody granted it to PUBLIC
    Attack("SELECT pg_reload_conf()"),
    Attack("SELECT pg_stat_reset()"),
    Attack("SELECT public.dblink_connect('mine', '{dsn}')", "dblink"),
    Attack("SELECT * FROM public.dblink('{dsn}', 'SELECT 1') AS t (n int)", "dblink"),
    Attack("SELECT public.dblink_exec('{dsn}', 'CREATE TEMPORARY TABLE written (n int)')", "dblink"),
    Attack("SELECT tools.autoprewarm_dump_now()", "pg_prewarm"),
    Attack("SELECT tools.autoprewarm_start_worker()", "pg_prewarm"),
    Attack(
        f"SELECT * FROM public.xpath_table('id', 'n', $$(SELECT 1 AS id, {EMIT}::text AS n) AS t$$, '/n', 'true')"
        " AS t (id int, n text)",
        "xml2",
    ),
]
STRICT_ATTACKS = [
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_xact_lock_shared(1, 2)",
    "SELECT pg_current_xact_id()",
    "SELECT txid_current()",
    "SELECT pg_relation_size('hidden')",
    "SELECT pg_total_relation_size('hidden')",
    "SELECT system_identifier FROM pg_control_system()",
]
# What psql (\\d+, \\df+, \\l+, \\dn+), JDBC, SQLAlchemy, pg_dump and mcpctl itself ask the catalog.
CLIENTS = [
    "SELECT set_config('search_path', 'public', false), current_setting('server_version_num')",
    "SELECT relname, pg_table_size(oid), obj_description(oid, 'pg_class') FROM pg_class WHERE relname = 'orders'",
    "SELECT attname, format_type(atttypid, atttypmod), col_description(attrelid, attnum),"
    " (SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum)"
    " FROM pg_attribute WHERE attrelid = 'orders'::regclass",
    "SELECT pg_get_indexdef(indexrelid, 0, true) FROM pg_index WHERE indrelid = 'orders'::regclass",
    "SELECT pg_get_constraintdef(oid, true) FROM pg_constraint WHERE conrelid = 'orders'::regclass",
    "SELECT viewname, definition FROM pg_views WHERE viewname = 'pg_locks'",
    "SELECT pg_get_functiondef(oid), pg_get_function_result(oid) FROM pg_proc WHERE proname = 'now'",
    "SELECT datname, pg_encoding_to_char(encoding), pg_database_size(oid) FROM pg_database WHERE datname = 'open'",
    "SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM information_schema.columns WHERE table_name = 'orders'",
    "SELECT * FROM information_schema.routines WHERE specific_schema = 'pg_catalog'",
    "SELECT * FROM information_schema.views",
    "SELECT pid, state, query FROM pg_stat_activity",
    "SELECT locktype, pg_blocking_pids(pid) FROM pg_locks",
    "SELECT name, setting FROM pg_settings",
    "SELECT * FROM pg_stat_user_tables",
    "SELECT pg_is_in_recovery(), txid_current_if_assigned(), pg_backend_pid(), pg_advisory_unlock_all()",
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'nobody'",
    "SELECT count(*), sum(quantity * unit_price) FROM order_items",
    "SELECT c.country, count(*) FROM orders o JOIN customers c ON c.id = o.customer_id GROUP BY 1 ORDER BY 2 DESC",
]


@dataclass
class Clean:
    """A cluster with the database `open`, as PostgreSQL makes it, and `hard`, the same but hardened."""

    cluster: Cluster
    installed: list[str] = field(default_factory=list)
    made: int = 0

    def admin(self, database: str) -> Connection:
        return psycopg.connect(self._dsn("postgres", self.cluster.superuser_password, database), autocommit=True)

    def analyst(self, database: str) -> Connection:
        return psycopg.connect(self._dsn(ANALYST, PASSWORD, database), autocommit=True)

    def make(self, database: str) -> None:
        with self.admin("postgres") as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        with self.admin(database) as connection:
            connection.execute((files("mcpctl.cli") / "shop.sql").read_bytes())
            connection.execute("CREATE TABLE hidden (n int)")
            connection.execute("GRANT SELECT ON customers, orders, order_items TO analyst")
            connection.execute("SELECT lo_from_bytea(4242, 'secret')")
            for careless in ("pg_read_file(text)", "pg_reload_conf()", "pg_stat_reset()"):
                connection.execute(f"GRANT EXECUTE ON FUNCTION {careless} TO PUBLIC".encode())
            connection.execute("CREATE SCHEMA tools; GRANT USAGE ON SCHEMA tools TO PUBLIC")
            for name in self.installed:
                schema = "tools" if name == "pg_prewarm" else "public"
                connection.execute(f"CREATE EXTENSION {name} SCHEMA {schema}".encode())

    def asks(self, database: str, statement: str) -> str:
        """What the analyst gets within BEGIN READ ONLY, in the extended protocol: the SQLSTATE, or '' for an answer."""
        dsn = f"host={self.cluster.host} port={self.cluster.port} user={ANALYST} password={PASSWORD}"
        statement = statement.replace("{dsn}", f"{dsn} dbname={database}")
        with self.analyst(database) as connection:
            connection.execute("BEGIN READ ONLY")
            result = connection.pgconn.exec_params(statement.encode(), [])
            return (result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) or b"").decode()

    def _dsn(self, role: str, password: str, database: str) -> str:
        return self.cluster.dsn_for(role, password, database)


@pytest.fixture(scope="module", params=VERSIONS, ids=str)
def clean(request: pytest.FixtureRequest) -> Iterator[Clean]:
    """Large objects are everybody's here: what `lo_compat_privileges` leaves of their privileges."""
    with Cluster.start(request.param, settings={"lo_compat_privileges": "on"}) as cluster:
        found = Clean(cluster)
        with found.admin("postgres") as connection:
            connection.execute(sql.SQL("CREATE ROLE analyst LOGIN PASSWORD {}").format(sql.Literal(PASSWORD)))
            connection.execute("CREATE ROLE shopkeeper")
            available = connection.execute("SELECT name FROM pg_available_extensions").fetchall()
            found.installed = [name for name in EXTENSIONS if (name,) in available]
        for database in ("open", "hard", "strict"):
            found.make(database)
        for database, strict in (("hard", False), ("strict", True)):
            with found.admin(database) as connection:
                connection.execute(harden.script(strict=strict).encode())
        yield found


@pytest.fixture
def fresh(clean: Clean) -> Iterator[str]:
    """A database for one test."""
    clean.made += 1
    name = f"fresh_{clean.made}"
    clean.make(name)
    yield name
    with clean.admin("postgres") as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.statement[:60])
def test_what_works_in_a_read_only_transaction_before_is_refused_after(clean: Clean, attack: Attack) -> None:
    if attack.extension and attack.extension not in clean.installed:
        pytest.skip(f"{clean.cluster.binaries} comes without the extension {attack.extension}")
    before = "" if clean.cluster.version[0] <= attack.until else "25006"
    assert clean.asks("open", attack.statement) == before
    assert clean.asks("hard", attack.statement) == "42501"
    assert clean.asks("strict", attack.statement) == "42501"


@pytest.mark.parametrize("statement", STRICT_ATTACKS)
def test_strict_takes_away_what_only_disturbs_or_shows_a_little_too(clean: Clean, statement: str) -> None:
    assert clean.asks("hard", statement) == ""
    assert clean.asks("strict", statement) == "42501"


def test_the_message_that_a_reader_writes_is_in_the_wal_after_his_rollback(clean: Clean) -> None:
    with clean.admin("open") as admin, clean.analyst("open") as analyst:
        before = admin.execute("SELECT pg_current_wal_insert_lsn()").fetchall()[0][0]
        analyst.execute("BEGIN READ ONLY")
        analyst.execute("SELECT pg_logical_emit_message(false, 'mcpctl', repeat('x', 1000000))")
        analyst.execute("ROLLBACK")
        grown = admin.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)", [before]).fetchall()[0][0]
    assert grown >= 1_000_000


@pytest.mark.parametrize("statement", CLIENTS, ids=lambda statement: statement[:60])
def test_what_clients_ask_and_the_shops_own_questions_are_still_answered(clean: Clean, statement: str) -> None:
    assert clean.asks("hard", statement) == ""


def test_a_second_run_changes_nothing_and_the_first_changed_what_it_should(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        untouched = connection.execute(ACLS).fetchall()
        assert harden.script().startswith("SET client_encoding = 'UTF8';\n")
        connection.execute(harden.script().encode())
        first = connection.execute(ACLS).fetchall()
        connection.execute(harden.script().encode())
        assert connection.execute(ACLS).fetchall() == first
        assert len(set(first) - set(untouched)) > 20


def test_the_list_is_open_before_and_empty_after_for_each_way_of_asking(clean: Clean) -> None:
    with clean.admin("open") as connection:
        open_before = dict(harden.still_open(connection, ANALYST))
        assert {"lo_create(oid)", "pg_export_snapshot()", "pg_read_file(text)"} <= set(open_before)
        assert "pg_advisory_lock(bigint)" not in open_before
        assert "pg_advisory_lock(bigint)" in dict(harden.still_open(connection, ANALYST, strict=True))
        assert all(reason in {entry.reason for entry in harden.ENTRIES} for reason in open_before.values())
        if "dblink" in clean.installed:
            assert "dblink_exec(text,text)" in open_before
            assert not [name for name in open_before if name.startswith("tools.pg_prewarm(")]
            assert "tools.autoprewarm_dump_now()" in open_before
    with clean.analyst("open") as connection:
        assert dict(harden.still_open(connection, None)) == open_before
    for database, strict in (("hard", False), ("strict", True)):
        with clean.admin(database) as connection:
            assert harden.still_open(connection, ANALYST, strict=strict) == []
            assert len(harden.still_open(connection, "postgres", strict=strict)) > 20
    with clean.admin("hard") as connection:
        assert harden.still_open(connection, ANALYST, strict=True) != []
        with pytest.raises(psycopg.errors.UndefinedObject):
            harden.still_open(connection, "nobody at all")


def test_what_a_role_is_granted_by_name_stays_and_is_told(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        connection.execute("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO shopkeeper")
        connection.execute("GRANT shopkeeper TO analyst")
        connection.execute(harden.script().encode())
        assert [name for name, _ in harden.still_open(connection, ANALYST)] == ["pg_export_snapshot()"]
        assert clean.asks(fresh, "SELECT pg_export_snapshot()") == ""
        connection.execute("REVOKE shopkeeper FROM analyst")
        assert clean.asks(fresh, "SELECT pg_export_snapshot()") == "42501"


def test_functions_of_the_same_name_that_are_somebody_elses_are_left_alone(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        connection.execute("CREATE FUNCTION public.lo_get(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
        connection.execute("CREATE FUNCTION tools.dblink(int) RETURNS int LANGUAGE sql AS 'SELECT $1'")
        connection.execute(harden.script(strict=True).encode())
    assert clean.asks(fresh, "SELECT public.lo_get('mine'), tools.dblink(1)") == ""


def test_who_may_not_revoke_is_told_the_function_and_nothing_is_changed(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        connection.execute(f"ALTER DATABASE {fresh} OWNER TO analyst".encode())
        before = connection.execute(ACLS).fetchall()
    with clean.analyst(fresh) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"lo_create\(oid\)"):
            connection.execute(harden.script().encode())
        connection.execute("ROLLBACK")
        assert connection.execute(ACLS).fetchall() == before


def test_what_another_role_granted_to_public_is_named_and_nothing_is_changed(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        connection.execute("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO shopkeeper WITH GRANT OPTION")
        connection.execute("SET ROLE shopkeeper")
        connection.execute("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC")
        connection.execute("RESET ROLE")
        before = connection.execute(ACLS).fetchall()
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"can still execute pg_export_snapshot\(\)\n"):
            connection.execute(harden.script().encode())
        connection.execute("ROLLBACK")
        assert connection.execute(ACLS).fetchall() == before


def test_definers_finds_what_acts_with_anothers_rights(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        assert harden.definers(connection, ANALYST) == []
        body = "RETURNS int SECURITY DEFINER LANGUAGE sql AS 'SELECT n FROM public.hidden'"
        connection.execute(f"CREATE FUNCTION tools.peek(text) {body}".encode())
        connection.execute(f"CREATE FUNCTION public.peek() {body}".encode())
        connection.execute("ALTER FUNCTION public.peek() OWNER TO shopkeeper")
        connection.execute(f"CREATE FUNCTION public.locked() {body}".encode())
        connection.execute("REVOKE EXECUTE ON FUNCTION public.locked() FROM PUBLIC")
        connection.execute(f"CREATE FUNCTION public.own() {body}".encode())
        connection.execute("ALTER FUNCTION public.own() OWNER TO analyst")
        connection.execute("CREATE FUNCTION public.plain() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        body = "RETURNS trigger SECURITY DEFINER LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
        connection.execute(f"CREATE FUNCTION public.fired() {body}".encode())
        expected = [("public", "peek()", OWNER, False), ("tools", "tools.peek(text)", "postgres", True)]
        assert [tuple(found) for found in harden.definers(connection, ANALYST)] == expected
    with clean.analyst(fresh) as connection:
        assert [tuple(found) for found in harden.definers(connection, None)] == expected
    assert clean.asks(fresh, "SELECT n FROM hidden") == "42501"
    assert clean.asks(fresh, "SELECT tools.peek('')") == ""


def test_views_finds_what_reads_as_one_whom_nothing_stops(clean: Clean, fresh: str) -> None:
    with clean.admin(fresh) as connection:
        assert harden.views(connection, ANALYST) == []
        names = ("by_superuser", "by_invoker", "by_column", "not_granted", "by_bypass", "by_owner")
        for name in names:
            connection.execute(f"CREATE VIEW {name} AS SELECT n, n + 1 AS m FROM hidden".encode())
        connection.execute("ALTER VIEW by_invoker SET (security_invoker = yes)")
        connection.execute("ALTER VIEW by_superuser SET (security_invoker = off)")
        connection.execute("GRANT SELECT ON by_superuser, by_invoker, by_bypass, by_owner TO analyst")
        connection.execute("GRANT SELECT (m) ON by_column TO analyst")
        connection.execute("ALTER VIEW by_owner OWNER TO shopkeeper")
        connection.execute("CREATE ROLE sees_all BYPASSRLS; ALTER VIEW by_bypass OWNER TO sees_all")
        try:
            expected = [
                ("public", "by_bypass", "sees_all", False, True),
                ("public", "by_column", "postgres", True, True),
                ("public", "by_superuser", "postgres", True, True),
            ]
            assert [tuple(found) for found in harden.views(connection, ANALYST)] == expected
        finally:
            connection.execute("DROP VIEW by_bypass; DROP ROLE sees_all")
    assert clean.asks(fresh, "SELECT m FROM by_column") == ""
    assert clean.asks(fresh, "SELECT n FROM by_invoker") == "42501"


@pytest.mark.parametrize("strict", [False, True])
def test_mcpctl_itself_works_on_a_hardened_database(
    clean: Clean, make_site: Callable[..., site.Site], strict: bool
) -> None:
    with clean.admin("postgres") as connection:
        connection.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        connection.execute("DROP ROLE IF EXISTS shop_reader")
    shop = site.Shop(clean.cluster)
    with shop.admin() as connection:
        connection.execute(harden.script(strict=strict).encode())
        assert harden.still_open(connection, site.READER, strict=strict) == []
    served = make_site(shop).start()
    with served.client(served.token()[1]) as client:
        assert client.rows("SELECT count(*) > 0 FROM orders") == [[True]]
        assert "permission denied" in client.error(f"SELECT {EMIT}")
        described = client.call("get_schema_info", {"table": "orders"}).json()["result"]
        assert not described["isError"], described
        assert client.rows("SELECT 1 AS n") == [[1]]
