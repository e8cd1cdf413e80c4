"""Databases that users bring: registered, bound to one user, asked read-only, removed and cut; on real PostgreSQL."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import pg
import site_of_mcpctl as site
from brought import (
    HANDED_OVER,
    ON,
    OWN_TOOLS,
    TWO,
    WORKER,
    MakeSite,
    do,
    dsn,
    everything_written,
    lines,
    refused,
    register,
    tools,
    users_of,
)
from mcpctl import private_file
from site_of_mcpctl import COMMAND, PASSWORD, READER, Client, Shop, Site, environment, eventually

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
NOBODY = 65534


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The shop on TCP, on the oldest and on the newest version: nobody brings a socket."""
    with site.shop(request.param, tcp=True) as found:
        yield found


@pytest.fixture(scope="module")
def newest_shop() -> Iterator[Shop]:
    with site.shop(pg.oldest_and_newest()[-1], tcp=True) as found:
        yield found


@pytest.fixture
def at(make_site: MakeSite, shop: Shop) -> Site:
    return users_of(make_site(shop, extra=ON, tcp=True)).start()


@pytest.fixture
def carol(at: Site) -> Iterator[Client]:
    with at.client(at.token("carol")[1]) as found:
        yield found


@pytest.fixture
def dave(at: Site) -> Iterator[Client]:
    with at.client(at.token("dave")[1]) as found:
        yield found


# -- asking it --------------------------------------------------------------------------------------------------------


def test_a_registered_database_is_asked_by_its_name_like_any_other(at: Site, shop: Shop, carol: Client) -> None:
    done = do(carol, "register_database", name="lab", dsn=dsn(shop))["registered"]
    assert (done["name"], done["host"], done["port"], done["user"]) == ("lab", "127.0.0.1", shop.cluster.port, READER)
    assert PASSWORD not in json.dumps(done)
    assert carol.rows("select current_user::text", database="lab") == [[READER]]
    assert do(carol, "get_schema_info", database="lab")["tables"]
    assert do(carol, "explain_query", query="select 1", database="lab")["plan"]
    both = do(carol, "query_database", query="select 1", databases=["shop", "lab"])["results"]
    assert [(one["database"], one["rows"]) for one in both] == [("shop", [[1]]), ("lab", [[1]])]
    listed = {one["name"]: one for one in do(carol, "list_databases")["databases"]}
    assert listed["lab"] == {"name": "lab", "default": False, "access": ["read"], "own": True}
    assert "own" not in listed["shop"]
    assert [one["name"] for one in do(carol, "list_my_databases")["databases"]] == ["lab"]
    assert "lab" in do(carol, "whoami")["databases"]
    do(carol, "query_database", query="select count(*) from orders", databases=["shop", "lab"])
    asked = lines(at, tool="query_database")
    assert [line["database"] for line in asked] == ["own:lab", "shop,own:lab", "shop,own:lab"]
    assert asked[-1]["relations"] == ["own:lab:public.orders", "shop:public.orders"]
    assert {line["database"] for line in lines(at, event="pool.opened")} == {"shop", "own:lab"}
    (registered,) = lines(at, tool="register_database")
    assert registered["database"] == "own:lab"
    assert f"{READER} at 127.0.0.1" in registered["reason"]


def test_it_is_only_read_and_within_the_same_limits(make_site: MakeSite, shop: Shop) -> None:
    at = users_of(make_site(shop, extra=ON + "limits: {max_rows: 2, statement_timeout: 500ms}\n", tcp=True)).start()
    with at.client(at.token("carol")[1]) as carol:
        do(carol, "register_database", name="lab", dsn=dsn(shop))
        assert "so it is no question" in carol.error("create table t (a int)", database="lab")
        found = carol.ask("select * from generate_series(1, 9)", database="lab")
        assert (found["row_count"], found["truncated"]) == (2, True)
        assert "57014" in carol.error("select pg_sleep(9)", database="lab")
        text = refused(carol, "execute_statement", statement="delete from orders", database="lab")
        assert "which is only read here" in text


def test_nobody_else_sees_names_uses_or_removes_it(at: Site, shop: Shop, carol: Client, dave: Client) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    nothing = dave.error("select 1", database="nothing")
    assert dave.error("select 1", database="lab") == nothing.replace("nothing", "lab")
    assert "own" not in json.dumps(do(dave, "list_databases"))
    assert do(dave, "list_my_databases") == {"databases": [], "count": 0}
    assert "you have no database 'lab'" in refused(dave, "remove_database", name="lab")
    with at.client(at.token(None)[1]) as service:
        assert "for you" in service.error("select 1", database="lab")
        assert "not the permission tools:list_my_databases" in refused(service, "list_my_databases")
    assert carol.rows("select 1", database="lab") == [[1]]


