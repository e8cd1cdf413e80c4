"""One pool per token and database: opened on first use, closed when idle, cut when the token ends.

All pools live under one budget of connections; a full budget closes the longest-idle pool before it refuses.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic

from mcpctl.errors import Error, ForbiddenError, UnauthorizedError, UnavailableError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.cutting import Cut, Outlived, cut, try_again
from mcpctl.postgres.login import OWN, Login
from mcpctl.postgres.ping import takes_connections
from mcpctl.postgres.session import Session
from mcpctl.postgres.terminator import Terminator, unreachable
from mcpctl.postgres.token_pool import TokenPool, UnwantedError
from mcpctl.postgres.verdicts import Verdicts

log = logging.getLogger("mcpctl.pools")
_MINUTE = 60.0
_OFTEN, _SELDOM = 0.25, 15.0
"""Seconds between two tries to end a backend that outlived its cut, in the first minute and after it."""
_LOOK = 0.05
"""Seconds after which whoever waits for room looks again by himself: nobody tells when PostgreSQL ends a backend."""
_PING_SECONDS = 2.0
Told = Callable[..., None]
_Key = tuple[str, int, tuple[str, str | None]]


def ended(principal: Principal) -> str:
    """Why a call was cut. Who comes without a token is cut by the lockdown alone."""
    return f"{'the token ended' if principal.token else 'the server was locked'} while the call ran"


class NarrowedError(ForbiddenError):
    """A call's rights became fewer while it ran. Its token lives."""


@dataclass
class _Shared:
    """What all pools of one database share, whoever they belong to."""

    terminator: Terminator
    verdicts: Verdicts
    turn: asyncio.Lock

    @classmethod
    def of(cls, login: Login, failed: Callable[[str], None]) -> "_Shared":
        verdicts = Verdicts()
        return cls(Terminator(login, verdicts.forget, failed), verdicts, asyncio.Lock())


