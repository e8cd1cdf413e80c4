"""An installation as it is at one moment: all that a backup holds, so that tokens, users, store and log fit together.

Whoever changes one of the files waits meanwhile, for the milliseconds that it takes to read the small ones; of the log
it is enough to know how long its files are, since they only grow.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mcpctl import private_file
from mcpctl.audit import parts as log_parts
from mcpctl.audit.log import read_key
from mcpctl.audit.parts import Chosen, Part
from mcpctl.audit.verify import Report, walk
from mcpctl.backup import contents
from mcpctl.backup.archive import CHUNK, Entry
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, NotFoundError, NotWrittenError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.blocked import store
from mcpctl.identity.lockdown import refuse_unfinished

ANY_BEGINNING = datetime.max.replace(tzinfo=UTC)
"""As `kept_since`: old files of the log may have been removed on purpose."""
LOG_NAME = "audit.jsonl"
"""How the log is called in a backup, wherever it stands."""


@dataclass(frozen=True)
class File:
    """One file of it: what it is, and its bytes as often as they are wanted."""

    entry: Entry
    chunks: Callable[[], Iterator[bytes]]


@dataclass
class Snapshot:
    """All of it. `log` is None where nothing was ever logged. `missing` are what the config names, and is not there."""

    files: list[File] = field(default_factory=list)
    tokens: int = 0
    users: int = 0
    key: bytes = b""
    log: Report | None = None
    missing: list[Path] = field(default_factory=list)


@contextlib.contextmanager
def held(path: Path, *, mode: int = 0o600) -> Iterator[None]:
    """Have whoever wants to change a private file wait. It need not be writable for us: a backup may run where it is
    not. NotWrittenError where another process holds it, and has stopped."""
    while True:
        fd = private_file.open_checked(path, os.O_RDONLY, mode=mode, trusted_owner=0 if mode != 0o600 else None)
        try:
            try:
                private_file.lock(fd, private_file.PATIENCE)
            except TimeoutError:
                raise NotWrittenError(f"{path} is held by another process, which has stopped", "end it") from None
            if private_file.is_at(path, os.fstat(fd)):
                yield
                return
        finally:
            os.close(fd)


@contextlib.contextmanager
def log_held(path: Path) -> Iterator[None]:
    """Have whoever writes the log wait, which they do for a quarter of a second alone."""
    name = path.with_name(f"{path.name}.lock")
    try:
        fd = private_file.open_checked(name, os.O_RDONLY)
    except NotFoundError:  # nobody has ever written one
        yield
        return
    try:
        try:
            private_file.lock(fd, 2.0)
        except TimeoutError:
            raise NotWrittenError(f"another process holds {name}", f"try again; fuser -v {name} says which") from None
        yield
    finally:
        os.close(fd)


def take(settings: Settings, open_until: ExitStack) -> Snapshot:
    """The installation as it is now; the log's files stay open until the stack is closed. Raises ConfigError where a
    file cannot be believed: what is broken is no backup."""
    found, small = Snapshot(), dict[str, bytes]()
    places, unread = contents.places(settings), list[tuple[str, str]]()
    state = store(settings)
    refuse_unfinished(settings.auth.token_file)
    with ExitStack() as holding:
        holding.callback(state.close)
        for kind in (contents.USERS, contents.TOKENS, contents.TENANTS):
            holding.enter_context(held(places[kind]))
        holding.enter_context(held(places[contents.CONFIG], mode=contents.mode(contents.CONFIG)))
        for kind in places.keys() - {contents.STATE, contents.ANCHORS}:
            with contextlib.suppress(NotFoundError):
                small[kind] = _read(kind, places[kind])
        anchors = _anchors(places.get(contents.ANCHORS), open_until)  # before the log: none is of a line beyond its end
        with log_held(settings.audit.file):
            opened = log_parts.opened(settings.audit.file, open_until, unread)
        if state.path.exists():  # after the log: of what the log tells that it ended, nothing is alive in it
            small[contents.STATE] = state.copied()
    found.key = read_key(settings.audit.key_file)
    found.tokens = len(tokens.token_file(settings.auth.token_file).current())
    found.users = len(users.user_file(settings.auth.user_file).current())
    tenants.tenant_file(settings.auth.tenant_file).current()
    found.files = [_of_bytes(kind, places[kind], small[kind]) for kind in places if kind in small]
    found.missing = [path for kind, path in places.items() if kind not in {*small, contents.LOCKDOWN, contents.ANCHORS}]
    _add_secrets(found, settings)
    found.files += [_of_part(one, contents.ANCHORS, "", "anchors") for one in anchors]
    _add_log(found, settings.audit.file, opened, unread)
    return found


def _read(kind: str, path: Path) -> bytes:
    config = kind == contents.CONFIG
    try:
        return private_file.read(path, mode=contents.mode(kind), trusted_owner=0 if config else None).data
    except NotFoundError:
        raise
    except Error:
        if kind != contents.LOCKDOWN:  # whatever has that name locks
            raise
        return b""


def _of_bytes(kind: str, path: Path, data: bytes, key: str = "", name: str = "") -> File:
    digest = hashlib.sha256(data).hexdigest()
    name = name or _NAMES.get(kind, kind)
    entry = Entry(name, kind, key, str(path), _mode(kind, path), len(data), digest)
    return File(entry, lambda: iter([data]))


def _mode(kind: str, path: Path) -> str:
    """The rights that it has, but no more than it may."""
    try:
        found = os.stat(path).st_mode & contents.mode(kind)
    except OSError:  # it was moved away just now
        found = 0o600
    return f"{found | 0o600:04o}"


_NAMES = {
    contents.CONFIG: "config.yaml", contents.TOKENS: "tokens.yaml", contents.USERS: "users.yaml",
    contents.TENANTS: "tenants.yaml", contents.STATE: "state.db",
}  # fmt: skip


def _add_secrets(found: Snapshot, settings: Settings) -> None:
    for number, (key, path) in enumerate(contents.secrets(settings).items(), 1):
        most, owner = contents.secret_mode(key)
        try:
            data = private_file.read(path, mode=most, trusted_owner=owner, limit=1 << 20).data
        except NotFoundError:
            found.missing.append(path)
            continue
        found.files.append(_of_bytes(contents.SECRET, path, data, key, f"secrets/{number:03d}"))


def _anchors(path: Path | None, open_until: ExitStack) -> list[Part]:
    if path is None:
        return []
    try:
        fd = private_file.open_checked(path, os.O_RDONLY)
    except NotFoundError:
        return []
    open_until.callback(os.close, fd)
    return [Part(path, fd, os.fstat(fd).st_size, False)]


def _add_log(found: Snapshot, path: Path, opened: list[Part], unread: list[tuple[str, str]]) -> None:
    """The log's files, and whether their chain is whole."""
    if not opened:
        return
    for part in sorted(opened, key=lambda one: (one.path != path, one.path.name)):
        end = part.path.name.removeprefix(path.name)
        if not (end.isascii() and end.isprintable() and len(end) < 60):
            unread.append((part.name, "its name is none that logrotate gives"))
            continue
        found.files.append(_of_part(part, contents.LOG, end, f"log/{LOG_NAME}{end}".replace(" ", "_")))
    found.log = walk(path, log_parts.choose(opened, path, unread), found.key, (), ANY_BEGINNING)


def chosen_of(path: Path, stack: ExitStack) -> Chosen:
    """The log's files as they are now."""
    unread: list[tuple[str, str]] = []
    with log_held(path):
        opened = log_parts.opened(path, stack, unread)
    return log_parts.choose(opened, path, unread)


def _of_part(part: Part, kind: str, key: str, name: str) -> File:
    digest, size = hashlib.sha256(), 0
    for chunk in _raw(part):
        digest.update(chunk)
        size += len(chunk)
    entry = Entry(name, kind, key, str(part.path), "0600", size, digest.hexdigest())
    return File(entry, lambda: _raw(part))


def _raw(part: Part) -> Iterator[bytes]:
    """A file's bytes as they stand there, up to where it ended."""
    done = 0
    while done < part.size and (chunk := os.pread(part.fd, min(CHUNK, part.size - done), done)):
        done += len(chunk)
        yield chunk
