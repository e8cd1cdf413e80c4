"""What may stand in config.yaml: every key with its type, default and one line of meaning.

This is the only list of them. `config.py` reads files by it, and a test holds `config.example.yaml` and
`docs/reference/config.md` to it.
"""

from dataclasses import field
from pathlib import Path

from mcpctl import config_values as values
from mcpctl.config_schema import keys, section, setting
from mcpctl.config_sign_in import Oauth, Oidc


@keys(frozen=True)
class Tls:
    """server.tls"""

    cert: Path | None = setting(None, values.optional(values.path), "certificate in PEM, for HTTPS; with `key`")
    key: Path | None = setting(None, values.optional(values.path), "its private key in PEM, 0600")
    chain: Path | None = setting(
        None, values.optional(values.path), "intermediate certificates in PEM, where `cert` has only its own"
    )
    client_ca: Path | None = setting(
        None, values.optional(values.path), "CA in PEM; clients need a certificate that it signed, beside their token"
    )
    client_certificate: str | None = setting(
        None, values.optional(values.choice("required", "optional")), "with client_ca; default: required"
    )


@keys(frozen=True)
class Server:
    """server"""

    host: str = setting(
        "127.0.0.1", values.text, "address to listen on; anything but loopback needs TLS or --behind-proxy"
    )
    port: int = setting(8080, values.number(0, 65535), "port to listen on; 0 takes a free one")
    public_url: str | None = setting(
        None, values.public_url, "what clients call the server by, where that is not host and port"
    )
    tls: Tls = section(Tls, "HTTPS")
    allowed_hosts: tuple[str, ...] = setting(
        (), values.hosts, "further Host headers to answer to, such as mcp.example.org"
    )
    allowed_origins: tuple[str, ...] = setting((), values.origins, "further Origin headers of browsers to answer to")
    trusted_proxies: tuple[values.Network, ...] = setting(
        (), values.networks, "networks whose X-Forwarded-For is believed"
    )
    workers: int = setting(1, values.number(1, 64), "processes that share the port")
    stdio: bool = setting(False, values.truth, "`serve` without a flag speaks on stdin and stdout instead of HTTP")
    sse: bool = setting(
        False, values.truth, "also serve /sse and /messages, for clients of before 2025-03; one worker only"
    )
    profile: str = setting(
        "development",
        values.choice("development", "production"),
        "production refuses to start without HTTPS, tokens that end, and what else is only for trying",
    )
    runtime_dir: Path | None = setting(
        None, values.optional(values.path), "folder of the control sockets; default: that of token_file"
    )
    state_file: Path = setting(
        Path("state.db"), values.path, "what the server itself remembers, 0600; on a disk of its own"
    )


@keys(frozen=True)
class Role:
    """auth.roles.NAME"""

    permissions: tuple[str, ...] = setting(
        (), values.permissions, "what users with this role may do, with * for a part"
    )


@keys(frozen=True)
class Sessions:
    """auth.sessions"""

    enabled: bool = setting(False, values.truth, "users with a password may sign in at /api/v1/auth for a session")
    lifetime: float = setting(86400.0, values.session_lifetime, "a session ends after this, 24h at most")
    idle: float = setting(3600.0, values.session_lifetime, "a session that is not used ends after this")
    per_user: int = setting(5, values.number(1, 100), "sessions of a user; one more ends that idle longest")


