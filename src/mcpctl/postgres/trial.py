"""A login that is tried: whether PostgreSQL takes it, and what it is like."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from mcpctl.errors import Error
from mcpctl.identity.grants import identifier
from mcpctl.postgres.login import POOLED_LOGINS, PRIVILEGED, SHARED_BACKENDS, Login

_ANSWERING = """extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text,
       (SELECT oid::int8 FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"""
_ABOUT = f"""
SELECT session_user, pg_catalog.current_setting('server_version'), pg_catalog.current_database(),
       {PRIVILEGED},
       {_ANSWERING},
       (SELECT s.version FROM pg_catalog.pg_stat_ssl s WHERE s.pid = pg_catalog.pg_backend_pid() AND s.ssl)"""


@dataclass(frozen=True)
class About:
    """What a login found. `tls` is the protocol's version, None for a socket or plain TCP; `elapsed` is in ms;
    `answering` tells one database of one running server from all others; `pooled`: it was reached through a pooler."""

    user: str
    version: str
    database: str
    privileged: bool
    tls: str | None
    elapsed: float
    answering: tuple[str, int]
    pooled: bool = False

    def words(self) -> str:
        """In one line."""
        pooled = ", through a pooler" if self.pooled else ""
        return f"PostgreSQL {self.version}, {self.tls or 'no TLS'}, {self.elapsed:.0f} ms{pooled}"

    def check(self, login: Login) -> None:
        """Raises an Error for a login with too much power, with the SQL that makes a better one."""
        if self.privileged and not login.settings.allow_privileged_login:
            raise Error(
                f"{self.user} is or can become a superuser, bypass row security, replicate or reach the server's "
                "files, and a question could use that",
                f"make a role that can only read, and log in as it:\n{reader_sql(self.database)}",
            )


def reason(problem: psycopg.Error) -> str:
    """The last thing that libpq says went wrong; indented lines, DETAIL and "Either …" below it are advice."""
    said = str(problem).strip().splitlines()
    lines = [line for line in said if not line[:1].isspace() and not line.startswith("Either provide the file")]
    fatal = [line for line in lines if "FATAL:" in line]
    return (fatal or lines or [type(problem).__name__])[-1]


def hint_of(said: str, otherwise: str) -> str:
    """What to do about a reason: where nobody here believes PostgreSQL's certificate, to say whose it is."""
    if "certificate verify failed" in said or "root certificate file" in said:
        return "sslrootcert names the CA of its certificate; `mcpctl init` takes it as --db-sslrootcert FILE"
    return otherwise


def log_in(login: Login) -> About:
    """Log in once. Raises an Error with PostgreSQL's reason, which never holds a password."""
    begun = monotonic()
    try:
        conninfo = make_conninfo(login.dsn(), client_encoding="UTF8")
        with psycopg.connect(conninfo, autocommit=True, application_name="mcpctl test") as connection:
            row = connection.execute(_ABOUT).fetchone()
            pooled = _pid(connection) != connection.info.backend_pid
            shared = pooled and _shared(connection, conninfo)
    except psycopg.Error as problem:
        said = reason(problem)
        hint = "are host, database, user and password the right ones? PostgreSQL's own log says more"
        if "no password supplied" in said:
            hint = "`mcpctl database add` takes one with --ask-password, or --password-file FILE"
        raise Error(f"{login.name}: {said}", hint_of(said, hint)) from None
    if shared:
        raise Error(f"{login.name}: {SHARED_BACKENDS}", "set pool_mode = session there, or name PostgreSQL itself")
    if pooled and login.role is not None:
        raise Error(f"{login.name}: {POOLED_LOGINS}", "name PostgreSQL itself for a database with roles: per_user")
    if row is None:
        raise Error(f"{login.name}: PostgreSQL gave no answer", "try again")
    return About(row[0], row[1], row[2], bool(row[3]), row[6], (monotonic() - begun) * 1000, (row[4], row[5]), pooled)


def answers(login: Login) -> None:
    """See that a PostgreSQL is where a login leads, whether it would let the login in or not (libpq, PQping). Raises an
    Error where none answers, or none that can be believed."""
    conninfo = make_conninfo(login.dsn(), client_encoding="UTF8")
    if psycopg.pq.PGconn.ping(conninfo.encode()) == psycopg.pq.Ping.OK:
        return
    try:
        psycopg.connect(conninfo, application_name="mcpctl test").close()
    except psycopg.Error as problem:
        said = reason(problem)
        hint = hint_of(said, "is PostgreSQL there, and does it take connections?")
        raise Error(f"{login.name}: {said}", hint) from None


def _pid(connection: psycopg.Connection[Any]) -> int:
    return int((connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone() or (0,))[0])


def _shared(connection: psycopg.Connection[Any], conninfo: str) -> bool:
    """Whether a pooler gives two clients one backend, or a client another one each time."""
    pid = _pid(connection)
    with psycopg.connect(conninfo, autocommit=True, application_name="mcpctl test") as other:
        return _pid(other) == pid or _pid(connection) != pid


def one_of(logins: Iterable[Login]) -> About | None:
    """What the first of these logins that is let in finds; None where none is."""
    for login in logins:
        with contextlib.suppress(Error):
            return log_in(login)
    return None


def answering(connection: psycopg.Connection[Any]) -> tuple[str, int]:
    """`About.answering` of the database of a connection."""
    start, oid = connection.execute(f"SELECT {_ANSWERING}".encode()).fetchone() or ("", 0)
    return start, oid


def reader_sql(dbname: str) -> str:
    """A login role that can only read the schema public of a database: PostgreSQL, "Predefined Roles", "GRANT"."""
    return f"""  CREATE ROLE mcp_reader LOGIN CONNECTION LIMIT 24;
  \\password mcp_reader
  ALTER ROLE mcp_reader SET default_transaction_read_only = on;
  ALTER ROLE mcp_reader SET statement_timeout = '30s';
  ALTER ROLE mcp_reader SET temp_file_limit = '256MB';
  GRANT CONNECT ON DATABASE {identifier(dbname)} TO mcp_reader;
  GRANT USAGE ON SCHEMA public TO mcp_reader;
  GRANT SELECT ON ALL TABLES IN SCHEMA public TO mcp_reader;
  ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO mcp_reader;"""
