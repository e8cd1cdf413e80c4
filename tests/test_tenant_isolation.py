"""Tenants over HTTP, on real servers: each tool in its tenant's context, what errors and catalogs give away, and many
calls of two tenants at once."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pg
import site_of_mcpctl as site
import two_tenants
from mcpctl.identity import tenants
from mcpctl.tools.table import TOOLS
from site_of_mcpctl import Client, eventually, in_background
from two_tenants import ACME, ACME_X, HOUSES, KINDS, WIDGETS, Device, House, Town, traces

CALLS = int(os.environ.get("ISOLATION_CALLS", "6000"))
"""Calls of all clients together in the test of many at once; `make soak` has 20,000."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "query_database": {"query": "select owner from $TABLE limit 1"},
    "get_schema_info": {},
    "explain_query": {"query": "select owner from $TABLE"},
    "execute_statement": {"statement": "insert into $TABLE (note) values ('by a test') returning owner"},
    "database_health": {},
    "list_databases": {},
    "whoami": {},
}
"""What each tool is asked here; a tool that is missing is a fault of the first test."""
ASKING = [name for name in ARGUMENTS if TOOLS[name].ask is not None]
_OLDEST, _NEWEST = pg.oldest_and_newest()[0], pg.oldest_and_newest()[-1]
PLACES = list(dict.fromkeys([(_OLDEST, KINDS[0]), *((_NEWEST, kind) for kind in KINDS)]))


def _id(place: tuple[Any, str]) -> str:
    return f"{place[0]}, {place[1]}"


