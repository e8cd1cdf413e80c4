"""What a principal may do. Pure: (principal, permission) → decision with its reason.

A permission is `<family>:<object>[:<right>]`: `tools:query_database`, `databases:sales:read`. A pattern is the same
with `*` for a part; a `*` at the end stands for all further parts. A token's own list narrows what its user has; a
token without one has all of it.
"""

from dataclasses import dataclass

from mcpctl.identity.principal import Principal


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    allowed: bool
    reason: str


def covers(pattern: str, permission: str) -> bool:
    """Whether a pattern such as `databases:*:read` covers a permission such as `databases:sales:read`."""
    wanted = permission.split(":")
    parts = pattern.split(":")
    for index, part in enumerate(parts):
        if part == "*" and index == len(parts) - 1:
            return True
        if index >= len(wanted) or part not in ("*", wanted[index]):
            return False
    return len(parts) == len(wanted)


def may(principal: Principal, permission: str) -> Decision:
    """Whether the principal's token lets it have `permission`."""
    if permission.startswith("databases:") and principal.databases is not None:
        name = permission.split(":")[1]
        if name not in principal.databases:
            return Decision(False, f"this token is for the databases {', '.join(principal.databases) or '(none)'}")
    if principal.permissions is None:
        return Decision(True, "the token has all that its user has")
    for pattern in principal.permissions:
        if covers(pattern, permission):
            return Decision(True, f"the token's permission {pattern}")
    return Decision(False, f"this token lacks the permission {permission}")
