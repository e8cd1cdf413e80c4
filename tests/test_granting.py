"""Grants in PostgreSQL, on the oldest and the newest: what is printed and what is applied, what is left, what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

import pg
from mcpctl.errors import ConflictError, Error, NotFoundError
from mcpctl.identity import tenants, users
from mcpctl.identity.grants import NARROWING, PENDING, REVOKING, identifier, login_role, quoted
from place import Place, place
from site_of_mcpctl import COMMAND, environment, eventually, in_background

ODD = [
    "plain", "select", "Upper Case", 'say "no"', "a.b", "$mcpctl$", "$mcpctlx$ $mcpctl$", "back\\slash", "it's",
    "ünïcode 表", "x" * 63, "é" * 31, "*", "%I %1$s %", "--", "line\nbreak",
    "tab\t\\ ", "next\x85", "\u2028it's", "\U000e0001far",
]  # fmt: skip


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("granting") / "site", request.param, tcp=True) as found:
        yield found


_COUNT = iter(range(1000))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    """A user of this test's own, of whose roles nothing is left afterwards."""
    found = here.add(f"u{next(_COUNT)}")
    yield found
    here.granting().end(found, here.dsns)
    for role in ("r", "w"):
        here.do(f"DROP ROLE IF EXISTS mcp_{found}_{role}")


def left_of(here: Place, user: str) -> list[str]:
    """What the catalogs of both databases still say about a user's roles."""
    rows = [row for dbname in ("shop", "other") for found in here.catalog(dbname).values() for row in found]
    return [row for row in rows if f"mcp_{user}_" in row]


def can(here: Place, user: str, query: str, access: str = "read", database: str = "shop") -> list[Any] | str:
    """The rows of a query as the user's own login role, or PostgreSQL's refusal."""
    with here.connect(user, access, database) as connection:
        try:
            answer = connection.execute(query.encode())
            return answer.fetchall() if answer.description else [answer.rowcount]
        except psycopg.Error as problem:
            return f"{problem.sqlstate}"


# -- printed or applied -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "what"), [("read", ("--table", "public.orders")), ("write", ("--schema", "public")), ("write", ())]
)
def test_what_is_printed_and_run_by_psql_is_what_is_applied(
    here: Place, user: str, access: str, what: tuple[str, ...]
) -> None:
    arguments = ("user", "grant", user, "--database", "shop", *what, "--access", access)
    here.site.run(*arguments, "--apply")
    applied = here.catalog()
    passwords = dict(here.recorded(user).passwords)  # type: ignore[union-attr]
    assert any(f"mcp_{user}_{access[0]}" in row for row in applied["roles"])
    assert here.site.run("grant", "diff", "--user", user).returncode == 0
    here.site.run(*arguments, "--apply")
    assert here.catalog() == applied  # twice is once
    assert here.recorded(user).passwords == passwords  # type: ignore[union-attr]
    here.ungrant(user)
    assert left_of(here, user) == []

    printed = here.site.run(*arguments, "--print-sql")
    assert left_of(here, user) == []
    assert here.recorded(user).state == PENDING  # type: ignore[union-attr]
    assert here.site.run("grant", "diff", "--user", user, check=False).returncode == 1
    here.psql(printed.stdout)
    assert here.catalog() == applied
    assert here.site.run("grant", "diff", "--user", user).stderr.startswith(f"{user} in shop: confirmed")
    assert here.recorded(user).state is None  # type: ignore[union-attr]
    here.psql(printed.stdout)
    assert here.catalog() == applied
    for one in ("read", "write")[: 1 if access == "read" else 2]:
        assert can(here, user, "SELECT 1", one) == [(1,)]


def test_the_password_itself_never_reaches_postgresql(here: Place, user: str) -> None:
    here.grant(user, "write", "public")
    for access in ("read", "write"):
        stored = here.query("SELECT rolpassword FROM pg_authid WHERE rolname = %s", login_role(user, access))[0][0]
        assert stored.startswith("SCRAM-SHA-256$4096:")
        assert here.password(user, access) not in here.cluster.log()
    assert here.password(user) != here.password(user, "write")


