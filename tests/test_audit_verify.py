"""`audit verify`: whatever is done to the log is found, and the first line that it was done to is named."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chain
from chain import KEY
from command_line import Home
from mcpctl import private_file
from mcpctl.audit import parts
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.anchors import Anchor
from mcpctl.audit.log import AuditLog
from mcpctl.audit.verify import Fault, Report, verify
from mcpctl.errors import ConfigError, ConflictError, NotFoundError, UnavailableError

NOW = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)
OTHER = bytes(range(1, 33))


def opened(path: Path, key: bytes = KEY) -> AuditLog:
    return AuditLog(path, key, lambda: NOW)


def write(path: Path, count: int, key: bytes = KEY, **fields: object) -> None:
    log = opened(path, key)
    for number in range(count):
        log.append("tool.called", request_id=f"r{number}", **fields)
    log.close()


def whole(path: Path, **options: object) -> Report:
    report = verify(path, KEY, **options)  # type: ignore[arg-type]
    assert report.fault is None, report.fault
    return report


def broken(path: Path, **options: object) -> Fault:
    fault = verify(path, KEY, **options).fault  # type: ignore[arg-type]
    assert fault is not None
    return fault


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# -- a whole log -------------------------------------------------------------------------------------------------


def test_a_log_is_whole_over_its_files_packed_ones_too_in_whatever_order_their_names_are(path: Path) -> None:
    for name in ("audit.jsonl.9", "audit.jsonl-20261119", "audit.jsonl.1"):
        write(path, 5)
        path.rename(path.with_name(name))
    write(path, 2)
    oldest = path.with_name("audit.jsonl.9")
    path.with_name("audit.jsonl.9.gz").write_bytes(gzip.compress(oldest.read_bytes()))
    oldest.unlink()
    report = whole(path)
    assert report.files == ["audit.jsonl.9.gz", "audit.jsonl-20261119", "audit.jsonl.1", "audit.jsonl"]
    assert (report.lines, report.first, report.last) == (17, 1, 17)
    assert report.hash == chain.lines(path)[-1]["hash"]


def test_a_log_that_was_emptied_is_not_whole_and_one_that_was_just_moved_away_is(path: Path) -> None:
    write(path, 3)
    known = Anchor(3, b"0" * 64, None, "an anchor")
    kept = path.read_bytes()
    os.truncate(path, 0)
    assert (broken(path).kind, broken(path).file, broken(path).seq) == ("cut", "audit.jsonl", 1)
    assert "3 lines after seq 0, says an anchor" in broken(path, anchors=[known]).reason
    path.unlink()
    assert "the log (seq 1): all of it is cut off: 3 lines" in str(broken(path, anchors=[known]))
    path.with_name("audit.jsonl.1").write_bytes(kept)
    assert whole(path).last == 3
    private_file.create(path, b"")
    assert whole(path).last == 3


def test_copies_and_what_is_no_log_are_named_and_not_read(path: Path) -> None:
    write(path, 5)
    shutil.copy(path, path.with_name("audit.jsonl.bak"))
    write(path, 5)
    path.rename(path.with_name("audit.jsonl.1"))
    path.with_name("audit.jsonl.1.gz").write_bytes(gzip.compress(path.with_name("audit.jsonl.1").read_bytes()))
    path.with_name("audit.jsonl.notes").write_text("lock the door\n")
    write(path, 1)
    report = whole(path)
    assert report.files == ["audit.jsonl.1", "audit.jsonl"]
    assert sorted(said.rpartition(": ")[2] for said in report.remarks) == [
        "audit.jsonl.1.gz", "audit.jsonl.bak", "audit.jsonl.notes",
    ]  # fmt: skip


def test_the_half_of_a_line_is_said_and_is_no_fault_unless_something_knows_the_whole_one(path: Path) -> None:
    write(path, 3)
    last = chain.lines(path)[-1]
    complete = path.read_bytes()
    path.write_bytes(complete[:-1])
    assert (whole(path).last, whole(path).remarks) == (3, [])  # it lacks its newline alone, and is proved as any other
    path.write_bytes(complete.replace(b'"r2"', b'"r9"')[:-1])
    assert (broken(path).kind, broken(path).line) == ("changed", 3)
    path.write_bytes(complete[:-10])
    assert "half of a line, as a crash or somebody leaves it" in whole(path).remarks[0]
    known = Anchor(3, last["hash"].encode(), None, "an anchor")
    assert (broken(path, anchors=[known]).kind, broken(path, anchors=[known]).line) == ("cut", 3)
    path.write_bytes(complete + b"not ours")
    assert broken(path) == Fault("added", "audit.jsonl", 4, None, "it is no line of mcpctl's, and has no end")


def test_verify_does_not_wait_for_writers_nor_they_for_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 1999)
    log = opened(path)
    log.append("tool.called")  # so that it knows the end
    real, wrote = audit_verify.files.read_at, []

    def read(fd: int, size: int, start: int) -> bytes:
        log.append("tool.called", request_id="meanwhile")
        wrote.append(start)
        return real(fd, size, start)

    monkeypatch.setattr(parts, "CHUNK", 100_000)
    monkeypatch.setattr(audit_verify.files, "read_at", read)
    assert whole(path).last == 2000
    assert len(wrote) > 5
    log.close()


def test_a_lock_that_another_process_holds_is_a_conflict_that_names_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, 1)
    monkeypatch.setattr(audit_verify, "_PATIENCE", 0.0)
    with path.with_name("audit.jsonl.lock").open("r+b") as held:
        private_file.lock(held.fileno())
        with pytest.raises(ConflictError, match=r"another process holds /.*/audit\.jsonl\.lock"):
            whole(path)


# -- what is removed on purpose ----------------------------------------------------------------------------------


def test_a_log_whose_beginning_is_gone_is_not_whole_unless_what_is_gone_is_old_enough(path: Path) -> None:
    write(path, 5)
    path.rename(path.with_name("audit.jsonl.1"))
    write(path, 5)
    path.with_name("audit.jsonl.1").unlink()
    fault = broken(path)
    assert (fault.kind, fault.file, fault.line, fault.seq) == ("missing", "audit.jsonl", 1, 1)
    assert "begins here, with seq 6" in fault.reason
    report = whole(path, kept_since=NOW)
    assert (report.lines, report.first, report.last) == (5, 6, 10)
    fault = broken(path, kept_since=NOW - timedelta(seconds=1))
    assert "older lines than that are to be kept" in fault.reason
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0].replace(b"r0", b"r9"), *lines[1:]]))
    assert broken(path, kept_since=NOW).kind == "changed"


# -- errors ------------------------------------------------------------------------------------------------------


def test_no_log_another_key_and_what_cannot_be_unpacked_are_errors(path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no audit log") as none:
        verify(path, KEY)
    assert none.value.exit_code == 4
    write(path, 5)
    with pytest.raises(ConfigError, match=r"written with another key.* key_id 630dcd29, .* ae216c2e"):
        verify(path, OTHER)
    packed = gzip.compress(path.read_bytes())
    for _ in ("beside what it is a copy of", "alone"):
        for bad in (packed[:-20], packed[:-8] + bytes(8)):  # cut short; with a wrong checksum
            path.with_name("audit.jsonl.1.gz").write_bytes(bad)
            fault = broken(path)
            assert (fault.kind, fault.file) == ("unread", "audit.jsonl.1.gz")
            assert "cannot be unpacked" in fault.reason
        path.unlink(missing_ok=True)


def test_a_line_of_another_key_within_the_log_was_changed(path: Path) -> None:
    write(path, 3)
    other, last = path.with_name("other"), chain.lines(path)[-1]
    write(other, 1, OTHER)
    path.write_bytes(path.read_bytes() + other.read_bytes().replace(b'"seq":1,', b'"seq":%d,' % (last["seq"] + 1)))
    fault = broken(path)
    assert (fault.kind, fault.line) == ("changed", 4)
    assert "its key_id, ae216c2e, is another key's" in fault.reason


def test_a_log_of_another_key_is_not_written_and_what_is_kept_beside_it_comes_when_the_key_is_back(path: Path) -> None:
    write(path, 3)
    before = path.read_bytes()
    other = opened(path, OTHER)
    with pytest.raises(ConfigError, match=r"was written with another audit\.key") as refused:
        other.check_key()
    assert "restore audit.key" in (refused.value.hint or "")
    for write_it in (other.check, lambda: other.append("token.revoked")):
        with pytest.raises(UnavailableError, match=r"was written with another audit\.key"):
            write_it()
    other.keep("token.revoked", token="1hrspjl1")
    assert path.read_bytes() == before
    log = opened(path)
    log.catch_up()
    log.close()
    assert (chain.verify(path), chain.lines(path)[-1]["token"]) == (4, "1hrspjl1")
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    path.rename(elsewhere / path.name)
    other.append("auth.ok")
    other.close()
    assert chain.verify(path, key=OTHER) == 1


def test_a_file_that_was_converted_and_a_packed_one_of_any_name_are_known_as_such(path: Path) -> None:
    write(path, 5)
    path.with_name("audit.jsonl.1").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    write(path, 0)
    assert whole(path).last == 5
    assert "there is no audit.jsonl" in whole(path).remarks[0]
    path.with_name("audit.jsonl.1").write_bytes(gzip.decompress(path.with_name("audit.jsonl.1").read_bytes()))
    os.truncate(path.with_name("audit.jsonl.1"), 0)
    write(path, 5)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert "CR LF" in broken(path).reason


# -- the commands ------------------------------------------------------------------------------------------------


def test_the_command_says_whole_or_names_the_first_bad_line(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    log = home.folder / "audit.jsonl"
    done = home("audit", "verify")
    assert (done.code, "there is no audit log" in done.error) == (4, True)
    for name in ("alice", "bob", "carol"):
        home("user", "add", name)
    assert home("audit", "verify").good.splitlines() == [
        "whole: 3 lines, seq 1 to 3, in audit.jsonl",
        f"the last hash is {chain.lines(log)[-1]['hash']}",
        "no anchor: a tail that was cut off would not be seen",
    ]
    found = json.loads(home("audit", "verify", "--json").good)
    assert (found["whole"], found["lines"], found["fault"], found["files"]) == (True, 3, None, ["audit.jsonl"])
    log.write_bytes(log.read_bytes().replace(b'"bob"', b'"eve"'))
    done = home("audit", "verify")
    assert done.code == 1
    assert "the audit log is not whole: changed: audit.jsonl, line 2 (seq 2): it was changed" in done.error
    done = home("audit", "verify", "--json")
    assert (done.code, done.err) == (1, "")
    assert json.loads(done.out)["fault"].items() >= {"kind": "changed", "line": 2, "seq": 2}.items()


def test_what_the_command_cannot_do_it_says(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home("user", "add", "alice")
    assert home("audit", "verify", "--kept", "soon").code == 2
    assert home("audit", "verify", "--anchors", "/nonexistent").code == 4
    key = home.folder / "audit.key"
    key.write_text(OTHER.hex() + "\n")
    done = home("audit", "verify")
    assert (done.code, "written with another key" in done.error) == (3, True)
    log = home.folder / "audit.jsonl"
    before = log.read_bytes()
    done = home("user", "disable", "alice")
    assert (done.code, "was written with another audit.key" in done.err) == (0, True)
    for refused in (("config", "check"), ("user", "add", "bob"), ("doctor",)):
        done = home(*refused)
        assert (done.code != 0, "was written with another audit.key" in done.out + done.err) == (True, True), refused
    done = home("audit", "rotate")
    assert (done.code, "was not written with the key that we have" in done.error) == (3, True)
    assert log.read_bytes() == before
    key.unlink()
    done = home("audit", "verify")
    assert (done.code, "audit.key" in done.error) == (3, True)


def test_a_log_is_rotated_and_packed_and_its_oldest_files_removed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", "audit: {anchor_file: anchors}\n")
    log = home.folder / "audit.jsonl"
    assert json.loads(home("audit", "rotate", "--json").good) == {"moved": None, "packed": []}
    moved = []
    for name in ("alice", "bob", "carol"):
        home("user", "add", name)
        moved.append(Path(home("audit", "rotate").good.strip()))
        assert re.fullmatch(r"audit\.jsonl\.\d{8}T\d{6}Z(-\d+)?", moved[-1].name)
        assert [line["event"] for line in chain.lines(log)] == ["audit.rotated"]
        assert chain.lines(log)[0]["reason"].startswith(f"{moved[-1].name}; by ")
        assert moved[-1].stat().st_mode & 0o777 == log.stat().st_mode & 0o777 == 0o600
    assert len(set(moved)) == 3  # within one second, too
    assert "3 anchors agree, up to seq 6" in home("audit", "verify").good
    packed = json.loads(home("audit", "rotate", "--gzip", "--json").good)
    assert packed["packed"] == [f"{one}.gz" for one in moved]
    assert not any(one.exists() for one in moved)
    found = json.loads(home("audit", "verify", "--json").good)
    assert (found["lines"], found["last"], len(found["files"])) == (7, 7, 5)
    moved[0].with_name(f"{moved[0].name}.gz").unlink()
    assert "say how long you keep lines, such as --kept 90d" in home("audit", "verify").error
    assert home("audit", "verify", "--kept", "90d").code == 1
    assert "seq 2 to 7" in home("audit", "verify", "--kept", "1ms").good


def test_a_rotation_that_fails_loses_nothing_and_replaces_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 3)
    log = opened(path)
    path.with_name("audit.jsonl.20261120T120000Z").write_text("somebody's")
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:50]))  # the disk is full
    with pytest.raises(UnavailableError, match="disk is full"):
        log.rotate("")
    monkeypatch.undo()
    log.close()
    assert path.with_name("audit.jsonl.20261120T120000Z").read_text() == "somebody's"
    assert path.read_bytes() == b""
    write(path, 1)
    assert whole(path).files == ["audit.jsonl.20261120T120000Z-2", "audit.jsonl"]
    assert whole(path).last == 4


# -- one line of ten thousand ------------------------------------------------------------------------------------


@dataclass
class Book:
    """A log of several files, kept as lists of lines, and put back after each try."""

    path: Path
    files: dict[str, list[bytes]]
    anchor: Anchor

    def put(self, files: dict[str, list[bytes]]) -> None:
        for name, lines in files.items():
            if lines is not self.files[name]:
                self.path.with_name(name).write_bytes(b"".join(lines))

    def place(self, number: int) -> tuple[str, int]:
        """File and index of the line with this seq."""
        for name, lines in self.files.items():
            if number <= len(lines):
                return name, number - 1
            number -= len(lines)
        raise IndexError(number)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    path = tmp_path_factory.mktemp("book") / "audit.jsonl"
    log = opened(path)
    for name, count in (("audit.jsonl.2", 4000), ("audit.jsonl.1", 3500), ("audit.jsonl", 2500)):
        for number in range(count):
            log.append("tool.called", user="alice", rows=number)
        if name != path.name:
            path.rename(path.with_name(name))
    end = log.written
    log.close()
    assert end is not None
    names = ("audit.jsonl.2", "audit.jsonl.1", "audit.jsonl")
    files = {name: path.with_name(name).read_bytes().splitlines(keepends=True) for name in names}
    assert chain.verify(*(path.with_name(name) for name in names)) == 10_000
    return Book(path, files, Anchor(end.seq, end.hash.encode(), None, "the journal"))


def change(book: Book, rng: random.Random) -> tuple[dict[str, list[bytes]], set[tuple[str, str, int]]]:
    """The log with one line changed by one byte; and what may be said: kind, file, line."""
    name, at = book.place(rng.randint(1, 10_000))
    lines = list(book.files[name])
    line = bytearray(lines[at])
    where = rng.randrange(len(line) - 1)  # its end is another case: it joins two lines
    line[where] = rng.choice([byte for byte in range(32, 127) if byte != line[where]])
    lines[at] = bytes(line)
    return {name: lines}, {("changed", name, at + 1)}


def remove(book: Book, rng: random.Random) -> tuple[dict[str, list[bytes]], set[tuple[str, str, int]]]:
    number = rng.randint(1, 9_999)
    name, at = book.place(number)
    lines = list(book.files[name])
    del lines[at]
    told = (name, at + 1) if at < len(lines) else (book.place(number + 1)[0], 1)
    return {name: lines}, {("missing" if number == 1 else "removed", *told)}


def add(book: Book, rng: random.Random) -> tuple[dict[str, list[bytes]], set[tuple[str, str, int]]]:
    """A copy of another line, or one that somebody without the key has made up."""
    name, at = book.place(rng.randint(1, 10_000))
    lines = list(book.files[name])
    source, number = book.place(rng.randint(1, 10_000))
    copied = book.files[source][number]
    made_up = copied.replace(b"alice", b"mallory")
    forged = rng.random() < 0.5
    lines.insert(at, made_up if forged else copied)
    behind = not forged and (source, number) == (name, at)  # the copy of a line before it is the one that is right
    return {name: lines}, {("added", name, at + 1 + behind)}


def swap(book: Book, rng: random.Random) -> tuple[dict[str, list[bytes]], set[tuple[str, str, int]]]:
    first, second = sorted(rng.sample(range(1, 10_001), 2))
    if rng.random() < 0.3:
        second = first + 1 if first < 10_000 else first - 1
        first, second = sorted((first, second))
    files = {name: list(lines) for name, lines in book.files.items()}
    (name, at), (other, behind) = book.place(first), book.place(second)
    files[name][at], files[other][behind] = files[other][behind], files[name][at]
    return {one: files[one] for one in {name, other}}, {("reordered", name, at + 1)}


def cut(book: Book, rng: random.Random) -> tuple[dict[str, list[bytes]], set[tuple[str, str, int]]]:
    lines = book.files["audit.jsonl"][: rng.randrange(2500)]
    return {"audit.jsonl": lines}, {("cut", "audit.jsonl", len(lines) + 1)}


@pytest.mark.parametrize("damage", [change, remove, add, swap, cut])
def test_each_of_a_hundred_damages_is_found_and_the_first_bad_line_is_named(book: Book, damage: object) -> None:
    rng = random.Random(f"seed {damage.__name__}")  # type: ignore[attr-defined]
    for number in range(100):
        files, expected = damage(book, rng)  # type: ignore[operator]
        book.put({**files})
        try:
            fault = broken(book.path, anchors=[book.anchor])
        finally:
            for name in files:
                book.path.with_name(name).write_bytes(b"".join(book.files[name]))
        assert (fault.kind, fault.file, fault.line) in expected, (number, fault)
    whole(book.path, anchors=[book.anchor])


def test_a_file_that_is_gone_and_a_tail_that_was_written_on_are_told(book: Book, path: Path) -> None:
    for name in book.files:
        shutil.copy(book.path.with_name(name), path.with_name(name))
    path.with_name("audit.jsonl.1").unlink()
    fault = broken(path)
    assert (fault.kind, fault.file, fault.line) == ("removed", "audit.jsonl", 1)
    assert "3500 lines, seq 4001 to 7500, should stand here, and are gone" in fault.reason
    shutil.copy(book.path.with_name("audit.jsonl.1"), path.with_name("audit.jsonl.1"))
    path.write_bytes(b"".join(book.files["audit.jsonl"][:-10]))
    write(path, 20)  # by a process that knows nothing of the old end
    assert whole(path).last == 10_010
    fault = broken(path, anchors=[book.anchor])
    assert (fault.kind, fault.line, fault.seq) == ("changed", 2500, 10_000)
    assert "another line stood here, says the journal" in fault.reason


# -- properties --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=()), max_size=200)


@QUICK
@given(statement=TEXT, reason=TEXT, relations=st.lists(TEXT, max_size=3), rows=st.integers())
def test_whatever_goes_into_a_line_comes_out_equal_is_printable_ascii_and_verifies(
    folder: Path, statement: str, reason: str, relations: list[str], rows: int
) -> None:
    path = folder / "audit.jsonl"
    path.unlink(missing_ok=True)
    given = {"statement": statement, "reason": reason, "relations": relations, "rows": rows}
    write(path, 1, **given)
    data = path.read_bytes()
    assert data.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in data[:-1])
    found = json.loads(data)
    assert {name: found[name] for name in given} == given
    assert whole(path).lines == chain.verify(path) == 1


@QUICK
@given(data=st.data())
def test_any_other_byte_anywhere_is_found(folder: Path, data: st.DataObject) -> None:
    path = folder / "one byte" / "audit.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    write(path, 3, statement="select 1")
    good = path.read_bytes()
    last = json.loads(good.splitlines()[-1])
    where = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[where]))
    path.write_bytes(good[:where] + bytes([byte]) + good[where + 1 :])
    fault = broken(path, anchors=[Anchor(3, last["hash"].encode(), None, "the journal")])
    assert fault.line == good[:where].count(b"\n") + 1
