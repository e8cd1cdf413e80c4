"""The frame around what is asked: a read-only transaction, sent in one packet with it, and whether all of it went as
it should.

    BEGIN READ ONLY · the snapshot · what is asked
    unlock, a new seed, and look for what would outlive it · ROLLBACK · sync

One sync point, since PostgreSQL sends what it has at each of them, and each wakes us. An error aborts all that stands
before the next one, the ROLLBACK too: then that and the look are asked for again, in a second round trip. A SELECT of
ours stands before what is asked, since SET TRANSACTION READ WRITE works until a query has taken the snapshot.
"""

import asyncio
from collections.abc import Sequence
from math import inf
from typing import Any

from psycopg import pq

from mcpctl.errors import ForbiddenError
from mcpctl.postgres import frame
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.login import SHARED_BACKENDS
from mcpctl.postgres.said import StatementError, cells, error
from mcpctl.postgres.session import Session
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.postgres.wire import ConnectionLostError, Wire

Statement = tuple[bytes, Sequence[bytes | None]]
_Status = pq.ExecStatus
_IDLE, _FAILED = pq.TransactionStatus.IDLE, pq.TransactionStatus.INERROR
_DONE, _TUPLES, _SYNC = int(_Status.COMMAND_OK), int(_Status.TUPLES_OK), int(_Status.PIPELINE_SYNC)
_BEGUN = (_DONE, _TUPLES)
"""The results of BEGIN and of the snapshot."""
_ENDED = (_TUPLES, _DONE, _SYNC)
"""Those of what stands behind a statement: UNLOCK or LOOK, ROLLBACK, and the sync point."""
_ALL = (*_BEGUN, _TUPLES, *_ENDED)
"""Those of a frame with a question whose rows come as one result."""
_GROWTH = 24 << 20
"""How much libpq may grow for one answer, unless an answer may have more than a fifth of it."""
_AT_ONCE = 10 << 20
"""How much it may grow at once: its buffer doubles until a row has room, so one of 8 MiB makes it grow by 16."""


