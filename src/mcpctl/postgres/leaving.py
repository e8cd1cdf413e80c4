"""The body of the SQL that ends a login role in one database; `roles.leave_here` fills it in."""

LEAVE = """DECLARE
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
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '%(heir)s') THEN
      CREATE ROLE %(heir)s NOLOGIN;
      COMMENT ON ROLE %(heir)s IS %(heir_mark)s;
    ELSIF (SELECT rolcanlogin OR rolsuper OR shobj_description(oid, 'pg_authid') IS DISTINCT FROM %(heir_mark)s
           FROM pg_roles WHERE rolname = '%(heir)s') THEN
      RAISE EXCEPTION 'role %(heir)s is not mcpctl''s' USING ERRCODE = 'MC001', HINT = 'rename or drop it';
    END IF;
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
      EXECUTE format('GRANT %(heir)s TO %%I', current_user);
    END IF;
    EXECUTE format('REASSIGN OWNED BY %%I TO %(heir)s', it.rolname);
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
      EXECUTE format('REVOKE %(heir)s FROM %%I', current_user);
    END IF;
  END IF;
  FOR given IN
    SELECT a.grantor, format('%%s ON %%s %%s', a.privilege_type,
             CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass) AS what
    FROM pg_class c, aclexplode(c.relacl) a WHERE a.grantee = it.oid AND a.grantor <> c.relowner
    UNION SELECT a.grantor, format('%%s (%%I) ON TABLE %%s', a.privilege_type, t.attname, c.oid::regclass)
    FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid, aclexplode(t.attacl) a
    WHERE a.grantee = it.oid AND a.grantor <> c.relowner
    UNION SELECT a.grantor, format('%%s ON SCHEMA %%I', a.privilege_type, n.nspname)
    FROM pg_namespace n, aclexplode(n.nspacl) a WHERE a.grantee = it.oid AND a.grantor <> n.nspowner
  LOOP
    IF pg_has_role(current_user, given.grantor, 'MEMBER') THEN
      EXECUTE format('SET LOCAL ROLE %%s', given.grantor::regrole);  -- only who has granted it can take it back
      EXECUTE format('REVOKE %%s FROM %%I CASCADE', given.what, it.rolname);
      RESET ROLE;
    END IF;
  END LOOP;
  FOR policy IN SELECT p.polname, p.polrelid::regclass AS what,
      CASE cardinality(p.polroles) WHEN 1 THEN 'alone, and is dropped' ELSE 'among others, and no longer' END AS how
    FROM pg_policy p WHERE it.oid = ANY (p.polroles)
  LOOP
    RAISE WARNING 'the policy %% on %% is for %% %%: a later grant is without it',
      policy.polname, policy.what, it.rolname, policy.how;
  END LOOP;
  EXECUTE format('DROP OWNED BY %%I', it.rolname);
  SELECT count(*) > 0 AS found INTO left_over FROM pg_shdepend
  WHERE refclassid = 'pg_authid'::regclass AND refobjid = it.oid AND classid <> 'pg_auth_members'::regclass;
  FOR given IN
    SELECT g.rolname, format('REVOKE %%I FROM %%I', g.rolname, it.rolname)
           || CASE WHEN current_setting('server_version_num')::int >= 160000
              THEN format(' GRANTED BY %%I', pg_get_userbyid(m.grantor)) ELSE '' END || ' CASCADE' AS what
    FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
    WHERE m.member = it.oid AND (elsewhere IS NOT NULL OR left_over.found) AND (elsewhere IS NULL OR NOT
      (g.rolname = '%(group)s' OR (g.rolname = 'pg_read_all_settings' AND it.rolname ~ '_a$')))
  LOOP
    BEGIN
      EXECUTE given.what;
    EXCEPTION WHEN insufficient_privilege THEN
      RAISE WARNING 'role %% stays a member of %%', it.rolname, given.rolname;
    END;
  END LOOP;
  IF elsewhere IS NULL AND left_over.found THEN
    EXECUTE format('ALTER ROLE %%I NOLOGIN', it.rolname);  -- it has something where it has no grant, or from others
    RAISE WARNING 'role %% stays, without LOGIN: it owns or was granted something that is not mcpctl''s', it.rolname;
  ELSIF elsewhere IS NULL AND NOT left_over.found THEN
    EXECUTE format('DROP ROLE %%I', it.rolname);
    IF NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid JOIN pg_roles r ON r.oid = m.member
                   WHERE g.rolname = '%(group)s' AND r.rolname <> current_user)
       AND (SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = '%(group)s') = %(group_mark)s
       AND NOT EXISTS (SELECT FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND deptype IN ('a', 'o', 'r')
                       AND refobjid = '%(group)s'::regrole) THEN
      DROP ROLE %(group)s;
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
"""What it owns goes to the heir, its rights end; the role goes too, or stays for what it has elsewhere."""
