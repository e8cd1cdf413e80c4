"""mcpctl user: who there is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import grant, guest, output, own_database, password, signed_in
from mcpctl.cli.administration import files_of
from mcpctl.cli.common import (
    ConfigOption,
    JsonOption,
    ReasonOption,
    by_whom,
    config_flag,
    confirm,
    living_tokens,
    note,
    note_all,
    proof,
    proof_of_user,
    ready_to_note,
    settings,
)
from mcpctl.cli.taking import taking

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token
    from mcpctl.identity.users import User

app = typer.Typer(
    help="Make, list, disable and remove users, and grant them what they may read, write and set.", no_args_is_help=True
)
app.command("grant")(grant.grant)
app.command("ungrant")(grant.ungrant)

Name = Annotated[str, typer.Argument(metavar="U", help="The user's name.")]


@app.command("add")
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="U", help="a-z first, then a-z 0-9 -, at most 31 characters.")],
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            metavar="R",
            help="mcp-user (the default), mcp-tools, mcp-developer, mcp-admin, or one of the config's. Repeatable.",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", metavar="T", help="The tenant that they belong to; then they see nothing else."),
    ] = None,
    note_: Annotated[str | None, typer.Option("--note", metavar="T", help="Who that is.")] = None,
    password_file: password.FileOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a user, whom tokens can then be given to.

    Example: mcpctl user add alice --role mcp-tools --note "Alice Example, sales"
    """
    from mcpctl.identity import tenants

    secret = None if password_file is None else password.read(password_file)
    found = settings(context, config)
    hashed = None if secret is None else password.hashed(secret, name)
    made = make(context, found, name, role, tenant, note_, hashed)
    if json:
        output.put_json(_record(made, []))
        return
    output.put(f"{name} added")
    flag = config_flag(found.source)
    places = tenants.checked(found)
    per_user = [
        one
        for one, database in found.databases.items()
        if database.roles == "per_user" and tenants.grantable(places, tenant, one)
    ]
    for database in per_user[:1]:
        output.say(f"next: mcpctl user grant {name} --database {database} --access read --apply{flag}")
    output.say(f"next: mcpctl token add --user {name} --expiry 90d{flag}")


def make(
    context: typer.Context,
    found: "Settings",
    name: str,
    role: list[str] | None,
    tenant: str | None,
    note_: str | None = None,
    hashed: str | None = None,
) -> "User":
    """A new user, in the file and in the audit log; `hashed` is the password."""
    from mcpctl.identity import tenants, tokens, users

    places = tenants.checked(found)
    if tenant is not None:
        tenants.find(places, tenant)
    _check_roles(found, role or [])
    ready_to_note(found)
    file = users.user_file(found.auth.user_file)
    if name not in file.current():  # one of that name may have been taken out by hand
        own_database.forget(found, name)
    made = users.add(file, name, note_, tokens.utcnow(), role, tenant, hashed)
    note(found, "user.added", user=name, reason=by_whom(context, note_))
    if hashed is not None:
        note(found, "user.password", user=name, reason=by_whom(context, "set"))
    return made


def _check_roles(found: "Settings", wanted: list[str]) -> None:
    import difflib

    from mcpctl.errors import NotFoundError
    from mcpctl.policy.roles import BUILT_IN

    known = [*BUILT_IN, *found.auth.roles]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise NotFoundError(f"there is no role {name}", f"{meant}there are {', '.join(known)}")


