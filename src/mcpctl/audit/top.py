"""Calls and refusals of the log, counted by who or what they concern."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mcpctl.audit.reading import Reading, Tally, reason_of
from mcpctl.audit.who_read import databases

BY = ("user", "token", "ip", "tool", "database", "table", "reason")
_KEYS = {"user": "user", "token": "token", "ip": "client_ip", "tool": "tool", "database": "database"}
MOST = 10_000
"""Different ones that are counted; what comes after is one."""
OTHERS = "(others)"
_CALLS = (b'"event":"tool.', b'"event":"auth.refused"')


@dataclass
class Counted(Tally):
    """The same, and how many of them were refused or cut."""

    refused: int = 0


def count(reading: Reading, by: str) -> dict[str, Counted]:
    """Count the calls, and the refusals of credentials; by `reason` the refusals alone. A line that stands for many
    refusals counts as many."""
    found: dict[str, Counted] = {}
    for line in reading.lines(lambda line: any(mark in line for mark in _CALLS)):
        bad = str(line.get("event", "")).endswith(".refused")
        if by == "reason" and not bad:
            continue
        for key in dict.fromkeys(_keys(line, by)):
            if key not in found and len(found) >= MOST:
                key = OTHERS  # a stranger can make up as many as he likes
            one = found.setdefault(key, Counted())
            before = one.count
            one.add(line)
            one.refused += one.count - before if bad else 0
    return found


def _keys(line: dict[str, Any], by: str) -> Iterator[str]:
    if by == "table":
        yield from (f"{database}:{relation}" for database, relation in databases(line))
    elif by == "reason":
        yield reason_of(line)
    elif (value := line.get(_KEYS[by])) is not None:
        yield str(value)
