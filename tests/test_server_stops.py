"""The end of a server, of a worker, and what is said of too many of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from chain import lines
from command_line import Home
from mcpctl import config
from mcpctl.errors import ConfigError
from mcpctl.server.parts import running
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually

MakeSite = Callable[..., Site]


def test_stopping_ends_what_runs_and_leaves_no_backend(make_site: MakeSite, newest_shop: Shop) -> None:
    for number, arguments in ((signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("--workers", "2"))):
        at = make_site(newest_shop).start(*arguments)
        with at.client(at.token()[1]) as a:
            ((pid,),) = a.rows("select pg_backend_pid()")
        at.stop(number)
        eventually(lambda pid=pid: not newest_shop.backends(f"pid = {pid}"), 3)
        assert not list(at.folder.glob("control.*.sock"))
        assert at.audit()[-1]["event"] == "server.stopped"


def test_what_never_started_does_not_stop_in_the_log(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", extra=f"server: {{runtime_dir: {tmp_path / 'none'}}}\n")

    async def run() -> None:
        async with running(config.load(home.config), files=True):
            pass

    with pytest.raises(ConfigError, match="cannot make the control socket"):
        asyncio.run(run())
    log = home.folder / "audit.jsonl"
    assert not log.exists() or [line for line in lines(log) if line["event"].startswith("server.")] == []


def test_a_server_that_cannot_make_its_control_socket_says_so_and_nothing_else(tmp_path: Path) -> None:
    """By an interpreter of its own, which tells at its end what was begun and never awaited."""
    home = Home(tmp_path / "home", extra=f"server: {{runtime_dir: {tmp_path / 'none'}}}\n")
    done = subprocess.run(
        [*COMMAND, "--config", str(home.config), "serve", "--port", "0"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    _, error, *rest = done.stderr.splitlines()
    assert error.startswith(f"mcpctl: error: cannot make the control socket {tmp_path / 'none'}/control.")
    assert (done.returncode, rest) == (3, ["mcpctl: hint: set server.runtime_dir to a folder of yours"])


def test_more_workers_than_the_login_roles_have_room_for_are_warned_of(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, per_user=True)
    for number, warned in (("2", True), ("1", False)):
        at.stderr.clear()
        at.start("--workers", number)
        said = "".join(at.stderr)
        assert ("login roles in shop have room for 1 workers, not for 2" in said) is warned
        assert ("set server.workers: 2, and grant again" in said) is warned
        at.stop()


def test_a_worker_that_dies_is_replaced(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    assert at.process is not None
    children = Path(f"/proc/{at.process.pid}/task/{at.process.pid}/children")
    if not children.exists():
        pytest.skip("a process's children are read from /proc")
    first = children.read_text().split()
    os.kill(int(first[0]), signal.SIGKILL)
    eventually(lambda: first[0] not in children.read_text().split() and len(children.read_text().split()) == 2)
    text = at.token()[1]

    def works() -> bool:
        try:
            with at.client(text) as a:
                return bool(a.rows("select 1") == [[1]])
        except httpx.HTTPError:
            return False  # the connection that the dead worker had

    eventually(works)
