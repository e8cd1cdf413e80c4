"""Sign-in sessions in the store: how they begin, are used, renewed and end; and what the door makes of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from authenticating import FAILED, HERE, THERE, House, enter, house, refused
from mcpctl.errors import ConfigError, masked
from mcpctl.identity import passwords, sessions, tokens, users
from mcpctl.identity.sessions import OAUTH, PASSWORD, Opened, Rules, Sessions, mark_of
from mcpctl.state import State

__all__ = ["house"]
HOUR = timedelta(hours=1)
RULES = {PASSWORD: Rules(), OAUTH: Rules(timedelta(days=90), timedelta(days=30), 20)}
MARK = mark_of(None)


class Store:
    """One process's view of a store, with the house's clock."""

    def __init__(self, house: House, path: Path) -> None:
        self.house = house
        self.state = State(path)
        self.sessions = Sessions(self.state, RULES, lambda: house.now)

    def open(self, user: str = "alice", **more: object) -> Opened:
        return self.sessions.open(user, MARK, **more)  # type: ignore[arg-type]


@pytest.fixture
def store(house: House, tmp_path: Path) -> Iterator[Store]:
    found = Store(house, tmp_path / "state.db")
    house.door.sessions = found.sessions
    yield found
    found.state.close()


@pytest.fixture
def other(house: House, store: Store, tmp_path: Path) -> Iterator[Store]:
    """Another worker's."""
    found = Store(house, tmp_path / "state.db")
    yield found
    found.state.close()


def test_a_session_opens_the_door_as_its_user(house: House, store: Store) -> None:
    session, text, _ = store.open(databases=("shop",), permissions=("tools:*",))
    found = enter(house, text)
    assert (found.token, found.user, found.databases, found.permissions) == (
        session.id, "alice", ("shop",), ("tools:*",)
    )  # fmt: skip
    assert sessions.session_id(text) == session.id
    assert tokens.token_id(text) is None
    assert house.hashes == 0


def test_the_store_keeps_nothing_that_opens_the_door(house: House, store: Store) -> None:
    _, text, _ = store.open()
    store.state.close()
    kept = b"".join(path.read_bytes() for path in store.state.path.parent.glob("state.db*"))
    assert text.encode() not in kept
    assert text.split("_")[2].encode() not in kept


@pytest.mark.parametrize("where", [4, 20, 60])
def test_a_typo_in_a_sessions_text_is_no_session(house: House, store: Store, where: int) -> None:
    _, text, _ = store.open()
    refused(house, text[:where] + ("a" if text[where] != "a" else "b") + text[where + 1 :])


def test_another_secret_of_a_sessions_id_is_wrong(house: House, store: Store) -> None:
    session, text, _ = store.open()
    enter(house, text)
    assert refused(house, sessions.secret(session.id)).message == "wrong secret"


def test_a_session_ends_when_it_was_idle_and_not_before(house: House, store: Store) -> None:
    _, text, _ = store.open()
    for _ in range(5):
        house.later(minutes=59)
        enter(house, text)
    house.later(minutes=60)
    assert "expired" in refused(house, text).message


def test_a_session_ends_after_its_lifetime_however_much_it_is_used(house: House, store: Store) -> None:
    _, text, _ = store.open()
    for _ in range(47):
        house.later(minutes=30)
        enter(house, text)
    house.later(minutes=30)
    assert "expired" in refused(house, text).message


def test_a_lifetime_that_the_config_has_shortened_holds_for_who_is_signed_in(house: House, store: Store) -> None:
    text = store.open().text
    house.door.sessions = Sessions(store.state, {PASSWORD: Rules(HOUR)}, lambda: house.now)
    for _ in range(3):
        house.later(minutes=19)
        enter(house, text)
    house.later(minutes=3)
    assert refused(house, text).message == "the token is expired"
    assert [why for _, why in house.door.sessions.sweep()] == ["its 1 h were over"]


def test_use_is_noted_the_first_time_then_twice_a_minute_and_not_with_each_call(house: House, store: Store) -> None:
    session, text, _ = store.open()
    house.later(seconds=1)
    enter(house, text)
    store.sessions.look()
    assert store.sessions.known[session.id].used_at > session.created_at
    enter(house, text)
    before = store.state.version()
    for _ in range(29):
        house.later(seconds=1)
        assert house.door.again(text, HERE) is not None
    assert store.state.version() == before
    house.later(seconds=1)
    assert house.door.again(text, HERE) is None, "it has to be noted, which is not the hot way's"
    enter(house, text)
    assert store.state.version() != before


