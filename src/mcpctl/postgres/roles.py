"""The SQL that makes a user's login roles and their grants in one database, and the SQL that takes them away.

The scripts stand alone: a DBA can read them and pipe them into psql, connected to the database, and `--apply` runs the
same text. They say what is to be, not what to change: run twice, the second changes nothing. A login role is marked by
its COMMENT with the installation that made it; one of that name without the mark is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcpctl.identity import grants
from mcpctl.identity.grants import ACCESSES, EVERYTHING, Grant, identifier, login_role

GROUP = "mcp_logins"
"""The role without login whose members all login roles are: what pg_hba.conf can name (`+mcp_logins`)."""
PRIVILEGES = {"read": ("SELECT",), "write": ("SELECT", "INSERT", "UPDATE", "DELETE")}
"""What a login role has on a table that it reads or writes. One that changes settings has nothing on any table."""
FOREIGN_MARK = "MC001"
"""SQLSTATE of a role that has our name, and not our mark."""
OPEN_HBA = "MC002"
"""SQLSTATE of a pg_hba.conf that lets the login roles in from anywhere."""
OVERPOWERED = "MC003"
"""SQLSTATE of a login role that somebody has made more than one."""
TURN = "SELECT pg_catalog.pg_advisory_xact_lock(6210384617);\n"
"""Waits for its turn: two grants at once in one database are made one after the other."""
_SYSTEM = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"


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
    """A text as SQL."""
    escaped = text.replace("'", "''")
    return f" E'{escaped}'".replace("\\", "\\\\") if "\\" in text else f"'{escaped}'"


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
    return f"-- {' '.join(title.splitlines())}\nBEGIN;\n{body}COMMIT;\n"


def grant_body(user: str, grant: Grant, verifiers: Mapping[str, str], terms: Terms) -> str:
    """What makes PostgreSQL as the grant says: for each access the role, its mark, limits and privileges, or, where
    nothing is granted any more, the end of it here. `verifiers` are those of the passwords, by access. What a role for
    admin access may set is another script, `parameters.body`, to run after this one."""
    parts = [f"{TURN}SET LOCAL search_path = pg_catalog;\nSET LOCAL client_min_messages = warning;\n{do(_CLUSTER)}"]
    for access in ACCESSES:
        role = login_role(user, access)
        if not getattr(grant, access):
            parts.append(leave_here(role, terms.mark))
            continue
        if access == "write" and not terms.open_hba:
            parts.append(hba_check())
        wanted = tables_of(grant, access)
        parts += [
            f"\n-- {role}: a login role for {access} access\n",
            _role(role, verifiers[access], terms),
            _settings(role, access, terms) if access != "admin" else "",  # it must see the server's own values
            do(_CONNECT % {"role": literal(role)}),
            _revoke_beyond(role, wanted),
            *(_grant(role, kind, target) for kind in wanted for target in _only(wanted, kind)),
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


def _role(role: str, verifier: str, terms: Terms) -> str:
    name, login = identifier(role), "LOGIN" if terms.login else "NOLOGIN"
    named = {"role": literal(role), "name": name, "mark": literal(terms.mark), "group": GROUP}
    return (
        do(_MAKE % named)
        + f"ALTER ROLE {name} {login} CONNECTION LIMIT {terms.connections} PASSWORD {literal(verifier)};\n"
        + f"GRANT {GROUP} TO {name};\n"
    )


def _settings(role: str, access: str, terms: Terms) -> str:
    values = {
        "default_transaction_read_only": "on" if access == "read" else "off",
        "statement_timeout": f"'{int(terms.statement_timeout * 1000)}ms'",
        "idle_in_transaction_session_timeout": "'60s'",
        "client_connection_check_interval": "'1s'",
    }
    lines = [f"ALTER ROLE {identifier(role)} SET {name} = {value};\n" for name, value in values.items()]
    limit = f"EXECUTE format('ALTER ROLE %I SET temp_file_limit = %L', {literal(role)}, '{terms.temp_file_limit}')"
    lines.append(
        do(f"BEGIN\n  IF has_parameter_privilege('temp_file_limit', 'SET') THEN\n    {limit};\n  END IF;\nEND")
    )
    if terms.schema is not None:
        path = f"'ALTER ROLE %I IN DATABASE %I SET search_path = %s', {literal(role)}, current_database()"
        lines.append(do(f"BEGIN\n  EXECUTE format({path}, {literal(literal(terms.schema))});\nEND"))
    return "".join(lines)


def _grant(role: str, access: str, target: str) -> str:
    name, held = identifier(role), ", ".join(PRIVILEGES[access])
    if target == EVERYTHING:
        loop = _grant_schema("%1$I", "%2$I", held, access)
        body = "".join(f"    EXECUTE format({literal(line)}, one.nspname, {literal(role)});\n" for line in loop)
        everywhere = (
            f"DECLARE one record;\nBEGIN\n  FOR one IN SELECT n.nspname FROM pg_namespace n WHERE {_SYSTEM} LOOP\n"
            f"{body}  END LOOP;\nEND"
        )
        return do(everywhere) + _default_privileges(role, access, None)
    found = grants.parse(target)
    if found.table is not None:
        lines = [f"GRANT USAGE ON SCHEMA {identifier(found.schema)} TO {name}"]
        lines.append(f"GRANT {held} ON TABLE {found.sql} TO {name}")
        own = _own_sequences(role, found.sql) if access == "write" else ""
        return "".join(f"{line};\n" for line in lines) + own
    lines = _grant_schema(found.sql, name, held, access)
    return "".join(f"{line};\n" for line in lines) + _default_privileges(role, access, found.schema)


def _grant_schema(schema: str, role: str, held: str, access: str) -> list[str]:
    lines = [f"GRANT USAGE ON SCHEMA {schema} TO {role}", f"GRANT {held} ON ALL TABLES IN SCHEMA {schema} TO {role}"]
    return [*lines, f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}"] if access == "write" else lines


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
    where = _SYSTEM if schema is None else f"n.nspname = {literal(schema)}"
    kinds = [(", ".join(PRIVILEGES[access]), "TABLES"), *([("USAGE", "SEQUENCES")] if access == "write" else [])]
    commands = "".join(
        f"    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I GRANT {held} ON {kind} TO %I',\n"
        f"      one.owner, one.nspname, {literal(role)});\n"
        for held, kind in kinds
    )
    return do(_OWNERS % {"where": where, "commands": commands})


def _revoke_beyond(role: str, wanted: Mapping[str, Sequence[str]]) -> str:
    """Take away what the role holds on tables, sequences and schemas here, and is not granted."""
    rows = []
    for access, targets in wanted.items():
        for text in targets:
            target = None if text == EVERYTHING else grants.parse(text)
            parts = (None, None) if target is None else (target.schema, target.table)
            rows.append(f"({literal(access)}, {', '.join('NULL' if one is None else literal(one) for one in parts)})")
    rows = rows or ["('', '', '')"]  # nothing is wanted, and VALUES needs a row: there is no schema without a name
    return do(_BEYOND % {"role": literal(role), "wanted": ", ".join(rows)})


def leave_here(role: str, mark: str) -> str:
    """The end of a role in this database: what it owns goes to whoever runs this, its rights end, and where it has
    nothing in another database either, the role and, with its last member, the group go too."""
    return do(_LEAVE % {"role": literal(role), "mark": literal(mark), "group": GROUP})


_CLUSTER = """BEGIN
  IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    LOCK TABLE pg_authid IN SHARE ROW EXCLUSIVE MODE;
  END IF;
