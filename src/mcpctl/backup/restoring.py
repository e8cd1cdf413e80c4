"""Brings a backup back: opened, planned, and put into place while nobody else writes; or finished, where that was
interrupted."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from mcpctl import config, config_file, control, reserve
from mcpctl.backup import contents, placing
from mcpctl.backup.opening import STAGE, Backup
from mcpctl.backup.placing import Journal, Step
from mcpctl.backup.planning import Plan, end_sessions, move_aside, plan, survey
from mcpctl.backup.since import Since
from mcpctl.backup.snapshot import held, log_held
from mcpctl.config_keys import Settings
from mcpctl.errors import ConflictError, Error
from mcpctl.identity.lockdown import UNFINISHED, Lockdown
from mcpctl.identity.tokens import rfc3339
from mcpctl.state import State

_LAYOUT = tuple(Path(one, "mcpctl") for one in ("/etc", "/var/lib", "/var/log", "/var/backups", "/run"))


def check_stopped(settings: Settings) -> None:
    """Raises ConflictError (exit 5) where a server runs on these files."""
    folder = control.folder_of(settings.server.runtime_dir, settings.auth.token_file)
    pids = [pid for pid, _ in control.ask_each(folder, {"do": "keys"})] if folder.is_dir() else []
    if pids:
        raise ConflictError(
            f"a server runs on these files (pid {', '.join(map(str, pids))}), and nothing was changed",
            "stop it first: systemctl stop mcpctl; --dry-run says what would be done while it runs",
        )
    store = settings.server.state_file
    if store.exists():
        with closing(State(store)) as found:
            if not found.is_alone():
                raise ConflictError(
                    f"another process has {store} open, and nothing was changed", f"stop it first: fuser -v {store}"
                )


def near(settings: Settings) -> Path:
    """Where a backup is unpacked: beside the log, which is the largest part of it; or in the next folder above."""
    folder = settings.audit.file.parent
    while not (folder.is_dir() and os.access(folder, os.W_OK)) and folder != folder.parent:
        folder = folder.parent
    return folder if os.access(folder, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - 0700 in it


def planned(
    found: Backup, here: Settings | None, since: Since, now: datetime, *, other: bool, revoke_all: bool
) -> Plan:
    """What is to be done, `here` being the settings that hold now, if any do. `other`: what is here is another
    installation's, and is moved aside."""
    if not other:
        told = _without_removed(found, since) if here is None else []
        if here is None and not since.known:  # else the log here says that it is ours: its key is known to us alone
            _check_places(found.settings)
        done = plan(found, here or found.settings, since, now, revoke_all=revoke_all)
        done.warnings += told
        return done
    settings = here or found.settings
    _check_places(found.settings)
    steps, aside = move_aside(settings, now)
    placing.check_room(steps)
    done = plan(found, found.settings, since, now, revoke_all=revoke_all, cleared=True)
    done.steps = [*steps, *done.steps]
    if steps:
        done.warnings.append(f"what was here is kept in {aside}")
    return done


@contextmanager
def quiet(settings: Settings) -> Iterator[None]:
    """Have whoever wants to change a file of entries wait. Raises ConflictError where a server runs."""
    auth = settings.auth
    with ExitStack() as holding:
        auth.token_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        holding.enter_context(placing.alone(auth.token_file.parent))
        for path in (auth.user_file, auth.token_file, auth.tenant_file):
            if os.path.lexists(path):
                holding.enter_context(held(path))
        check_stopped(settings)
        yield


def _check_places(settings: Settings) -> None:
    """Raises ConflictError where root would write to wherever a backup's config says, such as /etc/cron.d: anybody can
    make one who knows the public key."""
    if getattr(os, "geteuid", lambda: -1)() != 0 or settings.source is None:
        return
    ours = [settings.source.parent, *_LAYOUT]
    files = [*contents.places(settings).values(), *contents.secrets(settings).values(), settings.audit.file]
    far = sorted({str(path) for path in files if not any(path.resolve().is_relative_to(one.resolve()) for one in ours)})
    if far:
        raise ConflictError(
            f"the backup's config names files outside of {settings.source.parent}, where root would write whatever is "
            f"in it: {', '.join(far)}",
            "if that is right, give that folder to the owner of the service before; or take the config out with "
            f"`age -d`, look at it, put it to {settings.source}, and restore again",
        )


