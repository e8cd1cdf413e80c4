"""Serving over HTTP: builds everything once, runs it, shuts it down; with several workers, watches over them."""

import asyncio
import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.sse import SseServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings

from mcpctl.calls import Request
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, Error
from mcpctl.identity.principal import Principal
from mcpctl.identity.tokens import utcnow
from mcpctl.server import credentials, http, protocol, tls
from mcpctl.server.credentials import Gatekeeper
from mcpctl.server.door import Door, Visitor
from mcpctl.server.exchange import App, Caller, Receive, Scope, Send
from mcpctl.server.http import Http, Parts
from mcpctl.server.parts import Core, running

log = logging.getLogger("mcpctl")
_DRAIN = 5
"""Seconds that running calls have to end when the server is told to stop."""


@dataclass(frozen=True)
class Listening:
    """Where and how to listen: the config's `server` with the command line's flags over it."""

    settings: Settings
    behind_proxy: bool = False
    no_auth: bool = False

    @property
    def tls(self) -> bool:
        """Whether it speaks HTTPS."""
        return self.settings.server.tls.cert is not None

    @property
    def public(self) -> bool:
        """Whether it is there for others than who has started it."""
        server = self.settings.server
        proxied = self.behind_proxy or server.public_url is not None or bool(server.trusted_proxies)
        return proxied or not credentials.is_loopback(server.host)

    def check(self) -> None:
        """Refuse what would send tokens or rows in clear, or let strangers in."""
        server = self.settings.server
        loopback = credentials.is_loopback(server.host)
        if self.behind_proxy and not server.trusted_proxies:
            raise ConfigError("--behind-proxy needs server.trusted_proxies", "name the proxy's address there")
        if not loopback and not self.tls and not self.behind_proxy:
            raise ConfigError(
                f"plain HTTP on {server.host} would send tokens and rows in clear",
                "give --tls-cert and --tls-key, or --behind-proxy with server.trusted_proxies, or listen on 127.0.0.1",
            )
        if self.no_auth and not loopback:
            raise ConfigError(f"--no-auth is for loopback only, not for {server.host}", "use tokens")
        if self.no_auth and (self.behind_proxy or server.public_url or server.trusted_proxies):
            raise ConfigError("--no-auth does not go with public_url, trusted_proxies or --behind-proxy", "use tokens")


Ready = Callable[[str], None]
_STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def serve(listening: Listening, ready: Ready = lambda url: None) -> None:
    """Serve until told to stop. `ready(url)` is called once every worker answers."""
    listening.check()
    settings = listening.settings
    if listening.tls:
        tls.context(settings)
        if problem := tls.out_of_date(settings, utcnow()):
            log.warning("%s", problem)
    bound = _bind(settings.server.host, settings.server.port)
    port = bound.getsockname()[1]
    settings = replace(settings, server=replace(settings.server, port=port))
    listening = replace(listening, settings=settings)
    shown = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    url = settings.server.public_url or f"{'https' if listening.tls else 'http'}://{shown}:{port}"
    if listening.no_auth:
        log.warning("AUTHENTICATION IS OFF: whoever reaches %s has what the config's login has", url)
        log.warning("Connection isolation: DISABLED (--no-auth: all share one pool)")
    else:
        log.info("Connection isolation: ENABLED (per-token database connections)")
    bound.most = _all_descriptors(settings.limits.connections)
    try:
        if settings.server.workers == 1:
            told = asyncio.run(_worker(listening, bound, lambda: ready(f"{url}/mcp"), None, 1))
        else:
            told = _supervise(listening, bound, lambda: ready(f"{url}/mcp"))
    finally:
        bound.close()
    for number in told[:1]:
        signal.raise_signal(number)  # so that the exit status tells what ended it


def _all_descriptors(connections: int) -> int | None:
    """Take all the file descriptors that the system lets us have; how many of them visitors may fill. The others are
    for our files, and for twice as many connections to PostgreSQL as there may be: cancelling one opens another."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return None if hard == resource.RLIM_INFINITY else max(hard // 2, hard - 64 - 2 * connections)


def _bind(host: str, port: int) -> Door:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio turns Nagle's algorithm off for sockets that name their protocol, and else an answer takes 40 ms more.
        made = Door(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as problem:
        hint = "is another server there?"
        if isinstance(problem, socket.gaierror) or problem.errno == errno.EADDRNOTAVAIL:
            hint = "server.host and --host take an address of this machine, such as 127.0.0.1"
        raise Error(f"cannot listen on {host} port {port}: {problem.strerror}", hint) from None
    made.set_inheritable(True)
    return made


class _Uvicorn(uvicorn.Server):
    """uvicorn, which says when it is up, and leaves it to us to raise a signal again: after all is closed."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains; a second stops now."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._captured_signals.append(sig)

    @property
    def captured(self) -> list[int]:
        """The signals that told it to stop."""
        return self._captured_signals


