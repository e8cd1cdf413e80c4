"""What may stand in config.yaml: every key with its type, default and one line of meaning.

This is the only list of them. `config.py` reads files by it, and a test holds `config.example.yaml` and
`docs/reference/config.md` to it. A reader takes a plain YAML value and returns ours, or raises ValueError with
what would have been right.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcpctl import dangerous_settings

Reader = Callable[[Any], Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


_LONGEST = 1000 * _UNITS["y"]
_LARGEST = 1 << 40
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def duration(value: Any) -> float:
    """Seconds, from `250ms 30s 5m 12h 90d 2w 1y`; 1000y at most, so that a date can still say it."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|w|y)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError("a duration such as 30s, 5m, 12h, 90d")
    seconds = float(found[1]) * _UNITS[found[2]]
    if seconds > _LONGEST:
        raise ValueError("a duration of 1000y at most")
    return seconds


def _positive_duration(value: Any) -> float:
    seconds = duration(value)
    if seconds < 0.001:  # PostgreSQL counts in ms, and takes 0 for "no limit"
        raise ValueError("a duration of 1ms or more")
    return seconds


def _optional_duration(value: Any) -> float | None:
    return None if value is None else _positive_duration(value)


def _statement_timeout(value: Any) -> float:
    found = _positive_duration(value)
    if found * 1000 >= 2**31:
        raise ValueError("a duration of 24d at most, which is PostgreSQL's own bound")
    return found


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,13}) ?(B|KiB|MiB|GiB|)", value)):
        size = int(found[1]) * _SIZES[found[2]]
    else:
        raise ValueError("a size such as 64KiB or 4MiB")
    if not 0 < size <= _LARGEST:
        raise ValueError("a size from 1B to 1024GiB")
    return size


def _number(low: int, high: int) -> Reader:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return read


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - every reader says so in the same way
    return value


def text(value: Any) -> str:
    """A text that is not empty, and that a file system, a terminal and a log can take."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    if _CONTROL.search(value):
        raise ValueError("a text without control characters")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else text(value)


def _path(value: Any) -> Path:
    return Path(text(value))


def _optional_path(value: Any) -> Path | None:
    return None if value is None else _path(value)


def _choice(*names: str) -> Reader:
    def read(value: Any) -> str:
        if value is False and "off" in names:  # to YAML 1.1 a bare off is false
            return "off"
        if value not in names:
            raise ValueError("one of " + ", ".join(names))
        return str(value)

    return read


def _optional_choice(*names: str) -> Reader:
    read = _choice(*names)
    return lambda value: None if value is None else read(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of texts")  # noqa: TRY004
    return tuple(text(item) for item in value)


def network(value: Any) -> Network:
    """An address or a network in CIDR notation."""
    try:
        found = ipaddress.ip_network(text(value))
        if isinstance(found, ipaddress.IPv6Network) and found.network_address.ipv4_mapped:
            raise ValueError(f"IPv4 is written as IPv4: {found.network_address.ipv4_mapped}")
        return found
    except ValueError as problem:
        raise ValueError(f"an address or network such as 10.0.0.0/8 ({problem})") from None


def _networks(value: Any) -> tuple[Network, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of networks")  # noqa: TRY004
    return tuple(network(item) for item in value)


def _public_url(value: Any) -> str | None:
    if value is None:
        return None
    url = text(value).removesuffix("/")  # the well-known places are at a host's root (RFC 9728)
    if not re.match("https?://", url) or not _is_authority(url.partition("://")[2]):
        raise ValueError("a URL such as https://mcp.example.org, without path, user, query or fragment")
    return _as_sent(url)


def _as_sent(origin: str) -> str:
    """An origin as clients write it: in lower case, without the scheme's own port (RFC 6454, section 6.1)."""
    origin = origin.lower()
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "/"))


