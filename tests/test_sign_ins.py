"""How often somebody may be wrong about a password, from where and about whom. The clock stands still."""

from __future__ import annotations

import pytest

from mcpctl.errors import LimitedError
from mcpctl.policy.limits import WINDOW
from mcpctl.policy.sign_ins import FEW, SignIns
from mcpctl.shared_counters import ADDRESSES, PRINCIPALS, Counters

MOST = 10
HERE, THERE = "192.0.2.1", "192.0.2.2"


class Gate:
    """The counts of one server, with a clock that stands still."""

    def __init__(self, most: int = MOST) -> None:
        self.now = 1000.0
        self.counters = Counters()
        self.limits = SignIns(most, self.counters, lambda: self.now)

    def wrong(self, name: str = "alice", address: str | None = HERE, times: int = 1) -> None:
        for _ in range(times):
            self.limits.end(self.limits.begin(name, address), wrong=True)

    def right(self, name: str = "alice", address: str | None = HERE) -> None:
        self.limits.end(self.limits.begin(name, address), wrong=False)

    def refused(self, name: str = "alice", address: str | None = HERE) -> int:
        with pytest.raises(LimitedError) as caught:
            self.limits.begin(name, address)
        assert caught.value.status == 429
        return caught.value.retry_after

    def somewhere(self, name: str, times: int) -> None:
        """Wrong tries about a name, each from another network."""
        for number in range(times):
            self.wrong(name, f"198.51.100.{number}")


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_who_was_right_a_thousand_times_is_let_in(gate: Gate) -> None:
    gate.wrong(times=MOST - 1)
    for _ in range(1000):
        gate.right()


def test_a_network_that_was_wrong_ten_times_waits_whomever_it_names_until_its_quarter_of_an_hour_is_over(
    gate: Gate,
) -> None:
    gate.wrong(times=MOST - 1)
    gate.now += 60
    gate.wrong("bob")
    assert gate.refused("carol") == WINDOW - 60
    gate.now += WINDOW - 60 - 0.5
    assert gate.refused() == 1
    gate.now += 0.5
    gate.wrong(times=MOST)
    gate.refused()


def test_others_are_let_in_while_a_network_waits(gate: Gate) -> None:
    gate.wrong(times=MOST)
    gate.refused()
    for name in ("alice", "bob"):
        gate.right(name, THERE)


def test_the_addresses_of_one_ipv6_network_count_as_one(gate: Gate) -> None:
    for number in range(MOST):
        gate.wrong(address=f"2001:db8:1:2::{number:x}")
    gate.refused(address="2001:db8:1:2:ffff::1")
    gate.right(address="2001:db8:1:3::1")


@pytest.mark.parametrize("name", ["alice", "nobody", "x" * 16000, "\ud800", ""])
def test_a_name_that_many_networks_try_leaves_each_network_two_wrong_tries(gate: Gate, name: str) -> None:
    gate.somewhere(name, MOST)
    gate.wrong(name, times=FEW)
    assert gate.refused(name) == WINDOW
    gate.right("bob")


def test_nobody_who_was_not_wrong_is_refused_because_of_others(gate: Gate) -> None:
    gate.somewhere("alice", 200)
    for _ in range(50):
        gate.right("alice", THERE)
    gate.wrong("alice", THERE)
    gate.right("alice", THERE)


def test_what_is_being_checked_counts_as_wrong_until_it_was_right(gate: Gate) -> None:
    open_ = [gate.limits.begin("alice", HERE) for _ in range(MOST)]
    assert gate.refused() == 1, "it is to come again at once, since these may be right"
    for one in open_:
        gate.limits.end(one, wrong=False)
    gate.right()


def test_a_thousand_tries_at_once_are_no_more_than_ten_wrong_ones(gate: Gate) -> None:
    checked = []
    for _ in range(1000):
        try:
            checked.append(gate.limits.begin("alice", HERE))
        except LimitedError:
            continue
    assert len(checked) == MOST


def test_a_try_that_is_refused_counts_nothing(gate: Gate) -> None:
    gate.wrong(times=MOST)
    for _ in range(100):
        gate.refused("bob")
    gate.now += WINDOW
    gate.somewhere("bob", MOST - 1)
    gate.wrong("bob", THERE, times=FEW)


def test_names_that_strangers_make_up_take_no_place_of_a_token_or_user(gate: Gate) -> None:
    kept = gate.counters.slot(PRINCIPALS, gate.counters.digest("user:alice"))
    before = bytes(gate.counters.memory[kept.key : kept.key + 16])
    for number in range(8000):
        gate.wrong(f"name{number}", f"10.{number >> 8 & 255}.{number & 255}.1")
    assert bytes(gate.counters.memory[kept.key : kept.key + 16]) == before


def test_a_count_that_cannot_be_begins_anew(gate: Gate) -> None:
    gate.wrong(times=MOST)
    slot = gate.counters.slot(ADDRESSES, gate.counters.digest(f"sign-in from {HERE}"))
    for until in (5e8, float("nan"), -1.0):
        gate.counters.fail(slot, until, 1000)
        gate.right("bob")
