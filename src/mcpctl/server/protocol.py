"""The SDK's edge: the whole protocol, both eras; every tools/call ends in `Calls.call`."""

from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server import CacheHint, Server, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ListPromptsResult,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    TextContent,
    Tool,
    ToolAnnotations,
)

from mcpctl import __version__
from mcpctl.calls import Calls, UnknownToolError
from mcpctl.errors import Error, UnavailableError
from mcpctl.facts import Request
from mcpctl.identity.principal import Principal
from mcpctl.server.tracing import Call, of_message
from mcpctl.tools.definition import Tool as Definition

Context = ServerRequestContext[Any, Any]
Who = Callable[[Context], Awaitable[tuple[Principal, Request]]]
"""The caller of an SDK request, and where it came from."""
Failed = Callable[[Context, Error], str]
"""Hears of an error that is the transport's to answer (401, 503), not the protocol's; what the caller may be told."""

INSTRUCTIONS = (
    "PostgreSQL. Start with list_databases and get_schema_info; then ask with query_database, one SQL "
    "statement a call. explain_query shows why one is slow."
)


def _annotations(tool: Definition) -> ToolAnnotations:
    reads = not tool.changes
    return ToolAnnotations(read_only_hint=reads, destructive_hint=None if reads else True, open_world_hint=False)


def build(calls: Calls, who: Who, failed: Failed, call: Call) -> Server[Any]:
    """The protocol server. It holds no state of its own: every request brings its caller. `call` answers each call."""

    async def list_tools(context: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
        try:
            principal, _ = await who(context)
        except Error as problem:
            raise MCPError(code=INTERNAL_ERROR, message=failed(context, problem)) from None
        return ListToolsResult(
            tools=[
                Tool(
                    name=tool.name,
                    description=tool.description,
                    input_schema=tool.input_schema,
                    output_schema=tool.output,
                    annotations=_annotations(tool),
                )
                for tool in calls.tools(principal)
            ]
        )

    async def call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
        try:
            principal, request = await who(context)
            request.carried = of_message(request.carried, context.meta)
            answer = await call(principal, params.name, params.arguments, request)
        except UnknownToolError as problem:
            raise MCPError(code=INVALID_PARAMS, message=problem.message) from None
        except UnavailableError as problem:  # over HTTP the transport answers 503 instead
            text = failed(context, problem)
            return CallToolResult(content=[TextContent(type="text", text=text)], is_error=True)
        except Error as problem:
            raise MCPError(code=INTERNAL_ERROR, message=failed(context, problem)) from None
        return CallToolResult(
            content=[TextContent(type="text", text=answer.text)],
            structured_content=answer.structured,
            is_error=answer.is_error,
        )

    async def list_resources(context: Context, params: PaginatedRequestParams | None) -> ListResourcesResult:
        return ListResourcesResult(resources=[])

    async def list_templates(context: Context, params: PaginatedRequestParams | None) -> ListResourceTemplatesResult:
        return ListResourceTemplatesResult(resource_templates=[])

    async def read_resource(context: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
        raise MCPError(code=INVALID_PARAMS, message="Resource not found", data={"uri": str(params.uri)})

    async def list_prompts(context: Context, params: PaginatedRequestParams | None) -> ListPromptsResult:
        return ListPromptsResult(prompts=[])

    private = CacheHint(ttl_ms=60_000, scope="private")
    public = CacheHint(ttl_ms=3_600_000, scope="public")
    server: Server[Any] = Server(
        "mcpctl",
        version=__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
        on_list_prompts=list_prompts,
        get_tool_input_schema=lambda name: None,  # no argument of ours is mirrored in a header
        cache_hints={
            "tools/list": private,
            "resources/list": public,
            "resources/templates/list": public,
            "prompts/list": public,
            "server/discover": public,
        },
    )
    server.middleware.clear()  # the SDK's tracing spans, which nobody here collects
    return server
