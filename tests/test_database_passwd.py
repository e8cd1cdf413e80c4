"""mcpctl database passwd: what a leaked password of a database opens afterwards, what the callers see of it, and what
is left where it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl import config as configuration
from mcpctl import private_file
from mcpctl.errors import Error, FullError
from mcpctl.identity import users
from mcpctl.keyring import Keyring, is_sealed
from mcpctl.postgres import passwords, scram
from mcpctl.postgres.administrator import Administrator
from mcpctl.renewing import Renewing
from site_of_mcpctl import PASSWORD, READER, in_background

ROLE = "mcp_alice_r"


def kept(found: site.Site, user: str | None = None, access: str = "read") -> str:
    """The password of the shop's login, or of a user's, as it is kept now."""
    text = (found.folder / "shop.password").read_text().strip()
    if user is not None:
        text = users.user_file(found.folder / "users.yaml").current()[user].grants["shop"].passwords[access]
    return Keyring(found.folder / "secret.key").open(text, "it") if is_sealed(text) else text


def lets_in(shop: site.Shop, role: str, password: str) -> bool:
    try:
        shop.login(role, password).close()
    except psycopg.OperationalError:
        return False
    return True


def last(found: site.Site) -> dict[str, object]:
    return [line for line in found.audit() if line["event"] == "config.database_password"][-1]


@pytest.fixture
def leaked(newest_shop: site.Shop, tmp_path: Path) -> Iterator[site.Site]:
    """A server with one login for all, whose password a stranger has; PostgreSQL has that one again at the end."""
    found = site.Site(tmp_path / "site", newest_shop)
    private_file.create(found.folder / "admin.dsn", found.admin_dsn().encode())
    try:
        yield found
    finally:
        found.stop()
        with newest_shop.admin() as connection:
            connection.execute(passwords.change(READER, scram.verifier(READER, PASSWORD)).encode())


def test_a_leaked_password_opens_nothing_any_more_and_whoever_was_in_with_it_is_thrown_out(
    leaked: site.Site, newest_shop: site.Shop
) -> None:
    _, text = leaked.token()
    leaked.start()
    stranger = newest_shop.login(READER, PASSWORD)
    with leaked.client(text) as client, leaked.client(text) as other:
        assert client.rows("SELECT 1") == [[1]]
        slow = in_background(other.error, "SELECT pg_sleep(60)")
        site.eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(60)%' AND state = 'active'"))
        done = leaked.run("database", "passwd", "shop", "--apply")
        said = "the password of the database's login was changed while the call ran"
        assert slow.result() == f"{said}\nHint: your token is fine; ask again"
        assert client.rows("SELECT 2") == [[2]]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{READER} has a new password in shop, sealed in {leaked.folder / 'shop.password'}"
    assert lines[1].endswith(f"connections of {READER}; cut: 1 query, 0 backends left")
    pid = stranger.info.backend_pid
    assert [line.partition(",")[0] for line in lines[2:]] == ["ended"]
    assert f"not closed by the server: pid {pid}, no name, from a socket, since " in lines[2]
    assert "held it as plain text before" in done.stderr
    with pytest.raises(psycopg.OperationalError):
        stranger.execute("SELECT 1")
    assert not lets_in(newest_shop, READER, PASSWORD)
    new = kept(leaked)
    assert len(new) == 43
    assert lets_in(newest_shop, READER, new)
    line = last(leaked)
    assert (line["database"], f"pid {pid}" in str(line["reason"])) == ("shop", True)
    everywhere = newest_shop.cluster.log() + done.stdout + done.stderr + json.dumps(leaked.audit())
    assert new not in everywhere + "".join(leaked.stderr)
    again = json.loads(leaked.run("database", "passwd", "shop", "--apply", "--json").stdout)
    row = again["roles"][0]
    assert (row["role"], row["logs_in"], row["others"], row["were_plain"]) == (READER, True, [], [])
    assert kept(leaked) != new


def test_a_dba_runs_the_sql_and_the_new_password_counts_when_it_has_run(
    leaked: site.Site, newest_shop: site.Shop
) -> None:
    stranger = newest_shop.login(READER, PASSWORD)
    (leaked.folder / "admin.dsn").unlink()
    early = leaked.run("database", "passwd", "shop", "--done", check=False)
    assert (early.returncode, early.stderr.splitlines()[0]) == (5, f"mcpctl: error: no SQL was printed for {READER}")
    assert leaked.run("database", "passwd", "shop", "--apply", check=False).returncode == 4
    printed = leaked.run("database", "passwd", "shop")
    assert "SCRAM-SHA-256$4096:" in printed.stdout
    assert f"mcpctl database passwd shop --done --config {leaked.config}" in printed.stderr
    assert leaked.run("database", "passwd", "shop").stdout == printed.stdout
    assert kept(leaked) == PASSWORD
    leaked.run("key", "rotate")
    too_early = leaked.run("database", "passwd", "shop", "--done", check=False)
    assert (too_early.returncode, "does not take the new password" in too_early.stderr) == (1, True)
    with newest_shop.admin() as connection:
        connection.execute(printed.stdout.encode())
    with pytest.raises(psycopg.OperationalError):
        stranger.execute("SELECT 1")
    done = leaked.run("database", "passwd", "shop", "--done")
    assert "no server runs" in done.stdout
    assert lets_in(newest_shop, READER, kept(leaked))
    assert not lets_in(newest_shop, READER, PASSWORD)
    assert [path.name for path in leaked.folder.glob("*.new.password")] == []


def test_what_fails_changes_nothing_and_what_was_killed_is_finished_by_the_next_run(
    leaked: site.Site, newest_shop: site.Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = configuration.load(leaked.config, {})
    renewing = Renewing(settings, Keyring(settings.keyring.file), "me")
    one = renewing.of_config("shop", service=False)
    who = Administrator.of({"shop": leaked.admin_dsn()}, one.login)
    with monkeypatch.context() as patched:
        patched.setattr(private_file.Edit, "replace", full)
        with pytest.raises(FullError):
            renewing.apply(one, who, None)
    assert kept(leaked) == PASSWORD
    assert lets_in(newest_shop, READER, PASSWORD)
    with monkeypatch.context() as patched:
        patched.setattr(passwords, "change", lambda role, verifier: "SELECT 1/0")
        with pytest.raises(Error, match="division by zero"):
            renewing.apply(one, who, None)
    assert kept(leaked) == PASSWORD
    with monkeypatch.context() as patched:
        patched.setattr(passwords, "change", lambda role, verifier: BAD_AT_COMMIT + change(role, verifier))
        with pytest.raises(Error, match="duplicate key"):
            renewing.apply(one, who, None)
    assert kept(leaked) == PASSWORD
    assert lets_in(newest_shop, READER, PASSWORD)
    # killed after the file was replaced, and before the COMMIT
    (leaked.folder / "shop.password").write_text(Keyring(settings.keyring.file).seal("which PostgreSQL has not") + "\n")
    leaked.run("database", "passwd", "shop", "--apply")
    assert lets_in(newest_shop, READER, kept(leaked))
    given = "given by a vault, 24 characters"
    leaked.run("database", "passwd", "shop", "--apply", "--password-file", "-", input=given + "\n")
    assert (kept(leaked), lets_in(newest_shop, READER, given)) == (given, True)


change = passwords.change
BAD_AT_COMMIT = """CREATE TEMP TABLE twice (a int UNIQUE DEFERRABLE INITIALLY DEFERRED);
INSERT INTO twice VALUES (1), (1);
"""


def full(*_: object, **__: object) -> None:
    raise FullError("no room", "make room")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["shop", "--apply", "--done"], 2, "exclude each other"),
        (["shop", "--apply", "--user", "alice", "--all-users"], 2, "exclude each other"),
        (["shop", "--apply", "--user", "alice"], 2, "all users share one login"),
        (["shop", "--apply", "--all-users"], 2, "all users share one login"),
        (["shop", "--apply", "--service"], 2, "all share one login"),
        (["nothing", "--apply"], 4, "nothing"),
        (["shop", "--password-file", "-"], 2, "at least 15 characters"),
        (["bare", "--apply"], 3, "databases.bare has no password_file"),
        (["super", "--apply"], 5, "is the role that admin.dsn logs in as"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_changed(
    refusing: site.Site, arguments: list[str], code: int, said: str
) -> None:
    before = {path.name: path.read_bytes() for path in refusing.folder.glob("*.password")}
    done = refusing.run("database", "passwd", *arguments, check=False, input="short\n")
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert {path.name: path.read_bytes() for path in refusing.folder.glob("*.password")} == before


@pytest.fixture(scope="module")
def refusing(newest_shop: site.Shop, tmp_path_factory: pytest.TempPathFactory) -> site.Site:
    """A site with a database whose login has no password of ours, and one that logs in as the administrator."""
    place = f"host: {newest_shop.cluster.host}, port: {newest_shop.cluster.port}, dbname: postgres"
    more = f"  bare: {{{place}, user: nobody}}\n"
    more += f"  super: {{{place}, user: postgres, password_file: super.password}}\n"
    found = site.Site(tmp_path_factory.mktemp("refusing") / "site", newest_shop, database=more)
    for name, text in (("admin.dsn", found.admin_dsn()), ("super.password", newest_shop.cluster.superuser_password)):
        private_file.create(found.folder / name, text.encode())
    return found


def test_all_databases_that_share_a_role_get_its_new_password_and_so_does_the_service_login(
    leaked: site.Site, newest_shop: site.Shop
) -> None:
    place = f"host: {newest_shop.cluster.host}, port: {newest_shop.cluster.port}"
    dsn = f"host={newest_shop.cluster.host} port={newest_shop.cluster.port} dbname=template1 user={READER}"
    leaked.config.write_text(
        leaked.config.read_text()
        + f"  twin: {{{place}, dbname: postgres, user: {READER}, password_file: twin.password}}\n"
        f"  team: {{{place}, dbname: template1, roles: per_user, service_dsn: '{dsn}',"
        f" service_password_file: team.password}}\n"
    )
    for name in ("twin", "team"):
        private_file.create(leaked.folder / f"{name}.password", f"{PASSWORD}\n".encode())
    row = json.loads(leaked.run("database", "passwd", "team", "--service", "--apply", "--json").stdout)["roles"][0]
    assert row["databases"] == ["team", "shop", "twin"]
    sealed = {(leaked.folder / f"{name}.password").read_text() for name in ("shop", "twin", "team")}
    assert len(sealed) == 1
    assert lets_in(newest_shop, READER, kept(leaked))
    refused = leaked.run("database", "test", check=False).stdout  # it has no right there, and the right password
    assert refused.count("permission denied for database") == 2


@pytest.mark.newest
def test_the_login_roles_of_one_user_or_of_all_get_new_passwords_while_they_call(
    login_shop: site.Shop, tmp_path: Path
) -> None:
    found = site.Site(tmp_path / "site", login_shop, per_user=True, database="    allow_open_hba: true\n")
    for user, access in (("alice", "read"), ("alice", "write"), ("bob", "read")):
        found.grant(user, "--table", "public.orders", access=access)
    names = {"alice": ("read", "write"), "bob": ("read",)}
    before = {(user, access): kept(found, user, access) for user in names for access in names[user]}
    _, text = found.token()
    found.start()
    try:
        with found.client(text) as client:
            assert client.rows("SELECT current_user") == [[ROLE]]
            done = found.run("database", "passwd", "shop", "--user", "alice", "--apply")
            assert f"{ROLE} has a new password in shop, sealed in {found.folder / 'users.yaml'}" in done.stdout
            assert "mcp_alice_w has a new password" in done.stdout
            assert client.rows("SELECT current_user") == [[ROLE]]
            assert kept(found, "bob") == before["bob", "read"]
            every = json.loads(found.run("database", "passwd", "shop", "--all-users", "--apply", "--json").stdout)
            assert [row["role"] for row in every["roles"]] == [ROLE, "mcp_alice_w", "mcp_bob_r"]
            assert client.rows("SELECT current_user") == [[ROLE]]
        for (user, access), old in before.items():
            role = f"mcp_{user}_{access[0]}"
            assert not lets_in(login_shop, role, old)
            assert lets_in(login_shop, role, kept(found, user, access))
        assert found.run("grant", "diff").returncode == 0
        with login_shop.admin() as connection:
            connection.execute(f"COMMENT ON ROLE {ROLE} IS 'somebody else''s'")
        mixed = found.run("database", "passwd", "shop", "--all-users", "--apply", check=False)
        assert (mixed.returncode, f"role {ROLE} is not of this mcpctl" in mixed.stderr) == (5, True)
        assert "mcp_bob_r has a new password" in mixed.stdout
    finally:
        found.stop()
        with login_shop.admin() as connection:
            for role in (ROLE, "mcp_alice_w", "mcp_bob_r"):
                connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
