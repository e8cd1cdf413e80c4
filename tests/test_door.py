"""Those who come to the listening socket: silent, hasty, gone, or speaking no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from mcpctl.server import door, entrance, http, loop, run
from mcpctl.server.crowd import Crowd
from site_of_mcpctl import Shop, Site, eventually, in_background
from visiting import answer, unauthorized, visited

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("door") / "site", newest_shop).start()
    yield found
    found.stop()


def _connect(at: Site) -> socket.socket:
    host, port = urlsplit(at.url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _request(at: Site, token: str, query: str, *more: str) -> bytes:
    params = {"name": "query_database", "arguments": {"query": query}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    lines = [
        "POST /mcp HTTP/1.1", f"Host: {urlsplit(at.url).netloc}", f"Authorization: Bearer {token}", *more,
        "Content-Type: application/json", "Accept: application/json", f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("tls", [False, True], ids=["HTTP", "HTTPS"])
def test_a_flood_of_silent_visitors_does_not_stand_in_a_revocations_way(
    make_site: MakeSite, newest_shop: Shop, certificates: Path, tls: bool
) -> None:
    few = ("sh", "-c", 'ulimit -n 200 && exec "$0" "$@"')
    pair = ("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"))
    at = make_site(newest_shop).start(*pair if tls else (), before=few)
    verify: Any = ssl.create_default_context(cafile=str(certificates / "ca.pem")) if tls else True
    health = f"{at.url.removesuffix('/mcp')}/health"
    name, text = at.token()
    host, port = urlsplit(at.url).netloc.split(":")
    with at.client(text, verify=verify) as a, contextlib.ExitStack() as visitors:
        running = in_background(a.call, "query_database", {"query": "select pg_sleep(60)"})
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(60)%' AND state = 'active'"))
        for _ in range(300):
            visitors.enter_context(socket.create_connection((host, int(port)), timeout=5))
        eventually(lambda: _is_well(health, verify))
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", name).stdout
        assert running.result().status_code == 401
    assert _is_well(health, verify)
    assert len([line for line in at.stderr if "too few file descriptors" in line]) == 1
    assert len(at.stderr) < 30, at.stderr[-30:]


def _is_well(url: str, verify: Any) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, verify=verify).status_code == 200
    return False


def test_a_visitor_who_asks_nothing_is_sent_away() -> None:

    async def app(scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def visit(address: tuple[str, int]) -> None:
        with contextlib.ExitStack() as stack:
            asks, silent, slow = (stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3))
            slow.sendall(b"GET / HTTP/1.1\r\nHost:")
            for _ in range(2):  # before the others are sent away, and after
                asks.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert asks.recv(4096).startswith(b"HTTP/1.1 204")
                for one in (silent, slow):
                    with contextlib.suppress(ConnectionResetError):
                        assert one.recv(1) == b""

    asyncio.run(visited(app, visit, 0.5))


def test_a_tls_handshake_that_does_not_go_on_is_ended(certificates: Path) -> None:
    def visit(address: tuple[str, int]) -> None:
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        with (
            socket.create_connection(address, timeout=10) as silent,
            context.wrap_socket(socket.create_connection(address, timeout=10), server_hostname="localhost") as asks,
        ):
            asks.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 401 " in asks.recv(4096)
            assert silent.recv(1) == b""

    pair = {"ssl_certfile": certificates / "cert.pem", "ssl_keyfile": certificates / "key.pem"}
    asyncio.run(visited(unauthorized, visit, 0.5, **pair))


@pytest.mark.parametrize("more", [b"G", b"\r\n", b"a whole request"])
def test_who_goes_away_after_a_word_too_many_ends_his_call(newest_shop: Shop, served: Site, more: bytes) -> None:
    _, token = served.token()
    with _connect(served) as wire:
        wire.sendall(_request(served, token, "select pg_sleep(41)"))
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(41)%' AND state = 'active'"))
        wire.sendall(_request(served, token, "select 1") if b"whole" in more else more)
    eventually(lambda: not newest_shop.backends("query LIKE '%pg_sleep(41)%' AND state = 'active'"), 5)


def test_requests_that_come_before_the_answer_are_answered_in_turn_and_not_without_bound(served: Site) -> None:
    _, token = served.token()
    with _connect(served) as wire:
        for number in range(3):
            wire.sendall(_request(served, token, f"select {number}, pg_sleep(0.1)"))
        assert [f'"rows":[[{number},'.encode() in answer(wire)[1] for number in range(3)] == [True] * 3
        for number in range(40):  # always one ahead, and more than 64 KiB in all
            wire.sendall(_request(served, token, f"select {number} -- {'x' * 4000}"))
            if number:
                assert f'"rows":[[{number - 1}]]'.encode() in answer(wire)[1]
        assert b'"rows":[[39]]' in answer(wire)[1]
        wire.sendall(_request(served, token, "select 7, pg_sleep(0.3)"))
        wire.sendall(_request(served, token, f"select 8 -- {'x' * 100_000}"))
        assert [f'"rows":[[{number}'.encode() in answer(wire)[1] for number in (7, 8)] == [True] * 2
        for _ in range(2):  # an empty line before a request is passed over
            wire.sendall(b"\r\n" + _request(served, token, "select 9"))
            assert b'"rows":[[9]]' in answer(wire)[1]
    with _connect(served) as wire, contextlib.suppress(ConnectionError):
        wire.sendall(_request(served, token, "select pg_sleep(42)"))
        for _ in range(300):
            wire.sendall(b"x" * 10_000)
        assert wire.recv(1) == b""


def test_an_empty_line_behind_the_last_request_disturbs_it_not(served: Site) -> None:
    _, token = served.token()
    with _connect(served) as wire:
        wire.sendall(_request(served, token, "select 5, pg_sleep(0.3)", "Connection: close"))
        wire.sendall(b"\r\n")
        assert b'"rows":[[5,' in answer(wire)[1]


def test_who_reads_nothing_of_his_answer_is_sent_away() -> None:
    ended = threading.Event()

    async def app(scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": bytes(64 << 10), "more_body": True})
        ended.set()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert ended.wait(10)

    asyncio.run(visited(app, visit, 0.3))


NO_HTTP = [
    b"x\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET http://[::1/mcp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET http%3a//[/mcp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /mcp HTTP/1.1\r\n\r\n",
    b"POST /mcp HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nxyz\r\n",
]


@pytest.mark.parametrize("request_", NO_HTTP, ids=repr)
def test_what_is_no_http_is_answered_as_everything_else_is_and_not_logged(served: Site, request_: bytes) -> None:
    eventually(lambda: any(line.startswith("mcpctl audit anchor") for line in served.stderr))  # of its start
    logged = len(served.stderr)
    for _ in range(20):
        with _connect(served) as wire:
            wire.sendall(request_)
            head, body = answer(wire)
            assert head.split(b" ")[1][:1] == b"4", head
            assert b"x-request-id: " in head
            assert b"cache-control: no-store" in head
            assert json.loads(body)["error"]["message"]
            assert wire.recv(1) == b""
    assert len(served.stderr) == logged, served.stderr[logged:]


def test_a_credential_that_is_refused_for_its_form_leaves_an_audit_line(served: Site) -> None:
    _, token = served.token()
    header = f"Authorization: Bearer {token}"
    for more in ((f"X-API-Key: {token}",), (header,)):
        with _connect(served) as wire:
            wire.sendall(_request(served, token, "select 1", *more))
            assert b" 400 " in answer(wire)[0]
    assert httpx.post(f"{served.url}?token={token}").status_code == 400
    said = [line["reason"] for line in served.audit() if line["event"] == "auth.refused"]
    assert any("two credentials" in reason for reason in said)
    assert any("authorization stands there 2 times" in reason for reason in said)
    assert any("in the URL" in reason for reason in said)
    assert token[13:] not in (served.folder / "audit.jsonl").read_text()


@pytest.mark.parametrize("end", ["the token is revoked", "its user's roles are taken"])
def test_of_an_answer_that_is_read_slowly_nothing_more_leaves_once(
    make_site: MakeSite, newest_shop: Shop, end: str
) -> None:
    at = make_site(newest_shop, extra="limits: {max_bytes: 8MiB, max_rows: 100000}\n").start()
    name, token = at.token()
    host, port = urlsplit(at.url).netloc.split(":")
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect((host, int(port)))
        wire.sendall(_request(at, token, "select repeat('x', 1000) from generate_series(1, 3000)"))
        assert wire.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: [line for line in at.audit() if line["event"] == "tool.called"])
        at.run(*(("token", "revoke", name) if "token" in end else ("user", "roles", "alice", "--none")))
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := wire.recv(1 << 20):
                read += len(chunk)
    with at.client(at.token("bob")[1]) as client:
        whole = len(
            client.call("query_database", {"query": "select repeat('x', 1000) from generate_series(1, 3000)"}).content
        )
    assert read < whole - (1 << 20)


def test_a_cancelled_notification_that_is_none_or_is_not_an_older_clients_ends_nothing(
    newest_shop: Shop, served: Site
) -> None:
    with served.client(served.token()[1]) as client:
        running = in_background(client.call, "query_database", {"query": "select pg_sleep(3)"}, 77)
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(3)%' AND state = 'active'"))
        with served.client(served.token()[1]):
            for message, headers in (
                ({"method": "notifications/cancelled", "params": {"requestId": 77}}, {}),
                ({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 77}},
                 {"MCP-Protocol-Version": "2026-07-28"}),
            ):  # fmt: skip
                httpx.post(served.url, json=message, headers={**client.http.headers, **headers})
        assert running.result().json()["result"]["isError"] is False


def test_who_is_not_known_goes_for_a_newcomer_and_who_holds_most_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_NEWCOMERS", 100_000)  # there is never room enough, and nobody is turned away

    async def app(scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
        scope["state"]["known"], _, busy = scope["path"][1:].partition("/")
        while busy and (await receive())["type"] != "http.disconnect":
            pass
        await unauthorized(scope, receive, send)

    visitor = door.Visitor.of(1 << 20)
    with door.Door() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.visitors = visitor

        def visit() -> None:
            address = bound.getsockname()
            sources = ["127.0.0.1", "127.0.0.2", *["127.0.0.3"] * 8]
            with contextlib.ExitStack() as stack:
                wires = []
                for number, source in enumerate(sources):
                    wire = socket.create_connection(address, timeout=10, source_address=(source, 0))
                    wires.append(stack.enter_context(wire))
                    wire.sendall(b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"" if number else b"known"))
                    assert b" 401 " in answer(wire)[0], number
                bound.most = 100_000
                for number in range(6):
                    with socket.create_connection(address, timeout=10) as wire:
                        wire.sendall(b"GET /known HTTP/1.1\r\nHost: x\r\n\r\n")
                        assert b" 401 " in answer(wire)[0]
                    with contextlib.suppress(ConnectionResetError):
                        assert wires[2 + number].recv(1) == b""
                for wire in wires[:2]:
                    wire.sendall(b"GET /known HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert b" 401 " in answer(wire)[0]
                bound.most = None  # and then, who has many connections with one token
                many = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(5)]
                many[0].sendall(b"GET /many/busy HTTP/1.1\r\nHost: x\r\n\r\n")
                for wire in many[1:]:
                    wire.sendall(b"GET /many HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert b" 401 " in answer(wire)[0]
                    wire.sendall(b"GET ")
                bound.most = 100_000
                for gone in (many[1], wires[8], wires[9]):
                    newcomer = socket.create_connection(address, timeout=10, source_address=("127.0.0.3", 0))
                    stack.enter_context(newcomer)
                    with contextlib.suppress(ConnectionResetError):
                        assert gone.recv(1) == b""
                assert bound.turned_away == 9

        async def main() -> None:
            options: dict[str, Any] = {"lifespan": "off", "log_config": None, "timeout_keep_alive": 60}
            server = run._Uvicorn(uvicorn.Config(app, http=visitor, **options), lambda: None, [])
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            while not server.started:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(visit)
            server.should_exit = True
            await serving

        loop.run(main())


def test_the_door_is_asked_on_libuv_too() -> None:
    """uvloop has accept done by libuv, which knows no door: we accept ourselves."""
    pytest.importorskip("uvloop")
    found: list[str] = []

    async def main() -> None:
        found.append(type(asyncio.get_running_loop()).__module__)
        visitor = door.Visitor.of(1 << 20, 0.5)
        with door.Door() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.most = 0  # nobody is let in
            taking = entrance.Entrance(bound, visitor, None)
            with socket.create_connection(bound.getsockname(), timeout=10) as wire:
                assert await asyncio.to_thread(wire.recv, 1) == b""
            assert bound.turned_away == 1
            taking.close()
            await taking.wait_closed()

    loop.run(main())
    assert found == ["uvloop"]


def test_workers_take_in_as_many_each_and_who_is_stuck_keeps_nobody_out() -> None:
    """Two workers of one door, in one loop; then one of them takes nobody any more."""
    transports: list[asyncio.BaseTransport] = []

    class Quiet(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transports.append(transport)

    async def main() -> None:
        crowds = [Crowd(2), Crowd(2)]
        crowds[1]._counts, crowds[1].place = crowds[0]._counts, 1  # as after a fork
        with door.Door() as bound, contextlib.ExitStack() as wires:
            bound.bind(("127.0.0.1", 0))
            doors = [bound, wires.enter_context(door.Door(fileno=os.dup(bound.fileno())))]
            visitors, takings = [door.Visitor.of(1 << 20), door.Visitor.of(1 << 20)], []
            for one, theirs, theirs.crowd in zip(doors, visitors, crowds, strict=True):
                one.visitors = theirs
                takings.append(entrance.Entrance(one, Quiet, None))

            async def come(count: int) -> list[int]:
                total = len(transports) + count
                for _ in range(count):
                    wires.enter_context(socket.create_connection(bound.getsockname(), timeout=10))
                async with asyncio.timeout(20):
                    while len(transports) < total:
                        await asyncio.sleep(0)
                return [len(theirs.here) for theirs in visitors]

            assert min(await come(30)) >= 11
            takings[1].close()
            first, second = await come(20)
            assert second <= 19
            assert first + second == 50
            for taking in takings:
                taking.close()
                await taking.wait_closed()
            for theirs in visitors:
                for coming in theirs.here.values():
                    assert isinstance(coming, door._Coming)
                    coming.patience.cancel()
            for transport in transports:
                transport.abort()

    loop.run(main())


def test_a_door_that_is_closed_while_others_come_first_takes_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        faults: list[Any] = []
        here = asyncio.get_running_loop()
        here.set_exception_handler(lambda _, fault: faults.append(fault))
        crowd = Crowd(2)
        for left_open in (False, True):
            visitor = door.Visitor.of(1 << 20)
            visitor.crowd = crowd
            with door.Door() as bound, socket.socket() as first:
                bound.bind(("127.0.0.1", 0))
                bound.visitors = visitor
                coming = door._Coming(first, ("127.0.0.1", 1), 20.0)
                visitor.here[-1] = coming  # this worker has one, the other none
                taking = entrance.Entrance(bound, asyncio.Protocol, None)
                with socket.create_connection(bound.getsockname(), timeout=10):
                    async with asyncio.timeout(10):
                        while taking._paused is None:
                            await asyncio.sleep(0)
                    taking.close()
                    if not left_open:
                        bound.close()
                    await asyncio.sleep(0.01)  # the time for which others come first is over
                    assert list(visitor.here.values()) == [coming]
                coming.patience.cancel()
        assert not faults

    asyncio.run(main())
    loop.run(main())
    assert not caplog.records


def test_who_asked_in_time_is_answered_by_a_server_that_was_late() -> None:
    """A timer that is over comes before what the loop has yet to read."""
    visitor = door.Visitor.of(1 << 20)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def main() -> None:
        with door.Door() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.visitors = visitor
            server = run._Uvicorn(uvicorn.Config(unauthorized, http=visitor, ws="none", lifespan="off"), int, [])
            serving = asyncio.create_task(server.serve([bound]))
            async with asyncio.timeout(10):
                while not server.started:
                    await asyncio.sleep(0)
            with await asyncio.to_thread(socket.create_connection, bound.getsockname(), 10) as wire:
                for late in (False, True):
                    wire.sendall(request)
                    if late:
                        [here] = visitor.here.values()
                        assert isinstance(here, door.Visitor)
                        here._answered_at = asyncio.get_running_loop().time() - 60
                        here.timeout_keep_alive_handler()
                    assert b" 401 " in (await asyncio.to_thread(answer, wire))[0]
                here._answered_at = asyncio.get_running_loop().time() - 60
                here._unset_keepalive_if_required()
                here.timeout_keep_alive_handler()
                assert await asyncio.to_thread(wire.recv, 1) == b""  # who asked nothing more goes
            server.should_exit = True
            await serving

    loop.run(main())


def test_who_agrees_on_no_tls_is_counted_no_longer(certificates: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    visitor = door.Visitor.of(1 << 20)
    visitor.crowd = Crowd(2)

    async def main() -> None:
        with door.Door() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.visitors = visitor
            taking = entrance.Entrance(bound, asyncio.Protocol, context)
            with socket.create_connection(bound.getsockname(), timeout=10) as wire:
                wire.sendall(b"GET / HTTP/1.1\r\n\r\n")
                async with asyncio.timeout(10):
                    while not visitor.here:
                        await asyncio.sleep(0)
                    while visitor.here:
                        await asyncio.sleep(0)
            taking.close()
            await taking.wait_closed()

    loop.run(main())
    assert visitor.crowd is not None
    assert list(visitor.crowd._counts) == [0, 0]
