"""What a serving process answers on its control socket, by what it is asked to do."""

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mcpctl.calls import Calls
from mcpctl.postgres.cutting import Cut
from mcpctl.postgres.own import Own

Request = dict[str, Any]
Answer = Callable[[Request], Awaitable[dict[str, Any]]]
Settle = Callable[[list[str], str | None], Awaitable[Cut]]


class Answers:
    """One table a process; whoever has something to tell adds it. What a request lacks is a KeyError or TypeError."""

    def __init__(self, settle: Settle, calls: Calls, own: Own | None, keys: Callable[[], list[str]]) -> None:
        self._settle = settle
        self._calls = calls
        self._own = own
        self._keys = keys
        self._known: dict[str, Answer] = {
            "ping": self._ping,
            "keys": self._sealed_with,
            "settle": self._settled,
            "settle_own": self._settled_own,
            "matching": self._matching,
            "cancel": self._cancel,
        }

    def add(self, more: Mapping[str, Answer]) -> None:
        """Further things that can be asked, by name."""
        self._known |= more

    async def __call__(self, request: Request) -> dict[str, Any]:
        """The answer to one request."""
        answer = self._known.get(request["do"])
        return await answer(request) if answer is not None else {"error": f"unknown request {request['do']!r}"}

    async def _ping(self, request: Request) -> dict[str, Any]:
        return {"pid": os.getpid()}

    async def _sealed_with(self, request: Request) -> dict[str, Any]:
        return {"pid": os.getpid(), "keys": self._keys()}

    async def _settled(self, request: Request) -> dict[str, Any]:
        user = request.get("user")
        return values(await self._settle([str(token) for token in request["tokens"]], user and str(user)))

    async def _settled_own(self, request: Request) -> dict[str, Any]:
        own = self._own
        return values(await own.settle(str(request["user"]), str(request["name"])) if own else Cut())

    async def _matching(self, request: Request) -> dict[str, Any]:
        return {"matching": self._calls.matching(request["token"], request["id"])}

    async def _cancel(self, request: Request) -> dict[str, Any]:
        self._calls.cancel(request["token"], request["id"])
        return {}


def values(done: Cut) -> dict[str, Any]:
    """What was cut, as the command line adds it up."""
    return {"queries": done.queries, "backends_left": done.backends_left, "lingering": done.lingering}
