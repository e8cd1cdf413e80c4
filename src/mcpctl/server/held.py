"""How many bytes of requests a process holds at once, whoever sends them: of heads and of what comes ahead of its turn,
which anybody may send, and of bodies, which take a token."""

import asyncio
from collections.abc import Callable
from typing import Any

from mcpctl.errors import Error

_BYTES = 64 << 20
"""Of bodies; the large heads of strangers may have half of it."""
SMALL = 8 << 10
"""Bytes of a head, and of a body, that are not counted: who asks for little is served while others hold everything."""


class TooMuchError(Error):
    """A request would hold too much beside the others; its body has not been read to the end."""

    retry_after = 1


class Budget:
    """Bytes that may be held at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self.users = 0

    @classmethod
    def of_visitors(cls, request_bytes: int) -> "Budget":
        """That for what no request has been made of yet, by the config's `limits.request_bytes`."""
        return cls(max(_BYTES // 2, 2 * request_bytes))

    def take(self, more: int) -> bool:
        """Hold so many bytes more, or fewer where it is negative; False, and nothing is held, where it is too much."""
        if more > 0 and self.held + more > self.most:
            return False
        self.held += more
        return True


class Bodies:
    """The bodies of requests that are being read or answered: so many bytes in all, and a quarter of it for a caller.
    One request alone always fits."""

    def __init__(self, request_bytes: int) -> None:
        self._each = max(_BYTES // 4, request_bytes)
        self._all = Budget(4 * self._each)
        self._callers: dict[str | None, Budget] = {}

    def of(self, caller: str | None, task: "asyncio.Task[Any] | None") -> Callable[[int], None]:
        """What counts the bytes of one more request, which are held until its task has ended. It raises
        TooMuchError: 429 where the caller's other requests hold too much, 503 where everybody's do."""
        own = self._callers.setdefault(caller, Budget(self._each))
        own.users += 1
        held = seen = 0

        def take(more: int) -> None:
            nonlocal held, seen
            seen += more
            more = max(0, seen - SMALL) - held
            if not own.take(more):
                raise TooMuchError("your requests hold too much at once", "send fewer together", status=429)
            if not self._all.take(more):
                own.take(-more)
                raise TooMuchError("the bodies of all requests are too large together", status=503)
            held += more

        def release(_: object) -> None:
            own.take(-held)
            self._all.take(-held)
            own.users -= 1
            if not own.users:
                del self._callers[caller]

        if task is not None:
            task.add_done_callback(release)
        return take
