"""Opens a backup: all of it is unpacked into a folder of ours and proved there, before anything else is touched.

Whoever knows a public key can make a file that it opens. So a backup is as good as a stranger's until all of it was
looked at: its form, each file's hash, that each file can be read as what it is, and the chain of its log.
"""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mcpctl import config, keyring, private_file, state
from mcpctl.audit import log as audit_log
from mcpctl.audit.verify import Report, verify
from mcpctl.backup import age, archive, contents
from mcpctl.backup.archive import Entry, Manifest
from mcpctl.backup.snapshot import ANY_BEGINNING, LOG_NAME
from mcpctl.config_keys import Settings
from mcpctl.errors import Error
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.own_databases import OwnDatabases
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring

_ROOM = 64 << 20
"""Bytes of the disk that stay free."""
_LARGEST = {contents.CONFIG: 4 << 20, contents.SECRET: 1 << 20, contents.SECRET_KEY: 1 << 20, contents.AUDIT_KEY: 4096}
_SMALL = 64 << 20
_UNBOUNDED = (contents.STATE, contents.ANCHORS, contents.LOG)
_KINDS = (*contents.NEEDED, contents.SECRET_KEY, contents.LOCKDOWN, contents.SECRET, *_UNBOUNDED)
STAGE = ".mcpctl-restore-"
"""How the folder begins that a backup is unpacked into."""


@dataclass
class Backup:
    """One that was proved. `settings` are its config's, as it is where it is to stand; `files` where each file was
    unpacked to, by kind and key."""

    manifest: Manifest
    stage: Path
    settings: Settings
    key: bytes
    log: Report | None = None
    files: dict[tuple[str, str], Path] = field(default_factory=dict)

    def mode(self, kind: str, key: str) -> int:
        """The rights that such a file had, but no more than it may have."""
        said = next((one.mode for one in self.manifest.files if (one.kind, one.key) == (kind, key)), "0600")
        return int(said, 8) & contents.mode(kind) | 0o600

    @property
    def tokens(self) -> EntryFile[Token]:
        return tokens.token_file(self.files[contents.TOKENS, ""])

    @property
    def users(self) -> EntryFile[User]:
        return users.user_file(self.files[contents.USERS, ""])

    @property
    def tenants(self) -> EntryFile[Tenant]:
        return tenants.tenant_file(self.files[contents.TENANTS, ""])

    @property
    def state(self) -> state.State | None:
        """Its store; None where it has none."""
        path = self.files.get((contents.STATE, ""))
        return None if path is None else state.State(path, must_exist=True)

    @property
    def keyring(self) -> Keyring:
        """What its sealed passwords are opened with."""
        return Keyring(self.files.get((contents.SECRET_KEY, ""), self.stage / "none"))


@contextlib.contextmanager
def opened(
    file: BinaryIO,
    key: age.Identities | age.Passphrase,
    at: Callable[[Manifest], Path],
    near: Callable[[Settings], Path],
) -> Iterator[Backup]:
    """A backup, until the block ends. `at` says where its config is to stand, `near` the folder beside which the rest
    is unpacked: on the same disk, it need not be copied again. Raises ConfigError where it cannot be believed."""
    size = os.fstat(file.fileno()).st_size
    with contextlib.ExitStack() as stack:
        with age.decrypting(key, file) as plain:
            reader = archive.Reader(plain, archive.most_in(size))
            check_kinds(reader.manifest)
            found = _unpacked(reader, at(reader.manifest), near, stack)
        _prove(found)
        yield found


def check_kinds(manifest: Manifest) -> None:
    """Whether it lists what a backup has, once each, and the config first."""
    known = [(entry.kind, entry.key) for entry in manifest.files]
    first = known[:1] == [(contents.CONFIG, "")]
    if not first or len(set(known)) != len(known) or any((kind, "") not in known for kind in contents.NEEDED):
        raise archive.damaged("it lacks a file that each backup has")
    for entry in manifest.files:
        if entry.kind not in _KINDS or (entry.key and entry.kind not in (contents.SECRET, contents.LOG)):
            raise archive.damaged(f"{entry.name} is nothing that a backup holds")
        if entry.kind == contents.LOG and entry.key and (entry.key[0] not in ".-" or "/" in entry.key):
            raise archive.damaged(f"{entry.name} is no file of a log")
        if entry.kind not in _UNBOUNDED and entry.size > _LARGEST.get(entry.kind, _SMALL):
            raise archive.damaged(f"{entry.name} is too large")


