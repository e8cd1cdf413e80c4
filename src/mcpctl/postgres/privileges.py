"""What PostgreSQL itself says that a login may do with a table: asked as that login, nothing is run.

`has_table_privilege` names the right; EXPLAIN has the whole statement checked, with what a view reads underneath, as a
call would have it checked (PostgreSQL's executor looks at all privileges before it begins, also for EXPLAIN).
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Timer
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from mcpctl.errors import Error, ForbiddenError, NotFoundError, UnavailableError
from mcpctl.identity.grants import Target
from mcpctl.postgres.login import SETTINGS, Login
from mcpctl.postgres.trial import reason

Connection = psycopg.Connection[tuple[Any, ...]]
ACTIONS = {"select": "read", "insert": "write", "update": "write", "delete": "write"}
"""What can be done with a table, and the access that it needs."""
_KINDS = "c.relkind IN ('r', 'p', 'v', 'm', 'f')"
_ABOUT = f"""
SELECT c.oid::int8, has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, %(privilege)s),
       has_any_column_privilege(c.oid, %(column_privilege)s), row_security_active(c.oid),
       (SELECT array_agg(quote_ident(a.attname) ORDER BY a.attnum) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          AND has_column_privilege(c.oid, a.attnum, %(column_privilege)s))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND {_KINDS}"""
_INSERTABLE = """
SELECT array_agg(quote_ident(a.attname) ORDER BY a.attnum) FROM pg_attribute a
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' AND a.attidentity <> 'a'
  AND has_column_privilege(a.attrelid, a.attnum, 'INSERT') AND pg_column_is_updatable(a.attrelid, a.attnum, false)"""
_POLICIES = """
SELECT p.polname, p.polpermissive,
       pg_get_expr(CASE %(command)s WHEN 'a' THEN coalesce(p.polwithcheck, p.polqual) ELSE p.polqual END, p.polrelid)
FROM pg_policy p
WHERE p.polrelid = %(oid)s AND p.polcmd IN ('*', %(command)s)
  AND (0 = ANY (p.polroles) OR EXISTS (SELECT FROM unnest(p.polroles) r WHERE pg_has_role(current_user, r, 'USAGE')))
ORDER BY 1"""
_SEQUENCES = """
SELECT string_agg(s.oid::regclass::text, ', ' ORDER BY s.oid) FROM pg_attrdef a
  JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass
  JOIN pg_class s ON s.oid = d.refobjid
  JOIN pg_class c ON c.oid = a.adrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND a.adnum = ANY (%(defaults)s)
  AND CASE s.relkind WHEN 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE, UPDATE') END"""
_FUNCTIONS = r"""
WITH RECURSIVE below (relid, path) AS (
    SELECT c.oid, ARRAY[c.oid] FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(table)s
    UNION ALL SELECT i.inhrelid, path || i.inhrelid FROM below JOIN pg_inherits i ON i.inhparent = relid
      JOIN pg_class c ON c.oid = i.inhrelid WHERE c.relispartition OR NOT %(inserts)s)
SELECT relid::regclass::text, (
  SELECT string_agg(DISTINCT p.oid::regprocedure::text, ', ') FROM (
    SELECT conbin::text FROM pg_constraint WHERE conrelid = relid AND contype = 'c'
    UNION ALL SELECT adbin::text FROM pg_attrdef JOIN pg_attribute ON (attrelid, attnum) = (adrelid, adnum)
      WHERE adrelid = relid AND attgenerated = 's' AND %(inserts)s
    UNION ALL SELECT concat(indexprs, indpred) FROM pg_index WHERE indrelid = relid AND indisready AND %(inserts)s
    UNION ALL SELECT partexprs::text FROM pg_partitioned_table WHERE partrelid = ANY (path) AND %(inserts)s
  ) expressions (tree), regexp_matches(tree, ':(?:op)?funcid (\d+)', 'g') called
  JOIN pg_proc p ON p.oid = called[1]::oid WHERE NOT has_function_privilege(p.oid, 'EXECUTE'))
FROM below JOIN pg_class ON oid = relid WHERE relkind <> 'p' ORDER BY 1"""
"""What a row's way into a table calls, and the login may not execute, for each table that rows go into: partitions, and
for an UPDATE what inherits. From the stored expressions, since pg_depend does not have PostgreSQL's own functions. An
UPDATE has all checks looked at, and the rest only for some columns."""
_CALLED = "permission denied for what a check, generated column, index or partition key calls"
_UNMAPPED = """
SELECT s.srvname FROM pg_foreign_table t JOIN pg_foreign_server s ON s.oid = t.ftserver
  JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw JOIN pg_proc p ON p.oid = w.fdwhandler
WHERE t.ftrelid = %s AND p.proname = 'postgres_fdw_handler'
  AND NOT EXISTS (SELECT FROM pg_user_mappings m WHERE m.srvid = s.oid AND m.usename IN ('public', current_user))"""
