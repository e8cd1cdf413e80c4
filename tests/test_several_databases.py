"""query_database(databases=[…]): each source's rows under its name, and what goes wrong with one beside the others'."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.postgres.embedded import Binaries
from mcpctl.tools.query import MOST
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

TIMEOUT = 2.0
"""Seconds of statement_timeout in these sites; a call over several databases has two more."""
LATEST = TIMEOUT + 2 + 2
"""Seconds after which a call must have been answered, on a machine that is busy with other things."""
WHERE = "select current_database()::text as here, source from place"
ALL = ["one", "two", "three"]


@pytest.fixture(scope="module")
def shops(newest: Binaries) -> Iterator[tuple[Shop, Shop]]:
    """Two clusters. The first has the databases one and three, the second, which can be stopped or frozen, has two."""
    with site.shop(newest) as first, site.shop(newest) as second:
        for shop, names in ((first, ("one", "three")), (second, ("two",))):
            for name in names:
                _make(shop, name)
        yield first, second


def _make(shop: Shop, name: str) -> None:
    cluster = shop.cluster
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    dsn = cluster.dsn_for("postgres", cluster.superuser_password, name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            f"CREATE TABLE place AS SELECT '{name}'::text AS source; CREATE TABLE only_{name} (n int);"
            f"GRANT SELECT ON place, only_{name} TO shop_reader".encode()
        )


@pytest.fixture
def make(tmp_path: Path, shops: tuple[Shop, Shop]) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def one(limits: str = f"statement_timeout: {TIMEOUT:g}s") -> Site:
        places = (("one", shops[0]), ("two", shops[1]), ("three", shops[0]))
        more = "".join(
            f"  {name}: {{host: {shop.cluster.host}, port: {shop.cluster.port}, dbname: {name}, user: shop_reader,"
            " password_file: shop.password}\n"
            for name, shop in places
        )
        made.append(Site(tmp_path / "site", shops[0], database=more, extra=f"limits: {{{limits}}}\n").start())
        return made[-1]

    yield one
    for found in made:
        found.stop()
        assert not [line for line in found.stderr if "Traceback" in line], "".join(found.stderr)


@pytest.fixture
def at(make: Callable[..., Site]) -> Site:
    return make()


def _ask(client: Client, query: str, databases: list[str] = ALL, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.ask(query, databases=databases, **more)["results"]
    return found


def _last(at: Site) -> dict[str, Any]:
    return [line for line in at.audit() if line["event"].startswith("tool.")][-1]


def _calls(at: Site) -> int:
    return sum(line["event"].startswith("tool.") for line in at.audit())


def test_each_row_set_names_its_source_in_the_order_asked(at: Site) -> None:
    with at.client(at.token()[1]) as client:
        for asked in (ALL, ["three", "one", "two"], ["two"], ["two", "one", "two", "one"]):
            found = _ask(client, WHERE, asked)
            once = list(dict.fromkeys(asked))
            assert [one["database"] for one in found] == once
            assert [one["rows"] for one in found] == [[[name, name]] for name in once]
            assert all(one["columns"][0] == {"name": "here", "type": "text"} for one in found)
            assert all((one["row_count"], one["truncated"], "error" in one) == (1, False, False) for one in found)


def test_all_are_asked_at_the_same_time(at: Site) -> None:
    with at.client(at.token()[1]) as client:
        _ask(client, "select 1")
        begun = time.monotonic()
        found = _ask(client, "select 1 as one from pg_sleep(1.2)")
        assert [one["rows"] for one in found] == [[[1]]] * 3
        assert time.monotonic() - begun < 3 * 1.2


@contextlib.contextmanager
def _stopped(shop: Shop) -> Iterator[None]:
    shop.cluster.stop_server("immediate")
    try:
        yield
    finally:
        shop.cluster.start_server()


@contextlib.contextmanager
def _frozen(shop: Shop) -> Iterator[None]:
    """Its machine lost power: nothing of it runs, and no connection is closed."""
    shop.close()
    with shop.admin() as admin:
        rows = admin.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'").fetchall()
        pids = [shop.cluster.pid, *(row[0] for row in rows if row[0] != admin.info.backend_pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("known", [False, True], ids=["never asked before", "with open connections"])
@pytest.mark.parametrize("down", [_stopped, _frozen], ids=["is down", "hangs"])
def test_one_that_gives_no_answer_is_one_named_failure_beside_the_others_rows(
    at: Site, shops: tuple[Shop, Shop], down: Any, known: bool
) -> None:
    with at.client(at.token()[1]) as client:
        if known:
            _ask(client, WHERE)
        with down(shops[1]):
            for _ in range(2):
                begun = time.monotonic()
                one, two, three = _ask(client, WHERE)
                assert time.monotonic() - begun < LATEST
                assert (one["rows"], three["rows"]) == ([["one", "one"]], [["three", "three"]])
                assert two.keys() == {"database", "error"}
                assert two["database"] == "two"
            line = _last(at)
            assert (line["database"], line["outcome"], line["rows"]) == ("one,two,three", "partial", 2)
            assert line["reason"].startswith("two: ")
            assert {*line["relations"]} == {"one:public.place", "three:public.place"}
        eventually(lambda: _ask(client, WHERE)[1].get("rows") == [["two", "two"]], 20)


def test_one_that_is_too_slow_is_one_named_failure_beside_the_others_rows(at: Site) -> None:
    slow = (
        "select source, pg_sleep(case when current_database() = 'two' then 60 else 0 end) is null as slept from place"
    )
    with at.client(at.token()[1]) as client:
        begun = time.monotonic()
        one, two, three = _ask(client, slow)
        assert time.monotonic() - begun < LATEST
        assert (one["rows"], three["rows"]) == ([["one", False]], [["three", False]])
        assert two == {"database": "two", "error": "canceling statement due to statement timeout\nSQLSTATE: 57014"}
    assert (_last(at)["outcome"], _last(at)["reason"]) == ("partial", "two: SQLSTATE 57014")


def test_one_down_and_one_slow_leave_the_third(at: Site, shops: tuple[Shop, Shop]) -> None:
    slow = (
        "select source, pg_sleep(case when current_database() = 'one' then 60 else 0 end) is null as slept from place"
    )
    with at.client(at.token()[1]) as client, _stopped(shops[1]):
        begun = time.monotonic()
        found = _ask(client, slow)
        assert time.monotonic() - begun < LATEST
        assert ["error" in one for one in found] == [True, True, False]
        assert found[2]["rows"] == [["three", False]]
        assert "cannot be reached" in found[1]["error"]


def test_where_all_fail_the_line_says_so_and_repeats_nothing_that_postgresql_said(at: Site) -> None:
    with at.client(at.token()[1]) as client:
        found = _ask(client, "select 'secret'::int", ["one", "three"])
        assert all("secret" in one["error"] for one in found)
    line = _last(at)
    assert (line["event"], line["outcome"], line["reason"]) == (
        "tool.called", "error", "one: SQLSTATE 22P02; three: SQLSTATE 22P02",
    )  # fmt: skip


def test_a_call_leaves_one_line_with_all_its_databases_and_what_was_read_where(at: Site) -> None:
    with at.client(at.token()[1]) as client:
        before = _calls(at)
        _ask(client, WHERE, ["one", "two"])
        assert _calls(at) == before + 1
        line = _last(at)
        assert (line["database"], line["role"], line["rows"]) == ("one,two", "shop_reader", 2)
        assert line.get("backend_pid") is None
        assert (line["relations"], line["statement"]) == (["one:public.place", "two:public.place"], WHERE)
        _ask(client, "explain analyze table place", ["one", "two"])
        assert "relations" not in _last(at)  # which says that nobody knows
        _ask(client, WHERE, ["two"])
        assert (_last(at)["database"], _last(at)["relations"]) == ("two", ["public.place"])
        _ask(client, "table only_one", ["one", "two"])  # where it fails nobody knows what was read
        line = _last(at)
        assert (line["relations"], line["statement"]) == (["one:public.only_one", "two:?"], "table only_one")


def test_the_line_tells_of_its_own_call_whatever_the_token_asks_meanwhile(at: Site, shops: tuple[Shop, Shop]) -> None:
    slow = "select source, pg_sleep(case when current_database() = 'two' then 1 else 0 end) is null as slept from place"
    text = at.token()[1]
    with at.client(text) as client, at.client(text) as other:
        running = in_background(_ask, client, slow, ["one", "two"])
        eventually(lambda: shops[1].backends("state = 'active' AND query LIKE '%slept%'"))
        for _ in range(4):
            other.error("alter role shop_reader password 'x'", database="one")
        assert [one["row_count"] for one in running.result()] == [1, 1]
    line = _last(at)
    assert (line["relations"], line.get("statement")) == (["one:public.place", "two:public.place"], slow)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"database": "one", "databases": ["two"]}, "query_database takes database or databases, not both"),
        ({"databases": ["one", "nowhere", "two"]}, "there is no database 'nowhere' for you"),
        ({"databases": ["one", ""]}, "there is no default database"),
        ({"databases": ["one,two"]}, "there is no database of such a name for you"),
        ({"databases": []}, "takes 1 to 20 items"),
        ({"databases": ["one"] * (MOST + 1)}, "takes 1 to 20 items"),
        ({"databases": "one"}, "takes array of strings, not string"),
        ({"databases": [["one"]]}, "takes array of strings, and databases[0] is array"),
        ({"databases": ["one", None]}, "takes array of strings, and databases[1] is null"),
    ],
)
def test_what_cannot_be_asked_refuses_the_whole_call(at: Site, arguments: dict[str, Any], said: str) -> None:
    with at.client(at.token()[1]) as client:
        text = client.error(WHERE, **arguments)
        assert said in text
    assert (_last(at)["event"], _last(at)["outcome"], _last(at).get("rows")) == ("tool.refused", "refused", None)
    assert not [line for line in at.audit() if line["event"] == "pool.opened"], "nobody was asked"


def test_a_database_that_the_token_may_not_ask_refuses_the_call_and_only_that_name_is_said(at: Site) -> None:
    with at.client(at.token(databases=("one", "three"))[1]) as client:
        refused = client.error(WHERE, databases=["one", "two"])
        assert refused == "there is no database 'two' for you\nHint: list_databases shows those you may ask"
        assert refused.replace("'two'", "'four'") == client.error(WHERE, databases=["one", "four"])
        assert [one["rows"] for one in _ask(client, WHERE, ["three", "one"])] == [[["three"] * 2], [["one"] * 2]]


def test_the_bytes_of_an_answer_are_shared_out_among_the_databases(make: Callable[..., Site]) -> None:
    at = make("max_bytes: 30000")
    many = "select repeat('x', 100) as x from generate_series(1, 900)"
    with at.client(at.token()[1]) as client:
        alone = client.ask(many, database="one")
        assert alone["truncated"]
        found = _ask(client, many)
        assert all(one["truncated"] and "bytes were more than 10000" in one["note"] for one in found)
        share = [one["row_count"] for one in found]
        assert min(share) > 0
        assert max(share) <= alone["row_count"] / 3 + 1
        assert _last(at)["bytes"] <= 30000
        few = _ask(client, many, limit=5)
        assert [one["row_count"] for one in few] == [5, 5, 5]


def _sleeping(shops: tuple[Shop, Shop]) -> int:
    return sum(len(shop.backends("state = 'active' AND query LIKE '%sleep(61)%'")) for shop in shops)


def test_a_revocation_in_the_middle_ends_it_in_every_database(
    make: Callable[..., Site], shops: tuple[Shop, Shop]
) -> None:
    at = make("statement_timeout: 90s")
    name, text = at.token()
    with at.client(text) as client:
        arguments = {"query": "select pg_sleep(61)", "databases": ALL}
        running = in_background(client.call, "query_database", arguments)
        eventually(lambda: _sleeping(shops) == 3)
        done = at.run("token", "revoke", name)
        assert "cut: 3 queries, 0 backends left" in done.stdout
        assert running.result(5).status_code == 401
        eventually(lambda: _sleeping(shops) == 0, 1)
    lines = [line for line in at.audit() if line["event"].startswith("tool.")]
    assert [(line["event"], line["outcome"], line["database"]) for line in lines] == [
        ("tool.refused", "cut", "one,two,three")
    ]


def test_a_client_that_goes_away_ends_it_in_every_database(make: Callable[..., Site], shops: tuple[Shop, Shop]) -> None:
    at = make("statement_timeout: 90s")
    client = at.client(at.token()[1])
    client.http.timeout = 3.0
    running = in_background(client.call, "query_database", {"query": "select pg_sleep(61)", "databases": ALL})
    eventually(lambda: _sleeping(shops) == 3)
    with pytest.raises(Exception, match="timed out"):
        running.result()
    client.http.close()
    eventually(lambda: _sleeping(shops) == 0, 5)
    eventually(lambda: _calls(at) == 1)
    assert (_last(at)["outcome"], _last(at)["database"]) == ("cancelled", "one,two,three")


def test_a_budget_that_has_room_for_one_serves_three_one_after_the_other(make: Callable[..., Site]) -> None:
    at = make("connections: 2")
    with at.client(at.token()[1]) as client, at.client(at.token("bob")[1]) as other:
        running = in_background(_ask, other, WHERE, ["three", "two", "one"])
        assert [one["rows"] for one in _ask(client, WHERE)] == [[[name, name]] for name in ALL]
        assert [one["rows"] for one in running.result()] == [[[name, name]] for name in reversed(ALL)]
