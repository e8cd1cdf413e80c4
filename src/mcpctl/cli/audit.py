"""mcpctl audit: who did what."""

import contextlib
import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from ipaddress import IPv4Network, IPv6Network
    from pathlib import Path

    from mcpctl.audit.reading import Reading
    from mcpctl.config_keys import Settings

    Network = IPv4Network | IPv6Network

app = typer.Typer(help="Read the audit log.", no_args_is_help=True)
_WIDTHS = (24, 12, 8, 5, 8, 7, 4, 6, 20)
_NARROW = 130
"""Columns of a terminal below which the whole table would be unreadable: time to the second, and no numbers."""
_HEAD = ("TIME", "EVENT", "TOKEN", "USER", "DATABASE", "OUTCOME", "ROWS", "MS", "WHAT")


@app.callback()
def group() -> None:
    """Read the audit log."""


@app.command("tail")
def tail(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is written from now on.")] = False,
    lines: Annotated[
        int | None,
        typer.Option(
            "-n", "--lines", metavar="N", min=0, help="How many of the last lines. Default: 10; with --since, all."
        ),
    ] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="Only this user's.")] = None,
    token: Annotated[str | None, typer.Option("--token", metavar="ID", help="Only this token's.")] = None,
    ip: Annotated[str | None, typer.Option("--ip", metavar="ADDRESS", help="Only from there; a network, too.")] = None,
    event: Annotated[
        str | None, typer.Option("--event", metavar="E", help="Only this event, or family such as token.*")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="WHEN", help="Only from then on: 2h, 7d, or a time.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="WHEN", help="Only before then.")] = None,
    text: Annotated[
        str | None,
        typer.Option("--grep", metavar="TEXT", help="Only with this in the statement, the reason or a table's name."),
    ] = None,
    sql: Annotated[bool, typer.Option("--sql", help="Only statements, each in full as a block of its own.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show the end of the audit log; columns on a terminal. With --json each line as it is in the log. Exits 1 where
    lines may be missing in what it shows."""
    from mcpctl.audit import files as audit_files
    from mcpctl.audit.reading import stamp
    from mcpctl.cli.audit_read import tell_of

    begin, end, network = moment("--since", since), moment("--until", until), _asked_network(ip)
    _check_event(event)
    found = settings(context, config, forgiving=True)
    before = _last_number(found.audit.file) if follow else 0
    # opened at the end before the old lines are read, so that none between is lost
    newer = audit_files.follow(found.audit.file) if follow else None

    latest = stamp(end) if end is not None else "~"

    def wanted(line: dict[str, Any]) -> bool:
        return (
            (user is None or line.get("user") == user)
            and (token is None or line.get("token") == token)
            and (network is None or _is_within(line.get("client_ip"), network))
            and (text is None or _says(line, text.casefold()))
            and str(line.get("time", "")) < latest
            and (not sql or "statement" in line or "statement_hmac" in line)
            and (event is None or _is_event(str(line.get("event", "")), event))
        )

    if lines is None and since is None:
        lines = 10
    most = None if lines is None else min(lines, sys.maxsize)
    known, reading = _known(found, begin, wanted, most)
    if not (known or follow or most == 0):
        output.say("no line fits")
    heard = _show(known, json, sql)
    with contextlib.suppress(typer.Exit) if follow else contextlib.nullcontext():
        tell_of(reading)
    if newer is None or not heard:
        return
    last = max((audit_files.number(line) for line in known), default=0)
    for line in newer:
        number = audit_files.number(line)
        if number and number <= before:
            output.warn(f"the chain begins anew, at number {number} after {before}: was the log removed?")
            last = 0
        before = number or before
        if wanted(line) and (number > last or not number) and not _show([line], json, sql, with_head=False):
            return


def _last_number(path: "Path") -> int:
    """The number of the log's last line; 0 where there is none."""
    from mcpctl.audit import files as audit_files
    from mcpctl.errors import NotFoundError

    try:
        return audit_files.number(next(audit_files.read_back(path), {}))
    except NotFoundError:
        return 0


def _known(
    found: "Settings", begin: "datetime | None", wanted: "Callable[[dict[str, Any]], bool]", most: int | None
) -> "tuple[list[dict[str, Any]], Reading]":
    """The last lines that are wanted, and of what they were read: from a time on, else as far back as it takes."""
    from collections import deque
    from itertools import islice

    from mcpctl.cli.audit_read import reading_from

    reading = reading_from(found, begin, every=True)
    if begin is None:
        with contextlib.closing(reading.lines_back()) as back:
            known = list(islice(filter(wanted, back), most))[::-1]
        if not reading.packed:
            return known, reading
        reading = reading_from(found, None, every=True)  # what is packed can be read only from its beginning
    return list(deque(filter(wanted, reading.lines(lambda line: True)), most)), reading


def _says(line: dict[str, Any], text: str) -> bool:
    """Whether a line has that text in what was asked, why, or of which table; capitals or not."""
    said = [line.get("statement"), line.get("reason"), *(line.get("relations") or ())]
    return any(text in str(one).casefold() for one in said if one is not None)


def _asked_network(text: str | None) -> "Network | None":
    from mcpctl.errors import UsageError

    found = None if text is None else _network(text)
    if text is not None and found is None:
        raise UsageError(f"--ip {text!r} is no address and no network", "say 192.0.2.1, 10.0.0.0/24, or 2001:db8::/64")
    return found


def _network(text: Any) -> "Network | None":
    """An address, in whatever spelling, as the network of it alone; a network, as lines of many addresses have it."""
    from ipaddress import ip_address, ip_network

    try:
        bare = ip_address(str(text).partition("%")[0]) if "/" not in str(text) else None
        return ip_network(getattr(bare, "ipv4_mapped", None) or bare or text, strict=False)
    except ValueError:
        return None


def _is_within(text: Any, network: "Network") -> bool:
    found = _network(text)
    return found is not None and found.version == network.version and found.overlaps(network)


def moment(option: str, text: str | None) -> "datetime | None":
    """When an option means: a time, or that long ago."""
    from datetime import UTC, datetime, timedelta

    from mcpctl.config_values import duration
    from mcpctl.errors import UsageError

    if text is None:
        return None
    try:
        return datetime.now(UTC) - timedelta(seconds=duration(text))
    except (ValueError, OverflowError):
        try:
            when = datetime.fromisoformat(text)
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            raise UsageError(f"{option} {text!r} is no time", "say 2h, 7d, or 2027-01-31T12:00:00Z") from None


def _check_event(wanted: str | None) -> None:
    import difflib

    from mcpctl.audit import log as audit_log
    from mcpctl.errors import UsageError

    known = [*audit_log.EVENTS, *sorted({f"{name.partition('.')[0]}.*" for name in audit_log.EVENTS}), "unreadable"]
    if wanted is not None and wanted not in known:
        close = difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {close[0]}?" if close else "docs/reference/audit.md has them all"
        raise UsageError(f"--event {wanted!r} is no event and no family of events", hint)


def _is_event(found: str, wanted: str) -> bool:
    return found == wanted or (wanted.endswith(".*") and found.startswith(wanted[:-1]))


def when(line: dict[str, Any]) -> Any:
    """When a line's event happened, also where the line was written later."""
    return line.get("happened_at") or line.get("time")


def block(line: dict[str, Any]) -> str:
    """One statement: a line of who and when, and its text, each line of it set in, so that it can pass for no other."""
    names = ("user", "token", "client_ip", "database", "tool", "outcome", "rows", "reason")
    facts = [when(line), *(line.get(name) for name in names)]
    head = "  ".join(output.clean(fact) for fact in facts if fact is not None)
    kept = line.get("statement")
    text = f"(not kept; HMAC {line.get('statement_hmac')})" if kept is None else str(kept)
    return "\n".join([head, *(f"    {part}" for part in text.split("\n"))])


def _show(lines: list[dict[str, Any]], json: bool, sql: bool, *, with_head: bool = True) -> bool:
    """Show the lines; False where nobody reads them any more."""
    if json:
        return all(output.put_json(line) for line in lines)
    if sql:
        return all(output.put(block(line) + "\n") for line in lines)
    rows = []
    for line in lines:
        what = line.get("statement") or line.get("reason") or line.get("statement_hmac") or ""
        tool, place = line.get("tool"), line.get("client_ip")
        if place is not None and tool is None and line.get("user") is None:
            what = f"from {place}: {what}"
        rows.append(
            [
                when(line), line.get("event"), line.get("token"), line.get("user"), line.get("database"),
                line.get("outcome"), line.get("rows"), line.get("elapsed_ms"),
                f"{tool}: {' '.join(str(what).split())}" if tool else what,
            ]
        )  # fmt: skip
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < _NARROW:
        few = (0, 1, 2, 3, 5, 8)
        rows = [[f"{str(row[0])[:19]}Z" if row[0] else None, *(row[at] for at in few[1:])] for row in rows]
        widths = (20, *(_WIDTHS[at] for at in few[1:-1]), 15)
        return output.put_table([_HEAD[at] for at in few], rows, widths, with_head=with_head)
    return output.put_table(_HEAD, rows, _WIDTHS, with_head=with_head)
