"""Ending what a token has open, for good: cancel, terminate, close the socket; then look that it is gone.

A function that catches `query_canceled` outlives a cancel, so what is left is terminated by a connection of the same
role that is kept for it (`terminator.py`). Where that one was lost and cannot be had again, the closed socket ends the
backend within `client_connection_check_interval`, and what survives even that is told again until it is gone.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mcpctl.postgres.session import Session
from mcpctl.postgres.terminator import Terminator
from mcpctl.postgres.token_pool import TokenPool

log = logging.getLogger("mcpctl.pools")
GRACE = 0.1
"""Seconds that a cancelled statement has before its backend is terminated."""
PATIENCE = 0.6
"""Seconds after which the sockets are closed whatever the backends do."""
RENEWED = "the password of the database's login was changed while the call ran"
"""Why a pool is cut whose login got another password: the next call's connection takes it."""
_LOOK = 0.5
_BURST = 0.2


@dataclass
class Cut:
    """What was done. Reads as `2 queries cancelled, 0 backends left`."""

    queries: int = 0
    backends_left: int = 0
    lingering: list[int] = field(default_factory=list)
    left: list[tuple[Terminator, list[Session]]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        word = "query" if self.queries == 1 else "queries"
        left = "backend" if self.backends_left == 1 else "backends"
        text = f"{self.queries} {word} cancelled, {self.backends_left} {left} left"
        return text + (f" (pid {', '.join(map(str, self.lingering))})" if self.lingering else "")


class Outlived:
    """The backends that outlived their cut, by the task that ends them. A process has one, since they outlive the
    config that was in force, too: `hearing` is who is told of them, for each config that is in force or about to be."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Task[None], list[Session]] = {}
        self.hearing: list[Callable[..., None]] = []

    def follow(self, task: asyncio.Task[None], left: list[Session]) -> None:
        """Know these until that task, which ends them, has done so; for good where it fails: nobody knows then."""
        self._left[task] = left
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            del self._left[task]

    def of(self, theirs: Callable[[TokenPool], bool]) -> list[int]:
        """The pids of those of these pools."""
        return [session.pid for left in self._left.values() for session in left if theirs(session.pool)]

    @property
    def terminators(self) -> set[Terminator]:
        """What they are ended with."""
        return {session.pool.terminator for left in self._left.values() for session in left}

    async def give_up(self) -> None:
        """Leave them alone, at the end of the server."""
        for task in (tasks := list(self._left)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cut(pools: Sequence[TokenPool]) -> Cut:
    """Cut these pools, which nobody can find any more; see the module. Takes little more than a second at most."""
    closing = [asyncio.create_task(pool.close()) for pool in pools]
    done = Cut(queries=sum(len(pool.out) for pool in pools))
    victims: dict[Terminator, list[Session]] = {}
    for pool in pools:
        victims.setdefault(pool.terminator, []).extend(pool.sessions.values())
    left = await asyncio.gather(*(_cut_backends(terminator, found) for terminator, found in victims.items()))
    done.left = [(terminator, found) for terminator, found in zip(victims, left, strict=True) if found]
    done.lingering = [session.pid for found in left for session in found]
    done.backends_left = len(done.lingering)
    await asyncio.gather(*closing, return_exceptions=True)
    return done


async def try_again(terminator: Terminator, left: list[Session]) -> list[Session]:
    """Tell backends to end that outlived a cut; those that still do. Takes a moment."""
    return await _terminated(terminator, left, asyncio.get_running_loop().time() + _BURST)


async def _cut_backends(terminator: Terminator, sessions: list[Session]) -> list[Session]:
    """End these backends of one login; those that were still there at the end, as far as could be seen."""
    if not sessions:
        return []
    running = [session for session in sessions if session.task is not None]
    for session in running:
        session.cut = True
    cancels = [asyncio.create_task(session.cancel(PATIENCE)) for session in running]
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while any(session.task for session in running) and loop.time() - begun < GRACE:  # noqa: ASYNC110 - for GRACE at most
        await asyncio.sleep(0.005)
    left = await _terminated(terminator, sessions, begun + PATIENCE)
    for session in sessions:
        if session.task is not None:
            session.task.cancel()
        elif not session.conn.closed:
            session.close()
    await asyncio.gather(*cancels, return_exceptions=True)
    # The sockets are closed now: whether what was left is gone too, as far as it can be seen.
    return await _terminated(terminator, left, loop.time() + _LOOK)


async def _terminated(terminator: Terminator, left: list[Session], until: float) -> list[Session]:
    """Tell these backends to end until none is there any more, or until that time of the loop; those that may be.

    What a pooler has passed on, or is about to, is somebody else's: it is left alone.
    """
    loop = asyncio.get_running_loop()
    while (left := [session for session in left if not session.passes_on]) and loop.time() < until:
        left = await _still_there(terminator, left, until - loop.time())
        if left:
            await asyncio.sleep(0.01)
    return left


async def _still_there(terminator: Terminator, left: list[Session], patience: float) -> list[Session]:
    """Tell these backends to end, each on the host that it is on; those that may still be there."""
    found: list[Session] = []
    for place in {session.place for session in left}:
        asked = [session for session in left if session.place == place]
        backends = [session.backend for session in asked]
        if place == terminator.place:
            there = await terminator.terminate(backends, patience)
            there = there if place == terminator.place else None  # it was made anew, and leads to another host now
        else:
            there = await terminator.terminate_at(place, backends)
        found += [session for session in asked if there is None or session.pid in there]
    return found


async def end(session: Session) -> None:
    """End one backend that would not be cancelled: terminate it, and close the socket."""
    loop = asyncio.get_running_loop()
    if await _terminated(session.pool.terminator, [session], loop.time() + 0.3):
        log.warning("backend %d was told to end, and may still be there", session.pid)
        session.lingers = True
    session.close()
