"""Canaries: the first use of a token or a table that nobody should use blocks who did it, on all workers, for good."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from chain import lines, verify
from command_line import Home
from mcpctl import config, config_keys
from mcpctl.canaries import Canaries
from mcpctl.config_keys import Database, Settings
from mcpctl.errors import ConfigError
from mcpctl.identity.blocked import Block, Blocked
from mcpctl.identity.principal import LOCAL
from mcpctl.keyring import Keyring
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.server.live import Place, Process
from mcpctl.server.parts import Core, running
from mcpctl.state import State
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually, in_background

MakeSite = Callable[..., Site]
CANARIES = "canaries: {tables: [shop.public.honey, shop.public.Odd.Name]}\n"
TOUCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "a select": ("query_database", {"query": "select * from honey"}),
    "a count": ("query_database", {"query": "select count(*) from honey"}),
    "a view": ("query_database", {"query": "select * from honey_view"}),
    "a subquery that yields nothing": ("query_database", {"query": "select 1 where exists (select from honey)"}),
    "a function": ("query_database", {"query": "select word from ts_stat('select to_tsvector(id::text) from honey')"}),
    "a function whose block is rolled back": ("query_database", {"query": "select honey_undone()"}),
    "TABLE": ("query_database", {"query": "table honey"}),
    "an odd name": ("query_database", {"query": 'select * from "Odd.Name"'}),
    "several databases": ("query_database", {"query": "select * from honey", "databases": ["shop"]}),
    "explain": ("explain_query", {"query": "select * from honey"}),
    "explain of what is no question": ("explain_query", {"query": "insert into tips select id from honey"}),
    "explain analyze": ("explain_query", {"query": "select * from honey", "analyze": True}),
    "EXPLAIN as a question": ("query_database", {"query": "explain select * from honey"}),
    "EXPLAIN ANALYZE as a question": ("query_database", {"query": "explain (analyze) select * from honey"}),
}
HONEST = (
    "select 'honey', count(*) from orders -- from honey",
    "select relname from pg_class where relname = 'honey'",
    "show search_path",
    "explain select 1",
)


@pytest.fixture(scope="module")
def honey(shop: Shop) -> Shop:
    with shop.admin() as admin:
        admin.execute(
            'CREATE TABLE IF NOT EXISTS honey (id int); CREATE TABLE IF NOT EXISTS "Odd.Name" (id int);'
            "CREATE TABLE IF NOT EXISTS tips (id int); INSERT INTO honey VALUES (42);"
            "CREATE OR REPLACE VIEW honey_view AS SELECT * FROM honey;"
            "CREATE OR REPLACE FUNCTION honey_undone() RETURNS int LANGUAGE plpgsql AS $$"
            "BEGIN PERFORM FROM honey; RAISE 'undone'; EXCEPTION WHEN raise_exception THEN RETURN 1; END$$;"
            'GRANT SELECT ON honey, "Odd.Name", honey_view, tips TO shop_reader; GRANT INSERT ON tips TO shop_reader;'
            "CREATE OR REPLACE FUNCTION peek(name regclass) RETURNS text LANGUAGE plpgsql AS $$ DECLARE found text;"
            " BEGIN EXECUTE format('SELECT max(id) FROM %s', name) INTO found; RETURN found; END $$;"
            "CREATE OR REPLACE FUNCTION glance(name regclass) RETURNS text LANGUAGE sql PARALLEL SAFE"
            " AS 'SELECT peek(name)'"
        )
    return shop


@pytest.fixture
def at(make_site: MakeSite, honey: Shop) -> Site:
    return make_site(honey, extra=CANARIES + "server: {workers: 2}\n").start()


def blocked(at: Site) -> dict[str, str]:
    found = json.loads(at.run("token", "list", "--json").stdout)["tokens"]
    assert all((one["status"] == "blocked") == ("blocked" in one) for one in found)
    return {one["id"]: one["blocked"] for one in found if "blocked" in one}


def test_who_touches_a_canary_gets_nothing_and_is_blocked_and_honest_ones_are_not(at: Site) -> None:
    honest, text = at.token("bob")
    bad = {}
    with at.client(text) as client:
        for query in HONEST:
            assert client.rows(query)
        for how, (tool, arguments) in TOUCHES.items():
            name, token = at.token()
            with at.client(token) as other:
                answer = other.call(tool, arguments)
                assert (answer.status_code, "42" in answer.text) == (401, False), (how, answer.text)
                assert other.call("whoami").status_code == 401, how
            bad[name] = how
        assert client.rows("select 1") == [[1]]
    assert blocked(at).keys() == bad.keys()
    events = [line for line in at.audit() if line["event"] == "token.blocked"]
    assert [line["token"] for line in events] == list(bad)
    assert {line["user"] for line in events} == {"alice"}
    assert {line["client_ip"] for line in events} == {"127.0.0.1"}
    assert events[0]["relations"] == ["public.honey"]
    assert honest not in bad
    alerts = [line for line in at.stderr if "ALERT" in line]
    assert len(alerts) == len(bad)
    first = next(iter(bad))
    assert f"ALERT canary: token {first} (alice), from 127.0.0.1: it touched the canary shop.public.honey" in alerts[0]
    with at.shop.admin() as admin:
        assert admin.execute("SELECT count(*) FROM tips").fetchone() == (0,)


def test_a_block_is_every_workers_it_outlives_a_restart_and_is_lifted_by_one_command(at: Site) -> None:
    name, text = at.token()
    with at.config.open("a") as file:
        file.write("limits: {max_rows: 5}\n")
    at.run("config", "reload")
    assert blocked(at) == {}
    assert (at.folder / "state.db-wal").exists()  # `token list` was not the last who had the store open
    with at.client(text) as other:
        running = in_background(other.call, "query_database", {"query": "select pg_sleep(20)"})
        eventually(lambda: at.shop.backends("query ~ 'pg_sleep' AND state = 'active'"))
        with at.client(text) as a:
            assert a.call("query_database", {"query": "select * from honey"}).status_code == 401
        assert running.result().status_code == 401  # what else it had open is cut

    def refused_by_all() -> bool:
        found = set()
        for _ in range(12):  # a connection each
            with at.client(text) as a:
                found.add(a.call("whoami").status_code)
        return found == {401}

    eventually(refused_by_all)
    assert "it touched the canary shop.public.honey" in blocked(at)[name]
    shown = at.run("token", "show", name).stdout
    assert "blocked" in shown
    assert "it touched the canary" in shown
    verified = at.run("token", "verify", check=False, input=text)
    assert (verified.returncode, f"token {name} is blocked since" in verified.stdout) == (1, True)
    at.stop()
    at.start()
    with at.client(text) as a:
        assert a.call("whoami").status_code == 401
        at.run("token", "unblock", name, "--reason", "it was a test of ours")
        assert eventually(lambda: a.call("whoami").status_code == 200)
    assert blocked(at) == {}
    assert at.run("token", "unblock", name, check=False).returncode == 4
    last = [line for line in at.audit() if line["event"] == "token.unblocked"]
    assert [(line["token"], line["reason"].partition(";")[0]) for line in last] == [(name, "it was a test of ours")]


def test_what_writes_is_rolled_back_where_it_touches_a_canary(make_site: MakeSite, honey: Shop) -> None:
    extra = CANARIES + "auth: {admin_users: [eve]}\n"
    at = make_site(honey, extra=extra, per_user=True, database="    allow_open_hba: true\n")
    with at.shop.admin() as admin:
        admin.execute(
            "DROP TABLE IF EXISTS later; CREATE TABLE later (id int UNIQUE DEFERRABLE INITIALLY DEFERRED);"
            "CREATE OR REPLACE FUNCTION peek() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$"
            "BEGIN PERFORM FROM public.honey; RETURN NULL; END$$;"
            "CREATE CONSTRAINT TRIGGER peek AFTER INSERT ON later DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW WHEN (NEW.id = 7) EXECUTE FUNCTION peek()"
        )
    at.user("eve")
    at.grant("eve", "--schema", "public", access="write")
    at.start()
    name, text = at.token("eve")
    with at.client(text) as a:
        ours = a.call("execute_statement", {"statement": "insert into tips select 1 returning id"})
        assert ours.json()["result"]["isError"] is False, ours.text
        twice = a.call("execute_statement", {"statement": "insert into later values (1), (1)"})
        assert "duplicate key" in twice.text
        assert [line["relations"] for line in at.audit() if line["event"] == "tool.begun"] == [["public.tips"]]
        hidden = a.call("execute_statement", {"statement": "insert into tips select ('x' || peek('honey'))::int"})
        assert ("42" in hidden.text, hidden.json()["result"]["isError"]) == (False, True)
        theirs = a.call("execute_statement", {"statement": "insert into tips select id from honey"})
        assert theirs.status_code == 401
    other, text = at.token("eve")
    with at.client(text) as a:  # what runs at the COMMIT alone
        assert a.call("execute_statement", {"statement": "insert into later values (7)"}).status_code == 401
    assert set(blocked(at)) == {name, other}
    at.run("user", "remove", "eve", "--yes")
    with at.shop.admin() as admin:
        assert admin.execute("DELETE FROM tips RETURNING id").fetchall() == [(1,)]
        assert admin.execute("SELECT FROM later").fetchall() == []
        admin.execute("DROP TABLE later; DROP FUNCTION peek()")


def test_a_plan_that_cannot_be_seen_is_not_answered(at: Site) -> None:
    name, text = at.token()
    with at.client(text) as a:
        answer = a.call("query_database", {"query": "explain select * from honey, orders", "limit": 1})
        assert "honey" not in answer.text
        assert answer.status_code in (200, 401)
        assert answer.status_code == 401 or answer.json()["result"]["isError"]
    assert name


HIDDEN = {
    "in an error": "select ('x' || peek('honey'))::int",
    "in the error of an explain": "explain (analyze) select ('x' || peek('honey'))::int",
    "in an answer that is cut off": "select case when g = 1 then peek('honey') else repeat('x', 200) end"
    " from generate_series(1, 3000000) g",
}


@pytest.mark.parametrize("query", HIDDEN.values(), ids=HIDDEN.keys())
def test_what_functions_have_read_does_not_leave_where_nobody_can_say_what_it_was(at: Site, query: str) -> None:
    with at.client(at.token()[1]) as a:
        answer = a.call("query_database", {"query": query})
        assert "42" not in answer.text
        assert answer.json()["result"]["isError"], answer.text
        assert a.rows("select g from generate_series(1, 3000000) g limit 1") == [[1]]
        cut = a.call("query_database", {"query": "select * from generate_series(1, 3000000)"}).json()["result"]
        assert cut["structuredContent"]["truncated"]
        assert (
            "division by zero"
            in a.call("query_database", {"query": "select 1 / count(*) from orders where false"}).text
        )


def test_a_text_that_read_something_else_before_is_looked_at_each_time(at: Site) -> None:
    query = "select glance((case when exists (select from tips where id = -7) then 'honey' else 'tips' end)::regclass)"
    name, text = at.token()
    with at.client(text) as a:
        assert a.call("query_database", {"query": query}).status_code == 200
        with at.shop.admin() as admin:
            admin.execute("INSERT INTO tips VALUES (-7)")
        try:
            answer = a.call("query_database", {"query": query})
        finally:
            with at.shop.admin() as admin:
                admin.execute("DELETE FROM tips WHERE id = -7")
        assert (answer.status_code, "42" in answer.text) == (401, False)
    assert list(blocked(at)) == [name]


def test_the_first_use_of_a_canary_token_blocks_it_also_over_stdio(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    name, text = at.token()
    with at.config.open("a") as file:
        file.write(f"canaries: {{tokens: [{name}]}}\n")
    at.start()
    wrong = text[:20] + ("a" if text[20] != "a" else "b") + text[21:]
    with at.client(wrong) as a:
        assert a.call("whoami").status_code == 401
    assert blocked(at) == {}  # whoever only knows the id is nobody
    with at.client(text) as a:
        for _ in range(3):
            assert a.call("whoami").status_code == 401
    assert "it is a canary, and was used" in blocked(at)[name]
    assert len([line for line in at.audit() if line["event"] == "token.blocked"]) == 1
    at.stop()
    at.run("token", "unblock", name)
    done = subprocess.run(
        [*COMMAND, "serve", "--stdio", "--config", str(at.config)], check=False, timeout=30, capture_output=True,
        input='{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"whoami","arguments":{},"_meta":'
        '{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}\n',
        env=environment(MCPCTL_TOKEN=text), text=True,
    )  # fmt: skip
    assert "wrong secret" in json.loads(done.stdout)["error"]["message"]  # as any wrong one
    assert "blocked" not in done.stdout
    assert list(blocked(at)) == [name]  # the canary has stayed
    key = bytes.fromhex((at.folder / "audit.key").read_text())
    assert verify(at.folder / "audit.jsonl", key=key) == len(lines(at.folder / "audit.jsonl"))


def test_while_nobody_can_say_who_is_blocked_nobody_is_let_in(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra=CANARIES).start()
    _, text = at.token()
    store = at.folder / "state.db"
    with at.client(text) as a:
        assert a.rows("select 1") == [[1]]
        store.rename(at.folder / "away")
        eventually(lambda: a.call("whoami").status_code == 503)
        eventually(lambda: f"there is no {store}, which says which tokens are blocked" in "".join(at.stderr))
        assert httpx.get(at.url.removesuffix("/mcp") + "/ready", trust_env=False).status_code == 503
        (at.folder / "away").rename(store)
        eventually(lambda: a.call("whoami").status_code == 200)
        with sqlite3.connect(store) as connection:
            connection.execute("ALTER TABLE blocked RENAME TO away")
        eventually(lambda: a.call("whoami").status_code == 503)
        connection.execute("ALTER TABLE away RENAME TO blocked")
        connection.close()
        eventually(lambda: a.call("whoami").status_code == 200)
        at.stop()
    store.unlink()
    refused = at.run("serve", "--port", "0", check=False)
    assert refused.returncode == 3
    assert "mcpctl token unblock --all" in refused.stderr
    at.run("token", "unblock", "--all")
    with at.start().client(text) as a:
        assert a.rows("select 1") == [[1]]


def test_what_no_file_has_room_for_outlives_a_reload_and_a_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path / "home")
    canary, barred = home.token()[0], home.token()[0]
    with home.config.open("a") as file:
        file.write(f"canaries: {{tokens: [{canary}]}}\n")
    settings = config.load(home.config)
    held = sqlite3.connect(settings.server.state_file, isolation_level=None)

    def out(core: Core) -> list[list[str]]:
        return [list(core.authenticator.kept_out(by)) for by in ("canary", "command")]

    async def run() -> None:
        process, other = Process(Place("one")), Process(Place("one", worker=1))
        async with running(settings, files=True, process=process) as first:
            held.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()
            first.authenticator.tripped(first.authenticator.tokens.current()[canary], None)
            assert time.monotonic() - begun < 1  # nobody waits for whoever holds the store
            await first.watch.answers({"do": "bar", "tokens": [barred]})
            assert out(first) == [[canary], [barred]]
            for _ in range(3):
                first.calls.canaries.look()
            async with (
                running(settings, files=True, process=process, again=True) as second,
                running(settings, files=True, process=other) as third,
            ):
                assert [out(second), out(third)] == [[[canary], [barred]]] * 2
                held.execute("ROLLBACK")
                third.calls.canaries.look()

    asyncio.run(run())
    held.close()
    said = [one for one in caplog.records if one.levelname == "WARNING" and one.name == "mcpctl.canaries"]
    assert len(said) == 3  # once for each that lived
    assert "blocked" in home("token", "show", canary).good


def test_the_numbers_and_the_status_tell_of_a_block_and_of_a_lost_store(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    canary, _ = home.token()
    with home.config.open("a") as file:
        file.write(f"canaries: {{tokens: [{canary}]}}\n")

    async def run() -> None:
        async with running(config.load(home.config), files=True) as core:

            async def gauges() -> dict[str, Any]:
                return {"".join([name, *labels]): value for name, labels, value in await core.live.shared(1)}

            core.authenticator.tripped(core.authenticator.tokens.current()[canary], None)
            found = await gauges()
            assert [found["mcpctl_tokens" + one] for one in ("blocked", "active")] == [1, 0]
            assert [found["mcpctl_files_broken"], found["mcpctl_locked"]] == [0, 0]
            (home.folder / "state.db").unlink()
            (home.folder / "lockdown").touch(0o600)
            core.calls.canaries.look()
            found = await gauges()
            assert [found["mcpctl_files_broken"], found["mcpctl_locked"]] == [1, 1]
            assert (await core.watch.answers({"do": "status"}))["tokens"] is None

    asyncio.run(run())


def test_a_canary_is_seen_through_each_name_of_its_database() -> None:
    shop = Database(host="127.0.0.1", dbname="shop", user="reader")
    twins = Logins(dict.fromkeys(("pu", "shop", "shopw"), shop), Keyring(Path("/nonexistent"))).twins
    settings = Settings(canaries=config_keys.Canaries(tables=("shop.public.honey",)))
    canaries = Canaries(settings, State(Path("/nonexistent")), Mock(), Mock(), twins)
    assert all(canaries.guard(LOCAL, None, name) for name in ("pu", "shop", "shopw"))
    assert canaries.guard(LOCAL, None, "other") is None


def test_a_rotation_is_no_way_around_a_block_and_makes_no_canary_a_living_token(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    canary, bad, good = (home.token()[0] for _ in range(3))
    with home.config.open("a") as file:
        file.write(f"canaries: {{tokens: [{canary}]}}\n")
    store = State(home.folder / "state.db")
    Blocked(store).block({bad: Block("then", "it touched a canary")})
    store.close()
    for name, hint in ((canary, "revoke"), (bad, "unblock")):
        done = home("token", "rotate", name)
        assert (done.code, done.out) == (5, "")
        assert f"hint: mcpctl token {hint} {name}" in done.error
    done = home("token", "rotate", "--all", "--out", str(tmp_path / "new"))
    assert done.good.startswith(f"{good} replaced by ")
    assert f"token {bad} is blocked, and is left as it is" in done.err
    assert f"token {canary} is a canary, and is left as it is" in done.err
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_where_there_are_canaries_nothing_makes_an_empty_store_in_passing(tmp_path: Path) -> None:
    """Nor does a failed unblock anywhere else: whoever was blocked would be let in."""
    home = Home(tmp_path / "home", extra="canaries: {tables: [shop.public.honey]}\nown_databases: {hosts: [db.test]}\n")
    name, text = home.token()
    store = home.folder / "state.db"
    store.unlink()
    assert json.loads(home("token", "list", "--json").good)["tokens"][0]["status"] == "unknown"
    assert json.loads(home("token", "show", name, "--json").good)["status"] == "unknown"
    assert "nobody can say which tokens are" in home("token", "verify", stdin=text).out
    own = Own(config.load(home.config), Keyring(home.folder / "secret.key"), None)
    with pytest.raises(ConfigError, match="which tokens are blocked"):
        own.start()
    for command in (("token", "unblock", "ab12cd34"), ("key", "rotate"), ("doctor",), ("config", "check")):
        home(*command)
        assert not store.exists(), command
    assert home("token", "unblock", "ab12cd34").code == 3
    assert f"there is no {store}, which says" in home("config", "check").error
    done = home("token", "unblock", "--all", "--reason", "we lost it")
    assert done.code == 0
    assert f"there was no {store}: an empty one was made" in done.err
    last = lines(home.folder / "audit.jsonl")[-1]
    assert (last["event"], last.get("token")) == ("token.unblocked", None)
    assert last["reason"].startswith("every token, since state.db was gone and was made anew; we lost it; by ")
    assert store.exists()
    assert home("token", "unblock", "--all").err == ""
    assert json.loads(home("token", "show", name, "--json").good)["status"] == "active"
    bare = Home(tmp_path / "bare")
    (bare.folder / "state.db").unlink()
    assert bare("token", "unblock", "ab12cd34").code == 4
    assert not (bare.folder / "state.db").exists()


def test_what_cannot_be_a_canary_is_a_fault_of_the_config_and_a_token_that_is_gone_a_warning(tmp_path: Path) -> None:
    for number, (canaries, said) in enumerate(
        (
            ("{tables: [nowhere.public.t]}", "there is no database nowhere in the config"),
            ("{tables: [public.t]}", "takes tables such as shop.public.orders"),
            ("{tables: ['shop.public.*']}", "takes tables such as shop.public.orders"),
            ("{tokens: [mcp_aaaaaaaa_secret]}", "takes ids of tokens"),
        )
    ):
        home = Home(tmp_path / f"home{number}")
        with home.config.open("a") as file:
            file.write(f"canaries: {canaries}\n")
        done = home("config", "check")
        assert done.code == 3
        assert said in done.err
        assert "secret" not in done.err
    home = Home(tmp_path / "home", extra="canaries: {tokens: [zzzzzzzz]}\n")
    done = home("config", "check")
    assert done.code == 0, done.err
    assert "canaries.tokens names zzzzzzzz, and there is no such token" in done.err


def test_the_store_keeps_the_first_reason_and_one_of_the_first_form_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = State(path)
    assert store.rows("SELECT * FROM blocked") == []
    store.close()
    with sqlite3.connect(path) as connection:
        later = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'own_databases'"
        for (table,) in connection.execute(later).fetchall():
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    first, second = State(path, must_exist=True), State(path)
    one, two = Blocked(first), Blocked(second)
    one.block({"ab12cd34": Block("then", "one")})
    two.block({"ab12cd34": Block("later", "two"), "zz": Block("later", "two")})
    assert one.current() == {"ab12cd34": Block("then", "one"), "zz": Block("later", "two")}
    assert two.lift_all() == ["ab12cd34", "zz"]
    assert one.current() == {}
    for store in (first, second):
        store.close()
    path.unlink()
    with pytest.raises(ConfigError, match="which tokens are blocked"):
        one.current()
