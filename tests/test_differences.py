"""Where PostgreSQL and users.yaml disagree: what was handed on, what is to come, what others gave, memberships."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

import pg
from mcpctl.identity.grants import login_role
from place import Place, place


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("differences") / "site", request.param) as found:
        yield found


_COUNT = iter(range(1000))


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    """A user of this test's own, of whose roles nothing is left afterwards."""
    found = here.add(f"d{next(_COUNT)}")
    yield found
    if found in here.granting().people():
        here.granting().end(found, here.dsns)


def test_what_was_handed_on_or_is_to_come_or_is_on_sequences_is_found_and_mended(here: Place, user: str) -> None:
    role = login_role(user, "write")
    here.do("CREATE SCHEMA seen CREATE TABLE t (id serial, n int) CREATE SEQUENCE s", "CREATE ROLE onward")
    try:
        here.grant(user, "write", "seen")
        assert here.disagreements(user) == []
        here.do(
            f"GRANT SELECT ON seen.t TO {role} WITH GRANT OPTION",
            f"GRANT UPDATE (n) ON seen.t TO {role} WITH GRANT OPTION",
            f"GRANT SELECT (id) ON customers TO {role}",
            f"GRANT CREATE ON DATABASE shop TO {role}", f"GRANT CONNECT ON DATABASE shop TO {role} WITH GRANT OPTION",
            f"GRANT SELECT ON SEQUENCE seen.s TO {role}", f"GRANT USAGE ON SEQUENCE orders_id_seq TO {role}",
            f"REVOKE USAGE ON SEQUENCE seen.t_id_seq FROM {role}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA seen REVOKE INSERT ON TABLES FROM {role}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA seen GRANT TRUNCATE ON TABLES TO {role}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA seen GRANT USAGE ON SEQUENCES TO {role} WITH GRANT OPTION",
            f"ALTER DEFAULT PRIVILEGES GRANT USAGE ON TYPES TO {role}",
            f"REVOKE mcp_logins FROM {role}",
            f"SET ROLE {role}", "GRANT SELECT ON seen.t TO onward",
        )  # fmt: skip
        assert sorted(one.removeprefix(f"{role}: ") for one in here.disagreements(user)) == [
            "has CONNECT on the database WITH GRANT OPTION, which is not recorded",
            "has CREATE on the database, which is not recorded",
            "has SELECT (id) on public.customers, which is not recorded",
            "has SELECT on seen.s, which is not recorded",
            "has SELECT on seen.t WITH GRANT OPTION, which is not recorded",
            "has TRUNCATE on tables to come in seen that postgres makes, which is not recorded",
            "has UPDATE (n) on seen.t WITH GRANT OPTION, which is not recorded",
            "has USAGE on public.orders_id_seq, which is not recorded",
            "has USAGE on sequences to come in seen that postgres makes WITH GRANT OPTION, which is not recorded",
            "has USAGE on types to come in every schema that postgres makes, which is not recorded",
            "lacks INSERT on tables to come in seen that postgres makes",
            "lacks USAGE on seen.t_id_seq",
            "lacks membership in mcp_logins, which pg_hba.conf names",
        ]
        here.grant(user, "write", "seen")
        assert here.disagreements(user) == []
        assert here.query("SELECT has_table_privilege('onward', 'seen.t', 'SELECT')") == [(False,)]
    finally:
        here.do("DROP SCHEMA seen CASCADE", "DROP ROLE onward")


