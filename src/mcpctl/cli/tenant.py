"""mcpctl tenant: who shares data with whom."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, config_flag, note, ready_to_note, settings

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tenants import Tenant

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
    note_: Annotated[str | None, typer.Option("--note", metavar="T", help="Who that is.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a tenant: a database, or one schema of it, that its users have to themselves.

    Users belong to it with `user add --tenant`, and their tokens with them; all devices of a tenant share its data.

    Example: mcpctl tenant add acme --database acme
    """
    from mcpctl.errors import ConflictError, NotFoundError, UsageError
    from mcpctl.identity import grants, tenants, tokens, users

    found = settings(context, config)
    if database not in found.databases:
        known = ", ".join(found.databases) or "none"
        raise NotFoundError(f"there is no database {database} in the config", f"there are: {known}")
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
    made = tenants.Tenant(name, tokens.utcnow(), database, schema, note_)
    if inside := tenants.strangers(made, users.user_file(found.auth.user_file).current()):
        raise ConflictError(
            f"{', '.join(inside[:5])} {'has' if len(inside) == 1 else 'have'} a grant in {made.where} already",
            f"mcpctl user ungrant {inside[0]} --database {database} --apply",
        )
    _check_place(found, made)
    tenants.add(tenants.tenant_file(found.auth.tenant_file), made)
    note(found, "tenant.added", tenant=name, database=database, reason=by_whom(context, made.where))
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


def _check_place(found: "Settings", made: "Tenant") -> None:
    """Refuses a tenant whose database is another one's by another name of the config."""
    from mcpctl.errors import ConflictError
    from mcpctl.identity import tenants
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.logins import Logins

    logins = Logins(found.databases, Keyring(found.keyring.file))

    def place(name: str) -> tuple[str, ...]:
        about = logins.host(name).about()
        return about["host"], about["port"], about["dbname"]

    for other in tenants.tenant_file(found.auth.tenant_file).current().values():
        known = other.database in found.databases and other.database != made.database
        if known and place(other.database) == place(made.database):
            raise ConflictError(
                f"{made.database} is in PostgreSQL the same as {other.database}, which the tenant {other.name} has",
                "tenants share nothing",
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
    names = ("tenant", "database", "schema", "users", "created_at", "note")
    output.put_table([name.upper() for name in names], [[value[name] for name in names] for value in values])


@app.command("remove")
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="T", help="The tenant's name.")],
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a tenant out; its users must be removed before. Nothing in PostgreSQL is changed."""
    from mcpctl.identity import tenants, users

    found = settings(context, config, needs_log=False)
    people = users.user_file(found.auth.user_file).current()
    gone = tenants.remove(tenants.tenant_file(found.auth.tenant_file), name, people)
    note(found, "tenant.removed", tenant=name, database=gone.database, reason=by_whom(context))
    if json:
        output.put_json({"removed": name})
    else:
        output.put(f"{name} removed")
