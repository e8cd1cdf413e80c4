"""Users and tokens of pgEdge's MCP server, read from its files, to be made anew here.

Its passwords are bcrypt hashes and its tokens SHA-256 ones; neither can become ours. So a user comes without a password
and disabled, and each token is issued anew. The forms are those of pgEdge's documentation ("Token Management", "User
Management") and of its source (internal/auth/auth.go, users.go): names with fields, or a list of fields with an id.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl import plain_yaml
from mcpctl.errors import ConfigError, ConflictError, UsageError
from mcpctl.identity.users import NAME, OUTSIDE, check_note, read_time

_TOKEN_KEYS = {"id", "hash", "annotation", "note", "created_at", "expires_at", "database"}
_USER_KEYS = {"id", "username", "password_hash", "annotation", "created_at", "last_login", "enabled", "failed_attempts"}
_NOT_OURS = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class TheirToken:
    """A token of theirs. `expires_at` is None where it never ends."""

    id: str
    note: str | None
    expires_at: datetime | None
    database: str | None


@dataclass(frozen=True)
class TheirUser:
    """A user of theirs. `name` is what they are called here, `called` what they were called there."""

    called: str
    name: str
    note: str | None
    enabled: bool


def tokens(data: bytes, source: Path) -> tuple[list[TheirToken], list[str]]:
    """The tokens of such a file, and what of it is not carried over. ConfigError for every fault at once."""
    return _read(data, source, "tokens", _token, _TOKEN_KEYS)


def users(data: bytes, source: Path) -> tuple[list[TheirUser], list[str]]:
    """The users of such a file, likewise."""
    return _read(data, source, "users", _user, _USER_KEYS)


def _read(data: bytes, source: Path, top: str, read: Any, known: Collection[str]) -> tuple[list[Any], list[str]]:
    faults: list[str] = []
    tree = plain_yaml.as_plain(plain_yaml.parse(data, source, faults))
    found, left = [], set[str]()
    if not faults and (not isinstance(tree, dict) or top not in tree):
        faults.append(f"{source}: has no {top}: is it pgEdge's file of them?")
    for name, fields in _entries(tree.get(top) if isinstance(tree, dict) else None, faults, f"{source}: {top}"):
        try:
            found.append(read(name, fields))
            left |= fields.keys() - known
        except ValueError as problem:
            faults.append(f"{source}: {name}: {problem}")
    if faults:
        raise ConfigError("\n  ".join([f"{source} is not in order:", *faults]), "nothing was imported; mend the file")
    return found, [f"{one} of {top}" for one in sorted(left)]


def _entries(found: Any, faults: list[str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields) of each, in whichever of both forms."""
    if found is None:
        return
    if isinstance(found, Mapping):
        pairs = [(str(name), fields) for name, fields in found.items()]
    elif isinstance(found, list):
        pairs = [(str((one.get("id") or one.get("username")) if isinstance(one, dict) else ""), one) for one in found]
    else:
        pairs = [("", found)]
    for name, fields in pairs:
        if not name.isprintable():  # it would be more than one line or field of the list of new tokens
            faults.append(f"{where}: {name!r}: a name may hold no control character")
        elif not name or not isinstance(fields, dict):
            faults.append(f"{where}: {name or 'an entry'}: expected a name with fields")
        else:
            yield name, fields


def _token(name: str, fields: dict[str, Any]) -> TheirToken:
    ends, database = fields.get("expires_at"), fields.get("database") or None
    if not isinstance(fields.get("hash"), str):
        raise ValueError("hash: is missing")  # noqa: TRY004 - as all readers do
    if database is not None and not isinstance(database, str):
        raise ValueError("database: expected a name")
    return TheirToken(name, _note(fields), None if ends is None else read_time(ends, "expires_at"), database)


def _user(name: str, fields: dict[str, Any]) -> TheirUser:
    enabled = fields.get("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError("enabled: takes true or false")  # noqa: TRY004 - as all readers do
    called = str(fields.get("username") or name)
    return TheirUser(called, ours(called), _note(fields), enabled)


def ours(name: str) -> str:
    """A name as users have it here: a-z first, then a-z, 0-9 and -, at most 31 characters."""
    found = _NOT_OURS.sub("-", name.lower()).strip("-")
    found = (found if found[:1].isalpha() else f"u-{found}")[:31].rstrip("-")
    if not NAME.fullmatch(found) or OUTSIDE.fullmatch(found) or found == "u":
        raise ValueError(f"{name!r} cannot be made a user's name")
    return found


def _note(fields: dict[str, Any]) -> str | None:
    """What is said of it, as one line; None where that is nothing that a note may hold."""
    text = fields.get("annotation") or fields.get("note")
    if not isinstance(text, str):
        return None
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())[:1000]
    try:
        check_note(line or None)
    except UsageError:
        return None
    return line or None


def check_names(found: list[TheirUser], taken: Collection[str]) -> None:
    """ConflictError (exit 5) where two would have one name, or one is there already."""
    by_name: dict[str, str] = {}
    for user in found:
        if user.name in taken:
            raise ConflictError(
                f"{user.called} would be {user.name} here, and there is a user {user.name} already",
                "nothing was imported; take one of the two out of its file",
            )
        if user.name in by_name:
            raise ConflictError(
                f"{by_name[user.name]} and {user.called} would both be {user.name} here",
                "nothing was imported; change one of the two names in the file",
            )
        by_name[user.name] = user.called
