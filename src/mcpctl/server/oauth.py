"""The embedded authorization server's endpoints for programs: metadata (RFC 8414), /register (RFC 7591), /token (RFC
6749 as OAuth 2.1 has it) and /revoke (RFC 7009). What people see stands in `oauth_pages.py`."""

import base64
import binascii
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from mcpctl.errors import BusyError, Error, LimitedError, UnavailableError, UsageError
from mcpctl.identity import client_documents, strict_json
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.client_documents import Documents
from mcpctl.identity.oauth import Connections, GrantError, Issued
from mcpctl.identity.oauth_clients import Client, Clients, MetadataError
from mcpctl.identity.sessions import Session
from mcpctl.in_turn import in_turn
from mcpctl.policy.scopes import OFFLINE, Scopes
from mcpctl.recorder import Recorder
from mcpctl.server import credentials, encoding, exchange, parameters
from mcpctl.server.asked import is_resource
from mcpctl.server.cors import Cors
from mcpctl.server.exchange import MethodError, Receive, Scope, Send
from mcpctl.server.noted import Noted
from mcpctl.server.parameters import Parameters
from mcpctl.server.refusals import outside
from mcpctl.server.routes import Host, Route, Routes
from mcpctl.server.shown import shown

log = logging.getLogger("mcpctl.oauth")
METADATA = "/.well-known/oauth-authorization-server"
_LARGEST = 16 << 10
_TOO_MUCH = "the user was not asked for so much: ask for what was allowed, or for less"
Answer = Callable[[Host, Scope, Receive, str | None, str], Awaitable[tuple[int, dict[str, Any] | None]]]


class RefusalError(Error):
    """What a client is told (RFC 6749, section 5.2). `inside` is the reason for the log; None for what is none of its
    business."""

    def __init__(self, error: str, message: str, *, status: int = 400, inside: str | None = None) -> None:
        super().__init__(message, status=status)
        self.error = error
        self.inside = inside


@dataclass(frozen=True)
class Parts:
    """What the authorization server is made of."""

    connections: Connections
    clients: Clients
    documents: Documents | None
    scopes: Scopes
    door: Authenticator
    recorder: Recorder
    cors: Cors
    registration: bool

    async def client(self, name: str) -> Client:
        """The client of that id, or an Error with status 400."""
        found = self.clients.find(name)
        if found is not None:
            return found
        if self.documents is not None and client_documents.is_url(name):
            try:
                return await self.documents.find(name)
            except client_documents.DocumentError as problem:
                raise Error(f"the client's document: {problem.message}", problem.hint, status=400) from None
        raise Error("there is no such client", "have the client register again", status=400)

    def is_known(self, name: str) -> bool:
        """Whether the config still lets that client be one."""
        by_document = self.documents is not None and client_documents.is_url(name)
        return by_document or self.clients.find(name) is not None

    def closed(self, session: Session | None, reason: str, **where: Any) -> None:
        """Note that a connection has ended, and end what it has open."""
        if session is not None:
            self.recorder.note(
                "session.closed", token=session.id, user=session.user, transport="http", reason=reason, **where
            )
            self.door.look()


