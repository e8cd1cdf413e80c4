"""Which files are the log: `verify` and all that reads it choose the same, and name those that they cannot read."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import chain
from mcpctl import private_file
from mcpctl.audit import files, parts
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.reading import Reading
from mcpctl.errors import UnavailableError
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


def test_a_copy_of_the_first_line_alone_is_known_as_one(path: Path) -> None:
    write(path, 5)
    path.with_name("audit.jsonl.bak").write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert whole(path).remarks == ["not read, since it begins as audit.jsonl does: audit.jsonl.bak"]


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


# -- an end that is not as it was written ------------------------------------------------------------------------


def test_a_last_line_that_lacks_its_newline_alone_counts_for_all_and_is_completed(path: Path) -> None:
    write(path, 3)
    os.truncate(path, path.stat().st_size - 1)
    cut = path.read_bytes()
    assert (whole(path).last, whole(path).remarks) == (3, [])
    reading = Reading(path)
    assert [line["seq"] for line in reading.lines(lambda line: True)] == [1, 2, 3]
    assert reading.faults == []
    assert [line["seq"] for line in files.read_back(path)] == [3, 2, 1]
    following = files.follow(path, lambda seconds: None)
    write(path, 1)
    assert next(following)["seq"] == 4
    assert path.read_bytes().startswith(cut + b"\n{")
    assert chain.verify(path) == 4
    os.truncate(path, path.stat().st_size - 1)
    path.rename(path.with_name("audit.jsonl.1"))
    write(path, 1)
    assert whole(path).last == 5
    assert [line["seq"] for line in files.read_older(path.with_name("audit.jsonl.1"))] == [4, 3, 2, 1]


@pytest.mark.parametrize("torn", [b"", b'{"seq":4,"ti', None])
def test_nul_bytes_at_the_end_are_cut_off_and_the_chain_goes_on(
    path: Path, torn: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, 3)
    good = path.read_bytes()
    path.write_bytes((good[:-1] if torn is None else good + torn) + bytes(200_000))
    report = whole(path)
    assert (report.last, len(report.remarks)) == (3, torn is not None)
    assert [line["seq"] for line in Reading(path).lines(lambda line: True)] == [1, 2, 3]
    assert [line["seq"] for line in files.read_back(path)] == [3, 2, 1]
    write(path, 1)
    assert chain.verify(path) == 4
    assert "at its end are no whole line, and are cut off" in caplog.text


def test_a_damaged_file_that_was_moved_away_is_gone_on_from_and_its_damage_named(path: Path) -> None:
    write(path, 3)
    with path.open("ab") as file:
        file.write(b"x" * 100_000 + b"\n" + bytes(4096) + b"y")
    with pytest.raises(UnavailableError) as refused:
        write(path, 1)
    assert f"mv -n {path} {path}.broken" in str(refused.value.hint)
    path.rename(f"{path}.broken")
    write(path, 1)
    assert [line["seq"] for line in chain.lines(path)] == [4]
    assert (broken(path).file, broken(path).line) == ("audit.jsonl.broken", 4)


def test_what_may_hold_the_end_of_the_log_and_cannot_be_read_stops_the_next_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, 3)
    older = path.rename(path.with_name("audit.jsonl.1"))
    write(path, 2)
    newest = path.rename(path.with_name("audit.jsonl.2"))
    real = os.open

    def shut(name: Any, *given: Any, **more: Any) -> int:
        if name == newest:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", shut)
        with pytest.raises(UnavailableError, match=r"audit.jsonl.2, which cannot be opened: Permission denied"):
            write(path, 1)
    packed = files.pack(newest)
    with pytest.raises(UnavailableError, match=r"go on from .*audit.jsonl.2.gz, which is packed") as refused:
        write(path, 1)
    assert f"gunzip {packed}" in str(refused.value.hint)
    assert path.read_bytes() == b""
    assert packed is not None
    newest.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    write(path, 1)
    assert chain.verify(older, newest, path) == 6


def test_an_end_of_which_nothing_can_be_read_any_more_stops_the_next_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FIRST_LOOK", 1000)
    monkeypatch.setattr(files, "_FAR", 2000)
    write(path, 3)
    moved = path.rename(path.with_name("audit.jsonl.1"))
    with moved.open("ab") as file:
        file.write(b"x" * 3000)
    path.with_name("audit.jsonl.notes").write_bytes(b"x" * 3000)
    with pytest.raises(UnavailableError, match=r"of .*audit.jsonl.1 are no lines of this log"):
        write(path, 1)
