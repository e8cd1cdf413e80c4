"""The servers that `peers.py` measures: how each is started, what it is asked, and where it cannot be had."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load
import yaml

import site_of_mcpctl as site

POOL = 16
"""Connections to PostgreSQL that each may hold."""
HERE = Path(__file__).parent
PEERS = Path(os.environ.get("MCPCTL_BENCH_DIR", HERE.parent / ".bench"))
_SYSTEMS = PEERS / "python" / "bin" / "python"
PYTHON = str(_SYSTEMS) if _SYSTEMS.exists() else sys.executable
"""What runs the servers that are written in Python: the operating system's own, as in mcpctl's Debian package, where
setup.sh found one; the one that runs this may have been built without a profile."""
_SECONDS_TO_START = 30.0


class MissingError(Exception):
    """A peer that this machine does not have; the text says why."""


@dataclass
class Contender:
    """A running server. `one` is in its answer to `select 1`; `argument` is what its tool calls the SQL."""

    name: str
    version: str
    port: int
    process: subprocess.Popen[Any]
    one: str
    tool: str = "query_database"
    argument: str = "query"
    path: str = "/mcp"
    tokens: list[str] = field(default_factory=list)

    def pids(self) -> list[int]:
        """Its processes."""
        found = [self.process.pid]
        for pid in found:
            found += load.children(pid)
        return found

    def cpu(self) -> float:
        """CPU seconds that its processes have used."""
        return sum(map(load.cpu_seconds, self.pids()))

    def job(self, query: str, wanted: str | None, clients: int, **more: Any) -> dict[str, Any]:
        """What the load generator is told. `wanted` is in every answer; None for the one to `select 1`."""
        call = {"name": self.tool, "arguments": {self.argument: query}}
        at = {"host": "127.0.0.1", "port": self.port, "path": self.path}
        return {**at, "tokens": self.tokens, "call": call, "wanted": wanted or self.one, "clients": clients, **more}


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
def mcpctl(
    folder: Path, shop: site.Shop, source: Path | None, name: str, tokens: int = 1, workers: int = 1
) -> Iterator[Contender]:
    """mcpctl as an operator has it: token, limits, audit, a login role per user, read only."""
    most = max(POOL + workers, tokens * 3 // 2)  # none has to make room for another; each worker keeps one to end them
    pool = max(1, POOL // workers)  # each worker has a pool of its own for each token
    at = site.Site(
        folder, shop, _LIMITS.format(most=most), _MCPCTL.format(pool=pool, most=most), tcp=True, per_user=True
    )
    at.limits = {} if source is None else {"PYTHONPATH": str(source / "src")}
    user = folder.name  # the roles of two sites must not meet
    at.user(user)
    at.grant(user, "--schema", "public")
    texts = [at.token(user)[1] for _ in range(tokens)]
    at.start("--workers", str(workers), anew=True, python=PYTHON)
    try:
        assert at.process is not None
        port = int(at.url.split(":")[2].split("/")[0])
        yield Contender(name, _version(source), port, at.process, '"rows":[[1]]', tokens=texts)
    finally:
        at.stop()


def _version(source: Path | None) -> str:
    environment = site.environment() if source is None else site.environment(PYTHONPATH=str(source / "src"))
    command = [PYTHON, "-c", "import mcpctl; print(mcpctl.__version__)"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def python() -> str:
    """The version of `PYTHON`, and which it is."""
    command = [PYTHON, "-c", "import platform; print(platform.python_version())"]
    number = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return f"{number} ({'the operating system' if sys.executable != PYTHON else 'the virtual environment'}'s)"


# -- the others -------------------------------------------------------------------------------------------------------


def _found(pattern: str, what: str) -> Path:
    for path in sorted(PEERS.glob(pattern)):
        if os.access(path, os.R_OK):
            return path
    raise MissingError(f"{what} is not there: benchmarks/setup.sh says why")


def _dsn(shop: site.Shop) -> str:
    return shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop", tcp=True)


@contextlib.contextmanager
def toolbox(folder: Path, shop: site.Shop, *, jwt: bool = False) -> Iterator[Contender]:
    """Google's MCP Toolbox: without authentication, or with a JWT that it checks."""
    with contextlib.ExitStack() as stack:
        port, tokens, more, options = free_port(), [], [], []
        if jwt:
            token, service = _issued(folder, stack)
            tokens, more, options = [token], [service], ["--toolbox-url", f"http://127.0.0.1:{port}"]
        program = _found("node_modules/@toolbox-sdk/server-*/bin/toolbox", "npm's @toolbox-sdk/server")
        config = _private(folder / f"toolbox-{port}.yaml", yaml.safe_dump_all([*more, *_toolbox_config(shop)]))
        # It writes a line for each request unless told not to, and is not asked to here.
        quiet = ["--log-level", "ERROR", "--disable-version-check", "--disable-reload"]
        command = [str(program), *quiet, *options, "--config", str(config), "--port", str(port)]
        process = stack.enter_context(running(port, command, folder))
        said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
        name = "Toolbox with a JWT" if jwt else "Toolbox"
        yield Contender(
            name, said.split()[-1].split("+")[0], port, process, r"?column?\":1}", argument="sql", tokens=tokens
        )


