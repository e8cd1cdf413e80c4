"""Files that only their owner may read: checked before they are believed, replaced as a whole.

The rules, all of them checked on the open descriptor and not on the name:

- a regular file, owned by the caller (`read(..., trusted_owner=0)` also believes root's);
- no right for group or others beyond `mode`;
- no folder above it that anybody may write to (but for one with the sticky bit), and its own folder root's or the
  caller's; a symbolic link only into a folder that nobody but its owner can write, and never for root;
- a new content is written beside it, synced, renamed over it, and the folder synced: whoever reads sees the
  old whole file or the new whole file. Owner, group and mode stay what they were.

On Windows there are no such modes: the checks of mode and owner are left out there, the atomic replace is not.
"""

import contextlib
import errno
import glob
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from mcpctl import reserve
from mcpctl.errors import ConfigError, ConflictError, Error, FullError, NotFoundError, NotWrittenError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POSIX = sys.platform != "win32"
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NOWAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""For what turns out to be no file: a FIFO has nobody at its other end, a terminal is not to become ours."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""What a name, an owner or a mode is to blame for, and not the disk."""
PATIENCE = 10.0
"""Seconds that what takes a right away waits for another who holds its file, and may have been stopped."""

Fingerprint = tuple[int, int, int, int]
"""(inode, size, mtime, ctime, both in ns): differs when the content, the mode or the owner may differ."""

ABSENT: Fingerprint = (0, -1, 0, 0)
_fingerprint: Callable[[os.stat_result], Fingerprint] = attrgetter("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")


def fingerprint(path: Path | str) -> Fingerprint:
    """What `stat` says of the file now; `ABSENT` when there is none. Costs one system call."""
    try:
        found = os.stat(path)
    except OSError:
        return ABSENT
    return _fingerprint(found)


def fingerprints(paths: Iterable[str]) -> list[Fingerprint]:
    """`fingerprint` of each."""
    found = []
    for path in paths:
        try:
            found.append(_fingerprint(os.stat(path)))
        except OSError:
            found.append(ABSENT)
    return found


def become_owner(path: Path) -> None:
    """Give up root for good, in favour of the owner of `path`, when another user owns it.

    Run as root, the command line works on the service's files as the service's user, so that nothing it makes
    there is root's and nothing planted there is followed with root's rights. Where there is no such file, its folder,
    or the nearest above it that there is, says whose it would be. Does nothing for an ordinary user and for root's own
    files. The file's group is kept as a further one, so that the file can keep it. Order as setuid(2) asks: groups,
    gid, uid. HOME becomes that user's.
    """
    if not POSIX or os.geteuid() != 0:
        return
    refuse_link(path)
    for place in (path, *path.parents):
        try:
            found = os.lstat(place)
            break
        except OSError:
            continue
    else:
        return
    if found.st_uid == 0:
        return
    import pwd

    try:
        entry = pwd.getpwuid(found.st_uid)
        primary, groups, home = entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid), entry.pw_dir
    except KeyError:
        primary, groups, home = found.st_gid, [], "/"
    os.setgroups(sorted({primary, *groups, found.st_gid, *_groups_beside(path, found.st_uid)}))
    os.setgid(primary)
    os.setuid(found.st_uid)
    os.environ["HOME"] = home  # libpq looks for certificates there, and gives TLS up where that is root's, and closed


