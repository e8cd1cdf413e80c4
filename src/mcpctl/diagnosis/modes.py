"""Modes, owners, folders, and what a stopped process has left behind."""

import os
import shlex
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mcpctl import control, keyring, private_file, reserve
from mcpctl.audit import late
from mcpctl.config_keys import Settings
from mcpctl.diagnosis.patient import Check, Finding, Mend, Patient, some
from mcpctl.errors import ConfigError, Error
from mcpctl.postgres import administrator

CONFIG_MODE = 0o640
_PRIVATE = 0o600
_OTHERS_WRITE = 0o022
_OLD = 3600
"""Seconds after which nobody writes a file any more that somebody has begun."""


def modes(patient: Patient) -> Iterator[Finding]:
    """Whether anybody else may read or write what is mcpctl's, and whether it belongs to who serves."""
    if not private_file.POSIX:
        return
    check, found = Check("modes"), list(_files(patient.settings))
    for folder in _folders(patient.settings):
        yield from _folder(check, folder)
    wrong = [one for path, mode in found for one in mode_of(check, path, mode, patient.settings)]
    yield from wrong
    yield from _of_certificate(check, patient.settings)
    if not wrong:
        yield check.ok(f"owners and modes of {len(found)} files are as they must be")


def mode_of(check: Check, path: Path, most: int, settings: Settings | None = None) -> Iterator[Finding]:
    """The owner and the mode of one file. Only what others may read is mended: who could write it may have."""
    try:
        about = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISREG(about.st_mode):
        return
    mode, named = stat.S_IMODE(about.st_mode), shlex.quote(str(path))
    if about.st_uid not in (os.geteuid(), *([0] if _may_be_roots(path, settings) else [])):
        what = f"{path} belongs to another user (uid {about.st_uid}, and mcpctl's files are uid {os.geteuid()}'s)"
        hint = f"look at what is in it, then: chown --reference={shlex.quote(str(path.parent))} {named}"
        yield check.fail("modes.owner", what, hint, cause=str(path))
    if extra := mode & ~most & 0o777:
        what = f"{path} has mode {mode:04o}, and may have {most:04o} at most"
        if extra & _OTHERS_WRITE:
            hint = f"others could write it: look at what is in it, then: chmod {most:04o} {named}"
            yield check.fail("modes.written", what, hint, cause=str(path))
            return
        ours = about.st_uid == os.geteuid()
        mend = Mend(f"chmod {mode & most:04o} {path}", partial(_close, path, most)) if ours else None
        hint = f"chmod {most:04o} {named}; who else is on this machine may have read it"
        yield check.fail("modes.open", what, hint, mend, cause=str(path))


def _may_be_roots(path: Path, settings: Settings | None) -> bool:
    return settings is None or path in (settings.source, settings.keyring.file)


