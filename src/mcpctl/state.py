"""The embedded store of what the server itself remembers: one SQLite file, 0600, for all workers and the command line.

The file passes the rules of `private_file` before it is opened, and is made whole beside its place, so that nobody ever
meets half of it. It is in WAL mode: readers and one writer do not wait for each other (sqlite.org/wal.html; it wants a
disk of this machine). Each access is short, and waits a bounded time for another writer; an event loop does not wait
for it here, but by `in_turn.py`.
"""

import contextlib
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.errors import BusyError, ConfigError, UnavailableError

APPLICATION = 0x6D637063
"""PRAGMA application_id: the letters mcpc."""
_PATIENCE = 2.0
"""Seconds to wait for another writer, who needs some milliseconds."""
SHORTLY = 0.05
"""The patience of an event loop that comes again."""
_SCHEMA = """
CREATE TABLE own_databases (
  user TEXT NOT NULL, name TEXT NOT NULL, host TEXT NOT NULL, hostaddr TEXT NOT NULL, port INTEGER NOT NULL,
  dbname TEXT NOT NULL, login TEXT NOT NULL, sealed TEXT NOT NULL, created_at TEXT NOT NULL,
  PRIMARY KEY (user, name)
) WITHOUT ROWID
"""
_SINCE_2 = "CREATE TABLE blocked (token TEXT PRIMARY KEY, at TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID"
_SINCE_3 = """
CREATE TABLE sessions (
  id TEXT PRIMARY KEY, changed INTEGER NOT NULL, ended INTEGER NOT NULL DEFAULT 0, kind TEXT NOT NULL,
  user TEXT NOT NULL, hash TEXT NOT NULL, mark TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL,
  ends REAL NOT NULL, access_ends REAL, before TEXT, before_ends REAL, databases TEXT, permissions TEXT,
  client TEXT, address TEXT
) WITHOUT ROWID;
CREATE INDEX sessions_changed ON sessions (changed);
CREATE TABLE session_changes (last INTEGER NOT NULL);
INSERT INTO session_changes VALUES (0)
"""
_SINCE_4 = """
CREATE TABLE guests (
  name TEXT PRIMARY KEY, issuer TEXT NOT NULL, subject TEXT NOT NULL, shown TEXT, as_user TEXT NOT NULL,
  since REAL NOT NULL, seen REAL NOT NULL, disabled REAL
) WITHOUT ROWID
"""
_SINCE_5 = """
CREATE TABLE oauth_clients (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, redirects TEXT NOT NULL, renews INTEGER NOT NULL, created REAL NOT NULL,
  used REAL, address TEXT
) WITHOUT ROWID;
CREATE TABLE oauth_codes (
  hash TEXT PRIMARY KEY, client TEXT NOT NULL, name TEXT NOT NULL, host TEXT, redirect TEXT NOT NULL,
  challenge TEXT NOT NULL, scopes TEXT NOT NULL, resource TEXT NOT NULL, renews INTEGER NOT NULL, user TEXT NOT NULL,
  mark TEXT NOT NULL, made REAL NOT NULL, ends REAL NOT NULL, used INTEGER NOT NULL DEFAULT 0, session TEXT
) WITHOUT ROWID;
CREATE TABLE oauth_connections (
  session TEXT PRIMARY KEY, client TEXT NOT NULL, name TEXT NOT NULL, host TEXT, redirect TEXT NOT NULL,
  scopes TEXT NOT NULL, resource TEXT NOT NULL, renews INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE oauth_refresh_tokens (
  hash TEXT PRIMARY KEY, session TEXT NOT NULL, used INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX oauth_refresh_tokens_session ON oauth_refresh_tokens (session);
CREATE TABLE oauth_consents (
  user TEXT NOT NULL, client TEXT NOT NULL, redirect TEXT NOT NULL, scopes TEXT NOT NULL, made REAL NOT NULL,
  PRIMARY KEY (user, client, redirect)
) WITHOUT ROWID;
CREATE TABLE browsers (
  hash TEXT PRIMARY KEY, user TEXT NOT NULL, mark TEXT NOT NULL, made REAL NOT NULL, ends REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE form_keys (name TEXT PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID
"""
_SINCE_6 = """
ALTER TABLE oauth_refresh_tokens ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
DROP INDEX oauth_refresh_tokens_session;
CREATE INDEX oauth_refresh_tokens_number ON oauth_refresh_tokens (session, number);
ALTER TABLE oauth_connections ADD COLUMN permissions TEXT
"""
_STEPS = {2: _SINCE_2, 3: _SINCE_3, 4: _SINCE_4, 5: _SINCE_5, 6: _SINCE_6}
"""What a store of an earlier form lacks, by the form that has it."""
SCHEMA_VERSION = max(_STEPS)
_RESTORE = (
    "restore it from your backup; without one, stop the server, remove it with its -wal and -shm (databases that users "
    "have brought are lost with it, and guests who were disabled may come in again), then: mcpctl token unblock --all"
)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
"""No room: what is there can still be believed."""
Version = tuple[int, int, int]
_held: Counter[int] = Counter()
"""The descriptors of the files that are open here, and how many States have each. The process's, as the locks are: to
close one drops all locks that SQLite holds on the file in this process, whichever connection has them (fcntl(2), and
sqlite.org/howtocorrupt.html). Others then take the -wal for nobody's, and remove it."""
_holding = threading.Lock()


