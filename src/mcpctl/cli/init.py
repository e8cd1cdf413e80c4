"""mcpctl init: the first hour. Questions or flags, the files with their modes, the first user, and what comes next."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import JsonOption, by_whom, import_before, read_password
from mcpctl.cli.init_making import Making

if TYPE_CHECKING:
    from mcpctl.cli.init_answers import Asking
    from mcpctl.cli.init_layout import Layout


def init(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="Where. Default: for root /etc/mcpctl, and the service's other folders where there is a user mcpctl; "
            "else the user's config folder.",
        ),
    ] = None,
    db_host: Annotated[
        str | None, typer.Option("--db-host", metavar="H", help="PostgreSQL's host, address, or folder of the socket.")
    ] = None,
    db_port: Annotated[int | None, typer.Option("--db-port", min=1, max=65535, help="Its port; default 5432.")] = None,
    db_name: Annotated[str | None, typer.Option("--db-name", metavar="D", help="The database's name there.")] = None,
    db_user: Annotated[
        str | None, typer.Option("--db-user", metavar="R", help="The login role; default mcpctl_reader.")
    ] = None,
    db_password_file: Annotated[
        str | None,
        typer.Option("--db-password-file", metavar="FILE", help="Its password; - for stdin. Without: one is made up."),
    ] = None,
    db_sslmode: Annotated[
        str | None, typer.Option("--db-sslmode", metavar="M", help="Default: verify-full for another machine.")
    ] = None,
    db_sslrootcert: Annotated[
        str | None, typer.Option("--db-sslrootcert", metavar="FILE", help="The CA's certificate.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", metavar="NAME", help="What mcpctl calls it; default: its name there.")
    ] = None,
    roles: Annotated[
        str | None, typer.Option("--roles", metavar="R", help="shared: one login for all; per_user: one for each user.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="A", help="Address to listen on; default: loopback, or all with TLS."),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Port to listen on; default 8080, 8443 with TLS.")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option("--tls-cert", metavar="FILE", help="The server's certificate in PEM, for HTTPS.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its key in PEM, 0600.")] = None,
    tls_chain: Annotated[
        str | None, typer.Option("--tls-chain", metavar="FILE", help="Intermediate certificates in PEM.")
    ] = None,
    behind_proxy: Annotated[
        list[str] | None,
        typer.Option("--behind-proxy", metavar="CIDR", help="A proxy there does the TLS. Repeatable."),
    ] = None,
    public_url: Annotated[
        str | None, typer.Option("--public-url", metavar="URL", help="What clients call the server by.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="The first user of mcpctl.")] = None,
    expiry: Annotated[
        str | None, typer.Option("--expiry", metavar="WHEN", help="Make them a token, too, until then: 90d, a date.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the token to this new file (0600), not to stdout."),
    ] = None,
    issuer: Annotated[
        str | None, typer.Option("--issuer", metavar="URL", help="An identity provider whose tokens are taken, too.")
    ] = None,
    print_sql: Annotated[
        bool,
        typer.Option("--print-sql", help="Print the SQL for the login role on stdout, instead of the files' names."),
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not try the connection to PostgreSQL.")] = False,
    no_input: Annotated[bool, typer.Option("--no-input", help="Ask nothing, at a terminal neither.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a new installation: config, keys, empty token, user and tenant files, and say what comes next.

    On a terminal it asks for what no flag says: where PostgreSQL is, which is tried; who can connect, and how; who the
    first user is. Without a terminal it asks nothing. All of it is made, or nothing.

    Example: mcpctl init --db-host localhost --db-name shop --user alice --expiry 90d
    """
    from mcpctl import private_file
    from mcpctl.cli import init_answers
    from mcpctl.errors import UsageError

    given = init_answers.Given(
        db_host, db_port, db_name, db_user, db_password_file, db_sslmode, db_sslrootcert, database, roles, host, port,
        tls_cert, tls_key, tls_chain, tuple(behind_proxy or ()), public_url, user, expiry, out, issuer,
    )  # fmt: skip
    if print_sql and expiry is not None and out is None:
        raise UsageError("--print-sql takes stdout for the SQL, so the token needs a file", "say --out FILE")
    if print_sql and json:
        raise UsageError("--print-sql and --json exclude each other", "roles.sql beside the config has it, too")
    if print_sql and (db_host is None or (roles == "per_user" and user is None)) and not _terminal():
        hint = "say --user: with per_user the login roles are the users'" if db_host else "say --db-host and --db-name"
        raise UsageError("--print-sql: there is no login role to make", hint)
    layout = _layout(folder)
    _refuse_elsewhere(layout)
    _refuse_twice(layout)
    asking = None if no_input or json or not _terminal() else init_answers.Asking()
    answers = init_answers.answered(given, asking, read_password)
    making = Making(answers, layout, by_whom(context), print_sql=print_sql, json=json)
    with layout.prepared():
        import_before(layout.config)
        if layout.owner is None:
            private_file.become_owner(layout.config)
            private_file.check_folder(layout.config)
        if not no_check:
            making.logged_in = _tried(making, asking)
        with _to_the_end():
            making.as_owner(making.run)


