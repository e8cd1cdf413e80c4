"""pg_hba.conf: the lines that keep the users' login roles to mcpctl, and the SQL that sees whether they are kept.

PostgreSQL, "The pg_hba.conf File" (the first line that matches decides), "pg_hba_file_rules".
"""

GROUP = "mcp_logins"
"""The role without login whose members all login roles are: what pg_hba.conf can name (`+mcp_logins`)."""
OPEN = "MC002"
"""SQLSTATE of a pg_hba.conf that lets the login roles in from elsewhere, or that PostgreSQL has not taken."""


def lines(address: str, *, tls: bool = False) -> list[str]:
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


CHECK = rf"""DECLARE
  main text := (SELECT setting FROM pg_settings WHERE name = 'hba_file');
  legible boolean := main IS NOT NULL AND pg_has_role('pg_read_server_files', 'USAGE')
    AND has_function_privilege('pg_stat_file(text)', 'EXECUTE')
    AND has_function_privilege('pg_read_binary_file(text)', 'EXECUTE');
  wrong text;
BEGIN
  SELECT string_agg(format('line %s: %s', h.line_number, h.error), '; ') INTO wrong
  FROM pg_hba_file_rules h WHERE h.error IS NOT NULL AND h.type IS NULL;  -- with a type: it only matches nobody now
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'PostgreSQL does not take pg_hba.conf as it stands: %', wrong
      USING ERRCODE = '{OPEN}', HINT = 'mend these lines, and SELECT pg_reload_conf()';
  END IF;
  WITH rules AS (
    SELECT row_number() OVER () AS place, h.type = 'local' AS here, h.auth_method AS method, h.user_name AS names,
           concat_ws(' ', nullif(f.name, main), 'line', h.line_number || ':', h.type, array_to_string(h.database, ','),
             array_to_string(h.user_name, ','), h.address, h.netmask, h.auth_method) AS shown,
           CASE WHEN h.type = 'local' THEN ARRAY['socket'] WHEN h.netmask IS NULL THEN ARRAY['IPv4', 'IPv6']
                WHEN h.netmask LIKE '%:%' THEN ARRAY['IPv6'] ELSE ARRAY['IPv4'] END AS ways,
           '+{GROUP}' = ANY (h.user_name) AS ours,
           CASE WHEN h.type = 'local' OR 'clientcert=verify-full' = ANY (h.options) THEN true  -- as has the method cert
                WHEN h.netmask IS NULL THEN h.address NOT IN ('all', 'samenet') AND h.address NOT LIKE '.%'
                ELSE h.netmask IN ('255.255.255.255', 'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff') END AS narrow,
           'all' = ANY (h.database) OR current_database() = ANY (h.database)
             OR EXISTS (SELECT FROM unnest(h.database) d WHERE d ~ '^[/@+]' OR d LIKE 'same%') AS concerns,
           CASE WHEN NOT '+{GROUP}' = ANY (h.user_name) OR NOT 'all' = ANY (h.database) THEN false
                WHEN h.type = 'local' THEN h.auth_method IN ('scram-sha-256', 'reject')
                ELSE h.type = 'host' AND h.auth_method = 'reject'
                  AND (h.address = 'all' OR h.netmask IN ('0.0.0.0', '::')) END
             -- in quotes a name is just a name, which only the line's own text shows
             AND CASE WHEN legible THEN
                   split_part((string_to_array(encode(pg_read_binary_file(f.name), 'escape'), E'\n'))[h.line_number],
                     '#', 1) ~ '^[^"@\\]*[+]{GROUP}[^"@\\]*$'
                 ELSE true END AS wall
    FROM pg_hba_file_rules h, LATERAL (SELECT coalesce(to_jsonb(h) ->> 'file_name', main)) f (name)  -- from 16 on
    WHERE h.type IS NOT NULL
  )
  SELECT string_agg(r.shown, '; ' ORDER BY r.place) INTO wrong
  FROM rules r
  WHERE r.concerns AND r.method <> 'reject'
    AND EXISTS (SELECT FROM unnest(r.ways) way WHERE NOT EXISTS (
      SELECT FROM rules w WHERE w.wall AND w.place < r.place AND way = ANY (w.ways)))
    AND CASE WHEN r.ours THEN r.method NOT IN ('scram-sha-256', 'cert') OR NOT r.narrow
             ELSE EXISTS (SELECT FROM unnest(r.names) u WHERE u = 'all' OR u ~ '^(/|mcp_)' OR (u LIKE '+%'
               AND EXISTS (SELECT FROM pg_roles g, pg_roles m WHERE g.rolname = substr(u, 2) AND m.rolname ~ '^mcp_'
                 AND pg_has_role(m.oid, g.oid, 'MEMBER')))) END;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'pg_hba.conf lets the login roles of mcpctl in from elsewhere: %', wrong
      USING ERRCODE = '{OPEN}',
            HINT = 'a role that writes can change its own password, and come in past mcpctl: put the lines that '
                   'mcpctl user grant prints before these, with +{GROUP} not in quotes, and a single address '
                   '(192.0.2.7/32) or host name, where they let it in';
  END IF;
  IF NOT legible THEN
    RAISE WARNING 'the administrator may not read pg_hba.conf, so nobody saw whether +{GROUP} stands in quotes there, '
                  'where it is no group and keeps nobody out, and whether PostgreSQL has read the file since its last '
                  'change: look yourself, or have a superuser look';
  ELSIF EXISTS (SELECT FROM (SELECT main UNION SELECT to_jsonb(h) ->> 'file_name' FROM pg_hba_file_rules h) f (name)
                WHERE (pg_stat_file(f.name)).modification > pg_conf_load_time()) THEN
    RAISE EXCEPTION 'pg_hba.conf has been changed since PostgreSQL has read it'
      USING ERRCODE = '{OPEN}', HINT = 'SELECT pg_reload_conf();';
  END IF;
END"""
"""The body of an anonymous block that fails (SQLSTATE OPEN) unless pg_hba.conf lets the login roles into the current
database from single hosts alone, over the socket, or with a client certificate. Where it cannot see all: a WARNING."""
