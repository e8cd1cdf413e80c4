"""Where PostgreSQL and users.yaml disagree about a user's grant in one database."""

from typing import Any

import psycopg

from mcpctl.identity import grants
from mcpctl.identity.grants import ACCESSES, EVERYTHING, Grant, login_role, quoted
from mcpctl.postgres import parameters
from mcpctl.postgres.parameters import Parameters
from mcpctl.postgres.roles import PRIVILEGES, tables_of

Connection = psycopg.Connection[tuple[Any, ...]]
_SYSTEM = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
_RELATIONS = f"""
SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND {_SYSTEM}"""
_HELD = f"""
SELECT n.nspname, c.relname, a.privilege_type
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
     pg_catalog.aclexplode(c.relacl) a JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
WHERE r.rolname = %s AND c.relkind <> 'S' AND {_SYSTEM}
UNION ALL
SELECT n.nspname, NULL, a.privilege_type
FROM pg_catalog.pg_namespace n, pg_catalog.aclexplode(n.nspacl) a JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
WHERE r.rolname = %s AND {_SYSTEM}"""
_CONNECT = "SELECT pg_catalog.has_database_privilege(%s, pg_catalog.current_database(), 'CONNECT')"
_ENTERS = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_database d, pg_catalog.aclexplode(d.datacl) a
               JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
               WHERE r.rolname = %s AND d.datname = pg_catalog.current_database())"""
_ROLE = """
SELECT pg_catalog.shobj_description(r.oid, 'pg_authid'), r.rolcanlogin,
       r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls,
       (SELECT pg_catalog.array_agg(g.rolname::text) FROM pg_catalog.pg_auth_members m
        JOIN pg_catalog.pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid
          AND g.rolname <> 'mcp_logins' AND (g.rolname <> 'pg_read_all_settings' OR r.rolname !~ '_a$'))
FROM pg_catalog.pg_roles r WHERE r.rolname = %s"""
Held = set[tuple[str, str | None, str]]


def differences(
    connection: Connection, user: str, grant: Grant, mark: str, may_set: Parameters, *, login: bool = True
) -> list[str]:
    """Each point on which PostgreSQL is not as the grant says, as a sentence; none where all is well. `may_set`: what
    the user's grants in all databases of the cluster let change; `login`: whether the user's roles may log in."""
    found = []
    for access in ACCESSES:
        targets = getattr(grant, access)
        role = login_role(user, access)
        row = connection.execute(_ROLE, (role,)).fetchone()
        if row is None:
            found += [f"{role}: is not there"] if targets else []
            continue
        if access == "admin" and (targets or _enters(connection, role)):
            found += parameters.differences(connection, role, may_set, here=bool(targets))
        if not targets:
            if _held(connection, role) or (access == "admin" and _enters(connection, role)):
                found.append(f"{role}: has rights here, and no {access} access is recorded")
            continue
        found += _of_role(role, row, mark, login)
        if not _first(connection, _CONNECT, role):
            found.append(f"{role}: lacks CONNECT")
        found += _of_privileges(connection, role, access, grant)
    return found


def _of_role(role: str, row: tuple[Any, ...], mark: str, login: bool) -> list[str]:
    of_whom, can_login, more, member = row
    found = [] if of_whom == mark else [f"{role}: is not marked as this mcpctl's"]
    if can_login != login:
        found.append(f"{role}: may not log in" if login else f"{role}: may log in, and its user is disabled")
    found += [f"{role}: has been made more than a login"] if more else []
    return found + [f"{role}: is a member of {quoted(other)}, and has its rights" for other in member or ()]


def _of_privileges(connection: Connection, role: str, access: str, grant: Grant) -> list[str]:
    wanted = _wanted(connection, access, grant)
    held = _held(connection, role)
    missing = {f"{role}: lacks {_said(one)}" for one in wanted - held}
    extra = {f"{role}: has {_said(one)}, which is not recorded" for one in held - wanted}
    return sorted(missing) + sorted(extra)


def _said(one: tuple[str, str | None, str]) -> str:
    schema, table, privilege = one
    return f"{privilege} on {quoted(schema)}" + (f".{quoted(table)}" if table is not None else "")


def _wanted(connection: Connection, access: str, grant: Grant) -> Held:
    relations = [(row[0], row[1]) for row in connection.execute(_RELATIONS).fetchall()]
    schemas = [row[0] for row in connection.execute(f"SELECT n.nspname FROM pg_catalog.pg_namespace n WHERE {_SYSTEM}")]
    found: Held = set()
    for kind, targets in tables_of(grant, access).items():
        for text in targets:
            target = None if text == EVERYTHING else grants.parse(text)
            inside = schemas if target is None else [target.schema]
            found |= {(schema, None, "USAGE") for schema in inside}
            if target is not None and target.table is not None:
                tables = [(target.schema, target.table)]
            else:
                tables = [one for one in relations if one[0] in inside]
            found |= {(*table, privilege) for table in tables for privilege in PRIVILEGES[kind]}
    return found


def _held(connection: Connection, role: str) -> Held:
    return {(row[0], row[1], row[2]) for row in connection.execute(_HELD, (role, role)).fetchall()}


def _enters(connection: Connection, role: str) -> bool:
    """Whether the role was given a right on this database itself."""
    return bool(_first(connection, _ENTERS, role))


def _first(connection: Connection, query: str, *parameters: str) -> Any:
    row = connection.execute(query, parameters).fetchone()
    return row[0] if row is not None else None