def _close(path: Path, most: int) -> None:
    """Takes rights away, and never follows a link, nor reaches a file that has another name, too."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise Error(f"{path}: {problem.strerror}", "do it by hand") from None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_uid != os.geteuid():
            raise Error(f"{path} is no file of ours alone", "look at it with ls -l, and do it by hand")
        os.fchmod(fd, stat.S_IMODE(about.st_mode) & most)
    finally:
        os.close(fd)


def _files(settings: Settings) -> Iterator[tuple[Path, int]]:
    """Every file of the installation, with the most that its mode may be."""
    if settings.source is not None:
        yield settings.source, CONFIG_MODE
    auth, audit = settings.auth, settings.audit
    yield from ((one, _PRIVATE) for one in (auth.token_file, auth.user_file, auth.tenant_file, audit.key_file))
    if "CREDENTIALS_DIRECTORY" not in os.environ:
        yield settings.keyring.file, _PRIVATE
    yield from ((one, _PRIVATE) for one in (settings.server.state_file, audit.file, *late.places(audit.file, None)))
    yield from ((one, _PRIVATE) for one in sorted(audit.file.parent.glob(f"{audit.file.name}[.-]*")))
    secrets = [audit.anchor_file]
    for database in settings.databases.values():
        secrets += [database.password_file, database.service_password_file, database.sslkey]
    for issuer in auth.oidc.values():
        secrets += [issuer.introspection.client_secret_file]
    for client in auth.oauth.clients.values():
        secrets += [client.secret_file]
    yield from ((one, _PRIVATE) for one in dict.fromkeys(secrets) if one is not None and not keyring.rules(one))


def _of_certificate(check: Check, settings: Settings) -> Iterator[Finding]:
    """Who may read the certificate's key, and write the certificate. A group may read the key, as Debian's ssl-cert."""
    tls = settings.server.tls
    for path, bad, name in ((tls.key, 0o027, "modes.tls-key"), (tls.cert, 0o022, "modes.certificate")):
        if path is None or not path.exists():
            continue
        about = path.stat()
        if not about.st_mode & bad:
            continue
        mode = stat.S_IMODE(about.st_mode)
        what = f"{path} has mode {mode:04o}: others may {'read or ' if bad & 4 else ''}write it"
        ours = about.st_uid == os.geteuid() and not about.st_mode & _OTHERS_WRITE
        mend = Mend(f"chmod {mode & ~bad:04o} {path}", partial(_close, path, ~bad)) if ours else None
        named = shlex.quote(str(path))
        hint = f"chmod 0600 {named}; take a new key, if somebody else has an account here" if bad & 4 else ""
        yield check.fail(name, what, hint or f"look at what is in it, then: chmod 0644 {named}", mend, cause=str(path))


def _folders(settings: Settings) -> list[Path]:
    """Where something is written."""
    server = settings.server
    folders = [settings.auth.token_file.parent, settings.audit.file.parent, server.state_file.parent]
    return list(dict.fromkeys([*folders, *([server.runtime_dir] if server.runtime_dir else [])]))


def _folder(check: Check, folder: Path) -> Iterator[Finding]:
    named = shlex.quote(str(folder))
    if not os.path.lexists(folder):
        mend = Mend(f"mkdir -m 0700 {folder}", partial(_make, folder)) if folder.parent.is_dir() else None
        yield check.fail("modes.no-folder", f"there is no folder {folder}", f"install -d -m 0700 {named}", mend)
        return
    if wrong := list(_open_folder(check, folder)):
        yield from wrong
        return
    about = folder.stat()
    if about.st_mode & 0o020 and about.st_uid == os.geteuid():
        what = f"the group of {folder} (gid {about.st_gid}) can put other files in the place of those in it"
        yield check.warn("modes.folder-group", what, f"look at what is in it, then: chmod g-w {named}")


def _open_folder(check: Check, folder: Path) -> Iterator[Finding]:
    """A folder that anybody may write to, or that is below one."""
    try:
        private_file.check_folder(folder)
    except ConfigError as problem:
        hint = f"others could put files there: look at what is in it, then: {problem.hint}"
        at = problem.message.partition(", which holds")[0]
        what = problem.message.replace(", which holds mcpctl's files,", "")
        yield check.fail("modes.folder", what, hint, cause=f"{at}, which holds")
    except OSError:
        return  # whoever needs it says so


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except OSError as problem:
        raise Error(f"cannot make {folder}: {problem.strerror}", "do it by hand, as root") from None


def leftovers(patient: Patient) -> Iterator[Finding]:
    """What a process that was killed has left, and the room that is kept for a full disk."""
    settings, check = patient.settings, Check("leftovers")
    folder = settings.auth.token_file.parent
    if halves := _halves(settings, patient.now.timestamp()):
        mend = Mend(f"rm {some(map(str, halves))}", partial(_remove, halves))
        what = f"half written, by somebody who was stopped: {some(map(str, halves))}"
        yield check.warn("leftovers.halves", what, f"the files themselves are whole: rm {halves[0]}", mend)
    runtime = control.folder_of(settings.server.runtime_dir, settings.auth.token_file)
    if dead := [one for one in control.sockets(runtime) if control.is_dead(one)]:
        mend = Mend(f"rm {some(map(str, dead))}", partial(control.sweep, runtime))
        what = f"control sockets of servers that are gone: {some(one.name for one in dead)}"
        yield check.warn("leftovers.sockets", what, "the next server that starts removes them", mend)
    if hasattr(os, "posix_fallocate") and folder.is_dir() and not reserve.there(folder):
        what = f"no room is kept for a full disk: {reserve.of(folder)} is not there"
        hint = "make room on that disk: the next change of a token or user makes it"
        yield check.warn("leftovers.no-reserve", what, hint, Mend(f"made {reserve.of(folder)}", partial(_keep, folder)))


def _halves(settings: Settings, now: float) -> list[Path]:
    auth, found = settings.auth, []
    for file in (auth.token_file, auth.user_file, auth.tenant_file, settings.keyring.file):
        for one in sorted(file.parent.glob(f".{file.name}.*.tmp")):
            about = one.lstat()
            if stat.S_ISREG(about.st_mode) and now - about.st_mtime > _OLD:
                found.append(one)
    return found


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as problem:
            raise Error(f"cannot remove {path}: {problem.strerror}", "do it by hand") from None


def _keep(folder: Path) -> None:
    reserve.keep(folder)
    if not reserve.there(folder):
        raise Error(f"{reserve.of(folder)} could not be made", "make room on that disk")


def admin_file(patient: Patient) -> Iterator[Finding]:
    """Whether the server could read the administrator's file."""
    admin, check = patient.admin, Check("administrator")
    if admin is None or not admin.exists() or not os.access(admin, os.R_OK):
        return
    if admin.stat().st_uid == patient.settings.auth.token_file.stat().st_uid:
        yield check.warn(
            "administrator.owner",
            f"{admin} belongs to the user whom the server runs as, who could make roles with it",
            "for one person's own installation that is so; else: chown root, and run the server as another user",
        )


def early(source: Path | None) -> Iterator[Finding]:
    """What is to be seen of the config and the administrator's file before either is read, and root is given up."""
    if source is None or not private_file.POSIX:
        return
    yield from _open_folder(Check("modes"), source.parent)
    for path, most in ((source, CONFIG_MODE), (source.parent / administrator.FILE, _PRIVATE)):
        try:
            ours = path.lstat().st_uid == os.geteuid()
        except OSError:
            continue
        if ours:
            yield from mode_of(Check("modes"), path, most)
