"""/sse and /messages, for clients of before 2025-03: streams that end when their token does."""

import asyncio

from mcp_types import jsonrpc_message_adapter

from mcpctl.config_keys import Limits
from mcpctl.errors import Error, LimitedError, UsageError
from mcpctl.facts import Request
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal
from mcpctl.policy.limits import rule
from mcpctl.server import exchange, messages
from mcpctl.server.exchange import App, Caller, Message, Receive, Scope, Send
from mcpctl.server.routes import Host, Routes, know


class OldStreams:
    """The open streams of one app. `sse` is the SDK's transport, None where the config has not asked for it."""

    def __init__(self, host: Host, sse: App | None, authenticator: Authenticator, limits: Limits) -> None:
        self._host = host
        self._sse = sse
        self._authenticator = authenticator
        self._limits = limits
        self._open: dict[asyncio.Task[None], Principal] = {}

    def routes(self) -> Routes:
        """The paths, where there are any."""
        if self._sse is None:
            return {}
        return {"/sse": self._stream, "/messages": self._message, "/messages/": self._message}

    async def _stream(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if self._sse is None or scope["method"] != "GET":
            raise Error("only GET is answered here", status=405)
        address, principal = await self._host.admit(scope, request_id)
        try:
            self._check(principal)
        except LimitedError as problem:
            self._host.note_limited(problem, principal, address, request_id)
            raise
        know(scope, principal)
        task = asyncio.current_task()
        scope["mcpctl"] = Caller(principal, Request(request_id, address, "sse", None, None))
        if task is not None:
            self._open[task] = principal
        more = True

        async def noting(message: Message) -> None:
            nonlocal more
            more = message.get("more_body", False) or message["type"] == "http.response.start"
            await send(_with_credential(message, scope.get("in_url")))

        try:
            await self._sse(scope, receive, noting)
        except asyncio.CancelledError:
            if task is None or self._authenticator.still_valid(principal):
                raise
            task.uncancel()
            if more:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if task is not None:
                self._open.pop(task, None)

    def _check(self, principal: Principal) -> None:
        """Raise LimitedError where a token or user would have more streams than calls at once. They do not count as
        calls: clients keep them open all day."""
        limits = self._limits
        for kind, name, group in (("token", principal.token, limits.tokens), ("user", principal.user, limits.users)):
            most = rule(limits, group, group.named.get(name or "")).concurrent
            if name is not None and sum(getattr(one, kind) == name for one in self._open.values()) >= most:
                said = f"too many streams: {most} are the limit of the {kind} {name}; again when one has ended"
                raise LimitedError(said, kind=kind, name=name, limit="concurrent", retry_after=1)

    async def _message(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if self._sse is None or scope["method"] != "POST":
            raise Error("only POST is answered here", status=405)
        address, principal = await self._host.admit(scope, request_id)
        know(scope, principal)
        exchange.check_content_type(scope["headers"])
        body = await self._host.body(scope, receive, principal.token)
        try:
            messages.read(body)
            jsonrpc_message_adapter.validate_json(body, by_name=False)
        except (messages.NotAMessageError, ValueError):
            raise UsageError("the body is no JSON-RPC message", "post one message in JSON") from None
        scope["mcpctl"] = Caller(principal, Request(request_id, address, "sse", None, None))
        status, _, _ = await exchange.captured(self._sse, scope, body)
        if status == 404:
            raise Error(
                "there is no such session", "open /sse first, and post to the address that it names", status=404
            )
        if status != 202:
            raise UsageError("the session_id in the URL is none", "post to the address that /sse names")
        await exchange.answer(send, 202, b"", request_id)

    def end(self) -> int:
        """End those of tokens that are no longer valid; how many there were."""
        ended = [task for task, principal in self._open.items() if not self._authenticator.still_valid(principal)]
        for task in ended:
            task.cancel()
        return len(ended)


def _with_credential(message: Message, text: str | None) -> Message:
    """A message of a stream that was opened with a credential in the URL: the address that it names for posting has the
    same one, since its client can send no header."""
    body = message.get("body", b"")
    if not text or not body.startswith(b"event: endpoint"):
        return message
    return {**message, "body": body.replace(b"?session_id=", b"?token=" + text.encode() + b"&session_id=", 1)}
