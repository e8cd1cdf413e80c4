"""What PostgreSQL itself says that a login may do with a table: asked as that login, nothing is run.

`has_table_privilege` names the right; EXPLAIN has the whole statement checked, with what a view reads underneath, as a
call would have it checked (PostgreSQL's executor looks at all privileges before it begins, also for EXPLAIN).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from mcpctl.errors import ForbiddenError, NotFoundError
from mcpctl.identity.grants import Target
from mcpctl.postgres.login import SETTINGS, Login

Connection = psycopg.Connection[tuple[Any, ...]]
ACTIONS = {"select": "read", "insert": "write", "update": "write", "delete": "write"}
"""What can be done with a table, and the access that it needs."""
_KINDS = "c.relkind IN ('r', 'p', 'v', 'm', 'f')"
_ABOUT = f"""
SELECT c.oid::int8, has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, %(privilege)s),
       has_any_column_privilege(c.oid, %(column_privilege)s), row_security_active(c.oid),
       (SELECT array_agg(quote_ident(a.attname) ORDER BY a.attnum) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND {_KINDS}"""
_POLICIES = """
SELECT p.polname, p.polpermissive, pg_get_expr(p.polqual, p.polrelid) FROM pg_policy p
WHERE p.polrelid = %s AND p.polcmd IN ('*', %s)
  AND (0 = ANY (p.polroles) OR EXISTS (SELECT FROM unnest(p.polroles) r WHERE pg_has_role(current_user, r, 'USAGE')))
ORDER BY 1"""
_SEQUENCES = """
SELECT string_agg(s.oid::regclass::text, ', ' ORDER BY s.oid) FROM pg_attrdef a
  JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass
  JOIN pg_class s ON s.oid = d.refobjid
  JOIN pg_class c ON c.oid = a.adrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s
  AND CASE s.relkind WHEN 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE, UPDATE') END"""
_TABLES = f"""
SELECT n.nspname, c.relname, array_remove(ARRAY[
    CASE WHEN has_table_privilege(c.oid, 'SELECT') OR has_any_column_privilege(c.oid, 'SELECT') THEN 'select' END,
    CASE WHEN has_table_privilege(c.oid, 'INSERT') THEN 'insert' END,
    CASE WHEN has_table_privilege(c.oid, 'UPDATE') THEN 'update' END,
    CASE WHEN has_table_privilege(c.oid, 'DELETE') THEN 'delete' END], NULL), row_security_active(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE {_KINDS} AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND has_schema_privilege(n.oid, 'USAGE')
ORDER BY 1, 2"""
_SETTABLE = "SELECT name FROM unnest(%s::text[]) name WHERE has_parameter_privilege(name, 'ALTER SYSTEM') ORDER BY 1"
_COMMANDS = {"select": "r", "insert": "a", "update": "w", "delete": "d"}


@dataclass(frozen=True)
class Verdict:
    """PostgreSQL's answer for one table: `allowed`, its reasons in order, and the policies that filter the rows."""

    allowed: bool
    reasons: tuple[str, ...]
    row_security: bool = False
    policies: tuple[str, ...] = ()
    hides_all: bool = False


def connect(login: Login) -> Connection:
    """A connection as that login, made to be what a call's is. ForbiddenError with PostgreSQL's reason where there is
    none, or where the login is one that is not served."""
    try:
        connection = psycopg.connect(login.dsn(), autocommit=True, application_name="mcpctl can")
    except psycopg.OperationalError as problem:
        reason = str(problem).strip().rpartition("FATAL:")[2].strip() or "no answer"
        raise ForbiddenError(f"cannot log in: {reason.splitlines()[0]}") from None
    row = connection.execute(SETTINGS, ("30s",)).fetchone()
    if row is None or (row[3] and not login.settings.allow_privileged_login):
        connection.close()
        raise ForbiddenError("is a superuser, bypasses row security or may replicate, and so is not served")
    connection.execute("SET search_path = pg_catalog")
    return connection


def may(connection: Connection, action: str, target: Target) -> Verdict:
    """Whether that login may select from, insert into, update or delete from a table."""
    privilege = action.upper()
    named = {
        "privilege": privilege,
        "column_privilege": "SELECT" if action == "delete" else privilege,  # there is no DELETE on a column
        "schema": target.schema,
        "table": target.table,
    }
    row = connection.execute(_ABOUT, named).fetchone()
    if row is None:
        raise NotFoundError(f"there is no table {target}", "write schema.table, as PostgreSQL has it")
    oid, usage, whole, some, active, columns = row
    reasons = [f"has_schema_privilege({target.schema}, USAGE) = {_yes(usage)}"]
    reasons.append(f"has_table_privilege({target}, {privilege}) = {_yes(whole)}")
    if not whole and some and action != "delete":
        reasons.append("it has that right on some of its columns only")
    refusal = _explained(connection, action, target, columns or [])
    if refusal is not None and usage and whole:
        reasons.append(f"and yet: {refusal}")
    policies = connection.execute(_POLICIES, (oid, _COMMANDS[action])).fetchall() if active else []
    return Verdict(
        refusal is None,
        tuple(reasons),
        bool(active),
        tuple(
            f"{name} ({'permissive' if permissive else 'restrictive'})" + (f": {qual}" if qual else "")
            for name, permissive, qual in policies
        ),
        bool(active) and not any(permissive for _, permissive, _ in policies),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _explained(connection: Connection, action: str, target: Target, columns: Sequence[str]) -> str | None:
    """What PostgreSQL says against the statement; None for nothing. Nothing runs: it is EXPLAIN, and rolled back."""
    first = columns[0] if columns else "ctid"
    statement = {
        "select": f"SELECT * FROM {target.sql}",
        "insert": f"INSERT INTO {target.sql} DEFAULT VALUES",
        "update": f"UPDATE {target.sql} SET {first} = DEFAULT",
        "delete": f"DELETE FROM {target.sql}",
    }[action]
    connection.execute("BEGIN READ ONLY")
    try:
        plans = connection.execute(f"EXPLAIN (VERBOSE, FORMAT JSON, COSTS OFF) {statement}".encode()).fetchone()
        return _no_sequence(connection, plans[0]) if plans is not None and action == "insert" else None
    except psycopg.Error as problem:
        return problem.diag.message_primary or "it fails"
    finally:
        connection.execute("ROLLBACK")


def _no_sequence(connection: Connection, plans: Sequence[dict[str, Any]]) -> str | None:
    """What speaks against an INSERT that EXPLAIN does not see: nextval() asks for its right only when it runs. The plan
    names the table that the rows go into, also behind views. (An identity's sequence asks for no right.)"""
    for plan in plans:
        into = plan.get("Plan", {})
        row = connection.execute(_SEQUENCES, (into.get("Schema"), into.get("Relation Name"))).fetchone()
        if row is not None and row[0]:
            return f"permission denied for the sequence of a default: {row[0]}"
    return None


def tables(connection: Connection) -> list[tuple[Target, list[str], bool]]:
    """Every table that the login reaches: what it may do with it, and whether row security filters it."""
    rows = connection.execute(_TABLES).fetchall()
    return [(Target(schema, name), actions, active) for schema, name, actions, active in rows if actions]


def settable(connection: Connection, names: Sequence[str]) -> list[str]:
    """Those of the named settings that the login may change with ALTER SYSTEM."""
    return [row[0] for row in connection.execute(_SETTABLE, (list(names),)).fetchall()]