END"""
"""Roles are the cluster's: a grant in another database waits, too; one of a mere CREATEROLE login may fail there."""

_MAKE = """DECLARE it record;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '%(group)s') THEN
    CREATE ROLE %(group)s NOLOGIN;
    COMMENT ON ROLE %(group)s IS 'mcpctl: its users'' login roles; for pg_hba.conf';
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

_CONNECT = """BEGIN
  EXECUTE format('GRANT CONNECT ON DATABASE %%I TO %%I', current_database(), %(role)s);
END"""

_OWNERS = """DECLARE one record;
BEGIN
  FOR one IN
    SELECT DISTINCT n.nspname, r.rolname AS owner
    FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
      JOIN pg_database d ON d.datname = current_database()
      JOIN pg_roles r ON r.oid IN (n.nspowner, c.relowner)
        OR (r.oid = d.datdba AND n.nspowner = 'pg_database_owner'::regrole)
    WHERE %(where)s AND r.rolname !~ '^pg_'
  LOOP
%(commands)s  END LOOP;
END"""

_BEYOND = """DECLARE one record;
BEGIN
  FOR one IN
    WITH wanted (access, schema, name) AS (VALUES %(wanted)s),
    held AS (
      SELECT coalesce(ot.schema, n.nspname) AS schema, coalesce(ot.name, c.relname) AS name,
             a.privilege_type AS privilege,
             a.grantor, format('%%s ON %%s %%I.%%I', a.privilege_type,
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
      SELECT n.nspname, c.relname, a.privilege_type, a.grantor,
             format('%%s (%%I) ON TABLE %%I.%%I', a.privilege_type, t.attname, n.nspname, c.relname)
      FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace,
           aclexplode(t.attacl) a
      WHERE a.grantee = %(role)s::regrole
      UNION ALL
      SELECT n.nspname, NULL, a.privilege_type, a.grantor, format('%%s ON SCHEMA %%I', a.privilege_type, n.nspname)
      FROM pg_namespace n, aclexplode(n.nspacl) a WHERE a.grantee = %(role)s::regrole
    )
    SELECT format('REVOKE %%s FROM %%I', h.what, %(role)s) AS command, h.grantor FROM held h
    WHERE NOT EXISTS (
      SELECT FROM wanted w
      WHERE (w.schema IS NULL OR w.schema = h.schema) AND (w.name IS NULL OR h.name IS NULL OR w.name = h.name)
        AND CASE WHEN h.privilege IN ('INSERT', 'UPDATE', 'DELETE') THEN w.access = 'write'
                 WHEN h.privilege = 'USAGE' THEN h.name IS NULL OR w.access = 'write'
                 ELSE h.privilege = 'SELECT' END)
    UNION ALL
    SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %%s IN SCHEMA %%I REVOKE %%s ON %%s FROM %%I',
                  d.defaclrole::regrole, n.nspname, a.privilege_type,
                  CASE d.defaclobjtype WHEN 'S' THEN 'SEQUENCES' ELSE 'TABLES' END, %(role)s), NULL
    FROM pg_default_acl d JOIN pg_namespace n ON n.oid = d.defaclnamespace, aclexplode(d.defaclacl) a
    WHERE a.grantee = %(role)s::regrole AND d.defaclobjtype IN ('r', 'S') AND NOT EXISTS (
      SELECT FROM wanted w WHERE (w.schema IS NULL OR w.schema = n.nspname) AND w.name IS NULL
        AND (w.access = 'write' OR a.privilege_type = 'SELECT'))
    UNION ALL
    SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %%s REVOKE %%s ON %%s FROM %%I', d.defaclrole::regrole,
                  a.privilege_type, CASE d.defaclobjtype WHEN 'S' THEN 'SEQUENCES' ELSE 'TABLES' END, %(role)s), NULL
    FROM pg_default_acl d, aclexplode(d.defaclacl) a
    WHERE a.grantee = %(role)s::regrole AND d.defaclobjtype IN ('r', 'S') AND d.defaclnamespace = 0
  LOOP
    IF one.grantor IS NOT NULL AND pg_has_role(current_user, one.grantor, 'MEMBER') THEN
      EXECUTE format('SET LOCAL ROLE %%s', one.grantor::regrole);  -- only who has granted it can take it back
    END IF;
    EXECUTE one.command;
    RESET ROLE;
  END LOOP;
