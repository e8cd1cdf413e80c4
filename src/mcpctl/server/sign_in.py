"""/api/v1/auth, where a user's password becomes a session and a session ends, and /api/v1/admin/sessions, where those
who may see and end the sessions of others."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from mcpctl.errors import ForbiddenError, NotFoundError, UnauthorizedError, UsageError
from mcpctl.identity import sessions, users
from mcpctl.identity.principal import Principal
from mcpctl.identity.sessions import Session
from mcpctl.identity.standing import Standing
from mcpctl.identity.users import rfc3339
from mcpctl.in_turn import in_turn
from mcpctl.policy.access import Access
from mcpctl.recorder import Recorder
from mcpctl.server import encoding, exchange
from mcpctl.server.exchange import MethodError, Receive, Scope, Send
from mcpctl.server.noted import Noted
from mcpctl.server.routes import BELOW, Host, Route, Routes, know
from mcpctl.signing_in import SigningIn

SIGN_IN, ADMIN = "/api/v1/auth", "/api/v1/admin/sessions"
_MOST = 16 << 10
"""Bytes of a sign-in's body: a password has a kilobyte at most."""
_FORM = 'send {"user": "…", "password": "…"} and nothing else'
_WRONG = encoding.rpc_error(-32600, "Unauthorized: nobody may sign in with that user name and password")
_ID = re.compile(r"S[0-9a-z]{7}")