@keys(frozen=True)
class Auth:
    """auth"""

    token_file: Path = setting(Path("tokens.yaml"), values.path, "the tokens, 0600")
    user_file: Path = setting(Path("users.yaml"), values.path, "the users, 0600")
    tenant_file: Path = setting(Path("tenants.yaml"), values.path, "the tenants, 0600")
    token_lifetime: float | None = setting(
        None, values.optional(values.positive_duration), "lifetime of `token add` without --expiry; none: required"
    )
    max_token_lifetime: float | None = setting(
        None, values.optional(values.positive_duration), "no token may live longer; none: no bound"
    )
    admin_users: tuple[str, ...] = setting(
        (), values.texts, "users who have the role mcp-admin, whatever their own are"
    )
    read_only_users: tuple[str, ...] = setting((), values.texts, "users who can only read, whatever their roles are")
    roles: dict[str, Role] = field(
        default_factory=dict, metadata={"named": Role, "doc": "roles beside the built-in ones, by name"}
    )
    sessions: Sessions = section(Sessions, "sessions that a password opens")
    oidc: dict[str, Oidc] = field(
        default_factory=dict, metadata={"named": Oidc, "doc": "issuers whose tokens are taken, by a name of your own"}
    )
    oauth: Oauth = section(Oauth, "clients that users let in by themselves")
    credentials_in_url: bool = setting(
        False, values.truth, "also take a token or session as ?token=, ?api_key= or ?session_id=, where others log it"
    )


@keys(frozen=True)
class Keys:
    """keyring"""

    file: Path = setting(
        Path("secret.key"), values.path, "the keys that seal database passwords, 0600; or systemd's source"
    )


@keys(frozen=True)
class Pool:
    """databases.NAME.pool"""

    max_size: int = setting(4, values.number(1, 100), "connections that one token may hold at once")
    max_per_user: int = setting(8, values.number(1, 1000), "connections of all tokens of one user; for roles: per_user")
    wait: float = setting(30.0, values.positive_duration, "how long a call waits for one of them")
    max_waiting: int = setting(
        40, values.number(1, 10000), "calls of one token that may wait; more are refused at once"
    )
    max_idle: float = setting(300.0, values.positive_duration, "an unused pool is closed after this")
    max_lifetime: float = setting(3600.0, values.positive_duration, "a connection is replaced after this")


@keys(frozen=True)
class DatabaseLimits:
    """databases.NAME.limits"""

    max_rows: int | None = setting(None, values.optional(values.number(1, 1_000_000)), "instead of limits.max_rows")
    max_bytes: int | None = setting(None, values.optional(values.size), "instead of limits.max_bytes")
    statement_timeout: float | None = setting(
        None, values.optional(values.statement_timeout), "instead of limits.statement_timeout"
    )


SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@keys(frozen=True)
class Database:
    """databases.NAME"""

    dsn: str | None = setting(
        None, values.optional(values.text), "libpq connection string or URL, without a password; or host, port, …"
    )
    host: str | None = setting(None, values.optional(values.text), "host name, address, or folder of the socket")
    port: int | None = setting(None, values.optional(values.number(1, 65535)), "default 5432")
    dbname: str | None = setting(
        None, values.optional(values.text), "name of the database in PostgreSQL; default: the name here"
    )
    user: str | None = setting(None, values.optional(values.text), "the login role; give it no right to write")
    password_file: Path | None = setting(
        None, values.optional(values.path), "file with the password and nothing else, 0600"
    )
    sslmode: str | None = setting(
        None, values.optional(values.choice(*SSL_MODES)), "default: verify-full for another machine, prefer on this one"
    )
    sslrootcert: str | None = setting(
        None, values.optional(values.text), "CA file that signed the server's certificate; default: the system's"
    )
    sslcert: Path | None = setting(
        None, values.optional(values.path), "client certificate in PEM, for a server that asks for one"
    )
    sslkey: Path | None = setting(None, values.optional(values.path), "its private key in PEM, 0600")
    roles: str = setting(
        "shared",
        values.choice("shared", "per_user"),
        "per_user: each user logs in with a role of their own, as granted",
    )
    service_dsn: str | None = setting(
        None, values.optional(values.text), "libpq connection string for service tokens, where roles are per user"
    )
    service_password_file: Path | None = setting(
        None, values.optional(values.path), "file with the password of service_dsn, 0600"
    )
    allow_open_hba: bool = setting(
        False, values.truth, "grant write access although pg_hba.conf lets the users' roles in from elsewhere"
    )
    settings: tuple[str, ...] = setting(
        (), values.parameters, "settings of PostgreSQL that who was granted admin access may change; none: nobody may"
    )
    read_all_settings: bool = setting(
        False,
        values.truth,
        "who was granted admin access also sees in which file a setting stands (pg_read_all_settings)",
    )
    description: str | None = setting(
        None, values.optional(values.text), "one line on what is in it, shown by list_databases"
    )
    required: bool = setting(True, values.truth, "/ready answers 503 while it cannot be reached")
    default: bool = setting(False, values.truth, "the one that is meant when a call names none; a single one always is")
    allow_privileged_login: bool = setting(
        False, values.truth, "take a superuser, BYPASSRLS or replication login, which can read files and run programs"
    )
    pool: Pool = section(Pool, "connections of one token to it")
    limits: DatabaseLimits = section(DatabaseLimits, "limits that differ here")