END"""

_HBA = """DECLARE open text;
BEGIN
  WITH rules AS (
    SELECT row_number() OVER () AS place, h.line_number AS line, h.type, h.auth_method AS method, h.user_name AS names,
           array_to_string(h.database, ',') AS databases, array_to_string(h.user_name, ',') AS users,
           h.type = 'local' AS here,
           h.address IN ('all', '0.0.0.0', '::') AND coalesce(h.netmask, '0.0.0.0') IN ('0.0.0.0', '::') AS anywhere,
           '+%(group)s' = ANY (h.user_name) AS ours,
           'all' = ANY (h.database) AS everywhere,
           'all' = ANY (h.database) OR current_database() = ANY (h.database)
             OR EXISTS (SELECT FROM unnest(h.database) d WHERE d ~ '^[/@+]' OR d LIKE 'same%%') AS concerns
    FROM pg_hba_file_rules h WHERE h.error IS NULL
  ), walls AS (
    SELECT place, here FROM rules WHERE ours AND everywhere
      AND CASE WHEN here THEN method IN ('scram-sha-256', 'cert', 'reject') ELSE type = 'host' AND anywhere
               AND method = 'reject' END
  )
  SELECT string_agg(format('line %%s: %%s %%s %%s %%s', line, type, databases, users, method), '; ' ORDER BY place)
    INTO open
  FROM rules r
  WHERE concerns AND method <> 'reject'
    AND NOT EXISTS (SELECT FROM walls w WHERE w.here = r.here AND w.place < r.place)
    AND CASE WHEN ours THEN method NOT IN ('scram-sha-256', 'cert') OR (NOT here AND anywhere)
             ELSE EXISTS (SELECT FROM unnest(names) u WHERE u = 'all' OR u ~ '^/' OR u ~ '^mcp_' OR (u ~ '^[+]'
               AND EXISTS (SELECT FROM pg_roles g, pg_roles m WHERE g.rolname = substr(u, 2) AND m.rolname ~ '^mcp_'
                 AND m.rolname <> '%(group)s' AND pg_has_role(m.oid, g.oid, 'MEMBER')))) END;
  IF open IS NOT NULL THEN
    RAISE EXCEPTION 'pg_hba.conf lets the login roles of mcpctl in from anywhere: %%', open
      USING ERRCODE = 'MC002',
            HINT = 'a role that writes can change its own password, and come in past mcpctl: '
                   'put the lines for +%(group)s before these';
  END IF;
  IF NOT has_function_privilege('pg_stat_file(text)', 'EXECUTE') THEN
    RETURN;
  ELSIF (pg_stat_file(current_setting('hba_file'))).modification > pg_conf_load_time() THEN
    RAISE EXCEPTION 'pg_hba.conf has been changed since PostgreSQL has read it'
      USING ERRCODE = 'MC002', HINT = 'SELECT pg_reload_conf();';
  END IF;
