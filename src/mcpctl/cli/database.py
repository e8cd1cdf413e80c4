"""mcpctl database: what can be asked, and the passwords for it."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output, own_database
from mcpctl.cli.administration import files_of, lines_beside
from mcpctl.cli.common import (
    ConfigOption,
    JsonOption,
    by_whom,
    config_flag,
    confirm,
    loaded,
    note,
    read_password,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from mcpctl.config_keys import Settings
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.logins import Logins

app = typer.Typer(
    help="Add, list, test, harden and remove databases, and change their passwords.", no_args_is_help=True
)
app.command("register")(own_database.register)
app.command("unregister")(own_database.unregister)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The database's name in the config.")]
_KEYS = (
    "dsn", "host", "port", "dbname", "user", "sslmode", "sslrootcert", "sslcert", "sslkey", "roles", "service_dsn",
    "description",
)  # fmt: skip


@app.command("add")
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a-z first, then a-z 0-9 - _, at most 63 characters.")],
    dsn: Annotated[
        str | None, typer.Option("--dsn", metavar="DSN", help="libpq connection string, without a password.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="H", help="Host, address, or folder of the socket.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default 5432.")] = None,
    dbname: Annotated[str | None, typer.Option("--dbname", metavar="D", help="Its name in PostgreSQL.")] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="R", help="The login role.")] = None,
    password_file: Annotated[
        str | None,
        typer.Option("--password-file", metavar="FILE", help="Where the password is now; - for stdin. It is sealed."),
    ] = None,
    ask_password: Annotated[bool, typer.Option("--ask-password", help="Ask for the password, and seal it.")] = False,
    sslmode: Annotated[
        str | None, typer.Option("--sslmode", metavar="M", help="Default: verify-full for another machine.")
    ] = None,
    sslrootcert: Annotated[
        str | None, typer.Option("--sslrootcert", metavar="FILE", help="The CA's certificate.")
    ] = None,
    sslcert: Annotated[str | None, typer.Option("--sslcert", metavar="FILE", help="Client certificate.")] = None,
    sslkey: Annotated[str | None, typer.Option("--sslkey", metavar="FILE", help="Its private key, 0600.")] = None,
    roles: Annotated[
        str | None, typer.Option("--roles", metavar="R", help="shared, or per_user: see `user grant`.")
    ] = None,
    service_dsn: Annotated[
        str | None, typer.Option("--service-dsn", metavar="DSN", help="For service tokens, where roles are per user.")
    ] = None,
    description: Annotated[
        str | None, typer.Option("--description", metavar="T", help="One line on what is in it.")
    ] = None,
    not_required: Annotated[bool, typer.Option("--not-required", help="/ready is yes without it.")] = False,
    default: Annotated[bool, typer.Option("--default", help="The one that is meant where none is named.")] = False,
    max_rows: Annotated[int | None, typer.Option("--max-rows", metavar="N", help="Instead of limits.max_rows.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="4MiB", help="Instead of limits.max_bytes.")
    ] = None,
    statement_timeout: Annotated[
        str | None, typer.Option("--statement-timeout", metavar="30s", help="Instead of limits.statement_timeout.")
    ] = None,
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not log in first.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Put a database into the config. Its password is sealed; it is tried first, unless --no-test.

    The password comes from a prompt (--ask-password), a file or stdin; without one libpq looks where it always does: a
    client certificate, PGPASSFILE, the environment. A password in --dsn would be in the process list, and is refused.

    Example: mcpctl database add sales --host db.example.org --user sales_reader --ask-password
    """
    from mcpctl.errors import UsageError

    if password_file is not None and ask_password:
        raise UsageError("--password-file and --ask-password exclude each other", "choose one")
    if (service_dsn is not None) and roles != "per_user":
        raise UsageError("--service-dsn is for --roles per_user", "leave it out, or add --roles per_user")
    given = locals()
    values: dict[str, Any] = {key: given[key] for key in _KEYS if given[key] is not None}
    limits = {key: given[key] for key in ("max_rows", "max_bytes", "statement_timeout") if given[key] is not None}
    values |= {"limits": limits} if limits else {}
    values |= {"required": False} if not_required else {}
    values |= {"default": True} if default else {}
    password = given_password(password_file, ask=ask_password, name=name)
    source = _add(context, config, name, values, password, test=not no_test)
    where = "sealed" if password is not None else "no password kept"
    if json:
        output.put_json({"database": name, "sealed": password is not None, "tested": not no_test})
        return
    output.put(f"{name} added ({where})")
    output.say(f"a server that runs takes it with: mcpctl config reload{config_flag(source)}")
    if roles == "per_user":
        output.say(f"next: mcpctl user grant U --database {name} --access read --apply")


