"""mcpctl user grant and ungrant, mcpctl grant diff: what a user may read and write, in users.yaml and in PostgreSQL."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.administration import Files, files_of
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, config_flag, note, proof_of_user, ready_to_note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mcpctl.config_keys import Settings
    from mcpctl.errors import Error
    from mcpctl.identity.grants import Grant

app = typer.Typer(help="Compare what is recorded with what PostgreSQL has.", no_args_is_help=True)

UserArgument = Annotated[str, typer.Argument(metavar="U", help="The user's name.")]
DatabaseOption = Annotated[str, typer.Option("--database", metavar="D", help="The database's name in the config.")]
SchemaOption = Annotated[
    list[str] | None,
    typer.Option("--schema", metavar="S", help="This schema, with the tables to come in it. Repeatable."),
]
TableOption = Annotated[
    list[str] | None, typer.Option("--table", metavar="S.T", help="This table or view alone. Repeatable.")
]
PrintOption = Annotated[bool, typer.Option("--print-sql", help="Print the SQL for a DBA to run. The default.")]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Run it, as the administrator of admin.dsn.")]


def grant(
    context: typer.Context,
    user: UserArgument,
    database: DatabaseOption,
    access: Annotated[
        str,
        typer.Option(
            "--access", metavar="A", help="read, write or admin. Who writes reads, too; admin changes settings."
        ),
    ],
    schema: SchemaOption = None,
    table: TableOption = None,
    print_sql: PrintOption = False,
    apply: ApplyOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Let a user read or write in a database whose roles are per user. Without --schema and --table: all schemas.

    With admin access a user may change those settings of PostgreSQL that databases.D.settings lists, and nothing else.

    PostgreSQL is made as users.yaml then says: the user's login role is made, marked, and given exactly what is
    recorded. Granting the same twice changes nothing.

    Example: mcpctl user grant alice --database sales --schema public --access read --apply
    """
    files = files_of(context, config, needs_log=True)
    carry_out(context, files, user, database, access, (schema or [], table or []), Way(print_sql, apply, json))


def carry_out(
    context: typer.Context,
    files: Files,
    user: str,
    database: str,
    access: str,
    named: tuple[list[str], list[str]],
    way: "Way",
) -> None:
    """Grant a user an access to the schemas and tables that are named, or to all that there are."""
    from mcpctl.errors import UsageError
    from mcpctl.identity.grants import ACCESSES, targets

    if access not in ACCESSES:
        raise UsageError(f"--access takes read, write or admin, not {access!r}", "say --access read")
    _check_whole(access, *named)
    granting = files.granting()
    granting.check(database, access)
    within = granting.confined(user, database, access, targets(*named))
    _change(context, files, user, database, lambda old: old.more(access, within), way, "grant.added")
    if access == "write":
        _warn_of_roles(files, user, database)


def _warn_of_roles(files: Files, user: str, database: str) -> None:
    """A grant lets somebody write in PostgreSQL, and their roles have to let them call the tool that does."""
    from mcpctl.identity.principal import Principal
    from mcpctl.policy.access import Access
    from mcpctl.policy.roles import DEFAULT

    found, held = files.settings, files.granting().user(user).roles
    access, who = Access(found.auth), Principal(None, user, "", roles=held)
    links = [access.may(who, one) for one in ("tools:execute_statement", f"databases:{database}:write")]
    refusal = next((link.reason for link in links if not link.allowed), None)
    if refusal is None:
        return
    wanted = " ".join([*(one for one in held or () if one not in DEFAULT), "mcp-tools"])
    hint = f"mcpctl user roles {user} {wanted}{config_flag(found.source)}"
    if user in found.auth.read_only_users:
        hint = f"take {user} out of auth.read_only_users, and: {hint}"
    output.warn(f"{user} may not write yet: {refusal}", hint)


