"""get_pg_configuration and set_pg_configuration: the settings of PostgreSQL that the config lets users change."""

from typing import Any

from mcpctl import dangerous_settings
from mcpctl.errors import Error, ForbiddenError, NotFoundError
from mcpctl.postgres import settings
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.session import Session
from mcpctl.postgres.settings import Changed, Setting
from mcpctl.tools.definition import Result, Tool, encode, result
from mcpctl.tools.query import DATABASE

RESET = "reset"
"""The value that takes back what was set, as null does."""
_NAME = {"type": "string", "description": "such as work_mem"}


def _allowed(session: Session, name: str | None) -> tuple[str, ...]:
    """The settings that may be changed there; of a name that one. ForbiddenError for any other, known or not."""
    listed = session.pool.login.settings.settings
    if name is None:
        return listed
    if name.lower() not in listed:
        raise ForbiddenError(
            f"{name[:63]!r} is not among the settings that may be changed here", f"these are: {', '.join(listed)}"
        )
    return (name.lower(),)


# -- get ------------------------------------------------------------------------------------------------------------


async def _get(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Result:
    names = _allowed(session, arguments.get("name"))
    found, changed = await settings.look(session, names, bounds)
    answer: dict[str, Any] = {"settings": [_shown(one) for one in found]}
    if missing := sorted(set(names) - {one.name.lower() for one in found}):
        answer["not_shown"] = missing
    if "name" in arguments:
        if missing:
            raise NotFoundError(
                f"PostgreSQL shows your login no setting {missing[0]!r}",
                "there is none, or only members of pg_read_all_settings see it",
            )
        return result(answer)
    answer["changed"] = [_shown_briefly(one, names) for one in changed[: bounds.rows]]
    done = result(answer)
    if len(done.text) > bounds.bytes:
        raise Error("all settings together are more than an answer may have here", "ask for one by its `name`")
    return done


def _shown(one: Setting) -> dict[str, Any]:
    values = {
        "name": one.name,
        "value": one.value,
        "unit": one.unit,
        "context": one.context,
        "source": one.source,
        "pending_restart": one.pending_restart,
        "boot_value": one.boot_value,
        "source_file": one.file,
        "source_line": one.line,
    }
    return {key: value for key, value in values.items() if value is not None}


def _shown_briefly(one: Setting, names: tuple[str, ...]) -> dict[str, Any]:
    """Of a setting that is not the caller's to change: nothing that may be a password (primary_conninfo has one)."""
    name = one.name.lower()
    hidden = name not in names and ("." in name or dangerous_settings.why(name) is not None)
    left_out = ("context", "boot_value", *(("value",) if hidden else ()))
    return {key: value for key, value in _shown(one).items() if key not in left_out}


GET = Tool(
    name="get_pg_configuration",
    description=(
        "Show the PostgreSQL settings that you may change, with value, unit, context and source, and which settings "
        "of the server were changed."
    ),
    permission="tools:get_pg_configuration",
    properties={"name": {**_NAME, "description": "this setting alone"}, "database": DATABASE},
    ask=_get,
    access="admin",
)


# -- set ------------------------------------------------------------------------------------------------------------


async def _set(session: Session, arguments: dict[str, Any], bounds: Bounds) -> Result:
    [name] = _allowed(session, arguments["name"])
    value: str | None = arguments["value"]
    if value is not None and value.strip().lower() == RESET:
        value = None
    done = await settings.change(session, name, value, bounds)
    return result(_told(name, value, done))


def _told(name: str, value: str | None, done: Changed) -> dict[str, Any]:
    before, after = done.before, done.after
    pending = after is not None and after.pending_restart
    shows = done.loaded and after is not None and not pending
    answer: dict[str, Any] = {
        "name": name,
        "old_value": before and before.value,
        "new_value": after.value if shows and after is not None else value,
        "unit": after and after.unit,
        "in_force": shows and not _hidden_by(value, after),
        "pending_restart": pending,
        "source": after and after.source,
        "undo": _undo(before, after),
    }
    if after is not None and after.file is not None:
        answer["source_file"] = after.file
    if note := _note(value, done):
        answer["note"] = note
    return answer


def _hidden_by(value: str | None, after: Setting | None) -> str | None:
    """What wins over postgresql.auto.conf, where something does: an ALTER DATABASE, or the server's command line."""
    if value is None or after is None or after.source == "configuration file":
        return None
    return after.source


def _note(value: str | None, done: Changed) -> str | None:
    after = done.after
    if not done.loaded:
        return (
            "It is written to postgresql.auto.conf, and the server has not taken it yet: it is busy, or one of its "
            "configuration files has a fault, which its log names."
        )
    if after is None:
        return "PostgreSQL does not show this setting to your login; ask the administrator whether it is in force."
    if after.pending_restart:
        return "It is written to postgresql.auto.conf, and counts when the server has been restarted."
    if winner := _hidden_by(value, after):
        return f"It is written to postgresql.auto.conf, but the value that counts here comes from: {winner}."
    return None


def _undo(before: Setting | None, after: Setting | None) -> str:
    """How to have it as it was."""
    restart = ", then restart the server" if after is not None and after.context == "postmaster" else ""
    if before is not None and len(before.value) >= settings.LONGEST:
        return "its old value is too long to be set here; it stands in the server's files"
    again = before and before.again
    return f"set_pg_configuration with the value {encode(again).decode()}{restart}"


SET = Tool(
    name="set_pg_configuration",
    description=(
        "Change one PostgreSQL setting for the whole server, also after a restart (ALTER SYSTEM). Look at it with "
        "get_pg_configuration, and say what it will change, first."
    ),
    permission="tools:set_pg_configuration",
    properties={
        "name": _NAME,
        "value": {
            "type": ["string", "null"],
            "description": "as in postgresql.conf, such as 64MB; null or reset takes back what was set",
        },
        "database": DATABASE,
    },
    required=("name", "value"),
    ask=_set,
    access="admin",
    changes=True,
)
