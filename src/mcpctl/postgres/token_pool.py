"""The pool of one token for one database: psycopg_pool, with the failures told at once and every backend known."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic, time
from typing import Any

import psycopg
import psycopg_pool
from psycopg import AsyncConnection, pq

from mcpctl.audit.log import MORE
from mcpctl.errors import Error, ForbiddenError, UnavailableError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.login import SETTINGS, SHARED_BACKENDS, Login
from mcpctl.postgres.terminator import Backend, Terminator, alive, bounded, ending, place, unreachable
from mcpctl.postgres.verdicts import Verdicts

log = logging.getLogger("mcpctl.pools")
_LEFT = 1000
TELL = "tell the administrator"
POOLED_LOGINS = "a pooler stands before it, which does not pass on what a user's own login asks for when it connects"
MakeRoom = Callable[["TokenPool"], Awaitable[None]]


class _Login(AsyncConnection[Any]):
    """A connection whose pool hears why it could not be made."""

    @classmethod
    async def connect(cls, conninfo: str = "", *, failed: Callable[[Exception], None], **options: Any) -> "_Login":  # type: ignore[override]
        try:
            return await super().connect(conninfo, **options)
        except Exception as problem:
            failed(problem)
            raise


Guard = Callable[[tuple[str, ...] | None], None]


@dataclass(slots=True)
class Use:
    """What one call learns on a session; it outlives the borrowing, and the session's next use has one of its own.

    Of the caller's statement: `described` is whether PostgreSQL described columns of it (a text of which it has not may
    hold anything, a password too), `relations` what its plan reads, `unseen` whether its functions may have read more.
    `did`: what the audit line must say of the call however it ends.
    `guard` hears of the relations that the statement reads before anything of it is answered (None:
    nobody knows), and raises where it may not be. `lasts` is called before what a call has changed stays, and raises
    where it may not.
    """

    described: bool = False
    relations: tuple[str, ...] | None = None
    unseen: bool = False
    did: str | None = None
    guard: Guard | None = None
    lasts: Callable[[], None] = lambda: None

    @property
    def read(self) -> tuple[str, ...] | None:
        """What is known to be read, and MORE where that may not be all; None where nothing is known."""
        return self.relations if self.relations is None or not self.unseen else (*self.relations, MORE)


class Session:
    """One backend that has logged in, and who uses it now: `use` is of the call that has it. `lingers`: it was told to
    end, and has not yet. `passes_on`: nothing runs on it, and a pooler gives it to somebody else when it is closed."""

    __slots__ = (
        "conn", "cut", "lingers", "login", "passes_on", "pid", "place", "pool", "pooled", "started", "task", "use",
    )  # fmt: skip

    def __init__(
        self, conn: "_Login", pool: "TokenPool", pid: int, started: str, login: str, *, pooled: bool = False
    ) -> None:
        self.conn = conn
        self.pool = pool
        self.pid = pid
        self.started = started
        self.login = login
        self.place = place(conn)
        self.cut = False
        self.lingers = False
        self.pooled = self.passes_on = pooled
        self.task: asyncio.Task[Any] | None = None
        self.use = Use()

    @property
    def backend(self) -> Backend:
        """Which backend it is, for good."""
        return self.pid, self.started

    @property
    def astray(self) -> bool:
        """Whether it is on another host by now than the connection that could end it: that one was lost, and found the
        next of several hosts."""
        return self.pool.terminator.elsewhere(self.place)

    @property
    def pgconn(self) -> pq.abc.PGconn:
        """libpq's own connection, in pipeline mode."""
        return self.conn.pgconn

    async def cancel(self, timeout: float = 1.0) -> None:
        """Ask the backend to give up what it does (PQcancelStart). Whether it obeys is its affair."""
        try:
            await self.conn.cancel_safe(timeout=timeout)
        except psycopg.Error as problem:
            log.debug("cancelling backend %d: %s", self.pid, problem)

    def rest(self) -> None:
        """Note whether nothing runs on it."""
        if self.pooled and self.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            self.passes_on = True

    def close(self) -> None:
        """Close the socket, now."""
        self.rest()
        self.pgconn.finish()

    async def leave(self) -> None:
        """Close it and wait, for half a second at most, until its backend has ended: then its place is free."""
        ended = ending(self.conn)
        self.close()
        await ended


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
        self.sessions: dict[_Login, Session] = {}
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
        self._pool = self._new()

    def _new(self) -> "psycopg_pool.AsyncConnectionPool[_Login]":
        settings = self.login.settings.pool
        return psycopg_pool.AsyncConnectionPool(
            self._conninfo,
            connection_class=_Login,
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
        return not (self.out or self._waiting or self.connecting or self.lingering)

    @property
    def lingering(self) -> list[Session]:
        """Those that were told to end, and have not yet."""
        return [session for session in self.sessions.values() if session.lingers]

    @property
    def spare(self) -> list[Session]:
        """Those that nobody uses, and nobody waits for."""
        if self._waiting:
            return []
        return [
            session
            for conn, session in self.sessions.items()
            if not (conn.closed or session.lingers or session in self.out)
        ]

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for a connection of it."""
        return bool(self._waiting)

    @property
    def waiting(self) -> int:
        """How many wait for a connection of it."""
        return len(self._waiting)

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
        await self._pool.close(timeout=0.2)
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
                _heed()
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

    async def _configure(self, conn: _Login) -> None:
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
        self.connecting -= 1
        self.sessions[conn] = Session(conn, self, row[0], row[1], row[2], pooled=pooled)

    async def _check_pooler(self, conn: _Login, pid: int) -> None:
        """Who is connected to a pooler (it has numbers of its own for its clients) needs a backend of its own all the
        same. Raises ForbiddenError where it has none, and where its login brings settings that a pooler lets fall."""
        if self.login.role is not None:
            raise ForbiddenError(f"database {self.login.name!r} is not served: {POOLED_LOGINS}", TELL)
        with bounded(conn, self._wait):
            kept = await self.terminator.backend(self._wait)
            row = await (await conn.execute("SELECT pg_catalog.pg_backend_pid()")).fetchone()
        if kept == pid or row is None or row[0] != pid:
            raise ForbiddenError(f"database {self.login.name!r} is not served: {SHARED_BACKENDS}", TELL)

    async def take(self) -> Session:
        """A live connection, waiting for one as long as the config says. Raises UnavailableError with the reason."""
        self.last_used = monotonic()
        await self._forget_who_left()
        until = monotonic() + self._wait
        while True:
            conn = await self._getconn()
            session = self.sessions.get(conn)
            if session is not None and alive(conn) and not session.astray:
                break
            await conn.close()
            await self._pool.putconn(conn)
            _heed()
            if monotonic() > until:
                raise unreachable(self.login, TimeoutError("each new connection was lost at once"))
        self.out.add(session)
        task = asyncio.current_task()
        try:
            _heed()
            await self.terminator.ready()
        except BaseException:
            self.out.discard(session)
            await asyncio.shield(self._pool.putconn(conn))
            raise
        if session.astray:
            session.close()
            await self.give_back(session)
            return await self.take()
        session.task = task
        session.passes_on = False
        session.use = Use()
        return session

    async def _forget_who_left(self) -> None:
        """psycopg_pool keeps the place of whoever stopped waiting until a connection comes. While a database is down
        none does, so now and then the pool, which is empty, is made anew."""
        if self._left < _LEFT or self.count or not self.idle or self.closed:
            return
        self._left = 0
        old, self._pool = self._pool, self._new()
        await self._pool.open()
        await old.close(timeout=0.2)

    async def _getconn(self) -> _Login:
        if len(self._waiting) >= self.login.settings.pool.max_waiting:
            raise UnavailableError("too many calls of this token are waiting", "wait for some of them to end")
        self._left += 1
        conn = await self._waited()
        self._left = 0  # its coming has swept the queue
        return conn

    async def _waited(self) -> _Login:
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
            raise UnavailableError(
                f"no connection of this token to {self.login.name!r} came free in {self._wait:g} s",
                "wait for the token's other calls to end",
            ) from None
        except psycopg_pool.PoolClosed:
            raise _closed() from None

    async def give_back(self, session: Session) -> None:
        """Return a connection. One that is not as it was when it was new is closed instead."""
        session.task = None
        self.last_used = monotonic()
        session.rest()
        conn = session.conn
        if not conn.closed and conn.pgconn.transaction_status != pq.TransactionStatus.IDLE:
            session.close()
        self.out.discard(session)
        if conn.closed and not session.lingers:
            self.sessions.pop(conn, None)
        task = asyncio.ensure_future(self._pool.putconn(conn))
        await asyncio.shield(task)


def _closed() -> UnavailableError:
    return UnavailableError("the pool was closed meanwhile", "ask again in a moment")


def _heed() -> None:
    """Raise where whoever asks has been cancelled: Python 3.11's wait_for keeps a result that comes with a cancel."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
