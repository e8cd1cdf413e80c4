"""Two small servers on loopback: where a client is answered, and where its metadata document is."""

from __future__ import annotations

import contextlib
import json
import queue
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme


class Documents:
    """Serves what `answer` says: (status, headers, body) by path. Counts who asks."""

    def __init__(self, port: int) -> None:
        self.base = f"https://localhost:{port}"
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}

    def put(self, path: str, document: Any, status: int = 200, **headers: str) -> str:
        """The URL of a document there."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[path] = (status, {"content-type": "application/json", **named}, body)
        return self.base + path

    def client(self, path: str, **changed: Any) -> str:
        """The URL of the document of a client in order, with these keys changed."""
        url = self.base + path
        good = {
            "client_id": url,
            "client_name": "Document client",
            "redirect_uris": ["http://127.0.0.1:41234/back"],
            "grant_types": ["authorization_code", "refresh_token"],
        }
        return self.put(path, {name: value for name, value in {**good, **changed}.items() if value is not None})


@contextlib.contextmanager
def _serving(handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


def _handler(get: Callable[[BaseHTTPRequestHandler], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # who asked has gone
                get(self)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def documents(folder: Path) -> Iterator[tuple[Documents, Path]]:
    """A server of documents over TLS, and the file of the CA that signed its certificate."""
    authority = trustme.CA()
    ca = folder / "documents-ca.pem"
    authority.cert_pem.write_to_path(ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    there: list[Documents] = []

    def get(asked: BaseHTTPRequestHandler) -> None:
        found = there[0]
        found.asked.append(asked.path)
        status, headers, body = found.answers.get(asked.path, (404, {}, b""))
        asked.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            asked.send_header(name, value)
        asked.end_headers()
        asked.wfile.write(body)

    with _serving(_handler(get), context) as port:
        there.append(Documents(port))
        yield there[0], ca


class Callback:
    """Where a client on the user's own machine is answered."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/callback"
        self.came: queue.Queue[dict[str, str]] = queue.Queue()

    def told(self, seconds: float = 30) -> dict[str, str]:
        """What the browser has brought."""
        return self.came.get(timeout=seconds)


@contextlib.contextmanager
def callback() -> Iterator[Callback]:
    there: list[Callback] = []

    def get(asked: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(asked.path)
        if parts.path == "/callback":
            there[0].came.put({name: value[0] for name, value in parse_qs(parts.query).items()})
        asked.send_response(200)
        asked.send_header("content-length", "4")
        asked.end_headers()
        asked.wfile.write(b"done")

    with _serving(_handler(get)) as port:
        there.append(Callback(port))
        yield there[0]
