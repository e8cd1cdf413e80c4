"""A load generator that leaves the machine to the servers: one process, one thread, epoll, requests made as bytes once.

It is a process of its own. A job comes as JSON on stdin, what was measured goes as JSON to stdout. Each connection has
one call under way at a time and stays open. Every answer must have status 200 and hold the job's `wanted` text; the
first few of each connection are taken apart whole. Standard library alone, so that it starts at once:

    echo '{"host": …, "port": …, "clients": 16, "seconds": 1, …}' | python -S -E benchmarks/driver.py
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from array import array
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SESSION = re.compile(rb"\r\nmcp-session-id: *([^\r]+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_READ = 1 << 18
_TAKEN_APART = 3
"""Answers of each connection that are parsed whole."""
_PATIENCE = 20.0
"""Seconds in which some answer has to come."""
_HEAD = "Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\n"
_INITIALIZE = {
    "jsonrpc": "2.0",
    "id": "hello",
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "benchmark", "version": "1"},
    },
}
_INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


class WrongError(Exception):
    """A server answered something else than was asked for."""


def request(job: dict[str, Any], message: dict[str, Any], *headers: str) -> bytes:
    """A message as the bytes of an HTTP request."""
    body = json.dumps(message).encode()
    more = "".join(f"{one}\r\n" for one in headers)
    head = f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\n{_HEAD}{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One client. `requests` are sent in turn, again and again."""

    def __init__(self, job: dict[str, Any], number: int) -> None:
        self.socket = socket.create_connection((job["host"], job["port"]), timeout=_PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.id = number
        self.left = _TAKEN_APART
        self.turn = 0
        self.begun = 0.0
        self.got = b""
        message = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": job["call"]}
        headers = [f"Authorization: Bearer {one}" for one in job["tokens"]] or [""]
        session = self._hello(job, headers[0]) if job["initialize"] else []
        shift = number * len(headers) // job["clients"]  # else all would use the same token at the same time
        headers = headers[shift:] + headers[:shift]
        self.requests = [request(job, message, *filter(None, [one, *session])) for one in headers]

    def _hello(self, job: dict[str, Any], header: str) -> list[str]:
        """Begin a session; the headers that later requests carry."""
        self.socket.sendall(request(job, _INITIALIZE, *filter(None, [header])))
        answer = self._answer()
        parsed(answer, "hello")
        headers = ["MCP-Protocol-Version: 2025-06-18"]
        if found := _SESSION.search(answer):
            headers.append(f"Mcp-Session-Id: {found[1].decode()}")
        self.socket.sendall(request(job, _INITIALIZED, *filter(None, [header, *headers])))
        self._answer()
        return headers

    def _answer(self) -> bytes:
        data = b""
        while not complete(data):
            if not (more := self.socket.recv(_READ)):
                raise WrongError("the server closed the connection")
            data += more
        return data


def complete(data: bytes) -> bool:
    """Whether these bytes are a whole answer."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    if found := _LENGTH.search(data, 0, end):
        return len(data) >= end + 4 + int(found[1])
    if _CHUNKED.search(data, 0, end):
        return data.endswith(b"\r\n0\r\n\r\n")
    return True


def body(answer: bytes) -> bytes:
    """An answer without its head, its chunks put together."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not _CHUNKED.search(head):
        return rest
    whole = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        whole, rest = whole + rest[:length], rest[length + 2 :]
    return whole


def parsed(answer: bytes, id: int | str) -> dict[str, Any]:
    """The result in an answer, be it JSON or one event of a stream. WrongError where there is none."""
    text = body(answer)
    if not text.lstrip().startswith(b"{"):
        text = next((line[5:] for line in text.splitlines() if line.startswith(b"data:") and b'"id"' in line), b"{}")
    message = json.loads(text)
    if message.get("id") != id or "result" not in message or message["result"].get("isError"):
        raise WrongError(f"answered {answer[:600]!r}")
    result: dict[str, Any] = message["result"]
    return result


def check(answer: bytes, client: Connection, wanted: bytes) -> None:
    """WrongError unless this is the answer that was asked for."""
    if not answer.startswith(b"HTTP/1.1 200 ") or (wanted not in answer and wanted not in body(answer)):
        raise WrongError(f"answered {answer[:600]!r}")
    if client.left:
        client.left -= 1
        parsed(answer, client.id)


def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Ask for `warm_up` seconds, then for `seconds` that count."""
    clients = {one.socket.fileno(): one for one in (Connection(job, n) for n in range(job["clients"]))}
    wanted = job["wanted"].encode()
    poll = select.epoll()
    now = time.perf_counter
    for number, client in clients.items():
        client.socket.setblocking(False)
        poll.register(number, select.EPOLLIN)
    for client in clients.values():
        send(client, now())
    took, calls = array("d"), 0
    counted = now() + job["warm_up"]
    until = counted + job["seconds"]
    marks = [(time.monotonic(), time.process_time())]
    while len(marks) < 3:
        events = poll.poll(_PATIENCE)
        if not events:
            raise WrongError(f"no answer in {_PATIENCE:g} s")
        for number, _ in events:
            client = clients[number]
            data = client.socket.recv(_READ)
            if not data:
                raise WrongError("the server closed the connection")
            client.got = data = client.got + data if client.got else data
            if not complete(data):
                continue
            at = now()
            client.got = b""
            check(data, client, wanted)
            calls += 1
            if at >= counted and len(marks) == 2:
                took.append(at - client.begun)
            if at >= (counted if len(marks) == 1 else until) and len(marks) < 3:
                marks.append((time.monotonic(), time.process_time()))
                if len(marks) == 2:
                    print(json.dumps({"at": "begin"}), flush=True)
            send(client, at)
    print(json.dumps({"at": "end"}), flush=True)
    total = drain(clients, poll, wanted)
    took_sorted = sorted(took)
    return {
        "calls": len(took),
        "all_calls": calls + total,
        "seconds": marks[2][0] - marks[1][0],
        "cpu": marks[2][1] - marks[1][1],
        "p50": took_sorted[len(took) // 2],
        "p99": took_sorted[int(len(took) * 0.99)],
    }


def send(client: Connection, at: float) -> None:
    """The client's next request; a small one always fits into the socket's buffer."""
    text = client.requests[client.turn]
    client.turn = (client.turn + 1) % len(client.requests)
    client.begun = at
    if client.socket.send(text) != len(text):
        raise WrongError("a request did not fit into the socket's buffer")


def drain(clients: dict[int, Connection], poll: select.epoll, wanted: bytes) -> int:
    """Take the answers that are still under way; how many there were."""
    waiting = set(clients)
    while waiting:
        events = poll.poll(_PATIENCE)
        if not events:
            raise WrongError(f"no answer in {_PATIENCE:g} s")
        for number, _ in events:
            client = clients[number]
            client.got += client.socket.recv(_READ)
            if complete(client.got):
                check(client.got, client, wanted)
                waiting.discard(number)
                poll.unregister(number)
    return len(clients)


if __name__ == "__main__":
    try:
        print(json.dumps(drive(json.load(sys.stdin))))
    except (WrongError, OSError, ValueError) as problem:
        print(json.dumps({"wrong": str(problem)}))
        sys.exit(1)
