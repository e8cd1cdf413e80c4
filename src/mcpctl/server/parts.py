"""The one place that builds the long-lived objects, and takes them down again."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from mcpctl import __version__, control
from mcpctl.audit import log as audit_log
from mcpctl.audit.anchors import Anchors
from mcpctl.audit.durable import Durable
from mcpctl.calls import Calls
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.tokens import utcnow
from mcpctl.keyring import Keyring, place
from mcpctl.policy.access import Access
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.postgres.pools import Pools
from mcpctl.postgres.wire import large_blocks_apart
from mcpctl.recorder import Recorder
from mcpctl.server.watch import Watch

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


@contextlib.asynccontextmanager
async def running(settings: Settings, *, files: bool, workers: int = 1) -> AsyncIterator[Core]:
    """Everything built and looked after; cut and closed at the end. `files`: whether tokens are in use at all."""
    if not settings.databases:
        raise ConfigError("the config names no database", "add one below `databases:`; config.example.yaml shows how")
    keyring = Keyring(place(settings.keyring.file))
    logins = Logins(settings.databases, keyring)
    auth = settings.auth
    authenticator = Authenticator(
        auth.token_file,
        auth.user_file,
        auth.tenant_file,
        fewer=Access(auth).fewer,
        twins=logins.twins,
        databases=settings.databases,
    )
    if files:
        logins.check_sealed(authenticator.read().people)
    else:
        authenticator.local()
    key = audit_log.read_key(settings.audit.key_file)
    book = audit_log.AuditLog(settings.audit.file, key, utcnow)
    recorder = Recorder(book, settings.audit.statements, refuse=settings.audit.on_failure == "refuse")
    anchors = Anchors(book, settings.audit.anchor_file, utcnow)
    durable = Durable(book, anchors, settings.audit.sync, refuse=settings.audit.on_failure == "refuse")
    large_blocks_apart()
    pools = Pools(
        max(2, settings.limits.connections // workers),
        settings.limits.statement_timeout,
        recorder.note,
        authenticator.still_valid,
        authenticator.in_force,
        workers,
    )
    own = Own(settings, keyring, pools)
    logins.brought = own.has
    if files:
        own.start()
    calls = Calls(settings, logins, own, pools, recorder, durable.answering)
    folder = control.folder_of(settings.server.runtime_dir, settings.auth.token_file)
    watch = Watch(authenticator, calls, pools, recorder, folder, lambda: 0, keyring.ids, own)
    watch.audit_end = durable.end
    core = Core(settings, authenticator, logins, pools, calls, recorder, watch)
    tasks = []
    try:
        async with contextlib.AsyncExitStack() as stack:
            if files:
                await stack.enter_async_context(watch.listening())
                tasks.append(asyncio.create_task(watch.run()))
            recorder.note("server.started", reason=f"mcpctl {__version__}, pid {os.getpid()}")
            tasks.append(asyncio.create_task(durable.run()))
            yield core
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pools.close()
        recorder.flush(everything=True)
        recorder.note("server.stopped", reason=f"pid {os.getpid()}")
        await durable.close()
        authenticator.close()
        own.close()
        book.close()
