"""mcpctl session: what each token has open in the running server, and its end while the token lives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import signed_in
from command_line import on_a_terminal
from site_of_mcpctl import Shop, Site, eventually, in_background


@pytest.fixture
def site(newest_shop: Shop, make_site: Callable[..., Site]) -> Iterator[Site]:
    return make_site(newest_shop).start()


def sessions(site: Site) -> dict[str, dict[str, Any]]:
    found = json.loads(site.run("session", "list", "--json").stdout)
    assert found["silent"] == []
    return {one["id"]: one for one in found["sessions"]}


def test_a_session_is_what_a_token_has_open(site: Site) -> None:
    (alice, token), (bob, other) = site.token("alice"), site.token("bob")
    assert sessions(site) == {}
    with site.client(token) as client, site.client(other) as second:
        client.rows("select 1")
        second.call("whoami")  # opens nothing
        assert set(sessions(site)) == {alice}
        running = in_background(second.call, "query_database", {"query": "select pg_sleep(20)"})
        eventually(lambda: site.shop.backends("state = 'active'"))
        found = sessions(site)
        assert set(found) == {alice, bob}
        assert (found[alice]["user"], found[alice]["running"], found[bob]["running"]) == ("alice", 0, 1)
        assert found[bob]["pools"] == ["shop"]
        assert found[bob]["addresses"] == ["127.0.0.1"]
        pids = {pid for pid, *_ in site.shop.backends("application_name <> 'mcpctl cut'")}
        assert {*found[alice]["backends"], *found[bob]["backends"]} <= pids
        assert len(found[bob]["backends"]) == 1
        assert found[alice]["since"] <= found[alice]["last_call"] <= found[bob]["last_call"]
        line = site.run("session", "list").stdout.splitlines()[-1].split("\t")
        assert (line[0], line[1], line[4], line[5]) == (bob, "bob", "1", "shop")
        site.run("session", "revoke", bob)
        running.result()


def test_an_ended_session_cuts_what_runs_and_the_next_call_begins_anew(site: Site) -> None:
    (alice, token), (bob, other) = site.token("alice"), site.token("bob")
    with site.client(token) as client, site.client(other) as second:
        running = in_background(client.call, "query_database", {"query": "select pg_sleep(25)"})
        others = in_background(second.call, "query_database", {"query": "select pg_sleep(25)"})
        eventually(lambda: len(site.shop.backends("state = 'active'")) == 2)
        done = site.run("session", "revoke", alice, "--reason", "runaway report")
        assert done.stdout == f"{alice}: closed\n"
        assert done.stderr.startswith("cut: 1 query, 0 backends left\n")
        assert "still valid" in done.stderr
        answer = running.result(10).json()["result"]
        assert answer["isError"]
        assert "your session was ended by an administrator" in answer["content"][0]["text"]
        assert client.rows("select 7") == [[7]]
        assert sessions(site)[bob]["running"] == 1
        site.run("session", "revoke", bob)
        others.result()
    lines = site.audit()
    closed = [line for line in lines if line["event"] == "session.closed"]
    assert [(line["token"], line["user"], line["transport"]) for line in closed] == [
        (alice, "alice", "cli"), (bob, "bob", "cli"),
    ]  # fmt: skip
    assert closed[0]["reason"].startswith("runaway report; by ")
    cut = [line for line in lines if line.get("outcome") == "cut"]
    assert [(line["event"], line["token"]) for line in cut] == [("tool.refused", alice), ("tool.refused", bob)]
    assert next(line["token"] for line in lines if line["event"] == "pool.closed") == alice


def test_a_call_that_will_not_be_cancelled_ends_with_its_session(site: Site) -> None:
    name, token = site.token()
    stubborn = "select count(*) from generate_series(1, 1000000000) a, generate_series(1, 1000) b"
    with site.client(token) as client:
        running = in_background(client.call, "query_database", {"query": stubborn})
        eventually(lambda: site.shop.backends("state = 'active'"))
        values = json.loads(site.run("session", "revoke", name, "--json").stdout)
        assert (values["closed"], values["cut"]["queries"], values["cut"]["backends_left"]) == ([name], 1, 0)
        running.result(10)
        assert site.shop.backends("state = 'active'") == []


def test_what_has_nothing_open_is_said_and_an_unknown_id_ends_nothing(site: Site) -> None:
    (name, token), (idle, _) = site.token("alice"), site.token("bob")
    with site.client(token) as client:
        client.rows("select 1")
        done = site.run("session", "revoke", "yyyyyyyy", "zzzzzzzz", check=False)
        assert (done.returncode, done.stdout) == (4, "")
        assert "there is no token zzzzzzzz" in done.stderr
        assert set(sessions(site)) == {name}
        assert site.run("session", "revoke", idle).stdout == f"{idle}: had nothing open\n"
        assert [line for line in site.audit() if line["event"] == "session.closed"] == []


def test_all_workers_end_their_part(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start("--workers", "2")
    name, token = site.token()

    def spread() -> bool:
        with site.client(token) as client:
            client.rows("select 1")
        return len(sessions(site)[name]["backends"]) >= 2

    eventually(spread, 30)
    assert json.loads(site.run("session", "revoke", name, "--json").stdout)["closed"] == [name]
    assert sessions(site) == {}


def test_without_a_server_there_are_no_sessions(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop)
    for arguments in (("list",), ("revoke", "abcdefgh")):
        done = site.run("session", *arguments, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "mcpctl: error: no server runs" in done.stderr


def test_a_terminal_of_80_columns_shows_each_session_in_one_line_and_no_id_or_user_is_cut(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    site = make_site(newest_shop, extra=signed_in.ENABLED)
    longest = "somebody-whose-name-is-as-long0"
    site.user(longest)
    for user in ("alice", longest):
        site.edit_user(user, password=signed_in.hashed())
    site.start()

    def shown() -> list[list[str]]:
        found = on_a_terminal(["--config", str(site.config), "session", "list"], {"NO_COLOR": "1"}, width=80).out
        assert max(len(line.rstrip()) for line in found.splitlines()) <= 80
        return [line.split() for line in found.splitlines()]

    (token, text), (name, _) = site.token(), signed_in.session(site)
    with site.client(text) as client:
        client.rows("select 1")
        head, *rows = shown()
        assert head == ["ID", "USER", "KIND", "LAST", "CALL", "RUNNING", "ADDRESSES"]
        assert [row[:3] for row in rows] == [[token, "alice", "token"], [name, "alice", "password"]]
        assert {row[-1] for row in rows} == {"127.0.0.1"}
        name, _ = signed_in.session(site, longest)
        assert [name, longest] in [row[:2] for row in shown()]


def test_a_terminal_shows_a_table(site: Site) -> None:
    name, token = site.token()
    with site.client(token) as client:
        client.rows("select 1")
        shown = on_a_terminal(["--config", str(site.config), "session", "list"]).out
    assert "LAST CALL" in shown
    assert name in shown
