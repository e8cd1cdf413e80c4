"""Where PostgreSQL and users.yaml disagree about a user's grant in one database."""

import shlex
from collections.abc import Collection
from typing import Any, NamedTuple

import psycopg

from mcpctl.identity import grants
from mcpctl.identity.grants import ACCESSES, EVERYTHING, Grant, identifier, login_role, quoted
from mcpctl.postgres import parameters
from mcpctl.postgres.hba import GROUP
from mcpctl.postgres.parameters import Parameters
from mcpctl.postgres.roles import GONE, MAKERS, OURS, PRIVILEGES, SETTINGS, TO_COME, tables_of

Connection = psycopg.Connection[tuple[Any, ...]]
_SYSTEM = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
_RELATIONS = f"""
SELECT n.nspname, c.relname, c.relkind = 'S',
       (SELECT t.relname FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_class t ON t.oid = d.refobjid
        WHERE d.objid = c.oid AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
          AND d.refclassid = d.classid AND d.deptype IN ('a', 'i') AND c.relkind = 'S' LIMIT 1),
       {OURS}
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND {_SYSTEM}"""
_HELD = f"""
WITH held (schema, name, of_column, maker, grantor, grantee, privilege, grantable) AS (
  SELECT n.nspname, c.relname, NULL::name, NULL::name, a.*
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
       pg_catalog.aclexplode(c.relacl) a
  UNION ALL
  SELECT n.nspname, c.relname, t.attname, NULL, a.*
  FROM pg_catalog.pg_attribute t JOIN pg_catalog.pg_class c ON c.oid = t.attrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, pg_catalog.aclexplode(t.attacl) a
  UNION ALL
  SELECT n.nspname, NULL, NULL, NULL, a.*
  FROM pg_catalog.pg_namespace n, pg_catalog.aclexplode(n.nspacl) a
  UNION ALL
  SELECT n.nspname, {TO_COME}, NULL, pg_catalog.pg_get_userbyid(d.defaclrole), a.*
  FROM pg_catalog.pg_default_acl d LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace,
       pg_catalog.aclexplode(d.defaclacl) a
  UNION ALL
  SELECT NULL, NULL, NULL, NULL, a.*
  FROM pg_catalog.pg_database d, pg_catalog.aclexplode(d.datacl) a WHERE d.datname = pg_catalog.current_database()
)
SELECT h.privilege, h.schema, h.name, h.of_column, h.maker, pg_catalog.bool_or(h.grantable)
FROM held h JOIN pg_catalog.pg_roles r ON r.oid = h.grantee WHERE r.rolname = %s GROUP BY 1, 2, 3, 4, 5"""
_ROLE = """
SELECT pg_catalog.shobj_description(r.oid, 'pg_authid'), r.rolcanlogin,
       r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls,
       EXISTS (SELECT FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles g ON g.oid = m.roleid
               WHERE m.member = r.oid AND g.rolname = 'mcp_logins'),
       (SELECT pg_catalog.array_agg(ARRAY[g.rolname::text,
          pg_catalog.format('REVOKE %%I FROM %%I', g.rolname, r.rolname)
          || CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 160000 THEN
             pg_catalog.format(' GRANTED BY %%I', pg_catalog.pg_get_userbyid(m.grantor)) ELSE '' END])
        FROM pg_catalog.pg_auth_members m
        JOIN pg_catalog.pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid
          AND g.rolname <> 'mcp_logins' AND (g.rolname <> 'pg_read_all_settings' OR r.rolname !~ '_a$'))
FROM pg_catalog.pg_roles r WHERE r.rolname = %s"""
_NAMED = """CASE i.type WHEN 'parameter ACL' THEN 'PARAMETER' WHEN 'aggregate' THEN 'FUNCTION'
         WHEN 'foreign-data wrapper' THEN 'FOREIGN DATA WRAPPER' WHEN 'server' THEN 'FOREIGN SERVER' ELSE i.type END
       || ' ' || i.identity"""
_OWNED = f"""
SELECT {_NAMED} FROM pg_catalog.pg_shdepend s
  JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid AND s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass,
  pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) i
WHERE r.rolname = %s AND s.deptype = 'o' AND s.classid <> 'pg_catalog.pg_default_acl'::pg_catalog.regclass
  AND s.dbid IN (0, (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
ORDER BY 1"""
_OTHER = f"""
SELECT {_NAMED} FROM pg_catalog.pg_shdepend s
  JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid AND s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass,
  pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) i
WHERE r.rolname = %s AND s.deptype = 'a'
  AND s.dbid IN (0, (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
  AND s.classid::pg_catalog.regclass::text <> ALL (%s)
  AND (i.identity <> 'pg_catalog.pg_reload_conf()' OR r.rolname !~ '_a$') ORDER BY 1"""
