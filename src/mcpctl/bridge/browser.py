"""The browser, and where it comes back to: a redirect to this machine alone (RFC 8252, section 7.3)."""

import asyncio
import html
import os
import secrets
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from mcpctl.errors import Error, UsageError

PATH = "/callback"
_HEAD = 16 << 10
_READ = 10.0
"""Bytes of a request's head, and seconds for it: whoever connects and is silent holds up nobody."""


@dataclass(frozen=True)
class Answer:
    """What the browser brought back (RFC 6749, section 4.1.2; RFC 9207)."""

    code: str
    state: str
    iss: str | None


def listen(port: int = 0) -> socket.socket:
    """A socket of this machine alone, on that port or on a free one. Raises OSError."""
    family = socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.bind(("127.0.0.1", port))
        made.listen(8)
    except BaseException:
        made.close()
        raise
    return made


def listen_on(port: int) -> socket.socket:
    """As `listen`, for a port that somebody has asked for. Raises UsageError."""
    try:
        return listen(port)
    except OSError as problem:
        raise UsageError(f"--callback-port {port}: {problem.strerror}", "choose another one, or leave it out") from None


def address(listening: socket.socket) -> str:
    """The redirect URI of a socket."""
    return f"http://127.0.0.1:{listening.getsockname()[1]}{PATH}"


def there() -> bool:
    """Whether a browser can be opened that the person sees: not over ssh, nor as a service."""
    if sys.platform.startswith(("win", "darwin")):
        return "SSH_CONNECTION" not in os.environ
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def show(url: str) -> None:
    """Open the browser, without waiting for it."""
    threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()


async def come_back(listening: socket.socket, state: str, seconds: float) -> Answer:
    """Wait for the browser to come back with that state; anything else that comes is turned away, and nothing of it
    counts. Raises Error where the sign-in was refused, or took longer than that."""
    found: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(_answer(head, state, found))
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # not the browser that we wait for
        finally:
            writer.close()

    server = await asyncio.start_server(visit, sock=listening, limit=_HEAD)
    try:
        async with asyncio.timeout(seconds):
            return await found
    except TimeoutError:
        raise Error(f"nobody signed in within {seconds / 60:.0f} minutes", "try again") from None
    finally:
        server.close()


def _answer(head: bytes, state: str, found: "asyncio.Future[Answer]") -> bytes:
    """The page for a visitor; `found` is set when it is the one."""
    method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    target = urlsplit(rest.partition(" ")[0])
    if method != "GET" or target.path != PATH:
        return _page("404 Not Found", "There is nothing here.")
    given = dict(parse_qsl(target.query, keep_blank_values=True, max_num_fields=20))
    if not secrets.compare_digest(given.get("state", "").encode(), state.encode()):
        return _page("400 Bad Request", "This is not the sign-in that mcpctl waits for. Begin again.")
    if found.done():
        return _page("200 OK", "You can close this window.")
    if "error" in given or not given.get("code"):
        why = f"{given.get('error', 'no code')}: {given.get('error_description', '')}".strip(": ")[:300]
        found.set_exception(Error(f"the sign-in was refused: {why}", "sign in again, and allow it"))
        return _page("200 OK", f"The sign-in was refused: {why}. You can close this window.")
    found.set_result(Answer(given["code"], given["state"], given.get("iss")))
    return _page("200 OK", "You are signed in. You can close this window.")


def _page(status: str, said: str) -> bytes:
    body = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>mcpctl</title><p>{html.escape(said)}</p></html>\n"
    ).encode()
    headers = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\nReferrer-Policy: no-referrer\r\n"
        "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return headers.encode() + body
