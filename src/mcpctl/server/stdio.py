"""MCP on stdin and stdout, for one person's desktop. Imports nothing that only POSIX has.

The caller is the token in MCPCTL_TOKEN, checked again at every call; without one it is the local user, who has what
the config's login has.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, BinaryIO, Self, cast

from mcp.server import ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)

from mcpctl.calls import Request
from mcpctl.errors import UnauthorizedError
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.server.parts import Core
from mcpctl.server.protocol import build

log = logging.getLogger("mcpctl.stdio")
_MOMENT = 1.0
"""Seconds after the end of stdin for what has been asked: `echo … | mcpctl serve --stdio`. Then its queries are cut."""


async def serve(core: Core, token: str | None) -> None:
    """Serve until stdin ends."""

    async def who(context: ServerRequestContext[Any, Any]) -> tuple[Principal, Request]:
        request = Request(secrets.token_hex(8), None, "stdio", context.request_id)
        if token is None:
            return LOCAL, request
        try:
            principal = await core.authenticator.authenticate(token, None)
        except UnauthorizedError as problem:
            core.recorder.auth_refused(None, problem.message, token=problem.token_id, transport="stdio")
            raise UnauthorizedError(f"the token in MCPCTL_TOKEN is not valid: {problem.message}") from None
        core.recorder.auth_ok(principal.token, principal.user, None, transport="stdio")
        return principal, request

    server = build(core.calls, who)
    lines = _Lines()
    try:
        async with stdio_server(stdin=cast("Any", lines)) as (read, write):  # it wants no more than `async for`
            lines.answers = answers = _Answers(write)
            await server.run(read, answers, server.create_initialization_options())
    except* BrokenPipeError:
        log.info("the client has closed stdout")


class _Answers:
    """The SDK's stream of answers, which knows what has not been answered yet."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._open: set[RequestId | None] = set()
        self._done = asyncio.Event()
        self._done.set()

    def expect(self, request: RequestId) -> None:
        self._open.add(request)
        self._done.clear()

    async def all(self, seconds: float) -> None:
        """Wait until all that is expected has been sent, no longer than that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._done.wait(), seconds)

    async def send(self, item: SessionMessage) -> None:
        await self._inner.send(item)
        if isinstance(item.message, JSONRPCResponse | JSONRPCError):
            self._open.discard(item.message.id)
        if not self._open:
            self._done.set()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Lines:
    """The lines of stdin that are messages. Any other is answered here, as the SDK would pass it over in silence
    (JSON-RPC 2.0, section 5.1); and at the end of stdin the last answers have a moment."""

    def __init__(self) -> None:
        self.answers: _Answers
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = threading.Semaphore(1)
        # The interpreter waits for no daemon thread at its end, and stdin may have none. Its descriptor is our own,
        # since the interpreter closes sys.stdin.
        file = os.fdopen(os.dup(0), "rb", closefd=False)
        threading.Thread(target=self._read, args=(file,), name="stdin", daemon=True).start()

    def _read(self, file: BinaryIO) -> None:
        line = b"begun"
        while line:
            self._wanted.acquire()
            try:
                line = file.readline()
            except OSError:  # the terminal is gone
                line = b""
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._came.put_nowait, line)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            line = await self._came.get()
            self._wanted.release()
            if not line:
                await self.answers.all(_MOMENT)
                raise StopAsyncIteration
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
                message = jsonrpc_message_adapter.validate_json(text, by_name=False)
                if isinstance(message, JSONRPCNotification) and "id" in json.loads(text):
                    raise ValueError("an id that is none")
            except ValueError:
                await self.answers.send(SessionMessage(_refusal(line)))
                continue
            if isinstance(message, JSONRPCRequest):
                self.answers.expect(message.id)
            return text


def _refusal(line: bytes) -> JSONRPCError:
    """What is said of a line that is no message, with its id where it has one."""
    code, said, request = PARSE_ERROR, "Parse error: one line of JSON in UTF-8 is a message", None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line.decode("utf-8"))
        given = found.get("id") if isinstance(found, dict) else None
        if (isinstance(given, str) and given.isascii()) or (isinstance(given, int) and not isinstance(given, bool)):
            request = given
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
        code, said = INVALID_REQUEST, "Invalid request: a message is one JSON-RPC 2.0 object"
    return JSONRPCError(jsonrpc="2.0", id=request, error=ErrorData(code=code, message=said))


async def serve_until_told(core: Core, token: str | None) -> bool:
    """Serve until stdin ends (False) or SIGTERM comes (True); a thread that waits for stdin is then left behind."""
    told = asyncio.Event()
    with contextlib.suppress(NotImplementedError):  # Windows has no such signal
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    serving, waiting = asyncio.ensure_future(serve(core, token)), asyncio.ensure_future(told.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        waiting.cancel()
        serving.result()
    return told.is_set()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on a loop that can wait for sockets of libpq's: on Windows the default one cannot."""
    if sys.platform == "win32":  # pragma: no cover - Windows
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(main)
        return
    asyncio.run(main)


def token_from_environment() -> str | None:
    """MCPCTL_TOKEN, taken out of the environment so that nothing started from here inherits it."""
    return os.environ.pop("MCPCTL_TOKEN", None)