def test_what_one_worker_opens_uses_and_ends_the_others_know_at_once(house: House, store: Store, other: Store) -> None:
    session, text, _ = other.open()
    first = enter(house, text)
    house.later(minutes=59)
    other.sessions.look()
    other.sessions.use(other.sessions.known[session.id])
    house.later(minutes=59)
    enter(house, text)
    assert other.sessions.end([session.id]) == [session.id]
    assert refused(house, text).message == "no such session, or it has ended"
    assert house.ended == [{session.id: "signed out"}]
    assert not house.door.still_valid(first)


def test_the_sixth_session_of_a_user_ends_the_one_that_was_idle_longest(house: House, store: Store) -> None:
    opened = []
    for _ in range(5):
        opened.append(store.open())
        house.later(minutes=1)
    enter(house, opened[0].text)
    enter(house, opened[1].text)
    others = store.open("bob")
    kept = store.open(kind=OAUTH, access=HOUR)
    sixth = store.open()
    assert [one.id for one in sixth.ended] == [opened[2].session.id]
    refused(house, opened[2].text)
    for one in (*opened[:2], *opened[3:], sixth, kept):
        enter(house, one.text)
    assert others.session.id in store.sessions.known


def test_who_signs_in_after_the_clock_was_set_back_is_signed_in(house: House, store: Store) -> None:
    """The others were used in what is the future now."""
    house.later(hours=1)
    opened = [store.open() for _ in range(5)]
    house.later(minutes=-10)
    sixth = store.open()
    assert len(sixth.ended) == 1
    assert sixth.session.id not in [one.id for one in sixth.ended]
    enter(house, sixth.text)
    assert sum(one.session.id in store.sessions.known for one in opened) == 4


