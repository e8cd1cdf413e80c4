"""user grant --access admin: what PostgreSQL then lets the user's login role change, and how that ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import pg
import settings_site
import site_of_mcpctl as site
from settings_site import ROLE, ask, change, fact, grant, privileges, relist, with_carol

RELOADS = """SELECT count(*) FROM pg_proc p, aclexplode(p.proacl) a
 WHERE p.oid = 'pg_reload_conf()'::regprocedure AND a.grantee = to_regrole(%s)"""
MEMBER = (
    "SELECT count(*) FROM pg_auth_members WHERE member = to_regrole(%s) AND roleid = 'pg_read_all_settings'::regrole"
)
ACL = """SELECT coalesce(string_agg(x::text, ' | ' ORDER BY x::text), '') FROM (
  SELECT parname, paracl::text FROM pg_parameter_acl UNION ALL
  SELECT proname, proacl::text FROM pg_proc WHERE proname = 'pg_reload_conf' UNION ALL
  SELECT datname, datacl::text FROM pg_database UNION ALL
  SELECT rolname, rolpassword || rolconnlimit || rolcanlogin FROM pg_authid WHERE rolname ~ '^mcp' UNION ALL
  SELECT setrole::regrole::text, setconfig::text FROM pg_db_role_setting) x"""
TWO = ("work_mem", "log_line_prefix")


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def cluster(request: pytest.FixtureRequest) -> Iterator[site.Shop]:
    yield from settings_site.own_cluster(request.param)


@pytest.fixture
def own(cluster: site.Shop) -> Iterator[site.Shop]:
    yield cluster
    settings_site.clean(cluster)


@pytest.fixture
def here(own: site.Shop, make_site: settings_site.Make) -> site.Site:
    return with_carol(make_site, own, settings_site.config(TWO))


def diff(here: site.Site) -> list[str]:
    done = here.run("grant", "diff", "--user", "carol", "--json", check=False)
    found = [one["difference"] for one in json.loads(done.stdout)["differences"]]
    assert done.returncode == (1 if found else 0)
    return found


def test_the_role_may_change_exactly_what_is_listed_and_granting_twice_changes_nothing(
    own: site.Shop, here: site.Site
) -> None:
    done = grant(here)
    assert "carol in shop: admin" in done.stdout
    assert f"{ROLE} may also execute pg_reload_conf()" in done.stderr
    assert privileges(own) == {name: {"ALTER SYSTEM"} for name in TWO}
    assert fact(own, RELOADS, ROLE) == 1
    assert fact(own, MEMBER, ROLE) == 0
    assert diff(here) == []
    before = fact(own, ACL)
    grant(here)
    assert fact(own, ACL) == before


def test_what_is_no_longer_listed_is_taken_away_and_what_is_new_is_given(own: site.Shop, here: site.Site) -> None:
    grant(here)
    with own.admin() as connection:
        connection.execute(f"GRANT SET ON PARAMETER session_replication_role TO {ROLE}".encode())
        connection.execute(f"GRANT SELECT ON public.orders TO {ROLE}".encode())
    relist(here, "settings: [work_mem, log_line_prefix]", "settings: [work_mem, jit]\n    read_all_settings: true")
    assert sorted(diff(here)) == [
        f"{ROLE}: has ALTER SYSTEM on the setting log_line_prefix, which is not recorded",
        f"{ROLE}: has SELECT on public.orders, which is not recorded",
        f"{ROLE}: has SET on the setting session_replication_role, which is not recorded",
        f"{ROLE}: lacks ALTER SYSTEM on the setting jit",
        f"{ROLE}: lacks membership in pg_read_all_settings",
    ]
    grant(here)
    assert diff(here) == []
    assert privileges(own) == {"work_mem": {"ALTER SYSTEM"}, "jit": {"ALTER SYSTEM"}}
    assert fact(own, MEMBER, ROLE) == 1
    relist(here, "    read_all_settings: true\n", "")
    assert diff(here) == [f"{ROLE}: has membership in pg_read_all_settings, which is not recorded"]
    grant(here)
    assert fact(own, MEMBER, ROLE) == 0


def test_a_right_that_somebody_took_away_is_missed(own: site.Shop, here: site.Site) -> None:
    grant(here)
    with own.admin() as connection:
        connection.execute(f"REVOKE EXECUTE ON FUNCTION pg_reload_conf() FROM {ROLE}".encode())
        connection.execute(f"REVOKE CONNECT ON DATABASE shop FROM {ROLE}".encode())
        connection.execute("REVOKE CONNECT ON DATABASE shop FROM PUBLIC")
    assert diff(here) == [f"{ROLE}: lacks EXECUTE on pg_reload_conf()", f"{ROLE}: lacks CONNECT on the database"]


def test_the_sql_that_is_printed_can_be_run_by_a_dba(own: site.Shop, here: site.Site) -> None:
    script = grant(here, "--print-sql").stdout
    assert "pg_reload_conf" in script
    assert privileges(own) == {}
    assert f"{ROLE}: is not there" in diff(here)
    for _ in range(2):
        with own.admin() as connection:
            connection.execute(script.encode())
        assert privileges(own) == {name: {"ALTER SYSTEM"} for name in TWO}
    assert diff(here) == []
    script = here.run("user", "ungrant", "carol", "--database", "shop", "--access", "admin", "--print-sql").stdout
    with own.admin() as connection:
        connection.execute(script.encode())
    assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    assert diff(here) == []


@pytest.mark.parametrize("verb", ["grant", "ungrant"])
@pytest.mark.parametrize("more", [("--schema", "public"), ("--table", "public.orders")])
def test_admin_access_goes_with_no_schema_and_no_table(here: site.Site, verb: str, more: tuple[str, str]) -> None:
    done = here.run("user", verb, "carol", "--database", "shop", "--access", "admin", *more, check=False)
    assert done.returncode == 2
    assert "takes no --schema or --table" in done.stderr


def test_there_is_no_admin_access_where_nothing_is_listed(here: site.Site) -> None:
    relist(here, "settings: [work_mem, log_line_prefix]", "settings: []")
    done = grant(here, check=False)
    assert done.returncode == 1
    assert "databases.shop.settings: [work_mem]" in done.stderr
    assert "grants" not in (here.folder / "users.yaml").read_text()


def test_a_listed_setting_that_postgresql_does_not_know_is_named_and_nothing_is_granted(
    own: site.Shop, here: site.Site
) -> None:
    relist(here, "settings: [work_mem, log_line_prefix]", "settings: [work_mem, work_memm]")
    done = grant(here, check=False)
    assert done.returncode == 1
    assert "work_memm" in done.stderr
    assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    assert json.loads(here.run("user", "show", "carol", "--json").stdout)["grants"] == {}


def test_the_record_and_the_other_commands_say_that_it_is_admin_access(here: site.Site) -> None:
    grant(here)
    shown = json.loads(here.run("user", "show", "carol", "--json").stdout)["grants"]["shop"]
    assert shown == {"read": [], "write": [], "admin": True, "state": None}
    assert "admin" in here.run("user", "show", "carol").stdout
    done = here.run("can", "carol", "call", "set_pg_configuration")
    assert done.stdout.startswith("yes")
    assert "admin work_mem, log_line_prefix in shop" in done.stdout
    assert here.run("can", "alice", "call", "set_pg_configuration", check=False).returncode == 1
    rights = json.loads(here.run("can", "carol", "--json").stdout)["rights"]
    assert [one["what"] for one in rights if one["right"] == "set"] == sorted(TWO)
    assert "set_pg_configuration" in [one["what"] for one in rights if one["right"] == "call"]
    assert "set_pg_configuration" not in here.run("can", "alice").stdout


def test_reading_and_changing_settings_are_two_logins_that_end_apart(own: site.Shop, here: site.Site) -> None:
    grant(here)
    grant(here, access="read")
    assert diff(here) == []
    assert privileges(own, "mcp_carol_r") == {}
    here.run("user", "ungrant", "carol", "--database", "shop", "--access", "admin", "--apply")
    assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    assert fact(own, "SELECT has_table_privilege('mcp_carol_r', 'public.orders', 'SELECT')") is True
    grant(here)
    here.run("user", "ungrant", "carol", "--database", "shop", "--access", "read", "--apply")
    assert privileges(own) == {name: {"ALTER SYSTEM"} for name in TWO}
    assert diff(here) == []


@pytest.fixture
def twice(own: site.Shop, make_site: settings_site.Make) -> site.Site:
    """Two databases of one cluster, each with a list of its own."""
    second = (
        f"  second:\n    host: {own.cluster.host}\n    port: {own.cluster.port}\n    dbname: postgres\n"
        "    roles: per_user\n    settings: [work_mem, jit]\n"
    )
    return with_carol(make_site, own, settings_site.config(TWO), extra=second)


def both(twice: site.Site, verb: str, database: str, access: str = "admin") -> Any:
    return twice.run("user", verb, "carol", "--database", database, "--access", access, "--apply")


def test_settings_are_the_cluster_s_so_two_databases_count_together(own: site.Shop, twice: site.Site) -> None:
    both(twice, "grant", "shop")
    both(twice, "grant", "second")
    assert set(privileges(own)) == {"work_mem", "log_line_prefix", "jit"}
    assert diff(twice) == []
    both(twice, "ungrant", "shop")
    assert set(privileges(own)) == {"work_mem", "jit"}
    assert fact(own, RELOADS, ROLE) == 0  # a function's privileges are a database's
    assert diff(twice) == []
    both(twice, "grant", "shop", "read")
    assert set(privileges(own)) == {"work_mem", "jit"}
    both(twice, "ungrant", "second")
    assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    assert diff(twice) == []


def test_a_cluster_is_known_by_another_of_its_addresses_too(own: site.Shop, make_site: settings_site.Make) -> None:
    second = (
        f"  second:\n    host: {own.cluster.host}/.\n    port: {own.cluster.port}\n    dbname: postgres\n"
        "    roles: per_user\n    settings: [work_mem, jit]\n"
    )
    found = with_carol(make_site, own, settings_site.config(TWO), extra=second)
    both(found, "grant", "shop")
    both(found, "grant", "second", "read")
    assert set(privileges(own)) == {"work_mem", "log_line_prefix"}
    both(found, "grant", "second")
    assert set(privileges(own)) == {"work_mem", "log_line_prefix", "jit"}
    assert diff(found) == []
    both(found, "ungrant", "second")
    assert set(privileges(own)) == {"work_mem", "log_line_prefix"}
    assert diff(found) == []


def test_the_tool_keeps_to_the_list_of_the_database_that_is_named(own: site.Shop, twice: site.Site) -> None:
    both(twice, "grant", "shop")
    both(twice, "grant", "second")
    twice.start()
    with twice.client(twice.token("carol")[1]) as client:
        for database, name, refused in (("shop", "jit", True), ("second", "jit", False)):
            arguments = {"name": name, "value": "off", "database": database}
            answer = client.call("set_pg_configuration", arguments).json()["result"]
            assert answer["isError"] is refused, answer
    assert fact(own, "SHOW jit") == "off"


def test_a_user_who_is_disabled_or_removed_changes_nothing_any_more(own: site.Shop, here: site.Site) -> None:
    grant(here)
    here.run("user", "disable", "carol")
    assert fact(own, "SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", ROLE) is False
    here.run("user", "enable", "carol")
    assert fact(own, "SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", ROLE) is True
    assert f"role {ROLE} dropped" in here.run("user", "remove", "carol", "--yes").stdout
    assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    assert fact(own, "SELECT count(*) FROM pg_parameter_acl p, aclexplode(p.paracl) a WHERE a.grantee <> 10") == 0


def test_the_login_still_opens_after_the_keys_were_rotated(here: site.Site) -> None:
    grant(here)
    before = (here.folder / "users.yaml").read_text()
    here.run("key", "rotate")
    assert (here.folder / "users.yaml").read_text() != before
    here.start()
    with here.client(here.token("carol")[1]) as client:
        answer = client.call("set_pg_configuration", {"name": "work_mem", "value": "6MB"}).json()["result"]
    assert not answer["isError"], answer


def test_an_administrator_without_the_right_grants_nothing(own: site.Shop, here: site.Site) -> None:
    with own.admin() as connection:
        connection.execute("CREATE ROLE weak LOGIN CREATEROLE PASSWORD 'weak'")
        connection.execute("GRANT ALL ON DATABASE shop TO weak WITH GRANT OPTION")
    try:
        (here.folder / "admin.dsn").write_text(own.cluster.dsn_for("weak", "weak", "shop") + "\n")
        done = grant(here, check=False)
        assert done.returncode == 1
        assert "permission denied for parameter" in done.stderr
        assert fact(own, "SELECT to_regrole(%s)", ROLE) is None
    finally:
        with own.admin() as connection, psycopg.connect(own.cluster.dsn, autocommit=True) as elsewhere:
            for one in (connection, elsewhere):
                one.execute("DROP OWNED BY weak CASCADE")
            connection.execute("DROP ROLE weak")


def test_can_does_not_tell_of_what_the_role_was_granted_by_us(own: site.Shop, here: site.Site) -> None:
    grant(here)
    can = ("can", "carol", "call", "set_pg_configuration")
    with own.admin() as connection:
        connection.execute("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC")
    assert "still open to any login: pg_export_snapshot(), … (1)" in here.run(*can).stdout
    with own.admin() as connection:
        connection.execute("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    assert "hardening" not in here.run(*can).stdout


def test_a_member_of_pg_read_all_settings_sees_the_file_and_no_password(
    own: site.Shop, make_site: settings_site.Make
) -> None:
    more = settings_site.config(("work_mem",), "    read_all_settings: true\n")
    found = with_carol(make_site, own, more, user="frank")
    grant(found, user="frank")
    with own.admin() as connection:
        connection.execute("ALTER SYSTEM SET primary_conninfo = 'host=db password=hush'")
        connection.execute("SELECT pg_reload_conf()")
    found.start()
    try:
        with found.client(found.token("frank")[1]) as client:
            done = change(client, "work_mem", "64MB")
            assert done["source_file"].endswith("postgresql.auto.conf")
            site.eventually(lambda: "primary_conninfo" in {one["name"] for one in changed(client)})
            entry = next(one for one in changed(client) if one["name"] == "primary_conninfo")
            assert "value" not in entry
            assert entry["source_file"].endswith("postgresql.auto.conf")
            assert entry["source_line"] > 0
            assert "hush" not in client.call("get_pg_configuration").text
            assert '"65536"' in change(client, "work_mem", "32MB")["undo"]
    finally:
        found.stop()
        settings_site.reset(own)


def changed(client: site.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(client, "get_pg_configuration")["changed"]
    return found
