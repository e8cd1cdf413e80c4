"""How a database is doing, as far as an ordinary login role may know.

Numbers may be of the whole server. Names are of this database alone, and only of relations that the role may read. Of
the sessions of other roles PostgreSQL shows that they are there, and they are counted; what it hides of them stays
hidden ("The Cumulative Statistics System", pg_stat_activity).

No relation that is asked about is locked, so that the answer comes also while somebody holds ACCESS EXCLUSIVE: sizes
are `relpages`, which VACUUM and ANALYZE keep, not pg_relation_size(), which would wait. All columns that are read are
the same in PostgreSQL 15 to 18.
"""

from typing import Any

from mcpctl.errors import Error
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.catalog import READABLE
from mcpctl.postgres.session import Session

LISTED = 5
"""Entries that each list shows at most, the worst first."""
LONG = 10
"""Seconds after which a query is a long one, and a wait for a lock a long wait."""
QUERY_TEXT = 80
"""Characters of a query's text that are shown."""
MANY_ROWS = 1_000
"""Rows below which neither dead rows nor missing planner statistics matter."""
DEAD_RATIO = 0.2
"""Share of dead rows from which autovacuum, as PostgreSQL sets it up, should long have been there."""
LARGE_TABLE = 10_000
"""Rows from which reading a table from end to end is dear."""
MANY_SCANS = 100
"""Times that a large table must have been read so before an index is missed."""
UNUSED_BYTES = 1 << 20
"""Size from which an index that nobody uses is worth a word."""


def _utc(moment: str) -> str:
    return f"""pg_catalog.to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"""


def _seconds(since: str) -> str:
    return f"pg_catalog.round(extract(epoch FROM pg_catalog.clock_timestamp() - {since}))"


def _worst(columns: str, source: str, order: str) -> str:
    """The first entries of a list, and how many there are more. Rows of a sorted subquery are aggregated in its order
    (PostgreSQL, "Aggregate Functions")."""
    return f"""(SELECT pg_catalog.jsonb_build_object(
   'entries', coalesce(pg_catalog.jsonb_agg(pg_catalog.to_jsonb(l) - 'all'), '[]'),
   'more', coalesce(pg_catalog.max(l."all"), 0) - pg_catalog.count(*))
  FROM (SELECT {columns}, pg_catalog.count(*) OVER () AS "all" FROM {source} ORDER BY {order} LIMIT {LISTED}) l)"""


_LONG_QUERIES = _worst(
    f"""pid, {_seconds("since")} AS seconds, state, wait_event_type || ':' || wait_event AS wait,
   pg_catalog."left"(query, {QUERY_TEXT}) || CASE WHEN pg_catalog.length(query) > {QUERY_TEXT} THEN '…' ELSE '' END
    AS query""",
    f"""client WHERE NOT hidden AND state <> 'idle' AND pid <> pg_catalog.pg_backend_pid()
   AND datid = (SELECT oid FROM here) AND {_seconds("since")} > {LONG}""",
    "seconds DESC, pid",
)

