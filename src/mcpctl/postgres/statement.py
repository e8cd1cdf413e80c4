"""One statement: one read-only transaction, bounded rows, bytes and time, and nothing of it left behind.

A text is asked about before it runs (Parse and Describe; PostgreSQL's word decides, never ours), and what PostgreSQL
said is remembered. A known question is then one flush and one round trip in libpq's pipeline:

    BEGIN READ ONLY · limits, which also take the snapshot · the statement · sync
    ROLLBACK · unlock, a new seed, and look for what would outlive it · sync

The second segment stands behind its own sync, since an error aborts the rest of its segment. A SELECT of ours stands
before the statement, since SET TRANSACTION READ WRITE works until a query has taken the snapshot. It ends with
ROLLBACK, never COMMIT: that undoes what PostgreSQL lets a read-only transaction write, and every setting. What a
rollback cannot undo goes with the connection, which is closed unless PostgreSQL says that the text leaves nothing.
Of such a text, and of a new one, the locks are looked at before the ROLLBACK: what functions read is in no plan.
"""

import asyncio
import random
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from mcpctl.errors import Error, ForbiddenError
from mcpctl.postgres import cutting
from mcpctl.postgres.answer import Answer, Bounds, Rows
from mcpctl.postgres.login import SHARED_BACKENDS
from mcpctl.postgres.token_pool import Session
from mcpctl.postgres.values import Types, UnknownType
from mcpctl.postgres.verdicts import Verdict, Verdicts
from mcpctl.postgres.wire import ConnectionLostError, TooLargeError, Wire

T = TypeVar("T")
Statement = tuple[bytes, Sequence[bytes | None]]
_Status = pq.ExecStatus
_LIMITS = b"""SELECT pg_catalog.set_config('statement_timeout', $1, true),
 pg_catalog.set_config('lock_timeout', $1, true), pg_catalog.pg_backend_pid()"""
_UNLOCK = b"""SELECT pg_catalog.pg_advisory_unlock_all(),
 (SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements), pg_catalog.setseed($1)"""
_FLUSH = 150000, _UNLOCK + b", pg_catalog.pg_stat_force_next_flush()"
"""From that version on, so that what SEEN counts is of one transaction alone: PostgreSQL gathers it for seconds."""
_CURSOR = b"declare c no scroll cursor for\n"
LOCKED = b"""SELECT DISTINCT n.nspname || '.' || c.relname FROM pg_catalog.pg_locks l
 JOIN pg_catalog.pg_class t ON t.oid = l.relation JOIN pg_catalog.pg_class c ON c.oid = CASE t.relkind WHEN 't'
  THEN (SELECT o.oid FROM pg_catalog.pg_class o WHERE o.reltoastrelid = t.oid) ELSE t.oid END
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
 AND l.relation NOT IN ('pg_catalog.pg_locks'::regclass, 'pg_catalog.pg_class'::regclass,
                        'pg_catalog.pg_namespace'::regclass, 'pg_catalog.pg_index'::regclass) ORDER BY 1"""
SEEN = (
    b"("
    + LOCKED
    + b""") UNION SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class t
 LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = t.oid
 JOIN pg_catalog.pg_class c ON c.oid = coalesce(i.indrelid, t.oid)
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE t.oid >= 16384 AND t.relkind IN ('r', 'm', 'S', 'i') AND c.relkind IN ('r', 'm', 'S')
 AND pg_catalog.pg_stat_get_xact_numscans(t.oid) + pg_catalog.pg_stat_get_xact_blocks_fetched(t.oid) > 0"""
)
"""Also the tables that the transaction's counters have: where a block that catches its error was rolled back, its locks
are gone by now. No such block stands in what leaves nothing, and asking of each table costs too much there."""
_GATHER = b"""SELECT pg_catalog.set_config($1, 'on', true),
 pg_catalog.set_config('max_parallel_workers_per_gather', '1', true)"""
_APART = b"EXPLAIN (COSTS OFF) WITH apart AS MATERIALIZED (\n%s\n) SELECT"
"""PostgreSQL plans no worker for a query that holds anything PARALLEL UNSAFE: set_config, query_to_xml, each function
that may change its session. It looks before it plans, so into views, policies and what is never used too."""
_PARALLEL_BY_NAME = 160000, b"force_parallel_mode", b"debug_parallel_query"
_TYPES = b"""SELECT t.oid, pg_catalog.format_type(t.oid, NULL), CASE WHEN t.typcategory = 'A' THEN (
  WITH RECURSIVE base AS (SELECT oid, typbasetype FROM pg_catalog.pg_type WHERE oid = t.typelem UNION ALL
   SELECT p.oid, p.typbasetype FROM base JOIN pg_catalog.pg_type p ON p.oid = base.typbasetype)
  SELECT oid FROM base WHERE typbasetype = 0) ELSE 0 END,
 coalesce(e.typdelim, ',') FROM pg_catalog.pg_type t LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
 WHERE t.oid = ANY($1::oid[])"""