def _without_removed(found: Backup, since: Since) -> list[str]:
    """Take out of the backup's config the databases that the log says were removed from it since; what to say of it."""
    path, place, told = found.files[contents.CONFIG, ""], found.settings.source, []
    for name in sorted(since.databases & found.settings.databases.keys()):
        try:
            config_file.remove(path, "databases", name, partial(_read, place))
            told.append(f"the database {name} was removed since, and is taken out of the config that comes back")
        except Error as problem:
            told.append(f"the database {name} was removed since, and is back with the config: {problem.message}")
    if told:
        found.settings = config.load(path, at=place)
    return told


def _read(place: Path | None, path: Path) -> None:
    config.load(path, at=place)


def place(done: Plan, said: str, now: datetime, *, other: bool) -> None:
    """Carry out a plan, all of it or, where anything fails, none; `finish` is to follow, outside of `quiet`."""
    settings = done.settings
    (settings.source or settings.auth.token_file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    token_file, at = settings.auth.token_file, journal_of(settings)
    sweep(done)
    ready = sorted(placing.make_ready(done.steps), key=lambda step: (step.do != placing.DROP, not _locks(step)))
    locked = (other or not Lockdown(token_file).on()) and not any(map(_locks, ready))
    journal = Journal(str(settings.source), str(token_file), tuple(ready), said, done.end_sessions, locked)
    try:
        placing.begin(at, journal)
    except BaseException:
        placing.sweep(done.steps)
        raise
    with log_held(settings.audit.file):
        placing.carry_out(journal, rfc3339(now))


def _locks(step: Step) -> bool:
    return step.do == placing.PUT and Path(step.to).name == contents.LOCKDOWN


def journal_of(settings: Settings) -> Path:
    """Where the journal of a restore of these files stands."""
    return placing.journal_of(settings.source or settings.auth.token_file, settings.auth.token_file)


def finish(journal: Journal, at: Path, now: datetime, note: Callable[[Settings, str], None]) -> None:
    """Do what is left of a restore, and have its audit line written."""
    placing.carry_out(journal, rfc3339(now))
    settings = config.load(Path(journal.config))
    if journal.end_sessions:
        end_sessions(settings)
    reserve.keep(settings.auth.token_file.parent)
    note(settings, journal.said)
    placing.end(at, journal)
    remove(unpacked(settings))  # of the one that was interrupted


def sweep(done: Plan) -> None:
    """Remove what a restore has left that was killed before it changed anything."""
    ours = {folder for step in done.steps for folder in Path(step.path).parents}
    remove(one for one in unpacked(done.settings) if one not in ours)
    placing.sweep(done.steps)


def unpacked(settings: Settings) -> list[Path]:
    """The folders that backups have been unpacked into and in which nobody is at work; one may be, in a --dry-run."""
    found = []
    for folder in sorted(near(settings).glob(f"{STAGE}*")):
        with suppress(ConflictError, OSError), placing.alone(folder):
            if not folder.is_symlink():
                found.append(folder)
    return found


def remove(folders: Iterable[Path]) -> None:
    """Remove such folders, but for one in which somebody has begun to work since."""
    for folder in folders:
        with suppress(ConflictError, OSError), placing.alone(folder):
            shutil.rmtree(folder, ignore_errors=True)


def unfinished(settings: Settings) -> Path | None:
    """The journal of a restore that was interrupted here."""
    beside = (settings.source, settings.auth.token_file)
    return next((at for at in (one.with_name(UNFINISHED) for one in beside if one) if os.path.lexists(at)), None)


__all__ = [
    "Since", "check_stopped", "finish", "journal_of", "near", "place", "planned", "quiet", "remove", "survey",
    "unfinished", "unpacked",
]  # fmt: skip
