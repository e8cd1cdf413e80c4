"""mcpctl session: who is signed in, what each credential has open in the running server, and its end."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output, signed_in
from mcpctl.cli.common import ConfigOption, JsonOption, ReasonOption, asked_to_settle, by_whom, note_all, settings, told
from mcpctl.cli.live import ago, ask, ask_if_any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcpctl.config_keys import Settings
    from mcpctl.errors import Failures

app = typer.Typer(
    help="See who is signed in and what tokens have open in the running server, and end it.", no_args_is_help=True
)


@app.callback()
def group() -> None:
    """See who is signed in and what tokens have open in the running server, and end it."""


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List who is signed in, and the tokens that have a call running or a connection open, in all workers together."""
    found = settings(context, config, needs_log=False, forgiving=True)
    here = signed_in.listed(found)
    answers, silent = (ask_if_any if here else ask)(found, {"do": "sessions"})
    sessions = _together(one for answer in answers for one in answer["sessions"])
    if json:
        output.put_json({"sessions": sessions, "signed_in": here, "silent": silent})
        return
    _put(_rows(sessions, here))


_HEAD = (
    "ID", "USER", "SINCE", "LAST CALL", "RUNNING", "POOLS", "BACKENDS", "ADDRESSES", "KIND", "ENDS IN", "CLIENT"
)  # fmt: skip
_FEW = (0, 1, 8, 3, 4, 7)
"""What is shown of them where there is no room for all: whose they are, and whether to end them."""
_NARROW = 120
"""Columns of a terminal that have not."""


def _put(rows: list[list[object]]) -> None:
    """The table; neither an id nor a user is cut, since that is what one types next."""
    import shutil
    import sys

    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < _NARROW
    shown = _FEW if narrow else range(len(_HEAD))
    cells = [[row[at] for at in shown] for row in rows]
    whole = [max((len(output.clean(row[at])) for row in cells), default=0) for at in (0, 1)]
    words = [max(map(len, _HEAD[at].split())) for at in shown]
    output.put_table([_HEAD[at] for at in shown], cells, [*map(max, whole, words), *words[2:]])


def _rows(sessions: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[list[object]]:
    """One row a token that has something open, and one for each session that somebody is signed in with."""
    import time
    from datetime import datetime

    now = time.time()
    left = {one["id"]: one for one in here}
    rows: list[list[object]] = []
    for one in sessions:
        of = left.pop(one["id"], None)
        row: list[object] = [
            one["id"], one["user"], ago(now - one["since"]), ago(now - one["last_call"]), one["running"],
            ",".join(one["pools"]), ",".join(map(str, one["backends"])), ",".join(one["addresses"]),
        ]  # fmt: skip
        rows.append([*row, *_kind(of, now)])
    for one in left.values():
        since, used = (now - datetime.fromisoformat(one[key]).timestamp() for key in ("created_at", "last_used_at"))
        rows.append([one["id"], one["user"], ago(since), ago(used), 0, "", "", one["address"], *_kind(one, now)])
    return rows


def _kind(session: dict[str, Any] | None, now: float) -> list[object]:
    from datetime import datetime

    if session is None:
        return ["token", None, None]
    return [session["kind"], ago(datetime.fromisoformat(session["ends_at"]).timestamp() - now), session["client"]]


def _together(found: "Iterable[dict[str, Any]]") -> list[dict[str, Any]]:
    """One session a token, whichever workers have something of it; the oldest first."""
    sessions: dict[str, dict[str, Any]] = {}
    for one in found:
        if (there := sessions.setdefault(one["id"], one)) is one:
            continue
        there["since"] = min(there["since"], one["since"])
        there["last_call"] = max(there["last_call"], one["last_call"])
        there["running"] += one["running"]
        for name in ("addresses", "pools", "backends"):
            there[name] = sorted({*there[name], *one[name]})
    return sorted(sessions.values(), key=lambda one: one["since"])


@app.command("revoke")
def revoke(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID…]", help="Ids of sessions, and of tokens, as `list` shows them.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="U", help="All sessions that this user is signed in with.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All sessions that anybody is signed in with.")] = False,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """End sessions: who was signed in has to sign in again. What they have running is cut, and connections are closed.

    For a token's id only what it has open ends. The token stays valid, and its next call begins anew; `mcpctl token
    revoke` ends a token.
    """
    from mcpctl.errors import Failures, UsageError

    if bool(ids) + (user is not None) + all_ != 1:
        raise UsageError("name sessions by their ids, or say --user or --all", "`mcpctl session list` shows the ids")
    found = settings(context, config, needs_log=False, forgiving=True)
    wanted, why, missing = list(dict.fromkeys(ids or ())), by_whom(context, reason), Failures()
    here = _signed_in(found, user, wanted, all_, missing)
    if not ids:
        signed_in.out_of_browsers(found, user)
    over = signed_in.end(found, here) if here else []  # first: for a token's id a server has to run
    note_all(found, [line for one in over for line in signed_in.closed([one], here[one], why)])
    tokens = [name for name in wanted if not signed_in.is_one(name)]
    there = _there(found, tokens, missing) if tokens else []
    if not here and not there:
        missing.check()
    answers = asked_to_settle(found, over) if over else []
    ended = _end_open(found, there, why, answers)
    words, values = told(answers) if answers or there else ("no server runs", None)
    closed = [*over, *ended]
    if json:
        others = [one for one in (*here, *there) if one not in closed]
        output.put_json({"closed": closed, "not_open": others, "cut": values})
        missing.check()
        return
    for name in here:
        output.put(f"{name}: {'ended' if name in over else 'had ended already'}")
    for name in there:
        output.put(f"{name}: {'closed' if name in ended else 'had nothing open'}")
    if not wanted and not here:
        output.put("nobody is signed in" if user is None else f"{user} is not signed in")
    if closed or there:
        output.say(words)
    if ended:
        output.say("the tokens are still valid, and their next call begins anew; `mcpctl token revoke` ends a token")
    missing.check()


