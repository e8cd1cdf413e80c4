"""Revocation reaches the running query: by every way in which a token can end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

import site_of_mcpctl as site
from mcpctl.identity import tokens
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

MakeSite = Callable[..., Site]
STUBBORN = """
CREATE OR REPLACE FUNCTION stubborn() RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  LOOP
    BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END;
  END LOOP;
END $$
"""


def _sleeping(shop: Shop, what: str = "pg_sleep(60)") -> list[int]:
    """Pids of the reader's backends that run that statement."""
    return [row[0] for row in shop.backends(f"state = 'active' AND query LIKE '%{what}%'")]


def _start_sleeping(shop: Shop, client: Client, query: str = "select pg_sleep(60)") -> tuple[site.Background, int]:
    before = set(_sleeping(shop, "pg_sleep(60)" if "sleep" in query else "stubborn"))
    running = in_background(client.call, "query_database", {"query": query})
    found = eventually(lambda: set(_sleeping(shop, "pg_sleep(60)" if "sleep" in query else "stubborn")) - before)
    return running, found.pop()


def _gone(shop: Shop, pid: int, seconds: float = 1.0) -> float:
    begun = time.monotonic()
    eventually(lambda: pid not in [row[0] for row in shop.backends()], seconds)
    return time.monotonic() - begun


class Other:
    """B, who asks all the time and must lose nothing."""

    def __init__(self, at: Site) -> None:
        self._client = at.client(at.token("bob")[1])
        self._stop = False
        self.asked = 0
        self._work = in_background(self._run)

    def _run(self) -> None:
        while not self._stop:
            assert self._client.rows("select 42") == [[42]]
            self.asked += 1
            time.sleep(0.02)

    def end(self) -> int:
        self._stop = True
        self._work.result()
        self._client.http.close()
        return self.asked


@pytest.mark.parametrize("workers", [1, 2])
def test_a_revoked_token_is_refused_and_its_running_query_gone_within_a_second(
    make_site: MakeSite, shop: Shop, workers: int
) -> None:
    at = make_site(shop).start("--workers", str(workers))
    other = Other(at)
    took = []
    for _ in range(5):
        name, text = at.token()
        with at.client(text) as a, at.client(text) as again:
            running, pid = _start_sleeping(shop, a)
            done = at.run("token", "revoke", name, "--reason", "a test")
            assert again.call("whoami").status_code == 401
            took.append(_gone(shop, pid))
            assert running.result(5).status_code == 401
            assert done.stdout == f"{name} revoked\ncut: 1 query, 0 backends left\n"
            assert "cut: 0 queries, 0 backends left" in at.run("token", "revoke", name).stdout
    assert other.end() > 5
    assert max(took) < 1
    events = [line["event"] for line in at.audit()]
    assert events.count("token.revoked") == 5
    assert any("1 query cancelled, 0 backends left" in line.get("reason", "") for line in at.audit())


@pytest.mark.newest
def test_a_token_is_cut_by_expiry_removal_and_the_end_of_an_overlap(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop).start()
    other = Other(at)
    for how in ("expiry", "remove", "overlap", "edit"):
        name, text = at.token(seconds=3 if how == "expiry" else 3600)
        with at.client(text) as a, at.client(text) as again:
            running, pid = _start_sleeping(shop, a)
            ends = at.tokens.current()[name].expires_at
            assert ends is not None
            if how == "remove":
                assert "cut: 1 query, 0 backends left" in at.run("token", "remove", name, "--yes").stdout
            elif how == "overlap":
                now = datetime.now(UTC)
                old, _, fresh = tokens.rotate(at.tokens, name, timedelta(seconds=2.5), None, now)
                assert old.expires_at is not None
                ends = old.expires_at
                with at.client(fresh) as new:
                    assert new.rows("select 1") == [[1]]
                assert again.call("whoami").status_code == 200
            elif how == "edit":
                path = at.folder / "tokens.yaml"
                edited = path.with_suffix(".new")  # as editors do: the old file is there until the new one is whole
                edited.touch(0o600)
                edited.write_text("".join(line for line in path.read_text().splitlines(True) if name not in line))
                edited.replace(path)
            if how in ("expiry", "overlap"):
                eventually(lambda ends=ends: datetime.now(UTC) >= ends)
            assert again.call("whoami").status_code == 401, how
            _gone(shop, pid)
            assert running.result(5).status_code == 401
            if how in ("expiry", "overlap"):
                eventually(lambda name=name: ("token.expired", name) in [(e["event"], e["token"]) for e in _named(at)])
                done = at.run("token", "revoke", name).stdout
                assert done == f"{name} revoked\ncut: 0 queries, 0 backends left\n"  # it was expiry that cut it
    assert other.end() > 5


