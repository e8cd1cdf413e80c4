"""The SQL that makes a user's login roles and their grants in one database, and the SQL that takes them away.

The scripts stand alone: a DBA can read them and pipe them into psql, connected to the database, and `--apply` runs the
same text. They say what is to be, not what to change: run twice, the second changes nothing. A login role is marked by
its COMMENT with the installation that made it; one of that name without the mark is left alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mcpctl.identity import grants
from mcpctl.identity.grants import ACCESSES, EVERYTHING, Grant, escaped, identifier, login_role
from mcpctl.postgres import hba
from mcpctl.postgres.hba import GROUP
from mcpctl.postgres.leaving import LEAVE

HEIR = "mcp_left"
"""The role without login and rights that gets what a login role owned: a function of its, a view or an index of a
table of its runs with the owner's rights, and so with none."""
PRIVILEGES = {"read": ("SELECT",), "write": ("SELECT", "INSERT", "UPDATE", "DELETE")}
"""What a login role has on a table that it reads or writes. One that changes settings has nothing on any table."""
SETTINGS = (
    "default_transaction_read_only",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "client_connection_check_interval",
)
"""What a login role is told for its sessions, beside temp_file_limit and, in a tenant's schema, search_path."""
FOREIGN_MARK = "MC001"
"""SQLSTATE of a role that has our name, and not our mark."""
NO_TABLE = "MC004"
"""SQLSTATE of a name that is not a table's or a view's, but something else's."""
LEFT_OVER = "MC005"
"""SQLSTATE of a login role of ours that an earlier user of that name has left."""
OVERPOWERED = "MC003"
"""SQLSTATE of a login role that somebody has made more than one."""
ENCODING = "SET client_encoding = 'UTF8';"
"""Stands at the top of each script: what else PGCLIENTENCODING says would name other objects."""
GONE = "is recorded and not there"
"""What is said of a schema or table that was granted and has been dropped since."""
Rights = Collection[tuple[str, ...]]
"""Rights as `Grant.recorded` has them."""
_GROUP = {"group": GROUP, "group_mark": "'mcpctl: its users'' login roles; for pg_hba.conf'"}
_HEIR_MARK = "'mcpctl: owns what its users'' login roles owned'"
_SYSTEM = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
OURS = "(r.rolname ~ '^mcp_' AND pg_catalog.shobj_description(r.oid, 'pg_authid') ~ '^mcpctl')"
"""Whether a role `r` is a login role, or HEIR. What it owns it alone or a superuser could grant, so that a grant on a
schema passes it over: it neither gives nor takes rights on it."""
MAKERS = f"""
    SELECT DISTINCT n.nspname, r.rolname AS owner
    FROM pg_catalog.pg_namespace n
      LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
      JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
      JOIN pg_catalog.pg_roles r ON r.oid IN (n.nspowner, c.relowner)
        OR (r.oid = d.datdba AND n.nspowner = 'pg_database_owner'::pg_catalog.regrole)
    WHERE r.rolname !~ '^pg_' AND NOT {OURS}"""
"""Who makes the tables to come, by schema: each role that owns something there, and is none of OURS."""
TO_COME = (
    "CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS'"
    " WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' ELSE 'LARGE OBJECTS' END"
)
"""What a default privilege is on (PostgreSQL, "pg_default_acl")."""


@dataclass(frozen=True)
class Terms:
    """What every login role of a database is given. Times are in seconds; `connections` is its CONNECTION LIMIT,
    `login` whether its user is not disabled, `schema` the one that a tenant has, which is then its search path."""

    mark: str
    connections: int
    statement_timeout: float
    open_hba: bool = False
    login: bool = True
    schema: str | None = None
    temp_file_limit: str = "256MB"


def literal(text: str) -> str:
    """A text as SQL, without a control character in it."""
    inner = text.replace("'", "''")
    if text.isprintable() and "\\" not in text:
        return f"'{inner}'"
    return " E'" + escaped(inner.replace("\\", "\\\\"), r"\u%04X", r"\U%08X") + "'"


def do(body: str) -> str:
    """An anonymous block; its quotes are such that nothing in it ends them."""
    tag = "mcpctl"
    while f"${tag}$" in body:
        tag += "x"
    return f"DO ${tag}$\n{body.rstrip()}\n${tag}$;\n"


