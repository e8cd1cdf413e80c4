"""Which files are the log: `verify` and all that reads it choose the same, and name those that they cannot read."""

from __future__ import annotations

import gzip
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mcpctl import private_file
from mcpctl.audit import files, parts
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.reading import Reading
from site_of_mcpctl import eventually
from test_audit_verify import NOW, broken, whole, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_two_files_that_begin_alike_and_differ_are_a_fault_whichever_is_larger_or_ends_with_a_higher_number(
    path: Path,
) -> None:
    write(path, 9, user="alice")
    whole_lines = path.read_bytes().splitlines(keepends=True)
    path.rename(path.with_name("audit.jsonl.1"))
    write(path, 1)
    hidden = [*whole_lines[:5], whole_lines[5].replace(b'"alice"', b'"bob"')]
    for lines in (hidden, [*hidden, *whole_lines[6:], whole_lines[8].replace(b'"seq":9', b'"seq":99')]):
        path.with_name("audit.jsonl.copy").write_bytes(b"".join(lines))
        fault = broken(path)
        assert (fault.kind, fault.line) == ("changed", 6)
        assert {"audit.jsonl.1", "audit.jsonl.copy"} == {fault.file, fault.reason.split()[0]}
        reading = Reading(path)
        assert sum(line.get("user") == "alice" for line in reading.lines(lambda line: True)) >= 9
        assert "begin alike, and differ from line 6 on" in reading.faults[0]


def test_the_longer_of_two_is_read_where_the_other_is_its_beginning(path: Path) -> None:
    write(path, 9)
    path.with_name("audit.jsonl.copy").write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5])[:-9])
    assert (whole(path).last, whole(path).files) == (9, ["audit.jsonl.copy"])
    assert "not read, since it begins as audit.jsonl.copy does: audit.jsonl" in whole(path).remarks
    assert len(list(Reading(path).lines(lambda line: True))) == 9


def test_a_file_that_cannot_be_read_is_named_and_is_a_fault(path: Path) -> None:
    write(path, 5)
    path.rename(path.with_name("elsewhere"))
    write(path.with_name("elsewhere"), 5)
    path.with_name("elsewhere").rename(path)
    path.with_name("audit.jsonl.1").symlink_to("elsewhere")
    path.with_name("audit.jsonl.2").mkdir()
    fault = broken(path, kept_since=NOW)
    assert (fault.kind, str(fault)) == (
        "unread", "audit.jsonl.1: it cannot be read, and may hold lines: it is a symbolic link",
    )  # fmt: skip
    reading = Reading(path)
    list(reading.lines(lambda line: True))
    assert reading.faults == [
        f"audit.jsonl.{name} cannot be read as a part of the log: {why}"
        for name, why in ((1, "it is a symbolic link"), (2, "it is no file"))
    ]


def test_a_line_that_has_no_end_is_not_read_to_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CHUNK", 1000)
    monkeypatch.setattr(parts, "LONGEST", 5000)
    write(path, 3)
    path.with_name("audit.jsonl.junk").write_bytes(b"x" * 100_000)
    real, read = audit_verify.files.read_at, []
    monkeypatch.setattr(audit_verify.files, "read_at", lambda *at: (read.append(at[1]), real(*at))[1])
    assert whole(path).remarks == ["not read, since it holds no line of this log: audit.jsonl.junk"]
    assert sum(read) < 20_000
    with path.open("ab") as file:
        file.write(b'{"seq":4,' + b"x" * 100_000 + b"\n")
    assert (broken(path).kind, broken(path).line) == ("changed", 4)


def test_of_two_that_pack_the_same_file_one_waits_and_finds_nothing_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, 9)
    moved = path.rename(path.with_name("audit.jsonl.20261119T000000Z"))
    content, tries, pause = moved.read_bytes(), list[int](), list[Future[Path | None]]()
    copy, lock = shutil.copyfileobj, private_file.lock

    def slow(*given: Any) -> None:
        if not pause:  # the other begins in the middle of this one
            pause.append(pool.submit(files.pack, moved))
            eventually(lambda: len(tries) == 2 or pause[0].done())
        copy(*given)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    monkeypatch.setattr(private_file, "lock", lambda fd: (tries.append(fd), lock(fd)))
    with ThreadPoolExecutor(1) as pool:
        assert files.pack(moved) == path.with_name(f"{moved.name}.gz")
        assert pause[0].result(30) is None
    assert [one.name for one in path.parent.glob("*jsonl.2*")] == [f"{moved.name}.gz"]
    assert gzip.decompress(path.with_name(f"{moved.name}.gz").read_bytes()) == content


def test_a_file_that_is_packed_between_the_look_at_its_name_and_its_opening_is_read_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = [path.with_name(f"audit.jsonl.{number}") for number in (1, 2)]
    for one in moved:
        write(path, 5)
        path.rename(one)
    write(path, 1)
    left, real = list(moved), Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        found = list(real(folder, pattern))
        if left:
            files.pack(left.pop(0))
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert whole(path).last == 11
    assert not any(one.exists() for one in moved)
