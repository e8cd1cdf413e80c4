"""What a restore is to do, decided file by file, without doing any of it.

A file that is here stays, unless it is one of entries (tokens, users, tenants): then what it lacks comes back, but for
what was taken away. A file that is not here comes from the backup, without what the log says was taken away since. Of
two logs the longer one stays in force where one goes on from the other; else the one that is here.
"""

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcpctl import keyring, private_file
from mcpctl.audit import anchors, late
from mcpctl.audit import log as audit_log
from mcpctl.audit.parts import opened
from mcpctl.backup import contents, merging
from mcpctl.backup.merging import Reseal, Said
from mcpctl.backup.opening import Backup
from mcpctl.backup.placing import DROP, MOVE, PUT, Step
from mcpctl.backup.since import NONE, OTHER, SHORTER, Since, add_late, look
from mcpctl.backup.snapshot import LOG_NAME
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, ConflictError
from mcpctl.identity import browsers, sessions, tenants, tokens, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.keyring import Keyring
from mcpctl.state import APPLICATION, State

_ENTRIES = (contents.TOKENS, contents.USERS, contents.TENANTS)


@dataclass
class Plan:
    """`lines` is what happens to each file, in words, `warnings` what is to be known. `settings` are those that hold
    afterwards."""

    settings: Settings
    steps: list[Step] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    merged: dict[str, Said] = field(default_factory=dict)
    since: Since = field(default_factory=Since)
    tokens: int = 0
    users: int = 0
    end_sessions: bool = False


def there_already(settings: Settings) -> list[Path]:
    """The files of an installation that stand where that config says, the log's too."""
    found = [*contents.places(settings).values(), *contents.secrets(settings).values()]
    found += late.places(settings.audit.file, settings.auth.token_file.parent)
    return [path for path in dict.fromkeys(found) if os.path.lexists(path)] + _log_files(settings.audit.file)


def _log_files(path: Path) -> list[Path]:
    import contextlib

    with contextlib.ExitStack() as stack:
        return [part.path for part in opened(path, stack, [])] if path.parent.is_dir() else []


def move_aside(settings: Settings, now: datetime) -> tuple[list[Step], Path]:
    """The steps that move another installation's files out of the way, and where to. admin.dsn stays: it is root's."""
    aside = settings.auth.token_file.with_name(f"before-restore-{now:%Y%m%dT%H%M%SZ}")
    steps, names = [], set[str]()
    for path in there_already(settings):
        name = path.name if path.name not in names else f"{len(names)}-{path.name}"
        names.add(name)
        steps.append(Step(MOVE, str(path), str(aside / name)))
    store = settings.server.state_file
    return [*steps, *(Step(DROP, f"{store}{end}") for end in ("-wal", "-shm"))], aside


def check_same(found: Backup, settings: Settings) -> None:
    """Raises ConflictError (exit 5) where the backup is of another installation than the one that is here."""
    path = settings.audit.key_file
    if os.path.lexists(path) and audit_log.read_key(path) != found.key:
        raise ConflictError(
            f"this backup is of another installation ({found.manifest.installation}, of {found.manifest.host}): "
            f"{path} is another key",
            "where only `mcpctl init` was run: --other-installation moves what is here aside, and keeps it",
        )


def plan(
    found: Backup, settings: Settings, since: Since, now: datetime, *, revoke_all: bool, cleared: bool = False
) -> Plan:
    """What is to be done, with what `survey` has found. `cleared`: nothing counts that is here, since it is moved aside
    first."""
    done = Plan(settings, since=since)
    again = _resealing(found, settings, cleared)
    places = contents.places(settings)
    _end_what_is_blocked(since, places[contents.STATE])
    _plan_entries(found, done, again, cleared, now if revoke_all else None)
    for kind in (contents.CONFIG, contents.SECRET_KEY, contents.AUDIT_KEY, contents.ANCHORS, contents.LOCKDOWN):
        if kind == contents.LOCKDOWN:
            _plan_lockdown(found, done, places, cleared)
        elif kind in places:
            _plan_file(found, done, kind, "", places[kind], cleared)
    for key, path in contents.secrets(settings).items():
        _plan_secret(found, done, key, path, again, cleared)
    _plan_state(found, done, again, cleared)
    done.end_sessions = revoke_all or _is_older(done)
    _plan_log(found, done, now, cleared)
    return done