def as_owner(path: Path, work: Callable[[], None]) -> None:
    """Do some work as the owner of `path`, in a process of its own where that is not who we are, so that we stay root
    for what is root's. An Error of the work is raised here."""
    if not POSIX or os.geteuid() != 0 or os.lstat(path).st_uid == 0:
        work()
        return
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become_owner(path)
            work()
            status = 0
        except Error as problem:
            os.write(writing, json.dumps([problem.message, problem.hint, problem.exit_code]).encode())
        except Exception as problem:  # noqa: BLE001 - nobody above us in this process would tell it
            why = f"the owner of {path.name} could not do it: {type(problem).__name__}: {problem}"
            os.write(writing, json.dumps([why, f"look at the owner of {path}", 1]).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        said = told.read()
    _, status = os.waitpid(pid, 0)
    if said:
        message, hint, code = json.loads(said)
        raise Error(message, hint, exit_code=code)
    if status:
        raise Error("what had to be done as the owner of mcpctl's files failed", f"look at the owner of {path}")


def refuse_link(path: Path) -> None:
    """What is started as root follows no link, wherever it leads: whoever planted it may have known where."""
    if os.path.islink(path):
        raise ConfigError(
            f"{path} is a symbolic link, and root follows none", "name the file itself in the config, or use its owner"
        )


def _groups_beside(path: Path, owner: int) -> set[int]:
    """The groups of the owner's other files in that folder: a change of one of them keeps its group."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            about = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(about.st_mode) and about.st_uid == owner and about.st_nlink == 1:
                found.add(about.st_gid)
    return found


def _real_path(path: Path) -> Path:
    """The file itself, behind a symbolic link that can be trusted; else refused."""
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return path
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as problem:
        raise ConfigError(f"cannot look at {path}: {problem.strerror}", "check its folder's owner and mode") from None
    if POSIX and os.geteuid() == 0:
        refuse_link(path)
    real = Path(os.path.realpath(path))
    if POSIX:
        try:
            folder = os.stat(real.parent)
        except OSError as problem:
            raise ConfigError(
                f"{path} is a symbolic link to where there is nothing for us ({real}: {problem.strerror})",
                "name the file itself in the config",
            ) from None
        if folder.st_mode & 0o022 or folder.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                f"{path} is a symbolic link into {real.parent}, where others can write",
                f"move the file, or: chmod go-w {real.parent}",
            )
        _check_folders(path)
    return real


def _check_folders(path: Path) -> None:
    """Whether others could put another file in the place of this one: in its folder, or in one above."""
    above = [*path.absolute().parents, *Path(os.path.realpath(path.parent) + "/x").parents]
    for folder in dict.fromkeys(above):
        mode = os.stat(folder).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConfigError(f"{folder}, which holds {path.name}, can be written by anybody", f"chmod o-w {folder}")
    owner = os.stat(path.parent).st_uid
    if os.geteuid() != 0 and owner not in (0, os.geteuid()):
        raise ConfigError(
            f"{path.parent}, which holds {path.name}, belongs to another user (uid {owner})",
            "keep it in a folder of yours",
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder whose files others could replace, before anything is made in it; one that is not there yet is
    judged by those above it. Raises ConfigError."""
    while POSIX and not os.path.exists(folder):
        folder = folder.parent
    if POSIX:
        _check_folders(folder / "mcpctl's files")


def _check(path: Path, shown: object, found: os.stat_result, mode: int, trusted_owner: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{shown} is not a regular file", "name a file in the config")
    if not POSIX:
        return
    if found.st_uid not in (os.geteuid(), trusted_owner):
        raise ConfigError(
            f"{shown} belongs to another user (uid {found.st_uid}, and this is uid {os.geteuid()})",
            f"all of mcpctl's files belong to one user; `ls -l {path.parent}` shows which of them does not",
        )
    extra = stat.S_IMODE(found.st_mode) & ~mode & 0o777
    if extra:
        raise ConfigError(
            f"{shown} has mode {stat.S_IMODE(found.st_mode):04o}, and may have {mode:04o} at most",
            f"chmod {mode:04o} {path}",
        )
    _check_folders(path)


def open_checked(path: Path, flags: int, *, mode: int = 0o600, trusted_owner: int | None = None) -> int:
    """A descriptor of a private file that has passed the rules above; `flags` as for os.open.

    With O_CREAT a file that is missing is made with `mode`.
    """
    return _open(path, flags, mode, trusted_owner)[0]


def check_opened(path: Path, fd: int) -> None:
    """Raises ConfigError where a private file that is open already does not keep the rules (any more)."""
    _check(_real_path(path), path, os.fstat(fd), 0o600, None)


def _open(path: Path, flags: int, mode: int = 0o600, trusted_owner: int | None = None) -> tuple[int, Path]:
    """As open_checked, with the file's own name, which is another one where `path` is a link."""
    real = _real_path(path)
    shown = path if real == path else f"{path}, a link to {real},"
    try:
        fd = os.open(real, flags | _NOFOLLOW | _CLOEXEC | _NOWAIT, mode)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"there is no file {shown}".rstrip(","), "is it the right name?", exit_code=3, status=503
        ) from None
    except OSError as problem:
        if problem.errno in (errno.ENXIO, errno.EISDIR):
            raise ConfigError(f"{shown} is not a regular file", "name a file in the config") from None
        if problem.errno == errno.ELOOP:
            raise ConfigError(f"{shown} is a symbolic link", "name the file itself in the config") from None
        writes, said = flags & (os.O_RDWR | os.O_WRONLY), f"{shown} cannot be written: {problem.strerror}"
        if problem.errno in (errno.EPERM, errno.EACCES) and writes and not flags & os.O_CREAT:
            os.close(_open(path, os.O_RDONLY, mode, trusted_owner)[0])  # raises where it is not to be believed either
            raise NotWrittenError(said, "check its mode, and its attributes with lsattr") from None
        if problem.errno not in _FORBIDDEN and writes:
            raise not_written(problem, said) from None
        raise ConfigError(f"{shown} cannot be opened: {problem.strerror}", "check its owner and mode") from None
    try:
        found = os.fstat(fd)
        if POSIX and flags & os.O_CREAT and not found.st_mode & 0o777:
            os.fchmod(fd, mode)  # just made, under a umask that leaves nothing
            found = os.fstat(fd)
        _check(real, shown, found, mode, trusted_owner)
    except BaseException:
        os.close(fd)
        raise
    return fd, real


@dataclass(frozen=True)
class Content:
    """A private file as it was read: its bytes, and the fingerprint that it had before they were."""

    data: bytes
    fingerprint: Fingerprint


def read(path: Path, *, mode: int = 0o600, trusted_owner: int | None = None, limit: int = 64 << 20) -> Content:
    """The content of a private file. Raises ConfigError (exit 3) for a file that breaks a rule."""
    fd = open_checked(path, os.O_RDONLY, mode=mode, trusted_owner=trusted_owner)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)  # before it is read: what is written over it meanwhile differs from this
        try:
            data = file.read(limit + 1)
        except OSError as problem:
            raise NotWrittenError(f"cannot read {path}: {problem.strerror}", "is it a file on a disk?") from None
        if len(data) > limit:
            raise ConfigError(f"{path} is larger than {limit >> 20} MiB", "this is not a file that mcpctl wrote")
    return Content(data, _fingerprint(found))


