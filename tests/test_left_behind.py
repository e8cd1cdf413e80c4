"""What others have left lying about: no administration runs it, none of it is handed to somebody with more rights,
and what stands for all login roles has none of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

import pg
from mcpctl.errors import ConflictError, Error
from place import Place, place


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("left") / "site", request.param) as found:
        found.do("GRANT CREATE ON SCHEMA public TO PUBLIC")  # as in a database from before PostgreSQL 15
        yield found


_COUNT = iter(range(1000))


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    found = here.add(f"l{next(_COUNT)}")
    yield found
    if found in here.granting().people():
        here.granting().end(found, here.dsns)


TRAPS = (
    "CREATE TABLE public.caught (who text)",
    "GRANT INSERT ON public.caught TO PUBLIC",
    """CREATE FUNCTION public.format(text, name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
         INSERT INTO public.caught VALUES (current_user); RETURN pg_catalog.format($1, $2); END $$""",
    """CREATE FUNCTION public.array_to_string(text[], text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
         INSERT INTO public.caught VALUES (current_user); RETURN pg_catalog.array_to_string($1, $2); END $$""",
    """CREATE FUNCTION public.same(oid, oid) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
         INSERT INTO public.caught VALUES (current_user); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$""",
    "CREATE OPERATOR public.= (leftarg = oid, rightarg = oid, function = public.same)",
    "ALTER DATABASE shop SET search_path = public, pg_catalog",
)


def test_no_command_runs_what_somebody_has_left_in_the_search_path(here: Place, user: str) -> None:
    here.do(*TRAPS)
    try:
        with here.admin() as connection:  # the traps are some
            connection.execute("SELECT 1 FROM pg_class WHERE oid = oid LIMIT 1")
            assert connection.execute("SELECT count(*) > 0 FROM public.caught").fetchone() == (True,)
            connection.execute("DELETE FROM public.caught")
        flags = ["--database", "shop"]
        here.site.run("user", "grant", user, *flags, "--access", "write", "--table", "public.orders", "--apply")
        for command in (
            ["grant", "diff"],
            ["doctor"],
            ["can", user],
            ["who-can", "select", "public.orders", "--database", "shop"],
            ["database", "harden", "shop", "--apply"],
            ["user", "disable", user],
            ["user", "enable", user],
            ["user", "ungrant", user, *flags, "--access", "write", "--apply"],
            ["user", "remove", user, "--yes"],
        ):
            here.site.run(*command, check=False)
        assert here.query("SELECT DISTINCT who FROM public.caught WHERE who = 'postgres'") == []
    finally:
        here.do(
            "SET search_path = pg_catalog",
            "ALTER DATABASE shop RESET search_path",
            "DROP OPERATOR public.= (oid, oid)",
            "DROP FUNCTION public.format(text, name), public.array_to_string(text[], text), public.same(oid, oid)",
            "DROP TABLE public.caught",
        )


DEFAULTS = {
    "client_encoding": "SQL_ASCII",
    "statement_timeout": "1",
    "standard_conforming_strings": "off",
    "quote_all_identifiers": "on",
    "default_transaction_read_only": "on",
    "idle_session_timeout": "1",
}


def test_no_default_of_a_database_stands_in_the_administrators_way(here: Place, user: str) -> None:
    here.site.edit_user(user, roles=("mcp-tools",))
    here.do(*(f"ALTER DATABASE shop SET {name} = {value}" for name, value in DEFAULTS.items()), dbname="other")
    try:
        flags = ("user", "grant", user, "--database", "shop", "--access", "write", "--table", "public.orders")
        here.site.run(*flags, "--apply")
        assert "agree" in here.site.run("grant", "diff").stderr
        assert "Traceback" not in here.site.run("doctor", check=False).stderr
        said = here.site.run("can", user, "update", "public.orders", "--database", "shop").stdout
        assert said.startswith("yes")
        assert user in here.site.run("who-can", "select", "public.orders", "--database", "shop").stdout
        here.site.run("user", "ungrant", user, "--database", "shop", "--apply")
        assert not here.query("SELECT FROM pg_roles WHERE rolname ~ %s", f"^mcp_{user}_", dbname="other")
    finally:
        here.do("ALTER DATABASE shop RESET ALL", dbname="other")


@pytest.mark.parametrize("end", ["remove", "ungrant"])
def test_what_a_user_owned_acts_with_no_rights_once_the_user_is_gone(here: Place, user: str, end: str) -> None:
    here.grant(user, "write", "public.orders")
    reader = here.add(f"l{next(_COUNT)}")
    here.grant(reader, "read", "public.products")
    role = f"mcp_{user}_w"
    here.do(
        f"SET ROLE {role}",
        """CREATE FUNCTION public.boss(text) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS $$
           DECLARE n bigint; BEGIN EXECUTE $1 INTO n; RETURN n; END $$""",
        "CREATE VIEW public.through AS SELECT * FROM public.orders",
        "GRANT SELECT ON public.through TO PUBLIC",
    )
    if end == "remove":
        told = json.loads(here.site.run("user", "remove", user, "--yes", "--json").stdout)
        assert f"{role} owned function public.boss(pg_catalog.text) in shop" in told["owned"]
    else:
        here.ungrant(user)
    assert here.query("SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'boss'") == [("mcp_left",)]
    with here.connect(reader) as connection:
        for statement in (
            "SELECT public.boss('SELECT count(*) FROM public.orders')",
            "SELECT public.boss('SELECT count(*) FROM pg_catalog.pg_authid')",
            "SELECT count(*) FROM public.through",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
    assert here.query("SELECT rolcanlogin, rolsuper FROM pg_roles WHERE rolname = 'mcp_left'") == [(False, False)]
    assert not here.query("SELECT FROM pg_auth_members WHERE 'mcp_left'::regrole IN (roleid, member)")
    here.granting().end(reader, here.dsns)
    here.do("DROP FUNCTION public.boss(text)", "DROP VIEW public.through", "DROP ROLE mcp_left")


@pytest.mark.parametrize("name", ["mcp_logins", "mcp_left"])
def test_a_role_of_our_name_that_is_not_ours_is_left_alone(here: Place, user: str, name: str) -> None:
    if name == "mcp_left":
        here.grant(user, "write", "public.orders")
        here.do(f"CREATE TABLE public.own (n int); ALTER TABLE public.own OWNER TO mcp_{user}_w")
    here.do(f"CREATE ROLE {name}; COMMENT ON ROLE {name} IS 'a DBA''s own'", "CREATE ROLE app LOGIN")
    here.do(f"GRANT {name} TO app")
    with pytest.raises((ConflictError, Error), match=f"role {name} is not mcpctl's"):
        if name == "mcp_left":
            here.granting().end(user, here.dsns)
        else:
            here.grant(user, "read", "public.orders")
    assert here.query("SELECT pg_has_role('app', %s, 'MEMBER')", name) == [(True,)]
    here.do(f"DROP ROLE app, {name}")
    if name == "mcp_left":
        here.granting().end(user, here.dsns)
        here.do("DROP TABLE public.own", "DROP ROLE mcp_left")


def test_what_the_group_of_all_has_is_told_and_does_not_hold_the_last_ungrant_up(here: Place, user: str) -> None:
    here.grant(user, "read", "public.products")
    here.do("GRANT SELECT ON public.orders TO mcp_logins", "GRANT pg_read_all_data TO mcp_logins",
            "CREATE TABLE everybodys (n int); ALTER TABLE everybodys OWNER TO mcp_logins")  # fmt: skip
    done = here.site.run("grant", "diff", check=False)
    assert done.returncode == 1
    for what in (
        "mcp_logins: has a right on table public.orders",
        "mcp_logins: is a member of pg_read_all_data",
        "mcp_logins: owns table public.everybodys",
    ):
        assert what in done.stdout
        assert what in here.site.run("doctor", check=False).stdout
    here.ungrant(user)
    assert here.query("SELECT rolname FROM pg_roles WHERE rolname ~ '^mcp_'") == [("mcp_logins",)]
    here.do("DROP OWNED BY mcp_logins", "REVOKE pg_read_all_data FROM mcp_logins", "DROP ROLE mcp_logins")


def test_a_right_on_a_function_that_was_given_by_hand_is_a_difference(here: Place, user: str) -> None:
    here.grant(user, "read", "public.products")
    here.do(f"GRANT EXECUTE ON FUNCTION pg_ls_dir(text) TO mcp_{user}_r")
    found = here.disagreements(user)
    assert len(found) == 1
    assert (
        f"mcp_{user}_r: has a right on function pg_catalog.pg_ls_dir(pg_catalog.text), which is not recorded"
        in found[0]
    )
    here.grant(user, "read", "public.orders")
    here.ungrant(user, "read", "public.orders")  # it stands in nobody's way
    here.do(found[0].partition("a DBA mends it: ")[2])
    assert here.disagreements(user) == []


def test_a_cluster_that_is_away_keeps_no_other_from_losing_its_logins(here: Place, user: str) -> None:
    here.grant(user, "read", "public.products")
    text = here.config.read_text()
    here.config.write_text(text + "  away: {host: /nonexistent, port: 1, dbname: x, roles: per_user}\n")
    file = here.folder / "admin.dsn"
    lines = file.read_text()
    file.write_text(f"{lines}away: postgresql://postgres@/?host=/nonexistent&port=1\n")
    with here.users.edit() as entries:
        entries[user] = entries[user].with_grant(here.recorded(user).__class__("away", ("*",), passwords={"read": "x"}))
    try:
        done = here.site.run("user", "disable", user, check=False)
        assert (done.returncode, "cannot reach away" in done.stderr) == (1, True)
        assert "the server refuses all of their tokens" in " ".join(done.stderr.split())
        assert here.query("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", f"mcp_{user}_r") == [(False,)]
        gone = here.site.run("user", "remove", user, "--yes", check=False)
        assert gone.returncode == 1
        assert "cannot reach away" in gone.stderr
        assert f"dropped so far: mcp_{user}_r" in gone.stderr
        assert here.query("SELECT FROM pg_roles WHERE rolname = %s", f"mcp_{user}_r") == []
    finally:
        here.config.write_text(text)
        file.write_text(lines)
        with here.users.edit() as entries:
            grants = {name: one for name, one in entries[user].grants.items() if name != "away"}
            entries[user] = entries[user].__class__(user, entries[user].created_at, grants=grants)


def test_what_a_login_role_owns_is_a_difference_until_it_is_somebody_elses(here: Place, user: str) -> None:
    """Who owns a table may do everything with it, whatever was granted."""
    here.grant(user, "read", "public.orders")
    role = f"mcp_{user}_r"
    here.do(f"CREATE TABLE owned (n int); ALTER TABLE owned OWNER TO {role}")
    [told] = [one for one in here.disagreements(user) if ": owns " in one]
    assert told.startswith(f"{role}: owns table public.owned, which is not recorded; a DBA mends it: ALTER table")
    here.do(told.partition("a DBA mends it: ")[2])
    assert here.disagreements(user) == []
    here.do("DROP TABLE owned")


def test_an_ungrant_of_nothing_that_fails_leaves_nothing_to_be_taken_back(here: Place, user: str) -> None:
    here.cluster.stop_server()
    try:
        done = here.site.run("user", "ungrant", user, "--database", "other", "--apply", check=False)
    finally:
        here.cluster.start_server()
    assert (done.returncode, "cannot reach other" in done.stderr) == (1, True)
    assert "other" not in here.granting().user(user).grants
