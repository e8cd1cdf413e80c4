"""What `token list` adds: how tokens are used, and which have grown old."""

from typing import TYPE_CHECKING, Any

from mcpctl.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from mcpctl.audit.reading import Reading
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token

COLUMNS = ("last_used", "calls", "rows", "addresses")
_SOME = 6


def add(found: "Settings", values: list[dict[str, Any]], now: "datetime") -> "Reading":
    """Put each token's usage into its values, and say how far back the log was looked at. What of it was not there is
    for `tell_of` to say, behind the answer."""
    from mcpctl.audit import usage
    from mcpctl.audit.reading import stamp
    from mcpctl.cli.audit_read import reading_from
    from mcpctl.errors import NotFoundError

    reading, used = reading_from(found, now - usage.DAYS), {}
    try:
        used = usage.by_token(reading)
    except NotFoundError as problem:
        reading.faults.append(problem.message)
    for value in values:
        one = used.get(value["id"], usage.Usage())
        value |= {
            "last_used": one.last or None, "calls": one.count, "rows": one.rows, "addresses": len(one.addresses),
        }  # fmt: skip
    output.say(f"used: by the log since {stamp(now - usage.DAYS)}")
    return reading


def warn_of_age(living: "Iterable[Token]", now: "datetime") -> None:
    """Name those that nobody will notice when they leak."""
    from mcpctl.identity import tokens

    never = [one.id for one in living if one.expires_at is None]
    for what, ids in (("never expire", never), ("are older than a year", tokens.aged(living, now))):
        if ids:
            more = f" and {len(ids) - _SOME} more" if len(ids) > _SOME else ""
            output.warn(f"{what}: {', '.join(ids[:_SOME])}{more}", "mcpctl token rotate ID --expiry 90d")
