"""execute_statement: a statement that may write, as the caller's own writing role."""

from time import monotonic
from typing import Any

from mcpctl.postgres import execution, statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.session import Session
from mcpctl.tools.definition import Result, Tool
from mcpctl.tools.query import DATABASE, as_result


async def _execute(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Result:
    begun = monotonic()
    done = await execution.execute(session, arguments["statement"], bounds)
    head = {"command": done.command, "rows_affected": done.affected}
    answer = as_result(done.returned, statement.elapsed(begun), head)
    answer.command = done.command
    return answer


EXECUTE = Tool(
    name="execute_statement",
    description=(
        "Run one INSERT, UPDATE, DELETE or MERGE (or SELECT) and commit it. RETURNING gives rows. Say before what it "
        "will change."
    ),
    permission="tools:execute_statement",
    properties={"statement": {"type": "string", "description": "one SQL statement"}, "database": DATABASE},
    required=("statement",),
    ask=_execute,
    statement="statement",
    access="write",
    changes=True,
)
