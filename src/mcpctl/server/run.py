"""Serving over HTTP: builds everything once, runs it, shuts it down."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import uvicorn
from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.sse import SseServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings

from mcpctl import certificates
from mcpctl.audit.end import SharedEnd
from mcpctl.errors import Error
from mcpctl.facts import Request
from mcpctl.identity import browsers
from mcpctl.identity.principal import Principal
from mcpctl.identity.tokens import utcnow
from mcpctl.policy.access import Access
from mcpctl.server import authorization as oauth
from mcpctl.server import loop, metrics, protocol
from mcpctl.server.credentials import Gatekeeper
from mcpctl.server.crowd import Crowd
from mcpctl.server.door import Door, Visitor
from mcpctl.server.entrance import Entrance
from mcpctl.server.exchange import App, Caller, Receive, Scope, Send
from mcpctl.server.hangup import Hangup
from mcpctl.server.http import Http, Parts
from mcpctl.server.listening import Listening, bind
from mcpctl.server.live import Place, Process
from mcpctl.server.notify import Notifier
from mcpctl.server.parts import Core, running
from mcpctl.server.refusals import outside
from mcpctl.server.reload import DRAIN, Alone, Read, Serving
from mcpctl.server.routes import Addition
from mcpctl.server.sign_in import SignIn
from mcpctl.server.workers import Link, Supervisor, stopping
from mcpctl.shared_counters import Counters

log = logging.getLogger("mcpctl")
Ready = Callable[[str], None]
Work = Callable[[], Coroutine[Any, Any, None]]
COUNTED = "limits.bin"
"""The name of what the limits count, beside the state file."""


@dataclass(frozen=True)
class _Shared:
    """What was made before the workers are: where calls are answered, where /metrics is, what the limits count, and who
    tells systemd."""

    calls: Door
    metrics: socket.socket | None
    counters: Counters
    chain: SharedEnd
    crowd: Crowd
    systemd: Notifier


def serve(
    listening: Listening,
    ready: Ready = lambda url: None,
    read: Read | None = None,
    hangup: Hangup | None = None,
    systemd: Notifier | None = None,
    handed: Door | None = None,
) -> None:
    """Serve until told to stop. `ready(url)` is called once every worker answers. `read` reads the config again, when
    `hangup` or a command asks for it; without them HUP ends the server. `systemd` is told how it goes; `handed` is a
    socket that listens already, at the config's host and port."""
    systemd = systemd or Notifier({})
    listening.check()
    settings = listening.settings
    if listening.tls:
        pair = certificates.read(settings.server.tls)
        pair.context()
        if problem := pair.out_of_date(utcnow()):
            log.warning("%s", problem)
        listening = replace(listening, pair=pair)
    bound = handed or bind(settings.server.host, settings.server.port)
    port = bound.getsockname()[1]
    scraped = metrics.bind(settings.metrics) if settings.metrics.port is not None else None
    shared = _Shared(bound, scraped, _counters(listening), SharedEnd(), Crowd(settings.server.workers), systemd)
    listening = replace(listening, port=port)
    shown = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    url = settings.server.public_url or f"{'https' if listening.tls else 'http'}://{shown}:{port}"
    if listening.no_auth:
        log.warning("AUTHENTICATION IS OFF: whoever reaches %s has what the config's login has", url)
        log.warning("Connection isolation: DISABLED (--no-auth: all share one pool)")
    else:
        log.info("Connection isolation: ENABLED (per-token database connections)")
    if settings.auth.credentials_in_url:
        log.warning("auth.credentials_in_url: tokens in URLs are taken; proxies and histories keep these")

    place = Place(f"{os.getpid()}-{secrets.token_hex(4)}", f"{url}/mcp", 0, settings.server.workers)

    def up() -> None:
        ready(f"{url}/mcp")
        systemd.ready(f"serving at {url}/mcp")

    try:
        if settings.server.workers == 1:
            told = loop.run(_alone(listening, shared, place, up, read, hangup))
        else:
            work = partial(_worker, shared, place)
            told = Supervisor(listening, bound, up, work, read, hangup, systemd).run()
    finally:
        shared.counters.close()
        bound.close()
        if scraped is not None:
            scraped.close()
    for number in told[:1]:
        if hangup is not None and number == getattr(signal, "SIGHUP", None):
            signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # so that the exit status tells what ended it


def _counters(listening: Listening) -> Counters:
    """What the limits of all workers count; where nobody has a token it outlives nothing."""
    server = listening.settings.server
    path = None if listening.no_auth else server.state_file.with_name(COUNTED)
    return Counters(path, workers=server.workers)


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


