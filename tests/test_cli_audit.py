"""mcpctl audit tail: the end of the log, filtered, followed, and nothing in it that steers a terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chain import verify
from command_line import Home, on_a_terminal
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
    alice("token", "revoke", name, "--reason", "lost\x1b[31m\nlaptop")
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
    assert home("audit", "tail", "--since", "soon").code == 2
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