# Of a session that is hidden PostgreSQL still shows database and role, not of what kind it is. Nearly all that have
# both are clients; parallel and background workers that are hidden count with them.
_SERVER = f"""
WITH client AS MATERIALIZED (
 SELECT a.*, a.backend_type IS NULL AS hidden,
  CASE WHEN a.state LIKE 'idle%' THEN a.state_change ELSE a.query_start END AS since
 FROM pg_catalog.pg_stat_activity a
 WHERE a.backend_type = 'client backend'
  OR a.backend_type IS NULL AND a.usesysid IS NOT NULL AND a.datid IS NOT NULL
), here AS (
 SELECT d.*, s.blks_hit, s.blks_read, s.stats_reset FROM pg_catalog.pg_database d
 JOIN pg_catalog.pg_stat_database s ON s.datid = d.oid WHERE d.datname = pg_catalog.current_database()
), waiting AS MATERIALIZED (
 SELECT l.pid, l.waitstart FROM pg_catalog.pg_locks l WHERE NOT l.granted
), position AS (
 SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
  ELSE pg_catalog.pg_current_wal_lsn() END AS lsn
)
SELECT pg_catalog.jsonb_build_object(
 'connections', (SELECT pg_catalog.jsonb_build_object(
   'used', pg_catalog.count(*),
   'max', pg_catalog.current_setting('max_connections')::pg_catalog.int4,
   'hidden', pg_catalog.count(*) FILTER (WHERE hidden),
   'idle_in_transaction_s', pg_catalog.max({_seconds("since")}) FILTER (WHERE state LIKE 'idle in transaction%'))
  FROM client),
 'states', (SELECT pg_catalog.jsonb_object_agg(s.state, s.n) FROM (
   SELECT coalesce(state, 'starting') AS state, pg_catalog.count(*) AS n FROM client WHERE NOT hidden GROUP BY 1) s),
 'waiting', (SELECT pg_catalog.jsonb_build_object(
   'sessions', pg_catalog.count(DISTINCT pid), 'longest_s', pg_catalog.max({_seconds("waitstart")})) FROM waiting),
 'long_queries', {_LONG_QUERIES},
 'here', (SELECT pg_catalog.jsonb_build_object(
   'blocks', blks_hit + blks_read,
   'cache_hit_ratio', pg_catalog.round(blks_hit / nullif(blks_hit + blks_read, 0)::pg_catalog."numeric", 4),
   'stats_since', {_utc("stats_reset")},
   'transactions', pg_catalog.jsonb_build_object('age', pg_catalog.age(datfrozenxid),
    'max', pg_catalog.current_setting('autovacuum_freeze_max_age')::pg_catalog.int8),
   'multixacts', pg_catalog.jsonb_build_object('age', pg_catalog.mxid_age(datminmxid),
    'max', pg_catalog.current_setting('autovacuum_multixact_freeze_max_age')::pg_catalog.int8)) FROM here),
 'replication', (SELECT pg_catalog.jsonb_build_object(
   'is_standby', pg_catalog.pg_is_in_recovery(),
   'lag_s', CASE WHEN pg_catalog.pg_last_wal_receive_lsn() = pg_catalog.pg_last_wal_replay_lsn() THEN 0
     ELSE {_seconds("pg_catalog.pg_last_xact_replay_timestamp()")} END,
   'standbys', pg_catalog.count(*),
   'standbys_hidden', pg_catalog.count(*) FILTER (WHERE r.state IS NULL),
   'standbys_lag_s', pg_catalog.max(pg_catalog.round(extract(epoch FROM r.replay_lag))),
   'standbys_lag_bytes', pg_catalog.max(greatest(0, pg_catalog.pg_wal_lsn_diff(position.lsn, r.replay_lsn)))
     FILTER (WHERE r.replay_lsn IS NOT NULL))
  FROM pg_catalog.pg_stat_replication r CROSS JOIN position)
)
"""

# A role that may read some columns of a table only is not told of its indexes and keys, which name others (`whole`).
_READ = f"""readable AS MATERIALIZED (
 SELECT c.oid, n.nspname AS schema, c.relname AS relation, pg_catalog.format('%I.%I', n.nspname, c.relname) AS "table",
  c.reltuples, pg_catalog.has_table_privilege(c.oid, 'SELECT') AS whole
 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
  AND {READABLE}
), counted AS MATERIALIZED (
 SELECT r.oid, r.schema, r.relation, r."table", s.n_live_tup AS rows, s.n_dead_tup AS dead,
  pg_catalog.round(s.n_dead_tup / nullif(s.n_live_tup + s.n_dead_tup, 0)::pg_catalog."numeric", 3) AS dead_ratio,
  {_utc("greatest(s.last_vacuum, s.last_autovacuum)")} AS vacuumed,
  {_utc("greatest(s.last_analyze, s.last_autoanalyze)")} AS analyzed,
  s.seq_scan AS scans, s.seq_tup_read AS scanned, s.seq_tup_read / nullif(s.seq_scan, 0) AS rows_each,
  coalesce(s.idx_tup_fetch, 0) AS fetched
 FROM readable r JOIN pg_catalog.pg_stat_user_tables s ON s.relid = r.oid
)"""
_COVERS = """i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts >= pg_catalog.cardinality(k.conkey)
     AND (i.indkey::pg_catalog.int2[])[0:pg_catalog.cardinality(k.conkey) - 1] @> k.conkey"""
