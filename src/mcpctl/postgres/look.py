"""What the doctor asks a database as its login: which tables it may write, what time it is there."""

from datetime import date, datetime
from typing import Any, cast

import psycopg
from psycopg import pq

LIBPQ = pq.version()
"""The version of the libpq in use: 160003 is 16.3."""
OLDEST = 15
"""The first version that mcpctl is made for."""
ENDS = {
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
"""Until when PostgreSQL mends what is found (www.postgresql.org/support/versioning)."""
_MOST = 100
_WRITABLE = """
SELECT pg_catalog.format('%%I.%%I', n.nspname, c.relname)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
    AND n.nspname !~ '^pg_(temp|toast)'
    AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
    AND (pg_catalog.has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
        OR pg_catalog.has_any_column_privilege(c.oid, 'INSERT, UPDATE'))
ORDER BY 1 LIMIT %s"""


def writable(connection: psycopg.Connection[Any]) -> list[str]:
    """The tables that the connection's login may write, by whatever way, quoted as SQL wants them."""
    return [str(row[0]) for row in connection.execute(_WRITABLE, (_MOST,)).fetchall()]


def time(connection: psycopg.Connection[Any]) -> datetime:
    """What time it is there."""
    [(found,)] = connection.execute("SELECT pg_catalog.clock_timestamp()").fetchall()
    return cast(datetime, found)
