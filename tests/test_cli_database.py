"""mcpctl database: passwords from a prompt, a file and stdin, sealed; what is refused, and what it leaves."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

import site_of_mcpctl as site
from command_line import Done, Home, on_a_terminal, run
from mcpctl import private_file
from mcpctl.cli import init
from mcpctl.keyring import Keyring, is_sealed
from site_of_mcpctl import PASSWORD, READER, environment, starter

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
NOBODY = 65534


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation whose config has comments."""
    found = Home(tmp_path / "home")
    text = "# ours\ndatabases:\n  # the first\n  first: {host: /nonexistent, user: u}  # kept\n\n# the end\n"
    found.config.write_text(text)
    return found


def where(shop: site.Shop) -> list[str]:
    return ["--host", shop.cluster.host, "--port", str(shop.cluster.port), "--dbname", "shop", "--user", READER]


def add(home: Home, shop: site.Shop, *more: str, **options: str) -> Done:
    return home("database", "add", "sales", *where(shop), *more, **options)


def sealed(home: Home) -> str:
    """The password of sales, opened."""
    path = home.folder / "sales.password"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text().strip()
    assert is_sealed(text)
    return Keyring(home.folder / "secret.key").open(text, "it")


def unchanged(home: Home, before: dict[str, bytes]) -> bool:
    """Whether nothing but the audit log is as it was."""
    now = home.files()
    return all(now.get(name) == before.get(name) for name in {*now, *before} if "audit.jsonl" not in name)


# -- add ----------------------------------------------------------------------------------------------------------


def test_a_password_from_a_file_or_stdin_is_tried_and_sealed(home: Home, newest_shop: site.Shop) -> None:
    plain = home.folder.parent / "given"
    plain.touch(0o600)
    plain.write_text(f"{PASSWORD}\n")
    done = add(home, newest_shop, "--password-file", str(plain), "--description", "what was sold")
    assert done.good == "sales added (sealed)\n"
    assert sealed(home) == PASSWORD
    text = home.config.read_text()
    assert [line for line in text.splitlines() if "#" in line] == [
        "# ours", "  # the first", "  first: {host: /nonexistent, user: u}  # kept", "# the end",
    ]  # fmt: skip
    assert stat.S_IMODE(home.config.stat().st_mode) == 0o600
    assert home("database", "test", "sales").good.startswith(f"sales\t{READER}\tyes\tPostgreSQL ")
    home("database", "remove", "sales", "--yes").good  # noqa: B018 - that it is good
    assert not (home.folder / "sales.password").exists()
    assert add(home, newest_shop, "--password-file", "-", stdin=f"{PASSWORD}\n").good.endswith("(sealed)\n")
    assert sealed(home) == PASSWORD
    events = [json.loads(line)["event"] for line in (home.folder / "audit.jsonl").read_text().splitlines()]
    assert events == ["config.database_added", "config.database_removed", "config.database_added"]


def test_a_password_from_a_prompt_is_not_shown(home: Home, newest_shop: site.Shop) -> None:
    arguments = ["--config", str(home.config), "database", "add", "sales", *where(newest_shop), "--ask-password"]
    done = on_a_terminal(arguments, answers=[("password for sales:", f"{PASSWORD}\n")])
    assert done.code == 0, done
    assert "sales added (sealed)" in done.out
    assert PASSWORD not in done.out
    assert sealed(home) == PASSWORD


def test_what_doctor_says_of_a_plain_password_leads_to_a_sealed_one(home: Home, newest_shop: site.Shop) -> None:
    kept, moved = home.folder / "sales.password", home.folder.parent / "moved"
    assert add(home, newest_shop, "--password-file", "-", stdin=PASSWORD).code == 0
    kept.write_text(PASSWORD)
    kept.chmod(0o644)
    assert f"chmod 0600 {kept}" in home("doctor").out
    kept.chmod(0o600)
    assert "move it to another FILE; mcpctl database remove sales; mcpctl database add sales" in home("doctor").out
    kept.rename(moved)
    assert home("database", "remove", "sales", "--yes").code == 0
    assert add(home, newest_shop, "--password-file", str(moved)).good == "sales added (sealed)\n"
    assert sealed(home) == PASSWORD


