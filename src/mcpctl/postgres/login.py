"""How mcpctl logs in: the operator's settings as one libpq connection string, and what a new connection is made to be.

PostgreSQL, "Database Connection Control Functions", lists the keywords; the operator may use those below.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl import private_file
from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError, NotFoundError

_KEYWORDS = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey",
    "sslcrl", "channel_binding", "require_auth", "gssencmode", "connect_timeout", "target_session_attrs",
    "keepalives", "keepalives_idle", "tcp_user_timeout",
})  # fmt: skip
CONNECT_TIMEOUT = 5
"""Seconds that opening a connection may take, unless the DSN says otherwise."""

SETTINGS: LiteralString = """
SELECT pg_catalog.pg_backend_pid(),
       (SELECT backend_start::text FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()),
       session_user::text,
       (SELECT rolsuper OR rolbypassrls OR rolreplication FROM pg_catalog.pg_roles WHERE rolname = session_user),
       pg_catalog.set_config('default_transaction_read_only', 'on', false),
       pg_catalog.set_config('statement_timeout', %s, false),
       pg_catalog.set_config('idle_in_transaction_session_timeout', '10s', false),
       pg_catalog.set_config('client_connection_check_interval', '250ms', false),
       pg_catalog.set_config('DateStyle', 'ISO, YMD', false),
       pg_catalog.set_config('IntervalStyle', 'iso_8601', false),
       pg_catalog.set_config('bytea_output', 'hex', false),
       pg_catalog.set_config('extra_float_digits', '1', false)
"""
"""What every connection is made to be, in one round trip, and what mcpctl has to know about it.

`client_connection_check_interval` ends a backend whose socket we closed although it will not be cancelled.
"""


@dataclass(frozen=True)
class Login:
    """A database of the config, ready to be connected to. `dsn()` reads the password file each time."""

    name: str
    settings: Database

    def dsn(self) -> str:
        """The libpq connection string. Raises ConfigError for a keyword or a password file that is not right."""
        values = self._keywords()
        if self.settings.password_file is not None:
            password = self._password(self.settings.password_file)
            values["password"] = password.decode("utf-8", "replace").rstrip("\r\n")
        values.setdefault("connect_timeout", CONNECT_TIMEOUT)
        named = values.get("host") or values.get("hostaddr") or os.environ.get("PGHOST") or os.environ.get("PGHOSTADDR")
        if "sslmode" not in values and not _is_here(str(named or "")):
            values["sslmode"] = "verify-full"
            values.setdefault("sslrootcert", "system")
        return make_conninfo("", **values)

    def _password(self, path: Path) -> bytes:
        try:
            return private_file.read(path, limit=4096).data
        except NotFoundError as problem:
            raise ConfigError(problem.message, "write the password into it, and nothing else; 0600") from None

    def _keywords(self) -> dict[str, Any]:
        config = self.settings
        if config.dsn is None:
            return {
                name: value
                for name, value in {
                    "host": config.host,
                    "port": config.port,
                    "dbname": config.dbname or self.name,
                    "user": config.user,
                    "sslmode": config.sslmode,
                    "sslrootcert": config.sslrootcert,
                }.items()
                if value is not None
            }
        try:
            values = conninfo_to_dict(config.dsn)
        except psycopg.Error:
            raise ConfigError(
                f"databases.{self.name}.dsn is no libpq connection string",
                "such as postgresql://reader@db.example.org/sales, or: host=db.example.org dbname=sales user=reader",
            ) from None
        if unknown := sorted(values.keys() - _KEYWORDS):
            raise ConfigError(
                f"databases.{self.name}.dsn: not taken: {', '.join(unknown)}", "leave out each of these keywords"
            )
        for port in str(values.get("port", "")).split(","):
            if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise ConfigError(  # it may be a password with a / or @ in it, which is not shown
                    f"databases.{self.name}.dsn: its port is none", "1 to 65535; a / or @ in a password is %2F or %40"
                )
        return dict(values)


def _is_here(host: str) -> bool:
    """Whether every host named is this machine: a socket's folder, or loopback."""
    for one in host.split(","):
        if one in ("", "localhost") or one.startswith(("/", "@")):
            continue
        try:
            if not ipaddress.ip_address(one).is_loopback:
                return False
        except ValueError:
            return False
    return True


def logins(databases: Mapping[str, Database]) -> dict[str, Login]:
    """All databases of the config by name, each checked as far as it can be without connecting."""
    found = {name: Login(name, database) for name, database in databases.items()}
    for login in found.values():
        login.dsn()
    return found
