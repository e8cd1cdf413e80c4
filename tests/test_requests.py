"""HTTP as it comes: in drops, in chunks, behind other requests, without end; and what the answers wait for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
import uvicorn

from mcpctl.server import door
from mcpctl.server.exchange import Receive, Scope, Send
from visiting import CHUNKED, answer, unauthorized, visited


@pytest.mark.parametrize("read", [False, True], ids=["refused", "read"])
@pytest.mark.parametrize("size", [1, 64])
def test_bodies_in_small_chunks_hold_up_nobody(read: bool, size: int) -> None:
    late = 0.0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while read and (await receive()).get("more_body", False):
            pass
        await unauthorized(scope, receive, send)

    async def look() -> None:
        """How long the loop was busy between two turns of this: its own time, without that of other processes."""
        nonlocal late
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.01)
            late = max(late, time.thread_time() - began)

    def visit(address: tuple[str, int]) -> None:
        flood = b"%x\r\n%b\r\n" % (size, b"x" * size) * (200_000 // (size + 6))
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(20)]
            for wire in wires:
                wire.sendall(CHUNKED)
            for wire in wires:
                wire.setblocking(False)
                with contextlib.suppress(OSError):
                    for _ in range(1 if read else 4):
                        wire.send(flood)

    async def main() -> None:
        looking = asyncio.create_task(look())
        await visited(app, visit, 5)
        looking.cancel()

    asyncio.run(main())
    assert late < 0.3, late


def test_a_body_that_goes_on_behind_its_answer_closes_the_connection() -> None:
    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(CHUNKED + b"1\r\nx\r\n")
            head, body = answer(wire)
            assert b" 401 " in head
            assert b"connection: close" in head.lower()
            assert body == b"no"
            sent = 0
            with pytest.raises(ConnectionError):
                while sent < 64 << 20:
                    wire.sendall(bytes(1 << 20))
                    sent += 1 << 20
            assert sent < 64 << 20
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):  # whose body has come whole may stay
                wire.sendall(CHUNKED + b"1\r\nx\r\n0\r\n\r\n")
                assert b"close" not in answer(wire)[0].lower()

    asyncio.run(visited(unauthorized, visit, 20))


def test_a_request_behind_a_body_in_chunks_is_asked_again_and_one_in_drops_is_heard() -> None:
    """The parser does not say where chunks end: the connection is closed, and nothing behind them is taken for more."""
    body = CHUNKED + b"1\r\nx\r\n0\r\n\r\n"

    def visit(address: tuple[str, int]) -> None:
        for behind in (body, b"GET /else HTTP/1.1\r\nHost: x\r\n\r\n", b"x", b"\0" * 9000):
            with socket.create_connection(address, timeout=10) as wire:
                wire.sendall(body + behind)
                head, _ = answer(wire)
                assert b" 401 " in head
                assert b"connection: close" in head.lower()
                assert wire.recv(1) == b""
        with socket.create_connection(address, timeout=10) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(2):
                for number in range(len(body)):
                    wire.sendall(body[number : number + 1])
                head, _ = answer(wire)
                assert b" 401 " in head
                assert b"close" not in head.lower()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        await unauthorized(scope, receive, send)

    asyncio.run(visited(app, visit, 20))


def test_a_call_that_came_before_the_answer_is_not_idle_however_long_it_runs() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(200 if scope["path"] == "/long" else 0):
            await asyncio.sleep(0.001)
        await unauthorized(scope, receive, send)

    def visit(address: tuple[str, int]) -> None:
        one, other = (b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"/", b"/long"))
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(one + other)
            assert [answer(wire)[1] for _ in range(2)] == [b"no", b"no"]
            assert wire.recv(1) == b""
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(one + other[:9])
            assert answer(wire)[1] == b"no"
            with pytest.raises(TimeoutError):  # nobody hangs up on who has begun to speak
                wire.settimeout(0.2)
                wire.recv(1)
            wire.settimeout(10)
            wire.sendall(other[9:])
            assert answer(wire)[1] == b"no"

    asyncio.run(visited(app, visit, 20, timeout_keep_alive=0))


def test_who_reads_nothing_of_a_refusal_is_sent_away() -> None:
    visitor = door.Visitor.of(1 << 20, 0.3)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        body = bytes(8 << 10)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8192")]})
        await send({"type": "http.response.body", "body": body})

    async def main() -> None:
        with door.Door() as bound, socket.socket() as wire:
            bound.visitors = visitor
            bound.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, http=visitor, lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            while not server.started:
                await asyncio.sleep(0.01)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect(bound.getsockname())
            while not any(isinstance(one, door.Visitor) for one in visitor.here.values()):
                await asyncio.sleep(0)
            [one] = visitor.here.values()
            assert isinstance(one, door.Visitor)
            while not one.transport.get_write_buffer_size():
                wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                before = one.cycle
                while one.cycle is before or not one.idle:
                    await asyncio.sleep(0)
            wire.sendall(CHUNKED + b"ZZ\r\n")
            while visitor.here:
                await asyncio.sleep(0.01)
            server.should_exit = True
            await serving

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_head_is_answered_at_once_and_an_old_client_is_told_nothing_before_its_answer() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while scope["method"] == "POST" and (await receive()).get("more_body", False):
            pass
        await unauthorized(scope, receive, send)

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=1) as wire:
            wire.sendall(b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            assert b" 401 " in wire.recv(4096)
        for version, length, said in ((b"1.1", 3, b" 100 "), (b"1.0", 3, b""), (b"1.1", 0, b" 401 ")):
            with socket.create_connection(address, timeout=10) as wire:
                head = b"POST / HTTP/%b\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
                wire.sendall(head % (version, length))
                if said:
                    assert said in wire.recv(4096)
                if length:
                    wire.sendall(b"abc")
                    assert b" 401 " in wire.recv(4096)

    asyncio.run(visited(app, visit, 20))


@pytest.mark.parametrize(
    "much",
    [
        b"\r\n" * 9,
        CHUNKED + b"1\r\nx\r\n" * 1100,
        CHUNKED + b"0\r\nX: " + b"x" * 9000,
        CHUNKED + b"1;" + b"x" * 9000,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 17_000,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 17_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 200 + b"\r\n",
    ],
)
def test_what_costs_more_than_it_asks_closes_the_connection(much: bytes) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        await unauthorized(scope, receive, send)

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(much)
            with contextlib.suppress(ConnectionError):
                assert wire.recv(4096)[:12] in (b"", b"HTTP/1.1 400")

    asyncio.run(visited(app, visit, 20))