END"""

_LEAVE = """DECLARE
  it record;
  elsewhere name[];
  left_over record;
  given record;
  policy record;
  one name;
  held text[];
  command text;
BEGIN
  SELECT r.oid, r.rolname, shobj_description(r.oid, 'pg_authid') AS mark INTO it
  FROM pg_roles r WHERE r.rolname = %(role)s;
  IF NOT FOUND THEN
    RETURN;
  ELSIF it.mark IS DISTINCT FROM %(mark)s THEN
    RAISE EXCEPTION 'role %% is not of this mcpctl', it.rolname USING ERRCODE = 'MC001';
  END IF;
  SELECT array_agg(d.datname) INTO elsewhere FROM pg_database d, aclexplode(d.datacl) a
  WHERE a.grantee = it.oid AND a.privilege_type = 'CONNECT' AND d.datname <> current_database();
  IF elsewhere IS NOT NULL
     AND NOT EXISTS (SELECT FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = it.oid
                     AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database()))
     AND NOT EXISTS (SELECT FROM pg_database d, aclexplode(d.datacl) a
                     WHERE a.grantee = it.oid AND d.datname = current_database()) THEN
    RETURN;  -- it has nothing here, and what it has elsewhere is not to be touched
  END IF;
  SELECT array_agg(format('GRANT %%s ON PARAMETER %%I TO %%I', a.privilege_type, p.parname, it.rolname)) INTO held
  FROM pg_parameter_acl p, aclexplode(p.paracl) a WHERE a.grantee = it.oid;
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    EXECUTE format('GRANT %%I TO %%I', it.rolname, current_user);
  END IF;
  IF EXISTS (SELECT FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = it.oid AND deptype = 'o'
             AND dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))) THEN
    EXECUTE format('REASSIGN OWNED BY %%I TO %%I', it.rolname, current_user);
  END IF;
  FOR given IN SELECT DISTINCT a.grantor, c.oid::regclass AS what FROM pg_class c, aclexplode(c.relacl) a
    WHERE a.grantee = it.oid AND a.grantor <> c.relowner AND c.relkind <> 'S'
  LOOP
    IF pg_has_role(current_user, given.grantor, 'MEMBER') THEN
      EXECUTE format('SET LOCAL ROLE %%s', given.grantor::regrole);  -- only who has granted it can take it back
      EXECUTE format('REVOKE ALL ON TABLE %%s FROM %%I', given.what, it.rolname);
      RESET ROLE;
    END IF;
  END LOOP;
  FOR policy IN SELECT p.polname, p.polrelid::regclass AS what FROM pg_policy p WHERE p.polroles = ARRAY[it.oid] LOOP
    RAISE WARNING 'the policy %% on %% is for %% alone, and goes with it', policy.polname, policy.what, it.rolname;
  END LOOP;
  EXECUTE format('DROP OWNED BY %%I', it.rolname);
  SELECT count(*) > 0 AS found INTO left_over FROM pg_shdepend
  WHERE refclassid = 'pg_authid'::regclass AND refobjid = it.oid AND classid <> 'pg_auth_members'::regclass;
  IF elsewhere IS NULL AND left_over.found THEN
    EXECUTE format('ALTER ROLE %%I NOLOGIN', it.rolname);  -- it has something where it has no grant, or from others
    RAISE WARNING 'role %% stays, without LOGIN: it owns or was granted something that is not mcpctl''s', it.rolname;
  ELSIF elsewhere IS NULL AND NOT left_over.found THEN
    EXECUTE format('DROP ROLE %%I', it.rolname);
    IF NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid JOIN pg_roles r ON r.oid = m.member
                   WHERE g.rolname = '%(group)s' AND r.rolname ~ '^mcp_') THEN
      DROP ROLE IF EXISTS %(group)s;
    END IF;
  ELSE
    FOREACH one IN ARRAY coalesce(elsewhere, '{}') LOOP
      EXECUTE format('GRANT CONNECT ON DATABASE %%I TO %%I', one, it.rolname);
    END LOOP;
    FOREACH command IN ARRAY coalesce(held, '{}') LOOP  -- parameters are the cluster's, and DROP OWNED took them, too
      EXECUTE command;
    END LOOP;
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
      EXECUTE format('REVOKE %%I FROM %%I', it.rolname, current_user);
    END IF;
  END IF;
END"""


def hba_check() -> str:
    """SQL that fails where pg_hba.conf lets the login roles in from anywhere (PostgreSQL, "pg_hba_file_rules")."""
    return do(_HBA % {"group": GROUP})


def hba_lines(address: str, *, tls: bool = False) -> list[str]:
    """The lines that keep the login roles to mcpctl's own machine; `address` is where it connects from, or `local`;
    `tls`: over TLS alone."""
    if address == "local":
        first = [f"local  all  +{GROUP}  scram-sha-256"]
    else:
        first = [
            f"{'hostssl' if tls else 'host'}  all  +{GROUP}  {address}  scram-sha-256",
            f"local  all  +{GROUP}  reject",
        ]
    return [*first, f"host  all  +{GROUP}  all  reject"]
