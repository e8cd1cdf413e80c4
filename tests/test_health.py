"""database_health: what is wrong is told, what is well is not, and nothing is named that the role may not read."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

import pg
import site_of_mcpctl as site
from mcpctl.tools import health as tool
from site_of_mcpctl import Client, Shop, Site, eventually

MakeSite = Callable[..., Site]
LISTS = {
    "long_queries", "bloated_tables", "never_analyzed", "unused_indexes", "foreign_keys_without_index",
    "scanned_tables",
}  # fmt: skip

# What the reader may see stands in the schema "open", and the same of another tenant in the schema "hidden".
ILL = """
CREATE SCHEMA hidden;
CREATE SCHEMA open;
GRANT USAGE ON SCHEMA open TO shop_reader;

CREATE TABLE {0}parents (id int PRIMARY KEY, code int, UNIQUE (id, code));
INSERT INTO {0}parents SELECT i, i FROM generate_series(1, 20000) i;
CREATE TABLE {0}children (parent int REFERENCES {0}parents, parent_code int, filler int,
                       FOREIGN KEY (parent, parent_code) REFERENCES {0}parents (id, code));
INSERT INTO {0}children SELECT i % 20000 + 1, i % 20000 + 1, i FROM generate_series(1, 100000) i;
CREATE INDEX children_filler ON {0}children (filler);
CREATE UNIQUE INDEX children_unique ON {0}children (filler, parent);

CREATE TABLE {0}bloated (i int) WITH (autovacuum_enabled = off);
INSERT INTO {0}bloated SELECT generate_series(1, 3000);
CREATE TABLE {0}guarded (i int) WITH (autovacuum_enabled = off);
INSERT INTO {0}guarded SELECT generate_series(1, 2000);
ANALYZE {0}bloated, {0}children, {0}guarded, {0}parents;
ALTER TABLE {0}guarded ENABLE ROW LEVEL SECURITY;
DELETE FROM {0}bloated WHERE i <= 1500;
CREATE TABLE {0}unknown (i int) WITH (autovacuum_enabled = off);
INSERT INTO {0}unknown SELECT generate_series(1, 2000);
CREATE TABLE {0}searched (i int) WITH (autovacuum_enabled = off);
INSERT INTO {0}searched SELECT generate_series(1, 10000);
ANALYZE {0}searched;
DO $$ BEGIN FOR turn IN 1..100 LOOP PERFORM count(*) FROM {0}searched WHERE i = -1; END LOOP; END $$;
"""


def ask(client: Client, **arguments: Any) -> Any:
    """The structured answer, which says the same as its text."""
    answer = client.call("database_health", arguments).json()["result"]
    assert not answer["isError"], answer["content"][0]["text"]
    assert json.loads(answer["content"][0]["text"]) == answer["structuredContent"]
    return answer["structuredContent"]


def about(found: Any, word: str) -> list[str]:
    return [sentence for sentence in found["advice"] if word in sentence]


def as_reader(shop: Shop, **options: Any) -> psycopg.Connection[Any]:
    """A session of the very role that mcpctl logs in as, which PostgreSQL shows it in full."""
    return psycopg.connect(shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop"), autocommit=True, **options)


@pytest.fixture(scope="module")
def well(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A caller of the healthy shop."""
    at = Site(tmp_path_factory.mktemp("well") / "site", shop).start()
    at.edit_user("alice", roles=("mcp-tools",))
    with at.client(at.token()[1]) as client:
        yield client
    at.stop()


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def sick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shop, Client]]:
    """A cluster of its own with what is wrong in it, and a caller."""
    with site.shop(request.param) as shop:
        with shop.admin() as admin:
            begin, rest = ILL.split("\n\n", 1)
            admin.execute(begin)
            for schema in ("open.", "hidden."):
                admin.execute(rest.replace("{0}", schema))
            admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA open TO shop_reader")
            # Not even a right on a table names it while its schema is closed.
            admin.execute("GRANT SELECT ON hidden.children TO shop_reader")
        at = Site(tmp_path_factory.mktemp("sick") / "site", shop).start()
        at.edit_user("alice", roles=("mcp-tools",))
        with at.client(at.token()[1]) as client:
            eventually(lambda: ask(client)["scanned_tables"])  # a session's counts are written when it ends
            yield shop, client
        at.stop()


