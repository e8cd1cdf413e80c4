"""What the audit log that is here says was taken away since a backup was made: that stays away."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl.audit import files as log_files
from mcpctl.audit import late
from mcpctl.audit.anchors import Anchor
from mcpctl.audit.parts import Chosen, UnreadError
from mcpctl.audit.verify import Report, walk
from mcpctl.backup.snapshot import ANY_BEGINNING, chosen_of
from mcpctl.identity.users import read_time, rfc3339

_WANTED = re.compile(
    rb'"event":"(?:token\.(?:revoked|expired|removed|rotated|added|blocked|unblocked)|session\.closed|tenant\.removed|'
    rb"user\.(?:removed|disabled|enabled|roles|password|unlinked)|grant\.(?:removed|printed)|"
    rb'database\.unregistered|config\.database_(?:added|removed)|server\.(?:locked|unlocked)|audit\.lost)"'
)
SAME, SHORTER, OTHER, NONE = "same", "shorter", "other", "none"
"""What the log here is to the backup's: it goes on from it; it is a beginning of it; neither; there is none."""


@dataclass
class Since:
    """`known`: the log here goes on from the backup's last line without a gap, so that whatever it does not tell of did
    not happen. Else what it tells counts all the same. `earlier` is what the backup's log tells after the end of the
    log here, where that is SHORTER: what is here may be as old as its log."""

    relation: str = NONE
    known: bool = False
    report: Report | None = None
    ended: dict[str, datetime] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)
    blocked: dict[str, tuple[str, str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    disabled: dict[str, datetime] = field(default_factory=dict)
    roles: set[str] = field(default_factory=set)
    passwords: set[str] = field(default_factory=set)
    unlinked: set[str] = field(default_factory=set)
    grants: set[tuple[str, str]] = field(default_factory=set)
    tenants: set[str] = field(default_factory=set)
    unregistered: set[tuple[str, str]] = field(default_factory=set)
    databases: set[str] = field(default_factory=set)
    locked: tuple[str, str] | None = None
    earlier: "Since | None" = None


def look(path: Path, key: bytes, last: tuple[int, str], theirs: "tuple[Path, Report] | None") -> Since:
    """Hold the log at `path` against a backup whose log ended with `last`, number and hash, and stands in `theirs`.
    ConfigError where it is of another key."""
    found = Since()
    with ExitStack() as stack:
        chosen = chosen_of(path, stack)
        if not chosen.parts and not chosen.unread:
            return found
        anchors = [Anchor(last[0], last[1].encode("ascii"), None, "the backup")] if last[0] else []
        report = found.report = walk(path, chosen, key, anchors, ANY_BEGINNING)
        found.relation = _relation(report, last[0], key, theirs)
        if found.relation == SHORTER and theirs is not None:
            found.earlier = _told_by(theirs[0], report.last)
            return found
        whole = report.fault is None and (report.anchored == last[0] if last[0] else report.first == 1)
        after = last[0] if whole else 0
        lost = False
        for line in _lines(chosen, after):
            lost |= line.get("event") == "audit.lost"
            _add(found, line)
        found.known = whole and not lost
    return found


def _told_by(path: Path, after: int) -> Since:
    found = Since()
    with ExitStack() as stack:
        for line in _lines(chosen_of(path, stack), after):
            _add(found, line)
    return found


def add_late(found: Since, path: Path, spare: Path) -> None:
    """Add what commands have done while the log could not be written, which waits beside it."""
    for event, fields in late.kept(path, spare):
        found.known &= event != "audit.lost"
        _add(found, {"event": event, **fields})


def _relation(report: Report, last: int, key: bytes, theirs: "tuple[Path, Report] | None") -> str:
    if report.fault is None:
        return SAME
    if report.fault.kind != "cut" or theirs is None or not report.last or report.last >= last:
        return OTHER
    end = Anchor(report.last, report.hash.encode("ascii"), None, "the log here")
    path, _ = theirs
    with ExitStack() as stack:
        there = walk(path, chosen_of(path, stack), key, [end], ANY_BEGINNING)
    return SHORTER if there.fault is None and there.anchored == report.last else OTHER


def _lines(chosen: Chosen, after: int) -> Iterator[dict[str, Any]]:
    for part in chosen.parts:
        try:
            for line in part.lines():
                if _WANTED.search(line):
                    found = log_files.parsed(line)
                    if log_files.number(found) > after:
                        yield found
        except UnreadError:  # the report says it
            continue


def _add(found: Since, line: dict[str, Any]) -> None:
    event = str(line.get("event"))
    token, user = str(line.get("token") or ""), str(line.get("user") or "")
    if not _WANTED.match(f'"event":"{event}"'.encode()) or event == "audit.lost":  # of those that wait beside the log
        return
    when = _when(line)
    if event in ("token.revoked", "token.expired", "token.rotated"):
        found.ended.setdefault(token, when)  # of a rotated one with an overlap nobody knows how long that was
    elif event == "token.removed":
        found.removed.add(token)
    elif event == "token.added":
        found.added.add(token)
    elif event == "token.blocked":
        found.blocked[token] = (rfc3339(when), str(line.get("reason") or "a canary"))
    elif event == "token.unblocked":
        found.blocked.pop(token, None)
    elif event == "session.closed":
        found.closed.add(token)
    elif event == "tenant.removed":
        found.tenants.add(str(line.get("tenant") or ""))
    elif event.startswith("config."):
        change = found.databases.add if event == "config.database_removed" else found.databases.discard
        change(str(line.get("database") or ""))
    elif event.startswith("server."):
        found.locked = (rfc3339(when), str(line.get("reason") or "")) if event == "server.locked" else None
    elif event == "database.unregistered":
        found.unregistered.add((user, str(line.get("database") or "").removeprefix("own:")))
    elif event.startswith("grant."):
        found.grants.add((user, str(line.get("database") or "")))
    else:
        _add_user(found, event, user, when)


def _add_user(found: Since, event: str, user: str, when: datetime) -> None:
    if event == "user.removed":
        found.gone.add(user)
    elif event == "user.disabled":
        found.disabled[user] = when
    elif event == "user.enabled":
        found.disabled.pop(user, None)
    elif event == "user.roles":
        found.roles.add(user)
    elif event == "user.password":
        found.passwords.add(user)
    elif event == "user.unlinked":
        found.unlinked.add(user)


def _when(line: dict[str, Any]) -> datetime:
    return read_time(line.get("happened_at") or line.get("time"), "time")
