"""Makes a backup: a snapshot, encrypted into a file that is there as a whole or not at all."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from mcpctl import private_file
from mcpctl.audit.log import installation
from mcpctl.backup import age, archive, names, snapshot
from mcpctl.backup.archive import Manifest
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, ConflictError
from mcpctl.identity.users import rfc3339


@dataclass(frozen=True)
class Made:
    """What was written. `removed` are the older ones that went with it."""

    path: Path
    size: int
    sha256: str
    manifest: Manifest
    missing: tuple[Path, ...]
    fault: str | None
    removed: tuple[Path, ...] = ()


def make(
    settings: Settings, to: age.Recipients | age.Passphrase, path: Path, now: datetime, about: tuple[str, str]
) -> Made:
    """Write a backup to `path`, where there is nothing yet (else ConflictError); `about` is (version, host)."""
    if os.path.lexists(path):
        raise ConflictError(f"{path} exists already", "it is left as it is; choose another name")
    with ExitStack() as stack:
        found = snapshot.take(settings, stack)
        log = found.log
        manifest = Manifest(
            about[0], rfc3339(now), about[1], installation(found.key), found.tokens, found.users,
            log.last if log else 0, log.hash if log else "", log is None or log.fault is None,
            tuple(file.entry for file in found.files),
        )  # fmt: skip
        with _whole(path) as fd:
            with age.encrypting(to, fd) as sink:
                archive.write(sink, manifest, (file.chunks() for file in found.files))
            os.fsync(fd)
            size, digest = _digest(fd)
    fault = str(log.fault) if log is not None and log.fault is not None else None
    return Made(path, size, digest, manifest, tuple(found.missing), fault)


def folder(path: Path) -> Path:
    """The folder for backups, made with 0700 where it is not there. Raises ConfigError where others could write to
    it."""
    private_file.check_folder(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"cannot make the folder {path}: {problem.strerror}",
            "make it for the owner of mcpctl's files: install -d -m 0700 -o OWNER FOLDER",
        ) from None
    return path


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[int]:
    """A new file, 0600, which gets its name when the block has ended well. Its lock says that somebody writes it."""
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    private_file.create(beside, b"")
    try:
        fd = private_file.open_checked(beside, os.O_RDWR)
        try:
            private_file.lock(fd)
            yield fd
            try:
                os.link(beside, path)
            except FileExistsError:
                raise ConflictError(f"{path} exists already", "it is left as it is; try again") from None
            except PermissionError:  # a disk without hard links
                os.rename(beside, path)
        finally:
            os.close(fd)
    except OSError as problem:
        raise private_file.not_written(problem, f"cannot write {path}: {problem.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    private_file._sync_folder(path.parent)


def _digest(fd: int) -> tuple[int, str]:
    """Size and SHA-256 of what is on the disk now."""
    digest, done = hashlib.sha256(), 0
    while chunk := os.pread(fd, archive.CHUNK, done):
        digest.update(chunk)
        done += len(chunk)
    return done, digest.hexdigest()


def prune(made: Path, now: datetime, keep: timedelta) -> tuple[Path, ...]:
    """Remove what is older than that in the folder of a backup that was just made: files of such a name, and never the
    one that was made. What a killed run left goes, too."""
    gone = []
    for one, when in names.there(made.parent):
        if one != made and now - when > keep:
            one.unlink()
            gone.append(one)
    for left in made.parent.glob(".mcpctl-*.tar.gz.age.*.tmp"):
        _sweep(left)
    return tuple(gone)


def _sweep(left: Path) -> None:
    with contextlib.suppress(OSError):  # it is being written, which its lock says
        fd = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            private_file.lock(fd, 0)
            left.unlink()
        finally:
            os.close(fd)
