"""mcpctl demo: everything at once, a first answer, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from mcpctl.postgres import harden
from site_of_mcpctl import COMMAND, environment


@contextlib.contextmanager
def demo(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "demo", "--port", "0", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**variables),
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _running_in(folder: str) -> list[str]:
    """Processes whose arguments name that folder."""
    found = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = one.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if folder in text:
                found.append(text)
    return found


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder with a name that wants quotes everywhere, and is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="a f'#1 ") as name:
        Path(name).chmod(0o755)  # PostgreSQL may run as another user there
        yield Path(name)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed line is curl's, and there is no curl")
def test_the_printed_curl_line_answers_with_rows_and_ctrl_c_leaves_nothing(own_folder: Path) -> None:
    others = {"PGOPTIONS": "-c default_transaction_read_only=on", "PGSERVICE": "nope", "PGCHANNELBINDING": "require"}
    with demo(TMPDIR=str(own_folder), **others) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if "Ctrl-C ends everything" in line:
                break
        [curl] = [line.strip() for line in lines if line.startswith("  curl ")]
        done = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=30, env=environment())
        assert len(json.loads(done.stdout)["result"]["structuredContent"]["rows"]) == 3
        header = Path(next(word for word in shlex.split(curl) if word.startswith("@"))[1:])
        assert stat.S_IMODE(header.stat().st_mode) == 0o600
        [token] = [line.split("=")[1] for line in lines if "export MCP_TOKEN=" in line]
        assert set(re.findall(r"MCP_TOKEN\w*", "".join(lines))) == {"MCP_TOKEN"}
        assert token not in curl
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not header.parent.exists()
        assert not _running_in(str(header.parent))


def test_a_password_opens_a_session_in_the_demo_as_the_pages_say() -> None:
    with demo("--json") as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        password = "several words are a password"
        given = [*COMMAND, "--config", facts["config"], "user", "passwd", "demo", "--password-file", "-"]
        subprocess.run(given, input=password, text=True, check=True, capture_output=True, env=environment())
        url = facts["url"].replace("/mcp", "/api/v1/auth")
        answer = httpx.post(url, json={"user": "demo", "password": password}, trust_env=False, timeout=30)
        assert answer.json()["user"] == "demo"
        reload = [*COMMAND, "--config", facts["config"], "config", "reload"]
        done = subprocess.run(reload, capture_output=True, text=True, env=environment())
        assert done.returncode == 1
        assert "this server keeps the config that it was started with" in done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_json_says_where_everything_is_and_a_signal_ends_all_of_it(number: signal.Signals) -> None:
    with demo("--json") as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        assert set(facts) == {"url", "token", "dsn", "config", "pid"}
        assert facts["pid"] == process.pid
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "whoami", "arguments": {}}}
        headers = {"Authorization": f"Bearer {facts['token']}", "Accept": "application/json"}
        answer = httpx.post(facts["url"], json=call, headers=headers, trust_env=False, timeout=30)
        assert answer.json()["result"]["structuredContent"]["user"] == "demo"
        with psycopg.connect(facts["dsn"]) as admin:
            row = admin.execute("SELECT rolsuper, (SELECT count(*) FROM orders) > 1000 FROM pg_roles "
                                "WHERE rolname = current_user").fetchone()  # fmt: skip
            assert row == (True, True)
            assert harden.held_by_public(admin) == []
            place = admin.execute("SELECT current_setting('data_directory')").fetchone()
        done = subprocess.run(
            [*COMMAND, "--config", facts["config"], "token", "list"], capture_output=True, text=True, env=environment()
        )
        assert done.stdout.count("\n") == 1
        process.send_signal(number)
        assert process.wait(20) == 130
        assert not Path(facts["config"]).parent.exists()
        assert place is not None
        assert not os.path.exists(place[0])


def test_json_that_cannot_be_written_is_told_and_leaves_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "demo", "--port", "0", "--json"],
            stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=60, env=environment(),
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "mcpctl: error: No space left on device" in done.stderr