def test_a_password_that_waits_for_a_dba_goes_with_its_database(home: Home, newest_shop: site.Shop) -> None:
    assert add(home, newest_shop, "--password-file", "-", stdin=PASSWORD).code == 0
    assert home("database", "passwd", "sales").code == 0
    assert (home.folder / "sales.new.password").exists()
    assert home("database", "remove", "sales", "--yes").code == 0
    assert not [path for path in home.folder.iterdir() if path.name.startswith("sales.")]


def test_a_database_without_a_login_yet_is_looked_for_by_the_administrator(home: Home, newest_shop: site.Shop) -> None:
    cluster = newest_shop.cluster
    per_user = ["--host", cluster.host, "--port", str(cluster.port), "--roles", "per_user", "--dbname"]
    blind = home("database", "add", "sales", *per_user, "shopp")
    assert (blind.code, "nobody has looked whether sales is there" in blind.err) == (0, True)
    assert home("database", "remove", "sales", "--yes").code == 0
    admin = f"{cluster.dsn_for('postgres', cluster.superuser_password, 'postgres')}\n"
    private_file.create(home.folder / "admin.dsn", f"sales: {admin}later: {admin}".encode())
    before = home.files()
    refused = home("database", "add", "sales", *per_user, "shopp")
    assert (refused.code, 'database "shopp" does not exist' in refused.error) == (1, True)
    assert unchanged(home, before)
    seen = home("database", "add", "sales", *per_user, "shop")
    assert (seen.code, "nobody has looked" in seen.err) == (0, False), seen.err


def test_a_wrong_password_stores_nothing(home: Home, newest_shop: site.Shop) -> None:
    before = home.files()
    done = add(home, newest_shop, "--password-file", "-", stdin="wrong and secret\n")
    assert done.code == 1
    assert "password authentication failed" in done.error
    assert "wrong and secret" not in done.err
    assert unchanged(home, before)
    done = add(home, newest_shop)
    assert (done.code, "takes one with --ask-password, or --password-file FILE" in done.error) == (1, True)
    assert add(home, newest_shop, "--password-file", "-", "--no-test", stdin="not tried\n").code == 0
    assert sealed(home) == "not tried"


@pytest.mark.parametrize(
    ("more", "stdin", "code", "why"),
    [
        (["--password-file", "-", "--ask-password"], "x", 2, "exclude each other"),
        (["--ask-password"], "x", 2, "needs a terminal"),
        (["--password-file", "-"], "\n", 2, "is empty"),
        (["--service-dsn", "host=x"], "", 2, "is for --roles per_user"),
        (["--dsn", "host=x user=y"], "", 3, "dsn"),
        (["--password-file", "/nonexistent"], "", 3, "there is no file"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    home: Home, newest_shop: site.Shop, more: list[str], stdin: str, code: int, why: str
) -> None:
    before = home.files()
    done = add(home, newest_shop, *more, stdin=stdin)
    assert (done.code, why in done.error) == (code, True), done.error
    assert unchanged(home, before)


@pytest.mark.parametrize(("name", "why"), [("own", "own cannot be"), ("Sales", "that cannot be")])
def test_a_name_that_means_something_else_or_nothing_is_refused(home: Home, name: str, why: str) -> None:
    before = home.files()
    done = home("database", "add", name, "--host", "db.example.org", "--no-test")
    assert (done.code, f"{why} a database's name" in done.error) == (2, True), done.error
    assert unchanged(home, before)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://reader:hunter2@db.example.org/sales",
        "host=db.example.org user=reader password=hunter2",
        "postgresql://reader@db.example.org/sales?password=hunter2",
        "host=db.example.org user=reader sslpassword=hunter2",
    ],
)
def test_a_dsn_with_a_password_is_refused_and_not_repeated(home: Home, dsn: str) -> None:
    before = home.files()
    for option in (["--dsn", dsn], ["--service-dsn", dsn, "--roles", "per_user", "--host", "db.example.org"]):
        done = home("database", "add", "sales", *option, "--no-test")
        assert done.code == 3
        assert "password" in done.error
        assert "hunter2" not in done.err
        assert unchanged(home, before)


