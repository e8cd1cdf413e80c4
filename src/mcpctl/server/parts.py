"""The one place that builds the long-lived objects, and takes them down again."""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from mcpctl import __version__, control
from mcpctl.audit import log as audit_log
from mcpctl.audit.anchors import Anchors
from mcpctl.audit.durable import Durable
from mcpctl.calls import Calls
from mcpctl.canaries import Canaries
from mcpctl.config_keys import Auth, Settings
from mcpctl.errors import ConfigError
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.guest_book import GuestBook
from mcpctl.identity.password_queue import Passwords
from mcpctl.identity.sessions import Sessions, rules_of
from mcpctl.identity.tokens import utcnow
from mcpctl.identity.vouched import Visitors
from mcpctl.keyring import Keyring, place
from mcpctl.policy.access import Access
from mcpctl.policy.limits import Limiter
from mcpctl.policy.sign_ins import SignIns
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.postgres.pools import Pools
from mcpctl.postgres.wire import large_blocks_apart
from mcpctl.recorder import Recorder
from mcpctl.server.live import Live, Place, Process
from mcpctl.server.tracing import Call, Traces
from mcpctl.server.watch import Watch
from mcpctl.signing_in import SigningIn
from mcpctl.state import State

log = logging.getLogger("mcpctl")


@dataclass
class Core:
    """What every way of serving needs."""

    settings: Settings
    authenticator: Authenticator
    logins: Logins
    pools: Pools
    calls: Calls
    recorder: Recorder
    watch: Watch
    live: Live
    state: State
    call: Call
    """Answers a call: with a trace, where the config wants that."""
    traced: bool
    signing_in: SigningIn | None = None
    """Where users may sign in with a password."""
    quiet: bool = False
    """Whether its end is not the server's: another one has taken its place."""


@contextlib.asynccontextmanager
async def running(
    settings: Settings, *, files: bool, process: Process | None = None, again: bool = False
) -> AsyncIterator[Core]:
    """Everything built and looked after; cut and closed at the end. `files`: whether tokens are in use at all;
    `process`: what this process keeps while the config changes (None: it shares nothing with others), `again`: whether
    it has served with another already."""
    if not settings.databases:
        raise ConfigError("the config names no database", "add one below `databases:`; config.example.yaml shows how")
    keyring = Keyring(place(settings.keyring.file))
    logins = Logins(settings.databases, keyring)
    auth = settings.auth
    process = process or Process(Place(f"{os.getpid()}-{secrets.token_hex(4)}"))
    limiter = Limiter(settings.limits, process.counters)
    authenticator = Authenticator(
        auth.token_file,
        auth.user_file,
        auth.tenant_file,
        fewer=Access(auth).fewer,
        twins=logins.twins,
        databases=settings.databases,
        wrong=limiter.wrong,
        over=process.over,
        kept_out=process.kept_out,
    )
    if not files:
        authenticator.check_local()
    elif process.begins or again:  # who takes a dead worker's place refuses calls meanwhile, as the others do
        logins.check_sealed(authenticator.read().people)
    key = audit_log.read_key(settings.audit.key_file)
    spare = auth.token_file.parent
    book = audit_log.AuditLog(settings.audit.file, key, utcnow, spare=spare, others=process.chain)
    if process.begins or again:
        book.check_key()
    refuse = settings.audit.on_failure == "refuse"
    anchors = Anchors(book, settings.audit.anchor_file, utcnow)
    durable = Durable(book, anchors, settings.audit.sync, refuse=refuse)
    metrics = process.metrics
    metrics.know(settings.databases)
    recorder = Recorder(
        book,
        settings.audit.statements,
        refuse=refuse,
        count=metrics.count,
        line=limiter.line,
        greeted=process.greeted,
        late=process.late,
    )
    large_blocks_apart()
    pools = Pools(
        max(2, settings.limits.connections // process.place.workers),
        settings.limits.statement_timeout,
        recorder.note,
        authenticator.still_valid,
        authenticator.in_force,
        process.outlived,
        process.place.workers,
    )
    pools.failed = metrics.connection_failed
    own = Own(settings, keyring, pools)
    logins.brought = own.has
    if files:
        own.start()
        authenticator.sessions = sign_in_sessions(auth, own.state)
        if auth.oidc:
            from mcpctl.identity.oidc import Issuers  # it brings httpx2 and PyJWT: a third of a second

            authenticator.visitors = Visitors(Issuers(auth.oidc, utcnow))
            authenticator.guests = GuestBook(own.state, utcnow)
    canaries = Canaries(settings, own.state, authenticator, recorder, logins.twins, process.counters.unwritten)
    if files:
        canaries.start()
    calls = Calls(
        settings, logins, own, pools, recorder, limiter, canaries, durable.answering if durable.waits else None
    )
    traces = Traces(settings.tracing, calls) if settings.tracing.endpoint is not None else None
    call: Call = traces.call if traces is not None else calls.call
    folder = control.folder_of(settings.server.runtime_dir, settings.auth.token_file)
    watch = Watch(authenticator, calls, pools, recorder, folder, lambda: 0, keyring.ids, own, process.told)
    watch.answers.add({"audit_end": durable.end})
    watch.was_cut = metrics.cut
    watch.hear()
    live = Live(settings, process, authenticator, logins, pools, calls, recorder, durable.lag)
    watch.answers.add(live.answers())
    signing_in = passwords = None
    if authenticator.sessions is not None:
        passwords = Passwords()
        limits = SignIns(settings.limits.failed_sign_ins, process.counters)
        signing_in = SigningIn(authenticator, authenticator.sessions, passwords, limits, recorder)
    core = Core(
        settings,
        authenticator,
        logins,
        pools,
        calls,
        recorder,
        watch,
        live,
        own.state,
        call,
        traces is not None,
        signing_in,
    )
    tasks, begun = [], False
    pools.begin()
    try:
        async with contextlib.AsyncExitStack() as stack:
            if files:
                await stack.enter_async_context(watch.listening(process.sockets, begins=process.begins))
                if not again:
                    await watch.learn()
            tasks.append(asyncio.create_task(watch.run() if files else watch.look_for_lock()))
            if not again:
                recorder.note(
                    "server.started", reason=f"mcpctl {__version__}, pid {os.getpid()}, config {digest(settings)}"
                )
            tasks.append(asyncio.create_task(durable.run()))
            begun = True
            yield core
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pools.close()
        recorder.flush(everything=True)
        if core.quiet or (again and not begun):
            recorder.catch_up()  # what it cannot write yet its successor does: the process has it still
        else:
            if begun:
                recorder.note("server.stopped", reason=f"pid {os.getpid()}")
            recorder.close()
        await durable.close()
        if traces is not None:
            await traces.close()
        if authenticator.visitors is not None:
            await authenticator.visitors.close()
        if passwords is not None:
            await asyncio.to_thread(passwords.close)  # on a busy machine it takes a process seconds to die
        authenticator.close()
        own.close()
        book.close()


def sign_in_sessions(auth: Auth, state: State) -> Sessions | None:
    """The sessions of an installation; None where nobody can sign in."""
    rules = rules_of(auth)
    return Sessions(state, rules) if rules else None


def digest(settings: Settings) -> str:
    """The beginning of the config file's SHA-256, as sha256sum prints it: it shows in the audit log that the file was
    changed, whoever did it and with what."""
    if settings.source is None:
        return "none"
    try:
        return hashlib.sha256(settings.source.read_bytes()).hexdigest()[:12]
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