def test_two_users_may_call_different_databases_by_the_same_name(
    at: Site, shop: Shop, carol: Client, dave: Client
) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    with shop.admin() as connection:
        connection.execute("DROP DATABASE IF EXISTS dave")
        connection.execute("CREATE DATABASE dave")
    do(dave, "register_database", name="lab", dsn=dsn(shop, dbname="dave"))
    for _ in range(3):
        assert carol.rows("select current_database()::text", database="lab") == [["shop"]]
        assert dave.rows("select current_database()::text", database="lab") == [["dave"]]
    do(dave, "remove_database", name="lab")
    assert "for you" in dave.error("select 1", database="lab")
    assert carol.rows("select current_database()::text", database="lab") == [["shop"]]


def test_a_token_for_some_databases_neither_asks_nor_brings_nor_removes_others(
    at: Site, shop: Shop, carol: Client
) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    with at.client(at.token("carol", databases=("shop",))[1]) as narrow:
        assert "for you" in narrow.error("select 1", database="lab")
        assert do(narrow, "list_my_databases") == {"databases": [], "count": 0}
        assert "this token is for the databases shop" in refused(narrow, "remove_database", name="lab")
        assert "this token is for" in refused(narrow, "register_database", name="more", dsn=dsn(shop))
    with at.client(at.token("carol", databases=("lab",))[1]) as alone:
        assert alone.rows("select 1") == [[1]]
        assert do(alone, "list_my_databases")["count"] == 1
        assert "for you" in alone.error("select 1", database="shop")


# -- what is not registered -------------------------------------------------------------------------------------------


def test_what_cannot_be_registered_is_told_why_and_leaves_nothing(at: Site, shop: Shop, carol: Client) -> None:
    admin = shop.cluster.superuser_password
    for wanted, why in (
        ({"name": "lab", "dsn": dsn(shop, "wrong")}, "does not take that user with that password"),
        ({"name": "lab", "dsn": dsn(shop, admin, "postgres")}, "superuser"),
        ({"name": "lab", "dsn": dsn(shop, dbname="nothing")}, "no such database"),
        ({"name": "lab", "dsn": dsn(shop).replace(str(shop.cluster.port), "1")}, "no login was possible"),
        ({"name": "lab", "dsn": dsn(shop).replace("127.0.0.1", "127.0.0.2")}, "none of the hosts"),
        ({"name": "lab", "dsn": dsn(shop).replace("127.0.0.1", "localhost.invalid")}, "none of the hosts"),
        ({"name": "lab", "dsn": dsn(shop, None)}, "holds no password"),
        ({"name": "lab", "dsn": dsn(shop) + "?sslmode=disable"}, "not sslmode"),
        ({"name": "shop", "dsn": dsn(shop)}, "there is a database 'shop' already"),
        ({"name": "Lab!", "dsn": dsn(shop)}, "cannot be a database's name"),
    ):
        text = refused(carol, "register_database", **wanted)
        assert why in text, text
        assert PASSWORD not in text
        assert str(at.folder) not in text
    assert "takes no argument 'CANARY'" in refused(carol, "register_database", name="lab", dsn=dsn(shop), CANARY=1)
    assert not any("CANARY" in str(line) for line in at.audit())
    assert do(carol, "list_my_databases")["count"] == 0
    for name in ("a", "b", "c"):
        do(carol, "register_database", name=name, dsn=dsn(shop))
    assert "a user may have 3" in refused(carol, "register_database", name="d", dsn=dsn(shop))
    assert "already" in refused(carol, "register_database", name="a", dsn=dsn(shop))


def test_whether_a_database_is_a_tenants_does_not_show(at: Site, shop: Shop, carol: Client) -> None:
    def said() -> list[str]:
        return [refused(carol, "register_database", name="shop", dsn=dsn(shop)),
                refused(carol, "remove_database", name="shop")]  # fmt: skip

    before = said()
    at.run("tenant", "add", "acme", "--database", "shop")
    assert said() == before


def test_a_tenants_user_is_told_that_the_tenant_is_why_they_bring_none(at: Site, shop: Shop) -> None:
    at.run("tenant", "add", "acme", "--database", "shop")
    at.run("user", "add", "ann", "--tenant", "acme", "--role", "mcp-tools")
    with at.client(at.token("ann")[1]) as ann:
        told = refused(ann, "register_database", name="lab", dsn=dsn(shop))
    assert "you belong to a tenant" in told
    assert "only users" not in told


