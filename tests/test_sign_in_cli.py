"""Who is signed in, on the command line: sessions are listed and ended there, and end with their user's password."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from command_line import on_a_terminal
from mcpctl import config
from mcpctl.cli import signed_in as cli
from signed_in import ENABLED, PASSWORD, ask, events, hashed, session, sign_in
from site_of_mcpctl import Shop, Site, eventually, in_background

SLEEP = {"query": "select pg_sleep(25)"}


@pytest.fixture
def site(newest_shop: Shop, make_site: Callable[..., Site]) -> Site:
    site = make_site(newest_shop, extra=ENABLED)
    for name in ("alice", "bob"):
        site.edit_user(name, password=hashed())
    return site.start()


def listed(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.run("session", "list", "--json").stdout)
    return found


def signed_in(site: Site) -> list[str]:
    return [one["id"] for one in listed(site)["signed_in"]]


def lines(site: Site) -> dict[str, list[str]]:
    return {row.split("\t")[0]: row.split("\t") for row in site.run("session", "list").stdout.splitlines()}


def is_over(site: Site, text: str) -> bool:
    with site.client(text) as client:
        return client.call("whoami").status_code == 401


def test_the_list_has_who_is_signed_in_beside_the_tokens_that_have_something_open(site: Site) -> None:
    idle, _ = session(site, "bob")
    (name, text), (token, secret) = session(site), site.token("bob")
    with site.client(text) as client, site.client(secret) as other:
        client.rows("select 1")
        other.rows("select 1")
        found = lines(site)
        assert {*found} == {idle, name, token}
        assert (found[token][1], found[token][5], found[token][8:]) == ("bob", "shop", ["token", "", ""])
        assert (found[name][1], found[name][5], found[name][8]) == ("alice", "shop", "password")
        assert found[idle][1:9] == ["bob", *found[idle][2:4], "0", "", "", "127.0.0.1", "password"]
        assert found[idle][9].startswith(("59 min", "1 h"))
        values = listed(site)
    assert [one["id"] for one in values["sessions"]] == [name, token]
    assert {one["id"] for one in values["signed_in"]} == {idle, name}
    assert text not in json.dumps(values)
    assert "ENDS IN" in on_a_terminal(["--config", str(site.config), "session", "list"]).out


def test_a_revoked_session_is_over_for_good_and_loses_what_it_has_running(site: Site) -> None:
    (name, text), (_, other) = session(site), session(site)
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        eventually(lambda: site.shop.backends("state = 'active'"))
        begun = time.monotonic()
        done = site.run("session", "revoke", name, "--reason", "lost laptop")
        assert (done.stdout, done.stderr) == (f"{name}: ended\n", "cut: 1 query, 0 backends left\n")
        assert site.shop.backends("state = 'active'") == []
        assert running.result(10).status_code == 401
        assert time.monotonic() - begun < 5
    assert is_over(site, text)
    assert not is_over(site, other)
    again = site.run("session", "revoke", name)
    assert again.stdout == f"{name}: had ended already\n"
    closed = events(site, "session.closed")
    assert [(line["token"], line["user"], line["transport"]) for line in closed] == [(name, "alice", "cli")]
    assert closed[0]["reason"].startswith("lost laptop; by ")


def test_all_sessions_of_a_user_end_and_then_all_of_everybody(site: Site) -> None:
    opened = [session(site)[0], session(site)[0]]
    other, text = session(site, "bob")
    values = json.loads(site.run("session", "revoke", "--user", "alice", "--json").stdout)
    assert sorted(values["closed"]) == sorted(opened)
    assert (values["not_open"], values["cut"]["queries"]) == ([], 0)
    assert signed_in(site) == [other]
    assert site.run("session", "revoke", "--user", "alice").stdout == "alice is not signed in\n"
    assert site.run("session", "revoke", "--all").stdout == f"{other}: ended\n"
    assert is_over(site, text)
    assert site.run("session", "revoke", "--all").stdout == "nobody is signed in\n"


def test_sessions_and_tokens_may_be_named_together(site: Site) -> None:
    (name, _), (token, secret) = session(site), site.token("bob")
    with site.client(secret) as client:
        client.rows("select 1")
        done = site.run("session", "revoke", token, name)
        assert done.stdout == f"{name}: ended\n{token}: closed\n"
        assert "the tokens are still valid" in done.stderr
        assert client.rows("select 2") == [[2]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "--user or --all"), (("Sabcdefg", "--all"), 2, "--user or --all"),
        (("--user", "alice", "--all"), 2, "--user or --all"), (("Sabcdefg",), 4, "there is no session Sabcdefg"),
        (("--user", "nobody"), 4, "nobody"), (("zzzzzzzz",), 4, "there is no token zzzzzzzz"),
    ],
)  # fmt: skip
def test_what_is_not_there_ends_nothing(site: Site, arguments: tuple[str, ...], code: int, said: str) -> None:
    name, _ = session(site)
    done = site.run("session", "revoke", *arguments, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert signed_in(site) == [name]


def test_what_is_there_ends_although_another_id_is_not(site: Site) -> None:
    name, _ = session(site)
    done = site.run("session", "revoke", "Sabcdefg", name, check=False)
    assert (done.returncode, done.stdout) == (4, f"{name}: ended\n")
    assert signed_in(site) == []


def test_without_a_server_sessions_are_listed_and_ended_all_the_same(site: Site) -> None:
    (name, _), (other, text) = session(site), session(site)
    site.stop()
    assert {*lines(site)} == {name, other}
    done = site.run("session", "revoke", other)
    assert (done.stdout, done.stderr) == (f"{other}: ended\n", "no server runs\n")
    site.start()
    assert is_over(site, text)
    assert signed_in(site) == [name]


def test_another_password_ends_the_sessions_of_the_old_one(site: Site) -> None:
    (name, text), (_, other), (_, token) = session(site), session(site, "bob"), site.token()
    new = "a second phrase, quite as long"
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        eventually(lambda: site.shop.backends("state = 'active'"))
        done = site.run("user", "passwd", "alice", "--password-file", "-", input=f"{new}\n")
        assert done.stdout == "alice: password set\n"
        assert done.stderr == "1 session ended; cut: 1 query, 0 backends left\n"
        assert running.result(10).status_code == 401
    assert is_over(site, text)
    assert not is_over(site, other)
    assert not is_over(site, token)
    assert (sign_in(site).status_code, sign_in(site, password=new).status_code) == (401, 200)
    closed = events(site, "session.closed")
    assert [(line["token"], line["user"]) for line in closed] == [(name, "alice")]
    assert closed[0]["reason"].startswith("password of alice set; by ")
    assert site.run("user", "passwd", "alice", "--remove").stderr.startswith("1 session ended")
    assert sign_in(site, password=new).status_code == 401


def test_a_password_that_was_changed_by_hand_ends_its_sessions_within_a_second(site: Site) -> None:
    name, text = session(site)
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        eventually(lambda: site.shop.backends("state = 'active'"))
        begun = time.monotonic()
        site.edit_user("alice", password=hashed("a third phrase, of the same kind"))
        assert running.result(10).status_code == 401
        assert time.monotonic() - begun < 2
    assert is_over(site, text)
    site.edit_user("alice", password=hashed())
    assert not is_over(site, text), "it was the file alone that said so"
    refused = events(site, "auth.refused")
    assert {(line["token"], line["reason"]) for line in refused} == {(name, "its user's password was changed")}


def test_a_disabled_user_has_no_session_when_they_are_enabled_again(site: Site) -> None:
    (name, text), (other, theirs) = session(site), session(site, "bob")
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        eventually(lambda: site.shop.backends("state = 'active'"))
        done = site.run("user", "disable", "alice", "--reason", "left")
        assert done.stdout == "alice disabled\ncut: 1 query, 0 backends left\n"
        assert "1 session ended\n" in done.stderr
        assert running.result(10).status_code == 401
    assert is_over(site, text)
    site.run("user", "enable", "alice")
    assert is_over(site, text)
    assert (signed_in(site), is_over(site, theirs)) == ([other], False)
    assert [line["token"] for line in events(site, "session.closed")] == [name]
    assert sign_in(site).status_code == 200


def test_who_signs_in_while_they_are_being_disabled_is_signed_out_too(site: Site) -> None:
    name, text = session(site)
    found = config.load(site.config)
    assert cli.end_theirs(found, "alice", []) == [name], "it was opened after the command had read which there are"
    assert is_over(site, text)


def test_a_removed_user_leaves_no_session_to_whoever_comes_under_that_name(site: Site) -> None:
    name, text = session(site)
    done = site.run("user", "remove", "alice", "--yes")
    assert "1 session ended\n" in done.stderr
    assert is_over(site, text)
    site.run("user", "add", "alice", "--password-file", "-", input=f"{PASSWORD}\n")
    assert is_over(site, text)
    assert signed_in(site) == []
    assert [line["token"] for line in events(site, "session.closed")] == [name]


def test_what_cannot_be_ended_in_the_store_opens_nothing_and_is_said(site: Site) -> None:
    _, text = session(site)
    state = site.folder / "state.db"
    state.chmod(0o644)
    try:
        done = site.run("user", "disable", "alice")
        assert "the sessions of alice cannot be read" in done.stderr
    finally:
        state.chmod(0o600)
    assert is_over(site, text)


def test_a_session_of_a_site_that_has_turned_them_off_opens_nothing(site: Site) -> None:
    _, text = session(site)
    site.stop()
    site.limits = {**site.limits, "MCPCTL_AUTH__SESSIONS__ENABLED": "false"}
    site.start()
    assert is_over(site, text)
    assert ask(site, "DELETE", "/api/v1/auth", text).status_code == 404
