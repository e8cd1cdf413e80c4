"""The remote server: one message there, and what it answers, by Streamable HTTP (MCP 2026-07-28, and those before)."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import httpx2

from mcpctl import __version__
from mcpctl.bridge import address, message
from mcpctl.bridge.message import Message
from mcpctl.errors import ConfigError, Error, UnavailableError

CONNECT = 30.0
"""Seconds to reach a server, and to hand over a message. An answer may take as long as the client waits for it."""
LARGEST = 64 << 20
"""Bytes of one message, either way."""
GOODBYE = 1.0
"""Seconds for a server to hear that its session has ended."""
_TRIES = 3
_PAUSE = 1.0
"""How often a stream is asked for again that broke off, and seconds before that where the server names none."""

Put = Callable[[bytes], Awaitable[None]]


class Credential(Protocol):
    """What is shown to the server."""

    async def bearer(self) -> str | None:
        """The bearer token for the next request; None without one."""

    async def another(self, used: str | None, refused: httpx2.Response) -> None:
        """See to it that `bearer` gives another token than `used`, which the server has refused so (401, or 403 for
        want of scope). Raises Error where there is none to be had."""

    def rotated(self, used: str | None) -> bool:
        """Whether `bearer` gives another token than `used` by now, as somebody has put one there. It asks nobody."""


class AwayError(UnavailableError):
    """The server cannot be reached, or broke off."""


def client(ca_file: Path | None) -> httpx2.AsyncClient:
    """A client that follows no redirect by itself, and believes the system's certificate authorities, and this one."""
    context = httpx2.create_ssl_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as problem:
            said = getattr(problem, "strerror", None) or "no certificate in PEM"
            raise ConfigError(f"--ca-file {ca_file}: {said}", "name a file of certificates in PEM") from None
    return httpx2.AsyncClient(
        verify=context,
        timeout=httpx2.Timeout(CONNECT, read=None, pool=None),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=30.0),
        follow_redirects=False,
    )


@contextlib.contextmanager
def _named(url: str) -> Any:
    """What goes wrong on the way, as an Error that says what and where."""
    where = address.shown(url)
    try:
        yield
    except httpx2.ConnectError as problem:
        said = str(problem)
        if "CERTIFICATE_VERIFY_FAILED" in said or "certificate" in said.lower():
            why = said.partition("CERTIFICATE_VERIFY_FAILED] ")[2] or said
            raise AwayError(f"the certificate of {where} is not to be believed: {why}", _certificate(said)) from None
        raise AwayError(f"cannot reach {where}: {said or 'no connection'}", "is it the right URL, and up?") from None
    except httpx2.TimeoutException:
        raise AwayError(f"{where} did not answer in {CONNECT:.0f} seconds", "is it the right URL, and up?") from None
    except (httpx2.TransportError, httpx2.StreamError, httpx2.SSEError) as problem:
        why = str(problem) or type(problem).__name__
        raise AwayError(f"{where} broke off: {why}", _BROKE_OFF) from None
    except httpx2.DecodingError:
        raise AwayError(f"{where} answered in a broken encoding", "look at the proxy in between") from None


def _certificate(said: str) -> str:
    if "expired" in said:
        return "whoever runs the server has to renew it; check this machine's clock, too"
    if "ostname" in said or "IP address" in said or "not valid for" in said:
        return "use the name that the certificate was made for"
    return "where the server's certificate authority is your own, name its file with --ca-file"


async def fetch(http: httpx2.AsyncClient, request: httpx2.Request, *, seconds: float = CONNECT) -> httpx2.Response:
    """A whole answer, of a bounded size and in a bounded time. Raises AwayError."""
    url = str(request.url)
    with _named(url):
        try:
            async with asyncio.timeout(seconds):
                answer = await http.send(request, stream=True)
                try:
                    body = await _whole(answer, 1 << 20)
                finally:
                    await answer.aclose()
        except TimeoutError:
            raise AwayError(f"{address.shown(url)} did not answer in {seconds:.0f} seconds", "try again") from None
    headers = [(key, text) for key, text in answer.headers.multi_items() if key not in _OF_THE_WAY]
    found = httpx2.Response(answer.status_code, headers=headers, content=body, request=request)
    found.next_request = answer.next_request
    return found


_OF_THE_WAY = ("content-encoding", "content-length", "transfer-encoding")


async def _whole(answer: httpx2.Response, limit: int = LARGEST) -> bytes:
    found = bytearray()
    async for part in answer.aiter_bytes():
        found += part
        if len(found) > limit:
            where = address.shown(str(answer.request.url))
            raise AwayError(f"{where} answered more than {limit >> 20} MiB", "ask for less")
    return bytes(found)


