"""The table that all workers share: over processes that are killed, restarts, full disks and files that are none."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcpctl import shared_counters
from mcpctl.errors import ConfigError
from mcpctl.shared_counters import ADDRESSES, PRINCIPALS, Counters, Slot, source

SPENT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits.bin"


@contextlib.contextmanager
def opened(path: Path | None, **options: Any) -> Iterator[Counters]:
    found = Counters(path, **options)
    try:
        yield found
    finally:
        found.close()


def slot(counters: Counters, name: str, table: int = PRINCIPALS) -> Slot:
    return counters.slot(table, counters.digest(name))


def test_what_is_noted_outlives_a_restart_and_is_nobody_else_s(path: Path) -> None:
    for place in (path, None):
        with opened(place) as first:
            here = slot(first, "alice")
            first.take(here, 5.5)
            first.fail(here, 9.5, 3)
            first.spend(here, SPENT)
            assert slot(first, "alice") == here
            if place is None:
                continue
        with opened(place) as again:
            here = slot(again, "alice")
            assert (again.taken(here), again.failed(here), again.spent(here)) == (5.5, (9.5, 3), SPENT)
            other = slot(again, "bob")
            assert (again.taken(other), again.failed(other), again.spent(other)) == (0.0, (0.0, 0), (0,) * 10)
    assert path.stat().st_mode & 0o777 == 0o600


def test_after_a_boot_everybody_who_was_saved_is_still_there(path: Path) -> None:
    for booted in (1000.0, 90_000.0):
        with opened(path, booted=booted) as counters:
            for number in range(300):
                here = slot(counters, f"token {number}")
                assert counters.spent(here) == (SPENT if booted > 1000 else (0,) * 10)
                counters.take(here, 1.0)
                counters.spend(here, SPENT)


def test_times_of_before_a_boot_are_forgotten_and_budgets_are_not(path: Path) -> None:
    for booted, taken in ((1000.0, 0.0), (1001.0, 5.5), (90_000.0, 0.0), (500.0, 0.0)):
        with opened(path, booted=booted) as counters:
            here = slot(counters, "alice")
            assert (counters.taken(here), counters.failed(here)) == (taken, (9.5, 3) if taken else (0.0, 0))
            assert counters.spent(here) == (SPENT if booted != 1000 else (0,) * 10)
            counters.take(here, 5.5)
            counters.fail(here, 9.5, 3)
            counters.spend(here, SPENT)


def test_any_number_of_addresses_evicts_the_stalest_of_them_and_no_principal(path: Path) -> None:
    with opened(path) as counters:
        counters.spend(slot(counters, "alice"), SPENT)
        for number in range(30_000):
            counters.take(slot(counters, f"address {number}", ADDRESSES), float(number + 1))
        assert counters.spent(slot(counters, "alice")) == SPENT
        assert counters.taken(slot(counters, "address 29999", ADDRESSES)) == 30_000
        kept = sum(
            counters.taken(slot(counters, f"address {number}", ADDRESSES)) > 0 for number in range(29_000, 30_000)
        )
        assert kept > 990


def test_a_place_that_is_remembered_is_looked_up_again_once_it_is_another_s(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as counters:
        here = slot(counters, "alice")
        counters.take(here, 5.0)
        with monkeypatch.context() as patch:
            patch.setattr(counters, "_find", lambda table, digest: pytest.fail("looked up again"))
            assert slot(counters, "alice") is here
        counters.memory[here.key : here.key + 16] = other = here.digest[:4] + bytes(12)  # as another worker does it
        again = slot(counters, "alice")
        assert again.key != here.key
        assert counters.taken(again) == 0.0
        assert counters.slot(PRINCIPALS, other).key == here.key


def test_thousands_of_principals_have_room(path: Path) -> None:
    with opened(path) as counters:
        for number in range(3000):
            counters.take(slot(counters, f"token {number}"), 1.0)
        assert sum(counters.taken(slot(counters, f"token {number}")) == 0 for number in range(3000)) < 20


@pytest.mark.parametrize("fault", ["shorter", "longer", "other", "empty", "gone"])
def test_a_file_that_is_cut_or_replaced_hurts_nobody_who_counts_and_begins_anew(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as before:
        before.take(slot(before, "alice"), 5.0)
    with opened(path) as running:
        data = path.read_bytes()
        if fault == "gone":
            path.unlink()
        else:
            texts = {"shorter": data[:-1], "longer": data + b"x", "other": b"x" + data[1:], "empty": b""}
            path.write_bytes(texts[fault])
        with opened(path) as after:
            assert after.taken(slot(after, "alice")) == 0.0
        assert running.taken(slot(running, "alice")) == 5.0
    assert ("begins anew" in caplog.text) == (fault != "gone")
    with opened(path) as again:
        assert again.taken(slot(again, "alice")) == 5.0
    assert [entry.name for entry in path.parent.iterdir()] == ["limits.bin"]


@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("removed", [True, False])
def test_a_file_that_is_removed_or_replaced_is_written_again_though_nothing_is_new(
    path: Path, at_the_end: bool, removed: bool
) -> None:
    counters = Counters(path)
    counters.take(slot(counters, "alice"), 5.0)
    counters.save()
    before = path.read_bytes(), path.stat().st_ino
    counters.save()
    assert path.stat().st_ino == before[1]
    path.unlink()
    if not removed:
        path.write_bytes(b"")
    (counters.close if at_the_end else counters.save)()
    assert path.read_bytes() == before[0]
    if not at_the_end:
        counters.close()


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_file_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="has mode"):
        Counters(path)


def test_where_there_is_no_room_it_is_said_once_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(path) as counters:
        counters.take(slot(counters, "alice"), 5.0)
        with monkeypatch.context() as disk:
            disk.setattr(os, "replace", full)
            counters.save()
            counters.save()
        assert caplog.text.count("cannot be saved") == 1
        assert [*path.parent.iterdir()] == []
        counters.save()
    with opened(path) as counters:
        assert counters.taken(slot(counters, "alice")) == 5.0


def _fork(work: Callable[[], None]) -> int:
    """Another worker, which does this and ends."""
    if pid := os.fork():
        return pid
    try:
        work()
    finally:
        os._exit(0)


def test_workers_that_count_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_counters, "_PATIENCE", 30)  # a slow machine is no stopped worker
    with opened(None, workers=3) as counters:
        found = slot(counters, "alice")

        def add() -> None:
            for _ in range(3000):
                with counters:
                    hour, day, calls, *rest = counters.spent(found)
                    counters.spend(found, (hour, day, calls + 1, *rest))

        for pid in [_fork(add) for _ in range(3)]:
            os.waitpid(pid, 0)
        assert counters.spent(found)[2] == 9000


@contextlib.contextmanager
def _holder() -> Iterator[tuple[Counters, Slot, int]]:
    """This process's counters, and another worker in which one call runs and which holds their lock."""
    with opened(None, workers=2) as counters:
        found = slot(counters, "alice")
        told, tell = os.pipe()

        def hold() -> None:
            counters.as_worker(1)
            with counters:
                counters.run([found], 1)
                os.write(tell, b"x")
                signal.pause()

        pid = _fork(hold)
        os.read(told, 1)
        try:
            yield counters, found, pid
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(told)
            os.close(tell)


