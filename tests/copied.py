"""Clusters with the demo's shop in them, which are copied from one that was made once a process and version: initdb
and the sample data take two seconds of a core, and a test run wants some hundreds."""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import hmac
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import psycopg
from psycopg import sql

from mcpctl.postgres import harden
from mcpctl.postgres.embedded import Binaries, Cluster

PASSWORD = "reader's own secret"
_MEMORY, _PLENTY = Path("/dev/shm"), 4 << 30


def fill(cluster: Cluster) -> None:
    """Make the shop, and the login role that can only read it."""
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE shop")
    dsn = cluster.dsn_for("postgres", cluster.superuser_password, "shop")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in ("shop.sql", "shop_reader.sql"):
            connection.execute((files("mcpctl.cli") / name).read_bytes())
        connection.execute(harden.script().encode())
        for role, password in (("shop_reader", PASSWORD), ("postgres", cluster.superuser_password)):
            named, verifier = sql.Identifier(role), sql.Literal(_verifier(password))
            connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(named, verifier))


def _verifier(password: str) -> str:
    """As mcpctl.postgres.scram makes it, of one round: the usual 4096 are a third of what a login takes, and these two
    log in some ten thousand times."""
    salt = b"of the tests"
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    shown = [base64.b64encode(one).decode() for one in (salt, stored, server)]
    return f"SCRAM-SHA-256$1:{shown[0]}${shown[1]}:{shown[2]}"


@functools.cache
def _original(binaries: Binaries) -> Cluster:
    """A stopped cluster with the shop in it."""
    cluster = Cluster.start(binaries)
    atexit.register(cluster.stop)
    fill(cluster)
    cluster.stop_server()
    return cluster


class Copied(Cluster):
    """A cluster like any other, with the shop in it; all of a version have one superuser's password."""

    def _settle(self, bases: Sequence[Path]) -> None:
        """In memory where there is plenty: a copy takes a fifth of the time there."""
        super()._settle([*(_MEMORY,) * (_MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _PLENTY), *bases])

    def _usable(self) -> bool:
        """As it was for the original, where its user could run the programs in their place."""
        self._bin = self.binaries.folder
        return _original(self.binaries)._bin == self._bin or super()._usable()

    def _initialise(self) -> None:
        original = _original(self.binaries)
        self.superuser_password = original.superuser_password
        subprocess.run(["cp", "-a", f"{original.folder / 'data'}/.", str(self.folder / "data")], check=True)