def test_a_role_has_its_limits_and_may_be_named_by_its_group(here: Place, user: str) -> None:
    here.grant(user, "write", "public")
    rows = here.query(
        "SELECT rolname, rolconnlimit, rolconfig, rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls,"
        " pg_has_role(oid, 'mcp_logins', 'MEMBER'), shobj_description(oid, 'pg_authid') FROM pg_roles"
        " WHERE rolname ~ %s ORDER BY 1",
        f"^mcp_{user}_",
    )
    for (role, limit, config, power, member, comment), read_only in zip(rows, ("on", "off"), strict=True):
        assert (limit, power, member) == (9, False, True), role
        assert {f"default_transaction_read_only={read_only}", "temp_file_limit=256MB"} < set(config)
        assert "statement_timeout=30s" in config or "statement_timeout=30000ms" in config
        assert comment == here.granting().mark(user)


# -- what can be granted ------------------------------------------------------------------------------------------


def test_odd_names_are_granted_and_taken_back_each_by_itself(here: Place, user: str) -> None:
    """All of them on the newest; on the oldest, which names things in the same way, some of each sort."""
    names = ODD if here.cluster.binaries == pg.oldest_and_newest()[-1] else ODD[::4]
    for index, odd in enumerate(names):
        other = names[(index + 1) % len(names)]
        schema, table = identifier(odd), identifier(other)
        here.do(
            f"CREATE SCHEMA {schema}",
            f"CREATE TABLE {schema}.{table} (id serial, n int)",
            f"CREATE TABLE {schema}.{identifier(odd)} (id int)",
        )
    try:
        for index, odd in enumerate(names):
            schema, table = identifier(odd), identifier(names[(index + 1) % len(names)])
            named = (quoted(odd), f"{quoted(odd)}.{quoted(names[(index + 1) % len(names)])}")
            here.grant(user, "read", named[1])
            assert can(here, user, f"SELECT n FROM {schema}.{table}") == []
            assert can(here, user, f"SELECT id FROM {schema}.{identifier(odd)}") == "42501"
            here.grant(user, "write", named[0])
            assert can(here, user, f"INSERT INTO {schema}.{table} (n) VALUES (1)", "write") == [1]
            assert can(here, user, f"SELECT id FROM {schema}.{identifier(odd)}") == []
            assert here.granting().disagreements(here.granting().user(user), here.recorded(user), here.dsns) == []  # type: ignore[arg-type]
            here.ungrant(user, None, named[0])
            here.grant(user, "write", named[1])
            here.ungrant(user, None, named[1])
            assert left_of(here, user) == []
    finally:
        for odd in names:
            here.do(f"DROP SCHEMA {identifier(odd)} CASCADE")


def test_odd_names_go_through_the_command_line_and_psql(here: Place, user: str) -> None:
    schemas = [identifier(odd) for odd in ODD]
    assert "".join(schemas).isprintable()
    here.do(*(f"CREATE SCHEMA {schema} CREATE TABLE t (n int)" for schema in schemas))
    try:
        options = [word for odd in ODD for word in ("--schema", quoted(odd))]
        printed = here.site.run("user", "grant", user, "--database", "shop", *options, "--access", "read").stdout
        assert printed.replace("\n", "").isprintable()
        here.psql(printed)
        assert here.site.run("grant", "diff", "--user", user).stderr.startswith(f"{user} in shop: confirmed")
        assert [can(here, user, f"SELECT n FROM {schema}.t") for schema in schemas] == [[]] * len(schemas)
        here.psql(here.site.run("user", "ungrant", user, "--database", "shop").stdout)
        assert left_of(here, user) == []
    finally:
        here.do(*(f"DROP SCHEMA {schema} CASCADE" for schema in schemas))


