"""mcpctl token: who may come in, until when, and out again at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import lockdown, output, usage
from mcpctl.cli.common import (
    ConfigOption,
    JsonOption,
    ReasonOption,
    by_whom,
    confirm,
    note,
    note_all,
    proof,
    read_secret,
    ready_to_note,
    settings,
)
from mcpctl.cli.new_token import (
    blocked_by_us,
    bounded,
    check_places,
    check_services,
    check_user,
    expiry_of,
    handing_over,
    kept,
    networks_of,
    not_to_rotate,
    people,
    permission_of,
    record,
    standing,
    tell,
)
from mcpctl.cli.taking import known_of, revoked, taking

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token

app = typer.Typer(help="Make, list, rotate, revoke and remove tokens.", no_args_is_help=True)

OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the token to this new file (0600), not to stdout.")
]
ExpiryOption = Annotated[
    str | None,
    typer.Option("--expiry", metavar="WHEN", help="12h, 30d, 2w, 1y, a date, or never. 90d is a good choice."),
]


@app.command("add")
def add(
    context: typer.Context,
    user: Annotated[
        str | None, typer.Option("--user", metavar="U", help="Whose token. Without: a service token.")
    ] = None,
    database: Annotated[
        list[str] | None, typer.Option("--database", metavar="D", help="Only this database. Repeatable.")
    ] = None,
    expiry: ExpiryOption = None,
    note_: Annotated[str | None, typer.Option("--note", metavar="T", help="What it is for.")] = None,
    permission: Annotated[
        list[str] | None,
        typer.Option("--permission", metavar="P", help="Only this, e.g. tools:query_database. Repeatable."),
    ] = None,
    allow_ip: Annotated[
        list[str] | None, typer.Option("--allow-ip", metavar="CIDR", help="Only from there. Repeatable.")
    ] = None,
    out: OutOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a token. It is printed once, alone, on stdout; its facts go to stderr.

    Example: mcpctl token add --user alice --expiry 90d --note "laptop"
    """
    from mcpctl.config import check_database, default_database
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens, users

    found = settings(context, config)
    now = tokens.utcnow()
    whose = users.find(users.user_file(found.auth.user_file).current(), user) if user is not None else None
    if whose is not None:
        check_user(whose)
    for name in database or ():
        check_database(found, name)
    databases = tuple(dict.fromkeys(database)) if database else None
    if user is None and databases is None:
        default = default_database(found)
        if default is None:
            raise UsageError(
                "a service token is for databases, and there is no default one", "name them with --database"
            )
        databases = (default,)
    check_places(found, whose, databases or ())
    if user is None:
        check_services(found, databases or ())
    try:
        permissions = tuple(permission_of(found, text) for text in permission) if permission else None
    except ValueError as problem:
        raise UsageError(
            f"--permission: {problem}", "say tools:query_database, databases:sales:read, or tools:*"
        ) from None
    networks = networks_of(allow_ip)
    wanted = tokens.Wanted(user, expiry_of(found, expiry, now), databases, permissions, networks, note_)
    file = tokens.token_file(found.auth.token_file)
    ready_to_note(found)
    with handing_over(out) as give:
        made = now if whose is None else max(now, whose.created_at)  # a clock that was set back makes nobody another's
        entry, text = tokens.add(file, wanted, made)
        note(found, "token.added", token=entry.id, user=user, reason=by_whom(context, note_))
        give(entry, text, json, now)
    tell(found, entry, file.current(), out)


