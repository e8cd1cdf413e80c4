"""mcpctl status and mcpctl top: how the running server is, and what it does."""

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output, signed_in, top_screen
from mcpctl.cli.common import ConfigOption, JsonOption, asked_to_settle, by_whom, note_all, settings, told

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

Answered = list[dict[str, Any]]
Rows = list[list[object]]
_BROKEN = "A FILE IS BROKEN OR MISSING: nobody is let in; `mcpctl doctor` says which"


def ask_if_any(found: "Settings", request: dict[str, Any], *, warn: bool = True) -> tuple[Answered, list[int]]:
    """What the serving processes answer within 2 s, and the pids of those that do not."""
    from mcpctl import control

    answers = control.ask_each(control.folder_of(found.server.runtime_dir, found.auth.token_file), request)
    silent = [(pid, answer["error"]) for pid, answer in answers if "error" in answer]
    for pid, error in silent if warn else ():
        output.warn(f"process {pid}: {error}", f"`ps -p {pid}` shows it; what it serves is missing here")
    return [answer for _, answer in answers if "error" not in answer], [pid for pid, _ in silent]


def ask(found: "Settings", request: dict[str, Any], *, warn: bool = True) -> tuple[Answered, list[int]]:
    """As `ask_if_any`; Error (exit 1) where no server runs."""
    from mcpctl.errors import Error

    answers, silent = ask_if_any(found, request, warn=warn)
    if not answers and not silent:
        raise Error("no server runs", f"`mcpctl serve` starts one; looked in {_folder(found)}")
    return answers, silent


def _folder(found: "Settings") -> str:
    from mcpctl import control

    return str(control.folder_of(found.server.runtime_dir, found.auth.token_file))


