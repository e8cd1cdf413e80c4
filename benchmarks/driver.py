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
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_READ = 1 << 18
_TAKEN_APART = 3
"""Answers of each connection that are parsed whole."""
_PATIENCE = 20.0
"""Seconds in which some answer has to come."""
_HEAD = "Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\n"


class WrongError(Exception):
    """A server answered something else than was asked for."""


def request(job: dict[str, Any], message: dict[str, Any], token: str) -> bytes:
    """A message as the bytes of an HTTP request."""
    body = json.dumps(message).encode()
    who = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\n{_HEAD}{who}"
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
        tokens = job["tokens"] or [""]
        mine = tokens[number % len(tokens) :: job["clients"]]  # no two clients have one while there are enough
        self.requests = [request(job, message, one) for one in mine]


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


def check(answer: bytes, client: Connection, wanted: bytes) -> None:
    """WrongError unless this is the answer that was asked for; the first few of a client are taken apart."""
    if not answer.startswith(b"HTTP/1.1 200 ") or (wanted not in answer and wanted not in body(answer)):
        raise WrongError(f"answered {answer[:600]!r}")
    if client.left:
        client.left -= 1
        text = body(answer)
        if not text.lstrip().startswith(b"{"):  # one event of a stream
            text = next((line[5:] for line in text.splitlines() if line.startswith(b"data: {")), b"{}")
        message = json.loads(text)
        if message.get("id") != client.id or message.get("result", {"isError": True}).get("isError"):
            raise WrongError(f"answered {answer[:600]!r}")


def send(client: Connection, at: float) -> None:
    """The client's next request; a small one always fits into the socket's buffer."""
    text = client.requests[client.turn]
    client.turn = (client.turn + 1) % len(client.requests)
    client.begun = at
    if client.socket.send(text) != len(text):
        raise WrongError("a request did not fit into the socket's buffer")


class Run:
    """All clients of one job, each with a call under way."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._wanted = job["wanted"].encode()
        connections = [Connection(job, number) for number in range(job["clients"])]
        self._clients = {one.socket.fileno(): one for one in connections}
        self._poll = select.epoll()
        for number, one in self._clients.items():
            one.socket.setblocking(False)
            self._poll.register(number, select.EPOLLIN)
        for one in connections:
            send(one, time.perf_counter())

    def until(self, end: float) -> array[float]:
        """Go on until that time of `perf_counter`; the seconds that each call took."""
        took, now = array("d"), time.perf_counter
        at = now()
        while at < end:
            for client in self._answered():
                at = now()
                took.append(at - client.begun)
                send(client, at)
        return took

    def drain(self) -> int:
        """Take the answers that are still under way; how many there were."""
        left = set(self._clients.values())
        while left:
            left -= set(self._answered())
        return len(self._clients)

    def _answered(self) -> list[Connection]:
        """The clients whose answers are whole and right, once there is news of any."""
        events = self._poll.poll(_PATIENCE)
        if not events:
            raise WrongError(f"no answer in {_PATIENCE:g} s")
        whole = []
        for number, _ in events:
            client = self._clients[number]
            data = client.socket.recv(_READ)
            if not data:
                raise WrongError("the server closed the connection")
            if client.got:
                data = client.got + data
            if complete(data):
                check(data, client, self._wanted)
                data = b""
                whole.append(client)
            client.got = data
        return whole


def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Ask for `warm_up` seconds, then for `seconds` that count; says when these begin and when they end."""
    run = Run(job)
    warm = run.until(time.perf_counter() + job["warm_up"])
    print(json.dumps({"at": "begin"}), flush=True)
    begun, cpu = time.perf_counter(), time.process_time()
    took = sorted(run.until(begun + job["seconds"]))
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    print(json.dumps({"at": "end"}), flush=True)
    if not took:
        raise WrongError(f"no answer in {seconds:g} s")
    return {
        "calls": len(took),
        "all_calls": len(warm) + len(took) + run.drain(),
        "seconds": seconds,
        "cpu": cpu,
        "p50": took[len(took) // 2],
        "p99": took[len(took) * 99 // 100],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(drive(json.load(sys.stdin))))
    except (WrongError, OSError, ValueError) as problem:
        print(json.dumps({"wrong": str(problem)}))
        sys.exit(1)
