"""What a user was granted in one database: schemas and tables to read or to write, and the sealed passwords of the
login roles that hold it. Names are as PostgreSQL quotes them: `sales`, `sales.orders`, `"Odd name".t`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mcpctl.config import ACCESSES as ACCESSES
from mcpctl.errors import UsageError

EVERYTHING = "*"
"""Every schema that is there when the grant is applied."""
SUFFIXES = {"read": "r", "write": "w", "admin": "a"}
"""The end of the login role's name for each access."""
PENDING, NARROWING, REVOKING = "pending", "narrowing", "revoking"
"""Recorded, and not yet seen in PostgreSQL; taken back in part, or whole, and perhaps still there in PostgreSQL."""
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")
_UNQUOTED = re.compile(r"[^\W\d][\w$]*")
"""What PostgreSQL takes for a name without quotes ("Lexical Structure" in its manual)."""
_PART = re.compile(r'(?:"((?:[^"\x00]|"")+)"|([^".\s\x00]+))')
_LISTS = ("read", "write")
_FIELDS = (*_LISTS, "admin", "state", *SUFFIXES.values())


def quoted(name: str) -> str:
    """A name as people write it: in double quotes where it is not plain. `parse` reads it back."""
    return name if _PLAIN.fullmatch(name) else _in_quotes(name)


