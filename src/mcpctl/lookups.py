"""Hosts that somebody else names, looked up in threads of their own.

A name server that never answers holds a thread for as long as the system's resolver has patience, and the event loop's
own few threads are what the hosts of the config's databases are resolved in.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mcpctl.errors import UnavailableError

LOOKUPS = 32
"""Hosts that are being looked up at once, those too whom nobody waits for any more."""
Look = Callable[..., Sequence[tuple[Any, ...]]]
"""As socket.getaddrinfo."""


class Lookups:
    """Resolves hosts, at most LOOKUPS at once. Their threads are daemons, so that none of them keeps the process from
    its end."""

    def __init__(self, look: Look = socket.getaddrinfo) -> None:
        self._look = look
        self.running = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of a host. Raises OSError, UnicodeError, or UnavailableError where there are too many."""
        if self.running >= LOOKUPS:
            raise UnavailableError("too many hosts are being looked up", "try again in a moment")
        answered: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self.running += 1
        thread = threading.Thread(target=self._ask, args=(host, port, answered), name="lookup", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no thread
            self.running -= 1
            raise UnavailableError("no host can be looked up now", "try again in a moment") from None
        return await answered

    def _ask(self, host: str, port: int, answered: "asyncio.Future[list[str]]") -> None:
        found: list[str] | OSError | UnicodeError
        try:
            rows = self._look(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(one[4][0]) for one in rows))
        except (OSError, UnicodeError) as problem:
            found = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            answered.get_loop().call_soon_threadsafe(self._told, answered, found)

    def _told(self, answered: "asyncio.Future[list[str]]", found: list[str] | OSError | UnicodeError) -> None:
        self.running -= 1
        if answered.done():  # who has asked has waited long enough
            return
        if isinstance(found, list):
            answered.set_result(found)
        else:
            answered.set_exception(found)
