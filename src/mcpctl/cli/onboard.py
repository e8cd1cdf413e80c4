"""mcpctl user onboard: user, grant, token and the client's configuration in one command."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import client_config, grant, output, token, user
from mcpctl.cli.administration import Files, files_of
from mcpctl.cli.common import ConfigOption, by_whom, note

if TYPE_CHECKING:
    from mcpctl.identity.users import User


@user.app.command("onboard")
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
    url: client_config.UrlOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a user, let them read or write, give them a token, and say what their client needs: four commands in one.

    What can be wrong is looked for before anything is made. Where the grant fails, a new user is taken out again; what
    fails later leaves user and grant, says so, and may be run again. The token is alone on stdout; with --print-sql the
    SQL is.

    Example: mcpctl user onboard alice --database sales --schema public --expiry 90d --client cursor --out alice.token
    """
    from mcpctl.errors import UsageError

    if print_sql and out is None:
        raise UsageError("--print-sql takes stdout for the SQL, so the token needs a file", "say --out FILE")
    client_config.check(client)
    if access not in ("read", "write"):
        raise UsageError(f"--access takes read or write, not {access!r}", "say --access read")
    way, named = grant.Way(print_sql, not print_sql, False), (schema or [], table or [])
    files = files_of(context, config, needs_log=True)
    url = url or client_config.url_of(files.settings)
    known = _checked(files, name, database, access, named, way, expiry, out)
    if known is not None and ((role and tuple(role) != known.roles) or (tenant and tenant != known.tenant)):
        raise UsageError(f"user {name} is there already, with another role or tenant", "leave out --role and --tenant")
    made = known
    try:
        if made is None:
            made = user.make(context, files.settings, name, role, tenant)
            output.say(f"{name} added")
        with contextlib.nullcontext() if print_sql else contextlib.redirect_stdout(sys.stderr):
            grant.carry_out(context, files, name, database, access, named, way)
        token.add(context, name, [database], expiry, f"{client}, by onboard", None, None, out, False, config)
    except BaseException:
        if made is not None:
            _left(context, files, made, new=known is None)
        raise
    with contextlib.redirect_stdout(sys.stderr):
        client_config.show(context, client, None, files.granting().user(name).tenant, url, False, config, out)
    output.say(f"{name} is on board; see what they may do: mcpctl can {name}")


def _checked(
    files: Files,
    name: str,
    database: str,
    access: str,
    named: tuple[list[str], list[str]],
    way: grant.Way,
    expiry: str,
    out: Path | None,
) -> "User | None":
    """The user, if there is one. Raises for what can be known to fail before anything is made."""
    from mcpctl.cli.new_token import check_user, expiry_of, handing_over
    from mcpctl.identity.grants import targets
    from mcpctl.identity.tokens import utcnow

    granting = files.granting()
    expiry_of(files.settings, expiry, utcnow())
    granting.check(database, access)
    targets(*named)
    if way.apply:
        files.administrator(database, granting)
    known = granting.people().get(name)
    if known is not None:
        check_user(known)
    with handing_over(out):
        pass  # its file could be made, and is away again
    return known


def _left(context: typer.Context, files: Files, made: "User", *, new: bool) -> None:
    """After a failure: take a new user out again who has got nothing, or say what stays."""
    from mcpctl.identity import users

    file = users.user_file(files.settings.auth.user_file)
    if file.current().get(made.name) != made:
        output.say(f"{made.name} and what is granted stay; when that is mended, the same command goes on from there")
    elif new:
        users.remove(file, made.name)
        note(files.settings, "user.removed", user=made.name, reason=by_whom(context, "onboard failed"))
        output.say(f"{made.name} is taken out again; nothing was made")
