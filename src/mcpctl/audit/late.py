"""Lines that a command could not write into the audit log, kept beside it until the next writer can.

The file's first line is the number of the log's last line when somebody began to write the others into the log, or
dashes. It is written over in place, which needs no room, before the first of them is. Each writer looks here first,
under the log's lock, so that whatever the log holds beyond that number is what has been written already: each line
comes into the log exactly once, whoever dies in between.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.errors import UnavailableError

_NOT_BEGUN = b"-" * 19 + b"\n"
_MOST = 1 << 20
"""Bytes of it; what would make it larger is not kept."""


def place(log: Path) -> Path:
    """Where they are kept. No name that the log is moved away to begins with a dot."""
    return log.with_name(f".{log.name}.late")


def keep(log: Path, event: str, fields: dict[str, Any]) -> None:
    """Keep a line. Raises an Error where not even that is possible; then nothing is kept."""
    line = json.dumps({"event": event, **fields}).encode("ascii") + b"\n"
    with _held(place(log), os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
        size = os.fstat(fd).st_size
        os.lseek(fd, max(0, size - 1), os.SEEK_SET)
        half = size and os.read(fd, 1) != b"\n"  # of a command that died in the middle
        data = (b"\n" if half else b"" if size else _NOT_BEGUN) + line
        if size + len(data) > _MOST:
            raise UnavailableError(f"{place(log)} is full", "mend the audit log: the next that is written empties it")
        if os.write(fd, data) != len(data):
            os.ftruncate(fd, size)
            raise UnavailableError(f"{place(log)} cannot be written: the disk is full", "make room")


def write(log: Path, end: Callable[[], int], append: Callable[[str, dict[str, Any]], None]) -> None:
    """Write what is kept into the log by `append(event, fields)`; under its lock. `end` is its last line's number."""
    path = place(log)
    if not os.path.lexists(path):
        return
    with _held(path, os.O_RDWR) as fd, os.fdopen(os.dup(fd), "rb") as file:
        head, *lines = file.read(_MOST).splitlines(keepends=True) or [b""]
        begun = head.strip(b"-\n ")
        seq = end()
        if not begun:
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"%19d\n" % seq)
            os.fsync(fd)
        done = seq - int(begun) if begun.isdigit() else 0
        for line in lines[max(0, done) :]:
            append(*_read(line))
        path.unlink()


def _read(line: bytes) -> tuple[str, dict[str, Any]]:
    """A kept line's event and fields; what cannot be read is told in a line of its own."""
    try:
        fields = json.loads(line)
        return fields.pop("event"), fields
    except (ValueError, KeyError, TypeError, AttributeError):
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