def given_password(file: str | None, *, ask: bool, name: str) -> str | None:
    """The password, from where it was said to be; never from the command line's own words."""
    import getpass
    import sys

    from mcpctl.errors import UsageError

    if file is not None:
        found = read_password(file)
    elif ask:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("--ask-password needs a terminal", "use --password-file FILE, or - for stdin")
        found = getpass.getpass(f"password for {name}: ", stream=sys.stderr)
    else:
        return None
    if not found:
        raise UsageError("the password is empty", "give it, or leave it out altogether")
    return found


def _add(
    context: typer.Context, config: Path | None, name: str, values: dict[str, Any], password: str | None, *, test: bool
) -> Path:
    """Check it as the config would be with it, try it, seal the password, and write the config, in this order."""

    from mcpctl import config as configuration
    from mcpctl import config_file, private_file
    from mcpctl.errors import ConflictError, NotFoundError, UsageError
    from mcpctl.postgres import administrator

    looks = test and values.get("roles") == "per_user"
    admin, lines = lines_beside(context, config) if looks else (None, {})  # root's, who may be gone with `loaded`
    found = loaded(context, config)
    if found.source is None:
        raise NotFoundError("there is no config file to put it into", "make one with `mcpctl init`", exit_code=3)
    if not configuration.NAME.fullmatch(name):
        raise UsageError("that cannot be a database's name", "a-z first, then a-z 0-9 - _, at most 63")
    if name == "own":
        raise UsageError("own cannot be a database's name", "the log names users' own databases own:NAME")
    if name in found.databases:
        raise ConflictError(f"there is a database {name} already", "`mcpctl database list` shows all")
    source, own = found.source, found.auth.token_file.parent / f"{name}.password"
    if password is not None:
        values["service_password_file" if "service_dsn" in values else "password_file"] = str(own)

    def check(path: Path) -> None:
        """Read the new file as the server would, log in, and only then seal: all as the owner of mcpctl's files."""
        new = configuration.load(path)

        def tried() -> None:
            from mcpctl import rotation
            from mcpctl.identity import users
            from mcpctl.identity.blocked import store
            from mcpctl.keyring import Keyring
            from mcpctl.postgres.logins import Logins

            keyring = Keyring(new.keyring.file)
            own_database.check_free(new, name)
            if password is not None:
                with (
                    closing(store(found)) as state,
                    users.user_file(new.auth.user_file).edit(),  # no key is dropped while we seal with it
                ):
                    beside = (item for store in rotation.stores(found, state) for item in store.sealed())
                    private_file.create(own, keyring.seal(password, beside).encode() + b"\n")
            try:
                _try(new, name, keyring, test=test)
                if test and not Logins({name: new.databases[name]}, keyring).own(name):
                    mine = {one: line for one, line in lines.items() if one in ("", name)}  # others may come yet
                    _look(new, name, administrator.by_database(admin, mine, new) if admin else {})
                _check_twin(new, name, keyring, test=test)
            except BaseException:
                if password is not None:
                    own.unlink(missing_ok=True)
                raise
            note(new, "config.database_added", database=name, reason=by_whom(context))
            warn_of_tokens(new, name, "may ask it at the server's next start")

        private_file.as_owner(new.auth.token_file, tried)

    config_file.add(source, "databases", name, values, check)
    return source


def _check_twin(new: "Settings", name: str, keyring: "Keyring", *, test: bool) -> None:
    """Refuses a second name for a database that is a tenant's: whoever may use that one would be in it."""
    from dataclasses import replace

    from mcpctl.errors import ConflictError
    from mcpctl.identity import tenants, users
    from mcpctl.postgres.logins import Logins

    every = tenants.tenant_file(new.auth.tenant_file).current()  # one may have lost its database, which this brings
    tenants.check_members(new.auth.tenant_file, every, users.user_file(new.auth.user_file).current())
    places = [one for one in every.values() if one.database != name]
    there = {one.database for one in places if one.database in new.databases}
    apart = {**new.databases, name: replace(new.databases[name], roles="shared")}  # else Logins refuses it
    same = {one for one in there if Logins(apart, keyring).same(name, one)}
    if not same:
        logins = Logins(new.databases, keyring)
        same = one_answers(new, logins, name, there) if test else set()
    for place in places:
        if place.database in same:
            raise ConflictError(
                f"{name} is in PostgreSQL the same as {place.database}, where the tenant {place.name} has "
                f"{place.where}",
                "a tenant's database has one name",
            )


