"""What the login role of a user with admin access may set: ALTER SYSTEM on the settings that the config lists, EXECUTE
on `pg_reload_conf()`, which has them applied, and nothing on any table.

Settings, and roles with them, belong to the cluster; a function's privileges to a database. So the settings are those
of all databases of the cluster together in which the user has admin access. PostgreSQL's manual: GRANT ("PARAMETER"),
ALTER SYSTEM, "Configuration Settings Functions", "Predefined Roles".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from mcpctl.identity.grants import quoted
from mcpctl.postgres.roles import do, literal

Connection = psycopg.Connection[tuple[Any, ...]]
READ_ALL = "pg_read_all_settings"
"""PostgreSQL's own role, whose members see every setting and the file that it stands in."""


@dataclass(frozen=True)
class Parameters:
    """The settings that a login role may change, and whether it is a member of `pg_read_all_settings`."""

    names: tuple[str, ...] = ()
    read_all: bool = False


def body(role: str, wanted: Parameters, *, here: bool) -> str:
    """The SQL that has the role set exactly these, once `roles.grant_body` has made it. `here`: in this database, too,
    so that it can have them applied; else only what belongs to the cluster, and nothing where there is no such role."""
    names = f"ARRAY[{', '.join(map(literal, wanted.names))}]::text[]"
    values = {"role": literal(role), "wanted": names, "read_all": str(wanted.read_all).lower(), "group": READ_ALL}
    script = f"\n-- {role}: may change {', '.join(wanted.names) or 'no setting'}\n" + do(_SET % values)
    if here:
        script += "-- EXECUTE on pg_reload_conf(): without it a changed setting would wait for somebody else's reload\n"
        script += do(_RELOAD % values)
    return script


_SET = """DECLARE
  one record;
  it oid;
BEGIN
  SELECT r.oid INTO it FROM pg_roles r WHERE r.rolname = %(role)s;
  IF it IS NULL THEN
    RETURN;
  END IF;
  FOR one IN
    WITH held AS (SELECT p.parname AS name, a.privilege_type AS privilege
                  FROM pg_parameter_acl p, aclexplode(p.paracl) a WHERE a.grantee = it),
    wanted AS (SELECT name, 'ALTER SYSTEM' AS privilege FROM unnest(%(wanted)s) name)
    SELECT format('REVOKE %%s ON PARAMETER %%I FROM %%I', x.privilege, x.name, %(role)s) AS command
    FROM (SELECT * FROM held EXCEPT SELECT * FROM wanted) x
    UNION ALL
    SELECT format('GRANT %%s ON PARAMETER %%I TO %%I', x.privilege, x.name, %(role)s)
    FROM (SELECT * FROM wanted EXCEPT SELECT * FROM held) x
  LOOP
    EXECUTE one.command;
  END LOOP;
  IF %(read_all)s <> EXISTS (SELECT FROM pg_auth_members WHERE member = it AND roleid = '%(group)s'::regrole) THEN
    EXECUTE format(CASE WHEN %(read_all)s THEN 'GRANT %(group)s TO %%I' ELSE 'REVOKE %(group)s FROM %%I' END, %(role)s);
  END IF;
END"""

_RELOAD = """BEGIN
  IF NOT EXISTS (SELECT FROM pg_proc p, aclexplode(p.proacl) a
                 WHERE p.oid = 'pg_catalog.pg_reload_conf()'::regprocedure AND a.grantee = to_regrole(%(role)s)) THEN
    EXECUTE format('GRANT EXECUTE ON FUNCTION pg_catalog.pg_reload_conf() TO %%I', %(role)s);
  END IF;
END"""

_HELD = """
SELECT p.parname, a.privilege_type FROM pg_catalog.pg_parameter_acl p, pg_catalog.aclexplode(p.paracl) a
  JOIN pg_catalog.pg_roles r ON r.oid = a.grantee WHERE r.rolname = %s"""
_RELOADS = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
               JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
               WHERE p.oid = 'pg_catalog.pg_reload_conf()'::pg_catalog.regprocedure AND r.rolname = %s)"""
_READS_ALL = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r ON r.oid = m.member
               WHERE r.rolname = %s AND m.roleid = 'pg_read_all_settings'::pg_catalog.regrole)"""


def differences(connection: Connection, role: str, wanted: Parameters, *, here: bool) -> list[str]:
    """Each point on which the role is not as wanted, as a sentence. `here`: whether it is for admin access in this
    database; else it may be, for another one of the cluster."""
    names = {(name, "ALTER SYSTEM") for name in wanted.names}
    held = {(row[0], row[1]) for row in connection.execute(_HELD, (role,)).fetchall()}
    found = [f"{role}: lacks {privilege} on the setting {name}" for name, privilege in sorted(names - held)]
    found += [
        f"{role}: has {privilege} on the setting {name}, which is not recorded"
        for name, privilege in sorted(held - names)
    ]
    asked: Sequence[tuple[str, bool, str]] = (
        (_RELOADS, here, "EXECUTE on pg_reload_conf()"),
        (_READS_ALL, wanted.read_all, f"membership in {quoted(READ_ALL)}"),
    )
    say: dict[bool, Callable[[str], str]] = {
        True: lambda what: f"{role}: lacks {what}",
        False: lambda what: f"{role}: has {what}, which is not recorded",
    }
    for query, want, what in asked:
        row = connection.execute(query.encode(), (role,)).fetchone()
        if row is not None and row[0] != want:
            found.append(say[want](what))
    return found
