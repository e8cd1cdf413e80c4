"""mcpctl import pgedge: their users and tokens made anew here, all or none."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest

from command_line import Home
from mcpctl import pgedge, private_file
from mcpctl.errors import ConfigError
from mcpctl.identity import tokens, users
from site_of_mcpctl import COMMAND

TOKENS = """
tokens:
    prod-api:
        hash: "a7b3c8d9e1f2a3b4c5d6e7f8a9b0c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f6a7b8"
        annotation: "Production API - Team A"
        created_at: 2025-01-15T08:30:00.123456789Z
        expires_at: 2999-12-31T23:59:59Z
        database: shop
    dev-local: {hash: "1a2b", annotation: "", expires_at: null, connections: {connections: {x: {alias: x}}}}
    over: {hash: "1a2b", expires_at: 2025-12-31T23:59:59+02:00}
"""
LISTED = """
tokens:
  - id: token-1234567890
    hash: b3f805a4c2e7d9f1a8b6c3e2d5f4a1b9c8e7d6f5a4b3c2e1d9f8a7b6c5e4d3f2
    note: Production API
    created_at: "2024-10-30T10:15:30Z"
    expires_at: "2999-10-30T10:15:30Z"
"""
USERS = """
users:
    Alice.Smith: {username: Alice.Smith, password_hash: $2a$12$abc, created_at: 2024-10-30T10:15:30Z,
                  last_login: null, enabled: true, annotation: Developer}
    9lives: {username: 9lives, password_hash: $2a$12$abc, enabled: false, annotation: ""}
"""


def _file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.unlink(missing_ok=True)
    private_file.create(path, text.encode())
    return str(path)


def test_users_come_disabled_and_tokens_are_issued_anew_with_a_list_of_who_gets_which(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", "auth: {max_token_lifetime: 90d}\n")
    words = ["import", "pgedge", "--tokens", _file(tmp_path, "t", TOKENS), "--users", _file(tmp_path, "u", USERS)]
    before, out = home.files(), tmp_path / "list"
    assert home(*words).code == 2  # nobody would have the tokens
    dry = json.loads(home(*words, "--dry-run", "--json").good)
    assert home.files() == before
    assert dry["users"] == {"Alice.Smith": "alice-smith", "9lives": "u-9lives"}
    assert dry["expired"] == ["over"]
    assert dry["not_carried_over"] == ["connections of tokens"]
    done = home(*words, "--out", str(out))
    assert "mcp_" not in done.good + done.err
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = [line.split("\t") for line in out.read_text().splitlines()[1:]]
    made = tokens.token_file(home.folder / "tokens.yaml").current()
    assert [row[0] for row in rows] == ["prod-api", "dev-local"]
    for _, name, text, note in rows:
        assert tokens.matches(made[name], text)
        assert (made[name].note or "") == note
        assert made[name].databases == ("shop",)
        assert made[name].expires_at is not None
        assert made[name].expires_at - made[name].created_at <= home_limit()
    people = users.user_file(home.folder / "users.yaml").current()
    assert {name: (one.disabled_at is None, one.password) for name, one in people.items()} == {
        "alice-smith": (False, None), "u-9lives": (False, None),
    }  # fmt: skip
    events = [json.loads(line)["event"] for line in (home.folder / "audit.jsonl").read_text().splitlines()]
    assert events == ["user.added", "user.added", "token.added", "token.added"]
    after = home.files()
    (tmp_path / "list").unlink()
    assert home(*words, "--out", str(out)).code == 5
    assert home.files() == after
    assert not out.exists()


def home_limit() -> object:
    from datetime import timedelta

    return timedelta(days=90)


def test_what_is_not_in_order_imports_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    before, out = home.files(), str(tmp_path / "list")
    for name, text, code in (
        ("--tokens", "tokens: {a: {annotation: no hash}}", 3),
        ("--tokens", "tokens: {a: {hash: x, expires_at: soon}}", 3),
        ("--tokens", "tokens: {a: {hash: x, database: nowhere}}", 4),
        ("--tokens", "users: {}", 3),
        ("--tokens", "tokens: !!python/object:os.system {}", 3),
        ("--users", "users: {A.b: {enabled: true}, a-b: {enabled: true}}", 5),
        ("--users", "users: {'!!!': {enabled: true}}", 3),
        ("--users", "users: [[[]]]", 3),
        ("--tokens", 'tokens: {"a\\tb\\nc": {hash: x}}', 3),
    ):
        done = home("import", "pgedge", name, _file(tmp_path, "bad", text), "--out", out)
        assert done.code == code, (text, done.err)
        assert done.error
        assert home.files() == before, text
        assert not Path(out).exists()
    assert home("import", "pgedge", "--users", str(tmp_path / "none")).code == 4
    assert home("import", "pgedge").code == 2


def test_a_list_that_nobody_reads_imports_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    line = ("import", "pgedge", "--tokens", _file(tmp_path, "t", "tokens: {a: {hash: x, annotation: b c}}"))
    line = (*line, "--users", _file(tmp_path, "u", "users: {bob: {}}"), "--user", "bob", "--out", "-")
    assert home(*line, "--json").code == 2
    with open("/dev/full", "w") as full:
        command = [*COMMAND, *line, "--config", str(home.config)]
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == 1
    assert not tokens.token_file(home.folder / "tokens.yaml").current()
    assert "bob" not in users.user_file(home.folder / "users.yaml").current()
    listed = home(*line).good.splitlines()[0].split("\t")
    assert (listed[0], listed[2][:4], listed[3]) == ("a", "mcp_", "b c")


def test_the_listed_form_of_their_documentation_is_read_too() -> None:
    found, left = pgedge.tokens(LISTED.encode(), Path("t"))
    assert [(one.id, one.note) for one in found] == [("token-1234567890", "Production API")]
    assert left == []
    with pytest.raises(ConfigError):
        pgedge.tokens(b"tokens: [{note: x}]", Path("t"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("alice", "alice"), ("Alice.Smith", "alice-smith"), ("9lives", "u-9lives"), ("a_b@c.org", "a-b-c-org")],
)
def test_a_name_becomes_one_of_our_form(theirs: str, ours: str) -> None:
    assert pgedge.ours(theirs) == ours
