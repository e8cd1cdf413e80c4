"""mcpctl token: who may come in, until when, and out again at once."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, note, note_all, ready_to_note, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

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


def _values(token: "Token", now: "datetime") -> dict[str, Any]:
    from mcpctl.identity.tokens import as_values

    found = as_values(token)
    names = ("user", "databases", "permissions", "created_at", "expires_at", "revoked_at", "note")
    return {"id": token.id, **{name: found[name] for name in names}, "status": token.status(now)}


@contextlib.contextmanager
def _handing_over(out: Path | None) -> "Iterator[Callable[[Token, str, bool, datetime], None]]":
    """A way to hand over a new token, once and nowhere else. The file for it is made before the token is: where it
    cannot be, there is no token; where there is no token, it goes away again."""
    import os

    from mcpctl import private_file
    from mcpctl.errors import ConfigError, Error

    if out is not None:
        try:
            private_file.create(out, b"\n" * 80)  # its whole room, so that a full disk is known now
        except ConfigError as problem:
            hint = "name a file in a folder of yours; run as root, mcpctl works as the owner of its files"
            raise ConfigError(problem.message, hint) from None
    given = False

    def give(token: "Token", text: str, json: bool, now: "datetime") -> None:
        nonlocal given
        try:
            if out is not None:
                with os.fdopen(private_file.open_checked(out, os.O_WRONLY), "wb") as file:
                    file.write(text.encode() + b"\n")
                    file.truncate()
                given = True
            if json:
                output.put_json(
                    {**_values(token, now), "token": text if out is None else None, "out": out and str(out)}
                )
            elif out is None:
                output.put(text)
        except (OSError, Error, output.SeenEnough) as problem:
            why = getattr(problem, "strerror", None) or str(problem) or "nobody reads stdout"
            raise Error(
                f"token {token.id} was made, but could not be handed over: {why}",
                f"make another, and: mcpctl token revoke {token.id}",
            ) from None

    try:
        yield give
    finally:
        if out is not None and not given:
            out.unlink(missing_ok=True)


def _expiry(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    from datetime import timedelta

    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import parse_expiry

    if text is not None:
        ends = parse_expiry(text, now)
    elif found.auth.token_lifetime is not None:
        ends = now + timedelta(seconds=found.auth.token_lifetime)
    else:
        raise UsageError(
            "--expiry is missing, and the config has no auth.token_lifetime",
            "say --expiry 90d, or `never` if it must be",
        )
    most = _latest(found, now)
    if most is not None and (ends is None or ends > most):
        raise UsageError(
            f"--expiry {text or 'of the config'} is beyond auth.max_token_lifetime ({most:%Y-%m-%d %H:%M} UTC now)",
            "choose an earlier one",
        )
    if ends is None:
        output.warn("a token that never expires is a bad idea", "nobody will notice when it leaks; choose --expiry 1y")
    return ends


def _latest(found: "Settings", now: "datetime") -> "datetime | None":
    """The latest end that the config lets a token have."""
    from datetime import timedelta

    most = found.auth.max_token_lifetime
    return None if most is None else now + timedelta(seconds=most)


def _bounded(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    """The end that a rotation asks for, or the latest one that the config lets it have."""
    return _expiry(found, text, now) if text is not None else _latest(found, now)


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
    from mcpctl.config import default_database
    from mcpctl.config_keys import network
    from mcpctl.errors import NotFoundError, UsageError
    from mcpctl.identity import tokens, users

    found = settings(context, config)
    now = tokens.utcnow()
    if user is not None:
        users.find(users.user_file(found.auth.user_file).current(), user)
    for name in database or ():
        if name not in found.databases:
            raise NotFoundError(
                f"there is no database {name} in the config", f"there are: {', '.join(found.databases) or 'none'}"
            )
    databases = tuple(dict.fromkeys(database)) if database else None
    if user is None and databases is None:
        default = default_database(found)
        if default is None:
            raise UsageError(
                "a service token is for databases, and there is no default one", "name them with --database"
            )
        databases = (default,)
    try:
        permissions = tuple(tokens.check_permission(text) for text in permission) if permission else None
    except ValueError as problem:
        raise UsageError(
            f"--permission: {problem}", "say tools:query_database, databases:sales:read, or tools:*"
        ) from None
    try:
        networks = tuple(network(text) for text in allow_ip) if allow_ip else None
    except ValueError as problem:
        raise UsageError(f"--allow-ip takes {problem}", "repeat it for each network") from None
    wanted = tokens.Wanted(user, _expiry(found, expiry, now), databases, permissions, networks, note_)
    file = tokens.token_file(found.auth.token_file)
    ready_to_note(found)
    with _handing_over(out) as give:
        entry, text = tokens.add(file, wanted, now)
        note(found, "token.added", token=entry.id, user=user, reason=by_whom(context, note_))
        give(entry, text, json, now)
    _tell(found, entry, file.current())


def _tell(found: "Settings", entry: "Token", entries: Any) -> None:
    """The facts of a new token, on stderr."""
    from mcpctl.identity.tokens import rfc3339, utcnow
    from mcpctl.policy.access import covers

    whose = f"user {entry.user}" if entry.user else "a service"
    ends = f"expires {rfc3339(entry.expires_at)}" if entry.expires_at else "never expires"
    output.say(f"token {entry.id} for {whose}, {ends}; keep it now, it is not shown again")
    if entry.permissions is not None and not any(text.startswith(("*", "tools:")) for text in entry.permissions):
        output.warn("this token's permissions name no tool, so it can call none", "add --permission 'tools:*'")
    elif entry.permissions is not None:
        asked = [f"databases:{name}:read" for name in found.databases]
        if not any(covers(pattern, wanted) for pattern in entry.permissions for wanted in asked):
            hint = "add --permission 'databases:*:read'"
            output.warn("this token's permissions name no database, so it can ask none", hint)
    now = utcnow()
    living = [token for token in entries.values() if token.status(now) in ("active", "expiring")]
    worst = sum(
        database.pool.max_size
        for token in living
        for name, database in found.databases.items()
        if token.databases is None or name in token.databases
    )
    if worst > found.limits.connections:
        output.say(
            f"note: the {len(living)} living tokens could want {worst} connections at once, and the server has "
            f"{found.limits.connections} (limits.connections): the longest-idle pool gives way, then calls wait"
        )


@app.command("list")
def list_(
    context: typer.Context,
    expiring: Annotated[
        str | None, typer.Option("--expiring", metavar="14d", help="Only those that end within this time.")
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Only those that have expired.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List all tokens. No secret is in the file, so none is shown."""
    from datetime import timedelta

    from mcpctl.config_keys import duration
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    found = settings(context, config)
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
    values = [_values(token, now) for token in entries]
    if json:
        output.put_json({"tokens": values})
        return
    names = ("id", "user", "databases", "permissions", "created_at", "expires_at", "status", "note")
    output.put_table([name.upper() for name in names], [[_cell(value[name]) for name in names] for value in values])