@app.command("list")
def list_(
    context: typer.Context,
    expiring: Annotated[
        str | None, typer.Option("--expiring", metavar="14d", help="Only those that end within this time.")
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Only those that have expired.")] = False,
    used: Annotated[
        bool, typer.Option("--usage", help="With last use, calls, rows and addresses, by the log of 30 days.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List all tokens. No secret is in the file, so none is shown. With --usage exits 1 where the log is not whole."""
    from datetime import timedelta

    from mcpctl.cli.audit_read import tell_of
    from mcpctl.config_values import duration
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    found = settings(context, config, needs_log=False)
    now = tokens.utcnow()
    entries = list(tokens.token_file(found.auth.token_file).current().values())
    if expiring is not None:
        try:
            until = now + timedelta(seconds=duration(expiring))
        except (ValueError, OverflowError) as problem:
            raise UsageError(f"--expiring takes {problem}, not {expiring!r}", "such as --expiring 14d") from None
        entries = [
            token
            for token in entries
            if token.status(now) in ("active", "expiring")
            and token.expires_at is not None
            and token.expires_at <= until
        ]
    if expired:
        entries = [token for token in entries if token.status(now) == "expired"]
    lockdown.tell(found)
    known, blocked = people(found), blocked_by_us(found)
    values = [record(token, standing(token, known, now, blocked)) for token in entries]
    for value in values:
        if blocked and value["id"] in blocked:
            value["blocked"] = blocked[value["id"]].words
    reading = usage.add(found, values, now) if used else None
    usage.warn_of_age([token for token in entries if token.status(now) in ("active", "expiring")], now)
    if json:
        output.put_json({"tokens": values})
    else:
        _put_list(values, usage.COLUMNS if used else ())
    if reading is not None:
        tell_of(reading)


def _put_list(values: list[dict[str, Any]], more: tuple[str, ...]) -> None:
    names = ["id", "user", "databases", "permissions", "created_at", "expires_at", "status", "note", *more]
    output.put_table([name.upper() for name in names], [[_cell(value[name]) for name in names] for value in values])
    for value in values:
        if "blocked" in value:
            output.warn(f"token {value['id']} is blocked {value['blocked']}", f"mcpctl token unblock {value['id']}")


def _cell(value: Any) -> Any:
    """A field as a cell: a list that names nothing allows nothing, while no list is no limit."""
    return (",".join(value) or "none") if isinstance(value, list) else value


TokenId = Annotated[str, typer.Argument(metavar="ID", help="The token's id, as `token list` shows it.")]


@app.command("show")
def show(context: typer.Context, id: TokenId, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show one token's record."""
    from mcpctl.identity import tokens

    found = settings(context, config, needs_log=False)
    now = tokens.utcnow()
    entry = tokens.show(tokens.token_file(found.auth.token_file), id)
    blocked = blocked_by_us(found)
    shown = {
        **record(entry, standing(entry, people(found), now, blocked)),
        **({"blocked": blocked[id].words} if blocked and id in blocked else {}),
        "allow_ips": None if entry.allow_ips is None else [str(item) for item in entry.allow_ips],
    }
    if json:
        output.put_json(shown)
        return
    output.put_table(["FIELD", "VALUE"], [[name, _cell(value)] for name, value in shown.items()])


ExceptOption = Annotated[
    list[str] | None, typer.Option("--except", metavar="ID", help="With --all: not this one. Repeatable.")
]


@app.command("rotate")
def rotate(
    context: typer.Context,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The token's id, as `token list` shows it.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every living token; --out is their folder.")] = False,
    but: ExceptOption = None,
    overlap: Annotated[
        str | None, typer.Option("--overlap", metavar="24h", help="How long the old one still works.")
    ] = None,
    expiry: ExpiryOption = None,
    out: OutOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Replace a token by a new one with the same rights, which ends when the old one would have.

    Without --overlap the old one ends now.
    """
    from datetime import timedelta

    from mcpctl.config_values import duration
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    if (id is None) != all_ or (but and not all_):
        raise UsageError("name the one token to rotate, or say --all", "--except goes with --all")
    if all_ and out is None:
        raise UsageError("new secrets of all tokens go into files, not to stdout", "name a folder: --out FOLDER")
    found = settings(context, config)
    now = tokens.utcnow()
    over: timedelta | None = None
    if overlap is not None:
        try:
            over = timedelta(seconds=duration(overlap))
        except (ValueError, OverflowError) as problem:
            raise UsageError(f"--overlap takes {problem}, not {overlap!r}", "such as --overlap 24h") from None
    if id is None:
        _rotate_all(context, found, but or [], over, expiry, out or Path(), json, now)
        return
    old, new = _replace(context, found, id, over, bounded(found, expiry, now), out, json, now)
    ends_at = f"expires {tokens.rfc3339(new.expires_at)}" if new.expires_at else "never expires"
    output.say(f"token {new.id} replaces {id}, {ends_at}; {kept(out)}")
    if old.revoked_at is not None:
        output.say(f"token {id} has ended; {proof(found, [id])[0]}")
    elif old.expires_at is not None:
        output.say(f"token {id} ends by itself at {tokens.rfc3339(old.expires_at)}")


def _replace(
    context: typer.Context, found: "Settings", id: str, over: "timedelta | None", ends: "datetime | None",
    out: Path | None, json: bool, now: "datetime",
) -> "tuple[Token, Token]":  # fmt: skip
    """Rotate one and hand the new one over; (old, new)."""
    from mcpctl.errors import ConflictError
    from mcpctl.identity import tokens, users

    file = tokens.token_file(found.auth.token_file)
    if (entry := tokens.show(file, id)).user is not None:
        user = users.find(users.user_file(found.auth.user_file).current(), entry.user)
        check_user(user)
        if user.created_at > entry.created_at:
            raise ConflictError(
                f"token {id} was given to an earlier {user.name}, and this one is another user of that name",
                f"mcpctl token add --user {user.name} makes this one a token of their own",
            )
    ready_to_note(found)
    if why := not_to_rotate(found).get(id):
        raise ConflictError(f"token {id} is {why}", f"mcpctl token {'unblock' if why == 'blocked' else 'revoke'} {id}")
    with handing_over(out) as give:
        old, new, text = tokens.rotate(file, id, over, ends, now)
        note(found, "token.rotated", token=id, user=old.user, reason=by_whom(context, f"replaced by {new.id}"))
        give(new, text, json, now)
    if id in found.limits.tokens.named:
        output.warn(f"limits.tokens.named names {id}: its successor {new.id} has no limits of its own", "name it there")
    return old, new


def _rotate_all(
    context: typer.Context, found: "Settings", but: list[str], over: "timedelta | None", expiry: str | None,
    folder: Path, json: bool, now: "datetime",
) -> None:  # fmt: skip
    """Rotate each token that opens something, the new ones into files of their own. One that fails ends it: what was
    done until then is told, and holds."""
    from mcpctl.identity import tokens

    file = tokens.token_file(found.auth.token_file)
    spared, known, barred = {tokens.show(file, name).id for name in but}, people(found), not_to_rotate(found)
    living = [
        one
        for one in file.current().values()
        if one.id not in spared and tokens.standing(one, known, now) in ("active", "expiring")
    ]
    for left in [living.pop(at).id for at in reversed(range(len(living))) if living[at].id in barred]:
        output.warn(f"token {left} is {barred[left]}, and is left as it is", f"mcpctl token revoke {left}")
    ends = bounded(found, expiry, now)
    folder.mkdir(mode=0o700, exist_ok=True)
    done: list[dict[str, Any]] = []
    for entry in living:
        place = folder / f"{entry.user or 'service'}-{entry.id}.token"
        _, new = _replace(context, found, entry.id, over, ends, place, False, now)
        done.append({"old": entry.id, "new": new.id, "user": entry.user, "out": str(place)})
        if not json:
            output.put(f"{entry.id} replaced by {new.id}: {place}")
    words, values = proof(found, [one.id for one in living])
    if json:
        output.put_json({"rotated": done, "cut": values})
    else:
        output.put(words)


@app.command("revoke")
def revoke(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="The tokens' ids.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every token there is.")] = False,
    but: ExceptOption = None,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """End tokens now: their next request is refused, their running queries are cut. The record stays.

    Never asks. Revoking twice is fine.
    """
    from mcpctl.errors import Failures, UsageError
    from mcpctl.identity import tokens

    if bool(ids) == all_ or (but and not all_):
        raise UsageError("name the tokens to revoke, or say --all without any", "--except goes with --all alone")
    found = settings(context, config, needs_log=False, forgiving=True)
    file = tokens.token_file(found.auth.token_file)
    missing = Failures()
    known = [name for name in file.current() if name not in (but or ())] if all_ else known_of(file, ids or [], missing)
    done, words, values = revoked(found, known, by_whom(context, reason), file=file, every=all_, but=but or ())
    if json:
        already = [entry.id for entry, alive in done if not alive]
        output.put_json({"revoked": [entry.id for entry, _ in done], "already": already, "cut": values})
    else:
        for entry, alive in done:
            output.put(f"{entry.id} {'revoked' if alive else 'was revoked already'}")
        output.put(words)
    missing.check()


@app.command("remove")
def remove(
    context: typer.Context,
    id: TokenId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a token out of the file, record and all. `revoke` keeps the record."""
    from mcpctl.identity import tokens

    found = settings(context, config, needs_log=False)
    file = tokens.token_file(found.auth.token_file)
    entry = tokens.show(file, id)
    confirm(f"removing token {id}", f"Remove token {id} ({entry.user or 'service'}) and its record?", yes)
    with taking(found, [id], by_whom(context)):
        tokens.remove(file, id)
    note(found, "token.removed", token=id, user=entry.user, reason=by_whom(context))
    words, values = proof(found, [id])
    if json:
        output.put_json({"removed": [id], "cut": values})
        return
    output.put(f"{id} removed")
    output.put(words)


@app.command("prune")
def prune(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Take the records of expired and revoked tokens out of the file."""
    from mcpctl.identity import tokens

    found = settings(context, config, needs_log=False)
    gone = tokens.prune(tokens.token_file(found.auth.token_file), tokens.utcnow())
    why = by_whom(context, "pruned")
    note_all(found, [("token.removed", {"token": entry.id, "user": entry.user, "reason": why}) for entry in gone])
    if json:
        output.put_json({"removed": [entry.id for entry in gone]})
        return
    for entry in gone:
        output.put(f"{entry.id} removed")


@app.command("verify")
def verify(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Where the token is. Default: stdin.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say whether a token is good, and if not, why. It is read from a file or stdin, never from the command line.

    Exits 0 for a good one, 1 for any other.
    """
    from mcpctl.identity import tokens

    text = read_secret(str(file)).decode("utf-8", "replace").strip() if file else _from_stdin()
    found = settings(context, config, needs_log=False)
    now = tokens.utcnow()
    name = tokens.token_id(text)
    entry = tokens.token_file(found.auth.token_file).current().get(name) if name else None
    if name is None:
        good, why = False, "not one of our tokens: its form or checksum is wrong (cut off, or a typo)"
    elif entry is None:
        good, why = False, f"there is no token {name} here (removed, or of another server)"
    elif not tokens.matches(entry, text):
        good, why = False, f"its id is {name}, but it is not that token"
    elif (blocked := blocked_by_us(found)) is None:
        good, why = False, f"token {name} may be blocked: nobody can say which tokens are"
    elif name in blocked:
        good, why = False, f"token {name} is blocked {blocked[name].words}"
    elif (bars := _user_bars(found, entry)) is not None:
        good, why = False, f"token {name} opens nothing: its user {entry.user} {bars}"
    else:
        status = entry.status(now)
        good, why = status in ("active", "expiring"), f"token {name} is {status}"
    if json:
        output.put_json({"valid": good, "id": name, "reason": why})
    else:
        output.put(why)
    if not good:
        raise typer.Exit(1)


def _user_bars(found: "Settings", entry: "Token") -> str | None:
    """Why a token opens nothing although it is alive: its user."""
    from mcpctl.identity import tenants, users

    if entry.user is None:
        return None
    user = users.user_file(found.auth.user_file).current().get(entry.user)
    if user is None:
        return "is gone"
    if user.created_at > entry.created_at:
        return "is another one of that name, made after the token was"
    if user.disabled_at is not None:
        return "is disabled"
    if user.tenant is not None and user.tenant not in tenants.tenant_file(found.auth.tenant_file).current():
        return f"belongs to the tenant {user.tenant}, which is gone"
    return None


def _from_stdin() -> str:
    """A secret: a line of a pipe, or typed without being shown."""
    import getpass
    import sys

    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        return getpass.getpass("token: ", stream=sys.stderr).strip()
    return sys.stdin.buffer.readline(4096).decode("utf-8", "replace").strip()