def ungrant(
    context: typer.Context,
    user: UserArgument,
    database: DatabaseOption,
    access: Annotated[
        str | None,
        typer.Option("--access", metavar="A", help="read, write or admin alone. Who no longer reads cannot write."),
    ] = None,
    schema: SchemaOption = None,
    table: TableOption = None,
    print_sql: PrintOption = False,
    apply: ApplyOption = False,
    done: Annotated[
        bool, typer.Option("--done", help="A DBA has run the SQL, and nobody can log in there and look.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a grant back: all of it in that database, or what --access, --schema and --table name.

    The server refuses from now on, and running queries are cut; PostgreSQL's own rights end with the SQL.
    """
    from mcpctl.errors import UsageError
    from mcpctl.identity.grants import ACCESSES, Grant, targets

    if access not in (None, *ACCESSES):
        raise UsageError(f"--access takes read, write or admin, not {access!r}", "leave it out to take all back")
    _check_whole(access, schema, table)
    named = targets(schema or [], table or []) if schema or table else ()
    files = files_of(context, config, needs_log=False)
    if done:
        if access or named or print_sql or apply:
            raise UsageError("--done goes with --database alone", "it is about what was taken back before, as a whole")
        files.granting().believe(user, database, files.dsns)
        note(files.settings, "grant.removed", user=user, database=database, reason=by_whom(context, "as a DBA says"))
        if json:
            output.put_json({"user": user, "database": database, **_shown(Grant(database))})
        else:
            output.put(f"{user} in {database}: nothing")
        return

    def change(old: Grant) -> Grant:
        have = {*old.read, *old.write}
        lacking = [one for one in named if one not in have]
        if lacking and not old.closed:  # else an earlier run may have recorded it, and PostgreSQL still has it
            recorded = ", ".join(sorted(have)) or "none"
            hint = f"recorded: {recorded}; what is inside of a wider grant cannot be taken out of it"
            raise UsageError(f"{user} has no grant on {lacking[0]} in {database}", hint)
        return old.less(access, named)

    _change(context, files, user, database, change, Way(print_sql, apply, json), "grant.removed")


def _check_whole(access: str | None, schema: list[str] | None, table: list[str] | None) -> None:
    """Settings are the cluster's: no schema or table goes with them."""
    from mcpctl.errors import UsageError

    if access == "admin" and (schema or table):
        raise UsageError(
            "--access admin takes no --schema or --table", "it is about the settings that databases.D.settings lists"
        )


class Way:
    """Print or apply, and how the result is shown."""

    def __init__(self, print_sql: bool, apply: bool, json: bool) -> None:
        from mcpctl.errors import UsageError

        if print_sql and apply:
            raise UsageError("--print-sql and --apply exclude each other", "choose one")
        self.apply = apply
        self.json = json


def _change(
    context: typer.Context,
    files: Files,
    user: str,
    database: str,
    change: "Callable[[Grant], Grant]",
    way: Way,
    event: str,
) -> None:
    from mcpctl.errors import Error, UnavailableError
    from mcpctl.granting import told
    from mcpctl.identity.grants import login_role

    found, granting = files.settings, files.granting()
    granting.check(database)
    if event == "grant.added":
        ready_to_note(found)
    who = files.administrator(database, granting) if way.apply else None
    old = granting.user(user).grants.get(database)
    try:
        if old is not None:
            granting.settled(granting.user(user), old, files.dsns)
        if who is not None:
            done, script = granting.applied(user, database, change, who), None
        else:
            done, script = granting.printed(user, database, change)
    except Error as problem:
        if event == "grant.removed":
            _add_what_is_so(context, found, granting.user(user).grants.get(database), user, problem)
        raise
    what = f"{database}: {told(done)}"
    note(
        found,
        event if way.apply else "grant.printed",
        user=user,
        database=database,
        reason=by_whom(context, what),
    )
    if who is not None:
        try:
            differences = granting.disagreements(granting.user(user), done, files.dsns)
        except UnavailableError as problem:  # it is done, and recorded
            differences = [f"{problem.message}; {problem.hint}"]
        told_there = [one for one in who.warnings if not any(more.startswith(one) for more in differences)]
        for text in (*told_there, *differences):
            output.warn(text)
    lines = files.hba_lines(database, granting)
    words, values = proof_of_user(found, user) if event == "grant.removed" else ("", None)
    if way.json:
        cut = {"cut": values} if event == "grant.removed" else {}
        output.put_json({"user": user, "database": database, **_shown(done), "sql": script, "pg_hba": lines, **cut})
        return
    if script is not None:
        output.put(script.rstrip("\n"))
        look = f"when that SQL has run: mcpctl grant diff{config_flag(found.source)}"
        counts = "it counts" if event == "grant.added" and not done.closed else _refused(done, user)
        output.say(f"recorded as {done.state}; {counts}; {look}")
    else:
        output.put(f"{user} in {what}")
    if words:
        output.say(words)
    if not done.empty:
        if done.admin and event == "grant.added":
            output.say(f"{login_role(user, 'admin')} may also execute pg_reload_conf(), which has a change applied")
        _say_what_follows(files, database, granting, lines)


def _add_what_is_so(
    context: typer.Context, found: "Settings", grant: "Grant | None", user: str, problem: "Error"
) -> None:
    """Where a right could not be taken back in PostgreSQL: what is recorded, cut, and refused by now."""
    from mcpctl.granting import told

    if grant is None or grant.state is None:
        return  # nothing was recorded
    what = f"{grant.database}: {told(grant)}, {grant.state}, not yet so in PostgreSQL"
    note(found, "grant.removed", user=user, database=grant.database, reason=by_whom(context, what))
    words, _ = proof_of_user(found, user)
    problem.message += f"; recorded as {grant.state}: {_refused(grant, user)} ({words})"
    problem.hint = f"{problem.hint or 'see doctor'}; then run the same command again, which goes on from there"


def _refused(grant: "Grant", user: str) -> str:
    """What the server refuses from now on, while PostgreSQL still has what was taken back."""
    if grant.empty or not grant.closed:
        return "the server refuses already what was taken back"
    return f"the server refuses all of {user}'s calls in {grant.database} until PostgreSQL is seen to have it"


def _shown(grant: "Grant") -> dict[str, Any]:
    return {"read": list(grant.read), "write": list(grant.write), "admin": grant.admin, "state": grant.state}


def _say_what_follows(files: Files, database: str, granting: Any, lines: list[str]) -> None:
    """What the sysadmin should know with every grant: pg_hba.conf, what is open still, the worst case."""
    output.say("pg_hba.conf should keep these logins to mcpctl, with these lines before all others that match:")
    for line in lines:
        output.say(f"  {line}")
    from mcpctl.errors import UnavailableError

    try:
        for text, hint in files.remarks(database, granting):
            output.warn(text, hint)
    except UnavailableError as problem:  # the grant is made
        output.warn(problem.message, problem.hint)


@app.callback()
def group() -> None:
    """Compare what is recorded with what PostgreSQL has."""


@contextmanager
def _reaching(database: str, unasked: "dict[str, Error]") -> "Iterator[None]":
    """What cannot be reached is kept for the end, and the other databases are looked at."""
    from mcpctl.errors import UnavailableError

    try:
        yield
    except UnavailableError as problem:
        unasked[database] = problem


@app.command("diff")
def diff(
    context: typer.Context,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="Only this user.")] = None,
    database: Annotated[str | None, typer.Option("--database", metavar="D", help="Only this database.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show where PostgreSQL and users.yaml disagree. Exits 1 where they do, or a database is not reached.

    What a DBA has run from --print-sql meanwhile is confirmed in users.yaml. `mcpctl user grant` again mends the rest,
    but for what is shown with the SQL or the command that mends it.
    """
    files = files_of(context, config, needs_log=False)
    granting = files.granting()
    people = {user: granting.user(user)} if user else granting.people()
    recorded = {one for entry in people.values() for one in entry.grants}
    if database and database not in {*recorded, *files.settings.databases}:
        granting.check(database)
    rows: list[tuple[str, str, str]] = []
    unasked: dict[str, Error] = {}
    for name, entry in people.items():
        for grant in entry.grants.values():
            if (database and grant.database != database) or grant.database in unasked:
                continue
            with _reaching(grant.database, unasked):
                if granting.settled(entry, grant, files.dsns):
                    output.say(f"{name} in {grant.database}: confirmed")
                    continue
                rows += [(name, grant.database, one) for one in granting.disagreements(entry, grant, files.dsns)]
    if user is None:
        strays: dict[str, str] = {}  # a role is the cluster's, and is told of once
        for one in [database] if database else files.settings.databases:
            if one in unasked:
                continue
            with _reaching(one, unasked):
                for where, said in granting.strays(files.dsns, (one,)):
                    strays.setdefault(said, where)
        rows += [("", where, said) for said, where in strays.items()]
    if json:
        output.put_json(
            {"differences": [dict(zip(("user", "database", "difference"), row, strict=True)) for row in rows]}
        )
    elif rows:
        output.put_table(["USER", "DATABASE", "DIFFERENCE"], rows)
    elif not unasked:
        output.say("users.yaml and PostgreSQL agree")
    for problem in unasked.values():
        output.error(problem.message, problem.hint)
    if rows or unasked:
        raise typer.Exit(1)
