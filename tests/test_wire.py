"""Floods, slow visitors and half-closed sockets: what they cost is bounded, and who asks honestly is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn

import attacked
from mcpctl.server.door import Door, Visitor
from mcpctl.server.exchange import Receive, Scope, Send
from mcpctl.server.held import SMALL, Bodies, Budget, TooMuchError
from site_of_mcpctl import Shop, Site, eventually

MakeSite = Callable[..., Site]
MIB = 1 << 20


def _memory(at: Site, what: str) -> int:
    """VmRSS or VmHWM of the server, in bytes."""
    assert at.process is not None
    lines = Path(f"/proc/{at.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _head(address: tuple[str, int], token: str, size: int, padding: int = 0) -> bytes:
    lines = [
        "POST /mcp HTTP/1.1", "Host: {}:{}".format(*address), f"Authorization: Bearer {token}",
        "Content-Type: application/json", "Accept: application/json", f"Content-Length: {size}", f"X: {'x' * padding}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the server's memory is read from /proc")
def test_three_hundred_large_heads_with_unfinished_bodies_cost_no_more_than_the_budget(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    """Bodies hold 64 MiB at most, grown by an eighth while they are read. Each connection has a head of 16 KiB, what
    has been made of it, and twice what asyncio reads at once (256 KiB): on its way, and waiting for the app. That is
    254 MiB in all; without a budget the bodies alone would add 221 MiB, and more with each further connection."""
    at = make_site(newest_shop).start(anew=True)
    host, port = urlsplit(at.url).netloc.split(":")
    address = (host, int(port))
    tokens = [at.token()[1] for _ in range(6)]
    bound = 64 * MIB * 9 // 8 + 300 * (16 * 7 + 2 * 256) * 1024

    async def visit(number: int) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writers.append(writer)
        writer.write(_head(address, tokens[number % len(tokens)], MIB, 15_000) + bytes(MIB * 95 // 100))
        try:
            async with asyncio.timeout(5):
                return await reader.read(12)
        except (TimeoutError, ConnectionError):
            return b""

    async def flood() -> list[bytes]:
        with at.client(at.token("bob")[1]) as honest:
            answers = asyncio.gather(*(visit(number) for number in range(300)))
            while len(writers) < 300:
                await asyncio.sleep(0.01)
            for _ in range(5):
                assert (await asyncio.to_thread(honest.call, "whoami")).status_code == 200
            found = await answers
            for writer in writers:
                writer.transport.abort()
            return found

    writers: list[asyncio.StreamWriter] = []
    with at.client(at.token("bob")[1]) as client:
        client.rows("select 1")
    before = _memory(at, "VmRSS")
    found = asyncio.run(flood())
    assert {b"HTTP/1.1 503", b"HTTP/1.1 429"} & set(found), set(found)
    assert set(found) <= {b"HTTP/1.1 503", b"HTTP/1.1 429", b""}, set(found)
    assert _memory(at, "VmHWM") - before < bound, (_memory(at, "VmHWM") - before) / MIB


def test_bodies_are_counted_until_their_requests_end_and_a_caller_has_a_quarter() -> None:
    async def one(bodies: Bodies, caller: str, size: int) -> None:
        bodies.of(caller, asyncio.current_task())(size)
        await asyncio.sleep(0)

    async def refused(bodies: Bodies, *asked: tuple[str, int]) -> list[int]:
        found = await asyncio.gather(*(one(bodies, *each) for each in asked), return_exceptions=True)
        return [problem.status for problem in found if isinstance(problem, TooMuchError)]

    async def main() -> None:
        bodies = Bodies(MIB)
        for _ in range(2):  # what has ended is not held
            assert await refused(bodies, *[("a", MIB)] * 20) == [429] * 4
        assert await refused(bodies, *((str(number // 16), MIB) for number in range(80))) == [503] * 16
        assert (
            await refused(bodies, *((str(number // 16), MIB) for number in range(80)), ("small", SMALL)) == [503] * 16
        )
        assert await refused(Bodies(100 * MIB), ("a", 100 * MIB)) == []
        assert bodies._callers == {}

    asyncio.run(main())


async def _ok(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_unfinished_heads_have_a_budget_and_small_ones_are_always_heard() -> None:
    budget = Budget(10 * SMALL)
    visitor = type("Few", (Visitor,), {"budget": budget, "patience": 3.0})
    asked = b"GET / HTTP/1.1\r\nHost: x\r\n"

    async def stay(address: tuple[str, int], padding: int) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(asked + b"X: " + b"x" * padding)
        try:
            async with asyncio.timeout(1):
                return await reader.read(1)
        except ConnectionError:
            return b""
        except TimeoutError:
            return b"still there"
        finally:
            writer.close()

    async def main() -> tuple[list[bytes], bytes]:
        with Door() as door:
            door.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(_ok, http=visitor, lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve(sockets=[door]))
            while not server.started:
                await asyncio.sleep(0.01)
            large = asyncio.gather(*(stay(door.getsockname(), 15_000) for _ in range(30)))
            await asyncio.sleep(0)
            reader, writer = await asyncio.open_connection(*door.getsockname())
            writer.write(asked + b"\r\n")
            answer = await reader.read(12)
            writer.close()
            found = await large
            server.should_exit = True
            await serving
            return found, answer

    found, answer = asyncio.run(main())
    assert answer == b"HTTP/1.1 204"
    assert 5 <= found.count(b"still there") <= 15, found
    assert budget.held == 0


def test_silent_and_slow_visitors_are_sent_away_and_the_others_served(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    _, token = at.token()

    async def silent(address: tuple[str, int]) -> bytes:
        return await attacked.converse(address, b"")

    async def slow(address: tuple[str, int], first: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(first)
        heard = asyncio.create_task(attacked.hear(reader))
        with contextlib.suppress(ConnectionError):
            while not heard.done():
                writer.write(b"x")
                await writer.drain()
                await asyncio.wait([heard], timeout=0.1)
        writer.close()
        return await heard

    async def honest(address: tuple[str, int]) -> bytes:
        body = attacked.WHOAMI.encode()
        head = _head(address, token, len(body)).replace(b"\r\nX: ", b"\r\nConnection: close")
        return await attacked.converse(address, head + body)

    async def main() -> None:
        async with attacked.served(at) as address, asyncio.timeout(60):
            dark = asyncio.gather(*(silent(address) for _ in range(500)))
            heads = asyncio.gather(*(slow(address, b"POST /mcp HTTP/1.1\r\nHost: ") for _ in range(20)))
            bodies = asyncio.gather(*(slow(address, _head(address, token, 10_000)) for _ in range(20)))
            for _ in range(10):
                assert (await honest(address)).startswith(b"HTTP/1.1 200")
            assert set(await dark) == set(await heads) == {b""}
            assert {answer[:12] for answer in await bodies} == {b"HTTP/1.1 408"}
            assert (await honest(address)).startswith(b"HTTP/1.1 200")

    asyncio.run(main())


def test_who_says_that_nothing_more_comes_ends_the_call(make_site: MakeSite, newest_shop: Shop) -> None:
    """A half-closed socket is a closed one: nobody waits behind it for an answer, as far as can be known."""
    at = make_site(newest_shop).start()
    host, port = urlsplit(at.url).netloc.split(":")
    asked = '{"name":"query_database","arguments":{"query":"select pg_sleep(43)"}}'
    body = attacked.WHOAMI.replace('{"name":"whoami"}', asked).encode()
    with socket.create_connection((host, int(port)), timeout=20) as wire:
        wire.sendall(_head((host, int(port)), at.token()[1], len(body)) + body)
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"))
        wire.shutdown(socket.SHUT_WR)
        assert wire.recv(1) == b""
    eventually(lambda: not newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"), 5)


def test_a_fault_of_ours_is_said_once_in_the_servers_log_however_many_strangers_hear_of_it(
    make_site: MakeSite, newest_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    at = make_site(newest_shop)

    async def main() -> list[bytes]:
        async with attacked.served(at) as address:
            (at.folder / "tokens.yaml").write_text("tokens: [")
            asked = _head(address, "x", 0).replace(b"\r\nX: ", b"\r\nConnection: close")
            return [await attacked.converse(address, asked) for _ in range(5)]

    assert {answer[:12] for answer in asyncio.run(main())} == {b"HTTP/1.1 503"}
    assert len([record for record in caplog.records if "request " in record.getMessage()]) == 1


def test_what_is_asked_in_vain_costs_its_address_too_and_two_lengths_end_the_connection(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="limits: {rate: 0.001, burst: 4}\n")
    at.limits = {}
    whole = b"\r\nConnection: close\r\n\r\n"

    async def main() -> list[bytes]:
        async with attacked.served(at) as address:
            host = "Host: {}:{}".format(*address).encode()
            twice = b"GET /x HTTP/1.1\r\n" + host + b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
            two = await attacked.converse(address, twice + b"0\r\n\r\n" + b"GET /health HTTP/1.1\r\n" + host + whole)
            assert (two[:12], two.count(b"HTTP/1.1"), b"connection: close" in two) == (b"HTTP/1.1 400", 1, True)
            asked = [b"GET /nothing HTTP/1.1\r\n" + host, b"POST /mcp HTTP/1.1\r\nHost: example.org"] * 3
            asked.append(b"GET /health HTTP/1.1\r\n" + host)
            return [(await attacked.converse(address, one + whole))[9:12] for one in asked]

    assert asyncio.run(main()) == [b"404", b"421"] * 2 + [b"429"] * 2 + [b"200"]


def test_whom_a_limit_refuses_the_door_does_not_know(
    make_site: MakeSite, newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = make_site(newest_shop, extra="limits: {tokens: {rate: 0.001, burst: 1}}\n")
    at.limits = {}
    name, token = at.token()
    known = []

    class Seen(Visitor):
        def on_response_complete(self) -> None:
            known.append(self.known)
            super().on_response_complete()

    monkeypatch.setattr(attacked, "Visitor", Seen)

    async def main() -> list[bytes]:
        async with attacked.served(at) as address:
            body = attacked.WHOAMI.encode()
            asked = _head(address, token, len(body)).replace(b"\r\nX: ", b"\r\nConnection: close") + body
            return [(await attacked.converse(address, asked))[9:12] for _ in range(2)]

    assert asyncio.run(main()) == [b"200", b"429"]
    assert known == [name, None]
