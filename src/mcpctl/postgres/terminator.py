"""A connection of a login that is kept to end the others with: when it is needed, there may be none to be had.

Any role may terminate its own backends (PostgreSQL, "Server Signaling Functions"). No statement of a caller's begins
without this connection, so that a full server, or a role at its CONNECTION LIMIT, does not stand in a revocation's way.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl.errors import ConfigError, Error, UnavailableError
from mcpctl.postgres.login import Login
from mcpctl.postgres.ping import takes_connections

log = logging.getLogger("mcpctl.pools")
Backend = tuple[int, str]
"""A backend's pid, and when it began: a pid alone may be somebody else's by now."""
Place = tuple[str, str, str]
"""Host, address and port of a connection: a connection string may name several hosts, a name have several addresses."""
_LEAST = 0.05
_SOON = 1.0
"""Seconds in which a host that is well has answered."""
_GOODBYE = 0.5
_SURE = 0.02
"""Seconds for which the connection counts as being there once it was seen to be: it may be lost at any time after."""
_SLOW = 0.1
"""Seconds that a tried login does nothing, and that its first statement takes: so much a busy server may need."""
_TERMINATE = """
SELECT a.pid, CASE WHEN a.backend_start IS NOT NULL THEN pg_catalog.pg_terminate_backend(a.pid) END
FROM pg_catalog.pg_stat_activity a,
  ROWS FROM (pg_catalog.unnest(%s::int[]), pg_catalog.unnest(%s::text[])) wanted (pid, began)
