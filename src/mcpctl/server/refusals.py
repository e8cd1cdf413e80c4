"""What is said to a request that is refused, or that we failed: the same in all lanes."""

import logging
from time import monotonic

from mcpctl.errors import BusyError, Error, LimitedError, LockedError, ScopeError, UnauthorizedError
from mcpctl.server import credentials, encoding
from mcpctl.server.credentials import Gatekeeper
from mcpctl.server.exchange import MethodError
from mcpctl.server.held import TooMuchError

log = logging.getLogger("mcpctl.http")
CANCELLED = "The call was cancelled: by its client, or because "
_SAID_FOR = 60.0
_INVALID_REQUEST, _INTERNAL = -32600, -32603
_UNAUTHORIZED = encoding.rpc_error(
    _INVALID_REQUEST, "Unauthorized: a valid token is needed", {"hint": "send it as Authorization: Bearer …"}
)
_TOO_MANY_WRONG = encoding.rpc_error(_INVALID_REQUEST, "Too many wrong tokens from this address; a valid one is taken")


class Refusals:
    """The refusals of one app; `tls`: whether it is called by https. `scopes` are those that a client is told to ask
    for, where it can."""

    def __init__(
        self, public_url: str | None, gatekeeper: Gatekeeper, *, tls: bool, scopes: tuple[str, ...] = ()
    ) -> None:
        self._public_url = public_url
        self._gatekeeper = gatekeeper
        self._tls = tls
        self._scope = f', scope="{" ".join(scopes)}"' if scopes else ""
        self._said: dict[str, tuple[float, int]] = {}

    def base(self, headers: credentials.Headers) -> str:
        """What clients call this server by."""
        if self._public_url:
            return self._public_url
        try:
            host = credentials.header(headers, b"host")
            self._gatekeeper.check(headers)
        except Error:
            host = None
        return f"{'https' if self._tls else 'http'}://{host or self._gatekeeper.authority}"

    def answer(
        self, asked: credentials.Headers, path: str, problem: Error, request_id: str, base: str | None = None
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """(status, body, headers) of a refusal. `base`: that of these headers, where it is known."""
        if isinstance(problem, UnauthorizedError):
            return self._unauthorized(asked, problem, base)
        headers: list[tuple[bytes, bytes]] = []
        if isinstance(problem, ScopeError):
            more = f', error="insufficient_scope", scope="{" ".join(problem.scopes)}"'
            headers.append(self._challenge(base or self.base(asked), more))
        message, hint = problem.message, problem.hint
        if isinstance(problem, BusyError) or (
            isinstance(problem, LimitedError | TooMuchError) and problem.status == 429
        ):
            headers.append((b"retry-after", str(problem.retry_after).encode()))
        if problem.status == 405:
            headers.append((b"allow", _allowed(path, problem)))
        if problem.status in (400, 408, 413) or isinstance(problem, TooMuchError):
            headers.append((b"connection", b"close"))
        if problem.status >= 500:
            self._say(problem.message, request_id)
            told = problem.status == 503 and ("cannot be written" in message or message.startswith(CANCELLED))
            message = message if told else outside(problem)
        data = {"hint": hint} if hint and problem.status < 500 else None
        return problem.status, encoding.rpc_error(_INVALID_REQUEST, message, data), headers

    def _unauthorized(
        self, asked: credentials.Headers, problem: UnauthorizedError, base: str | None
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """It says the same whatever the reason, which is in the audit log. Strangers ask for it as often as they like,
        so it is made of what is there."""
        if problem.status == 429:
            return 429, _TOO_MANY_WRONG, [(b"retry-after", str(problem.retry_after).encode())]
        error = "" if problem.message == "no credential" else ', error="invalid_token"'
        return problem.status, _UNAUTHORIZED, [self._challenge(base or self.base(asked), self._scope + error)]

    @staticmethod
    def _challenge(base: str, more: str) -> tuple[bytes, bytes]:
        """What a client is asked for (RFC 6750, section 3; RFC 9728, section 5.1)."""
        where = f"{base}/.well-known/oauth-protected-resource/mcp"
        return b"www-authenticate", f'Bearer resource_metadata="{where}"{more}'.encode("latin-1", "replace")

    def _say(self, message: str, request_id: str) -> None:
        """Say in the server's log what is wrong with us: once a minute, however many ask."""
        since, more = self._said.get(message, (-_SAID_FOR, 0))
        if monotonic() - since < _SAID_FOR:
            self._said[message] = (since, more + 1)
            return
        before, extra = f" ({more} requests more before)" if more else "", {"about": {"request_id": request_id}}
        log.warning("request %s: %s%s", request_id, message, before, extra=extra)
        self._said[message] = (monotonic(), 0)


def _allowed(path: str, problem: Error) -> bytes:
    """The methods that a path answers."""
    if isinstance(problem, MethodError):
        return problem.allow.encode()
    return b"POST" if path in ("/mcp", "/messages", "/messages/") else b"GET"


def failed(request_id: str) -> bytes:
    """The answer to what went wrong with us."""
    return encoding.rpc_error(_INTERNAL, f"Internal error. Request {request_id}.")


def outside(problem: Error) -> str:
    """What a stranger may hear of a fault of ours: files and their paths are for the log."""
    if isinstance(problem, LockedError):
        return problem.message
    return (
        "The server cannot answer calls right now; the administrator's log says why"
        if problem.status == 503
        else "Internal error"
    )