def mark(installation: str, user: str) -> str:
    """The COMMENT of a login role."""
    return f"mcpctl {installation}: login role of {user}"


def script(body: str, title: str) -> str:
    """A body as a script for psql: all of it or nothing. A name in the title ends no comment."""
    return f"{ENCODING}\n-- " + escaped(title, r"\%04X", r"\+%06X") + f"\nBEGIN;\n{body}COMMIT;\n"


def grant_body(
    user: str,
    grant: Grant,
    verifiers: Mapping[str, str],
    terms: Terms,
    added: Rights | None = None,
    new: Collection[str] = (),
) -> str:
    """What makes PostgreSQL as the grant says: for each access the role, its mark, limits and privileges, or, where
    nothing is granted any more, the end of it here. `verifiers` are those of the passwords, by access. What a role for
    admin access may set is another script, `parameters.body`, to run after this one. `added`: the rights that have to
    be there, None for all; of the others, which were recorded before, a dropped one is only warned of. `new`: the
    accesses whose login role must not be there yet."""
    parts = [f"SET LOCAL search_path = pg_catalog;\nSET LOCAL client_min_messages = warning;\n{TURN}"]
    # what ends comes first: what it still owns could not be granted on
    for access in sorted(ACCESSES, key=lambda access: bool(getattr(grant, access))):
        role = login_role(user, access)
        if not getattr(grant, access):
            parts.append(leave_here(role, terms.mark))
            continue
        if access == "write" and not terms.open_hba:
            parts.append(do(hba.CHECK))
        wanted = tables_of(grant, access)
        parts += [
            f"\n-- {role}: a login role for {access} access\n",
            _left_over(role, user, verifiers[access], terms.mark) if access in new else "",
            _role(role, verifiers[access], terms),
            _settings(role, access, terms) if access != "admin" else "",  # it must see the server's own values
            _revoke_beyond(role, wanted),
            do(_CONNECT % {"role": literal(role)}),
            *(
                _grant(role, kind, target, must_be_there=added is None or (grant.database, kind, target) in added)
                for kind in wanted
                for target in _only(wanted, kind)
            ),
        ]
    return "".join(parts)


def tables_of(grant: Grant, access: str) -> dict[str, tuple[str, ...]]:
    """What the login role for an access reads and writes: who writes reads, and who changes settings does neither."""
    match access:
        case "read":
            return {"read": grant.read}
        case "write":
            return {"read": grant.read, "write": grant.write}
    return {}


def _only(wanted: Mapping[str, Sequence[str]], kind: str) -> list[str]:
    """The targets of that kind; what is written is not granted for reading once more."""
    return [one for one in wanted[kind] if kind == "write" or one not in wanted.get("write", ())]


def _left_over(role: str, user: str, verifier: str, mark: str) -> str:
    name = identifier(role)
    hint = f"see what it owns, which goes too; in each database: DROP OWNED BY {name}; and at last: DROP ROLE {name}"
    named = {"role": role, "user": user, "verifier": verifier, "mark": mark, "hint": hint}
    return do(_LEFT_OVER % {key: literal(text) for key, text in named.items()})


def _role(role: str, verifier: str, terms: Terms) -> str:
    name, login = identifier(role), "LOGIN" if terms.login else "NOLOGIN"
    named = {"role": literal(role), "name": name, "mark": literal(terms.mark)} | _GROUP
    return (
        do(_MAKE % named)
        + do(_FORGET % {"role": literal(role)})
        + f"ALTER ROLE {name} {login} CONNECTION LIMIT {terms.connections} PASSWORD {literal(verifier)};\n"
        + f"GRANT {GROUP} TO {name};\n"
    )


