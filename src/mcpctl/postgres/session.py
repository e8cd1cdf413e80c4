"""One backend that has logged in, and what a call learns on it."""

import asyncio
import logging
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from msgspec import Struct
from psycopg import AsyncConnection, pq

from mcpctl.audit.log import MORE
from mcpctl.postgres.shape import Loaders
from mcpctl.postgres.terminator import Backend, ending, place
from mcpctl.postgres.wire import Wire

if TYPE_CHECKING:
    from mcpctl.postgres.token_pool import TokenPool

log = logging.getLogger("mcpctl.pools")


class Connection(AsyncConnection[Any]):
    """A connection whose pool hears why it could not be made."""

    @classmethod
    async def connect(cls, conninfo: str = "", *, failed: Callable[[Exception], None], **options: Any) -> "Connection":  # type: ignore[override]
        try:
            return await super().connect(conninfo, **options)
        except Exception as problem:
            failed(problem)
            raise

    wire: Wire | None = None
    """Its way to the event loop, once it is in pipeline mode."""
    loaders: Loaders | None = None
    """What loads the rows that come by it."""

    async def close(self) -> None:
        self.loaders = None  # which know it
        if self.wire is not None:
            self.wire.close()
        await super().close()


Guard = Callable[[tuple[str, ...] | None], None]


class Use(Struct, eq=False):
    """What one call learns on a session; it outlives the borrowing, and the session's next use has one of its own.

    Of the caller's statement: `described` is whether PostgreSQL described columns of it (a text of which it has not may
    hold anything, a password too), `relations` what its plan reads, `unseen` whether its functions may have read more.
    `did`: what the audit line must say of the call however it ends.
    `guard` hears of the relations that the statement reads before anything of it is answered (None:
    nobody knows), and raises where it may not be. `lasts` is called before what a call has changed stays, and raises
    where it may not. `trace`: the id that PostgreSQL is to know it by, beside the token's.
    """

    described: bool = False
    relations: tuple[str, ...] | None = None
    unseen: bool = False
    did: str | None = None
    guard: Guard | None = None
    trace: str | None = None
    lasts: Callable[[], None] = lambda: None

    @property
    def read(self) -> tuple[str, ...] | None:
        """What is known to be read, and MORE where that may not be all; None where nothing is known."""
        return self.relations if self.relations is None or not self.unseen else (*self.relations, MORE)


class Session:
    """One backend that has logged in, and who uses it now: `use` is of the call that has it. `lingers`: it was told to
    end, and has not yet. `passes_on`: nothing runs on it, and a pooler gives it to somebody else when it is closed.
    `seconds`: what a statement may take on it; None until the frame was made ready."""

    __slots__ = (
        "conn", "cut", "lingers", "login", "number", "passes_on", "pgconn", "pid", "place", "pool", "pooled", "seconds",
        "started", "task", "until", "use", "used",
    )  # fmt: skip

    def __init__(
        self, conn: "Connection", pool: "TokenPool", pid: int, started: str, login: str, *, pooled: bool = False
    ) -> None:
        self.conn = conn
        self.pgconn: pq.abc.PGconn = conn.pgconn  # libpq's own connection, in pipeline mode
        self.pool = pool
        self.pid = pid
        self.number = b"%d" % pid  # as PostgreSQL says it
        self.started = started
        self.login = login
        self.place = place(conn)
        self.cut = False
        self.lingers = False
        self.seconds: float | None = None
        self.used = monotonic()
        self.until = inf
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
        self.conn.loaders = None
        if self.conn.wire is not None:
            self.conn.wire.close()
        self.pgconn.finish()

    async def leave(self) -> None:
        """Close it and wait, for half a second at most, until its backend has ended: then its place is free."""
        ended = ending(self.conn)
        self.close()
        await ended
