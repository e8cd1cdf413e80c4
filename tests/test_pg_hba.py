"""pg_hba.conf: what lets the users' login roles in from anywhere is told, in whatever form it stands there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.postgres import administrator, roles
from mcpctl.postgres.embedded import Binaries, Cluster

SOCKET = roles.hba_lines("local")
OWN = "local all postgres scram-sha-256\nhost all postgres 127.0.0.1/32 scram-sha-256\n"


@pytest.fixture(scope="module")
def cluster(newest: Binaries) -> Iterator[Cluster]:
    with Cluster.start(newest) as found:
        with psycopg.connect(found.dsn, autocommit=True) as connection:
            connection.execute("CREATE ROLE mcp_logins")
            connection.execute("CREATE ROLE mcp_alice_w LOGIN IN ROLE mcp_logins")
            connection.execute("CREATE ROLE team ROLE mcp_alice_w")
        yield found


def told(cluster: Cluster, *lines: str) -> str | None:
    """What is said of a file with these lines behind the administrator's own."""
    file = cluster.folder / "data" / "pg_hba.conf"
    with file.open("w", encoding="utf-8") as out:
        out.write(OWN + "\n".join(lines) + "\n")
    site.reload(cluster)
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        found = administrator.keeps_logins_here(connection, "shop")
    return None if found is None else found.message


@pytest.mark.parametrize(
    "lines",
    [
        (*SOCKET, "local all all peer", "host all all all scram-sha-256"),
        (*roles.hba_lines("192.0.2.7/32"), "local all all peer", "host all all 0.0.0.0/0 scram-sha-256"),
        (*roles.hba_lines("192.0.2.7/32", tls=True), "host all all all scram-sha-256"),
        ("host all other_role all trust", "host elsewhere all all trust"),
        (),
    ],
)
def test_a_file_that_keeps_the_logins_to_mcpctl_is_taken(cluster: Cluster, lines: tuple[str, ...]) -> None:
    assert told(cluster, *lines) is None


@pytest.mark.parametrize(
    "lines",
    [
        ("host all all all scram-sha-256",),
        ("local all all peer",),
        ("host all all all scram-sha-256", *SOCKET),
        ("host all +mcp_logins 127.0.0.1/32 trust", *SOCKET),
        ("host all +mcp_logins 0.0.0.0/0 scram-sha-256", *SOCKET),
        ("host all +mcp_logins all scram-sha-256", *SOCKET),
        ("local all +mcp_logins trust", "host all +mcp_logins all reject"),
        ("host all /^mcp_ 0.0.0.0/0 scram-sha-256", *SOCKET),
        ("host all mcp_wendy_w,mcp_alice_w 0.0.0.0/0 scram-sha-256", *SOCKET),
        ("host all +team 0.0.0.0/0 scram-sha-256", *SOCKET),
        ("host /^post all 0.0.0.0/0 scram-sha-256", *SOCKET),
        ("host postgres +mcp_logins all reject", "host all all all scram-sha-256"),
        ("host all +mcp_logins 10.0.0.0/8 reject", "host all all all scram-sha-256"),
        ("hostssl all +mcp_logins all reject", "host all all all scram-sha-256"),
    ],
)
def test_a_file_that_lets_the_logins_in_from_elsewhere_is_told(cluster: Cluster, lines: tuple[str, ...]) -> None:
    said = told(cluster, *lines)
    assert said is not None
    assert "lets the login roles of mcpctl in from anywhere" in said


def test_a_rule_in_an_included_file_counts_at_its_place(cluster: Cluster) -> None:
    more = cluster.folder / "data" / "open.conf"
    more.write_text("\n" * 10 + "host all all all scram-sha-256\n")
    more.chmod(0o644)
    said = told(cluster, "include open.conf", *SOCKET)
    assert said is not None
    assert "line 11" in said


def test_a_file_that_was_not_read_yet_counts_for_nothing(cluster: Cluster) -> None:
    file = cluster.folder / "data" / "pg_hba.conf"
    good = (*SOCKET, "host all all all scram-sha-256")
    assert told(cluster, *good) is None
    seen = file.stat().st_mtime
    os.utime(file, (seen, seen + 60))  # PostgreSQL tells whole seconds
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        found = administrator.keeps_logins_here(connection, "shop")
    os.utime(file, (seen, seen))
    assert found is not None
    assert "has been changed since PostgreSQL has read it" in found.message
    assert found.hint is not None
    assert "pg_reload_conf" in found.hint