def _settings(role: str, access: str, terms: Terms) -> str:
    milliseconds = int(terms.statement_timeout * 1000)
    values = dict(
        zip(SETTINGS, ("on" if access == "read" else "off", f"'{milliseconds}ms'", "'60s'", "'1s'"), strict=True)
    )
    lines = [f"ALTER ROLE {identifier(role)} SET {name} = {value};\n" for name, value in values.items()]
    limit = f"EXECUTE format('ALTER ROLE %I SET temp_file_limit = %L', {literal(role)}, '{terms.temp_file_limit}')"
    lines.append(
        do(f"BEGIN\n  IF has_parameter_privilege('temp_file_limit', 'SET') THEN\n    {limit};\n  END IF;\nEND")
    )
    if terms.schema is not None:
        path = f"'ALTER ROLE %I IN DATABASE %I SET search_path = %s', {literal(role)}, current_database()"
        lines.append(
            do(f"BEGIN\n  EXECUTE format({path}, {literal(literal(grants.parse(terms.schema).schema))});\nEND")
        )
    return "".join(lines)


def _grant(role: str, access: str, target: str, *, must_be_there: bool) -> str:
    name, held = identifier(role), ", ".join(PRIVILEGES[access])
    if target == EVERYTHING:
        usage = f"EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', one.nspname, {literal(role)})"
        schemas = f"SELECT n.nspname FROM pg_namespace n WHERE {_SYSTEM}"
        everywhere = f"DECLARE one record;\nBEGIN\n  FOR one IN {schemas} LOOP\n    {usage};\n  END LOOP;\nEND"
        return do(everywhere) + _grant_all(role, access, None) + _default_privileges(role, access, None)
    found = grants.parse(target)
    if found.table is not None:
        lines = [
            f"GRANT USAGE ON SCHEMA {identifier(found.schema)} TO {name}",
            f"GRANT {held} ON TABLE {found.sql} TO {name}",
        ]
        check = do(_NO_TABLE % {"schema": literal(found.schema), "table": literal(found.table)})
        more = _own_sequences(role, str(found)) if access == "write" else ""
    else:
        lines = [f"GRANT USAGE ON SCHEMA {found.sql} TO {name}"]
        check = ""
        more = _grant_all(role, access, found.schema) + _default_privileges(role, access, found.schema)
    script = "".join(f"{line};\n" for line in lines) + more
    return check + script if must_be_there else _if_there(found, script)


def _if_there(found: grants.Target, script: str) -> str:
    """What is granted on a target that was recorded before: it may have been dropped meanwhile."""
    there = f"SELECT FROM pg_namespace n WHERE n.nspname = {literal(found.schema)}"
    if found.table is not None:
        there = (
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN"
            f" ('r', 'p', 'v', 'm', 'f') AND n.nspname = {literal(found.schema)} AND c.relname = {literal(found.table)}"
        )
    warning = f"RAISE WARNING '% {GONE}', {literal(str(found))}"
    return do(f"BEGIN\n  IF NOT EXISTS ({there}) THEN\n    {warning};\n    RETURN;\n  END IF;\n{script}END")


def _grant_all(role: str, access: str, schema: str | None) -> str:
    """On each table and, to write, sequence of a schema, or of all of them, but for what OURS own."""
    kinds = {"'r', 'p', 'v', 'm', 'f'": f"{', '.join(PRIVILEGES[access])} ON TABLE"}
    kinds |= {"'S'": "USAGE ON SEQUENCE"} if access == "write" else {}
    where = f"{_of_schema(schema)} AND NOT {OURS}"
    loops = "".join(
        "  FOR one IN SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace\n"
        f"      JOIN pg_roles r ON r.oid = c.relowner\n    WHERE c.relkind IN ({kind}) AND {where}\n  LOOP\n"
        f"    EXECUTE format('GRANT {what} %I.%I TO %I', one.nspname, one.relname, {literal(role)});\n  END LOOP;\n"
        for kind, what in kinds.items()
    )
    return do(f"DECLARE one record;\nBEGIN\n{loops}END")


def _of_schema(schema: str | None) -> str:
    return _SYSTEM if schema is None else f"n.nspname = {literal(schema)}"


def _own_sequences(role: str, table: str) -> str:
    """The sequences that the table's own columns draw from: an INSERT needs them."""
    return do(
        "DECLARE one regclass;\nBEGIN\n"
        "  FOR one IN SELECT d.objid FROM pg_depend d JOIN pg_class c ON c.oid = d.objid\n"
        f"    WHERE d.refobjid = {literal(table)}::regclass AND d.classid = 'pg_class'::regclass\n"
        "      AND c.relkind = 'S' AND d.deptype IN ('a', 'i')\n  LOOP\n"
        f"    EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', one, {literal(role)});\n  END LOOP;\nEND"
    )


