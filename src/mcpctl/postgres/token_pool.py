"""The pool of one token for one database: psycopg_pool, with the failures told at once and every backend known."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic, time
from typing import Any

import psycopg_pool
from psycopg import pq

from mcpctl.errors import Error, ForbiddenError, UnavailableError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.login import POOLED_LOGINS, SETTINGS, SHARED_BACKENDS, Login
from mcpctl.postgres.session import Connection, Session, Use
from mcpctl.postgres.shape import Loaders
from mcpctl.postgres.terminator import Terminator, alive, bounded, ending, unreachable
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.postgres.wire import Wire

log = logging.getLogger("mcpctl.pools")
_LEFT = 1000
_AT_HAND, _LATELY = 5.0, 0.05
"""Seconds that a connection is kept for the next call before psycopg_pool has it back."""
_IDLE = pq.TransactionStatus.IDLE
TELL = "tell the administrator"
Turn = asyncio.Future[Session | None]
MakeRoom = Callable[["TokenPool"], Awaitable[None]]


class UnwantedError(UnavailableError):
    """Nobody waits any more for the connection that there was to be room for."""


class TokenPool:
    """See the module. `make_room(pool)` is awaited before each new connection, and adds one to its `connecting`.
    `ended` says why it was ended, where its token was not."""

    def __init__(
        self,
        terminator: Terminator,
        principal: Principal,
        timeout: float,
        verdicts: Verdicts,
        make_room: MakeRoom,
    ) -> None:
        settings = terminator.login.settings.pool
        self.terminator = terminator
        self.principal = principal
        self.verdicts = verdicts
        self.short = principal.token or principal.pool
        self.sessions: dict[Connection, Session] = {}
        self.out: set[Session] = set()
        self.last_used = monotonic()
        self.opened = time()
        self.ended: str | None = None
        self._timeout = timeout
        self._make_room = make_room
        self.connecting = 0
        self._room: asyncio.Future[None] | None = None
        self._waiting: dict[asyncio.Timeout, Error | None] = {}
        self._wait = settings.wait
        self._left = 0
        self._hand: list[Session] = []
        self._turns: deque[tuple[float, Turn]] = deque()
        self._turning: asyncio.TimerHandle | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._laying: set[asyncio.Task[None]] = set()
        self._pool = self._new()

    def _new(self) -> "psycopg_pool.AsyncConnectionPool[Connection]":
        settings = self.login.settings.pool
        return psycopg_pool.AsyncConnectionPool(
            self._conninfo,
            connection_class=Connection,
            kwargs={
                "autocommit": True,
                "prepare_threshold": None,
                "client_encoding": "UTF8",
                "application_name": f"mcpctl {self.short}",
                "failed": self._failed,
            },
            min_size=0,
            max_size=settings.max_size,
            max_lifetime=settings.max_lifetime,
            max_idle=settings.max_idle,
            timeout=settings.wait,
            reconnect_timeout=0,  # the next caller tries again; nobody waits for a database that is down
            num_workers=1,
            open=False,
            configure=self._configure,
            name=f"token {self.short}, database {self.login.shown}",
        )

    @property
    def login(self) -> Login:
        """Who logs in; the password in it is that of now."""
        return self.terminator.login

    @property
    def count(self) -> int:
        """Connections open or being opened, or whose backend may still be there."""
        for conn, session in list(self.sessions.items()):
            if conn.closed and not session.lingers and session not in self.out:
                del self.sessions[conn]
        return len(self.sessions) + self.connecting

    @property
    def idle(self) -> bool:
        """Nobody uses it, waits for it, or is being connected, and nothing of it lingers."""
        return not (self.out or self.wanted or self.connecting or self.lingering)

    @property
    def lingering(self) -> list[Session]:
        """Those that were told to end, and have not yet."""
        return [session for session in self.sessions.values() if session.lingers]

    @property
    def spare(self) -> list[Session]:
        """Those that nobody uses, and nobody waits for."""
        if self.wanted:
            return []
        return [
            session
            for conn, session in self.sessions.items()
            if not (conn.closed or session.lingers or session in self.out)
        ]

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for a connection of it."""
        return bool(self._waiting or self._turns)

    @property
    def waiting(self) -> int:
        """How many wait for a connection of it."""
        return len(self._waiting) + len(self._turns)

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._pool.closed

    async def open(self) -> None:
        """Start it; it connects when the first call comes."""
        await self._pool.open()

    async def close(self) -> None:
        """Close it and its idle connections; what is out is closed when it comes back."""
        ended = ending(*(conn for conn, session in self.sessions.items() if session not in self.out))
        if self._room is not None:
            self._room.cancel()  # else the pool would wait for it, and it perhaps for whoever closes the pool
        if self._resting is not None:
            self._resting.cancel()
        while (turn := self._next_turn()) is not None:
            turn.set_result(None)
        if self._turning is not None:
            self._turning.cancel()
        hand, self._hand = self._hand, []
        await self._pool.close(timeout=0.2)
        for session in hand:
            session.close()
            await self._pool.putconn(session.conn)
        await asyncio.gather(*self._laying)
        await ended

    async def _conninfo(self) -> str:
        try:
            await self._room_for_one_more()
        except Error as problem:
            self._refused(problem)
            raise
        try:
            return self.terminator.beside(self.login.dsn())
        except Error as problem:
            self._failed(problem)
            raise

    async def _room_for_one_more(self) -> None:
        while True:
            self._room = asyncio.ensure_future(self._make_room(self))
            try:
                return await self._room
            except UnwantedError:
                if not self.wanted or self.closed:
                    raise  # else somebody has come since, who knows nothing of it
            except asyncio.CancelledError:
                _heed(asyncio.current_task())
                raise _closed() from None
            finally:
                self._room = None

    def _failed(self, problem: Exception) -> None:
        """A connection that there was room for could not be made."""
        self.connecting -= 1
        self.terminator.failed(self.login.shown)
        self._refused(problem)

    def _refused(self, problem: Exception) -> None:
        """There will be no new connection: whoever waits is told, unless one that is there may still come to them."""
        if not isinstance(problem, UnavailableError | ForbiddenError):
            problem = unreachable(self.login, problem)
        now = asyncio.get_running_loop().time()
        there = any(not (conn.closed or session.lingers) for conn, session in self.sessions.items())
        for waiting in self._waiting:
            if waiting.expired():
                continue  # it has been told, and is on its way out: another attempt may fail before it is
            self._waiting[waiting] = problem
            if not (self.out or there):
                waiting.reschedule(now)

    async def _configure(self, conn: Connection) -> None:
        try:
            timeout = f"{int(self._timeout * 1000)}ms"
            with bounded(conn, self._wait):
                row = await (await conn.execute(SETTINGS, (timeout,))).fetchone()
            if row is None or (row[3] and not self.login.settings.allow_privileged_login):
                raise ForbiddenError(
                    f"database {self.login.name!r} is not served: its login is a superuser, bypasses row security, "
                    "or may replicate",
                    "the administrator makes a role that can only read, or sets allow_privileged_login",
                )
            if row[1] is None:
                raise UnavailableError(
                    f"database {self.login.name!r} is not served: its login does not see its own backends, and could "
                    "not end them",
                    TELL,
                )
            if pooled := row[0] != conn.pgconn.backend_pid:
                await self._check_pooler(conn, row[0])
        except BaseException as problem:
            await conn.close()  # psycopg_pool forgets it, and its backend would stay
            if isinstance(problem, Exception):
                self._failed(problem)
            raise
        conn.pgconn.enter_pipeline_mode()
        conn.wire = Wire(conn.pgconn)
        conn.loaders = Loaders(conn)
        self.connecting -= 1
        session = self.sessions[conn] = Session(conn, self, row[0], row[1], row[2], pooled=pooled)
        session.until = session.used + self.login.settings.pool.max_lifetime

    async def _check_pooler(self, conn: Connection, pid: int) -> None:
        """Who is connected to a pooler (it has numbers of its own for its clients) needs a backend of its own all the
        same. Raises ForbiddenError where it has none, and where its login brings settings that a pooler lets fall."""
        if self.login.role is not None:
            raise ForbiddenError(f"database {self.login.name!r} is not served: {POOLED_LOGINS}", TELL)
        with bounded(conn, self._wait):
            kept = await self.terminator.backend(self._wait)
            row = await (await conn.execute("SELECT pg_catalog.pg_backend_pid()")).fetchone()
        if kept == pid or row is None or row[0] != pid:
            raise ForbiddenError(f"database {self.login.name!r} is not served: {SHARED_BACKENDS}", TELL)

    def take_at_hand(self, task: "asyncio.Task[object] | None" = None) -> Session | None:
        """One that a call gave back a moment ago, if there is any, without waiting for anything, for this task (None:
        the current one, which it takes a while to find)."""
        if not self._hand or not self.terminator.sure(now := monotonic()) or (session := self._at_hand(now)) is None:
            return None
        self.last_used = now
        self.out.add(session)
        session.task = task or asyncio.current_task()
        session.passes_on = False
        session.use = Use()
        return session

    async def take(self) -> Session:
        """A live connection, waiting for one as long as the config says. Raises UnavailableError with the reason."""
        self.last_used = monotonic()
        try:
            session = self._at_hand(self.last_used) or await self._turn() or await self._lent()
        except BaseException:
            self._make_turns()  # what it was to have had is another's
            raise
        self.out.add(session)
        task = asyncio.current_task()
        try:
            _heed(task)
            if not self.terminator.sure(monotonic()):
                await self.terminator.ready()
        except BaseException:
            await self.give_back(session)
            raise
        if session.astray:
            session.close()
            await self.give_back(session)
            return await self.take()
        session.task = task
        session.passes_on = False
        session.use = Use()
        return session

    def _at_hand(self, now: float) -> Session | None:
        """A connection that a call has given back a moment ago. psycopg_pool's own lending costs as much as a call."""
        here = self.terminator.place
        while self._hand:
            session = self._hand.pop()
            wire = session.conn.wire
            lately = now - session.used < _LATELY
            there = (wire is not None and (wire.open if lately else wire.quiet)) or alive(session.conn)
            if there and (session.place == here or not session.astray):
                return session
            session.close()
            self._later(session)
        return None

    async def _turn(self) -> Session | None:
        """The connection of a call that ends, where there may be no further one; None where there may be."""
        most = self.login.settings.pool.max_size
        if len(self.out) < most and not (self._waiting and self.count >= most):
            return None
        if len(self._turns) >= self.login.settings.pool.max_waiting:
            raise _too_many()
        loop = asyncio.get_running_loop()
        turn: Turn = loop.create_future()
        self._turns.append((loop.time() + self._wait, turn))
        if self._turning is None:
            self._turning = loop.call_later(self._wait, self._overdue)
        try:
            session = await turn
        except BaseException:
            self._hand_on(turn)
            raise
        if session is not None and session.conn.closed:
            await self.give_back(session)
            return None
        return session

    def _overdue(self) -> None:
        """Tell those whose turn has not come in time: one timer is for all."""
        loop = asyncio.get_running_loop()
        while self._turns and (self._turns[0][0] <= loop.time() or self._turns[0][1].done()):
            turn = self._turns.popleft()[1]
            if not turn.done():
                turn.set_exception(self._none_came())
        self._turning = loop.call_at(self._turns[0][0], self._overdue) if self._turns else None

    def _hand_on(self, turn: Turn) -> None:
        """Who has been given a connection, and does not want it any more, leaves it to the next."""
        self._turns = deque(one for one in self._turns if one[1] is not turn)
        given = turn.done() and not turn.cancelled() and turn.exception() is None
        if given and (session := turn.result()) is not None:
            self.out.discard(session)
            if not self._kept(session):
                self._later(session)

    async def _lent(self) -> Session:
        """One that psycopg_pool lends, or makes."""
        await self._forget_who_left()
        until = monotonic() + self._wait
        while True:
            conn = await self._getconn()
            session = self.sessions.get(conn)
            if session is not None and alive(conn) and not session.astray:
                return session
            await conn.close()
            await self._pool.putconn(conn)
            _heed(asyncio.current_task())
            if monotonic() > until:
                raise unreachable(self.login, TimeoutError("each new connection was lost at once"))

    async def _forget_who_left(self) -> None:
        """psycopg_pool keeps the place of whoever stopped waiting until a connection comes. While a database is down
        none does, so now and then the pool, which is empty, is made anew."""
        if self._left < _LEFT or self.count or not self.idle or self.closed or self._hand or self._laying:
            return
        self._left = 0
        old, self._pool = self._pool, self._new()
        await self._pool.open()
        await old.close(timeout=0.2)

    async def _getconn(self) -> Connection:
        if len(self._waiting) >= self.login.settings.pool.max_waiting:
            raise _too_many()
        self._left += 1
        conn = await self._waited()
        self._left = 0  # its coming has swept the queue
        return conn

    async def _waited(self) -> Connection:
        reason: Error | None = None
        try:
            async with asyncio.timeout(self._wait + 0.2) as waiting:  # who could not have room says why first
                self._waiting[waiting] = None
                try:
                    return await self._pool.getconn(self._wait + 0.2)
                finally:
                    reason = self._waiting.pop(waiting)
        except (TimeoutError, psycopg_pool.PoolTimeout):
            if reason is not None:
                raise reason from None
            raise self._none_came() from None
        except psycopg_pool.PoolClosed:
            raise _closed() from None

    def _none_came(self) -> UnavailableError:
        return UnavailableError(
            f"no connection of this token to {self.login.name!r} came free in {self._wait:g} s",
            "wait for the token's other calls to end",
        )

    async def give_back(self, session: Session) -> None:
        """Return a connection. One that is not as it was when it was new is closed instead."""
        if not self.put_back(session):
            await asyncio.shield(self._laid_back(session))

    def put_back(self, session: Session) -> bool:
        """`give_back`, where nothing has to be waited for; False where something has."""
        session.task = None
        self.last_used = monotonic()
        if session.pooled:
            session.rest()
        if session.pgconn.transaction_status != _IDLE and not session.conn.closed:
            session.close()
        self.out.discard(session)
        return self._kept(session)

    def _kept(self, session: Session) -> bool:
        """Give a connection to whose turn it is, or keep it at hand for the next call: for a moment, since whoever
        counts what nobody uses is to find it with psycopg_pool. False where it has to be laid back."""
        if session.pgconn.status == pq.ConnStatus.BAD:
            if not session.lingers:
                self.sessions.pop(session.conn, None)
            return False
        if monotonic() >= session.until or self._pool.closed:
            return False
        if self._waiting and self._pool.get_stats().get("requests_waiting"):
            return False  # who waits for psycopg_pool has waited for longer than whose turn would be next
        if self._turns and (turn := self._next_turn()) is not None:
            self.out.add(session)
            turn.set_result(session)
            return True
        session.used = self.last_used
        self._hand.append(session)
        if self._resting is None:
            self._resting = asyncio.get_running_loop().call_later(_AT_HAND, self._rest)
        return True

    def _next_turn(self) -> Turn | None:
        while self._turns:
            if not (turn := self._turns.popleft()[1]).done():
                return turn
        return None

    def _rest(self) -> None:
        """Lay back what nobody has used for a moment."""
        self._resting, before = None, monotonic() - _AT_HAND
        for session in [one for one in self._hand if one.used <= before]:
            self._hand.remove(session)
            self._later(session)
        if self._hand:
            self._resting = asyncio.get_running_loop().call_later(_AT_HAND, self._rest)

    def _later(self, session: Session) -> None:
        """Lay a connection back, without waiting for it."""
        self._laid_back(session)

    def _laid_back(self, session: Session) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._pool.putconn(session.conn))
        self._laying.add(task)
        task.add_done_callback(self._laid)
        return task

    def _laid(self, task: "asyncio.Task[None]") -> None:
        """As many as there is room for need not wait for their turn: psycopg_pool has or makes one for them."""
        self._laying.discard(task)
        self._make_turns()

    def _make_turns(self) -> None:
        """Have as many go to psycopg_pool as there is room for beside those who wait there: else these would never
        become fewer, and each connection would go through psycopg_pool to the next."""
        for _ in range(self.login.settings.pool.max_size - len(self.out) - len(self._waiting)):
            if (turn := self._next_turn()) is None:
                break
            turn.set_result(None)


def _too_many() -> UnavailableError:
    return UnavailableError("too many calls of this token are waiting", "wait for some of them to end")


def _closed() -> UnavailableError:
    return UnavailableError("the pool was closed meanwhile", "ask again in a moment")


def _heed(task: "asyncio.Task[Any] | None") -> None:
    """Raise where whoever asks has been cancelled: Python 3.11's wait_for keeps a result that comes with a cancel."""
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
