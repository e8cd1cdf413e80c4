"""Asking an issuer over HTTPS for a JSON object: bounded in time and size, without redirects, and whom to believe is
the config's CA or the system's.

Every failure is an UnavailableError: that we cannot ask says nothing about a token.
"""

import asyncio
import base64
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlsplit

import httpx2

from mcpctl.config_values import is_loopback
from mcpctl.errors import ConfigError, UnavailableError
from mcpctl.identity import strict_json

LIMIT = 256 << 10
"""Bytes of an answer. An issuer's keys are some 10 KiB."""
SECONDS = 5.0
"""For one question, from the connection to the last byte."""
_HINT = "check the URL in the config, the network path to it, and that its realm is there"


class NotThereError(UnavailableError):
    """It answers, and has nothing at that address (404)."""


class Fetcher:
    """Asks one issuer's endpoints. `http_on_loopback` lets it ask this machine without TLS."""

    def __init__(
        self, ca_file: Path | None = None, *, http_on_loopback: bool = False, seconds: float = SECONDS
    ) -> None:
        self._http_on_loopback = http_on_loopback
        self._seconds = seconds
        self._client = httpx2.AsyncClient(
            verify=_trusting(ca_file),
            trust_env=False,  # no proxy, password or CA from an environment that is not the config
            follow_redirects=False,
            timeout=seconds,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "mcpctl"},
        )

    async def get(self, url: str) -> dict[str, Any]:
        """The object at `url`. Raises NotThereError, UnavailableError."""
        return await self._ask(self._client.build_request("GET", self._checked(url)))

    async def post(self, url: str, form: Mapping[str, str], client: str, secret: str) -> dict[str, Any]:
        """The answer to a form, sent as that client (RFC 6749, section 2.3.1). Raises UnavailableError."""
        login = base64.b64encode(f"{quote_plus(client)}:{quote_plus(secret)}".encode()).decode()
        headers = {"Authorization": f"Basic {login}"}
        return await self._ask(self._client.build_request("POST", self._checked(url), data=form, headers=headers))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    def _checked(self, url: str) -> str:
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
        except ValueError:
            raise UnavailableError("the issuer names an address that is none", _HINT) from None
        local = parts.scheme == "http" and self._http_on_loopback and is_loopback(host)
        if not host or parts.username is not None or not (parts.scheme == "https" or local):
            raise UnavailableError(f"{url[:200]!r}: is not https", "the issuer's metadata has to name https addresses")
        return url

    async def _ask(self, request: httpx2.Request) -> dict[str, Any]:
        url = str(request.url)
        try:
            async with asyncio.timeout(self._seconds):
                return strict_json.read(await self._body(request))
        except TimeoutError:
            raise UnavailableError(f"{url}: no answer within {self._seconds:g} s", _HINT) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as problem:
            raise UnavailableError(f"{url}: {problem or type(problem).__name__}", _HINT) from None
        except ValueError as problem:
            raise UnavailableError(f"{url}: its answer {problem}", _HINT) from None

    async def _body(self, request: httpx2.Request) -> bytes:
        """The body of a good answer, which is JSON by its own word, and no longer than LIMIT."""
        answer = await self._client.send(request, stream=True)
        try:
            _check(answer)
            body = bytearray()
            async for part in answer.aiter_raw():
                body += part
                if len(body) > LIMIT:
                    raise ValueError(f"is longer than {LIMIT} bytes")
            return bytes(body)
        finally:
            await answer.aclose()


def _check(answer: httpx2.Response) -> None:
    status, kind = answer.status_code, answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if status == 404:
        raise NotThereError(f"{answer.url}: there is nothing (404)", _HINT)
    if status in (401, 403):
        hint = "check client_id and client_secret_file, and what that client may do there"
        raise UnavailableError(f"{answer.url}: refuses us ({status})", hint)
    if status != 200:
        more = ", a redirect, which is not followed" if 300 <= status < 400 else ""
        raise ValueError(f"has status {status}{more}")
    if kind != "application/json" and not kind.endswith("+json"):
        raise ValueError("is not said to be JSON")
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise ValueError("is packed, which we did not ask for")


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if ca_file is not None:  # Python 3.13 asks for extensions that many a company's CA does not write
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context
    except (OSError, ssl.SSLError) as problem:
        reason = getattr(problem, "strerror", None) or "it holds no certificate in PEM"
        raise ConfigError(f"{ca_file}: cannot be used as a CA: {reason}", "name the CA's certificate in PEM") from None
