"""An app of the test's own behind the door, and those who visit it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from mcpctl.server import door, exchange, run

CHUNKED = b"POST /mcp HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


async def visited(app: exchange.App, visit: Callable[[tuple[str, int]], None], patience: float, **options: Any) -> None:
    """Let somebody visit the app through the door."""
    visitor = door.Visitor.of(1 << 20, patience)
    config = uvicorn.Config(app, http=visitor, lifespan="off", log_config=None, **options)
    server = run._Uvicorn(config, lambda: None, [])
    with door.Door() as bound:
        bound.visitors = visitor
        bound.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(visit, bound.getsockname())
        server.should_exit = True
        await serving


async def unauthorized(scope: exchange.Scope, receive: exchange.Receive, send: exchange.Send) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


def answer(wire: socket.socket) -> tuple[bytes, bytes]:
    """The next answer's head and body."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += (more := wire.recv(1))
        assert more, found
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += (more := wire.recv(length - len(body)))
        assert more, body
    return head, body
