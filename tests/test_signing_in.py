"""A right password becomes a session, and what others do meanwhile leaves nothing that nobody knows of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from authenticating import HERE, House, house, run
from chain import KEY, lines
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnauthorizedError, UnavailableError
from mcpctl.identity import users
from mcpctl.identity.password_queue import Passwords
from mcpctl.identity.passwords import RFC_9106_SECOND
from mcpctl.identity.sessions import PASSWORD as KIND
from mcpctl.identity.sessions import Opened, Rules, Sessions
from mcpctl.policy.sign_ins import SignIns
from mcpctl.recorder import Recorder
from mcpctl.shared_counters import Counters
from mcpctl.signing_in import MADE_ROOM, SigningIn
from mcpctl.state import State
from signed_in import PASSWORD, hashed

__all__ = ["house"]


class Meanwhile(Sessions):
    """Sessions of which one is opened after something else was done: what another process does while the store is
    waited for."""

    first: Callable[[], object] = staticmethod(lambda: None)

    def open(self, *args: Any, **more: Any) -> Opened:
        self.first()
        return super().open(*args, **more)


class Desk:
    """Where alice signs in."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house = house
        self.log = AuditLog(folder / "audit.jsonl", KEY, lambda: house.now)
        self.state = State(folder / "state.db")
        self.sessions = Meanwhile(self.state, {KIND: Rules(most=1)}, lambda: house.now)
        self.passwords = Passwords(RFC_9106_SECOND)
        self.recorder = Recorder(self.log, "full", refuse=True)
        house.door.sessions = self.sessions
        limits = SignIns(10, Counters())
        self.signing_in = SigningIn(house.door, self.sessions, self.passwords, limits, self.recorder)
        users.set_password(house.users, "alice", hashed())

    def open(self) -> Opened:
        return run(self.signing_in.open("alice", PASSWORD, HERE, "1"))

    def events(self) -> list[tuple[str, str | None, str | None]]:
        return [(one["event"], one.get("token"), one.get("reason")) for one in lines(self.log.path)]

    def close(self) -> None:
        self.passwords.close()
        self.state.close()
        self.log.close()


@pytest.fixture
def desk(house: House, tmp_path: Path) -> Iterator[Desk]:
    found = Desk(house, tmp_path)
    yield found
    found.close()


def test_who_is_disabled_while_their_session_is_opened_has_none_when_they_are_enabled_again(desk: Desk) -> None:
    def disabled() -> None:
        users.disable(desk.house.users, "alice", desk.house.now)
        desk.sessions.end_of("alice")

    desk.sessions.first = disabled
    with pytest.raises(UnauthorizedError) as caught:
        desk.open()
    assert caught.value.message == "its user alice is disabled"
    users.disable(desk.house.users, "alice", None)
    desk.house.door.look()
    assert desk.sessions.of("alice") == []
    assert [event for event, *_ in desk.events()] == ["auth.refused"]


def test_a_user_file_that_breaks_meanwhile_leaves_no_session_that_nobody_has(desk: Desk) -> None:
    desk.sessions.first = lambda: desk.house.users.path.write_text("users: [")
    with pytest.raises(UnavailableError):
        desk.open()
    assert desk.sessions.of("alice") == []


def test_what_ended_to_make_room_is_told_although_the_new_ones_line_cannot_be_written(desk: Desk) -> None:
    first, log = desk.open().session.id, desk.log.path
    aside = log.with_name("moved.jsonl")

    def break_it() -> None:
        log.rename(aside)
        log.mkdir()

    desk.sessions.first = break_it
    with pytest.raises(UnavailableError):
        desk.open()
    log.rmdir()
    aside.rename(log)
    desk.recorder.catch_up()
    assert desk.sessions.of("alice") == []
    assert [one for one in desk.events() if one[0] == "session.closed"] == [("session.closed", first, MADE_ROOM)]
