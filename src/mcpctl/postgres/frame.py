"""The statements of ours: those around a caller's statement, and those that ask what it reads and what it leaves."""

BEGIN, END = b"BEGIN READ ONLY", b"ROLLBACK"
SET_LIMITS = b"""SELECT pg_catalog.set_config('statement_timeout', $1, false),
 pg_catalog.set_config('lock_timeout', $1, false)"""
"""Until others are set: what a transaction changes of them, its ROLLBACK undoes."""
SNAPSHOT, UNLOCK = b"mcpctl snapshot", b"mcpctl unlock"
"""The names of the two statements that each connection has prepared, with its first exchange. What a function may
have put in their place runs in the READ ONLY transaction; in place of the others it would decide how that goes."""
WHO = b"SELECT pg_catalog.pg_backend_pid()"
WHO_AND_TRACE = WHO + b", pg_catalog.set_config('application_name', $1, true)"
"""The same, and until the transaction's end the trace that it belongs to, without a further round trip."""
UNLOCK_ALL = b"""SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.setseed(
 pg_catalog.float8div(pg_catalog.date_part('microseconds', pg_catalog.clock_timestamp()), 60000001))"""
"""The seed is no secret: one call's random() is only not to follow from what another has set. No operator: whoever may
make one in a schema of the path would have us run a function."""
LOOK = (
    UNLOCK_ALL
    + b", (SELECT pg_catalog.sum(CASE WHEN from_sql THEN 9 ELSE 1 END) FROM pg_catalog.pg_prepared_statement())"
)
AS_IT_WAS = b"2"
"""What that counts where nothing is prepared but SNAPSHOT and UNLOCK, and by nobody else."""
FRESH = 150000, b"SELECT pg_catalog.pg_stat_force_next_flush()"
"""From that version on, before SEEN, so that what it counts is of one transaction alone: PostgreSQL gathers it for
seconds."""
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
