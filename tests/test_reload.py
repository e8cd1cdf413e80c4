"""HUP and `mcpctl config reload`: the config is read again, whole or not at all, and no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pty
import re
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest

import chain
from mcpctl import config
from mcpctl.cli import serve
from mcpctl.config_keys import Metrics, Server, Settings, Tls
from mcpctl.errors import ConfigError, Error
from mcpctl.facts import Request
from mcpctl.server import workers
from mcpctl.server.exchange import App, Receive, Scope, Send
from mcpctl.server.listening import Listening
from mcpctl.server.live import Place, Process
from mcpctl.server.parts import Core, running
from mcpctl.server.reload import RELOADED, Outcome, Requests, Serving
from mcpctl.server.workers import Supervisor
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually, in_background

MakeSite = Callable[..., Site]
both = pytest.mark.parametrize("workers", ["1", "2"])


def change(at: Site, before: str, after: str) -> None:
    text = at.config.read_text()
    assert before in text
    new = at.config.with_name("new.yaml")  # as an editor does: a reader sees the one or the other
    new.touch(0o600)
    new.write_text(text.replace(before, after))
    new.replace(at.config)


def reloads(at: Site) -> list[tuple[str, str]]:
    """(event, reason) of every reload in the audit log."""
    return [(one["event"], one["reason"]) for one in at.audit() if one["event"].startswith("config.reload")]


def hang_up(at: Site, outcomes: int = 1) -> None:
    """Send HUP, and wait for so many outcomes."""
    before = len(reloads(at))
    assert at.process is not None
    at.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(reloads(at)) >= before + outcomes)


@both
def test_a_changed_limit_counts_for_the_next_call_on_the_same_connection(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 5}\n").start("--workers", workers)
    changes = []
    with at.client(at.token()[1]) as a:
        assert len(a.rows("select generate_series(1, 9)")) == 5
        change(at, "max_rows: 5", "max_rows: 7")
        changes.append(("limits", hashlib.sha256(at.config.read_bytes()).hexdigest()[:12]))
        hang_up(at)
        eventually(lambda: len(a.rows("select generate_series(1, 9)")) == 7)
        change(at, "limits: {max_rows: 7}", "limits: {max_rows: 8}\nlog: {level: debug}")
        changes.append(("limits, log", hashlib.sha256(at.config.read_bytes()).hexdigest()[:12]))
        assert at.run("config", "reload").stdout == "changed: limits, log\n"
        assert len(a.rows("select generate_series(1, 9)")) == 8
        assert at.run("config", "reload").stdout.startswith("changed: nothing in the config")
    assert reloads(at)[:2] == [("config.reloaded", f"changed: {said}; config {digest}") for said, digest in changes]
    events = [one["event"] for one in at.audit()]
    assert events.count("server.started") == int(workers)
    (begun, *_) = [one["reason"] for one in at.audit() if one["event"] == "server.started"]
    assert re.fullmatch(r"mcpctl .*, pid \d+, config [0-9a-f]{12}", begun)
    assert "server.stopped" not in events
    assert at.stop() == -signal.SIGTERM
    assert [one["event"] for one in at.audit()].count("server.stopped") == int(workers)
    assert not list(at.folder.glob("control.*.sock"))


@both
def test_a_broken_config_changes_nothing_and_a_mended_one_is_taken(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 5}\n").start("--workers", workers)
    with at.client(at.token()[1]) as a:
        for wrong, why in (
            ("max_rows: many", "limits.max_rows: takes"),
            ("max_row: 7", "there is no such key"),
            ("max_rows: 7}\naudit: {key_file: nowhere.key", "nowhere.key"),
            ("max_rows: 7}\naudit: {file: nowhere/audit.jsonl", "the audit log cannot be written"),
        ):
            change(at, "max_rows: 5", wrong)
            asked = at.run("config", "reload", check=False)
            assert (asked.returncode, "what was in force stays" in asked.stderr, why in asked.stderr) == (1, True, True)
            hang_up(at)
            change(at, wrong, "max_rows: 5")
            event, reason = reloads(at)[-1]
            assert event == "config.reload_refused"
            assert why in reason
            assert len(a.rows("select generate_series(1, 9)")) == 5
        (at.folder / "shop.password").rename(at.folder / "elsewhere")
        refused = at.run("config", "reload", check=False)
        assert refused.returncode == 1
        assert "what was in force stays" in refused.stderr
        assert "shop.password" in refused.stderr
        assert a.rows("select 1") == [[1]]
        (at.folder / "elsewhere").rename(at.folder / "shop.password")
        change(at, "max_rows: 5", "max_rows: 7")
        at.run("config", "reload")
        assert len(a.rows("select generate_series(1, 9)")) == 7


def test_what_cannot_change_is_named_and_a_restart_asked_for(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="server: {stdio: false}\nlimits: {max_rows: 5}\n").start()
    change(at, "stdio: false", 'host: "::1", workers: 2')
    change(at, "max_rows: 5", "max_rows: 7")
    refused = at.run("config", "reload", check=False)
    assert refused.returncode == 1
    assert "server.host, server.workers cannot change while the server runs" in refused.stderr
    assert "restart it" in refused.stderr
    with at.client(at.token()[1]) as a:
        assert len(a.rows("select generate_series(1, 9)")) == 5
    at.stop()
    none = at.run("config", "reload", check=False)
    assert (none.returncode, "no server runs" in none.stderr) == (1, True)


def test_what_cannot_change_while_it_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reload.md").read_text(encoding="utf-8")
    old = Listening(Settings(), port=4711)
    server = Server()
    for new, key in (
        (replace(server, host="::1"), "server.host"), (replace(server, port=1), "server.port"),
        (replace(server, workers=2), "server.workers"), (replace(server, stdio=True), "server.stdio"),
        (replace(server, tls=Tls(Path("c"), Path("k"))), "server.tls.cert"),
        (replace(server, runtime_dir=Path("/run/other")), "server.runtime_dir"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{key} cannot change"):
            old.check_successor(Listening(Settings(server=new)))
        assert f"`{key}`" in page
    with pytest.raises(ConfigError, match=r"^metrics\.host, metrics\.port cannot change"):
        old.check_successor(Listening(Settings(metrics=Metrics("::1", 9100))))
    assert "`metrics.host`, `metrics.port`" in page
    old.check_successor(Listening(Settings(server=replace(server, public_url="https://x"))))


@both
def test_a_call_that_runs_ends_with_its_answer(make_site: MakeSite, newest_shop: Shop, workers: str) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 5}\n").start("--workers", workers)
    with at.client(at.token()[1]) as a, at.client(at.token()[1]) as b:
        running = in_background(a.rows, "select pg_sleep(2), 'old' as it")
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        change(at, "max_rows: 5", "max_rows: 7")
        hang_up(at)
        eventually(lambda: len(b.rows("select generate_series(1, 9)")) == 7)
        assert running.result()[0][1] == "old"
        assert len(a.rows("select generate_series(1, 9)")) == 7
    eventually(lambda: len(list(at.folder.glob("control.*.sock"))) == int(workers))
    assert sum(one["event"] == "tool.called" and one["outcome"] != "ok" for one in at.audit()) == 0


@both
def test_no_request_fails_across_reloads_under_load(make_site: MakeSite, newest_shop: Shop, workers: str) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 5}\n").start("--workers", workers)
    answers = [[[n] for n in range(1, most)] for most in (6, 8)]
    texts = [at.token()[1] for _ in range(4)]
    done = threading.Event()
    asked: list[int] = []

    def ask(text: str) -> None:
        with at.client(text) as a:
            while not done.is_set() or len(asked) < 200:
                assert a.rows("select generate_series(1, 9)") in answers
                asked.append(1)
                assert a.rows("select 1") == [[1]]
                asked.append(1)

    asking = [in_background(ask, text) for text in texts]
    try:
        for number in range(5):
            change(at, *(("max_rows: 5", "max_rows: 7") if number % 2 == 0 else ("max_rows: 7", "max_rows: 5")))
            hang_up(at)
    finally:
        done.set()
    for one in asking:
        one.result(60)
    assert len(asked) >= 200
    assert [event for event, _ in reloads(at)] == ["config.reloaded"] * 5
    eventually(lambda: sum(one["event"] == "tool.called" for one in at.audit()) == len(asked))


@both
def test_ten_in_a_row_are_one_or_few_and_the_last_config_counts(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 1}\n").start("--workers", workers)
    assert at.process is not None
    for number in range(1, 11):
        change(at, f"max_rows: {number}}}", f"max_rows: {number + 1}}}")
        at.process.send_signal(signal.SIGHUP)
    with at.client(at.token()[1]) as a:
        eventually(lambda: len(a.rows("select generate_series(1, 20)")) == 11)
    assert {event for event, _ in reloads(at)} == {"config.reloaded"}
    assert 1 <= len(reloads(at)) <= 10
    assert at.run("config", "reload").returncode == 0


def test_during_the_start_it_is_remembered(make_site: MakeSite, newest_shop: Shop) -> None:
    """Sent as soon as the process takes it: SigCgt of /proc/PID/status has its bit."""
    for number in ("1", "2"):
        at = make_site(newest_shop).start("--workers", number, wait=False)
        process = at.process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status")
        if not status.exists():
            pytest.skip("the signals that a process takes are read from /proc")

        def taken(status: Path = status) -> bool:
            (caught,) = [line for line in status.read_text().splitlines() if line.startswith("SigCgt:")]
            return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)

        eventually(taken, 20)
        process.send_signal(signal.SIGHUP)
        eventually(lambda at=at: any("serving at" in line for line in at.stderr), 20)
        eventually(lambda at=at: (at.folder / "audit.jsonl").exists() and reloads(at))
        assert at.stop() == -signal.SIGTERM


def test_it_is_taken_before_the_config_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGHUP)

    def reading(*_: object) -> Settings:
        signal.raise_signal(signal.SIGHUP)
        raise ConfigError("broken")

    monkeypatch.setattr(serve, "settings", reading)
    try:
        with pytest.raises(ConfigError):
            serve.serve(Mock())
    finally:
        signal.signal(signal.SIGHUP, before)


@both
def test_during_the_drain_it_changes_nothing(make_site: MakeSite, newest_shop: Shop, workers: str) -> None:
    at = make_site(newest_shop).start("--workers", workers)
    assert at.process is not None
    with at.client(at.token()[1]) as a:
        running = in_background(a.rows, "select pg_sleep(1.5)::text, 'whole'")
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        at.process.send_signal(signal.SIGTERM)
        for _ in range(3):
            at.process.send_signal(signal.SIGHUP)
        assert running.result()[0][1] == "whole"
    assert at.process.wait(15) == -signal.SIGTERM
    assert "config.reloaded" not in [event for event, _ in reloads(at)]


def test_flags_stay_above_the_file_and_keys_and_passwords_are_read_anew(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="server: {workers: 2}\n").start("--workers", "1")
    change(at, "server: {workers: 2}", "server: {workers: 3}")
    assert at.run("config", "reload").stdout.startswith("changed: nothing in the config")
    (at.folder / "shop.password").write_text("another\n")
    at.run("config", "reload")
    with at.client(at.token()[1]) as a:
        assert "shop" in a.error("select 1")
        (at.folder / "shop.password").write_text("reader's own secret\n")
        at.run("config", "reload")
        assert a.rows("select 1") == [[1]]


@both
def test_another_audit_key_than_the_logs_is_refused_at_once_and_at_a_start(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop).start("--workers", workers)
    key = at.folder / "audit.key"
    before = key.read_text()
    with at.client(at.token()[1]) as a:
        key.write_text("00" * 32 + "\n")
        refused = at.run("config", "reload", check=False)
        assert refused.returncode == 1
        assert "was written with another audit.key" in refused.stderr
        assert "restore audit.key from the backup" in refused.stderr
        assert a.rows("select 1") == [[1]]
        eventually(lambda: [event for event, _ in reloads(at)] == ["config.reload_refused"])
    at.stop()
    not_started = at.run("serve", "--port", "0", "--workers", workers, check=False)
    assert "was written with another audit.key" in not_started.stderr
    assert not_started.returncode == (3 if workers == "1" else 1)
    chain.verify(at.folder / "audit.jsonl", key=bytes.fromhex(before))


def test_a_revocation_reaches_what_runs_on_the_old_config(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    name, text = at.token()
    with at.client(text) as a:
        running = in_background(lambda: a.call("query_database", {"query": "select pg_sleep(4)"}).status_code)
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        at.run("config", "reload")
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", name).stdout
        assert running.result(3) == 401


def test_a_new_database_can_be_asked_and_an_old_one_no_more(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    with at.client(at.token()[1]) as a:
        change(at, "  shop:\n", "  shop2:\n")
        assert at.run("config", "reload").stdout == "changed: databases\n"
        assert a.rows("select 1", database="shop2") == [[1]]
        assert "shop" in a.error("select 1", database="shop")


def test_old_clients_streams_end_and_connect_again(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="server: {sse: true}\n").start()
    stream = at.url.removesuffix("/mcp") + "/sse"
    with at.client(at.token()[1]) as a:
        for _ in range(2):
            with a.http.stream("GET", stream) as answer:
                lines = answer.iter_lines()
                assert next(lines) == "event: endpoint"
                at.run("config", "reload")
                list(lines)  # it ends, whole
    assert "Traceback" not in "".join(at.stderr)


def test_a_call_that_a_reload_cuts_is_told_so_and_the_next_reload_waits_for_its_end(
    make_site: MakeSite, newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process there are two generations at most, with the connections of each."""
    at = make_site(newest_shop)
    listening = Listening(config.load(at.config, at.limits))
    monkeypatch.setattr("mcpctl.server.reload.DRAIN", 0.3)
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def build(listening: Listening) -> AsyncIterator[tuple[Core, App]]:
        async with running(listening.settings, files=False, process=process, again=serving.begun) as core:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                query = {"query": "select pg_sleep(60)"}
                await core.calls.call(core.authenticator.local(), "query_database", query, Request("r", None, "http"))

            seen.append("built")
            yield core, app
            seen.append("gone")

    async def main() -> None:
        await serving.begin(listening)
        call = asyncio.ensure_future(serving({"path": "/mcp"}, None, None))  # type: ignore[arg-type]
        while not newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"):
            await asyncio.sleep(0.01)
        await serving.prepare(listening)
        serving.commit()
        await serving.prepare(listening)
        assert seen == ["built", "built", "gone", "built"]
        assert await asyncio.gather(call, return_exceptions=True) != [None]
        await serving.end()

    process = Process(Place("here"))
    serving = Serving(build, lambda listening: None, tells=True)
    asyncio.run(main())
    (line,) = [one for one in at.audit() if one["event"] == "tool.called"]
    assert line["reason"] == "the client went away, or the config was reloaded; ask again"


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM])
def test_a_body_that_is_still_on_its_way_is_told_as_a_call_that_is_cut(
    make_site: MakeSite, newest_shop: Shop, how: signal.Signals
) -> None:
    at = make_site(newest_shop).start()
    url = urlsplit(at.url)
    head = f"POST /mcp HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {at.token()[1]}\r\n"
    head += "Accept: application/json, text/event-stream\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    with socket.create_connection((url.hostname or "", url.port or 0), 15) as wire:
        wire.sendall(f"{head}\r\n{{".encode())
        eventually(lambda: any(line["event"] == "auth.ok" for line in at.audit()))
        assert at.process is not None
        at.process.send_signal(how)
        with wire.makefile("rb") as answer:
            said = answer.read()
    assert said.startswith(b"HTTP/1.1 503")
    assert (RELOADED if how == signal.SIGHUP else "the server stops").encode() in said
    if how == signal.SIGTERM:
        assert at.process.wait(10) == -how
    assert "Traceback" not in "".join(at.stderr)