"""Of the wrappers that come with PostgreSQL the one that opens a connection, and asks for a user mapping by then."""
_EMPTY = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND NOT c.relispopulated"""
_TRIGGERS = """
SELECT DISTINCT t.tgname FROM pg_trigger t
WHERE t.tgrelid IN (SELECT %(table)s::oid UNION SELECT relid FROM pg_partition_tree(%(table)s::oid::regclass))
  AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & %(bit)s <> 0 ORDER BY 1"""
_TRIGGER_BITS = {"insert": 4, "delete": 8, "update": 16}
"""PostgreSQL's pg_trigger.h; there is none for select."""
_TABLES = f"""
SELECT n.nspname, c.relname, array_remove(ARRAY[
    CASE WHEN has_any_column_privilege(c.oid, 'SELECT') THEN 'select' END,
    CASE WHEN has_any_column_privilege(c.oid, 'INSERT') THEN 'insert' END,
    CASE WHEN has_any_column_privilege(c.oid, 'UPDATE') THEN 'update' END,
    CASE WHEN has_table_privilege(c.oid, 'DELETE') THEN 'delete' END], NULL), row_security_active(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE {_KINDS} AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND has_schema_privilege(n.oid, 'USAGE')
ORDER BY 1, 2"""
_SETTABLE = "SELECT name FROM unnest(%s::text[]) name WHERE has_parameter_privilege(name, 'ALTER SYSTEM') ORDER BY 1"
_WHOEVER_ASKS = ("the database system is ", "sorry, too many clients", "remaining connection slots", "database ")
"""How PostgreSQL's refusals begin that are not the login's: it starts or stops, is full, or has no such database."""
_PATIENCE = 5
"""Seconds that PostgreSQL has to say what it would do."""
_LOCKED = 2
"""Seconds of them that it may wait for a lock."""
_UNKNOWN = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)
_COMMANDS = {"select": "r", "insert": "a", "update": "w", "delete": "d"}


@dataclass(frozen=True)
class Verdict:
    """PostgreSQL's answer for one table: `allowed`, its reasons in order, and the policies that filter the rows.
    `hides_all`: they let no row through; `every_row`: or each. `triggers` run then, too, and what they do is not known
    before. `columns`: the only ones that the login has the right on; none where it has it on the table."""

    allowed: bool
    reasons: tuple[str, ...]
    row_security: bool = False
    policies: tuple[str, ...] = ()
    hides_all: bool = False
    every_row: bool = True
    triggers: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def on_columns(self) -> str:
        """As it stands behind the action in a GRANT: nothing where it is the table."""
        return f" ({', '.join(self.columns)})" if self.columns else ""


def connect(login: Login) -> Connection:
    """A connection as that login, made to be what a call's is. ForbiddenError with PostgreSQL's reason where it gives
    none, or where the login is one that is not served; UnavailableError where the database cannot be reached."""
    try:
        conninfo = make_conninfo(login.dsn(), client_encoding="UTF8")
        connection = psycopg.connect(conninfo, autocommit=True, application_name="mcpctl can")
    except psycopg.OperationalError as problem:
        why = reason(problem)
        _, refused, said = why.rpartition("FATAL:")
        if refused and not said.strip().startswith(_WHOEVER_ASKS):
            raise ForbiddenError(f"cannot log in: {said.strip()}") from None
        raise UnavailableError(
            f"the database {login.name} cannot be reached: {said.strip()}",
            f"`mcpctl database test {login.name}` tries it",
        ) from None
    row = connection.execute(SETTINGS, (f"{_PATIENCE}s",)).fetchone()
    if row is None or (row[3] and not login.settings.allow_privileged_login):
        connection.close()
        raise ForbiddenError("is a superuser, bypasses row security or may replicate, and so is not served")
    connection.execute(f"SET search_path = pg_catalog; SET lock_timeout = '{_LOCKED}s'")
    return connection


def may(connection: Connection, action: str, target: Target) -> Verdict:
    """Whether that login may select from, insert into, update or delete from a table. NotFoundError where there is
    none; UnavailableError where PostgreSQL cannot say, since it is locked, or takes too long."""
    try:
        return _verdict(connection, action, target)
    except psycopg.errors.LockNotAvailable:
        raise UnavailableError(
            f"{target}, or what it reads, is locked, and was for {_LOCKED} s: whether {action} is allowed is not known",
            "ask again when what holds the lock, such as a migration, has ended; pg_locks shows it",
        ) from None
    except psycopg.errors.QueryCanceled:
        raise UnavailableError(
            f"{action} on {target} takes longer than {_PATIENCE} s to plan: whether it is allowed is not known",
            "a view or policy there is very large, or calls a function that takes long or does not end",
        ) from None


