"""An installation as the doctor sees it, and what is found about it."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

from mcpctl.audit import log as audit_log
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, UnavailableError
from mcpctl.granting import Granting
from mcpctl.keyring import Keyring

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
STATVFS = getattr(os, "statvfs", None)
UNITS = tuple(map(Path, ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")))
"""Where an installed unit is, the first that has it (systemd.unit(5), "Unit File Load Path")."""
_MANY = 6
_SAID = 300


@dataclass(frozen=True)
class Mend:
    """What `--fix` does about a finding: in words, and the work itself, which raises an Error where it cannot."""

    words: str
    work: Callable[[], object]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, which stays, how it is, and what to do. `cause` is a text that tells the
    same fault where another check meets it."""

    name: str
    check: str
    status: str
    what: str
    hint: str | None = None
    mend: Mend | None = field(default=None, compare=False)
    cause: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Check:
    """What is looked at: a kind, and of several of that kind which."""

    kind: str
    about: str | None = None

    @property
    def title(self) -> str:
        """How a table names it."""
        return f"{self.kind} {self.about}" if self.about is not None else self.kind.replace("-", " ")

    def ok(self, what: str) -> Finding:
        """It is as it should be."""
        return Finding(self.kind, self.title, OK, what)

    def skip(self, what: str, hint: str | None = None) -> Finding:
        """It was not looked at, and why."""
        return Finding(self.kind, self.title, SKIP, what, hint)

    def warn(self, name: str, what: str, hint: str, mend: Mend | None = None) -> Finding:
        """Something to know, and to do."""
        return Finding(name, self.title, WARN, what, hint, mend)

    def fail(self, name: str, what: str, hint: str, mend: Mend | None = None, cause: str | None = None) -> Finding:
        """Something that is wrong."""
        return Finding(name, self.title, FAIL, what, hint, mend, cause)

    def broken(self, problem: Error) -> Finding:
        """The check met what it cannot go on with."""
        hint = problem.hint or "mend that, and look again"
        name = "unreachable" if isinstance(problem, UnavailableError) else "broken"
        return Finding(f"{self.kind}.{name}", self.title, FAIL, problem.message, hint, cause=problem.message)


@dataclass
class Patient:
    """`dsns` are the administrator's, `admin` their file; `admin_unread`: it could not be read. `pruned`: of the
    configuration no more is known than what an incident needs. With a `token` of somebody's calls are made. `now` is
    when the visit began; `disk` asks a file system for its room, as statvfs(3) does; `units` are the folders of
    systemd's units."""

    settings: Settings
    dsns: Mapping[str, str]
    admin: Path | None
    now: datetime
    environ: Mapping[str, str]
    disk: Callable[[Path], Any] | None = STATVFS
    units: tuple[Path, ...] = UNITS
    admin_unread: bool = False
    pruned: bool = False
    token: str | None = field(default=None, repr=False)
    begun: float = field(default_factory=monotonic)

    def present(self) -> datetime:
        """The time now, by the clock that `now` was read from."""
        return self.now + timedelta(seconds=monotonic() - self.begun)

    def granting(self) -> Granting:
        """Its grants."""
        key = audit_log.read_key(self.settings.audit.key_file)
        return Granting(self.settings, Keyring(self.settings.keyring.file), audit_log.installation(key))


def some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _MANY} more" if len(every) > _MANY else ""
    return ", ".join(every[:_MANY]) + more


def short(problem: object) -> str:
    """What went wrong, in one line that is not too long."""
    return " ".join(str(problem).split())[:_SAID]