class Endpoints:
    """The routes, for an app to take as one of its additions."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._noted = Noted()

    def __call__(self, host: Host) -> Routes:
        """See routes.py:Addition."""
        found = {METADATA: self._get(host), f"{METADATA}/mcp": self._get(host)}
        found |= {"/token": self._post(host, self._token), "/revoke": self._post(host, self._revoke)}
        if self._parts.registration:
            found["/register"] = self._post(host, self._register)
        return {path: self._noted.watched(path, route) for path, route in found.items()}

    # -- what is there -------------------------------------------------------------------------------------------------

    def _get(self, host: Host) -> Route:
        async def route(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
            host.visit(scope, request_id)
            if await self._parts.cors.preflight(scope, send, request_id, b"GET"):
                return
            exchange.only_get(scope)
            more = self._parts.cors.headers(scope["headers"])
            await exchange.answer(send, 200, encoding.encode(self.metadata(host.base(scope))), request_id, more)

        return route

    def metadata(self, issuer: str) -> dict[str, Any]:
        """RFC 8414, section 2; RFC 9207; the draft on Client ID Metadata Documents, section 6."""
        methods = ["none", "client_secret_basic", "client_secret_post"]
        found: dict[str, Any] = {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/authorize",
            "token_endpoint": f"{issuer}/token",
            "revocation_endpoint": f"{issuer}/revoke",
            # not all that there are: Gemini CLI asks the user for whatever stands here
            "scopes_supported": [*self._parts.scopes.default, OFFLINE],
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token"],
            "token_endpoint_auth_methods_supported": methods,
            "revocation_endpoint_auth_methods_supported": methods,
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
            "protected_resources": [f"{issuer}/mcp"],
        }
        if self._parts.documents is not None:
            found["client_id_metadata_document_supported"] = True
        if self._parts.registration:
            found["registration_endpoint"] = f"{issuer}/register"
        return found

    # -- a POST's way --------------------------------------------------------------------------------------------------

    def _post(self, host: Host, answer: Answer) -> Route:
        async def route(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
            address = host.visit(scope, request_id)
            if await self._parts.cors.preflight(scope, send, request_id, b"POST"):
                return
            if scope["method"] != "POST":
                raise MethodError("POST")
            headers = self._parts.cors.headers(scope["headers"])
            try:
                self._parts.door.check_lock()
                status, found = await answer(host, scope, receive, address, request_id)
            except GrantError as problem:
                self._note(problem, address, request_id)
                told = _TOO_MUCH if problem.error == "invalid_scope" else "the grant opens nothing, or no longer"
                status, found = 400, _error(problem.error, told)
            except Error as problem:
                status, found, more = self._refused(scope["path"], problem, address, request_id)
                headers += more
            body = encoding.encode(found) if found is not None else b""
            await exchange.answer(send, status, body, request_id, [(b"pragma", b"no-cache"), *headers])

        return route

    def _refused(
        self, path: str, problem: Error, address: str | None, request_id: str
    ) -> tuple[int, dict[str, Any], list[tuple[bytes, bytes]]]:
        if isinstance(problem, RefusalError):
            if problem.inside is not None:
                self._refuse_in_log(problem.inside, address, request_id)
            else:
                self._noted(path, problem, request_id)
            more = [(b"www-authenticate", b'Basic realm="mcpctl"')] if problem.status == 401 else []
            return problem.status, _error(problem.error, problem.message), more
        if isinstance(problem, MetadataError):
            self._noted(path, problem, request_id)
            return 400, _error(problem.error, problem.message), []
        if isinstance(problem, LimitedError):
            after = [(b"retry-after", str(problem.retry_after).encode())]
            return 429, _error("temporarily_unavailable", "too many requests: come again later"), after
        if problem.status >= 500:
            log.warning("request %s: %s", request_id, problem.message, extra={"about": {"request_id": request_id}})
            busy = isinstance(problem, UnavailableError)
            after = [(b"retry-after", str(problem.retry_after).encode())] if isinstance(problem, BusyError) else []
            return 503, _error("temporarily_unavailable" if busy else "server_error", outside(problem)), after
        self._noted(path, problem, request_id)
        return problem.status, _error("invalid_request", problem.message), []

    def _note(self, problem: GrantError, address: str | None, request_id: str) -> None:
        ended = problem.ended
        self._refuse_in_log(problem.message, address, request_id, ended)
        self._parts.closed(ended, problem.message, client_ip=address, request_id=request_id)

    def _refuse_in_log(self, reason: str, address: str | None, request_id: str, session: Session | None = None) -> None:
        self._parts.recorder.auth_refused(
            address, reason, proven=session is not None, token=session.id if session else None,
            user=session.user if session else None, request_id=request_id, transport="http",
        )  # fmt: skip

    # -- /token --------------------------------------------------------------------------------------------------------

    async def _token(
        self, host: Host, scope: Scope, receive: Receive, address: str | None, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        given, client = await self._form(host, scope, receive, address)
        self._parts.recorder.before_call()
        kind, resource, connections = given.get("grant_type"), given.get("resource"), self._parts.connections
        ours = f"{host.base(scope)}/mcp"
        if resource is not None and not is_resource(resource, ours):
            raise RefusalError("invalid_target", f"resource is to be {ours}")
        target = None if resource is None else ours
        if kind == "authorization_code":
            for name in ("code", "code_verifier"):
                if name not in given:
                    raise RefusalError("invalid_request", f"{name} is missing")
            code, back, verifier = given["code"], given.get("redirect_uri"), given["code_verifier"]
            issued = await in_turn(lambda: connections.redeem(code, client, back, verifier, target, address))
            await self._note_opened(issued, address, request_id)
        elif kind == "refresh_token":
            if "refresh_token" not in given:
                raise RefusalError("invalid_request", "refresh_token is missing")
            scopes = given["scope"].split() if "scope" in given else None
            refresh = given["refresh_token"]
            issued = await in_turn(lambda: connections.renew(refresh, client, target, scopes))
        else:
            missing = "invalid_request" if kind is None else "unsupported_grant_type"
            raise RefusalError(missing, "grant_type is to be authorization_code or refresh_token")
        self._parts.door.look()
        return 200, self._issued(issued)

    def _issued(self, issued: Issued) -> dict[str, Any]:
        found: dict[str, Any] = {
            "access_token": issued.access,
            "token_type": "Bearer",
            "expires_in": int(self._parts.connections.access.total_seconds()),
            "scope": " ".join(issued.scopes),
        }
        return found if issued.refresh is None else {**found, "refresh_token": issued.refresh}

    async def _note_opened(self, issued: Issued, address: str | None, request_id: str) -> None:
        """One line for a new connection, without which it does not stay."""
        where = {"user": issued.session.user, "client_ip": address, "request_id": request_id, "transport": "http"}
        told = f"client {issued.session.client} with {' '.join(issued.scopes)}"
        try:
            self._parts.recorder.call("session.opened", {"token": issued.session.id, **where, "reason": told})
        except UnavailableError:
            await in_turn(lambda: self._parts.connections.end(issued.session.user or "", issued.session.id))
            raise
        for one in issued.ended:
            self._parts.closed(
                one, "another connection of its user took its place", client_ip=address, request_id=request_id
            )

    # -- /revoke -------------------------------------------------------------------------------------------------------

    async def _revoke(
        self, host: Host, scope: Scope, receive: Receive, address: str | None, request_id: str
    ) -> tuple[int, None]:
        given, client = await self._form(host, scope, receive, address)
        if "token" not in given:
            raise RefusalError("invalid_request", "token is missing")
        text = given["token"]
        session = await in_turn(lambda: self._parts.connections.revoke(text, client))
        self._parts.closed(session, f"client {client} has given it back", client_ip=address, request_id=request_id)
        return 200, None

    # -- who asks ------------------------------------------------------------------------------------------------------

    async def _form(self, host: Host, scope: Scope, receive: Receive, address: str | None) -> tuple[Parameters, str]:
        """The parameters of a request, and which client it is that asks."""
        headers = scope["headers"]
        if scope["query_string"]:
            raise UsageError("parameters in the URL are not taken", "send them in the body")
        parameters.check_form(headers)
        given = Parameters(await host.body(scope, receive, address, parameters.LARGEST))
        given.check_once()
        name, secret = _basic(headers)
        if name is not None and ("client_secret" in given or given.get("client_id", name) != name):
            raise RefusalError("invalid_request", "the client says twice who it is")
        name = name if name is not None else given.get("client_id")
        if name is None:
            raise RefusalError("invalid_client", "client_id is missing", status=401)
        self._check_client(name, secret if secret is not None else given.get("client_secret"))
        return given, name

    def _check_client(self, name: str, secret: str | None) -> None:
        """Raises a RefusalError where there is no such client, or its secret is wrong. One that a document describes is
        known by its URL alone: what it asks with says whether it was asked for."""
        client = self._parts.clients.find(name)
        if client is None and self._parts.documents is not None and client_documents.is_url(name):
            return
        if client is None:
            raise RefusalError("invalid_client", "there is no such client", status=401)
        if client.secret is not None and not secrets.compare_digest(client.secret.encode(), (secret or "").encode()):
            inside = f"wrong secret of the client {client.id}"
            raise RefusalError("invalid_client", "the client is not who it says", status=401, inside=inside)

    # -- /register -----------------------------------------------------------------------------------------------------

    async def _register(
        self, host: Host, scope: Scope, receive: Receive, address: str | None, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        exchange.check_content_type(scope["headers"])
        body = await host.body(scope, receive, address, _LARGEST)
        try:
            said = strict_json.read(body)
        except ValueError as problem:
            raise MetadataError(f"the body {problem}") from None
        client = await in_turn(lambda: self._parts.clients.register(said, address))
        told = f"{client.id} calls itself {shown(client.name)!r}, answered at {shown(client.redirects[0], 200)}"
        self._parts.recorder.of_stranger(
            "client.registered", client_ip=address, request_id=request_id, transport="http", reason=told
        )
        return 201, _registered(client, self._parts.scopes)


def _registered(client: Client, scopes: Scopes) -> dict[str, Any]:
    """RFC 7591, section 3.2.1: what was registered, which may be other than what was asked for."""
    return {
        "client_id": client.id,
        "client_name": client.name,
        "redirect_uris": list(client.redirects),
        "grant_types": ["authorization_code", *(["refresh_token"] if client.renews else [])],
        "response_types": ["code"],
        "token_endpoint_auth_method": "none",
        "scope": " ".join((*scopes.names, OFFLINE)),
    }


def _basic(headers: credentials.Headers) -> tuple[str | None, str | None]:
    """(client, secret) of Authorization: Basic (RFC 6749, section 2.3.1); (None, None) where there is none."""
    said = credentials.header(headers, b"authorization")
    if said is None:
        return None, None
    scheme, _, encoded = said.partition(" ")
    try:
        name, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        name, colon, secret = "", "", ""
    if scheme.lower() != "basic" or not colon:
        raise RefusalError("invalid_client", "Authorization is to be Basic", status=401)
    return unquote_plus(name), unquote_plus(secret)


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": code, "error_description": message}