def _signed_in(
    found: "Settings", user: str | None, wanted: list[str], every: bool, missing: "Failures"
) -> "dict[str, str]":
    """The sessions that are meant, by id, and whose each is. Those that had ended already only by their ids."""
    from mcpctl.errors import NotFoundError
    from mcpctl.identity import users

    names = [name for name in wanted if signed_in.is_one(name)]
    if not names and user is None and not every:
        return {}
    records = signed_in.records(found)
    if not names:
        here = {one: whose for one, (whose, ended) in records.items() if not ended and user in (None, whose)}
        if user is not None and not here:
            users.find(users.user_file(found.auth.user_file).current(), user)
        return here
    for name in names:
        with missing:
            if name not in records:
                raise NotFoundError(f"there is no session {name}", "`mcpctl session list` shows those that there are")
    return {name: records[name][0] for name in names if name in records}


def _there(found: "Settings", names: list[str], missing: "Failures") -> list[str]:
    """Those of the ids that are tokens', or of which something is open; Error (exit 1) where no server runs."""
    from mcpctl.identity import tokens

    file = tokens.token_file(found.auth.token_file)
    file.current()
    answers, _ = ask(found, {"do": "sessions"})
    open_ = {one["id"] for answer in answers for one in answer["sessions"]}
    there = list[str]()
    for name in names:
        with missing:
            if name not in open_:
                tokens.show(file, name)
            there.append(name)
    return there


def _end_open(found: "Settings", names: list[str], why: str, done: list[dict[str, Any]]) -> list[str]:
    """End what these tokens have open; those that had something. What the servers answer is added to `done`."""
    from mcpctl.identity import tokens

    if not names:
        return []
    known = tokens.token_file(found.auth.token_file).current()
    ended = []
    for name in names:
        answers, silent = ask(found, {"do": "end_session", "token": name})
        done += answers + [{"error": "silent"} for _ in silent]
        if any(answer["open"] for answer in answers):
            ended.append(name)
    users = {name: known[name].user if name in known else None for name in ended}
    note_all(found, [("session.closed", {"token": name, "user": users[name], "reason": why}) for name in ended])
    return ended
