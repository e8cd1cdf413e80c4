"""Rates, calls at once and budgets: what is let in, what is refused, and until when. The clocks stand still."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import config
from mcpctl.config_keys import Limits
from mcpctl.errors import ConfigError, LimitedError
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.policy.limits import WINDOW, Limiter, gcra, running
from mcpctl.shared_counters import PLACES, PRINCIPALS, Counters, Slot

ALICE = Principal("alice001", "alice", "x", tenant="acme")
HERE, THERE = "192.0.2.1", "192.0.2.2"
NINE = 1795770000.0
"""2026-11-27 09:00 UTC."""


class House:
    """Limits of a config, with clocks that stand still."""

    def __init__(self, limits: Limits, workers: int = 1) -> None:
        self.now = 1000.0
        self.utc = NINE
        self.limiter = Limiter(limits, Counters(workers=workers), lambda: self.now, lambda: self.utc)

    def enter(self, who: Principal = ALICE, address: str | None = HERE, visited: bool = False) -> Any:
        return self.limiter.enter(who, address, visited=visited)

    def refused(self, who: Principal = ALICE, address: str | None = HERE) -> LimitedError:
        with pytest.raises(LimitedError) as caught:
            self.enter(who, address)
        return caught.value

    def call(self, who: Principal = ALICE, address: str | None = HERE, **cost: Any) -> None:
        """One call from its beginning to its end."""
        slots = self.enter(who, address)
        try:
            self.limiter.check(who, address)
            self.limiter.charge(who, address, **{"rows": 0, "size": 0, "seconds": 0.0, **cost})
        finally:
            self.limiter.leave(slots)

    def over(self, who: Principal = ALICE, address: str | None = HERE) -> LimitedError:
        with pytest.raises(LimitedError) as caught:
            self.limiter.check(who, address)
        return caught.value


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], House]:
    def made(text: str) -> House:
        file = tmp_path / "config.yaml"
        file.touch(0o600)
        file.write_text("databases: {shop: {host: localhost}}\n" + text)
        return House(config.load(file, {}).limits)

    return made


# -- rates ----------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1000), st.integers(1, 50), st.lists(st.floats(0, 2), min_size=1, max_size=60), st.floats(0, 1e9))
def test_no_more_than_burst_and_rate_is_ever_let_in_and_no_wait_is_too_short(
    rate: float, burst: int, pauses: list[float], begun: float
) -> None:
    taken, now, let_in = 0.0, begun, 0
    for pause in pauses:
        now += pause / rate
        taken, wait = gcra(taken, now, 1 / rate, burst)
        let_in += not wait
        assert let_in <= burst + (now - begun) * rate + 1.001
        if wait:
            assert wait <= 1 / rate + 1e-6
            assert gcra(taken, now + wait + 1e-6, 1 / rate, burst)[1] == 0


@pytest.mark.parametrize("stored", [float("nan"), float("inf"), -1e300, 5e8, 0.0])
def test_what_cannot_have_been_taken_counts_as_nothing(stored: float) -> None:
    taken, wait = gcra(stored, 1000.0, 0.1, 20)
    assert (taken, wait) == (1000.1, 0.0)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=80), st.sampled_from([1, 2]))
def test_what_is_let_in_and_noted_is_what_gcra_says_of_one_worker_and_of_several(
    pauses: list[float], workers: int
) -> None:
    house, taken = House(Limits(rate=10.0, burst=3), workers), 0.0
    bob = Principal(None, None, "x")
    for pause in pauses:
        house.now += pause
        taken, wait = gcra(taken, house.now, 0.1, 3)
        for count in (lambda: house.limiter.visit(HERE), lambda: house.limiter.leave(house.enter(bob, None))):
            with pytest.raises(LimitedError) if wait else contextlib.nullcontext():
                count()
        counters = house.limiter._counters
        for kind, name in (("address", HERE), ("token", "local")):
            slot = house.limiter._subject(kind, name).slot
            assert (counters.taken(slot), counters.running(slot)) == (taken, 0)
    house.limiter._counters.close()


@pytest.mark.parametrize("rotten", [float("nan"), float("inf"), -1e300, 5e8])
def test_a_torn_time_in_the_table_refuses_nobody_and_is_written_over(rotten: float) -> None:
    house = House(Limits())
    for _ in range(2):
        house.limiter.visit(HERE)
        house.limiter.leave(house.enter(visited=True))
        counters, subjects = house.limiter._counters, house.limiter._of(ALICE, HERE).all
        assert [round(counters.taken(one.slot), 6) for one in subjects] == [1000.1] * 4
        for one in subjects:
            counters.take(one.slot, rotten)


def test_who_was_evicted_is_looked_up_again_and_what_was_its_place_is_left_alone() -> None:
    house = House(Limits(), workers=2)
    first = house.enter()
    counters, subjects = house.limiter._counters, house.limiter._of(ALICE, HERE).all
    for slot in first:  # as the other worker does it
        counters.memory[slot.key : slot.key + 16] = slot.digest[:4] + bytes(12)
        counters.take(slot, 7.0)
    house.limiter.leave(house.enter())
    house.limiter.visit(HERE)
    house.limiter.leave(first)
    assert not {one.slot.key for one in subjects} & {slot.key for slot in first}
    assert [counters.taken(slot) for slot in first] == [7.0] * 4
    assert [counters.running(slot) for slot in first] == [1] * 4
    assert [counters.running(one.slot) for one in subjects] == [0] * 4
    assert [round(counters.taken(one.slot), 6) for one in subjects] == [1000.1, 1000.1, 1000.1, 1000.2]
    counters.close()


def _fill_the_bucket_of(counters: Counters, slot: Slot) -> None:
    """Have names come that are counted beside that one, and of more worth, until its place is another's."""
    names = (counters.digest(f"token:{number}") for number in itertools.count())
    beside = (one for one in names if int.from_bytes(one[:4], "little") % 2048 == slot.runs // (8 * PLACES))
    for one in itertools.islice(beside, 8):
        counters.take(counters.slot(PRINCIPALS, one), 5000.0)


def test_who_was_evicted_by_its_own_process_is_looked_up_again() -> None:
    house = House(Limits())
    counters, subject = house.limiter._counters, house.limiter._of(ALICE, HERE).all[0]
    house.limiter.leave(house.enter())
    first = subject.slot
    _fill_the_bucket_of(counters, first)
    assert first.gone
    running = house.enter()
    assert not any(one.gone for one in running)
    assert [counters.running(one) for one in running] == [1] * 4
    assert counters.memory[subject.slot.key : subject.slot.key + 16] == subject.digest
    house.limiter.leave(running)
    assert [counters.running(one) for one in running] == [0] * 4


def test_who_leaves_a_place_that_was_given_away_takes_nothing_from_who_has_it_now() -> None:
    house = House(Limits())
    counters, subject = house.limiter._counters, house.limiter._of(ALICE, HERE).all[0]
    running = house.enter()
    counters.counts[subject.slot.runs] = 0  # as if nothing ran there: so it is put out
    _fill_the_bucket_of(counters, subject.slot)
    assert running[0].gone
    counters.counts[running[0].runs] = 5
    house.limiter.leave(running)
    assert counters.counts[running[0].runs] == 5


def test_the_defaults_are_20_at_once_and_10_a_second_for_each_who_counts(make: Callable[[str], House]) -> None:
    house = make("")
    for _ in range(20):
        house.call()
    problem = house.refused()
    assert (problem.kind, problem.name, problem.limit, problem.retry_after) == ("token", "alice001", "rate", 1)
    assert problem.message == (
        "too many calls: 10 a second, and 20 at once, are the limit of the token alice001; again in 1 s"
    )
    assert house.refused(replace(ALICE, token="alice002"), THERE).kind == "user"
    assert house.refused(Principal("bob00001", "bob", "x", tenant="acme"), THERE).kind == "tenant"
    carol = Principal("carol001", "carol", "x")
    assert house.refused(carol, HERE).kind == "address"
    house.call(carol, THERE)
    house.now += 0.1
    house.call()
    house.refused()


def test_what_one_limit_refuses_is_taken_from_no_other(make: Callable[[str], House]) -> None:
    house = make("limits: {tokens: {rate: 1, burst: 1}, users: {rate: 1, burst: 3}}\n")
    house.call()
    for _ in range(10):
        assert house.refused().kind == "token"
    house.call(replace(ALICE, token="alice002"))
    house.call(replace(ALICE, token="alice003"))
    assert house.refused(replace(ALICE, token="alice004")).kind == "user"


def test_an_address_pays_once_before_anybody_knows_who_it_is(make: Callable[[str], House]) -> None:
    house = make("limits: {addresses: {rate: 0.5, burst: 2}}\n")
    for _ in range(2):
        house.limiter.visit(HERE)
        house.limiter.leave(house.enter(visited=True))
    with pytest.raises(LimitedError) as caught:
        house.limiter.visit(HERE)
    assert (caught.value.kind, caught.value.retry_after) == ("address", 2)
    house.limiter.visit(THERE)
    house.limiter.visit(None)


def test_an_ipv6_network_of_64_bits_counts_as_one(make: Callable[[str], House]) -> None:
    house = make("limits: {burst: 1}\n")
    house.limiter.visit("2001:db8:0:1::1")
    with pytest.raises(LimitedError, match="the address 2001:db8:0:1::/64"):
        house.limiter.visit("2001:db8:0:1:ffff::2")
    house.limiter.visit("2001:db8:0:2::1")


def test_a_named_ipv6_address_does_not_count_for_its_whole_network(make: Callable[[str], House]) -> None:
    house = make("limits: {addresses: {burst: 1, named: {'2001:db8::1': {burst: 3}}}}\n")
    for address, burst in (("2001:db8::1", 3), ("2001:db8::2", 1)):
        for _ in range(burst):
            house.limiter.visit(address)
        with pytest.raises(LimitedError):
            house.limiter.visit(address)


def test_the_most_specific_network_wins_and_each_address_in_it_counts_for_itself(make: Callable[[str], House]) -> None:
    house = make(
        "limits: {addresses: {burst: 1, named:"
        " {10.0.0.0/8: {burst: 2}, 10.1.0.0/16: {burst: 3}, 10.1.1.1: {burst: 4}}}}\n"
    )
    for address, burst in (("192.0.2.1", 1), ("10.9.9.9", 2), ("10.9.9.8", 2), ("10.1.2.3", 3), ("10.1.1.1", 4)):
        for _ in range(burst):
            house.limiter.visit(address)
        with pytest.raises(LimitedError):
            house.limiter.visit(address)


def test_one_name_has_its_own_limits_then_its_kind_s_then_those_of_all(make: Callable[[str], House]) -> None:
    house = make("limits: {burst: 5, users: {burst: 4, named: {alice: {burst: 3}}}}\n")
    subjects = {
        name: house.limiter._subject(kind, name).rule.burst
        for kind, name in (("user", "alice"), ("user", "bob"), ("token", "alice"), ("tenant", "x"))
    }
    assert subjects == {"alice": 5, "bob": 4, "x": 5} | {"alice": house.limiter._subject("token", "alice").rule.burst}
    assert house.limiter._subject("user", "alice").rule.burst == 3


# -- calls at once ----------------------------------------------------------------------------------------------------


def test_calls_at_once_are_bounded_and_come_back_when_they_end(make: Callable[[str], House]) -> None:
    house = make("limits: {concurrent: 2, tokens: {concurrent: 1}}\n")
    first = house.enter()
    problem = house.refused()
    assert (problem.kind, problem.limit, problem.retry_after) == ("token", "concurrent", 1)
    assert "1 are the limit of the token alice001; again when one has ended" in problem.message
    second = house.enter(replace(ALICE, token="alice002"), THERE)
    assert house.refused(replace(ALICE, token="alice003"), None).kind == "user"
    house.limiter.leave(first)
    house.limiter.leave(house.enter())
    house.limiter.leave(second)
    assert house.limiter._counters.running(house.enter()[1]) == 1


def test_calls_that_run_in_another_worker_count() -> None:
    house = House(Limits(concurrent=2), workers=2)
    counters = house.limiter._counters
    counters.as_worker(1)
    there = house.enter()
    counters.as_worker(0)
    here = house.enter()
    assert house.refused().limit == "concurrent"
    house.limiter.leave(here)
    house.limiter.leave(house.enter())
    assert [counters.running(slot) for slot in there] == [1] * 4
    counters.close()


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, cost, most, unit",
    [
        ("calls: 2", {}, 2, "calls"),
        ("rows: 10", {"rows": 5}, 10, "rows"),
        ("bytes: 1KiB", {"size": 512}, 1024, "bytes"),
        ("database_seconds: 3", {"seconds": 1.5}, 3, "seconds of database time"),
    ],
)
def test_a_budget_that_is_used_up_says_of_whom_how_much_and_until_when(
    make: Callable[[str], House], budget: str, cost: dict[str, Any], most: int, unit: str
) -> None:
    house = make(f"limits: {{users: {{budgets: {{hour: {{{budget}}}}}}}}}\n")
    house.utc = NINE + 3599
    house.call(**cost)
    house.call(**cost)
    problem = house.over()
    assert problem.message == (
        f"the budget of the user alice is used up: {most} of {most} {unit} this hour, until 10:00 UTC"
    )
    assert (problem.retry_after, problem.limit) == (1, "hour." + budget.split(":")[0])
    house.limiter.check(Principal("bob00001", "bob", "x", tenant="acme"), HERE)
    house.utc += 1
    house.call(**cost)


