"""Use and age of tokens: token list --usage, its warnings and the doctor's; revoke --all --except."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from command_line import Home
from mcpctl.audit import usage
from mcpctl.audit.log import AuditLog, read_key
from mcpctl.identity import tokens
from test_control import process


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def write(home: Home, *lines: dict[str, Any], ago: timedelta = timedelta()) -> None:
    log = AuditLog(home.folder / "audit.jsonl", read_key(home.folder / "audit.key"), lambda: datetime.now(UTC) - ago)
    for line in lines:
        log.append(line.pop("event", "tool.called"), **line)
    log.close()


def made(home: Home, name: str, ago: timedelta) -> None:
    """Have a token been made that long ago."""
    file = home.folder / "tokens.yaml"
    now = json.loads(home("token", "show", name, "--json").good)["created_at"]
    file.write_text(file.read_text().replace(now, tokens.rfc3339(datetime.now(UTC) - ago)))


def test_token_list_tells_how_each_is_used_by_the_log_of_30_days(home: Home) -> None:
    write(home, {"token": "x" * 8, "rows": 9, "client_ip": "192.0.2.77"}, ago=timedelta(days=31))
    one, other = home.token()[0], home.token()[0]
    for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"):
        write(home, {"token": one, "rows": 5, "client_ip": address})
    write(home, {"event": "tool.refused", "token": one, "client_ip": "192.0.2.1"}, {"token": "y" * 8, "rows": 7})
    done = home("token", "list", "--usage", "--json")
    found = {row["id"]: row for row in json.loads(done.good)["tokens"]}
    assert [found[one][key] for key in ("calls", "rows", "addresses")] == [5, 20, 3]
    assert found[one]["last_used"].startswith(str(datetime.now(UTC).year))
    assert [found[other][key] for key in ("calls", "rows", "addresses", "last_used")] == [0, 0, 0, None]
    assert "used: by the log since " in done.err
    assert [len(row.split("\t")) for row in home("token", "list", "--usage").good.splitlines()] == [12, 12]
    assert "calls" not in home("token", "list", "--json").good
    path = home.folder / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[2:]))
    assert "the log here begins with line 3" in home("token", "list", "--usage").err
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::2]))
    for arguments in ((), ("--json",)):
        done = home("token", "list", "--usage", *arguments)
        assert (done.code, one in done.out, "the log is not whole: lines 4 to 4 are missing" in done.err) == (
            1, True, True,
        )  # fmt: skip


def test_a_line_that_counts_refusals_counts_as_many_and_is_no_later_use(home: Home) -> None:
    name = home.token()[0]
    write(home, {"token": name, "tool": "query_database"}, ago=timedelta(hours=1))
    more = {"event": "tool.refused", "outcome": "limited", "token": name}
    write(home, {**more, "reason": "40 more within a minute, by the rate limit of the token"})
    write(home, {**more, "reason": "2 more within a minute, by the rate limit of the token"})
    [row] = json.loads(home("token", "list", "--usage", "--json").good)["tokens"]
    assert row["calls"] == 43
    assert row["last_used"] < tokens.rfc3339(datetime.now(UTC) - timedelta(minutes=59))
    found = json.loads(home("incident", "report", "--token", name, "--json").good)
    assert found["used"]["count"] == 43
    assert [(one["tool"], one["outcome"], one["count"]) for one in found["calls"]] == [
        ("(any)", "limited", 42), ("query_database", "None", 1),
    ]  # fmt: skip
    assert [(one["reason"], one["count"]) for one in found["refusals"]] == [("more within a minute, counted", 42)]


def test_old_tokens_and_those_that_never_end_are_warned_of(home: Home) -> None:
    never = home("token", "add", "--expiry", "never").good.split("_")[1]
    old, young = home.token()[0], home.token()[0]
    made(home, old, tokens.OLD + timedelta(minutes=1))
    made(home, young, tokens.OLD - timedelta(minutes=1))
    shown = home("token", "list").err
    assert f"never expire: {never}\n" in shown
    assert f"are older than a year: {old}\n" in shown
    assert f"older than a year: {old}\t" in home("doctor").out
    home("token", "revoke", never, old)
    assert home("token", "list").err == ""
    assert "older than a year" not in home("doctor").out


def test_the_doctor_names_a_token_that_comes_from_many_addresses_within_a_day(home: Home) -> None:
    log = home.folder / "audit.jsonl"
    assert usage.shared(log, datetime.now(UTC)) == {}
    seen = [f"192.0.2.{n}" for n in range(usage.MANY_ADDRESSES)]
    write(home, *({"event": "auth.ok", "token": "a" * 8, "client_ip": one} for one in seen), ago=timedelta(days=2))
    write(home, *({"event": "auth.ok", "token": "b" * 8, "client_ip": one} for one in seen[1:]))
    write(home, *({"event": "auth.refused", "token": "b" * 8, "client_ip": f"198.51.100.{n}"} for n in range(9)))
    write(home, *({"event": "auth.ok", "token": "c" * 8, "client_ip": f"2001:db8::{n}"} for n in range(20)))
    assert usage.shared(log, datetime.now(UTC)) == {}
    write(home, {"event": "auth.ok", "token": "b" * 8, "client_ip": seen[0]})
    assert usage.shared(log, datetime.now(UTC)) == {"b" * 8: usage.MANY_ADDRESSES}
    assert f"{'b' * 8} came from {usage.MANY_ADDRESSES} addresses within a day" in home("doctor").out


def test_all_tokens_but_some_are_revoked_at_once(home: Home) -> None:
    keep, one, two = (home.token()[0] for _ in range(3))
    before = home.files()
    assert home("token", "revoke", "--all", "--except", keep, "--except", "nosuchid").code == 4
    assert home("token", "revoke", one, "--except", keep).code == 2
    assert home.files() == before
    done = home("token", "revoke", "--all", "--except", keep, "--reason", "leaked").good
    assert done == f"{one} revoked\n{two} revoked\nno server runs\n"
    assert {row["id"]: row["status"] for row in json.loads(home("token", "list", "--json").good)["tokens"]} == {
        keep: "active", one: "revoked", two: "revoked",
    }  # fmt: skip


def test_no_token_is_made_for_a_file_that_anybody_could_replace(home: Home, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    done = home("token", "add", "--expiry", "1d", "--out", str(tmp_path / "open" / "x"))
    assert (done.code, "can be written by anybody" in done.error) == (3, True)
    assert home("token", "list").good == ""
    assert not list((tmp_path / "open").iterdir())


def test_all_tokens_are_rotated_into_private_files(home: Home) -> None:
    home("user", "add", "alice")
    keep, mine, service = home.token()[0], home.token("--user", "alice")[0], home.token()[0]
    dead = home.token()[0]
    home("token", "revoke", dead)
    out = home.folder / "new"
    for wrong in (["--all"], [mine, "--all", "--out", str(out)], [mine, "--except", keep], []):
        assert home("token", "rotate", *wrong).code == 2
    assert home("token", "rotate", "--all", "--out", str(out), "--except", "nosuchid").code == 4
    assert not out.exists()
    done = json.loads(home("token", "rotate", "--all", "--out", str(out), "--except", keep, "--json").good)
    assert [(one["old"], one["user"]) for one in done["rotated"]] == [(mine, "alice"), (service, None)]
    assert sorted(path.name for path in out.iterdir()) == [f"alice-{mine}.token", f"service-{service}.token"]
    assert {path.stat().st_mode & 0o777 for path in (*out.iterdir(), out)} == {0o600, 0o700}
    for one in done["rotated"]:
        assert home("token", "verify", "--file", one["out"]).good == f"token {one['new']} is active\n"
    status = {row["id"]: row["status"] for row in json.loads(home("token", "list", "--json").good)["tokens"]}
    assert (status[keep], status[mine], status[service], status[dead]) == ("active", "revoked", "revoked", "revoked")
    again = home("token", "rotate", "--all", "--out", str(out), "--overlap", "1h")
    assert again.good.count(" replaced by ") == 3
    assert again.good.endswith("no server runs\n")


def test_a_typo_beside_a_right_id_does_not_keep_that_one_alive(home: Home) -> None:
    one, other = home.token()[0], home.token()[0]
    done = home("token", "revoke", one, "zzzzzzzz", "yyyyyyyy", other)
    assert (done.code, done.out) == (4, f"{one} revoked\n{other} revoked\nno server runs\n")
    assert "there is no token zzzzzzzz; there is no token yyyyyyyy" in done.error
    with process(home.folder, "1", b'{"sessions": [], "open": false}\n') as asked:
        done = home("session", "revoke", "zzzzzzzz", one)
    assert (done.code, done.out) == (4, f"{one}: had nothing open\n")
    assert "there is no token zzzzzzzz" in done.error
    assert [request["token"] for request in asked if request["do"] == "end_session"] == [one]


@pytest.mark.parametrize("words", [("--all", "zzzzzzzz"), ("--except", "zzzzzzzz"), ("zzzzzzzz", "--except", "x"), ()])
def test_what_does_not_go_with_all_is_said(home: Home, words: tuple[str, ...]) -> None:
    done = home("token", "revoke", *words)
    assert done.code == 2
    assert "or say --all" in done.error
    assert "--except goes with --all" in done.error


def test_a_store_that_cannot_be_opened_is_no_reason_to_stop_once_a_right_is_taken(home: Home) -> None:
    home("user", "add", "alice")
    name, _ = home.token("--user", "alice")
    (home.folder / "state.db").unlink(missing_ok=True)
    (home.folder / "state.db").mkdir()
    assert home("token", "revoke", name).good == f"{name} revoked\nno server runs\n"
    assert home("user", "disable", "alice").good == "alice disabled\nno server runs\n"