class State:
    """The store at `path`, opened when it is first needed and made where there is none, unless it `must_exist` or was
    there before. `patience`: seconds for which a change waits for another writer, who needs some milliseconds. One
    thread's."""

    def __init__(self, path: Path, *, must_exist: bool = False, patience: float | None = None) -> None:
        self.path = path
        self.must_exist = must_exist
        self._patience = _PATIENCE if patience is None else patience
        self._connection: sqlite3.Connection | None = None
        self._fd = -1
        self._opened = 0
        self._written = 0

    def version(self) -> Version:
        """Differs as soon as anybody has written, in this process or in another one."""
        with self._told():
            connection = self._open()
            (changes,) = connection.execute("PRAGMA data_version").fetchone()
            return self._opened, self._written, changes

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a question. UnavailableError while it is busy, ConfigError where the file cannot be believed."""
        with self._told():
            return self._open().execute(sql, values).fetchall()

    def copied(self) -> bytes:
        """The whole store as one file's bytes, without what anybody may be writing meanwhile."""
        with self._told():
            return self._open().serialize()

    def is_alone(self) -> bool:
        """Whether no other process has the file open."""
        self.close()
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=0.2, isolation_level=None)) as connection:
                # sqlite.org/wal.html, 6: it needs the file for itself
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.execute("BEGIN EXCLUSIVE")
                connection.execute("ROLLBACK")
        except sqlite3.OperationalError as problem:
            return not _is_busy(problem)
        except sqlite3.DatabaseError:  # it is none; whoever opens it says so
            return True
        return True

    @contextlib.contextmanager
    def change(self, patience: float | None = None) -> Iterator[sqlite3.Connection]:
        """One transaction that others who write wait for; rolled back where the block fails. It waits `patience`
        seconds for another writer. Raises BusyError where that is not enough, and nothing was done."""
        with self._told():
            connection = self._open()
            self._begin(connection, self._patience if patience is None else patience)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self._written += 1

    def _begin(self, connection: sqlite3.Connection, patience: float) -> None:
        self._wait(connection, patience)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as problem:
            if _is_busy(problem):
                raise BusyError(*self._held()) from None
            raise
        finally:
            self._wait(connection, max(self._patience, SHORTLY))

    @staticmethod
    def _wait(connection: sqlite3.Connection, seconds: float) -> None:
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def _held(self) -> tuple[str, str]:
        return f"{self.path} is held by another process", "try again in a moment"

    def close(self) -> None:
        """Close it, until it is needed again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            _let_go(self._fd)

    # -- the file --------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and private_file.is_at(self.path, os.fstat(self._fd)):
            self._check_head()
            return self._connection
        self.close()  # another file has taken its place: a backup was restored
        if not os.path.lexists(self.path):
            if self.must_exist or self._opened:  # an empty one would say that no token and no guest is kept out
                raise self.missing()
            make(self.path)
        fd = _hold(self.path)
        try:
            connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            try:
                self._check(connection)  # another worker may be making its form a newer one
                self._wait(connection, max(self._patience, SHORTLY))
            except BaseException:
                connection.close()
                raise
        except BaseException:
            _let_go(fd)
            raise
        self._connection, self._fd = connection, fd
        self._opened += 1
        return connection

    def _check_head(self) -> None:
        """SQLite answers from what it has read, and does not notice that the file was written over in its place."""
        if not private_file.POSIX:
            return
        head = os.pread(self._fd, 72, 0)  # sqlite.org/fileformat.html, 1.3
        if head[:16] != b"SQLite format 3\0" or int.from_bytes(head[68:], "big") != APPLICATION:
            raise ConfigError(f"{self.path}: somebody has written over it", _RESTORE)

    def missing(self) -> ConfigError:
        """What is wrong where there is none, and has to be."""
        return ConfigError(
            f"there is no {self.path}, which says which tokens are blocked",
            "restore it from your backup; where no token is to be blocked and no guest disabled: mcpctl token unblock "
            "--all",
        )

    def _check(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION and 1 <= version < SCHEMA_VERSION:
            version = _renew(connection, self.path)
        if application != APPLICATION:
            raise ConfigError(
                f"{self.path} is not a store of mcpctl's",
                f"{_RESTORE}; where it never was one, name another file in server.state_file",
            )
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{self.path} was written by another version of mcpctl (its form is {version}, ours {SCHEMA_VERSION})",
                "run that version, or restore the file from your backup",
            )
        connection.execute("PRAGMA synchronous = FULL")  # what was removed stays removed, whatever the machine does
        connection.execute("PRAGMA secure_delete = ON")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.OperationalError as problem:
            if _is_busy(problem):
                raise UnavailableError(*self._held()) from None
            if getattr(problem, "sqlite_errorcode", 0) in _FULL:
                raise UnavailableError(f"{self.path}: {problem}", "is the disk full?") from None
            hint = f"is it yours, and its disk in order? Else: {_RESTORE}"
            raise ConfigError(f"{self.path}: {problem}", hint) from None
        except sqlite3.DatabaseError as problem:
            raise ConfigError(f"{self.path}: {problem}", _RESTORE) from None


def _is_busy(problem: sqlite3.OperationalError) -> bool:
    code: int = getattr(problem, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)  # an extended code ends with its plain one


def _hold(path: Path) -> int:
    """The process's one descriptor of a file that keeps the rules of private_file."""
    with _holding:
        fd = next((one for one in _held if private_file.is_at(path, os.fstat(one))), None)
        if fd is None:
            fd = private_file.open_checked(path, os.O_RDWR)
        else:
            private_file.check_opened(path, fd)
        _held[fd] += 1
        return fd


