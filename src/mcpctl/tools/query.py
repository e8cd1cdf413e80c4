"""query_database and explain_query: a statement in, its rows or its plan out."""

from collections.abc import Coroutine, Mapping
from time import monotonic
from typing import Any

import msgspec

from mcpctl.errors import Error, UsageError
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds, Rows
from mcpctl.postgres.said import StatementError
from mcpctl.postgres.session import Session
from mcpctl.postgres.statement import NotAQuestionError
from mcpctl.tools.definition import Result, Tool, encode, result

DATABASE = {"type": "string", "description": "from list_databases; else the default"}
MOST = 20
"""Databases that one call may ask."""


def _query(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Coroutine[Any, Any, Result]:
    limit = arguments.get("limit")
    if limit is not None and limit < bounds.rows:
        bounds = Bounds(limit, bounds.bytes, bounds.seconds)
    return statement.answered(session, arguments["query"], bounds, as_result)


def as_result(found: Rows, elapsed: float, before: Mapping[str, Any] = {}) -> Result:
    """Rows as an answer; what stands `before` them in it. Each cell was encoded once, when it came."""
    tail: dict[str, Any] = {"row_count": found.count, "truncated": found.note is not None, "elapsed_ms": elapsed}
    if found.note is not None:
        tail["note"] = found.note
    head = encode(before)[:-1] + b"," if before else b"{"
    columns = b"[]" if found.shape is None else found.shape.json
    pieces = (head, b'"columns":', columns, b',"rows":', found.json, b",", encode(tail)[1:])
    return Result(b"".join(pieces).decode(), rows=found.count, bytes=len(found.json))


def together(results: Mapping[str, Result | Error]) -> Result:
    """One answer of several databases: each one's rows, or what went wrong there, under its name."""
    texts: list[msgspec.Raw] = []
    for name, found in results.items():
        if isinstance(found, Result):
            texts.append(msgspec.Raw(encode({"database": name})[:-1] + b"," + found.text.encode()[1:]))
        else:
            texts.append(msgspec.Raw(encode({"database": name, "error": said(found)})))
    done = [found for found in results.values() if isinstance(found, Result)]
    return Result(
        encode({"results": texts}).decode(),
        rows=sum(found.rows or 0 for found in done),
        bytes=sum(found.bytes or 0 for found in done),
    )


def said(problem: Error) -> str:
    """An error as text: PostgreSQL's own words with SQLSTATE, detail, hint and position, or ours with its hint."""
    lines = [problem.message]
    fields = problem.fields if isinstance(problem, StatementError) else {"hint": problem.hint}
    for name in ("sqlstate", "detail", "hint", "position", "context"):
        if value := fields.get(name):
            lines.append(f"{name.upper() if name == 'sqlstate' else name.capitalize()}: {value}")
    return "\n".join(lines)


QUERY = Tool(
    name="query_database",
    description=(
        "Run one read-only SQL question (SELECT, VALUES, WITH, EXPLAIN, SHOW) on PostgreSQL. Rows come as arrays in "
        "column order; `truncated` and `note` say when more exist."
    ),
    permission="tools:query_database",
    properties={
        "query": {"type": "string", "description": "one SQL statement"},
        "database": DATABASE,
        "databases": {
            "type": "array",
            "items": {"type": "string"},
            "maxItems": MOST,
            "description": "ask several at once; then `results` has one entry each",
        },
        "limit": {"type": "integer", "minimum": 1, "description": "rows at most"},
    },
    required=("query",),
    output={
        "type": "object",
        "properties": {
            "columns": {"type": "array"},
            "rows": {"type": "array"},
            "row_count": {"type": "integer"},
            "truncated": {"type": "boolean"},
            "results": {"type": "array"},
        },
    },
    ask=_query,
    statement="query",
)


async def _is_question(session: Session, query: str, bounds: Bounds) -> bool:
    try:
        return await statement.is_question(session, query, bounds)
    except NotAQuestionError:
        return False


async def _explain(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Result:
    begun = monotonic()
    query, analyze = arguments["query"], arguments.get("analyze", False)
    if analyze and not await _is_question(session, query, bounds):
        raise UsageError(
            "analyze runs the statement, and this one is no question (SELECT, VALUES, TABLE, WITH … SELECT)",
            "leave out analyze to see its plan alone",
        )
    prefix = "EXPLAIN (ANALYZE, BUFFERS)\n" if analyze else "EXPLAIN (COSTS)\n"  # the (…) takes no further option
    try:
        found = await statement.run(session, prefix + query, bounds)
    except StatementError as problem:
        if "position" in problem.fields:
            problem.fields["position"] = str(max(1, int(problem.fields["position"]) - len(prefix)))
        raise
    answer: dict[str, Any] = {"plan": [row[0] for row in found.rows], "elapsed_ms": statement.elapsed(begun)}
    if found.note is not None:
        answer["note"] = found.note
    done = result(answer)
    done.rows, done.bytes = found.count, len(found.json)
    return done


EXPLAIN = Tool(
    name="explain_query",
    description="Show PostgreSQL's plan for a statement without running it; with `analyze`, run it and show the times.",
    permission="tools:explain_query",
    properties={
        "query": {"type": "string", "description": "one SQL statement, without EXPLAIN"},
        "analyze": {"type": "boolean", "description": "run it too (questions only)"},
        "database": DATABASE,
    },
    required=("query",),
    ask=_explain,
    statement="query",
)
