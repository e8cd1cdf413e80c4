"""The dispatch table: every tool there is, with the permission it needs. The order is that of tools/list."""

from mcpctl.tools.caller import LIST_DATABASES, WHOAMI
from mcpctl.tools.definition import Tool
from mcpctl.tools.execute import EXECUTE
from mcpctl.tools.health import HEALTH
from mcpctl.tools.own import LIST_MINE, REGISTER, REMOVE
from mcpctl.tools.query import EXPLAIN, QUERY
from mcpctl.tools.schema import SCHEMA
from mcpctl.tools.settings import GET, SET

TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        QUERY,
        SCHEMA,
        EXPLAIN,
        EXECUTE,
        HEALTH,
        GET,
        SET,
        LIST_DATABASES,
        WHOAMI,
        REGISTER,
        LIST_MINE,
        REMOVE,
    )
}
