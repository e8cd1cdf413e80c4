"""mcpctl session: what each credential has open in the running server, and its end."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, ReasonOption, by_whom, note_all, settings, told
from mcpctl.cli.live import ago, ask

if TYPE_CHECKING:
    from collections.abc import Iterable

app = typer.Typer(help="See and end what tokens have open in the running server.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """See and end what tokens have open in the running server."""


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List the tokens that have a call running or a connection open, in all workers together."""
    import time

    found = settings(context, config, needs_log=False, forgiving=True)
    answers, silent = ask(found, {"do": "sessions"})
    sessions = _together(one for answer in answers for one in answer["sessions"])
    if json:
        output.put_json({"sessions": sessions, "silent": silent})
        return
    now = time.time()
    output.put_table(
        ["ID", "USER", "SINCE", "LAST CALL", "RUNNING", "POOLS", "BACKENDS", "ADDRESSES"],
        [
            [
                one["id"], one["user"], ago(now - one["since"]), ago(now - one["last_call"]), one["running"],
                ",".join(one["pools"]), ",".join(map(str, one["backends"])), ",".join(one["addresses"]),
            ]
            for one in sessions
        ],
    )  # fmt: skip


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
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="The tokens' ids.")],
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """End what tokens have open: running calls are cut, connections closed. The tokens stay valid, and their next call
    begins anew; `mcpctl token revoke` ends a token.
    """
    from mcpctl.errors import Failures
    from mcpctl.identity import tokens

    found = settings(context, config, needs_log=False, forgiving=True)
    file = tokens.token_file(found.auth.token_file)
    known = file.current()
    wanted = list(dict.fromkeys(ids))
    answers, _ = ask(found, {"do": "sessions"})
    open_ = {one["id"] for answer in answers for one in answer["sessions"]}
    missing, there = Failures(), list[str]()
    for name in wanted:
        with missing:
            if name not in open_:
                tokens.show(file, name)
            there.append(name)
    if not there:
        missing.check()
    wanted = there
    done: list[dict[str, Any]] = []
    ended = []
    for name in wanted:
        answers, silent = ask(found, {"do": "end_session", "token": name})
        done += answers + [{"error": "silent"} for _ in silent]
        if any(answer["open"] for answer in answers):
            ended.append(name)
    why = by_whom(context, reason)
    users = {name: known[name].user if name in known else None for name in ended}
    note_all(found, [("session.closed", {"token": name, "user": users[name], "reason": why}) for name in ended])
    words, values = told(done)
    if json:
        output.put_json({"closed": ended, "not_open": [name for name in wanted if name not in ended], "cut": values})
        missing.check()
        return
    for name in wanted:
        output.put(f"{name}: {'closed' if name in ended else 'had nothing open'}")
    output.say(words)
    if ended:
        output.say("the tokens are still valid, and their next call begins anew; `mcpctl token revoke` ends a token")
    missing.check()
