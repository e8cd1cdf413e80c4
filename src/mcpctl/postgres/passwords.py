"""Another password for a login role: the SQL, and the end of whoever is connected with the one before."""

import time
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import conninfo_to_dict

from mcpctl.errors import ConflictError, Error, NotFoundError
from mcpctl.identity.grants import identifier
from mcpctl.postgres import administrator, roles
from mcpctl.postgres.administrator import Connection
from mcpctl.postgres.login import Login, same_place

_CLOSING = 0.5
"""Seconds in which the backend of a connection that was closed has ended."""
_GONE_WITHIN = 5.0
"""Seconds: some of what PostgreSQL does is not interrupted at once."""


@dataclass(frozen=True)
class Backend:
    """A connection of a role's, as far as whoever looked may see it: `address` is None for a socket."""

    pid: int
    began: str
    address: str | None
    application: str

    def words(self) -> str:
        """In one line."""
        name = ascii(self.application[:63])[1:-1] or "no name"
        return f"pid {self.pid}, {name}, from {self.address or 'a socket'}, since {self.began or 'nobody may see when'}"


def role_of(login: Login) -> str:
    """The role that a login of the config names; "" where it names none."""
    return login.about()["user"]


def password_of(login: Login) -> str | None:
    """The password that a login has now, if it has one of ours."""
    found = conninfo_to_dict(login.dsn()).get("password")
    return None if found is None else str(found)


def is_one(login: Login, other: Login) -> bool:
    """Whether two logins of the config are one role of one cluster: they have one address, or one password."""
    if role_of(login) != role_of(other):
        return False
    return same_place(login.dsn(), other.dsn()) or (password_of(login) or "") == password_of(other)


def change(role: str, verifier: str) -> str:
    """The statement that gives a role another password, of which PostgreSQL sees the verifier alone."""
    return f"ALTER ROLE {identifier(role)} PASSWORD {roles.literal(verifier)};\n"


def script(role: str, verifier: str) -> str:
    """What a DBA runs instead of us: the change, and the end of the role's connections."""
    return (
        roles.script(change(role, verifier), f"mcpctl: a new password for {role}. Any database of the cluster will do.")
        + "SET search_path = pg_catalog, pg_temp;\n"
        + roles.end_connections(role)
    )


def check(connection: Connection, role: str, mark: str | None) -> None:
    """See that a role is there, with this mark where one is given, and is not the administrator's own. Raises
    NotFoundError or ConflictError."""
    query = "SELECT pg_catalog.shobj_description(oid, 'pg_authid') FROM pg_catalog.pg_roles WHERE rolname = %s"
    row = connection.execute(query, (role,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no role {role} in PostgreSQL", "nothing was changed; `mcpctl grant diff`")
    if mark is not None and row[0] != mark:
        raise ConflictError(f"role {role} is not of this mcpctl", "nothing was changed; see what `mcpctl doctor` says")
    if connection.info.user == role:
        raise ConflictError(
            f"{role} is the role that {administrator.FILE} logs in as",
            f"give the service a role of its own; that one's password: \\password in psql, then {administrator.FILE}",
        )


def older(connection: Connection, role: str, moment: str | None = None) -> tuple[str, list[Backend]]:
    """(the moment, the role's connections that began no later), by PostgreSQL's clock. Without a moment it is now."""
    if moment is None:
        moment = str((connection.execute("SELECT pg_catalog.clock_timestamp()::text").fetchone() or ("",))[0])
    rows = connection.execute(_OLDER, (role, moment)).fetchall()
    return moment, [Backend(*row) for row in rows]


_OLDER = """
SELECT pid, coalesce(backend_start::timestamptz(0)::text, ''), client_addr::text, coalesce(application_name, '')
FROM pg_catalog.pg_stat_activity
WHERE usename = %s AND pid <> pg_catalog.pg_backend_pid() AND coalesce(backend_start <= %s::timestamptz, true)
ORDER BY backend_start"""


def others(connection: Connection, role: str, moment: str) -> list[Backend]:
    """The role's connections from before that moment that no server of ours has closed: what it closes has a moment to
    end."""
    until = time.monotonic() + _CLOSING
    while True:
        left = older(connection, role, moment)[1]
        if not any(one.application.startswith("mcpctl") for one in left) or time.monotonic() > until:
            return left
        time.sleep(0.02)


def end_older(connection: Connection, login: Login, role: str, moment: str) -> None:
    """End the role's connections that began no later, and see that they are gone. Where the administrator may not, the
    role does it itself: any role may (PostgreSQL, "Server Signaling Functions"). Raises an Error where some stay."""
    try:
        connection.execute(roles.end_connections(role, moment).encode())
    except psycopg.errors.InsufficientPrivilege:
        _by_itself(login, role, moment)
    until = time.monotonic() + _GONE_WITHIN
    while left := older(connection, role, moment)[1]:
        if time.monotonic() > until:
            said = "; ".join(one.words() for one in left)
            raise Error(
                f"{role} has its new password, and is still connected with the old one: {said}",
                "a superuser ends it: SELECT pg_terminate_backend(PID)",
            )
        time.sleep(0.02)


def _by_itself(login: Login, role: str, moment: str) -> None:
    own = administrator.connect_as(login)
    if own is None:
        return  # whoever looks afterwards says what is left
    with own:
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND pid <> pg_backend_pid()"
            " AND backend_start <= %s::timestamptz"
        )
        own.execute(query, (role, moment))
