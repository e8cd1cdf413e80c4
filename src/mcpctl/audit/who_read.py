"""Whose statements touched a table, by the relations that PostgreSQL's own plan named: never by a statement's text."""

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mcpctl.audit.log import MORE
from mcpctl.audit.reading import Reading, Tally, outcome_of, shortened
from mcpctl.errors import UsageError
from mcpctl.identity import grants

ASKING = ("query_database", "explain_query", "execute_statement")
"""The tools that take a statement."""
KEPT = 1000
"""Statements that are kept to be shown, the last ones; the others are counted."""
_DATABASE = re.compile(r"(?:own:)?[a-z][a-z0-9_-]{0,62}")
_BEFORE = re.compile(r"(own:[a-z][a-z0-9_-]{0,62}|(?!own:)[a-z][a-z0-9_-]{0,62}):(.+)", re.DOTALL)
"""A database and what is in it, as the log and `audit top` have them."""
_MORE = f'{MORE}"'.encode()
_MARK = b',"relations":['
"""In an audit line only a key can look so: within a text each quote has a backslash before it."""


@dataclass(frozen=True)
class Target:
    """A table, or all of a schema (table None), in one database or any."""

    schema: str
    table: str | None
    database: str | None = None

    @property
    def name(self) -> str:
        """As PostgreSQL named it to the log: without quotes; for a schema its beginning."""
        return f"{self.schema}.{self.table or ''}"

    def names(self, relation: str) -> bool:
        """Whether that relation is it. A dot within a quoted name is not told from one between names."""
        return relation == self.name if self.table is not None else relation.startswith(self.name)


def parse(text: str, database: str | None) -> Target:
    """`schema.table`, `schema.*`, or either with a database before it, and a dot or a colon. Raises UsageError."""
    if (named := _BEFORE.fullmatch(text)) and database in (None, named[1]):
        database, text = named[1], named[2]
    whole = text.endswith(".*")
    body = text[:-2] if whole else text
    try:
        return _parsed(body, whole, database)
    except ValueError as problem:
        head, _, rest = body.partition(".")
        if database is None and _DATABASE.fullmatch(head) and rest:
            try:
                return _parsed(rest, whole, head)
            except ValueError:
                pass
        raise UsageError(str(problem), "such as sales.orders, sales.*, or shop.sales.orders") from None


def _parsed(body: str, whole: bool, database: str | None) -> Target:
    found = grants.parse(body)
    if whole and found.table is not None and database is None and _DATABASE.fullmatch(found.schema):
        return Target(found.table, None, found.schema)
    if whole == (found.table is not None):
        raise ValueError(f"{body!r} names no table" if not whole else f"{body!r} is no schema")
    return Target(found.schema, found.table, database)


@dataclass
class Found:
    """Who touched it, by (user, token, database); the last statements; and by outcome the other statements of
    which PostgreSQL never named all tables, `unknown`, with the first and the last of them. `named`: the target's
    database stands in a line."""

    statements: deque[dict[str, Any]]
    who: dict[tuple[str | None, str | None, str | None], Tally] = field(default_factory=dict)
    more: int = 0
    named: bool = False
    unknown: Counter[str] = field(default_factory=Counter)
    unknown_when: Tally = field(default_factory=Tally)


def search(reading: Reading, target: Target, kept: int = KEPT) -> Found:
    """Look through the log, and keep the last statements."""
    found = Found(deque(maxlen=kept))
    needle = json.dumps(target.name)[1 : None if target.table is not None else -1].encode()

    name = json.dumps(target.database or "")[1:-1].encode()
    asked = re.compile(rb',"database":"(?:[^"]*,)?%s[",]' % re.escape(name))
    found.named = target.database is None

    def wanted(line: bytes) -> bool:
        found.named = found.named or asked.search(line) is not None
        return needle in line or _MORE in line if _MARK in line else b',"role":"' in line

    for line in reading.lines(wanted):
        touched = _touched(line, target)
        if not touched and _unknown(line, target):
            found.unknown[outcome_of(line)] += 1
            found.unknown_when.add(line)
        for database in touched:
            who = (_name(line, "user"), _name(line, "token"), database)
            found.who.setdefault(who, Tally()).add(line)
            found.more += len(found.statements) == kept
            found.statements.append({**shortened(line), "database": database})
    return found


def _unknown(line: dict[str, Any], target: Target) -> bool:
    """Whether a line is of a statement that came to PostgreSQL and of which nobody knows all that it read."""
    if "relations" in line:
        return any(one == MORE and target.database in (None, name) for name, one in databases(line))
    asked = str(line.get("database", "")).split(",")
    if target.database is not None and target.database not in asked:
        return False
    return line.get("tool") in ASKING and "role" in line


def _name(line: dict[str, Any], field: str) -> str | None:
    """A field's text, also where somebody has put something else there."""
    value = line.get(field)
    return None if value is None else str(value)


def databases(line: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """(database, relation) of each relation of a line."""
    asked = _name(line, "database")
    names = str(asked).split(",")
    relations = line.get("relations")
    for relation in map(str, relations if isinstance(relations, list) else ()):
        fitting = (one for one in names if len(names) > 1 and relation.startswith(f"{one}:"))
        name = max(fitting, key=len, default=None)  # `own:lab`, where a database is called `own`
        yield (asked, relation) if name is None else (name, relation[len(name) + 1 :])


def _touched(line: dict[str, Any], target: Target) -> list[str | None]:
    """The databases in which a line touched the target, each once."""
    found = [name for name, relation in databases(line) if target.names(relation)]
    return [name for name in dict.fromkeys(found) if target.database in (None, name)]
