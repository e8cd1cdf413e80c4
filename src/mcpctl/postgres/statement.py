"""One statement: one read-only transaction, bounded rows, bytes and time, and nothing of it left behind.

A text is asked about before it runs (Parse and Describe; PostgreSQL's word decides, never ours), and what PostgreSQL
said is remembered. A known question is then one packet and one round trip, in the frame that framed.py puts around it.
That ends with ROLLBACK, never COMMIT: it undoes what PostgreSQL lets a read-only transaction write, and every setting.
What a rollback cannot undo goes with the connection, which is closed unless PostgreSQL says that the text leaves
nothing. Of such a text, and of a new one, the locks are looked at before the ROLLBACK: what functions read is in no
plan.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from mcpctl.errors import Error
from mcpctl.postgres import cutting, frame
from mcpctl.postgres.answer import Answer, Bounds, Rows, whole
from mcpctl.postgres.framed import Framed
from mcpctl.postgres.said import StatementError, cells, error, withheld
from mcpctl.postgres.session import Session
from mcpctl.postgres.values import UnknownType
from mcpctl.postgres.verdicts import ALL, CHUNK, FEW, SMALL_CHUNK, Key, Verdict
from mcpctl.postgres.wire import COPIES, ConnectionLostError, TooLargeError, Wire

T = TypeVar("T")
_Status = pq.ExecStatus
_ROWS = frozenset(map(int, (_Status.TUPLES_CHUNK, _Status.TUPLES_OK, _Status.COMMAND_OK, _Status.SINGLE_TUPLE)))
_CURSOR = b"declare c no scroll cursor for\n"
_KEPT = 4 << 20
"""How much libpq may have grown for a connection that is used again: it never gives its buffer back."""
AFTER = 1.0
"""Seconds beyond statement_timeout after which our own deadline ends it."""
_GROWN = (
    "the answer has become far larger than it was when this was asked last, seconds ago; nothing of it was taken",
    "ask again",
)


class NotAQuestionError(Error):
    """PostgreSQL would neither open a cursor for it nor describe columns of it."""

    status = 200


def run(
    session: Session, text: str, bounds: Bounds, params: Sequence[bytes | None] | None = None
) -> Coroutine[Any, Any, Rows]:
    """Run one question of the caller's, or of ours where there are `params`. Raises an Error with the reason.

    Cancelled, or past its deadline, it makes sure that the backend stops: cancel, then terminate, then close.
    """
    exchange = Exchange(session, bounds)
    if params is None:
        return exchange.run(encode(text), _as_they_are)
    return _ending(exchange, exchange.ours(encode(text), params))


def answered(session: Session, text: str, bounds: Bounds, made: Callable[[Rows, float], T]) -> Coroutine[Any, Any, T]:
    """`run`, for what is `made` of a caller's rows and the milliseconds that they took."""
    return Exchange(session, bounds).run(encode(text), made)


def _as_they_are(rows: Rows, elapsed: float) -> Rows:
    return rows


async def is_question(session: Session, text: str, bounds: Bounds) -> bool:
    """Whether PostgreSQL would open a cursor for the text. Raises its error where it is not even a statement."""
    exchange = Exchange(session, bounds)
    return await _ending(exchange, exchange.ask(encode(text)))


async def guarded(exchange: "Exchange", work: Coroutine[Any, Any, T]) -> T:
    """Do the work within its time; however it ends, the backend ends with it, or is as it was when it was new."""

    async def timed() -> T:
        async with asyncio.timeout(exchange.bounds.seconds + AFTER):
            return await work

    return await _ending(exchange, timed())


async def _ending(exchange: "Exchange", work: Coroutine[Any, Any, T]) -> T:
    """`guarded`, for what waits for nothing but its exchange, which has its deadline itself."""
    try:
        done = await work
    except _WRONG as problem:
        raise await exchange.over(problem) from None
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


_WRONG = (TimeoutError, asyncio.CancelledError, psycopg.Error, Error)
"""How an exchange goes wrong."""


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


