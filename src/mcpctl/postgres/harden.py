"""What PUBLIC may execute and a reader must not: the list, the SQL that takes it away, and the SQL that looks for it.

A login role with nothing but SELECT on some tables still holds, through PUBLIC, EXECUTE on functions that write, reach
outside or read behind the privileges, from within a plain SELECT in a READ ONLY transaction too. What PUBLIC holds can
be taken from PUBLIC only, in each database for itself. docs/security.md says what is left standing, and why.

PostgreSQL, "GRANT" (EXECUTE is PUBLIC's by default), "System Administration Functions", "SET TRANSACTION" (what READ
ONLY forbids), "Large Objects", "Writing SECURITY DEFINER Functions Safely", "CREATE VIEW" (security_invoker).
"""

from typing import Any, NamedTuple

import psycopg
from psycopg.rows import args_row

from mcpctl.identity.grants import SUFFIXES


class Entry(NamedTuple):
    """Functions of one kind: a regular expression for the whole name, and why they are on the list, in one line."""

    names: str
    reason: str
    extension: str | None = None
    """An extension's own functions, in whatever schema they are; None: functions in pg_catalog."""
    strict: bool = False
    """Shows or disturbs little, and programs other than mcpctl may need it."""


class Definer(NamedTuple):
    """A function that acts with its owner's rights: schema, signature, owner, whether that is a superuser."""

    schema: str
    signature: str
    owner: str
    superuser: bool


class View(NamedTuple):
    """A view that reads with its owner's rights: schema, name, owner, whether that is a superuser, or has BYPASSRLS."""

    schema: str
    name: str
    owner: str
    superuser: bool
    bypassrls: bool


ENTRIES = (
    Entry(
        "lo_.*|loread|lowrite",
        "large objects: written in a read-only transaction up to 15; everybody's with lo_compat_privileges",
    ),
    Entry("pg_logical_emit_message", "writes WAL, and to whoever decodes it; no rollback undoes it"),
    Entry("pg_export_snapshot", "writes a file, and lets other sessions hold on to old rows"),
    Entry(
        "pg_read_(binary_)?file|pg_stat_file|pg_ls_dir|pg_file_.*|pg_logdir_ls",
        "reads, lists or writes the server's files; PUBLIC has it only if it was granted",
    ),
    Entry(
        "pg_reload_conf|pg_rotate_logfile|pg_switch_wal|pg_create_restore_point|pg_promote"
        "|pg_wal_replay_(pause|resume)|pg_backup_(start|stop)|pg_replication_origin_.*",
        "steers the server; PUBLIC has it only if it was granted",
    ),
    Entry("pg_stat_reset.*", "wipes statistics that autovacuum relies on; PUBLIC has it only if it was granted"),
    Entry(".*", "opens connections of its own, in which nothing is read-only", extension="dblink"),
    Entry("http.*", "asks any host that the server can reach", extension="http"),
    Entry("autoprewarm_.*", "starts a process of the server, and writes a file", extension="pg_prewarm"),
    Entry("pg_stat_statements_reset", "wipes everybody's statistics", extension="pg_stat_statements"),
    Entry("xpath_table", "runs SQL that it is given, under a label (PARALLEL SAFE) that denies it", extension="xml2"),
    Entry(
        "pg_(try_)?advisory_(xact_)?lock(_shared)?",
        "locks by number that programs agree on: makes those of other roles wait",
        strict=True,
    ),
    Entry(
        "txid_current|pg_current_xact_id",
        "uses up a transaction number, in a read-only transaction too",
        strict=True,
    ),
    Entry(
        "pg_(relation|table|indexes|total_relation)_size",
        "shows the size of tables that were not granted",
        strict=True,
    ),
    Entry("pg_control_.*|pg_get_loaded_modules", "shows what the cluster is and what it runs", strict=True),
    Entry(
        "pg_available_wal_summaries|pg_wal_summary_contents",
        "shows which blocks change, of every table of every database",
        strict=True,
    ),
    Entry("pg_prewarm", "fills the cache that all share", extension="pg_prewarm", strict=True),
)
"""The whole list, as it was tried on 15, 16 and 18 by a role with SELECT alone. `http` was only read, never run."""


def _literal(value: str | bool | None) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else str(value).lower()


_OF_EXTENSION = """SELECT {what} FROM pg_catalog.pg_depend AS d JOIN pg_catalog.pg_extension AS e ON e.oid = d.refobjid
            WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.deptype = 'e'
                AND {which}"""


