"""The load generator of the benchmarks counts right answers alone, however a server frames them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent.parent / "benchmarks" / "driver.py"


@contextlib.contextmanager
def server(frame: str, status: int, result: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """(its port, the tokens it was shown); every call has that result."""
    shown: list[str] = []

    class Page(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            shown.append(self.headers["Authorization"])
            body = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}).encode()
            self.send_response(status)
            if frame == "length":
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            body = b"event: message\ndata: " + body + b"\n\n"
            for part in (body[:70], body[70:], b""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as found:
        found.daemon_threads = True
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield found.server_port, shown
        finally:
            found.shutdown()
            thread.join()


def drive(port: int) -> Any:
    """The last that the load generator says of two clients with four tokens."""
    job = {"host": "127.0.0.1", "port": port, "path": "/mcp", "clients": 2, "warm_up": 0.05, "seconds": 0.1}
    job |= {"tokens": ["a", "b", "c", "d"], "call": {"name": "query_database"}, "wanted": "the row that was asked for"}
    done = subprocess.run(
        [sys.executable, "-S", "-E", DRIVER], input=json.dumps(job), capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout.splitlines()[-1])


RIGHT = {"content": [{"type": "text", "text": "[1, the row that was asked for]"}]}


@pytest.mark.parametrize("frame", ["length", "chunks"])
def test_every_right_answer_is_counted_and_the_tokens_are_used_in_turn(frame: str) -> None:
    with server(frame, 200, RIGHT) as (port, shown):
        found = drive(port)
    assert found["all_calls"] == len(shown) >= found["calls"] > 0
    assert 0 < found["p50"] <= found["p99"]
    for first, second in ("ac", "bd"):  # each client has two of its own
        assert abs(shown.count(f"Bearer {first}") - shown.count(f"Bearer {second}")) <= 1
        assert f"Bearer {first}" in shown


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (503, RIGHT),
        (200, {"content": [{"type": "text", "text": "another row"}]}),
        (200, {**RIGHT, "isError": True}),
    ],
)
def test_a_wrong_answer_ends_the_run(status: int, result: dict[str, Any]) -> None:
    with server("length", status, result) as (port, _):
        assert drive(port)["wrong"].startswith("answered b'HTTP/1.1 ")