class Exchange(Framed):
    """One statement's conversation on one connection."""

    async def run(self, text: bytes, made: Callable[[Rows, float], T]) -> T:
        """Answer a question of the caller's, and see what is known of it."""
        begun = monotonic()
        try:
            with self.wire(self.bounds.seconds + AFTER) as wire:
                use = self.session.use
                key, known = self._verdicts.of(self.session.login, text)
                verdict = known or await self._judged(wire, text, key)
                self._note(verdict)
                self._leaves_nothing = verdict.leaves_nothing
                guarded = use.guard is not None  # then each run is looked at: a function may read another table then
                must = guarded and not (verdict.leaves_nothing and verdict.relations is not None)
                look = guarded or use.unseen
                self._known = verdict.seen and not look
                try:
                    rows = await self._framed(wire, text, (), look=look, must=must, chunk=verdict.chunk)
                except TooLargeError:
                    self._verdicts.amend(key, verdict, replace(verdict, chunk=CHUNK))
                    if verdict.chunk == ALL:
                        raise TooLargeError(*_GROWN) from None
                    raise
                unknown = None if rows.shape is None else rows.shape.unknown
                chunk = _chunk(rows)
                if not (verdict.seen or use.unseen) or verdict.chunk != chunk:
                    seen, relations = (True, use.relations) if not use.unseen else (verdict.seen, verdict.relations)
                    self._verdicts.amend(key, verdict, replace(verdict, relations=relations, seen=seen, chunk=chunk))
                if unknown and self._clean:  # made anew since the text was judged
                    await self._learn(wire, unknown)
                    rows = await self._framed(wire, text, (), look=look, must=must)
                self._clean = self._clean and wire.grown <= _KEPT
        except _WRONG as problem:
            raise await self.over(problem) from None
        except Exception:  # a fault of ours, or of what PostgreSQL has sent: what else is wrong nobody knows
            self.session.close()
            raise
        if not self.clean:
            await self.session.leave()
        return made(rows, elapsed(begun))

    async def ours(self, text: bytes, params: Sequence[bytes | None]) -> Rows:
        """Answer a question of ours."""
        with self.wire(self.bounds.seconds + AFTER) as wire:
            return await self._framed(wire, text, params)

    async def over(self, problem: BaseException) -> BaseException:
        """See that the backend ends, or is as it was, behind what went wrong; what whoever asked is to hear of it."""
        if isinstance(problem, TimeoutError):
            await despite_cancel(self.stop())
            said = f"canceling statement due to statement timeout ({self.bounds.seconds:g} s)"
            return StatementError(said, {"sqlstate": "57014"})
        if isinstance(problem, asyncio.CancelledError):
            await despite_cancel(self.stop())
        elif isinstance(problem, TooLargeError):
            await despite_cancel(cutting.end(self.session))
        elif isinstance(problem, ConnectionLostError):
            self.session.close()
        elif isinstance(problem, psycopg.Error):  # libpq has nobody to say it to any more
            self.session.close()
            return ConnectionLostError("the connection to the database was lost")
        else:
            await self.leave()
        return problem

    async def ask(self, text: bytes) -> bool:
        """Whether the text is a question, without running it."""
        with self.wire(self.bounds.seconds + AFTER) as wire:
            key, known = self._verdicts.of(self.session.login, text)
            verdict = known or await self._judged(wire, text, key)
            self._note(verdict)
            return verdict.question

    async def _judged(self, wire: Wire, text: bytes, key: Key) -> Verdict:
        """What PostgreSQL says of the text. Raises NotAQuestionError."""
        question, shows = await self.judge(wire, text)
        if not question and not shows:
            raise NotAQuestionError(
                "PostgreSQL describes no columns for this statement, so it is no question, and was not run",
                "query_database takes what has an answer: SELECT, VALUES, TABLE, WITH … SELECT, EXPLAIN, SHOW",
            )
        self.session.use.described = True
        verdict = await self._planned(wire, text) if question else Verdict(False, None, False)
        self._verdicts.remember(key, verdict)
        return verdict

    def _note(self, verdict: Verdict) -> None:
        """Note for the call what is known of its text."""
        use = self.session.use
        use.described = True
        if verdict.relations is not None:  # none at all is something that is known, too
            use.relations = verdict.relations
            if use.guard is not None:
                use.guard(verdict.relations)
        if verdict.question:  # else it may be the EXPLAIN ANALYZE of one, which runs it
            use.unseen = not (verdict.seen and verdict.leaves_nothing)

    # -- what PostgreSQL says of a text ------------------------------------------------------------------------

    async def judge(self, wire: Wire, text: bytes, before: bytes = _CURSOR) -> tuple[bool, bool]:
        """(would PostgreSQL take it behind `before`: open a cursor for it; does it describe columns of it), without
        running anything."""
        self._pgconn.send_prepare(b"", before + text)
        wire.sync()
        self._pgconn.send_prepare(b"", text)
        self._pgconn.send_describe_prepared(b"")
        wire.sync()
        await wire.flush()
        cursor = await wire.command()
        await wire.synced()
        parsed = await wire.command()
        described = await wire.command()
        await wire.synced()
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
        [answer] = await self._ours(wire, (frame.TYPES, (wanted.encode(),)))
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
        since, before, after = frame.PARALLEL_BY_NAME
        parallel = after if self._pgconn.server_version >= since else before
        _, locked, _, plan = await self._ours(
            wire,
            (_CURSOR + text, ()),
            (frame.LOCKED, ()),
            (frame.GATHER, (parallel,)),
            (frame.APART % text.rstrip(b"; \t\r\n"), ()),
        )
        relations = (
            None if isinstance(locked, StatementError) else tuple(row[0].decode("utf-8", "replace") for row in locked)
        )
        return Verdict(True, relations, not isinstance(plan, StatementError) and plan[0][0] == b"Gather")

    async def _framed(
        self,
        wire: Wire,
        text: bytes,
        params: Sequence[bytes | None],
        *,
        look: bool = False,
        must: bool = False,
        chunk: int = CHUNK,
    ) -> Rows:
        """The statement's rows. `look`: at what it has read, functions too, which is more than its plan says; `must`:
        without that it is not answered. `chunk`: see Verdict."""
        if self.session.seconds != self.bounds.seconds:
            await self.ready(wire)
        asked = frame.LOCKED if self._leaves_nothing else frame.SEEN
        if look and asked is frame.SEEN:
            self.refresh(wire)
        self._send(wire, ((text, params), (asked, ())) if look else ((text, params),))
        if wire.sent():
            await wire.coming()
            wire.came()
        else:
            await wire.flush()
        if chunk == ALL and not look and (rows := self._answered_at_once(wire)) is not None:
            return rows
        if not self._begun_at_once(wire):
            await self.begun(wire)
        answer = Answer(self._types, self.bounds, self.session.conn.loaders, trusted=chunk != CHUNK)
        if chunk != ALL:
            self._pgconn.set_chunked_rows_mode(min(chunk, self.bounds.rows + 1))
        take = self._pgconn.get_result
        failed: StatementError | None = None
        stop: asyncio.Task[None] | None = None
        try:
            while (result := take() if wire.whole() else await wire.result()) is not None:
                if result.status in _ROWS:
                    if stop is None and not await answer.take(result):
                        stop = asyncio.create_task(self.session.cancel())
                    if answer.heavy:
                        wire.forget_size()
                elif result.status in COPIES:
                    raise ConnectionLostError("the statement turned out to be a COPY, which is not a question")
                else:
                    wire.see()
                    if stop is None:
                        failed = error(result)
            locked = cells(await wire.command()) if look else []
            if not self._ended_at_once(wire):
                await self._ended(wire, stop)
        except TooLargeError:
            if must or answer.shape is None:
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
            answer.rest()
            if stop is not None:
                await asyncio.shield(stop)
        if failed is not None:
            raise withheld(failed) if must else failed
        if look:
            self.see(locked, must=must)
        return answer.done()

    def _answered_at_once(self, wire: Wire) -> Rows | None:
        """Take all of a frame with a small answer, where all of it is there, and as it is mostly; else none of it."""
        loaders = self.session.conn.loaders
        if loaders is None or (found := self._at_once(wire)) is None:
            return None
        result, unlock = found[4], found[6]
        self._ended_so(wire, unlock)
        if (rows := whole(self._types, loaders, self.bounds, result)) is None:
            self._taken_back(wire, found)
        return rows

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
        return result.status in _ROWS

    async def stop(self) -> None:
        """End what is still running: politely, so that the connection can be used again, or else for good."""
        if self.session.cut or self.session.conn.closed:
            self.session.close()
            return
        try:
            async with asyncio.timeout(0.5):
                await self.session.cancel(0.4)
                with self.wire() as wire:
                    while wire.owed > 0:
                        await asyncio.sleep(0)  # of a conversation that is out of step, libpq says None for ever
                        result = await wire.result()
                        if result is not None and result.status == _Status.PIPELINE_SYNC:
                            wire.owed -= 1
        except (TimeoutError, ConnectionLostError, TooLargeError, psycopg.Error):
            await cutting.end(self.session)
            return
        # A cancel that came late may have hit the ROLLBACK: what is not clearly clean is not used again.
        await self.session.leave()


def _chunk(rows: Rows) -> int:
    """How many rows of the same text libpq is to gather the next time."""
    if not rows.even:
        return CHUNK
    few = rows.count <= FEW and rows.note is None and rows.shape is not None and rows.shape.plain
    return ALL if few else SMALL_CHUNK


def elapsed(since: float) -> float:
    """Milliseconds since a `monotonic()`, to the microsecond."""
    return int((monotonic() - since) * 1e6 + 0.5) / 1000  # a fifth of what round() to three places takes