def _few(entries: tuple[Entry, ...]) -> str:
    """The functions that can be on the list at all, for `_matching`: each function's name is compared once, and not
    with each entry, which takes two to four times as long. OFFSET keeps the planner from turning it round."""
    names = "|".join(entry.names for entry in entries if entry.extension is None)
    extensions = ", ".join(_literal(name) for name in sorted({entry.extension for entry in entries if entry.extension}))
    return f"""(
        SELECT f.oid, f.proname, f.pronamespace, f.proacl, f.proowner FROM pg_catalog.pg_proc AS f
        WHERE f.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND f.proname ~ {_literal(f"^({names})$")}
            OR f.oid IN ({_OF_EXTENSION.format(what="d.objid", which=f"e.extname IN ({extensions})")})
        OFFSET 0)"""


def _matching(entries: tuple[Entry, ...], functions: str = "pg_catalog.pg_proc") -> str:
    """The FROM of a query for functions `p` that are on the `list`."""
    order = ("extension", "names", "reason", "strict")
    rows = ",\n        ".join(f"({', '.join(_literal(getattr(entry, name)) for name in order)})" for entry in entries)
    return f"""FROM (VALUES
        {rows}
    ) AS list ({", ".join(order)})
    JOIN {functions} AS p ON p.proname ~ ('^(' || list.names || ')$')
    WHERE CASE
        WHEN list.extension IS NULL THEN p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace
        ELSE EXISTS (
            {_OF_EXTENSION.format(what="", which="d.objid = p.oid AND e.extname = list.extension")})
    END"""


_PUBLIC_HOLDS = """EXISTS (
        SELECT FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS held
        WHERE held.grantee = 0 AND held.privilege_type = 'EXECUTE')"""

# After the loop it looks again: where nothing could be revoked, PostgreSQL warns, and goes on.
_SCRIPT = """\
SET client_encoding = 'UTF8';
-- mcpctl: takes from PUBLIC what a role that may only read must not execute{strict}.
-- For PostgreSQL 15 to 18. Run it connected to the database, as a superuser, in each database for itself:
--     psql -v ON_ERROR_STOP=1 -d NAME -f FILE
-- All or nothing, and as often as you like: again after each CREATE EXTENSION, ALTER EXTENSION UPDATE and upgrade.
-- The functions' owners and superusers keep them. What another role needs, grant it by name.
-- Before pg_upgrade to 17 or newer give back this one, whose arguments change; then run this again:
--     GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text) TO PUBLIC;
--     GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, bytea) TO PUBLIC;

BEGIN;
SET LOCAL search_path = pg_catalog, pg_temp;
DO $harden$
DECLARE
    listed oid[] := ARRAY(SELECT p.oid
    {matching});
    routine pg_catalog.regprocedure;
    still text;
BEGIN
    FOR routine IN
        SELECT p.oid FROM pg_catalog.pg_proc AS p
        WHERE p.oid = ANY (listed) AND {public_holds}
        ORDER BY p.oid
    LOOP
        EXECUTE pg_catalog.format('REVOKE EXECUTE ON ROUTINE %s FROM PUBLIC', routine);
        RAISE NOTICE 'taken from PUBLIC: %', routine;
    END LOOP;

    SELECT pg_catalog.string_agg(p.oid::pg_catalog.regprocedure::text, ', ' ORDER BY p.oid) INTO still
    FROM pg_catalog.pg_proc AS p
    WHERE p.oid = ANY (listed) AND {public_holds};
    IF still IS NOT NULL THEN
        RAISE EXCEPTION 'PUBLIC can still execute %', still USING
            ERRCODE = 'insufficient_privilege',
            HINT = 'Run this as a superuser; where another role has granted it, take back what that role granted.';
    END IF;
END
$harden$;
COMMIT;
"""


def script(*, strict: bool = False) -> str:
    """SQL that revokes EXECUTE on the list from PUBLIC in the database it is run in; `strict` takes all of the list.

    It is one transaction, may be run again, and fails with SQLSTATE 42501, naming the functions, where PUBLIC would
    keep one. PostgreSQL, "REVOKE": only what the function's owner granted goes, and only by him or a superuser.
    """
    entries = tuple(entry for entry in ENTRIES if strict or not entry.strict)
    word = ", and what is only asked for with `strict`" if strict else ""
    return _SCRIPT.format(strict=word, matching=_matching(entries), public_holds=_PUBLIC_HOLDS)


