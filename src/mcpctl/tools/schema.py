"""get_schema_info: what there is to ask about."""

from typing import Any

from mcpctl.postgres import catalog
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.session import Session
from mcpctl.tools.definition import Result, Tool, result
from mcpctl.tools.query import DATABASE


async def _schema(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Result:
    schema, name = arguments.get("schema"), arguments.get("table")
    if name is not None:
        return result({"table": await catalog.table(session, schema, name, bounds)})
    found = await catalog.tables(session, schema, bounds)
    names = [column for column, _ in found.columns]
    tables = [{key: value for key, value in zip(names, row, strict=True) if value is not None} for row in found.rows]
    answer: dict[str, Any] = {"tables": tables}
    if found.note is not None:
        answer["note"] = "There are more tables; name a `schema`."
    done = result(answer)
    done.rows, done.bytes = len(tables), len(found.json)
    return done


SCHEMA = Tool(
    name="get_schema_info",
    description="List the tables you may read; with `table`, its columns, types, comments, constraints and indexes.",
    permission="tools:get_schema_info",
    properties={
        "schema": {"type": "string", "description": "only this schema"},
        "table": {"type": "string", "description": "name, or schema.name"},
        "database": DATABASE,
    },
    ask=_schema,
)