def survey(found: Backup, settings: Settings) -> Since:
    """What the log that is here says. Raises ConflictError (exit 5) where it, or its key, is of another installation
    than the backup."""
    check_same(found, settings)
    theirs = (found.stage / "log" / LOG_NAME, found.log) if found.log is not None else None
    path, since = settings.audit.file, Since()
    try:
        if path.parent.is_dir():
            since = look(path, found.key, (found.manifest.seq, found.manifest.hash), theirs)
    except ConfigError as problem:
        raise ConflictError(
            f"the audit log here is another installation's: {problem.message}",
            "--other-installation moves what is here aside, and keeps it",
        ) from None
    add_late(since, path, settings.auth.token_file.parent)
    return since


def _resealing(found: Backup, settings: Settings, cleared: bool) -> Reseal:
    """How something sealed of the backup is kept: with the newest key that is here, where there is one."""
    here, theirs = Keyring(settings.keyring.file), found.keyring
    if cleared or not os.path.lexists(here.path) or (contents.SECRET_KEY, "") not in found.files:
        return lambda text, what: text
    keys = here.keys()

    def again(text: str, what: str) -> str:
        if any(keyring.opens_alone(key, text) for key in keys):
            return text
        return here.seal(theirs.open(text, what))

    return again


# -- the files -------------------------------------------------------------------------------------------------------


def _plan_file(found: Backup, done: Plan, kind: str, key: str, place: Path, cleared: bool) -> None:
    """A file that stays as it is where there is one."""
    source = found.files.get((kind, key))
    if os.path.lexists(place) and not cleared:
        done.lines.append((str(place), _kept(place, source)))
    elif source is not None:
        done.steps.append(Step(PUT, str(source), str(place), found.mode(kind, key)))
        done.lines.append((str(place), "comes from the backup"))
        if kind == contents.CONFIG:
            done.settings = found.settings


def _kept(place: Path, source: Path | None) -> str:
    try:
        sizes = {os.stat(one).st_size for one in (place, source or place)}
        same = source is not None and len(sizes) == 1 and place.read_bytes() == source.read_bytes()
    except OSError:
        same = False
    return "stays" if same or source is None else "stays as it is here, and differs from the backup's"


def _plan_lockdown(found: Backup, done: Plan, places: Mapping[str, Path], cleared: bool) -> None:
    """It comes back where it was lost with the token file beside it, and where what is here is older than it."""
    since = done.since if done.since.earlier is None else done.since.earlier
    if not (cleared or done.since.earlier is not None or not os.path.lexists(places[contents.TOKENS])):
        return
    if since.locked is not None and (contents.LOCKDOWN, "") not in found.files:
        made = found.stage / "locked"
        when, why = since.locked
        private_file.create(made, json.dumps({"since": when, "by": "", "reason": why}).encode() + b"\n")
        found.files[contents.LOCKDOWN, ""] = made
    if (contents.LOCKDOWN, "") in found.files and not os.path.lexists(places[contents.LOCKDOWN]):
        done.warnings.append("the server was locked, and stays so: mcpctl lockdown --lift")
    _plan_file(found, done, contents.LOCKDOWN, "", places[contents.LOCKDOWN], cleared)


def _end_what_is_blocked(since: Since, store: Path) -> None:
    """A store that stays, and is older than the backup, may not know of what a canary has blocked: that ends."""
    if since.earlier is not None and os.path.lexists(store):
        for token, (at, _) in since.earlier.blocked.items():
            since.earlier.ended.setdefault(token, users.read_time(at, "at"))


def _plan_secret(found: Backup, done: Plan, key: str, place: Path, again: Reseal, cleared: bool) -> None:
    source = found.files.get((contents.SECRET, key))
    if source is not None and (cleared or not os.path.lexists(place)):
        data = private_file.read(source).data
        text = data.decode("utf-8", "replace").strip()
        if keyring.is_sealed(text) and (sealed := again(text, f"the password of {key}")) != text:
            source.write_bytes(sealed.encode() + b"\n")
    elif source is None and not os.path.lexists(place):
        done.warnings.append(f"{key}: {place} is neither here nor in the backup")
    _plan_file(found, done, contents.SECRET, key, place, cleared)