def test_a_worker_that_is_killed_leaves_no_lock_and_its_place_s_next_no_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _holder() as (counters, found, pid):
        counters.run([found], 1)
        assert counters.running(found) == 2
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(shared_counters, "_PATIENCE", -1)
        with counters:
            assert counters._without_until == 0
        assert counters.running(found) == 2
        counters.as_worker(1)
        assert counters.running(found) == 1
        counters.as_worker(0)
        counters.run([found], -1)
        assert counters.running(found) == 0


def test_a_worker_that_is_stopped_while_it_holds_the_lock_stops_no_other_and_is_waited_for_once() -> None:
    with _holder() as (counters, found, _):
        for _ in range(100):
            with counters:
                counters.take(found, 5.0)
        assert counters.taken(found) == 5.0
        assert counters._without_until > time.monotonic()


def test_who_is_evicted_leaves_nothing_running_to_the_next(path: Path) -> None:
    with opened(path) as counters:
        for number in range(30_000):
            here = slot(counters, f"address {number}", ADDRESSES)
            assert counters.running(here) == 0
            counters.run([here], 1)


def test_any_number_of_visits_evicts_no_wrong_sign_ins_of_now_no_budget_of_today_and_no_call_that_runs() -> None:
    with opened(None) as counters:
        now = time.monotonic()
        today = int(time.time()) // 86400
        names = [f"victim {number}" for number in range(50)]
        for name in names:
            for kind in ("guesses", "spends", "runs", "guessed", "spent"):
                counters.take(slot(counters, f"{name} {kind}", ADDRESSES), now)
            counters.fail(slot(counters, f"{name} guesses", ADDRESSES), now + 900, 10)
            counters.fail(slot(counters, f"{name} guessed", ADDRESSES), now - 1, 10)
            counters.spend(slot(counters, f"{name} spends", ADDRESSES), (0, today + 1, *SPENT[2:]))
            counters.spend(slot(counters, f"{name} spent", ADDRESSES), (0, today - 1, *SPENT[2:]))
            counters.run([slot(counters, f"{name} runs", ADDRESSES)], 1)
        for number in range(60_000):
            counters.take(slot(counters, f"visit {number}", ADDRESSES), now + number / 1000)
        for name in names:
            found = {
                kind: slot(counters, f"{name} {kind}", ADDRESSES)
                for kind in ("guesses", "spends", "runs", "guessed", "spent")
            }
            assert counters.failed(found["guesses"])[1] == 10
            assert counters.spent(found["spends"])[2:] == SPENT[2:]
            assert counters.running(found["runs"]) == 1
            assert counters.failed(found["guessed"])[1] == counters.spent(found["spent"])[2] == 0