@pytest.fixture(scope="module", params=PLACES, ids=_id)
def town(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """The three tenants and a server, on the oldest and the newest PostgreSQL, of both kinds."""
    binaries, kind = request.param
    with site.shop(binaries) as shop:
        found = two_tenants.settle(tmp_path_factory.mktemp("town") / "site", shop, kind)
        found.site.start()
        yield found
        found.site.stop()
        assert not [line for line in found.site.stderr if "Traceback" in line], "".join(found.site.stderr)


def _arguments(tool: str, house: House) -> dict[str, Any]:
    return {name: value.replace("$TABLE", house.tables[0]) for name, value in ARGUMENTS[tool].items()}


def _result(client: Client, tool: str, arguments: dict[str, Any]) -> Any:
    answer = client.call(tool, arguments)
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def _text(client: Client, tool: str, arguments: dict[str, Any], *, fails: bool) -> str:
    result = _result(client, tool, arguments)
    assert result["isError"] is fails, result
    text: str = result["content"][0]["text"]
    return text


def _others(house: House) -> list[House]:
    return [one for one in HOUSES if one is not house]


BEYOND = [name for name, tool in TOOLS.items() if tool.access == "admin" or tool.own is not None]
"""Tools for what is the whole cluster's, or outside of it: a tenant has neither."""


def test_there_is_a_question_here_for_every_tool() -> None:
    assert {*ARGUMENTS, *BEYOND} == TOOLS.keys()


@pytest.mark.parametrize("tool", BEYOND)
def test_what_is_beyond_a_tenant_is_refused_and_names_nobody(town: Town, tool: str) -> None:
    with town.client(ACME) as client:
        given = dict.fromkeys(TOOLS[tool].required, "widgets")
        said = _text(client, tool, given, fails=True)
    assert [word for other in _others(ACME) for word in traces(said.replace("widgets", ""), of=other)] == []
    assert (town.site.audit()[-1]["outcome"], town.site.audit()[-1]["tenant"]) == ("refused", "acme")


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
@pytest.mark.parametrize("tool", ARGUMENTS)
def test_each_tool_answers_from_inside_the_tenant_and_names_nobody_else(town: Town, tool: str, house: House) -> None:
    with town.client(house) as client:
        result = _result(client, tool, _arguments(tool, house))
    assert not result["isError"], result
    assert [word for other in _others(house) for word in traces(json.dumps(result), of=other)] == []
    line = town.site.audit()[-1]
    assert (line["tool"], line["tenant"], line["user"], line["outcome"]) == (tool, house.name, house.user, "ok")
    if tool in ASKING:
        assert line["database"] == town.database(house)
        assert line["role"] == f"mcp_{house.user}_{'w' if tool == 'execute_statement' else 'r'}"


def test_what_speaks_of_the_caller_speaks_of_the_tenant(town: Town) -> None:
    for house in HOUSES:
        with town.client(house) as client:
            who = _result(client, "whoami", {})["structuredContent"]
            assert (who["user"], who["tenant"], who["databases"]) == (house.user, house.name, [town.database(house)])
            place = f"databases:{town.database(house)}:"
            assert {one for one in who["permissions"] if not one.startswith("tools:")} == {
                f"{place}read",
                f"{place}write",
            }
            listed = _result(client, "list_databases", {})["structuredContent"]
            assert listed == {
                "databases": [{"name": town.database(house), "default": True, "access": ["read", "write"]}],
                "count": 1,
            }
            assert _result(client, "database_health", {})["structuredContent"]["tenant"] == house.name
            tables = _result(client, "get_schema_info", {})["structuredContent"]["tables"]
            assert sorted(one["name"] for one in tables) == sorted(house.tables)


# -- naming another's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ASKING)
def test_a_database_of_another_tenant_is_as_one_that_does_not_exist(town: Town, tool: str) -> None:
    """The same words for both, but for the name that was typed; and nothing is written anywhere."""
    named = [town.database(one) for one in _others(ACME)] if town.apart else []
    with town.client(ACME) as client:
        said = {
            name: _text(client, tool, {**_arguments(tool, ACME), "database": name}, fails=True).replace(name, "$NAME")
            for name in (*named, "nowhere", "acme2", "acm", "ACME", "acme ", "template1", "postgres", "*")
        }
    assert [line["outcome"] for line in town.site.audit()[-len(said) :]] == ["refused"] * len(said)
    no_names = {said.pop(name) for name in ("ACME", "acme ", "*")}
    assert no_names == {"there is no database of such a name for you\nHint: list_databases shows those you may ask"}
    assert set(said.values()) == {"there is no database '$NAME' for you\nHint: list_databases shows those you may ask"}


@pytest.fixture(scope="module")
def sam(town: Town) -> Iterator[Client]:
    """Somebody of no tenant, without a grant."""
    town.site.run("user", "add", "sam", "--role", "mcp-tools")
    with town.site.client(town.site.token("sam", databases=None)[1]) as client:
        yield client


@pytest.mark.parametrize("tool", ASKING)
def test_who_belongs_to_no_tenant_learns_of_none(town: Town, sam: Client, tool: str) -> None:
    """A tenant's database, another one without a grant, and one that is not there: the same words."""
    ways = ["database", "databases"] if "databases" in TOOLS[tool].properties else ["database"]
    names = [*dict.fromkeys(town.database(one) for one in HOUSES), "shop", "nowhere"]
    said = {
        _text(sam, tool, {**_arguments(tool, ACME), way: name if way == "database" else [name]}, fails=True)
        .replace(f"'{name}'", "$NAME")
        for way in ways
        for name in names
    }  # fmt: skip
    assert said == {"there is no database $NAME for you\nHint: list_databases shows those you may ask"}
    assert _text(sam, tool, _arguments(tool, ACME), fails=True).startswith("there is no default database")


def test_of_several_databases_one_of_another_tenant_refuses_the_call(town: Town) -> None:
    other = town.database(WIDGETS) if town.apart else "nowhere"
    with town.client(ACME) as client:
        arguments = {"query": "select owner from acme_users", "databases": [town.database(ACME), other]}
        said = _text(client, "query_database", arguments, fails=True)
    assert said.splitlines()[0] == f"there is no database '{other}' for you"


@pytest.mark.parametrize("tool", ARGUMENTS)
def test_no_argument_chooses_the_tenant(town: Town, tool: str) -> None:
    with town.client(ACME) as client:
        for name in ("tenant", "user", "role", "token", "tenant_id"):
            arguments = {**_arguments(tool, ACME), name: WIDGETS.name}
            assert f"{tool} takes no argument '{name}'" in _text(client, tool, arguments, fails=True)
        client.http.headers.update({"X-Tenant": "widgets", "X-Tenant-ID": "widgets", "X-MCP-User": "wil"})
        result = _result(client, tool, _arguments(tool, ACME))
    assert traces(json.dumps(result), of=WIDGETS) == []
    assert town.site.audit()[-1]["tenant"] == "acme"


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_another_tenants_schema_or_table_is_refused_and_only_what_was_typed_is_named(town: Town, house: House) -> None:
    with town.client(house) as client:
        for other in _others(house):
            for table in (*other.tables, *(f"{other.place}.{one}" for one in other.tables)):
                said = [
                    _text(client, "query_database", {"query": f"select * from {table}"}, fails=True),
                    _text(client, "explain_query", {"query": f"select * from {table}"}, fails=True),
                    _text(
                        client, "execute_statement", {"statement": f"insert into {table} default values"}, fails=True
                    ),
                    _text(client, "execute_statement", {"statement": f"delete from {table}"}, fails=True),
                    _text(client, "get_schema_info", {"table": table}, fails=True),
                ]
                for text in said:
                    beyond = {*traces(text, of=other)} - {*re.split(r"\W+", table), other.name}
                    assert not beyond, text
            schema = _text(client, "get_schema_info", {"schema": other.place}, fails=True)
            assert schema.replace(other.place, "$S") == _text(
                client, "get_schema_info", {"schema": "nowhere"}, fails=True
            ).replace("nowhere", "$S")


def _hostile(other: House) -> list[str]:
    table = f"{other.place}.{other.tables[0]}"
    return [
        f"select set_config('role', 'mcp_{other.user}_r', false)",
        f"select set_config('session_authorization', 'mcp_{other.user}_r', false)",
        f"select query_to_xml('select * from {table}', true, false, '')",
        f"select table_to_xml('{table}'::regclass, true, false, '')",
        f"select database_to_xml(true, false, ''), pg_get_userbyid(1) from {table}",
        f"select count(*) from {table} where note = (select max(note) from {table})",
        f"with x as (select set_config('search_path', '{other.place}', true)) select * from x, {other.tables[0]}",
        f"select pg_terminate_backend(pid) from pg_stat_activity where usename = 'mcp_{other.user}_r'",
        f"select currval('{other.place}.{other.tables[0]}_id_seq')",
        "select pg_read_file('postgresql.conf')",
    ]


def test_no_question_reaches_the_rows_the_role_or_the_backends_of_another_tenant(town: Town) -> None:
    with town.client(WIDGETS) as theirs:
        sleeper = in_background(theirs.rows, "select owner, pg_sleep(3) from widgets_orders where id = 1")
        with town.client(ACME) as client:
            eventually(lambda: town.shop.cluster and _active(town, "mcp_wil_r"))
            for query in _hostile(WIDGETS):
                said = _text(client, "query_database", {"query": query}, fails=True)
                assert "widgets's" not in said
            seen = client.rows("select query from pg_stat_activity where usename = 'mcp_wil_r'")
            assert {row[0] for row in seen} <= {"<insufficient privilege>"}
        assert sleeper.result() == [["widgets", ""]]


def _active(town: Town, role: str) -> int:
    query = "select count(*) from pg_stat_activity where state = 'active' and usename = %s"
    return int(town.shop.look(query, role)[0][0])


def test_the_catalogs_hide_the_tables_of_another_database_and_not_those_of_another_schema(town: Town) -> None:
    """So `tenant add` says it: names show within one database, and within one cluster the databases' names."""
    with town.client(ACME) as client:
        names = {row[0] for row in client.rows("select relname from pg_class where relkind = 'r'")}
        statistics = client.rows("select tablename from pg_stats where tablename like 'widgets%'")
        databases = {row[0] for row in client.rows("select datname from pg_database")}
    assert ({*WIDGETS.tables} <= names) is not town.apart
    assert statistics == [], "what is in the rows does not show in either"
    if town.apart:
        assert {"widgets", "acme_x"} <= databases
        assert "the names of its databases and roles show to all" in town.said["acme"]
    else:
        assert "names of all schemas, tables and columns" in town.said["acme"]


@pytest.mark.newest
def test_health_names_nothing_that_another_tenant_runs_or_has(town: Town) -> None:
    with town.client(WIDGETS) as theirs:
        sleeper = in_background(theirs.rows, "select owner, pg_sleep(2) from widgets_orders where id = 1")
        eventually(lambda: _active(town, "mcp_wil_r"))
        with town.client(ACME) as client:
            said = _text(client, "database_health", {}, fails=False)
        assert traces(said, of=WIDGETS) == []
        assert "pg_sleep" not in said
        sleeper.result()


# -- the same data, or another ----------------------------------------------------------------------------------------


def test_two_devices_of_a_tenant_see_each_others_writes_and_no_other_tenant_does(town: Town) -> None:
    word = f"written at {time.time_ns()}"
    with town.client(ACME, 0) as first, town.client(ACME, 1) as second, town.client(WIDGETS) as stranger:
        before = stranger.rows("select count(*) from widgets_inventory")
        made = f"insert into acme_users (device, note) values (0, '{word}') returning owner"
        assert _result(first, "execute_statement", {"statement": made})["structuredContent"]["rows"] == [["acme"]]
        assert second.rows(f"select owner, device from acme_users where note = '{word}'") == [["acme", 0]]
        changed = f"update acme_users set device = 1 where note = '{word}'"
        assert not _result(second, "execute_statement", {"statement": changed})["isError"]
        assert first.rows(f"select owner, device from acme_users where note = '{word}'") == [["acme", 1]]
        assert stranger.rows("select count(*) from widgets_inventory") == before
        assert stranger.rows(f"select note from widgets_inventory where note = '{word}'") == []
        assert first.rows("select pg_backend_pid()") != second.rows("select pg_backend_pid()")


def test_a_grant_beyond_the_tenant_is_not_made(town: Town) -> None:
    where = ["--database", "widgets"] if town.apart else ["--database", "shop", "--schema", "widgets"]
    for more in (where, ["--database", "shop", "--schema", "public"], [*where, "--table", "widgets.widgets_orders"]):
        done = town.site.run("user", "grant", "ann", *more, "--access", "read", "--apply", check=False)
        assert done.returncode == 2, done.stderr
        assert "the tenant acme has" in done.stderr
    with town.client(ACME) as client:
        assert _result(client, "whoami", {})["structuredContent"]["databases"] == [town.database(ACME)]


def test_a_tenant_that_moves_cuts_what_runs_and_one_that_is_gone_lets_nobody_in(town: Town) -> None:
    file = tenants.tenant_file(town.site.folder / "tenants.yaml")
    own = file.current()["acme-x"]
    with town.client(ACME_X) as client, town.client(ACME) as other:
        running = in_background(client.call, "query_database", {"query": "select pg_sleep(60)"})
        eventually(lambda: _active(town, "mcp_xen_r"))
        with file.edit() as entries:
            entries["acme-x"] = replace(own, database="shop", schema="nowhere")
        assert "was taken or narrowed" in running.result(5).text
        eventually(lambda: not _active(town, "mcp_xen_r"), 3)
        assert client.call("query_database", {"query": "select owner from acme_x_users"}).json()["result"]["isError"]
        with file.edit() as entries:
            del entries["acme-x"]
        asked = {"query": "select 1"}
        assert {one.call("query_database", asked).status_code for one in (client, other)} == {503}
        with file.edit() as entries:
            entries["acme-x"] = own
        assert client.rows("select owner from acme_x_users limit 1") == [["acme-x"]]
        assert other.rows("select owner from acme_users limit 1") == [["acme"]]


# -- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_calls_of_two_tenants_at_once_every_answer_is_the_right_tenants(
    kind: str, newest: Any, tmp_path: Path
) -> None:
    """Four clients, two of each tenant: questions, errors, writes, and leaving in the middle."""
    with site.shop(newest) as shop:
        town = two_tenants.settle(tmp_path / "site", shop, kind)
        town.site.start()
        try:
            devices = [Device(town, house, number, 10 * number + at) for at, house in enumerate((ACME, WIDGETS))
                       for number in range(2)]  # fmt: skip
            share = CALLS // len(KINDS) // len(devices)
            seconds = two_tenants.all_at_once(*(lambda one=one: one.run(share) for one in devices))  # type: ignore[misc]
            assert [wrong for device in devices for wrong in device.wrong] == []
            _check_writes(town, devices)
            _check_lines(town, devices, share)
            rounds = two_tenants.cost(town, tmp_path / "shared", max(400, CALLS // 50), rounds=1)
        finally:
            town.site.stop()
    ratio = sorted(apart / one for apart, one in rounds)[len(rounds) // 2]
    print(f"\n{share * len(devices)} calls, {kind}: {share * len(devices) / seconds:.0f} a second; the same questions "
          f"take {ratio:.2f} of the time that they take over one shared pool")  # fmt: skip
    assert not [line for line in town.site.stderr if "Traceback" in line]


def _check_writes(town: Town, devices: list[Device]) -> None:
    """What was said to be written is there, once, in its own tenant's table, and nothing else is."""
    for house in (ACME, WIDGETS):
        with town.admin(house) as admin:
            found = dict(admin.execute(f"select device, count(*) from {house.tables[0]} where device is not null"
                                       " group by 1".encode()).fetchall())  # fmt: skip
        assert found == {one.number: one.written for one in devices if one.house is house and one.written}


def _check_lines(town: Town, devices: list[Device], share: int) -> None:
    """Each call has its one line, with its own tenant and role."""
    eventually(lambda: len(_called(town)) == share * len(devices), 20)
    lines = _called(town)
    counted = Counter((line["tenant"], line["user"], line["token"]) for line in lines)
    assert set(counted.values()) == {share}
    for line in lines:
        house = next(one for one in HOUSES if one.name == line["tenant"])
        assert line["user"] == house.user
        if line.get("role") is not None:
            assert line["role"] in (f"mcp_{house.user}_r", f"mcp_{house.user}_w")


def _called(town: Town) -> list[dict[str, Any]]:
    return [line for line in town.site.audit() if line["event"] in ("tool.called", "tool.refused")]