def test_a_membership_is_told_with_the_sql_that_mends_it(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    role = login_role(user, "read")
    here.do("CREATE ROLE passer CREATEROLE", "CREATE ROLE joined", "GRANT joined TO passer WITH ADMIN OPTION",
            "SET ROLE passer", f"GRANT joined TO {role}")  # fmt: skip
    try:
        here.grant(user, "read", "public.orders")
        (told,) = here.disagreements(user)
        assert told.startswith(f"{role}: is a member of joined, and has its rights; a DBA mends it: REVOKE joined FROM")
        here.do(told.partition("a DBA mends it: ")[2])
        assert here.disagreements(user) == []
        here.do(f"GRANT {role} TO joined")
        (told,) = here.disagreements(user)
        assert told.startswith(f"{role}: joined is a member of it, and has its rights; a DBA mends it: REVOKE ")
        here.do(told.partition("a DBA mends it: ")[2])
        here.do(f"ALTER ROLE {role} CREATEDB")
        (told,) = here.disagreements(user)
        here.do(told.partition("a DBA mends it: ")[2])
        assert here.disagreements(user) == []
    finally:
        here.do("DROP OWNED BY joined, passer CASCADE", "DROP ROLE joined, passer")


def test_what_others_gave_on_sequences_columns_and_schemas_ends_with_the_grant(here: Place, user: str) -> None:
    role = login_role(user, "write")
    here.do("CREATE SCHEMA lent CREATE TABLE t (id serial, n int)", "CREATE ROLE lender",
            "GRANT USAGE ON SCHEMA lent TO lender WITH GRANT OPTION",
            "GRANT SELECT (n) ON lent.t TO lender WITH GRANT OPTION",
            "GRANT USAGE ON SEQUENCE lent.t_id_seq TO lender WITH GRANT OPTION")  # fmt: skip
    try:
        here.grant(user, "write", "lent")
        here.do("SET ROLE lender", f"GRANT USAGE ON SCHEMA lent TO {role}", f"GRANT SELECT (n) ON lent.t TO {role}",
                f"GRANT USAGE ON SEQUENCE lent.t_id_seq TO {role}")  # fmt: skip
        here.ungrant(user)
        assert here.query("SELECT FROM pg_roles WHERE rolname ~ %s", f"^mcp_{user}_") == []
    finally:
        here.do("DROP SCHEMA lent CASCADE", "DROP OWNED BY lender", "DROP ROLE lender")


def test_what_a_login_has_in_the_system_schemas_is_found_and_mended(here: Place, user: str) -> None:
    role = login_role(user, "read")
    here.grant(user, "read")
    here.do(f"GRANT SELECT ON pg_catalog.pg_authid TO {role}", f"GRANT SELECT (umoptions) ON pg_user_mapping TO {role}",
            f"GRANT CREATE ON SCHEMA information_schema TO {role}")  # fmt: skip
    assert [one.removeprefix(f"{role}: has ") for one in here.disagreements(user)] == [
        "CREATE on information_schema, which is not recorded",
        "SELECT (umoptions) on pg_catalog.pg_user_mapping, which is not recorded",
        "SELECT on pg_catalog.pg_authid, which is not recorded",
    ]
    here.grant(user, "read")
    assert here.disagreements(user) == []


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_parameter_that_a_login_may_set_is_told_with_the_sql_that_mends_it(
    here: Place, user: str, access: str
) -> None:
    role = login_role(user, access)
    here.grant(user, access, "public.orders")
    here.do(f"GRANT SET, ALTER SYSTEM ON PARAMETER session_replication_role TO {role}")
    (told,) = here.disagreements(user)
    what = "PARAMETER session_replication_role"
    mends = f'REVOKE ALL ON {what} FROM "{role}"'
    assert told == f"{role}: has a right on {what}, which is not recorded; a DBA mends it: {mends}"
    here.do(mends)
    assert here.disagreements(user) == []


def test_what_a_login_may_do_with_aggregates_and_servers_is_told_with_the_sql_that_mends_it(
    here: Place, user: str
) -> None:
    role = login_role(user, "read")
    here.grant(user, "read", "public.orders")
    here.do("CREATE AGGREGATE public.total(int) (SFUNC = int4pl, STYPE = int)",
            "CREATE FOREIGN DATA WRAPPER wrapping", 'CREATE SERVER "Far one" FOREIGN DATA WRAPPER wrapping',
            "CREATE PROCEDURE public.proceeds() LANGUAGE sql AS ''", "CREATE DOMAIN public.numbered AS int",
            f"GRANT EXECUTE ON FUNCTION public.total(int) TO {role}",
            f"GRANT EXECUTE ON PROCEDURE public.proceeds() TO {role}",
            f"GRANT USAGE ON DOMAIN public.numbered TO {role}",
            f"GRANT USAGE ON FOREIGN DATA WRAPPER wrapping TO {role}",
            f'GRANT USAGE ON FOREIGN SERVER "Far one" TO {role}')  # fmt: skip
    try:
        told = here.disagreements(user)
        assert len(told) == 5
        here.do(*(one.partition("a DBA mends it: ")[2] for one in told))
        assert here.disagreements(user) == []
    finally:
        here.do("DROP FOREIGN DATA WRAPPER wrapping CASCADE", "DROP AGGREGATE public.total(int)",
                "DROP PROCEDURE public.proceeds()", "DROP DOMAIN public.numbered")  # fmt: skip


def test_the_command_that_mends_names_the_same_table_where_its_name_is_not_printable(here: Place, user: str) -> None:
    name = "it's\n\\\u0085"
    here.do(f'CREATE TABLE public."{name}" ()')
    here.grant(user, "read", f'public."{name}"')
    here.do(f'DROP TABLE public."{name}"')
    told = here.site.run("grant", "diff", "--user", user, check=False).stdout
    word = told.partition(" --table ")[2].partition(" --apply")[0]
    shell = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], env=shell, capture_output=True, check=True).stdout
    assert said.decode() == f'public."{name}"'


def test_a_user_or_database_that_there_is_not_agrees_with_nothing(here: Place, user: str) -> None:
    for more in (("--user", "nosuch"), ("--database", "nosuch"), ("--user", user, "--database", "nosuch")):
        done = here.site.run("grant", "diff", *more, check=False)
        assert (done.returncode, "there is no " in done.stderr) == (4, True)
    assert here.site.run("grant", "diff", "--user", user, "--database", "shop").returncode == 0