def one_answers(found: "Settings", logins: "Logins", name: str, others: Iterable[str]) -> set[str]:
    """Those of the others where the same database of the same PostgreSQL answers, whatever the way to it is called.
    Warns of those that nobody could look at."""
    from mcpctl.identity import users
    from mcpctl.postgres import trial

    people = users.user_file(found.auth.user_file).current()
    seen = {}
    for one in [name, *sorted(others)]:
        about = trial.one_of((*logins.own(one), *logins.of_people(one, people)))
        if about is None and one == name:
            return set()
        seen[one] = about and about.answering
    if unseen := [one for one, answering in seen.items() if answering is None]:
        output.warn(
            f"nobody could see whether {name} is in PostgreSQL the same as {', '.join(unseen)}",
            f"mcpctl database test {unseen[0]} says why",
        )
    return {one for one, answering in seen.items() if one != name and answering == seen[name]}


def _try(new: "Settings", name: str, keyring: "Keyring", *, test: bool) -> None:
    """Raises an Error where the database's logins are not in order, or cannot log in, or have too much power."""
    from mcpctl.postgres import trial
    from mcpctl.postgres.logins import Logins

    logins = Logins({name: new.databases[name]}, keyring)
    for login in logins.own(name) if test else ():
        trial.log_in(login).check(login)


def _look(new: "Settings", name: str, dsns: "Mapping[str, str]") -> None:
    """Where nobody can log in yet: whether the administrator gets into that database; else warns that nobody looked."""
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.administrator import Administrator
    from mcpctl.postgres.logins import Logins

    if name in dsns:
        login = Logins({name: new.databases[name]}, Keyring(new.keyring.file)).host(name)
        Administrator.of(dsns, login).connect().close()
    else:
        output.warn(f"nobody has looked whether {name} is there", "the first grant needs it; is no name a typo?")


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List the databases of the config, and how each is logged in to."""
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.logins import Logins

    found = settings(context, config, needs_log=False)
    logins = Logins(found.databases, Keyring(found.keyring.file))
    rows = []
    for name, database in found.databases.items():
        about = logins.host(name).about()
        limits = {
            "max_rows": database.limits.max_rows or found.limits.max_rows,
            "max_bytes": database.limits.max_bytes or found.limits.max_bytes,
            "statement_timeout": database.limits.statement_timeout or found.limits.statement_timeout,
        }
        user = "each user's own" if database.roles == "per_user" else about["user"]
        rows.append({
            "name": name, "host": about["host"], "port": about["port"], "dbname": about["dbname"], "user": user,
            "sslmode": about["sslmode"], "roles": database.roles, "required": database.required,
            "default": database.default or len(found.databases) == 1, **limits, "description": database.description,
        })  # fmt: skip
    if json:
        output.put_json({"databases": rows})
        return
    shown = ("name", "host", "port", "dbname", "user", "sslmode", "roles", "required", "default", "description")
    output.put_table([one.upper() for one in shown], [[row[one] for one in shown] for row in rows])


@app.command("test")
def try_(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", help="Which; without one, all.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Log in to each database as the server would, and say what was found. Exits 1 where one does not answer.

    Where roles are per user, the service login is tried and each user's own, but for users who are disabled.
    """
    from mcpctl.config import check_database
    from mcpctl.errors import Error
    from mcpctl.identity import users
    from mcpctl.keyring import Keyring
    from mcpctl.postgres import trial
    from mcpctl.postgres.logins import Logins

    found = settings(context, config, needs_log=False)
    for name in names or ():
        check_database(found, name)
    logins = Logins(found.databases, Keyring(found.keyring.file))
    everybody = users.user_file(found.auth.user_file).current()
    people = {name: user for name, user in everybody.items() if user.disabled_at is None}
    rows: list[dict[str, Any]] = []
    for name in names or found.databases:
        for login in (*logins.own(name), *logins.of_people(name, people)):
            who = login.about()["user"]
            try:
                about = trial.log_in(login)
                about.check(login)
                rows.append({"database": name, "login": about.user, "ok": True, "about": about.words()})
            except Error as problem:
                rows.append({"database": name, "login": who, "ok": False, "about": problem.message})
        if logins.per_user(name) and not any(row["database"] == name for row in rows):
            none = "nobody but disabled users" if logins.of_people(name, everybody) else "nobody"
            rows.append(
                {
                    "database": name,
                    "login": None,
                    "ok": False,
                    "about": f"{none} has a grant there, and there is no service_dsn",
                }
            )
    if json:
        output.put_json({"databases": rows})
    else:
        output.put_table(
            ["DATABASE", "LOGIN", "OK", "ABOUT"],
            [(row["database"], row["login"], "yes" if row["ok"] else "no", row["about"]) for row in rows],
        )
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