# -- a healthy database -----------------------------------------------------------------------------------------


def test_of_a_healthy_database_there_is_little_to_say_and_nothing_to_advise(well: Client, shop: Shop) -> None:
    shop.close()
    eventually(lambda: ask(well)["limited"] is False)  # whoever else was there has left
    found = ask(well)
    assert found["advice"] == []
    assert {name: found[name] for name in LISTS} == {name: [] for name in LISTS}
    assert "more" not in found
    assert found["connections"]["max"] == 100
    assert found["connections"]["used"] == sum(found["connections"]["states"].values()) >= 1
    assert found["connections"]["states"]["active"] == 1
    assert 0 < found["cache_hit_ratio"] <= 1
    assert found["transaction_id_age"]["max"] == 200_000_000
    assert 0 < found["transaction_id_age"]["age"] < 10_000
    assert found["replication"] == {"is_standby": False, "standbys": 0}
    assert found["tables"]["count"] >= 4
    # No tokenizer of a model makes more than a token of 2.5 characters of such JSON on average.
    assert len(json.dumps(found, separators=(",", ":"))) / 2.5 < 400


def test_sessions_of_other_roles_are_numbers_and_the_answer_says_that_it_is_limited(well: Client, shop: Shop) -> None:
    shop.close()
    eventually(lambda: ask(well)["limited"] is False)  # whoever else was there has left
    secret = shop.cluster.dsn_for("postgres", shop.cluster.superuser_password, "shop")
    with psycopg.connect(secret, application_name="payroll") as other:
        other.execute("SELECT 'a secret question'")
        found = ask(well)
        assert found["limited"] is True
        counted = found["connections"]
        assert counted["hidden"] == 1
        assert counted["used"] == counted["hidden"] + sum(counted["states"].values())
        assert "idle_in_transaction_s" not in counted
        assert not any(word in json.dumps(found) for word in ("payroll", "postgres", "secret"))


def test_a_table_that_is_locked_against_everybody_holds_nothing_up(well: Client, shop: Shop) -> None:
    before = ask(well)["tables"]
    with shop.admin() as admin, admin.transaction():
        admin.execute("LOCK TABLE orders, customers IN ACCESS EXCLUSIVE MODE")
        assert ask(well)["tables"] == before


