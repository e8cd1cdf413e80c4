"""One run of the SDK's OAuth client, driven by hand; see sign_in.py. Importing this imports the SDK."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from socket import socket
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import httpx2
from mcp.client.auth import (
    OAuthClientProvider,
    OAuthFlowError,
    OAuthRegistrationError,
    OAuthTokenError,
    PKCEParameters,
)
from mcp.shared.auth import (
    AuthorizationCodeResult,
    OAuthClientInformationFull,
    OAuthClientMetadata,
    OAuthMetadata,
    OAuthToken,
    ProtectedResourceMetadata,
)
from mcp_types import LATEST_PROTOCOL_VERSION
from pydantic import AnyUrl, ValidationError

from mcpctl.bridge import address, browser
from mcpctl.bridge.remote import AwayError, fetch
from mcpctl.bridge.sign_in import PATIENCE, Options
from mcpctl.errors import Error

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
_INTERVAL, _SLOWER = 5.0, 5.0
"""Seconds between two looks, and how many more when there are too many (RFC 8628, sections 3.2 and 3.5)."""
_PAST = 1.0
"""A time that is over, for a token that the server does not take: the SDK renews what has expired."""
_PUBLIC: Literal["none"] = "none"
"""A client on a desktop can keep no secret of its own (RFC 8252, section 8.4)."""
_ASK = "ask whoever runs the server, or the authorization server"
_NO_SIGN_IN = "give it a token: --token-file FILE, MCPCTL_TOKEN, or `mcpctl connect URL --keep-token`"


class _Storage:
    """The SDK's storage, in memory: the record is kept as a whole, by who calls us."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info


class _Provider(OAuthClientProvider):
    """The SDK's, which asks us how to get from a known client to a token, as its own extensions do."""

    authorize: Callable[[Callable[[], Awaitable[httpx2.Request]]], Awaitable[httpx2.Request]]

    async def _perform_authorization(self) -> httpx2.Request:
        return await self.authorize(super()._perform_authorization)