def _is_authority(value: str) -> bool:
    """Whether it is a host, with a port or without one, as clients send it: in ASCII (RFC 3986, section 3.2)."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", value)
    if not found or (found[2] and not 0 < int(found[2]) < 65536):
        return False
    try:
        return not value.startswith("[") or ipaddress.ip_address(found[1][1:-1]).version == 6
    except ValueError:
        return False


def _hosts(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    if wrong := [item for item in found if not _is_authority(item)]:
        raise ValueError(f"hosts such as mcp.example.org or mcp.example.org:8443 ({wrong[0]!r} is none)")
    return found


def _origins(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    for item in found:
        scheme, _, host = item.partition("://")
        if not re.fullmatch("[a-z][a-z0-9+.-]*", scheme) or not _is_authority(host):
            raise ValueError(f"origins such as https://app.example.org, without a path ({item!r} is none)")
    return tuple(map(_as_sent, found))


_PERMISSION = re.compile(r"\*|[a-z*][a-z0-9_*-]*(:[A-Za-z*][A-Za-z0-9_.*-]*){1,3}")


def permission(value: Any) -> str:
    """A permission pattern such as `*`, `tools:*`, `databases:sales:read`."""
    found = text(value)
    if not _PERMISSION.fullmatch(found):
        raise ValueError(
            f"{found!r} is no permission; they look like tools:query_database, databases:sales:read, tools:*"
        )
    return found


PARAMETER = re.compile(r"[a-z_][a-z0-9_.]{0,126}")
"""What has the form of a setting's name, in lower case."""


def _parameters(value: Any) -> tuple[str, ...]:
    """Names of PostgreSQL's settings, in lower case, of which none opens the server to who may change it."""
    found = tuple(dict.fromkeys(_texts(value)))
    wrong = [f"{name[:80]!r} is none" for name in found if not PARAMETER.fullmatch(name)]
    faults = [f"names of PostgreSQL's settings in lower case, such as work_mem ({', '.join(wrong)})"] if wrong else []
    for name in found:
        if reason := dangerous_settings.why(name):
            faults.append(f"no setting that {reason}: leave out {name}")
    if faults:
        raise ValueError("; ".join(faults))
    return found


def setting(default: Any, read: Reader, doc: str) -> Any:
    """A dataclass field that is a key of the config."""
    return field(default=default, metadata={"read": read, "doc": doc})


def section(cls: type, doc: str) -> Any:
    """A dataclass field that is a section of the config."""
    return field(default_factory=cls, metadata={"section": cls, "doc": doc})


@dataclass(frozen=True)
class Tls:
    """server.tls"""

    cert: Path | None = setting(None, _optional_path, "certificate in PEM, for HTTPS; with `key`")
    key: Path | None = setting(None, _optional_path, "its private key in PEM, 0600")
    chain: Path | None = setting(
        None, _optional_path, "intermediate certificates in PEM, where `cert` has only its own"
    )


@dataclass(frozen=True)
class Server:
    """server"""

    host: str = setting("127.0.0.1", text, "address to listen on; anything but loopback needs TLS or --behind-proxy")
    port: int = setting(8080, _number(0, 65535), "port to listen on; 0 takes a free one")
    public_url: str | None = setting(
        None, _public_url, "what clients call the server by, where that is not host and port"
    )
    tls: Tls = section(Tls, "HTTPS")
    allowed_hosts: tuple[str, ...] = setting((), _hosts, "further Host headers to answer to, such as mcp.example.org")
    allowed_origins: tuple[str, ...] = setting((), _origins, "further Origin headers of browsers to answer to")
    trusted_proxies: tuple[Network, ...] = setting((), _networks, "networks whose X-Forwarded-For is believed")
    workers: int = setting(1, _number(1, 64), "processes that share the port")
    stdio: bool = setting(False, _bool, "`serve` without a flag speaks on stdin and stdout instead of HTTP")
    sse: bool = setting(False, _bool, "also serve /sse and /messages, for clients of before 2025-03; one worker only")
    runtime_dir: Path | None = setting(
        None, _optional_path, "folder of the control sockets; default: that of token_file"
    )
    state_file: Path = setting(Path("state.db"), _path, "what the server itself remembers, 0600; on a disk of its own")


def _permissions(value: Any) -> tuple[str, ...]:
    return tuple(permission(one) for one in _texts(value))


@dataclass(frozen=True)
class Role:
    """auth.roles.NAME"""

    permissions: tuple[str, ...] = setting((), _permissions, "what users with this role may do, with * for a part")