def test_no_password_is_kept_in_the_clear_anywhere(at: Site, shop: Shop, carol: Client) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    refused(carol, "register_database", name="lab", dsn=dsn(shop))
    assert carol.rows("select 1", database="lab") == [[1]]
    (at.folder / "shop.password").unlink()  # the config's own, which this test has not put there
    kept = everything_written(at) + "".join(at.stderr).encode()
    assert b"own:lab" in kept
    assert b"own secret" not in kept
    assert b"own%20secret" not in kept
    assert b"sealed:v1:" in kept


def test_a_connection_string_in_a_names_place_is_neither_logged_nor_repeated(
    at: Site, shop: Shop, carol: Client
) -> None:
    """A model mixes arguments up."""
    swapped, narrow = dsn(shop), at.client(at.token("carol", databases=("shop",))[1])
    with narrow:
        for client in (carol, narrow):
            for text in (
                refused(client, "register_database", name=swapped, dsn="lab"),
                refused(client, "remove_database", name=swapped),
                client.error("select 1", database=swapped),
                client.error("select 1", databases=["shop", swapped]),
                refused(client, "get_schema_info", database=swapped),
            ):
                assert "a database's name" in text or "no database of such a name" in text
                assert "own%20secret" not in text
    (at.folder / "shop.password").unlink()  # the config's own, which this test has not put there
    kept = everything_written(at) + "".join(at.stderr).encode()
    assert b"no database of such a name" in kept
    assert b"own%20secret" not in kept
    assert b"postgresql:" not in kept