def _toolbox_config(shop: site.Shop) -> list[dict[str, Any]]:
    source = {
        "kind": "source", "name": "shop", "type": "postgres", "host": "127.0.0.1", "port": shop.cluster.port,
        "database": "shop", "user": site.READER, "password": site.PASSWORD,
        "queryParams": {"pool_max_conns": str(POOL)},
    }  # fmt: skip
    tool = {"kind": "tool", "name": "query_database", "type": "postgres-execute-sql", "source": "shop"}
    return [source, {**tool, "description": "Run a statement."}]


def _issued(folder: Path, stack: contextlib.ExitStack) -> tuple[str, dict[str, Any]]:
    """(a JWT, the service that checks it) of an issuer that runs as long as the stack."""
    port, file = free_port(), folder / "jwt"
    stack.enter_context(running(port, [sys.executable, str(HERE / "issuer.py"), str(port), str(file), "bench"], folder))
    service = {"kind": "authService", "name": "issuer", "type": "generic", "mcpEnabled": True, "audience": "bench"}
    return file.read_text(encoding="ascii"), {**service, "authorizationServer": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def dbhub(folder: Path, shop: site.Shop) -> Iterator[Contender]:
    """Bytebase's DBHub: a bearer that all share, read only."""
    port, token = free_port(), secrets.token_urlsafe()
    source = f'[[sources]]\nid = "shop"\ndsn = "{_dsn(shop)}?sslmode=disable"\npool_max_connections = {POOL}\n'
    tool = '[[tools]]\nname = "execute_sql"\nsource = "shop"\nreadonly = true\nmax_rows = 1000\n'
    config = _private(folder / "dbhub.toml", source + tool)
    package = _found("node_modules/@bytebase/dbhub/package.json", "npm's @bytebase/dbhub")
    node = _found("node_modules/node-*/bin/node", "npm's Node 22")
    command = [str(node), str(package.parent / "dist" / "index.js"), "--transport", "http", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--config", str(config)]
    with running(port, command, folder, DBHUB_AUTH_TOKEN=token, NODE_ENV="production") as process:
        number = json.loads(package.read_text(encoding="utf-8"))["version"]
        one = r"?column?\": 1\n"
        yield Contender("DBHub", number, port, process, one, tool="execute_sql", argument="sql", tokens=[token])


@contextlib.contextmanager
def bare_sdk(folder: Path, shop: site.Shop) -> Iterator[Contender]:
    """The least that can be built on the official SDK for Python, without authentication."""
    port = free_port()
    command = [PYTHON, str(HERE / "bare_sdk.py"), str(port), str(POOL)]
    with running(port, command, folder, BENCH_DSN=_dsn(shop)) as process:
        yield Contender("bare SDK", version("mcp"), port, process, r"rows\":[[1]]")


def _private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text, encoding="utf-8")
    return path
