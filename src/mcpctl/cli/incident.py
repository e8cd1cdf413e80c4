"""mcpctl incident report: everything that a token or a user did, as one page."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.audit_read import SinceOption, UntilOption, reading_from, tally, tell_of
from mcpctl.cli.common import ConfigOption, JsonOption, settings, user_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mcpctl.audit.reading import Reading, Tally
    from mcpctl.audit.report import Facts
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token
    from mcpctl.identity.users import User

app = typer.Typer(help="Find out what somebody did.", no_args_is_help=True)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~!&@]|:(?=//)|(?<=www)\.")


@app.callback()
def group() -> None:
    """Find out what somebody did."""


@app.command("report")
def report(
    context: typer.Context,
    token: Annotated[str | None, typer.Option("--token", metavar="ID", help="What this token did.")] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="What this user's tokens did.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it to this new file (0600), not to stdout.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Tell everything that a token or a user did, as one page in Markdown: from where, what was read, what was refused.

    A token that was removed is told of from the log alone. Exits 1 where the log is not whole.

    Example: mcpctl incident report --token 1hrspjl1 --out report.md
    """
    from mcpctl.audit import report as reports
    from mcpctl.cli.audit import moment
    from mcpctl.errors import NotFoundError, UsageError

    if token is None and user is None:
        raise UsageError("a report is of a token or of a user", "say --token ID or --user U")
    begin, end = moment("--since", since), moment("--until", until)
    found = settings(context, config, needs_log=False, forgiving=True)
    record, person = _records(found, token, user)
    reading = reading_from(found, begin, end)
    facts = reports.gather(reading, token, user)
    if record is None and person is None and not facts.tokens and not facts.users:
        tell_of(reading)
        what = f"token {token}" if _plain(token) else "such token or user"
        raise NotFoundError(f"there is no {what}, and no line of the log names one", "look further back, or at the id")
    if person is None and user is None and facts.users:  # the token was removed: the log knows whose it was
        _, person = _records(found, None, max(facts.users, key=lambda name: facts.users[name].count))
    values = _values(reading, facts, record, person)
    text = _as_json(values) if json else "\n".join(_page(token, user, values, found.audit.statements)) + "\n"
    if out is None:
        output.put(text.rstrip("\n"))
    else:
        _write(out, text)
    tell_of(reading)


def _records(found: "Settings", token: str | None, user: str | None) -> "tuple[Token | None, User | None]":
    """What the files say of them now."""
    from mcpctl.identity import tokens, users

    entry = tokens.token_file(found.auth.token_file).current().get(token or "")
    name = user or (entry.user if entry is not None else None)
    return entry, users.user_file(found.auth.user_file).current().get(name or "")


def _write(out: Path, text: str) -> None:
    from mcpctl import private_file
    from mcpctl.errors import ConfigError

    try:
        private_file.create(out, text.encode())
    except ConfigError as problem:
        folder = f"name a file in a folder that {user_name()} may write"
        raise ConfigError(problem.message, f"{folder}; run as root, mcpctl works as the owner of its files") from None


def _as_json(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values, ensure_ascii=True).replace("\x7f", "\\u007f") + "\n"


# -- what there is to say -----------------------------------------------------------------------------------------


def _values(reading: "Reading", facts: "Facts", record: "Token | None", person: "User | None") -> dict[str, Any]:
    """The report, as --json prints it."""
    from mcpctl.audit.reading import stamp
    from mcpctl.identity import tokens

    now = tokens.utcnow()
    people = {person.name: person} if person is not None else {}
    return {
        "made_at": stamp(now),
        "token": record and {**_without_hash(record), "status": tokens.standing(record, people, now)},
        "user": person and _person(person),
        "used": tally(facts.used),
        "users": _counted(facts.users, "user"),
        "tokens": _counted(facts.tokens, "token"),
        "calls": _counted(facts.calls, "tool", "outcome"),
        "addresses": _counted(facts.addresses, "address"),
        "refused_addresses": _counted(facts.strangers, "address"),
        "tables": _counted(facts.tables, "database", "relation"),
        "roles": _counted(facts.roles, "database", "role"),
        "backends": _counted(facts.backends, "pid"),
        "refusals": _counted(facts.refusals, "reason"),
        "events": {"all": facts.happened, "last": list(facts.events)},
        "settings": {"all": facts.changed, "last": list(facts.settings)},
        "statements": {"all": facts.asked, "last": list(facts.statements)},
        "log": {
            "since": reading.begin and stamp(reading.begin),
            "until": reading.end and stamp(reading.end),
            "lines_read": reading.read,
            "missing_before": reading.missing_before,
            "remarks": reading.remarks,
            "faults": reading.faults,
        },
    }


