"""mcpctl tenant: who shares data with whom."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.administration import Files, files_of
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, config_flag, confirm, note, ready_to_note, settings
from mcpctl.cli.database import one_answers, warn_of_tokens
from mcpctl.cli.new_token import networks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcpctl.config_keys import Settings
    from mcpctl.identity.tenants import Tenant
    from mcpctl.identity.users import User
    from mcpctl.postgres.login import Login
    from mcpctl.postgres.logins import Logins

app = typer.Typer(help="Make, list and remove tenants.", no_args_is_help=True)


@app.command("add")
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="T", help="a-z first, then a-z 0-9 -, at most 31 characters.")],
    database: Annotated[str, typer.Option("--database", metavar="D", help="The database's name in the config.")],
    schema: Annotated[
        str | None,
        typer.Option("--schema", metavar="S", help="Only this schema of it; else all of it is the tenant's."),
    ] = None,
    allow_ip: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-ip", metavar="CIDR", help="Its tokens are taken only from this address or network. Repeatable."
        ),
    ] = None,
    note_: Annotated[str | None, typer.Option("--note", metavar="T", help="Who that is.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a tenant: a database, or one schema of it, that its users have to themselves.

    Users belong to it with `user add --tenant`, and their tokens with them; all devices of a tenant share its data.

    Example: mcpctl tenant add acme --database acme
    """
    from mcpctl.config import check_database
    from mcpctl.errors import ConflictError, UsageError
    from mcpctl.identity import grants, tenants, tokens, users

    networks = networks_of(allow_ip)

    files = files_of(context, config, needs_log=True)
    found = files.settings
    check_database(found, database)
    if schema is not None:
        (schema,) = grants.targets([schema], [])
        if schema == grants.EVERYTHING:
            raise UsageError("--schema takes one schema", "leave it out for the whole database")
        if found.databases[database].roles != "per_user":
            raise UsageError(
                f"in {database} all users share one login, which sees every schema",
                f"set databases.{database}.roles: per_user, or give the tenant a database of its own",
            )
    ready_to_note(found)
    made = tenants.Tenant(name, tokens.utcnow(), database, schema, note_, networks)
    people = users.user_file(found.auth.user_file).current()
    if not any(user.tenant == name for user in people.values()):  # else it may be what mends the file
        tenants.checked(found)
    if inside := tenants.strangers(made, people):
        raise ConflictError(
            f"{', '.join(inside[:5])} {'has' if len(inside) == 1 else 'have'} a grant in {made.where} already",
            f"mcpctl user ungrant {inside[0]} --database {database} --apply",
        )
    logins = files.logins()
    others = found.databases.keys() - {database}
    if twin := next(iter(logins.twins.get(database) or one_answers(found, logins, database, others)), None):
        raise ConflictError(f"{database} is in PostgreSQL the same as {twin}", "leave one of them in the config")
    if made.own is not None:
        _check_service(logins, made)
        _check_there(files, [*logins.own(database), *logins.of_people(database, people)], made)
    file = tenants.tenant_file(found.auth.tenant_file, there=lambda one: one.database in found.databases)
    tenants.add(file, made)
    note(found, "tenant.added", tenant=name, database=database, reason=by_whom(context, made.where))
    if schema is None:
        _warn_of_others(found, made, people)
    if json:
        output.put_json({"tenant": name, **tenants.as_values(made)})
        return
    output.put(f"{name} added: {made.where}")
    if made.schema is not None:
        output.warn(
            "in one database the names of all schemas, tables and columns, and about how many rows they have, show to "
            "every tenant; rows do not",
            f"where names must not show, a database for each: mcpctl database add {name} --dbname {name} …",
        )
    else:
        output.say("in one cluster the names of its databases and roles show to all; a cluster of its own hides them")
    output.say(f"next: mcpctl user add U --tenant {name}{config_flag(found.source)}")