def _plan_entries(found: Backup, done: Plan, again: Reseal, cleared: bool, revoked: datetime | None) -> None:
    auth, since = done.settings.auth, done.since
    said = done.merged = {kind: Said() for kind in _ENTRIES}
    here_tokens = _here(tokens.token_file(auth.token_file), cleared)
    wanted: Any = merging.merged_tokens(found.tokens.current(), here_tokens, since, said[contents.TOKENS])
    if revoked is not None:
        wanted = merging.all_revoked(wanted, revoked)
    done.tokens = len(wanted)
    _plan_merged(done, contents.TOKENS, tokens.token_file(auth.token_file), wanted, here_tokens, found)
    here_users = _here(users.user_file(auth.user_file), cleared)
    wanted = merging.merged_users(found.users.current(), here_users, since, again, said[contents.USERS])
    done.users = len(wanted)
    _plan_merged(done, contents.USERS, users.user_file(auth.user_file), wanted, here_users, found)
    here_tenants = _here(tenants.tenant_file(auth.tenant_file), cleared)
    wanted = merging.merged_tenants(found.tenants.current(), here_tenants, since, said[contents.TENANTS])
    _plan_merged(done, contents.TENANTS, tenants.tenant_file(auth.tenant_file), wanted, here_tenants, found)


def _here(file: EntryFile[Any], cleared: bool) -> Mapping[str, Any] | None:
    if cleared or not os.path.lexists(file.path):
        return None
    try:
        return file.current()
    except ConfigError as problem:
        raise ConfigError(
            problem.message, f"mend it, or move it away ({file.path}): then it comes from the backup"
        ) from None


def _plan_merged(
    done: Plan,
    kind: str,
    file: EntryFile[Any],
    wanted: Mapping[str, Any],
    here: Mapping[str, Any] | None,
    found: Backup,
) -> None:
    said = done.merged[kind]
    if here is not None and dict(here) == dict(wanted):
        done.lines.append((str(file.path), f"stays{_told(said)}"))
        return
    source = found.stage / f"merged-{kind}"
    private_file.create(source, file.render(wanted))
    EntryFile(source, file.shape).current()
    done.steps.append(Step(PUT, str(source), str(file.path)))
    what = "comes from the backup" if here is None else f"{len(said.back)} come back" if said.back else "is changed"
    done.lines.append((str(file.path), f"{what}{_told(said)}"))


def _told(said: Said) -> str:
    parts = [(len(said.out), "stay out"), (len(said.less), "come with less"), (len(said.lost), "are lost")]
    return "".join(f", {count} {words}" for count, words in parts if count)


def _plan_state(found: Backup, done: Plan, again: Reseal, cleared: bool) -> None:
    place, store = done.settings.server.state_file, found.state
    if store is None and done.since.blocked:  # one is needed, to say so
        found.files[contents.STATE, ""] = found.stage / "state.db"
        store = State(found.files[contents.STATE, ""])
    if store is None or (os.path.lexists(place) and not cleared):
        if os.path.lexists(place):
            _check_store(place)
            done.lines.append((str(place), "stays"))
        return
    with closing(store):
        _narrow(store, done.since, again)
    done.steps += [Step(DROP, f"{place}{end}") for end in ("-wal", "-shm")]
    _plan_file(found, done, contents.STATE, "", place, True)


def _is_older(done: Plan) -> bool:
    """Whether a store stays that may be older than the backup: who has signed out since is signed in there."""
    earlier = done.since.earlier
    if earlier is None or not os.path.lexists(done.settings.server.state_file):
        return False
    done.warnings.append("what is here may be older than the backup, so all sessions end")
    for user, name in sorted(earlier.unregistered):
        done.warnings.append(f"{user}'s {name} was removed before the backup: mcpctl database unregister {user} {name}")
    return True


def _check_store(place: Path) -> None:
    """What stays has to be one. It is only looked at, whatever its form."""
    with open(private_file.open_checked(place, os.O_RDONLY), "rb") as file:
        head = file.read(72)  # sqlite.org/fileformat.html, 1.3
    ours = head.startswith(b"SQLite format 3\0") and head[68:] == APPLICATION.to_bytes(4, "big")
    if not ours:
        raise ConfigError(
            f"{place} is not a store of mcpctl's, and nothing was changed",
            f"move it away, with {place.name}-wal and {place.name}-shm: then it comes from the backup",
        )