@app.command("remove")
def remove(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a database out of the config, with its sealed password. Nothing in PostgreSQL is changed.

    Refused while users have grants there, whose login roles would stay, and while it is a tenant's.
    """

    from mcpctl import config_file, private_file
    from mcpctl.config import check_database
    from mcpctl.errors import NotFoundError

    admin, lines = lines_beside(context, config, forgiving=True)
    found = loaded(context, config)
    check_database(found, name)
    if found.source is None:
        raise NotFoundError(f"there is no config file to take {name} out of", "it is in the environment")
    confirm(f"removing database {name}", f"Remove the database {name} from the config?", yes)
    private_file.as_owner(found.auth.token_file, lambda: _check_unused(found, name))
    config_file.remove(found.source, "databases", name, _must_load)
    private_file.as_owner(found.auth.token_file, lambda: _forget(context, found, name))
    if json:
        output.put_json({"removed": name})
    else:
        output.put(f"{name} removed")
        output.say("a server that runs keeps it until it is told: mcpctl config reload")
    if name in lines:
        output.warn(f"{admin} still has a line for {name}, and no grant is given or taken until that goes", "remove it")


def _must_load(path: Path) -> None:
    from mcpctl import config as configuration

    configuration.load(path)


def _check_unused(found: "Settings", name: str) -> None:
    from mcpctl.errors import ConflictError
    from mcpctl.identity import tenants, users

    granted = [user.name for user in users.user_file(found.auth.user_file).current().values() if name in user.grants]
    if granted:
        raise ConflictError(
            f"{', '.join(granted[:5])} {'has' if len(granted) == 1 else 'have'} a grant in {name}",
            f"mcpctl user ungrant {granted[0]} --database {name} --apply",
        )
    for place in tenants.checked(found).values():
        if place.database == name:
            raise ConflictError(f"the tenant {place.name} has {place.where}", f"mcpctl tenant remove {place.name}")


def _forget(context: typer.Context, found: "Settings", name: str) -> None:
    """Remove the sealed password, if it is ours, write the audit line, and say which tokens still name it."""
    from mcpctl import private_file, renewing
    from mcpctl.keyring import is_sealed

    own = found.auth.token_file.parent / f"{name}.password"
    used = (found.databases[name].password_file, found.databases[name].service_password_file)
    if own in used and own.exists() and is_sealed(private_file.read(own, limit=4096).data.decode("utf-8", "replace")):
        own.unlink()
    for pending in own.parent.glob(f"{name}.*{renewing.PENDING.removeprefix('.')}"):  # of a login, .service or .ROLE
        pending.unlink()
    note(found, "config.database_removed", database=name, reason=by_whom(context))
    warn_of_tokens(found, name, "would open a new database of that name")


def warn_of_tokens(found: "Settings", name: str, how: str, but: "Container[str | None]" = ()) -> None:
    """Name the living tokens that are for a database of that name, `but` those users': it may come to mean another."""
    from mcpctl.identity import tokens

    now, file = tokens.utcnow(), tokens.token_file(found.auth.token_file)
    named = [one for one in file.current().values() if name in (one.databases or ()) and one.user not in but]
    if living := [one.id for one in named if one.status(now) in ("active", "expiring")]:
        output.warn(
            f"{len(living)} living {'token names' if len(living) == 1 else 'tokens name'} {name}, and {how}: "
            f"{', '.join(living[:5])}{', …' if len(living) > 5 else ''}",
            f"mcpctl token revoke {' '.join(living[:5])}",
        )


@app.command("harden")
def harden(
    context: typer.Context,
    name: Name,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="Print the SQL for a DBA to run. The default.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Run it, as the administrator of admin.dsn.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also what only shows sizes or disturbs a little; some programs need it.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take EXECUTE from PUBLIC on functions that write, reach outside, or read behind the privileges' back.

    Once for each database, and again after an upgrade or CREATE EXTENSION. docs/security.md says what it takes away,
    and what it cannot.
    """
    from mcpctl.config import check_database
    from mcpctl.errors import UsageError
    from mcpctl.postgres import harden as hardening
    from mcpctl.postgres.administrator import Administrator

    if print_sql and apply:
        raise UsageError("--print-sql and --apply exclude each other", "choose one")
    files = files_of(context, config, needs_log=False)
    found = files.settings
    check_database(found, name)
    script = hardening.script(strict=strict)
    if not apply:
        if json:
            output.put_json({"database": name, "sql": script, "applied": False})
        else:
            output.put(script.rstrip("\n"))
        return
    who = Administrator.of(files.dsns, files.logins().host(name))
    with who.connected() as connection:
        before = hardening.held_by_public(connection, strict=strict)
        connection.execute(script.encode())
    note(found, "config.database_hardened", database=name, reason=by_whom(context, f"{len(before)} functions"))
    if json:
        output.put_json({"database": name, "applied": True, "revoked": before})
        return
    for one in before:
        output.put(f"taken from PUBLIC: {one}")
    output.put(f"{name} is hardened" if before else f"{name} was hardened already")
    output.say(f"see what is left: mcpctl doctor{config_flag(found.source)}")