@dataclass(frozen=True)
class Auth:
    """auth"""

    token_file: Path = setting(Path("tokens.yaml"), _path, "the tokens, 0600")
    user_file: Path = setting(Path("users.yaml"), _path, "the users, 0600")
    tenant_file: Path = setting(Path("tenants.yaml"), _path, "the tenants, 0600")
    token_lifetime: float | None = setting(
        None, _optional_duration, "lifetime of `token add` without --expiry; none: required"
    )
    max_token_lifetime: float | None = setting(None, _optional_duration, "no token may live longer; none: no bound")
    admin_users: tuple[str, ...] = setting((), _texts, "users who have the role mcp-admin, whatever their own are")
    read_only_users: tuple[str, ...] = setting((), _texts, "users who can only read, whatever their roles are")
    roles: dict[str, Role] = field(
        default_factory=dict, metadata={"named": Role, "doc": "roles beside the built-in ones, by name"}
    )


@dataclass(frozen=True)
class Keys:
    """keyring"""

    file: Path = setting(Path("secret.key"), _path, "the keys that seal database passwords, 0600; or systemd's source")


@dataclass(frozen=True)
class Pool:
    """databases.NAME.pool"""

    max_size: int = setting(4, _number(1, 100), "connections that one token may hold at once")
    max_per_user: int = setting(8, _number(1, 1000), "connections of all tokens of one user; for roles: per_user")
    wait: float = setting(30.0, _positive_duration, "how long a call waits for one of them")
    max_waiting: int = setting(40, _number(1, 10000), "calls of one token that may wait; more are refused at once")
    max_idle: float = setting(300.0, _positive_duration, "an unused pool is closed after this")
    max_lifetime: float = setting(3600.0, _positive_duration, "a connection is replaced after this")


@dataclass(frozen=True)
class DatabaseLimits:
    """databases.NAME.limits"""

    max_rows: int | None = setting(
        None, lambda v: None if v is None else _number(1, 1_000_000)(v), "instead of limits.max_rows"
    )
    max_bytes: int | None = setting(None, lambda v: None if v is None else _size(v), "instead of limits.max_bytes")
    statement_timeout: float | None = setting(
        None, lambda v: None if v is None else _statement_timeout(v), "instead of limits.statement_timeout"
    )


SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True)
class Database:
    """databases.NAME"""

    dsn: str | None = setting(
        None, _optional_text, "libpq connection string or URL, without a password; or host, port, …"
    )
    host: str | None = setting(None, _optional_text, "host name, address, or folder of the socket")
    port: int | None = setting(None, lambda v: None if v is None else _number(1, 65535)(v), "default 5432")
    dbname: str | None = setting(None, _optional_text, "name of the database in PostgreSQL; default: the name here")
    user: str | None = setting(None, _optional_text, "the login role; give it no right to write")
    password_file: Path | None = setting(None, _optional_path, "file with the password and nothing else, 0600")
    sslmode: str | None = setting(
        None, _optional_choice(*SSL_MODES), "default: verify-full for another machine, prefer on this one"
    )
    sslrootcert: str | None = setting(
        None, _optional_text, "CA file that signed the server's certificate; default: the system's"
    )
    sslcert: Path | None = setting(None, _optional_path, "client certificate in PEM, for a server that asks for one")
    sslkey: Path | None = setting(None, _optional_path, "its private key in PEM, 0600")
    roles: str = setting(
        "shared", _choice("shared", "per_user"), "per_user: each user logs in with a role of their own, as granted"
    )
    service_dsn: str | None = setting(
        None, _optional_text, "libpq connection string for service tokens, where roles are per user"
    )
    service_password_file: Path | None = setting(None, _optional_path, "file with the password of service_dsn, 0600")
    allow_open_hba: bool = setting(
        False, _bool, "grant write access although pg_hba.conf lets the users' roles in from elsewhere"
    )
    settings: tuple[str, ...] = setting(
        (), _parameters, "settings of PostgreSQL that who was granted admin access may change; none: nobody may"
    )
    read_all_settings: bool = setting(
        False, _bool, "who was granted admin access also sees in which file a setting stands (pg_read_all_settings)"
    )
    description: str | None = setting(None, _optional_text, "one line on what is in it, shown by list_databases")
    required: bool = setting(True, _bool, "/ready answers 503 while it cannot be reached")
    default: bool = setting(False, _bool, "the one that is meant when a call names none; a single one always is")
    allow_privileged_login: bool = setting(
        False, _bool, "take a superuser, BYPASSRLS or replication login, which can read files and run programs"
    )
    pool: Pool = section(Pool, "connections of one token to it")
    limits: DatabaseLimits = section(DatabaseLimits, "limits that differ here")