def create(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make a new private file, or refuse where there is one already (exit 5)."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, mode)
    except FileExistsError:
        raise ConflictError(f"{path} exists already", "it is left as it is; remove it or choose another name") from None
    except OSError as problem:
        if problem.errno not in _FORBIDDEN:
            raise not_written(problem, f"cannot make {path}: {problem.strerror}") from None
        raise ConfigError(f"cannot make {path}: {problem.strerror}", "check the folder's owner and mode") from None
    try:
        with os.fdopen(fd, "wb") as file:
            if POSIX:
                os.fchmod(file.fileno(), mode)  # whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except BaseException as problem:
        path.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise not_written(problem, f"cannot write {path}: {problem.strerror}") from None
        raise


def not_written(problem: OSError, said: str) -> Error:
    """What to raise for a file that could not be written."""
    if problem.errno in NO_ROOM:
        return FullError(said, "make room on that disk, and try again")
    return NotWrittenError(said, "is the disk in order, and the folder yours?")


def lock(fd: int, patience: float | None = None) -> None:
    """Wait for the descriptor's file to be ours alone; released when it is closed, also by a crash.

    With `patience` no longer than that many seconds; then TimeoutError: somebody who holds it has stopped.
    """
    if fcntl is not None and patience is None:
        fcntl.flock(fd, fcntl.LOCK_EX)
    elif fcntl is not None:
        until = None  # the clock is asked once somebody else has it
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                now = time.monotonic()
                until = now + (patience or 0.0) if until is None else until
                if now >= until:
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock") from None
                time.sleep(0.0001)  # one who writes line after line leaves it free for moments
    else:  # pragma: no cover - Windows
        import msvcrt

        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_LOCK, 1)


