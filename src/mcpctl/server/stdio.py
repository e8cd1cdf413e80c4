"""MCP on stdin and stdout, for one person's desktop. Imports nothing that only POSIX has.

The caller is the token in MCPCTL_TOKEN, checked again at every call; without one it is the local user, who has what
the config's login has, and is served only where there are no tenants.
"""

import asyncio
import contextlib
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
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)

from mcpctl.errors import Error, LockedError, UnauthorizedError
from mcpctl.facts import Request
from mcpctl.identity.principal import Principal
from mcpctl.server import messages
from mcpctl.server.parts import Core
from mcpctl.server.protocol import build

log = logging.getLogger("mcpctl.stdio")
_WRONG = "the token in MCPCTL_TOKEN is not valid"
_MOMENT = 1.0
"""Seconds after the end of stdin for what has been asked: `echo … | mcpctl serve --stdio`. Then its queries are cut."""


async def serve(core: Core, token: str | None) -> None:
    """Serve until stdin ends."""

    async def who(context: ServerRequestContext[Any, Any]) -> tuple[Principal, Request]:
        request = Request(secrets.token_hex(8), None, "stdio", context.request_id)
        if token is None:
            return core.authenticator.local(), request
        try:
            principal = await core.authenticator.authenticate(token, None)
        except UnauthorizedError as problem:
            core.recorder.auth_refused(None, problem.message, token=problem.token_id, transport="stdio")
            raise UnauthorizedError(f"{_WRONG}: {problem.message}") from None
        except LockedError as problem:
            whose: dict[str, Any] = {"token": problem.token_id, "user": problem.user}
            core.recorder.auth_refused(None, problem.message, locked=True, proven=True, **whose, transport="stdio")
            raise
        core.recorder.auth_ok(principal.token, principal.user, None, transport="stdio")
        return principal, request

    def told(context: ServerRequestContext[Any, Any], problem: Error) -> str:
        """Whoever has used a canary is told what any wrong token is, and whose call a lockdown has cut, that."""
        if isinstance(problem, UnauthorizedError) and core.authenticator.locked and _WRONG not in problem.message:
            return LockedError().message
        blocked = isinstance(problem, UnauthorizedError) and "blocked" in problem.message
        return f"{_WRONG}: wrong secret" if blocked else problem.message

    server = build(core.calls, who, told, core.call)
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
                found = messages.read(line)
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    said = "Invalid request: a message is one JSON-RPC 2.0 object"
                    raise messages.NotAMessageError(INVALID_REQUEST, said, messages.answerable(found)) from None
            except messages.NotAMessageError as problem:
                error = ErrorData(code=problem.code, message=problem.said)
                await self.answers.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=problem.request, error=error)))
                continue
            if isinstance(message, JSONRPCRequest):
                self.answers.expect(message.id)
            return line.decode("utf-8")


async def serve_until_told(core: Core, token: str | None) -> int | None:
    """Serve until stdin ends (None), or SIGTERM or SIGHUP comes (its number): a thread that waits for stdin is then
    left behind."""
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        if not told.done():
            told.set_result(number)

    for name in ("SIGTERM", "SIGHUP"):
        with contextlib.suppress(NotImplementedError, AttributeError):  # Windows has no such signals
            number = getattr(signal, name)
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup(1)
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    serving: asyncio.Future[Any] = asyncio.ensure_future(serve(core, token))
    await asyncio.wait({serving, cast("asyncio.Future[Any]", told)}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    return told.result() if told.done() else None


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
