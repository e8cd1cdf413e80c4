"""The end of a right: what runs by it is cut within a second, what comes is refused, and what is left is answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from mcpctl.identity import tokens
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

TOOLS = {"query_database": "query", "execute_statement": "statement"}


@pytest.fixture(scope="module")
def at(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with frank, who may write one table, and henry, whom nothing happens to."""
    with login_shop.admin() as admin:
        admin.execute("CREATE SCHEMA franks; CREATE TABLE franks.notes (id serial, body text)")
        admin.execute("CREATE TABLE franks.others (id serial, body text)")
    found = Site(tmp_path_factory.mktemp("ends") / "site", login_shop, per_user=True)
    found.user("frank", "mcp-tools")
    found.user("henry", "mcp-user")
    found.user("grace", "mcp-tools")
    found.grant("henry", "--schema", "franks")
    found.start()
    yield found
    found.stop()


def _sleeping(at: Site, role: str) -> list[int]:
    with at.shop.admin() as admin:
        found = admin.execute(
            "SELECT pid FROM pg_stat_activity WHERE usename ~ %s AND state = 'active'"
            " AND query LIKE '%%pg_sleep(60)%%'",
            (f"^mcp_{role}_[rw]$",),
        )
        return [row[0] for row in found.fetchall()]


def _said(client: Client, tool: str, statement: str) -> str:
    """What a call is answered: `rows`, an error's text, or the HTTP status."""
    answer = client.call(tool, {TOOLS[tool]: statement})
    if answer.status_code != 200:
        return str(answer.status_code)
    result = answer.json()["result"]
    text: str = result["content"][0]["text"]
    return text if result["isError"] else "rows"


UNGRANT = ("user", "ungrant", "frank", "--database", "shop", "--apply")
ENDS: dict[str, tuple[Callable[[Site], object], str, str]] = {
    "disabled": (lambda at: at.run("user", "disable", "frank"), "401", "401"),
    "disabled in the file": (lambda at: at.edit_user("frank", disabled_at=datetime.now(UTC)), "401", "401"),
    "all taken back": (lambda at: at.run(*UNGRANT), "no read access", "no write access"),
    "a table taken back": (
        lambda at: at.run(*UNGRANT, "--access", "write", "--table", "franks.notes"), "rows", "no write access"),
    "a role taken": (lambda at: at.edit_user("frank", roles=("mcp-user",)), "rows", "has not the permission"),
    "all roles taken": (lambda at: at.edit_user("frank", roles=()), "has not the permission", "has not the permission"),
}  # fmt: skip
"""How a right ends, and what the next call of query_database and that of execute_statement are answered then."""


@pytest.mark.parametrize("how", ENDS)
def test_the_end_of_a_right_cuts_what_runs_within_a_second_and_refuses_what_comes(at: Site, how: str) -> None:
    at.edit_user("frank", disabled_at=None, roles=("mcp-tools",))
    at.grant("frank", "--schema", "franks")
    at.grant("frank", "--table", "franks.notes", access="write")
    end, *expected = ENDS[how]
    aside_id, aside_token = at.token("henry")
    with at.client(at.token("frank")[1]) as client, at.client(aside_token) as other:
        aside = in_background(other.call, "query_database", {"query": "select pg_sleep(60)"})
        running = [in_background(client.call, tool, {TOOLS[tool]: "select pg_sleep(60)"}) for tool in TOOLS]
        eventually(lambda: len(_sleeping(at, "frank")) == 2 and _sleeping(at, "henry"))
        end(at)
        ended = time.monotonic()
        eventually(lambda: not _sleeping(at, "frank"), 1.0)
        for call in running:
            assert call.result(max(0.1, ended + 1 - time.monotonic())).status_code == 401
        for tool, words in zip(TOOLS, expected, strict=True):
            assert words in _said(client, tool, "select 1")
        assert _sleeping(at, "henry"), "somebody else's runs on"
        tokens.revoke(at.tokens, [aside_id], datetime.now(UTC))
        assert aside.result().status_code == 401
    if how == "disabled":
        at.run("user", "enable", "frank")  # PostgreSQL knows of it, too


def test_what_a_user_may_still_do_is_answered_at_once_after_another_right_was_taken(at: Site) -> None:
    """The cut is for what was let in before: it takes some milliseconds, and a call that comes meanwhile is another."""
    with at.client(at.token("henry")[1]) as client:
        for number in range(30):
            at.edit_user("henry", roles=("mcp-user", "mcp-tools") if number % 2 else ("mcp-user",))
            assert [_said(client, "query_database", "select 1") for _ in range(3)] == ["rows"] * 3


def test_a_further_grant_cuts_nothing_and_counts_at_once(at: Site) -> None:
    at.grant("grace", "--table", "franks.others")
    with at.client(at.token("grace")[1]) as client, at.client(at.token("grace")[1]) as again:
        running = in_background(client.call, "query_database", {"query": "select 7 from pg_sleep(6) -- pg_sleep(60)"})
        pids = eventually(lambda: _sleeping(at, "grace"))
        assert "permission denied" in _said(again, "query_database", "select count(*) from franks.notes")
        assert "no write access" in _said(again, "execute_statement", "select 1")
        at.grant("grace", "--table", "franks.notes", access="write")
        assert _sleeping(at, "grace") == pids
        assert _said(again, "query_database", "select count(*) from franks.notes") == "rows"
        assert _said(again, "execute_statement", "update franks.notes set body = body where false") == "rows"
        assert running.result().json()["result"]["structuredContent"]["rows"] == [[7]]
