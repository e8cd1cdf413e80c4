"""The statements of ours: those around a caller's statement, and those that ask what it reads and what it leaves."""

BEGIN, LIMITS, END, UNLOCK, LOOK = b"mcpctl begin", b"mcpctl limits", b"mcpctl end", b"mcpctl unlock", b"mcpctl look"
_LIMITS = b"""SELECT pg_catalog.set_config('statement_timeout', $1, true),
 pg_catalog.set_config('lock_timeout', $1, true), pg_catalog.pg_backend_pid()"""
_UNLOCK = b"SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.setseed($1)"
_COUNTED = b", (SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statement())"
FRESH = 150000, b"SELECT pg_catalog.pg_stat_force_next_flush()"
"""From that version on, before SEEN, so that what it counts is of one transaction alone: PostgreSQL gathers it for
seconds."""
FRAME = {
    BEGIN: b"BEGIN READ ONLY",
    LIMITS: _LIMITS,
    END: b"ROLLBACK",
    UNLOCK: _UNLOCK,
    LOOK: _UNLOCK + _COUNTED,
}
"""The statements of the frame, which each connection has prepared with its first exchange."""
PREPARED = b"%d" % len(FRAME)
"""How many a connection has prepared that is as it was."""
LOCKED = b"""SELECT DISTINCT n.nspname || '.' || c.relname FROM pg_catalog.pg_locks l
 JOIN pg_catalog.pg_class t ON t.oid = l.relation JOIN pg_catalog.pg_class c ON c.oid = CASE t.relkind WHEN 't'
  THEN (SELECT o.oid FROM pg_catalog.pg_class o WHERE o.reltoastrelid = t.oid) ELSE t.oid END
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
 AND l.relation NOT IN ('pg_catalog.pg_locks'::regclass, 'pg_catalog.pg_class'::regclass,
                        'pg_catalog.pg_namespace'::regclass, 'pg_catalog.pg_index'::regclass) ORDER BY 1"""
SEEN = (
    b"("
    + LOCKED
    + b""") UNION SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class t
 LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = t.oid
 JOIN pg_catalog.pg_class c ON c.oid = coalesce(i.indrelid, t.oid)
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE t.oid >= 16384 AND t.relkind IN ('r', 'm', 'S', 'i') AND c.relkind IN ('r', 'm', 'S')
 AND pg_catalog.pg_stat_get_xact_numscans(t.oid) + pg_catalog.pg_stat_get_xact_blocks_fetched(t.oid) > 0"""
)
"""Also the tables that the transaction's counters have: where a block that catches its error was rolled back, its locks
are gone by now. No such block stands in what leaves nothing, and asking of each table costs too much there."""
GATHER = b"""SELECT pg_catalog.set_config($1, 'on', true),
 pg_catalog.set_config('max_parallel_workers_per_gather', '1', true)"""
APART = b"EXPLAIN (COSTS OFF) WITH apart AS MATERIALIZED (\n%s\n) SELECT"
"""PostgreSQL plans no worker for a query that holds anything PARALLEL UNSAFE: set_config, query_to_xml, each function
that may change its session. It looks before it plans, so into views, policies and what is never used too."""
PARALLEL_BY_NAME = 160000, b"force_parallel_mode", b"debug_parallel_query"
TYPES = b"""SELECT t.oid, pg_catalog.format_type(t.oid, NULL), CASE WHEN t.typcategory = 'A' THEN (
  WITH RECURSIVE base AS (SELECT oid, typbasetype FROM pg_catalog.pg_type WHERE oid = t.typelem UNION ALL
   SELECT p.oid, p.typbasetype FROM base JOIN pg_catalog.pg_type p ON p.oid = base.typbasetype)
  SELECT oid FROM base WHERE typbasetype = 0) ELSE 0 END,
 coalesce(e.typdelim, ',') FROM pg_catalog.pg_type t LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
 WHERE t.oid = ANY($1::oid[])"""
