"""mcpctl database register and unregister: databases that users bring themselves, with the password asked for here."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, note, read_password, ready_to_note, settings, told

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.postgres.own import Own

UserArgument = Annotated[str, typer.Argument(metavar="USER", help="Whose it is.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the user calls it.")]


def register(
    context: typer.Context,
    user: UserArgument,
    name: NameArgument,
    dsn: Annotated[str, typer.Option("--dsn", metavar="DSN", help="Host, port, dbname and user; no password.")],
    password_file: Annotated[
        str | None, typer.Option("--password-file", metavar="FILE", help="Where the password is, 0600; - is stdin.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Register a database that a user brings: tried once, sealed, and that user's alone.

    The password is asked for on the terminal. The host must be in own_databases.hosts.

    Example: mcpctl database register alice lab --dsn postgresql://alice@lab.example.org/results
    """
    import asyncio

    from mcpctl.errors import UsageError
    from mcpctl.identity import users
    from mcpctl.postgres import own_login
    from mcpctl.tools.own import told as where

    given = None if password_file is None else read_password(password_file)
    found = settings(context, config)
    ready_to_note(found)
    if (tenant := users.find(users.user_file(found.auth.user_file).current(), user).tenant) is not None:
        raise UsageError(f"{user} belongs to the tenant {tenant}, and sees nothing outside of it", "name another user")
    wanted = own_login.parse(dsn)
    if wanted.password is not None:
        raise UsageError(
            "--dsn holds a password, which everybody on this machine can see, and the shell keeps",
            "take another password, leave it out here, and give it when you are asked",
        )
    password = _asked_for() if given is None else given
    own = _own(found)
    try:
        row = asyncio.run(own.register(user, name, wanted, password))
    finally:
        own.close()
    note(found, "database.registered", user=user, database=row.shown, reason=by_whom(context, where(row)))
    if json:
        output.put_json({"user": user, "name": name, "host": row.host, "hostaddr": row.hostaddr, "port": row.port})
    else:
        output.put(f"{name} registered for {user}: {where(row)}")


def unregister(
    context: typer.Context,
    user: UserArgument,
    name: NameArgument,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take away a database that a user has brought, and cut what runs there. Never asks."""
    import asyncio

    from mcpctl import control
    from mcpctl.errors import NotFoundError
    from mcpctl.tools.own import told as where

    found = settings(context, config, needs_log=False)
    own = _own(found)
    try:
        row, _ = asyncio.run(own.remove(user, name))
    except NotFoundError:
        raise NotFoundError(
            f"{user} has brought no database {name}", f"`mcpctl user show {user}` shows those there are"
        ) from None
    finally:
        own.close()
    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    answers = control.ask_all(folder, {"do": "settle_own", "user": user, "name": name})
    words, values = told(answers) if answers else ("no server runs", None)
    note(found, "database.unregistered", user=user, database=row.shown, reason=by_whom(context, where(row)))
    if json:
        output.put_json({"user": user, "removed": name, "cut": values})
        return
    output.put(f"{name} of {user} removed")
    output.put(words)


def forget(found: "Settings", user: str) -> list[str]:
    """Take away all that a user has brought, and what an earlier user of that name has; the names."""
    if not found.server.state_file.exists():
        return []
    own = _own(found)
    try:
        return own.remove_all(user)
    finally:
        own.close()


def brought(found: "Settings", user: str) -> list[tuple[str, str]]:
    """(name, where it leads) of each database that a user has brought."""
    from mcpctl.tools.own import told as where

    if not found.server.state_file.exists():
        return []
    own = _own(found)
    try:
        return [(row.name, where(row)) for row in own.of(user)]
    finally:
        own.close()


def check_free(found: "Settings", name: str) -> None:
    """Raises ConflictError (exit 5) where users have brought databases of that name, which one of the config hides."""
    from mcpctl.errors import ConflictError

    own = _own(found)
    try:
        users = [row.user for row in own.everybody().values() if row.name == name]
    finally:
        own.close()
    if users:
        raise ConflictError(
            f"{', '.join(users[:5])} {'has' if len(users) == 1 else 'have'} a database {name} of their own",
            f"choose another name, or: mcpctl database unregister {users[0]} {name}",
        )


def _own(found: "Settings") -> "Own":
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.own import Own

    return Own(found, Keyring(found.keyring.file), None)


def _asked_for() -> str:
    """The password, asked for without echo."""
    import getpass
    import sys

    from mcpctl.errors import UsageError

    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "the password is asked for, and there is no terminal to ask at", "name a 0600 file with --password-file"
        )
    return getpass.getpass("password: ", stream=sys.stderr)
