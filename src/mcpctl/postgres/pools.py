"""One pool per token and database: opened on first use, closed when idle, cut when the token ends.

All pools live under one budget of connections; a full budget closes the longest-idle pool before it refuses.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from mcpctl.errors import Error, UnauthorizedError, UnavailableError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.cutting import Cut, cut, try_again
from mcpctl.postgres.login import Login
from mcpctl.postgres.ping import takes_connections
from mcpctl.postgres.terminator import Terminator, unreachable
from mcpctl.postgres.token_pool import Session, TokenPool
from mcpctl.postgres.verdicts import Verdicts

log = logging.getLogger("mcpctl.pools")
_MINUTE = 60.0
_OFTEN, _SELDOM = 0.25, 15.0
"""Seconds between two tries to end a backend that outlived its cut, in the first minute and after it."""
_LOOK = 0.05
"""Seconds after which whoever waits for room looks again by himself: nobody tells when PostgreSQL ends a backend."""
_PING_SECONDS = 2.0
Told = Callable[..., None]


@dataclass
class _Shared:
    """What all pools of one database share, whoever they belong to."""

    terminator: Terminator
    verdicts: Verdicts
    turn: asyncio.Lock

    @classmethod
    def of(cls, login: Login) -> "_Shared":
        verdicts = Verdicts()
        return cls(Terminator(login, verdicts.forget), verdicts, asyncio.Lock())


class Pools:
    """All pools of this process. `told(event, **fields)` hears of each opening and closing; `valid(principal)` says
    whether a principal still is what it was when its request came in."""

    def __init__(
        self,
        logins: Mapping[str, Login],
        budget: int,
        statement_timeout: float,
        told: Told,
        valid: Callable[[Principal], bool],
    ) -> None:
        self._shared = {name: _Shared.of(login) for name, login in logins.items()}
        self._budget = budget
        self._at_once = max(1, budget // 4)
        self._statement_timeout = statement_timeout
        self._told = told
        self._valid = valid
        self._pools: dict[tuple[str, str], TokenPool] = {}
        self._room = asyncio.Lock()
        self._freed = asyncio.Event()
        self._finishing: set[asyncio.Task[None]] = set()
        self._cutting = 0
        self._closed = False

    def _counted(self, asking: TokenPool, more: int) -> int:
        """Connections, as they would be with `more` of that pool's and the one that is kept for its login.

        Backends that were told to end, and may not have yet, count for their own database alone: while a host hangs
        nobody knows, and the other databases must not have to wait for it.
        """
        found = more + sum(
            pool.count - (0 if pool.terminator is asking.terminator else len(pool.lingering))
            for pool in self._pools.values()
        )
        kept = {pool.terminator for pool in self._pools.values() if pool.count or pool is asking}
        kept.update(shared.terminator for shared in self._shared.values() if shared.terminator.open)
        return found + len(kept)

    @contextlib.asynccontextmanager
    async def borrow(self, principal: Principal, database: str) -> AsyncIterator[Session]:
        """A connection of this principal's own pool for that database; given back, clean or closed, afterwards."""
        pool = await self._pool(principal, database)
        try:
            session = await pool.take()
        except Error:
            self._check(principal)  # its pool was closed since it was cut: that is the reason
            raise
        try:
            self._check(principal)  # it may have been cut while this call waited
            yield session
        finally:
            try:
                await pool.give_back(session)
            finally:
                self._freed.set()

    async def _pool(self, principal: Principal, database: str) -> TokenPool:
        if self._closed:
            raise UnavailableError("the server is stopping", "ask again in a moment")
        self._check(principal)
        key = (principal.pool, database)
        pool = self._pools.get(key)
        if pool is None:
            shared = self._shared[database]
            pool = TokenPool(
                shared.terminator,
                principal,
                self._statement_timeout,
                shared.verdicts,
                lambda asking: self._make_room(asking),
            )
            self._pools[key] = pool
            await pool.open()
            self._tell("pool.opened", pool, None)
        return pool

    @property
    def closed(self) -> bool:
        """Whether the server is stopping."""
        return self._closed

    def valid(self, principal: Principal) -> bool:
        """Whether a principal still is what it was when its request came in."""
        return self._valid(principal)

    def _check(self, principal: Principal) -> None:
        if not self._valid(principal):
            raise UnauthorizedError("the token ended while the call was on its way", token_id=principal.token)

    def _tell(self, event: str, pool: TokenPool, reason: str | None) -> None:
        word = event.removeprefix("pool.")
        log.info("pool %s for token %s, database %s: %d left", word, pool.short, pool.login.name, len(self._pools))
        owner = pool.principal
        self._told(event, token=owner.token, user=owner.user, database=pool.login.name, reason=reason)

    async def _make_room(self, asking: TokenPool) -> None:
        """Let `asking` connect once more, within the budget. Raises UnavailableError when nothing came free in the time
        that a call waits, or nobody waits any more.

        The connection that is kept for its login comes first, and then no more than a quarter of the budget is being
        opened at once for one database: a host that does not answer, or no longer, cannot take it from the others.
        """
        connecting = False
        try:
            async with asyncio.timeout(asking.login.settings.pool.wait):
                ready = False
                while not ready:
                    connecting = False
                    if not asking.terminator.open:
                        async with self._room:
                            await self._room_for(asking, 0)
                            asking.terminator.begin()
                    connecting = True
                    ready = await asking.terminator.ready()
                connecting = False
                async with self._shared[asking.login.name].turn:
                    while self._being_opened(asking.terminator) >= self._at_once:
                        self._check_wanted(asking)
                        await self._change()
                    async with self._room:
                        await self._room_for(asking, 1)
                        asking.connecting += 1
        except TimeoutError as late:
            hangs = connecting or self._being_opened(asking.terminator) >= self._at_once
            raise (unreachable(asking.login, late) if hangs else self._full()) from None

    def _being_opened(self, terminator: Terminator) -> int:
        return sum(pool.connecting for pool in self._pools.values() if pool.terminator is terminator)

    def _check_wanted(self, asking: TokenPool) -> None:
        if asking.closed or not asking.wanted:
            raise self._full()

    async def _change(self) -> None:
        """Wait until there may be room."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._freed.wait()

    def _full(self) -> UnavailableError:
        return UnavailableError(
            f"all {self._budget} database connections of this server are in use", "ask again in a moment"
        )

    async def _room_for(self, asking: TokenPool, more: int) -> None:
        """Wait until there is room: the longest-idle pool gives way, then what busy ones have to spare, or a call ends.
        Who asks first is first."""
        while self._counted(asking, more) > self._budget:
            self._check_wanted(asking)
            others = sorted(
                (pool for pool in self._pools.values() if pool is not asking), key=lambda pool: pool.last_used
            )
            idle = [pool for pool in others if pool.idle]
            spare = [session for pool in others for session in pool.spare]
            if idle:
                await self._close(idle[0], "the budget is full")
                await self._let_go(asking)
            elif await self._let_go(asking):
                pass
            elif spare:
                await spare[0].leave()
            else:
                await self._change()
        self._check_wanted(asking)

    async def _close(self, pool: TokenPool, reason: str) -> None:
        for key, found in list(self._pools.items()):
            if found is pool:
                del self._pools[key]
                await pool.close()
                self._tell("pool.closed", pool, reason)

    async def _let_go(self, asking: TokenPool | None = None) -> bool:
        """Close what was kept to end backends with, where there is none left to end; whether there was any.

        For the sake of a pool that asks for room, also what others wait for, who have none yet.
        """
        if self._cutting or self._finishing:
            return False
        used = {
            pool.terminator
            for pool in self._pools.values()
            if pool is asking or pool.out or pool.count or (asking is None and pool.wanted)
        }
        unused = [
            shared.terminator
            for shared in self._shared.values()
            if shared.terminator.open and shared.terminator not in used
        ]
        for terminator in unused:
            await terminator.close()
        return bool(unused)

    async def sweep(self) -> None:
        """Close the pools that nobody has used for their `max_idle`, and tell backends again that would not end."""
        for pool in list(self._pools.values()):
            if lingering := pool.lingering:
                left = await try_again(pool.terminator, lingering)
                for session in lingering:
                    session.lingers = session in left
        now = monotonic()
        await asyncio.gather(*(
            self._close(pool, "idle")
            for pool in self._pools.values()
            if pool.idle and now - pool.last_used > pool.login.settings.pool.max_idle
        ))  # fmt: skip
        await self._let_go()
        for terminator in {pool.terminator for pool in self._pools.values() if pool.count}:
            terminator.begin()  # it may have been ended under a query that runs; nobody waits for it here

    async def cut(self, token: str | None, reason: str) -> Cut:
        """End all that a token has open: cancel, terminate, close. Returns what was done; see `cutting`."""
        victims = [pool for pool in self._pools.values() if pool.principal.token == token]
        for key, pool in list(self._pools.items()):
            if pool in victims:
                del self._pools[key]
        self._cutting += 1
        try:
            done = await cut(victims)
        finally:
            self._cutting -= 1
        for terminator, left in done.left:
            task = asyncio.create_task(self._finish(terminator, left, token, reason))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        for pool in victims:
            self._tell("pool.closed", pool, f"{reason}: {done}")
        await self._let_go()
        self._freed.set()
        return done

    async def _finish(self, terminator: Terminator, left: list[Session], token: str | None, reason: str) -> None:
        """Stay after backends that outlived a cut, and write when they are gone."""
        pids = ", ".join(str(session.pid) for session in left)

        def tell(what: str) -> None:
            log.info("token %s: %s: backend %s %s", token, reason, pids, what)
            said = f"{reason}: backend {pids} {what}"
            self._told("query.cancelled", token=token, database=terminator.login.name, reason=said)

        begun, late = monotonic(), False
        while left := await try_again(terminator, left):
            if not late and monotonic() - begun > _MINUTE:
                late = True
                tell("is still there after a minute")
            await asyncio.sleep(_SELDOM if late else _OFTEN)
        tell("is gone")

    async def close(self) -> None:
        """Cut everything, for the end of the server."""
        self._closed = True
        ending = {pool.principal.token for pool in self._pools.values()}
        await asyncio.gather(*(self.cut(token, "the server stops") for token in ending))
        for task in self._finishing:
            task.cancel()
        await asyncio.gather(*self._finishing, return_exceptions=True)
        await asyncio.gather(*(shared.terminator.close() for shared in self._shared.values()))

    async def reachable(self, database: str) -> bool:
        """Whether the database's server takes connections now; it has two seconds to say so."""
        return await takes_connections(self.login(database).dsn(), _PING_SECONDS)

    def login(self, database: str) -> Login:
        """The login of a database of the config."""
        return self._shared[database].terminator.login