@contextlib.contextmanager
def _to_the_end() -> Iterator[None]:
    """What would end us here, a Ctrl-C or a terminal that goes away, waits until all is made: it takes a moment, and
    half of it would be in the way of the next `mcpctl init`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminal() -> bool:
    """Whether somebody is there who can be asked."""
    return all(one is not None and one.isatty() for one in (sys.stdin, sys.stderr))


def _layout(folder: Path | None) -> "Layout":
    """Where the files go."""
    from mcpctl import config
    from mcpctl.cli import init_layout

    if folder is not None or not _is_root():
        return init_layout.one_folder((folder or config.default_folder()).absolute())
    return init_layout.system() or init_layout.one_folder(Path("/etc/mcpctl"))


def _refuse_elsewhere(layout: "Layout") -> None:
    """MCPCTL_CONFIG would lead every command that follows to another installation."""
    from mcpctl.errors import UsageError

    named, made = os.environ.get("MCPCTL_CONFIG"), layout.config / "config.yaml"
    if named and Path(named).absolute() != made:
        folder = shlex.quote(str(Path(named).absolute().parent))
        raise UsageError(
            f"MCPCTL_CONFIG names {named}, and this would make {made}",
            "unset it" + (f", or name its folder: mcpctl init {folder}" if Path(named).name == made.name else ""),
        )


def _refuse_twice(layout: "Layout") -> None:
    """Before anything is asked: an installation that is there is left alone, and what one has left is no new one's."""
    from mcpctl.errors import ConflictError

    places = [layout.config / "config.yaml", layout.log / "audit.jsonl"]
    places += [layout.state / "state.db"] if layout.owner is not None else []
    for path in places:
        if os.path.lexists(path):
            raise ConflictError(f"{path} exists already", "nothing was made; remove it or choose another folder")


def _tried(making: Making, asking: "Asking | None") -> bool:
    """Whether the login role is seen to be let in. An Error where PostgreSQL is not as was said, unless the person goes
    on all the same."""
    from mcpctl.errors import Error

    try:
        making.as_owner(making.try_database)
    except Error as problem:
        if asking is None:
            problem.hint = f"{problem.hint or ''}; nothing was made; --no-check makes it all the same".removeprefix(
                "; "
            )
            raise
        output.error(problem.message, problem.hint)
        if not asking.yes("go on all the same?"):
            raise Error("nothing was made", "run it again with what is right") from None
        return False
    found = making.answers.postgres
    return found is not None and found.password is not None and not found.made_up


def make(folder: Path, text: str, state_folder: Path | None = None) -> list[str]:
    """The files of a new installation, all or none; refused (exit 5) where one of them is there already. The server's
    own memory goes into `state_folder`, if that is another one."""
    from mcpctl import keyring, private_file, reserve, state
    from mcpctl.audit import log as audit_log
    from mcpctl.errors import ConfigError, ConflictError
    from mcpctl.identity import tenants, tokens, users

    contents = {
        "config.yaml": text.encode(),
        "tokens.yaml": tokens.token_file(folder / "tokens.yaml").render({}),
        "users.yaml": users.user_file(folder / "users.yaml").render({}),
        "tenants.yaml": tenants.tenant_file(folder / "tenants.yaml").render({}),
        "audit.key": audit_log.new_key(),
        "secret.key": keyring.new_key().encode() + b"\n",
    }
    try:
        there_already = folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = [name for name in contents if os.path.lexists(folder / name)]
    except OSError as problem:
        raise ConfigError(
            f"cannot make the folder {folder}: {problem.strerror}", "choose another with `mcpctl init DIR`"
        ) from None
    if taken:
        raise ConflictError(
            f"{folder / taken[0]} exists already", "nothing was made; remove it or choose another folder"
        )
    made: list[Path] = []
    try:
        for name, data in contents.items():
            private_file.create(folder / name, data)
            made.append(folder / name)
        reserve.keep(folder)
        store = (state_folder or folder) / "state.db"
        if not os.path.lexists(store):
            state.make(store)
    except BaseException:
        reserve.give_up(folder)
        for path in made:
            path.unlink(missing_ok=True)
        if not there_already:
            folder.rmdir()
        raise
    return list(contents)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