def _cell(value: Any) -> Any:
    return ",".join(value) if isinstance(value, list) else value


TokenId = Annotated[str, typer.Argument(metavar="ID", help="The token's id, as `token list` shows it.")]


@app.command("show")
def show(context: typer.Context, id: TokenId, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show one token's record."""
    from mcpctl.identity import tokens

    found = settings(context, config)
    now = tokens.utcnow()
    entry = tokens.show(tokens.token_file(found.auth.token_file), id)
    values = {
        **_values(entry, now),
        "allow_ips": None if entry.allow_ips is None else [str(item) for item in entry.allow_ips],
    }
    if json:
        output.put_json(values)
        return
    output.put_table(["FIELD", "VALUE"], [[name, _cell(value)] for name, value in values.items()])


@app.command("rotate")
def rotate(
    context: typer.Context,
    id: TokenId,
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

    from mcpctl.config_keys import duration
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    found = settings(context, config)
    now = tokens.utcnow()
    over: timedelta | None = None
    if overlap is not None:
        try:
            over = timedelta(seconds=duration(overlap))
        except (ValueError, OverflowError) as problem:
            raise UsageError(f"--overlap takes {problem}, not {overlap!r}", "such as --overlap 24h") from None
    ends = _bounded(found, expiry, now)
    ready_to_note(found)
    with _handing_over(out) as give:
        old, new, text = tokens.rotate(tokens.token_file(found.auth.token_file), id, over, ends, now)
        note(found, "token.rotated", token=id, user=old.user, reason=by_whom(context, f"replaced by {new.id}"))
        give(new, text, json, now)
    ends_at = f"expires {tokens.rfc3339(new.expires_at)}" if new.expires_at else "never expires"
    output.say(f"token {new.id} replaces {id}, {ends_at}; keep it now, it is not shown again")
    if old.revoked_at is not None:
        output.say(f"token {id} has ended; {_proof(found, [id])[0]}")
    elif old.expires_at is not None:
        output.say(f"token {id} ends by itself at {tokens.rfc3339(old.expires_at)}")


_ASKED_AT_ONCE = 1000


def _proof(found: "Settings", names: list[str]) -> tuple[str, dict[str, Any] | None]:
    """What the running servers did about ended tokens, waiting 2 s at most: as words, and as values."""
    from mcpctl import control

    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    answers = control.ask_all(folder, {"do": "settle", "tokens": names[:_ASKED_AT_ONCE]})
    if not answers:
        return "no server runs", None
    for begin in range(_ASKED_AT_ONCE, len(names), _ASKED_AT_ONCE):
        answers += control.ask_all(folder, {"do": "settle", "tokens": names[begin : begin + _ASKED_AT_ONCE]})
    silent = sum("error" in answer for answer in answers)
    queries = sum(answer.get("queries", 0) for answer in answers)
    left = sum(answer.get("backends_left", 0) for answer in answers)
    pids = [pid for answer in answers for pid in answer.get("lingering", ())]
    words = (
        f"cut: {queries} {'query' if queries == 1 else 'queries'}, {left} {'backend' if left == 1 else 'backends'} left"
    )
    if pids:
        words += f" (pid {', '.join(map(str, pids))})"
    if silent:
        words += f"; {silent} of {len(answers)} server processes did not answer in time"
    return words, {"queries": queries, "backends_left": left, "lingering": pids, "silent": silent}


@app.command("revoke")
def revoke(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="The tokens' ids.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every token there is.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", metavar="T", help="Why, for the audit log.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """End tokens now: their next request is refused, their running queries are cut. The record stays.

    Never asks. Revoking twice is fine.
    """
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    if bool(ids) == all_:
        raise UsageError("name the tokens to revoke, or say --all", "`mcpctl token list` shows the ids")
    found = settings(context, config)
    done = tokens.revoke(tokens.token_file(found.auth.token_file), None if all_ else ids, tokens.utcnow())
    fresh = [entry for entry, alive in done if alive]
    why = by_whom(context, reason)
    words, values = _proof(found, [entry.id for entry, _ in done])  # first what is urgent, then its record
    note_all(found, [("token.revoked", {"token": entry.id, "user": entry.user, "reason": why}) for entry in fresh])
    if json:
        output.put_json(
            {
                "revoked": [entry.id for entry, _ in done],
                "already": [entry.id for entry, alive in done if not alive],
                "cut": values,
            }
        )
        return
    for entry, alive in done:
        output.put(f"{entry.id} {'revoked' if alive else 'was revoked already'}")
    output.put(words)


@app.command("remove")
def remove(
    context: typer.Context,
    id: TokenId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take a token out of the file, record and all. `revoke` keeps the record."""
    import sys

    from mcpctl.errors import Error, UsageError
    from mcpctl.identity import tokens

    found = settings(context, config)
    file = tokens.token_file(found.auth.token_file)
    entry = tokens.show(file, id)
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"removing token {id} wants a yes, and there is no terminal to ask at", "say --yes")
        if not typer.confirm(f"Remove token {id} ({entry.user or 'service'}) and its record?", err=True):
            raise Error("nothing was removed")
    tokens.remove(file, id)
    note(found, "token.removed", token=id, user=entry.user, reason=by_whom(context))
    words, values = _proof(found, [id])
    if json:
        output.put_json({"removed": [id], "cut": values})
        return
    output.put(f"{id} removed")
    output.put(words)


@app.command("prune")
def prune(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Take the records of expired and revoked tokens out of the file."""
    from mcpctl.identity import tokens

    found = settings(context, config)
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
    from mcpctl import private_file
    from mcpctl.identity import tokens

    text = private_file.read(file, limit=4096).data.decode("utf-8", "replace").strip() if file else _from_stdin()
    found = settings(context, config)
    now = tokens.utcnow()
    name = tokens.token_id(text)
    entry = tokens.token_file(found.auth.token_file).current().get(name) if name else None
    if name is None:
        good, why = False, "not one of our tokens: its form or checksum is wrong (cut off, or a typo)"
    elif entry is None:
        good, why = False, f"there is no token {name} here (removed, or of another server)"
    elif not tokens.matches(entry, text):
        good, why = False, f"its id is {name}, but it is not that token"
    else:
        status = entry.status(now)
        good, why = status in ("active", "expiring"), f"token {name} is {status}"
    if json:
        output.put_json({"valid": good, "id": name, "reason": why})
    else:
        output.put(why)
    if not good:
        raise typer.Exit(1)


def _from_stdin() -> str:
    """A secret: a line of a pipe, or typed without being shown."""
    import getpass
    import sys

    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        return getpass.getpass("token: ", stream=sys.stderr).strip()
    return sys.stdin.buffer.readline(4096).decode("utf-8", "replace").strip()
