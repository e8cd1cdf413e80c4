"""The hot lane answers as the ordinary one does, and refuses what that one refuses, between any two calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mcpctl.server import door, encoding
from mcpctl.server.exchange import Receive, Scope, Send
from mcpctl.server.express import Call
from mcpctl.server.hot import Found, Lane, Reply, Write
from site_of_mcpctl import Shop, Site, eventually, in_background
from visiting import answer, visited

MakeSite = Callable[..., Site]
Task = asyncio.Task[None]
Gone = Callable[[], bool]
_HEAD = b"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAuthorization: y\r\n\r\n"


class _App:
    """An app, and the reading of a config that it was made of, which counts what goes the hot way."""

    in_force = True

    def __init__(self) -> None:
        self.again_for: list[bytes] = []
        self.ordinary: list[bytes] = []
        self.gone = self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body = b""
        while (message := await receive()).get("more_body", False) or message.get("body"):
            body += message["body"]
            if not message["more_body"]:
                break
        self.ordinary.append(body)
        scope["state"] |= {
            "found": Found(self, None, None, scope["headers"], 100, (False, "")),
            "generation": self,
            "known": "t",
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def read(self, found: Found, body: bytes) -> Call | None:
        return None if body == b"sdk" else Call(1, body.decode(), None, False)

    async def again(self, found: Found, call: Call, task: Task, gone: Gone, write: Write) -> bool:
        self.again_for.append(call.name.encode())
        try:
            await asyncio.sleep(60 if call.name == "long" else 0)
        finally:
            self.gone += gone()
        return await write(Reply(401 if call.name == "no" else 200, b"again", "1"))


def test_a_further_call_with_the_same_head_goes_the_hot_way_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_AT_ONCE_SECONDS", 60.0)
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def ask(*pieces: bytes, answers: int = 1) -> None:
                for piece in pieces:
                    wire.sendall(piece)
                for _ in range(answers):
                    answer(wire)

            def whole(body: bytes) -> bytes:
                return _HEAD % len(body) + body

            ask(whole(b"first"))
            ask(whole(b"second"))
            ask(whole(b"another length"))
            ask(_HEAD % 8, b"in ", b"drops")
            ask(whole(b"sdk"))
            ask(whole(b"one") + whole(b"two"), answers=2)
            ask(whole(b"x" * 101))
            ask(whole(b"head").replace(b"y\r\n", b"z\r\n"))
            ask(whole(b"no").replace(b"y\r\n", b"z\r\n"))
            ask(whole(b"anew").replace(b"y\r\n", b"z\r\n"))
            app.in_force = False
            ask(whole(b"reloaded").replace(b"y\r\n", b"z\r\n"))
            app.in_force = True
            ask(whole(b"close").replace(b"y\r\n", b"y\r\nConnection: close\r\n"))
            assert wire.recv(1) == b""
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(_HEAD % 3 + b"one")
            answer(wire)
            wire.sendall(_HEAD % 4 + b"long")
            eventually(lambda: app.again_for[-1] == b"long")
        eventually(lambda: app.gone)

    asyncio.run(visited(app, visit, 20))
    assert app.again_for == [b"second", b"another length", b"in drops", b"no", b"long"]
    others = [b"first", b"sdk", b"one", b"two", b"x" * 101, b"head", b"anew", b"reloaded", b"close", b"one"]
    assert app.ordinary == others


def test_what_does_not_come_at_once_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_AT_ONCE_SECONDS", 0.0)
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for number in range(2):
                wire.sendall(_HEAD % 3 + b"on")
                eventually(lambda number=number: app.asked > number)
                wire.sendall(b"e")
                answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"one"], [])


def test_who_asks_nothing_more_is_sent_away_and_who_is_answered_is_not() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            began = time.monotonic()
            while time.monotonic() - began < 1.5:  # longer than anybody may be silent
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
            wire.sendall(_HEAD % 3 + b"on")
            wire.sendall(b"e")
            answer(wire)
            assert wire.recv(1) == b""

    asyncio.run(visited(app, visit, 20, timeout_keep_alive=1))
    assert len(app.ordinary) == 1


def test_a_long_answer_stops_when_it_is_no_longer_wanted_and_waits_for_who_reads_it() -> None:
    class Long(_App):
        wanted = True

        async def again(self, found: Found, call: Call, task: Task, gone: Gone, write: Write) -> bool:
            return await write(Reply(200, bytes(8 << 20), "1", wanted=lambda: self.wanted))

    app = Long()

    def visit(address: tuple[str, int]) -> None:
        for app.wanted in (True, False):
            with socket.create_connection(address, timeout=10) as wire:
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
                wire.sendall(_HEAD % 3 + b"two")
                read = 0
                while read < 8 << 20 and (more := wire.recv(1 << 20)):
                    read += len(more)
                assert (read >= 8 << 20) is app.wanted

    asyncio.run(visited(app, visit, 20))


def test_a_connection_that_is_hung_up_while_a_long_answer_leaves_ends_behind_it() -> None:
    class HungUp(_App):
        async def again(self, found: Found, call: Call, task: Task, gone: Gone, write: Write) -> bool:
            def wanted() -> bool:
                write.__self__.shutdown()  # type: ignore[attr-defined]
                return True

            return await write(Reply(200, bytes(1 << 20), "1", wanted=wanted))

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
            assert wire.recv(1) == b""

    asyncio.run(visited(HungUp(), visit, 60, timeout_keep_alive=60))


def test_who_was_answered_just_now_is_not_sent_away_however_long_it_took() -> None:
    class Slow(_App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(1.5)  # until shortly before the second look
            await super().__call__(scope, receive, send)

        async def again(self, found: Found, call: Call, task: Task, gone: Gone, write: Write) -> bool:
            await asyncio.sleep(1.35)
            return await write(Reply(200, b"again", "1"))

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
                wire.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    wire.recv(1)
                wire.settimeout(10)

    asyncio.run(visited(Slow(), visit, 0.8))


def test_the_headers_of_an_answer_are_the_same_in_both_lanes() -> None:
    for body in (b"", b"{}"):
        ordinary = b"".join(b"%b: %b\r\n" % header for header in encoding.headers(body, "abc"))
        assert Reply(200, body, "abc").lines() == ordinary


def test_what_a_head_has_said_is_not_shown() -> None:
    headers = [(b"authorization", b"Bearer mcp_secret")]
    assert "mcp_" not in repr(Found(_App(), None, "mcp_secret", headers, 9, (False, "")))


def test_a_large_head_is_not_kept() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall((_HEAD % 3).replace(b"y\r\n", b"y" * 9000 + b"\r\n") + b"one")
                answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"one"], [])


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\n\r\n", b"x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"])
def test_a_head_without_one_length_is_never_known(head: bytes) -> None:
    assert Lane.of(head, Found(_App(), None, None, [], 9, (False, "")), _App()) is None


# -- over a real server --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _wire(at: Site, certificates: Path | None = None) -> Iterator[socket.socket]:
    host, port = urlsplit(at.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        if certificates is None:
            yield plain
            return
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        with context.wrap_socket(plain, server_hostname=host) as wire:
            yield wire


def _ask(at: Site, wire: socket.socket, token: str, query: str, name: str = "query_database") -> tuple[int, bytes]:
    head, body = _answer(at, wire, token, query, name)
    return int(head.split(b" ")[1]), body


def _answer(at: Site, wire: socket.socket, token: str, query: str, name: str) -> tuple[bytes, bytes]:
    wire.sendall(_request(at, token, query, name))
    return answer(wire)


def _request(at: Site, token: str, query: str, name: str = "query_database") -> bytes:
    params = {"name": name, "arguments": {"query": query}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    lines = [
        "POST /mcp HTTP/1.1", f"Host: {urlsplit(at.url).netloc}", f"Authorization: Bearer {token}",
        "Content-Type: application/json", "Accept: application/json", f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("hot") / "site", newest_shop, extra="limits: {request_bytes: 4KiB}\n").start()
    yield found
    found.stop()


def test_both_lanes_say_the_same(served: Site) -> None:
    _, token = served.token()
    asked = ["select 1", "select 'é', null", "drop table x", "select 1/0", "x" * 5000]
    for query in asked:
        for name in ("query_database", "no_such_tool"):
            said = []
            with _wire(served) as wire:
                for _ in range(2):
                    head, body = _answer(served, wire, token, query, name)
                    lines = [
                        line for line in head.split(b"\r\n") if not re.match(rb"date|content-length|x-request-id", line)
                    ]
                    said.append((lines, re.sub(rb"elapsed_ms\W+[\d.]+", b"", body)))
                    if b"connection: close" in lines:
                        break
            assert said[0] == said[-1]
    calls = [line for line in served.audit() if line["event"] == "tool.called" and line.get("statement") == "select 1"]
    assert len(calls) == 2
    same = [{key: line[key] for key in ("user", "token", "tool", "client_ip", "transport", "rows")} for line in calls]
    assert same[0] == same[1]
    assert len({line["request_id"] for line in calls}) == 2


def test_who_goes_away_in_a_hot_call_ends_it(newest_shop: Shop, served: Site) -> None:
    _, token = served.token()
    with _wire(served) as wire:
        assert _ask(served, wire, token, "select 1")[0] == 200
        wire.sendall(_request(served, token, "select pg_sleep(43)"))
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"))
    eventually(lambda: not newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"), 5)
    eventually(lambda: [line for line in served.audit() if line.get("outcome") == "cancelled"])


def _run(at: Site, wire: socket.socket, token: str, *command: str) -> str:
    """What a command says; calls go on meanwhile, so that the connection stays."""
    running = in_background(at.run, *command)
    while running.runs:
        _ask(at, wire, token, "select 1")
    return str(running.result().stdout)


def test_what_has_changed_between_two_hot_calls_counts(
    make_site: MakeSite, newest_shop: Shop, certificates: Path
) -> None:
    pair = ("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"))
    at = make_site(newest_shop).start(*pair)
    name, token = at.token()
    wrong = at.token()[1][:-1] + "?"
    with _wire(at, certificates) as wire:
        for _ in range(3):
            assert _ask(at, wire, token, "select 1")[0] == 200
        _run(at, wire, token, "lockdown")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [503, 503]
        _run(at, wire, token, "lockdown", "--lift")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [200, 200]
        assert _ask(at, wire, wrong, "select 1")[0] == 401
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [200, 200]
        assert _run(at, wire, token, "config", "reload").startswith("changed: ")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(3)] == [200, 200, 200]
        _run(at, wire, token, "token", "revoke", name)
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [401, 401]
    name, token = at.token()
    with _wire(at, certificates) as wire:
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select pg_sleep(44)"))
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(44)%' AND state = 'active'"))
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", name).stdout
        assert answer(wire)[0].startswith(b"HTTP/1.1 401")
    name, token = at.token()
    with _wire(at, certificates) as wire:
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select 'late', pg_sleep(1)"))
        eventually(lambda: newest_shop.backends("query LIKE '%late%' AND state = 'active'"))
        assert at.process is not None
        at.process.send_signal(signal.SIGTERM)
        head, body = answer(wire)
        assert b"connection: close" in head
        assert b"late" in body


def test_a_hot_answer_that_is_read_slowly_counts_as_a_call_and_ends_with_its_token_after_a_reload(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="limits: {max_bytes: 16MiB, max_rows: 100000, tokens: {concurrent: 1}}\n").start()
    name, token = at.token()
    url = urlsplit(at.url)
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect((url.hostname, url.port))
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select repeat('x', 1000) from generate_series(1, 4000)"))
        assert wire.recv(12) == b"HTTP/1.1 200"
        with _wire(at) as other:
            assert _ask(at, other, token, "select 1")[0] == 429, "a call that is being answered runs"
        at.run("config", "reload")
        at.run("token", "revoke", name)
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := wire.recv(1 << 20):
                read += len(chunk)
                assert read < 6 << 20, "all of it has left"
