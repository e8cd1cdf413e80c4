"""Lines that could not be written into the audit log, kept beside it until the next writer can; where there is no room
for them, in the folder of the token file, whose reserve is given up for them.

Such a file's first line has two numbers. One is that of the log's last line when somebody began to write the others
into the log, or dashes. It is written over in place, which needs no room, before the first of them is. Each writer
looks here first, under the log's lock, so that whatever the log holds beyond that number is what has been written
already: each line comes into the log exactly once, whoever dies in between. The other is how many lines could not even
be kept. An empty file says that there were some.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcpctl import private_file, reserve
from mcpctl.errors import Error, UnavailableError

_HEAD = re.compile(rb"[-0-9]{19} [0-9]{19}\n")
_MOST = 1 << 20
"""Bytes of it; what would make it larger is not kept."""


def _is_there(path: str) -> bool:
    return os.access(path, os.F_OK, follow_symlinks=False)


is_there = _is_there if os.access in os.supports_follow_symlinks and _is_there(os.sep) else os.path.lexists
"""What lexists says, in half its time where the system can, and does not keep us from it (a container's rules may):
each line of the log asks for each place."""


class _TooMuchError(UnavailableError):
    """There is room, but what is kept is enough."""


def place(log: Path) -> Path:
    """Where they are kept. No name that the log is moved away to begins with a dot."""
    return log.with_name(f".{log.name}.late")


def places(log: Path, spare: Path | None) -> list[Path]:
    """All of the files where lines may be kept; `spare` is the token file's folder."""
    return list(dict.fromkeys([place(log), place((spare or log.parent) / log.name)]))


def keep(log: Path, spare: Path | None, event: str, fields: dict[str, Any]) -> None:
    """Keep a line. Raises an Error where not even that is possible; then nothing is kept."""
    line = json.dumps({"event": event, **fields}).encode("ascii") + b"\n"
    here, *other = places(log, spare)
    try:
        _keep(here, line)
    except _TooMuchError:
        raise
    except Error:
        for path in other:
            with contextlib.suppress(Error):
                return _keep(path, line)
        if spare is None or not reserve.give_up(spare):
            raise
        _keep(other[0] if other else here, line)


def _keep(path: Path, line: bytes) -> None:
    there = os.path.lexists(path)  # an empty one says that lines were lost
    with _held(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
        size = os.fstat(fd).st_size
        os.lseek(fd, max(0, size - 1), os.SEEK_SET)
        half = size and os.read(fd, 1) != b"\n"  # of a command that died in the middle
        data = (b"\n" if half else b"" if size else _head(int(there))) + line
        if size + len(data) > _MOST:
            raise _TooMuchError(f"{path} is full", "mend the audit log: the next that is written empties it")
        try:
            whole = os.write(fd, data) == len(data)
        except OSError:
            whole = False
        if not whole:
            os.ftruncate(fd, size)
            if not there:
                path.unlink()
            raise UnavailableError(f"{path} cannot be written", "is the disk full?")


def lose(log: Path, spare: Path | None, count: int) -> bool:
    """Have the log say one day that this many lines could not be kept; False where not even that is possible."""
    for path in places(log, spare):
        there = os.path.lexists(path)
        with contextlib.suppress(Error), _held(path, os.O_RDWR | os.O_CREAT) as fd:
            head = os.read(fd, len(_head(0)))
            if _HEAD.fullmatch(head):
                os.lseek(fd, 20, os.SEEK_SET)
                os.write(fd, b"%019d" % (int(head[20:39]) + count))
            elif not head:
                with contextlib.suppress(OSError):
                    if os.write(fd, _head(count + there)) != len(_head(0)):
                        os.ftruncate(fd, 0)
            return True
    return False


def _head(lost: int) -> bytes:
    return b"-" * 19 + b" %019d\n" % lost


def write(log: Path, spare: Path | None, end: Callable[[], int], append: Callable[[str, dict[str, Any]], None]) -> None:
    """Write what is kept into the log by `append(event, fields)`; under its lock. `end` is its last line's number."""
    found = [path for path in places(log, spare) if os.path.lexists(path)]
    for path in found if len(found) < 2 else sorted(found, key=_is_untouched):
        _write(path, end, append)


def _is_untouched(path: Path) -> bool:
    """Whether nobody has begun to write it: what somebody has comes first, since the log goes on behind it."""
    with _held(path, os.O_RDWR) as fd:
        return os.read(fd, 1) == b"-"


def _write(path: Path, end: Callable[[], int], append: Callable[[str, dict[str, Any]], None]) -> None:
    with _held(path, os.O_RDWR) as fd, os.fdopen(os.dup(fd), "rb") as file:
        head, *lines = file.read(_MOST).splitlines(keepends=True) or [b""]
        begun = head[:19].strip(b"-\n ")
        seq = end()
        if head and not begun:
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"%019d" % seq)
            os.fsync(fd)
        done = seq - int(begun) if begun.isdigit() else 0
        for event, fields in _all(head, lines)[max(0, done) :]:
            append(event, fields)
        path.unlink()


def kept(log: Path, spare: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """(event, fields) of what waits there to be written, in the order in which it happened; it goes on waiting."""
    found = []
    for path in places(log, spare):
        if os.path.lexists(path):
            with _held(path, os.O_RDONLY) as fd, os.fdopen(os.dup(fd), "rb") as file:
                head, *lines = file.read(_MOST).splitlines(keepends=True) or [b""]
                found += _all(head, lines)
    return sorted(found, key=lambda one: str(one[1].get("happened_at") or ""))


def _all(head: bytes, lines: list[bytes]) -> list[tuple[str, dict[str, Any]]]:
    found = [_read(line) for line in lines]
    lost = int(head[20:39]) if _HEAD.fullmatch(head) else int(not head)
    if lost:
        found.append(("audit.lost", {"reason": f"at least {lost} lines could neither be written nor be kept"}))
    return found


def _read(line: bytes) -> tuple[str, dict[str, Any]]:
    """A kept line's event and fields; what cannot be read is told in a line of its own."""
    try:
        fields = json.loads(line)
        listed = [one for value in fields.values() for one in (value if isinstance(value, list) else [value])]
        if any(isinstance(one, list | dict) for one in listed):  # what is nested enough cannot be written again
            raise ValueError
        return fields.pop("event"), fields
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "audit.lost", {"reason": "a line that was kept for the log could not be read"}


@contextlib.contextmanager
def _held(path: Path, flags: int) -> Iterator[int]:
    """The file's descriptor, locked: no other keeps a line meanwhile, or writes them."""
    while True:
        fd = private_file.open_checked(path, flags)
        try:
            private_file.lock(fd, 1.0)
            if private_file.fingerprint(path)[0] != os.fstat(fd).st_ino:
                continue  # it was written into the log, and removed
            yield fd
            return
        except OSError as problem:
            raise UnavailableError(f"{path} cannot be written: {problem.strerror}", "make room") from None
        finally:
            os.close(fd)


def waits(path: Path) -> bool:
    """Whether lines are kept there that the log does not have yet. An empty file says that some were lost."""
    try:
        return os.lstat(path).st_size > 0
    except OSError:
        return False