def _let_go(fd: int) -> None:
    with _holding:
        _held[fd] -= 1
        if not _held[fd]:
            del _held[fd]
            os.close(fd)


def _renew(connection: sqlite3.Connection, path: Path) -> int:
    """Give a store of an earlier form what it lacks, one form after the other; its form now. A copy is kept."""
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()  # another process may have been quicker
    if version < SCHEMA_VERSION:
        _keep_copy(connection, path.with_name(f"{path.name}.form-{version}"))
    for form in range(int(version) + 1, SCHEMA_VERSION + 1):
        _take(connection, _STEPS[form])
        connection.execute(f"PRAGMA user_version = {form}")
    connection.execute("COMMIT")
    return max(int(version), SCHEMA_VERSION)


def _keep_copy(connection: sqlite3.Connection, to: Path) -> None:
    """Keep the store as it is beside it, whole or not at all, for the version of mcpctl that wrote it."""
    if os.path.lexists(to):
        return  # of an attempt that was interrupted behind it
    beside = to.with_name(f".{to.name}.{os.urandom(6).hex()}.tmp")
    private_file.create(beside, connection.serialize())
    os.replace(beside, to)


def _take(connection: sqlite3.Connection, statements: str) -> None:
    """Run statements in the transaction that is open; `executescript` would end it."""
    for one in statements.split(";\n"):
        connection.execute(one)


def schema(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    """What a store is made of: (kind, name, table, SQL) of each table and index."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    return {tuple(" ".join(str(one).split()) for one in row) for row in rows}


def build(connection: sqlite3.Connection) -> None:
    """Make an empty database an empty store."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN")
    connection.execute(_SCHEMA)
    for step in _STEPS.values():
        _take(connection, step)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def make(path: Path) -> None:
    """Make an empty store. Where another process makes one at the same time, one of the two stays."""
    private_file.check_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    private_file.create(beside, b"")
    try:
        connection = sqlite3.connect(beside, isolation_level=None)
        try:
            build(connection)
        finally:
            connection.close()
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)
    except OSError as problem:
        raise ConfigError(f"cannot make {path}: {problem.strerror}", "check the folder's owner and mode") from None
    finally:
        beside.unlink(missing_ok=True)
    if private_file.POSIX:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