"""Whether index `i` finds the rows of foreign key `k`: its columns come first, in whatever order."""
_BYTES = "c.relpages::pg_catalog.int8 * pg_catalog.current_setting('block_size')::pg_catalog.int8"

_BLOATED = _worst(
    '"table", dead_ratio, dead, vacuumed, analyzed',
    f"counted WHERE dead >= {MANY_ROWS} AND dead_ratio >= {DEAD_RATIO}",
    'dead DESC, "table"',
)
# A crash forgets when a table was analyzed, pg_stats does not; but it shows nothing where row security holds for the
# role. With OFFSET 0 it is looked up for the few tables in question, not read as a whole.
_NEVER_ANALYZED = _worst(
    '"table", rows',
    f"""counted t WHERE rows >= {MANY_ROWS} AND analyzed IS NULL AND NOT pg_catalog.row_security_active(oid)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_stats s
    WHERE s.schemaname = t.schema AND s.tablename = t.relation OFFSET 0)""",
    'rows DESC, "table"',
)
# An index that a foreign key needs is left out: without it, it would be missed at the next delete.
_UNUSED = _worst(
    f"pg_catalog.format('%I.%I', r.schema, c.relname) AS index, {_BYTES} AS bytes",
    f"""readable r JOIN pg_catalog.pg_index i ON i.indrelid = r.oid JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
   JOIN pg_catalog.pg_stat_user_indexes s ON s.indexrelid = i.indexrelid
   WHERE r.whole AND s.idx_scan = 0 AND {_BYTES} >= {UNUSED_BYTES} AND i.indisvalid AND NOT c.relispartition
    AND NOT (i.indisunique OR i.indisexclusion OR i.indisreplident)
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = r.oid AND k.contype = 'f'
     AND {_COVERS})""",
    "bytes DESC, index",
)
_FOREIGN_KEYS = _worst(
    """r."table", (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY u.place)
    FROM pg_catalog.unnest(k.conkey) WITH ORDINALITY AS u(number, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attnum = u.number) AS columns,
   greatest(0, r.reltuples::pg_catalog.int8, t.rows) AS rows""",
    f"""readable r JOIN pg_catalog.pg_constraint k ON k.conrelid = r.oid LEFT JOIN counted t ON t.oid = r.oid
   WHERE r.whole AND k.contype = 'f' AND k.conparentid = 0 AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
    WHERE i.indrelid = r.oid AND m.amname NOT IN ('brin', 'gin') AND {_COVERS})""",
    'rows DESC, r."table", k.conname',
)
_SCANNED = _worst(
    '"table", rows, scans, rows_each',
    f"""counted WHERE rows >= {LARGE_TABLE} AND scans >= {MANY_SCANS} AND rows_each >= {LARGE_TABLE}
   AND scanned > fetched""",
    'scanned DESC, "table"',
)

_TABLES = f"""
WITH {_READ}
SELECT pg_catalog.jsonb_build_object(
 'tables', (SELECT pg_catalog.jsonb_build_object('count', pg_catalog.count(*), 'dead_ratio',
   pg_catalog.round(pg_catalog.sum(dead) / nullif(pg_catalog.sum(rows) + pg_catalog.sum(dead), 0), 3)) FROM counted),
 'bloated_tables', {_BLOATED},
 'never_analyzed', {_NEVER_ANALYZED},
 'unused_indexes', {_UNUSED},
 'foreign_keys_without_index', {_FOREIGN_KEYS},
 'scanned_tables', {_SCANNED}
)
"""


async def server(session: Session, bounds: Bounds) -> dict[str, Any]:
    """Connections, long queries, cache, age of transaction ids, replication. Seconds and bytes; a list is
    {entries, more}. Raises an Error with PostgreSQL's reason."""
    return await _one(session, _SERVER, bounds)


async def tables(session: Session, bounds: Bounds) -> dict[str, Any]:
    """Dead rows, planner statistics, and indexes of the tables that the role may read. Bytes; a list is
    {entries, more}. Raises an Error with PostgreSQL's reason."""
    return await _one(session, _TABLES, bounds)


async def _one(session: Session, text: str, bounds: Bounds) -> dict[str, Any]:
    found = await statement.run(session, text, bounds, ())
    if not found.count:
        raise Error("what there is to say of the database's health is more than an answer may have here")
    facts: dict[str, Any] = found.rows[0][0]
    return facts
