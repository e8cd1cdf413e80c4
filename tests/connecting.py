"""What the tests of `mcpctl connect` have on both of its sides: a client of its stdin and stdout, servers that answer
as they are told, and a server of the official SDK's behind a real OpenID provider."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import uvicorn
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context

from clients import rig
from commands import Started
from site_of_mcpctl import command, environment, eventually, starter

META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}
ROBOT = Path(__file__).parent / "clients" / "robot.py"
BROWSER = f"{sys.executable} {ROBOT} %s"


def modern(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": {**params, "_meta": META}}


def old(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def told(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


NO_KEYRING = "keyring.backends.fail.Keyring"
INITIALIZE = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}


def at_home(folder: Path, **env: str) -> dict[str, str]:
    """The environment of somebody whose home that is, without a keyring, a proxy, or a display."""
    plain = {"XDG_CONFIG_HOME": str(folder), "HOME": str(folder), "PYTHON_KEYRING_BACKEND": NO_KEYRING}
    left_out = {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"} - env.keys()
    found = environment(**{**plain, **env})
    return {name: value for name, value in found.items() if name.upper() not in left_out}


class Bridge:
    """`mcpctl connect` as a client has it: a process with pipes. `before`: what a new interpreter runs instead of
    mcpctl; else it is forked, and `test_clients` and others start it anew."""

    def __init__(self, folder: Path, *arguments: str, before: list[str] | None = None, **env: str) -> None:
        given, environment = ["connect", *arguments], at_home(folder, **env)
        self.process: subprocess.Popen[bytes] | Started
        if before:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([*before, *given], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
            self._errors = self.process.stderr
        else:
            self.process = starter().talk(given, environment)
            self._errors = self.process.errors
        self.stderr: list[str] = []
        self._came: queue.Queue[bytes] = queue.Queue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._hear)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._came.put(line)

    def _hear(self) -> None:
        assert self._errors is not None
        for line in self._errors:
            self.stderr.append(line.decode())

    @property
    def said(self) -> str:
        return "".join(self.stderr)

    def raw(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, *messages: dict[str, Any]) -> None:
        self.raw(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def line(self, seconds: float = 30) -> bytes:
        """The next line of stdout."""
        try:
            return self._came.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"no answer; stderr:\n{self.said}") from None

    def answer(self, seconds: float = 30) -> Any:
        return json.loads(self.line(seconds))

    def ask(self, message: dict[str, Any], seconds: float = 30) -> Any:
        """The answer to a message, which must be the next one."""
        self.send(message)
        found = self.answer(seconds)
        assert found.get("id") == message["id"], found
        return found

    @property
    def silent(self) -> bool:
        return self._came.empty()

    def close(self, seconds: float = 5) -> int:
        """Close stdin, and wait for the end: its exit code."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join(5)
        return code

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(5)
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


Seen = tuple[str, dict[str, str], bytes]
"""Method, headers in small letters, body."""


class Visitor(BaseHTTPRequestHandler):
    """One request of a scripted server's."""

    protocol_version = "HTTP/1.1"
    server: Scripted

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        seen = (self.command, {key.lower(): value for key, value in self.headers.items()}, body)
        self.server.seen.append(seen)
        try:
            self.server.script(self, seen)
            self.wfile.flush()
        except OSError:
            self.server.left.set()
            self.close_connection = True

    do_POST = do_GET = do_DELETE = _serve

    def reply(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def result(self, of: bytes, result: dict[str, Any], **headers: str) -> None:
        number = json.loads(of)["id"]
        self.reply(200, json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode(), **headers)

    def stream(self, *events: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(event + b"\n\n")
        self.wfile.flush()
        self.close_connection = True

    def wait_until_left(self) -> None:
        """Wait until the client has closed the connection."""
        self.connection.settimeout(20)
        assert self.connection.recv(1) == b""
        self.server.left.set()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Scripted(ThreadingHTTPServer):
    """A server that answers each request as a function says."""

    daemon_threads = True

    def __init__(self, script: Callable[[Visitor, Seen], None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Visitor)
        self.script = script
        self.seen: list[Seen] = []
        self.left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/mcp"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def scripted(script: Callable[[Visitor, Seen], None], port: int = 0) -> Iterator[Scripted]:
    with Scripted(script, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(5)


@contextlib.contextmanager
def provider(node: Path, **env: str) -> Iterator[str]:
    """The issuer of a real OpenID provider, which nobody has signed in at yet."""
    process = subprocess.Popen(
        [str(node), str(rig.HERE / "provider_of_bridge.mjs")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "MCPCTL_TEST_NODE_DIR": str(rig.node_dir()), **env},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


class Introspecting:
    """Asks the provider about each token (RFC 7662)."""

    def __init__(self, issuer: str) -> None:
        self._issuer = issuer
        self.seen: list[str] = []
        self.refused: set[str] = set()

    async def verify_token(self, token: str) -> AccessToken | None:
        async with httpx.AsyncClient(auth=("resource-server", "of the test"), trust_env=False) as http:
            answer = await http.post(f"{self._issuer}/token/introspection", data={"token": token})
        found = answer.json()
        if not found.get("active") or token in self.refused:
            return None
        self.seen.append(token)
        return AccessToken(
            token=token, client_id=found["client_id"], subject=found.get("sub"), resource=found.get("aud"),
            scopes=found.get("scope", "").split(), claims={"iss": found.get("iss")},
        )  # fmt: skip


class Protected:
    """A server of the official SDK's, which takes tokens of the provider's."""

    def __init__(self, issuer: str) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/mcp"
        self.verifier = Introspecting(issuer)
        about = {"issuer_url": issuer, "resource_server_url": self.url, "required_scopes": ["read"]}
        auth = AuthSettings.model_validate({**about, "validate_token_resource": True})
        server = MCPServer("protected", log_level="CRITICAL", token_verifier=self.verifier, auth=auth)
        _give_tools(server)
        app = server.streamable_http_app()
        config = uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1, ws="none")
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> Protected:
        self._thread.start()
        eventually(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(15)
        self._socket.close()


def _give_tools(server: MCPServer) -> None:
    @server.tool()
    async def count(to: int, context: Context) -> str:
        """Counts, and says how far it is."""
        for number in range(1, to + 1):
            await context.report_progress(number, to)
            await anyio.sleep(0)
        return f"counted to {to}"

    @server.tool()
    async def hello(name: str) -> str:
        """Says hello."""
        return f"hello {name}"


@contextlib.contextmanager
def bridged(script: Any, folder: Path, *arguments: str, **env: str) -> Iterator[tuple[Scripted, Bridge]]:
    with scripted(script) as server, Bridge(folder, server.url, *arguments, **env) as bridge:
        yield server, bridge


def echo(visitor: Visitor, seen: Seen) -> None:
    if "id" in json.loads(seen[2] or b"{}") and "method" in json.loads(seen[2]):
        visitor.result(seen[2], {})
    else:
        visitor.reply(202)


def run(folder: Path, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return command("connect", *arguments, input=stdin, env=at_home(folder, **env))
