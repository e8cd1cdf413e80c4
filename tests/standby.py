"""A streaming standby of a test's cluster, made by pg_basebackup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg

from mcpctl.postgres.embedded import Cluster
from site_of_mcpctl import eventually


@contextlib.contextmanager
def standby(primary: Cluster) -> Iterator[Cluster]:
    """The standby, when it answers."""
    made = Cluster(primary.binaries, {"hot_standby": "on", "hot_standby_feedback": "on"}, tcp=primary.port != 5432)
    try:
        made._settle([primary.folder.parent])
        made.superuser_password = primary.superuser_password
        data = made.folder / "data"
        command = [str(made._bin / "pg_basebackup"), "-D", str(data), "-d", primary.dsn, "-R", "-X", "stream"]
        assert made._run([*command, "-c", "fast", "--no-sync"], 60), made.log()
        made._start_on_free_port(tries=5)
        yield made
    except BaseException:
        print(made.log()[-4000:])
        raise
    finally:
        made.stop()


def promote(cluster: Cluster) -> None:
    """Make a primary of it (what `pg_ctl promote` does), and wait until it is one."""
    with psycopg.connect(cluster.dsn, autocommit=True) as admin:
        assert admin.execute("SELECT pg_promote()").fetchone() == (True,)


def caught_up(primary: Cluster, other: Cluster) -> None:
    """Wait until the standby has all that the primary has written."""
    with psycopg.connect(primary.dsn, autocommit=True) as one, psycopg.connect(other.dsn, autocommit=True) as two:
        one.execute("SET synchronous_commit = on")  # the clusters of tests commit without it, and flush a moment later
        one.execute("SELECT pg_logical_emit_message(true, 'test', 'all before it is flushed with it')")
        [written] = one.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone() or ("",)
        eventually(
            lambda: two.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [written]).fetchone() == (True,)
        )
