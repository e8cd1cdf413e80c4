"""What a route of the app is, and what those that stand in files of their own ask of the app."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from mcpctl.errors import LimitedError
from mcpctl.identity.principal import Principal
from mcpctl.server.exchange import Receive, Scope, Send

Route = Callable[[Scope, Receive, Send, str], Awaitable[None]]
"""Answers a request, whose id comes last. What it raises as an Error is told to the client by the app."""
Routes = Mapping[str, Route]
"""By path. One that ends with BELOW is for every name below it."""
BELOW = "/*"


class Host(Protocol):
    """The app, as its routes see it."""

    def visit(self, scope: Scope, request_id: str) -> str | None:
        """Count a request of anybody's against its address's rate, check its Host and Origin, and return the address.
        Raises LimitedError, or an Error where it may not ask."""

    async def admit(self, scope: Scope, request_id: str) -> tuple[str | None, Principal]:
        """As `visit`, and let its caller in: (address, principal). Raises UnauthorizedError and its like, of which the
        audit log has been told."""

    async def body(self, scope: Scope, receive: Receive, caller: str | None, most: int | None = None) -> bytes:
        """The request's body, of `most` bytes at most, which are counted for `caller`, a token's id or a stranger's
        address. Raises an Error: too large, too slow, too much at once."""

    def base(self, scope: Scope) -> str:
        """What clients call this server by: scheme, host and port."""

    def note_limited(
        self, problem: LimitedError, principal: Principal | None, address: str | None, request_id: str
    ) -> None:
        """One line of the audit log for a call that was too much, or a count."""


Addition = Callable[[Host], Routes]
"""Gives the app further routes."""


def find(routes: Routes, path: str) -> Route | None:
    """The route of a path."""
    found = routes.get(path)
    if found is None and not path.endswith(BELOW):
        found = routes.get(path.rpartition("/")[0] + BELOW)
    return found


def know(scope: Scope, principal: Principal) -> None:
    """Tell the door whose the connection is; see door.py:Visitor.make_room. Not of one who is refused by a limit."""
    scope.setdefault("state", {})["known"] = principal.token or "local"