_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


def host_name(value: str) -> str | None:
    """A host's name in its one spelling, without a final dot; None for what is none, addresses included."""
    name = value.lower().removesuffix(".")
    if not _HOST_NAME.fullmatch(name) or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
        return None  # a last label of digits alone is an address to resolvers, in one of its old spellings
    return name


def _named_hosts(value: Any) -> tuple[str, ...]:
    found = []
    for number, item in enumerate(_texts(value), 1):
        name = host_name(item)
        try:
            found.append(name if name is not None else str(network(item)))
        except ValueError:
            raise ValueError(
                f"hosts such as db.example.org, 10.1.2.3 or 10.0.0.0/8 (number {number} is none)"
            ) from None
    return tuple(found)


@dataclass(frozen=True)
class OwnDatabases:
    """own_databases"""

    hosts: tuple[str, ...] = setting(
        (), _named_hosts, "names, addresses and networks that users' own databases may be on; none: off"
    )
    allow_password_in_dsn: bool = setting(
        False, _bool, "take passwords in register_database, where the model and the client's history see them"
    )
    most: int = setting(5, _number(1, 1000), "databases that one user may register")
    sslmode: str = setting(
        "verify-full", _choice("require", "verify-ca", "verify-full"), "how their servers show who they are"
    )
    sslrootcert: Path | None = setting(
        None, _optional_path, "CA file that signed their certificates; default: the system's"
    )


@dataclass(frozen=True)
class Limits:
    """limits"""

    max_rows: int = setting(1000, _number(1, 1_000_000), "rows of one answer; more are cut off and it says so")
    max_bytes: int = setting(1 << 20, _size, "bytes of one answer's rows, as JSON")
    statement_timeout: float = setting(30.0, _statement_timeout, "a statement is cancelled after this")
    request_bytes: int = setting(1 << 20, _size, "bytes of one request's body")
    connections: int = setting(
        20, _number(2, 10000), "connections to PostgreSQL of the whole server, all workers together"
    )


@dataclass(frozen=True)
class Audit:
    """audit"""

    file: Path = setting(Path("audit.jsonl"), _path, "the log, one JSON line an event, 0600")
    key_file: Path = setting(Path("audit.key"), _path, "the key of its chain, 0600; keep it, or the log proves nothing")
    statements: str = setting(
        "full", _choice("full", "hash", "off"), "keep statements as text, as an HMAC, or not at all"
    )
    on_failure: str = setting(
        "refuse", _choice("refuse", "warn"), "what happens to calls while the log cannot be written"
    )


@dataclass(frozen=True)
class Log:
    """log"""

    level: str = setting("info", _choice("debug", "info", "warning", "error"), "how much goes to stderr")


@dataclass(frozen=True)
class Settings:
    """The whole configuration, checked. `source` is the file it came from (None: environment alone), `by_root` whether
    the command that reads it was begun as root."""

    server: Server = section(Server, "where and how it listens")
    auth: Auth = section(Auth, "who may ask")
    keyring: Keys = section(Keys, "what database passwords are sealed with")
    databases: dict[str, Database] = field(
        default_factory=dict, metadata={"named": Database, "doc": "what can be asked, by name"}
    )
    own_databases: OwnDatabases = section(OwnDatabases, "databases that users bring themselves")
    limits: Limits = section(Limits, "what one call, and all of them, may take")
    audit: Audit = section(Audit, "the log of who did what")
    log: Log = section(Log, "the server's own messages")
    source: Path | None = None
    by_root: bool = False