CHUNK = 16
"""Rows that libpq gathers before we see one: few, since each may be as large as an answer."""
_GROWTH = 24 << 20
"""How much libpq may grow for one answer, unless an answer may have more than a fifth of it."""
_AT_ONCE = 10 << 20
"""How much it may grow at once: its buffer doubles until a row has room, so one of 8 MiB makes it grow by 16."""
_KEPT = 4 << 20
"""How much libpq may have grown for a connection that is used again: it never gives its buffer back."""
_AFTER = 1.0
"""Seconds beyond statement_timeout after which our own deadline ends it."""
_ERROR_BYTES = 2000


class StatementError(Error):
    """What PostgreSQL said of the statement, in its own words, each bounded."""

    status = 200

    def __init__(self, message: str, fields: dict[str, str]) -> None:
        super().__init__(message, fields.get("hint"))
        self.fields = fields


class NotAQuestionError(Error):
    """PostgreSQL would neither open a cursor for it nor describe columns of it."""

    status = 200


async def run(session: Session, text: str, bounds: Bounds, params: Sequence[bytes | None] | None = None) -> Rows:
    """Run one question of the caller's, or of ours where there are `params`. Raises an Error with the reason.

    Cancelled, or past its deadline, it makes sure that the backend stops: cancel, then terminate, then close.
    """
    exchange = Exchange(session, bounds)
    return await guarded(exchange, exchange.run(encode(text), params))


async def is_question(session: Session, text: str, bounds: Bounds) -> bool:
    """Whether PostgreSQL would open a cursor for the text. Raises its error where it is not even a statement."""
    exchange = Exchange(session, bounds)
    return await guarded(exchange, exchange.ask(encode(text)))


async def guarded(exchange: "Exchange", work: Coroutine[Any, Any, T]) -> T:
    """Do the work within its time; however it ends, the backend ends with it, or is as it was when it was new."""
    try:
        async with asyncio.timeout(exchange.bounds.seconds + _AFTER):
            done = await work
    except TimeoutError:
        await despite_cancel(exchange.stop())
        raise StatementError(
            f"canceling statement due to statement timeout ({exchange.bounds.seconds:g} s)", {"sqlstate": "57014"}
        ) from None
    except asyncio.CancelledError:
        await despite_cancel(exchange.stop())
        raise
    except TooLargeError:
        await despite_cancel(cutting.end(exchange.session))
        raise
    except ConnectionLostError:
        exchange.session.close()
        raise
    except psycopg.Error as problem:  # libpq has nobody to say it to any more
        exchange.session.close()
        raise ConnectionLostError("the connection to the database was lost") from problem
    except Error:
        await exchange.leave()
        raise
    await exchange.leave()
    return done


def encode(text: str) -> bytes:
    """A caller's text as PostgreSQL takes it. Raises StatementError for what it cannot."""
    if "\0" in text:
        raise StatementError("the statement holds a NUL character, which PostgreSQL's texts cannot", {})
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise StatementError(f"the statement is not valid Unicode at character {problem.start}", {}) from None


