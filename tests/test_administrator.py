"""The administrator and the end of a user: disable, enable, remove, and pg_hba.conf."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

import pg
from mcpctl import keyring
from mcpctl.diagnosis.patient import FAIL, WARN
from mcpctl.errors import ConflictError, NotFoundError
from mcpctl.postgres import administrator
from place import Place, place
from test_doctor import Doctor


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("administrator") / "site", request.param) as found:
        yield found


_COUNT = iter(range(1000))


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    found = here.add(f"v{next(_COUNT)}")
    yield found
    if found in here.granting().people():
        here.granting().end(found, here.dsns)


def roles_of(here: Place, user: str) -> list[tuple[str, bool]]:
    """(role, whether it may log in) of a user's login roles."""
    return here.query("SELECT rolname, rolcanlogin FROM pg_roles WHERE rolname ~ %s ORDER BY 1", f"^mcp_{user}_")


# -- disable, enable, remove --------------------------------------------------------------------------------------


def test_disable_takes_the_login_ends_its_connections_and_enable_gives_it_back(here: Place, user: str) -> None:
    here.grant(user, "write", "public.orders")
    both = [(f"mcp_{user}_r", True), (f"mcp_{user}_w", True)]
    assert roles_of(here, user) == both
    with here.connect(user) as open_one:
        assert "NOLOGIN" in here.site.run("user", "disable", user).stderr
        with pytest.raises(psycopg.OperationalError):
            open_one.execute("SELECT 1")
    assert roles_of(here, user) == [(role, False) for role, _ in both]
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        here.connect(user)
    tried = here.site.run("database", "test", "shop", check=False).stdout  # as the server would, which lets nobody in
    assert (f"mcp_{user}_" in tried, "nobody but disabled users has a grant there" in tried) == (False, True), tried
    assert here.site.run("grant", "diff", "--user", user).returncode == 0
    here.grant(user, "read", "public.customers")  # a grant lets nobody in who is disabled
    assert roles_of(here, user) == [(role, False) for role, _ in both]
    assert "mcp_" in here.site.run("user", "enable", user).stderr
    assert roles_of(here, user) == both
    here.connect(user).close()


def test_disable_goes_on_whatever_is_wrong_with_the_administrators_file(here: Place, user: str) -> None:
    """An incident does not wait until that is mended; to give the right back does."""
    here.grant(user, "read", "public.orders")
    admin = here.config.parent / administrator.FILE
    text = admin.read_text()
    try:
        admin.write_text(f"{text}\ngone: host=/tmp dbname=gone\n")  # as after `mcpctl database remove gone`
        assert f"NOLOGIN: mcp_{user}_r" in here.site.run("user", "disable", user).stderr
        assert here.site.run("user", "enable", user, check=False).returncode == 3
        admin.write_text(text)
        here.site.run("user", "enable", user)
        admin.chmod(0o644)
        said = here.site.run("user", "disable", user)
        assert said.stdout.startswith(f"{user} disabled")
        assert all(part in said.stderr for part in ("has mode 0644", "a DBA runs: ", f'"mcp_{user}_r" NOLOGIN'))
    finally:
        admin.write_text(text)
        admin.chmod(0o600)


