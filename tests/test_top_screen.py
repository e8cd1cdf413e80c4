"""The screen of mcpctl top, on a real terminal beside a real server: what is marked, what keys do, how it is left."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mcpctl.cli.top_screen import Screen, Seen
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually, in_background

LONG = "select pg_sleep(60)::text"
LEFT = "\x1b[?1049l"
"""The alternate screen is left."""


class Terminal:
    """A terminal, and a program on it."""

    def __init__(self, arguments: list[str], env: dict[str, str], size: tuple[int, int]) -> None:
        self.leader, self.follower = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.follower)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=self.follower, stdout=self.follower, stderr=self.follower, start_new_session=True,
            env=environment(**{"TERM": "xterm-256color", **env}),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, seconds: float = 0.05) -> bool:
        """Take what it has written; whether there was anything."""
        if not select.select([self.leader], [], [], seconds)[0]:
            return False
        try:
            self.shown += os.read(self.leader, 1 << 16).decode("utf-8", "replace")
        except OSError:
            return False
        return True

    def until(self, what: str, since: int = 0) -> str:
        """Wait until it has written that, not before this place; all since then."""
        eventually(lambda: (self.read() and what in self.shown[since:]) or what in self.shown[since:], 30)
        return self.shown[since:]

    def press(self, keys: str, what: str) -> str:
        """Press keys, and wait for what they lead to."""
        here = len(self.shown)
        os.write(self.leader, keys.encode())
        return self.until(what, here)

    def end(self) -> int:
        code = None
        until = time.monotonic() + 20
        while code is None and time.monotonic() < until:
            self.read()
            code = self.process.poll()
        while self.read(0.1):
            pass
        assert code is not None, self.shown[-2000:]
        return code

    @property
    def as_it_was(self) -> bool:
        """Whether keys are handled as before, the cursor is seen, and the screen is the ordinary one."""
        attributes = termios.tcgetattr(self.follower)
        return (
            attributes == self.before
            and LEFT in self.shown
            and "\x1b[?25h" in self.shown.rpartition(LEFT)[0][-200:] + self.shown.rpartition(LEFT)[2]
        )


@contextmanager
def top(site: Site, *arguments: str, size: tuple[int, int] = (160, 30), **env: str) -> Iterator[Terminal]:
    found = Terminal(["--config", str(site.config), "top", "--interval", "0.3", *arguments], env, size)
    try:
        found.until("q: quit")
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        os.close(found.leader)
        os.close(found.follower)


def said(answer: Any) -> str:
    return str(answer.json()["result"]["content"][0]["text"])


def test_a_key_ends_a_query_and_another_one_its_token(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start("--workers", "2")
    (alice, token), (bob, other) = site.token("alice"), site.token("bob")
    with site.client(token) as first, site.client(other) as second, top(site) as screen:
        assert "mark a line first" in screen.press("x", "first")
        running = in_background(first.call, "query_database", {"query": LONG})
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        screen.until("1 call runs")
        screen.press("j", ">")
        screen.press("x", "ended: query_database of alice")
        answer = running.result()
        assert (answer.status_code, said(answer)) == (
            200,
            "an administrator has ended this call; your token is still good",
        )
        assert not newest_shop.backends("query ~ 'pg_sleep' and state = 'active'")
        assert first.rows("select 1") == [[1]]
        params = {"name": "query_database", "arguments": {"query": LONG}, "_meta": {"to/the-sdk": 1}}
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        slow = in_background(lambda: second.http.post(second.url, json=asked))
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        screen.until(bob, len(screen.shown))
        here = len(screen.shown)
        screen.until("1 call runs", here)
        screen.press("\x1b[A\x1b[A\x1b[A", ">")
        screen.press("x", "ended: query_database of bob")
        assert said(slow.result()) == said(answer)
        last = in_background(second.call, "query_database", {"query": LONG})
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        screen.until("1 call runs", len(screen.shown))
        screen.press("kkk", ">")
        screen.press("X", f"{bob} revoked; cut: 1 query, 0 backends left")
        assert last.result().status_code == 401
        assert second.call("whoami").status_code == 401
        os.write(screen.leader, b"q")
        assert screen.end() == 0
        assert screen.as_it_was
    lines = {(line["event"], line["token"]): line for line in site.audit() if line.get("transport") == "cli"}
    cut = lines["query.cancelled", alice]
    assert (cut["tool"], cut["database"], cut["user"]) == ("query_database", "shop", "alice")
    assert cut["reason"].startswith("one call was ended; mcpctl top; by ")
    assert lines["token.revoked", bob]["reason"].startswith("mcpctl top; by ")
    called = [line for line in site.audit() if line["event"] == "tool.refused" and line["token"] == alice]
    assert [(line["request_id"], line["outcome"]) for line in called] == [(cut["request_id"], "cut")]


def test_the_terminal_is_left_as_it_was_however_it_ends(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start()
    ends: list[tuple[Callable[[Terminal], object], int]] = [
        (lambda one: os.write(one.leader, b"\x03"), 130),
        (lambda one: os.write(one.leader, b"\x04"), 0),
        (lambda one: os.write(one.leader, b"\x1aq"), 0),  # Ctrl-Z stops nothing
        (lambda one: one.process.send_signal(signal.SIGTERM), -signal.SIGTERM),
        (lambda one: one.process.send_signal(signal.SIGHUP), -signal.SIGHUP),
    ]
    for end, code in ends:
        with top(site, NO_COLOR="1") as screen:
            end(screen)
            assert screen.end() == code
            assert screen.as_it_was, (code, screen.shown[-300:])
            assert not re.search(r"\x1b\[[0-9;]*3[0-9]", screen.shown)


def test_it_fits_any_size_and_outlives_the_server(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start()
    for _ in range(12):
        with site.client(site.token()[1]) as client:
            client.rows("select 1")
    with top(site, size=(200, 40), COLUMNS="80", LINES="24") as screen:  # as readline leaves them
        assert screen.shown.count(" alice ") >= 12
        here = len(screen.shown)
        screen.resize(60, 12)
        screen.process.send_signal(signal.SIGWINCH)
        small = screen.until("j k or arrows", here)
        frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", small.rpartition("\x1b[H")[2])
        assert len(frame.splitlines()) <= 12
        assert max(map(len, frame.splitlines())) <= 60
        site.stop()
        screen.until("no server runs", len(screen.shown))
        site.start()
        screen.until("0 calls run  ", len(screen.shown))
        os.write(screen.leader, b"q")
        assert screen.end() == 0


def seen(*names: str) -> Seen:
    of_call = dict.fromkeys(("user", "tool", "database", "backend_pid", "client_ip"))
    return Seen([{**of_call, "id": name, "token": f"t{name}", "seconds": 1.0} for name in names])


def test_a_mark_never_moves_to_another_call_by_itself() -> None:
    looks, ended = [seen("a", "b", "c"), seen("b", "c"), seen("c")], list[str]()

    def end(what: Any) -> str:
        ended.append(what["id"] if isinstance(what, dict) else what)
        return "done"

    made = Screen(lambda: looks.pop(0), end, end, lambda: "", sql=False)
    made.look()
    made.press(b"j")
    made.press(b"j")
    made.look()
    made.press(b"x")
    assert ended == ["b"]
    made.look()
    made.press(b"x")
    made.press(b"X")
    assert ended == ["b"]
    made.press(b"\x1b[B")
    made.press(b"X")
    assert ended == ["b", "tc"]


def test_no_text_from_outside_steers_the_terminal() -> None:
    from rich.console import Console

    evil = "a\x1b[2Jb\u202e"
    seen = Seen([{"id": "1", "seconds": 1, "user": evil, "token": "t", "tool": "q", "database": "d", "backend_pid": 1}])
    seen.running[0]["client_ip"], seen.failed = None, evil
    screen = Screen(lambda: seen, lambda call: f"ended: {call['user']}", str, str, sql=False)
    screen.look()
    for key in (b"j", b"x"):
        screen.press(key)
    console = Console(file=io.StringIO(), width=100)
    console.print(screen.drawn(100, 20))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("a\\x1b[2Jb\\u202e") == 3
    assert not {"\x1b", "\u202e"} & set(shown)


def test_no_id_is_cut_however_long_the_statement_is() -> None:
    from rich.console import Console

    there = seen("a")
    there.running[0] |= {"statement": "select " + "x" * 500, "token": "abcdefgh", "backend_pid": 4194304}
    made = Screen(lambda: there, lambda call: "", lambda token: "", lambda: "", sql=True)
    made.look()
    made.press(b"j")
    console = Console(width=70, height=20, record=True, file=io.StringIO())
    console.print(made.drawn(70, 20))
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("> ")]
    assert ("abcdefgh" in line, "4194304" in line, len(line) <= 70) == (True, True, True), line


@pytest.mark.parametrize("room", [2, 5, 30])
def test_the_marked_line_is_always_among_those_that_are_shown(room: int) -> None:
    from rich.console import Console

    there = seen(*map(str, range(30)))
    made = Screen(lambda: there, lambda call: "", lambda token: "", lambda: "", sql=False)
    made.look()
    for _ in range(25):
        made.press(b"j")
    console = Console(width=100, height=room + 7, record=True, file=io.StringIO())
    console.print(made.drawn(100, room + 7))
    text = console.export_text()
    assert len(text.splitlines()) <= room + 7
    assert [line for line in text.splitlines() if line.startswith("> ") and "t24" in line], json.dumps(text)
