"""Everything that a token, or a user, did by the log: gathered in one pass, whatever its length in bounded memory."""

import json
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from mcpctl.audit.reading import Reading, Tally, outcome_of, reason_of, shortened
from mcpctl.audit.who_read import databases

MOST = 500
"""Different addresses, tables, reasons and so on that are told apart; what comes after is one."""
STATEMENTS = 500
"""Statements that are kept, the last ones."""
OTHERS = "(others)"


class Counted(dict[Any, Tally]):
    """Tallies by what they are of, bounded."""

    def add(self, key: Hashable, line: dict[str, Any]) -> None:
        """Count a line for that."""
        known = key if key in self or len(self) < MOST else OTHERS
        self.setdefault(known, Tally()).add(line)


@dataclass
class Facts:
    """What the log says. `used` are calls and sign-ins, `strangers` the addresses that were refused; `events` what
    else happened to it, of `happened`; `statements` the last of `asked`, `settings` of `changed`."""

    used: Tally = field(default_factory=Tally)
    users: Counted = field(default_factory=Counted)
    tokens: Counted = field(default_factory=Counted)
    calls: Counted = field(default_factory=Counted)
    addresses: Counted = field(default_factory=Counted)
    strangers: Counted = field(default_factory=Counted)
    tables: Counted = field(default_factory=Counted)
    roles: Counted = field(default_factory=Counted)
    backends: Counted = field(default_factory=Counted)
    refusals: Counted = field(default_factory=Counted)
    settings: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST))
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST))
    statements: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=STATEMENTS))
    asked: int = 0
    happened: int = 0
    changed: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        event = str(line.get("event"))
        for name, counted in (("user", self.users), ("token", self.tokens)):
            if (value := line.get(name)) is not None:
                counted.add(str(value), line)
        if event.endswith(".refused"):
            self.refusals.add(reason_of(line), line)
        if (address := line.get("client_ip")) is not None:
            (self.strangers if event == "auth.refused" else self.addresses).add(str(address), line)
        if event == "auth.ok" or event.startswith("tool."):
            self.used.add(line)
        if event.startswith("tool."):
            self._add_call(line)
        elif event != "auth.ok":
            self.happened += 1
            self.events.append(line)

    def _add_call(self, line: dict[str, Any]) -> None:
        self.calls.add((str(line.get("tool", "(any)")), outcome_of(line)), line)
        for one in databases(line):
            self.tables.add(one, line)
        if (role := line.get("role")) is not None:
            self.roles.add((str(line.get("database")), str(role)), line)
        if isinstance(pid := line.get("backend_pid"), int):
            self.backends.add(pid, line)
        if "statement" in line or "statement_hmac" in line:
            self.asked += 1
            self.statements.append(shortened(line))
        if line.get("tool") == "set_pg_configuration" and line.get("event") != "tool.refused":
            self.changed += 1
            self.settings.append(line)


def gather(reading: Reading, token: str | None, user: str | None) -> Facts:
    """What the log says of that token, that user, or that token as that user's."""
    facts = Facts()
    marks = [f'"{name}":{json.dumps(value)}'.encode() for name, value in (("token", token), ("user", user)) if value]
    replaced = f"replaced by {token}" if token else None

    def wanted(line: bytes) -> bool:
        return all(mark in line for mark in marks) or (replaced is not None and replaced.encode() in line)

    for line in reading.lines(wanted):
        own = token in (None, line.get("token")) and user in (None, line.get("user"))
        if own or (line.get("event") == "token.rotated" and replaced and replaced in str(line.get("reason"))):
            facts.add(line)
    return facts
