"""The command tree. At its top only names and help are known, so that a command imports what it needs, and nothing
that another one does."""

from collections.abc import Callable
from copy import copy
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

TOP = {
    "demo": ("Try it: an embedded PostgreSQL with a small shop, a user, a token and a server on HTTP.", "demo"),
    "init": (
        "Make a new installation: config, keys, empty token, user and tenant files, and say what comes next.",
        "init",
    ),
    "serve": ("Serve MCP: over HTTP on 127.0.0.1:8080 without a flag, or on stdin and stdout.", "serve"),
    "connect": ("Speak MCP on stdin and stdout for a server elsewhere: for clients that start a program.", "connect"),
    "status": ("How the running server is.", "live"),
    "top": ("What runs now, and who used most in the last minute.", "live"),
    "doctor": (
        "Look at everything: files, keys, secrets in the open, databases, grants, "
        "and what is still open in PostgreSQL.",
        "doctor",
    ),
    "client-config": ("Print what a client's configuration needs to connect, or put it there.", "client_config"),
    "support-bundle": (
        "Print what a report of a fault needs to say, without secrets, statements and names: read it, then send it.",
        "support_bundle",
    ),
    "lockdown": ("Answer no more calls, on any worker and after a restart, until it is lifted.", "lockdown"),
    "can": (
        "Say whether a user may do something, and why: token, user, role, permission, grant, login role, PostgreSQL.",
        "can",
    ),
    "who-can": ("List every user and service token that may do something.", "can"),
    "token": ("Make, list, rotate, revoke and remove tokens.", "token", "unblock"),
    "user": (
        "Make, list, disable and remove users, and grant them what they may read, write and set.",
        "user",
        "onboard",
        "link",
    ),
    "tenant": ("Make, list and remove tenants.", "tenant"),
    "database": (
        "Add, list, test, harden and remove databases, and change their passwords.",
        "database",
        "database_passwd",
    ),
    "grant": ("Compare what is recorded with what PostgreSQL has.", "grant"),
    "session": ("See who is signed in and what tokens have open in the running server, and end it.", "session"),
    "audit": ("Read the audit log.", "audit", "audit_read", "audit_report", "audit_verify"),
    "incident": ("Find out what somebody did.", "incident"),
    "key": ("Rotate the key that seals database passwords.", "key"),
    "backup": (
        "Back up config, tokens, users, keys, passwords, what the server remembers, and the audit log, while it runs.",
        "backup",
    ),
    "restore": ("Bring back what is in a backup, all of it or nothing, while no server runs.", "restore"),
    "import": ("Take over users and tokens of another server.", "import_"),
    "config": ("Check the configuration, and have it read again.", "config"),
}
"""Name → its help's first sentence, its module, and the modules whose commands join it."""


def load(name: str, below: str | None = None) -> Any:
    """The real command or group of that name, whose modules are imported now; of the group no more than the command
    `below` it, where there is one of that name."""
    module, *_ = [import_module(f"mcpctl.cli.{place}") for place in TOP[name][1:]]
    alone = typer.Typer(rich_markup_mode=None)
    if hasattr(module, "app"):
        app = copy(module.app)
        named = [one for one in app.registered_commands if one.name == below]
        app.registered_commands = named or app.registered_commands
        alone.add_typer(app, name=name)
    else:
        alone.command(name)(getattr(module, name.replace("-", "_")))
    return typer.main.get_group(alone).commands[name]


class Top(TyperGroup):
    """What `mcpctl` alone is: its commands stand there with their help until one of them is named."""

    def __init__(self, *, commands: Any, **attributes: Any) -> None:
        shown: Any = {name: TyperCommand(name, help=help, rich_markup_mode=None) for name, (help, *_) in TOP.items()}
        super().__init__(commands=shown, **attributes)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The real command instead of the one that is shown."""
        name, shown, rest = super().resolve_command(ctx, args)
        return name, shown and load(args[0], *rest[:1]), rest


def read_plainly() -> None:
    """Let words, paths and what is not given be read as they are. Typer, from 0.29 on, reads every value by pydantic,
    and imports it for that, which takes longer than most commands do. What is not so plain it still reads."""
    for kind in (TyperArgument, TyperOption):
        setattr(kind, "process_value", _plainly(kind.process_value))  # noqa: B010 - mypy knows it as a method


def _plainly(by_typer: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(by_typer)
    def process_value(param: Any, ctx: Any, value: Any) -> Any:
        kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        if value is None and not param.required:
            read: Any = () if param.multiple or param.nargs == -1 else None
        elif kind in (int, float) and type(value) is kind:  # a default
            read = value
        elif kind in (str, Path) and isinstance(value, str):
            read = kind(value)
        elif kind == list[str] and value and isinstance(value, list | tuple):
            read = list(value)
        else:
            return by_typer(param, ctx, value)
        return read if param.callback is None else param.callback(ctx, param, read)

    return process_value