def test_tables_to_come_are_readable_whoever_of_the_owners_makes_them(here: Place, user: str) -> None:
    here.do(
        "CREATE ROLE owner_a", "CREATE ROLE owner_b", "CREATE SCHEMA coming AUTHORIZATION owner_a",
        "GRANT CREATE, USAGE ON SCHEMA coming TO owner_b", "SET ROLE owner_b",
    )  # fmt: skip
    try:
        with here.admin() as connection:
            connection.execute("SET ROLE owner_b")
            connection.execute("CREATE TABLE coming.first (id serial)")
        here.grant(user, "write", "coming")
        for owner in ("owner_a", "owner_b"):
            with here.admin() as connection:
                connection.execute(f"SET ROLE {owner}".encode())
                connection.execute(f"CREATE TABLE coming.of_{owner} (id serial, n int)".encode())
            assert can(here, user, f"SELECT n FROM coming.of_{owner}") == []
            assert can(here, user, f"INSERT INTO coming.of_{owner} (n) VALUES (1)", "write") == [1]
            assert can(here, user, f"INSERT INTO coming.of_{owner} (n) VALUES (1)") == "25006"
        here.ungrant(user, "write")
        with here.admin() as connection:
            connection.execute("SET ROLE owner_a")
            connection.execute("CREATE TABLE coming.last (n int)")
        assert can(here, user, "SELECT n FROM coming.last") == []
        here.ungrant(user)
        assert left_of(here, user) == []
    finally:
        here.do("DROP SCHEMA coming CASCADE", "DROP OWNED BY owner_a, owner_b", "DROP ROLE owner_a, owner_b")


def test_everything_is_every_schema_and_no_system_table(here: Place, user: str) -> None:
    here.do('CREATE SCHEMA "Second" CREATE TABLE t (n int)')
    try:
        here.grant(user, "read")
        assert can(here, user, 'SELECT n FROM "Second".t') == []
        assert can(here, user, "SELECT count(*) > 0 FROM orders") == [(True,)]
        assert can(here, user, "SELECT * FROM pg_authid") == "42501"
        here.grant(user, "read", "public")  # narrower, and recorded beside it
        here.ungrant(user, None, "*")
        assert can(here, user, 'SELECT n FROM "Second".t') == "42501"
        assert can(here, user, "SELECT count(*) > 0 FROM orders") == [(True,)]
        assert not [row for row in left_of(here, user) if "Second" in row]
    finally:
        here.do('DROP SCHEMA "Second" CASCADE')


def test_views_partitions_and_materialized_views_are_granted_as_tables(here: Place, user: str) -> None:
    here.do(
        "CREATE SCHEMA kinds",
        "CREATE TABLE kinds.base (n int)", "CREATE VIEW kinds.shown AS SELECT n FROM kinds.base",
        "CREATE MATERIALIZED VIEW kinds.kept AS SELECT n FROM kinds.base",
        "CREATE TABLE kinds.parts (id int GENERATED ALWAYS AS IDENTITY, n int) PARTITION BY RANGE (n)",
        "CREATE TABLE kinds.low PARTITION OF kinds.parts FOR VALUES FROM (0) TO (10)",
    )  # fmt: skip
    try:
        here.grant(user, "write", "kinds.shown", "kinds.parts")
        here.grant(user, "read", "kinds.kept")
        assert can(here, user, "SELECT n FROM kinds.shown") == []
        assert can(here, user, "SELECT n FROM kinds.kept") == []
        assert can(here, user, "INSERT INTO kinds.shown VALUES (1)", "write") == [1]
        assert can(here, user, "INSERT INTO kinds.parts (n) VALUES (1)", "write") == [1]
        assert can(here, user, "SELECT n FROM kinds.parts") == [(1,)]
        assert can(here, user, "SELECT n FROM kinds.low") == "42501"
        assert can(here, user, "SELECT n FROM kinds.base") == "42501"
        here.grant(user, "read", "kinds")
        assert can(here, user, "SELECT n FROM kinds.low") == [(1,)]
    finally:
        here.do("DROP SCHEMA kinds CASCADE")


def test_a_part_of_a_grant_is_taken_back_with_its_sequences_and_the_rest_stays(here: Place, user: str) -> None:
    here.do("CREATE SCHEMA part", *(f"CREATE TABLE part.t{n} (id serial, n int)" for n in (1, 2)))
    try:
        here.grant(user, "write", "part.t1", "part.t2")
        assert can(here, user, "SELECT nextval('part.t2_id_seq')", "write") == [(1,)]
        here.ungrant(user, "write", "part.t2")
        assert can(here, user, "SELECT nextval('part.t2_id_seq')", "write") == "42501"
        assert can(here, user, "INSERT INTO part.t2 (n) VALUES (1)", "write") == "42501"
        assert can(here, user, "SELECT n FROM part.t2", "write") == []
        assert can(here, user, "INSERT INTO part.t1 (n) VALUES (1)", "write") == [1]
        here.ungrant(user, "read", "part.t2")
        assert can(here, user, "SELECT n FROM part.t2") == "42501"
        here.ungrant(user, "write")
        assert not [row for row in left_of(here, user) if f"mcp_{user}_w" in row]
        assert can(here, user, "SELECT n FROM part.t1") == [(1,)]
    finally:
        here.do("DROP SCHEMA part CASCADE")


