"""mcpctl user onboard: user, grant, token and the client's configuration in one command."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from mcpctl.cli import client_config, grant, output, token, user
from mcpctl.cli.administration import files_of
from mcpctl.cli.common import ConfigOption


def onboard(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="U", help="The user's name; made if there is none.")],
    database: grant.DatabaseOption,
    expiry: Annotated[str, typer.Option("--expiry", metavar="WHEN", help="The token's end: 12h, 30d, 2w, 1y, a date.")],
    client: Annotated[
        str, typer.Option("--client", metavar="C", help="As in client-config: claude-code, cursor, vscode, …")
    ] = "json",
    access: Annotated[
        str, typer.Option("--access", metavar="A", help="read or write. Who writes reads, too.")
    ] = "read",
    schema: grant.SchemaOption = None,
    table: grant.TableOption = None,
    role: Annotated[list[str] | None, typer.Option("--role", metavar="R", help="As in user add. Repeatable.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="T", help="As in user add.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the token to this new file (0600), not to stdout."),
    ] = None,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="Print the SQL for a DBA instead of running it; needs --out.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Make a user, let them read or write, give them a token, and say what their client needs: four commands in one.

    It stops at the first that fails, and may be run again. The token is alone on stdout; with --print-sql the SQL is.

    Example: mcpctl user onboard alice --database sales --schema public --expiry 90d --client cursor --out alice.token
    """
    from mcpctl.cli.new_token import expiry_of
    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import utcnow

    if print_sql and out is None:
        raise UsageError("--print-sql takes stdout for the SQL, so the token needs a file", "say --out FILE")
    client_config.check(client)
    if access not in ("read", "write"):
        raise UsageError(f"--access takes read or write, not {access!r}", "say --access read")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "name another file")
    way = grant.Way(print_sql, not print_sql, False)
    files = files_of(context, config, needs_log=True)
    expiry_of(files.settings, expiry, utcnow())  # all that could be wrong is said before anything is made
    if name not in files.granting().people():
        with contextlib.redirect_stdout(sys.stderr):
            user.add(context, name, role, tenant, None, False, config)
    elif (role and tuple(role) != files.granting().user(name).roles) or (
        tenant and tenant != files.granting().user(name).tenant
    ):
        raise UsageError(f"user {name} is there already, with another role or tenant", "leave out --role and --tenant")
    with contextlib.nullcontext() if print_sql else contextlib.redirect_stdout(sys.stderr):
        grant.carry_out(context, files, name, database, access, (schema or [], table or []), way)
    token.add(context, name, [database], expiry, f"{client}, by onboard", None, None, out, False, config)
    with contextlib.redirect_stdout(sys.stderr):
        client_config.client_config(context, client, None, None, False, config)
    output.say(f"{name} is on board; see what they may do: mcpctl can {name}")
