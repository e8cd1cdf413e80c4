"""Which files are the log: `verify` and all that reads it choose the same, and name those that they cannot read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mcpctl.audit import parts
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.reading import Reading
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