def _default_privileges(role: str, access: str, schema: str | None) -> str:
    """For tables to come: default privileges of each role that owns something there, or they would cover nothing."""
    kinds = [(", ".join(PRIVILEGES[access]), "TABLES"), *([("USAGE", "SEQUENCES")] if access == "write" else [])]
    commands = "".join(
        f"    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I GRANT {held} ON {kind} TO %I',\n"
        f"      one.owner, one.nspname, {literal(role)});\n"
        for held, kind in kinds
    )
    return do(_OWNERS % {"where": _of_schema(schema), "commands": commands})


def _revoke_beyond(role: str, wanted: Mapping[str, Sequence[str]]) -> str:
    """Take away what the role holds on tables, sequences and schemas here or to come, and is not granted; and the
    right to hand on what it is, with what it has handed on."""
    rows = []
    for access, targets in wanted.items():
        for text in targets:
            target = None if text == EVERYTHING else grants.parse(text)
            parts = (None, None) if target is None else (target.schema, target.table)
            rows.append(f"({literal(access)}, {', '.join('NULL' if one is None else literal(one) for one in parts)})")
    rows = rows or ["('', '', '')"]  # nothing is wanted, and VALUES needs a row: there is no schema without a name
    return do(_BEYOND % {"role": literal(role), "wanted": ", ".join(rows), "kinds": TO_COME})


def switch_login(wanted: Sequence[str], *, on: bool) -> list[str]:
    """What a DBA runs to let roles log in, or not any more; then their connections end, too. A statement of its own for
    each: who comes in before NOLOGIN counts is ended after it, and all have it before any is ended, whatever fails. A
    DBA may run it in a database whose search_path somebody else has set, and with a client of any encoding."""
    start = [ENCODING, *([] if on else ["SET search_path = pg_catalog, pg_temp;"])]
    ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename ="
    return [
        *start,
        *(set_login(role, on=on) for role in wanted),
        *([] if on else [f"{ends} {literal(role)};" for role in wanted]),
    ]


def set_login(role: str, *, on: bool) -> str:
    """What lets a role log in, or not any more."""
    return f"ALTER ROLE {identifier(role)} {'LOGIN' if on else 'NOLOGIN'};"


def end_connections(role: str, before: str | None = None) -> str:
    """What ends a role's connections, or those that began no later than a timestamp of PostgreSQL's. Who is no
    superuser becomes a member for it, and is none afterwards."""
    older = "true" if before is None else f"coalesce(backend_start <= {literal(before)}::timestamptz, true)"
    return do(_END_CONNECTIONS % {"role": literal(role), "older": older})


def leave_here(role: str, mark: str) -> str:
    """The end of a role in this database: what it owns goes to HEIR, its rights end, and where it has nothing in
    another database either, the role and, with its last member, the group go too."""
    named = {"role": literal(role), "mark": literal(mark), "heir": HEIR, "heir_mark": _HEIR_MARK}
    return do(LEAVE % (named | _GROUP))


TURN = do("""DECLARE before text := current_setting('lock_timeout');
BEGIN
  SET LOCAL lock_timeout = '10s';
  IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    LOCK TABLE pg_authid IN SHARE ROW EXCLUSIVE MODE;
  ELSE
    PERFORM pg_advisory_xact_lock(6210384617);
  END IF;
  PERFORM set_config('lock_timeout', before, true);
END""")
"""Waits for its turn, at most 10 s: grants at once are made one after the other. Roles are the cluster's, and so is the
lock of a superuser, which no reader can hold. A mere CREATEROLE login may take only one that anybody can: a grant in
another database does not wait for it, and may fail."""

_END_CONNECTIONS = """DECLARE
  joins boolean := NOT (pg_has_role(%(role)s, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE'));
BEGIN
  IF joins THEN
    EXECUTE format('GRANT %%I TO %%I', %(role)s, current_user);
  END IF;
  PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %(role)s AND %(older)s;
  IF joins THEN
    EXECUTE format('REVOKE %%I FROM %%I', %(role)s, current_user);
  END IF;
END"""