def _verdict(connection: Connection, action: str, target: Target) -> Verdict:
    privilege = action.upper()
    named = {
        "privilege": privilege,
        "column_privilege": "SELECT" if action == "delete" else privilege,  # there is no DELETE on a column
        "schema": target.schema,
        "table": target.table,
    }
    row = connection.execute(_ABOUT, named).fetchone()
    if row is None:
        raise NotFoundError(f"there is no table {target}", "write schema.table, as PostgreSQL has it, or --database D")
    oid, usage, whole, some, active, granted = row
    some = some and action != "delete"
    only = tuple(granted or ()) if some and not whole else ()
    reasons = [f"has_schema_privilege({target.schema}, USAGE) = {_yes(usage)}"]
    if not usage:
        return Verdict(False, tuple(reasons))
    reasons.append(f"has_table_privilege({target}, {privilege}) = {_yes(whole)}")
    if only:
        reasons.append(f"on the columns {', '.join(only)} only")
    if not (whole or some):
        return Verdict(False, tuple(reasons))
    columns = _insertable(connection, oid) if action == "insert" else granted if action == "update" else only
    refusal, limits = _refusal(connection, action, target, columns or [])
    refusal = refusal or _unmapped(connection, oid)
    reasons += limits if refusal is None else []
    bits = {"table": oid, "bit": _TRIGGER_BITS.get(action, 0)}
    triggers = tuple(row[0] for row in connection.execute(_TRIGGERS, bits).fetchall())
    named = {"oid": oid, "command": _COMMANDS[action]}
    policies = connection.execute(_POLICIES, named).fetchall() if active else []
    hides_all = active and not any(permissive and qual for _, permissive, qual in policies)
    if refusal is None and hides_all and action == "insert":
        refusal = "row security is on, and no policy lets this role insert a row"
    if refusal is not None:
        reasons.append(f"and yet: {refusal}")
    return Verdict(
        refusal is None,
        tuple(reasons),
        active,
        tuple(
            f"{name} ({'permissive' if permissive else 'restrictive'})" + (f": {qual}" if qual else "")
            for name, permissive, qual in policies
        ),
        hides_all,
        any(permissive and qual == "true" for _, permissive, qual in policies)
        and all(permissive or qual in (None, "true") for _, permissive, qual in policies),
        triggers,
        only,
    )


def _insertable(connection: Connection, table: int) -> list[str]:
    """The columns that an INSERT may give a value; none where a foreign table's wrapper cannot say."""
    try:
        row = connection.execute(_INSERTABLE, (table,)).fetchone()
    except _UNKNOWN:
        raise
    except psycopg.Error:
        return []
    return (row[0] if row is not None else None) or []


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _refusal(
    connection: Connection, action: str, target: Target, columns: Sequence[str]
) -> tuple[str | None, list[str]]:
    """What PostgreSQL says against the action, None for nothing; and, of one that is possible, what it is not possible
    for, and why. A SELECT is of the columns, or of all where there are none. An UPDATE is possible where that of any
    column is, and an INSERT where one with all values is: a view's expression takes no value, an identity only DEFAULT,
    and a default may call what the login must not."""
    named = f" ({', '.join(columns)}) VALUES ({', '.join('NULL' for _ in columns)})"
    statements = {
        "select": [f"SELECT {', '.join(columns) or '*'} FROM {target.sql}"],
        "insert": [f"INSERT INTO {target.sql}{how}" for how in (" DEFAULT VALUES", *([named] if columns else ()))],
        "update": [
            f"UPDATE {target.sql} SET {one} = {to}" for to in ("DEFAULT", "NULL") for one in columns or ["ctid"]
        ],
        "delete": [f"DELETE FROM {target.sql}"],
    }[action]
    first = None
    for statement in statements:
        refusal, limits = _explained(connection, action, statement)
        if refusal is None:
            if first and action == "insert":
                limits = [f"only with a value for every column: {first}", *limits]
            return None, limits
        first = first or refusal
    return first, []