def test_tools_show_only_where_the_config_names_hosts_and_only_to_users_who_may(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    off = users_of(make_site(newest_shop)).start()
    with off.client(off.token("carol")[1]) as carol:
        assert not OWN_TOOLS & tools(carol)
        assert "own_databases" in refused(carol, "list_my_databases")
        assert [one["name"] for one in do(carol, "list_databases")["databases"]] == ["shop"]
    on = users_of(make_site(newest_shop, extra=ON)).start()
    for user, expected in (("carol", OWN_TOOLS), ("alice", set()), (None, set())):
        with on.client(on.token(user)[1]) as client:
            assert OWN_TOOLS & tools(client) == expected, user


def test_without_leave_a_password_in_the_dsn_is_refused_and_the_command_line_named(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = users_of(make_site(newest_shop, extra=HANDED_OVER, tcp=True)).start()
    with at.client(at.token("carol")[1]) as carol:
        text = refused(carol, "register_database", name="lab", dsn=dsn(newest_shop))
        assert "stands in the conversation" in text
        assert "mcpctl database register carol lab" in text
        assert "mcpctl database register carol lab" in refused(
            carol, "register_database", name="lab", dsn=dsn(newest_shop, None)
        )
        assert do(carol, "list_my_databases")["count"] == 0


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_registers_shows_and_removes(make_site: MakeSite, shop: Shop) -> None:
    at = users_of(make_site(shop, extra=HANDED_OVER, tcp=True)).start()
    with at.client(at.token("carol")[1]) as carol:
        assert carol.rows("select 1") == [[1]]
        register(at, shop)
        assert carol.rows("select 1", database="lab") == [[1]]  # a server that runs knows at once
        shown = at.run("user", "show", "carol").stdout
        assert "own database lab" in shown
        running = site.in_background(carol.call, "query_database", {"query": "select pg_sleep(20)", "database": "lab"})
        eventually(lambda: shop.backends("state = 'active' AND query LIKE '%pg_sleep(20)%'"))
        done = at.run("database", "unregister", "carol", "lab")
        assert done.stdout.splitlines() == ["lab of carol removed", "cut: 1 query, 0 backends left"]
        text = running.result(5).json()["result"]["content"][0]["text"]
        assert text == "the database 'lab' was removed while the call ran"
        (line,) = (one for one in lines(at, tool="query_database") if one.get("reason") == text)
        assert (line["event"], line["outcome"]) == ("tool.refused", "cut")
        assert "for you" in carol.error("select 1", database="lab")
        assert carol.rows("select 1") == [[1]]
    assert at.run("database", "unregister", "carol", "lab", check=False).returncode == 4
    assert [line["database"] for line in lines(at, event="database.registered")] == ["own:lab"]
    assert [line["user"] for line in lines(at, event="database.unregistered")] == ["carol"]


def test_the_command_line_takes_no_password_in_its_arguments(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    words = ("database", "register", "carol", "lab", "--dsn")
    done = at.run(*words, dsn(newest_shop), check=False)
    assert done.returncode == 2
    assert "holds a password" in done.stderr
    assert "own%20secret" not in done.stderr
    done = at.run(*words, dsn(newest_shop, None), check=False)
    assert done.returncode == 2
    assert "--password-file" in done.stderr
    done = at.run("database", "register", "nobody", "lab", "--dsn", dsn(newest_shop, None), check=False)
    assert done.returncode == 4


def test_on_a_terminal_the_password_is_asked_for_without_echo(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [*COMMAND, "--config", str(at.config), "database", "register", "carol", "lab", "--dsn", dsn(newest_shop, None)],
        stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while b"password: " not in seen:
        seen += os.read(master, 4096)
    os.write(master, PASSWORD.encode() + b"\n")
    while b"registered for carol" not in seen:
        seen += os.read(master, 4096)
    assert done.wait(30) == 0
    os.close(master)
    assert PASSWORD.encode() not in seen


@needs_root
def test_root_s_password_file_is_read_before_root_is_given_up(
    make_site: MakeSite, newest_shop: Shop, tmp_path: Path
) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    for path in (at.folder, *at.folder.iterdir()):
        os.chown(path, 0 if path == at.config else NOBODY, NOBODY)
    given = tmp_path / "given"
    private_file.create(given, PASSWORD.encode() + b"\n")
    words = ("database", "register", "carol", "lab", "--dsn", dsn(newest_shop, None), "--password-file", str(given))
    assert at.run(*words).stdout.startswith("lab registered for carol")
    assert (at.folder / "state.db").stat().st_uid == NOBODY


# -- removal and the end of a user ------------------------------------------------------------------------------------


def test_removing_one_cuts_its_query_in_every_worker_and_leaves_the_others(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = users_of(make_site(newest_shop, extra=ON + TWO, tcp=True)).start()
    clients = [at.client(at.token("carol")[1]) for _ in range(5)]
    do(clients[0], "register_database", name="lab", dsn=dsn(newest_shop))
    do(clients[0], "register_database", name="kept", dsn=dsn(newest_shop))
    query = {"query": "select pg_sleep(30)", "database": "lab"}
    running = [site.in_background(client.call, "query_database", query) for client in clients[1:]]
    other = {"query": "select pg_sleep(2.5)", "database": "kept"}
    kept = site.in_background(clients[0].call, "query_database", other)
    eventually(lambda: len(newest_shop.backends("state = 'active' AND query LIKE '%pg_sleep%'")) == 5)
    with at.client(at.token("carol")[1]) as remover:
        do(remover, "remove_database", name="lab")
    for call in running:
        assert "was removed while the call ran" in call.result(3).json()["result"]["content"][0]["text"]
    assert kept.result(10).json()["result"]["isError"] is False
    eventually(lambda: not newest_shop.backends("query LIKE '%pg_sleep(30)%'"), 3)
    for client in clients:
        client.http.close()


def test_a_function_that_catches_the_cancel_is_cut_too(at: Site, shop: Shop, carol: Client) -> None:
    with shop.admin() as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION stubborn() RETURNS int LANGUAGE plpgsql AS $$ BEGIN LOOP BEGIN "
            "PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$"
        )
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    running = site.in_background(carol.call, "query_database", {"query": "select stubborn()", "database": "lab"})
    eventually(lambda: shop.backends("state = 'active' AND query LIKE '%stubborn()%'"))
    done = at.run("database", "unregister", "carol", "lab")
    assert "cut: 1 query, 0 backends left" in done.stdout
    assert "was removed while the call ran" in running.result(5).json()["result"]["content"][0]["text"]


def test_a_user_s_end_is_the_end_of_what_they_brought(at: Site, shop: Shop, carol: Client, dave: Client) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    do(dave, "register_database", name="lab", dsn=dsn(shop))
    assert "own database lab removed" in at.run("user", "remove", "carol", "--yes").stdout
    users_again = at.run("user", "add", "carol", "--role", WORKER)
    assert users_again.returncode == 0
    with at.client(at.token("carol")[1]) as again:
        assert do(again, "list_my_databases")["count"] == 0
        assert "for you" in again.error("select 1", database="lab")
    assert dave.rows("select 1", database="lab") == [[1]]