def _named(at: Site) -> list[dict[str, Any]]:
    return [line for line in at.audit() if "token" in line]


def test_a_function_that_catches_the_cancel_is_terminated(make_site: MakeSite, shop: Shop) -> None:
    _stubborn(shop)
    at = make_site(shop).start()
    name, text = at.token()
    with at.client(text) as a:
        running, pid = _start_sleeping(shop, a, "select stubborn()")
        begun = time.monotonic()
        done = at.run("token", "revoke", name)
        _gone(shop, pid, max(0.05, 1.5 - (time.monotonic() - begun)))
        assert running.result(5).status_code == 401
        assert "cut: 1 query, 0 backends left" in done.stdout


UNENDING = "select stubborn() from (select set_config('client_connection_check_interval', '0', true)) x"
"""Outlives a cancel, a timeout and a closed socket: only a terminate ends it."""


def _stubborn(shop: Shop) -> None:
    with shop.admin() as admin:
        admin.execute(STUBBORN)
        admin.execute("GRANT EXECUTE ON FUNCTION stubborn() TO shop_reader")


@contextlib.contextmanager
def _all_taken(shop: Shop) -> Iterator[None]:
    """The role has no connection left to give."""
    with shop.admin() as admin:
        admin.execute("ALTER ROLE shop_reader CONNECTION LIMIT 1")
        try:
            yield
        finally:
            admin.execute("ALTER ROLE shop_reader CONNECTION LIMIT 60")


@pytest.mark.parametrize("query", ["select pg_sleep(60)", "select stubborn()", UNENDING])
def test_a_token_is_cut_though_its_role_has_no_connection_left(make_site: MakeSite, shop: Shop, query: str) -> None:
    _stubborn(shop)
    at = make_site(shop).start()
    name, text = at.token()
    with at.client(text) as a:
        running, pid = _start_sleeping(shop, a, query)
        with _all_taken(shop):
            done = at.run("token", "revoke", name)
            assert "cut: 1 query, 0 backends left" in done.stdout
            _gone(shop, pid)
        assert running.result(5).status_code == 401


def test_a_backend_that_outlives_the_cut_is_ended_as_soon_as_the_role_has_a_connection(
    make_site: MakeSite, shop: Shop
) -> None:
    """The connection that is kept to end others with was ended itself, and no other can be had."""
    _stubborn(shop)
    at = make_site(shop).start()
    name, text = at.token()
    with at.client(text) as a:
        running, pid = _start_sleeping(shop, a, UNENDING)
        with _all_taken(shop):
            with shop.admin() as admin:
                kept = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mcpctl cut'"
                assert admin.execute(kept).fetchall()
            done = at.run("token", "revoke", name)
            assert f"1 backend left (pid {pid})" in done.stdout
        _gone(shop, pid, 3)
        assert running.result(5).status_code == 401
    eventually(lambda: [line for line in at.audit() if f"backend {pid} is gone" in line.get("reason", "")])


def test_no_call_begins_without_the_connection_that_could_end_it(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop).start()
    with at.client(at.token()[1]) as a:
        assert a.rows("select 1") == [[1]]
        with shop.admin() as admin, _all_taken(shop):
            kept = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mcpctl cut'"
            assert admin.execute(kept).fetchall()
            eventually(lambda: not shop.backends("application_name = 'mcpctl cut'"))
            # The server hears of its end a moment after PostgreSQL has written it down.
            eventually(lambda: "takes no further connection" in a.call("query_database", {"query": "select 1"}).text)
        assert a.rows("select 1") == [[1]]
        assert len(shop.backends("application_name = 'mcpctl cut'")) == 1
    at.stop()
    eventually(lambda: not shop.backends())


