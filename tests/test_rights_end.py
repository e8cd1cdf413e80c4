"""The end of a right: what runs by it is cut within a second, what comes is refused, and what is left is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from mcpctl import config
from mcpctl.audit import top
from mcpctl.audit.log import AuditLog
from mcpctl.audit.reading import Reading
from mcpctl.errors import UnauthorizedError, UnavailableError
from mcpctl.facts import Answer, Request
from mcpctl.identity import tokens, users
from mcpctl.postgres import roles
from mcpctl.server.parts import running
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

TOOLS = {"query_database": "query", "execute_statement": "statement"}


@pytest.fixture(scope="session")
def at(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with frank, who may write one table, and henry, whom nothing happens to. It has a second database."""
    with login_shop.admin() as admin:
        admin.execute("CREATE SCHEMA franks; CREATE TABLE franks.notes (id serial, body text)")
        admin.execute("CREATE TABLE franks.others (id serial, body text)")
        admin.execute("CREATE DATABASE second")
    cluster = login_shop.cluster
    second = f"{{host: {cluster.host}, port: {cluster.port}, dbname: second, roles: per_user}}"
    more = f"    default: true\n  second: {second}\n"
    found = Site(tmp_path_factory.mktemp("ends") / "site", login_shop, database=more, per_user=True)
    found.user("frank", "mcp-tools")
    found.user("henry", "mcp-user")
    found.user("grace", "mcp-tools")
    found.grant("henry", "--schema", "franks")
    found.start()
    yield found
    found.stop()


def _sleeping(at: Site, role: str) -> list[int]:
    found = at.shop.look(
        "SELECT pid FROM pg_stat_activity WHERE usename ~ %s AND state = 'active' AND query LIKE '%%pg_sleep(60)%%'",
        f"^mcp_{role}_[rw]$",
    )
    return [row[0] for row in found]


def _said(client: Client, tool: str, statement: str) -> str:
    """What a call is answered: `rows`, an error's text, or the HTTP status."""
    return _words(client.call(tool, {TOOLS[tool]: statement}))


def _words(answer: httpx.Response) -> str:
    if answer.status_code != 200:
        return str(answer.status_code)
    result = answer.json()["result"]
    text: str = result["content"][0]["text"]
    return text if result["isError"] else "rows"


