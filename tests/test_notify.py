"""What systemd hears of a server: it is ready, reads its config again, ends, answers; and the socket it hands over."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcpctl.errors import ConfigError
from mcpctl.server import activation
from mcpctl.server.notify import Notifier
from site_of_mcpctl import COMMAND, UNLIMITED, Client, Shop, Site, environment, eventually
from test_workers import children

MakeSite = Callable[..., Site]
UNITS = Path(__file__).parents[1] / "systemd"
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="systemd is Linux's")


class Ear:
    """The socket that systemd listens on."""

    def __init__(self, address: str) -> None:
        self.name = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self._socket.setblocking(False)
        self.heard: list[str] = []
        self.signs = 0
        self.last_sign = 0.0

    def __enter__(self) -> Ear:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def listen(self) -> list[str]:
        """All that was said; the signs of life are counted apart."""
        while select.select([self._socket], [], [], 0)[0]:
            said = self._socket.recv(4096).decode()
            if said == "WATCHDOG=1":
                self.signs += 1
                self.last_sign = time.monotonic()
            else:
                self.heard.append(said)
        return self.heard

    def hears(self, *what: str) -> str:
        """Wait for a message with all of these in it; what was said before it is forgotten."""

        def found() -> str | None:
            return next((said for said in self.listen() if all(one in said for one in what)), None)

        said: str = eventually(found)
        del self.heard[: self.heard.index(said) + 1]
        return said

    def silent(self, seconds: float) -> bool:
        """Whether no sign of life has come for so long."""
        self.listen()
        return time.monotonic() - self.last_sign > seconds

    def lives(self) -> None:
        """Wait for two further signs of life."""
        self.listen()
        before = self.signs
        eventually(lambda: self.listen() is not None and self.signs > before + 1)


@pytest.fixture(params=["a file's", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    name = str(tmp_path / "notify") if request.param == "a file's" else f"@mcpctl-test-{secrets.token_hex(8)}"
    with Ear(name) as made:
        yield made


def test_each_state_is_one_datagram_and_a_text_cannot_add_another(ear: Ear) -> None:
    told = Notifier({"NOTIFY_SOCKET": ear.name})
    told.ready("serving at x")
    told.status("1 worker is\nREADY=1\x00 gone " + "x" * 5000)
    told.status("")
    before = time.monotonic_ns() // 1000
    told.reloading()
    told.reloaded("read")
    told.stopping()
    ready, status, usual, reloading, reloaded, stopping = ear.listen()
    assert ready == "READY=1\nSTATUS=serving at x"
    assert status.startswith("STATUS=serving at x; 1 worker is READY=1")
    assert len(status) < 400
    assert "\n" not in status
    assert usual == "STATUS=serving at x"
    kind, at, _ = reloading.split("\n")
    assert kind == "RELOADING=1"
    assert before <= int(at.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert reloaded == "READY=1\nSTATUS=serving at x; read"
    assert stopping.startswith("STOPPING=1\n")


def test_signs_of_life_come_twice_as_often_as_wanted_and_only_from_an_event_loop_that_runs(ear: Ear) -> None:
    now = [100.0]
    told = Notifier({"NOTIFY_SOCKET": ear.name, "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "7"}, 7, lambda: now[0])
    assert told.interval == 4.0
    for now[0] in (100.0, 101.0, 101.9, 102.0, 103.9, 104.0):
        told.alive()
    ear.listen()
    assert ear.signs == 3

    async def main() -> None:
        task = asyncio.create_task(Notifier({"NOTIFY_SOCKET": ear.name, "WATCHDOG_USEC": "40000"}).keep_alive())
        try:
            while ear.signs < 8:
                ear.listen()
                await asyncio.sleep(0.005)
            hung = time.monotonic() + 0.3
            while time.monotonic() < hung:
                ear.listen()
            assert ear.silent(0.2)
        finally:
            task.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize(
    "wrong", [{}, {"WATCHDOG_PID": "8"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"NOTIFY_SOCKET": ""}]
)
def test_who_is_not_meant_gives_no_sign_of_life(wrong: dict[str, str], ear: Ear) -> None:
    environ = {"NOTIFY_SOCKET": ear.name, **({"WATCHDOG_USEC": "4000000"} if wrong else {}), **wrong}
    told = Notifier(environ, 7)
    assert told.interval is None
    told.alive()
    asyncio.run(told.keep_alive())
    ear.listen()
    assert ear.signs == 0


@pytest.mark.parametrize("name", ["/nowhere/notify", "@nobody-is-there", "vsock:2:1", "@", "notify"])
def test_a_socket_where_nobody_listens_is_told_of_once_and_harms_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mcpctl.notify"):
        told = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"})
        told.ready("x")
        told.alive()
        told.stopping()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("ear", ["abstract"], indirect=True)
def test_systemd_hears_of_the_start_of_reloads_and_of_the_end(make_site: MakeSite, newest_shop: Shop, ear: Ear) -> None:
    at = make_site(newest_shop)
    at.limits = {**UNLIMITED, "NOTIFY_SOCKET": ear.name, "WATCHDOG_USEC": "400000"}
    at.start()
    assert ear.hears("READY=1") == f"READY=1\nSTATUS=serving at {at.url}"
    ear.lives()
    assert at.process is not None
    at.process.send_signal(signal.SIGHUP)
    ear.hears("RELOADING=1", "MONOTONIC_USEC=")
    ear.hears("READY=1", "config read again, changed: nothing in the config")
    whole = at.config.read_text()
    at.config.write_text(whole + "limts: {}\n")
    assert at.run("config", "reload", check=False).returncode == 1
    ear.hears("RELOADING=1")
    ear.hears("READY=1", "config NOT read again: ", "limts")
    ear.lives()
    os.kill(at.process.pid, signal.SIGSTOP)
    eventually(lambda: ear.silent(1.0))
    os.kill(at.process.pid, signal.SIGCONT)
    ear.lives()
    assert at.stop() == -signal.SIGTERM
    ear.hears("STOPPING=1")
    assert ear.listen() == []


def test_a_worker_that_hangs_ends_the_signs_of_life_of_all(
    make_site: MakeSite, newest_shop: Shop, tmp_path: Path
) -> None:
    with Ear(str(tmp_path / "notify")) as ear:
        at = make_site(newest_shop)
        at.limits = {**UNLIMITED, "NOTIFY_SOCKET": ear.name, "WATCHDOG_USEC": "2000000"}
        at.start("--workers", "2")
        ear.hears("READY=1", "serving at")
        ear.lives()
        first, second = children(at)
        os.kill(second, signal.SIGSTOP)
        eventually(lambda: ear.silent(2.0))
        os.kill(second, signal.SIGCONT)
        ear.lives()
        os.kill(first, signal.SIGKILL)
        ear.hears("STATUS=", "1 of 2 workers is being started again")
        eventually(lambda: any(said == f"STATUS=serving at {at.url}" for said in ear.listen()))
        ear.lives()
        assert at.run("config", "reload").returncode == 0
        ear.hears("RELOADING=1")
        ear.hears("READY=1", "config read again")
        assert at.stop() == -signal.SIGTERM
        ear.hears("STOPPING=1")


# -- the listening socket -----------------------------------------------------------------------------------------


def test_a_socket_that_was_handed_over_is_served_by_all_workers_and_outlives_the_server(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop)
    at.config.write_text("server: {host: 127.0.0.2, port: 1, workers: 2}\n" + at.config.read_text())
    token = at.token()[1]
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(8)
        given = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', "
        given += "LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"

        def start(*more: str) -> subprocess.Popen[str]:
            handing = [sys.executable, "-IS", "-c", given, str(bound.fileno())]
            return subprocess.Popen(
                [*handing, *COMMAND, "--config", str(at.config), "serve", *more],
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**UNLIMITED),
                pass_fds=[bound.fileno()],
            )  # fmt: skip

        refused = start("--port", "0")
        assert "--host and --port do not go with a socket of systemd's" in refused.communicate(timeout=30)[1]
        assert refused.returncode == 2

        server = start()
        port = bound.getsockname()[1]
        try:
            with Client(f"http://127.0.0.1:{port}/mcp", token) as early:  # it waits until the server is there
                assert early.rows("select 1") == [[1]]
            assert at.run("config", "reload").stdout.startswith("changed: nothing in the config")
        finally:
            server.terminate()
            said = server.communicate(timeout=30)[1]
        assert f"serving at http://127.0.0.1:{port}/mcp" in said
        assert server.returncode == -signal.SIGTERM
        with socket.create_connection(("127.0.0.1", port)):
            pass  # it still listens


def test_what_is_no_listening_tcp_socket_is_refused(tmp_path: Path) -> None:
    with (
        socket.socket() as silent,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
        (tmp_path / "file").open("w") as file,
    ):
        local.bind(str(tmp_path / "local"))
        local.listen()
        datagrams.bind(("127.0.0.1", 0))
        for one, why in (
            (silent, "no listening TCP"),
            (datagrams, "no listening"),
            (local, "no listening"),
            (file, "no socket"),
        ):
            with pytest.raises(ConfigError, match=why):
                activation._door(one.fileno())
            assert os.fstat(one.fileno())  # it is still its owner's
        gone = os.dup(silent.fileno())
        os.close(gone)
        with pytest.raises(ConfigError, match="nothing is open there"):
            activation._door(gone)


def test_only_one_socket_for_this_process_is_taken() -> None:
    assert activation.handed({}, 7) is None
    assert activation.handed({"LISTEN_FDS": "1"}, 7) is None
    assert activation.handed({"LISTEN_FDS": "1", "LISTEN_PID": "8"}, 7) is None
    for wrong, why in (
        ("2", "handed over 2 sockets"),
        ("0", "handed over 0"),
        ("-1", "no number"),
        ("one", "no number"),
    ):
        with pytest.raises(ConfigError, match=why):
            activation.handed({"LISTEN_FDS": wrong, "LISTEN_PID": "7"}, 7)


# -- the units ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_units_are_in_order_and_the_service_is_exposed_little(tmp_path: Path) -> None:
    copies = []
    for unit in sorted(UNITS.glob("mcpctl*.*")):
        if unit.is_file():
            copies.append(tmp_path / unit.name)
            copies[-1].write_text(unit.read_text().replace("/usr/bin/mcpctl", sys.executable))
    assert len(copies) == 6
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *copies], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    for name, tenths in (("mcpctl.service", 20), ("mcpctl-backup.service", 20), ("mcpctl-check.service", 20)):
        threshold = f"--threshold={tenths - 1}"
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, tmp_path / name],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-300:] + done.stderr
