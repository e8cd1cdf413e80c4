"""mcpctl audit tail: the end of the log, filtered, followed, and nothing in it that steers a terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chain import verify
from command_line import Home, on_a_terminal
from mcpctl.audit.log import AuditLog, read_key
from site_of_mcpctl import COMMAND, environment


@pytest.fixture
def alice(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found("user", "add", "alice")
    return found


@pytest.fixture
def busy(alice: Home) -> tuple[Home, str]:
    name = alice.token("--user", "alice")[0]
    alice.token()
    alice("token", "revoke", name, "--reason", "lost laptop")
    return alice, name


def test_an_event_that_there_is_not_is_an_error_that_says_which_was_meant(busy: tuple[Home, str]) -> None:
    home, _ = busy
    refused = home("audit", "tail", "--event", "tool.caled")
    assert refused.code == 2
    assert "did you mean tool.called?" in refused.error
    assert home("audit", "tail", "--event", "nope.*").code == 2


def test_audit_tail_shows_the_end_and_filters(busy: tuple[Home, str]) -> None:
    home, name = busy

    def events(*arguments: str) -> list[str]:
        return [json.loads(line)["event"] for line in home("audit", "tail", "--json", *arguments).good.splitlines()]

    every = ["user.added", "token.added", "token.added", "token.revoked"]
    assert events() == every
    assert events("-n", "1") == ["token.revoked"]
    assert events("-n", "0") == []
    assert events("-n", "99999999999999999999") == every
    assert events("--user", "alice") == ["user.added", "token.added", "token.revoked"]
    assert events("--token", name) == ["token.added", "token.revoked"]
    assert events("--event", "token.*") == every[1:]
    assert events("--event", "token.added", "-n", "1") == ["token.added"]
    assert events("--event", "token.removed") == []
    assert events("--since", "1h") == every
    assert events("--since", "1h", "-n", "2") == every[2:]
    assert events("--since", "2999-01-01") == []
    for far in ("soon", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert home("audit", "tail", "--since", far).code == 2
        for option in ("--since", "--until"):
            done = home("audit", "who-read", "sales.orders", option, far)
            assert (done.code, f"{option} {far!r} is no time" in done.error) == (2, True)
    piped = home("audit", "tail").good
    assert len(piped.splitlines()) == 4
    assert all(line.count("\t") == 8 for line in piped.splitlines())
    assert "\x1b" not in piped + on_a_terminal(["--config", str(home.config), "audit", "tail"], {"NO_COLOR": "1"}).good
    key = bytes.fromhex((home.folder / "audit.key").read_text())
    assert verify(home.folder / "audit.jsonl", key=key) == 4


def test_audit_tail_can_be_read_on_a_narrow_terminal(busy: tuple[Home, str]) -> None:
    home, name = busy
    shown = on_a_terminal(["--config", str(home.config), "audit", "tail"], {"NO_COLOR": "1"}, width=80).good
    head, *rows = shown.splitlines()
    assert head.split() == ["TIME", "EVENT", "TOKEN", "USER", "OUTCOME", "WHAT"]
    assert all(len(row) <= 80 for row in rows)
    assert sum(name in row for row in rows) == 2
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +[a-z]+\.", row) for row in rows if row[0] != " ")


def test_audit_tail_follows_over_a_rotation_until_ctrl_c(busy: tuple[Home, str]) -> None:
    home, _ = busy
    shown: list[str] = []
    steps: list[Callable[[], object]] = [
        lambda: home("user", "add", "carol"),
        lambda: (home.folder / "audit.jsonl").rename(home.folder / "audit.jsonl.1"),
        lambda: home("user", "add", "dave"),
    ]

    def until(text: str) -> bool:
        shown.append(text)
        if "lost" in text and steps and ("carol" in text or len(steps) == 3):
            steps.pop(0)()
        return "dave" in text

    done = on_a_terminal(["--config", str(home.config), "audit", "tail", "-f", "-n", "1"], {"NO_COLOR": "1"}, until)
    assert done.code == 130
    rows = done.out.splitlines()
    assert [row.split()[:1] for row in rows].count(["TIME"]) == 1
    assert [word for row in rows for word in ("lost", "carol", "dave") if word in row] == ["lost", "carol", "dave"]
    assert "Traceback" not in done.out


def test_an_interrupt_exits_130_without_a_word(busy: tuple[Home, str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--config", str(busy[0].config), "audit", "tail", "-f"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert "user.added" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].strip() == ""
    assert process.returncode == 130


def test_audit_tail_shows_statements_as_blocks_and_one_address_alone(alice: Home) -> None:
    log = AuditLog(alice.folder / "audit.jsonl", read_key(alice.folder / "audit.key"), lambda: datetime.now(UTC))
    for address, statement in (("192.0.2.1", "select 1\nfrom x\x1b[2J"), ("192.0.2.2", "select 2")):
        log.append("tool.called", user="alice", client_ip=address, tool="query_database", statement=statement, rows=3)
    log.append("tool.called", user="alice", client_ip="192.0.2.2", tool="execute_statement", statement_hmac="ab12")
    log.close()
    shown = alice("audit", "tail", "--sql").good.split("\n\n")
    assert [part.split("\n")[1:] for part in shown[:3]] == [
        ["    select 1", "    from x\\x1b[2J"], ["    select 2"], ["    (not kept; HMAC ab12)"],
    ]  # fmt: skip
    assert shown[1].split("\n")[0].endswith("  alice  192.0.2.2  query_database  3")
    assert alice("audit", "tail", "--sql", "--ip", "192.0.2.1").good.count("query_database") == 1
    assert len(alice("audit", "tail", "--ip", "192.0.2.2").good.splitlines()) == 2


def test_audit_tail_finds_addresses_in_any_spelling_and_by_network(alice: Home) -> None:
    log = AuditLog(alice.folder / "audit.jsonl", read_key(alice.folder / "audit.key"), lambda: datetime.now(UTC))
    for address in ("10.0.0.7", "10.0.1.7", "2001:db8::1", "2001:db8:0:1::/64", "not one"):
        log.append("auth.refused", client_ip=address, reason="x")
    log.close()

    def found(address: str) -> list[str]:
        lines = alice("audit", "tail", "--json", "--ip", address).good.splitlines()
        return [json.loads(line)["client_ip"] for line in lines]

    assert found("10.0.0.0/24") == found("::ffff:10.0.0.7") == ["10.0.0.7"]
    assert found("2001:0DB8:0:0:0:0:0:1") == ["2001:db8::1"]
    assert found("2001:db8:0:1::9") == ["2001:db8:0:1::/64"]
    assert found("2001:db8::/32") == ["2001:db8::1", "2001:db8:0:1::/64"]
    assert (alice("audit", "tail", "--ip", "nonsense").code, alice("audit", "tail", "--ip", "").code) == (2, 2)


def test_audit_top_counts_calls_and_refusals_by_what_is_asked(alice: Home) -> None:
    log = AuditLog(alice.folder / "audit.jsonl", read_key(alice.folder / "audit.key"), lambda: datetime.now(UTC))
    call = {"user": "alice", "token": "abcd1234", "client_ip": "192.0.2.1", "tool": "query_database"}
    for rows in (1, 2):
        log.append("tool.called", **call, database="shop", relations=["public.a", "public.b"], rows=rows)
    log.append("tool.refused", **call, reason="no grant")
    for _ in range(2):
        log.append("auth.refused", client_ip="203.0.113.9", reason="no such token\x1b")
    log.append("auth.refused", client_ip="203.0.113.9", reason="40 more within a minute")
    log.close()

    def top(by: str, *arguments: str) -> list[list[str]]:
        return [row.split("\t")[:4] for row in alice("audit", "top", "--by", by, *arguments).good.splitlines()]

    refused = alice("audit", "tail", "--event", "auth.refused", "-n", "1").good
    assert refused.endswith("\tfrom 203.0.113.9: 40 more within a minute\n")
    assert top("user") == [["alice", "3", "1", "3"]]
    assert top("ip") == [["203.0.113.9", "42", "42", "0"], ["192.0.2.1", "3", "1", "3"]]
    assert top("ip", "-n", "1") == [["203.0.113.9", "42", "42", "0"]]
    assert top("table") == [["shop:public.a", "2", "0", "3"], ["shop:public.b", "2", "0", "3"]]
    assert [row[:2] for row in top("reason")] == [
        ["more within a minute, counted", "40"], ["no such token\\x1b", "2"], ["no grant", "1"],
    ]  # fmt: skip
    assert top("ip", "--since", "2999-01-01") == []
    assert json.loads(alice("audit", "top", "--by", "tool", "--json").good)["top"][0]["key"] == "query_database"
    assert "say one of user, token" in alice("audit", "top", "--by", "weather").error