def test_it_takes_a_permission_of_its_own(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    at.edit_user("alice", roles=("mcp-tools",))
    with at.client(at.token(permissions=("tools:query_database", "databases:*"))[1]) as client:
        refused = client.call("database_health").json()["result"]
        assert refused["isError"]
        assert "lacks the permission tools:database_health" in refused["content"][0]["text"]
    with at.client(at.token(permissions=("tools:database_health", "databases:*"))[1]) as client:
        assert ask(client, database="shop")["tables"]["count"] >= 4
        assert client.call("database_health", {"table": "x"}).json()["result"]["isError"]
    refused_line, line = [line for line in at.audit() if line.get("tool") == "database_health"][:2]
    assert refused_line["event"] == "tool.refused"
    assert (line["event"], line["outcome"], line["database"], line["role"]) == (
        "tool.called", "ok", "shop", site.READER,
    )  # fmt: skip


def test_where_answers_must_be_smaller_than_it_is_it_says_so(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="limits: {max_bytes: 300}\n").start()
    at.edit_user("alice", roles=("mcp-tools",))
    with at.client(at.token()[1]) as client:
        refused = client.call("database_health").json()["result"]
        assert refused["isError"]
        assert "more than an answer may have here" in refused["content"][0]["text"]


# -- what is wrong ----------------------------------------------------------------------------------------------


def test_an_index_that_nobody_uses_is_named_with_its_size_and_advised_against(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    found = ask(client)
    [index] = found["unused_indexes"]
    assert index["index"] == "open.children_filler"  # children_unique is unique, and parents_pkey too
    with shop.admin() as admin:
        assert admin.execute("SELECT pg_relation_size('open.children_filler')").fetchone() == (index["bytes"],)
    [advice] = about(found, "DROP INDEX")
    assert advice.startswith("1 index (open.children_filler) was not used since statistics began")


def test_an_index_that_was_used_once_or_that_a_foreign_key_needs_is_not_called_unused(
    sick: tuple[Shop, Client],
) -> None:
    shop, client = sick
    with shop.admin() as admin:
        admin.execute("CREATE TABLE open.used (a int, b int REFERENCES open.parents)")
        admin.execute("INSERT INTO open.used SELECT i, 1 FROM generate_series(1, 60000) i")
        admin.execute("CREATE INDEX used_a ON open.used (a)")
        admin.execute("CREATE INDEX used_b ON open.used (b)")
        admin.execute("GRANT SELECT ON open.used TO shop_reader")
        try:
            both = {"open.children_filler", "open.used_a"}
            assert {entry["index"] for entry in ask(client)["unused_indexes"]} == both
            admin.execute("SET enable_seqscan = off")
            admin.execute("SELECT a FROM open.used WHERE a = 7")
            admin.execute("SELECT pg_stat_force_next_flush()")
            eventually(lambda: {e["index"] for e in ask(client)["unused_indexes"]} == {"open.children_filler"})
        finally:
            admin.execute("DROP TABLE open.used")


def test_a_foreign_key_without_an_index_is_named_until_it_has_one(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    found = ask(client)
    keys = found["foreign_keys_without_index"]
    assert [(key["table"], key["columns"]) for key in keys] == [
        ("open.children", "parent"), ("open.children", "parent, parent_code"),
    ]  # fmt: skip
    assert all(90_000 < key["rows"] < 110_000 for key in keys)
    assert about(found, "2 foreign keys (open.children, …) have no index")
    with shop.admin() as admin:
        for made, left in (
            ("(filler, parent, parent_code)", ["parent", "parent, parent_code"]),  # they do not come first
            ("(parent) WHERE filler > 5", ["parent", "parent, parent_code"]),  # it is not whole
            ("(parent) INCLUDE (parent_code)", ["parent, parent_code"]),  # what is included is not searched
            ("USING brin (parent, parent_code)", ["parent", "parent, parent_code"]),
            ("(parent_code, parent, filler)", ["parent"]),  # in whatever order
            ("(parent, parent_code)", []),
        ):
            admin.execute(f"CREATE INDEX supporting ON open.children {made}")  # type: ignore[arg-type]
            found = ask(client)
            admin.execute("DROP INDEX open.supporting")
            assert [key["columns"] for key in found["foreign_keys_without_index"]] == left, made
            assert len(about(found, "no index on the referencing columns")) == bool(left)


def test_tables_with_dead_rows_without_statistics_and_read_from_end_to_end_are_named(sick: tuple[Shop, Client]) -> None:
    found = ask(sick[1])
    [bloated] = found["bloated_tables"]
    assert bloated.pop("analyzed").endswith("Z")
    assert bloated == {"table": "open.bloated", "dead_ratio": 0.5, "dead": 1500, "vacuumed": None}
    assert found["never_analyzed"] == [{"table": "open.unknown", "rows": 2000}]
    assert found["scanned_tables"] == [{"table": "open.searched", "rows": 10000, "scans": 100, "rows_each": 10000}]
    assert 0 < found["tables"]["dead_ratio"] < 0.1
    assert about(found, "1 table (open.bloated) has many dead rows (50% of the first): VACUUM")
    assert about(found, "1 table (open.unknown) was never analyzed")
    assert about(found, "1 large table (open.searched) is often read from end to end (100 times)")


def test_what_another_tenant_has_is_neither_named_nor_counted(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    before = ask(client)
    assert "hidden." not in json.dumps(before)
    with shop.admin() as admin:  # the proof that there was something to hide: with the right, all of it shows
        admin.execute("GRANT USAGE ON SCHEMA hidden TO shop_reader")
        try:
            assert len(ask(client)["unused_indexes"]) == 2
            admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA hidden TO shop_reader")
            with_right = ask(client)
        finally:
            admin.execute("REVOKE SELECT ON ALL TABLES IN SCHEMA hidden FROM shop_reader")
            admin.execute("REVOKE USAGE ON SCHEMA hidden FROM shop_reader")
    for name in LISTS - {"long_queries"}:
        assert len(with_right[name]) == 2 * len(before[name]) > 0, name
    assert with_right["tables"]["count"] == before["tables"]["count"] + 6
    assert ask(client)["tables"] == before["tables"]


def test_who_may_read_some_columns_is_told_of_the_table_but_of_no_index_or_key(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    with shop.admin() as admin:
        try:
            admin.execute("REVOKE SELECT ON open.children, open.bloated FROM shop_reader")
            none = ask(client)
            admin.execute("GRANT SELECT (filler) ON open.children TO shop_reader")
            admin.execute("GRANT SELECT (i) ON open.bloated TO shop_reader")
            some = ask(client)
        finally:
            admin.execute("GRANT SELECT ON open.children, open.bloated TO shop_reader")
    assert none["bloated_tables"] == none["unused_indexes"] == none["foreign_keys_without_index"] == []
    assert [entry["table"] for entry in some["bloated_tables"]] == ["open.bloated"]
    assert some["unused_indexes"] == some["foreign_keys_without_index"] == []


def test_a_list_shows_the_five_worst_and_how_many_there_are_more(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    with shop.admin() as admin:
        for number in range(6):
            admin.execute(f'CREATE TABLE open."Small {number}" (parent int REFERENCES open.parents)')  # type: ignore[arg-type]
        admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA open TO shop_reader")
        try:
            found = ask(client)
        finally:
            for number in range(6):
                admin.execute(f'DROP TABLE open."Small {number}"')  # type: ignore[arg-type]
    shown = [key["table"] for key in found["foreign_keys_without_index"]]
    assert shown == ["open.children"] * 2 + [f'open."Small {number}"' for number in range(3)]
    assert found["more"] == {"foreign_keys_without_index": 3}
    assert about(found, "8 foreign keys (open.children, …) have no index")


# -- sessions ---------------------------------------------------------------------------------------------------


def test_long_queries_are_shown_as_postgresql_shows_them_to_the_role(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    long = f"SELECT pg_sleep(40) /* {'x' * 200} */"
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(shop.admin())
        own, foreign, waiting, resting = as_reader(shop), shop.admin(), as_reader(shop), as_reader(shop)
        for connection in (own, foreign, waiting, resting):
            stack.callback(connection.close)
        for connection, text in (
            (own, long), (foreign, "SELECT pg_sleep(40) /* of another */"), (waiting, "SELECT pg_advisory_lock(1)"),
        ):  # fmt: skip
            if connection is waiting:
                holder.execute("SELECT pg_advisory_lock(1)")
            task = site.in_background(_until_cancelled, connection, text)
            stack.callback(task.result)
            stack.callback(connection.cancel)
        resting.execute("BEGIN")
        resting.execute("SELECT 'resting'")
        eventually(lambda: len(ask(client)["long_queries"]) == 3, 20, 0.25)
        found = ask(client)
        entries = {entry["pid"]: entry for entry in found["long_queries"]}
        assert entries.keys() == {c.info.backend_pid for c in (own, waiting, resting)}
        mine = entries[own.info.backend_pid]
        assert mine["query"] == long[:80] + "…"
        assert (mine["state"], mine["wait"]) == ("active", "Timeout:PgSleep")
        assert 10 < mine["seconds"] < 40
        assert entries[waiting.info.backend_pid]["wait"] == "Lock:advisory"
        assert entries[resting.info.backend_pid]["state"] == "idle in transaction"
        assert found["limited"] is True
        assert found["connections"]["hidden"] == 2
        assert found["connections"]["waiting_on_locks"] == 1
        assert found["connections"]["idle_in_transaction_s"] > 10
        assert "of another" not in json.dumps(found)
        assert about(found, "1 session waits for a lock")
        assert about(found, "has been running for")
        holder.execute("GRANT pg_read_all_stats TO shop_reader")
        try:
            everything = ask(client)
        finally:
            holder.execute("REVOKE pg_read_all_stats FROM shop_reader")
        assert everything["limited"] is False
        assert everything["connections"]["hidden"] == 0
        assert "of another" in json.dumps(everything["long_queries"])


def _until_cancelled(connection: psycopg.Connection[Any], text: str) -> None:
    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute(text)  # type: ignore[arg-type]


# -- standbys and crashes; the last ones, since they start the server anew ------------------------------------------


def test_a_standby_is_counted_and_its_lag_shown_only_to_who_may_see_it(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    dsn = shop.cluster.dsn_for("postgres", shop.cluster.superuser_password, "")
    eventually(lambda: ask(client)["limited"] is False)
    wal = psycopg.pq.PGconn.connect((dsn + "&replication=true").encode())
    with contextlib.ExitStack() as stack:
        stack.callback(wal.finish)
        assert wal.exec_(b"START_REPLICATION PHYSICAL 0/1000000").status == psycopg.pq.ExecStatus.COPY_BOTH
        # "Standby status update" of PostgreSQL's streaming replication protocol: all but the first MiB is still to do.
        wal.put_copy_data(struct.pack("!cQQQQB", b"r", 0x1000000, 0x1000000, 0x100000, 0, 0))
        wal.flush()
        found = ask(client)
        assert found["replication"] == {"is_standby": False, "standbys": 1}
        assert found["limited"] is True
        assert found["connections"]["hidden"] == 0  # it takes none of max_connections
        with shop.admin() as admin:
            admin.execute("GRANT pg_read_all_stats TO shop_reader")
            try:
                behind = "pg_wal_lsn_diff(pg_current_wal_lsn(), '0/100000')"
                assert eventually(lambda: ask(client)["replication"].get("standbys_lag_bytes"))
                least = admin.execute(f"SELECT {behind} - 1000000").fetchone()[0]
                found = ask(client)
                most = admin.execute(f"SELECT {behind}").fetchone()[0]
            finally:
                admin.execute("REVOKE pg_read_all_stats FROM shop_reader")
        assert least <= found["replication"]["standbys_lag_bytes"] <= most
        assert found["limited"] is False
    eventually(lambda: ask(client)["replication"]["standbys"] == 0)


def test_a_crash_forgets_when_a_table_was_analyzed_but_it_is_not_called_never(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    shop.cluster.kill()
    shop.cluster.start_server()
    with shop.admin() as admin:
        assert admin.execute(
            "SELECT last_analyze FROM pg_stat_user_tables WHERE relid = 'open.bloated'::regclass"
        ).fetchone() == (None,)
        for table in ("bloated", "guarded", "unknown"):  # of the second, pg_stats shows the reader nothing
            admin.execute(f"INSERT INTO open.{table} SELECT generate_series(1, 2000)")  # type: ignore[arg-type]
    eventually(lambda: ask(client)["never_analyzed"] == [{"table": "open.unknown", "rows": 2000}])
    with shop.admin() as admin:
        counted = admin.execute(
            "SELECT n_live_tup FROM pg_stat_user_tables WHERE relid = 'open.bloated'::regclass"
        ).fetchone()
        assert counted == (2000,)
        assert ask(client)["stats_since"] is None
        since = admin.execute("SELECT pg_stat_reset(), now()").fetchone()[1]  # type: ignore[index]
    found = ask(client)
    assert abs(datetime.fromisoformat(found["stats_since"]) - since) < timedelta(seconds=60)
    assert about(found, f"not used since {found['stats_since']}:")


def test_a_standby_says_that_it_is_one(sick: tuple[Shop, Client]) -> None:
    shop, client = sick
    shop.cluster.stop_server()
    data = shop.cluster.folder / "data"
    signal = data / "standby.signal"
    signal.touch()
    owner = data.stat()
    with contextlib.suppress(PermissionError):  # who is not root is the owner
        os.chown(signal, owner.st_uid, owner.st_gid)
    shop.cluster.start_server()
    try:
        found = ask(client)
        assert found["replication"]["is_standby"] is True
        assert found["replication"]["standbys"] == 0
        assert found["tables"]["count"] > 4
    finally:
        shop.cluster.stop_server()
        signal.unlink()
        shop.cluster.start_server()


# -- advice on what takes too long to bring about -------------------------------------------------------------------

HEALTHY: dict[str, Any] = {
    "connections": {"used": 5, "max": 100, "hidden": 0, "idle_in_transaction_s": None},
    "states": {"active": 1},
    "waiting": {"sessions": 0, "longest_s": None},
    "here": {
        "blocks": 10_000, "cache_hit_ratio": 0.9, "stats_since": None,
        "transactions": {"age": 210_000_000, "max": 200_000_000},
        "multixacts": {"age": 0, "max": 400_000_000},
    },
    "replication": {
        "is_standby": False, "lag_s": None, "standbys": 1, "standbys_hidden": 0, "standbys_lag_s": 60,
        "standbys_lag_bytes": 5000,
    },
    **{name: {"entries": [], "more": 0} for name in LISTS},
}  # fmt: skip


@pytest.mark.parametrize(
    "part, change, sentence",
    [
        ("connections", {"used": 80}, "80 of 100 connections are used"),
        ("connections", {"idle_in_transaction_s": 61}, "A transaction has been idle for 61 s"),
        ("waiting", {"sessions": 2, "longest_s": 11}, "2 sessions wait for a lock, up to 11 s"),
        ("here", {"cache_hit_ratio": 0.7}, "Only 70% of the blocks were found in shared_buffers"),
        ("here", {"transactions": {"age": 250_000_000, "max": 200_000_000}}, "The oldest transaction id is 250000000"),
        ("here", {"transactions": {"age": 1_600_000_000, "max": 2_000_000_000}}, "The oldest transaction id is 16000"),
        ("here", {"multixacts": {"age": 500_000_000, "max": 400_000_000}}, "The oldest multixact id is 500000000 old"),
        ("replication", {"is_standby": True, "lag_s": 61}, "This standby is 61 s behind"),
        ("replication", {"standbys_lag_s": 61}, "A standby is 61 s and 5000 bytes behind"),
        ("replication", {"standbys_lag_bytes": 2 << 30}, "A standby is 60 s and 2147483648 bytes behind"),
    ],
)
def test_advice_is_given_beyond_a_bound_and_not_before(part: str, change: dict[str, Any], sentence: str) -> None:
    assert tool._advice(HEALTHY) == []
    [advice] = tool._advice({**HEALTHY, part: {**HEALTHY[part], **change}})
    assert advice.startswith(sentence)
    few = {**HEALTHY, "here": {**HEALTHY["here"], "blocks": 9_999, "cache_hit_ratio": 0.1}}
    assert tool._advice(few) == []
