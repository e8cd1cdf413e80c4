"""Why requests to the sign-in endpoints were no good that are wrong in another way than a credential: the audit log has
no line of them, and the server's log has one a minute for each place and reason, with how many more there were."""

import logging
from collections.abc import Callable
from time import monotonic

from mcpctl.errors import Error, ForbiddenError
from mcpctl.server.exchange import Receive, Scope, Send
from mcpctl.server.routes import Route

log = logging.getLogger("mcpctl.sign_in")
_SAID_FOR = 60.0
MALFORMED = frozenset({400, 403, 408, 413, 415, 421})
"""The statuses of such requests."""
_MOST = 200
"""Reasons that are told apart."""


class Noted:
    """Tells the server's log. A stranger fills no disk with it."""

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._said: dict[tuple[str, int, str], tuple[float, int]] = {}

    def __call__(self, path: str, problem: Error, request_id: str) -> None:
        """Note what is wrong with a request at the route of that path. No message of ours repeats a secret."""
        if len(self._said) >= _MOST:
            self._said = {key: one for key, one in self._said.items() if self._now() - one[0] < _SAID_FOR}
        repeats = problem.status in (403, 421) and not isinstance(problem, ForbiddenError)  # its Origin, its Host
        alike = repeats or len(self._said) >= _MOST
        key = path, problem.status, "" if alike else problem.message
        since, more = self._said.get(key, (-_SAID_FOR, 0))
        if self._now() - since < _SAID_FOR:
            self._said[key] = (since, more + 1)
            return
        self._said[key] = (self._now(), 0)
        before = f" ({more} more before)" if more else ""
        extra = {"about": {"request_id": request_id}}
        log.info("request %s: %s: %d, %s%s", request_id, path, problem.status, problem.message, before, extra=extra)

    def watched(self, path: str, route: Route) -> Route:
        """That route, whose refusals of malformed requests are noted."""

        async def watched(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
            try:
                await route(scope, receive, send, request_id)
            except Error as problem:
                if problem.status in MALFORMED:
                    self(path, problem, request_id)
                raise

        return watched