async def despite_cancel(work: Awaitable[Any]) -> None:
    """Finish `work` even when we are cancelled again meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
    task.result()


class Exchange:
    """One statement's conversation on one connection."""

    def __init__(self, session: Session, bounds: Bounds) -> None:
        self.session = session
        self._pgconn = session.pgconn
        self.bounds = bounds
        self._verdicts: Verdicts = session.pool.verdicts
        self._types: Types = session.pool.verdicts.types
        self._growth = max(_GROWTH, 5 * bounds.bytes)
        self._at_once = max(_AT_ONCE, 2 * bounds.bytes + (1 << 20))
        self._syncs = 0
        self._leaves_nothing = True
        self._clean = True

    async def run(self, text: bytes, params: Sequence[bytes | None] | None) -> Rows:
        with Wire(self._pgconn, self._growth, self._at_once) as wire:
            if params is not None:
                return await self._framed(wire, text, params)
            verdict, use = await self._judged(wire, text), self.session.use
            self._leaves_nothing = verdict.leaves_nothing
            guarded = use.guard is not None  # then each run is looked at: a function may read another table each time
            must = guarded and not (verdict.leaves_nothing and verdict.relations is not None)
            look = guarded or use.unseen
            rows = await self._framed(wire, text, (), look=look, must=must)
            if not (verdict.seen or use.unseen):
                more = replace(verdict, relations=use.relations, seen=True)
                self._verdicts.remember(self._verdicts.key(self.session.login, text), more)
            unknown = self._types.unknown(rows.types)
            if unknown and self._clean:  # made anew since the text was judged
                await self._learn(wire, unknown)
                rows = await self._framed(wire, text, (), look=look, must=must)
            self._clean = self._clean and wire.grown <= _KEPT
            return rows

    async def leave(self) -> None:
        """Close a connection that is not as it was when it was new; its conversation is over."""
        if not (self._clean and self._leaves_nothing):
            await self.session.leave()

    async def ask(self, text: bytes) -> bool:
        """Whether the text is a question, without running it."""
        with Wire(self._pgconn, self._growth, self._at_once) as wire:
            return (await self._judged(wire, text)).question

    async def _judged(self, wire: Wire, text: bytes) -> Verdict:
        """What PostgreSQL says of the text, or said in the last seconds. Raises NotAQuestionError."""
        key = self._verdicts.key(self.session.login, text)
        verdict = self._verdicts.get(key)
        if verdict is None:
            question, shows = await self.judge(wire, text)
            if not question and not shows:
                raise NotAQuestionError(
                    "PostgreSQL describes no columns for this statement, so it is no question, and was not run",
                    "query_database takes what has an answer: SELECT, VALUES, TABLE, WITH … SELECT, EXPLAIN, SHOW",
                )
            self.session.use.described = True
            verdict = await self._planned(wire, text) if question else Verdict(False, None, False)
            self._verdicts.remember(key, verdict)
        self.session.use.described = True
        if verdict.relations is not None:  # none at all is something that is known, too
            self.session.use.relations = verdict.relations
            if self.session.use.guard is not None:
                self.session.use.guard(verdict.relations)
        if verdict.question:  # else it may be the EXPLAIN ANALYZE of one, which runs it
            self.session.use.unseen = not (verdict.seen and verdict.leaves_nothing)
        return verdict

    def _sync(self) -> None:
        self._pgconn.pipeline_sync()
        self._syncs += 1

    async def _synced(self, wire: Wire) -> None:
        await wire.sync()
        self._syncs -= 1

    # -- what PostgreSQL says of a text ------------------------------------------------------------------------

    async def judge(self, wire: Wire, text: bytes, before: bytes = _CURSOR) -> tuple[bool, bool]:
        """(would PostgreSQL take it behind `before`: open a cursor for it; does it describe columns of it), without
        running anything."""
        self._pgconn.send_prepare(b"", before + text)
        self._sync()
        self._pgconn.send_prepare(b"", text)
        self._pgconn.send_describe_prepared(b"")
        self._sync()
        await wire.flush()
        cursor = await wire.command()
        await self._synced(wire)
        parsed = await wire.command()
        described = await wire.command()
        await self._synced(wire)
        for answer in (parsed, described):
            if answer.status != _Status.COMMAND_OK:
                raise error(answer)
        oids = {described.ftype(i) for i in range(described.nfields)}
        if unknown := self._types.unknown(oids):
            await self._learn(wire, unknown)
        return cursor.status == _Status.COMMAND_OK, described.nfields > 0

    async def _learn(self, wire: Wire, oids: set[int]) -> None:
        """Ask the catalog about types that PostgreSQL did not come with, and about their elements."""
        wanted = "{" + ",".join(map(str, sorted(oids))) + "}"
        [answer] = await self._ours(wire, (_TYPES, (wanted.encode(),)))
        if isinstance(answer, StatementError):
            raise answer
        found = [UnknownType(int(row[0]), row[1].decode(), int(row[2]), row[3].decode()) for row in answer]
        for one in found:
            self._types.learn(one)

    async def _planned(self, wire: Wire, text: bytes) -> Verdict:
        """What a question reads, and whether it leaves nothing, where PostgreSQL says so.

        A cursor is declared for it, which plans it and locks what the plan reads, and is never fetched from. (EXPLAIN
        would print every constant that the planner has folded, of a gigabyte if need be; that of a query which does
        not use it prints nothing of it.)
        """
        since, before, after = _PARALLEL_BY_NAME
        parallel = after if self._pgconn.server_version >= since else before
        _, locked, _, plan = await self._ours(
            wire,
            (_CURSOR + text, ()),
            (LOCKED, ()),
            (_GATHER, (parallel,)),
            (_APART % text.rstrip(b"; \t\r\n"), ()),
        )
        relations = (
            None if isinstance(locked, StatementError) else tuple(row[0].decode("utf-8", "replace") for row in locked)
        )
        return Verdict(True, relations, not isinstance(plan, StatementError) and plan[0][0] == b"Gather")

    async def _ours(self, wire: Wire, *statements: Statement) -> list[list[tuple[bytes, ...]] | StatementError]:
        """The cells of statements of ours, as they came, run in one transaction up to the first that fails."""
        self._send(*statements)
        await wire.flush()
        await self._begun(wire)
        results = [await wire.command() for _ in statements]
        await self._ended(wire)
        return [cells(result) for result in results]

    # -- the frame -------------------------------------------------------------------------------------------

    def begin(self, begin: bytes, *statements: Statement) -> None:
        """Queue the first segment of a frame: a transaction, its limits, and these."""
        pgconn = self._pgconn
        pgconn.send_query_params(begin, None)
        pgconn.send_query_params(_LIMITS, [b"%d" % int(self.bounds.seconds * 1000)])
        for text, params in statements:
            pgconn.send_query_params(text, list(params) or None)
        self._sync()

    def _send(self, *statements: Statement) -> None:
        if self.session.conn.closed or not self._clean:
            raise ConnectionLostError("the connection to the database was lost")
        self.begin(b"BEGIN READ ONLY", *statements)
        pgconn = self._pgconn
        pgconn.send_query_params(b"ROLLBACK", None)
        since, flush = _FLUSH
        unlock = flush if pgconn.server_version >= since else _UNLOCK
        pgconn.send_query_params(unlock, [b"%.9f" % random.uniform(-1, 1)])  # noqa: S311 - no secret
        self._sync()

    async def _begun(self, wire: Wire) -> None:
        begin = await wire.command()
        limits = await wire.command()
        if begin.status != _Status.COMMAND_OK or limits.status != _Status.TUPLES_OK:
            self._clean = False
            raise error(begin if begin.status != _Status.COMMAND_OK else limits)
        if limits.get_value(0, 2) != b"%d" % self.session.pid:  # a pooler gives its clients any backend by now
            self.session.close()
            raise ForbiddenError(f"database {self.session.pool.login.name!r} is not served: {SHARED_BACKENDS}")

    async def _ended(self, wire: Wire) -> None:
        """Take the rest of the frame, and see whether it is as it should be."""
        await self._synced(wire)
        rollback = await wire.command()
        unlock = await wire.command()
        await self._synced(wire)
        self._clean = (  # else a late cancel hit the frame, or a prepared statement would outlive the call
            rollback.status == _Status.COMMAND_OK
            and unlock.status == _Status.TUPLES_OK
            and unlock.get_value(0, 1) == b"0"
            and self._pgconn.transaction_status == pq.TransactionStatus.IDLE
        )

    async def _framed(
        self, wire: Wire, text: bytes, params: Sequence[bytes | None], *, look: bool = False, must: bool = False
    ) -> Rows:
        """The statement's rows. `look`: at what it has read, functions too, which is more than its plan says; `must`:
        without that it is not answered."""
        self._send((text, params), *([(LOCKED if self._leaves_nothing else SEEN, ())] if look else []))
        await wire.flush()
        await self._begun(wire)
        answer = Answer(self._types, self.bounds)
        self._pgconn.set_chunked_rows_mode(min(CHUNK, self.bounds.rows + 1))
        failed: StatementError | None = None
        stop: asyncio.Task[None] | None = None
        try:
            while (result := await wire.result()) is not None:
                if result.status in (_Status.TUPLES_CHUNK, _Status.TUPLES_OK, _Status.COMMAND_OK, _Status.SINGLE_TUPLE):
                    if stop is None and not await answer.take(result):
                        stop = asyncio.create_task(self.session.cancel())
                elif self.is_copy(result):
                    raise ConnectionLostError("the statement turned out to be a COPY, which is not a question")
                elif stop is None:
                    failed = error(result)
            locked = cells(await wire.command()) if look else []
            await self._ended(wire)
        except TooLargeError:
            if must or not answer.columns:
                raise
            answer.too_large()
            await cutting.end(self.session)
            return answer.done()
        except ConnectionLostError:
            if failed is None:
                raise
            self._clean = False  # PostgreSQL's last words come before its end
            raise withheld(failed) if must else failed from None
        finally:
            if stop is not None:
                await asyncio.shield(stop)
        if failed is not None:
            raise withheld(failed) if must else failed
        if look:
            self.see(locked, must=must)
        return answer.done()

    def see(self, locked: list[tuple[bytes, ...]] | StatementError, *, must: bool = True) -> None:
        """Note what a statement has locked beside what its plan reads, and let the session's guard hear of it; where
        PostgreSQL does not say (a statement that was stopped), only if it `must`."""
        use, known = self.session.use, None
        if not isinstance(locked, StatementError):
            found = {row[0].decode("utf-8", "replace") for row in locked}
            known = use.relations = tuple(sorted(found.union(use.relations or ())))
            use.unseen = False
        if use.guard is not None and (must or known is not None):
            use.guard(known)

    @staticmethod
    def has_rows(result: Any) -> bool:
        """Whether it is a result that went well, with rows or without."""
        return result.status in (_Status.TUPLES_CHUNK, _Status.TUPLES_OK, _Status.COMMAND_OK, _Status.SINGLE_TUPLE)

    @staticmethod
    def is_copy(result: Any) -> bool:
        """Whether PostgreSQL now speaks COPY."""
        return result.status in (_Status.COPY_IN, _Status.COPY_OUT, _Status.COPY_BOTH)

    async def stop(self) -> None:
        """End what is still running: politely, so that the connection can be used again, or else for good."""
        if self.session.cut or self.session.conn.closed:
            self.session.close()
            return
        try:
            async with asyncio.timeout(0.5):
                await self.session.cancel(0.4)
                with Wire(self._pgconn, self._growth, self._at_once) as wire:
                    while self._syncs:
                        result = await wire.result()
                        if result is not None and result.status == _Status.PIPELINE_SYNC:
                            self._syncs -= 1
        except (TimeoutError, ConnectionLostError, TooLargeError, psycopg.Error):
            await cutting.end(self.session)
            return
        # A cancel that came late may have hit the ROLLBACK: what is not clearly clean is not used again.
        await self.session.leave()


