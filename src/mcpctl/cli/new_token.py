"""What a new token is given: its end and its permissions; how it is handed over, once, and what is said of it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpctl.cli import output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token


def record(token: "Token", now: "datetime") -> dict[str, Any]:
    """A token as `--json` shows it."""
    from mcpctl.identity.tokens import as_values

    found = as_values(token)
    names = ("user", "databases", "permissions", "created_at", "expires_at", "revoked_at", "note")
    return {"id": token.id, **{name: found[name] for name in names}, "status": token.status(now)}


@contextlib.contextmanager
def handing_over(out: Path | None) -> "Iterator[Callable[[Token, str, bool, datetime], None]]":
    """A way to hand over a new token, once and nowhere else. The file for it is made before the token is: where it
    cannot be, there is no token; where there is no token, it goes away again."""
    import os

    from mcpctl import private_file
    from mcpctl.errors import ConfigError, Error, UsageError

    if out is not None and str(out) == "-":
        raise UsageError("--out takes a file, not -", "without --out the token goes to stdout")
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
                output.put_json({**record(token, now), "token": text if out is None else None, "out": out and str(out)})
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


def expiry_of(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    """The end that is asked for, or the config's default. UsageError where there is none, or the config bars it."""
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


def bounded(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    """The end that a rotation asks for, or the latest one that the config lets it have."""
    return expiry_of(found, text, now) if text is not None else _latest(found, now)


def permission_of(found: "Settings", text: str) -> str:
    """A pattern that covers something that there is. ValueError for any other: it would be a typo."""
    import difflib

    from mcpctl.identity.tokens import check_permission
    from mcpctl.policy.access import covers
    from mcpctl.tools.table import TOOLS

    known = [tool.permission for tool in TOOLS.values()] + [f"databases:{name}:read" for name in found.databases]
    if not any(covers(check_permission(text), one) for one in known):
        close = difflib.get_close_matches(text, known, 1)
        raise ValueError(f"{text} covers nothing that there is{f'; did you mean {close[0]}?' if close else ''}")
    return text


def tell(found: "Settings", entry: "Token", entries: Any) -> None:
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