_SET = """
SELECT pg_catalog.split_part(one, '=', 1) FROM pg_catalog.pg_db_role_setting s
  JOIN pg_catalog.pg_roles r ON r.oid = s.setrole, pg_catalog.unnest(s.setconfig) one
WHERE r.rolname = %s AND s.setdatabase IN
  (0, (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
  AND pg_catalog.split_part(one, '=', 1) <> ALL (%s) ORDER BY 1"""
_MEMBERS = """
SELECT u.rolname::text FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r ON r.oid = m.roleid
  JOIN pg_catalog.pg_roles u ON u.oid = m.member
WHERE r.rolname = %s
  AND coalesce((pg_catalog.to_jsonb(m) ->> 'inherit_option')::bool OR (pg_catalog.to_jsonb(m) ->> 'set_option')::bool,
    true)
ORDER BY 1"""
"""Who has a login role's rights, too. From 16 on who makes a role is a member of it who has not."""
_COMPARED = ["pg_class", "pg_namespace", "pg_default_acl", "pg_database"]
"""Where `_HELD` looks for rights."""
_GROUP = """
SELECT r.rolcanlogin OR r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls,
       (SELECT pg_catalog.array_agg(g.rolname::text) FROM pg_catalog.pg_auth_members m
        JOIN pg_catalog.pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid)
FROM pg_catalog.pg_roles r WHERE r.rolname = %s"""
BY_HAND = "; a DBA mends it: "
"""Stands before the SQL for what no grant mends, since somebody has done it on purpose."""


class Right(NamedTuple):
    """A privilege on the database, on a schema, on a table or sequence in it, or on a column; with a `maker` on what
    that role will make, of the kind `name`, in that schema or in all."""

    privilege: str
    schema: str | None
    name: str | None = None
    column: str | None = None
    maker: str | None = None

    def __str__(self) -> str:
        column = f" ({quoted(self.column)})" if self.column is not None else ""
        if self.maker is not None:
            where = f"in {quoted(self.schema)}" if self.schema is not None else "in every schema"
            return f"{self.privilege} on {(self.name or '').lower()} to come {where} that {quoted(self.maker)} makes"
        names = [quoted(one) for one in (self.schema, self.name) if one is not None]
        return f"{self.privilege}{column} on {'.'.join(names) or 'the database'}"

    def within(self) -> "Right":
        """The right that gives this one too: on the whole table, or whoever makes it."""
        return self._replace(column=None, maker=None if self.maker is None else "")


def differences(
    connection: Connection, user: str, grant: Grant, mark: str, may_set: Parameters, *, login: bool = True
) -> list[str]:
    """Each point on which PostgreSQL is not as the grant says, as a sentence; none where all is well. `may_set`: what
    the user's grants in all databases of the cluster let change; `login`: whether the user's roles may log in."""
    there = _there(connection)
    found = [_gone(user, grant.database, one) for one in dict.fromkeys(grant.read + grant.write) if one not in there]
    for access in ACCESSES:
        targets = getattr(grant, access)
        role = login_role(user, access)
        row = connection.execute(_ROLE, (role,)).fetchone()
        if row is None:
            found += [f"{role}: is not there"] if targets else []
            continue
        held = _held(connection, role)
        found += _owned(connection, role)
        found += [
            f"{role}: {quoted(one)} is a member of it, and has its rights"
            f"{BY_HAND}REVOKE {identifier(role)} FROM {identifier(one)}"
            for (one,) in connection.execute(_MEMBERS, (role,)).fetchall()
        ]
        if access == "admin" and (targets or held):
            found += parameters.differences(connection, role, may_set, here=bool(targets))
        if not targets:
            found += [f"{role}: has rights here, and no {access} access is recorded"] if held else []
            continue
        found += _of_role(role, row, mark, login)
        found += _of_privileges(role, _wanted(connection, access, grant, there, held), held)
        ours = [*SETTINGS, "temp_file_limit", "search_path"]
        settings = connection.execute(_SET, (role, ours)).fetchall()
        found += [f"{role}: has a default of its own for {name}, which is not ours" for (name,) in settings]
        found += [
            f"{role}: has a right on {what}, which is not recorded{BY_HAND}REVOKE ALL ON {what} FROM {identifier(role)}"
            for what in _other(connection, role, [*_COMPARED, *(["pg_parameter_acl"] if access == "admin" else [])])
        ]
    return found


def _owned(connection: Connection, role: str) -> list[str]:
    """What a role owns: who owns something may do everything with it, and let others do so."""
    return [
        f"{role}: owns {what}, which is not recorded{BY_HAND}ALTER {what} OWNER TO pg_database_owner"
        for (what,) in connection.execute(_OWNED, (role,)).fetchall()
    ]