def _record(user: "User", living: list["Token"]) -> dict[str, Any]:
    """A user as `--json` shows it: without what is sealed or hashed."""
    from mcpctl.identity.users import as_values

    found = {key: value for key, value in as_values(user).items() if key != "password"}
    granted = {
        name: {"read": list(one.read), "write": list(one.write), "admin": one.admin, "state": one.state}
        for name, one in user.grants.items()
    }
    return {
        "user": user.name,
        **found,
        "has_password": user.password is not None,
        "grants": granted,
        "tokens": len(living),
        "token_ids": [token.id for token in living],
    }


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List all users, with how many living tokens each has, and the guests of outside issuers who have come."""
    from mcpctl.identity import users
    from mcpctl.policy.roles import DEFAULT

    found = settings(context, config, needs_log=False)
    living = living_tokens(found)
    entries = users.user_file(found.auth.user_file).current()
    if json:
        output.put_json(
            {
                "users": [_record(user, living.get(user.name, [])) for user in entries.values()],
                "guests": [guest.values(one) for one in guest.known(found)],
            }
        )
        return
    rows = [
        (
            user.name,
            user.created_at.isoformat().replace("+00:00", "Z"),
            ",".join(DEFAULT if user.roles is None else user.roles) or "none",
            user.tenant,
            ",".join(user.grants),
            len(living.get(user.name, ())),
            "disabled" if user.disabled_at is not None else "active",
            user.note,
        )
        for user in entries.values()
    ]
    linked = {(link.issuer, link.subject): user.name for user in entries.values() for link in user.links}
    rows += [guest.row(one, linked.get((one.issuer, one.subject))) for one in guest.known(found)]
    output.put_table(["USER", "CREATED_AT", "ROLES", "TENANT", "GRANTS", "TOKENS", "STATUS", "NOTE"], rows)


@app.command("show")
def show(context: typer.Context, name: Name, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show one user: roles, grants, tokens, and whether there is a password."""
    from mcpctl.granting import told
    from mcpctl.identity import users
    from mcpctl.policy.roles import DEFAULT

    if guest.is_guest(name):
        guest.show(context, name, json, config)
        return
    found = settings(context, config, needs_log=False)
    user = users.find(users.user_file(found.auth.user_file).current(), name)
    living = living_tokens(found).get(name, [])
    if json:
        output.put_json(_record(user, living))
        return
    values = users.as_values(user)
    rows: list[tuple[str, Any]] = [("user", name), ("created_at", values["created_at"])]
    rows += [
        ("disabled_at", values["disabled_at"]),
        ("roles", ",".join(DEFAULT if user.roles is None else user.roles) or "none"),
    ]
    rows += [("tenant", user.tenant), ("password", "no" if user.password is None else "yes")]
    for database, one in user.grants.items():
        rows.append((f"grant on {database}", told(one) + (f" ({one.state})" if one.state else "")))
    rows += [(f"link to {one.issuer}", one.subject) for one in user.links]
    rows += [(f"own database {one}", where) for one, where in own_database.brought(found, name)]
    rows += [("tokens", ",".join(token.id for token in living)), ("note", user.note)]
    output.put_table(["FIELD", "VALUE"], rows)