def test_calls_that_wait_are_cut_with_those_that_run_and_say_so(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, database="    pool: {max_size: 2}\n").start()
    name, text = at.token()
    clients = [at.client(text) for _ in range(6)]
    running = [in_background(one.call, "query_database", {"query": "select pg_sleep(60)"}) for one in clients]
    eventually(lambda: len(_sleeping(newest_shop)) == 2)
    assert "cut: 2 queries, 0 backends left" in at.run("token", "revoke", name).stdout
    assert [one.result(5).status_code for one in running] == [401] * 6
    for client in clients:
        client.http.close()
    lines = [line for line in at.audit() if line["event"].startswith("tool.")]
    assert [(line["event"], line["outcome"]) for line in lines] == [("tool.refused", "cut")] * 6


KILLER = """
CREATE OR REPLACE FUNCTION killer() RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_config('client_connection_check_interval', '0', false);
  LOOP
    BEGIN
      PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE usename = current_user AND pid <> pg_backend_pid();
      PERFORM pg_sleep(0.002), pg_stat_clear_snapshot();
    EXCEPTION WHEN query_canceled THEN NULL;
    END;
  END LOOP;
END $$
"""


def test_a_function_that_ends_every_other_connection_of_its_role_is_ended(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    shop = newest_shop
    with shop.admin() as admin:
        admin.execute(KILLER)
        admin.execute("GRANT EXECUTE ON FUNCTION killer() TO shop_reader")
        at = make_site(shop).start()
        name, text = at.token()
        with at.client(text) as a:
            running = in_background(a.call, "query_database", {"query": "select killer()"})
            eventually(lambda: shop.backends("query LIKE '%killer%'"))
            at.run("token", "revoke", name)
            try:
                eventually(lambda: not shop.backends("query LIKE '%killer%'"), 60)  # each try races it, and has 2 ms
            finally:  # else it would end the other tests' connections, too
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^select killer'")
            assert running.result(5).status_code == 401


WAYS = (
    "revoke",
    "remove",
    "expiry",
    "overlap",
    "revoke, no connection left",
    "expiry, no connection left",
    "revoke what catches the cancel",
    "overlap of what catches the cancel",
    "remove what catches the cancel, no connection left",
    "revoke what outlives a closed socket, no connection left",
)


@pytest.mark.newest
def test_a_frozen_backend_is_remembered_until_it_has_ended(make_site: MakeSite, shop: Shop) -> None:
    """After its call has timed out too: a revocation names it then, and the log says when it is gone."""
    at = make_site(shop, extra="limits: {statement_timeout: 200ms}\n").start()
    token_id, token = at.token()
    with at.client(token) as a:
        pid = a.rows("select pg_backend_pid()")[0][0]
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "statement timeout" in a.error("select 1")
            assert a.rows("select 2") == [[2]]
            assert f"1 backend left (pid {pid})" in at.run("token", "revoke", token_id).stdout
        finally:
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: any(f"backend {pid} is gone" in str(line.get("reason")) for line in at.audit()))
    assert not shop.backends(f"pid = {pid}")


def test_a_frozen_backend_is_remembered_after_a_reload(make_site: MakeSite, newest_shop: Shop) -> None:
    """One of a token that was revoked before it, and one that the reload itself has cut."""
    others = {row[0] for row in newest_shop.backends()}  # of a server that serves other tests, too
    at = make_site(newest_shop, extra="limits: {statement_timeout: 200ms}\n").start()
    (before, first), (after, second) = at.token(), at.token()
    with at.client(first) as a, at.client(second) as b:
        pids = [client.rows("select pg_backend_pid()")[0][0] for client in (a, b)]
        kept = {row[0] for row in newest_shop.backends("application_name = 'mcpctl cut'")} - others
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert all("statement timeout" in client.error("select 1") for client in (a, b))
            at.run("token", "revoke", before)
            at.run("config", "reload")
            eventually(lambda: any(line.get("reason", "").startswith("the config was reloaded") for line in at.audit()))
            for pid, token_id in zip(pids, (before, after), strict=True):
                done = at.run("token", "revoke", token_id).stdout
                assert done.endswith(f"cut: 0 queries, 1 backend left (pid {pid})\n")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    for pid in pids:
        eventually(lambda pid=pid: any(f"backend {pid} is gone" in str(line.get("reason")) for line in at.audit()))
    assert "cut: 0 queries, 0 backends left" in at.run("token", "revoke", before).stdout
    eventually(lambda: not {row[0] for row in newest_shop.backends()} & {*pids, *kept})