_MAKE = """DECLARE it record;
BEGIN
  SELECT r.*, shobj_description(r.oid, 'pg_authid') AS mark INTO it FROM pg_roles r WHERE r.rolname = '%(group)s';
  IF NOT FOUND THEN
    CREATE ROLE %(group)s NOLOGIN;
    COMMENT ON ROLE %(group)s IS %(group_mark)s;
  ELSIF it.mark IS DISTINCT FROM %(group_mark)s THEN
    RAISE EXCEPTION 'role %(group)s is not mcpctl''s' USING ERRCODE = 'MC001', HINT = 'rename or drop it';
  END IF;
  SELECT r.*, shobj_description(r.oid, 'pg_authid') AS mark INTO it FROM pg_roles r WHERE r.rolname = %(role)s;
  IF NOT FOUND THEN
    CREATE ROLE %(name)s;
    COMMENT ON ROLE %(name)s IS %(mark)s;
  ELSIF it.mark IS DISTINCT FROM %(mark)s THEN
    RAISE EXCEPTION 'role %% is not of this mcpctl', it.rolname
      USING ERRCODE = 'MC001', HINT = 'rename or drop it, or give the user another name';
  ELSIF it.rolsuper OR it.rolcreaterole OR it.rolcreatedb OR it.rolreplication OR it.rolbypassrls THEN
    RAISE EXCEPTION 'role %% has been made more than a login', it.rolname
      USING ERRCODE = 'MC003', HINT = 'ALTER ROLE … NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS';
  END IF;
END"""

_LEFT_OVER = """DECLARE older boolean;
BEGIN
  IF has_table_privilege('pg_authid', 'SELECT') THEN
    SELECT rolpassword IS DISTINCT FROM %(verifier)s INTO older FROM pg_authid
    WHERE rolname = %(role)s AND shobj_description(oid, 'pg_authid') = %(mark)s;
  ELSE  -- what is left over has no LOGIN
    SELECT NOT rolcanlogin INTO older FROM pg_roles
    WHERE rolname = %(role)s AND shobj_description(oid, 'pg_authid') = %(mark)s;
  END IF;
  IF older THEN
    RAISE EXCEPTION 'role %% is left over from an earlier %%', %(role)s, %(user)s
      USING ERRCODE = 'MC005', HINT = %(hint)s;
  END IF;
END"""

_NO_TABLE = """DECLARE kind text;
BEGIN
  SELECT k.kind INTO kind FROM (
    SELECT CASE c.relkind WHEN 'S' THEN 'a sequence' WHEN 'i' THEN 'an index' WHEN 'I' THEN 'an index'
                          WHEN 'c' THEN 'a type' END
    FROM pg_class c WHERE c.relnamespace = to_regnamespace(quote_ident(%(schema)s)) AND c.relname = %(table)s
    UNION ALL
    SELECT 'a type' FROM pg_type t WHERE t.typnamespace = to_regnamespace(quote_ident(%(schema)s))
      AND t.typname = %(table)s AND t.typrelid = 0) k (kind)
  LIMIT 1;
  IF kind IS NOT NULL THEN
    RAISE EXCEPTION '%%.%% is %%, and no table or view', %(schema)s, %(table)s, kind
      USING ERRCODE = 'MC004', HINT = 'name a table or view; its sequences go along with write access to it';
  END IF;
END"""

_FORGET = """BEGIN
  EXECUTE format('ALTER ROLE %%I RESET ALL', %(role)s);
  EXECUTE format('ALTER ROLE %%I IN DATABASE %%I RESET ALL', %(role)s, current_database());
END"""
"""A role may change its own defaults, where a function lets it: they are made anew with each grant."""

_CONNECT = """BEGIN
  EXECUTE format('GRANT CONNECT ON DATABASE %%I TO %%I', current_database(), %(role)s);
END"""

_OWNERS = f"""DECLARE one record;
BEGIN
  FOR one IN{MAKERS} AND %(where)s
  LOOP
%(commands)s  END LOOP;
END"""

