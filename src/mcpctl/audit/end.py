"""Where the audit log's chain ends, and what the workers of one server tell each other of it."""

import mmap
import zlib
from pathlib import Path
from struct import Struct
from typing import NamedTuple

_TOLD = Struct("<QQQ64s")
_CHECK = Struct("<I")


class End(NamedTuple):
    """Where the chain ends: the file's identity and size, the last line's number and hash."""

    inode: int
    size: int
    seq: int
    hash: str


class SharedEnd:
    """Where a worker's last line has left the chain, in memory that all workers of a server share. Made before they are
    forked; read and written under the log's lock. Each goes on from there as if the line were its own: it need not read
    what another has written, and sees what was cut off since. One that was killed while it told has told nothing."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _TOLD.size + _CHECK.size)

    def tell(self, path: Path, key_id: str, end: End) -> None:
        """Tell the others that the log of that path, which is written with that key, ends there."""
        data = _TOLD.pack(end.inode, end.size, end.seq, end.hash.encode("ascii"))
        self._memory[:] = data + _CHECK.pack(_check(path, key_id, data))

    def of(self, path: Path, key_id: str, inode: int) -> End | None:
        """Where the log of that path and that key ended, which is in that file; None where nobody has told it."""
        data = self._memory[: _TOLD.size]
        if self._memory[_TOLD.size :] != _CHECK.pack(_check(path, key_id, data)):
            return None
        found, size, seq, digest = _TOLD.unpack(data)
        return End(inode, size, seq, digest.decode("ascii")) if found == inode else None


def _check(path: Path, key_id: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{key_id} {path}".encode("utf-8", "surrogateescape")))
