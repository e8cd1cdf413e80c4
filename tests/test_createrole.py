"""An administrator who is no superuser: a login with CREATEROLE that owns what it grants."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

import pg
from mcpctl.errors import Error
from place import Place, place
from site_of_mcpctl import reload


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("createrole") / "site", request.param) as found:
        yield found


_COUNT = iter(range(1000))


def roles_of(here: Place, user: str) -> list[tuple[str, bool]]:
    """(role, whether it may log in) of a user's login roles."""
    return here.query("SELECT rolname, rolcanlogin FROM pg_roles WHERE rolname ~ %s ORDER BY 1", f"^mcp_{user}_")


@pytest.fixture
def dba(here: Place) -> Iterator[str]:
    """A CREATEROLE login that owns the schema mine and the database's CONNECT, in the place of the superuser."""
    here.do(
        "CREATE ROLE dba LOGIN CREATEROLE PASSWORD 'dba''s own'",
        "CREATE SCHEMA mine AUTHORIZATION dba",
        "GRANT CONNECT ON DATABASE shop TO dba WITH GRANT OPTION",
    )
    with here.admin() as connection:
        connection.execute("SET ROLE dba")
        connection.execute("CREATE TABLE mine.t (id serial, n int)")
    file = here.folder / "admin.dsn"
    before = file.read_text()
    file.write_text(here.cluster.dsn_for("dba", "dba's own", "shop") + "\n")
    yield "dba"
    file.write_text(before)
    here.do(
        "DROP OWNED BY dba CASCADE",
        "DROP ROLE IF EXISTS mcp_logins",
        "DROP ROLE dba",
    )


