"""A backup's form, before it is encrypted: a gzip of a tar, whose first file is the manifest.

The manifest lists every other file with its size and SHA-256, in the order in which they stand there. Whoever reads it
takes nothing else: no link, no folder, no path, no header but the plain one of 512 bytes (POSIX.1-1988 ustar, and GNU's
size for more than 8 GiB). So nothing in the file says where anything is to be written, or how much memory it takes.
"""

import gzip
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, BinaryIO

from mcpctl.errors import ConfigError, Error

FORMAT, VERSION = "mcpctl backup", 1
MANIFEST = "manifest.json"
CHUNK = 1 << 20
_BLOCK = 512
_LARGEST_MANIFEST = 4 << 20
_MOST_FILES = 10_000
_RATIO = 100
"""How much smaller a log becomes at the very most: half of each line is a hash."""
_NAME = re.compile(r"[!-.0-~][!-~]{0,98}")
_MODE = re.compile(r"0[0-7]{3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One file. `kind` and `key` say what it is (see contents.py), `path` where it stood."""

    name: str
    kind: str
    key: str
    path: str
    mode: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself. `seq` and `hash` are those of the log's last line in it, `whole` whether its chain
    was when it was made."""

    version: str
    made_at: str
    host: str
    installation: str
    tokens: int
    users: int
    seq: int
    hash: str
    whole: bool
    files: tuple[Entry, ...]


def damaged(what: str) -> ConfigError:
    """What to raise for a backup that is not as it has to be."""
    return ConfigError(f"this backup cannot be believed: {what}", "nothing was changed; take another copy of it")


def write(out: IO[bytes], manifest: Manifest, files: Iterable[Iterable[bytes]]) -> None:
    """Write it: the manifest, then the files that it lists, whose bytes come in that order. Raises Error where one is
    not as the manifest says any more."""
    said = {"format": FORMAT, "format_version": VERSION, **asdict(manifest)}
    with gzip.GzipFile("", "wb", 6, out, mtime=0) as packed:
        data = json.dumps(said, indent=1).encode("ascii")
        packed.write(_header(MANIFEST, len(data)) + data + _padding(len(data)))
        for entry, chunks in zip(manifest.files, files, strict=True):
            packed.write(_header(entry.name, entry.size))
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                packed.write(chunk)
            if (size, digest.hexdigest()) != (entry.size, entry.sha256):
                raise Error(f"{entry.path} was changed while it was read", "try again")
            packed.write(_padding(size))
        packed.write(b"\0" * 2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _padding(size: int) -> bytes:
    return b"\0" * (-size % _BLOCK)


class Reader:
    """Reads one; `most` are the bytes that it may hold at all. Raises ConfigError where it is not as it has to be."""

    def __init__(self, stream: BinaryIO | IO[bytes], most: int) -> None:
        self._packed = gzip.GzipFile(fileobj=stream)
        self._left = most + (64 << 20)
        size = self._next(MANIFEST)
        if size > _LARGEST_MANIFEST:
            raise damaged("its manifest is too large")
        self.manifest = _manifest(b"".join(self._bytes(size)))
        total = sum(entry.size for entry in self.manifest.files)
        if total > self._left:
            raise damaged(f"it says that it holds {total} bytes, which is more than such a file can")

    def files(self) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        """Each file with its bytes, which must be taken; they are proved when they have ended."""
        for entry in self.manifest.files:
            if self._next(entry.name) != entry.size:
                raise damaged(f"{entry.name} has not the size that its manifest says")
            yield entry, self._proved(entry)
        if any(self._read(2 * _BLOCK)) or self._unpacked(1):
            raise damaged("more stands behind its end")

    def _proved(self, entry: Entry) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for chunk in self._bytes(entry.size):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != entry.sha256:
            raise damaged(f"{entry.name} is not the one that its manifest says")

    def _bytes(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            chunk = self._read(min(CHUNK, left))
            left -= len(chunk)
            yield chunk
        if any(self._read(-size % _BLOCK)):
            raise damaged("something stands between two files")

    def _next(self, name: str) -> int:
        """The size of the file that comes next, which must have that name."""
        try:
            found = tarfile.TarInfo.frombuf(self._read(_BLOCK), "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError, ValueError):
            raise damaged("it is no tar of mcpctl's") from None
        if found.type != tarfile.REGTYPE or found.name != name or found.linkname or found.size < 0:
            raise damaged(f"something else stands where {name} should")
        return found.size

    def _read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise damaged("it unpacks to more than such a file can hold")
        data = b""
        while len(data) < size and (more := self._unpacked(size - len(data))):
            data += more
        if len(data) < size:
            raise damaged("it is cut off")
        return data

    def _unpacked(self, most: int) -> bytes:
        try:
            return self._packed.read(most)
        except (OSError, EOFError, zlib.error):
            raise damaged("it is cut off, or cannot be unpacked") from None


def most_in(size: int) -> int:
    """The bytes that a backup of that size can hold."""
    return size * _RATIO


def _manifest(data: bytes) -> Manifest:
    try:
        said = json.loads(data)
        if said.pop("format") != FORMAT:
            raise damaged("it is another program's")
        version = said.pop("format_version")
        files = said.pop("files")
        entries = tuple(_checked(Entry(**one)) for one in files[:_MOST_FILES])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged("its manifest cannot be read") from None
    if version != VERSION:
        raise ConfigError(f"this backup has the form {version}, and this mcpctl knows {VERSION}", "use a newer mcpctl")
    try:
        found = Manifest(**said, files=entries)
    except TypeError:
        raise damaged("its manifest lacks something") from None
    names = [entry.name for entry in entries]
    if len(files) > _MOST_FILES or len(set(names)) != len(names) or not _is_typed(found):
        raise damaged("its manifest is not in order")
    return found


def _checked(entry: Entry) -> Entry:
    if not (_is_typed(entry) and _NAME.fullmatch(entry.name) and _SHA256.fullmatch(entry.sha256)):
        raise damaged("its manifest is not in order")
    if ".." in entry.name.split("/"):
        raise damaged("a file in it has a name that leads elsewhere")
    if entry.size < 0 or not _MODE.fullmatch(entry.mode) or any(ord(letter) < 32 for letter in entry.path + entry.key):
        raise damaged("its manifest is not in order")
    return entry


def _is_typed(found: Any) -> bool:
    kinds = {"files": tuple, "size": int, "tokens": int, "users": int, "seq": int, "whole": bool}
    return all(type(getattr(found, one.name)) is kinds.get(one.name, str) for one in fields(found))
