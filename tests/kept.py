"""Backups in tests: one key for all of them, and what is in one."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrage

from command_line import Done, Home
from mcpctl import private_file
from mcpctl.backup import archive
from mcpctl.identity import sessions as of_sessions
from mcpctl.identity import users
from mcpctl.identity.browsers import Browsers
from mcpctl.identity.grants import Grant
from mcpctl.identity.own_databases import OwnDatabase, OwnDatabases
from mcpctl.identity.tokens import utcnow
from mcpctl.keyring import Keyring
from mcpctl.state import State
from site_of_mcpctl import record

KEY = pyrage.x25519.Identity.generate()
FOR = str(KEY.to_public())
ROW = OwnDatabase("alice", "mine", "db.example.org", "203.0.113.7", 5432, "mine", "me", "", "2026-11-01T00:00:00Z")
RULES = {of_sessions.PASSWORD: of_sessions.Rules()}


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


def populated(tmp_path: Path) -> Home:
    """Some users, sealed passwords, a database of a user's, a session and a browser."""
    home = Home(tmp_path / "home", "auth: {sessions: {enabled: true}}\n")
    people = users.user_file(home.folder / "users.yaml")
    ring = Keyring(home.folder / "secret.key")
    for name in ("alice", "bob", "carol"):
        users.add(people, name, None, datetime.now(UTC), roles=["mcp-tools"], password=None)
        record(people, name, Grant("shop", read=("public",), passwords={"read": ring.seal("a password")}))
    with closing(State(home.folder / "state.db")) as store:
        OwnDatabases(store, ring, people).add(replace(ROW, created_at="2999-01-01T00:00:00Z"), "own", 5)
        of_sessions.Sessions(store, RULES).open("alice", of_sessions.mark_of(None))
        Browsers(store, people.current, utcnow).sign_in("a cookie", "alice", of_sessions.mark_of(None))
    private_file.create(home.folder / "shop.password", ring.seal("sealed").encode())
    home.config.write_text(
        home.config.read_text().replace("user: reader", "user: reader, password_file: shop.password")
    )
    return home


def lose(home: Home, *names: str) -> None:
    for one in [home.folder / name for name in names] or list(home.folder.iterdir()):
        one.unlink()


def tokens(home: Home) -> dict[str, str]:
    return {one["id"]: one["status"] for one in json.loads(home("token", "list", "--json").good)["tokens"]}


def sessions(home: Home) -> list[str]:
    with closing(State(home.folder / "state.db")) as store:
        return [one.id for one in of_sessions.Sessions(store, RULES).all()]


def note(home: Home, event: str, **fields: str) -> None:
    from mcpctl.audit.log import AuditLog, read_key

    log = AuditLog(home.folder / "audit.jsonl", read_key(home.folder / "audit.key"), utcnow)
    log.append(event, **fields)
    log.close()