@keys(frozen=True)
class OwnDatabases:
    """own_databases"""

    hosts: tuple[str, ...] = setting(
        (), values.named_hosts, "names, addresses and networks that users' own databases may be on; none: off"
    )
    allow_password_in_dsn: bool = setting(
        False, values.truth, "take passwords in register_database, where the model and the client's history see them"
    )
    most: int = setting(5, values.number(1, 1000), "databases that one user may register")
    sslmode: str = setting(
        "verify-full", values.choice("require", "verify-ca", "verify-full"), "how their servers show who they are"
    )
    sslrootcert: Path | None = setting(
        None, values.optional(values.path), "CA file that signed their certificates; default: the system's"
    )


_COUNT = values.optional(values.number(1, 10**12))


@keys(frozen=True)
class Budget:
    """limits.budgets.hour, limits.budgets.day"""

    calls: int | None = setting(None, _COUNT, "tool calls")
    rows: int | None = setting(None, _COUNT, "rows of their answers")
    bytes: int | None = setting(None, values.optional(values.size), "bytes of these rows, as JSON")
    database_seconds: int | None = setting(None, _COUNT, "seconds that they have a connection to a database")


@keys(frozen=True)
class Budgets:
    """limits.budgets"""

    hour: Budget = section(Budget, "in each hour of UTC")
    day: Budget = section(Budget, "in each day of UTC")


@keys(frozen=True)
class Allowance:
    """limits.KIND.named.NAME"""

    rate: float | None = setting(None, values.optional(values.rate), "instead of limits.rate")
    burst: int | None = setting(None, values.optional(values.number(1, 1_000_000)), "instead of limits.burst")
    concurrent: int | None = setting(None, values.optional(values.number(1, 10_000)), "instead of limits.concurrent")
    max_rows: int | None = setting(None, values.optional(values.number(1, 1_000_000)), "no more rows than this")
    max_bytes: int | None = setting(None, values.optional(values.size), "no more bytes than this")
    statement_timeout: float | None = setting(None, values.optional(values.statement_timeout), "no longer than this")
    budgets: Budgets = section(Budgets, "instead of limits.budgets, key by key")


@keys(frozen=True)
class Kind(Allowance):
    """limits.tokens, limits.users, limits.tenants, limits.addresses"""

    named: dict[str, Allowance] = field(
        default_factory=dict,
        metadata={"named": Allowance, "name": values.limited, "doc": "one token, user, tenant or network, by name"},
    )


@keys(frozen=True)
class Limits:
    """limits"""

    max_rows: int = setting(1000, values.number(1, 1_000_000), "rows of one answer; more are cut off and it says so")
    max_bytes: int = setting(1 << 20, values.size, "bytes of one answer's rows, as JSON")
    statement_timeout: float = setting(30.0, values.statement_timeout, "a statement is cancelled after this")
    request_bytes: int = setting(1 << 20, values.size, "bytes of one request's body")
    connections: int = setting(
        20, values.number(2, 10000), "connections to PostgreSQL of the whole server, all workers together"
    )
    rate: float = setting(
        10.0, values.rate, "calls a second of one token, of one user, of one tenant, and from one address"
    )
    burst: int = setting(20, values.number(1, 1_000_000), "calls of each of them that may come at once")
    concurrent: int = setting(20, values.number(1, 10_000), "calls of each of them that may run at once")
    failed_sign_ins: int = setting(
        10, values.number(1, 1_000_000), "refused tokens from one address in 15 minutes; further ones are 429"
    )
    budgets: Budgets = section(Budgets, "what each of them may take in an hour, and in a day")
    tokens: Kind = section(Kind, "limits that differ for tokens")
    users: Kind = section(Kind, "limits that differ for users")
    tenants: Kind = section(Kind, "limits that differ for tenants")
    addresses: Kind = section(Kind, "limits that differ for addresses")