def test_the_door_remembers_no_more_of_sessions_that_are_over_than_it_has_room_for(
    house: House, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcpctl.identity.standing._REMEMBERED", 5)
    for _ in range(20):
        one = store.open()
        enter(house, one.text)
        store.sessions.end([one.session.id])
        refused(house, one.text)
    door = house.door
    assert max(map(len, (door._verifying, door._editions, door._gone, door._known, door._seen))) <= 5


def test_a_restart_keeps_sessions(house: House, store: Store, tmp_path: Path) -> None:
    session, text, _ = store.open()
    store.state.close()
    again = Store(house, tmp_path / "state.db")
    house.door.sessions = again.sessions
    assert enter(house, text).token == session.id
    again.state.close()


def test_disabling_or_removing_the_user_ends_their_sessions(house: House, store: Store) -> None:
    session, text, _ = store.open()
    enter(house, text)
    users.disable(house.users, "alice", house.now)
    house.door.refresh()
    assert house.ended == [{session.id: "its user is disabled"}]
    assert "disabled" in refused(house, text).message
    users.disable(house.users, "alice", None)
    enter(house, text)
    users.remove(house.users, "alice")
    house.door.refresh()
    assert house.ended[-1] == {session.id: "its user is gone"}
    house.later(hours=0.5)
    users.add(house.users, "alice", None, house.now)
    assert "another alice" in refused(house, text).message


def test_a_renewed_secret_replaces_the_old_one_while_what_is_open_goes_on(house: House, store: Store) -> None:
    session, old, _ = store.open(kind=OAUTH, access=HOUR)
    first = enter(house, old)
    house.later(minutes=50)
    new = store.sessions.renew(store.sessions.known[session.id], HOUR, timedelta(seconds=30))
    again = enter(house, new)
    assert (again.pool, again.edition, house.ended) == (first.pool, first.edition, [])
    assert house.door.still_valid(first)
    assert enter(house, old).token == session.id, "what was on its way arrives"
    house.later(seconds=30)
    assert refused(house, old).message == "wrong secret"
    house.later(minutes=59)
    assert enter(house, new).token == session.id
    house.later(minutes=1)
    assert "expired" in refused(house, new).message
    last = store.sessions.renew(store.sessions.known[session.id], HOUR, timedelta(0))
    assert enter(house, last).token == session.id
    refused(house, new)


def test_access_that_has_ended_closes_what_is_open_until_it_is_renewed(house: House, store: Store) -> None:
    session, text, _ = store.open(kind=OAUTH, access=HOUR)
    found = enter(house, text)
    assert house.door.next_expiry() == 3600
    house.later(hours=1)
    assert house.door.expired() == [session.id]
    assert not house.door.still_valid(found)


def test_an_access_that_its_client_can_renew_is_401_however_many_were_wrong(house: House, store: Store) -> None:
    ended = [store.open(kind=OAUTH, access=HOUR, client="a").text for _ in range(FAILED + 2)]
    own = store.open().text
    house.later(hours=1)
    assert {refused(house, text).status for text in ended} == {401}  # and none of them counts
    assert [refused(house, own).status for _ in range(FAILED + 1)] == [401] * FAILED + [429]
    assert refused(house, ended[0]).status == 401
    house.later(days=90)
    assert {refused(house, text).status for text in ended[:FAILED]} == {401}
    assert refused(house, ended[0]).status == 429, "what is over for good is not renewed"


def test_sessions_that_are_over_are_swept(house: House, store: Store) -> None:
    store.open()
    kept = store.open(kind=OAUTH, access=timedelta(minutes=5))
    house.later(hours=1)
    store.sessions.sweep()
    assert [*store.sessions.known] == [kept.session.id]
    assert len(store.state.rows("SELECT id FROM sessions")) == 2
    house.later(hours=2)
    store.sessions.sweep()
    assert store.state.rows("SELECT id FROM sessions") == [(kept.session.id,)]


def test_a_store_that_is_gone_or_broken_opens_nothing_and_tokens_still_do(house: House, store: Store) -> None:
    session, text, _ = store.open()
    _, token = house.token()
    enter(house, text)
    whole = store.state.path.read_bytes()
    store.state.path.write_bytes(b"not a store")
    refused(house, text)
    assert house.ended == [{session.id: "signed out"}]
    enter(house, token)
    with pytest.raises(ConfigError):
        store.open()
    store.state.path.write_bytes(whole)
    for path in store.state.path.parent.glob("state.db-*"):
        path.unlink()


def test_a_store_that_is_held_leaves_who_is_signed_in(house: House, store: Store) -> None:
    _, text, _ = store.open()
    enter(house, text)
    house.later(minutes=10)
    with sqlite3.connect(store.state.path, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        enter(house, text)
        holder.execute("ROLLBACK")
    holder.close()
    enter(house, text, THERE)
    assert store.sessions.known[sessions.session_id(text) or ""].used_at == house.now


def test_ending_twice_is_once(store: Store) -> None:
    session, _, _ = store.open()
    assert store.sessions.end([session.id, session.id, "Snothere"]) == [session.id]
    assert store.sessions.end([session.id]) == []
    assert store.sessions.of("alice") == []


def test_a_sessions_text_is_masked_in_messages(store: Store) -> None:
    _, text, _ = store.open()
    assert masked(f"it was {text}") == f"it was {text[:13]}…"


# -- the end of their time, and of their password ---------------------------------------------------------------------


def test_whose_time_is_over_is_told_once_by_one_of_those_who_sweep(house: House, store: Store, other: Store) -> None:
    idle, _, _ = store.open()
    used, _, _ = store.open("bob")
    renewed, _, _ = store.open(kind=OAUTH, access=HOUR)
    for _ in range(25):
        house.later(minutes=59)
        store.sessions.use(store.sessions.known[used.id])
    told = [(one.id, why) for sweep in (other, store, other) for one, why in sweep.sessions.sweep()]
    assert sorted(told) == sorted([(idle.id, "not used for 1 h"), (used.id, "its 24 h were over")])
    assert {*store.sessions.known} == {*other.sessions.known} == {renewed.id}, "its access alone was over"


def test_a_session_of_another_password_is_over_and_what_it_has_open_ends(house: House, store: Store) -> None:
    users.add(house.users, "carol", None, house.now, password=passwords.hashed("first and quite long"))
    people = house.users.current()
    session, text, _ = store.sessions.open("carol", mark_of(people["carol"].password))
    principal = enter(house, text)
    users.set_password(house.users, "carol", passwords.hashed("second and as long"))
    assert refused(house, text).message == "its user's password was changed"
    assert house.ended == [{session.id: "its user's password was changed"}]
    assert not house.door.still_valid(principal)
    assert house.door.again(text, HERE) is None


def test_a_user_whose_password_stays_keeps_their_sessions(house: House, store: Store) -> None:
    _, text, _ = store.open()
    enter(house, text)
    users.add(house.users, "dave", None, house.now)
    enter(house, text)
    assert house.ended == []


def test_sessions_of_a_kind_that_was_turned_off_open_nothing_and_are_ended_with_the_others(
    house: House, store: Store, tmp_path: Path
) -> None:
    kept, _, _ = store.open()
    gone, text, _ = store.open(kind=OAUTH, access=HOUR)
    state = State(tmp_path / "state.db")
    less = Sessions(state, {PASSWORD: Rules()}, lambda: house.now)
    house.door.sessions = less
    assert refused(house, text).message == "no such session, or it has ended"
    assert [one.id for one in less.all()] == [kept.id]
    assert {*less.records()} == {kept.id, gone.id}
    assert sorted(less.end_of("alice")) == sorted([kept.id, gone.id])
    assert less.sweep() == []
    state.close()


def test_what_is_told_of_a_session_opens_nothing(store: Store) -> None:
    session, text, _ = store.open(address=HERE)
    values = sessions.as_values(session, store.sessions)
    assert (values["address"], values["expires_at"]) == (HERE, "2026-11-21T12:00:00Z")
    for secret in (text, text.split("_")[2], session.hash, MARK):
        assert secret not in str(values)
