"""How mcpctl logs in: the operator's settings as one libpq connection string, and what a new connection is made to be.

PostgreSQL, "Database Connection Control Functions", lists the keywords; the operator may use those below.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl import keyring, private_file
from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.identity.grants import SUFFIXES
from mcpctl.keyring import Keyring

KEYWORDS = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey",
    "sslcrl", "channel_binding", "require_auth", "gssencmode", "connect_timeout", "target_session_attrs",
    "keepalives", "keepalives_idle", "tcp_user_timeout",
})  # fmt: skip
KNOWS_REQUIRE_AUTH = pq.version() >= 160000
"""Whether this libpq can be told how the server may ask for the password. Without it nothing keeps a server that shows
no certificate from asking for it in clear."""
SCRAM_ONLY = {"require_auth": "scram-sha-256"} if KNOWS_REQUIRE_AUTH else {}
CONNECT_TIMEOUT = 5
"""Seconds that opening a connection may take, unless the DSN says otherwise."""
SYSTEM = "system"
"""What libpq calls the system's CAs as an sslrootcert."""
_MEANT = {"read-write": "primary", "read-only": "standby"}
"""What who asks for such a server means. libpq goes by default_transaction_read_only as well, which is on for a login
that can only read, wherever it is."""

OWN = "own:"
"""What the names of databases that users bring begin with in the logs; the callers know them without it."""

FIRM = {
    "role": "none",
    "statement_timeout": "60s",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "client_connection_check_interval": "250ms",
    "default_transaction_read_only": "off",
    "row_security": "on",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    "client_min_messages": "notice",
}
"""What a connection is from its first moment, whatever the role's owner or the database's has made its default by ALTER
ROLE or ALTER DATABASE: what a client asks for when it connects goes before those (PostgreSQL, "Setting Parameters").
As `role`, a login could otherwise be made another one, which can neither see nor end the backends of its own."""
SHARED_BACKENDS = (
    "a pooler stands before it that gives several clients one backend (pool_mode transaction or statement)"
)
POOLED_LOGINS = "a pooler stands before it, which does not pass on what a user's own login asks for when it connects"
PRIVILEGED: LiteralString = """
EXISTS (SELECT FROM pg_catalog.pg_roles r
        WHERE (r.rolsuper OR r.rolbypassrls OR r.rolreplication
               OR r.rolname IN ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'))
          AND pg_catalog.pg_has_role(session_user, r.oid, 'MEMBER'))"""
"""Whether a login is, or can become, one that reads files, runs programs, replicates or passes over row security."""
SETTINGS: LiteralString = f"""
SELECT pg_catalog.pg_backend_pid(),
       (SELECT EXTRACT(epoch FROM backend_start)::text FROM pg_catalog.pg_stat_activity
        WHERE pid = pg_catalog.pg_backend_pid()),
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

    @cached_property
    def key(self) -> tuple[str, str | None]:
        """What is one login, whatever its password is now."""
        return self.name, self.role

    @cached_property
    def for_settings(self) -> bool:
        """Whether it is a user's login for PostgreSQL's settings, and for nothing else."""
        return self.role is not None and self.role.endswith(f"_{SUFFIXES['admin']}")

    @property
    def shown(self) -> str:
        """How the audit log and the server's own call it; `name` is how its callers do."""
        return self.name

    @property
    def crowd(self) -> str:
        """Whose connections count together: the database's, whoever logs in."""
        return self.name

    @property
    def place(self) -> tuple[str, str]:
        """Host and port: databases of one place are of one cluster, and so have their roles in common."""
        values = _with_defaults(conninfo_to_dict(self.dsn()))
        return str(values.get("hostaddr") or values.get("host") or ""), str(values.get("port") or "5432")

    def about(self) -> dict[str, str]:
        """Where and as whom it logs in, for people: host, port, dbname, user, sslmode; no password."""
        values = conninfo_to_dict(self.dsn())
        known = _with_defaults(values)
        host, port = known.get("host") or known.get("hostaddr") or "(socket)", known.get("port") or "5432"
        usual = {"host": host, "port": port, "dbname": "", "user": "", "sslmode": "prefer"}
        return {name: str(values.get(name) or other) for name, other in usual.items()}

    def dsn(self) -> str:
        """The libpq connection string. Raises ConfigError for a keyword or a password file that is not right."""
        values = self._keywords()
        if self.role is not None:
            for name in ("password", "user"):
                values.pop(name, None)
            values["user"] = self.role
        if self.password is not None:
            values |= {"password": self.password(), **SCRAM_ONLY}
        elif self.settings.password_file is not None:
            values["password"] = self._read_password(self.settings.password_file)
        values.setdefault("connect_timeout", CONNECT_TIMEOUT)
        if (wanted := values.get("target_session_attrs")) in _MEANT:
            values["target_session_attrs"] = _MEANT[wanted]
        if self.role is not None:  # that for settings runs no text of a caller's, and must see the server's own values
            values |= firmly({"role": "none"} if self.for_settings else FIRM)
        secure(values, self._key("sslmode"))
        return make_conninfo("", **values)

    def _key(self, instead: str) -> str:
        """The key that says where this login leads: one of the connection strings, or `instead` where there is none."""
        config = self.settings
        dsn = "service_dsn" if config.dsn == config.service_dsn else "dsn"
        return f"databases.{self.name}.{instead if config.dsn is None else dsn}"

    def _read_password(self, path: Path) -> str:
        try:
            text = (
                private_file.read(path, limit=4096, **keyring.rules(path))
                .data.decode("utf-8", "replace")
                .rstrip("\r\n")
            )
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
                f"{self._key('dsn')} is no libpq connection string",
                "such as postgresql://reader@db.example.org/sales, or: host=db.example.org dbname=sales user=reader",
            ) from None
        if unknown := sorted(values.keys() - KEYWORDS):
            raise ConfigError(
                f"{self._key('dsn')}: not taken: {', '.join(unknown)}", "leave out each of these keywords"
            )
        check_ports(values, self._key("dsn"))
        return dict(values)