def _unpacked(
    reader: archive.Reader, at: Path, near: Callable[[Settings], Path], stack: contextlib.ExitStack
) -> Backup:
    files = reader.files()
    first, chunks = next(files)
    text = b"".join(chunks)
    settings = _settings_of(text, at)
    stage = near(settings) / f"{STAGE}{os.urandom(6).hex()}"
    stage.mkdir(mode=0o700)
    stack.callback(shutil.rmtree, stage, ignore_errors=True)
    fd = os.open(stage, os.O_RDONLY)
    stack.callback(os.close, fd)
    private_file.lock(fd, 0)  # somebody is at work in it, and it is nobody's to sweep
    _check_room(stage, sum(entry.size for entry in reader.manifest.files))
    found = Backup(reader.manifest, stage, settings, b"")
    (stage / "log").mkdir(mode=0o700)
    _write(found, first, iter([text]))
    for entry, chunks in files:
        _write(found, entry, chunks)
    return found


def _settings_of(text: bytes, at: Path) -> Settings:
    """The backup's config, read as if it stood there. It is written nowhere yet."""
    return config.load(at, data=text)


def _check_room(folder: Path, size: int) -> None:
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < size + _ROOM:
        raise Error(
            f"it unpacks to {size} bytes, for which {folder.parent} has no room", "nothing was changed; make room there"
        )


def _write(found: Backup, entry: Entry, chunks: Iterator[bytes]) -> None:
    if entry.kind == contents.LOG:
        path = found.stage / "log" / f"{LOG_NAME}{entry.key}"
    else:
        path = found.stage / f"{len(found.files):05d}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
    except OSError as problem:
        raise private_file.not_written(problem, f"cannot unpack it: {problem.strerror}; nothing was changed") from None
    found.files[entry.kind, entry.key] = path


# -- what is proved --------------------------------------------------------------------------------------------------


def _prove(found: Backup) -> None:
    found.key = audit_log.read_key(found.files[contents.AUDIT_KEY, ""])
    if audit_log.installation(found.key) != found.manifest.installation:
        raise archive.damaged("its audit.key is not that of the installation that it says it is of")
    counts = len(found.tokens.current()), len(found.users.current())
    found.tenants.current()
    if counts != (found.manifest.tokens, found.manifest.users):
        raise archive.damaged("it has not as many tokens and users as it says")
    if (contents.SECRET_KEY, "") in found.files:
        found.keyring.keys()
    _prove_state(found)
    if (contents.SECRET_KEY, "") in found.files:
        for text, what in sealed(found):
            found.keyring.open(text, what)
    _prove_log(found)


def _prove_state(found: Backup) -> None:
    """The store is one of ours and nothing more: SQLite would run what else stands in its schema."""
    store = found.state
    if store is None:
        return
    with closing(store), closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        _check_plain(store.path)
        store.rows("SELECT 1")  # opened, and brought to our form
        state.build(fresh)
        with closing(sqlite3.connect(store.path)) as other:
            if state.schema(other) != state.schema(fresh):
                raise archive.damaged("its state.db has another form than mcpctl's")


def _check_plain(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            kinds = {row[0] for row in connection.execute("SELECT type FROM sqlite_schema")}
            sound = connection.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]
    except sqlite3.DatabaseError:
        raise archive.damaged("its state.db is none") from None
    if not sound or kinds - {"table", "index"}:
        raise archive.damaged("its state.db is damaged, or holds what no store of mcpctl's does")


def sealed(found: Backup) -> Iterator[tuple[str, str]]:
    """(sealed, what it is) of each sealed text in it."""
    yield from users.sealed_in(found.users.current())
    store = found.state
    if store is not None:
        with closing(store):
            yield from OwnDatabases(store, found.keyring, found.users).sealed()
    for (kind, key), path in found.files.items():
        if kind == contents.SECRET:
            text = private_file.read(path).data.decode("utf-8", "replace").strip()
            if keyring.is_sealed(text):
                yield text, f"the password of {key}"


def _prove_log(found: Backup) -> None:
    said = found.manifest
    if not any(kind == contents.LOG for kind, _ in found.files):
        if said.seq:
            raise archive.damaged("its audit log is not in it")
        return
    found.log = verify(found.stage / "log" / LOG_NAME, found.key, (), ANY_BEGINNING)
    if said.whole and found.log.fault is not None:
        raise archive.damaged(f"its audit log is not whole: {found.log.fault}")
    if said.whole and (found.log.last, found.log.hash) != (said.seq, said.hash):
        raise archive.damaged("its audit log does not end where it says")
