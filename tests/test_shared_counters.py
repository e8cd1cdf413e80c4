"""The table that all workers share: over processes that are killed, restarts, full disks and files that are none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcpctl import shared_counters
from mcpctl.errors import ConfigError
from mcpctl.shared_counters import ADDRESSES, PRINCIPALS, SIZE, Counters, Slot, source

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
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, SIZE)
    assert path.stat().st_blocks * 512 >= SIZE  # no page of it is missing when the disk is full


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


def test_thousands_of_principals_have_room(path: Path) -> None:
    with opened(path) as counters:
        for number in range(3000):
            counters.take(slot(counters, f"token {number}"), 1.0)
        assert sum(counters.taken(slot(counters, f"token {number}")) == 0 for number in range(3000)) < 20


@pytest.mark.parametrize("fault", ["shorter", "longer", "other", "torn", "text"])
def test_a_file_of_another_form_or_a_torn_one_is_made_anew_and_who_has_it_open_goes_on(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as before:
        before.take(slot(before, "alice"), 5.0)
        with path.open("r+b") as file:
            match fault:
                case "shorter":
                    path.unlink()
                    path.touch(0o600)
                    path.write_bytes(b"x" * 100)
                case "longer":
                    file.truncate(SIZE + 1)
                case "other":
                    file.write(b"mcpctl counters 0")
                case "torn":
                    file.write(bytes(32))
                case _:
                    path.unlink()
                    path.touch(0o600)
                    path.write_text("a note\n")
        with opened(path) as after:
            assert after.taken(slot(after, "alice")) == 0.0
        assert before.taken(slot(before, "alice")) == 5.0
    assert "begins anew" in caplog.text
    assert [entry.name for entry in path.parent.iterdir()] == ["limits.bin"]


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_file_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="has mode"):
        Counters(path)


def test_where_there_is_no_room_each_worker_counts_for_itself_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with opened(path) as counters:
        counters.take(slot(counters, "alice"), 5.0)
        assert counters.taken(slot(counters, "alice")) == 5.0
    assert "each worker counts for itself" in caplog.text
    assert path.stat().st_size == 0
    monkeypatch.undo()
    with opened(path) as counters:
        assert counters.taken(slot(counters, "alice")) == 0.0
    assert path.stat().st_size == SIZE


_ADD = """
import sys
from pathlib import Path
from mcpctl import shared_counters
from mcpctl.shared_counters import Counters
shared_counters._PATIENCE = 30  # a slow machine is no stopped worker
place, workers, turns = map(int, sys.argv[2:])
counters = Counters(Path(sys.argv[1]), place=place, workers=workers)
with counters:
    found = counters.slot(0, counters.digest("alice"))
    counters.run(found, 1)
print(flush=True)
for _ in range(turns):
    with counters:
        hour, day, calls, *rest = counters.spent(found)
        counters.spend(found, (hour, day, calls + 1, *rest))
if not turns:
    sys.stdin.readline()
    with counters:
        print(flush=True)
        sys.stdin.read()
"""


def _worker(path: Path, place: int, workers: int, turns: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _ADD, str(path), str(place), str(workers), str(turns)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_workers_that_count_at_once_lose_nothing(path: Path) -> None:
    workers = [_worker(path, place, 3, 3000) for place in range(3)]
    for worker in workers:
        _end(worker)
    with opened(path) as counters:
        assert counters.spent(slot(counters, "alice"))[2] == 9000


@contextlib.contextmanager
def _holder(path: Path) -> Iterator[tuple[Counters, subprocess.Popen[str]]]:
    """This process's counters, and another worker that holds their lock."""
    other = _worker(path, 1, 2, 0)
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with opened(path, place=0, workers=2) as counters:
            other.stdin.write("go on\n")
            other.stdin.flush()
            other.stdout.readline()
            yield counters, other
    finally:
        other.kill()
        other.communicate()


def test_a_worker_that_is_killed_leaves_no_lock_and_its_place_s_next_no_count(path: Path) -> None:
    with _holder(path) as (counters, other):
        found = slot(counters, "alice")
        counters.run(found, 1)
        assert counters.running(found) == 2
        other.kill()
        other.wait(10)
        fcntl.flock(counters._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(counters._fd, fcntl.LOCK_UN)
        assert counters.running(found) == 2
        with opened(path, place=1, workers=2):
            assert counters.running(found) == 1
        counters.run(found, -1)
        counters.run(found, -1)
        assert counters.running(found) == 0


def test_a_worker_that_is_stopped_while_it_holds_the_lock_stops_no_other(path: Path) -> None:
    with _holder(path) as (counters, other):
        other.send_signal(signal.SIGSTOP)
        with counters:
            counters.take(slot(counters, "alice"), 5.0)
        assert counters.taken(slot(counters, "alice")) == 5.0


def test_without_fcntl_one_process_counts_without_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_counters, "fcntl", None)
    for place in (path, None):
        with opened(place) as counters, counters:
            counters.run(slot(counters, "alice"), 1)
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