def test_a_call_of_one_that_was_evicted_is_subtracted_from_nobody() -> None:
    with opened(None) as counters:
        first = slot(counters, "alice", ADDRESSES)
        counters.run([first], 1)
        number = 0
        while (here := slot(counters, f"address {number}", ADDRESSES)).values != first.values:
            counters.run([here], 1)
            number += 1
        counters.run([here], 1)
        counters.run([first], -1)
        assert counters.running(here) == 1


def test_without_fcntl_one_process_counts_without_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_counters, "fcntl", None)
    for place in (path, None):
        with opened(place) as counters, counters:
            counters.run([slot(counters, "alice")], 1)
            assert counters.running(slot(counters, "alice")) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "address, counts_as",
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("testclient", "testclient"),
        (None, None),
    ],
)
def test_who_counts_as_one(address: str | None, counts_as: str | None) -> None:
    assert source(address) == counts_as


def test_a_place_that_another_worker_takes_in_the_middle_counts_nothing_for_who_has_it_then() -> None:
    """A call that ends counts without holding the others."""

    class Taken:
        """Memory in which the place has another's name from the second look on."""

        looks = 0

        def __getitem__(self, at: slice) -> bytes:
            self.looks += 1
            return here.digest if self.looks == 1 else bytes(16)

    with opened(None, workers=2) as counters:
        here = slot(counters, "alice")
        counters.run([here], 2)
        assert counters.running(here) == 2
        memory, counters.memory = counters.memory, Taken()  # type: ignore[assignment]
        counters.run([here], -1)
        counters.memory = memory
        assert counters.running(here) == 0
