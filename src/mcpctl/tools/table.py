"""The dispatch table: every tool there is, with the permission it needs. The order is that of tools/list."""

from mcpctl.tools.caller import LIST_DATABASES, WHOAMI
from mcpctl.tools.definition import Tool
from mcpctl.tools.query import EXPLAIN, QUERY
from mcpctl.tools.schema import SCHEMA

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (QUERY, SCHEMA, EXPLAIN, LIST_DATABASES, WHOAMI)}