def test_a_superusers_login_is_refused_with_the_sql_that_makes_a_better_one(home: Home, newest_shop: site.Shop) -> None:
    cluster = newest_shop.cluster
    before = home.files()
    done = home(
        "database", "add", "sales", "--host", cluster.host, "--port", str(cluster.port), "--dbname", "shop",
        "--user", "postgres", "--password-file", "-", stdin=cluster.superuser_password,
    )  # fmt: skip
    assert done.code == 1
    assert "can become a superuser" in done.error
    assert unchanged(home, before)
    lines = [line.strip() for line in done.err.splitlines() if line.strip().endswith(";")]
    with newest_shop.admin() as connection:
        try:
            for line in lines:
                connection.execute(line.encode())
            connection.execute("ALTER ROLE mcp_reader PASSWORD 'a better one'")
            login = [*where(newest_shop)[:-1], "mcp_reader"]
            good = home("database", "add", "sales", *login, "--password-file", "-", stdin="a better one\n")
            assert good.code == 0, good.err
        finally:
            connection.execute("DROP OWNED BY mcp_reader")
            connection.execute("DROP ROLE mcp_reader")


@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer"])
def test_a_remote_host_without_tls_is_refused(home: Home, sslmode: str) -> None:
    before = home.files()
    done = home("database", "add", "sales", "--host", "192.0.2.1", "--user", "u", "--sslmode", sslmode, "--no-test")
    assert done.code == 3
    assert "in clear" in done.error
    assert unchanged(home, before)


def test_a_name_that_is_taken_or_none_is_refused(home: Home, newest_shop: site.Shop) -> None:
    before = home.files()
    assert home("database", "add", "first", "--host", "/x", "--user", "u", "--no-test").code == 5
    assert home("database", "add", "No Name", "--host", "/x", "--user", "u", "--no-test").code == 2
    assert unchanged(home, before)
    private_file.create(home.folder / "sales.password", b"somebody's own\n")
    done = add(home, newest_shop, "--password-file", "-", stdin=PASSWORD)
    assert done.code == 5
    assert (home.folder / "sales.password").read_bytes() == b"somebody's own\n"


def test_a_config_that_cannot_be_read_is_left_as_it_is(home: Home) -> None:
    home.config.write_text("databases: {first: {host: /x, user: u}}\nserver: &anchor {port: 1}\n")
    before = home.files()
    assert home("database", "add", "sales", "--host", "/x", "--user", "u", "--no-test").code == 3
    assert unchanged(home, before)


def test_flags_that_make_no_config_are_told_of_and_not_lines_that_nobody_has(home: Home) -> None:
    before = home.files()
    done = home("database", "add", "sales", "--host", "/nonexistent", "--roles", "some", "--max-rows", "0", "--no-test")
    assert done.code == 3
    assert "with this change the configuration is not in order:\n  databases.sales.roles: " in done.err
    assert "\n  databases.sales.limits.max_rows: " in done.err
    assert "nothing was written" in done.err
    assert "config.yaml" not in done.err
    assert unchanged(home, before)


def test_the_form_of_the_file_stays(home: Home) -> None:
    form = (
        "---\r\n# ours\r\ndatabases:\r\n    first:\r\n        host: /nonexistent\r\n        roles: per_user\r\n"
        "        settings:\r\n          - work_mem\r\n          - jit  # kept\r\n"
    )
    home.config.write_bytes(form.encode())
    done = home("database", "add", "sales", "--host", "/nonexistent", "--no-test", "--max-rows", "5")
    assert done.code == 0, done.err
    added = "    sales:\r\n        host: /nonexistent\r\n        limits:\r\n            max_rows: 5\r\n"
    assert home.config.read_bytes().decode() == form + added