def test_a_createrole_login_that_owns_the_schema_grants_and_takes_back(here: Place, dba: str) -> None:
    user = here.add(f"v{next(_COUNT)}")
    here.grant(user, "read", "mine")
    assert roles_of(here, user) == [(f"mcp_{user}_r", True)]
    with here.connect(user) as connection:
        assert connection.execute("SELECT n FROM mine.t").fetchall() == []
    here.grant(user, "read", "mine")
    assert here.granting().disagreements(here.granting().user(user), here.recorded(user), here.dsns) == []  # type: ignore[arg-type]
    here.ungrant(user)
    assert roles_of(here, user) == []
    grant = ("user", "grant", user, "--database", "shop", "--table", "mine.t", "--access", "read", "--apply")
    here.do("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC")
    said = " ".join(here.site.run(*grant).stderr.split())
    here.do("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    assert "a superuser runs what this prints: mcpctl database harden shop --print-sql" in said
    here.site.run("user", "disable", user)
    assert roles_of(here, user) == [(f"mcp_{user}_r", False)]
    here.site.run("user", "remove", user, "--yes")
    assert roles_of(here, user) == []


def test_a_createrole_login_that_owns_nothing_of_it_changes_nothing(here: Place, dba: str) -> None:
    user = here.add(f"v{next(_COUNT)}")
    before = here.catalog()
    for target in ("public.orders", "public", "*"):
        with pytest.raises(Error) as caught:
            here.grant(user, "read", target)
        assert caught.value.exit_code == 1, caught.value.message
        assert caught.value.hint
        assert here.catalog() == before
        assert here.recorded(user) is None


def test_a_createrole_login_cannot_say_whether_pg_hba_is_open_and_so_write_is_refused(here: Place, dba: str) -> None:
    user = here.add(f"v{next(_COUNT)}")
    with pytest.raises(Error, match="pg_hba") as caught:
        here.grant(user, "write", "mine")
    for half in ("SELECT ON pg_hba_file_rules", "EXECUTE ON FUNCTION pg_hba_file_rules()"):
        assert f"GRANT {half} TO R;" in str(caught.value.hint)
        assert "databases.shop.allow_open_hba: true" in str(caught.value.hint)
        here.do(f"GRANT {half} TO dba")
        if "SELECT" in half:
            with pytest.raises(Error, match="function pg_hba_file_rules") as caught:
                here.grant(user, "write", "mine")
    done = here.site.run(
        "user", "grant", user, "--database", "shop", "--schema", "mine", "--access", "write", "--apply"
    )
    assert "mcpctl: warning: the administrator may not read pg_hba.conf" in done.stderr
    assert "the administrator may not read pg_hba.conf" in here.site.run("doctor", check=False).stdout
    with here.connect(user, "write") as connection:
        connection.execute("INSERT INTO mine.t (n) VALUES (1)")
    here.ungrant(user)
    assert roles_of(here, user) == []


@pytest.fixture
def writer(here: Place, dba: str) -> Iterator[str]:
    """A user who reads and writes in mine, by grants of the dba's."""
    here.do("GRANT SELECT ON pg_hba_file_rules TO dba", "GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO dba")
    user = here.add(f"v{next(_COUNT)}")
    here.grant(user, "write", "mine")
    yield user
    if user in here.granting().people():
        here.granting().end(user, here.dsns)


def members(here: Place) -> list[tuple[str]]:
    """What the dba is a member of, by its own grant."""
    query = "SELECT roleid::regrole::text FROM pg_auth_members WHERE member = 'dba'::regrole AND grantor = member"
    return here.query(query)


def test_a_createrole_login_ends_the_connections_of_all_roles_and_is_no_member_afterwards(
    here: Place, writer: str
) -> None:
    both = [f"mcp_{writer}_r", f"mcp_{writer}_w"]
    with here.connect(writer) as reads, here.connect(writer, "write") as writes:
        told = json.loads(here.site.run("user", "disable", writer, "--json").stdout)
        assert (told["roles"], told["failed"]) == (both, None)
        for connection in (reads, writes):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    assert roles_of(here, writer) == [(role, False) for role in both]
    assert members(here) == []
    here.site.run("user", "enable", writer)
    with here.connect(writer) as reads:
        assert here.site.run("user", "remove", writer, "--yes").returncode == 0
        with pytest.raises(psycopg.OperationalError):
            reads.execute("SELECT 1")
    assert roles_of(here, writer) == []


def test_what_fails_for_one_role_keeps_no_other_from_its_end_and_is_an_error(here: Place, writer: str) -> None:
    """The reader's role is out of the administrator's hands: somebody has made it a superuser."""
    here.do(f"ALTER ROLE mcp_{writer}_r SUPERUSER")
    try:
        with here.connect(writer) as reads, here.connect(writer, "write") as writes:
            done = here.site.run("user", "disable", writer, "--json", check=False)
            with pytest.raises(psycopg.OperationalError):
                writes.execute("SELECT 1")
            told = json.loads(done.stdout)
            assert (done.returncode, told["roles"]) == (1, [f"mcp_{writer}_w"])
            assert told["failed"]
            said = " ".join(done.stderr.split())
            assert f"error: {writer} is disabled, and the server refuses all of their tokens; but not all of it" in said
            gone = here.site.run("user", "remove", writer, "--yes", check=False)
            said = " ".join(gone.stderr.split())
            assert (gone.returncode, f"mcp_{writer}_r is still connected" in said) == (1, True), said
            assert f"dropped so far: mcp_{writer}_w" in said
            reads.execute("SELECT 1")
        assert roles_of(here, writer) == [(f"mcp_{writer}_r", True)]
    finally:
        here.do(f"ALTER ROLE mcp_{writer}_r NOSUPERUSER")


def test_what_our_own_roles_own_is_no_part_of_a_grant_on_its_schema(here: Place, writer: str) -> None:
    here.do(f"CREATE TABLE mine.own (id serial); ALTER TABLE mine.own OWNER TO mcp_{writer}_w")
    owns = [f"mcp_{writer}_w: owns {what}" for what in ("sequence mine.own_id_seq", "table mine.own")]
    assert [one.partition(",")[0] for one in here.disagreements(writer)] == owns
    here.ungrant(writer, "write")  # mcp_left owns it from now on, and the reader's grant is made anew
    other = here.add(f"v{next(_COUNT)}")
    here.grant(other, "write", "mine")
    assert here.query("SELECT tableowner FROM pg_tables WHERE tablename = 'own'") == [("mcp_left",)]
    for one in (writer, other):
        assert here.disagreements(one) == []
        with here.connect(one) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT FROM mine.own")
    here.do(f"GRANT SELECT ON mine.own TO mcp_{other}_r")  # nor is it taken back
    assert here.disagreements(other) == []
    here.do("DROP TABLE mine.own")
    here.granting().end(other, here.dsns)


def test_the_lines_that_keep_the_login_roles_out_let_the_administrator_in(here: Place, dba: str) -> None:
    """From 16 on, who makes a role is a member of it, and pg_hba.conf counts that."""
    user = here.add(f"v{next(_COUNT)}")
    grant = ("user", "grant", user, "--database", "shop", "--table", "mine.t", "--access", "read", "--apply")
    member = here.cluster.version[0] >= 16
    said = here.site.run(*grant).stderr
    assert ('  local  all  "dba"  scram-sha-256\n' in said) is member
    file = here.cluster.folder / "data" / "pg_hba.conf"
    before = file.read_text()
    try:
        file.write_text(f"local all +mcp_logins reject\n{before}")
        reload(here.cluster)
        done = here.site.run(*grant, check=False)
        assert (done.returncode, "a line of its own, before those of +mcp_logins" in done.stderr) == (
            (1, True) if member else (0, False)
        )
        file.write_text(f'local  all  "dba"  scram-sha-256\nlocal all +mcp_logins reject\n{before}')
        reload(here.cluster)
        here.site.run(*grant)
    finally:
        file.write_text(before)
        reload(here.cluster)
    here.granting().end(user, here.dsns)
