"""Codes, connections and refresh tokens in the store: their times, two at once, and what is forgotten."""

from __future__ import annotations

import base64
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mcpctl.config_sign_in import Oauth
from mcpctl.errors import LimitedError, UnavailableError
from mcpctl.identity import oauth
from mcpctl.identity.browsers import Browsers
from mcpctl.identity.oauth import Allowed, Connections, GrantError, Issued
from mcpctl.identity.oauth_clients import Client, Clients
from mcpctl.identity.sessions import OAUTH, Rules, Sessions, mark_of
from mcpctl.identity.users import User
from mcpctl.state import State

START = datetime(2026, 11, 28, tzinfo=UTC)
BACK, HERE = "http://127.0.0.1/back", "https://mcp.example/mcp"
VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
APP = Client("client-1", "An app", (BACK,))
RULES = {OAUTH: Rules(timedelta(days=90), timedelta(days=30), 20)}


class Worker:
    """One process's view of the store, with a clock of the test's."""

    def __init__(self, path: Path, now: Callable[[], datetime], people: Mapping[str, User]) -> None:
        self.state = State(path)
        self.sessions = Sessions(self.state, RULES, now)
        self.connections = Connections(
            self.state, self.sessions, lambda: people, lambda names: tuple(names), timedelta(hours=1), now
        )
        self.browsers = Browsers(self.state, lambda: people, now)

    def code(self, client: Client = APP, *scopes: str) -> str:
        wanted = scopes or ("mcp:read",)
        return self.connections.allow(Allowed(client, BACK, CHALLENGE, wanted, HERE, "alice", mark_of("hash")))

    def redeem(self, code: str) -> Issued:
        return self.connections.redeem(code, APP.id, BACK, VERIFIER, HERE, None)

    def renew(self, refresh: str | None, *scopes: str) -> Issued:
        return self.connections.renew(refresh or "", APP.id, None, scopes or None)


class House:
    def __init__(self, folder: Path) -> None:
        self.now = START
        self.people = {"alice": User("alice", START, password="hash")}
        self.one = Worker(folder / "state.db", lambda: self.now, self.people)
        self.two = Worker(folder / "state.db", lambda: self.now, self.people)

    def later(self, **time: float) -> None:
        self.now += timedelta(**time)

    def change(self, **fields: object) -> None:
        self.people["alice"] = replace(self.people["alice"], **fields)  # type: ignore[arg-type]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    found = House(tmp_path)
    yield found
    found.one.state.close()
    found.two.state.close()


def test_a_code_is_good_for_a_minute(house: House) -> None:
    code, late = house.one.code(), house.one.code()
    house.later(seconds=59)
    assert house.two.redeem(code).scopes == ("mcp:read",)
    house.later(seconds=1)
    with pytest.raises(GrantError, match="too old"):
        house.two.redeem(late)


def test_a_code_that_two_workers_take_at_once_opens_nothing(house: House) -> None:
    code = house.one.code()
    found = house.two.connections._code(code)  # which has read it before the other one
    issued = house.one.redeem(code)
    house.two.connections._code = lambda text: found  # type: ignore[method-assign]
    with pytest.raises(GrantError, match="twice"):
        house.two.redeem(code)
    del house.two.connections._code
    with pytest.raises(GrantError, match="twice"):
        house.two.redeem(code)
    with pytest.raises(GrantError):
        house.one.renew(issued.refresh)


def _ended_meanwhile(house: House) -> None:
    """From now on the other worker ends each connection before the first one has looked at it again."""
    look = house.one.sessions.look

    def late() -> None:
        house.two.sessions.end_of("alice")
        look()

    house.one.sessions.look = late  # type: ignore[method-assign]


def test_a_connection_that_somebody_ends_as_it_is_opened_or_renewed_opens_nothing(house: House) -> None:
    issued, code = house.one.redeem(house.one.code()), house.one.code()
    renew = house.one.sessions.renew

    def renewed(*given: Any) -> str:
        _ended_meanwhile(house)
        return renew(*given)

    house.one.sessions.renew = renewed  # type: ignore[method-assign]
    with pytest.raises(GrantError, match="ended"):
        house.one.renew(issued.refresh)
    opened = house.one.redeem(code).session
    assert house.two.sessions.changes()[opened.id] is None