class Framed:
    """A conversation on one connection, in frames."""

    _leaves_nothing = _clean = True
    _known = _refreshed = False

    def __init__(self, session: Session, bounds: Bounds) -> None:
        self.session = session
        self._pgconn = session.pgconn
        self.bounds = bounds
        self._verdicts: Verdicts = session.pool.verdicts
        self._types = self._verdicts.types

    @property
    def clean(self) -> bool:
        """Whether the connection is as it was when it was new."""
        return self._clean and self._leaves_nothing

    def wire(self, seconds: float = inf) -> Wire:
        """The connection's wire, for this exchange; in so many seconds it has to be over."""
        most, wire = self.bounds.bytes, self.session.conn.wire
        if wire is None:
            raise ConnectionLostError("the connection to the database was lost")
        return wire.exchange(max(_GROWTH, 5 * most), max(_AT_ONCE, 2 * most + (1 << 20)), seconds)

    async def leave(self) -> None:
        """Close a connection that is not as it was when it was new; its conversation is over."""
        if not self.clean:
            await self.session.leave()

    async def _ours(self, wire: Wire, *statements: Statement) -> list[list[tuple[bytes, ...]] | StatementError]:
        """The cells of statements of ours, as they came, run in one transaction up to the first that fails."""
        await self.ready(wire)
        self._send(wire, statements)
        await wire.flush()
        await self.begun(wire)
        results = await wire.commands(len(statements))
        await self._ended(wire)
        return [cells(result) for result in results]

    async def ready(self, wire: Wire) -> None:
        """Have the frame's statements prepared, and what one may take set as it is to be. Not in the frame's packet: it
        runs only where that has gone well, and behind what is parsed nothing can be READ WRITE."""
        session, pgconn, seconds = self.session, self._pgconn, self.bounds.seconds
        if session.seconds == seconds:
            return
        first = session.seconds is None
        if first:
            pgconn.send_prepare(frame.SNAPSHOT, frame.WHO)
            pgconn.send_prepare(frame.UNLOCK, frame.UNLOCK_ALL)
        pgconn.send_query_params(frame.SET_LIMITS, (b"%d" % int(seconds * 1000),))
        wire.sync()
        await wire.flush()
        results = await wire.commands(3 if first else 1)
        await wire.synced()
        for one in results:
            if one.status not in (_DONE, _TUPLES):
                self._clean = False
                raise error(one)
        session.seconds = seconds

    def begin(self, begin: bytes, statements: Sequence[Statement]) -> None:
        """Queue the beginning of a frame that is `ready`: a transaction, begun so, its snapshot, and these."""
        pgconn = self._pgconn
        pgconn.send_query_params(begin, None)
        if (trace := self.session.use.trace) is None:
            pgconn.send_query_prepared(frame.SNAPSHOT, None)
        else:
            named = f"mcpctl {self.session.pool.short} {trace}".encode()
            pgconn.send_query_params(frame.WHO_AND_TRACE, (named,))
        for text, params in statements:
            pgconn.send_query_params(text, params or None)

    def _send(self, wire: Wire, statements: Sequence[Statement]) -> None:
        if not self._clean:
            raise ConnectionLostError("the connection to the database was lost")
        self.begin(frame.BEGIN, statements)
        if self._known:
            self._pgconn.send_query_prepared(frame.UNLOCK, None)
        else:
            self._pgconn.send_query_params(frame.LOOK, None)
        self._pgconn.send_query_params(frame.END, None)
        wire.sync(last=True)

    def refresh(self, wire: Wire) -> None:
        """Have PostgreSQL count anew what a transaction reads, before the frame of one that it is asked of."""
        since, flush = frame.FRESH
        if self._pgconn.server_version >= since:
            self._refreshed = True
            self._pgconn.send_query_params(flush, None)
            wire.sync()

    async def begun(self, wire: Wire) -> None:
        """See that the frame has begun as it should."""
        if self._refreshed:
            self._refreshed = False
            await wire.commands(1)
            await wire.synced()
        begin, snapshot = await wire.commands(2)
        if begin.status != _DONE or snapshot.status != _TUPLES:
            self._clean = False
            raise error(snapshot if begin.status == _DONE else begin)
        self._see_backend(snapshot)

    def _begun_at_once(self, wire: Wire) -> bool:
        """`begun`, where all of it is there, and nothing but what there is mostly."""
        found = None if self._refreshed else wire.at_once(_BEGUN, 4)
        if found is not None:
            self._see_backend(found[2])
        return found is not None

    def _at_once(self, wire: Wire) -> list[Any] | None:
        """The results of all of a frame whose rows are one, where all of it is there, and as it is mostly."""
        found = None if self._refreshed else wire.at_once(_ALL, 11)
        if found is not None:
            self._see_backend(found[2])
        return found

    def _see_backend(self, snapshot: Any) -> None:
        """See that it is the session's own backend that has answered: a pooler gives its clients any by now."""
        session = self.session
        if snapshot.get_value(0, 0) != session.number:
            session.close()
            raise ForbiddenError(f"database {session.pool.login.name!r} is not served: {SHARED_BACKENDS}")

    async def _ended(self, wire: Wire, stop: "asyncio.Task[None] | None" = None) -> None:
        """Take the rest of the frame, and see whether it is as it should be; behind an error, ask for it again, when
        the cancel that `stop` sends cannot hit it any more."""
        unlock, rollback = await wire.commands(2)
        await wire.synced()
        if self._pgconn.transaction_status == _FAILED:
            if stop is not None:
                await asyncio.shield(stop)
            self._known = False
            self._pgconn.send_query_params(frame.END, None)
            self._pgconn.send_query_params(frame.LOOK, None)
            wire.sync()
            await wire.flush()
            rollback, unlock = await wire.commands(2)
            await wire.synced()
        if rollback is None or unlock is None:
            raise ConnectionLostError("the conversation with the database is out of step")
        as_it_should = rollback.status == _DONE and unlock.status == _TUPLES  # else somebody else's cancel has hit it
        self._clean = as_it_should and self._leaves_as_it_was(unlock)

    def _ended_at_once(self, wire: Wire) -> bool:
        """`_ended`, where all of it is there, and as it should be."""
        found = wire.at_once(_ENDED, 5)
        if found is not None:
            self._ended_so(wire, found[0])
        return found is not None

    def _taken_back(self, wire: Wire, found: list[Any]) -> None:
        """Have what was `_at_once` be taken one by one."""
        wire.give_back(found)
        wire.owed += 1

    def _ended_so(self, wire: Wire, unlock: Any) -> None:
        wire.owed -= 1
        self._clean = self._leaves_as_it_was(unlock)

    def _leaves_as_it_was(self, unlock: Any) -> bool:
        """Whether the frame's end leaves no transaction, and no prepared statement that would outlive the call."""
        as_it_was = self._known or unlock.get_value(0, 2) == frame.AS_IT_WAS
        return as_it_was and self._pgconn.transaction_status == _IDLE