def ago(seconds: float) -> str:
    """A time as its two largest units: `3 d 4 h`, `12 s`."""
    rest = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def status(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> int:
    """How the running server is. Exits 0 where one answers, and 1 where none runs, or none answers.

    Example: mcpctl status && echo up
    """
    found = settings(context, config, needs_log=False, forgiving=True)
    answers, silent = ask_if_any(found, {"do": "status"})
    up = bool(answers)
    servers: dict[str, dict[int, dict[str, Any]]] = {}
    for answer in sorted(answers, key=lambda one: one["config_since"]):  # a process answers twice during a reload
        workers = servers.setdefault(answer["server"], {})
        answer["running"] += workers.get(answer["pid"], answer | {"running": 0})["running"]
        workers[answer["pid"]] = answer
    told = [_server(sorted(workers.values(), key=lambda one: one["worker"])) for workers in servers.values()]
    last = _last_number(found)
    if json:
        output.put_json({"up": up, "servers": told, "silent": silent, "audit_seq": last})
        return 0 if up else 1
    if not up:
        hangs = f"none of the server's processes answers: {', '.join(map(str, silent))}"
        output.put(hangs if silent else f"no server runs (looked in {_folder(found)})")
        return 1
    for one in told:
        output.put_table(["WHAT", "IS"], _facts(one, last))
    return 0


def _last_number(found: "Settings") -> int | None:
    """The number of the audit log's last line; None where there is none that can be read."""
    from mcpctl.audit import files
    from mcpctl.errors import Error

    try:
        return files.number(next(files.read_back(found.audit.file), {})) or None
    except (Error, OSError):
        return None


def _server(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the workers of one server say, together. What each has of its own is added up."""
    first = workers[0]
    databases: dict[str, dict[str, Any]] = {}
    for one in workers:
        for name, about in one["databases"].items():
            there = databases.setdefault(name, {"up": about["up"], "pools": 0, "connections": 0})
            there["up"] = there["up"] and about["up"]
            there["pools"] += about["pools"]
            there["connections"] += about["connections"]
    return {
        **{name: value for name, value in first.items() if name not in ("worker", "pid")},
        "pids": [one["pid"] for one in workers],
        "since": min(one["since"] for one in workers),
        "config_since": min(one["config_since"] for one in workers),
        "config_changed": any(one["config_changed"] for one in workers),
        "databases": databases,
        "connections": sum(about["connections"] for about in databases.values()),
        "budget": sum(one["budget"] for one in workers),
        "running": sum(one["running"] for one in workers),
        "minute": {name: sum(one["minute"][name] for one in workers) for name in first["minute"]},
        "audit": next((one["audit"] for one in workers if one["audit"]), None),
    }


def _facts(one: dict[str, Any], last: int | None) -> Rows:
    import time
    from datetime import UTC, datetime

    now, minute = time.time(), one["minute"]

    def when(seconds: float) -> str:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    answering = len(one["pids"])
    rows: Rows = [
        ["server", f"up {ago(now - one['since'])}, version {one['version']}"],
        ["serving at", one["url"] or "stdin and stdout"],
        ["processes", f"{answering} of {one['workers']} answer: {', '.join(map(str, one['pids']))}"],
        ["config", f"{one['config'] or 'environment'}, in force since {when(one['config_since'])}"],
    ]
    if one["config_changed"]:
        rows.append(["config", "the file has changed since"])
    if one.get("lockdown"):
        rows.append(["lockdown", f"ON: {one['lockdown']}"])
    if one["tls_not_after"] is not None:
        left = one["tls_not_after"] - now
        rows.append(["certificate", f"ends {when(one['tls_not_after'])}, {f'in {ago(left)}' if left > 0 else 'ENDED'}"])
    for name, about in one["databases"].items():
        reached = {True: "takes connections", False: "DOES NOT TAKE CONNECTIONS", None: "a user's own"}[about["up"]]
        open_ = f"{_count(about['pools'], 'pool')}, {_count(about['connections'], 'connection')}"
        rows.append([f"database {name}", f"{reached}; {open_}"])
    rows.append(["connections", f"{one['connections']} of {one['budget']}"])
    counts = one["tokens"]
    shown = ", ".join(f"{count} {status}" for status, count in (counts or {}).items() if count) or "none"
    rows.append(["tokens", _BROKEN if counts is None else shown])
    if one["kept_out"]:
        rows.append(["kept out", f"{', '.join(one['kept_out'])}: only until a restart; revoke again"])
    rows += [
        ["running", _count(one["running"], "call")],
        [
            "last minute",
            f"{_count(minute['calls'], 'call')}, {minute['failed']} failed, {minute['refused']} refused; "
            f"{_count(minute['strangers'], 'credential')} refused",
        ],
        ["audit log", f"{one['audit'] or 'can be written'}; last line {last or 'none'}"],
    ]
    return rows


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print it once, also on a terminal.")] = False,
    lines: Annotated[
        int, typer.Option("-n", "--lines", metavar="N", min=1, help="How many of each kind. Default: 20.")
    ] = 20,
    interval: Annotated[
        float, typer.Option("--interval", metavar="N", min=0.2, max=3600, help="Seconds between two looks. Default: 2.")
    ] = 2.0,
    sql: Annotated[bool, typer.Option("--sql", help="With the statements, where the config keeps them.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """What runs now, and who used most in the last minute. On a terminal it goes on until q or Ctrl-C.

    There j, k and the arrows mark a line, x ends the marked call's query, and X revokes its token. Neither asks.
    """
    from mcpctl.errors import UsageError

    found = settings(context, config, needs_log=False, forgiving=True)
    if sql and found.audit.statements != "full":
        raise UsageError(
            "--sql shows statements, and the config keeps none in full", "audit.statements: full would keep them"
        )
    if json or once or not sys.stdout.isatty():
        running, used, silent = _look(found, lines, sql)
        if json:
            output.put_json({"running": running, "last_minute": used, "silent": silent})
            return
        head = [*top_screen.RUNNING, *(["STATEMENT"] if sql else [])]
        if sys.stdout.isatty():
            output.put_table(head, top_screen.running_rows(running, sql))
            output.put_table(top_screen.USED, top_screen.used_rows(used))
        else:
            output.put_table([], [["running", *row] for row in top_screen.running_rows(running, sql)])
            output.put_table([], [["last_minute", *row] for row in top_screen.used_rows(used)])
        return
    _watch(found, lines, sql, interval, by_whom(context, "mcpctl top"))


def _look(
    found: "Settings", most: int, sql: bool, *, warn: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int]]:
    """What runs, the longest first; what each token used in the last minute, the most seconds first; and the pids of
    processes that are silent."""
    answers, silent = ask(found, {"do": "running", "sql": sql}, warn=warn)
    running = sorted((one for answer in answers for one in answer["running"]), key=lambda one: -one["seconds"])
    used: dict[str, dict[str, Any]] = {}
    for answer in answers:
        for token, one in answer["minute"].items():
            there = used.setdefault(token, {"token": token, **dict.fromkeys(one, 0), "addresses": []})
            there["user"] = one["user"]
            there["addresses"] = sorted({*there["addresses"], *one["addresses"]})
            for name in ("calls", "failed", "refused", "rows", "bytes", "seconds"):
                there[name] += one[name]
    return running[:most], sorted(used.values(), key=lambda one: -one["seconds"])[:most], silent


def _watch(found: "Settings", lines: int, sql: bool, interval: float, why: str) -> None:
    """Show it again and again, on the whole terminal, with keys that end what is marked."""
    import time

    from mcpctl.errors import Error

    seen = top_screen.Seen(*_look(found, lines, sql, warn=False))  # where no server runs, it is an error at once

    def look() -> top_screen.Seen:
        nonlocal seen
        try:
            seen = top_screen.Seen(*_look(found, lines, sql, warn=False))
        except Error as problem:  # it is started again, perhaps
            seen = top_screen.Seen(failed=problem.message)
        return seen

    screen = top_screen.Screen(
        look, partial(_cut, found, why), partial(_revoke, found, why), lambda: time.strftime("%H:%M:%S"), sql=sql
    )
    top_screen.show(screen, interval)


def _cut(found: "Settings", why: str, call: dict[str, Any]) -> str:
    """End one call, and write it down; what was done."""
    answers, silent = ask(found, {"do": "end_call", "id": call["id"]}, warn=False)
    there = [answer for answer in answers if answer["there"]]
    if not there:
        return f"NOT DONE: no answer from {', '.join(map(str, silent))}" if silent else "that call has ended by itself"
    named = {name: call[name] for name in ("token", "user", "tenant", "tool", "database", "backend_pid")}
    note_all(found, [("query.cancelled", {"request_id": call["id"], **named, "reason": f"one call was ended; {why}"})])
    whose = f"{call['tool']} of {call['user'] or call['token']}"
    return f"ended: {whose}" if all(answer["ended"] for answer in there) else f"told to end, and still there: {whose}"


def _revoke(found: "Settings", why: str, token: str) -> str:
    """Revoke a token as `token revoke` does, or end a session as `session revoke` does; what was done."""
    if signed_in.is_one(token):
        whose = signed_in.records(found).get(token, ("somebody", True))[0]
        over = signed_in.end(found, [token])
        note_all(found, signed_in.closed(over, whose, why))
        return f"session {token} of {whose} ended; {told(asked_to_settle(found, [token]))[0]}"
    from mcpctl.cli.taking import revoked

    ((entry, alive),), words, _ = revoked(found, [token], why)
    return f"{entry.id} {'revoked' if alive else 'was revoked already'}; {words}"
