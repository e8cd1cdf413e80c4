"""Pools where each user has a login role: a user's own limit, and many users under one budget."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import site_of_mcpctl as site
from mcpctl.postgres.embedded import Binaries
from site_of_mcpctl import Shop, Site, eventually, in_background
from two_tenants import Wire, all_at_once

SECONDS = float(os.environ.get("LOAD_SECONDS", "5"))
"""How long the load on one user's limit lasts."""
OPEN = "usename = 'mcp_{}_r'"


@pytest.fixture
def own(newest: Binaries) -> Iterator[Shop]:
    """A PostgreSQL whose users' logins come over the socket alone."""
    with site.shop(newest) as found:
        site.keep_out(found.cluster)
        yield found


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def one(shop: Shop, *users: str, **options: Any) -> Site:
        made.append(Site(tmp_path / "site", shop, per_user=True, **options))
        for user in users:
            if user not in ("alice", "bob"):
                made[-1].run("user", "add", user)
            made[-1].grant(user, "--schema", "public")
        return made[-1].start()

    yield one
    for found in made:
        found.stop()


def _count(shop: Shop, what: str) -> int:
    return int(shop.look(f"SELECT count(*) FROM pg_stat_activity WHERE {what}")[0][0])


_QUICK = ("select 1 as n", "select 1 as n from pg_sleep(0.02)", "select 1 as n from generate_series(1, 1)")


class Caller:
    """One client of a token, which asks as long as there is time, and keeps what went wrong."""

    def __init__(self, url: str, token: str, until: float, *queries: str) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._wire = Wire(url, token)
        self._until = until
        self._queries = queries or _QUICK

    def run(self) -> None:
        while time.monotonic() < self._until:
            begun = time.monotonic()
            query = self._queries[self.answered % len(self._queries)]
            failed, content, body = self._wire.call("query_database", {"query": query}, self.answered)
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.answered += 1
            if failed or content["rows"] != [[1]]:
                self.wrong.append(body)
        self._wire.close()


def test_the_tokens_of_a_user_share_the_users_limit_and_every_call_is_served(
    make: Callable[..., Site], own: Shop
) -> None:
    """Three tokens with four clients each, and three connections: nobody is refused, nobody starves, and PostgreSQL's
    own CONNECTION LIMIT is never met."""
    at = make(own, "alice", database="    pool: {max_per_user: 3, wait: 20s}\n")
    until = time.monotonic() + SECONDS
    callers = [[Caller(at.url, text, until) for _ in range(4)] for _, text in (at.token() for _ in range(3))]
    most: list[int] = []

    def watch() -> None:
        with own.admin() as admin:
            while time.monotonic() < until:
                query = f"SELECT count(*), pg_sleep(0.01) FROM pg_stat_activity WHERE {OPEN.format('alice')}"
                most.append(admin.execute(query.encode()).fetchall()[0][0])

    all_at_once(watch, *(caller.run for token in callers for caller in token))
    assert [wrong for token in callers for caller in token for wrong in caller.wrong] == []
    assert 2 <= max(most) <= 3 + 1, "those of the calls, and the one that is kept to end them"
    shares = [sum(caller.answered for caller in token) for token in callers]
    assert min(shares) > sum(shares) / 30, shares
    assert max(caller.slowest for token in callers for caller in token) < 15
    assert "too many connections" not in own.cluster.log()
    with own.admin() as admin:
        limit = admin.execute("SELECT rolconnlimit FROM pg_roles WHERE rolname = 'mcp_alice_r'").fetchall()
    assert limit == [(4,)]


