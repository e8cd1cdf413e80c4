"""A database that a user brings: what a DSN may say, which addresses it may lead to, and how mcpctl logs in there.

Whoever writes the DSN may be hostile, and so may be the server it names. So a DSN says host, port, dbname and user;
every other keyword of libpq's that a variable of the environment could set is set here (PostgreSQL, "Environment
Variables"). The host is resolved once, and only that address is ever connected to.
"""

import functools
import ipaddress
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl.config_keys import OwnDatabases
from mcpctl.config_values import Network, host_name
from mcpctl.errors import ConfigError, Error, ForbiddenError, UnavailableError, UsageError
from mcpctl.identity.own_databases import OwnDatabase
from mcpctl.lookups import Lookups
from mcpctl.postgres.hba import GROUP
from mcpctl.postgres.login import CONNECT_TIMEOUT, OWN, SYSTEM, Login, find_cas
from mcpctl.postgres.terminator import bounded

CHECK = 10.0
"""Seconds that resolving, connecting and looking may take altogether."""
LOOK = 5.0
"""Seconds that a server which has let us in may take to say who we are there."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAY_SAY = ("host", "port", "dbname", "user", "password")
_LONGEST = 2000
_SPECIAL = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
    "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",
    "::/96", "fe80::/10", "fec0::/10", "ff00::/8", "fd00:ec2::254/128", "fd20:ce::254/128",
    "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16",
)))  # fmt: skip
"""Where only a network of the config that lies within it lets anybody: this machine (with ::1 and ::), the link,
multicast, what is reserved, the metadata services of clouds, and IPv6 that stands for an IPv4 address (NAT64, Teredo,
6to4). A mapped IPv4 address is judged as IPv4."""
_NOT_TO_BE_SET = {"service", "servicefile"}
_SENT_ANYWAY = ("PGSERVICE", "PGSERVICEFILE", "PGTZ", "PGDATESTYLE", "PGGEQO")
"""Variables that libpq heeds whatever the connection string says."""
_LOOK = f"""SELECT (SELECT rolsuper OR rolbypassrls OR rolreplication FROM pg_catalog.pg_roles
 WHERE rolname = session_user),
 EXISTS (SELECT FROM pg_catalog.pg_roles g WHERE g.rolname = '{GROUP}'
  AND pg_catalog.pg_has_role(session_user, g.oid, 'MEMBER'))"""


# -- the DSN ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a DSN says."""

    host: str
    port: int
    dbname: str
    user: str
    password: str | None = field(default=None, repr=False)


def parse(dsn: str) -> Wanted:
    """What a connection string or URL says. UsageError for any keyword but host, port, dbname, user and password, for
    several hosts, a socket, or a value that is none. It is not shown: it may hold a password."""
    hint = "such as postgresql://reader@db.example.org:5432/sales, or: host=db.example.org dbname=sales user=reader"
    try:
        values = conninfo_to_dict(dsn) if len(dsn) <= _LONGEST and dsn.isprintable() else {}
    except (psycopg.Error, UnicodeError):
        values = {}
    if not values:
        raise UsageError("dsn is no connection string", hint)
    if unknown := sorted(values.keys() - set(_MAY_SAY)):
        raise UsageError(
            f"dsn takes host, port, dbname and user, and not {', '.join(unknown)}", "leave it out; the server sets it"
        )
    for name in ("host", "dbname", "user"):
        if not values.get(name):
            raise UsageError(f"dsn names no {name}", hint)
    for name in ("dbname", "user"):
        if len(str(values[name]).encode()) > 63:
            raise UsageError(f"the {name} in dsn is longer than PostgreSQL's names, which have 63 bytes")
    return Wanted(
        _host(str(values["host"])),
        _port(str(values.get("port") or "5432")),
        str(values["dbname"]),
        str(values["user"]),
        str(values["password"]) if values.get("password") else None,
    )


def _host(text: str) -> str:
    try:
        if "%" not in text:
            return str(ipaddress.ip_address(text))
        name = None
    except ValueError:
        name = host_name(text)
    if name is None:
        raise UsageError(
            "the host in dsn is no host name and no address", "one host; no folder of a socket, no list, no port in it"
        )
    return name


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536):
        raise UsageError("the port in dsn is none", "1 to 65535; a / or @ in a password is %2F or %40")
    return int(text)


# -- where it may lead -------------------------------------------------------------------------------------------------


class Hosts:
    """The hosts, addresses and networks of the config."""

    def __init__(self, named: Sequence[str]) -> None:
        self._names = {one for one in named if host_name(one) is not None}
        self._networks = [ipaddress.ip_network(one) for one in named if one not in self._names]

    def may_be(self, host: str) -> bool:
        """Whether it is worth asking what that name means."""
        return host in self._names or bool(self._networks)

    def allow(self, host: str, address: Address) -> bool:
        """Whether that address of that host may be connected to."""
        address = plain(address)
        special = next((net for net in _SPECIAL if net.version == address.version and address in net), None)
        if any(address in one and (special is None or _within(one, special)) for one in self._networks):
            return True
        if host not in self._names:
            return False
        return special is None or (host == "localhost" and address.is_loopback)


def plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one is, where it is one."""
    return getattr(address, "ipv4_mapped", None) or address


def _within(inner: Network, outer: Network) -> bool:
    if isinstance(inner, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


Resolve = Callable[[str, int], Awaitable[list[str]]]


class Resolver:
    """Asks the system's resolver for the hosts that users name, none of which may hold up the config's."""

    def __init__(self, lookups: Lookups | None = None) -> None:
        self._lookups = lookups or Lookups()

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of a host; none where it has none. UnavailableError where too many are being looked up."""
        try:
            return await self._lookups(host, port)
        except (OSError, UnicodeError):
            return []