class Remote:
    """A remote MCP server. `put` takes each message that comes from it; `say` a line for the person."""

    def __init__(
        self, url: str, http: httpx2.AsyncClient, credential: Credential, put: Put, say: Callable[[str], None]
    ) -> None:
        self.url = url
        self._http = http
        self._credential = credential
        self._put = put
        self._say = say
        self._agreed: str | None = None
        self._session: str | None = None
        self._repeated: dict[str, dict[tuple[str, ...], str]] = {}

    @property
    def has_session(self) -> bool:
        """Whether the server (of before 2026-07-28) has opened a session for us."""
        return self._session is not None

    async def carry(self, sent: Message) -> None:
        """Bring a message there and its answers back. A request is answered whatever happens: by an error at least."""
        try:
            await self._carry(sent)
        except Error as problem:
            data = {"hint": problem.hint} if problem.hint else {}
            await self._fail(sent, message.NO_ANSWER, problem.message, **data)
        except Exception as problem:  # noqa: BLE001 - whoever has asked must be answered
            kind = type(problem).__name__
            await self._fail(sent, message.INTERNAL, f"the bridge failed: {kind}", hint="please report it")

    async def _fail(self, sent: Message, code: int, said: str, **data: Any) -> None:
        hint = f" ({data['hint']})" if "hint" in data else ""
        self._say(f"{sent.method or 'an answer'}: {said}{hint}")
        if sent.request is not None:
            await self._put(message.error(sent.request, code, said, **data))

    async def _carry(self, sent: Message) -> None:
        if sent.method == "initialize":
            self._session = self._agreed = None
        async with self._asked("POST", message.headers(sent, self._agreed, self._repeated), sent.line) as answer:
            if answer.status_code >= 300:
                await self._refused(sent, answer)
            elif sent.request is None:
                pass  # a notification has no answer
            elif answer.status_code == 202:
                raise AwayError(f"{address.shown(self.url)} took the request, and answers nothing", _NONE)
            else:
                if sent.method == "initialize":
                    self._session = answer.headers.get("mcp-session-id")
                await self._answers(sent, answer)

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, headers: dict[str, str], body: bytes | None, *, again: bool = True
    ) -> AsyncIterator[httpx2.Response]:
        """An answer whose head has come. What is refused for its credential is sent `again` with another one: once for
        a token that is not taken, and once for one that does not reach."""
        if self._session is not None:
            headers = {**headers, "Mcp-Session-Id": self._session}
        refused: set[int] = set()
        while True:
            bearer = await self._credential.bearer()
            shown = {"Authorization": f"Bearer {bearer}"} if bearer is not None else {}
            with _named(self.url):
                request = self._http.build_request(method, self.url, content=body, headers={**headers, **shown})
                answer = await self._http.send(request, stream=True)
                try:
                    if not again or answer.status_code in refused or not self._helps(bearer, answer):
                        yield answer
                        return
                finally:
                    await answer.aclose()
            refused.add(answer.status_code)
            if answer.status_code != 429:
                await self._credential.another(bearer, answer)

    def _helps(self, used: str | None, answer: httpx2.Response) -> bool:
        """Whether to send it again. 429 may be for the wrong tokens until now: the right one may be there since."""
        if answer.status_code == 429:
            return self._credential.rotated(used)
        return _wants_credential(answer)

    async def _refused(self, sent: Message, answer: httpx2.Response) -> None:
        """Tell the client what a server says that does not do it. Its own JSON-RPC error goes on as it is, but for an
        id that it did not know."""
        status, where = answer.status_code, address.shown(self.url)
        if status < 400:
            to = address.shown(str(answer.next_request.url)) if answer.next_request else "nowhere"
            raise AwayError(f"{where} redirects to {to}, which is not followed", "use that URL if it is the right one")
        body = await _whole(answer)
        found = _object(body)
        if sent.request is not None and isinstance(found.get("error"), dict) and "code" in found["error"]:
            same = message.answerable(found) == sent.request
            await self._put(message.one_line(body) if same else json.dumps({**found, "id": sent.request}).encode())
            return
        data: dict[str, Any] = {"status": status}
        if status == 404 and self._session is None:
            await self._fail(sent, message.NOT_FOUND, f"{where} is not there, or knows no {sent.method}", **data)
            return
        after = answer.headers.get("retry-after", "")
        if after.isdecimal():
            data["retry_after"] = int(after[:6])
        said = found.get("error_description") or found.get("message") or found.get("error") or answer.reason_phrase
        told = f"{where} refuses: {status} {str(said)[:300]}"
        await self._fail(sent, message.NO_ANSWER, told, **data, hint=_why(status))

    async def _answers(self, sent: Message, answer: httpx2.Response) -> None:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            if not await self._pass(sent, await _whole(answer)):
                raise AwayError(f"{address.shown(self.url)} answered something else than was asked", _NONE)
        elif kind == "text/event-stream":
            await self._stream(sent, answer)
        else:
            what = kind or "nothing"
            raise AwayError(f"{address.shown(self.url)} answered {what[:80]}, which is not MCP", _NONE)

    async def _pass(self, sent: Message | None, body: bytes) -> bool:
        """Hand on one message of the server's; True for the answer to `sent`, which ends its stream."""
        found = _object(body)
        if found.get("jsonrpc") != "2.0":
            raise AwayError(f"{address.shown(self.url)} answered what is no JSON-RPC", _NONE)
        if "method" in found:
            await self._put(message.one_line(body))
            return False
        if sent is None or ("result" not in found and "error" not in found):
            return False
        number = message.answerable(found)
        if number is None and "error" in found:
            await self._put(json.dumps({**found, "id": sent.request}).encode())
            return True
        if number != sent.request or type(number) is not type(sent.request):
            raise AwayError(f"{address.shown(self.url)} answered another call than was asked", _NONE)
        self._learn(sent, found.get("result"))
        await self._put(message.one_line(body))
        return True

    def _learn(self, sent: Message, result: Any) -> None:
        """What an answer says of how the next messages are to be sent."""
        if not isinstance(result, dict):
            return
        if sent.method == "initialize" and isinstance(result.get("protocolVersion"), str):
            self._agreed = result["protocolVersion"]
        elif sent.method == "tools/list":
            self._repeated.update(message.repeated(result.get("tools")))

    async def _stream(self, sent: Message, answer: httpx2.Response) -> None:
        """The events of a stream, up to the answer; one that breaks off is asked for again where its events have ids
        (MCP 2025-11-25, Streamable HTTP, "Resumability")."""
        last = _Place()
        if await self._events(sent, answer, last):
            return
        for _ in range(_TRIES):
            if last.event is None:
                break
            await asyncio.sleep(last.pause)
            with contextlib.suppress(AwayError):
                async with self._asked("GET", self._listening(last), None) as again:
                    if again.status_code == 200 and await self._events(sent, again, last):
                        return
        raise AwayError(f"{address.shown(self.url)} broke off before it answered", _BROKE_OFF)

    def _listening(self, last: "_Place") -> dict[str, str]:
        headers = {"Accept": "text/event-stream"}
        if self._agreed is not None:
            headers["MCP-Protocol-Version"] = self._agreed
        if last.event is not None:
            headers["Last-Event-ID"] = last.event
        return headers

    async def _events(self, sent: Message | None, answer: httpx2.Response, last: "_Place") -> bool:
        """Hand on the events of a stream; True when the answer to `sent` was among them."""
        try:
            with _named(self.url):
                async for event in httpx2.EventSource(answer, max_event_size=LARGEST):
                    last.note(event)
                    if event.data and event.event == "message" and await self._pass(sent, event.data.encode()):
                        return True
        except AwayError:
            if last.event is None:
                raise
        return False

    async def listen(self) -> None:
        """Hand on what a server with sessions says by itself, until it wants no listener, or cannot be reached any
        more."""
        last, failed = _Place(), 0
        while failed < _TRIES and self._session is not None:
            failed += 1
            with contextlib.suppress(Error):
                async with self._asked("GET", self._listening(last), None) as answer:
                    if answer.status_code != 200:
                        return
                    failed = 0
                    await self._events(None, answer, last)
            await asyncio.sleep(last.pause)

    async def end(self) -> None:
        """End the session, if there is one; a server that does not listen holds up nobody."""
        if self._session is None:
            return
        with contextlib.suppress(Error, TimeoutError):
            async with asyncio.timeout(GOODBYE), self._asked("DELETE", self._listening(_Place()), None, again=False):
                pass