def test_a_code_that_nobody_has_fetched_is_forgotten_when_it_is_too_old(house: House) -> None:
    house.one.code()
    used = house.one.code()
    house.one.redeem(used)
    house.later(seconds=61)
    house.one.connections.sweep()
    assert house.one.state.rows("SELECT count(*) FROM oauth_codes") == [(1,)]
    with pytest.raises(GrantError, match="twice"):
        house.one.redeem(used)


def test_a_refresh_token_lives_as_long_as_its_connection_is_used(house: House) -> None:
    issued = house.one.redeem(house.one.code())
    for _ in range(3):
        house.later(days=29)
        issued = house.two.renew(issued.refresh)
    house.later(days=3)
    with pytest.raises(GrantError, match="ended"):
        house.two.renew(issued.refresh)


def test_a_connection_that_is_not_used_ends(house: House) -> None:
    issued = house.one.redeem(house.one.code())
    house.later(days=30)
    with pytest.raises(GrantError, match="ended"):
        house.two.renew(issued.refresh)


def test_the_access_token_before_is_taken_for_a_moment(house: House) -> None:
    first = house.one.redeem(house.one.code())
    second = house.one.renew(first.refresh)
    session = house.one.sessions.known[second.session.id]
    assert session.is_current(second.access)
    assert session.was_current(first.access, house.now)
    assert not session.was_current(first.access, house.now + oauth.OVERLAP)


def test_a_client_that_renews_all_the_time_does_not_fill_the_store(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "MOST_RENEWALS", 9)
    issued = [house.one.redeem(house.one.code())]
    for _ in range(9):
        issued.append(house.two.renew(issued[-1].refresh))
    with pytest.raises(GrantError, match="renewed 9 times") as refused:
        house.one.renew(issued[-1].refresh)
    assert refused.value.ended is not None
    with pytest.raises(GrantError, match="ended"):
        house.two.renew(issued[-1].refresh)


def test_no_number_of_renewals_hides_that_a_refresh_token_was_stolen(house: House) -> None:
    """Who has stolen it renews many times before its owner does once."""
    stolen = house.one.redeem(house.one.code()).refresh
    last = house.two.renew(stolen)
    for _ in range(200):
        last = house.two.renew(last.refresh)
    with pytest.raises(GrantError, match="twice"):
        house.one.renew(stolen)
    with pytest.raises(GrantError, match="ended"):
        house.two.renew(last.refresh)


def test_a_narrowed_access_token_does_not_get_more_when_its_connection_does(house: House) -> None:
    first = house.one.redeem(house.one.code(APP, "mcp:read", "mcp:write"))
    narrow = house.one.renew(first.refresh, "mcp:read")
    assert not narrow.session.was_current(first.access, house.now), "what is on its way has more than it is to have"
    whole = house.one.renew(narrow.refresh)
    assert whole.session.permissions == ("mcp:read", "mcp:write")
    session = house.one.sessions.known[whole.session.id]
    assert session.is_current(whole.access)
    assert not session.was_current(narrow.access, house.now)