def cells(result: Any) -> list[tuple[bytes, ...]] | StatementError:
    """A result's cells as they came, or what PostgreSQL said instead."""
    if result.status not in (_Status.TUPLES_OK, _Status.COMMAND_OK):
        return error(result)
    return [
        tuple(result.get_value(row, column) or b"" for column in range(result.nfields)) for row in range(result.ntuples)
    ]


def error(result: Any) -> StatementError:
    """What PostgreSQL said, or that what stood before it went wrong (PIPELINE_ABORTED has no words of its own)."""
    if result.status == _Status.PIPELINE_ABORTED:
        return StatementError("the statement was not run", {})
    return _said(result)


def withheld(failed: StatementError) -> StatementError:
    """An error without its words, which may hold a row of what nobody may read: what it has read nobody can say."""
    state = failed.fields.get("sqlstate", "none")
    return StatementError(
        f"it failed (SQLSTATE {state}), and PostgreSQL's words are withheld: they may hold what nobody may read",
        {
            "sqlstate": state,
            "hint": "here are canary tables, and PostgreSQL does not say what a statement that fails has read",
        },
    )


def _said(result: Any) -> StatementError:
    """PostgreSQL's own words: message, SQLSTATE, detail, hint, position. Never where it runs or who we are."""
    wanted = {
        "sqlstate": pq.DiagnosticField.SQLSTATE,
        "detail": pq.DiagnosticField.MESSAGE_DETAIL,
        "hint": pq.DiagnosticField.MESSAGE_HINT,
        "position": pq.DiagnosticField.STATEMENT_POSITION,
        "context": pq.DiagnosticField.CONTEXT,
    }
    fields = {name: _bounded(value) for name, code in wanted.items() if (value := result.error_field(code))}
    primary = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)
    if primary is None:
        raise ConnectionLostError("the connection to the database was lost")
    return StatementError(_bounded(primary), fields)


def _bounded(value: bytes) -> str:
    text = value[:_ERROR_BYTES].decode("utf-8", "ignore" if len(value) > _ERROR_BYTES else "replace")
    return text + "…" if len(value) > _ERROR_BYTES else text


def elapsed(since: float) -> float:
    """Milliseconds since a `monotonic()`, to the microsecond."""
    return round((monotonic() - since) * 1000, 3)
