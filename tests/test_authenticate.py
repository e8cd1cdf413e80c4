"""A presented credential → Principal, or a refusal: what it costs, what is remembered, and when it is over."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from authenticating import FAILED, HERE, START, THERE, House, enter, forged, house, refused, run
from mcpctl.config_values import network
from mcpctl.errors import UnauthorizedError
from mcpctl.identity import authenticate, tenants, tokens, users
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.policy.limits import WINDOW

__all__ = ["house"]


def test_a_right_token_says_who_asks_and_what_it_is_limited_to(house: House) -> None:
    name, text = house.token(
        user="alice", databases=("shop",), permissions=("tools:*",), expires_at=START + timedelta(1)
    )
    found = enter(house, text)
    assert (found.token, found.user, found.name) == (name, "alice", "alice")
    assert (found.databases, found.permissions, found.expires_at) == (("shop",), ("tools:*",), START + timedelta(1))
    assert len(found.pool) == 64
    assert text not in repr(found)
    assert text.split("_")[2] not in repr(vars(house.door))


@pytest.mark.parametrize(
    "text", ["", "x", "mcp_", "Bearer", "é" * 63, "\udcff", "mcp_aaaaaaaa_" + "0" * 43 + "_000000", "x" * 1_000_000]
)
def test_a_text_of_another_form_or_checksum_costs_no_hash(house: House, text: str) -> None:
    house.token()
    problem = refused(house, text)
    assert (problem.status, problem.token_id) == (401, None)
    assert house.hashes == 0


def test_a_typo_and_an_unknown_id_cost_no_hash(house: House) -> None:
    name, text = house.token()
    refused(house, text[:-1] + ("0" if text[-1] != "0" else "1"))
    refused(house, text[:20] + ("0" if text[20] != "0" else "1") + text[21:])
    unknown = tokens.mint({name})
    assert refused(house, unknown[1]).token_id == unknown[0]
    assert house.hashes == 0


def test_a_token_is_hashed_once_and_then_remembered(house: House) -> None:
    _, text = house.token()
    first = enter(house, text)
    assert [enter(house, text, address) for address in (HERE, THERE, None)] == [first] * 3
    assert house.hashes == 1


def test_requests_that_come_at_once_cost_one_hash_together(house: House) -> None:
    _, text = house.token()

    async def all_at_once() -> list[Principal]:
        return await asyncio.gather(*(house.door.authenticate(text, HERE) for _ in range(50)))

    assert len(set(run(all_at_once()))) == 1
    assert house.hashes == 1


def test_a_remembered_token_does_not_let_another_secret_of_its_id_in(house: House) -> None:
    _, text = house.token()
    enter(house, text)
    assert refused(house, forged(text)).message == "wrong secret"


def test_a_change_of_another_entry_forgets_nothing(house: House) -> None:
    _, text = house.token()
    other, _ = house.token()
    enter(house, text)
    tokens.revoke(house.tokens, [other], house.now)
    house.token()
    enter(house, text)
    assert house.hashes == 1
    assert house.ended == []


def test_a_new_hash_under_the_same_id_forgets_the_old_secret_at_once(house: House) -> None:
    name, text = house.token()
    other = house.token()[0]
    before = enter(house, text)
    house.change(name, hash=house.tokens.current()[other].hash)
    assert refused(house, text).message == "wrong secret"
    assert house.ended == [{name: "changed"}]
    assert not house.door.still_valid(before)


def test_wrong_credentials_of_an_address_are_429_in_the_end_and_a_right_token_is_always_let_in(house: House) -> None:
    name, text = house.token()
    other_name, other = house.token()
    enter(house, other)
    for number in range(FAILED):
        wrong = ("no token at all", tokens.mint({name})[1], forged(text, number))[number % 3]
        assert refused(house, wrong).status == 401
    limited = refused(house, forged(text, 99))
    assert (limited.status, limited.token_id, limited.retry_after) == (429, name, WINDOW)
    over, stolen = house.token(expires_at=house.now + timedelta(seconds=0))
    told = refused(house, stolen)  # as a wrong one: that its secret is right is nobody's business
    assert (told.status, told.proven, told.token_id, limited.proven) == (429, True, over, False)
    assert refused(house, "x").status == 429
    assert enter(house, text).token == name  # never seen before, from that address
    assert enter(house, other).token == other_name
    assert refused(house, forged(text), THERE).status == 401
    assert refused(house, forged(text), None).status == 401
    house.later(seconds=WINDOW)
    assert refused(house, forged(text, 100)).status == 401


def test_all_that_is_refused_is_answered_alike_however_often_it_is_tried(house: House) -> None:
    live, elsewhere = house.token(allow_ips=(network("192.0.2.1"),))
    over, expired = house.token(expires_at=START)
    dead, revoked = house.token()
    tokens.revoke(house.tokens, [dead], house.now)
    unknown = tokens.mint({live, over, dead})[1]
    reasons = {elsewhere: "not from this address", expired: "the token is expired", revoked: "the token is revoked",
               forged(elsewhere): "wrong secret", unknown: "no such token id"}  # fmt: skip
    for number, (text, reason) in enumerate(reasons.items(), 1):
        found = [refused(house, text, f"203.0.113.{number}") for _ in range(FAILED + 2)]
        assert [one.status for one in found] == [401] * FAILED + [429] * 2
        assert {one.retry_after for one in found} == {0, WINDOW}
        assert all(reason in one.message for one in found)
    assert enter(house, elsewhere).token == live


def test_wrong_secrets_that_come_at_once_are_counted_like_those_in_turn(house: House) -> None:
    name, text = house.token()

    async def flood() -> list[BaseException | Principal]:
        texts = [forged(text, number) for number in range(100)]
        return await asyncio.gather(*(house.door.authenticate(one, HERE) for one in texts), return_exceptions=True)

    statuses = [problem.status for problem in run(flood()) if isinstance(problem, UnauthorizedError)]
    assert (statuses.count(401), statuses.count(429)) == (FAILED, 100 - FAILED)
    assert enter(house, text).token == name


def test_a_tenant_s_token_is_refused_from_outside_of_its_tenant_s_networks_too(house: House) -> None:
    place = tenants.tenant_file(house.tokens.path.with_name("tenants.yaml"))
    tenants.add(place, Tenant("acme", START, "acme", allow_ips=(network("192.0.2.0/24"),)))
    users.add(house.users, "ann", None, START, tenant="acme")
    _, text = house.token(user="ann", allow_ips=(network("192.0.2.1"), network("198.51.100.1")))
    _, wide = house.token(user="ann")
    assert enter(house, text).tenant == "acme"
    assert refused(house, text, THERE).message == f"not from this address ({THERE})"
    assert refused(house, text, "198.51.100.1").message == "not from this address (198.51.100.1)"
    assert enter(house, wide, THERE).tenant == "acme"
    assert refused(house, wide, "2001:db8::1").status == 401
    found = enter(house, wide, HERE)
    with place.edit() as entries:
        entries["acme"] = replace(entries["acme"], allow_ips=(network("203.0.113.0/24"),))
    assert refused(house, wide, HERE).status == 401
    assert not house.door.in_force(found, "acme")


def test_right_tokens_that_come_at_once_are_never_taken_for_an_attack(house: House) -> None:
    name, text = house.token()

    async def both() -> list[BaseException | Principal]:
        texts = [text if number % 2 else forged(text, number) for number in range(2 * FAILED - 2)]
        return await asyncio.gather(*(house.door.authenticate(one, HERE) for one in texts), return_exceptions=True)

    found = [one for one in run(both()) if isinstance(one, Principal)]
    assert [one.token for one in found] == [name] * (FAILED - 1)


def test_hashing_does_not_hold_up_the_event_loop(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    _, text = house.token()
    go = threading.Event()
    monkeypatch.setattr(authenticate.tokens, "matches", lambda *_: go.wait(20))

    async def meanwhile() -> Principal:
        asking = asyncio.create_task(house.door.authenticate(text, HERE))
        for _ in range(100):
            await asyncio.sleep(0)  # the loop goes round while the hash is being made
        assert not asking.done()
        go.set()
        return await asking

    assert run(meanwhile()).token


def test_an_entry_that_goes_while_its_hash_is_made_lets_nobody_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text = house.token()

    def matches(*_: object) -> bool:
        tokens.remove(house.tokens, name)
        house.door.refresh()
        return True

    monkeypatch.setattr(authenticate.tokens, "matches", matches)
    assert refused(house, text).message == "no such token id"


def test_a_token_is_refused_from_elsewhere_and_taken_from_its_own_address(house: House) -> None:
    name, text = house.token(allow_ips=(network("192.0.2.1"),))
    assert enter(house, text).token == name
    for _ in range(FAILED + 1):
        assert "not from this address" in refused(house, text, THERE).message
    assert enter(house, text).token == name


def test_a_token_ends_at_its_instant_and_is_told_once(house: House) -> None:
    name, text = house.token(expires_at=START + timedelta(hours=1))
    house.token(expires_at=START + timedelta(minutes=1))  # never used: nothing of it can be open
    found = enter(house, text)
    assert house.door.next_expiry() == 3600
    house.later(hours=1, microseconds=-1)
    assert house.door.expired() == []
    assert enter(house, text) == found
    assert house.door.still_valid(found)
    house.later(microseconds=1)
    assert not house.door.still_valid(found)
    assert refused(house, text).message == "the token is expired"
    assert house.door.next_expiry() == 0
    assert house.door.expired() == [name]
    assert house.door.expired() == []
    assert house.door.next_expiry() is None
    assert house.hashes == 1


def test_an_end_that_is_put_off_works_without_a_new_hash(house: House) -> None:
    name, text = house.token(expires_at=START + timedelta(hours=1))
    found = enter(house, text)
    house.change(name, expires_at=START + timedelta(hours=2), note="longer")
    house.door.refresh()
    assert house.door.still_valid(found)
    assert enter(house, text).expires_at == START + timedelta(hours=2)
    assert house.door.still_valid(found)
    assert house.hashes == 1
    assert house.ended == []


def test_one_changed_entry_costs_the_others_no_new_hash_and_as_long_as_none_is_due_none_is_looked_at(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [house.token(expires_at=START + timedelta(hours=2)) for _ in range(5)]
    first, later = house.token(expires_at=START + timedelta(hours=1)), house.token()
    for _, text in (*made, first, later):
        enter(house, text)
    tokens.revoke(house.tokens, [made[0][0]], house.now)
    house.change(later[0], expires_at=START + timedelta(minutes=30))
    house.door.refresh()
    assert house.ended == [{made[0][0]: "revoked"}]
    with monkeypatch.context() as looking:
        looking.setattr(Token, "status", lambda *_: pytest.fail("it was looked at"))
        assert house.door.next_expiry() == 1800
        assert house.door.expired() == []
    for _, text in (*made[1:], first, later):
        enter(house, text)
    assert house.hashes == 7
    house.later(minutes=30)
    assert house.door.expired() == [later[0]]
    assert house.door.next_expiry() == 1800
    house.later(minutes=30)
    assert house.door.expired() == [first[0]]


def test_who_was_seen_to_have_expired_is_told_of_though_the_clock_is_set_back(house: House) -> None:
    name, text = house.token(expires_at=START + timedelta(hours=1))
    enter(house, text)
    house.later(hours=1)
    refused(house, text)
    house.later(hours=-1)
    assert house.door.expired() == [name]


def test_a_rotation_with_overlap_does_not_disturb_what_the_old_token_has_open(house: House) -> None:
    name, text = house.token()
    found = enter(house, text)
    tokens.rotate(house.tokens, name, timedelta(hours=1), None, house.now)
    house.door.refresh()
    assert house.door.still_valid(found)
    assert enter(house, text).token == name
    assert house.ended == []
    house.later(hours=1)
    assert house.door.expired() == [name]
    assert not house.door.still_valid(found)


@pytest.mark.parametrize("way", ["revoked", "removed", "its user is gone", "changed", "rotated"])
def test_every_end_is_told_once_before_the_request_that_noticed_is_answered(house: House, way: str) -> None:
    name, text = house.token(user="alice")
    unused, _ = house.token(user="alice")
    found = enter(house, text)
    match way:
        case "revoked":
            tokens.revoke(house.tokens, None, house.now)
        case "removed":
            tokens.remove(house.tokens, name)
            tokens.remove(house.tokens, unused)
        case "rotated":
            tokens.rotate(house.tokens, name, None, None, house.now)
        case "changed":
            house.change(name, permissions=("tools:whoami",))
        case _:
            with house.users.edit() as people:
                del people["alice"]
    if way == "changed":
        assert enter(house, text).permissions == ("tools:whoami",)
    else:
        refused(house, text)
    assert house.ended == [{name: "revoked" if way == "rotated" else way}]
    assert not house.door.still_valid(found)
    house.door.refresh()
    assert len(house.ended) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"user": None},
        {"databases": ("other",)},
        {"databases": ()},
        {"permissions": ()},
        {"allow_ips": (network("192.0.2.0/24"),)},
    ],
)
def test_a_narrower_right_ends_what_was_opened_under_the_wider_one_for_good(
    house: House, fields: dict[str, Any]
) -> None:
    name, text = house.token(user="alice")
    before = enter(house, text)
    house.change(name, **fields)
    after = enter(house, text)
    assert house.ended == [{name: "changed"}]
    assert not house.door.still_valid(before)
    assert house.door.still_valid(after)
    house.change(name, user="alice", databases=None, permissions=None, allow_ips=None)
    house.door.refresh()  # as it was at first: what was opened then is over nevertheless
    assert not house.door.still_valid(before)
    assert not house.door.still_valid(after)


def test_an_id_that_is_removed_and_put_back_is_let_in_anew_but_nothing_of_before_goes_on(house: House) -> None:
    name, text = house.token()
    before = enter(house, text)
    entry = house.tokens.current()[name]
    tokens.remove(house.tokens, name)
    refused(house, text)
    with house.tokens.edit() as entries:
        entries[name] = entry
    after = enter(house, text)
    assert house.hashes == 2
    assert house.door.still_valid(after)
    assert not house.door.still_valid(before)


def test_whoever_needs_no_token_is_always_valid(house: House) -> None:
    assert house.door.still_valid(LOCAL)
