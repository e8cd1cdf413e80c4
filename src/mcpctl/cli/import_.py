"""mcpctl import: users and tokens of another server, made anew here."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, note_all, read_secret, ready_to_note, settings

if TYPE_CHECKING:
    from contextlib import ExitStack
    from datetime import datetime

    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token
    from mcpctl.pgedge import TheirToken, TheirUser

app = typer.Typer(help="Take over users and tokens of another server.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Take over users and tokens of another server."""


@app.command("pgedge")
def pgedge(
    context: typer.Context,
    tokens_file: Annotated[
        str | None, typer.Option("--tokens", metavar="FILE", help="pgEdge's file of tokens, 0600.")
    ] = None,
    users_file: Annotated[
        str | None, typer.Option("--users", metavar="FILE", help="pgEdge's file of users, 0600.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A new file (0600) for the list of the new tokens; - for stdout."),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="U", help="Whose the tokens are. Without: service tokens.")
    ] = None,
    database: Annotated[
        list[str] | None,
        typer.Option("--database", metavar="D", help="What tokens are for that name no database. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and make nothing.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make users and tokens as they are in the files of pgEdge's MCP server, all of them or none.

    Its hashes cannot be carried over: users come disabled and without a password, and tokens are issued anew. The list
    of which new token is for which old one goes into the file of --out. None lives longer than the old one.

    Example: mcpctl import pgedge --tokens tokens.yaml --users users.yaml --out new-tokens.txt
    """
    from mcpctl import pgedge
    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import utcnow

    if tokens_file is None and users_file is None:
        raise UsageError("there is nothing to import", "name pgEdge's files: --tokens, --users, or both")
    if tokens_file is not None and out is None and not dry_run:
        raise UsageError("new tokens are made, and nobody would have them", "name a file for their list: --out FILE")
    if json and str(out) == "-":
        raise UsageError(
            "--json and the list of --out - would both be on stdout", "name a file for the list: --out FILE"
        )
    their_tokens, left = pgedge.tokens(_data(tokens_file), Path(tokens_file)) if tokens_file else ([], [])
    their_users, more = pgedge.users(_data(users_file), Path(users_file)) if users_file else ([], [])
    found = settings(context, config)
    now = utcnow()
    wanted, ended = _wanted(found, their_tokens, their_users, user, database or [], now)
    _check_users(found, their_users)
    if not dry_run:
        ready_to_note(found)
        made = _make(found, their_users, wanted, out, now)
        _note(context, found, their_users, made)
    _tell(their_users, wanted, ended, [*left, *more], json, dry_run)


def _data(file: str) -> bytes:
    from mcpctl.errors import NotFoundError

    if not os.path.lexists(file):
        raise NotFoundError(f"there is no file {file}", "is it the right name?")
    return read_secret(file, 16 << 20)


def _check_users(found: "Settings", theirs: "list[TheirUser]") -> None:
    from mcpctl import pgedge
    from mcpctl.identity import users

    pgedge.check_names(theirs, users.user_file(found.auth.user_file).current())


Wanted = list[tuple["TheirToken", Any]]


def _wanted(
    found: "Settings",
    theirs: "list[TheirToken]",
    coming: "list[TheirUser]",
    user: str | None,
    names: list[str],
    now: "datetime",
) -> "tuple[Wanted, list[TheirToken]]":
    """(theirs, what the new one is to be) of each that is not over, and those that are."""
    from datetime import timedelta

    from mcpctl.cli.new_token import check_places, check_services
    from mcpctl.config import check_database, default_database
    from mcpctl.errors import UsageError
    from mcpctl.identity import users
    from mcpctl.identity.tokens import Wanted as New

    whose = None
    if user is not None and user not in [one.name for one in coming]:
        whose = users.find(users.user_file(found.auth.user_file).current(), user)
    most = found.auth.max_token_lifetime
    latest = None if most is None else now + timedelta(seconds=most)
    wanted, ended = [], []
    for one in theirs:
        if one.expires_at is not None and one.expires_at <= now:
            ended.append(one)
            continue
        databases = tuple(dict.fromkeys([one.database] if one.database else names))
        if not databases and user is None:
            if (default := default_database(found)) is None:
                raise UsageError(f"{one.id} names no database, and there is no default one", "name it with --database")
            databases = (default,)
        for name in databases:
            check_database(found, name)
        check_places(found, whose, databases)
        if user is None:
            check_services(found, databases)
        ends = min(filter(None, (one.expires_at, latest)), default=None)
        wanted.append((one, New(user, ends, databases or None, None, None, one.note)))
    return wanted, ended


def _make(
    found: "Settings", people: "list[TheirUser]", wanted: Wanted, out: Path | None, now: "datetime"
) -> "list[tuple[TheirToken, Token]]":
    """Users and tokens, all or none; the list of the tokens is there before they count."""
    from contextlib import ExitStack
    from dataclasses import asdict

    from mcpctl.identity import tokens, users

    file = users.user_file(found.auth.user_file)
    with ExitStack() as undo:
        with tokens.token_file(found.auth.token_file).edit() as entries:
            made = []
            for theirs, new in wanted:
                name, text = tokens.mint(entries)
                hashed = tokens.CHEAP_ARGON2ID.hash(text)
                entries[name] = tokens.Token(id=name, hash=hashed, created_at=now, **asdict(new))
                made.append((theirs, entries[name], text))
            lines = [f"{theirs.id}\t{token.id}\t{text}\t{token.note or ''}" for theirs, token, text in made]
            _list(out, lines, undo)
            with file.edit() as here:
                _check_users(found, people)
                for one in people:
                    here[one.name] = users.User(one.name, now, one.note, disabled_at=now)
            undo.callback(_take_out, file, [one.name for one in people])
            if str(out) == "-":  # last of all, and before anything counts: nobody may have a reader that is gone
                _print([line.split("\t") for line in lines])
        undo.pop_all()
    return [(theirs, token) for theirs, token, _ in made]


def _take_out(file: Any, names: list[str]) -> None:
    with file.edit(though_full=True) as here:
        for name in names:
            here.pop(name, None)


_HEAD = "# pgEdge's id, the id here, the new token, what it is for; hand them out, and then remove this file"


def _list(out: Path | None, lines: list[str], undo: "ExitStack") -> None:
    """Write the list of who gets which; `undo` takes it away again."""
    from mcpctl import private_file

    if out is not None and str(out) != "-" and lines:
        private_file.create(out, "\n".join([_HEAD, *lines, ""]).encode())
        undo.callback(out.unlink, missing_ok=True)


def _print(rows: list[list[str]]) -> None:
    """The list on stdout: on a terminal no token is broken into two lines."""
    from mcpctl.errors import Error

    heard = all(output.put("  ".join(row)) for row in rows) if sys.stdout.isatty() else output.put_table((), rows)
    if not heard:
        raise Error("nobody reads stdout, where the new tokens go", "nothing was imported; name a file: --out FILE")


def _note(
    context: typer.Context, found: "Settings", people: "list[TheirUser]", made: "list[tuple[TheirToken, Token]]"
) -> None:
    events: list[tuple[str, dict[str, Any]]] = [
        (
            "user.added",
            {"user": one.name, "reason": by_whom(context, f"imported from pgEdge, where it was {one.called}")},
        )
        for one in people
    ]
    events += [
        (
            "token.added",
            {"token": token.id, "user": token.user, "reason": by_whom(context, f"imported from pgEdge's {theirs.id}")},
        )
        for theirs, token in made
    ]
    note_all(found, events)


def _tell(
    people: "list[TheirUser]", wanted: Wanted, ended: "list[TheirToken]", left: list[str], json: bool, dry_run: bool
) -> None:
    from mcpctl.identity.users import rfc3339

    ends = {theirs.id: new.expires_at and rfc3339(new.expires_at) for theirs, new in wanted}
    if json:
        output.put_json(
            {
                "dry_run": dry_run,
                "users": {one.called: one.name for one in people},
                "tokens": ends,
                "expired": [one.id for one in ended],
                "not_carried_over": left,
            }
        )
        return
    rows = [("user", one.called, one.name, "" if one.enabled else "was disabled there") for one in people]
    rows += [
        ("token", theirs.id, theirs.note or "", f"until {ends[theirs.id] or 'it is revoked'}") for theirs, _ in wanted
    ]
    rows += [("token", one.id, one.note or "", "left out: it has expired") for one in ended]
    output.put_table(("what", "there", "here", ""), rows)
    for one in left:
        output.warn(f"not carried over: {one}")
    if dry_run:
        output.say("nothing was made")
    elif people:
        output.say("each user is disabled until: mcpctl user passwd U; mcpctl user enable U; and has no grant yet")
