"""What a client asks for at /authorize: read, and checked in the order that RFC 6749, section 4.1.2.1 wants.

First who asks and where they want the answer. As long as one of these is not proven, nothing is sent there, but told to
the person. What is wrong afterwards is the client's to hear.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from mcpctl import redirect_uris
from mcpctl.errors import Error, UsageError
from mcpctl.identity.oauth import is_challenge
from mcpctl.identity.oauth_clients import Client
from mcpctl.policy.scopes import OFFLINE, Scopes
from mcpctl.server.parameters import Parameters

_STATE = re.compile(r"[\x20-\x7e]{1,4000}")
Find = Callable[[str], Awaitable[Client]]
"""The client of an id; an Error where there is none."""


class RefusedError(Error):
    """The client is told no. `error` is the code of RFC 6749, section 4.1.2.1; `url` is where it hears of it."""

    status = 400

    def __init__(self, message: str, error: str, client: Client, redirect: str, url: str) -> None:
        super().__init__(message, "start again from the client")
        self.error = error
        self.client = client
        self.redirect = redirect
        self.url = url


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a client's, in order. `query` is as it came, `issuer` whom it asks."""

    client: Client
    redirect: str
    state: str | None
    scopes: tuple[str, ...]
    challenge: str
    resource: str
    prompt: frozenset[str]
    query: str
    issuer: str

    def answer(self, **what: str) -> str:
        """The URL that takes an answer to the client."""
        return _answered(self.redirect, self.state, self.issuer, what)

    def refused(self, error: str, message: str) -> RefusedError:
        """A no."""
        url = self.answer(error=error, error_description=message)
        return RefusedError(message, error, self.client, self.redirect, url)

    @property
    def without_login(self) -> str:
        """The query, but that nobody has to sign in again."""
        return re.sub(r"(^|&)prompt=[^&]*", lambda found: _kept_prompt(found, self.prompt), self.query).lstrip("&")


def _kept_prompt(found: re.Match[str], prompt: frozenset[str]) -> str:
    left = "+".join(sorted(prompt - {"login", "select_account"}))
    return f"{found[1]}prompt={left}" if left else ""


def _answered(redirect: str, state: str | None, issuer: str, what: dict[str, str]) -> str:
    """RFC 9207: `iss` says who answers, also with a no."""
    more = {**what, **({"state": state} if state is not None else {}), "iss": issuer}
    return f"{redirect}{'&' if '?' in redirect else '?'}{urlencode(more)}"


async def read(query: bytes, find: Find, scopes: Scopes, issuer: str) -> Asked:
    """What this query asks for. RefusedError for what the client is told, any other Error for what only the person may
    be."""
    given = Parameters(query)
    client, redirect = await _who(given, find)
    state = given.get("state")

    def no(error: str, message: str) -> RefusedError:
        known = state if state is not None and _STATE.fullmatch(state) else None
        url = _answered(redirect, known, issuer, {"error": error, "error_description": message})
        return RefusedError(message, error, client, redirect, url)

    if given.twice:
        raise no("invalid_request", "a parameter stands there twice")
    if state is not None and not _STATE.fullmatch(state):
        raise no("invalid_request", "state is too long, or not of visible ASCII characters")
    if "request" in given or "request_uri" in given:
        raise no("request_not_supported", "request objects are not read here")
    if given.get("response_type") != "code":
        missing = "response_type" not in given
        raise no("invalid_request" if missing else "unsupported_response_type", "response_type is to be code")
    if given.get("response_mode", "query") != "query":
        raise no("invalid_request", "response_mode is to be query")
    if given.get("code_challenge_method") != "S256" or not is_challenge(given.get("code_challenge", "")):
        raise no("invalid_request", "PKCE is needed: a code_challenge, and code_challenge_method S256")
    resource = f"{issuer}/mcp"
    if not is_resource(given.get("resource", resource), resource):
        raise no("invalid_target", f"resource is to be {resource}")
    asked = given.get("scope", "").split(" ") if "scope" in given else list(scopes.default)
    known = scopes.known(asked)
    if "scope" in given and not set(known) - {OFFLINE}:
        if set(known) != {OFFLINE}:
            raise no("invalid_scope", f"none of these scopes is there; there are {' '.join(scopes.names)}")
        known = (*scopes.default, OFFLINE)
    prompt = frozenset(given.get("prompt", "").split())
    if "none" in prompt and len(prompt) > 1:
        raise no("invalid_request", "prompt is none, or others, not both")
    return Asked(
        client, redirect, state, known, given["code_challenge"], resource, prompt, query.decode("ascii"), issuer
    )


async def _who(given: Parameters, find: Find) -> tuple[Client, str]:
    """Who asks, and where they want the answer: both proven."""
    if not given.twice.isdisjoint({"client_id", "redirect_uri"}):
        raise UsageError("client_id or redirect_uri stands there twice", "start again from the client")
    if "client_id" not in given:
        raise UsageError("no client asks: client_id is missing", "start again from the client")
    client = await find(given["client_id"])
    redirect = given.get("redirect_uri")
    if redirect is None:
        if len(client.redirects) != 1:
            raise UsageError("the client does not say where to answer: redirect_uri is missing", _AGAIN)
        redirect = client.redirects[0]
    if not redirect_uris.matching(redirect, client.redirects):
        raise UsageError("the client wants the answer where it has not registered to be", _AGAIN)
    return client, redirect


_AGAIN = "start again from the client; nothing was sent to it"


def is_resource(said: str, ours: str) -> bool:
    """Whether a resource indicator (RFC 8707) is this server. Scheme and host may be in upper case."""
    try:
        parts = urlsplit(said)
    except ValueError:
        return False
    authority = f"{parts.scheme}://{parts.netloc}"
    return f"{authority.lower()}{said[len(authority) :]}" == ours