def _in_quotes(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def escaped(text: str, short: str, long: str) -> str:
    """The text with each character that is not printable as its number: in `short`, and beyond FFFF in `long`."""
    return "".join(one if one.isprintable() else (short if ord(one) < 0x10000 else long) % ord(one) for one in text)


def identifier(name: str) -> str:
    """A name as SQL: always in double quotes, since a plain one may be a reserved word; and without a control
    character, which no terminal shows as it is (PostgreSQL, "Lexical Structure")."""
    if name.isprintable():
        return _in_quotes(name)
    return "U&" + escaped(_in_quotes(name.replace("\\", "\\\\")), r"\%04X", r"\+%06X")


@dataclass(frozen=True, slots=True)
class Target:
    """A schema, or one table in it (table, view, materialized or foreign table)."""

    schema: str
    table: str | None = None

    def __str__(self) -> str:
        return quoted(self.schema) + (f".{quoted(self.table)}" if self.table is not None else "")

    @property
    def sql(self) -> str:
        """The same as SQL."""
        return identifier(self.schema) + (f".{identifier(self.table)}" if self.table is not None else "")


def parse(text: str) -> Target:
    """The schema or table that a text names; ValueError where it could mean two things."""
    parts: list[str] = []
    rest = text
    while True:
        found = _PART.match(rest)
        if not found:
            raise ValueError(f"{text!r} is no name; write schema or schema.table, with double quotes where needed")
        plain: str | None = found[2]
        rest = rest[found.end() :]
        if rest[:1].isspace() and '"' not in text and text.isprintable():
            needed = ".".join(map(quoted, text.split(".")))
            raise ValueError(f"{text!r} is no name; what has a blank needs double quotes: {needed}")
        if plain is not None and plain != plain.lower():
            raise ValueError(f'{text!r} has upper case; PostgreSQL folds it unless it is quoted: "{plain}"')
        if plain is not None and not _UNQUOTED.fullmatch(plain):
            raise ValueError(f"{text!r} is no name; there are no patterns; such a name needs quotes: {quoted(plain)}")
        parts.append(found[1].replace('""', '"') if plain is None else plain)
        if not rest:
            break
        if not rest.startswith(".") or len(parts) > 1:
            raise ValueError(f"{text!r} is no name; write schema or schema.table, with double quotes where needed")
        rest = rest[1:]
    if any(len(part.encode()) > 63 for part in parts):
        raise ValueError(f"{text[:80]!r} is longer than PostgreSQL's names, which have 63 bytes")
    return Target(*parts)


@dataclass(frozen=True, slots=True)
class Grant:
    """What one user has in one database. `passwords` are sealed, by the access they log in for."""

    database: str
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    admin: bool = False
    state: str | None = None
    passwords: Mapping[str, str] = field(default_factory=dict)

    def has(self, access: str) -> bool:
        """Whether it lets the user log in for that access."""
        return not self.closed and access in self.passwords and bool(getattr(self, access))

    @property
    def closed(self) -> bool:
        """Whether it opens nothing until PostgreSQL has it: a login role could still do what was taken from it."""
        return self.state in (NARROWING, REVOKING)

    @property
    def empty(self) -> bool:
        """Whether nothing is granted by it."""
        return not (self.read or self.write or self.admin)

    @property
    def rights(self) -> frozenset[tuple[str, ...]]:
        """Each right that it opens; what has fewer than before was narrowed."""
        return frozenset() if self.closed else self.recorded

    @property
    def recorded(self) -> frozenset[tuple[str, ...]]:
        """Each right in it, whether it opens something or not."""
        found = {("read", target) for target in self.read} | {("write", target) for target in self.write}
        return frozenset((self.database, *right) for right in (found | ({("admin", "")} if self.admin else set())))

    def changed_to(self, after: "Grant") -> "Grant":
        """`after`, with the state that it is in until PostgreSQL has it. A login role that keeps some of its targets
        and loses others is closed until then; one that loses all of them has no use any more."""
        if after.empty:
            return replace(after, state=REVOKING)
        taken = any(getattr(after, one) and set(getattr(self, one)) - set(getattr(after, one)) for one in _LISTS)
        return replace(after, state=NARROWING if taken or self.closed else PENDING)

    def same(self, other: "Grant") -> bool:
        """Whether both say the same, whatever key their passwords are sealed with."""
        return replace(self, passwords={}) == replace(other, passwords={})

    def without(self, before: "Grant", after: "Grant") -> "Grant":
        """Without what `after` has, and `before` had not."""
        read, write = (set(getattr(after, one)) - set(getattr(before, one)) for one in _LISTS)
        left = replace(
            self,
            read=tuple(one for one in self.read if one not in read),
            write=tuple(one for one in self.write if one not in write),
        )
        return replace(left, state=REVOKING) if left.empty else left

    def more(self, access: str, targets: tuple[str, ...]) -> "Grant":
        """With these as well. Who writes reads, too: an answer to UPDATE … WHERE is one."""
        if access == "admin":
            return replace(self, admin=True)
        wider = replace(self, read=_joined(self.read, targets))
        return wider if access == "read" else replace(wider, write=_joined(self.write, targets))

    def less(self, access: str | None, targets: tuple[str, ...]) -> "Grant":
        """Without these; without any target or access named, all of it. What is no longer read is not written."""
        read, write, admin = self.read, self.write, self.admin
        if access in (None, "read"):
            read = _without(read, targets)
        if access in (None, "read", "write"):
            write = _without(write, targets)
        if access == "admin" or (access is None and not targets):
            admin = False
        return replace(self, read=read, write=write, admin=admin)


def _joined(have: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({*have, *more}))


def _without(have: tuple[str, ...], less: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one for one in have if one not in less) if less else ()


def targets(schemas: list[str], tables: list[str]) -> tuple[str, ...]:
    """The targets that a command names, in their one spelling; all schemas where it names none."""
    found = []
    for option, texts in (("--schema", schemas), ("--table", tables)):
        for text in texts:
            if option == "--schema" and text == EVERYTHING:
                found.append(text)
                continue
            try:
                target = parse(text)
            except ValueError as problem:
                raise UsageError(f"{option}: {problem}", "such as --schema sales or --table sales.orders") from None
            if (target.table is None) != (option == "--schema"):
                raise UsageError(
                    f"{option} {text} names a {'schema' if target.table is None else 'table'}",
                    "--schema takes a schema, --table takes schema.table",
                )
            if target.schema.startswith("pg_") or target.schema == "information_schema":
                raise UsageError(f"{option} {text}: system schemas are PostgreSQL's own", "leave it out")
            found.append(str(target))
    return tuple(dict.fromkeys(found)) or (EVERYTHING,)


def read(database: str, fields: Any) -> Grant:
    """A grant from users.yaml; ValueError for what is none."""
    if not isinstance(fields, dict):
        raise ValueError(f"grants.{database}: expected {{read: […], …}}")  # noqa: TRY004 - as all readers do
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise ValueError(f"grants.{database}.{unknown[0]}: there is no such key; there are {', '.join(_FIELDS)}")
    lists = {}
    for access in _LISTS:
        value = fields.get(access, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"grants.{database}.{access}: expected a list of schemas and tables")
        lists[access] = tuple(item if item == EVERYTHING else str(parse(item)) for item in value)
    state, admin = fields.get("state"), fields.get("admin", False)
    if state not in (None, PENDING, NARROWING, REVOKING):
        raise ValueError(f"grants.{database}.state: is pending, narrowing, revoking, or left out")
    if not isinstance(admin, bool):
        raise ValueError(f"grants.{database}.admin: takes true or false")  # noqa: TRY004 - as all readers do
    passwords = {access: fields[suffix] for access, suffix in SUFFIXES.items() if suffix in fields}
    if not all(isinstance(sealed, str) for sealed in passwords.values()):
        raise ValueError(f"grants.{database}: expected sealed passwords at {', '.join(SUFFIXES.values())}")
    return Grant(database, lists["read"], lists["write"], admin, state, passwords)


def as_values(grant: Grant) -> dict[str, Any]:
    """A grant's fields as plain values, without its database."""
    values: dict[str, Any] = {}
    for access in _LISTS:
        if found := getattr(grant, access):
            values[access] = list(found)
    if grant.admin:
        values["admin"] = True
    if grant.state is not None:
        values["state"] = grant.state
    values.update({SUFFIXES[access]: grant.passwords[access] for access in ACCESSES if access in grant.passwords})
    return values


def login_role(user: str, access: str) -> str:
    """The name of the login role that a user has for an access."""
    return f"mcp_{user}_{SUFFIXES[access]}"