class SignIn:
    """The routes, for an app to take as one of its additions. `passwords`: whether one becomes a session here; those
    that users have let clients have are seen and ended in any case. `leave(user)` signs a user out of all browsers."""

    def __init__(
        self,
        signing_in: SigningIn,
        door: Standing,
        access: Access,
        recorder: Recorder,
        leave: Callable[[str], None],
        *,
        passwords: bool,
    ) -> None:
        self._signing_in = signing_in
        self._leave = leave
        self._passwords = passwords
        self._sessions = signing_in.sessions
        self._door = door
        self._access = access
        self._recorder = recorder

    def __call__(self, host: Host) -> Routes:
        """See routes.py:Addition."""

        def of(answer: Any) -> Route:
            async def route(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
                await answer(host, scope, receive, send, request_id)

            return route

        found = {ADMIN: of(self._several), f"{ADMIN}{BELOW}": of(self._one)}
        return found | ({SIGN_IN: Noted().watched(SIGN_IN, of(self._auth))} if self._passwords else {})

    # -- one's own -------------------------------------------------------------------------------------------------

    async def _auth(self, host: Host, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if scope["method"] == "POST":
            await self._sign_in(host, scope, receive, send, request_id)
        elif scope["method"] == "DELETE":
            await self._sign_out(host, scope, send, request_id)
        else:
            raise MethodError("POST, DELETE")

    async def _sign_in(self, host: Host, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        address = host.visit(scope, request_id)
        if scope["query_string"]:
            raise UsageError("a sign-in takes nothing in the URL", _FORM)
        exchange.check_content_type(scope["headers"])
        name, password = read(await host.body(scope, receive, address, _MOST))
        gone = asyncio.Event()
        watcher = asyncio.create_task(exchange.watch(receive, asyncio.current_task(), gone))
        try:
            session, text, _ = await self._signing_in.open(name, password, address, request_id)
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            return  # nobody would have the session, and it would take another one's place
        except UnauthorizedError:
            where = f"{host.base(scope)}/.well-known/oauth-protected-resource/mcp"
            challenge = f'Bearer resource_metadata="{where}"'.encode("latin-1", "replace")
            await exchange.answer(send, 401, _WRONG, request_id, [(b"www-authenticate", challenge)])
            return
        finally:
            watcher.cancel()
        found = {
            "session_id": text,
            "expires_at": rfc3339(self._sessions.ends(session)),
            "idle_seconds": round(self._sessions.idle(session).total_seconds()),
            "user": name,
        }
        await exchange.answer(send, 200, encoding.encode(found), request_id)

    async def _sign_out(self, host: Host, scope: Scope, send: Send, request_id: str) -> None:
        address, principal = await host.admit(scope, request_id)
        know(scope, principal)
        session = self._sessions.known.get(principal.token or "")
        if session is None:
            raise ForbiddenError("a token is no session, and does not sign out", "its administrator can revoke it")
        await self._end([session], "signed out", address, request_id)
        await exchange.answer(send, 204, b"", request_id)

    # -- those of others -------------------------------------------------------------------------------------------

    async def _several(self, host: Host, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if scope["method"] not in ("GET", "HEAD", "DELETE"):
            raise MethodError("GET, HEAD, DELETE")
        address, principal = await host.admit(scope, request_id)
        know(scope, principal)
        if scope["method"] != "DELETE":
            self._check(principal, "sessions:list", address, request_id)
            user = _user(scope, needed=False)
            found = [one for one in self._seen_by(principal) if user in (None, one.user)]
            shown = [sessions.as_values(one, self._sessions) for one in found]
            await exchange.answer(send, 200, encoding.encode({"sessions": shown}), request_id)
            return
        self._check(principal, "sessions:end", address, request_id)
        user = _user(scope, needed=True) or ""
        if self._may_know(principal, user):
            await in_turn(lambda: self._leave(user))
        theirs = [one for one in self._seen_by(principal) if one.user == user]
        ended = await self._end_for(principal, theirs, address, request_id)
        await exchange.answer(send, 200, encoding.encode({"ended": ended}), request_id)

    async def _one(self, host: Host, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        if scope["method"] != "DELETE":
            raise MethodError("DELETE")
        address, principal = await host.admit(scope, request_id)
        know(scope, principal)
        self._check(principal, "sessions:end", address, request_id)
        name = scope["path"].rpartition("/")[2]
        found = [one for one in self._seen_by(principal) if one.id == name and _ID.fullmatch(name)]
        if not found or not await self._end_for(principal, found, address, request_id):
            raise NotFoundError("there is no such session", f"GET {ADMIN} lists those that there are")
        await exchange.answer(send, 204, b"", request_id)

    def _check(self, principal: Principal, permission: str, address: str | None, request_id: str) -> None:
        """Raises ForbiddenError where a principal has not that permission; the audit log is told."""
        decision = self._access.may(principal, permission)
        if decision.allowed:
            return
        self._recorder.auth_refused(
            address, f"may not {permission}: {decision.reason}", proven=True, token=principal.token,
            user=principal.user, tenant=principal.tenant, request_id=request_id, transport="http",
        )  # fmt: skip
        raise ForbiddenError(f"that takes the permission {permission}: {decision.reason}")

    def _seen_by(self, principal: Principal) -> list[Session]:
        """The sessions that a principal may know of: of its own tenant's users alone, if it has one."""
        return [one for one in self._sessions.all() if self._may_know(principal, one.user or "")]

    def _may_know(self, principal: Principal, name: str) -> bool:
        if principal.tenant is None:
            return True
        user = self._door.person(name)
        return user is not None and user.tenant == principal.tenant

    async def _end_for(self, by: Principal, which: list[Session], address: str | None, request_id: str) -> list[str]:
        ids = [one.id for one in which]
        await in_turn(lambda: self._sessions.ask_again(ids))
        return await self._end(which, f"ended over HTTP by {by.name}", address, request_id)

    async def _end(self, which: list[Session], reason: str, address: str | None, request_id: str) -> list[str]:
        """End sessions, and what they have open; the ids of those that had not ended yet."""
        ids = [one.id for one in which]
        ended = await in_turn(lambda: self._sessions.end(ids))
        of = {one.id: one.user for one in which}
        for name in ended:
            user = self._door.person(of[name] or "")
            self._recorder.note(
                "session.closed", token=name, user=of[name], tenant=user.tenant if user is not None else None,
                client_ip=address, request_id=request_id, transport="http", reason=reason,
            )  # fmt: skip
        self._door.look()
        return ended


def read(body: bytes) -> tuple[str, str]:
    """User name and password of a sign-in's body. UsageError (400) for any other; nothing of it is repeated."""
    wrong = UsageError("the body is no sign-in", _FORM)
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(found, dict) or found.keys() != {"user", "password"}:
        raise wrong
    name, password = found["user"], found["password"]
    for key in ("user", "password"):
        if not isinstance(found[key], str):
            raise UsageError(f"the {key} of the sign-in is no text", _FORM)
    return name, password


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _user(scope: Scope, *, needed: bool) -> str | None:
    """The user that the query names; UsageError (400) for anything else in it, or where one is needed."""
    query = scope["query_string"].decode("latin-1")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        pairs = [("", "")]
    if not pairs and not needed:
        return None
    if len(pairs) != 1 or pairs[0][0] != "user" or not users.NAME.fullmatch(pairs[0][1]):
        raise UsageError("the query names no user", "?user=NAME; a single session is named in the path")
    return str(pairs[0][1])
