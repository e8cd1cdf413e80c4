"""A client as small as can be, so that the load is the server's and not its own: one connection, one call at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 20.0
"""Seconds in which a call has to be answered; one that is not counts as hanging."""


@dataclass(frozen=True)
class Reply:
    """An answer: HTTP status, the server's number for the request, the body as JSON."""

    status: int
    request_id: str
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """What a model would read: the result's first text, or the error's message."""
        result = self.body.get("result")
        if result is None:
            return str(self.body.get("error", {}).get("message", ""))
        return str(result["content"][0]["text"])

    @property
    def rows(self) -> list[list[Any]] | None:
        """The rows of an answer that is none of an error."""
        result = self.body.get("result")
        if result is None or result.get("isError") or self.status != 200:
            return None
        return list(result["structuredContent"]["rows"])


class LostError(Exception):
    """The connection ended before an answer came."""


class Caller:
    """One connection, made again where it is lost. `source` is the address to call from."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None, source: str | None = None) -> None:
        self._url = urlsplit(url)
        self._tls = tls
        self._source = source
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def ask(self, token: str, query: str, number: int) -> Reply:
        """query_database with this text. LostError where no answer came; TimeoutError where it hangs."""
        call = {"name": "query_database", "arguments": {"query": query}}
        message = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call}
        return await self.post(token, json.dumps(message).encode())

    async def post(self, token: str, body: bytes) -> Reply:
        """Post a body to /mcp."""
        head = (
            f"POST {self._url.path} HTTP/1.1\r\nHost: {self._url.netloc}\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nAccept: application/json, text/event-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(PATIENCE):
                if self._streams is None:
                    local = (self._source, 0) if self._source else None
                    host, port = self._url.hostname, self._url.port
                    self._streams = await asyncio.open_connection(host, port, ssl=self._tls, local_addr=local)
                reader, writer = self._streams
                writer.write(head.encode() + body)
                return await self._read(reader)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError) as problem:
            self.close()
            raise LostError(type(problem).__name__) from None
        except TimeoutError:
            self.close()
            raise

    async def _read(self, reader: asyncio.StreamReader) -> Reply:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Reply(int(first.split()[1]), headers.get("x-request-id", ""), json.loads(body) if body else {})


def resident(pid: int) -> int:
    """Bytes that a process has in memory; 0 where there is no such process."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The processes that a process has begun."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open; 0 where there is no such process."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0
