"""A text that was let in, looked at again: whatever would not let it in now, or lets in somebody else, is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from authenticating import HERE, START, THERE, House, enter, forged, house, refused
from mcpctl.config_values import network
from mcpctl.errors import LockedError, UnavailableError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.tenants import Tenant

__all__ = ["house"]


def _let_in(house: House, **wanted: object) -> tuple[str, str]:
    name, text = house.token(**wanted)
    assert house.door.again(text, HERE) is None
    enter(house, text)
    assert house.door.again(text, HERE) is not None
    return name, text


def test_as_long_as_nothing_changes_it_is_who_it_was(house: House) -> None:
    _, text = _let_in(house, user="alice", expires_at=START + timedelta(hours=1))
    for _ in range(3):
        house.token()  # another's entry
        house.later(minutes=10)
        assert house.door.again(text, HERE) is enter(house, text)


def _with_the_secret_of_another(house: House, name: str) -> None:
    other, _ = house.token()
    house.change(name, hash=house.tokens.current()[other].hash)


CHANGES: dict[str, Callable[[House, str], object]] = {
    "revoked": lambda house, name: tokens.revoke(house.tokens, [name], house.now),
    "removed": lambda house, name: tokens.remove(house.tokens, name),
    "another secret": _with_the_secret_of_another,
    "expired": lambda house, name: house.later(hours=2),
    "ends sooner": lambda house, name: house.change(name, expires_at=house.now),
    "from elsewhere alone": lambda house, name: house.change(name, allow_ips=(network("198.51.100.1"),)),
    "blocked": lambda house, name: house.door.keep_out("canary", {name: "it is a canary"}),
    "its user is gone": lambda house, name: users.remove(house.users, "alice"),
    "its user is disabled": lambda house, name: users.disable(house.users, "alice", START),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_shuts_a_token_out_is_seen(house: House, change: Callable[[House, str], object]) -> None:
    name, text = _let_in(house, user="alice", expires_at=START + timedelta(hours=1))
    change(house, name)
    assert house.door.again(text, HERE) is None
    refused(house, text)
    assert house.door.again(text, HERE) is None


def test_whose_rights_are_others_now_is_asked_anew(house: House) -> None:
    name, text = _let_in(house, user="alice")
    users.set_roles(house.users, "alice", ["reader"])
    assert house.door.again(text, HERE) is None
    assert enter(house, text).roles == ("reader",)
    assert house.door.again(text, HERE) is enter(house, text)
    house.change(name, databases=("shop",))
    assert house.door.again(text, HERE) is None
    assert enter(house, text).databases == ("shop",)


def test_a_tenant_that_lets_in_from_elsewhere_alone_is_seen(house: House) -> None:
    place = house.door.tenants
    tenants.add(place, Tenant("acme", START, "acme", allow_ips=(network("192.0.2.0/24"),)))
    users.add(house.users, "ann", None, START, tenant="acme")
    _, text = _let_in(house, user="ann")
    assert house.door.again(text, HERE) is not None
    with place.edit() as entries:
        entries["acme"] = replace(entries["acme"], allow_ips=(network("203.0.113.0/24"),))
    assert house.door.again(text, HERE) is None
    refused(house, text)


def test_a_lockdown_is_seen_and_so_is_its_end(house: House) -> None:
    _, text = _let_in(house)
    house.door.lockdown.begin("now", "test", None)
    assert house.door.again(text, HERE) is None
    with pytest.raises(LockedError):
        enter(house, text)
    house.door.lockdown.lift()
    assert house.door.again(text, HERE) is None, "all that was open has ended, so that it is asked anew"
    enter(house, text)
    assert house.door.again(text, HERE) is not None


def test_while_a_file_is_broken_nobody_is_let_in_again(house: House) -> None:
    _, text = _let_in(house)
    house.tokens.path.write_bytes(b"version: [")
    with pytest.raises(UnavailableError):
        house.door.again(text, HERE)


def test_only_what_was_let_in_is_known_and_what_has_to_be_looked_at_each_time_is_not(house: House) -> None:
    name, text = _let_in(house, allow_ips=(network(HERE),))
    assert house.door.again(text, THERE) is None
    assert house.door.again(forged(text), HERE) is None
    assert house.door.again(text[:-1], HERE) is None
    assert house.door.again("", HERE) is None
    refused(house, text, THERE)
    assert house.door.again(text, THERE) is None
    assert house.door.again(text, HERE) is not None
    canary, other = house.token()
    house.door.canaries = {canary}
    enter(house, other)
    assert house.door.again(other, HERE) is None
    assert name != canary


def test_a_look_at_the_files_is_for_all_that_had_come_before_it(house: House) -> None:
    name, text = _let_in(house)
    tokens.revoke(house.tokens, [name], house.now)
    assert house.door.again(text, HERE, look=False) is not None, "as it was when somebody looked last"
    assert house.door.again(text, HERE) is None
    assert house.door.again(text, HERE, look=False) is None