ENDED = "401"
TAKEN = "your access to 'shop' was taken or narrowed while the call ran"
UNGRANT = ("user", "ungrant", "frank", "--database", "shop", "--apply")
ENDS: dict[str, tuple[Callable[[Site], object], str, str]] = {
    "disabled": (lambda at: at.run("user", "disable", "frank"), ENDED, ENDED),
    "disabled in the file": (lambda at: at.edit_user("frank", disabled_at=datetime.now(UTC)), ENDED, ENDED),
    "all taken back": (lambda at: at.run(*UNGRANT), *["there is no default database"] * 2),
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
            answer = call.result(max(0.1, ended + 1 - time.monotonic()))
            assert _words(answer) == ENDED if ENDED in expected else TAKEN in _words(answer)
        for tool, words in zip(TOOLS, expected, strict=True):
            assert words in _said(client, tool, "select 1")
        assert _sleeping(at, "henry"), "somebody else's runs on"
        cut = [line for line in at.audit() if line.get("outcome") == "cut" and line["user"] == "frank"][-2:]
        assert len({line["tool"] for line in cut}) == 2
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


@pytest.mark.newest
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


@pytest.fixture
def both(at: Site) -> Iterator[tuple[Client, Client]]:
    """Two clients of one token of ivan's, who reads both databases."""
    if "ivan" not in users.user_file(at.folder / "users.yaml").current():
        at.user("ivan", "mcp-user")
    at.grant("ivan", "--schema", "franks")
    at.run("user", "grant", "ivan", "--database", "second", "--schema", "public", "--access", "read", "--apply")
    text = at.token("ivan")[1]
    with at.client(text) as one, at.client(text) as other:
        yield one, other


@pytest.mark.newest
def test_a_right_that_is_taken_in_one_database_cuts_nothing_in_another(at: Site, both: tuple[Client, Client]) -> None:
    one, other = both
    cut = in_background(one.call, "query_database", {"query": "select 1 from pg_sleep(60)"})
    query = "select 7 from pg_sleep(3) -- pg_sleep(60)"
    runs = in_background(other.call, "query_database", {"query": query, "database": "second"})
    eventually(lambda: len(_sleeping(at, "ivan")) == 2)
    done = at.run("user", "ungrant", "ivan", "--database", "shop", "--apply").stderr
    assert "cut: 1 query, 0 backends left" in done
    assert TAKEN in _words(cut.result())
    assert runs.result().json()["result"]["structuredContent"]["rows"] == [[7]]
    line = next(line for line in reversed(at.audit()) if line.get("outcome") == "cut")
    assert (line["event"], line["database"], line["user"]) == ("tool.refused", "shop", "ivan")
    assert "your access to 'shop'" in line["reason"]
    closed = [line for line in at.audit() if line["event"] == "pool.closed" and line["user"] == "ivan"]
    assert [line["database"] for line in closed] == ["shop"]
    assert "its user's grant on shop was narrowed: 1 query" in closed[0]["reason"]


def test_a_token_that_was_cut_in_one_database_is_still_cut_everywhere_when_it_is_revoked(
    at: Site, both: tuple[Client, Client]
) -> None:
    one, other = both
    runs = in_background(other.call, "query_database", {"query": "select pg_sleep(60)", "database": "second"})
    eventually(lambda: _sleeping(at, "ivan"))
    at.run("user", "ungrant", "ivan", "--database", "shop", "--apply")
    assert _sleeping(at, "ivan"), "that database is not concerned"
    assert "no default database" in _said(one, "query_database", "select 1")
    newest = max((one for one in at.tokens.current().values() if one.user == "ivan"), key=lambda one: one.created_at)
    assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", newest.id).stdout
    assert runs.result(1).status_code == 401
    assert not _sleeping(at, "ivan")


@pytest.mark.newest
def test_of_several_databases_what_was_read_before_the_right_was_taken_does_not_leave(
    at: Site, both: tuple[Client, Client]
) -> None:
    one, _ = both
    query = "select current_database()::text from pg_sleep(case current_database() when 'second' then 3 else 0 end)"
    asked = {"query": f"{query} -- pg_sleep(60)", "databases": ["shop", "second"]}
    runs = in_background(one.call, "query_database", asked)
    eventually(lambda: len(_sleeping(at, "ivan")) == 1)
    at.run("user", "ungrant", "ivan", "--database", "shop", "--apply")
    first, second = runs.result().json()["result"]["structuredContent"]["results"]
    assert TAKEN in first["error"]
    assert "rows" not in first
    assert second["rows"] == [["second"]]


def test_what_a_dba_is_to_take_back_closes_the_database_until_it_is_seen_to_be_gone(at: Site) -> None:
    """PostgreSQL still lets the login role read what was taken back, so nobody is let in as it."""
    at.user("judy", "mcp-user")
    at.grant("judy", "--table", "franks.notes", "--table", "franks.others")
    at.run("user", "grant", "judy", "--database", "second", "--schema", "public", "--access", "read", "--apply")
    text = at.token("judy")[1]
    with at.client(text) as client, at.client(text) as other:
        runs = in_background(other.call, "query_database", {"query": "select pg_sleep(60)"})
        eventually(lambda: _sleeping(at, "judy"))
        script = at.run("user", "ungrant", "judy", "--database", "shop", "--table", "franks.notes")
        assert TAKEN in _words(runs.result())
        assert "recorded as narrowing; the server refuses all of judy's calls in shop until" in script.stderr
        others = ("--database", "shop", "--table", "franks.others")
        for _ in range(2):
            assert _words(client.call("query_database", {"query": "select 1", "database": "shop"})) != "rows"
            assert _words(client.call("query_database", {"query": "select 1", "database": "second"})) == "rows"
            asked = at.run("can", "judy", "select", "franks.others", "--database", "shop", check=False)
            assert (asked.returncode, "your access in 'shop' is being narrowed" in asked.stdout) == (1, True)
            at.run("user", "grant", "judy", *others, "--access", "read")  # to be granted more opens nothing either
        with at.shop.admin() as admin:
            admin.execute(script.stdout.encode())
        assert _words(client.call("query_database", {"query": "select 1", "database": "shop"})) != "rows"
        assert "judy in shop: confirmed" in at.run("grant", "diff", "--user", "judy", check=False).stderr
        assert _words(client.call("query_database", {"query": "select 1", "database": "shop"})) == "rows"


def test_other_roles_that_give_as_much_cut_nothing(at: Site, both: tuple[Client, Client]) -> None:
    one, _ = both
    runs = in_background(one.call, "query_database", {"query": "select 7 from pg_sleep(3) -- pg_sleep(60)"})
    eventually(lambda: _sleeping(at, "ivan"))
    assert at.run("user", "roles", "ivan", "mcp-tools").stdout == "ivan: mcp-tools\ncut: 0 queries, 0 backends left\n"
    assert _said(one, "query_database", "select 1") == "rows"
    assert runs.result().json()["result"]["structuredContent"]["rows"] == [[7]]
    runs = in_background(one.call, "query_database", {"query": "select pg_sleep(60)"})
    eventually(lambda: _sleeping(at, "ivan"))
    assert "cut: 1 query, 0 backends left" in at.run("user", "roles", "ivan", "--none").stdout
    assert TAKEN in _words(runs.result())
    assert "roles\tnone\n" in at.run("user", "show", "ivan").stdout
    at.run("user", "roles", "ivan", "mcp-user")


STUBBORN = (
    "do $d$ begin perform set_config('client_connection_check_interval', '0', false);"
    " perform set_config('statement_timeout', '0', false);"
    " for i in 1..60 loop begin perform pg_sleep(1); exception when query_canceled then null; end; end loop; end $d$"
)


@pytest.mark.parametrize(
    "defaults",
    [
        ["role = mcp_logins"],
        ["timezone = 'Asia/Tokyo'", "datestyle = 'SQL, DMY'", "statement_timeout = 1", "idle_session_timeout = 1",
         "client_encoding = SQL_ASCII", "quote_all_identifiers = on", "standard_conforming_strings = off"],
    ],
    ids=["role", "others"],
)  # fmt: skip
def test_no_default_that_a_login_role_is_given_keeps_its_query_alive(at: Site, defaults: list[str]) -> None:
    """A function that runs what it is given lets a role that writes change its own defaults (docs/security.md)."""
    user = f"stub-{len(defaults)}"
    at.user(user, "mcp-tools")
    with at.shop.admin() as admin:
        admin.execute(
            "CREATE OR REPLACE FUNCTION franks.run(t text) RETURNS text LANGUAGE plpgsql AS"
            " $$BEGIN EXECUTE t; RETURN 'pg_sleep(60)'; END$$"
        )
        at.grant(user, "--schema", "franks", access="write")
        for default in defaults:
            admin.execute(f'ALTER ROLE "mcp_{user}_w" SET {default}'.encode())
    token_id, text = at.token(user)
    with at.client(text) as client:
        asked = {"statement": f"select franks.run($x${STUBBORN}$x$) -- pg_sleep(60)"}
        running = in_background(client.call, "execute_statement", asked)
        eventually(lambda: _sleeping(at, user))
        told = at.run("grant", "diff", check=False).stdout
        for name in (default.split()[0] for default in defaults):
            assert name in roles.SETTINGS or f"mcp_{user}_w: has a default of its own for {name}" in told.lower()
        revoked = time.monotonic()
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", token_id).stdout
        assert not _sleeping(at, user)
        assert running.result(1).status_code == 401
    assert time.monotonic() - revoked < 5
    at.grant(user, "--schema", "franks", access="write")
    assert f"mcp_{user}_w: has a default" not in at.run("grant", "diff", check=False).stdout


def test_what_a_removed_user_has_running_is_refused_in_our_words_and_not_in_postgresqls(at: Site) -> None:
    """Removing ends the login roles' backends, too: by then the server has cut, and knows why."""
    at.user("gone", "mcp-tools")
    at.grant("gone", "--schema", "franks")
    with at.client(at.token("gone")[1]) as client:
        call = in_background(client.call, "query_database", {"query": "select pg_sleep(60)"})
        eventually(lambda: _sleeping(at, "gone"))
        done = at.run("user", "remove", "gone", "--yes")
        assert _words(call.result()) == ENDED
    assert "cut: 1 query, 0 backends left" in done.stdout


def test_what_writes_has_a_line_before_it_stays_and_else_does_not_stay(
    at: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is killed between the COMMIT and the call's own line leaves no row that nothing explains."""
    at.user("nina", "mcp-tools")
    at.grant("nina", "--table", "franks.others", access="write")
    text, add, full = at.token("nina")[1], AuditLog.add, False
    seen: list[tuple[str, int]] = []

    def rows() -> int:
        with at.shop.admin() as admin:
            return len(admin.execute("SELECT FROM franks.others WHERE body = 'nina'").fetchall())

    def adding(log: AuditLog, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> None:
        for event, _ in lines:
            seen.append((event, rows()))
            if full and event == "tool.begun":
                raise UnavailableError("the disk is full")
        add(log, *lines, at_once=at_once)

    async def insert() -> None:
        principal = await core.authenticator.authenticate(text, "127.0.0.1")
        arguments = {"statement": "insert into franks.others (body) values ('nina')"}
        await core.calls.call(principal, "execute_statement", arguments, Request("r", "127.0.0.1", "http"))

    async def main() -> None:
        nonlocal core, full
        async with running(config.load(at.config, at.limits), files=True) as core:
            monkeypatch.setattr(AuditLog, "add", adding)
            await insert()
            full = True
            await insert()

    core: Any = None
    asyncio.run(main())
    assert [one for one in seen if one[0].startswith("tool.")] == [
        ("tool.begun", 0), ("tool.called", 1), ("tool.begun", 1), ("tool.called", 1),
    ]  # fmt: skip
    begun, called = [line for line in at.audit() if line.get("user") == "nina" and line["event"].startswith("tool.")][
        :2
    ]
    same = ("request_id", "token", "tool", "database", "role", "backend_pid", "statement_hmac", "relations")
    assert [begun[name] for name in same] == [called[name] for name in same]
    assert top.count(Reading(at.folder / "audit.jsonl"), "user")["nina"].count == 2


def test_an_answer_that_waits_for_its_line_leaves_only_to_who_may_still_have_it(at: Site) -> None:
    """Lines of calls that end together are written together, so that rights may end between a call and its answer."""
    at.user("lena", "mcp-tools")
    at.grant("lena", "--table", "franks.others")
    name, text = at.token("lena")
    told: list[str] = []

    async def main() -> None:
        async with running(config.load(at.config, at.limits), files=True) as core:
            write = core.recorder.ended

            async def ask(query: str) -> Answer:
                principal = await core.authenticator.authenticate(text, "127.0.0.1")
                request = Request("r", "127.0.0.1", "http")
                return await core.calls.call(principal, "query_database", {"query": query}, request)

            async def ending(happens: Callable[[], Awaitable[None]]) -> Answer:
                async def ended(*of: Any) -> None:
                    await write(*of)
                    await happens()

                core.recorder.ended = ended  # type: ignore[method-assign]
                other = asyncio.create_task(ask("select pg_sleep(60)"))  # else nobody's line is waited for
                try:
                    while len(core.calls.running()) != 1:
                        await asyncio.sleep(0.01)
                    return await ask("select body from franks.others")
                finally:
                    other.cancel()
                    await asyncio.wait([other])

            async def run(*command: str) -> None:
                await asyncio.to_thread(at.run, *command)
                core.authenticator.refresh()

            async def cancel() -> None:
                raise asyncio.CancelledError

            assert not (await ending(lambda: asyncio.sleep(0))).is_error
            with pytest.raises(asyncio.CancelledError):
                await ending(cancel)
            found = await ending(lambda: run("user", "ungrant", "lena", "--database", "shop", "--apply"))
            assert found.is_error
            told.append(found.text)
            at.grant("lena", "--table", "franks.others")
            with pytest.raises(UnauthorizedError) as caught:
                await ending(lambda: run("token", "revoke", name))
            told.append(caught.value.message)

    asyncio.run(main())
    assert TAKEN in told[0]
    asked = [line for line in at.audit() if line.get("user") == "lena" and line.get("tool") == "query_database"]
    ends = [(line["event"], line["outcome"], line.get("reason", "")) for line in asked]
    held = [one for one in ends if one[2].startswith("its answer did not leave: ")]
    assert [one[:2] for one in held] == [
        ("tool.refused", "cancelled"),
        ("tool.refused", "cut"),
        ("tool.refused", "cut"),
    ]
    assert TAKEN in held[1][2]
    assert told[1] in held[2][2]
    assert ends.count(("tool.called", "ok", "")) == 4
