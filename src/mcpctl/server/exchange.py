"""One HTTP request and its answer, as ASGI has them: what is accepted, how an app is asked, how an answer is sent."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from mcpctl.errors import Error
from mcpctl.facts import Request
from mcpctl.identity.principal import Principal
from mcpctl.server import credentials, encoding

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_JSON = b"application/json"
PIECE = 64 << 10
"""Bytes of an answer that leave at once."""


def request_ids() -> Iterator[str]:
    """16 random hexadecimal digits each; a system call is for many."""
    while True:
        drawn = secrets.token_hex(2048)
        yield from [drawn[at : at + 16] for at in range(0, len(drawn), 16)]


@dataclass
class Caller:
    """Who an SDK request comes from; put into the scope. `problem` comes back where the transport has to answer."""

    principal: Principal
    request: Request
    problem: Error | None = None


async def watch(receive: Receive, task: "asyncio.Task[Any] | None", gone: asyncio.Event) -> None:
    """Cancel the request's task when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    if task is not None:
        task.cancel()


async def through(app: App, scope: Scope, body: bytes) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """The SDK's answer to a request as ours: (status, body, the headers that are its own)."""
    status, answer, kept = await captured(app, scope, body)
    caller: Caller = scope["mcpctl"]
    if caller.problem is not None:
        raise caller.problem
    return status, encoding.again(answer), kept


async def captured(app: App, scope: Scope, body: bytes) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    status, kept, chunks = 500, [], []

    async def send(message: Message) -> None:
        nonlocal status, kept
        if message["type"] == "http.response.start":
            status = message["status"]
            kept = [(key, value) for key, value in message["headers"] if key.lower() == b"allow"]
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(scope, _replay(body), send)
    return status, b"".join(chunks), kept


def _replay(body: bytes) -> Receive:
    """A `receive` that gives this body, and then waits: whether the client is there, the outer watcher knows."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    return receive


def negotiate(scope: Scope) -> None:
    """JSON comes and JSON goes, or the request is refused; afterwards both lanes see one line of each header."""
    headers = scope["headers"]
    check_content_type(headers)
    accepted = b",".join(value for key, value in headers if key == b"accept").decode("latin-1").lower()
    kinds = {part.partition(";")[0].strip() for part in accepted.split(",")}
    if not kinds & {"application/json", "application/*", "*/*"}:
        raise Error("the answer is JSON", "send Accept: application/json, text/event-stream", status=406)
    kept = [(key, value) for key, value in headers if key not in (b"accept", b"content-type")]
    scope["headers"] = [*kept, (b"accept", b"application/json, text/event-stream"), (b"content-type", _JSON)]


def check_content_type(headers: credentials.Headers) -> None:
    given = (credentials.header(headers, b"content-type") or "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise Error("the body is to be JSON", "send Content-Type: application/json", status=415)


class MethodError(Error):
    """A method that a path does not answer; `allow` are those that it does."""

    status = 405

    def __init__(self, allow: str) -> None:
        super().__init__(f"only {allow} is answered here")
        self.allow = allow


def only_get(scope: Scope) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        raise Error("only GET is answered here", status=405)


async def answer(
    send: Send,
    status: int,
    body: bytes,
    request_id: str,
    headers: list[tuple[bytes, bytes]] | None = None,
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Answer. `wanted`: whether the rest of a long answer may still leave; else the connection is closed under it."""
    own = encoding.headers(body, request_id) + (headers or [])
    await send({"type": "http.response.start", "status": status, "headers": own})
    whole = memoryview(body)
    while len(whole) > PIECE:
        await send({"type": "http.response.body", "body": bytes(whole[:PIECE]), "more_body": True})
        whole = whole[PIECE:]
        if not wanted():
            return
    await send({"type": "http.response.body", "body": bytes(whole)})