@pytest.mark.parametrize("rotten", [2**64 - 1, 2**63])
def test_what_cannot_have_been_spent_counts_as_nothing_and_stops_no_call(
    make: Callable[[str], House], rotten: int
) -> None:
    house = make("limits: {budgets: {hour: {calls: 2}}}\n")
    for subject in house.limiter._of(ALICE, HERE).all:
        with (counters := house.limiter._counters):
            slot = counters.slot(subject.table, subject.digest)
            counters.spend(slot, (int(NINE // 3600), int(NINE // 86400), *[rotten] * 8))
    for _ in range(2):
        house.call(size=100, rows=1)
    assert house.over().limit == "hour.calls"


def test_what_was_spent_of_a_place_that_is_another_s_by_now_is_not_ours(make: Callable[[str], House]) -> None:
    house = make("limits: {budgets: {hour: {rows: 10}}}\n")
    house.call(rows=10)
    house.over()
    counters, subjects = house.limiter._counters, house.limiter._of(ALICE, HERE).all
    before = [one.slot for one in subjects]
    for slot in before:  # as another worker does it
        counters.memory[slot.key : slot.key + 16] = slot.digest[:4] + bytes(12)
    house.limiter.check(ALICE, HERE)
    house.limiter.charge(ALICE, HERE, rows=4, size=0, seconds=0.0)
    assert [counters.spent(slot)[3] for slot in before] == [10] * 4
    assert [counters.spent(one.slot)[3] for one in subjects] == [4] * 4


def test_a_day_s_budget_ends_at_midnight_and_an_answer_may_go_beyond_it_once(make: Callable[[str], House]) -> None:
    house = make("limits: {tenants: {named: {acme: {budgets: {day: {rows: 10}, hour: {rows: 1000}}}}}}\n")
    house.call(rows=9)
    house.call(rows=900)
    assert "the tenant acme is used up: 909 of 10 rows this day, until 00:00 UTC" in house.over().message
    house.utc += 14 * 3600
    house.over()
    house.utc += 3600
    house.call()


def test_a_clock_that_is_stepped_back_gives_no_budget_back_and_one_far_ahead_takes_none_for_ever() -> None:
    assert running(10, 10) == 10
    assert running(10, 11) == 11
    assert running(10, 9) == 10
    assert running(10_000, 9) == 9
    house = House(Limits(budgets=replace(Limits().budgets, hour=replace(Limits().budgets.hour, calls=1))))
    house.call()
    house.utc -= 3600
    house.over()
    house.utc -= 3600
    house.limiter.check(ALICE, HERE)


# -- one answer -------------------------------------------------------------------------------------------------------


def test_of_rows_bytes_and_time_the_smallest_counts(make: Callable[[str], House]) -> None:
    house = make(
        "limits: {tokens: {max_rows: 50, named: {alice001: {max_bytes: 10KiB}}}, users: {max_rows: 70},"
        " tenants: {statement_timeout: 2s}, addresses: {max_bytes: 1MiB}}\n"
    )
    assert house.limiter.smallest(ALICE, HERE, 1000, 1 << 20, 30.0) == (50, 10240, 2.0)
    assert house.limiter.smallest(ALICE, HERE, 20, 100, 1.0) == (20, 100, 1.0)
    assert house.limiter.smallest(LOCAL, None, 1000, 1 << 20, 30.0) == (50, 1 << 20, 30.0)


def test_where_nobody_s_answers_are_bounded_apart_what_is_given_counts() -> None:
    assert House(Limits()).limiter.smallest(ALICE, HERE, 1000, 1 << 20, 30.0) == (1000, 1 << 20, 30.0)


# -- strangers --------------------------------------------------------------------------------------------------------


def test_failed_sign_ins_are_counted_from_the_first_for_a_quarter_of_an_hour() -> None:
    house = House(Limits())
    for _ in range(10):
        assert house.limiter.wrong(HERE) == 0
        house.now += 1
    assert house.limiter.wrong(HERE) == WINDOW - 10
    assert house.limiter.wrong(THERE) == 0
    house.now += WINDOW - 11
    assert house.limiter.wrong(HERE) == 1
    house.now += 1
    assert house.limiter.wrong(HERE) == 0


# -- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, fault",
    [
        ("limits: {rate: 0}", "limits.rate: takes a number a second"),
        ("limits: {rate: true}", "limits.rate: takes a number a second"),
        ("limits: {users: {named: {10.0.0.0/8: {rate: 1}}}}", "limits.users.named: 10.0.0.0/8 is not one of users"),
        ("limits: {addresses: {named: {alice: {rate: 1}}}}", "limits.addresses.named: alice is not one of addresses"),
        ("limits: {addresses: {named: {10.0.0.1/8: {rate: 1}}}}", "limits.addresses.named.10.0.0.1/8: a name is"),
        ("limits: {addresses: {named: {'fe80::1%eth0': {rate: 1}}}}", "limits.addresses.named.fe80::1%eth0: a name is"),
        ("limits: {users: {named: {alice: {rates: 1}}}}", "did you mean rate?"),
        ("limits: {addresses: {named: {'2001:db8::/48': {rate: 1}, '2001:DB8:0::/48': {rate: 2}}}}", "there already"),
        ("limits: {budgets: {week: {calls: 1}}}", "limits.budgets.week: there is no such key"),
    ],
)
def test_a_limit_that_means_nothing_is_a_fault(make: Callable[[str], House], text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(text)
    assert fault in str(caught.value)