def _warn_of_others(found: "Settings", tenant: "Tenant", people: "Mapping[str, User]") -> None:
    """Name who could ask the database until now: with a login that all share everybody, else nobody who is left."""
    shared = found.databases[tenant.database].roles == "shared"
    out = [user.name for user in people.values() if shared and user.tenant is None and user.disabled_at is None]
    if out:
        output.warn(
            f"{tenant.database} is closed from now on to whoever belongs to no tenant: "
            f"{', '.join(out[:5])}{', …' if len(out) > 5 else ''}",
            f"who belongs to {tenant.name}: mcpctl user remove U, and user add U --tenant {tenant.name}",
        )
    members = [user.name for user in people.values() if user.tenant == tenant.name]
    warn_of_tokens(found, tenant.database, "may ask it no more", members)


def _check_service(logins: "Logins", tenant: "Tenant") -> None:
    """Refuses a schema that the login of service tokens may use (exit 5), or where nobody could look."""
    from contextlib import closing

    from mcpctl.errors import ConflictError, Error
    from mcpctl.postgres import administrator

    for login in logins.own(tenant.database):
        user, connection = login.about()["user"], administrator.connect_as(login)
        if connection is None:
            raise Error(
                f"{user}, the login of service tokens in {tenant.database}, gets in nowhere to see what it may use",
                f"mcpctl database test {tenant.database}",
            )
        with closing(connection):
            if administrator.may_use(connection, tenant.own or ""):
                raise ConflictError(
                    f"service tokens log in to {tenant.database} as {user}, who may use {tenant.where}",
                    f'REVOKE ALL ON SCHEMA {tenant.schema} FROM "{user}", PUBLIC; and from what it is a member of',
                )


def _check_there(files: Files, logins: "list[Login]", tenant: "Tenant") -> None:
    """Refuses a schema that is not there (exit 4): after a typo the one that is meant could be granted to others. Warns
    where none of the logins, nor the administrator, gets in to look."""
    from contextlib import closing, suppress

    from mcpctl.errors import Error, NotFoundError
    from mcpctl.postgres import administrator

    connection = next(filter(None, map(administrator.connect_as, logins)), None)
    if connection is None:
        with suppress(Error):
            connection = files.administrator(tenant.database, files.granting()).connect()
    if connection is None:
        output.warn(
            f"nobody could look whether {tenant.where} is there", "is it a typo? then the one meant is no tenant's"
        )
        return
    with closing(connection):
        if not administrator.is_schema(connection, tenant.own or ""):
            raise NotFoundError(
                f"there is no schema {tenant.schema} in {tenant.database}",
                "make it first; names are as PostgreSQL has them",
            )


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List all tenants, with how many users each has."""
    from mcpctl.identity import tenants, users

    found = settings(context, config, needs_log=False)
    members: dict[str | None, int] = {}
    for user in users.user_file(found.auth.user_file).current().values():
        members[user.tenant] = members.get(user.tenant, 0) + 1
    entries = tenants.tenant_file(found.auth.tenant_file).current()
    values = [
        {"tenant": one.name, **tenants.as_values(one), "users": members.get(one.name, 0)} for one in entries.values()
    ]
    if json:
        output.put_json({"tenants": values})
        return
    names = ("tenant", "database", "schema", "users", "created_at", "note", "allow_ips")
    shown = [{**value, "allow_ips": ",".join(value["allow_ips"] or ())} for value in values]
    output.put_table([name.upper() for name in names], [[value[name] for name in names] for value in shown])


@app.command("remove")
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="T", help="The tenant's name.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a tenant out; its users must be removed before. Nothing in PostgreSQL is changed.

    A database that was its alone is then open to whoever may ask databases; so it asks first.
    """
    from mcpctl.identity import tenants, users

    found = settings(context, config, needs_log=False)
    people = users.user_file(found.auth.user_file).current()
    file = tenants.tenant_file(found.auth.tenant_file)
    place = tenants.removable(file, name, people)
    tenants.check_members(file.path, file.current(), people)
    if place.schema is None and place.database in found.databases:
        confirm(
            f"removing tenant {name}",
            f"{place.database} is then open to whoever may ask databases. Remove tenant {name}?",
            yes,
        )
    gone = tenants.remove(file, name, people)
    note(found, "tenant.removed", tenant=name, database=gone.database, reason=by_whom(context))
    if json:
        output.put_json({"removed": name})
    else:
        output.put(f"{name} removed")