async def _worker(
    listening: Listening, bound: socket.socket, started: Callable[[], None], lifeline: int | None, workers: int
) -> list[int]:
    """One process's server; returns the signals that ended it. `lifeline`: a pipe whose end says that the supervisor
    is gone."""
    settings = listening.settings
    async with running(settings, files=not listening.no_auth, workers=workers) as core, _app(listening, core) as app:
        config = uvicorn.Config(
            app,
            # h11, which strips header values on both sides (RFC 9110); httptools leaves the end
            http=Visitor.of(settings.limits.request_bytes),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # the audit log is the record; an access log would keep URLs
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_DRAIN,
            ssl_context_factory=(lambda config, default: tls.context(settings)) if listening.tls else None,
        )
        server = _Uvicorn(config, started)
        if lifeline is not None:
            asyncio.get_running_loop().add_reader(lifeline, lambda: setattr(server, "should_exit", True))
        await server.serve(sockets=[bound])
    return server.captured


@contextlib.asynccontextmanager
async def _app(listening: Listening, core: Core) -> AsyncIterator[Http]:
    """The ASGI app with both lanes."""
    settings = listening.settings

    async def who(context: protocol.Context) -> tuple[Principal, Request]:
        caller = _caller(context)
        return caller.principal, replace(caller.request, rpc_id=context.request_id)

    def failed(context: protocol.Context, problem: Error) -> str:
        _caller(context).problem = problem
        return http.outside(problem)

    server = protocol.build(core.calls, who, failed)
    # The gatekeeper has checked Host and Origin for both lanes before the SDK sees a request.
    checked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    manager = StreamableHTTPSessionManager(
        server,
        json_response=True,
        stateless=True,
        security_settings=checked,
        max_request_body_size=settings.limits.request_bytes,
    )
    gatekeeper = Gatekeeper.of(
        settings, settings.server.host, settings.server.port, behind_proxy=listening.behind_proxy
    )
    app = Http(
        Parts(
            settings=settings,
            calls=core.calls,
            logins=core.logins,
            authenticator=core.authenticator,
            recorder=core.recorder,
            gatekeeper=gatekeeper,
            sdk=manager.handle_request,
            no_auth=listening.no_auth,
            tls=listening.tls,
            sse=_old_clients(server, checked) if settings.server.sse else None,
            cancel_elsewhere=core.watch.cancel_elsewhere,
        )
    )
    core.watch.end_streams = app.end_streams
    async with manager.run():
        yield app


def _caller(context: protocol.Context) -> Caller:
    """What the app put into the scope of the HTTP request that an SDK request came with."""
    if context.request is None:
        raise TypeError("an SDK request over HTTP without its HTTP request")
    caller: Caller = context.request.scope["mcpctl"]
    return caller


def _old_clients(server: Server[Any], checked: TransportSecuritySettings) -> App:
    """/sse and /messages of the revision 2024-11-05, through the SDK."""
    transport = SseServerTransport("/messages/", checked)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller = scope["mcpctl"]
        owner = caller.principal.token or "local"  # the SDK lets nobody else post to this one's stream
        scope["user"] = AuthenticatedUser(AccessToken(token="", client_id=owner, scopes=[], subject=owner))
        if scope["path"] == "/sse":
            async with transport.connect_sse(scope, receive, send) as (read, write):
                await server.run(read, write, server.create_initialization_options())
        else:
            await transport.handle_post_message(scope, receive, send)

    return app


# -- several workers -----------------------------------------------------------------------------------------------


def _supervise(listening: Listening, bound: socket.socket, ready: Callable[[], None]) -> list[int]:
    """Fork the workers, start again those that die, and pass on the signal to stop; returns the signals that came."""
    if not hasattr(os, "fork"):
        raise ConfigError("several workers need fork, which this system has not", "set server.workers to 1")
    workers = listening.settings.server.workers
    told_read, told_write = os.pipe()
    lifeline_read, lifeline_write = os.pipe()
    children: set[int] = set()
    stop: list[int] = []

    def told(number: int, _: Any) -> None:
        stop.append(number)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def fork() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            children.add(pid)
            return
        status = 1
        try:
            for number in _STOPPING:
                signal.signal(number, signal.SIG_DFL)
            os.close(lifeline_write)
            asyncio.run(_worker(listening, bound, lambda: _tell(told_write), lifeline_read, workers))
            status = 0
        except Error as problem:
            log.error("%s", problem.message)
        except KeyboardInterrupt:
            status = 0
        except Exception:
            log.exception("worker %d failed", os.getpid())
        finally:
            os._exit(status)

    for number in _STOPPING:
        signal.signal(number, told)
    for _ in range(workers):
        fork()
    up = 0
    failed = 0
    os.set_blocking(told_read, False)
    while children:
        with contextlib.suppress(BlockingIOError):
            up += len(os.read(told_read, 64))
            if up >= workers and failed >= 0:
                failed = -1
                ready()
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.discard(pid)
            if not stop and up < workers:
                failed += 1
                stop.append(0)
                told(signal.SIGTERM, None)
            elif not stop:
                log.error("worker %d died; another takes its place", pid)
                time.sleep(0.2)  # one that dies at once must not keep a core busy
                fork()
            continue
        select.select([], [], [], 0.05)
    os.close(lifeline_write)
    for number in _STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if failed > 0:
        raise Error("a worker did not start", "the log above says why")
    return stop


def _tell(fd: int) -> None:
    os.write(fd, b".")
