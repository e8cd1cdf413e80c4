"""Sessions of the command line: what it says, where it says it, and how it exits."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from command_line import Home, on_a_terminal, run
from site_of_mcpctl import COMMAND, environment, eventually

TOKEN = re.compile(r"mcp_[0-9a-z]{8}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}\n")
KEYS = {"id", "user", "databases", "permissions", "created_at", "expires_at", "revoked_at", "note", "status"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def alice(home: Home) -> Home:
    home("user", "add", "alice")
    return home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- init, config check, user ------------------------------------------------------------------------------------


def test_init_makes_private_files_and_says_what_comes_next(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mcpctl"
    done = run("init", str(folder), env={"HOME": str(tmp_path)})
    names = ["config.yaml", "tokens.yaml", "users.yaml", "tenants.yaml", "audit.key", "secret.key"]
    assert done.good.splitlines() == [str(folder / name) for name in names]
    assert done.err.startswith("next:\n")
    assert f"mcpctl config check --config {folder / 'config.yaml'}" in done.err
    assert mode(folder) == 0o700
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert json.loads((folder / "audit.jsonl").read_text())["event"] == "config.created"


def test_init_twice_is_a_conflict_and_changes_nothing(home: Home) -> None:
    before = home.files()
    done = run("init", str(home.folder))
    assert done.code == 5
    assert "exists already" in done.error
    assert home.files() == before


def test_an_init_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "audit.key").mkdir()
    assert run("init", str(folder)).code == 5
    assert [path.name for path in folder.iterdir()] == ["audit.key"]
    (tmp_path / "file").touch()
    assert "cannot make the folder" in run("init", str(tmp_path / "file")).error


@pytest.mark.parametrize("command", ["init", "demo"])
def test_what_reads_no_config_refuses_one(tmp_path: Path, command: str) -> None:
    refused = run("--config", str(tmp_path / "new" / "config.yaml"), command)
    assert refused.code == 2
    assert f"{command} reads no config" in refused.error
    assert list(tmp_path.iterdir()) == []


def test_init_json_is_one_object(tmp_path: Path) -> None:
    done = run("init", str(tmp_path / "new"), "--json")
    assert set(json.loads(done.good)) == {"folder", "files"}


def test_config_check_says_ok_or_every_fault(home: Home) -> None:
    assert home("config", "check").good == f"ok: {home.config}, 1 database(s): shop\n"
    assert json.loads(home("config", "check", "--json").good) == {
        "ok": True, "config": str(home.config), "databases": ["shop"],
    }  # fmt: skip
    (home.folder / "tokens.yaml").chmod(0o644)
    (home.folder / "audit.key").write_text("short")
    done = home("config", "check")
    assert done.code == 3
    assert "tokens.yaml has mode 0644" in done.error
    assert "audit.key does not hold" in done.error
    assert "mcpctl: hint: " in done.error
    home.config.write_text("databases: {shop: {hots: db}}\nlimit: {}\n")
    done = home("config", "check")
    assert done.code == 3
    assert "config.yaml:1: databases.shop.hots: there is no such key; did you mean host?" in done.error
    assert "config.yaml:2: limit: there is no such key; did you mean limits?" in done.error


def test_a_config_is_named_by_either_flag_or_the_variable(home: Home, tmp_path: Path) -> None:
    expected = home("token", "list", "--json").good
    assert run("token", "list", "--json", "--config", str(home.config)).good == expected
    assert run("token", "list", "--json", env={"MCPCTL_CONFIG": str(home.config)}).good == expected
    assert run("--config", "config.yaml", "token", "list", "--json", cwd=home.folder).good == expected
    done = run("token", "list", env={"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)})
    assert (done.code, "there is no config file" in done.error) == (3, True)


def test_users_are_added_and_listed_with_their_living_tokens(home: Home) -> None:
    made = home("user", "add", "alice", "--note", "from\u00a0Köln")
    assert made.good == "alice added\n"
    assert made.err == f"next: mcpctl token add --user alice --expiry 90d --config {home.config}\n"
    shown = json.loads(home("user", "add", "bob", "--json").good)
    assert set(shown) == {
        "user",
        "created_at",
        "disabled_at",
        "roles",
        "tenant",
        "note",
        "links",
        "has_password",
        "grants",
        "tokens",
        "token_ids",
    }
    home.token("--user", "alice")
    home("token", "revoke", home.token("--user", "alice")[0])
    rows = [line.split("\t") for line in home("user", "list").good.splitlines()]
    assert [(row[0], row[5]) for row in rows] == [("alice", "1"), ("bob", "0")]
    found = json.loads(home("user", "list", "--json").good)["users"]
    assert [user["tokens"] for user in found] == [1, 0]
    assert found[0]["note"] == "from\u00a0Köln"
    done = home("user", "add", "alice")
    assert (done.code, "there is a user alice already" in done.error) == (5, True)
    assert home("user", "add", "Alice!").code == 2


# -- token -------------------------------------------------------------------------------------------------------


def test_a_token_is_alone_on_stdout_and_its_facts_are_on_stderr(alice: Home) -> None:
    done = alice("token", "add", "--user", "alice", "--expiry", "90d", "--note", "laptop")
    assert TOKEN.fullmatch(done.good)
    name = done.out.split("_")[1]
    assert done.err.startswith(f"token {name} for user alice, expires ")
    assert done.out.strip() not in done.err
    [line] = alice("token", "list").good.splitlines()
    cells = line.split("\t")
    assert (cells[0], cells[1], cells[6], cells[7]) == (name, "alice", "active", "laptop")


def test_every_limit_of_a_token_arrives_in_its_record(alice: Home) -> None:
    name, _ = alice.token(
        "--user", "alice", "--database", "shop", "--database", "shop", "--permission", "tools:*", "--permission",
        "databases:shop:read", "--allow-ip", "10.0.0.0/8", "--allow-ip", "::1", "--note", "x",
    )  # fmt: skip
    found = json.loads(alice("token", "show", name, "--json").good)
    assert set(found) == KEYS | {"allow_ips"}
    assert (found["databases"], found["allow_ips"]) == (["shop"], ["10.0.0.0/8", "::1/128"])
    assert found["permissions"] == ["tools:*", "databases:shop:read"]
    shown = dict(line.split("\t") for line in alice("token", "show", name).good.splitlines())
    assert (shown["id"], shown["permissions"]) == (name, "tools:*,databases:shop:read")


def test_json_has_the_keys_of_the_contract_and_the_times_are_utc(alice: Home) -> None:
    added = json.loads(alice("token", "add", "--user", "alice", "--expiry", "1d", "--json").good)
    assert set(added) == KEYS | {"token", "out"}
    assert TOKEN.fullmatch(added["token"] + "\n")
    listed = json.loads(alice("token", "list", "--json").good)
    assert list(listed) == ["tokens"]
    assert [set(token) for token in listed["tokens"]] == [KEYS]
    [token] = listed["tokens"]
    assert token["status"] == "expiring"
    assert token["created_at"].endswith("Z")
    ends = datetime.fromisoformat(token["expires_at"]) - datetime.fromisoformat(token["created_at"])
    assert ends == timedelta(days=1)
    assert (token["databases"], token["permissions"], token["revoked_at"], token["note"]) == (None, None, None, None)


def test_a_service_token_is_for_the_databases_named_or_the_default_one(home: Home) -> None:
    name, _ = home.token()
    assert json.loads(home("token", "show", name, "--json").good)["databases"] == ["shop"]
    with home.config.open("a") as file:
        file.write("  sales: {host: db}\n")
    done = home("token", "add", "--expiry", "1d")
    assert (done.code, "no default one" in done.error) == (2, True)
    name, _ = home.token("--database", "sales")
    assert json.loads(home("token", "show", name, "--json").good)["databases"] == ["sales"]


def test_a_token_needs_an_expiry_or_a_default_and_never_is_said_to_be_a_bad_idea(alice: Home) -> None:
    done = alice("token", "add", "--user", "alice")
    assert (done.code, done.out, "--expiry is missing" in done.error) == (2, "", True)
    done = alice("token", "add", "--user", "alice", "--expiry", "never")
    assert TOKEN.fullmatch(done.good)
    assert "mcpctl: warning: a token that never expires is a bad idea" in done.err
    with alice.config.open("a") as file:
        file.write("auth: {token_lifetime: 1d, max_token_lifetime: 2d}\n")
    assert TOKEN.fullmatch(alice("token", "add", "--user", "alice").good)
    for expiry in ("3d", "never", "2099-01-01"):
        done = alice("token", "add", "--user", "alice", "--expiry", expiry)
        assert (done.code, "beyond auth.max_token_lifetime" in done.error) == (2, True)


@pytest.mark.parametrize(
    "permissions, told",
    [
        (["tools:*"], "name no database"),
        (["databases:*:read"], "name no tool"),
        (["tools:*", "databases:shop:read"], ""),
        (["*"], ""),
        ([], ""),
    ],
)
def test_permissions_that_lead_to_nothing_are_warned_of(alice: Home, permissions: list[str], told: str) -> None:
    flags = [word for permission in permissions for word in ("--permission", permission)]
    done = alice("token", "add", "--user", "alice", "--expiry", "1d", *flags)
    assert TOKEN.fullmatch(done.good)
    assert ("mcpctl: warning: " in done.err) is bool(told)
    assert told in done.err


def test_a_permission_that_covers_nothing_is_a_typo(alice: Home) -> None:
    for text, meant in (
        ("tools:query_databse", "did you mean tools:query_database?"),
        ("databases:shpo:read", "did you mean databases:shop:read?"),
        ("tables:*", "covers nothing that there is"),
    ):
        done = alice("token", "add", "--user", "alice", "--expiry", "1d", "--permission", text)
        assert (done.code, done.out) == (2, "")
        assert meant in done.error


def test_a_rotation_keeps_to_the_longest_lifetime_too(alice: Home) -> None:
    name = alice("token", "add", "--user", "alice", "--expiry", "never").good.split("_")[1]
    with alice.config.open("a") as file:
        file.write("auth: {max_token_lifetime: 2d}\n")
    assert alice("token", "rotate", name, "--expiry", "never").code == 2
    fresh = alice("token", "rotate", name).good.split("_")[1]
    ends = json.loads(alice("token", "show", fresh, "--json").good)["expires_at"]
    assert datetime.fromisoformat(ends) - datetime.now(UTC) <= timedelta(days=2)


def test_out_writes_the_token_to_a_new_private_file_and_never_over_another(alice: Home, tmp_path: Path) -> None:
    out = tmp_path / "token.txt"
    add = ("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(out))
    done = alice(*add, preexec_fn=lambda: os.umask(0))
    assert (done.good, f"it is in {out}, and nowhere else" in done.err) == ("", True)
    assert TOKEN.fullmatch(out.read_text())
    assert mode(out) == 0o600
    assert alice("token", "verify", "--file", str(out)).good.endswith("is expiring\n")
    before = (alice.files(), out.read_bytes())
    for place in (out, tmp_path, tmp_path / "link"):
        if place.name == "link":
            place.symlink_to(tmp_path / "elsewhere")
        done = alice("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(place))
        assert (done.code, "exists already" in done.error) == (5, True)
    done = alice("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(tmp_path / "no" / "x"))
    assert (done.code, "cannot make" in done.error) == (3, True)
    assert (alice.files(), out.read_bytes()) == before
    assert not (tmp_path / "elsewhere").exists()


def test_a_token_that_could_not_be_made_leaves_no_file_for_it(alice: Home, tmp_path: Path) -> None:
    (alice.folder / "tokens.yaml").write_text("broken")
    done = alice("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(tmp_path / "out"))
    assert (done.code, "tokens.yaml" in done.error) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["add", "rotate"])
def test_a_token_that_nobody_could_read_is_said_to_be_lost(alice: Home, command: str) -> None:
    arguments = ["--user", "alice", "--expiry", "1d"] if command == "add" else [alice.token()[0]]
    reading, nobody = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("wb") as full, os.fdopen(nobody, "wb") as broken:
        process = subprocess.run(
            [*COMMAND, "--config", str(alice.config), "token", command, *arguments],
            stdout=full if command == "add" else broken, stderr=subprocess.PIPE, text=True,
            env=environment(), timeout=60,
        )  # fmt: skip
    assert process.returncode == 1
    lost = re.search(r"token (\w{8}) was made, but could not be handed over", process.stderr)
    assert lost
    assert f"mcpctl token revoke {lost[1]}" in process.stderr
    assert alice("token", "revoke", lost[1]).good


def test_a_no_stays_a_no_where_nobody_reads_stderr_either(home: Home) -> None:
    reading, nobody = os.pipe()
    os.close(reading)
    with os.fdopen(nobody, "wb") as broken:
        asked = [*COMMAND, "--config", str(home.config), "user", "add", "bob"]
        env = environment(PYTHONUNBUFFERED="")  # as for people: what could not be written is tried again at the exit
        done = [subprocess.run(asked, stdout=broken, stderr=broken, env=env, timeout=60) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 5]


def test_rotate_replaces_at_once_or_after_the_overlap(alice: Home) -> None:
    name, text = alice.token("--user", "alice", "--note", "n")
    done = alice("token", "rotate", name, "--overlap", "24h")
    assert TOKEN.fullmatch(done.good)
    fresh = done.out.split("_")[1]
    assert f"token {fresh} replaces {name}" in done.err
    assert f"token {name} ends by itself at" in done.err
    assert alice("token", "verify", stdin=text).good == f"token {name} is expiring\n"
    done = alice("token", "rotate", fresh)
    assert f"token {fresh} has ended; no server runs" in done.err
    statuses = {token["id"]: token["status"] for token in json.loads(alice("token", "list", "--json").good)["tokens"]}
    assert (statuses[name], statuses[fresh], len(statuses)) == ("expiring", "revoked", 3)
    done = alice("token", "rotate", fresh)
    assert (done.code, "is revoked already" in done.error) == (5, True)


def test_revoke_is_idempotent_never_asks_and_says_what_it_did(alice: Home) -> None:
    one, other = alice.token("--user", "alice")[0], alice.token()[0]
    assert alice("token", "revoke", one, "--reason", "leaked").good == f"{one} revoked\nno server runs\n"
    assert alice("token", "revoke", one).good == f"{one} was revoked already\nno server runs\n"
    assert json.loads(alice("token", "revoke", "--all", "--json").good) == {
        "revoked": [one, other], "already": [one], "cut": None,
    }  # fmt: skip
    events = [json.loads(line) for line in (alice.folder / "audit.jsonl").read_text().splitlines()]
    revoked = [event for event in events if event["event"] == "token.revoked"]
    assert [event["token"] for event in revoked] == [one, other]
    assert revoked[0]["reason"].startswith("leaked; by ")
    assert alice("token", "revoke").code == 2
    assert alice("token", "revoke", one, "--all").code == 2


def test_remove_wants_a_yes_and_never_asks_without_a_terminal(alice: Home) -> None:
    name = alice.token("--user", "alice")[0]
    before = alice.files()
    done = alice("token", "remove", name, stdin="y\n")
    assert (done.code, "say --yes" in done.error) == (2, True)
    assert alice.files() == before
    shown = on_a_terminal(["--config", str(alice.config), "token", "remove", name], answers=[("[y/N]", "n\n")])
    assert (shown.code, "nothing was removed" in shown.out) == (1, True)
    shown = on_a_terminal(["--config", str(alice.config), "token", "remove", name], answers=[("[y/N]", "\x03")])
    assert shown.code == 130
    assert alice.files() == before
    shown = on_a_terminal(["--config", str(alice.config), "token", "remove", name], answers=[("[y/N]", "y\n")])
    assert (shown.code, f"{name} removed" in shown.out) == (0, True)
    other = alice.token()[0]
    assert alice("token", "remove", other, "--yes").good.startswith(f"{other} removed\n")
    assert json.loads(alice("token", "list", "--json").good) == {"tokens": []}


def test_prune_takes_out_what_is_over_and_list_filters(alice: Home) -> None:
    soon = alice("token", "add", "--user", "alice", "--expiry", "300ms").good.split("_")[1]
    dead, living = alice.token("--user", "alice")[0], alice.token()[0]
    week = alice("token", "add", "--user", "alice", "--expiry", "7d").good.split("_")[1]
    alice("token", "revoke", dead)
    eventually(lambda: json.loads(alice("token", "list", "--expired", "--json").good)["tokens"])
    assert [token["id"] for token in json.loads(alice("token", "list", "--expired", "--json").good)["tokens"]] == [soon]
    found = json.loads(alice("token", "list", "--expiring", "14d", "--json").good)
    assert [token["id"] for token in found["tokens"]] == [week]
    assert json.loads(alice("token", "prune", "--json").good) == {"removed": [soon, dead]}
    assert alice("token", "prune").good == ""
    assert [line.split("\t")[0] for line in alice("token", "list").good.splitlines()] == [living, week]


def test_verify_reads_a_secret_from_stdin_or_a_file_and_says_why_not(alice: Home) -> None:
    name, text = alice.token("--user", "alice")
    assert alice("token", "verify", stdin=text + "\n").good == f"token {name} is active\n"
    assert json.loads(alice("token", "verify", "--json", stdin=text).good)["valid"] is True
    wrong: list[tuple[str | bytes, str]] = [
        (text[:-1], "form or checksum is wrong"),
        ("", "form or checksum is wrong"),
        (b"\xff\xfe\x00", "form or checksum is wrong"),
        ("x" * 100_000, "form or checksum is wrong"),
    ]
    for given, why in wrong:
        done = alice("token", "verify", stdin=given)
        assert (done.code, why in done.out, done.err) == (1, True, "")
    alice("token", "revoke", name)
    done = alice("token", "verify", stdin=text)
    assert (done.code, done.out) == (1, f"token {name} is revoked\n")
    alice("token", "remove", name, "--yes")
    assert "there is no token" in alice("token", "verify", stdin=text).out
    shown = on_a_terminal(["--config", str(alice.config), "token", "verify"], answers=[("token: ", text + "\n")])
    assert shown.code == 1
    assert text not in shown.out  # what is typed is not shown


def test_an_unknown_thing_exits_4_and_nothing_changes(alice: Home) -> None:
    _, text = alice.token("--user", "alice")
    before = alice.files()
    for arguments in (
        ["token", "show", "zzzzzzzz"],
        ["token", "rotate", "zzzzzzzz"],
        ["token", "revoke", "zzzzzzzz"],
        ["token", "revoke", text],
        ["token", "remove", "zzzzzzzz", "--yes"],
        ["token", "add", "--user", "nobody-here", "--expiry", "1d"],
        ["token", "add", "--database", "none", "--expiry", "1d"],
    ):
        done = alice(*arguments)
        assert (done.code, done.out) == (4, ""), arguments
        assert "mcpctl: hint: " in done.error
        assert text not in done.error
    assert alice.files() == before


# -- how it looks ------------------------------------------------------------------------------------------------


def test_a_table_is_for_terminals_and_tabs_are_for_pipes(alice: Home) -> None:
    name = alice.token("--user", "alice", "--note", "my laptop")[0]
    piped = alice("token", "list").good
    assert len(piped.splitlines()) == 1
    assert piped.count("\t") == 7
    listing = ["--config", str(alice.config), "token", "list"]
    shown = on_a_terminal(listing)
    head, row = shown.good.splitlines()
    assert "\x1b[1m" in head
    assert re.sub(r"\x1b\[[0-9;]*m", "", head).split()[:3] == ["ID", "USER", "DATABASES"]
    assert name in row
    assert "\t" not in shown.out
    plain = on_a_terminal(listing, env={"NO_COLOR": "1"})
    assert "\x1b" not in plain.good
    assert plain.out.split()[:3] == ["ID", "USER", "DATABASES"]
    assert "\x1b[1m" in on_a_terminal(listing, env={"NO_COLOR": ""}).good
    assert on_a_terminal([*listing, "--json"]).good == alice("token", "list", "--json").good


def test_nothing_from_a_file_steers_the_terminal(alice: Home) -> None:
    name = alice.token("--user", "alice")[0]
    path = alice.folder / "tokens.yaml"
    nasty = r"\e]0;owned\a\e[31m\x9b31m\t\n\u202e\u2066"
    path.write_text(path.read_text().replace("user: alice", f'user: alice, note: "{nasty}"'))
    for arguments in (["list"], ["show", name], ["list", "--json"], ["show", name, "--json"]):
        for done in (
            alice("token", *arguments),
            on_a_terminal(["--config", str(alice.config), "token", *arguments], {"NO_COLOR": "1"}),
        ):
            raw = done.good.replace("\n", "").replace("\t", "")
            assert all(character.isprintable() for character in raw), raw
            assert "owned" in raw
    path.write_text('"a\\e[31mb": 1\n')
    assert "\x1b" not in alice("token", "list").error


@pytest.mark.parametrize("command, code", [("user list", 0), ("token verify", 1), ("audit tail -f", 0)])
def test_a_reader_that_has_seen_enough_is_no_failure_and_no_yes(alice: Home, command: str, code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [*COMMAND, "--config", str(alice.config), *command.split()],
        stdout=writing, stderr=subprocess.PIPE, input="no token", text=True, env=environment(), timeout=60,
    )  # fmt: skip
    os.close(writing)
    assert (process.returncode, process.stderr) == (code, "")


def test_the_version_and_help_are_on_stdout_and_a_bare_command_shows_help_on_stderr() -> None:
    assert re.fullmatch(r"mcpctl \d+\.\d+\.\d+\n", run("--version").good)
    assert "Usage:" in run("--help").good
    assert "Usage:" in run("token", "add", "-h").good
    for arguments in ([], ["token"], ["user"], ["audit"], ["config"]):
        done = run(*arguments)
        assert (done.code, done.out, "Usage:" in done.err) == (2, "", True)


def test_who_ran_a_command_is_what_the_kernel_says_and_not_the_environment(home: Home) -> None:
    import pwd

    home("user", "add", "alice", env={"LOGNAME": "mallory", "USER": "mallory", "LNAME": "m", "USERNAME": "m"})
    [line] = (home.folder / "audit.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == f"by {pwd.getpwuid(os.getuid()).pw_name}"


# -- an audit log that cannot be written -------------------------------------------------------------------------


def test_no_right_is_given_while_the_audit_log_cannot_be_written_but_every_one_is_taken(alice: Home) -> None:
    name = alice.token("--user", "alice")[0]
    other = alice.token("--user", "alice")[0]
    (alice.folder / "audit.jsonl").chmod(0o644)
    before = alice.files()
    for arguments in (
        ["token", "add", "--user", "alice", "--expiry", "1d", "--out", str(alice.folder / "out")],
        ["token", "rotate", name],
        ["user", "add", "bob"],
    ):
        done = alice(*arguments)
        assert (done.code, done.out) == (3, "")
        assert "nothing was done: the audit log cannot be written" in done.error
    assert alice.files() == before
    done = alice("token", "revoke", name)
    assert done.good.startswith(f"{name} revoked\n")
    assert "mcpctl: warning: done, but not in the audit log" in done.err
    assert alice("token", "remove", other, "--yes").good
    with alice.config.open("a") as file:
        file.write("audit: {on_failure: warn}\n")
    done = alice("token", "add", "--user", "alice", "--expiry", "1d")
    assert TOKEN.fullmatch(done.good)
    assert "not in the audit log" in done.err