class Flow:
    """Renews a token, signs in, or signs out: one of them, once."""

    def __init__(self, url: str, http: httpx2.AsyncClient, options: Options, say: Callable[[str], None]) -> None:
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # what goes wrong is raised, and said by us
        self._url = url
        self._http = http
        self._options = options
        self._say = say
        self._device = options.device or not browser.there()
        self._device_endpoints: dict[str, str] = {}
        self._storage = _Storage()
        self._left, self._interval = PATIENCE, _INTERVAL
        self._provider = self._made("http://127.0.0.1/callback", (None, None))

    def _made(self, redirect: str, questions: tuple[Any, Any]) -> _Provider:
        about = OAuthClientMetadata(
            redirect_uris=[AnyUrl(redirect)], client_name="mcpctl", token_endpoint_auth_method=_PUBLIC
        )
        made = _Provider(self._url, about, self._storage, *questions, client_metadata_url=self._options.metadata_url)
        made.authorize = self._authorize
        return made

    # -- what is kept -----------------------------------------------------------------------------------------------

    def record(self, now: float) -> dict[str, Any]:
        """What the next run of the bridge needs to know."""
        context, tokens = self._provider.context, self._storage.tokens
        life = tokens.expires_in if tokens is not None else None
        parts = {
            "tokens": tokens,
            "client": context.client_info,
            "server": context.oauth_metadata,
            "resource": context.protected_resource_metadata,
        }
        found: dict[str, Any] = {
            name: part.model_dump(mode="json", exclude_none=True) for name, part in parts.items() if part is not None
        }
        return {**found, "expires_at": None if life is None else now + life}

    def _restore(self, record: dict[str, Any]) -> None:
        """Go on from where the last run was."""
        context = self._provider.context
        try:
            if "tokens" in record:
                self._storage.tokens = OAuthToken.model_validate(record["tokens"])
            if "client" in record:
                self._storage.client = OAuthClientInformationFull.model_validate(record["client"])
            if "server" in record:
                context.oauth_metadata = OAuthMetadata.model_validate(record["server"])
            if "resource" in record:
                context.protected_resource_metadata = found = ProtectedResourceMetadata.model_validate(
                    record["resource"]
                )
                context.auth_server_url = str(found.authorization_servers[0])
        except (ValidationError, TypeError, AttributeError, KeyError):
            hint = f"`mcpctl connect {self._url} --sign-out` forgets it; then sign in again"
            raise Error("what is kept of the last sign-in cannot be understood", hint) from None

    # -- the three things -------------------------------------------------------------------------------------------

    async def renew(self, record: dict[str, Any]) -> bool:
        """Renew the token with the refresh token (RFC 6749, section 6); False where that is not taken any more. Raises
        AwayError where the authorization server cannot be asked now."""
        self._restore(record)
        self._provider.context.token_expiry_time = _PAST
        return await self._drive(None)

    async def sign_in(self, record: dict[str, Any], refused: httpx2.Response) -> None:
        """Sign in, as the refusal says (401), or for more scope (403). Raises Error."""
        with closing(browser.listen_on(self._options.port) if self._options.port else browser.listen()) as listening:
            self._provider = self._made(browser.address(listening), self._browse(listening))
            self._restore({"tokens": {**record["tokens"], "refresh_token": None}} if record.get("tokens") else {})
            if self._options.client_id is not None:
                self._storage.client = OAuthClientInformationFull(
                    client_id=self._options.client_id, token_endpoint_auth_method=_PUBLIC
                )
            if not await self._drive(refused):
                raise Error("the sign-in led to no token", _NO_SIGN_IN)

    async def revoke(self, record: dict[str, Any]) -> None:
        """End a sign-in at the authorization server (RFC 7009), where it offers that. Raises Error."""
        self._restore(record)
        context, tokens = self._provider.context, self._storage.tokens
        context.client_info = self._storage.client
        endpoint = context.oauth_metadata.revocation_endpoint if context.oauth_metadata is not None else None
        if tokens is None or endpoint is None:
            return
        for kind, token in (("refresh_token", tokens.refresh_token), ("access_token", tokens.access_token)):
            if token is None:
                continue
            answer = await self._send(self._form(str(endpoint), {"token": token, "token_type_hint": kind}))
            if kind == "access_token" and tokens.refresh_token and _is_kept_there(answer):
                self._say("the authorization server takes back no access token: the last one ends by itself")
            elif answer.status_code != 200:
                said = f"the sign-in is forgotten here, but {address.shown(str(endpoint))} did not confirm its end"
                raise Error(f"{said}: {_said(answer)}", "end it on the page of your authorization server")

    # -- the SDK's flow, driven -------------------------------------------------------------------------------------

    async def _drive(self, refused: httpx2.Response | None) -> bool:
        """Run the flow until it would send the message itself with a new token; True when there is one. `refused` is
        what the message was answered with; without it only a renewal is tried."""
        request = httpx2.Request("POST", self._url, headers={"MCP-Protocol-Version": LATEST_PROTOCOL_VERSION})
        flow = self._provider.async_auth_flow(request)
        before = self._storage.tokens
        try:
            outgoing = await anext(flow)
            while True:
                if outgoing is not request:
                    answer = await self._send(outgoing)
                elif self._storage.tokens is not before:
                    return True
                elif refused is None:
                    return False
                else:
                    answer, refused = refused, None
                outgoing = await flow.asend(answer)
        except (OAuthFlowError, OAuthRegistrationError, OAuthTokenError, ValidationError) as problem:
            said = str(problem).partition("[type=")[0]  # behind that pydantic shows what came, which may be a token
            raise Error(f"the sign-in failed: {' '.join(said.split())[:400]}", _ASK) from None
        finally:
            await flow.aclose()

    async def _send(self, outgoing: httpx2.Request) -> httpx2.Response:
        """Send a request of the flow's, if it may go there."""
        url = str(outgoing.url)
        if not address.private(url):
            raise Error(f"the sign-in leads to {address.shown(url)}, which is not encrypted", _ASK)
        grant = None
        if outgoing.method == "POST":
            grant = parse_qs(outgoing.content.decode()).get("grant_type", [None])[0]
            if outgoing.headers.get("content-type") == "application/json":
                self._check_registration()
        answer = await (self._poll(outgoing) if grant == DEVICE else fetch(self._http, outgoing))
        if outgoing.method == "POST" and (answer.status_code >= 500 or answer.status_code == 429):
            raise AwayError(f"{address.shown(url)} answers {answer.status_code}", "try again later")
        if outgoing.method == "GET":
            self._note(answer)
        return answer

    def _check_registration(self) -> None:
        """The SDK would register at the MCP server itself where nobody says how; few want that by now."""
        server = self._provider.context.oauth_metadata
        if server is None:
            raise Error(f"{address.shown(self._url)} wants a token, and offers no sign-in", _NO_SIGN_IN)
        if server.registration_endpoint is None:
            raise Error(
                f"{server.issuer} lets no client register itself",
                "have mcpctl registered there, and say --client-id ID, or --client-metadata-url URL if it takes those",
            )

    def _note(self, answer: httpx2.Response) -> None:
        """What the SDK leaves out of an authorization server's metadata: where the device flow begins."""
        found = _object(answer)
        endpoint, issuer = found.get("device_authorization_endpoint"), found.get("issuer")
        if answer.status_code == 200 and isinstance(endpoint, str) and isinstance(issuer, str):
            self._device_endpoints[issuer] = endpoint
            if self._device:
                about = self._provider.context.client_metadata
                about.grant_types = list(dict.fromkeys([*about.grant_types, DEVICE]))

    def _form(self, url: str, data: dict[str, str]) -> httpx2.Request:
        """A form, with the client's own credential where it was given one."""
        context = self._provider.context
        client = {"client_id": context.client_info.client_id} if context.client_info is not None else {}
        data, headers = context.prepare_token_auth({**client, **data}, {})
        return httpx2.Request("POST", url, data=data, headers=headers)

    # -- a person signs in ------------------------------------------------------------------------------------------

    async def _authorize(self, by_browser: Callable[[], Awaitable[httpx2.Request]]) -> httpx2.Request:
        """The request for a token, after a person has allowed it."""
        server = self._provider.context.oauth_metadata
        if server is None:
            raise Error(f"{address.shown(self._url)} wants a token, and offers no sign-in", _NO_SIGN_IN)
        endpoint = self._device_endpoints.get(str(server.issuer)) if self._device else None
        if endpoint is not None:
            return await self._by_device(endpoint, str(server.token_endpoint))
        if self._options.device:
            raise Error(f"{server.issuer} offers no sign-in with a code", "leave out --device")
        if "S256" not in (server.code_challenge_methods_supported or ()):
            raise Error(f"{server.issuer} does not say that it knows PKCE with S256, which MCP asks for", _ASK)
        return await by_browser()

    def _browse(self, listening: socket) -> tuple[Any, Any]:
        """The SDK's two questions: show the person this page, and what came back?"""
        shown: list[str] = []

        async def show(url: str) -> None:
            if not address.private(url):
                raise Error(f"the sign-in leads to {address.shown(url)}, which is not encrypted", _ASK)
            shown.append(parse_qs(urlsplit(url).query)["state"][0])
            self._say(f"sign in with your browser: {url}")
            if browser.there():
                browser.show(url)

        async def came_back() -> AuthorizationCodeResult:
            found = await browser.come_back(listening, shown[-1], PATIENCE)
            return AuthorizationCodeResult(code=found.code, state=found.state, iss=found.iss)

        return show, came_back

    async def _by_device(self, endpoint: str, token_endpoint: str) -> httpx2.Request:
        """Ask for a code, and tell the person where to enter it (RFC 8628, sections 3.1 and 3.2). The proof that we are
        who asked (PKCE) goes along: Keycloak wants it of each client that has to have it in the browser."""
        context = self._provider.context
        proof = PKCEParameters.generate()
        challenge = {"code_challenge": proof.code_challenge, "code_challenge_method": "S256"}
        more = {"resource": context.get_resource_url()} if context.should_include_resource_param(None) else {}
        scope = {"scope": context.client_metadata.scope} if context.client_metadata.scope else {}
        answer = await self._send(self._form(endpoint, {**scope, **more, **challenge}))
        found = _object(answer)
        try:
            code, where, typed = (str(found[name]) for name in ("device_code", "verification_uri", "user_code"))
            self._left = min(float(found["expires_in"]), PATIENCE)
            self._interval = float(found.get("interval", _INTERVAL))
        except (KeyError, ValueError, TypeError):
            raise Error(f"{address.shown(endpoint)} gives no code to sign in with: {_said(answer)}", _ASK) from None
        self._say(
            f"to sign in, open {found.get('verification_uri_complete', where)} and enter or compare the code {typed}"
        )
        shown = {"grant_type": DEVICE, "device_code": code, "code_verifier": proof.code_verifier}
        return self._form(token_endpoint, {**shown, **more})

    async def _poll(self, outgoing: httpx2.Request) -> httpx2.Response:
        """Look until the person has allowed or refused it (RFC 8628, sections 3.4 and 3.5)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._left):
                while True:
                    await asyncio.sleep(self._interval)
                    answer = await fetch(self._http, outgoing)
                    said = _object(answer).get("error")
                    if said == "slow_down":
                        self._interval += _SLOWER
                    elif said == "access_denied":
                        raise Error("the sign-in was refused", "sign in again, and allow it")
                    elif said == "expired_token":
                        break
                    elif said != "authorization_pending":
                        return answer
        raise Error("nobody entered the code in time", "try again")


def _object(answer: httpx2.Response) -> dict[str, Any]:
    try:
        found = json.loads(answer.content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_kept_there(answer: httpx2.Response) -> bool:
    """Whether tokens of that kind are never taken back, as often with JWTs (RFC 7009, section 2.2.1)."""
    return answer.status_code == 400 and _object(answer).get("error") == "unsupported_token_type"


def _said(answer: httpx2.Response) -> str:
    """What an authorization server says of a failure (RFC 6749, section 5.2)."""
    found = _object(answer)
    words = [str(found[key]) for key in ("error", "error_description") if found.get(key)]
    return f"{answer.status_code} {': '.join(words)}"[:300]
