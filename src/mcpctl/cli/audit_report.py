"""mcpctl audit report: the log for whoever looks at it once a week."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.audit import app, moment
from mcpctl.cli.audit_read import reading_from, tell_of
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from mcpctl.audit.reading import Reading
    from mcpctl.audit.review import Review, Use

_HEAD = ("TOKEN", "USER", "CALLS", "BEFORE", "REFUSED", "ROWS", "BEFORE", "ADDRESSES", "UNUSUAL")


@app.command("report")
def report(
    context: typer.Context,
    since: Annotated[
        str, typer.Option("--since", metavar="WHEN", help="What to look at: 7d, or from a time on.")
    ] = "7d",
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=1, help="How many of each kind.")] = 20,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Tell what a week brought: how tokens were used and what of it is unusual beside the week before, what was
    refused, and what else happened.

    Example: mcpctl audit report --since 7d
    """
    from datetime import UTC, datetime

    from mcpctl.audit import review
    from mcpctl.errors import UsageError

    now, begin = datetime.now(UTC), moment("--since", since)
    if begin is None or begin >= now:
        raise UsageError(f"--since {since!r} is not in the past", "say 7d, or a time")
    try:
        before = begin - (now - begin)
    except OverflowError:
        raise UsageError(f"--since {since!r} is too far back to compare with what was before", "say 7d") from None
    reading = reading_from(settings(context, config, needs_log=False, forgiving=True), before)
    found = review.look(reading, begin)
    uses = sorted(found.tokens.items(), key=lambda one: (-len(one[1].unusual()), -one[1].now.calls, one[0]))
    uses = [(token, use) for token, use in uses if use.now.calls]
    if json:
        _put_json(reading, found, uses, begin, before)
    else:
        _put(found, uses, lines)
    tell_of(reading)


def _put(found: "Review", uses: "list[tuple[str, Use]]", lines: int) -> None:
    rows = [
        (
            token, use.user, use.now.calls, use.before.calls, use.now.refused, use.now.rows, use.before.rows,
            len(use.now.places), "; ".join(use.unusual()) or None,
        )
        for token, use in uses[:lines]
    ]  # fmt: skip
    output.put_table(_HEAD, rows)
    for head, counted in (("REFUSED BECAUSE", found.refusals), ("EVENT", found.events)):
        output.put("")
        output.put_table((head, "COUNT"), counted.most_common(lines))
    more = max(len(uses), len(found.refusals), len(found.events)) - lines
    if more > 0:
        output.say(f"and up to {more} more of a kind; -n shows them")
    if unusual := sum(bool(use.unusual()) for _, use in uses):
        output.say(f"{unusual} of {len(uses)} tokens are unusual; mcpctl incident report --token ID tells all of one")


def _put_json(reading: "Reading", found: "Review", uses: "list[tuple[str, Use]]", begin: Any, before: Any) -> None:
    from mcpctl.audit.reading import stamp

    def period(one: Any) -> dict[str, Any]:
        return {"calls": one.calls, "refused": one.refused, "rows": one.rows, "addresses": len(one.places)}

    output.put_json(
        {
            "since": stamp(begin),
            "compared_with": stamp(before),
            "tokens": [
                {
                    "token": token,
                    "user": use.user,
                    **period(use.now),
                    "hours": use.now.hours,
                    "before": period(use.before),
                    "unusual": use.unusual(),
                }
                for token, use in uses
            ],
            "refusals": dict(found.refusals.most_common()),
            "events": dict(found.events.most_common()),
            "missing_before": reading.missing_before,
            "remarks": reading.remarks,
            "faults": reading.faults,
        }
    )
