"""What the workers of a server tell each other of the audit log's end: it saves them reading, and hides nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from chain import KEY, lines, verify
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.end import End, SharedEnd
from mcpctl.audit.log import AuditLog, BusyError
from mcpctl.errors import UnavailableError
from mcpctl.private_file import lock, unlock

NOW = datetime(2026, 11, 29, 12, 0, 0, tzinfo=UTC)
END = End(7, 1000, 12, "ab" * 32)


class Reading(AuditLog):
    """A log that counts how often it has read the file's last line."""

    reads = 0

    def _last_line(self, size: int) -> tuple[tuple[int, str] | None, int]:
        self.reads += 1
        return super()._last_line(size)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


Made = Callable[[SharedEnd | None], Reading]


@pytest.fixture
def made(path: Path) -> Iterator[Made]:
    logs: list[Reading] = []

    def make(others: SharedEnd | None) -> Reading:
        logs.append(Reading(path, KEY, lambda: NOW, others=others))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def write(log: AuditLog, *users: str) -> None:
    log.add(*[("tool.called", {"user": user}) for user in users])


def test_workers_read_none_of_each_other_s_lines(made: Made, path: Path) -> None:
    others = SharedEnd()
    one, two, apart = made(others), made(others), made(None)
    for log in (one, two, one, two):
        write(log, "a", "b")
    assert (one.reads, two.reads) == (0, 0)
    write(apart, "c")
    write(one, "a")
    write(two, "b")
    assert (one.reads, two.reads) == (1, 0)
    assert "".join(line["user"] for line in lines(path)) == "abababab" + "cab"
    assert verify(path) == 11


def test_what_is_told_is_of_one_log_and_whole(tmp_path: Path) -> None:
    told, here, there = SharedEnd(), tmp_path / "a", tmp_path / "b"
    assert told.of(here, "key", 7) is None
    told.tell(here, "key", END)
    others = [told.of(there, "key", 7), told.of(here, "another", 7), told.of(here, "key", 8)]
    assert others == [None] * 3
    for place in (0, 8, 16, 30, 87):  # who told it was killed in the middle
        told._memory[place] ^= 1
        assert told.of(here, "key", 7) is None
        told._memory[place] ^= 1
    assert told.of(here, "key", 7) == END


def test_a_line_cut_off_that_another_worker_has_written_is_missed(made: Made, path: Path) -> None:
    others = SharedEnd()
    one, two = made(others), made(others)
    write(one, "a")
    write(two, "b")
    write(one, "c", "d")
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    path.write_bytes(b"".join(kept))
    write(two, "e")
    assert [line["seq"] for line in lines(path)] == [1, 2, 3, 5]
    assert audit_verify.verify(path, KEY).fault


def test_a_line_cut_off_is_missed_though_a_command_has_written_on(made: Made, path: Path) -> None:
    others = SharedEnd()
    one, two, apart = made(others), made(others), made(None)
    write(one, "a")
    write(two, "b")
    write(one, "c")
    os.truncate(path, len(b"".join(path.read_bytes().splitlines(keepends=True)[:2])))
    write(apart, "d")
    write(two, "e")
    with pytest.raises(AssertionError):
        verify(path)


@pytest.mark.parametrize("anew", [False, True])
def test_a_line_cut_off_is_missed_by_a_worker_that_has_not_seen_it(made: Made, path: Path, anew: bool) -> None:
    """Also by one that has just begun. It would tell the others of an end behind what they know."""
    others = SharedEnd()
    one, two = made(others), made(others)
    write(one, "a")
    write(two, "b")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    write(made(others) if anew else one, "c", "d")
    write(two, "e")
    with pytest.raises(AssertionError):
        verify(path)
    assert audit_verify.verify(path, KEY).fault


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_file_that_is_rotated_goes_on_for_every_worker(made: Made, path: Path, how: str) -> None:
    others = SharedEnd()
    one, two, apart = made(others), made(others), made(None)
    write(one, "a")
    write(two, "b")
    write(one, "c")
    if how == "copied":
        before = path.with_name("audit.jsonl.1")
        before.write_bytes(path.read_bytes())
        os.truncate(path, 0)
    else:
        moved = apart.rotate("")
        assert moved is not None
        before = moved
    for log in (two, one, apart, two, one):
        write(log, "d", "e")
    assert verify(before, path) == 3 + 10 + (how == "moved")


def test_who_would_have_to_wait_for_another_s_line_is_told_and_has_written_nothing(made: Made, path: Path) -> None:
    log = made(None)
    write(log, "a")
    held = os.open(f"{path}.lock", os.O_RDWR)
    lock(held)
    fields: dict[str, Any] = {"user": "b"}
    with pytest.raises(BusyError):
        log.add(("tool.called", fields), at_once=True)
    assert fields == {"user": "b"}
    unlock(held)
    log.add(("tool.called", fields), at_once=True)
    os.close(held)
    assert verify(path) == 2


@pytest.mark.parametrize("written_on", [False, True])
def test_a_log_that_comes_back_to_its_place_goes_on(made: Made, path: Path, written_on: bool) -> None:
    """Another one, with another key, was there for a while: what is written now is not to go into that."""
    log = made(None)
    write(log, "a")
    aside = path.with_name("aside")
    path.rename(aside)
    other = AuditLog(path, bytes(32), lambda: NOW)
    write(other, "x")
    other.close()
    with pytest.raises(UnavailableError):
        write(log, "b")
    aside.rename(path)
    if written_on:
        write(made(None), "c")
    write(log, "d")
    write(log, "e")
    assert verify(path) == 3 + written_on