def unlock(fd: int) -> None:
    """Let go of what `lock` took, keeping the descriptor."""
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:  # pragma: no cover - Windows
        import msvcrt

        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)


class Edit:
    """A private file held under its lock: `data` is its content, `replace` puts another in its place."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        with os.fdopen(os.dup(fd), "rb") as file:
            self.data = file.read()

    def replace(self, data: bytes, *, though_full: bool = False) -> None:
        """Put `data` in place of the file in one step; owner, group and mode stay. Raises FullError, ConfigError.

        `though_full` is for what takes a right away, which must be done on a full disk, too: the reserve is given up.
        Where even that is no room for a second file, it writes over the one that is there; whoever reads meanwhile
        meets a broken file, and refuses.
        """
        try:
            self._replace(data)
        except FullError:
            if not though_full:
                raise
            try:
                if not reserve.give_up(self.path.parent):
                    raise
                self._replace(data)
            except FullError:
                if not self._overwrite(data):
                    raise

    def _replace(self, data: bytes) -> None:
        old = os.fstat(self._fd)
        beside = self.path.with_name(f".{self.path.name}.{os.urandom(6).hex()}.tmp")
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                if POSIX:
                    _keep_owner(file.fileno(), old)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not is_at(self.path, old):
                raise ConfigError(f"{self.path} was replaced by somebody else meanwhile; it is left so", "try again")
            os.replace(beside, self.path)
        except OSError as problem:
            beside.unlink(missing_ok=True)
            raise not_written(problem, f"cannot write {self.path}: {problem.strerror}; nothing was changed") from None
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

    def _overwrite(self, data: bytes) -> bool:
        """Write over the file itself; False, and nothing is changed, where even that has no room."""
        size = os.fstat(self._fd).st_size
        try:
            if len(data) > size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, size, len(data) - size)
        except OSError:
            os.ftruncate(self._fd, size)  # it may have come a part of the way
            return False
        done = 0
        while done < len(data):
            os.lseek(self._fd, done, os.SEEK_SET)
            done += os.write(self._fd, data[done:])
        os.ftruncate(self._fd, len(data))
        if os.utime in os.supports_fd:  # the kernel's own stamp may be that of what a reader met half written
            os.utime(self._fd, ns=(time.time_ns(), time.time_ns()))
        os.fsync(self._fd)
        return True


def _keep_owner(fd: int, old: os.stat_result) -> None:
    """Owner, group and mode as they were. A group that we are not in is let go where it has no right anyway."""
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            if old.st_uid != os.geteuid() or old.st_mode & 0o070:
                raise
    os.fchmod(fd, stat.S_IMODE(old.st_mode))


def is_at(path: Path, found: os.stat_result) -> bool:
    """Whether this very file still has that name."""
    try:
        now = os.stat(path)
    except OSError:
        return False
    return (found.st_ino, found.st_dev) == (now.st_ino, now.st_dev)


@contextlib.contextmanager
def edit(path: Path, *, mode: int = 0o600, patience: float | None = None) -> Iterator[Edit]:
    """Hold a private file of that mode at most for a change. Others who want to change it wait, for `patience` seconds
    at most if that is given (then NotWrittenError); readers don't.

    The lock is on the file itself, which nobody but its owner can open: no stranger can hold up a revocation.
    Since a change replaces the file, a waiter may wake up holding the old one; it then takes the new one's lock.
    """
    while True:
        fd, real = _open(path, os.O_RDWR, mode)
        try:
            try:
                lock(fd, patience)
            except TimeoutError:
                raise NotWrittenError(f"{path} is held by another process, which has stopped", "end it") from None
            if not is_at(real, os.fstat(fd)):
                continue  # if it is gone, the next open says so
            _sweep(real)
            yield Edit(real, fd)
            return
        finally:
            os.close(fd)


def _sweep(path: Path) -> None:
    """Remove what a killed writer left half written; called under the lock, when nobody writes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (fsync(2): the folder needs its own)."""
    if not POSIX:
        return
    fd = os.open(folder, os.O_RDONLY | _CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