@app.command("roles")
def roles(
    context: typer.Context,
    name: Name,
    role: Annotated[
        list[str] | None, typer.Argument(metavar="[ROLE…]", help="All roles that they are to have.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="No role at all: then they may do nothing.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a user these roles instead of those they have; without a role, show them.

    Where one is taken away, what the user has running is cut.

    Example: mcpctl user roles alice mcp-tools analyst
    """
    from mcpctl.errors import UsageError
    from mcpctl.identity import users
    from mcpctl.policy.roles import DEFAULT

    if role and none:
        raise UsageError("--none goes with no role", "leave one of them out")
    changes = bool(role) or none
    found = settings(context, config, needs_log=changes)
    file = users.user_file(found.auth.user_file)
    user = users.find(file.current(), name)
    if changes:
        _check_roles(found, role or [])
        ready_to_note(found)
        user = users.set_roles(file, name, role or [])
        note(found, "user.roles", user=name, reason=by_whom(context, ", ".join(user.roles or ()) or "none"))
    words, values = proof_of_user(found, name) if changes else ("", None)
    held = DEFAULT if user.roles is None else user.roles
    if json:
        output.put_json({"user": name, "roles": list(held)} | ({"cut": values} if changes else {}))
        return
    output.put(f"{name}: {', '.join(held) or 'none'}")
    if changes:
        output.put(words)


@app.command("passwd")
def passwd(
    context: typer.Context,
    name: Name,
    password_file: password.FileOption = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the password away: nobody signs in as them.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a user a password to sign in with, or another one; it is asked for twice. Their sessions end; their tokens
    stay as they are.

    Example: mcpctl user passwd alice
    """
    from mcpctl.errors import UsageError
    from mcpctl.identity import users

    if remove and password_file is not None:
        raise UsageError("--remove and --password-file exclude each other", "choose one")
    secret = None if password_file is None else password.read(password_file)
    found = settings(context, config, needs_log=not remove)
    file = users.user_file(found.auth.user_file)
    users.find(file.current(), name)
    hashed = None
    if not remove:
        ready_to_note(found)
        hashed = password.hashed(password.asked_for(name) if secret is None else secret, name)
    theirs = signed_in.of(found, name)
    _, changed = users.set_password(file, name, hashed)
    word = "removed" if remove else "set"
    if changed:
        note(found, "user.password", user=name, reason=by_whom(context, word))
    ended = _sign_out(context, found, name, theirs, f"password of {name} {word}") if changed else []
    words, values = proof(found, ended) if ended else ("", None)
    if json:
        told = {"user": name, "has_password": not remove, "changed": changed}
        output.put_json({**told, "sessions_ended": ended, "cut": values})
        return
    output.put(f"{name}: password {word}" if changed else f"{name} had no password")
    _tell_signed_out(ended, words)


def _sign_out(context: typer.Context, found: "Settings", name: str, theirs: list[str], why: str) -> list[str]:
    """End a user's sessions for good, after the server has begun to refuse them; those that had not ended."""
    ended = signed_in.end_theirs(found, name, theirs)
    note_all(found, signed_in.closed(ended, name, by_whom(context, why)))
    return ended


def _tell_signed_out(ended: list[str], words: str = "") -> None:
    if ended:
        output.say(f"{len(ended)} session{'s' if len(ended) > 1 else ''} ended{f'; {words}' if words else ''}")


@app.command("disable")
def disable(
    context: typer.Context,
    name: Name,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Refuse all of a user's tokens from now on, end their sessions, and cut what runs; `enable` lets them in again.
    Never asks.

    With an administrator in admin.dsn the user's login roles lose their LOGIN, too.
    """
    _switch(context, name, reason, json, config, off=True)


@app.command("enable")
def enable(context: typer.Context, name: Name, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Let a disabled user in again."""
    _switch(context, name, None, json, config, off=False)


def _switch(context: typer.Context, name: str, reason: str | None, json: bool, config: Any, *, off: bool) -> None:
    from mcpctl.errors import Error
    from mcpctl.identity import tokens, users
    from mcpctl.postgres.roles import switch_login

    if guest.is_guest(name):
        guest.switch(context, name, reason, json, config, off=off)
        return
    files = files_of(context, config, needs_log=not off, forgiving=off)
    found = files.settings
    if not off:
        ready_to_note(found)
    file = users.user_file(found.auth.user_file)
    theirs = [token.id for token in living_tokens(found).get(name, [])] if off else []
    sessions = signed_in.of(found, name) if off else []
    with taking(found, [*theirs, *sessions], by_whom(context, reason), found.auth.user_file):
        user, changed = users.disable(file, name, tokens.utcnow() if off else None)
    word = "disabled" if off else "enabled"
    if changed:
        note(found, f"user.{word}", user=name, reason=by_whom(context, reason))
    ended = _sign_out(context, found, name, sessions, f"user {name} disabled") if off else []
    words, values = proof_of_user(found, name, ended) if off else ("", None)
    locked, unseen = list[str](), list[str]()
    failed: Error | None = None
    if user.grants:
        granting = files.granting()
        try:
            for role in granting.set_login(name, files.dsns, unseen, on=not off):
                locked.append(role)
        except Error as problem:
            failed = problem
        for text in unseen:
            output.warn(text, f"put the database back into the config, and then: mcpctl user {word[:-1]} {name} again")
        for database, roles in granting.unreached(user, files.dsns).items():
            script = " ".join(switch_login(roles, on=not off))
            output.warn(f"{database}: no administrator to {word[:-1]} the login roles; a DBA runs: {script}")
    if json:
        told = failed.message if failed is not None else None
        output.put_json(
            {"user": name, "changed": changed, "roles": locked, "failed": told, "sessions_ended": ended, "cut": values}
        )
    else:
        output.put(f"{name} {word}" if changed else f"{name} was {word} already")
        if off:
            output.put(words)
        _tell_signed_out(ended)
        if locked:
            output.say(f"{'NOLOGIN' if off else 'LOGIN'}: {', '.join(locked)}")
    if failed is not None:
        server = "the server refuses all of their tokens" if off else "the server lets them in"
        again = f"{failed.hint or 'see doctor'}; then mcpctl user {word[:-1]} {name} again"
        raise Error(f"{name} is {word}, and {server}; but not all of it is so in PostgreSQL: {failed.message}", again)


@app.command("remove")
def remove(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a user out, with all login roles; what those own goes to mcp_left, and is named.

    The user's tokens end with that. Where a DBA gives no administrator: take the grants back with --print-sql first.
    """

    from mcpctl.errors import Error
    from mcpctl.identity import tokens, users

    files = files_of(context, config, needs_log=False)
    found = files.settings
    file = users.user_file(found.auth.user_file)
    user = users.find(file.current(), name)
    confirm(f"removing user {name}", f"Remove user {name}, their tokens' access and their login roles?", yes)
    living, sessions = living_tokens(found).get(name, []), signed_in.of(found, name)
    per_user = any(database.roles == "per_user" for database in found.databases.values())
    granting, disabled, cut = (files.granting() if user.grants or (per_user and files.dsns) else None), False, None
    if granting is not None:
        granting.check_administrators(user, files.dsns)
        _, disabled = users.disable(file, name, tokens.utcnow())  # the server refuses from here on, whatever comes
        # before PostgreSQL ends a call with words of its own
        cut = proof(found, [*(token.id for token in living), *sessions], name)
    try:
        gone = granting.end(name, files.dsns) if granting is not None else None
    except Error as problem:
        if disabled:
            note(found, "user.disabled", user=name, reason=by_whom(context, "removing them failed"))
        problem.message = f"{name} is disabled, and not yet removed: {problem.message}"
        raise
    users.remove(file, name)
    signed_out = _sign_out(context, found, name, sessions, f"user {name} removed")
    ended = [token.id for token in living]
    if ended:
        tokens.revoke(tokens.token_file(found.auth.token_file), ended, tokens.utcnow())
    try:
        brought = own_database.forget(found, name)
    except Error as problem:
        brought = []
        output.warn(f"what {name} has brought is still stored, and nobody's: {problem.message}", problem.hint)
    dropped, owned = (gone.roles, gone.owned) if gone is not None else ([], [])
    why = by_whom(context, f"user {name} removed")
    note_all(found, [("token.revoked", {"token": one, "user": name, "reason": why}) for one in ended])
    note_all(
        found, [("user.removed", {"user": name, "reason": by_whom(context, f"roles: {', '.join(dropped) or 'none'}")})]
    )
    words, values = cut or proof(found, [*ended, *signed_out], name)
    for warning in gone.warnings if gone is not None else ():
        output.warn(warning)
    if json:
        told = {"removed": name, "roles": dropped, "owned": owned, "own_databases": brought}
        output.put_json({**told, "sessions_ended": signed_out, "cut": values})
        return
    output.put(f"{name} removed")
    _tell_signed_out(signed_out)
    for role in dropped:
        output.put(f"role {role} dropped")
    for one in brought:
        output.put(f"own database {one} removed")
    for one in owned:
        output.say(f"{one}; it belongs to mcp_left now, as whom nobody logs in")
    output.put(words)