def as_before(path: Path) -> None:
    """Make a store one of form 5."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in (
            "DROP INDEX oauth_refresh_tokens_number",
            "ALTER TABLE oauth_refresh_tokens DROP COLUMN number",
            "CREATE INDEX oauth_refresh_tokens_session ON oauth_refresh_tokens (session)",
            "ALTER TABLE oauth_connections DROP COLUMN permissions",
            "PRAGMA user_version = 5",
        ):
            connection.execute(statement)


def test_a_worker_waits_for_another_one_that_makes_the_form_a_newer_one(house: House, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    issued = house.one.redeem(house.one.code())
    house.one.state.close()
    as_before(path)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        ends = threading.Timer(0.4, other.execute, ("COMMIT",))
        ends.start()
        store = State(path, patience=0)
        try:
            assert store.rows("SELECT session, permissions FROM oauth_connections") == [(issued.session.id, None)]
        finally:
            store.close()
            ends.join()


def test_a_store_of_the_form_before_is_kept_as_it_was(house: House, tmp_path: Path) -> None:
    path, kept = tmp_path / "state.db", tmp_path / "state.db.form-5"
    issued = house.one.redeem(house.one.code())
    house.one.state.close()
    as_before(path)
    for _ in range(2):
        with closing(State(path)) as store:
            store.rows("SELECT permissions FROM oauth_connections")
    assert kept.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(kept)) as before:
        assert before.execute("PRAGMA user_version").fetchone() == (5,)
        assert before.execute("SELECT session FROM oauth_connections").fetchall() == [(issued.session.id,)]
    assert not list(tmp_path.glob(".state.db.*"))


def test_connections_of_a_store_of_the_form_before_go_on(house: House, tmp_path: Path) -> None:
    first = house.one.redeem(house.one.code(APP, "mcp:read", "mcp:write"))
    second = house.one.renew(first.refresh)
    house.one.state.close()
    as_before(tmp_path / "state.db")
    house.one.connections.fit(lambda client: True)
    third = house.one.renew(second.refresh)
    assert third.session.permissions == ("mcp:read", "mcp:write")
    with pytest.raises(GrantError, match="twice"):
        house.one.renew(first.refresh)


def test_a_renewal_for_fewer_scopes_narrows_the_access_token_and_nothing_else(house: House) -> None:
    first = house.one.redeem(house.one.code(APP, "mcp:read", "mcp:write"))
    narrow = house.two.renew(first.refresh, "mcp:read")
    assert (narrow.scopes, narrow.session.permissions) == (("mcp:read",), ("mcp:read",))
    assert house.one.connections.of("alice")[0].permissions == ("mcp:read", "mcp:write")
    wide = house.one.renew(narrow.refresh)
    assert (wide.scopes, wide.session.permissions) == (("mcp:read", "mcp:write"), ("mcp:read", "mcp:write"))


def test_a_renewal_for_more_scopes_gets_nothing_and_ends_nothing(house: House) -> None:
    first = house.one.redeem(house.one.code(APP, "mcp:read"))
    for scopes in (("mcp:read", "mcp:write"), ("mcp:write",), ("",)):
        with pytest.raises(GrantError) as problem:
            house.two.renew(first.refresh, *scopes)
        assert problem.value.error == "invalid_scope"
    assert house.two.renew(first.refresh).scopes == ("mcp:read",)


def test_what_the_config_took_from_a_scope_comes_back_with_no_renewal(house: House) -> None:
    first = house.one.redeem(house.one.code(APP, "mcp:read", "mcp:write"))
    allowed = {"mcp:read": "mcp:read"}
    house.two.connections._permissions = lambda names: tuple(allowed[one] for one in names if one in allowed)
    house.two.connections.fit(lambda client: True)
    second = house.one.renew(first.refresh, "mcp:read")
    assert house.one.renew(second.refresh).session.permissions == ("mcp:read",)


@pytest.mark.parametrize(
    "changed", [{"password": "other"}, {"password": None}, {"disabled_at": START}, {"created_at": START + timedelta(1)}]
)
def test_whoever_is_no_longer_who_allowed_it_renews_nothing(house: House, changed: dict[str, object]) -> None:
    issued, code = house.one.redeem(house.one.code()), house.one.code()
    house.one.browsers.sign_in("c" * 43, "alice", mark_of("hash"))
    assert house.two.browsers.user("c" * 43) is not None
    house.change(**changed)
    with pytest.raises(GrantError, match="the user is gone"):
        house.two.renew(issued.refresh)
    with pytest.raises(GrantError, match="the user is gone"):
        house.two.redeem(code)
    assert house.two.browsers.user("c" * 43) is None
    assert house.two.connections.of("alice") == []


def test_a_browser_is_signed_in_for_half_a_day(house: House) -> None:
    house.one.browsers.sign_in("c" * 43, "alice", mark_of("hash"))
    house.later(hours=11, minutes=59)
    assert house.two.browsers.user("c" * 43) is not None
    house.later(minutes=1)
    assert house.two.browsers.user("c" * 43) is None


def test_all_workers_make_forms_with_one_key(house: House) -> None:
    assert house.one.browsers.key() == house.two.browsers.key()
    assert len(house.one.browsers.key()) == 32


def test_no_secret_is_in_the_store(house: House, tmp_path: Path) -> None:
    code = house.one.code()
    issued = house.one.redeem(code)
    house.one.browsers.sign_in("c" * 43, "alice", mark_of("hash"))
    house.one.state.close()
    house.two.state.close()
    written = b"".join(path.read_bytes() for path in tmp_path.glob("state.db*"))
    assert APP.id.encode() in written
    for secret in (code, issued.access, issued.refresh or "", "c" * 43, VERIFIER):
        assert secret.encode() not in written


def test_a_connection_without_refresh_tokens_ends_with_its_access_token(house: House) -> None:
    once = replace(APP, renews=False)
    issued = house.one.redeem(house.one.code(once))
    assert issued.refresh is None
    house.two.connections.sweep()
    assert len(house.one.connections.of("alice")) == 1
    house.later(hours=1)
    house.two.connections.sweep()
    assert house.one.connections.of("alice") == []


def test_what_is_over_is_forgotten(house: House) -> None:
    issued = house.one.redeem(house.one.code())
    house.one.renew(issued.refresh)
    house.one.connections.end("alice", issued.session.id)
    house.later(days=2)
    house.one.connections.sweep()
    for table in ("oauth_codes", "oauth_connections", "oauth_refresh_tokens"):
        assert house.one.state.rows(f"SELECT count(*) FROM {table}") == [(0,)]


def test_consent_is_remembered_for_what_was_asked_for_and_not_for_ever(house: House) -> None:
    store, alice = house.one.connections, house.people["alice"]
    store.remember("alice", APP.id, BACK, ("mcp:read", "mcp:write"))
    assert store.remembers(alice, APP.id, BACK, ("mcp:read",))
    for client, place, scopes in ((APP.id, BACK, ("mcp:admin",)), (APP.id, f"{BACK}2", ()), ("other", BACK, ())):
        assert not store.remembers(alice, client, place, scopes)
    assert not store.remembers(replace(alice, created_at=START + timedelta(days=1)), APP.id, BACK, ())
    house.later(days=91)
    assert not store.remembers(alice, APP.id, BACK, ())
    store.sweep()
    assert house.one.state.rows("SELECT count(*) FROM oauth_consents") == [(0,)]


# -- registered clients -----------------------------------------------------------------------------------------------

SAID = {"redirect_uris": [BACK], "client_name": "An app"}


def clients(house: House, **settings: int) -> Clients:
    return Clients(house.one.state, Oauth(**settings), {}, lambda: house.now)


def test_when_there_is_no_room_the_oldest_goes_that_nobody_has_allowed(house: House) -> None:
    store = clients(house, registrations=2)
    first, second = store.register(SAID, "a"), store.register(SAID, "b")
    with pytest.raises(UnavailableError):  # a flow that has begun comes to its end
        store.register(SAID, "c")
    house.later(hours=1)
    store.use(first.id)
    third = store.register(SAID, "c")
    assert [store.find(one.id) is not None for one in (first, second, third)] == [True, False, True]


def test_where_all_clients_are_in_use_the_one_goes_that_was_allowed_longest_ago_and_is_connected_no_more(
    house: House,
) -> None:
    store = clients(house, registrations=3)
    first, second, third = (store.register(SAID, "a") for _ in range(3))
    for one in (first, second, third):
        house.later(minutes=1)
        store.use(one.id)
    code = house.one.code(first)
    session = house.one.connections.redeem(code, first.id, BACK, VERIFIER, HERE, None).session
    with pytest.raises(UnavailableError):  # all of them were allowed a moment ago
        store.register(SAID, "b")
    house.later(hours=1)
    fourth = store.register(SAID, "b")
    assert [store.find(one.id) is not None for one in (first, second, third, fourth)] == [True, False, True, True]
    house.one.connections.end("alice", session.id)
    store.use(third.id)
    store.use(fourth.id)
    store.register(SAID, "b")
    assert store.find(first.id) is None


def test_strangers_who_register_drive_out_nobody_whom_users_know(house: House) -> None:
    store = clients(house, registrations=4)
    known = store.register(SAID, "a")
    store.use(known.id)
    house.later(hours=1)
    for number in range(3):
        store.register(SAID, str(number))
    with pytest.raises(UnavailableError):
        store.register(SAID, "3")
    house.later(hours=1)
    store.register(SAID, "4")
    assert store.find(known.id) is not None


def test_an_address_registers_twenty_in_an_hour(house: House) -> None:
    store = clients(house)
    for _ in range(20):
        store.register(SAID, "a")
    with pytest.raises(LimitedError):
        store.register(SAID, "a")
    store.register(SAID, "b")
    house.later(hours=1, seconds=1)
    store.register(SAID, "a")


def test_a_client_that_nobody_allows_is_forgotten_after_a_day(house: House) -> None:
    store = clients(house)
    unused, used = store.register(SAID, "a"), store.register(SAID, "a")
    store.use(used.id)
    house.later(days=2)
    store.sweep()
    assert store.find(unused.id) is None
    assert store.find(used.id) == used
    house.later(days=90)
    store.sweep()
    assert store.find(used.id) is None
