"""Workers and their supervisor are killed; what is left goes on, or ends by itself."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import chain
from mcpctl import control
from site_of_mcpctl import Shop, Site, eventually, in_background

MakeSite = Callable[..., Site]
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")


def children(at: Site) -> list[int]:
    assert at.process is not None
    pid = at.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_one_is_killed_under_load_and_the_other_goes_on(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    first = children(at)
    done = threading.Event()
    answered: list[str] = []
    broken: list[int] = []

    def ask(text: str, number: int) -> None:
        while not done.is_set():
            with at.client(text) as a:
                try:
                    for turn in range(20):
                        mark = f"{number}-{len(answered)}-{turn}"
                        assert a.rows(f"select '{mark}'") == [[mark]]
                        answered.append(mark)
                except httpx.HTTPError:  # the connection that the dead worker had
                    broken.append(number)

    def sleep(text: str) -> bool:
        with at.client(text) as a:
            try:
                return bool(a.rows("select 'long', pg_sleep(3)"))
            except httpx.HTTPError:
                return False

    asking = [in_background(ask, at.token()[1], number) for number in range(4)]
    sleeping = [in_background(sleep, at.token()[1]) for _ in range(12)]
    eventually(lambda: len(newest_shop.backends("query ~ 'pg_sleep' and state = 'active'")) > 8)
    sockets = {path.name for path in at.folder.glob("control.*.sock")}
    os.kill(first[0], signal.SIGKILL)
    eventually(lambda: len(children(at)) == 2 and first[0] not in children(at))
    assert first[1] in children(at)
    eventually(lambda: len({path.name for path in at.folder.glob("control.*.sock")} - sockets) == 1)
    assert not list(at.folder.glob(f"control.{first[0]}.*"))
    ended = [one.result() for one in sleeping]
    assert True in ended  # the other's calls went on
    done.set()
    for one in asking:
        one.result()
    said = "".join(at.stderr)
    assert f"worker {first[0]} died (signal 9); another takes its place in 0.2 s" in said
    kept = {line.get("statement") for line in at.audit()}
    assert {f"select '{mark}'" for mark in answered} <= kept  # no line is lost that was answered for
    at.stop()
    assert chain.verify(at.folder / "audit.jsonl", key=bytes.fromhex((at.folder / "audit.key").read_text())) > 0


def test_who_is_kept_out_in_memory_alone_stays_out_whether_workers_die_or_hang(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop)
    (name, text), (canary, used) = at.token(), at.token()
    with at.config.open("a") as file:
        file.write(f"canaries: {{tokens: [{canary}]}}\n")
    at.start("--workers", "2")
    store = sqlite3.connect(at.folder / "state.db", isolation_level=None)
    store.execute("BEGIN IMMEDIATE")
    with at.client(used) as a:
        assert a.call("whoami").status_code == 401
    assert len(control.ask_all(at.folder, {"do": "bar", "tokens": [name]})) == 2
    for count in (2, 1):
        kill, hung = children(at)[:count], children(at)[count:]
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        for pid in kill:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(children(at)) == 2 and not set(kill) & set(children(at)))  # noqa: B023
        for one in (text, used):
            with at.client(one) as a:
                assert a.call("whoami").status_code == 401
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
    assert f"kept out\t{name}" in at.run("status").stdout
    assert "".join(at.stderr).count("ALERT canary") == 1
    store.close()


def test_the_connections_of_a_killed_worker_end(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    with at.client(at.token()[1]) as a:
        running = in_background(lambda: a.call("query_database", {"query": "select pg_sleep(25)"}))
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        for pid in children(at):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not newest_shop.backends("query ~ 'pg_sleep'"), 3)
        with pytest.raises(httpx.HTTPError):
            running.result()
    eventually(lambda: len(children(at)) == 2)


def test_workers_end_when_their_supervisor_is_killed(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    pids = children(at)
    with at.client(at.token()[1]) as a:
        assert a.rows("select 1") == [[1]]
    assert at.process is not None
    at.process.kill()
    assert at.process.wait(10) == -signal.SIGKILL
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
    eventually(lambda: not newest_shop.backends(), 3)
    assert not list(at.folder.glob("control.*.sock"))
    assert [one["event"] for one in at.audit()].count("server.stopped") == 2


def test_one_that_dies_again_and_again_is_started_later_and_later(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    key = at.folder / "audit.key"
    key.rename(at.folder / "elsewhere")  # what every start needs, and what runs has read
    os.kill(children(at)[0], signal.SIGKILL)
    eventually(lambda: "the 4th time in a row; another takes its place in 1.6 s" in "".join(at.stderr), 20)
    assert "died (exit status 1); another takes its place in 0.4 s" in "".join(at.stderr)
    with at.client(at.token()[1]) as a:
        assert a.rows("select 1") == [[1]]
    (at.folder / "elsewhere").rename(key)
    eventually(lambda: len(children(at)) == 2, 10)
    begun = time.monotonic()
    at.stop()
    assert time.monotonic() - begun < 5


def test_a_reload_reaches_the_one_that_took_a_dead_ones_place(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="limits: {max_rows: 5}\n").start("--workers", "2")
    os.kill(children(at)[0], signal.SIGKILL)
    at.config.write_text(at.config.read_text().replace("max_rows: 5", "max_rows: 7"))
    assert at.run("config", "reload").stdout == "changed: limits\n"
    text = at.token()[1]
    eventually(lambda: len(children(at)) == 2)
    for _ in range(10):
        with at.client(text) as a:
            assert len(a.rows("select generate_series(1, 9)")) == 7


_BORN_UNDER_A_SIGNAL = """
import asyncio, os, signal, socket, types
from mcpctl.server.workers import Supervisor

os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))

async def work(listening, link, place):
    await asyncio.sleep(60)

server = types.SimpleNamespace(workers=1)
listening = types.SimpleNamespace(settings=types.SimpleNamespace(server=server))
Supervisor(listening, socket.socket(), lambda: None, work, None, None).run()
"""


def test_a_signal_that_comes_at_its_birth_ends_a_worker() -> None:
    done = subprocess.run([sys.executable, "-c", _BORN_UNDER_A_SIGNAL], capture_output=True, text=True, timeout=10)
    assert "a worker did not start" in done.stderr, done


def test_one_that_hangs_is_killed_after_a_second_signal(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    process = at.process
    assert process is not None
    hung = children(at)[0]
    os.kill(hung, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    eventually(lambda: children(at) == [hung], 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert f"worker {hung} was told to end and did not; it is killed" in "".join(at.stderr)


_HANGS = """
import os, signal, socket, types
from mcpctl.server import workers

async def work(listening, link, place):
    link.up()
    os.kill(os.getpid(), signal.SIGSTOP)

workers._DRAINED = 0.3
server = types.SimpleNamespace(workers=1)
listening = types.SimpleNamespace(settings=types.SimpleNamespace(server=server))
ready = lambda: os.kill(os.getpid(), signal.SIGTERM)
print(workers.Supervisor(listening, socket.socket(), ready, work, None, None).run())
"""


def test_one_that_hangs_is_killed_when_its_drain_is_long_over() -> None:
    done = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=10)
    assert done.stdout == "[15]\n", done