def _narrow(store: State, since: Since, again: Reseal) -> None:
    """Take out of the backup's store what was taken away since. No line tells who has left a browser, or was made to:
    everybody signs in again."""
    browsers.forget(store, None)
    of = sessions.Sessions(store, {})
    of.end(since.closed)
    for user in since.gone | since.passwords:
        of.end_of(user)
    with store.change() as connection:
        connection.executemany("DELETE FROM own_databases WHERE user = ? AND name = ?", sorted(since.unregistered))
        connection.executemany("DELETE FROM own_databases WHERE user = ?", [(user,) for user in since.gone])
        rows = connection.execute("SELECT user, name, sealed FROM own_databases").fetchall()
        sealed = [(again(text, f"the password of {user}'s {name}"), user, name) for user, name, text in rows]
        connection.executemany("UPDATE own_databases SET sealed = ? WHERE user = ? AND name = ?", sealed)
        connection.executemany(
            "UPDATE guests SET disabled = coalesce(disabled, ?) WHERE name = ?",
            [(when.timestamp(), name) for name, when in since.disabled.items()],
        )
        connection.executemany(
            "INSERT OR IGNORE INTO blocked VALUES (?, ?, ?)",
            [(token, at, why) for token, (at, why) in since.blocked.items()],
        )
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")


def end_sessions(settings: Settings) -> int:
    """End every session in the store, and forget every browser in which somebody is signed in; how many they were."""
    if not settings.server.state_file.exists():
        return 0
    with closing(State(settings.server.state_file, must_exist=True)) as store:
        of = sessions.Sessions(store, {})
        ended = of.end(name for name, (_, over) in of.records().items() if not over)
        with store.change() as connection:
            _forget(connection)
    return len(ended)


def _forget(connection: sqlite3.Connection) -> None:
    for table in ("browsers", "oauth_codes"):
        connection.execute(f"DELETE FROM {table}")  # noqa: S608 - of constants


# -- the log ---------------------------------------------------------------------------------------------------------


def _plan_log(found: Backup, done: Plan, now: datetime, cleared: bool) -> None:
    path, relation = done.settings.audit.file, NONE if cleared else done.since.relation
    theirs = {key: source for (kind, key), source in found.files.items() if kind == contents.LOG}
    stamp = f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"
    if relation == OTHER:
        beside = path.parent / f"log-of-backup-{stamp}"
        done.steps += [Step(PUT, str(one), str(beside / f"{LOG_NAME}{end}")) for end, one in theirs.items()]
        done.lines.append((str(path), f"stays; the backup's is kept in {beside}"))
        done.warnings.append("the audit log here does not go on from the backup's: both are kept, this one in force")
        return
    if relation in (NONE, SHORTER):
        if relation == SHORTER:
            beside = path.parent / f"log-before-restore-{stamp}"
            done.steps += [Step(MOVE, str(one), str(beside / one.name)) for one in _log_files(path)]
            done.warnings.append(f"the audit log here ended before the backup's: it is kept in {beside}")
        done.steps += [Step(PUT, str(one), f"{path}{end}") for end, one in theirs.items()]
        if theirs:
            done.lines.append((str(path), f"comes from the backup, up to line {found.manifest.seq}"))
            _look_at_anchors(found, done, cleared)
        return
    done.lines.append((str(path), "stays: it goes on from the backup's" if done.since.known else "stays"))


def _look_at_anchors(found: Backup, done: Plan, cleared: bool) -> None:
    """Whether anchors, which are kept on another disk, know of lines that are lost."""
    path = done.settings.audit.anchor_file
    if path is None or cleared or not os.path.lexists(path):
        return
    far = max((one.seq for one in anchors.read_file(found.key, path)[0]), default=0)
    if far > found.manifest.seq:
        done.warnings.append(
            f"{path} knows of lines up to {far}, which are lost with the log that was here: `mcpctl audit verify` will "
            "say so until you keep that file elsewhere"
        )