def test_a_command_that_asks_every_worker_has_one_reload_and_one_that_is_stopped_holds_no_other_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = Requests()
    requests.ask("a")
    assert requests.take() == {"a"}
    requests.ask("a")  # the second worker's, while it runs
    requests.ask("")
    assert requests.take() == {""}
    requests.answer({"a"}, Outcome(True, "done"))
    requests.ask("a")
    assert requests.take() == set()

    monkeypatch.setattr(workers, "_ANSWER", 1.0)
    settings = replace(Settings(), server=replace(Server(), workers=2))
    supervisor = Supervisor(Listening(settings), Mock(), lambda: None, Mock(), None, None)
    (stopped, _), (ours, theirs) = pipes = [Pipe() for _ in range(2)]
    supervisor._workers, supervisor._due = [workers._Worker(0, os.getpid(), stopped)], {1: 0.0}
    monkeypatch.setattr(os, "waitpid", lambda *_: (0, 0))
    monkeypatch.setattr(supervisor, "_fork", lambda place: supervisor._workers.append(workers._Worker(place, 1, ours)))
    with pytest.raises(Error, match="a worker did not answer in time"):
        supervisor._prepare(Listening(settings))
    assert theirs.recv()[0] == "prepare"  # another dead one's place was taken meanwhile
    for pipe in pipes:
        for end in pipe:
            end.close()


