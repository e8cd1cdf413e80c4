"""MCP on stdin and stdout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import site_of_mcpctl as site
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually

MakeSite = Callable[..., Site]
META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}
STDIO = """
import sys, mcp.server.stdio, psycopg, psycopg_pool, anyio, argon2, asyncio, logging, concurrent.futures, tempfile
import uvicorn, typer, yaml, rich.console, mcp.client.stdio, msgspec
import types
for name in ("fcntl", "pwd", "grp"):
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, LK_UNLCK=0, locking=lambda fd, mode, size: None)  # Windows's
from mcpctl.cli.main import run
run(["serve", "--stdio"])
"""


def _speak(process: subprocess.Popen[str], *messages: dict[str, object]) -> list[dict[str, object]]:
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    for message in messages:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        if "id" in message:
            answers.append(json.loads(process.stdout.readline()))
    return answers


def _question(query: str) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": "query_database", "arguments": {"query": query}, "_meta": META}}  # fmt: skip


def test_stdio_needs_only_a_database_url_and_nothing_that_only_posix_has(newest_shop: Shop, tmp_path: Path) -> None:
    dsn = newest_shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STDIO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(MCPCTL_DATABASE_URL=dsn, XDG_CONFIG_HOME=str(tmp_path), HOME=str(tmp_path)), cwd="/",
    )  # fmt: skip
    try:
        (answer,) = _speak(process, _question("select 6 * 7 as answer"))
        assert answer["result"]["structuredContent"]["rows"] == [[42]]  # type: ignore[index]
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        rest = process.stdout.read()
        process.stdout.close()
        assert process.wait(10) == 0
    assert rest == ""
    assert (tmp_path / "mcpctl" / "audit.jsonl").stat().st_mode & 0o777 == 0o600


NO_MESSAGES: dict[bytes, tuple[int, object]] = {
    b"garbage": (-32700, None),
    b"{": (-32700, None),
    b"[" * 100_000: (-32700, None),
    b'\xef\xbb\xbf{"jsonrpc":"2.0","id":1,"method":"ping"}': (-32700, None),
    b"null": (-32600, None),
    b'[{"jsonrpc":"2.0","id":7,"method":"ping"}]': (-32600, None),
    b'{"id":8,"method":"ping"}': (-32600, 8),
    b'{"jsonrpc":"2.0","id":{},"method":"ping"}': (-32600, None),
    b'{"jsonrpc":"2.0","id":"\\ud800","method":"ping"}': (-32700, None),
    json.dumps({**_question("select 'x'"), "id": 9}).replace("x", "\\ud800").encode(): (-32700, 9),
    json.dumps({**_question("select 'x'"), "id": 10}).encode().replace(b"x", b"\xff"): (-32700, None),
}


def test_what_is_no_message_is_answered_and_nothing_of_it_run(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line, (code, number) in NO_MESSAGES.items():
            process.stdin.write(line + b"\n\n")
            process.stdin.flush()
            answer = json.loads(site.in_background(process.stdout.readline).result(10))
            assert (answer["error"]["code"], answer["id"]) == (code, number), line[:100]
        process.stdin.write(json.dumps(_question("select 'fine'")).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["structuredContent"]["rows"] == [["fine"]]
    finally:
        process.communicate(timeout=10)
    assert [line["statement"] for line in at.audit() if line["event"] == "tool.called"] == ["select 'fine'"]


def test_what_was_asked_before_the_end_of_stdin_is_answered_and_what_takes_long_is_cut(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop)
    asked = [{**_question(query), "id": number} for number, query in enumerate(["select 1", "select pg_sleep(60)"])]
    done = subprocess.run(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], check=True, timeout=20, env=environment(),
        input="".join(json.dumps(message) + "\n" for message in asked), capture_output=True, text=True,
    )  # fmt: skip
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert answers[0]["result"]["structuredContent"]["rows"] == [[1]]
    assert "result" not in answers.get(1, {})
    assert not newest_shop.backends("query LIKE '%sleep%'")


def test_where_there_are_tenants_nobody_is_served_without_a_token(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    command = [*COMMAND, "serve", "--stdio", "--config", str(at.config)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert "result" in _speak(process, _question("select 1"))[0]
        at.run("tenant", "add", "acme", "--database", "shop")
        (refused,) = _speak(process, _question("select 1"))
        assert "nobody is served without a token" in refused["error"]["message"]  # type: ignore[index]
        process.communicate(timeout=10)
    for way in (["--stdio"], ["--no-auth", "--port", "0"]):
        done = at.run("serve", *way, check=False)
        assert (done.returncode, "nobody is served without a token" in done.stderr) == (3, True)


def test_on_stdio_the_token_of_the_environment_counts_and_its_revocation_too(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop)
    name, text = at.token()
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(MCPCTL_TOKEN=text),
    )  # fmt: skip
    try:
        (answer,) = _speak(process, _question("select 1"))
        assert answer["result"]["structuredContent"]["rows"] == [[1]]  # type: ignore[index]
        running = site.in_background(_speak, process, _question("select pg_sleep(60)"))
        eventually(lambda: shop.backends("query LIKE '%sleep%' AND state = 'active'"))
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", name).stdout
        (answer,) = running.result()
        assert "error" in answer
        (answer,) = _speak(process, _question("select 1"))
        assert "error" in answer
    finally:
        process.communicate(timeout=10)
    assert all(line.get("token") in (name, None) for line in at.audit())


@pytest.mark.parametrize("before", [(), (_question("select 1"),)], ids=["at once", "after a call"])
def test_ctrl_c_on_stdio_ends_it(make_site: MakeSite, newest_shop: Shop, before: tuple[dict[str, object], ...]) -> None:
    at = make_site(newest_shop)
    (at.folder / "audit.jsonl").touch(0o600)
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        eventually(lambda: b"server.started" in (at.folder / "audit.jsonl").read_bytes())
        _speak(process, *before)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    finally:
        process.kill()
        _, said = process.communicate()
    assert "Traceback" not in said


def test_a_client_that_closes_stdout_is_gone(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdout.close()
        process.stdin.write(json.dumps(_question("select 1")) + "\n")
        process.stdin.flush()
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stdin.close()
        process.stderr.close()
        process.wait()


def test_sigterm_on_stdio_closes_everything_first(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    (answer,) = _speak(process, _question("select pg_backend_pid()"))
    pid = answer["result"]["structuredContent"]["rows"][0][0]  # type: ignore[index]
    process.send_signal(signal.SIGTERM)
    eventually(lambda: not newest_shop.backends(f"pid = {pid}"), 3)
    assert eventually(lambda: [line for line in at.audit() if line["event"] == "server.stopped"])
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stdio_that_is_told_to_end_closes_its_books(
    make_site: MakeSite, newest_shop: Shop, number: signal.Signals
) -> None:
    at = make_site(newest_shop)
    process = subprocess.Popen(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment(MCPCTL_TOKEN=at.token()[1]),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(_question("select pg_sleep(43)")).encode() + b"\n")
    process.stdin.flush()
    eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"), 30)
    process.send_signal(number)
    process.communicate(timeout=15)
    assert process.returncode == -number
    assert [line["event"] for line in at.audit()][-2:] == ["pool.closed", "server.stopped"]
    assert "tool.called" in [line["event"] for line in at.audit()]
    assert not list(at.folder.glob("*.sock"))