def test_the_place_of_a_frozen_backend_is_free_when_it_has_ended(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="limits: {statement_timeout: 200ms, connections: 2}\n").start()
    with at.client(at.token()[1]) as a, at.client(at.token("bob")[1]) as b:
        pid = a.rows("select pg_backend_pid()")[0][0]
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "statement timeout" in a.error("select 1")
            waiting = in_background(b.rows, "select 2")
            assert newest_shop.backends(f"pid = {pid}")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert waiting.result(15) == [[2]]


def test_fifty_ends_of_a_token_and_the_slowest_of_them(
    make_site: MakeSite, newest_shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    _stubborn(newest_shop)
    sites = [make_site(newest_shop).start("--workers", str(workers)) for workers in (1, 2)]
    took: dict[str, list[float]] = {}
    for number in range(50):
        at = sites[number // len(WAYS) % 2]
        how = WAYS[number % len(WAYS)]
        query = UNENDING if "outlives" in how else "select stubborn()" if "catches" in how else "select pg_sleep(60)"
        name, text = at.token(seconds=2 if how.startswith("expiry") else 3600)
        with contextlib.ExitStack() as stack:
            a, again = stack.enter_context(at.client(text)), stack.enter_context(at.client(text))
            running, pid = _start_sleeping(newest_shop, a, query)
            if "no connection left" in how:
                stack.enter_context(_all_taken(newest_shop))
            ends = at.tokens.current()[name].expires_at
            if how.startswith("remove"):
                tokens.remove(at.tokens, name)
            elif how.startswith("overlap"):
                ends = tokens.rotate(at.tokens, name, timedelta(seconds=0.5), None, datetime.now(UTC))[0].expires_at
            elif how.startswith("revoke"):
                tokens.revoke(at.tokens, [name], datetime.now(UTC))
            if how.startswith(("expiry", "overlap")):
                eventually(lambda ends=ends: datetime.now(UTC) >= ends, pause=0.001)
            begun = time.monotonic()
            assert again.call("whoami").status_code == 401
            _gone(newest_shop, pid)
            took.setdefault(how, []).append(time.monotonic() - begun)
            assert running.result(5).status_code == 401
    with capsys.disabled():
        print(f"\n50 ends of a token whose query ran, slowest {max(map(max, took.values())) * 1000:.0f} ms:")
        for how, times in took.items():
            print(f"  {how}: slowest {max(times) * 1000:.0f} ms, median {statistics.median(times) * 1000:.0f} ms")
    assert sum(map(len, took.values())) == 50
    assert max(map(max, took.values())) < 1


@pytest.mark.parametrize("lane", ["express", "sdk", "older sdk"])
def test_a_client_that_goes_away_ends_its_query(make_site: MakeSite, shop: Shop, lane: str) -> None:
    at = make_site(shop).start()
    _, text = at.token()
    host, port = urlsplit(at.url).netloc.split(":")
    params: dict[str, object] = {"name": "query_database", "arguments": {"query": "select pg_sleep(60)"}}
    headers = f"Authorization: Bearer {text}\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
    if lane == "sdk":
        params["_meta"] = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": {},
            "not/known": "to the express lane",
        }
        headers += "MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\nMcp-Name: query_database\r\n"
    elif lane == "older sdk":
        params["_meta"] = {"not/known": "to the express lane"}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    before = set(_sleeping(shop))
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(
            f"POST /mcp HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        pid = eventually(lambda: set(_sleeping(shop)) - before).pop()
    eventually(lambda: pid not in _sleeping(shop), 2)
    assert eventually(lambda: [line for line in at.audit() if line.get("outcome") == "cancelled"])


def test_an_older_clients_cancelled_notification_ends_the_one_call_of_its_number(
    make_site: MakeSite, shop: Shop
) -> None:
    at = make_site(shop).start("--workers", "2")
    _, text = at.token()
    with at.client(text) as a, at.client(text) as b:
        running = in_background(a.call, "query_database", {"query": "select pg_sleep(60)"}, 77)
        pid = eventually(lambda: _sleeping(shop)).pop()
        for number, wanted in (("77", True), (77, False)):
            note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": number}}
            assert b.http.post(b.url, json=note).status_code == 202
            if wanted:
                assert pid in _sleeping(shop)  # another type is another number
        eventually(lambda: pid not in _sleeping(shop), 3)
        running.result(5)