async def look(url: str, http: httpx2.AsyncClient, credential: Credential) -> bool:
    """Ask a server for nothing but who it is, with a credential; False where it wants none. Raises Error where it
    cannot be reached, or refuses."""
    before = await credential.bearer()
    meta = {
        message.VERSION_KEY: "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "mcpctl", "version": __version__},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    asked = {"jsonrpc": "2.0", "id": 1, "method": "server/discover", "params": {"_meta": meta}}
    answers: list[bytes] = []

    async def put(line: bytes) -> None:
        answers.append(line)

    await Remote(url, http, credential, put, lambda said: None).carry(message.read(json.dumps(asked).encode()))
    told = _object(answers[0]).get("error", {})
    if told.get("code") == message.NO_ANSWER:
        raise UnavailableError(str(told.get("message")), told.get("data", {}).get("hint"))
    return before is not None or await credential.bearer() is not None


_NONE = "is the URL that of an MCP server? mcpctl's ends in /mcp"
_BROKE_OFF = "the call may have run all the same; look before you repeat it"


class _Place:
    """How far a stream was read, and how long to wait before it is asked for again."""

    def __init__(self) -> None:
        self.event: str | None = None
        self.pause = _PAUSE

    def note(self, event: httpx2.ServerSentEvent) -> None:
        self.event = event.id or self.event
        if event.retry is not None:
            self.pause = min(event.retry / 1000, CONNECT)


def _wants_credential(answer: httpx2.Response) -> bool:
    """Whether another token may help (RFC 6750, section 3.1)."""
    asks = answer.headers.get("www-authenticate", "")
    return answer.status_code == 401 or (answer.status_code == 403 and "insufficient_scope" in asks)


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object, or an empty one for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _why(status: int) -> str:
    if status == 401:
        return "the credential is not valid there (any more)"
    if status == 403:
        return "you may not do this there"
    if status in (429, 503):
        return "try again later"
    return "ask whoever runs the server" if status >= 500 else _NONE