def test_disable_finds_a_role_whose_database_is_no_longer_in_the_config(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    text = here.config.read_text()
    here.config.write_text(text.replace("  shop:\n", "  renamed:\n"))
    try:
        for word in ("disable", "enable"):
            said = here.site.run("user", word, user).stderr
            assert f"{user} has a grant in shop, which is not in the config" in said
            assert f"LOGIN: mcp_{user}_r" in said
            assert here.query("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", f"mcp_{user}_r") == [
                (word == "enable",)
            ]
    finally:
        here.config.write_text(text)


def test_a_grant_to_a_disabled_user_by_another_name_of_the_host_keeps_the_password(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.site.run("user", "disable", user)
    here.grant(user, "read", "public.things", database="alias")
    assert here.password(user) == here.password(user, database="alias")


def test_remove_ends_every_role_in_every_database_and_says_what_it_owned(here: Place) -> None:
    user = here.add(f"v{next(_COUNT)}")
    here.grant(user, "write", "public.orders")
    here.grant(user, "read", "public.things", database="other")
    here.do("CREATE DATABASE unknown")
    for dbname in ("shop", "unknown"):
        here.do(f"CREATE TABLE kept (n int); ALTER TABLE kept OWNER TO mcp_{user}_w", dbname=dbname)
    here.do(f"CREATE SCHEMA theirs AUTHORIZATION mcp_{user}_r", dbname="unknown")
    done = here.site.run("user", "remove", user, "--yes", "--json")
    told = json.loads(done.stdout)
    assert sorted(told["roles"]) == [f"mcp_{user}_r", f"mcp_{user}_w"]
    assert sorted(told["owned"]) == [
        f"mcp_{user}_r owned schema theirs in unknown",
        f"mcp_{user}_w owned table public.kept in shop",
        f"mcp_{user}_w owned table public.kept in unknown",
    ]
    assert roles_of(here, user) == []
    assert here.query("SELECT tableowner FROM pg_tables WHERE tablename = 'kept'", dbname="unknown") == [("mcp_left",)]
    assert user not in here.granting().people()
    here.do("DROP TABLE kept")
    here.do("DROP DATABASE unknown")


def test_a_database_that_allows_no_connections_is_named_as_what_keeps_a_role(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.do("CREATE DATABASE shut")
    here.do(f"CREATE TABLE kept (n int); ALTER TABLE kept OWNER TO mcp_{user}_r", dbname="shut")
    here.do("ALTER DATABASE shut ALLOW_CONNECTIONS false")
    try:
        done = here.site.run("user", "remove", user, "--yes", check=False)
        said = " ".join(done.stderr.split())
        assert done.returncode == 1
        assert "stays: it has something in the database shut, which allows no connections" in said
        assert 'ALTER DATABASE "shut" ALLOW_CONNECTIONS true; then mcpctl user remove' in said
    finally:
        here.do("ALTER DATABASE shut ALLOW_CONNECTIONS true")
    gone = json.loads(here.site.run("user", "remove", user, "--yes", "--json").stdout)
    assert gone["owned"] == [f"mcp_{user}_r owned table public.kept in shut"]
    here.do("DROP DATABASE shut")


def test_default_privileges_are_not_told_as_owned(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.do(f"ALTER DEFAULT PRIVILEGES FOR ROLE mcp_{user}_r GRANT SELECT ON TABLES TO PUBLIC")
    assert json.loads(here.site.run("user", "remove", user, "--yes", "--json").stdout)["owned"] == []


def test_remove_ends_a_role_that_may_connect_to_no_database_any_more(here: Place) -> None:
    user = here.add(f"v{next(_COUNT)}")
    here.grant(user, "read", "public.orders")
    here.do(f"REVOKE CONNECT ON DATABASE shop FROM mcp_{user}_r", f"DROP OWNED BY mcp_{user}_r")
    here.site.run("user", "remove", user, "--yes")
    assert roles_of(here, user) == []


def test_remove_without_an_administrator_is_refused_and_changes_nothing(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    file = here.folder / "admin.dsn"
    aside = file.rename(here.folder / "aside")
    try:
        done = here.site.run("user", "remove", user, "--yes", check=False)
        assert done.returncode == 4
        assert f"mcpctl user ungrant {user} --database shop --print-sql" in done.stderr
    finally:
        aside.rename(file)
    assert here.granting().user(user).disabled_at is None
    assert roles_of(here, user) == [(f"mcp_{user}_r", True)]


def test_disable_without_an_administrator_shows_the_sql_that_a_dba_runs(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    aside = (here.folder / "admin.dsn").rename(here.folder / "aside")
    try:
        with here.connect(user) as connection:
            for word, may in (("disable", False), ("enable", True)):
                said = here.site.run("user", word, user).stderr
                assert f"mcpctl: warning: shop: no administrator to {word} the login roles; a DBA runs: " in said
                assert roles_of(here, user) == [(f"mcp_{user}_r", not may)]
                here.do(*said.partition("a DBA runs: ")[2].splitlines()[0].removesuffix(";").split("; "))
                assert roles_of(here, user) == [(f"mcp_{user}_r", may)]
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    finally:
        aside.rename(here.folder / "admin.dsn")


def test_a_removal_that_fails_half_way_says_what_is_done_and_goes_on_when_run_again(here: Place, user: str) -> None:
    here.grant(user, "write", "public.orders")
    here.do(f"CREATE TABLE held (n int); ALTER TABLE held OWNER TO mcp_{user}_w",
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$BEGIN IF EXISTS (SELECT FROM pg_tables WHERE tablename = 'held' AND tableowner = 'mcp_left') THEN"
            " RAISE 'not now'; END IF; END$$",
            "CREATE EVENT TRIGGER refuse ON ddl_command_end EXECUTE FUNCTION refuse()")  # fmt: skip
    try:
        done = here.site.run("user", "remove", user, "--yes", check=False)
    finally:
        here.do("DROP EVENT TRIGGER refuse", "DROP FUNCTION refuse()")
    assert done.returncode == 1
    assert f"{user} is disabled, and not yet removed: shop: not now" in done.stderr
    assert f"dropped so far: mcp_{user}_r; without LOGIN, and still there: mcp_{user}_w" in done.stderr
    assert f"mcpctl user remove {user} --yes again, which goes on from there" in done.stderr
    assert here.granting().user(user).disabled_at is not None
    assert roles_of(here, user) == [(f"mcp_{user}_w", False)]
    here.site.run("user", "remove", user, "--yes")
    assert roles_of(here, user) == []
    here.do("DROP TABLE held")


def test_what_postgresql_warns_of_and_what_is_still_different_is_told(here: Place, user: str) -> None:
    """A policy for the role alone is dropped, of either kind; one for others too is kept with the others."""
    here.grant(user, "read", "public.orders", "public.customers")
    role = f"mcp_{user}_r"
    here.do(f"CREATE POLICY wide ON orders TO {role} USING (true)",
            f"CREATE POLICY narrow ON orders AS RESTRICTIVE TO {role} USING (id > 1)",
            f"CREATE POLICY shared ON orders AS RESTRICTIVE TO {role}, pg_monitor USING (id > 2)",
            f"GRANT pg_monitor TO {role}")  # fmt: skip
    try:
        ungrant = ("user", "ungrant", user, "--database", "shop", "--apply")
        said = here.site.run(*ungrant, "--table", "public.customers").stderr
        assert f"mcpctl: warning: {role}: is a member of pg_monitor, and has its rights; a DBA mends it" in said
        said = here.site.run(*ungrant).stderr
        for name in ("wide", "narrow"):
            told = f"mcpctl: warning: the policy {name} on orders is for {role} alone, and is dropped: a later grant is"
            assert told in said.replace("public.orders", "orders")
        assert "the policy shared on" in said
        assert f"is for {role} among others, and no longer: a later grant is without it" in said
        kept = here.query("SELECT polname, polroles::regrole[]::text FROM pg_policy")
        assert kept == [("shared", "{pg_monitor}")]
        here.grant(user, "read", "public.orders")
        here.do(f"CREATE POLICY alone ON orders TO {role} USING (true)")
        assert "mcpctl: warning: the policy alone on" in here.site.run("user", "remove", user, "--yes").stderr
    finally:
        here.do(*(f"DROP POLICY IF EXISTS {name} ON orders" for name in ("wide", "narrow", "shared", "alone")))


@pytest.mark.parametrize(("what", "state"), [(("--table", "public.orders"), "narrowing"), ((), "revoking")])
def test_an_ungrant_that_fails_says_what_is_so_and_goes_on_when_run_again(
    here: Place, user: str, what: tuple[str, ...], state: str
) -> None:
    here.grant(user, "read", "public.orders", "public.products")
    command = ("user", "ungrant", user, "--database", "shop", *what, "--apply")
    here.cluster.stop_server()
    try:
        for _ in range(2):
            done = here.site.run(*command, check=False)
            assert done.returncode == 1
            assert "cannot reach shop" in done.stderr
            all_of_it = f"the server refuses all of {user}'s calls in shop until PostgreSQL is seen to have it"
            now = all_of_it if what else "the server refuses already what was taken back"
            said = f"; recorded as {state}: {now} (no server runs)"
            assert said in " ".join(done.stderr.split())
            assert "run the same command again, which goes on from there" in " ".join(done.stderr.split())
    finally:
        here.cluster.start_server()
    here.site.run(*command)
    found = here.recorded(user)
    assert (found.read if found else ()) == (("public.products",) if what else ())
    assert here.disagreements(user) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [("orders_id_seq", "a sequence"), ("orders_pkey", "an index"), ("mood", "a type"), ("pair", "a type")],
)
def test_what_is_no_table_is_refused_by_what_it_is(here: Place, user: str, name: str, what: str) -> None:
    here.do("CREATE TYPE mood AS ENUM ('good')", "CREATE TYPE pair AS (a int)")
    try:
        done = here.site.run("user", "grant", user, "--database", "shop", "--table", f"public.{name}",
                             "--access", "read", "--apply", check=False)  # fmt: skip
        assert done.returncode == 4
        assert f"mcpctl: error: shop: public.{name} is {what}, and no table or view" in done.stderr
        assert "its sequences go along with write access to it; nothing was changed" in done.stderr
        assert (roles_of(here, user), here.recorded(user)) == ([], None)
    finally:
        here.do("DROP TYPE mood, pair")


def test_what_owns_something_elsewhere_loses_its_login_when_the_last_grant_ends(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    here.do(f"CREATE TABLE kept (n int); ALTER TABLE kept OWNER TO mcp_{user}_r", dbname="other")
    here.do(f"GRANT pg_read_all_data TO mcp_{user}_r")
    here.ungrant(user)
    assert roles_of(here, user) == [(f"mcp_{user}_r", False)]
    assert here.query("SELECT FROM pg_auth_members WHERE member = %s::regrole", f"mcp_{user}_r") == []
    with pytest.raises(ConflictError, match=f"role mcp_{user}_r is left over from an earlier {user}") as caught:
        here.grant(user, "read", "public.orders")
    assert f'DROP OWNED BY "mcp_{user}_r"' in (caught.value.hint or "")
    assert (here.recorded(user), roles_of(here, user)) == (None, [(f"mcp_{user}_r", False)])
    strays = here.site.run("grant", "diff", check=False)
    assert f"mcp_{user}_r: is there, and no grant needs it" in strays.stdout
    here.do(f"DROP OWNED BY mcp_{user}_r", dbname="other")
    here.do(f"DROP ROLE mcp_{user}_r")


def test_remove_ends_a_role_that_no_grant_needs_too_and_warns_of_what_it_cannot_see(here: Place) -> None:
    user = here.add("max")
    here.grant(user, "read", "public.orders")
    here.do("CREATE TABLE kept (n int); ALTER TABLE kept OWNER TO mcp_max_r", dbname="other")
    here.ungrant(user)
    text = here.config.read_text()
    here.config.write_text(text + "  away: {host: /nonexistent, port: 1, dbname: x, roles: per_user}\n")
    file = here.folder / "admin.dsn"
    lines = file.read_text()
    file.write_text(f"{lines}away: postgresql://postgres@/?host=/nonexistent&port=1\n")
    try:
        done = here.site.run("user", "remove", user, "--yes")
    finally:
        here.config.write_text(text)
        file.write_text(lines)
    assert "role mcp_max_r dropped" in done.stdout
    assert "cannot reach away" in done.stderr
    assert "whether max has left a role there was not seen" in " ".join(done.stderr.split())
    assert roles_of(here, user) == []
    here.do("DROP TABLE kept", "DROP ROLE mcp_left", dbname="other")


def test_what_somebody_took_out_of_the_file_by_hand_is_not_taken_over_by_the_next_of_that_name(here: Place) -> None:
    user = here.add("kim")
    here.grant(user, "read", "public.orders")
    with here.users.edit() as entries:
        del entries[user]
    here.add(user)
    with pytest.raises(ConflictError, match="role mcp_kim_r is left over from an earlier kim"):
        here.grant(user, "read", "public.customers")
    printed = here.granting().printed(user, "shop", lambda old: old.more("read", ("public.orders",)))[1]
    with pytest.raises(psycopg.Error, match="is left over"):
        here.do(printed)
    here.do("DROP OWNED BY mcp_kim_r", "DROP ROLE mcp_kim_r")
    here.psql(printed)
    here.psql(printed)  # run twice, it changes nothing
    here.grant(user, "read", "public.things", database="other")
    assert here.disagreements(user) == []
    here.granting().end(user, here.dsns)


def test_what_was_not_yet_taken_back_may_be_granted_again(here: Place, user: str) -> None:
    here.grant(user, "write", "public.orders")
    here.granting().printed(user, "shop", lambda old: old.less("write", ()))
    here.grant(user, "write", "public.orders")
    assert here.disagreements(user) == []
    here.ungrant(user, "write")
    assert set(here.recorded(user).passwords) == {"read"}  # type: ignore[union-attr]


# -- pg_hba.conf --------------------------------------------------------------------------------------------------


def test_write_is_refused_while_pg_hba_lets_the_roles_in_and_names_the_line(here: Place, user: str) -> None:
    file = here.cluster.folder / "data" / "pg_hba.conf"
    kept = file.read_text()
    without = "".join(line for line in kept.splitlines(keepends=True) if "mcp_logins" not in line)
    grant = ("user", "grant", user, "--database", "shop", "--schema", "public", "--access")
    try:
        file.write_text(without)
        here.do("SELECT pg_reload_conf()")
        before = here.catalog()
        done = here.site.run(*grant, "write", "--apply", check=False)
        number = 1 + next(i for i, line in enumerate(without.splitlines()) if line.startswith("local"))
        assert done.returncode == 5, done.stderr
        assert f"line {number}: local all all" in done.stderr
        assert "allow_open_hba: true" in done.stderr
        assert (here.catalog(), here.recorded(user)) == (before, None)
        read = here.site.run(*grant, "read", "--apply").stderr.splitlines()
        lines = [line.strip() for line in read if line.startswith("  ")]
        assert lines == ["local  all  +mcp_logins  scram-sha-256", "host  all  +mcp_logins  all  reject"]
        file.write_text("\n".join([*lines, without]))
        here.do("SELECT pg_reload_conf()")
        here.site.run(*grant, "write", "--apply")
        here.ungrant(user, "write")
        file.write_text("\n".join([*lines[:1], without]))  # the half of it is not enough
        here.do("SELECT pg_reload_conf()")
        with pytest.raises(ConflictError, match="host"):
            here.grant(user, "write", "public")
    finally:
        file.write_text(kept)
        here.do("SELECT pg_reload_conf()")


def test_write_works_with_an_open_pg_hba_where_the_config_says_so(here: Place, user: str) -> None:
    file, config = here.cluster.folder / "data" / "pg_hba.conf", here.config.read_text()
    kept = file.read_text()
    try:
        file.write_text("".join(line for line in kept.splitlines(keepends=True) if "mcp_logins" not in line))
        here.config.write_text(config.replace("roles: per_user", "roles: per_user\n    allow_open_hba: true"))
        here.do("SELECT pg_reload_conf()")
        here.grant(user, "write", "public.orders")
        with here.connect(user, "write") as connection:
            connection.execute("DELETE FROM orders WHERE id = -1")
    finally:
        file.write_text(kept)
        here.config.write_text(config)
        here.do("SELECT pg_reload_conf()")


def test_without_an_administrator_only_printing_works(here: Place, user: str) -> None:
    with pytest.raises(NotFoundError, match="no administrator"):
        administrator.Administrator.of({"shop": "host=a"}, here.granting().logins.host("other"))
    aside = (here.folder / "admin.dsn").rename(here.folder / "aside")
    what = ("user", "grant", user, "--database", "other", "--access", "read")
    try:
        done = here.site.run(*what, "--apply", check=False)
        printed = here.site.run(*what, "--print-sql").stdout
    finally:
        aside.rename(here.folder / "admin.dsn")
    assert (done.returncode, "no administrator" in done.stderr) == (4, True)
    here.psql(printed, "other")
    with here.connect(user, database="other") as connection:
        assert connection.execute("SELECT what FROM things").fetchall() == []


def test_an_administrators_wrong_password_is_told_without_it(here: Place, user: str) -> None:
    file = here.folder / "admin.dsn"
    before = file.read_text()
    file.write_text(here.cluster.dsn_for("postgres", "wrong-and-secret", "shop") + "\n")
    try:
        done = here.site.run(
            "user", "grant", user, "--database", "shop", "--table", "public.orders", "--access", "read", "--apply",
            check=False,
        )  # fmt: skip
    finally:
        file.write_text(before)
    assert done.returncode == 1
    assert "password authentication failed" in done.stderr
    assert "wrong-and-secret" not in done.stderr
    assert here.recorded(user) is None


def test_no_password_is_sealed_with_another_key_than_the_others(here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    file = here.folder / "secret.key"
    right = file.read_text()
    file.write_text(keyring.new_key() + "\n")
    try:
        for access, table in (("write", "public.orders"), ("write", "public.customers")):
            wanted = ("user", "grant", user, "--database", "shop", "--table", table, "--access", access, "--apply")
            done = here.site.run(*wanted, check=False)
            assert (done.returncode, f"{file} holds another key than users.yaml: the" in done.stderr) == (3, True)
    finally:
        file.write_text(right)
    assert here.recorded(user).write == ()  # type: ignore[union-attr]
    assert roles_of(here, user) == [(f"mcp_{user}_r", True)]


def test_the_doctor_tells_a_stray_also_where_a_database_of_its_cluster_does_not_answer(here: Place) -> None:
    doctor, text = Doctor(here), here.config.read_text()
    here.do("CREATE ROLE mcp_stray_r", f"COMMENT ON ROLE mcp_stray_r IS '{here.granting().mark('stray')}'")
    try:
        for gone, tells in (("shop", "other"), ("other", "shop")):
            here.config.write_text(text.replace(f"dbname: {gone}\n", "dbname: gone\n", 1))
            found = [(one.status, one.check, one.what) for one in doctor.findings()]
            assert (WARN, f"database {tells}", "mcp_stray_r: is there, and no grant needs it") in found
            missed = {check for status, check, what in found if status == FAIL and "cannot reach" in what}
            assert missed == {f"database {gone}"}
    finally:
        here.config.write_text(text)
        here.do("DROP ROLE mcp_stray_r")