class Pools:
    """All pools of this process. `told(event, **fields)` hears of each opening and closing; `valid(principal)` says
    whether a principal's token still opens something, `in_force(principal, database)` whether it has all the rights in
    that database that it had when its request came in. `outlived` is the process's. `failed(database)` hears of each
    connection that could not be made."""

    def __init__(
        self,
        budget: int,
        statement_timeout: float,
        told: Told,
        valid: Callable[[Principal], bool],
        in_force: Callable[[Principal, str], bool],
        outlived: Outlived,
        workers: int = 1,
    ) -> None:
        self._shared: dict[tuple[str, str | None], _Shared] = {}
        self._budget = budget
        self._workers = workers
        self._at_once = max(1, budget // 4)
        self._statement_timeout = statement_timeout
        self._told = told
        self.valid = valid
        self._in_force = in_force
        self._pools: dict[_Key, TokenPool] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._queue: list[TokenPool] = []
        self._freed = asyncio.Event()
        self._waiting: list[TokenPool] = []
        self._since: dict[TokenPool, float] = {}
        self._outlived = outlived
        self._cutting = 0
        self._closed = False
        self.ends = "the server stops"
        """What is said of its end."""
        self.failed: Callable[[str], None] = lambda database: None

    def begin(self) -> None:
        """Hear of what outlives a cut, until the end."""
        self._outlived.hearing.append(self._told)

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

    def turn(self, login: Login) -> contextlib.AbstractAsyncContextManager[None]:
        """To be held around `take` and `give_back`: who sees to the settings of a database does so alone, since while
        a value is tried no other login may work. For all other logins it is nothing."""
        if not login.for_settings:
            return contextlib.nullcontext()
        return self._changing.setdefault(login.name, asyncio.Lock())

    async def take(self, principal: Principal, login: Login, task: "asyncio.Task[object] | None" = None) -> Session:
        """A connection of this principal's own pool for that login, to be given back. `task`: the current one."""
        if self._closed:
            raise UnavailableError(self.ends, "ask again in a moment")
        self.check(principal, login.name)
        key = (principal.pool, principal.edition_in(login.name), login.key)
        pool = self._pools.get(key) or await self._opened(key, principal, login)
        pool.terminator.login = login  # its password may be another one by now
        if (session := pool.take_at_hand(task)) is not None:
            return session
        try:
            session = await pool.take()
        except Error:
            self.check(principal, login.name)  # its pool was closed since it was cut: that is the reason
            raise
        try:
            self.check(principal, login.name)  # it may have been cut while this call waited
        except Error:
            await self.give_back(session)
            raise
        return session

    def put_back(self, session: Session) -> bool:
        """`give_back`, where nothing has to be waited for; False where something has, and it is still to be called."""
        return not self._waiting and session.pool.put_back(session)

    async def give_back(self, session: Session) -> None:
        """Have a connection back; one that is not as it was when it was new is closed."""
        pool = session.pool
        try:
            if self._waiting and self._owes(pool):
                await session.leave()
        finally:
            try:
                await pool.give_back(session)
            finally:
                if self._waiting:
                    self._freed.set()

    async def _opened(self, key: _Key, principal: Principal, login: Login) -> TokenPool:
        """The pool of that key, which there has not been."""
        if (shared := self._shared.get(login.key)) is None:
            shared = self._shared[login.key] = _Shared.of(login, lambda database: self.failed(database))
        shared.terminator.login = login
        room = partial(self._make_room, turn=shared.turn)
        pool = TokenPool(shared.terminator, principal, self._statement_timeout, shared.verdicts, room)
        self._pools[key] = pool
        await pool.open()
        self._tell("pool.opened", pool, None)
        return pool

    @property
    def closed(self) -> bool:
        """Whether the server is stopping."""
        return self._closed

    @property
    def budget(self) -> int:
        """The most connections that this process may have."""
        return self._budget

    @property
    def all(self) -> list[TokenPool]:
        """All pools."""
        return list(self._pools.values())

    @property
    def kept(self) -> list[str]:
        """The databases of the logins for each of which a connection is kept to end the others with."""
        return [shared.terminator.login.shown for shared in self._shared.values() if shared.terminator.open]

    def check(self, principal: Principal, database: str) -> None:
        """See that a call may go on there: UnauthorizedError where its token has ended, NarrowedError where its rights
        have become fewer since it came in."""
        if self._in_force(principal, database):
            return
        if not self.valid(principal):
            raise UnauthorizedError(ended(principal), token_id=principal.token)
        raise NarrowedError(
            f"your access to {database!r} was taken or narrowed while the call ran", "whoami shows what you have"
        )

    def _tell(self, event: str, pool: TokenPool, reason: str | None) -> None:
        word = event.removeprefix("pool.")
        owner = pool.principal
        extra = {"about": {"token": owner.token, "user": owner.user, "database": pool.login.shown}}
        shown, left = pool.login.shown, len(self._pools)
        log.info("pool %s for token %s, database %s: %d left", word, pool.short, shown, left, extra=extra)
        self._told(event, token=owner.token, user=owner.user, database=pool.login.shown, reason=reason)

    async def _make_room(self, asking: TokenPool, turn: asyncio.Lock) -> None:
        """Let `asking` connect once more, within the budget. Raises UnavailableError when nothing came free in the time
        that a call waits, or nobody waits any more.

        The connection that is kept for its login comes first, and then no more than a quarter of the budget is being
        opened at once for one database: a host that does not answer, or no longer, cannot take it from the others.
        """
        connecting = False
        self._since[asking] = monotonic()
        try:
            async with asyncio.timeout(asking.login.settings.pool.wait):
                ready = False
                while not ready:
                    connecting = False
                    if not asking.terminator.open:
                        with self._waits(asking):
                            await self._room_within(asking, 0)
                            await self._room_for(asking, 0)
                            asking.terminator.begin()
                    connecting = True
                    ready = await asking.terminator.ready()
                connecting = False
                with self._waits(asking):
                    async with turn:
                        await self._one_more(asking)
        except TimeoutError as late:
            hangs = connecting or self._being_opened(asking.terminator) >= self._at_once
            raise (unreachable(asking.login, late) if hangs else self._full()) from None
        finally:
            self._since.pop(asking, None)

    async def _one_more(self, asking: TokenPool) -> None:
        """Wait until a pool may open one more, and count it. What holds up its own login alone comes before the
        queue of all, so that nobody else waits for it."""
        while self._being_opened(asking.terminator) >= self._at_once:
            self._check_wanted(asking)
            await self._change()
        await self._room_within(asking, 1)
        await self._room_for(asking, 1)
        asking.connecting += 1

    def _being_opened(self, terminator: Terminator) -> int:
        crowd = terminator.login.crowd
        return sum(pool.connecting for pool in self._pools.values() if pool.login.crowd == crowd)

    def _check_wanted(self, asking: TokenPool) -> None:
        if asking.closed or not asking.wanted:
            raise UnwantedError("the pool was closed meanwhile", "ask again in a moment")

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
        """Wait until there is room. Who asks first is first. Nothing is awaited after the last look."""
        self._queue.append(asking)
        try:
            while self._behind(asking) or self._counted(asking, more) > self._budget:
                if self._behind(asking):
                    self._check_wanted(asking)
                    await self._change()
                elif not await self._take_back(asking, None):
                    await self._change()
            self._check_wanted(asking)
        finally:
            self._queue.remove(asking)
            self._freed.set()

    def _behind(self, asking: TokenPool) -> bool:
        """Whether a pool of another login waits for room, of which somebody has asked before anybody of this one."""
        own = self._asked(asking)
        return any(self._asked(pool) < own for pool in self._queue)

    def _asked(self, pool: TokenPool) -> float:
        """Since when a pool's login has been asked for. Those of one login take turns, so that the first of them may be
        waiting for the turn of a later one: that one must not stand back for whom the first would not."""
        return min((since for one, since in self._since.items() if one.terminator is pool.terminator), default=inf)

    async def _room_within(self, asking: TokenPool, more: int) -> None:
        """Wait until a pool's crowd has room; see `_crowd`."""
        while crowd := self._crowd(asking, more):
            if not await self._take_back(asking, crowd):
                await self._change()

    async def _take_back(self, asking: TokenPool, crowd: list[TokenPool] | None) -> bool:
        """Close what nobody uses: the longest-idle pool, what is kept for logins that have nothing open, or what busy
        pools have to spare; whether there was any. `crowd`: only what these pools have; no other would help."""
        self._check_wanted(asking)
        among = list(self._pools.values()) if crowd is None else crowd
        others = sorted((pool for pool in among if pool is not asking), key=lambda pool: pool.last_used)
        idle = [pool for pool in others if pool.idle]
        spare = [session for pool in others for session in pool.spare]
        if idle:
            await self._close(idle[0], "the budget is full")
        if (crowd is None or asking.login.crowd == OWN) and await self._let_go(asking):
            return True
        if spare and not idle:
            await spare[0].leave()
        return bool(idle or spare)

    @contextlib.contextmanager
    def _waits(self, asking: TokenPool) -> Iterator[None]:
        """Note that a pool waits for room, or for its turn to."""
        self._waiting.append(asking)
        try:
            yield
        finally:
            self._waiting.remove(asking)

    def _owes(self, pool: TokenPool) -> bool:
        """Whether a pool whose call has ended has to give its connection up, since another with none, or with two
        fewer, waits for room. Else it would hand it to its own next caller for ever, and the other would starve."""
        return any(
            pool in self._crowd(asking, 1) or self._counted(asking, 1) > self._budget
            for asking in self._waiting
            if asking is not pool and (asking.count == 0 or asking.count + 1 < pool.count)
        )

    def _crowd(self, asking: TokenPool, more: int) -> list[TokenPool]:
        """The pools of which one has to give way first: all tokens' of a user where the login role of one user has as
        much as it may, or all databases' that users have brought, which have half of the budget. Else none."""
        login = asking.login
        if login.role is None:
            return []
        same = [pool for pool in self._pools.values() if pool.terminator is asking.terminator]
        if sum(pool.count for pool in same) + more > max(1, login.settings.pool.max_per_user // self._workers):
            return same
        if login.crowd != OWN:
            return []
        brought = [pool for pool in self._pools.values() if pool.login.crowd == OWN]
        kept = {pool.terminator for pool in brought if pool.count or pool.terminator.open or pool is asking}
        return brought if sum(pool.count for pool in brought) + len(kept) + more > max(2, self._budget // 2) else []

    async def _close(self, pool: TokenPool, reason: str) -> None:
        for key, found in list(self._pools.items()):
            if found is pool:
                del self._pools[key]
                await pool.close()
                self._tell("pool.closed", pool, reason)

    async def _let_go(self, asking: TokenPool | None = None) -> bool:
        """Close what was kept to end backends with, where there is none left to end; whether there was any.

        For the sake of a pool that asks for room, also what others wait for, who have none yet and asked later. Who
        asked first keeps it, if its host answers: else each would close what the others have, and none get further.
        """
        if self._cutting:
            return False
        used = self._outlived.terminators | {
            pool.terminator
            for pool in self._pools.values()
            if pool is asking
            or pool.out
            or pool.count
            or (pool.wanted if asking is None else self._first(pool, asking))
        }
        unused = [(key, shared.terminator) for key, shared in self._shared.items() if shared.terminator not in used]
        found = [terminator for _, terminator in unused if terminator.open]
        for terminator in found:
            await terminator.close()
        for key, terminator in unused:  # of a user who may be gone by now
            if key[1] is not None and not self._wanted(terminator):
                self._shared.pop(key, None)
        return bool(found)

    def _first(self, pool: TokenPool, asking: TokenPool) -> bool:
        """Whether a pool's login was asked for before another's, and its host answers."""
        return self._asked(pool) < self._asked(asking) and pool.terminator.answers

    def _wanted(self, terminator: Terminator) -> bool:
        return terminator.open or any(pool.terminator is terminator for pool in self._pools.values())

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
        """End all that a token has open where it no longer has the rights for it: cancel, terminate, close. Returns
        what was done; see `cutting`."""

        def over(pool: TokenPool) -> bool:
            return self._closed or not self._in_force(pool.principal, pool.login.name)

        return await self._cut(lambda pool: pool.principal.token == token, token, reason, over)

    async def end(self, token: str, reason: str) -> Cut:
        """End all that a token has open, as `cut` does, although the token stays as it is."""
        for pool in self._pools.values():
            if pool.principal.token == token:
                pool.ended = reason
        return await self._cut(lambda pool: pool.principal.token == token, token, reason)

    async def cut_login(self, key: tuple[str, str | None], reason: str) -> Cut:
        """End all that anybody has open as that login, as `cut` does."""
        return await self._cut(lambda pool: pool.login.key == key, None, reason)

    def outlived(self, tokens: Container[str] | None) -> list[int]:
        """The pids of these tokens' backends, or of all, that were cut and have not ended, whatever config was in force
        then. Who comes without a token is ""."""
        return self._outlived.of(lambda pool: tokens is None or (pool.principal.token or "") in tokens)

    async def _cut(
        self,
        theirs: Callable[[TokenPool], bool],
        token: str | None,
        reason: str,
        over: Callable[[TokenPool], bool] = lambda pool: True,
    ) -> Cut:
        """End their pools that are over; what is left of an earlier cut of theirs counts as left, too."""
        victims = [pool for pool in self._pools.values() if theirs(pool) and over(pool)]
        for key, pool in list(self._pools.items()):
            if pool in victims:
                del self._pools[key]
        self._cutting += 1
        try:
            done = await cut(victims)
        finally:
            self._cutting -= 1
        before = self._outlived.of(theirs)
        for terminator, left in done.left:
            self._outlived.follow(asyncio.create_task(self._finish(terminator, left, token, reason)), left)
        for pool in victims:
            self._tell("pool.closed", pool, f"{reason}: {done}")
        await self._let_go()
        self._freed.set()
        done.lingering += before
        done.backends_left += len(before)
        return done

    async def _finish(self, terminator: Terminator, left: list[Session], token: str | None, reason: str) -> None:
        """Stay after backends that outlived a cut, and write when they are gone."""
        pids = ", ".join(str(session.pid) for session in left)

        def tell(what: str) -> None:
            log.info("token %s: %s: backend %s %s", token, reason, pids, what)
            said = f"{reason}: backend {pids} {what}"
            for told in self._outlived.hearing[:1]:  # the config that was in force then may be so no more
                told("query.cancelled", token=token, database=terminator.login.shown, reason=said)

        begun, late = monotonic(), False
        try:
            while still := await try_again(terminator, left):
                left[:] = still
                if not late and monotonic() - begun > _MINUTE:
                    late = True
                    tell("is still there after a minute")
                await asyncio.sleep(_SELDOM if late else _OFTEN)
            tell("is gone")
        finally:
            if self._closed:
                await terminator.close()

    async def close(self) -> None:
        """Cut everything, for the end of the server or of its config."""
        self._closed = True
        ending = {pool.principal.token for pool in self._pools.values()}
        await asyncio.gather(*(self.cut(token, self.ends) for token in ending))
        if self._told in self._outlived.hearing:
            self._outlived.hearing.remove(self._told)
        if not self._outlived.hearing:
            await self._outlived.give_up()
        kept = self._outlived.terminators  # closed when what it is to end has ended
        unused = (shared.terminator for shared in self._shared.values() if shared.terminator not in kept)
        await asyncio.gather(*(terminator.close() for terminator in unused))


async def reachable(login: Login) -> bool:
    """Whether the database's server takes connections now; it has two seconds to say so."""
    return await takes_connections(login.dsn(), _PING_SECONDS)
