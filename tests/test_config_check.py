"""mcpctl config check: what lies beyond the keys, each fault with its place."""

from __future__ import annotations

import os
import shutil
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import trustme

import mcpctl
from command_line import Home, run
from mcpctl import config, private_file
from mcpctl.cli import config as config_command
from mcpctl.config_keys import Pool
from mcpctl.errors import ConfigError
from test_control import process


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def faults(home: Home) -> list[str]:
    done = home("config", "check")
    assert (done.code, done.out) == (3, "")
    return [line.strip() for line in done.error.splitlines() if line.startswith("  ")]


def test_every_fault_of_what_the_config_names_is_told_at_once_with_its_line(home: Home) -> None:
    home.config.write_text(
        "server: {tls: {cert: none.pem, key: key.pem}}\n"
        "databases:\n"
        "  a: {host: x, user: u, password_file: one}\n"
        "  b: {host: x, user: u, password_file: two}\n"
        "  c: {dsn: host=x passfile=/x service=y}\n"
        "  d: {dsn: host=x port=99999 user=u}\n"
        "  e:\n    host: x\n    sslmode: disable\n"
        "  f:\n    host: x\n    roles: per_user\n    service_dsn: host=x user=u service=y\n"
    )
    for name in ("tokens.yaml", "users.yaml", "audit.key"):
        (home.folder / name).write_text("junk")
    found = faults(home)
    folder, config = home.folder, home.config
    assert [line.split(" (")[0] for line in found] == [
        f"{folder}/tokens.yaml is not in order:",
        f"{folder}/tokens.yaml:1: expected keys and values",
        f"{folder}/users.yaml is not in order:",
        f"{folder}/users.yaml:1: expected keys and values",
        f"{config}:1: audit: {folder}/audit.key does not hold 64 hex digits",
        f"{config}:3: databases.a.password_file: there is no file {folder}/one",
        f"{config}:4: databases.b.password_file: there is no file {folder}/two",
        f"{config}:5: databases.c.dsn: not taken: passfile, service",
        f"{config}:6: databases.d.dsn: its port is none",
        f"{config}:9: databases.e.sslmode: sslmode disable may send rows and passwords in clear to x",
        f"{config}:13: databases.f.service_dsn: not taken: service",
        f"{config}:1: server.tls: the certificate {folder}/none.pem cannot be used: No such file or directory",
    ]


def test_a_broken_tenant_file_is_a_fault_and_so_is_a_missing_one(home: Home) -> None:
    assert home("config", "check").good.startswith("ok")
    (home.folder / "tenants.yaml").unlink()
    assert faults(home)[0].startswith(
        f"there is no file {home.folder}/tenants.yaml (restore it; only where there never"
    )
    (home.folder / "users.yaml").unlink()
    assert f"no file {home.folder}/users.yaml (restore it from your backup; only where none" in faults(home)[0]
    (home.folder / "tenants.yaml").touch(0o600)
    (home.folder / "tenants.yaml").write_text("junk")
    assert any(one.startswith(f"{home.folder}/tenants.yaml is not in order:") for one in faults(home))


def test_plain_http_for_strangers_is_a_fault(home: Home) -> None:
    text = home.config.read_text()
    home.config.write_text(f"{text}server: {{host: 0.0.0.0}}\n")
    assert "plain HTTP on 0.0.0.0" in faults(home)[0]
    home.config.write_text(f"{text}server: {{host: 0.0.0.0, trusted_proxies: [10.0.0.1]}}\n")
    assert home("config", "check").good.startswith("ok")


def test_a_fault_of_a_variable_names_the_variable(tmp_path: Path) -> None:
    done = run("config", "check", env={"MCPCTL_DATABASE_URL": "postgresql://h:99999/db", "HOME": str(tmp_path)})
    assert done.code == 3
    assert "environment MCPCTL_DATABASE_URL: databases.default.dsn: its port is none" in done.error
    url = "postgresql://u:hunter2/secret@h/db"  # a slash in a password has to be written otherwise
    done = run("config", "check", env={"MCPCTL_DATABASE_URL": url, "HOME": str(tmp_path)})
    assert (done.code, "hunter2" in done.err) == (3, False)


def test_a_certificate_out_of_date_is_told(home: Home) -> None:
    old = trustme.CA().issue_cert("localhost", not_after=datetime(2025, 6, 1, tzinfo=UTC))
    old.cert_chain_pems[0].write_to_path(home.folder / "cert.pem")
    old.private_key_pem.write_to_path(home.folder / "key.pem")
    (home.folder / "key.pem").chmod(0o600)
    home.config.write_text(home.config.read_text() + "server: {tls: {cert: cert.pem, key: key.pem}}\n")
    done = home("config", "check")
    assert done.code == 0
    assert "to 2025-06-01: clients refuse it" in done.err


