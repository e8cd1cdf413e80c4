"""One statement that may write: in a transaction of its own, committed when its answer is whole, on a connection that
is closed afterwards, so that nothing of it but its rows outlives it.

PostgreSQL says beforehand, without running it, whether it would PREPARE the text: it does for SELECT, VALUES, INSERT,
UPDATE, DELETE and MERGE, and for nothing else (its manual, PREPARE). So no setting, role, password, session or
transaction can be touched by the text itself. Its parser takes SELECT INTO for a SELECT there: what counts rows as one
and describes no columns has made a table, and is rolled back.

    BEGIN READ WRITE · limits · the statement · what waits for the COMMIT · what it has locked · sync
    COMMIT · sync
"""

from dataclasses import dataclass
from typing import Any

from psycopg import pq

from mcpctl.postgres import cutting, frame, statement
from mcpctl.postgres.answer import Answer, Bounds, Rows
from mcpctl.postgres.said import StatementError, cells, error, withheld
from mcpctl.postgres.session import Session
from mcpctl.postgres.statement import Exchange, NotAQuestionError
from mcpctl.postgres.verdicts import CHUNK
from mcpctl.postgres.wire import TooLargeError, Wire

_PREPARE = b"prepare x as\n"
_DEFERRED = b"SET CONSTRAINTS ALL IMMEDIATE"
"""Runs the constraints and triggers that are deferred to the COMMIT: what they read is looked at, too."""
_TAKEN = "execute_statement takes SELECT, VALUES, INSERT, UPDATE, DELETE and MERGE, also behind WITH"


@dataclass
class Executed:
    """What a statement did: PostgreSQL's command tag, the rows it counted, and those it returned."""

    command: str
    affected: int
    returned: Rows


async def execute(session: Session, text: str, bounds: Bounds) -> Executed:
    """Run one statement and commit it. Raises an Error with the reason, and then nothing is committed, unless the
    connection was lost or the call cancelled in the very moment of the COMMIT."""
    exchange = _Execution(session, bounds)
    return await statement.guarded(exchange, exchange.execute(statement.encode(text)))


class _Execution(Exchange):
    async def execute(self, text: bytes) -> Executed:
        self._leaves_nothing = False  # the connection is closed afterwards, whatever the statement was
        with self.wire() as wire:
            accepted, _ = await self.judge(wire, text, _PREPARE)
            if not accepted:
                raise NotAQuestionError("PostgreSQL would not PREPARE this statement, so it was not run", _TAKEN)
            await self.ready(wire)
            self.refresh(wire)
            self.begin(b"BEGIN READ WRITE", [(text, ()), (_DEFERRED, ()), (frame.SEEN, ())])
            wire.sync()
            await wire.flush()
            await self.begun(wire)
            try:
                done = await self._results(wire)
            except TooLargeError:
                await cutting.end(self.session)
                raise StatementError(
                    "a row that it returns is far too large; nothing was changed", {"hint": "return fewer columns"}
                ) from None
            self.session.use.lasts()
            await self._commit(wire)
            return done

    async def _results(self, wire: Wire) -> Executed:
        """The statement's rows, as many as an answer may hold, and what it locked. Raises what PostgreSQL said, and
        for what made a table."""
        answer = Answer(self._types, self.bounds)
        self._pgconn.set_chunked_rows_mode(min(CHUNK, self.bounds.rows + 1))
        failed: StatementError | None = None
        wanted, tag = True, b""
        while (result := await wire.result()) is not None:
            if self.has_rows(result):
                tag = result.command_status or tag
                if result.status == pq.ExecStatus.COMMAND_OK and tag.startswith(b"SELECT"):
                    failed = StatementError("a SELECT INTO makes a table, so it was rolled back", {"hint": _TAKEN})
                wanted = wanted and await answer.take(result)
                if answer.heavy:
                    wire.forget_size()
            else:
                failed = failed or self._told(result)
        deferred = cells(await wire.command())
        locked = cells(await wire.command())
        await wire.synced()
        failed = failed or (deferred if isinstance(deferred, StatementError) else None)
        if failed is not None:
            raise failed
        self.see(locked)
        words = tag.decode("utf-8", "replace").split()
        affected = int(words[-1]) if words and words[-1].isdigit() else 0
        return Executed(" ".join(words), affected, answer.done())

    def _told(self, result: Any) -> StatementError:
        """PostgreSQL's error, without its words where a function may have put a canary's row into them."""
        failed = error(result)
        return failed if self.session.use.guard is None else withheld(failed)

    async def _commit(self, wire: Wire) -> None:
        self._pgconn.send_query_params(b"COMMIT", None)
        wire.sync()
        await wire.flush()
        committed: Any = await wire.command()
        await wire.synced()
        if not self.has_rows(committed):
            raise self._told(committed)
        if committed.command_status != b"COMMIT":
            raise StatementError("the transaction was rolled back: something in it had failed", {})