def _explained(connection: Connection, action: str, statement: str) -> tuple[str | None, list[str]]:
    """What PostgreSQL says against the statement, None for nothing; and against it for some partitions. Nothing runs:
    it is EXPLAIN, and rolled back."""
    connection.execute("BEGIN READ ONLY")
    try:
        with _bounded(connection):
            plans = connection.execute(f"EXPLAIN (VERBOSE, FORMAT JSON, COSTS OFF) {statement}".encode()).fetchone()
        if plans is None:
            return None, []
        empty = _not_populated(connection, plans[0])
        return (empty, []) if empty else _only_when_run(connection, action, plans[0])
    except _UNKNOWN:
        raise
    except psycopg.Error as problem:
        return problem.diag.message_primary or "it fails", []
    finally:
        if not connection.closed:
            connection.execute("ROLLBACK")


@contextmanager
def _bounded(connection: Connection) -> Iterator[None]:
    """EXPLAIN runs what the planner folds, which may catch a cancel, and so outlive every timeout of PostgreSQL's: then
    the connection is shut from this side."""
    over = Event()

    def shut() -> None:
        over.set()
        wire.shutdown(socket.SHUT_RDWR)

    with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as wire:
        late = Timer(_PATIENCE + 1, shut)
        late.start()
        try:
            yield
        except psycopg.OperationalError:
            if not over.is_set():
                raise
            raise psycopg.errors.QueryCanceled from None
        finally:
            late.cancel()


def _only_when_run(
    connection: Connection, action: str, plans: Sequence[dict[str, Any]]
) -> tuple[str | None, list[str]]:
    """What speaks against an INSERT or UPDATE that EXPLAIN does not see: nextval() asks for its right only when it
    runs, and so do checks. The plan names the table that the rows go into, also behind views, and puts out what goes
    into each of its columns: a default, or the NULL that was named. (An identity's sequence asks for no right.) What
    speaks against it for some partitions or heirs only is no refusal."""
    limits: list[str] = []
    if action not in ("insert", "update"):
        return None, limits
    inserts = action == "insert"
    for into in (plan.get("Plan", {}) for plan in plans):
        row_of = into["Plans"][0].get("Output", ()) if into.get("Plans") else ()
        defaults = [number for number, one in enumerate(row_of, 1) if not one.lstrip("(").startswith("NULL::")]
        named = {"schema": into.get("Schema"), "table": into.get("Relation Name")}
        named |= {"inserts": inserts, "defaults": defaults}
        row = connection.execute(_SEQUENCES, named).fetchone() if inserts else None
        if row is not None and row[0]:
            return f"permission denied for the sequence of a default: {row[0]}", []
        rows = connection.execute(_FUNCTIONS, named).fetchall()
        barred = [(table, f"{_CALLED}: {functions}") for table, functions in rows if functions]
        if barred and len(barred) == len(rows):
            return barred[0][1], []
        limits += [f"but not the rows of {table}: {why}" for table, why in barred]
    return None, limits


def _not_populated(connection: Connection, plans: Sequence[dict[str, Any]]) -> str | None:
    """What speaks against reading a materialized view that was made WITH NO DATA, which EXPLAIN does not open."""
    read = {one for plan in plans for one in _read(plan.get("Plan", {}))}
    empty = read.intersection((row[0], row[1]) for row in connection.execute(_EMPTY).fetchall())
    return f"materialized view {Target(*min(empty))} has not been populated" if empty else None


def _read(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(schema, relation) of each node of a plan."""
    if "Relation Name" in plan:
        yield plan["Schema"], plan["Relation Name"]
    for below in plan.get("Plans", ()):
        yield from _read(below)


def _unmapped(connection: Connection, table: int) -> str | None:
    """What speaks against a foreign table that EXPLAIN does not open either."""
    row = connection.execute(_UNMAPPED, (table,)).fetchone()
    return f"no user mapping on the server {row[0]}, for this role or PUBLIC" if row is not None else None


def tables(
    connection: Connection, access: str, again: Callable[[], Connection]
) -> Iterator[tuple[Target, list[str], bool, Error | None]]:
    """Every table that the login reaches: what it may do with it of that access, as `may` says, with the columns where
    it is not all of them; whether row security filters it; and why not all of it is known. `again` connects anew."""
    for schema, name, actions, active in connection.execute(_TABLES).fetchall():
        target, found, unknown = Target(schema, name), list[str](), None
        try:
            for one in (one for one in actions if ACTIONS[one] == access):
                if connection.closed:
                    connection = again()
                verdict = may(connection, one, target)
                found += [one + verdict.on_columns] if verdict.allowed else []
        except NotFoundError:  # dropped meanwhile
            continue
        except Error as problem:
            unknown = problem
        yield target, found, active, unknown
    connection.close()


def settable(connection: Connection, names: Sequence[str]) -> list[str]:
    """Those of the named settings that the login may change with ALTER SYSTEM."""
    return [row[0] for row in connection.execute(_SETTABLE, (list(names),)).fetchall()]
