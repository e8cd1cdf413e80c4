"""mcpctl audit who-read and audit top: what the whole log tells."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.audit import app
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from datetime import datetime

    from mcpctl.audit.reading import Reading, Tally
    from mcpctl.audit.who_read import Found
    from mcpctl.config_keys import Settings

SinceOption = Annotated[
    str | None, typer.Option("--since", metavar="WHEN", help="Only from then on: 2h, 7d, or a time.")
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="WHEN", help="Only before then: 2h, 7d ago, or a time.")
]


def reading_of(context: typer.Context, config: Any, since: str | None, until: str | None = None) -> "Reading":
    """The log that a command is to read, from and until when."""
    from mcpctl.cli.audit import moment

    begin, end = moment("--since", since), moment("--until", until)
    return reading_from(settings(context, config, needs_log=False, forgiving=True), begin, end)


def reading_from(
    found: "Settings", begin: "datetime | None", end: "datetime | None" = None, *, every: bool = False
) -> "Reading":
    """The same; where the log ends by the servers and by `audit.anchor_file` is looked at first. `every` line, also one
    that says only that a call was begun."""
    from mcpctl.audit.log import read_key
    from mcpctl.audit.reading import Reading
    from mcpctl.cli.audit_verify import known_ends
    from mcpctl.errors import Error

    key, remarks = b"", []
    try:
        key = read_key(found.audit.key_file)
    except Error as problem:
        remarks.append(f"audit.anchor_file is not looked at: {problem.message}")
    elsewhere = known_ends(found, key)
    return Reading(found.audit.file, begin, end, elsewhere.anchors, remarks=remarks + elsewhere.remarks, every=every)


def tell_of(reading: "Reading") -> None:
    """Say what of the log was not there. A hole in it is an error: an answer from the rest may be wrong."""
    if (before := reading.missing_before) is not None:
        output.warn(before)
    for remark in reading.remarks:
        output.warn(remark)
    for fault in reading.faults:
        output.error(f"the log is not whole: {fault}", None)
    if reading.faults:
        output.say("mcpctl: hint: `mcpctl audit verify` looks at the whole chain; this answer is of what could be read")
        raise typer.Exit(1)


def tally(found: "Tally") -> dict[str, Any]:
    """How often, how many rows, and when, as --json shows it."""
    return {"count": found.count, "rows": found.rows, "first": found.first, "last": found.last}


@app.command("who-read")
def who_read(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="schema.table or schema.*, also with a database before it.")
    ],
    since: SinceOption = None,
    until: UntilOption = None,
    database: Annotated[
        str | None, typer.Option("--database", metavar="D", help="Only in this one; own:NAME for a user's own.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the statements too, the last 1000.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List whose statements touched a table: by what PostgreSQL's own plan read, never by their text.

    Exits 0 where nobody did, 1 where the log is not whole, and 4 for a database that nothing knows.

    Example: mcpctl audit who-read sales.orders --since 7d
    """
    from mcpctl.audit import who_read as who_reads
    from mcpctl.cli.audit import moment
    from mcpctl.errors import NotFoundError

    wanted = who_reads.parse(target, database)
    begin, end = moment("--since", since), moment("--until", until)
    configured = settings(context, config, needs_log=False, forgiving=True)
    reading = reading_from(configured, begin, end)
    found = who_reads.search(reading, wanted)
    name = wanted.database
    if name is not None and not (name in configured.databases or found.named or reading.faults):
        text = f"there is no database {output.clean(name)} in the config, and no line of that time names one"
        raise NotFoundError(text, "look further back, or at the name; a user's own database is own:NAME")
    rows = sorted(found.who.items(), key=lambda one: one[1].last, reverse=True)
    if not rows and name is None and wanted.schema in configured.databases:
        named = f"{wanted.schema!r} is taken for a schema, and there is a database of that name"
        reading.remarks.append(f"{named}: for that say {wanted.schema}.SCHEMA.{wanted.table or '*'}")
    if json:
        _put_json(target, reading, found, rows)
    else:
        head = ["USER", "TOKEN", "DATABASE", "STATEMENTS", "ROWS", "FIRST", "LAST"]
        output.put_table(head, [(*who, one.count, one.rows, one.first, one.last) for who, one in rows])
        if verbose:
            _put_statements(found)
    if not rows:
        output.say("nobody, in what could be read" if reading.faults else "nobody")
    if found.unknown:
        when, counts = found.unknown_when, ", ".join(f"{count} {name}" for name, count in found.unknown.items())
        output.warn(
            f"of {found.unknown.total()} statements the log does not say what they read ({counts}), from {when.first} "
            f"to {when.last}: EXPLAIN and SHOW, those that PostgreSQL refused or never planned, and what functions "
            "read in those that failed or were cut off",
            "mcpctl audit tail --sql --since … shows them",
        )
    output.say("what functions read may be missing here")
    tell_of(reading)


def _put_json(target: str, reading: "Reading", found: "Found", rows: list[Any]) -> None:
    output.put_json(
        {
            "target": target,
            "who": [
                {"user": user, "token": token, "database": database, **tally(one)}
                for (user, token, database), one in rows
            ],
            "statements": list(found.statements),
            "more": found.more,
            "unknown": found.unknown.total(),
            "lines_read": reading.read,
            "missing_before": reading.missing_before,
            "remarks": reading.remarks,
            "faults": reading.faults,
        }
    )


def _put_statements(found: "Found") -> None:
    from mcpctl.cli.audit import block

    if found.more:
        output.say(f"{found.more} statements before these are not shown; --since and --until show a part")
    for line in found.statements:
        output.put("\n" + block(line))


@app.command("top")
def top(
    context: typer.Context,
    by: Annotated[
        str, typer.Option("--by", metavar="WHAT", help="user, token, ip, tool, database, table or reason.")
    ] = "user",
    since: SinceOption = "1h",
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=1, help="How many of them.")] = 20,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Count what was asked and refused, by user, token, address, tool, database, table, or reason of a refusal.

    Example: mcpctl audit top --by ip --since 1d
    """
    from mcpctl.audit import top as counting
    from mcpctl.errors import UsageError

    if by not in counting.BY:
        raise UsageError(f"--by {by!r} is nothing to count by", f"say one of {', '.join(counting.BY)}")
    reading = reading_of(context, config, since)
    found = counting.count(reading, by)
    rows = sorted(found.items(), key=lambda one: (-one[1].count, one[0]))[:lines]
    if json:
        shown = [{"key": key, "refused": one.refused, **tally(one)} for key, one in rows]
        output.put_json({"by": by, "top": shown, "more": len(found) - len(rows), "faults": reading.faults})
    else:
        head = [by.upper(), "COUNT", "REFUSED", "ROWS", "FIRST", "LAST"]
        output.put_table(head, [(key, one.count, one.refused, one.rows, one.first, one.last) for key, one in rows])
        if len(found) > len(rows):
            output.say(f"and {len(found) - len(rows)} more; -n shows them")
    tell_of(reading)
