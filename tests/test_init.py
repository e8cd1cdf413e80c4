"""mcpctl init: from nothing to the first answer; all of it, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from command_line import Done, on_a_terminal, run
from mcpctl import config
from mcpctl.cli import init_answers, init_config, init_layout
from mcpctl.cli.init_answers import Answers, Listening
from site_of_mcpctl import Shop, Site

FILES = ["config.yaml", "tokens.yaml", "users.yaml", "tenants.yaml", "audit.key", "secret.key"]
LOCAL = Listening("127.0.0.1", 8080, None, None, None, (), None)


def at(shop: Shop, *more: str) -> list[str]:
    """The flags that name the shop's database."""
    return ["--db-host", shop.cluster.host, "--db-port", str(shop.cluster.port), "--db-name", "shop", *more]


def by_superuser(shop: Shop, sql: str) -> None:
    cluster = shop.cluster
    dsn = cluster.dsn_for("postgres", cluster.superuser_password, "shop")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.encode())


def site_of(folder: Path, shop: Shop) -> Site:
    """The site of an installation that is there already."""
    made = Site.__new__(Site)
    made.folder, made.config, made.shop = folder, folder / "config.yaml", shop
    made.process, made.url, made.limits, made.stderr = None, "", {}, []
    return made


def nothing_left(done: Done, folder: Path, code: int, said: str) -> None:
    assert (done.code, done.out) == (code, ""), done
    assert said in done.error
    assert not folder.exists()