WHERE a.pid = wanted.pid AND coalesce(EXTRACT(epoch FROM a.backend_start)::text = wanted.began, true)
"""
"""What may be one of them counts as one: a backend of which PostgreSQL does not tell us when it began, too."""


class _LetGo(Exception):
    """Closed while it was made."""


class Terminator:
    """One a login and process. Opened before the login's first session, closed with the login's last pool. `opened()`
    is told each time: it may be another PostgreSQL by now that answers there. `failed(database)` hears of failures."""

    def __init__(
        self,
        login: Login,
        opened: Callable[[], None] = lambda: None,
        failed: Callable[[str], None] = lambda database: None,
    ) -> None:
        self.login = login
        self._opened = opened
        self.failed = failed
        self._conn: AsyncConnection[Any] | None = None
        self._opening: asyncio.Task[Exception | None] | None = None
        self._begun = self._seen = 0.0
        self._asking: set[asyncio.Task[set[int] | None]] = set()
        self.place: Place = ("", "", "")
        """Which of the hosts it was made to last. The login's sessions are made there too: it can end no others."""
        self._asked = ""
        """What a connection that is tried asks for at its start, beside what the login does: options of libpq's."""

    def sure(self, now: float) -> bool:
        """Whether it was there a moment before that `monotonic()`: who asks so does not look for it with each call."""
        if self._seen + _SURE < now:
            if self._being_made or not self._alive():
                return False
            self._seen = now
        return self._conn is not None

    async def ready(self) -> bool:
        """See that it is there; False where it was let go meanwhile, for somebody else's sake.

        Raises UnavailableError where PostgreSQL gives no connection.
        """
        problem = await self._attempt()
        if problem is not None and not isinstance(problem, _LetGo):
            raise unreachable(self.login, problem)
        return problem is None

    async def _attempt(self) -> Exception | None:
        """See that it is there; what went wrong. Whoever asks meanwhile shares the attempt, and its result."""
        self.begin()
        opening = self._opening
        if opening is None or opening.done():
            return None
        await asyncio.wait({opening})
        return _LetGo() if opening.cancelled() else opening.result()  # one that had not begun hears of no cancel

    def begin(self) -> None:
        """Begin to make it, where it is not there."""
        if not self._being_made and not self._alive():
            self._begun = monotonic()
            self._opening = asyncio.create_task(self._open())

    @property
    def open(self) -> bool:
        """Whether it holds a connection, or is making one."""
        return self._conn is not None or self._being_made

    @property
    def answers(self) -> bool:
        """Whether it holds a connection, or began to make one so short a time ago that its host may well answer."""
        return self._conn is not None or (self._being_made and monotonic() - self._begun < _SOON)

    @property
    def _being_made(self) -> bool:
        # an attempt that has ended says nothing of now; who asked for it has its result
        return self._opening is not None and not self._opening.done()

    def _alive(self) -> bool:
        conn = self._conn
        return conn is not None and (conn.lock.locked() or alive(conn))

    async def _open(self) -> Exception | None:
        """Connect, and no more: who fights back may end this one too, so that its first statement has to count."""
        if self._conn is not None:
            await self._conn.close()
        self._conn = None
        try:
            async with asyncio.timeout(self.login.settings.pool.wait):
                dsn = self.login.dsn()
                if self._asked:
                    options = f"{conninfo_to_dict(dsn).get('options', '')} {self._asked}"
                    dsn = make_conninfo(self.beside(dsn), options=options)
                self._conn = await AsyncConnection.connect(
                    dsn, autocommit=True, prepare_threshold=None, application_name="mcpctl cut"
                )
        except (psycopg.Error, Error, TimeoutError, OSError) as problem:
            self.failed(self.login.shown)
            return problem
        except asyncio.CancelledError:
            return _LetGo()  # who waits for it has not been cancelled
        self.place = place(self._conn)
        self._opened()
        return None

    def beside(self, dsn: str, there: Place | None = None) -> str:
        """A connection string of this login that leads to the very server on which this connection ends backends, or
        to that other one."""
        there = there or self.place
        if not there[0]:
            return dsn
        values = {**conninfo_to_dict(dsn), **dict(zip(("host", "hostaddr", "port"), there, strict=True))}
        values.pop("target_session_attrs", None)  # it had them; a standby that is promoted goes on being asked
        return make_conninfo("", **values)  # empty ones too: they keep libpq from looking into the environment

    def elsewhere(self, there: Place) -> bool:
        """Whether this connection is made to another place than that one; nowhere before it was made at all."""
        return bool(self.place[0]) and self.place != there

    async def backend(self, seconds: float) -> int:
        """The pid of its own backend. Raises UnavailableError where it was let go, and psycopg's error
        where it has none in that time: a pooler takes a client before it has a place for it in PostgreSQL."""
        conn = self._conn
        if conn is None:
            raise unreachable(self.login, _LetGo("the connection that ends the others was let go"))
        with bounded(conn, seconds):
            row = await (await conn.execute("SELECT pg_catalog.pg_backend_pid()")).fetchone()
        return int(row[0]) if row is not None else 0

    async def try_anew(self, seconds: float, asked: str = "") -> None:
        """Make it anew, as a new login that has room for certain and asks for these options of libpq's, and have it
        come to a first, slow statement; a step may take that many seconds. Raises what goes wrong; then it is closed.
        """
        self._asked = asked  # at once: whoever needs it while it closes has it made, and that one is tried then
        try:
            await self.close()
            async with asyncio.timeout(seconds):
                await self.ready()
            conn = self._conn
            if conn is None:
                raise UnavailableError("the connection was let go")
            await asyncio.sleep(_SLOW)
            with bounded(conn, seconds):
                await conn.execute("SELECT pg_catalog.pg_sleep(%s)", (_SLOW,))
        except BaseException:
            await self.close()  # what it asked for is put back nowhere else
            raise
        finally:
            self._asked = ""

    async def terminate(self, backends: Sequence[Backend], patience: float) -> set[int] | None:
        """Tell these to end, within that many seconds; the pids of those that were still there, None when there is no
        connection to tell them by."""
        until = asyncio.get_running_loop().time() + patience
        problem: Exception | None
        try:
            async with asyncio.timeout_at(until):
                problem = await self._attempt()
        except TimeoutError as late:
            problem = late
        conn = self._conn
        if problem is not None or conn is None:
            log.debug("no connection to terminate with: %s", problem)
            return None
        asking = asyncio.create_task(_ask(conn, backends))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        await asyncio.wait({asking}, timeout=max(_LEAST, until - asyncio.get_running_loop().time()))
        if not asking.done():
            self._conn = None  # it hangs: the next one makes a new one
            shut(conn)
            asking.cancel()
            return None
        return asking.result()

    async def terminate_at(self, there: Place, backends: Sequence[Backend]) -> set[int] | None:
        """As `terminate`, on another of several hosts, where this connection was before. Where none takes connections
        any more there is no backend either: nobody could tell more."""
        try:
            dsn = self.beside(self.login.dsn(), there)
            if not await takes_connections(dsn, _SOON):
                return set()
            async with (
                asyncio.timeout(_SOON),
                await AsyncConnection.connect(
                    dsn, autocommit=True, prepare_threshold=None, application_name="mcpctl cut"
                ) as conn,
            ):
                return await _ask(conn, backends)
        except (psycopg.Error, Error, TimeoutError, OSError) as problem:
            log.debug("no connection to terminate with: %s", problem)
            return None

    async def close(self) -> None:
        """Close it when nobody asks by it, until somebody needs it again."""
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait({self._opening})
        conn, self._conn = self._conn, None
        if conn is None:
            return
        # Behind whoever asks by it: the loop waits for his socket, and a client who comes is given a closed one's
        # number, and is turned away while that is waited for.
        try:
            with bounded(conn, _SOON), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SOON + _LEAST), conn.lock:
                    pass
        except asyncio.CancelledError:
            if not conn.lock.locked():
                await conn.close()
            raise
        finally:
            if conn.lock.locked():  # he was cancelled, and psycopg has the server cancel for him; or we were
                shut(conn)
                asyncio.get_running_loop().call_later(_LEAST, conn.pgconn.finish)
        if not conn.lock.locked():
            ended = ending(conn)
            await conn.close()
            await ended


