"""mcpctl's command line as a person or a script meets it: a process, its output and its exit code."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcpctl.cli import init
from site_of_mcpctl import COMMAND, command, environment

SHOP = "databases:\n  shop: {host: /nonexistent, dbname: shop, user: reader}\n"


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed as it should: one error, a hint or none, and no traceback."""
        assert self.code not in (0, None), (self.out, self.err)
        assert "Traceback" not in self.err, self.err
        assert self.err.count("mcpctl: error: ") == 1, self.err
        return self.err[self.err.index("mcpctl: error: ") :]

    @property
    def good(self) -> str:
        assert self.code == 0, (self.code, self.err)
        assert "Traceback" not in self.err
        return self.out


def run(
    *arguments: str,
    stdin: str | bytes | None = None,
    env: dict[str, str] | None = None,
    cwd: str | Path = "",
    **more: Any,
) -> Done:
    """mcpctl with these arguments, without a terminal; `more` is for subprocess.run."""
    if not (more or any(name.startswith("PYTHON") for name in env or {})):  # which Python reads when it begins
        done = command(*arguments, input=stdin, env=env, cwd=cwd)
    else:
        done = subprocess.run(
            [*COMMAND, *arguments], input=stdin or "", capture_output=True, timeout=60, text=True,
            env=environment(**(env or {})), cwd=cwd or None, **more,
        )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


class Home:
    """An installation without a server: its files, and mcpctl on them."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        init.make(folder, SHOP + extra)
        self.folder = folder
        self.config = folder / "config.yaml"

    def __call__(self, *arguments: str, **options: Any) -> Done:
        return run("--config", str(self.config), *arguments, **options)

    def token(self, *arguments: str) -> tuple[str, str]:
        """(id, token) of a new one."""
        text = self("token", "add", "--expiry", "30d", *arguments).good.strip()
        return text.split("_")[1], text

    def files(self) -> dict[str, bytes]:
        """Every file and what is in it."""
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


def on_a_terminal(
    arguments: Sequence[str],
    env: dict[str, str] | None = None,
    until: Callable[[str], bool] | None = None,
    answers: Sequence[tuple[str, str]] = (),
    width: int = 200,
) -> Done:
    """mcpctl with a terminal for stdin, stdout and stderr. `until`: what has been shown is enough, and Ctrl-C ends it.
    `answers`: what is typed when a text has been shown, since the last one was typed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env=environment(TERM="xterm-256color", COLUMNS=str(width), **(env or {})),
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(follower)
    shown, waiting, typed, ended, enough = b"", list(answers), 0, time.monotonic() + 30, float("inf")
    try:
        while time.monotonic() < ended:
            ready, _, _ = select.select([leader], [], [], 0.05)
            if ready:
                try:
                    chunk = os.read(leader, 65536)
                except OSError:  # the last one who held the other end is gone
                    break
                if not chunk:
                    break
                shown += chunk
            elif time.monotonic() - enough > 2:  # as a person would: Python loses one that comes just before it reads
                os.write(leader, b"\x03")
                enough = time.monotonic()
            text = shown.decode("utf-8", "replace")
            if waiting and waiting[0][0] in text[typed:]:
                answer, typed = waiting.pop(0)[1], len(text)
                os.write(leader, answer.encode())
                enough = time.monotonic() if answer == "\x03" else enough
            if until is not None and until(text):
                os.write(leader, b"\x03")
                until, enough = None, time.monotonic()
        try:
            code = process.wait(max(0.1, ended - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on; waiting for {waiting}, shown:\n{shown.decode()}") from None
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return Done(code, shown.decode().replace("\r\n", "\n"), shown.decode())


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
