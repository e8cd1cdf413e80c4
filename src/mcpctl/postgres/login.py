"""How mcpctl logs in: the operator's settings as one libpq connection string, and what a new connection is made to be.

PostgreSQL, "Database Connection Control Functions", lists the keywords; the operator may use those below.
"""

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl import keyring, private_file
from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.keyring import Keyring

_KEYWORDS = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey",
    "sslcrl", "channel_binding", "require_auth", "gssencmode", "connect_timeout", "target_session_attrs",
    "keepalives", "keepalives_idle", "tcp_user_timeout",
})  # fmt: skip
CONNECT_TIMEOUT = 5
"""Seconds that opening a connection may take, unless the DSN says otherwise."""

OWN = "own:"
"""What the names of databases that users bring begin with, in messages and in the audit log."""

PRIVILEGED: LiteralString = """
EXISTS (SELECT FROM pg_catalog.pg_roles r
        WHERE (r.rolsuper OR r.rolbypassrls OR r.rolreplication
               OR r.rolname IN ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'))
          AND pg_catalog.pg_has_role(session_user, r.oid, 'MEMBER'))"""
"""Whether a login is, or can become, one that reads files, runs programs, replicates or passes over row security."""
SETTINGS: LiteralString = f"""
SELECT pg_catalog.pg_backend_pid(),
       (SELECT backend_start::text FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()),
       session_user::text,
       {PRIVILEGED},
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
    """A database of the config, ready to be connected to. `dsn()` reads the password each time.

    `role` and `password` replace the config's own login by one user's; `password` opens what is sealed.
    """

    name: str
    settings: Database
    keyring: Keyring
    role: str | None = None
    password: Callable[[], str] | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str | None]:
        """What is one login, whatever its password is now."""
        return self.name, self.role

    @property
    def crowd(self) -> str:
        """Whose connections count together: the database's, whoever logs in."""
        return self.name

    @property
    def place(self) -> tuple[str, str]:
        """Host and port: databases of one place are of one cluster, and so have their roles in common."""
        values = conninfo_to_dict(self.dsn())
        host = values.get("host") or values.get("hostaddr") or os.environ.get("PGHOST") or ""
        return str(host), str(values.get("port") or os.environ.get("PGPORT") or "5432")

    def about(self) -> dict[str, str]:
        """Where and as whom it logs in, for people: host, port, dbname, user, sslmode; no password."""
        values = conninfo_to_dict(self.dsn())
        host, port = self.place
        usual = {"host": host or "(socket)", "port": port, "dbname": "", "user": "", "sslmode": "prefer"}
        return {name: str(values.get(name) or other) for name, other in usual.items()}

    def dsn(self) -> str:
        """The libpq connection string. Raises ConfigError for a keyword or a password file that is not right."""
        values = self._keywords()
        if self.role is not None:
            for name in ("password", "user"):
                values.pop(name, None)
            values["user"] = self.role
        if self.password is not None:
            values |= {"password": self.password(), "require_auth": "scram-sha-256"}
        elif self.settings.password_file is not None:
            values["password"] = self._read_password(self.settings.password_file)
        values.setdefault("connect_timeout", CONNECT_TIMEOUT)
        self._secure(values)
        return make_conninfo("", **values)

    def _secure(self, values: dict[str, Any]) -> None:
        """What leaves this machine is encrypted, and the other side shows who it is, unless the config says less."""
        named = values.get("host") or values.get("hostaddr") or os.environ.get("PGHOST") or os.environ.get("PGHOSTADDR")
        if is_here(str(named or "")):
            return
        if "sslmode" not in values:
            values["sslmode"] = "verify-full"
            values.setdefault("sslrootcert", "system")
        elif values["sslmode"] in ("disable", "allow", "prefer"):
            raise ConfigError(
                f"databases.{self.name}: sslmode {values['sslmode']} may send rows and passwords in clear to {named}",
                "leave it out (verify-full), or say require or verify-ca; disable is for loopback and sockets",
            )

    def _read_password(self, path: Path) -> str:
        try:
            text = private_file.read(path, limit=4096).data.decode("utf-8", "replace").rstrip("\r\n")
        except NotFoundError as problem:
            raise ConfigError(problem.message, "write the password into it, and nothing else; 0600") from None
        return self.keyring.open(text, f"the password in {path}") if keyring.is_sealed(text) else text

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
                    "sslcert": config.sslcert,
                    "sslkey": config.sslkey,
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


def is_here(host: str) -> bool:
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
