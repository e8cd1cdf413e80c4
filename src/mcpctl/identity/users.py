"""The user file: who there is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcpctl.config_keys import text
from mcpctl.errors import ConflictError, NotFoundError, UsageError
from mcpctl.identity.entry_file import EntryFile, Shape

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_FIELDS = ("created_at", "note")


@dataclass(frozen=True, slots=True)
class User:
    """One entry of users.yaml."""

    name: str
    created_at: datetime
    note: str | None = None


def _read(name: str, fields: dict[str, Any]) -> User:
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise ValueError(f"{unknown[0]}: there is no such key; there are {', '.join(_FIELDS)}")
    created, note = fields.get("created_at"), fields.get("note")
    if created is None:
        raise ValueError("created_at: is missing")
    if note is not None and not isinstance(note, str):
        raise ValueError("note: expected a text")
    return User(name, read_time(created, "created_at"), note)


def read_time(value: Any, name: str) -> datetime:
    """A time of one of these files, in UTC; ValueError for what is none."""
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if when.tzinfo is not None:
            return when.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: {str(value)[:40]!r} is not a time such as 2027-01-31T12:00:00Z") from None
    raise ValueError(f"{name}: has no time zone")


def check_note(note: str | None) -> None:
    """A note is a short line of text."""
    if note is None:
        return
    try:
        text(note)
    except ValueError as problem:
        raise UsageError(f"--note takes {problem}", "or leave it out") from None
    if re.search(r"mcp_[0-9a-z]{8}_[0-9A-Za-z]{20}", note):
        raise UsageError("--note holds a token", "notes are shown and logged; name the token by its id")
    if len(note) > 1000:
        raise UsageError("--note is longer than 1000 characters", "say it shorter")


def as_values(user: User) -> dict[str, Any]:
    """The entry's fields as plain values, without its name."""
    return {"created_at": user.created_at.isoformat().replace("+00:00", "Z"), "note": user.note}


_SHAPE: Shape[User] = Shape("users", NAME, _read, as_values)


def user_file(path: Path) -> EntryFile[User]:
    """The user file at `path`."""
    return EntryFile(path, _SHAPE)


def add(file: EntryFile[User], name: str, note: str | None, now: datetime) -> User:
    """Write a new user into the file; ConflictError (exit 5) where there is one of that name."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a user name", "a-z first, then a-z 0-9 -, at most 31 characters")
    check_note(note)
    with file.edit() as entries:
        if name in entries:
            raise ConflictError(f"there is a user {name} already", "`mcpctl user list` shows all")
        entries[name] = user = User(name, now, note)
    return user


def find(entries: Mapping[str, User], name: str) -> User:
    """The user of that name, or NotFoundError (exit 4)."""
    try:
        return entries[name]
    except KeyError:
        raise NotFoundError(f"there is no user {name}", f"make one with `mcpctl user add {name}`") from None