def test_one_command_the_sql_it_prints_and_serve_answer_the_first_question(newest_shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    flags = at(newest_shop, "--db-user", "init_reader", "--user", "alice", "--expiry", "90d")
    done = run("init", str(folder), *flags, "--out", str(tmp_path / "alice.token"), "--print-sql")
    assert done.good.rstrip("\n") == (folder / "roles.sql").read_text().rstrip("\n")
    assert "SCRAM-SHA-256$" in done.out
    assert "local  shop  init_reader  scram-sha-256\n" in done.err
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert (folder / "shop.password").read_text().startswith("sealed:")
    by_superuser(newest_shop, done.out)
    site = site_of(folder, newest_shop)
    assert "init_reader logs in" in site.run("doctor").stdout
    assert site.run("audit", "verify").returncode == 0
    try:
        site.start()
        with site.client((tmp_path / "alice.token").read_text().strip()) as client:
            assert client.rows("select count(*) from products") == [[120]]
    finally:
        site.stop()
    again = run("init", str(folder), *flags)
    assert (again.code, again.out) == (5, "")
    assert "exists already" in again.error


def test_a_login_that_is_there_is_tried_and_needs_no_sql(newest_shop: Shop, tmp_path: Path) -> None:
    by_superuser(newest_shop, "CREATE ROLE init_known LOGIN PASSWORD 'known already' IN ROLE shop_reader")
    flags = at(newest_shop, "--db-user", "init_known", "--db-password-file", "-", "--json")
    told = json.loads(run("init", str(tmp_path / "new"), *flags, stdin="known already\n").good)
    assert told == {"folder": str(tmp_path / "new"), "files": [*FILES, "shop.password"]}
    wrong = run("init", str(tmp_path / "wrong"), *flags, stdin="wrong\n")
    nothing_left(wrong, tmp_path / "wrong", 1, "password authentication failed")
    assert "--no-check" in wrong.err
    assert "known already" not in "".join(path.read_text("latin-1") for path in (tmp_path / "new").iterdir())
    superuser = at(newest_shop, "--db-user", "postgres", "--db-password-file", "-")
    refused = run("init", str(tmp_path / "x"), *superuser, stdin=newest_shop.cluster.superuser_password)
    nothing_left(refused, tmp_path / "x", 1, "superuser")


def test_with_a_role_for_each_user_the_sql_is_that_of_the_first_users_grant(newest_shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    done = run("init", str(folder), *at(newest_shop, "--roles", "per_user", "--user", "inita"), "--json")
    told = json.loads(done.good)
    assert "mcp_inita_r" in told["sql"]
    by_superuser(newest_shop, told["sql"])
    site = site_of(folder, newest_shop)
    assert "confirmed" in site.run("grant", "diff").stderr
    assert site.run("can", "inita", "select", "public.products").returncode == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--db-host", "127.0.0.1", "--db-port", "1", "--db-name", "x"], 1, "refused"),
        (["--db-host", "/nowhere", "--db-name", "x"], 1, "No such file"),
        (["--db-host", "127.0.0.1"], 2, "--db-name is missing"),
        (["--db-name", "x"], 2, "--db-name goes with --db-host"),
        (["--roles", "own", "--db-host", "h", "--db-name", "x"], 2, "--roles takes"),
        (["--roles", "per_user", "--db-host", "h", "--db-name", "x", "--db-user", "u"], 2, "no login of its own"),
        (["--db-host", "/s", "--db-name", "x", "--db-sslmode", "no", "--no-check"], 2, "databases.x.sslmode: takes"),
        (["--db-host", "db.example.org", "--db-name", "x", "--db-sslmode", "disable"], 3, "in clear"),
        (["--tls-cert", "c"], 2, "go together"),
        (["--tls-cert", "c", "--tls-key", "k"], 2, "--public-url is missing"),
        (["--tls-cert", "/c", "--tls-key", "/k", "--public-url", "https://a.example"], 3, "certificate /c cannot"),
        (["--behind-proxy", "10.0.0.0/33", "--public-url", "https://a.example"], 2, "server.trusted_proxies: takes"),
        (["--behind-proxy", "10.0.0.1", "--public-url", "a.example"], 2, "server.public_url: takes"),
        (["--host", "0.0.0.0"], 2, "in clear"),
        (["--user", "Alice"], 2, "cannot be a user name"),
        (["--expiry", "1d"], 2, "are for the token of --user"),
        (["--user", "a", "--out", "f"], 2, "--expiry is missing"),
        (["--user", "a", "--expiry", "400d"], 2, "beyond auth.max_token_lifetime"),
        (["--user", "a", "--expiry", "1d", "--out", "/etc/passwd"], 5, "exists already"),
        (["--issuer", "http://id.example.org"], 2, "auth.oidc.idp.issuer"),
        (["--print-sql"], 2, "no login role to make"),
        (["--print-sql", "--user", "a", "--expiry", "1d", "--db-host", "h", "--db-name", "x"], 2, "--out FILE"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_leaves_nothing(flags: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run("init", str(tmp_path / "new"), *flags)
    nothing_left(done, tmp_path / "new", code, "")
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_fails_takes_away_what_it_made_and_no_log_or_state_that_was_there(tmp_path: Path) -> None:
    old = {name: f"{name} of before" for name in ("audit.jsonl.1.gz", "audit.jsonl-20260101", "state.db")}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "alice.token").touch()
    done = run("init", str(tmp_path), "--user", "alice", "--expiry", "1d", "--out", str(tmp_path / "alice.token"))
    assert (done.code, "exists already" in done.err) == (5, True)
    assert {path.name for path in tmp_path.iterdir()} == {*old, "alice.token"}
    assert {name: (tmp_path / name).read_text() for name in old} == old


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_ends_it_while_it_makes_them_finds_all_of_the_files(number: signal.Signals, tmp_path: Path) -> None:
    ended = f"""
import os, sys
from mcpctl import private_file
from mcpctl.cli.main import run
create = private_file.create
def ending(path, data):
    create(path, data)
    if path.name == "users.yaml":
        os.kill(os.getpid(), {int(number)})
private_file.create = ending
sys.argv = ["mcpctl", "init", {str(tmp_path / "new")!r}, "--user", "alice"]
run()
"""
    done = subprocess.run([sys.executable, "-c", ended], capture_output=True, timeout=60, text=True, check=False)
    assert done.returncode in (-number, 130), done
    assert {*FILES, "audit.jsonl", "state.db"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert run("user", "list", "--config", str(tmp_path / "new" / "config.yaml")).good.startswith("alice\t")


def test_a_terminal_is_asked_and_wrong_answers_again(newest_shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shown = on_a_terminal(
        ["init", str(folder)],
        answers=[
            ("socket, - to", f"{newest_shop.cluster.host}\n"),
            ("its port", "no\n"), ("takes a port", f"{newest_shop.cluster.port}\n"),
            ("name there", "-\n"), ("name there", "shop\n"),
            ("per_user: one for each", "shared\n"), ("can only read", "init_asked\n"),
            ("to make one up", "\n"), ("who connects", "\n"), ("first user", "bob\n"),
            ("it is to last", "1y\n"), ("90d at most", "30d\n"),
            ("identity provider", "\n"),
        ],
    )  # fmt: skip
    assert shown.code == 0, shown.out
    assert "PostgreSQL answers at" in shown.out
    assert "until 20" in shown.out
    known = yaml.safe_load((folder / "config.yaml").read_text())["databases"]["shop"]
    assert (known["user"], known["host"]) == ("init_asked", newest_shop.cluster.host)
    assert "bob" in (folder / "users.yaml").read_text()
    stopped = on_a_terminal(["init", str(tmp_path / "other")], answers=[("socket, - to", "\x03")])
    assert stopped.code == 130
    down = on_a_terminal(
        ["init", str(tmp_path / "other"), "--db-host", "/nowhere", "--db-name", "x", "--roles", "per_user", "--user",
         "u", "--host", "127.0.0.1", "--issuer", "https://id.example.org"],
        answers=[("go on all the same?", "\n")],
    )  # fmt: skip
    assert (down.code, (tmp_path / "other").exists()) == (1, False), down.out
    assert "nothing was made" in down.out


def test_a_terminal_is_not_asked_with_no_input(tmp_path: Path) -> None:
    done = on_a_terminal(["init", str(tmp_path / "new"), "--no-input"])
    assert done.code == 0
    assert config.load(tmp_path / "new" / "config.yaml", {}).databases == {}


def test_what_an_identity_provider_has_to_be_told_is_said_with_the_right_values(tmp_path: Path) -> None:
    flags = ["--behind-proxy", "10.0.0.0/8", "--public-url", "https://mcp.example.org", "--user", "ann"]
    done = run("init", str(tmp_path / "new"), *flags, "--issuer", "https://id.example.org/realms/shop")
    assert done.code == 0, done
    assert "aud has https://mcp.example.org\n" in done.err
    assert "mcpctl user link ann --issuer idp --subject THEIR-SUB" in done.err
    found = config.load(tmp_path / "new" / "config.yaml", {})
    assert found.auth.oidc["idp"].audience == ("https://mcp.example.org",)
    assert found.auth.oidc["idp"].roles_claims == ("realm_access.roles",)
    assert found.auth.max_token_lifetime == 90 * 86400


@pytest.mark.parametrize("odd", ["sh op", 'a"b\\c', "schöne-daten", "no", "-x", "a #b", "{x}", "10"])
def test_odd_names_stand_in_the_config_as_they_are(odd: str, tmp_path: Path) -> None:
    flags = ["--db-host", "/run/x", "--db-name", odd, "--db-user", odd, "--database", "main", "--no-check"]
    done = run("init", str(tmp_path / "new"), *[f"{flags[i]}={flags[i + 1]}" for i in (0, 2, 4, 6)], "--no-check")
    assert done.code == 0, done
    known = config.load(tmp_path / "new" / "config.yaml", {}).databases["main"]
    assert (known.dbname, known.user) == (odd, odd)


# -- the service's layout ------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users get into."""
    made = Path(tempfile.mkdtemp(prefix="mcpctl-init-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


_AS_SERVICE = """
import os, sys
from pathlib import Path
from mcpctl.cli.common import import_before
from mcpctl.cli import init_answers, init_layout, init_making
from mcpctl.errors import Error

root = Path(sys.argv[1])
layout = init_layout.service(root, (65534, 65534))

def made(user):
    try:
        with layout.prepared():
            import_before(layout.config)
            given = init_answers.Given(user=user, expiry="1d")
            making = init_making.Making(init_answers.answered(given, None, str), layout, "by test")
            making.as_owner(making.run)
    except Error as problem:
        print(problem.message, "/", sorted(map(str, root.rglob("*mcpctl*"))), file=sys.stderr)

made("Not A Name")
layout.log.mkdir()
made("alice")
layout.log.rmdir()
made("alice")
assert os.geteuid() == 0
"""


def test_who_has_named_a_config_elsewhere_is_not_given_another_installation(tmp_path: Path) -> None:
    named = {"MCPCTL_CONFIG": str(tmp_path / "one" / "config.yaml")}
    done = run("init", str(tmp_path / "two"), "--no-input", env=named)
    assert (done.code, (tmp_path / "two").exists()) == (2, False)
    assert f"this would make {tmp_path}/two/config.yaml" in done.error
    other = run("init", str(tmp_path / "two"), "--no-input", env={"MCPCTL_CONFIG": str(tmp_path / "two" / "my.yaml")})
    assert (other.code, other.err.splitlines()[-1]) == (2, "mcpctl: hint: unset it")  # no folder makes that one
    assert run("init", str(tmp_path / "one"), "--no-input", env=named).code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_makes_the_services_folders_and_its_user_the_files_or_nothing_is_left(open_folder: Path) -> None:
    for one in ("etc", "var/lib", "var/log", "run", "var/backups"):
        (open_folder / one).mkdir(parents=True)
    command = [sys.executable, "-c", _AS_SERVICE, str(open_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0] == "'Not A Name' cannot be a user name / []"
    log = open_folder / "var" / "log" / "mcpctl"
    assert said[1] == f"{log} is there already, and is no folder of the user mcpctl / ['{log}']"
    assert done.stdout.startswith("mcp_")
    paths = [path for path in open_folder.rglob("*") if "mcpctl" in path.parts]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(65534, 65534)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}
    names = {str(path.relative_to(open_folder)) for path in paths}
    assert names >= {"var/lib/mcpctl/state.db", "var/log/mcpctl/audit.jsonl", "etc/mcpctl/config.yaml", "run/mcpctl"}


def test_the_config_of_the_service_names_its_folders(tmp_path: Path) -> None:
    layout = init_layout.service(Path("/"), (1, 1))
    text = init_config.text(Answers(None, LOCAL, None, None, None, None), layout)
    known: dict[str, Any] = yaml.safe_load(text)
    assert known["server"] == {"state_file": "/var/lib/mcpctl/state.db", "runtime_dir": "/run/mcpctl"}
    assert known["audit"] == {"file": "/var/log/mcpctl/audit.jsonl"}
    assert known["backup"] == {"directory": "/var/backups/mcpctl"}


@pytest.mark.parametrize(("owner", "run"), [((1, 1), "sudo mcpctl"), (None, "mcpctl")])
def test_what_comes_next_is_roots_where_the_files_are_a_services(owner: tuple[int, int] | None, run: str) -> None:
    layout = replace(init_layout.service(Path("/"), (1, 1)), owner=owner)
    found = init_config.steps(Answers(None, LOCAL, None, None, None, None), layout, sql=False, token=False, flag="")
    assert f"{run} config check && {run} doctor" in found
    assert f"{run} user add alice" in found
    assert found[-1].startswith("mcpctl client-config")


def test_a_flag_is_asked_for_only_where_nobody_has_said_it(tmp_path: Path) -> None:
    """Without a person nothing is asked, whatever is missing."""
    found = init_answers.answered(init_answers.Given(), None, str)
    assert found == Answers(None, LOCAL, None, None, None, None)