STILL_OPEN = f"""
SELECT p.oid::pg_catalog.regprocedure::text, list.reason
{_matching(ENTRIES, _few(ENTRIES))}
    AND (%(strict)s OR NOT list.strict)
    AND pg_catalog.has_function_privilege(coalesce(%(role)s::name, current_user), p.oid, 'EXECUTE')
ORDER BY 1
"""
"""What a role may still execute of the list, in the database it is asked in: (signature, reason).

Parameters in psycopg's style: `role` (NULL: whoever asks) and `strict`. It counts what the role holds by itself, by
PUBLIC and by its memberships, also in a schema that it cannot name: a view may name it for him.
PostgreSQL, "Access Privilege Inquiry Functions". UndefinedObject where there is no such role.
"""

_OUTSIDE = """n.nspname NOT IN ('pg_catalog', 'information_schema') AND r.rolname <> asking.role"""
_ASKING = "(SELECT coalesce(%(role)s::name, current_user) AS role) AS asking"

DEFINERS = f"""
SELECT n.nspname, p.oid::pg_catalog.regprocedure::text, r.rolname, r.rolsuper
FROM {_ASKING}, pg_catalog.pg_proc AS p
JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner
WHERE p.prosecdef AND {_OUTSIDE}
    AND p.prorettype NOT IN ('trigger'::pg_catalog.regtype, 'event_trigger'::pg_catalog.regtype)
    AND pg_catalog.has_function_privilege(asking.role, p.oid, 'EXECUTE')
ORDER BY 1, 2
"""
"""SECURITY DEFINER functions of others that the role may execute: (schema, signature, owner, owner is a superuser).

Parameter: `role`, as in STILL_OPEN. Trigger functions cannot be called, and are left out.
"""

VIEWS = f"""
SELECT n.nspname, c.relname, r.rolname, r.rolsuper, r.rolbypassrls
FROM {_ASKING}, pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
WHERE c.relkind = 'v' AND (r.rolsuper OR r.rolbypassrls) AND {_OUTSIDE}
    AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_options_to_table(c.reloptions) AS o
        WHERE o.option_name = 'security_invoker' AND o.option_value::boolean)
    AND (pg_catalog.has_table_privilege(asking.role, c.oid, 'SELECT')
        OR pg_catalog.has_any_column_privilege(asking.role, c.oid, 'SELECT'))
ORDER BY 1, 2
"""
"""Views that the role may read, and that read as an owner whom no privilege or no row policy stops.

(schema, name, owner, owner is a superuser, owner has BYPASSRLS). Parameter: `role`, as in STILL_OPEN.
"""


def still_open(connection: psycopg.Connection[Any], role: str | None, *, strict: bool = False) -> list[tuple[str, str]]:
    """What the role (None: the connection's own) may still execute of the list: (signature, reason). See STILL_OPEN.
    Without what a login role that changes settings was granted by us."""
    with connection.cursor(row_factory=args_row(lambda signature, reason: (str(signature), str(reason)))) as cursor:
        found = cursor.execute(STILL_OPEN.encode(), {"role": role, "strict": strict}).fetchall()
    granted = ("pg_reload_conf()",) if (role or "").endswith(f"_{SUFFIXES['admin']}") else ()
    return [one for one in found if one[0] not in granted]


def held_by_public(connection: psycopg.Connection[Any], *, strict: bool = False) -> list[str]:
    """The signatures on the list that PUBLIC may execute in this database."""
    entries = tuple(entry for entry in ENTRIES if strict or not entry.strict)
    listed = _matching(entries, _few(entries))
    query = f"SELECT DISTINCT p.oid::pg_catalog.regprocedure::text {listed} AND {_PUBLIC_HOLDS} ORDER BY 1"
    return [row[0] for row in connection.execute(query.encode()).fetchall()]


def definers(connection: psycopg.Connection[Any], role: str | None) -> list[Definer]:
    """The functions with which the role (None: the connection's own) acts as somebody else. See DEFINERS."""
    with connection.cursor(row_factory=args_row(Definer)) as cursor:
        return cursor.execute(DEFINERS.encode(), {"role": role}).fetchall()


def views(connection: psycopg.Connection[Any], role: str | None) -> list[View]:
    """The views through which the role (None: the connection's own) reads as one whom nothing stops. See VIEWS."""
    with connection.cursor(row_factory=args_row(View)) as cursor:
        return cursor.execute(VIEWS.encode(), {"role": role}).fetchall()