def test_a_second_name_of_a_tenants_database_is_known_by_what_answers(
    home: Home, newest_shop: site.Shop, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.symlink_to(newest_shop.cluster.host)
    login = [*where(newest_shop)[2:], "--password-file", "-"]
    add(home, newest_shop, "--password-file", "-", stdin=PASSWORD)
    assert home("tenant", "add", "lost", "--database", "first").good
    assert home("tenant", "add", "acme", "--database", "sales").code == 0
    before = home.files()
    done = home("database", "add", "mine", "--host", str(again), *login, stdin=PASSWORD)
    assert (done.code, "the same as sales, where the tenant acme has the database sales" in done.error) == (5, True)
    assert "nobody could see whether mine is in PostgreSQL the same as first" in done.err
    assert unchanged(home, before)
    assert home("tenant", "remove", "acme", "--yes").code == 0
    assert home("database", "add", "mine", "--host", str(again), *login, stdin=PASSWORD).code == 0
    done = home("tenant", "add", "acme", "--database", "sales")
    assert (done.code, "sales is in PostgreSQL the same as mine" in done.error) == (5, True)


# -- list, test, remove, harden -----------------------------------------------------------------------------------


def test_list_and_test_show_no_password_and_test_exits_one_where_one_does_not_answer(
    home: Home, newest_shop: site.Shop
) -> None:
    add(home, newest_shop, "--password-file", "-", "--max-rows", "7", stdin=PASSWORD)
    listed = {row["name"]: row for row in json.loads(home("database", "list", "--json").good)["databases"]}
    assert (listed["sales"]["user"], listed["sales"]["max_rows"]) == (READER, 7)
    assert set(listed) == {"first", "sales"}
    done = home("database", "test", "--json")
    assert done.code == 1
    said = {row["database"]: row for row in json.loads(done.out)["databases"]}
    assert (said["sales"]["ok"], said["first"]["ok"]) == (True, False)
    assert "No such file" in said["first"]["about"]
    assert home("database", "test", "sales").code == 0
    assert home("database", "test", "nothing").code == 4
    for shown in (done.out, done.err, home("database", "list").good):
        assert PASSWORD not in shown


def test_a_database_is_not_removed_while_somebody_has_a_grant_there(
    newest_shop: site.Shop, make_site: Callable[..., site.Site]
) -> None:
    found = make_site(newest_shop, per_user=True)
    found.grant("alice", "--table", "public.orders")
    before = found.config.read_bytes()
    done = found.run("database", "remove", "shop", "--yes", check=False)
    assert (done.returncode, "mcpctl user ungrant alice" in done.stderr) == (5, True)
    assert found.config.read_bytes() == before
    tested = found.run("database", "test", "shop")
    assert "mcp_alice_r\tyes" in tested.stdout
    found.run("user", "ungrant", "alice", "--database", "shop", "--apply")
    assert "nobody has a grant there" in found.run("database", "test", "shop", check=False).stdout
    with (found.folder / "admin.dsn").open("a") as file:
        file.write("\nshop: host=/tmp dbname=shop\n")
    said = found.run("database", "remove", "shop", "--yes").stderr
    assert ("still has a line for shop" in said, "token" in said) == (True, False), said
    assert found.run("database", "remove", "shop", "--yes", check=False).returncode == 4


def test_a_tenants_database_is_not_removed_and_tokens_that_name_another_are_told(home: Home) -> None:
    assert home("database", "add", "other", "--host", "/nonexistent", "--user", "u", "--no-test").code == 0
    assert home("tenant", "add", "acme", "--database", "first").code == 0
    before = home.config.read_bytes()
    done = home("database", "remove", "first", "--yes")
    assert (done.code, "the tenant acme has the database first" in done.error) == (5, True)
    assert "mcpctl tenant remove acme" in done.error
    assert home.config.read_bytes() == before
    assert home("tenant", "remove", "acme", "--yes").code == 0
    ended, _ = home.token("--database", "first")
    living, _ = home.token("--database", "first")
    assert home("token", "revoke", ended).code == 0
    removed = home("database", "remove", "first", "--yes")
    assert removed.good == "first removed\n"
    again = home("database", "add", "first", "--host", "/nonexistent", "--user", "u", "--no-test")
    assert f"1 living token names first, and may ask it at the server's next start: {living}" in again.err
    assert home("database", "remove", "first", "--yes").code == 0
    assert f"1 living token names first, and would open a new database of that name: {living}\n" in removed.err
    assert f"mcpctl token revoke {living}" in removed.err


def test_harden_prints_what_apply_takes_from_public(newest_shop: site.Shop, tmp_path: Path) -> None:
    with newest_shop.admin() as connection:
        connection.execute("CREATE DATABASE open_one")
    found = site.Site(tmp_path / "site", newest_shop, per_user=True)
    found.config.write_text(found.config.read_text().replace("dbname: shop", "dbname: open_one"))
    try:
        printed = found.run("database", "harden", "shop").stdout
        assert "FROM PUBLIC" in printed
        first = found.run("database", "harden", "shop", "--apply").stdout
        assert "taken from PUBLIC: " in first
        assert found.run("database", "harden", "shop", "--apply").stdout == "shop was hardened already\n"
        dsn = newest_shop.cluster.dsn_for("postgres", newest_shop.cluster.superuser_password, "open_one")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(printed.encode())
    finally:
        with newest_shop.admin() as connection:
            connection.execute("DROP DATABASE open_one WITH (FORCE)")


# -- root ---------------------------------------------------------------------------------------------------------


@needs_root
def test_root_adds_and_removes_a_database_of_a_service_whose_files_are_another_users(
    newest_shop: site.Shop, tmp_path: Path
) -> None:
    """config.yaml is root's, the others are the service's: each file keeps its owner."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    etc, var = tmp_path / "etc", tmp_path / "var"
    init.make(var, "databases: {}\n")
    etc.mkdir(mode=0o755)
    text = (
        f"# the service's\nauth: {{token_file: {var}/tokens.yaml, user_file: {var}/users.yaml,"
        f" tenant_file: {var}/tenants.yaml}}\n"
        f"audit: {{file: {var}/audit.jsonl, key_file: {var}/audit.key}}\nkeyring: {{file: {var}/secret.key}}\n"
        f"databases:\n  first: {{host: /nonexistent, user: u}}\n"
    )
    private_file.create(etc / "config.yaml", text.encode(), mode=0o640)
    os.chown(etc / "config.yaml", 0, NOBODY)
    for path in (var, *var.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    config = ["--config", str(etc / "config.yaml")]
    done = run(*config, "database", "add", "sales", *where(newest_shop), "--password-file", "-", stdin=PASSWORD)
    assert done.good == "sales added (sealed)\n"
    about = (var / "sales.password").stat()
    assert (about.st_uid, stat.S_IMODE(about.st_mode)) == (NOBODY, 0o600)
    about = (etc / "config.yaml").stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (0, NOBODY, 0o640)
    assert (etc / "config.yaml").read_text().startswith("# the service's\n")
    assert all(path.stat().st_uid == NOBODY for path in var.iterdir())
    assert [path.name for path in etc.iterdir()] == ["config.yaml"]
    given = tmp_path / "given"
    private_file.create(given, PASSWORD.encode() + b"\n")
    for owner in (0, NOBODY, NOBODY - 1):  # root's, the service's, and of whoever called sudo
        os.chown(given, owner, -1)
        again = ("database", "add", f"of{owner}", *where(newest_shop), "--password-file", str(given))
        assert run(*config, *again).good == f"of{owner} added (sealed)\n"
        assert run(*config, "database", "remove", f"of{owner}", "--yes").code == 0
    given.chmod(0o640)
    refused = run(*config, *again)
    assert (refused.code, f"chmod 0600 {given}" in refused.err) == (3, True)
    wrong = run(*config, "database", "add", "other", *where(newest_shop), "--password-file", "-", stdin="wrong")
    assert (wrong.code, wrong.error.startswith("mcpctl: error: other: ")) == (1, True)
    assert not (var / "other.password").exists()
    assert run(*config, "database", "remove", "sales", "--yes").good == "sales removed\n"
    assert not (var / "sales.password").exists()
    user = ["user", "add", "alice"]
    assert run(*config, *user).code == 0
    out = str(var / "alice.token")
    assert run(*config, "token", "add", "--user", "alice", "--expiry", "30d", "--out", out).code == 0
    verified = run(*config, "token", "verify", "--file", out)  # the file is the service's, not root's
    assert verified.good.endswith("is active\n")
    per_user = ["--host", newest_shop.cluster.host, "--port", str(newest_shop.cluster.port), "--dbname", "shop"]
    assert run(*config, "database", "add", "mine", *per_user, "--roles", "per_user").code == 0
    admin = newest_shop.cluster.dsn_for("postgres", newest_shop.cluster.superuser_password, "shop")
    private_file.create(etc / "admin.dsn", admin.encode())
    grant = ["--database", "mine", "--table", "public.orders"]
    done = run(*config, "user", "grant", "alice", *grant, "--access", "read", "--apply")
    assert done.good == "alice in mine: read public.orders\n"
    assert (etc / "admin.dsn").stat().st_uid == 0
    service = starter().run([*config, "user", "disable", "alice"], b"", environment(), 60, user=(NOBODY, NOBODY))
    assert (service.returncode, b"no administrator to disable" in service.stderr) == (0, True)
    assert run(*config, "user", "enable", "alice").code == 0
    daily = starter().run([*config, "doctor", "--json"], b"", environment(), 60, user=(NOBODY, NOBODY))
    told = [one["status"] for one in json.loads(daily.stdout)["checks"] if "admin.dsn" in one["message"]]
    assert (bool(told), "fail" in told, "failed" in told) == (True, False, False)
    assert run(*config, "grant", "diff").code == 0
    assert "belongs to the user whom" not in run(*config, "doctor").out
    assert run(*config, "key", "rotate").good.endswith("1 password sealed again\n")
    assert run(*config, "user", "remove", "alice", "--yes").good.startswith("alice removed\nrole mcp_alice_r dropped\n")
    assert all(path.stat().st_uid == NOBODY for path in var.iterdir())


@needs_root
def test_the_administrator_looks_though_all_files_but_his_are_the_services(
    newest_shop: site.Shop, tmp_path: Path
) -> None:
    """As `mcpctl init` of root leaves them: config.yaml is the service's, too. To the service itself his file is
    closed, and what needs none of it goes on."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    etc, cluster = tmp_path / "etc", newest_shop.cluster
    init.make(etc, "databases: {}\n")
    for path in (etc, *etc.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    admin = etc / "admin.dsn"
    private_file.create(admin, cluster.dsn_for("postgres", cluster.superuser_password, "postgres").encode())
    config = ["--config", str(etc / "config.yaml")]
    per_user = ["--host", cluster.host, "--port", str(cluster.port), "--roles", "per_user", "--dbname", "shop"]
    done = run(*config, "database", "add", "sales", *per_user)
    assert (done.good, "nobody has looked" in done.err) == ("sales added (no password kept)\n", False)
    assert (admin.stat().st_uid, run(*config, "user", "add", "alice").code) == (0, 0)
    arguments = [*config, "user", "disable", "alice"]
    as_it = starter().run(arguments, b"", environment(), 60, user=(NOBODY, NOBODY))
    said = as_it.stderr.decode()
    assert (as_it.returncode, as_it.stdout.decode().splitlines()[0]) == (0, "alice disabled"), said
    assert f"{admin} is another user's" in said
    os.chown(admin, 0, NOBODY)  # as whoever tried to let the daily check look
    admin.chmod(0o640)
    as_it = starter().run([*config, "grant", "diff"], b"", environment(), 60, user=(NOBODY, NOBODY))
    assert (as_it.returncode, b"open to this one, who could make roles" in as_it.stderr) == (3, True), as_it.stderr
