"""register_database, list_my_databases and remove_database: databases that users bring themselves."""

from collections.abc import Callable
from typing import Any

from mcpctl.errors import UsageError
from mcpctl.identity.own_databases import OwnDatabase
from mcpctl.postgres import own_login
from mcpctl.postgres.own import Own
from mcpctl.tools.definition import Result, Tool, result

May = Callable[[str], bool]
"""Whether the caller may ask a database of that name."""
_NAME = {"type": "string"}


def _values(row: OwnDatabase) -> dict[str, Any]:
    return {
        "name": row.name,
        "host": row.host,
        "port": row.port,
        "dbname": row.dbname,
        "user": row.login,
        "created_at": row.created_at,
    }


def told(row: OwnDatabase) -> str:
    """Where a row leads, for the audit log."""
    return f"{row.login} at {row.host} ({row.hostaddr}) port {row.port}, database {row.dbname}"


async def _register(own: Own, user: str, arguments: dict[str, Any], _: May) -> Result:
    name = arguments["name"]
    own.check_name(user, name)
    wanted = own_login.parse(arguments["dsn"])
    if not own.takes_passwords:
        seen = ", and take another one: this one stands in the conversation" if wanted.password is not None else ""
        raise UsageError(
            f"the password of a database is not given here{seen}",
            f"the administrator registers it and asks you for it: mcpctl database register {user} {name} --dsn DSN",
        )
    if wanted.password is None:
        raise UsageError("dsn holds no password", "such as postgresql://reader:PASSWORD@db.example.org/sales")
    row = await own.register(user, name, wanted, wanted.password)
    done = result({"registered": _values(row)})
    done.command = f"registered: {told(row)}"
    return done


REGISTER = Tool(
    name="register_database",
    description="Register the user's own PostgreSQL database, to be asked by that name, read-only.",
    permission="tools:register_database",
    properties={
        "name": _NAME,
        "dsn": {"type": "string", "description": "libpq string or URL with host, port, dbname, user"},
    },
    required=("name", "dsn"),
    own=_register,
    changes=True,
)


def _note(own: Own, row: OwnDatabase) -> dict[str, str]:
    if row.name in own.taken:
        return {"note": "hidden: the administrator has one of this name; remove it, and register it under another"}
    if not own.reaches(row):
        return {"note": "closed: its host is no longer one of those that databases may be on here; remove it"}
    return {}


async def _list(own: Own, user: str, _: dict[str, Any], may: May) -> Result:
    found = [_values(row) | _note(own, row) for row in own.of(user) if may(row.name)]
    return result({"databases": found, "count": len(found)})


LIST_MINE = Tool(
    name="list_my_databases",
    description="List the databases that the user has registered.",
    permission="tools:list_my_databases",
    own=_list,
)


async def _remove(own: Own, user: str, arguments: dict[str, Any], _: May) -> Result:
    row, cut = await own.remove(user, arguments["name"])
    done = result({"removed": row.name, "queries_cancelled": cut.queries, "backends_left": cut.backends_left})
    done.command = f"removed: {told(row)}; {cut}"
    return done


REMOVE = Tool(
    name="remove_database",
    description="Forget a database that the user has registered, and end what runs there.",
    permission="tools:remove_database",
    properties={"name": _NAME},
    required=("name",),
    own=_remove,
    changes=True,
)
