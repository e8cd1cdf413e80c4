"""Backups in tests: one key for all of them, and what is in one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyrage

from command_line import Done, Home
from mcpctl.backup import archive

KEY = pyrage.x25519.Identity.generate()
FOR = str(KEY.to_public())


def identity(folder: Path) -> str:
    """The file of the private key."""
    path = folder / "backup.key"
    path.touch(0o600)
    path.write_text(f"# for tests\n{KEY}\n")
    return str(path)


def made(home: Home, path: Path, *more: str) -> Path:
    home("backup", str(path), "--recipient", FOR, *more).good  # noqa: B018 - fails where it did
    return path


def restored(home: Home, path: Path, *more: str, **options: Any) -> Done:
    return home("restore", str(path), "--identity", identity(path.parent), *more, **options)


def plain(path: Path) -> bytes:
    """The tar.gz that is encrypted in it."""
    return pyrage.decrypt(path.read_bytes(), [KEY])


def names(path: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(plain(path))) as found:
        return found.getnames()


def sealed(path: Path, data: bytes) -> Path:
    """A file that anybody can make who knows the public key."""
    path.write_bytes(pyrage.encrypt(data, [KEY.to_public()]))
    return path


def parts(path: Path) -> tuple[archive.Manifest, list[bytes]]:
    """What a backup says of itself, and its files."""
    reader = archive.Reader(io.BytesIO(plain(path)), 1 << 30)
    return reader.manifest, [b"".join(chunks) for _, chunks in reader.files()]


def packed(manifest: archive.Manifest, files: list[bytes]) -> bytes:
    out = io.BytesIO()
    archive.write(out, manifest, [[data] for data in files])
    return out.getvalue()
