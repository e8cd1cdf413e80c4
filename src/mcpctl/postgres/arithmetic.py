"""How many connections PostgreSQL has to give to those who are no superusers."""

from collections.abc import Sequence
from typing import Any

import psycopg

from mcpctl.postgres.login import Login

_ROOM = """
SELECT pg_catalog.current_setting('max_connections')::int
     - pg_catalog.current_setting('superuser_reserved_connections')::int
     - coalesce(pg_catalog.current_setting('reserved_connections', true)::int, 0)"""


def room(connection: psycopg.Connection[tuple[Any, ...]]) -> int:
    """max_connections less what is kept for superusers (PostgreSQL, "Connections and Authentication")."""
    row = connection.execute(_ROOM).fetchone()
    return int(row[0]) if row is not None else 0


def asked(logins: Sequence[Login], seconds: int = 2) -> int | None:
    """The same, asked as the first of these logins that PostgreSQL takes in that time; None where it takes none."""
    for login in logins:
        try:
            with psycopg.connect(login.dsn(), connect_timeout=seconds, autocommit=True) as connection:
                return room(connection)
        except psycopg.Error:
            continue
    return None