def firmly(settings: Mapping[str, str]) -> dict[str, str]:
    """The keywords of libpq for a connection with these settings, and UTF-8."""
    return {"options": " ".join(f"-c {name}={value}" for name, value in settings.items()), "client_encoding": "UTF8"}


def check_ports(values: Mapping[str, Any], where: str) -> None:
    """See that each port is one. ConfigError names `where` the values are from."""
    for port in str(values.get("port", "")).split(","):
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(  # it may be a password with a / or @ in it, which is not shown
                f"{where}: its port is none", "1 to 65535; a / or @ in a password is %2F or %40"
            )


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A connection string's values, and what libpq takes from the environment or a service file where it says none."""
    defaults = {option.keyword.decode(): option.val.decode() for option in pq.Conninfo.get_defaults() if option.val}
    return {**defaults, **values}


def secure(values: dict[str, Any], where: str) -> None:
    """What leaves this machine is encrypted, and the other side shows who it is, unless the config says less. Who shows
    it not is not told the password in clear. ConfigError names `where` the values are from."""
    known = _with_defaults(values)
    named = [str(known[name]) for name in ("host", "hostaddr") if known.get(name)]  # libpq goes to the second
    if elsewhere := [one for one in named if not is_here(one)]:
        if "sslmode" not in values:
            values["sslmode"] = "verify-full"
            values.setdefault("sslrootcert", SYSTEM)
        elif values["sslmode"] in ("disable", "allow", "prefer"):
            raise ConfigError(
                f"{where}: sslmode {values['sslmode']} may send rows and passwords in clear to {elsewhere[0]}",
                "leave it out (verify-full), or say require or verify-ca; disable is for loopback and sockets",
            )
    if (values.get("sslrootcert") or known.get("sslrootcert")) == SYSTEM:
        find_cas()
    over_tcp = bool(named) and not any(one[:1] in ("", "/", "@") for text in named for one in text.split(","))
    verified = over_tcp and str(values.get("sslmode") or known.get("sslmode")).startswith("verify-")
    if KNOWS_REQUIRE_AUTH and not verified and not known.get("require_auth"):
        values["require_auth"] = "!password"


def find_cas() -> None:
    """Tell libpq where this system's CAs are, as Python knows it, unless the environment says so. The OpenSSL in
    psycopg's wheel looks for them in a folder of its own, which no system has, and would trust nobody. OpenSSL,
    SSL_CTX_set_default_verify_paths(3)."""
    import ssl

    if os.environ.keys() & {"SSL_CERT_FILE", "SSL_CERT_DIR"}:
        return
    found = ssl.get_default_verify_paths()
    for name, path in (("SSL_CERT_FILE", found.cafile), ("SSL_CERT_DIR", found.capath)):
        if path is not None:
            os.environ[name] = path


_LOOPBACK = "localhost"


def _plain(host: str) -> str:
    """One name of a host or address for all that mean the same."""
    if host.startswith("/"):
        return os.path.normpath(host)
    text = host.lower().rstrip("./") or "/"
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(text))  # as the resolver does: 127.1
        except OSError:
            return text
    address = getattr(address, "ipv4_mapped", None) or address
    return _LOOPBACK if address.is_loopback or address.is_unspecified else str(address)


def _kind(host: str) -> str:
    return "/" if host[0] in "/@" else host


def _spots(known: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(host, port) of each server that a connection string may lead to; names of one host are made one."""
    hosts = [_plain(one) for one in str(known.get("hostaddr") or known.get("host") or "/").split(",")]
    ports = [one or "5432" for one in str(known.get("port") or "5432").split(",")]
    return set(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False))


def same_place(dsn: str, other: str) -> bool:
    """Whether two connection strings may lead to one server: a socket's folder and loopback with the same port do."""
    one, two = (_with_defaults(conninfo_to_dict(text)) for text in (dsn, other))
    return any(
        port == other_port and (host == there or {_LOOPBACK, "/"} == {_kind(host), _kind(there)})
        for host, port in _spots(one)
        for there, other_port in _spots(two)
    )


def same_database(one: Login, other: Login) -> bool:
    """Whether two logins may lead to one database."""
    dsns = one.dsn(), other.dsn()
    known = (_with_defaults(conninfo_to_dict(dsn)) for dsn in dsns)
    name, other_name = (str(found.get("dbname") or found.get("user") or "") for found in known)
    return name == other_name and same_place(*dsns)


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