def test_a_user_whose_own_limit_is_reached_holds_up_nobody_else(make: Callable[..., Site], own: Shop) -> None:
    at = make(own, "alice", "bob", database="    pool: {max_per_user: 1, wait: 20s}\n")
    with contextlib.ExitStack() as stack:
        alice = [stack.enter_context(at.client(at.token()[1])) for _ in range(3)]
        bob = stack.enter_context(at.client(at.token("bob")[1]))
        sleeper = in_background(alice[0].rows, "select pg_sleep(4)")
        eventually(lambda: _count(own, f"{OPEN.format('alice')} AND state = 'active'"))
        waiting = [in_background(one.rows, "select 1") for one in alice[1:]]
        eventually(lambda: _pools_opened(at) == 3)
        begun = time.monotonic()
        assert bob.rows("select 2") == [[2]]
        assert time.monotonic() - begun < 3
        assert _count(own, f"{OPEN.format('alice')} AND state = 'active'") == 1, "she sleeps still"
        assert sleeper.result() == [[""]]
        assert [one.result() for one in waiting] == [[[1]], [[1]]]


def _pools_opened(at: Site) -> int:
    """Calls that have come as far as a pool: each token opens its own once, before it asks for a connection."""
    return sum(line["event"] == "pool.opened" for line in at.audit())


@pytest.mark.parametrize("who", ["alice", "bob"])
def test_a_token_that_keeps_its_connections_busy_does_not_starve_another(
    make: Callable[..., Site], own: Shop, who: str
) -> None:
    """Neither one of the same user, at the user's limit, nor one of another user, at the budget of all."""
    limits = {"alice": "    pool: {max_per_user: 2, wait: 30s}\n", "bob": "    pool: {wait: 30s}\n"}
    at = make(own, "alice", "bob", database=limits[who], extra="limits: {connections: 4}\n")
    _, text = at.token()
    until = time.monotonic() + 8
    busy = [Caller(at.url, text, until, "select 1 as n from pg_sleep(0.2)") for _ in range(6)]
    with at.client(at.token(who)[1]) as other:
        running = [in_background(one.run) for one in busy]
        eventually(lambda: _count(own, f"{OPEN.format('alice')} AND state = 'active'") >= 2)
        begun = time.monotonic()
        assert other.rows("select 2") == [[2]]
        assert time.monotonic() - begun < 6
        for one in running:
            one.result(60)
    assert [wrong for caller in busy for wrong in caller.wrong] == []


def test_a_call_that_waits_for_its_users_limit_in_vain_is_told_so(make: Callable[..., Site], own: Shop) -> None:
    at = make(own, "alice", database="    pool: {max_per_user: 1, wait: 500ms}\n")
    with at.client(at.token()[1]) as first, at.client(at.token()[1]) as second:
        sleeper = in_background(first.rows, "select pg_sleep(3)")
        eventually(lambda: _count(own, f"{OPEN.format('alice')} AND state = 'active'"))
        said = second.error("select 1")
        assert "connections" in said
        assert "in use" in said
        assert sleeper.result() == [[""]]
        assert second.rows("select 1") == [[1]]


def test_many_users_share_a_budget_that_has_room_for_few_of_them(make: Callable[..., Site], own: Shop) -> None:
    """Each login keeps a connection to end the others with, so a budget of six has room for three users at once."""
    users = [f"user-{letter}" for letter in "abcdefghijkl"]
    at = make(own, *users, extra="limits: {connections: 6}\n")
    texts = {user: at.token(user)[1] for user in users}
    said: dict[str, list[Any]] = {user: [] for user in users}

    def ask(user: str) -> None:
        wire = Wire(at.url, texts[user])
        for number in range(5):
            query = "select session_user::text, pg_sleep(0.05) is null"
            failed, content, body = wire.call("query_database", {"query": query}, number)
            said[user].append(body if failed else content["rows"])
        wire.close()

    seconds = all_at_once(*(lambda user=user: ask(user) for user in users))  # type: ignore[misc]
    assert said == {user: [[[f"mcp_{user}_r", False]]] * 5 for user in users}
    assert seconds < 30
    eventually(lambda: _count(own, "usename LIKE 'mcp_user%'") <= 6)  # one that was told to end may be about to