class _Uvicorn(uvicorn.Server):
    """uvicorn, which says when it is up, and leaves it to us to raise a signal again: after all is closed."""

    def __init__(
        self,
        config: uvicorn.Config,
        started: Callable[[], None],
        signals: Iterable[int],
        ends: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._tell = started
        self._ends = ends
        self.servers = []
        self._signals = signals

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the doors. We accept ourselves, since libuv would not ask them whom to let in."""
        for one in sockets or []:
            if not isinstance(one, Door):
                raise TypeError("a listening socket that is no door")
            self.servers.append(Entrance(one, self._protocol, self.config.ssl))  # type: ignore[arg-type]
        self.started = True
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the doors, let the calls that run end."""
        self._ends()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains; a second stops now."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._captured_signals.append(sig)

    def leave(self) -> None:
        """Drain, without a signal."""
        self.should_exit = True

    def hang_up(self) -> None:
        """End the open connections, each when it has its answer."""
        for one in list(self.server_state.connections):
            one.shutdown()

    @property
    def captured(self) -> list[int]:
        """The signals that told it to stop."""
        return self._captured_signals


async def _alone(
    listening: Listening,
    shared: _Shared,
    place: Place,
    up: Callable[[], None],
    read: Read | None,
    hangup: Hangup | None,
) -> list[int]:
    """The server where there is one process; returns the signals that ended it."""
    process = Process(place, shared.counters)
    serving, config = _prepared(shared.calls, process)
    server = _Uvicorn(config, up, stopping(hangup), shared.systemd.stopping)
    works: list[Work] = [shared.systemd.keep_alive]
    if read is not None:
        alone = Alone(serving, read, lambda: server.should_exit, shared.systemd)
        serving.reload = alone.outcome
        works.append(alone.run)
        if hangup is not None:
            here = asyncio.get_running_loop()
            hangup.stop = server.handle_exit
            hangup.told = lambda: _soon(here, alone.ask)
            if hangup.asked:
                alone.ask()
    await _serve(serving, config, server, listening, shared, process, works)
    return server.captured


async def _worker(shared: _Shared, first: Place, listening: Listening, link: Link, number: int) -> None:
    """One of several processes, which all have a place of their own."""
    process = Process(replace(first, worker=number), shared.counters, shared.chain)
    shared.crowd.place = number
    serving, config = _prepared(shared.calls, process, shared.crowd)
    server = _Uvicorn(config, link.up, [signal.SIGTERM])
    process.begins = link.first
    serving.reload = link.outcome
    serving.taken = link.taken
    link.stop = server.leave
    await _serve(serving, config, server, listening, shared, process, [partial(link.obey, serving), link.keep_alive])


async def _serve(
    serving: Serving,
    config: uvicorn.Config,
    server: _Uvicorn,
    listening: Listening,
    shared: _Shared,
    process: Process,
    works: list[Work],
) -> None:
    """Serve until told to stop, with this work beside it, and take everything down."""
    tasks: list[asyncio.Task[None]] = []
    try:
        await serving.begin(listening)
        tasks += (asyncio.create_task(work()) for work in works)
        if process.place.worker == 0:
            tasks.append(asyncio.create_task(process.save()))
        if shared.metrics is not None:
            tasks.append(asyncio.create_task(metrics.serve(shared.metrics, process, lambda: serving.current.core)))
        if (held := serving.certificates) is not None:
            config.ssl_context_factory = lambda config, default: held.live
            held.hang_up = server.hang_up
            process.ends = lambda: held.ends
        await server.serve(sockets=[shared.calls])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await serving.end(at_once=server.force_exit)


def _soon(here: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        here.call_soon_threadsafe(work)


def _prepared(bound: Door, process: Process, crowd: Crowd | None = None) -> tuple[Serving, uvicorn.Config]:
    """What a process serves with, and what uvicorn has to know of it."""
    visitor = Visitor.of(0)
    visitor.crowd = crowd
    bound.visitors = visitor
    process.turned_away = lambda: bound.turned_away

    def applied(listening: Listening) -> None:
        limits = listening.settings.limits
        bound.most = _all_descriptors(limits.connections)
        visitor.allow(limits.request_bytes)

    @contextlib.asynccontextmanager
    async def build(listening: Listening) -> AsyncIterator[tuple[Core, App]]:
        settings = listening.settings
        async with (
            running(settings, files=not listening.no_auth, process=process, again=serving.begun) as core,
            _app(listening, core) as app,
        ):
            yield core, app

    serving = Serving(build, applied, tells=process.place.worker == 0)
    config = uvicorn.Config(
        serving,
        http=visitor,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # the audit log is the record; an access log would keep URLs
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN,
    )
    return serving, config


@contextlib.asynccontextmanager
async def _app(listening: Listening, core: Core) -> AsyncIterator[Http]:
    """The ASGI app with both lanes."""
    settings = listening.settings

    async def who(context: protocol.Context) -> tuple[Principal, Request]:
        caller = _caller(context)
        return caller.principal, msgspec.structs.replace(caller.request, rpc_id=context.request_id)

    def failed(context: protocol.Context, problem: Error) -> str:
        _caller(context).problem = problem
        return outside(problem)

    server = protocol.build(core.calls, who, failed, core.call)
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
        settings, settings.server.host, listening.port or settings.server.port, behind_proxy=listening.behind_proxy
    )
    authorization = await oauth.build(core)
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
            additions=[*_additions(core), *(authorization.additions if authorization is not None else ())],
            scopes=authorization.scopes if authorization is not None else None,
            traced=core.call if core.traced else None,
        )
    )
    core.watch.end_streams = app.end_streams
    swept = asyncio.create_task(authorization.sweep()) if authorization is not None else None
    try:
        async with manager.run():
            yield app
    finally:
        if swept is not None:
            swept.cancel()


def _additions(core: Core) -> list[Addition]:
    """What is served beside MCP."""
    found: list[Addition] = []
    if core.signing_in is not None:
        access, passwords = Access(core.settings.auth), core.settings.auth.sessions.enabled
        leave = partial(browsers.forget, core.state)
        found.append(SignIn(core.signing_in, core.authenticator, access, core.recorder, leave, passwords=passwords))
    return found


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