_BEYOND = """DECLARE one record;
BEGIN
  FOR one IN
    WITH wanted (access, schema, name) AS (VALUES %(wanted)s),
    held AS (
      SELECT coalesce(ot.schema, n.nspname) AS schema, coalesce(ot.name, c.relname) AS name,
             c.relkind AS kind, a.privilege_type AS privilege, a.is_grantable, a.grantor,
             format('%%s ON %%s %%I.%%I', a.privilege_type,
               CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, n.nspname, c.relname) AS what
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN LATERAL (
          SELECT tn.nspname AS schema, t.relname AS name
          FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace tn ON tn.oid = t.relnamespace
          WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
            AND c.relkind = 'S' AND d.deptype IN ('a', 'i') LIMIT 1) ot ON true,
        aclexplode(c.relacl) a
      WHERE a.grantee = %(role)s::regrole
      UNION ALL
      SELECT n.nspname, c.relname, c.relkind, a.privilege_type, a.is_grantable, a.grantor,
             format('%%s (%%I) ON TABLE %%I.%%I', a.privilege_type, t.attname, n.nspname, c.relname)
      FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace,
           aclexplode(t.attacl) a
      WHERE a.grantee = %(role)s::regrole
      UNION ALL
      SELECT n.nspname, NULL, 'n', a.privilege_type, a.is_grantable, a.grantor,
             format('%%s ON SCHEMA %%I', a.privilege_type, n.nspname)
      FROM pg_namespace n, aclexplode(n.nspacl) a WHERE a.grantee = %(role)s::regrole
      UNION ALL
      SELECT NULL, NULL, 'd', a.privilege_type, a.is_grantable, a.grantor,
             format('%%s ON DATABASE %%I', a.privilege_type, d.datname)
      FROM pg_database d, aclexplode(d.datacl) a
      WHERE a.grantee = %(role)s::regrole AND d.datname = current_database()
        AND (a.is_grantable OR a.privilege_type <> 'CONNECT')
    )
    SELECT format('REVOKE %%s%%s FROM %%I CASCADE', CASE WHEN w.wanted THEN 'GRANT OPTION FOR ' END, h.what, %(role)s)
             AS command, h.grantor
    FROM held h, LATERAL (SELECT EXISTS (
      SELECT FROM wanted w
      WHERE (w.schema = h.schema OR (w.schema IS NULL AND h.schema !~ '^pg_' AND h.schema <> 'information_schema'))
        AND (w.name IS NULL OR h.name IS NULL OR w.name = h.name)
        AND CASE h.kind WHEN 'n' THEN h.privilege = 'USAGE'
                        WHEN 'S' THEN h.privilege = 'USAGE' AND w.access = 'write'
                        ELSE h.privilege = 'SELECT'
                          OR (h.privilege IN ('INSERT', 'UPDATE', 'DELETE') AND w.access = 'write') END) AS wanted) w
    WHERE h.is_grantable OR NOT w.wanted
    UNION ALL
    SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %%s%%s REVOKE %%s%%s ON %%s FROM %%I CASCADE',
                  d.defaclrole::regrole, CASE WHEN n.oid IS NOT NULL THEN format(' IN SCHEMA %%I', n.nspname) END,
                  CASE WHEN w.wanted THEN 'GRANT OPTION FOR ' END, a.privilege_type, %(kinds)s, %(role)s), NULL
    FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace, aclexplode(d.defaclacl) a,
      LATERAL (SELECT n.oid IS NOT NULL AND EXISTS (
        SELECT FROM wanted w WHERE (w.schema IS NULL OR w.schema = n.nspname) AND w.name IS NULL
          AND CASE d.defaclobjtype WHEN 'S' THEN a.privilege_type = 'USAGE' AND w.access = 'write'
                                   WHEN 'r' THEN a.privilege_type = 'SELECT'
                                     OR (a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE') AND w.access = 'write')
                                   ELSE false END) AS wanted) w
    WHERE a.grantee = %(role)s::regrole AND (a.is_grantable OR NOT w.wanted)
  LOOP
    IF one.grantor IS NOT NULL AND pg_has_role(current_user, one.grantor, 'MEMBER') THEN
      EXECUTE format('SET LOCAL ROLE %%s', one.grantor::regrole);  -- only who has granted it can take it back
    END IF;
    EXECUTE one.command;
    RESET ROLE;
  END LOOP;
END"""
