"""The administrator's connection, which makes roles: the command line's alone, from a file that the server never opens.

`admin.dsn` stands beside the config. A line is a libpq connection string, or `NAME: ` and one for the database NAME of
the config; the line without a name is for all others of its host. Where it goes, and how, it says alone: the config
may be the service user's, who could have the administrator log in at a place of his own, and pass what he likes on.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcpctl import private_file
from mcpctl.config import NAME
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, ConflictError, Error, Failures, NotFoundError, UnavailableError
from mcpctl.keyring import Keyring
from mcpctl.postgres import hba, roles
from mcpctl.postgres.login import (
    CONNECT_TIMEOUT,
    FIRM,
    KEYWORDS,
    SCRAM_ONLY,
    Login,
    check_ports,
    firmly,
    is_here,
    same_place,
    secure,
)
from mcpctl.postgres.trial import reason

FILE = "admin.dsn"
_FIRM = FIRM | {"search_path": "pg_catalog,pg_temp", "statement_timeout": "0", "lock_timeout": "10s"}
Connection = psycopg.Connection[tuple[Any, ...]]


Lines = Mapping[str, tuple[int, str]]


def by_database(path: Path, found: Lines, settings: Settings) -> dict[str, str]:
    """The connection string for each database of the config that the file has one for. The line without a name counts
    where it leads to the database's own server. ConfigError for a line whose database is none of the config's."""
    known, ring = settings.databases, Keyring(settings.keyring.file)
    for name, (number, _) in found.items():
        if name and name not in known:
            raise ConfigError(
                f"{path}:{number}: there is no database {name} in the config", f"there are: {', '.join(known)}"
            )
    named = {name: dsn for name, (_, dsn) in found.items() if name}
    if "" not in found:
        return named
    every = found[""][1]
    return {name: every for name, one in known.items() if _leads_to(every, Login(name, one, ring))} | named


def _leads_to(dsn: str, login: Login) -> bool:
    try:
        return same_place(dsn, _nobodys(login).dsn())
    except ConfigError:  # of the config's own, which is told where that is used
        return False


def lines(path: Path) -> Lines:
    """The file's connection strings by database, each with the number of its line; that without a name under "".
    ConfigError for a broken file."""
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(
        private_file.read(path, limit=1 << 16).data.decode("utf-8", "replace").splitlines(), 1
    ):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, rest = text.partition(": ")
        name, text = (name, rest.strip()) if colon and NAME.fullmatch(name) else ("", text)
        try:
            known = conninfo_to_dict(text)
        except psycopg.Error:
            raise ConfigError(
                f"{path}:{number}: is no libpq connection string", "such as postgresql://admin@db.example.org/postgres"
            ) from None
        if unknown := sorted(known.keys() - KEYWORDS):
            raise ConfigError(f"{path}:{number}: not taken: {', '.join(unknown)}", "leave out each of these keywords")
        if not known.get("host") and not known.get("hostaddr"):
            raise ConfigError(
                f"{path}:{number}: names no host; the config cannot say where the administrator logs in",
                "such as postgresql://admin@db.example.org/, or postgresql://admin@/?host=/run/postgresql",
            )
        check_ports(known, f"{path}:{number}")
        if name in found:
            raise ConfigError(f"{path}:{number}: a second line for {name or 'all databases'}", "leave one of them")
        found[name] = number, text
    return found


@dataclass(frozen=True)
class Administrator:
    """Who may make roles in one database of the config. `warnings` are PostgreSQL's, of all that was done so far."""

    login: Login
    dsn: str
    warnings: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, dsns: Mapping[str, str], login: Login) -> "Administrator":
        """The administrator of a database. NotFoundError where there is none."""
        dsn = dsns.get(login.name)
        if dsn is None:
            raise NotFoundError(
                f"there is no administrator for the database {login.name}",
                f"put a connection string to its server into {FILE} beside the config (0600, root's), or one that "
                f"begins with `{login.name}: `; or use --print-sql",
            )
        return cls(login, dsn)

    @property
    def way(self) -> str:
        """How pg_hba.conf names this login, and where it comes from: type, database, user and address."""
        values = conninfo_to_dict(self.dsn)
        user, host = f'"{values.get("user", "")}"', str(values.get("hostaddr") or values.get("host") or "")
        if host.startswith("/"):
            return f"local  all  {user}"
        return (
            f"host  all  {user}  127.0.0.1/32" if is_here(host) else f"hostssl  all  {user}  ADDRESS-OF-THIS-MACHINE/32"
        )

    def _conninfo(self, dbname: str | None) -> str:
        values: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT, **conninfo_to_dict(self.dsn)}
        if values.get("password"):  # it is not told in clear to whoever answers at that address
            values = {**SCRAM_ONLY, **values}
        values["dbname"] = dbname or conninfo_to_dict(_nobodys(self.login).dsn()).get("dbname") or values.get("dbname")
        secure(values, f"{FILE}, for {self.login.name}")
        values |= firmly(_FIRM)
        return make_conninfo("", **values)

    def connect(self, dbname: str | None = None) -> Connection:
        """A connection to that database, or to another of the cluster. Raises an Error that names no password.

        What others have left in the database is not found by it, whatever search_path somebody has set: an unqualified
        name would run their function with the administrator's rights (PostgreSQL, "Writing SECURITY DEFINER Functions
        Safely")."""
        with _said(self.login.name):
            made = psycopg.connect(self._conninfo(dbname), autocommit=True, application_name="mcpctl admin")
        made.add_notice_handler(self._heard)
        return made

    def _heard(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING" and notice.message_primary is not None:
            self.warnings.append(notice.message_primary)

    @contextlib.contextmanager
    def connected(self, dbname: str | None = None) -> Iterator[Connection]:
        """The same, closed at the end; what PostgreSQL refuses meanwhile is raised as an Error."""
        with self.connect(dbname) as connection, _said(self.login.name):
            yield connection

    def databases_of(self, role: str) -> list[str]:
        """The databases of the cluster in which a role owns something or has a right, and this one, the last."""
        with self.connected() as connection:
            found, own = _databases(connection, role, allow_connections=True), connection.info.dbname
        return [*(one for one in found if one != own), own]


def shut_with(connection: Connection, role: str) -> list[str]:
    """The databases that allow no connections, and in which a role owns something or has a right."""
    return _databases(connection, role, allow_connections=False)


def _databases(connection: Connection, role: str, *, allow_connections: bool) -> list[str]:
    rows = connection.execute(_DATABASES, (allow_connections, role, role, role)).fetchall()
    return [row[0] for row in rows]


def _nobodys(login: Login) -> Login:
    """The same database, without the password, which may not be ours to read."""
    return replace(login, role="mcpctl", password=lambda: "")


_DATABASES = """
SELECT d.datname FROM pg_catalog.pg_database d
WHERE d.datallowconn = %s
  AND (EXISTS (SELECT FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
                WHERE s.dbid = d.oid AND s.refclassid = 'pg_catalog.pg_authid'::regclass AND r.rolname = %s)
   OR EXISTS (SELECT FROM pg_catalog.aclexplode(d.datacl) a JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
              WHERE r.rolname = %s))
ORDER BY EXISTS (SELECT FROM pg_catalog.aclexplode(d.datacl) a JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
              WHERE r.rolname = %s), 1"""
"""Those that it may connect to come last: with the last of them the role can go."""


@contextlib.contextmanager
def _said(database: str) -> Iterator[None]:
    """PostgreSQL's refusals as ours. A login that fails says why, without the connection string."""
    try:
        yield
    except psycopg.OperationalError as problem:
        if problem.sqlstate is None:
            said = f"the administrator cannot reach {database}: {reason(problem)}"
            hint = f"see {FILE}"
            if "pg_hba.conf" in said:
                hint += (
                    f"; who makes a role is a member of it from 16 on: a line of its own, before those of +{hba.GROUP}"
                )
            raise UnavailableError(said, hint) from None
        raise translated(problem, database) from None
    except psycopg.Error as problem:
        raise translated(problem, database) from None


def translated(problem: psycopg.Error, database: str) -> Error:
    """What PostgreSQL refused, with our exit code and what to do."""
    said, hint = problem.diag.message_primary or reason(problem), problem.diag.message_hint
    match problem.sqlstate:
        case roles.FOREIGN_MARK | roles.OVERPOWERED | roles.LEFT_OVER:
            return ConflictError(f"{database}: {said}", hint)
        case hba.OPEN:
            return ConflictError(
                f"{database}: {said}", f"{hint}; or set databases.{database}.allow_open_hba: true, if that is wanted"
            )
        case roles.NO_TABLE:
            return NotFoundError(f"{database}: {said}", hint)
        case "3F000" | "42P01":
            return NotFoundError(f"{database}: {said}", "names are as PostgreSQL has them")
        case "55P03":
            if any(lock in (problem.diag.context or "") for lock in ("pg_authid", "pg_advisory_xact_lock")):
                return Error(f"{database}: another grant is being made there, or somebody holds its lock", _HOLDER)
            return Error(f"{database}: a table or another object that is to be changed is in use", _READER)
        case "42501" if "pg_hba_file_rules" in said:
            return Error(
                f"{database}: {said}, so nobody sees whom pg_hba.conf lets in",
                "a superuser runs, for the administrator's role R: GRANT SELECT ON pg_hba_file_rules TO R; "
                "GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO R; "
                f"or set databases.{database}.allow_open_hba: true, if that is wanted",
            )
        case "42501":
            return Error(f"{database}: {said}", f"{FILE} must name a superuser, or the owner of what is granted")
    return Error(f"{database}: {said} (SQLSTATE {problem.sqlstate or 'none'})", hint)


_READER = (
    "run it again when that is over, such as a pg_dump; see who it is: SET search_path = pg_catalog, pg_temp;"
    " SELECT a.pid, a.usename, l.relation::regclass, a.query FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
    " WHERE l.granted AND l.relation > 16383"
)
_HOLDER = (
    "run it again; if that lasts, see who holds it: SET search_path = pg_catalog, pg_temp; SELECT a.pid, a.usename,"
    " a.query FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.granted"
    " AND (l.locktype = 'advisory' OR l.relation = 'pg_authid'::regclass)"
)


@dataclass(frozen=True)
class Role:
    """A login role as PostgreSQL has it."""

    name: str
    mark: str | None
    can_login: bool
    limit: int
    owns: int


_ROLES = """
SELECT r.rolname, pg_catalog.shobj_description(r.oid, 'pg_authid'), r.rolcanlogin, r.rolconnlimit,
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_shdepend s
        WHERE s.refclassid = 'pg_catalog.pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o')
FROM pg_catalog.pg_roles r WHERE r.rolname ~ '^mcp_' AND r.rolname <> ALL (%s) ORDER BY 1"""


def login_roles(connection: Connection) -> dict[str, Role]:
    """Every role whose name is like that of a login role of ours, whoever made it."""
    found = [Role(*row) for row in connection.execute(_ROLES, ([hba.GROUP, roles.HEIR],)).fetchall()]
    return {role.name: role for role in found}


def logs_in(login: Login) -> bool:
    """Whether PostgreSQL takes that login's password; what it then may do is another question."""
    try:
        psycopg.connect(login.dsn()).close()
    except psycopg.OperationalError as problem:
        return any(one in str(problem) for one in _AFTER_THE_PASSWORD)
    return True


_AFTER_THE_PASSWORD = ("permission denied for database", "is not permitted to log in", "too many connections for")
"""What PostgreSQL refuses only after the password was right (its InitPostgres)."""


def connect_as(login: Login) -> Connection | None:
    """A connection as that login; None where PostgreSQL gives none."""
    try:
        made = psycopg.connect(login.dsn(), autocommit=True, application_name="mcpctl look", client_encoding="UTF8")
        made.execute("SET search_path = pg_catalog, pg_temp")
        return made
    except psycopg.Error:
        return None


def missing(connection: Connection, tables: Iterable[str]) -> list[str]:
    """Which of these, as schema.table without quotes, are the name of no table or view in that database."""
    query = (
        "SELECT wanted FROM unnest(%s::text[]) wanted WHERE NOT EXISTS (SELECT FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE relkind IN ('r', 'p', 'v', 'm', 'f') "
        "AND n.nspname || '.' || c.relname = wanted)"
    )
    return [str(row[0]) for row in connection.execute(query, (list(tables),)).fetchall()]


def is_member(connection: Connection, group: str) -> bool:
    """Whether the login of a connection is a member of a role, as pg_hba.conf counts it; a superuser is none."""
    query = (
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = %s"
        " AND pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER'))"
        " AND NOT (SELECT s.rolsuper FROM pg_catalog.pg_roles s WHERE s.rolname = current_user)"
    )
    return connection.execute(query, (group,)).fetchone() == (True,)


def may_use(connection: Connection, schema: str) -> bool:
    """Whether the login of a connection may use the schema of that name, as it stands in the catalog."""
    query = "SELECT pg_catalog.has_schema_privilege(oid, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = %s"
    return connection.execute(query, (schema,)).fetchone() == (True,)


def public_may_use(connection: Connection, schema: str) -> bool:
    """Whether everybody may use the schema of that name, as it stands in the catalog."""
    query = (
        "SELECT pg_catalog.has_schema_privilege('public', oid, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = %s"
    )
    return connection.execute(query, (schema,)).fetchone() == (True,)


def is_schema(connection: Connection, schema: str) -> bool:
    """Whether there is a schema of that name, as it stands in the catalog."""
    query = "SELECT FROM pg_catalog.pg_namespace WHERE nspname = %s"
    return connection.execute(query, (schema,)).fetchone() is not None


def set_login(
    who: Administrator, connection: Connection, wanted: Iterable[str], failed: Failures, *, on: bool
) -> Iterator[str]:
    """Let roles log in, or not any more; then their connections end, too. Each role, when it is so. What fails for one
    is kept in `failed`, and keeps none of the others from it."""
    done = list(wanted)
    for role in done:
        with failed, _said(who.login.name):
            connection.execute(roles.set_login(role, on=on).encode())
            yield role
    for role in [] if on else done:
        with failed, _said(who.login.name):
            connection.execute(roles.end_connections(role).encode())
            check_gone(connection, role)


def check_gone(connection: Connection, role: str) -> None:
    """Raises an Error where a connection of a role, told to end, is still there after a few seconds."""
    deadline = time.monotonic() + _GONE_WITHIN
    query = "SELECT pid FROM pg_catalog.pg_stat_activity WHERE usename = %s ORDER BY 1"
    while rows := connection.execute(query, (role,)).fetchall():
        if time.monotonic() > deadline:
            pids = ", ".join(str(pid) for (pid,) in rows)
            raise Error(
                f"{role} is still connected (pid {pids})", "a superuser ends it: SELECT pg_terminate_backend(PID)"
            )
        time.sleep(0.02)


_GONE_WITHIN = 5.0
"""Seconds: some of what PostgreSQL does is not interrupted at once."""


def keeps_logins_here(connection: Connection, database: str) -> Error | None:
    """None where pg_hba.conf keeps the login roles to single hosts (`hba.CHECK`); else what is wrong with it. What it
    could not see, PostgreSQL says as a warning. `database` is the database's name in the config."""
    try:
        connection.execute(roles.do(hba.CHECK).encode())
    except psycopg.Error as problem:
        return translated(problem, database)
    return None


def owned(connection: Connection, role: str) -> list[str]:
    """What a role owns in this database, as `table sales.orders`, and passes on: not its default privileges."""
    rows = connection.execute(_OWNED, (role,)).fetchall()
    return [row[0] for row in rows]


_OWNED = """
SELECT i.type || ' ' || i.identity FROM pg_catalog.pg_shdepend s
  JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid AND s.refclassid = 'pg_catalog.pg_authid'::regclass,
  pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) i
WHERE r.rolname = %s AND s.deptype = 'o' AND s.classid <> 'pg_default_acl'::regclass
  AND s.dbid IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
ORDER BY 1"""
