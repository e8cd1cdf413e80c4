"""The user file: who there is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    try:
        when = created if isinstance(created, datetime) else datetime.fromisoformat(created or "")
    except (TypeError, ValueError):
        raise ValueError(f"created_at: {created!r} is not a time such as 2027-01-31T12:00:00Z") from None
    if when.tzinfo is None:
        raise ValueError("created_at: has no time zone")
    if note is not None and not isinstance(note, str):
        raise ValueError("note: expected a text")
    return User(name, when.astimezone(UTC), note)


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
