"""list_databases and whoami: what the caller is and may name. No database is asked."""

from typing import Any

from mcpctl.identity.principal import Principal
from mcpctl.policy.access import within
from mcpctl.tools.definition import Databases, Result, Tool, result


def _list(_: Principal, databases: Databases) -> Result:
    found: list[dict[str, Any]] = []
    for name, description in databases.described.items():
        entry: dict[str, Any] = {
            "name": name,
            "default": name == databases.default,
            "access": databases.access[name],
        }
        if description is not None:
            entry["description"] = description
        if name in databases.own:
            entry["own"] = True
        found.append(entry)
    return result({"databases": found, "count": len(found)})


LIST_DATABASES = Tool(
    name="list_databases",
    description="List the databases you may ask, and which is the default.",
    permission="tools:list_databases",
    tell=_list,
)


def _whoami(principal: Principal, databases: Databases) -> Result:
    expires, permissions = principal.expires_at, databases.permissions
    if principal.tenant is not None or principal.databases is not None or principal.closed:
        # by the names that list_databases shows: to say which are closed would name another tenant's
        there = (f"databases:{name}:{access}" for name, held in databases.access.items() for access in held)
        permissions = within(permissions, ("tools:*", *there))
    return result(
        {
            "user": principal.user,
            "token": principal.token,
            "tenant": principal.tenant,
            "databases": list(databases.described),
            "permissions": list(permissions),
            "expires_at": expires and expires.isoformat().replace("+00:00", "Z"),
        }
    )


WHOAMI = Tool(
    name="whoami",
    description="Say who you are here: user, token id, databases, permissions, expiry.",
    permission="tools:whoami",
    tell=_whoami,
)
