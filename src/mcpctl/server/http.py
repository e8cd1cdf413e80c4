"""The ASGI app: routes, the checks before a call, the two lanes, and the answers.

An answer waits until it is whole, so that a call that is cut answers 401, and a client that goes away ends its call:
the request's task is cancelled, and with it the statement.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from mcp_types import jsonrpc_message_adapter
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from mcpctl.calls import Calls, Request, UnknownToolError
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, LimitedError, LockedError, UnauthorizedError, UnavailableError, UsageError
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal
from mcpctl.policy.limits import rule
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.pools import reachable
from mcpctl.recorder import Recorder
from mcpctl.server import credentials, encoding, exchange, messages
from mcpctl.server.credentials import Gatekeeper
from mcpctl.server.exchange import App, Caller, Message, Receive, Scope, Send
from mcpctl.server.express import Express
from mcpctl.server.held import Bodies, TooMuchError

log = logging.getLogger("mcpctl.http")
_READY_FOR = 2.0
_SAID_FOR = 60.0
_CANCELLED = "The call was cancelled: by its client, or because "
_INVALID_REQUEST, _INTERNAL = -32600, -32603


@dataclass
class Parts:
    """What the app is made of; built in one place, `run.py`. `cancel_elsewhere` asks the sibling workers."""

    settings: Settings
    calls: Calls
    logins: Logins
    authenticator: Authenticator
    recorder: Recorder
    gatekeeper: Gatekeeper
    sdk: App
    no_auth: bool = False
    tls: bool = False
    sse: App | None = None
    cancel_elsewhere: Callable[[str | None, str | int, int], Awaitable[None]] | None = None
    express: Express | None = field(default_factory=Express)


class Http:
    """The app. One instance a worker."""

    body_seconds = 30.0
    """In which a request's body has to have come."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bodies = Bodies(parts.settings.limits.request_bytes)
        self._ready: tuple[float, bool] | None = None
        self._said: dict[str, tuple[float, int]] = {}
        self._asking = asyncio.Lock()
        self._streams: dict[asyncio.Task[Any], Principal] = {}
        self.answered_express = 0
        self.answered_sdk = 0
        self._routes: dict[str, Callable[[Scope, Receive, Send, str], Awaitable[None]]] = {
            "/mcp": self._mcp,
            "/health": self._health,
            "/ready": self._is_ready,
            "/.well-known/oauth-protected-resource": self._metadata,
            "/.well-known/oauth-protected-resource/mcp": self._metadata,
        }
        if parts.sse is not None:
            self._routes |= {"/sse": self._old_stream, "/messages": self._old_message, "/messages/": self._old_message}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = secrets.token_hex(8)
        try:
            credentials.to_origin_form(scope)
            if self._parts.no_auth and credentials.forwarded(scope["headers"]):
                raise Error("--no-auth takes no request that a proxy has forwarded", "use tokens", status=403)
            route = self._routes.get(scope["path"])
            if route is None:
                self._visit(scope, request_id)
                raise Error("there is nothing here", "the server answers at /mcp", status=404)
            await route(scope, receive, send, request_id)
        except Error as problem:
            await self._refuse(scope, send, problem, request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            await exchange.answer(
                send, 500, encoding.rpc_error(_INTERNAL, f"Internal error. Request {request_id}."), request_id
            )

    # -- /mcp ----------------------------------------------------------------------------------------------------

    async def _mcp(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        address, principal = await self._admit(scope, request_id)
        if scope["method"] != "POST":
            raise Error("only POST is answered here", status=405)
        exchange.negotiate(scope)
        limiter = self._parts.calls.limiter
        try:
            slots = limiter.enter(principal, address, visited=True)
        except LimitedError as problem:
            self._note_limited(problem, principal, address, request_id)
            raise
        _know(scope, principal)
        try:
            await self._served(scope, receive, send, Request(request_id, address, "http"), principal)
        except UnauthorizedError:
            if self._parts.authenticator.locked:
                raise LockedError from None
            raise
        finally:
            limiter.leave(slots)

    def _note_limited(
        self, problem: LimitedError, principal: Principal | None, address: str | None, request_id: str
    ) -> None:
        """One line for a call that was too much, or a count; who is not known goes the way of strangers."""
        recorder = self._parts.recorder
        where: dict[str, Any] = {"request_id": request_id, "transport": "http"}
        if principal is None:
            recorder.auth_refused(address, problem.message, **where)
        else:
            who = {"token": principal.token, "user": principal.user, "tenant": principal.tenant}
            recorder.limited(problem, **who, client_ip=address, **where)

    async def _served(self, scope: Scope, receive: Receive, send: Send, request: Request, principal: Principal) -> None:
        body = await self._body(scope, receive, principal)
        task = asyncio.current_task()
        gone = asyncio.Event()
        watcher = asyncio.create_task(exchange.watch(receive, task, gone))
        request = replace(request, task=task)
        try:
            status, answer, headers = await self._answer(scope, principal, request, body)
        except asyncio.CancelledError:
            if gone.is_set():
                return
            if task is not None:
                task.uncancel()
            if self._parts.authenticator.still_valid(principal):
                raise UnavailableError(_CANCELLED + self._parts.calls.ends) from None
            raise UnauthorizedError("the token ended while the call ran", token_id=principal.token) from None
        finally:
            watcher.cancel()
        if not self._parts.authenticator.still_valid(principal):
            raise UnauthorizedError("the token ended while the call ran", token_id=principal.token)
        await exchange.answer(
            send, status, answer, request.id, headers, wanted=lambda: self._may_leave(principal, request)
        )

    def _may_leave(self, principal: Principal, request: Request) -> bool:
        """Whether an answer may still leave: its caller has the rights that it was made with."""
        door = self._parts.authenticator
        return door.still_valid(principal) and all(door.in_force(principal, one) for one in request.databases)

    async def _admit(self, scope: Scope, request_id: str) -> tuple[str | None, Principal]:
        """Host, origin, address, its rate, and credential: the caller's address and principal, or a refusal."""
        parts, headers = self._parts, scope["headers"]
        address = self._visit(scope, request_id)
        parts.gatekeeper.check(headers)
        if parts.no_auth:
            credentials.refuse_in_url(scope["query_string"])
            return address, parts.authenticator.local()
        try:
            credentials.refuse_in_url(scope["query_string"])
            text = credentials.token(headers)
            if text is None:
                raise UnauthorizedError("no credential")
            principal = await parts.authenticator.authenticate(text, address)
        except (UnauthorizedError, UsageError, LockedError) as problem:
            locked = isinstance(problem, LockedError)
            who: dict[str, Any] = {"token": getattr(problem, "token_id", None), "user": getattr(problem, "user", None)}
            proven = who["token"] is not None and (locked or getattr(problem, "proven", False))
            parts.recorder.auth_refused(
                address, problem.message, locked=locked, proven=proven, **who, request_id=request_id, transport="http"
            )
            raise
        parts.recorder.auth_ok(principal.token, principal.user, address, request_id=request_id, transport="http")
        return address, principal

    def _visit(self, scope: Scope, request_id: str) -> str | None:
        """Count a request against its address's rate, and return the address. Beyond it nothing costs a hash, or a line
        each."""
        headers, address = scope["headers"], scope["client"][0] if scope.get("client") else None
        if not self._parts.no_auth:
            address = self._parts.gatekeeper.address(headers, address)
        try:
            self._parts.calls.limiter.visit(address)
        except LimitedError as problem:
            known = None
            if not self._parts.no_auth:
                with contextlib.suppress(UnauthorizedError, UsageError):
                    known = self._parts.authenticator.recognised(credentials.token(headers))
            self._note_limited(problem, known, address, request_id)
            raise
        return address

    async def _body(self, scope: Scope, receive: Receive, principal: Principal) -> bytes:
        """The request's body, never more of it than the config allows, nor with the others', and not for ever."""
        most = self._parts.settings.limits.request_bytes
        if (credentials.header(scope["headers"], b"content-encoding") or "identity").lower() != "identity":
            raise Error("a packed body is not taken", "send it without Content-Encoding", status=415)
        length = credentials.header(scope["headers"], b"content-length")
        too_large = Error(f"the body is larger than {most} bytes", "ask for less at once", status=413)
        if length is not None and (not length.isascii() or not length.isdigit() or int(length) > most):
            raise too_large
        body = bytearray()
        take = self._bodies.of(principal.token, asyncio.current_task())
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Error("the client went away", status=400)
                    more = message.get("body", b"")
                    if len(body) + len(more) > most:
                        raise too_large
                    take(len(more))
                    body += more
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Error("the body did not come in time", status=408) from None
        except asyncio.CancelledError:  # nobody watches for the client yet: a reload cuts it, or the server's end
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            raise UnavailableError(_CANCELLED + self._parts.calls.ends) from None

    async def _answer(
        self, scope: Scope, principal: Principal, request: Request, body: bytes
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        parts = self._parts
        call = parts.express.read(scope["headers"], body) if parts.express is not None else None
        if call is not None and parts.express is not None:
            self.answered_express += 1
            try:
                answer = await parts.calls.call(principal, call.name, call.arguments, replace(request, rpc_id=call.id))
                return *parts.express.answer(call, answer), []
            except UnknownToolError as problem:
                return *parts.express.unknown_tool(call, problem.message), []
        self.answered_sdk += 1
        try:
            message = messages.read(body)
            messages.check_version(message, scope["headers"])
        except messages.NotAMessageError as problem:
            return 400, encoding.rpc_error(problem.code, problem.said, request=problem.request), []
        await self._cancelled(principal, message, scope["headers"])
        scope["mcpctl"] = Caller(principal, request)
        return await exchange.through(self._parts.sdk, scope, body)

    async def _cancelled(self, principal: Principal, message: Any, headers: credentials.Headers) -> None:
        """An older client's `notifications/cancelled` ends the one call of that token and number, if it is one. The
        SDK still answers the notification."""
        number = messages.cancelled(message)
        modern = any((messages.VERSION_HEADER, version.encode()) in headers for version in MODERN_PROTOCOL_VERSIONS)
        if number is None or modern:
            return
        here = self._parts.calls.matching(principal.token, number)
        if self._parts.cancel_elsewhere is not None:
            await self._parts.cancel_elsewhere(principal.token, number, here)
        elif here == 1:
            self._parts.calls.cancel(principal.token, number)

    # -- what else there is --------------------------------------------------------------------------------------

    async def _health(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        exchange.only_get(scope)
        await exchange.answer(send, 200, b'{"status":"ok"}', request_id)

    async def _is_ready(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Whether every database marked `required` takes connections; looked at every 2 s at most."""
        exchange.only_get(scope)
        async with self._asking:  # however many ask, the databases are asked once
            if self._ready is None or monotonic() - self._ready[0] > _READY_FOR:
                names = [name for name, database in self._parts.settings.databases.items() if database.required]
                found = await asyncio.gather(*(reachable(self._parts.logins.host(name)) for name in names))
                self._ready = (monotonic(), all(found))
        door, recorder = self._parts.authenticator, self._parts.recorder
        unlogged = recorder.failing and self._parts.settings.audit.on_failure == "refuse" and recorder.fault()
        ready = self._ready[1] and not unlogged and not door.lockdown.on() and door.broken is None
        await exchange.answer(send, 200 if ready else 503, encoding.encode({"ready": ready}), request_id)

    async def _metadata(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Protected resource metadata (RFC 9728)."""
        exchange.only_get(scope)
        self._parts.gatekeeper.check(scope["headers"])
        found = {
            "resource": f"{self._base(scope)}/mcp",
            "bearer_methods_supported": ["header"],
            "resource_name": "mcpctl",
        }
        await exchange.answer(send, 200, encoding.encode(found), request_id)

    def _base(self, scope: Scope) -> str:
        """What clients call this server by."""
        if self._parts.settings.server.public_url:
            return self._parts.settings.server.public_url
        try:
            host = credentials.header(scope["headers"], b"host")
            self._parts.gatekeeper.check(scope["headers"])
        except Error:
            host = None
        return f"{'https' if self._parts.tls else 'http'}://{host or self._parts.gatekeeper.authority}"

    async def _old_stream(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """/sse, for clients of before 2025-03: a stream that ends when its token does."""
        if self._parts.sse is None or scope["method"] != "GET":
            raise Error("only GET is answered here", status=405)
        address, principal = await self._admit(scope, request_id)
        try:
            self._check_streams(principal)
        except LimitedError as problem:
            self._note_limited(problem, principal, address, request_id)
            raise
        _know(scope, principal)
        task = asyncio.current_task()
        scope["mcpctl"] = Caller(principal, Request(request_id, address, "sse", None, None))
        if task is not None:
            self._streams[task] = principal
        more = True

        async def noting(message: Message) -> None:
            nonlocal more
            more = message.get("more_body", False) or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._parts.sse(scope, receive, noting)
        except asyncio.CancelledError:
            if task is None or self._parts.authenticator.still_valid(principal):
                raise
            task.uncancel()
            if more:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if task is not None:
                self._streams.pop(task, None)

    def _check_streams(self, principal: Principal) -> None:
        """Raise LimitedError where a token or user would have more streams than calls at once. They do not count as
        calls: clients keep them open all day."""
        limits = self._parts.settings.limits
        for kind, name, group in (("token", principal.token, limits.tokens), ("user", principal.user, limits.users)):
            most = rule(limits, group, group.named.get(name or "")).concurrent
            if name is not None and sum(getattr(one, kind) == name for one in self._streams.values()) >= most:
                said = f"too many streams: {most} are the limit of the {kind} {name}; again when one has ended"
                raise LimitedError(said, kind=kind, name=name, limit="concurrent", retry_after=1)

    async def _old_message(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if self._parts.sse is None or scope["method"] != "POST":
            raise Error("only POST is answered here", status=405)
        address, principal = await self._admit(scope, request_id)
        _know(scope, principal)
        exchange.check_content_type(scope["headers"])
        body = await self._body(scope, receive, principal)
        try:
            messages.read(body)
            jsonrpc_message_adapter.validate_json(body, by_name=False)
        except (messages.NotAMessageError, ValueError):
            raise UsageError("the body is no JSON-RPC message", "post one message in JSON") from None
        scope["mcpctl"] = Caller(principal, Request(request_id, address, "sse", None, None))
        status, _, _ = await exchange.captured(self._parts.sse, scope, body)
        if status == 404:
            raise Error(
                "there is no such session", "open /sse first, and post to the address that it names", status=404
            )
        if status != 202:
            raise UsageError("the session_id in the URL is none", "post to the address that /sse names")
        await exchange.answer(send, 202, b"", request_id)

    def end_streams(self) -> int:
        """End the open streams of tokens that are no longer valid; how many there were."""
        ended = [
            task for task, principal in self._streams.items() if not self._parts.authenticator.still_valid(principal)
        ]
        for task in ended:
            task.cancel()
        return len(ended)

    # -- refusals --------------------------------------------------------------------------------------------------

    async def _refuse(self, scope: Scope, send: Send, problem: Error, request_id: str) -> None:
        """One answer for every refusal; a 401 says the same whatever the reason, which is in the audit log."""
        headers: list[tuple[bytes, bytes]] = []
        message, hint = problem.message, problem.hint
        if isinstance(problem, UnauthorizedError):
            message, hint = "Unauthorized: a valid token is needed", "send it as Authorization: Bearer …"
            if problem.status == 429:
                message, hint = "Too many wrong tokens from this address; a valid one is taken", None
            else:
                where = f"{self._base(scope)}/.well-known/oauth-protected-resource/mcp"
                error = "" if problem.message == "no credential" else ', error="invalid_token"'
                headers.append(
                    (b"www-authenticate", f'Bearer resource_metadata="{where}"{error}'.encode("latin-1", "replace"))
                )
        if isinstance(problem, UnauthorizedError | LimitedError | TooMuchError) and problem.status == 429:
            headers.append((b"retry-after", str(problem.retry_after).encode()))
        if problem.status == 405:
            headers.append((b"allow", b"POST" if scope["path"] in ("/mcp", "/messages", "/messages/") else b"GET"))
        if problem.status in (400, 408, 413) or isinstance(problem, TooMuchError):
            headers.append((b"connection", b"close"))
        if problem.status >= 500:
            self._say(problem.message, request_id)
            told = problem.status == 503 and ("cannot be written" in message or message.startswith(_CANCELLED))
            message = message if told else outside(problem)
        data = {"hint": hint} if hint and problem.status < 500 else None
        body = encoding.rpc_error(_INVALID_REQUEST, message, data)
        await exchange.answer(send, problem.status, body, request_id, headers)

    def _say(self, message: str, request_id: str) -> None:
        """Say in the server's log what is wrong with us: once a minute, however many ask."""
        since, more = self._said.get(message, (-_SAID_FOR, 0))
        if monotonic() - since < _SAID_FOR:
            self._said[message] = (since, more + 1)
            return
        log.warning("request %s: %s%s", request_id, message, f" ({more} requests more before)" if more else "")
        self._said[message] = (monotonic(), 0)


def _know(scope: Scope, principal: Principal) -> None:
    """Tell the door whose the connection is; see door.py:Visitor.make_room. Not of one who is refused by a limit."""
    scope.setdefault("state", {})["known"] = principal.token or "local"


def outside(problem: Error) -> str:
    """What a stranger may hear of a fault of ours: files and their paths are for the log."""
    if isinstance(problem, LockedError):
        return problem.message
    return (
        "The server cannot answer calls right now; the administrator's log says why"
        if problem.status == 503
        else "Internal error"
    )
