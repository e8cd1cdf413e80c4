"""/metrics on a listener of its own, which all workers share: whoever is asked asks the others.

It takes one GET a connection and closes it, so that there is nothing to keep alive, to pipeline, or to send slowly for
longer than a moment. There is no credential: who may reach it is who may read it.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from mcpctl import metrics
from mcpctl.config_keys import Metrics as Settings
from mcpctl.config_values import is_loopback
from mcpctl.errors import Error
from mcpctl.metrics import Sample
from mcpctl.server.live import Place, Process
from mcpctl.server.parts import Core

log = logging.getLogger("mcpctl.metrics")
_SECONDS = 5.0
"""In which a request has to be there, and its answer taken."""
_LONGEST = 8 << 10
_AT_ONCE = 16
_TICK, _WINDOW = 0.25, 15.0


def bind(settings: Settings) -> socket.socket:
    """The listening socket, made before the workers are."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        made = socket.create_server(address[:2], family=family, backlog=_AT_ONCE)
    except OSError as problem:
        raise Error(
            f"cannot listen on {settings.host} port {settings.port} for /metrics: {problem.strerror}",
            "metrics.host takes an address of this machine, metrics.port a free port",
        ) from None
    host, port = made.getsockname()[:2]
    log.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
    return made


class Pulse:
    """How late the event loop is: the longest delay in the last 15 to 30 seconds."""

    def __init__(self) -> None:
        self._longest = [0.0, 0.0]

    def longest(self) -> float:
        """In seconds."""
        return max(self._longest)

    async def run(self) -> None:
        """Measure, for ever."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            before = loop.time()
            await asyncio.sleep(_TICK)
            now = loop.time()
            if now - begun > _WINDOW:
                begun, self._longest = now, [0.0, self._longest[0]]
            self._longest[0] = max(self._longest[0], now - before - _TICK)


class Scraped:
    """One worker's end of the listener. `current` is what is in force, which may be another at each request."""

    def __init__(self, place: Place, current: Callable[[], Core]) -> None:
        self._place = place
        self._current = current
        self._idle: dict[asyncio.StreamWriter, None] = {}
        self._answering = 0

    async def text(self, *, openmetrics: bool) -> str:
        """What all workers of this server have counted; one that does not answer within a second is left out."""
        core = self._current()
        found: dict[str, list[Sample]] = {str(self._place.worker): core.live.samples()}
        for answer in await core.watch.ask_others({"do": "metrics"}):
            if answer.get("server") == self._place.server:
                samples = [(name, labels, value) for name, labels, value in answer["samples"]]
                found.setdefault(str(answer["worker"]), samples)  # during a reload a process answers twice
        found[""] = await core.live.shared(len(found))
        return metrics.exposition(found, openmetrics=openmetrics)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        self._idle[writer] = None
        if len(self._idle) > _AT_ONCE:  # whoever opens many and asks for nothing keeps nobody else out
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.transport.abort()
        asks = False
        try:
            async with asyncio.timeout(_SECONDS):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self._idle.pop(writer, None)
                if self._answering >= _AT_ONCE:
                    return
                asks = True
                self._answering += 1
                writer.write(await self._answer(head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # who asks for nothing, or takes nothing, is sent away
        except Exception:
            log.exception("/metrics failed")
        finally:
            self._answering -= asks
            self._idle.pop(writer, None)
            writer.close()

    async def _answer(self, head: str) -> bytes:
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, _, rest = first.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        host = headers.get("host", "")
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if is_loopback(self._current().live.settings.metrics.host) and not is_loopback(host):
            return _reply(
                "421 Misdirected Request", "only localhost is answered here\n"
            )  # a name bound to us: rebinding
        if path != "/metrics":
            return _reply("404 Not Found", "the numbers are at /metrics\n")
        if method != "GET":
            return _reply("405 Method Not Allowed", "only GET is answered here\n", "Allow: GET\r\n")
        openmetrics = "application/openmetrics-text" in headers.get("accept", "")
        kind = metrics.OPENMETRICS if openmetrics else metrics.TEXT
        return _reply("200 OK", await self.text(openmetrics=openmetrics), kind=kind)


def _reply(status: str, body: str, extra: str = "", kind: str = "text/plain; charset=utf-8") -> bytes:
    data = body.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n{extra}\r\n"
    )
    return head.encode("latin-1") + data


async def serve(bound: socket.socket, process: Process, current: Callable[[], Core]) -> None:
    """Answer there until cancelled, for what is in force when somebody asks."""
    pulse = Pulse()
    process.lag = pulse.longest
    beating = asyncio.create_task(pulse.run())
    server = await asyncio.start_server(Scraped(process.place, current).serve, sock=bound, limit=_LONGEST)
    try:
        await asyncio.Event().wait()
    finally:
        server.close()
        beating.cancel()