async def addresses(wanted: Wanted, hosts: Hosts, ask: Resolve) -> list[str]:
    """The addresses that may be tried: of each family the first that the config lets in. ForbiddenError where there is
    none; it says the same of a host that there is not, so that nobody learns names of our network."""
    found: dict[int, str] = {}
    if hosts.may_be(wanted.host):
        for text in await ask(wanted.host, wanted.port):
            address = plain(ipaddress.ip_address(text.partition("%")[0]))
            if "%" not in text and hosts.allow(wanted.host, address):
                found.setdefault(address.version, str(address))
    if not found:
        raise ForbiddenError(
            f"{wanted.host} is none of the hosts that databases may be on here, or there is no such host",
            "the administrator names them in own_databases.hosts",
        )
    return list(found.values())


# -- how mcpctl logs in ------------------------------------------------------------------------------------------------


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError for a variable that libpq would heed, or send to a user's server, whatever it is told."""
    for name in _SENT_ANYWAY:
        if name in environ:
            raise ConfigError(
                f"the environment's {name} would take part in connections to users' own databases",
                f"start without {name}, or leave own_databases.hosts empty",
            )


@functools.cache
def _of_environment() -> dict[str, str]:
    """Each keyword that a variable could set, with what it is when none does."""
    found = {
        option.keyword.decode(): (option.compiled or b"").decode()
        for option in pq.Conninfo.get_defaults()
        if option.envvar and option.keyword.decode() not in _NOT_TO_BE_SET
    }
    # libpq 18 takes no empty text for these
    return found | {name: "3.0" for name in ("min_protocol_version", "max_protocol_version") if name in found}


@dataclass(frozen=True, kw_only=True)
class OwnLogin(Login):
    """The login of a database that a user has brought. `role` is its login, so that it has a bound of its own."""

    row: OwnDatabase
    rules: OwnDatabases

    @functools.cached_property
    def key(self) -> tuple[str, str | None]:
        """Nobody else's, and not that of an earlier one of the same name."""
        row = self.row
        return OWN, "\0".join(map(str, (*row.bound, row.created_at)))

    @property
    def shown(self) -> str:
        """With own: before the name; a database of the config has no colon in its."""
        return self.row.shown

    @property
    def crowd(self) -> str:
        """All of them together, however many one user has."""
        return OWN

    def dsn(self) -> str:
        """The libpq connection string, with every keyword in it that could come from elsewhere."""
        if self.password is None:
            raise TypeError("a login of a user's own has a password")
        row = self.row
        here = plain(ipaddress.ip_address(row.hostaddr)).is_loopback
        values = _of_environment() | {
            "host": row.host,
            "hostaddr": row.hostaddr,
            "port": str(row.port),
            "dbname": row.dbname,
            "user": row.login,
            "password": self.password(),
            "passfile": "/nonexistent/there-is-none",
            "require_auth": "scram-sha-256",
            "sslmode": "prefer" if here else self.rules.sslmode,
            "sslrootcert": "" if here else self._root(),
            "sslcertmode": "disable",
            "gssencmode": "disable",
            "connect_timeout": str(CONNECT_TIMEOUT),
            "client_encoding": "UTF8",
            "application_name": "mcpctl",
        }
        return make_conninfo("", **values)

    def _root(self) -> str:
        if self.rules.sslrootcert is not None:
            return str(self.rules.sslrootcert)
        if self.rules.sslmode != "verify-full":
            return ""
        find_cas()
        return SYSTEM


async def check(login: OwnLogin) -> None:
    """Log in once. Raises ForbiddenError or UnavailableError with what was wrong, in words that say nothing of us."""
    try:
        connection = await AsyncConnection.connect(login.dsn(), autocommit=True, prepare_threshold=None)
        try:
            with bounded(connection, LOOK):
                row = await (await connection.execute(_LOOK)).fetchone()
        finally:
            await connection.close()
    except (psycopg.Error, OSError) as problem:
        raise _why(problem) from None
    if row is None or row[0] is not False:
        raise ForbiddenError(
            "that login is a superuser, bypasses row security, or may replicate",
            "make a login role that can only read, and register it with that",
        )
    if row[1]:  # pg_hba.conf lets it in from here, and it would outlive its user's token
        raise ForbiddenError("that login is one of mcpctl's own", "register the database with a login of its own")


_REASONS = (
    ("password authentication failed", "PostgreSQL there does not take that user with that password"),
    ("authentication method requirement", "the server there asks for the password in another way than SCRAM-SHA-256"),
    ("no pg_hba.conf entry", "PostgreSQL there lets nobody in as that user from this server (pg_hba.conf)"),
    ("not permitted to log in", "that user may not log in there"),
    ("permission denied for database", "that user may not connect to that database"),
    ("does not support SSL", "the server there speaks no TLS"),
    ("does not match host name", "the certificate there is for another host"),
    ("certificate", "the certificate there is not signed by a CA that is trusted here"),
    ("does not exist", "PostgreSQL there has no such database, or no such user"),
    ("too many", "PostgreSQL there has no connection left to give"),
)
"""What libpq and PostgreSQL say, and how it is told. Their own words are not: what answers there may be anything."""


def _why(problem: BaseException) -> Error:
    text = str(problem)
    for words, told in _REASONS:
        if words in text:
            return UnavailableError(f"nothing was stored: {told}", "put that right, and register it again")
    return UnavailableError(
        "nothing was stored: no login was possible there in time", "are host, port, database, user and password right?"
    )
