"""The least that can be built on the official SDK: one tool that runs a statement, and nothing of what mcpctl adds.

python benchmarks/bare_sdk.py PORT POOL        with the DSN in the environment variable BENCH_DSN
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from mcp.server import Server, ServerRequestContext
from mcp.types import CallToolRequestParams, CallToolResult, ListToolsResult, PaginatedRequestParams, TextContent, Tool
from psycopg_pool import AsyncConnectionPool
from pydantic_core import to_json

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
Context = ServerRequestContext[Any]


def build(pool: AsyncConnectionPool) -> Server[Any]:
    """The server; `pool` must be open while it serves."""

    async def list_tools(context: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=[Tool(name="query_database", description="Run a statement.", input_schema=SCHEMA)])

    async def call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
        async with pool.connection() as connection:
            cursor = await connection.execute((params.arguments or {})["query"])
            names = [column.name for column in cursor.description or ()]
            found = {"columns": names, "rows": await cursor.fetchall()}
        return CallToolResult(content=[TextContent(type="text", text=to_json(found).decode())])

    return Server("bare", on_list_tools=list_tools, on_call_tool=call_tool)


def main() -> None:
    """Serve until killed."""
    port, size = map(int, sys.argv[1:])
    pool = AsyncConnectionPool(
        os.environ["BENCH_DSN"], min_size=size, max_size=size, open=False, kwargs={"autocommit": True}
    )
    app = build(pool).streamable_http_app(json_response=True, stateless_http=True)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with pool, inner(app) as state:
            yield state

    app.router.lifespan_context = lifespan
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
