"""MCP on stdin and stdout, for one person's desktop. Imports nothing that only POSIX has.

The caller is the token in MCPCTL_TOKEN, checked again at every call; without one it is the local user, who has what
the config's login has.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from mcp.server import ServerRequestContext
from mcp.server.stdio import stdio_server

from mcpctl.calls import Request
from mcpctl.errors import UnauthorizedError
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.server.parts import Core
from mcpctl.server.protocol import build


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
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


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
