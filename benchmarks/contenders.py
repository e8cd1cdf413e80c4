"""The servers that `peers.py` measures: how each is started, what it is asked, and where it cannot be had."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import load
import yaml

import site_of_mcpctl as site

POOL = 16
"""Connections to PostgreSQL that each may hold."""
PEERS = Path(os.environ.get("MCPCTL_BENCH_DIR", Path(__file__).parent.parent / ".bench"))
TOKENS = 200
_SECONDS_TO_START = 30.0


class MissingError(Exception):
    """A peer that this machine does not have; the text says why."""


@dataclass
class Contender:
    """A running server. `argument` is what its tool calls the SQL; `initialize` where it wants a session first."""

    name: str
    port: int
    process: subprocess.Popen[Any]
    tool: str = "query_database"
    argument: str = "query"
    path: str = "/mcp"
    tokens: list[str] = field(default_factory=list)
    initialize: bool = False
    version: str = ""

    def pids(self) -> list[int]:
        """Its processes."""
        found = [self.process.pid]
        for pid in found:
            found += load.children(pid)
        return found

    def cpu(self) -> float:
        """CPU seconds that its processes have used."""
        return sum(map(load.cpu_seconds, self.pids()))

    def job(self, query: str, wanted: str, clients: int, **more: Any) -> dict[str, Any]:
        """What the load generator is told."""
        call = {"name": self.tool, "arguments": {self.argument: query}}
        at = {"host": "127.0.0.1", "port": self.port, "path": self.path}
        who = {"tokens": self.tokens, "initialize": self.initialize}
        return {**at, **who, "call": call, "wanted": wanted, "clients": clients, **more}


def free_port() -> int:
    """A port for a server that cannot take a free one itself and say which."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def running(port: int, command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[Any]]:
    """A server that listens on that port, until the block ends; its output goes to a file in `folder`."""
    said = folder / f"{port}.log"
    with said.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, env=site.environment(**environment),
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + _SECONDS_TO_START
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                last = (said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise MissingError(f"it did not start: {last[:300]}")
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# -- mcpctl -----------------------------------------------------------------------------------------------------------

_MCPCTL = """\
    pool: {{max_size: {pool}, max_per_user: {most}, max_waiting: 1000}}
"""
_LIMITS = """\
limits:
  connections: {most}
  rate: 1000000
  burst: 1000000
  concurrent: 10000
"""


@contextlib.contextmanager
def mcpctl(folder: Path, shop: site.Shop, source: Path | None, name: str, tokens: int = 1) -> Iterator[Contender]:
    """mcpctl as an operator has it: token, limits, audit, a login role per user, read only; one worker."""
    most = max(POOL, tokens)
    at = site.Site(
        folder, shop, _LIMITS.format(most=most), _MCPCTL.format(pool=POOL, most=most), tcp=True, per_user=True
    )
    at.limits = {} if source is None else {"PYTHONPATH": str(source / "src")}
    user = folder.name  # the roles of two sites must not meet
    at.user(user)
    at.grant(user, "--schema", "public")
    texts = [at.token(user)[1] for _ in range(tokens)]
    at.start()
    try:
        assert at.process is not None
        port = int(at.url.split(":")[2].split("/")[0])
        yield Contender(name, port, at.process, tokens=texts, version=_version(source))
    finally:
        at.stop()


def _version(source: Path | None) -> str:
    environment = site.environment() if source is None else site.environment(PYTHONPATH=str(source / "src"))
    command = [sys.executable, "-c", "import mcpctl; print(mcpctl.__version__)"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


# -- the others -------------------------------------------------------------------------------------------------------


def _toolbox() -> Path:
    found = list(PEERS.glob("node_modules/@toolbox-sdk/server-*/bin/toolbox"))
    if not found:
        raise MissingError("npm's @toolbox-sdk/server is not there: run benchmarks/setup.sh")
    return found[0]


@contextlib.contextmanager
def toolbox(folder: Path, shop: site.Shop) -> Iterator[Contender]:
    """Google's MCP Toolbox, without authentication."""
    port = free_port()
    with running(port, _toolbox_command(folder, shop, port, []), folder) as process:
        yield Contender("Toolbox", port, process, argument="sql", version=_toolbox_version())


def _toolbox_command(folder: Path, shop: site.Shop, port: int, more: list[dict[str, Any]]) -> list[str]:
    source = {
        "kind": "source", "name": "shop", "type": "postgres", "host": "127.0.0.1", "port": shop.cluster.port,
        "database": "shop", "user": site.READER, "password": site.PASSWORD,
        "queryParams": {"pool_max_conns": str(POOL)},
    }  # fmt: skip
    tool = {"kind": "tool", "name": "query_database", "type": "postgres-execute-sql", "source": "shop"}
    tool["description"] = "Run a statement."
    config = folder / f"toolbox-{port}.yaml"
    config.touch(0o600)
    config.write_text(yaml.safe_dump_all([*more, source, tool]), encoding="utf-8")
    command = [str(_toolbox()), "--disable-version-check", "--disable-reload", "--log-level", "ERROR"]
    return [*command, "--config", str(config), "--port", str(port)]


def _toolbox_version() -> str:
    done = subprocess.run([_toolbox(), "--version"], check=True, capture_output=True, text=True)
    return done.stdout.split()[-1].split("+")[0]