def test_a_command_that_waits_when_the_server_ends_leaves_no_traceback(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)

    async def main() -> None:
        async with running(config.load(at.config, at.limits), files=False) as core:
            asked = asyncio.Event()

            async def reload(name: str) -> None:
                asked.set()
                await asyncio.Event().wait()

            core.watch.reload = reload
            reader, writer = asyncio.StreamReader(), Mock()
            reader.feed_data(b'{"do": "reload", "id": "x"}\n')
            task = asyncio.ensure_future(core.watch._serve(reader, writer))
            await asked.wait()
            task.cancel()
            await asyncio.wait([task])
            assert not task.cancelled()

    asyncio.run(main())


def on_terminal(at: Site, *before: str) -> tuple[subprocess.Popen[bytes], int]:
    """`mcpctl serve` in front on a terminal of its own; the process and the terminal's other end."""
    leader, follower = pty.openpty()

    def take() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*before, *COMMAND, "--config", str(at.config), "serve", "--port", "0"],
        stdin=follower, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        start_new_session=True, preexec_fn=take,
    )  # fmt: skip
    os.close(follower)
    eventually(lambda: (at.folder / "audit.jsonl").exists() and list(at.folder.glob("control.*.sock")), 20)
    return process, leader


def test_when_the_terminal_goes_away_it_ends_and_with_nohup_it_goes_on(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    process, leader = on_terminal(at)
    process.send_signal(signal.SIGHUP)  # the terminal is still there
    eventually(lambda: reloads(at))
    os.close(leader)
    assert process.wait(10) == -signal.SIGHUP
    assert at.audit()[-1]["event"] == "server.stopped"
    process, leader = on_terminal(at, "nohup")
    before = len(reloads(at))
    try:
        os.close(leader)
        eventually(lambda: len(reloads(at)) > before)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(10)
