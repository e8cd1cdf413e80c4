"""Room that is kept on the disk of the token file, so that a right can be taken while that disk is full.

It is a file that holds nothing. Who takes a right away gives it up when there is no room left; who adds one never does.
"""

import os
import stat
from pathlib import Path

SIZE = 256 << 10
"""Bytes."""
_PLENTY = 4 * SIZE
"""As long as less than this is free, none is made: what is still written needs the room itself."""


def of(folder: Path) -> Path:
    """The file that keeps the room in a folder."""
    return folder / ".reserve"


def there(folder: Path) -> bool:
    """Whether all of the room is kept."""
    try:
        found = os.lstat(of(folder))
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size >= SIZE


def spent(folder: Path) -> bool:
    """Whether the room is not kept, and not free either: what is left of it is for taking rights away."""
    if there(folder) or not hasattr(os, "statvfs"):
        return False
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < 2 * SIZE  # what is given needs some, too


def keep(folder: Path) -> None:
    """Make it where it is not there, and the disk has plenty of room. That it cannot be made is no fault."""
    if there(folder) or not hasattr(os, "posix_fallocate"):
        return
    try:
        disk = os.statvfs(folder)
        if disk.f_bavail * disk.f_frsize < _PLENTY:
            return
        give_up(folder)  # whoever made it was stopped
        fd = os.open(of(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        os.posix_fallocate(fd, 0, SIZE)
    except OSError:
        give_up(folder)
    finally:
        os.close(fd)


def give_up(folder: Path) -> bool:
    """Let the disk have the room; False where none was kept."""
    try:
        of(folder).unlink()
    except OSError:
        return False
    return True