def _without_hash(record: "Token") -> dict[str, Any]:
    from mcpctl.identity import tokens

    return {"id": record.id, **{name: value for name, value in tokens.as_values(record).items() if name != "hash"}}


def _person(person: "User") -> dict[str, Any]:
    grants = {
        name: {"read": [*one.read], "write": [*one.write], "admin": one.admin, "state": one.state}
        for name, one in person.grants.items()
    }
    return {
        "name": person.name,
        "disabled": person.disabled_at is not None,
        "roles": None if person.roles is None else [*person.roles],
        "tenant": person.tenant,
        "grants": grants,
    }


def _counted(counted: "Mapping[Any, Tally]", *names: str) -> list[dict[str, Any]]:
    rows = []
    for key, one in sorted(counted.items(), key=lambda item: -item[1].count):
        parts = key if isinstance(key, tuple) else (key,)
        rows.append({**dict(zip(names, parts, strict=False)), **tally(one)})
    return rows


# -- the page -----------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as Markdown that says just that: nothing in it is a heading, a link, or a control character."""
    return _MARKDOWN.sub(lambda found: "\\" + found[0], output.clean(value))


def _table(head: "Sequence[str]", rows: "Iterable[Sequence[Any]]") -> list[str]:
    lines = ["| " + " | ".join(_text("" if cell is None else cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ["None.", ""]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""]


def _tallies(title: str, rows: list[dict[str, Any]], *names: str) -> list[str]:
    head = [*names, "times", "rows", "first", "last"]
    keys = (*names, "count", "rows", "first", "last")
    return [f"## {title}", "", *_table(head, ([row.get(key) for key in keys] for row in rows))]


def _page(token: str | None, user: str | None, values: dict[str, Any], kept: str) -> "Iterable[str]":
    what = " of ".join(f"{kind} {_text(name)}" for kind, name in (("token", token), ("user", user)) if name)
    log = values["log"]
    span = " ".join(f"{name} {log[name]}" for name in ("since", "until") if log[name]) or "the whole log"
    yield from (f"# Incident report: {what}", "", f"Made at {values['made_at']}, of {span}.", "")
    yield from _standing(token, user, values)
    used = values["used"]
    yield from ("## Use", "", f"First {used['first'] or 'never'}, last {used['last'] or 'never'}.", "")
    yield from _tallies("Calls", values["calls"], "tool", "outcome")
    yield from _tallies("From where", values["addresses"], "address")
    yield from _tallies("Addresses that were refused", values["refused_addresses"], "address")
    yield from _tallies("Tables read", values["tables"], "database", "relation")
    yield from ("What functions read may be missing here. Rows are those of the whole answers.", "")
    yield from _tallies("Login roles", values["roles"], "database", "role")
    yield from _tallies("Backends of PostgreSQL", values["backends"], "pid")
    yield from _tallies("Refused", values["refusals"], "reason")
    yield from _listed("What happened to it", values["events"], ("time", "event", "client_ip", "database", "reason"))
    yield from _listed("Settings changed", values["settings"], ("time", "database", "outcome", "reason"))
    yield from _statements(values["statements"], kept)
    yield from _whole(log)
    yield from _next(token, values)


def _standing(token: str | None, user: str | None, values: dict[str, Any]) -> "Iterable[str]":
    if token is not None:
        record = values["token"]
        yield from ("## The token", "")
        if record is None:
            yield from ("It is not in the token file any more: what follows is from the log alone.", "")
        else:
            yield from _fields(record, "no limit")
        yield from _tallies("Its users by the log", values["users"], "user")
    elif user is not None:
        yield from _tallies("The tokens", values["tokens"], "token")
    person = values["user"]
    yield from ("## The user", "")
    if person is None:
        yield from ("There is none in the user file.", "")
        return
    yield from _fields({name: value for name, value in person.items() if name != "grants"}, "none")
    names = ("read", "write", "admin", "state")
    grants = ([name, *(_cell(one[access]) for access in names)] for name, one in person["grants"].items())
    yield from _table(("granted in", *names), grants)


def _fields(record: dict[str, Any], nothing: str) -> list[str]:
    limits = ("databases", "permissions", "allow_ips")
    return _table(
        ("field", "value"),
        ((name, nothing if value is None and name in limits else _cell(value)) for name, value in record.items()),
    )


def _cell(value: Any) -> Any:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value


def _listed(title: str, found: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    from mcpctl.cli.audit import when

    rows = [[when(line), *(line.get(name) for name in names[1:])] for line in found["last"]]
    return [f"## {title}", "", *_more(found), *_table(names, rows)]


def _more(found: dict[str, Any]) -> list[str]:
    """That only the last are shown, where it is so."""
    left = found["all"] - len(found["last"])
    return [f"{left} before these are not shown; --until shows them.", ""] if left else []


def _statements(found: dict[str, Any], kept: str) -> "Iterable[str]":
    from mcpctl.cli.audit import block

    yield from ("## Statements", "", *_more(found))
    if kept != "full":
        yield from (f"By `audit.statements: {kept}` their text is not kept now.", "")
    for line in found["last"]:
        # set in by four blanks it is code to Markdown, and no text gets out of that
        yield from (f"    {output.clean(part)}" for part in block(line).split("\n"))
        yield ""
    if not found["last"]:
        yield from ("None.", "")


def _whole(log: dict[str, Any]) -> "Iterable[str]":
    yield from ("## The log", "")
    for said in (log["missing_before"], *log["remarks"]):
        yield from (_text(said), "") if said else ()
    if log["faults"]:
        yield from ("**It is not whole. What is missing may be what matters.**", "")
        yield from (*(f"- {_text(fault)}" for fault in log["faults"]), "")
    else:
        of_these = " among these" if log["missing_before"] else ""
        yield from (f"{log['lines_read']} lines were read, and their numbers have no gap{of_these}.", "")
    yield from ("`mcpctl audit verify` proves that no line was changed, removed or added.", "")


def _next(token: str | None, values: dict[str, Any]) -> "Iterable[str]":
    whose = values["user"] and values["user"]["name"]
    names = [token] if token is not None else [one["token"] for one in values["tokens"] if "token" in one]
    look = ", ".join(f"`mcpctl {name}`" for name in names if _plain(name)) or "`mcpctl`"
    yield from ("## PostgreSQL's own log", "")
    yield f"Look for the application_name {look} (`%a` in log_line_prefix), and for the login roles and pids above"
    yield from (
        "(`%u`, `%p`): a statement can give its session another application_name, but no other role or pid.",
        "",
    )
    yield from ("## Next steps", "")
    steps = [f"End it, if it is alive: `mcpctl token revoke {name}`." for name in names[:1] if _plain(name)]
    if whose is not None:
        steps.append(f"Make a new one, and tell the application: `mcpctl token add --user {whose} --expiry 30d`.")
        steps.append(f"Look at what its user may do: `mcpctl can {whose}`. Take back what is not needed.")
    steps += [
        "Look for others from the same addresses: `mcpctl audit tail --ip ADDRESS --since 30d`.",
        "Who else read these tables: `mcpctl audit who-read TABLE --since 30d`.",
        "If more may have leaked: `mcpctl token revoke --all`, and a new token for each.",
        "Write down how it came about, and change what let it.",
    ]
    yield from (f"{number}. {step}" for number, step in enumerate(steps, 1))


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isalnum() and len(name) <= 32
