"""A PgBouncer before a test's cluster, run by the cluster's own user."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mcpctl.postgres.embedded import Cluster, _free_port
from site_of_mcpctl import eventually

SCRIPT = Path(__file__).parent / "clients" / "pgbouncer.sh"


@contextlib.contextmanager
def bouncer(cluster: Cluster, mode: str, **settings: object) -> Iterator[int]:
    """The port of 127.0.0.1 on which it listens, in that pool_mode. Who logs in is looked up by auth_query, and the
    client's SCRAM keys open PostgreSQL. Skips where there is none to be had."""
    done = subprocess.run(
        ["sh", str(SCRIPT)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "MCPCTL_TEST_PGBOUNCER_DIR": str(cluster.folder / "pgbouncer")},
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    program, libraries = done.stdout.splitlines()
    port = _free_port()
    config = {
        "listen_addr": "127.0.0.1", "listen_port": port, "unix_socket_dir": "", "pool_mode": mode,
        "auth_type": "scram-sha-256", "auth_user": "postgres", "auth_file": cluster.folder / f"users-{port}",
        "logfile": cluster.folder / f"bouncer-{port}.log", "default_pool_size": 20, **settings,
    }  # fmt: skip
    lines = ["[databases]", f"* = host={cluster.host} port={cluster.port}", "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in config.items()]
    file = cluster._write(f"bouncer-{port}.ini", "\n".join(lines).encode())
    cluster._write(f"users-{port}", f'"postgres" "{cluster.superuser_password}"\n'.encode())
    cluster._write(f"bouncer-{port}.log", b"")
    _, uid, gid = cluster._user or ("", None, None)
    process = subprocess.Popen(
        [program, str(file)], user=uid, group=gid, extra_groups=None if uid is None else [], cwd=cluster.folder,
        env={"PATH": os.defpath, "LD_LIBRARY_PATH": libraries}, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, (cluster.folder / f"bouncer-{port}.log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
            psycopg.connect(dsn, password=cluster.superuser_password).close()
            return True
        return False

    try:
        eventually(answers)
        yield port
    finally:
        process.terminate()
        process.wait(10)