def test_rights_that_somebody_gave_by_hand_are_found_and_taken_back(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    role = login_role(user, "read")
    here.do(f"GRANT SELECT, TRUNCATE ON customers TO {role}", f"GRANT INSERT ON orders TO {role}",
            f"GRANT CREATE ON SCHEMA public TO {role}", f"GRANT SELECT (id) ON products TO {role}")  # fmt: skip
    found = here.site.run("grant", "diff", "--user", user, check=False)
    assert found.returncode == 1
    for what in ("SELECT on public.customers", "TRUNCATE on", "INSERT on public.orders", "CREATE on public"):
        assert what in found.stdout
    here.grant(user, "read", "public.orders")
    assert can(here, user, "SELECT id FROM products LIMIT 1") == "42501"
    assert here.site.run("grant", "diff", "--user", user).returncode == 0


# -- several databases --------------------------------------------------------------------------------------------


def test_databases_of_one_cluster_share_a_password_also_by_another_name_of_the_host(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.site.run(
        "user", "grant", user, "--database", "alias", "--table", "public.things", "--access", "read", "--apply"
    )
    here.grant(user, "read", "public.things", database="other")
    assert here.password(user) == here.password(user, database="other") == here.password(user, database="alias")
    assert can(here, user, "SELECT count(*) > 0 FROM orders") == [(True,)]
    assert can(here, user, "SELECT what FROM things", database="other") == []


def test_what_is_printed_for_another_name_of_the_host_shuts_nobody_out(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    printed = here.granting().printed(user, "alias", lambda old: old.more("read", ("public.things",)))[1]
    here.psql(printed, "other")
    assert can(here, user, "SELECT count(*) > 0 FROM orders") == [(True,)]
    assert can(here, user, "SELECT what FROM things", database="alias") == []


def test_what_is_taken_back_in_one_database_stays_in_the_other(here: Place, user: str) -> None:
    here.grant(user, "write", "public.orders")
    here.grant(user, "write", "public.things", database="other")
    here.ungrant(user)
    assert can(here, user, "INSERT INTO things (what) VALUES ('a')", "write", "other") == [1]
    assert not [row for row in here.catalog()["relations"] if f"mcp_{user}_" in row]
    assert here.recorded(user) is None
    here.ungrant(user, database="other")
    assert left_of(here, user) == []


def test_the_group_goes_with_its_last_member(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    assert here.query("SELECT count(*) FROM pg_roles WHERE rolname = 'mcp_logins'") == [(1,)]
    here.ungrant(user)
    assert here.query("SELECT count(*) FROM pg_roles WHERE rolname = 'mcp_logins'") == [(0,)]


# -- failures -----------------------------------------------------------------------------------------------------


def unchanged(here: Place, user: str, error: type[Error], code: int, *targets: str) -> Error:
    """A grant that must fail, and leave nothing: neither in PostgreSQL nor in users.yaml."""
    before, recorded = here.catalog(), here.recorded(user)
    with pytest.raises(error) as caught:
        here.grant(user, "write", *targets)
    assert caught.value.exit_code == code
    assert here.catalog() == before
    assert here.recorded(user) == recorded
    return caught.value


def test_a_table_or_schema_that_is_not_there_changes_nothing(here: Place, user: str) -> None:
    assert "nowhere" in unchanged(here, user, NotFoundError, 4, "nowhere").message
    unchanged(here, user, NotFoundError, 4, "public.orders", "public.nothing")
    here.grant(user, "read", "public.orders")
    unchanged(here, user, NotFoundError, 4, "public.customers", "public.nothing")


@pytest.mark.parametrize(("option", "gone"), [("--table", "public.t2"), ("--schema", "s2")])
def test_what_was_dropped_keeps_nothing_else_from_being_taken_back(
    here: Place, user: str, option: str, gone: str
) -> None:
    here.do("CREATE TABLE t1 (n serial)", "CREATE TABLE t2 (n int)", "CREATE SCHEMA s2 CREATE TABLE t (n int)")
    here.grant(user, "write", "public.t1", "public.orders", gone)
    here.do("DROP TABLE t2", "DROP SCHEMA s2 CASCADE")
    changes = ("--database", "shop", "--table", "public.t1", "--apply")
    said = here.site.run("user", "ungrant", user, *changes).stderr
    mends = f"{gone} is recorded and not there; mcpctl user ungrant {user} --database shop {option} {gone} --apply"
    assert said.count(f"{gone} is recorded and not there") == said.count(mends) == 1
    assert can(here, user, "SELECT n FROM t1") == can(here, user, "SELECT n FROM t1", "write") == "42501"
    assert (here.recorded(user).state, here.recorded(user).read) == (None, tuple(sorted(("public.orders", gone))))  # type: ignore[union-attr]
    printed = here.granting().printed(user, "shop", lambda old: old.more("read", ("public.t1",)))[1]
    here.psql(printed.replace("client_min_messages = warning", "client_min_messages = error"))
    assert can(here, user, "SELECT n FROM t1") == []
    assert mends in here.site.run("grant", "diff", "--user", user, check=False).stdout
    unchanged(here, user, NotFoundError, 4, "public.nothing")
    here.site.run("user", "ungrant", user, "--database", "shop", option, gone, "--apply")
    assert here.disagreements(user) == []
    here.do("DROP TABLE t1")


def test_a_role_of_that_name_that_is_not_ours_is_a_conflict_and_left_alone(here: Place, user: str) -> None:
    here.do(f"CREATE ROLE mcp_{user}_r LOGIN")
    assert "is not of this mcpctl" in unchanged(here, user, ConflictError, 5, "public").message
    here.do(
        f"COMMENT ON ROLE mcp_{user}_r IS 'mcpctl 0123456789abcdef: login role of {user}'"
    )  # another installation's
    unchanged(here, user, ConflictError, 5, "public")
    here.granting().end(user, here.dsns)
    assert here.query("SELECT count(*) FROM pg_roles WHERE rolname = %s", f"mcp_{user}_r") == [(1,)]


@pytest.mark.parametrize("power", ["SUPERUSER", "CREATEROLE", "BYPASSRLS", "REPLICATION", "CREATEDB"])
def test_a_role_that_was_made_more_than_a_login_is_a_conflict(here: Place, user: str, power: str) -> None:
    here.grant(user, "read", "public.orders")
    here.do(f"ALTER ROLE mcp_{user}_r {power}")
    assert "more than a login" in unchanged(here, user, ConflictError, 5, "public").message
    assert "more than a login" in here.site.run("grant", "diff", "--user", user, check=False).stdout
    here.do(f"ALTER ROLE mcp_{user}_r NO{power}")
    here.grant(user, "read", "public.orders")


def test_a_backend_killed_in_the_middle_leaves_nothing(here: Place, user: str) -> None:
    before = here.catalog()
    with here.held_up():
        granting = in_background(here.grant, user, "read", "public")
        (pid,) = eventually(here.waiting)
        assert here.recorded(user).state == PENDING  # type: ignore[union-attr]
        here.query("SELECT pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(Error, match="terminating connection"):
            granting.result()
    assert here.catalog() == before
    assert here.recorded(user) is None


def test_a_command_killed_before_commit_leaves_a_pending_grant_that_the_next_run_mends(here: Place, user: str) -> None:
    before = here.catalog()
    what = ("user", "grant", user, "--database", "shop", "--schema", "public", "--access", "read", "--apply")
    with here.held_up():
        process = subprocess.Popen(
            [*COMMAND, "--config", str(here.config), *what],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        eventually(here.waiting, 30)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    eventually(lambda: not here.query("SELECT 1 FROM pg_stat_activity WHERE application_name = 'mcpctl admin'"))
    assert here.catalog() == before
    assert here.recorded(user).state == PENDING  # type: ignore[union-attr]
    shown = here.site.run("grant", "diff", "--user", user, "--json", check=False)
    said = [row["difference"] for row in json.loads(shown.stdout)["differences"]]
    assert (shown.returncode, said) == (1, [f"mcp_{user}_r: is not there", "the grant is pending"])
    here.site.run(*what)
    assert here.recorded(user).state is None  # type: ignore[union-attr]
    assert can(here, user, "SELECT count(*) > 0 FROM orders") == [(True,)]


def test_a_right_that_was_to_be_taken_back_stays_refused_when_postgresql_fails(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders", "public.customers")
    here.do(f"COMMENT ON ROLE mcp_{user}_r IS 'somebody else'")
    for targets, state in ((("public.orders",), NARROWING), ((), REVOKING)):
        with pytest.raises(ConflictError):
            here.ungrant(user, None, *targets)
        assert here.recorded(user).state == state  # type: ignore[union-attr]
        assert "public.orders" not in here.recorded(user).read  # type: ignore[union-attr]
    here.do(f"COMMENT ON ROLE mcp_{user}_r IS '{here.granting().mark(user)}'")
    here.ungrant(user)
    assert (here.recorded(user), left_of(here, user)) == (None, [])


def test_a_grant_to_be_taken_back_is_not_confirmed_while_postgresql_cannot_be_asked(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.granting().printed(user, "shop", lambda old: old.less(None, ()))
    here.cluster.stop_server()
    try:
        found = here.granting()
        assert not found.settled(found.user(user), here.recorded(user), {})  # type: ignore[arg-type]
    finally:
        here.cluster.start_server()
    assert here.recorded(user).state == REVOKING  # type: ignore[union-attr]
    here.ungrant(user)


def test_what_others_have_granted_is_taken_back_too(here: Place) -> None:
    """Only who has granted a right can take it back: the owner's REVOKE leaves it."""
    here.do("CREATE ROLE giver", "CREATE TABLE given (id int)", "INSERT INTO given VALUES (1)",
            "GRANT SELECT ON given TO giver WITH GRANT OPTION", "GRANT USAGE ON SCHEMA public TO giver")  # fmt: skip
    user = here.add("receiver")
    here.grant(user, "read", "public.given", "public.orders")
    with here.admin() as connection:
        connection.execute("SET ROLE giver")
        connection.execute("GRANT SELECT ON given TO mcp_receiver_r")
    here.ungrant(user, None, "public.given")
    with here.connect(user) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("TABLE public.given")
    with here.admin() as connection:
        connection.execute("SET ROLE giver")
        connection.execute("GRANT SELECT ON given TO mcp_receiver_r")
    here.ungrant(user)
    assert here.query("SELECT 1 FROM pg_roles WHERE rolname ~ '^mcp_receiver'") == []
    here.do("DROP OWNED BY giver", "DROP TABLE given", "DROP ROLE giver")


def test_default_privileges_of_no_schema_go_with_the_next_grant(here: Place) -> None:
    user = here.add("early")
    here.grant(user, "read", "public.orders")
    here.do("ALTER DEFAULT PRIVILEGES FOR ROLE postgres GRANT SELECT ON TABLES TO mcp_early_r")
    here.grant(user, "read", "public.orders")
    here.do("CREATE TABLE made_later (id int)")
    with here.connect(user) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("TABLE public.made_later")
    here.do("DROP TABLE made_later")
    here.ungrant(user)


@pytest.mark.parametrize("schema", ['"acme-north"', '"we""ird; x"', "plain"])
def test_a_tenants_schema_is_the_search_path_however_it_is_spelled(here: Place, schema: str) -> None:
    here.do(f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.t AS SELECT 1 AS x")
    name = f"t{next(_COUNT)}"
    tenants.add(tenants.tenant_file(here.folder / "tenants.yaml"), tenants.Tenant(name, NOW, "shop", schema))
    users.add(here.users, name, None, NOW, tenant=name)
    here.grant(name, "read", schema)
    with here.connect(name) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    here.granting().end(name, here.dsns)
    here.do(f"DROP SCHEMA {schema} CASCADE")
