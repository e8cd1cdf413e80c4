"""Sessions of the command line about users' passwords: what is asked, what is kept, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Home, on_a_terminal
from mcpctl.identity import passwords, tokens, users

HORSE = "correct horse battery"
OTHER = "another horse's battery"


@pytest.fixture
def alice(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home("user", "add", "alice")
    return home


def fits(home: Home, text: str, name: str = "alice") -> bool:
    kept = users.user_file(home.folder / "users.yaml").current()[name].password
    try:
        return passwords.RFC_9106_SECOND.verify(kept or "", text)
    except Exception:  # noqa: BLE001 - whatever it says, it is no yes
        return False


def logged(home: Home) -> list[tuple[str, str, str]]:
    lines = map(json.loads, (home.folder / "audit.jsonl").read_text().splitlines())
    return [(one["event"], one["user"], one["reason"].split(";")[0]) for one in lines if "user" in one]


def file_of(tmp_path: Path, data: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "given"
    path.touch()
    path.chmod(mode)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_password_comes_from_stdin_or_a_private_file_without_its_line_end(
    alice: Home, tmp_path: Path, end: bytes
) -> None:
    done = alice("user", "passwd", "alice", "--password-file", "-", stdin=HORSE + end.decode())
    assert (done.good, done.err) == ("alice: password set\n", "")
    assert fits(alice, HORSE)
    path = file_of(tmp_path, OTHER.encode() + end)
    shown = json.loads(alice("user", "passwd", "alice", "--password-file", path, "--json").good)
    assert shown == {"user": "alice", "has_password": True, "changed": True, "sessions_ended": [], "cut": None}
    assert fits(alice, OTHER)
    assert not fits(alice, HORSE)
    assert logged(alice)[1:] == [("user.password", "alice", "set")] * 2


def test_a_password_from_a_prompt_is_typed_twice_and_not_shown(alice: Home) -> None:
    arguments = ["--config", str(alice.config), "user", "passwd", "alice"]
    both = [("new password for alice:", f"{HORSE}\n"), ("the same again:", f"{HORSE}\n")]
    done = on_a_terminal(arguments, answers=both)
    assert done.code == 0, done
    assert "alice: password set" in done.out
    assert HORSE not in done.out
    assert fits(alice, HORSE)


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [(f"{OTHER}\n", 2, "the two passwords differ"), ("\x04", 2, "no password was typed"), ("\x03", 130, "")],
)
def test_a_prompt_that_is_not_answered_twice_alike_changes_nothing(
    alice: Home, typed: str, code: int, said: str
) -> None:
    before = alice.files()
    arguments = ["--config", str(alice.config), "user", "passwd", "alice"]
    both = [("new password for alice:", f"{HORSE}\n"), ("the same again:", typed)]
    done = on_a_terminal(arguments, answers=both)
    assert (done.code, said in done.out) == (code, True), done
    assert HORSE not in done.out
    assert "Traceback" not in done.out
    assert alice.files() == before


def test_without_a_terminal_nothing_is_asked(alice: Home) -> None:
    before = alice.files()
    done = alice("user", "passwd", "alice", stdin=f"{HORSE}\n{HORSE}\n")
    assert (done.code, done.out) == (2, "")
    assert "there is no terminal to ask at" in done.error
    assert "--password-file" in done.error
    assert alice.files() == before


@pytest.mark.parametrize(
    ("data", "mode", "code", "why"),
    [
        (b"", 0o600, 2, "the password is empty"),
        (b"\n", 0o600, 2, "the password is empty"),
        (b"short\n", 0o600, 2, "has 5 characters, and needs 15"),
        (b"correct horse battery\n\n", 0o600, 2, "holds a control character"),
        (b"correct horse\nbattery staple\n", 0o600, 2, "holds a control character"),
        (b"correct horse battery \xff", 0o600, 2, "is not in UTF-8"),
        (b"correct horse" * 1000, 0o600, 2, "longer than 1024 bytes"),
        (b"correct horse" * 100_000, 0o600, 3, "is larger than 1 MiB"),
        (b"a" * 20, 0o600, 2, "a few characters, again and again"),
        (tokens.signed("mcp_1hrspjl1_" + "Zy" * 21 + "x").encode(), 0o600, 2, "holds a token"),
        (HORSE.encode(), 0o640, 3, "has mode 0640"),
        (HORSE.encode(), 0o604, 3, "has mode 0604"),
    ],
)
def test_what_is_no_password_is_refused_not_repeated_and_changes_nothing(
    alice: Home, tmp_path: Path, data: bytes, mode: int, code: int, why: str
) -> None:
    path, before = file_of(tmp_path, data, mode), alice.files()
    for arguments in (["passwd", "alice"], ["add", "bob"]):
        done = alice("user", *arguments, "--password-file", path)
        assert (done.code, done.out) == (code, ""), done
        assert why in done.error
        assert "mcpctl: hint: " in done.error
        assert len(data) < 6 or data.decode("latin-1").strip()[:13] not in done.err
    assert alice.files() == before


def test_a_file_that_is_not_there_or_none_is_refused(alice: Home, tmp_path: Path) -> None:
    before = alice.files()
    for path in (tmp_path / "nowhere", tmp_path):
        done = alice("user", "passwd", "alice", "--password-file", str(path))
        assert (done.code, str(path) in done.error) == (3, True), done
    assert alice.files() == before


def test_a_user_who_is_not_there_gets_no_password(alice: Home) -> None:
    before = alice.files()
    done = alice("user", "passwd", "bob", "--password-file", "-", stdin=HORSE)
    assert (done.code, "there is no user bob" in done.error) == (4, True)
    assert alice("user", "passwd", "bob", "--remove").code == 4
    assert alice("user", "passwd", "alice", "--remove", "--password-file", "-", stdin=HORSE).code == 2
    assert alice.files() == before


def test_a_user_is_added_with_a_password(alice: Home) -> None:
    assert alice("user", "add", "bob", "--password-file", "-", stdin=HORSE).good == "bob added\n"
    assert fits(alice, HORSE, "bob")
    assert logged(alice)[1:] == [
        ("user.added", "bob", "by " + logged(alice)[1][2][3:]),
        ("user.password", "bob", "set"),
    ]
    done = alice("user", "add", "bob", "--password-file", "-", stdin=OTHER)
    assert done.code == 5
    assert fits(alice, HORSE, "bob")


def test_a_password_is_removed_and_once_more_is_no_failure(alice: Home) -> None:
    alice("user", "passwd", "alice", "--password-file", "-", stdin=HORSE)
    assert alice("user", "passwd", "alice", "--remove").good == "alice: password removed\n"
    assert b"argon2" not in (alice.folder / "users.yaml").read_bytes()
    assert alice("user", "passwd", "alice", "--remove").good == "alice had no password\n"
    shown = json.loads(alice("user", "passwd", "alice", "--remove", "--json").good)
    assert shown == {"user": "alice", "has_password": False, "changed": False, "sessions_ended": [], "cut": None}
    assert logged(alice)[1:] == [("user.password", "alice", "set"), ("user.password", "alice", "removed")]


def test_whether_there_is_a_password_is_shown_and_neither_it_nor_its_hash(alice: Home) -> None:
    name, _ = alice.token("--user", "alice")
    for has, answer in ((False, "no"), (True, "yes")):
        if has:
            alice("user", "passwd", "alice", "--password-file", "-", stdin=HORSE)
        assert f"password\t{answer}\n" in alice("user", "show", "alice").good
        one = json.loads(alice("user", "show", "alice", "--json").good)
        [listed] = json.loads(alice("user", "list", "--json").good)["users"]
        assert one == listed
        assert (one["has_password"], "password" in one) == (has, False)
    said = [
        alice(*words, *more)
        for words in (["user", "show", "alice"], ["user", "list"], ["token", "show", name], ["audit", "tail"])
        for more in ([], ["--json"])
    ] + [alice("config", "check"), alice("incident", "report", "--user", "alice", "--json")]
    assert all("argon2" not in done.out + done.err and HORSE not in done.out + done.err for done in said)
    kept = {path for path, data in alice.files().items() if b"t=3" in data or HORSE.encode() in data}
    assert kept == {str(alice.folder / "users.yaml")}


def test_a_password_is_not_set_while_the_audit_log_cannot_be_written_but_is_taken(alice: Home) -> None:
    alice("user", "passwd", "alice", "--password-file", "-", stdin=HORSE)
    (alice.folder / "audit.jsonl").chmod(0o644)
    before = alice.files()
    for arguments in (["passwd", "alice"], ["add", "bob"]):
        done = alice("user", *arguments, "--password-file", "-", stdin=OTHER)
        assert (done.code, done.out) == (3, "")
        assert "nothing was done: the audit log cannot be written" in done.error
    assert alice.files() == before
    done = alice("user", "passwd", "alice", "--remove")
    assert done.good == "alice: password removed\n"
    assert "mcpctl: warning: done, but not in the audit log" in done.err


def test_a_hash_of_another_cost_stops_every_command_and_says_what_to_do(alice: Home) -> None:
    path = alice.folder / "users.yaml"
    alice("user", "passwd", "alice", "--password-file", "-", stdin=HORSE)
    path.write_text(path.read_text().replace("t=3", "t=30"))
    for arguments in (["user", "list"], ["config", "check"], ["token", "add", "--user", "alice", "--expiry", "1d"]):
        done = alice(*arguments)
        assert done.code == 3
        assert "users.yaml:3: alice: password: t=30, m=65536, p=4, 16+32 bytes; only t=3, m=65536, p=4" in done.error
        assert "`mcpctl user passwd`" in done.error
