"""While somebody else holds state.db, such as a backup or a command, those who sign in wait, and nobody else does."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

import signed_in
from mcpctl.errors import BusyError
from mcpctl.in_turn import PATIENCE, in_turn
from mcpctl.state import State
from oauth_flow import ON, PASSWORD, App, Person, give_password
from site_of_mcpctl import Shop, Site, in_background

Make = Callable[..., Site]
BOTH = ON + "  sessions: {enabled: true}\n"


@pytest.fixture
def site(make_site: Make, newest_shop: Shop) -> Site:
    found = make_site(newest_shop, extra=BOTH)
    give_password(found, "alice")
    return found.start()


def sign_in(site: Site) -> httpx.Response:
    return signed_in.sign_in(site, "alice", PASSWORD)


@contextmanager
def held(folder: Path) -> Iterator[sqlite3.Connection]:
    """Another process writes, as far as SQLite can tell."""
    with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield holder


def test_calls_go_on_while_a_sign_in_waits_and_it_is_told_to_come_again(site: Site) -> None:
    _, text = site.token()
    with site.client(text) as caller, held(site.folder):
        assert caller.rows("select 1") == [[1]]
        waiting, slowest, count = in_background(sign_in, site), 0.0, 0
        while waiting.runs:
            begun = time.monotonic()
            assert caller.rows("select 1") == [[1]]
            slowest, count = max(slowest, time.monotonic() - begun), count + 1
        answer = waiting.result()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "state.db" not in answer.text
    assert slowest < PATIENCE / 2, f"the slowest of {count} calls took {slowest:.2f} s"
    assert sign_in(site).status_code == 200


def test_a_sign_in_that_waited_for_its_turn_gets_its_session(site: Site) -> None:
    _, text = site.token()
    with site.client(text) as caller:
        with held(site.folder):
            waiting = in_background(sign_in, site)
            for _ in range(5):
                assert caller.rows("select 1") == [[1]]
        assert waiting.result().status_code == 200


def test_a_refresh_token_that_found_the_store_held_is_not_used_up(site: Site) -> None:
    app = App(site)
    tokens = app.connected(Person(site))
    with held(site.folder):
        answer = app.refresh(tokens["refresh_token"])
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.headers["retry-after"] == "1"
    renewed = app.refresh(tokens["refresh_token"])
    assert renewed.status_code == 200
    assert app.works(renewed.json()["access_token"])


def test_whoever_waits_on_an_event_loop_holds_up_no_other_task(tmp_path: Path) -> None:
    state, turns = State(tmp_path / "state.db", patience=0.0), list[str]()
    state.version()

    def write() -> str:
        with state.change() as connection:
            connection.execute("INSERT INTO blocked VALUES ('a', 'b', 'c')")
        return "written"

    async def come(holder: sqlite3.Connection) -> None:
        waiting = asyncio.create_task(in_turn(write))
        for _ in range(3):
            await asyncio.sleep(0.01)
            turns.append("done" if waiting.done() else "mine")
        with pytest.raises(BusyError):
            write()
        holder.execute("ROLLBACK")
        assert await waiting == "written"

    with held(tmp_path) as holder:
        asyncio.run(come(holder))
    assert turns == ["mine"] * 3
    state.close()
