"""Clusters with the demo's shop in them, which are copied from one that was made once a process and version: initdb
and the sample data take two seconds of a core, and a test run wants some hundreds."""

from __future__ import annotations

import atexit
import functools
import subprocess
from importlib.resources import files

import psycopg
from psycopg import sql

from mcpctl.postgres import harden
from mcpctl.postgres.embedded import Binaries, Cluster

PASSWORD = "reader's own secret"


def fill(cluster: Cluster) -> None:
    """Make the shop, and the login role that can only read it."""
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE shop")
    dsn = cluster.dsn_for("postgres", cluster.superuser_password, "shop")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in ("shop.sql", "shop_reader.sql"):
            connection.execute((files("mcpctl.cli") / name).read_bytes())
        connection.execute(harden.script().encode())
        connection.execute(sql.SQL("ALTER ROLE shop_reader PASSWORD {}").format(sql.Literal(PASSWORD)))


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

    def _initialise(self) -> None:
        original = _original(self.binaries)
        self.superuser_password = original.superuser_password
        subprocess.run(["cp", "-a", f"{original.folder / 'data'}/.", str(self.folder / "data")], check=True)