def test_a_chain_has_to_go_on_from_the_certificate(home: Home) -> None:
    root = trustme.CA()
    middle = root.create_child_ca()
    issued = middle.issue_cert("localhost")
    folder = home.folder
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    middle.cert_pem.write_to_path(folder / "chain.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    (folder / "empty.pem").touch()
    text = home.config.read_text()

    def check_with(chain: str) -> tuple[int, str]:
        home.config.write_text(f"{text}server: {{tls: {{cert: cert.pem, key: key.pem, chain: {chain}}}}}\n")
        done = home("config", "check")
        return done.code, done.out + done.err

    assert check_with("chain.pem")[0] == 0
    for chain, why in (
        ("other.pem", "does not hold"),
        ("empty.pem", "there is no certificate in PEM in it"),
        ("key.pem", "there is no certificate in PEM in it"),
        ("none.pem", "No such file or directory"),
    ):
        code, said = check_with(chain)
        assert code == 3
        assert f"the chain {folder}/{chain}" in said
        assert why in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_roots_commands_work_where_the_owner_of_the_files_cannot_read_mcpctl(tmp_path: Path) -> None:
    """All that is imported after root is given up must have been before."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(Path(mcpctl.__file__).parent, closed / "mcpctl")
    home = Home(tmp_path / "home", "  mine: {host: /nonexistent, dbname: mine, roles: per_user}\n")
    for path in (home.folder, *home.folder.iterdir()):
        os.chown(path, 65534, 65534)
    for command in (
        ("config", "check"), ("user", "add", "alice", "--role", "mcp-tools"), ("user", "list"),
        ("user", "show", "alice"), ("token", "add", "--user", "alice", "--expiry", "1d"), ("token", "list"),
        ("tenant", "add", "acme", "--database", "shop"),
        ("user", "grant", "alice", "--database", "mine", "--access", "read", "--print-sql"), ("database", "list"),
        ("database", "add", "more", "--host", "/nonexistent", "--user", "u", "--no-test"), ("key", "rotate"),
        ("database", "remove", "more", "--yes"), ("user", "add", "bob"), ("user", "remove", "bob", "--yes"),
    ):  # fmt: skip
        done = home(*command, env={"PYTHONPATH": str(closed)}, cwd="/")
        assert done.code == 0, (command, done.err)


def test_a_name_in_the_configs_lists_that_no_user_has_is_warned_of(home: Home) -> None:
    home("user", "add", "alice")
    with home.config.open("a") as file:
        file.write("auth:\n  admin_users: [alice, alcie]\n  read_only_users: [guest]\n")
    done = home("config", "check")
    assert done.good.startswith("ok")
    line = home.config.read_text().splitlines().index("  admin_users: [alice, alcie]") + 1
    assert f"{home.config}:{line}: auth.admin_users names alcie, and there is no such user" in done.err
    assert f"{home.config}:{line + 1}: auth.read_only_users names guest" in done.err
    assert done.err.count("warning: ") == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("databases: {shop: {host: /x, dbname: y, pool: 3}}", "config.yaml:2: databases.shop.pool"),
        ("limits:\n  max_rows: many", "config.yaml:3: limits.max_rows"),
        ("server: {prt: 1, port: x}", "config.yaml:2: server.prt"),
        ("databases: {shop: [", "not YAML"),
        ("databases:\n\tshop: {}\nlog: {level: info}", "config.yaml:3: not YAML"),
    ],
)
def test_what_an_incident_does_not_need_is_forgiven(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "config.yaml"
    path.touch(0o600)
    path.write_text(f"auth: {{token_file: there.yaml}}\n{text}\naudit: {{file: elsewhere.jsonl}}\n")
    forgiven: list[str] = []
    found = config.load(path, {}, forgiven=forgiven)
    assert found.auth.token_file == path.with_name("there.yaml")
    assert found.audit.file == path.with_name("elsewhere.jsonl")
    assert told in forgiven[0]
    with pytest.raises(ConfigError):
        config.load(path, {})


@pytest.mark.parametrize(
    "text",
    [
        "auth: {token_file: 3}",
        "auth: {tokn_file: there.yaml}",
        "auht: {token_file: there.yaml}",
        "auth: there",
        "server: {runtime_dir: [}",
        "{auth: {token_file: there.yaml}, limits: [}",
        "audit:\n  fil: x",
        "auth: {user_file: a}\nauht:\n  token_file: [",
    ],
)
def test_what_an_incident_needs_is_not_forgiven_and_says_what_locks_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.touch(0o600)
    path.write_text(f"{text}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, {}, forgiven=[])
    assert "`touch lockdown` beside tokens.yaml" in (caught.value.hint or "")


def test_a_reload_names_at_once_who_does_not_answer_and_waits_on(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_command, "_SILENT", 0.2)
    monkeypatch.setattr(config_command, "_PATIENCE", 1)
    with (
        process(home.folder, "4711.x", None),
        process(home.folder, "4712.x", b'{"ok": true, "said": "changed: log"}\n') as asked,
    ):
        config_command.reload(Mock(), config=home.config)
    told = capsys.readouterr()
    assert told.out == "changed: log\n"
    assert [one["do"] for one in asked] == ["keys", "reload"]
    assert "process 4711 does not answer; it is waited for, 1 seconds at most" in told.err
    assert "process 4712" not in told.err


def test_the_sections_are_frozen_dataclasses() -> None:
    made = Pool(3, wait=2.0)
    assert (made.max_size, made.wait, made.max_per_user) == (3, 2.0, Pool().max_per_user)
    assert made == replace(Pool(), max_size=3, wait=2.0) != Pool()
    assert hash(made) == hash(replace(made)) != hash(Pool())
    with pytest.raises(FrozenInstanceError):
        made.wait = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Pool(size=3)  # type: ignore[call-arg]


def test_the_secrets_of_clients_are_read_as_the_server_would(home: Home) -> None:
    clients = "\n".join(
        f"      {name}: {{redirect_uris: ['https://a.example/cb'], secret_file: {name}.secret}}"
        for name in ("gone", "short")
    )
    sign_in = f"auth:\n  oauth:\n    enabled: true\n    clients:\n{clients}\n"
    home.config.write_text(sign_in + home.config.read_text())
    private_file.create(home.folder / "short.secret", b"short\n")
    key = "auth.oauth.clients"
    assert [line.split(" (")[0] for line in faults(home)] == [
        f"{home.config}:5: {key}.gone.secret_file: there is no file {home.folder}/gone.secret",
        f"{home.config}:6: {key}.short.secret_file: {home.folder}/short.secret: the secret of the client short has "
        "fewer than 32 ASCII characters",
    ]
