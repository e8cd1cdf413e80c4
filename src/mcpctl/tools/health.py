"""database_health: how a database is doing, and what to do where something is out of bounds."""

from typing import Any

from mcpctl.postgres import health
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.session import Session
from mcpctl.tools.definition import Result, Tool, encode, result
from mcpctl.tools.query import DATABASE

_LISTS = (
    "long_queries",
    "bloated_tables",
    "never_analyzed",
    "unused_indexes",
    "foreign_keys_without_index",
    "scanned_tables",
)
_FULL = 0.8
"""Share of max_connections from which there is little room left."""
_IDLE = 60
"""Seconds that a transaction may stand open with nothing to do."""
_CACHED = 0.9
"""Share of blocks that should be found in shared_buffers."""
_BLOCKS = 10_000
"""Blocks that must have been asked for before their ratio says anything."""
_OVERDUE, _DANGEROUS = 1.2, 1_500_000_000
"""Autovacuum begins at its freeze age; beyond a fifth more it does not keep up. At 2^31 PostgreSQL stops writes."""
_LAG, _LAG_BYTES = 60, 1 << 30
"""How far a standby may be behind, in seconds and in bytes of WAL."""


async def _health(session: Session, _: dict[str, Any], bounds: Bounds) -> Result:
    facts = {**await health.server(session, bounds), **await health.tables(session, bounds)}
    answer = _known({"tenant": session.pool.principal.tenant}) | _shown(facts)
    answer["advice"] = _advice(facts)
    done = result(answer)
    done.bytes = len(encode(answer))
    return done


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts in the order and the form in which they are answered; what is unknown or 0 and says nothing is out."""
    here, replication = facts["here"], dict(facts["replication"])
    connections, waiting = facts["connections"], facts["waiting"]
    hidden_standbys = replication.pop("standbys_hidden")
    shown: dict[str, Any] = {
        "limited": bool(connections["hidden"] or hidden_standbys),
        "connections": _known({**connections, "states": facts["states"], "waiting_on_locks": waiting["sessions"]}),
        "cache_hit_ratio": here["cache_hit_ratio"],
        "transaction_id_age": here["transactions"],
        "multixact_id_age": here["multixacts"],
        "replication": _known(replication),
        "tables": _known(facts["tables"]),
        "stats_since": here["stats_since"],
    }
    for name in _LISTS:
        shown[name] = facts[name]["entries"]
    shown["long_queries"] = [_known(entry) for entry in shown["long_queries"]]
    if more := {name: facts[name]["more"] for name in _LISTS if facts[name]["more"]}:
        shown["more"] = more
    return shown


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _advice(facts: dict[str, Any]) -> list[str]:
    return [*_of_sessions(facts), *_of_server(facts), *_of_tables(facts), *_of_indexes(facts)]


def _of_sessions(facts: dict[str, Any]) -> list[str]:
    found, connections, waiting = [], facts["connections"], facts["waiting"]
    if connections["used"] >= _FULL * connections["max"]:
        found.append(
            f"{connections['used']} of {connections['max']} connections are used: close idle ones, or pool them."
        )
    if (idle := connections["idle_in_transaction_s"] or 0) > _IDLE:
        found.append(
            f"A transaction has been idle for {idle} s: it holds its locks, and VACUUM back. End it, and set "
            "idle_in_transaction_session_timeout."
        )
    if (longest := waiting["longest_s"] or 0) > health.LONG:
        found.append(
            f"{_count(waiting['sessions'], 'session waits', 'sessions wait')} for a lock, up to {longest} s: "
            "pg_blocking_pids(pid) says for whom."
        )
    running = [entry for entry in facts["long_queries"]["entries"] if not entry["state"].startswith("idle")]
    if running:
        found.append(
            f"The query of pid {running[0]['pid']} has been running for {running[0]['seconds']} s: see why with "
            "explain_query, or end it with pg_cancel_backend(pid)."
        )
    return found


def _of_server(facts: dict[str, Any]) -> list[str]:
    found, here, replication = [], facts["here"], facts["replication"]
    if here["blocks"] >= _BLOCKS and here["cache_hit_ratio"] < _CACHED:
        found.append(
            f"Only {here['cache_hit_ratio']:.0%} of the blocks were found in shared_buffers: make it larger, or read "
            "less (indexes)."
        )
    for name, ids in (("transaction", here["transactions"]), ("multixact", here["multixacts"])):
        if ids["age"] > min(_OVERDUE * ids["max"], _DANGEROUS):
            found.append(
                f"The oldest {name} id is {ids['age']} old, and autovacuum should freeze at {ids['max']}: look for old "
                "transactions, prepared transactions and replication slots, then VACUUM FREEZE."
            )
    if (lag := replication["lag_s"] or 0) > _LAG:
        found.append(f"This standby is {lag} s behind: what you read here is old.")
    seconds, size = replication["standbys_lag_s"] or 0, replication["standbys_lag_bytes"] or 0
    if seconds > _LAG or size > _LAG_BYTES:
        found.append(f"A standby is {seconds} s and {size} bytes behind.")
    return found


def _of_tables(facts: dict[str, Any]) -> list[str]:
    found = []
    if entries := facts["bloated_tables"]["entries"]:
        found.append(
            f"{_named(facts, 'bloated_tables', 'table has', 'tables have')} many dead rows "
            f"({entries[0]['dead_ratio']:.0%} of the first): VACUUM (ANALYZE), and look why autovacuum did not come."
        )
    if facts["never_analyzed"]["entries"]:
        found.append(
            f"{_named(facts, 'never_analyzed', 'table was', 'tables were')} never analyzed, so plans are guesses: "
            "ANALYZE."
        )
    return found


def _of_indexes(facts: dict[str, Any]) -> list[str]:
    found = []
    since = facts["here"]["stats_since"] or "statistics began"
    if facts["unused_indexes"]["entries"]:
        found.append(
            f"{_named(facts, 'unused_indexes', 'index was', 'indexes were')} not used since {since}: if that is long "
            "enough, and the standbys do not use it either, DROP INDEX CONCURRENTLY."
        )
    if facts["foreign_keys_without_index"]["entries"]:
        found.append(
            f"{_named(facts, 'foreign_keys_without_index', 'foreign key has', 'foreign keys have')} no index on the "
            "referencing columns, so each delete of a referenced row scans the table: CREATE INDEX CONCURRENTLY."
        )
    if entries := facts["scanned_tables"]["entries"]:
        found.append(
            f"{_named(facts, 'scanned_tables', 'large table is', 'large tables are')} often read from end to end "
            f"({entries[0]['scans']} times): look for the query with explain_query, and index what it filters by."
        )
    return found


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _named(facts: dict[str, Any], name: str, one: str, many: str) -> str:
    """How many a list holds, and the first: `1 index (public.a) was`, `3 indexes (public.a, …) were`."""
    entries = facts[name]["entries"]
    number = len(entries) + facts[name]["more"]
    noun, verb = (one if number == 1 else many).rsplit(" ", 1)
    first = entries[0].get("table") or entries[0]["index"]
    return f"{number} {noun} ({first}{', …' if number > 1 else ''}) {verb}"


HEALTH = Tool(
    name="database_health",
    description=(
        "Check a database: connections, long queries, cache, bloat, transaction-id age, replication, indexes. `advice` "
        "says what to mend."
    ),
    permission="tools:database_health",
    properties={"database": DATABASE},
    ask=_health,
)
