"""The ASGI app: routes, the checks before a call, the two lanes, and the answers.

An answer waits until it is whole, so that a call that is cut answers 401, and a client that goes away ends its call:
the request's task is cancelled, and with it the statement.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from msgspec.structs import replace

from mcpctl.calls import Calls, UnknownToolError
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, LimitedError, LockedError, UnauthorizedError, UnavailableError, UsageError
from mcpctl.facts import Answer, Request
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal
from mcpctl.policy.scopes import Scopes
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.pools import reachable
from mcpctl.recorder import Recorder
from mcpctl.server import credentials, encoding, exchange, messages
from mcpctl.server.cors import Cors
from mcpctl.server.credentials import Gatekeeper
from mcpctl.server.exchange import PIECE, App, Caller, Receive, Scope, Send
from mcpctl.server.express import Call, Express
from mcpctl.server.held import SMALL, Bodies
from mcpctl.server.hot import Asking, Found, Reply
from mcpctl.server.old_streams import OldStreams
from mcpctl.server.refusals import CANCELLED, Refusals, failed
from mcpctl.server.routes import Addition, Route, find, know
from mcpctl.server.tracing import Call as TracedCall
from mcpctl.server.tracing import of_headers, of_message
from mcpctl.shared_counters import Slot

log = logging.getLogger("mcpctl.http")
_READY_FOR = 2.0
_NOTHING: dict[str, Any] = {}
_NOBODY = (None, "")


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
    additions: Sequence[Addition] = ()
    scopes: Scopes | None = None
    traced: TracedCall | None = None
    """Answers a call within a span, where the config wants traces."""


class Http:
    """The app. One instance a worker."""

    body_seconds = 30.0
    """In which a request's body has to have come."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bodies = Bodies(parts.settings.limits.request_bytes)
        self._ready: tuple[float, bool] | None = None
        asked_for = parts.scopes.default if parts.scopes is not None else ()
        self._refusals = Refusals(parts.settings.server.public_url, parts.gatekeeper, tls=parts.tls, scopes=asked_for)
        self._cors = Cors(parts.settings.server.allowed_origins)
        self._asking = asyncio.Lock()
        self._ids = exchange.request_ids()
        self.looked = False
        self.answered_express = 0
        self.answered_sdk = 0
        self._routes: dict[str, Route] = {
            "/mcp": self._mcp,
            "/health": self._health,
            "/ready": self._is_ready,
            "/.well-known/oauth-protected-resource": self._metadata,
            "/.well-known/oauth-protected-resource/mcp": self._metadata,
        }
        self._old = OldStreams(self, parts.sse, parts.authenticator, parts.settings.limits)
        for more in (self._old.routes(), *(addition(self) for addition in parts.additions)):
            self._routes |= more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        app, number = scope.get("state", _NOTHING).get("visited", _NOBODY)
        request_id = number if app is self else next(self._ids)
        try:
            credentials.to_origin_form(scope)
            if self._parts.no_auth and credentials.forwarded(scope["headers"]):
                raise Error("--no-auth takes no request that a proxy has forwarded", "use tokens", status=403)
            route = find(self._routes, scope["path"])
            if route is None:
                self._visit(scope, request_id)
                raise Error("there is nothing here", "the server answers at /mcp", status=404)
            await route(scope, receive, send, request_id)
        except Error as problem:
            await self._refuse(scope, send, problem, request_id)
        except Exception:
            log.exception("request %s failed", request_id, extra={"about": {"request_id": request_id}})
            await exchange.answer(send, 500, failed(request_id), request_id)

    # -- /mcp ----------------------------------------------------------------------------------------------------

    async def _mcp(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if scope["method"] == "OPTIONS":
            self.visit(scope, request_id)
            if await self._cors.preflight(scope, send, request_id, b"POST"):
                return
        address, text = self._presented(scope, request_id)
        try:
            principal = await self._known(text, address, request_id)
        except UnauthorizedError:
            if scope["method"] == "POST":  # what others are answered has another form
                self._remember(scope, address, text, let_in=False)
            raise
        if scope["method"] != "POST":
            raise Error("only POST is answered here", status=405)
        exchange.negotiate(scope)
        slots = self._enter(principal, address, request_id)
        try:
            know(scope, principal)
            body = await self.body(scope, receive, principal.token)
            self._remember(scope, address, text, let_in=True)
            around = of_headers(scope["headers"]) if self._parts.traced is not None else None
            request = Request(request_id, address, "http", carried=around)
            await self._served(scope, receive, send, request, principal, body)
        finally:
            self._parts.calls.limiter.leave(slots)

    def _enter(self, principal: Principal, address: str | None, request_id: str) -> Sequence[Slot]:
        """One of the calls at once, or a refusal."""
        try:
            return self._parts.calls.limiter.enter(principal, address, visited=True)
        except LimitedError as problem:
            self.note_limited(problem, principal, address, request_id)
            raise

    def _remember(self, scope: Scope, address: str | None, text: str | None, *, let_in: bool) -> None:
        """Let further requests with that head go the hot way, if they can."""
        parts, headers = self._parts, scope["headers"]
        routed = parts.express.route(headers) if parts.express is not None and let_in else None
        if routed is not None or not let_in:
            most = min(SMALL, parts.settings.limits.request_bytes)
            given = None if parts.no_auth else text is not None
            kept, more = credentials.without(headers), self._cors.headers(headers)
            scope["state"]["found"] = Found(self, address, kept, most, routed, given, more=more)

    # -- the hot lane, see hot.py ---------------------------------------------------------------------------------

    def read(self, found: Found, body: bytes) -> Call | None:
        """The call in a body, which the express lane can answer."""
        if found.routed is None or self._parts.express is None:
            return None
        return self._parts.express.read(found.headers, body, found.routed)

    async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
        """Answer a further request with a head that was read; `_mcp` from there on. Who asks for what is no call is
        known by then, and goes the ordinary way with the number that he was counted under."""
        request_id, address = next(self._ids), found.address
        try:
            self._count(address, lambda: text, request_id)
            principal = await self._known(text, address, request_id, look=not self.looked)
            call = self.read(found, body)
            if call is None:
                return request_id
            slots = self._enter(principal, address, request_id)
            try:
                asking.know(principal.token)
                around = of_headers(found.headers) if self._parts.traced is not None else None
                request = Request(request_id, address, "http", call.id, asking.answering, True, carried=around)
                express, work = self._begin(call, principal, request)
                try:
                    answer = await work
                    self._still(principal)
                    status, body = express.answer(call, answer)
                except UnknownToolError as problem:
                    self._still(principal)
                    status, body = express.unknown_tool(call, problem.message)
                except asyncio.CancelledError:
                    if asking.gone():
                        return False
                    raise self._cut(principal, request) from None
                except UnauthorizedError as problem:
                    raise self._as_locked(problem) from None
                reply = Reply(status, body, request_id, found.more)
                if len(reply.body) <= PIECE and not asking.flow.write_paused:
                    return asking.write(reply)
                return await asking.write_long(reply, partial(self._may_leave, principal, request))
            finally:
                self._parts.calls.limiter.leave(slots)
        except Error as problem:
            found.base = found.base or self._refusals.base(found.headers)
            status, body, headers = self._refusals.answer(found.headers, "/mcp", problem, request_id, found.base)
            reply = Reply(status, body, request_id, [*headers, *found.more])
        except Exception:
            log.exception("request %s failed", request_id, extra={"about": {"request_id": request_id}})
            reply = Reply(500, failed(request_id), request_id)
        return await asking.write_long(reply, lambda: True) if asking.flow.write_paused else asking.write(reply)

    def note_limited(
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

    async def _served(
        self, scope: Scope, receive: Receive, send: Send, request: Request, principal: Principal, body: bytes
    ) -> None:
        task = asyncio.current_task()
        gone = asyncio.Event()
        watcher = asyncio.create_task(exchange.watch(receive, task, gone))
        request = replace(request, task=task)
        try:
            found = await self._answer(scope, principal, request, body)
            self._still(principal)
        except asyncio.CancelledError:
            if gone.is_set():
                return
            raise self._cut(principal, request) from None
        except UnauthorizedError as problem:
            raise self._as_locked(problem) from None
        finally:
            watcher.cancel()
        await exchange.answer(
            send,
            *found[:2],
            request.id,
            [*found[2], *self._cors.headers(scope["headers"])],
            wanted=lambda: self._may_leave(principal, request),
        )

    def _cut(self, principal: Principal, request: Request) -> Error:
        """Why a call was cancelled whose client has not gone."""
        if request.task is not None:
            request.task.uncancel()
        if self._parts.authenticator.still_valid(principal):
            return UnavailableError(CANCELLED + self._parts.calls.ends)
        return self._ended(principal)

    def _as_locked(self, problem: Error) -> Error:
        """What ended a call; where all calls were ended by a lockdown, that is the reason."""
        unauthorized = isinstance(problem, UnauthorizedError)
        return LockedError() if unauthorized and self._parts.authenticator.locked else problem

    def _ended(self, principal: Principal) -> Error:
        """What a caller is told whose token is no longer valid."""
        return self._as_locked(UnauthorizedError("the token ended while the call ran", token_id=principal.token))

    def _still(self, principal: Principal) -> None:
        """Raises UnauthorizedError, or LockedError, where its token is no longer valid."""
        if not self._parts.authenticator.still_valid(principal):
            raise self._ended(principal)

    def _may_leave(self, principal: Principal, request: Request) -> bool:
        """Whether an answer may still leave: its caller has the rights that it was made with."""
        door = self._parts.authenticator
        return door.still_valid(principal) and all(door.in_force(principal, one) for one in request.databases)

    def visit(self, scope: Scope, request_id: str) -> str | None:
        """See routes.py:Host."""
        address = self._visit(scope, request_id)
        self._parts.gatekeeper.check(scope["headers"])
        return address

    def base(self, scope: Scope) -> str:
        """See routes.py:Host."""
        return self._refusals.base(scope["headers"])

    def end_streams(self) -> int:
        """End the open streams of tokens that are no longer valid; how many there were."""
        return self._old.end()

    def _presented(self, scope: Scope, request_id: str) -> tuple[str | None, str | None]:
        """Address, its rate, host and origin: the caller's address and credential, or a refusal."""
        address = self.visit(scope, request_id)
        try:
            if self._parts.no_auth:
                credentials.refuse_in_url(scope["query_string"])
                return address, None
            text, rest = credentials.presented(scope, self._in_url(scope))
            scope["in_url"], scope["query_string"] = rest != scope["query_string"] and text, rest
            return address, text
        except (UnauthorizedError, UsageError) as problem:
            self._note_refused(problem, address, request_id)
            raise

    def _in_url(self, scope: Scope) -> Sequence[bytes]:
        """The names of a credential in this URL: none, unless the config says in so many words that one may stand
        there. A head with one goes the ordinary way each time: what it says is that credential's (hot.py:Lane.of)."""
        return credentials.IN_URL.get(scope["path"], ()) if self._parts.settings.auth.credentials_in_url else ()

    async def admit(self, scope: Scope, request_id: str) -> tuple[str | None, Principal]:
        """The caller's address and principal, or a refusal."""
        address, text = self._presented(scope, request_id)
        return address, await self._known(text, address, request_id)

    async def _known(self, text: str | None, address: str | None, request_id: str, *, look: bool = True) -> Principal:
        """Whose credential it is, or a refusal."""
        parts = self._parts
        if parts.no_auth:
            return parts.authenticator.local()
        try:
            if text is None:
                raise UnauthorizedError("no credential")
            door = parts.authenticator
            if (known := door.again(text, address, look=look)) is not None:
                self.looked = True
            principal = known or await door.authenticate(text, address)
        except (UnauthorizedError, UsageError, LockedError) as problem:
            self._note_refused(problem, address, request_id)
            raise
        parts.recorder.auth_ok(principal.token, principal.user, address, request_id=request_id, transport="http")
        return principal

    def _note_refused(self, problem: Error, address: str | None, request_id: str) -> None:
        if self._parts.no_auth:
            return
        token, user, proven, locked = None, None, False, isinstance(problem, LockedError)
        if isinstance(problem, LockedError):
            token, user, proven = problem.token_id, problem.user, problem.token_id is not None
        elif isinstance(problem, UnauthorizedError):
            token, proven = problem.token_id, problem.token_id is not None and problem.proven
        self._parts.recorder.auth_refused(
            address, problem.message, proven=proven, locked=locked, token=token, user=user,
            request_id=request_id, transport="http",
        )  # fmt: skip

    def _visit(self, scope: Scope, request_id: str) -> str | None:
        """Count a request against its address's rate, and return the address."""
        headers, address = scope["headers"], scope["client"][0] if scope.get("client") else None
        if not self._parts.no_auth:
            address = self._parts.gatekeeper.address(headers, address)
        if scope.get("state", _NOTHING).get("visited", _NOBODY)[0] is not self:  # else it was counted on the hot lane
            self._count(address, lambda: credentials.presented(scope, self._in_url(scope))[0], request_id)
        return address

    def _count(self, address: str | None, text: Callable[[], str | None], request_id: str) -> None:
        """Count a request against its address's rate. Beyond it nothing costs a hash, or a line each."""
        try:
            self._parts.calls.limiter.visit(address)
        except LimitedError as problem:
            known = None
            if not self._parts.no_auth:
                with contextlib.suppress(UnauthorizedError, UsageError):
                    known = self._parts.authenticator.recognised(text())
            self.note_limited(problem, known, address, request_id)
            raise

    async def body(self, scope: Scope, receive: Receive, caller: str | None, most: int | None = None) -> bytes:
        """The request's body, never more of it than the config allows, nor with the others', and not for ever."""
        most = min(most or self._parts.settings.limits.request_bytes, self._parts.settings.limits.request_bytes)
        if (credentials.header(scope["headers"], b"content-encoding") or "identity").lower() != "identity":
            raise Error("a packed body is not taken", "send it without Content-Encoding", status=415)
        length = credentials.header(scope["headers"], b"content-length")
        too_large = Error(f"the body is larger than {most} bytes", "ask for less at once", status=413)
        if length is not None and (not length.isascii() or not length.isdigit() or int(length) > most):
            raise too_large
        body = bytearray()
        take = self._bodies.of(caller, asyncio.current_task())
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
            raise UnavailableError(CANCELLED + self._parts.calls.ends) from None

    async def _answer(
        self, scope: Scope, principal: Principal, request: Request, body: bytes
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        parts = self._parts
        express, headers = parts.express, scope["headers"]
        call = express.read(headers, body, express.route(headers)) if express is not None else None
        if call is not None:
            return *await self._express(call, principal, replace(request, rpc_id=call.id)), []
        self.answered_sdk += 1
        try:
            message = messages.read(body)
            messages.check_version(message, scope["headers"])
        except messages.NotAMessageError as problem:
            return 400, encoding.rpc_error(problem.code, problem.said, request=problem.request), []
        await self._cancelled(principal, message, scope["headers"])
        scope["mcpctl"] = Caller(principal, request)
        return await exchange.through(self._parts.sdk, scope, body)

    def _begin(self, call: Call, principal: Principal, request: Request) -> tuple[Express, Awaitable[Answer]]:
        """The express lane, and what answers a call that came by it."""
        parts = self._parts
        if parts.express is None:
            raise TypeError("there is no express lane")
        self.answered_express += 1
        answer: TracedCall = parts.calls.call
        if parts.traced is not None:
            answer, request.carried = parts.traced, of_message(request.carried, call.carried)
        return parts.express, answer(principal, call.name, call.arguments, request)

    async def _express(self, call: Call, principal: Principal, request: Request) -> tuple[int, bytes]:
        """The express lane's answer."""
        express, work = self._begin(call, principal, request)
        try:
            return express.answer(call, await work)
        except UnknownToolError as problem:
            return express.unknown_tool(call, problem.message)

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
        self._parts.gatekeeper.check(scope["headers"])
        if await self._cors.preflight(scope, send, request_id, b"GET"):
            return
        exchange.only_get(scope)
        base = self._refusals.base(scope["headers"])
        found: dict[str, Any] = {
            "resource": f"{base}/mcp",
            "bearer_methods_supported": ["header"],
            "resource_name": "mcpctl",
        }
        servers = [one.issuer for one in self._parts.settings.auth.oidc.values()]
        if self._parts.scopes is not None:
            # not all that there are: many clients ask the user for whatever stands here (MCP, "Scope Minimization")
            found["scopes_supported"] = list(self._parts.scopes.default)
            servers.insert(0, base)
        if servers:
            found["authorization_servers"] = servers
        await exchange.answer(send, 200, encoding.encode(found), request_id, self._cors.headers(scope["headers"]))

    async def _refuse(self, scope: Scope, send: Send, problem: Error, request_id: str) -> None:
        status, body, headers = self._refusals.answer(scope["headers"], scope["path"], problem, request_id)
        await exchange.answer(send, status, body, request_id, [*headers, *self._cors.headers(scope["headers"])])