def of_group(connection: Connection, name: str) -> list[str]:
    """What the group of all login roles, or the heir of what they owned, has and must not: all of its members have it
    too, or all that runs as it."""
    row = connection.execute(_GROUP, (name,)).fetchone()
    if row is None:
        return []
    more, others = row
    found = [f"{name}: has been made more than a group"] if more else []
    found += [f"{name}: is a member of {quoted(one)}, and with it everybody in it" for one in others or ()]
    if name == GROUP:  # the heir is there to own
        found += [
            f"{name}: owns {what[0]}, and so does everybody in it" for what in connection.execute(_OWNED, (name,))
        ]
    return found + [f"{name}: has a right on {what}, and with it everybody in it" for what in _other(connection, name)]


def _other(connection: Connection, role: str, but: list[str] | None = None) -> list[str]:
    return [row[0] for row in connection.execute(_OTHER, (role, but or [])).fetchall()]


def _of_role(role: str, row: tuple[Any, ...], mark: str, login: bool) -> list[str]:
    of_whom, can_login, more, in_group, member = row
    found = [] if of_whom == mark else [f"{role}: is not marked as this mcpctl's"]
    if can_login != login:
        found.append(f"{role}: may not log in" if login else f"{role}: may log in, and its user is disabled")
    if not in_group:
        found.append(f"{role}: lacks membership in {GROUP}, which pg_hba.conf names")
    if more:
        name = identifier(role)
        powers = f"ALTER ROLE {name} NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS"
        found.append(f"{role}: has been made more than a login{BY_HAND}{powers}")
    return found + [
        f"{role}: is a member of {quoted(other)}, and has its rights{BY_HAND}{revoke}" for other, revoke in member or ()
    ]


def _of_privileges(role: str, wanted: set[Right], held: dict[Right, bool]) -> list[str]:
    broad = {one.within() for one in wanted}
    missing = {f"{role}: lacks {one}" for one in wanted - held.keys()}
    extra = {f"{role}: has {one}, which is not recorded" for one in held if one.within() not in broad}
    extra |= {
        f"{role}: has {one} WITH GRANT OPTION, which is not recorded"
        for one, grantable in held.items()
        if grantable and one.within() in broad
    }
    return sorted(missing) + sorted(extra)


def _there(connection: Connection) -> set[str]:
    """Each target that could be granted here."""
    schemas = connection.execute(f"SELECT n.nspname FROM pg_catalog.pg_namespace n WHERE {_SYSTEM}").fetchall()
    relations = connection.execute(_RELATIONS.encode()).fetchall()
    tables = {str(grants.Target(schema, name)) for schema, name, sequence, _, _ in relations if not sequence}
    return {EVERYTHING, *(quoted(row[0]) for row in schemas), *tables}


def _gone(user: str, database: str, target: str) -> str:
    kind = "schema" if grants.parse(target).table is None else "table"
    return f"{target} {GONE}; mcpctl user ungrant {user} --database {database} --{kind} {_word(target)} --apply"


def _word(text: str) -> str:
    """A word of a shell's command that can be copied from where it is shown: bash's form for what is not printable."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + grants.escaped(text.replace("\\", r"\\").replace("'", r"\'"), r"\u%04X", r"\U%08X") + "'"


def _wanted(connection: Connection, access: str, grant: Grant, there: set[str], held: Collection[Right]) -> set[Right]:
    """What the role is to hold; of what our own roles own in a schema that was granted, whatever it does hold."""
    relations = connection.execute(_RELATIONS.encode()).fetchall()
    makers = connection.execute(f"{MAKERS} AND {_SYSTEM}".encode()).fetchall()
    schemas = {row[0] for row in connection.execute(f"SELECT n.nspname FROM pg_catalog.pg_namespace n WHERE {_SYSTEM}")}
    found = {Right("CONNECT", None)}
    for kind, targets in tables_of(grant, access).items():
        privileges = {False: PRIVILEGES[kind], True: ("USAGE",) if kind == "write" else ()}
        for text in there.intersection(targets):
            target = None if text == EVERYTHING else grants.parse(text)
            inside = schemas if target is None else {target.schema}
            table = target.table if target is not None else None
            found |= {Right("USAGE", schema) for schema in inside}
            if target is not None and table is not None:
                found |= {Right(privilege, target.schema, table) for privilege in PRIVILEGES[kind]}
            found |= {
                Right(privilege, schema, name)
                for schema, name, sequence, of, ours in relations
                if schema in inside and (table is None or (sequence and of == table))
                for privilege in privileges[sequence]
                if not ours or table is not None or Right(privilege, schema, name) in held
            }
            found |= {
                Right(privilege, schema, "SEQUENCES" if sequence else "TABLES", maker=maker)
                for schema, maker in makers
                if schema in inside and table is None
                for sequence in (False, True)
                for privilege in privileges[sequence]
            }
    return found


def _held(connection: Connection, role: str) -> dict[Right, bool]:
    """What the role was given itself, and whether it may hand it on."""
    rows = connection.execute(_HELD.encode(), (role,)).fetchall()
    return {Right(*row[:5]): row[5] for row in rows}
