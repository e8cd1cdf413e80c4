"""What a permission allows, in the words of whoever is asked for it."""

import re
from collections.abc import Mapping

from mcpctl.errors import UsageError

_TOOLS: Mapping[str, str] = {
    "query_database": "Ask your databases questions, and read the answers",
    "get_schema_info": "See which tables and columns there are",
    "explain_query": "See how a question would be answered, and what that costs",
    "execute_statement": "Run statements that change or delete data",
    "database_health": "See how your databases are doing",
    "get_pg_configuration": "Read the settings of PostgreSQL",
    "set_pg_configuration": "Change settings of PostgreSQL",
    "list_databases": "See the names of the databases that you may use",
    "whoami": "See your user name, your roles and your limits",
    "register_database": "Add databases in your name, with a password",
    "list_my_databases": "See which databases you have added",
    "remove_database": "Remove databases that you have added",
}
_CHANGING = ("execute_statement", "set_pg_configuration", "register_database", "remove_database")
_RIGHTS: Mapping[str, str] = {
    "read": "Read data in {}",
    "write": "Change and delete data in {}",
    "admin": "Change settings in {}",
    "*": "Read, change and delete data, and change settings, in {}",
}
_PART = r"[A-Za-z0-9_.*-]{1,63}"
_TOOL = re.compile(f"tools:({_PART})")
_DATABASE = re.compile(rf"databases:({_PART})(?::([a-z]+|\*))?")


def in_words(permission: str) -> str:
    """One line for a page: what whoever has this permission can do. UsageError for what is no permission of ours."""
    if permission == "*":
        return "Do everything that you may do yourself"
    if found := _TOOL.fullmatch(permission):
        return _tool(permission, found[1])
    found = _DATABASE.fullmatch(permission)
    words = _RIGHTS.get(found[2] or "*") if found else None
    if found is None or words is None:
        raise _unknown(permission)
    return words.format("every database that you may use" if found[1] == "*" else f"the database {found[1]}")


def changes(permission: str) -> bool:
    """Whether whoever has this permission can change anything that stays."""
    family, _, rest = permission.partition(":")
    if family == "databases":
        return not rest.endswith(":read")
    return "*" in permission or rest in _CHANGING


def _tool(permission: str, tool: str) -> str:
    if tool == "*":
        return "Use every tool that you may use yourself"
    if "*" in tool:
        return f"Use every tool that you may use yourself, and whose name fits {tool}"
    if tool not in _TOOLS:
        raise _unknown(permission)
    return _TOOLS[tool]


def _unknown(permission: str) -> UsageError:
    return UsageError(f"there is no permission {permission!r}", "ask for one of those in docs/users-and-grants.md")
