"""Ending what a token has open, for good: cancel, terminate by a sibling, close the socket; then look that it is gone.

A function that catches `query_canceled` outlives a cancel, so a second connection of the same role terminates what is
left (any role may terminate its own backends). Where the role has no connection free, the cancelled backends make
room; where even that fails, the closed socket ends the backend within `client_connection_check_interval`.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import AsyncConnection

from mcpctl.errors import Error
from mcpctl.postgres.login import Login
from mcpctl.postgres.token_pool import Session, TokenPool

log = logging.getLogger("mcpctl.pools")
GRACE = 0.1
"""Seconds that a cancelled statement has before its backend is terminated."""
_AGAIN, _TRIES = 0.25, 240
PATIENCE = 0.6
"""Seconds after which the sockets are closed whatever the backends do."""

_TERMINATE = """
SELECT a.pid, pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
WHERE (a.pid, a.backend_start::text) IN (SELECT * FROM unnest(%s::int[], %s::text[]))
"""


@dataclass
class Cut:
    """What was done. Reads as `2 queries cancelled, 0 backends left`."""

    queries: int = 0
    backends_left: int = 0
    lingering: list[int] = field(default_factory=list)
    left: list[tuple[Login, list[Session]]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        word = "query" if self.queries == 1 else "queries"
        left = "backend" if self.backends_left == 1 else "backends"
        text = f"{self.queries} {word} cancelled, {self.backends_left} {left} left"
        return text + (f" (pid {', '.join(map(str, self.lingering))})" if self.lingering else "")


async def cut(pools: Sequence[TokenPool]) -> Cut:
    """Cut these pools, which nobody can find any more; see the module. Takes about a second at the very most."""
    closing = [asyncio.create_task(pool.close()) for pool in pools]
    done = Cut(queries=sum(len(pool.out) for pool in pools))
    by_login: dict[str, tuple[Login, list[Session]]] = {}
    for pool in pools:
        _, found = by_login.setdefault(pool.login.name, (pool.login, []))
        found.extend(pool.sessions.values())
    left = await asyncio.gather(*(_cut_backends(login, sessions) for login, sessions in by_login.values()))
    done.left = [(login, found) for (login, _), found in zip(by_login.values(), left, strict=True) if found]
    done.lingering = [session.pid for found in left for session in found]
    done.backends_left = len(done.lingering)
    await asyncio.gather(*closing, return_exceptions=True)
    return done


async def finish(login: Login, left: list[Session]) -> bool:
    """Go on telling backends to end that outlived a cut, for a minute; whether they are gone."""
    for _ in range(_TRIES):
        await asyncio.sleep(_AGAIN)
        terminator = await _open(login)
        if terminator is None:
            continue
        try:
            if await _terminate(terminator, left):
                return True
        finally:
            await terminator.close()
    return False


async def _cut_backends(login: Login, sessions: list[Session]) -> list[Session]:
    """End these backends of one login; those that were still there at the end, as far as could be seen."""
    if not sessions:
        return []
    running = [session for session in sessions if session.task is not None]
    for session in running:
        session.cut = True
    cancels = [asyncio.create_task(session.cancel()) for session in running]
    opening = asyncio.create_task(_open(login))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while any(session.task for session in running) and loop.time() - begun < GRACE:  # noqa: ASYNC110 - for GRACE at most
        await asyncio.sleep(0.005)
    terminator = (await opening) or (await _open(login))  # what the cancels freed may let us in now
    left = list(sessions)
    try:
        while terminator is not None and loop.time() - begun < PATIENCE:
            gone = await _terminate(terminator, left)
            if gone is None:
                terminator = None
            elif gone:
                left = []
                break
            await asyncio.sleep(0.01)
    finally:
        if terminator is not None:
            await terminator.close()
    for session in sessions:
        if session.task is not None:
            session.task.cancel()
        elif not session.conn.closed:
            session.close()
    await asyncio.gather(*cancels, return_exceptions=True)
    if not left:
        return []
    return await _look_again(login, left)


async def _look_again(login: Login, left: list[Session]) -> list[Session]:
    """Their sockets are closed; whether the backends are gone too, as far as a new connection can be had to look."""
    looker = await _open(login)
    if looker is None:
        return left
    try:
        for _ in range(30):
            gone = await _terminate(looker, left)
            if gone:
                return []
            await asyncio.sleep(0.02)
        return left
    finally:
        await looker.close()


async def _open(login: Login) -> AsyncConnection[Any] | None:
    """A connection of the same role beside the pool; None where none can be had."""
    try:
        async with asyncio.timeout(0.5):
            return await AsyncConnection.connect(
                login.dsn(), autocommit=True, prepare_threshold=None, application_name="mcpctl cut"
            )
    except (psycopg.Error, Error, TimeoutError, OSError) as problem:
        log.debug("no connection to terminate with: %s", problem)
        return None


async def _terminate(terminator: AsyncConnection[Any], sessions: Iterable[Session]) -> bool | None:
    """Tell these backends to end; True when none is there any more, None when the terminator is lost itself."""
    pids = [session.pid for session in sessions]
    starts = [session.started for session in sessions]
    try:
        rows = await (await terminator.execute(_TERMINATE, (pids, starts))).fetchall()
    except psycopg.Error as problem:
        log.debug("terminating: %s", problem)
        return None
    return not rows


async def end(session: Session) -> None:
    """End one backend that would not be cancelled: terminate it by a sibling, and close the socket."""
    terminator = await _open(session.pool.login)
    if terminator is not None:
        try:
            for _ in range(20):
                if await _terminate(terminator, [session]) is not False:
                    break
                await asyncio.sleep(0.01)
            else:
                log.warning("backend %d was told to end, and is still there", session.pid)
        finally:
            await terminator.close()
    session.close()