async def _ask(conn: AsyncConnection[Any], backends: Sequence[Backend]) -> set[int] | None:
    pids, starts = [pid for pid, _ in backends], [started for _, started in backends]
    try:
        return {row[0] for row in await (await conn.execute(_TERMINATE, (pids, starts))).fetchall()}
    except psycopg.Error as problem:
        log.debug("terminating: %s", problem)
        return None
    except asyncio.CancelledError:
        await conn.close()
        raise


def place(conn: AsyncConnection[Any]) -> Place:
    """Where a connection leads."""
    return conn.info.host, conn.info.hostaddr, str(conn.info.port)


def shut(conn: AsyncConnection[Any]) -> None:
    """Shut a connection's socket from this side: whoever waits for the server's word hears at once that none comes.

    To cancel him is not enough: psycopg then asks the server to cancel, and waits for what it says to that.
    """
    if not conn.closed:
        with contextlib.suppress(OSError), socket.fromfd(conn.pgconn.socket, socket.AF_INET, socket.SOCK_STREAM) as one:
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bounded(conn: AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """What is asked in the block is answered in that time, or the connection is shut, and psycopg says so."""
    late = asyncio.get_running_loop().call_later(seconds, shut, conn)
    try:
        yield
    finally:
        late.cancel()


def ending(*conns: AsyncConnection[Any]) -> "asyncio.Future[Any]":
    """To be asked for before connections in whose conversation nothing is left are closed, and awaited afterwards: done
    when their backends have ended, so that their places are free; after half a second in any case."""
    watched = [
        socket.fromfd(conn.pgconn.socket, socket.AF_INET, socket.SOCK_STREAM) for conn in conns if not conn.closed
    ]
    return asyncio.gather(*map(_ended, watched))


async def _ended(theirs: socket.socket) -> None:
    """Wait until a backend's end of its socket closes, which is when its process ends."""
    loop = asyncio.get_running_loop()
    with theirs, contextlib.suppress(TimeoutError, OSError):  # then it ends a little later, or was reset
        theirs.setblocking(False)
        async with asyncio.timeout(_GOODBYE):
            while await loop.sock_recv(theirs, 4096):
                pass


def unreachable(login: Login, problem: BaseException) -> UnavailableError:
    """What a caller is told. The problem's words name hosts, logins and files, which are the administrator's."""
    log.warning("database %s: %s", login.shown, str(problem).strip() or type(problem).__name__)
    if isinstance(problem, ConfigError):
        return UnavailableError(
            f"database {login.name!r} cannot be used: mcpctl's own files are not in order",
            "your token is fine; tell the administrator",
        )
    return UnavailableError(
        f"database {login.name!r} cannot be reached right now, or takes no further connection",
        "your token is fine; ask again in a moment, or tell the administrator",
    )


def alive(conn: AsyncConnection[Any]) -> bool:
    """Whether the server still holds its end: a FATAL message or the end of the stream would be waiting."""
    pgconn = conn.pgconn
    try:
        pgconn.consume_input()
        pgconn.consume_input()
    except psycopg.Error:
        return False
    return pgconn.status == pq.ConnStatus.OK  # one that was closed has none
