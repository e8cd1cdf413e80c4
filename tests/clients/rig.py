"""Drives real clients that run on Node: the MCP Inspector, both TypeScript SDKs, the conformance suite.

Every function needs the rig installed; `node_or_reason` does that, or says why it cannot be done.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
TIMEOUT = 120.0
NOT_INSTALLABLE = 3
HEAD_LIMIT = 64 * 1024

Era = Literal["auto", "modern", "legacy"]
Revision = Literal["2026-07-28", "2025-11-25"]
Target = str | Sequence[str]

# The scenarios that say something about any server, and need none of the suite's own fixture tools.
NEUTRAL: dict[Revision, tuple[str, ...]] = {
    "2026-07-28": (
        "caching",
        "http-header-validation",
        "dns-rebinding-protection",
        "sep-2164-resource-not-found",
        "resources-list",
        "tools-list",
        "server-sse-multiple-streams",
        "input-required-result-unsupported-methods",
        "server-stateless",
    ),
    "2025-11-25": (
        "server-initialize",
        "ping",
        "tools-list",
        "resources-list",
        "server-sse-multiple-streams",
        "dns-rebinding-protection",
    ),
}

# What a server without the suite's fixture tools cannot show. They count unless the suite marks them "untestable".
NEEDS_FIXTURE_TOOLS = {
    "sep-2575-server-rejects-undeclared-capability",
    "sep-2575-missing-capability-http-400",
    "sep-2575-http-server-no-independent-requests-on-stream",
    "sep-2575-server-no-log-without-loglevel",
}
# Warnings that belong to a server without sessions.
EXPECTED_WARNINGS = {"server-sse-multiple-streams-session"}


class RigError(Exception):
    """The rig or a client broke in a way that is not an answer of the server under test."""


class ClientError(Exception):
    """A client reported an error instead of a result."""

    def __init__(self, code: object, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Check:
    """One check of a conformance scenario."""

    id: str
    status: str
    message: str
    untestable: bool

    @property
    def failed(self) -> bool:
        if self.untestable and self.id in NEEDS_FIXTURE_TOOLS:
            return False
        return self.status == "FAILURE" or (self.status == "WARNING" and self.id not in EXPECTED_WARNINGS)


@dataclass(frozen=True)
class Scenario:
    """One conformance scenario with all of its checks."""

    name: str
    checks: tuple[Check, ...]

    @property
    def status(self) -> Literal["passed", "failed", "empty"]:
        if not self.checks:
            return "empty"
        return "failed" if self.failures else "passed"

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"{check.id}: {check.status} {check.message}" for check in self.checks if check.failed)


def node_dir() -> Path:
    """Where node_modules is, or will be."""
    return Path(os.environ.get("MCPCTL_TEST_NODE_DIR") or HERE).resolve()


@functools.cache
def node_or_reason() -> Path | str:
    """The Node to run clients with, installed now if need be; or the reason why there is none."""
    try:
        done = subprocess.run(
            ["sh", str(HERE / "setup.sh")],
            capture_output=True,
            text=True,
            timeout=900,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        return f"tests/clients/setup.sh did not run: {fault}"
    if done.returncode == NOT_INSTALLABLE:
        return done.stderr.strip() or "tests/clients/setup.sh gave no reason"
    if done.returncode != 0:
        raise RigError(f"tests/clients/setup.sh exited {done.returncode}: {done.stderr.strip()}")
    for node in sorted(node_dir().glob("node_modules/node-*/bin/node")):
        return node
    raise RigError("tests/clients/setup.sh reports success, and there is no Node")


def _node() -> Path:
    node = node_or_reason()
    if isinstance(node, str):
        raise RigError(f"no Node on this machine: {node}")
    return node


def _run(
    argv: Sequence[str], home: str, *, stdin: str = "", ca: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run something on Node, with a home of its own and nothing of ours in its environment."""
    env = {
        "PATH": f"{_node().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HOME": home,
        "MCPCTL_TEST_NODE_DIR": str(node_dir()),
        "MCP_INSPECTOR_SECRET_STORE": "memory",
        "NO_COLOR": "1",
    }
    if ca is not None:
        env["NODE_EXTRA_CA_CERTS"] = str(ca)
    try:
        return subprocess.run(
            [str(_node()), *argv],
            input=stdin,
            capture_output=True,
            text=True,
            env=env,
            cwd=home,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise RigError(f"{argv[0]} gave no answer in {TIMEOUT:.0f} s; stderr: {late.stderr!r}") from late


def _package_file(name: str) -> str:
    return str(node_dir() / "node_modules" / "@modelcontextprotocol" / name)


def inspector(
    target: Target,
    *args: str,
    token: str | None = None,
    era: Era | None = None,
    ca: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Run the Inspector's command line on a URL, or on a command that speaks stdio; return the result it prints.

    `args` are the Inspector's own: "--method", "tools/list". A failure that it reports raises ClientError.
    """
    options = [*args, "--stored-auth-only"]
    if era is not None:
        options += ["--protocol-era", era]
    if isinstance(target, str):
        if token is not None:
            options += ["--header", f"Authorization: Bearer {token}"]
        argv = [target, "--transport", "http", *options, "--format", "json"]
    else:
        for name, value in (env or {}).items():
            options += ["-e", f"{name}={value}"]
        # The command goes last, behind "--": the Inspector would take the command's own --config for its own.
        argv = [*options, "--format", "json", target[0], "--", *target[1:]]
    launcher = _package_file("inspector/clients/launcher/build/index.js")
    with tempfile.TemporaryDirectory(prefix="mcpctl-inspector-") as home:
        done = _run([launcher, "--cli", *argv], home, ca=ca)
    for text in (done.stdout, *reversed(done.stderr.splitlines())):
        try:
            answer = json.loads(text)
        except ValueError:
            continue
        if isinstance(answer, dict) and "error" in answer:
            raise ClientError(answer["error"].get("code"), str(answer["error"].get("message")))
        if isinstance(answer, dict) and "result" in answer:
            return answer["result"]
    raise RigError(f"the Inspector exited {done.returncode}; stdout: {done.stdout!r}; stderr: {done.stderr!r}")


def typescript(
    target: Target,
    tool: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    token: str | None = None,
    era: Era = "auto",
    ca: Path | None = None,
    env: Mapping[str, str] | None = None,
    old: bool = False,
) -> dict[str, Any]:
    """Connect with a TypeScript client (the 2.x one, or the 1.x SDK if `old`), list the tools and call one.

    Returns {"era", "version", "tools", "result"}; a failure that the client reports raises ClientError.
    """
    wanted: dict[str, Any] = {"era": era, "tool": tool, "arguments": dict(arguments or {})}
    if isinstance(target, str):
        wanted |= {"url": target, "token": token}
    else:
        wanted |= {"command": list(target), "env": dict(env or {})}
    script = HERE / ("client_old.mjs" if old else "client.mjs")
    with tempfile.TemporaryDirectory(prefix="mcpctl-typescript-") as home:
        done = _run([str(script)], home, stdin=json.dumps(wanted), ca=ca)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise RigError(
            f"{script.name} exited {done.returncode}; stdout: {done.stdout!r}; stderr: {done.stderr!r}"
        ) from None
    if not isinstance(answer, dict):
        raise RigError(f"{script.name} printed {answer!r}")
    if "error" in answer:
        raise ClientError(answer["error"]["code"], answer["error"]["message"])
    return answer


@functools.cache
def conformance(url: str, token: str, requirements: Revision, ca: Path | None = None) -> tuple[Scenario, ...]:
    """Run the conformance suite for a revision, and return its neutral scenarios in the order of NEUTRAL.

    The suite exits 1, since the scenarios that need fixture tools fail; so its files are read, not its exit code.
    """
    main = _package_file("conformance/dist/index.js")
    with tempfile.TemporaryDirectory(prefix="mcpctl-conformance-") as home, bearer_proxy(url, token, ca) as open_url:
        done = _run([main, "server", "--url", open_url, "--requirements", requirements, "-o", home], home)
        found = {_scenario_name(file.parent): _read_checks(file) for file in Path(home).glob("server-*/checks.json")}
    if not found:
        raise RigError(f"the conformance suite exited {done.returncode} with no results; stderr: {done.stderr!r}")
    return tuple(Scenario(name, found.get(name, ())) for name in NEUTRAL[requirements])


def _scenario_name(folder: Path) -> str:
    # server-<scenario>-<time, as 2026-11-20T12-27-33-708Z>
    return re.sub(r"-\d{4}-\d\d-\d\dT[\d-]+Z$", "", folder.name.removeprefix("server-"))


def _read_checks(file: Path) -> tuple[Check, ...]:
    return tuple(
        Check(
            id=check["id"],
            status=check["status"],
            message=check.get("errorMessage") or "",
            untestable=bool((check.get("details") or {}).get("untestable")),
        )
        for check in json.loads(file.read_text())
    )


@contextmanager
def bearer_proxy(url: str, token: str, ca: Path | None = None) -> Iterator[str]:
    """A proxy on a free loopback port that adds the bearer token; yields its URL, stops when the block ends.

    It passes bytes on as they come, so it streams, and leaves every header as sent (also the spaces that one scenario
    puts around a value). Only a Host or Origin that names the proxy itself is made to name the server: whatever else,
    as `evil.example.com`, must reach the server's own check.
    """
    proxy = _Proxy(url, token, ca)
    thread = threading.Thread(target=proxy.run, name="bearer-proxy", daemon=True)
    thread.start()
    proxy.ready.wait(TIMEOUT)
    if proxy.fault is not None or not proxy.authority:
        raise RigError(f"the proxy did not start: {proxy.fault}")
    try:
        yield f"http://{proxy.authority}{urlsplit(url).path}"
    finally:
        proxy.stop()
        thread.join(TIMEOUT)


class _Proxy:
    def __init__(self, url: str, token: str, ca: Path | None) -> None:
        parts = urlsplit(url)
        if parts.hostname is None:
            raise RigError(f"no host in {url}")
        self.secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        self.server = parts.netloc
        self.token = token
        self.ca = ca
        self.authority = ""
        self.fault: OSError | None = None
        self.ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as fault:
            self.fault = fault
        finally:
            self.ready.set()

    def stop(self) -> None:
        if self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        listener = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=HEAD_LIMIT)
        self.authority = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self.ready.set()
        await self._stopping.wait()
        listener.close()
        # asyncio.run cancels the connections that are left.

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request on one connection: "Connection: close" is put in, so both ends know where it stops."""
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            tls = ssl.create_default_context(cafile=self.ca) if self.secure else None
            answer, upstream = await asyncio.open_connection(self.host, self.port, ssl=tls)
            upstream.write(self._edited(head))
            sending = asyncio.create_task(_pump(reader, upstream))
            receiving = asyncio.create_task(_pump(answer, writer))
            try:
                # The client going away ends the server's request too; the end of the answer ends both.
                await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                sending.cancel()
                receiving.cancel()
                await asyncio.gather(sending, receiving, return_exceptions=True)
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the suite sees a closed connection, and says so
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.close()

    def _edited(self, head: bytes) -> bytes:
        first, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        own = self.authority.encode()
        scheme = b"https" if self.secure else b"http"
        kept = []
        names = set()
        for field in fields:
            name, _, value = field.partition(b":")
            key = name.strip().lower()
            names.add(key)
            if key == b"connection":
                continue
            if key == b"host" and value.strip() == own:
                kept.append(b"Host: " + self.server.encode())
            elif key == b"origin" and value.strip() == b"http://" + own:
                kept.append(b"Origin: " + scheme + b"://" + self.server.encode())
            else:
                kept.append(field)
        if b"authorization" not in names:
            kept.append(b"Authorization: Bearer " + self.token.encode())
        return b"\r\n".join([first, *kept, b"Connection: close", b"", b""])


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(HEAD_LIMIT):
        sink.write(data)
        await sink.drain()
