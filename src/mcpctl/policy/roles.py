"""Roles × permissions: what each built-in role may do, as one table. The config may add roles of its own.

A permission is `tools:<tool>` or `databases:<database>:<right>`, the right being read, write or admin. A call needs
its tool's permission and its right on the database; in a database whose roles are per user also a grant there.
`sessions:list` and `sessions:end` are for the sessions of others, over HTTP.
"""

from collections.abc import Mapping

_EVERYBODY = (
    "tools:query_database",
    "tools:get_schema_info",
    "tools:explain_query",
    "tools:list_databases",
    "tools:whoami",
    "databases:*:read",
)
_BRING = ("tools:register_database", "tools:list_my_databases", "tools:remove_database")
_WORKERS = (*_EVERYBODY, "tools:execute_statement", "tools:database_health", *_BRING, "databases:*:write")

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "mcp-admin": ("*",),
    "mcp-developer": ("tools:*", "databases:*:read", "databases:*:write"),
    "mcp-tools": _WORKERS,
    "mcp-user": _EVERYBODY,
}
"""The permissions of each role that is always there."""
DEFAULT = ("mcp-user",)
"""The roles of a user who was given none, of a service token, and of the local user."""
ADMIN = "mcp-admin"
READ_ONLY = (*_EVERYBODY, "tools:database_health")
"""The most that a user of `auth.read_only_users` has, whatever the roles say."""