@keys(frozen=True)
class Audit:
    """audit"""

    file: Path = setting(Path("audit.jsonl"), values.path, "the log, one JSON line an event, 0600")
    key_file: Path = setting(
        Path("audit.key"), values.path, "the key of its chain, 0600; keep it, or the log proves nothing"
    )
    statements: str = setting(
        "full", values.choice("full", "hash", "off"), "keep statements as text, as an HMAC, or not at all"
    )
    on_failure: str = setting(
        "refuse", values.choice("refuse", "warn"), "what happens to calls while the log cannot be written"
    )
    sync: float = setting(1.0, values.sync, "a line is on disk before its `answer` leaves, or after this long at most")
    anchor_file: Path | None = setting(
        None, values.optional(values.path), "where anchors are kept, beside the server's log, 0600; on another disk"
    )


@keys(frozen=True)
class Metrics:
    """metrics"""

    host: str = setting("127.0.0.1", values.text, "address that /metrics listens on")
    port: int | None = setting(
        None, values.optional(values.number(0, 65535)), "port of /metrics, which is off without one; 0 takes a free one"
    )
    allow_remote: bool = setting(
        False, values.truth, "listen on another address than loopback: whoever reaches it reads names, without a token"
    )


@keys(frozen=True)
class Canaries:
    """canaries"""

    tokens: tuple[str, ...] = setting(
        (), values.token_ids, "ids of tokens that nobody should use: the first use blocks them"
    )
    tables: tuple[str, ...] = setting(
        (), values.tables, "tables that nobody should read, as database.schema.table: who does is blocked"
    )


@keys(frozen=True)
class Backup:
    """backup"""

    directory: Path | None = setting(
        None,
        values.optional(values.path),
        "where `mcpctl backup` without a FILE writes to, 0700; none: a FILE is needed",
    )
    recipients: tuple[str, ...] = setting(
        (), values.recipients, "public keys (age1… or ssh-ed25519 …) that a backup is encrypted for"
    )
    keep: float = setting(
        7 * 86400.0, values.positive_duration, "backups in `directory` that are older are removed after the next one"
    )


@keys(frozen=True)
class Log:
    """log"""

    level: str = setting("info", values.choice("debug", "info", "warning", "error"), "how much of it")
    format: str = setting(
        "auto",
        values.choice("auto", "text", "json", "journald"),
        "auto is journald where stderr is the journal, and text elsewhere",
    )
    file: Path | None = setting(None, values.optional(values.path), "a file instead of stderr, 0600")
    sql_debug: bool = setting(
        False, values.truth, "each statement that was run, as far as audit.statements lets it be kept"
    )


@keys(frozen=True)
class Tracing:
    """tracing"""

    endpoint: str | None = setting(
        None, values.optional(values.web_address), "where traces are sent, by OTLP over HTTP; off without one"
    )
    sample: float = setting(1.0, values.share, "which part of the calls, where the caller has not decided")


@keys(frozen=True)
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
    metrics: Metrics = section(Metrics, "numbers for Prometheus")
    canaries: Canaries = section(Canaries, "what nobody should use, and who does is blocked")
    backup: Backup = section(Backup, "copies of all of this, encrypted")
    log: Log = section(Log, "the server's own messages")
    tracing: Tracing = section(Tracing, "OpenTelemetry traces of calls")
    source: Path | None = None
    by_root: bool = False
