"""What ends all that an authenticator remembers: broken files, a lockdown, a change of any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta

import pytest

from authenticating import START, House, enter, forged, house, refused
from mcpctl.errors import LockedError, UnavailableError
from mcpctl.identity import users

__all__ = ["house"]


@pytest.mark.parametrize("which", ["tokens", "users"])
@pytest.mark.parametrize("fault", ["broken", "mode", "missing"])
def test_a_broken_file_closes_the_door_until_it_is_mended(house: House, which: str, fault: str) -> None:
    _, text = house.token(user="alice")
    found = enter(house, text)
    path = getattr(house, which).path
    good = path.read_bytes()
    match fault:
        case "broken":
            path.write_bytes(good + b"broken")
        case "mode":
            path.chmod(0o666)
        case _:
            path.rename(path.with_name("away"))
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            enter(house, text)
        assert caught.value.status == 503
        assert path.name in caught.value.message
    match fault:
        case "broken":
            path.write_bytes(good)
        case "mode":
            path.chmod(0o600)
        case _:
            path.with_name("away").rename(path)
    assert enter(house, text) == found
    assert house.hashes == 1
    assert house.ended == []


def test_a_token_that_expires_while_the_files_are_broken_still_ends(house: House) -> None:
    name, text = house.token(expires_at=START + timedelta(hours=1))
    found = enter(house, text)
    house.tokens.path.chmod(0o666)
    house.later(hours=2)
    with pytest.raises(UnavailableError):
        house.door.refresh()
    assert house.door.expired() == [name]
    assert not house.door.still_valid(found)


def test_while_the_server_is_locked_a_wrong_credential_is_wrong_and_a_right_one_is_told_and_known(house: House) -> None:
    name, text = house.token(user="alice")
    tripped: list[str] = []
    house.door.canaries, house.door.tripped = {name}, lambda token, address: tripped.append(token.id)
    house.door.lockdown.path.touch()
    assert refused(house, forged(text)).token_id == name
    assert tripped == []
    with pytest.raises(LockedError) as caught:
        enter(house, text)
    assert (caught.value.token_id, caught.value.user, tripped) == (name, "alice", [name])
    house.change(name, revoked_at=house.now)
    assert refused(house, text).message == "the token is revoked"


@pytest.mark.parametrize(
    "end",
    [
        lambda house, name: house.change(name, revoked_at=house.now),
        lambda house, name: house.change(name, expires_at=START),
        lambda house, name: users.disable(house.users, "alice", START),
        lambda house, name: users.remove(house.users, "alice"),
        lambda house, name: house.door.keep_out("command", {name: "told"}),
        lambda house, name: house.door._kept_out.update(command={name: "told to another generation"}),
        lambda house, name: house.door.lockdown.path.touch(),
        lambda house, name: (house.later(hours=2), house.door.expired(), house.later(hours=-2)),
    ],
)
def test_what_is_remembered_of_a_token_that_opens_ends_with_whatever_ends_it(
    house: House, end: Callable[[House, str], object]
) -> None:
    name, text = house.token(user="alice", expires_at=START + timedelta(hours=1))
    found = enter(house, text)
    assert house.door.still_valid(found)
    end(house, name)
    with contextlib.suppress(LockedError):
        house.door.refresh()
    assert not house.door.still_valid(found)
    assert not house.door.in_force(found, "shop")


def test_files_that_have_not_changed_are_looked_at_and_not_gone_through(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text = house.token(user="alice")
    found = enter(house, text)
    monkeypatch.setattr(house.door, "read", lambda: pytest.fail("read again"))
    monkeypatch.setattr(house.door, "_why_not", lambda token: pytest.fail("judged again"))
    assert enter(house, text) is found
    assert house.door.still_valid(found)
    monkeypatch.undo()
    house.change(name, revoked_at=house.now)
    assert refused(house, text).message == "the token is revoked"
