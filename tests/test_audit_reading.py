"""The audit log read from its end, through the files that a rotation has moved away."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from chain import KEY
from command_line import Home
from mcpctl.audit import files as audit_files
from mcpctl.audit import report, top, usage, who_read
from mcpctl.audit.log import AuditLog
from mcpctl.audit.reading import Reading


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return AuditLog(path, KEY, lambda: datetime.now(UTC))


def write(log: AuditLog, count: int) -> None:
    for _ in range(count):
        log.append("tool.called", user="alice")


def test_a_line_that_cannot_be_read_is_told_as_such(log: AuditLog, path: Path) -> None:
    write(log, 1)
    with path.open("ab") as file:
        file.write(b"\xff\x1b[31m\n[1]\n\n{}")
    assert [line.get("event") for line in audit_files.read_back(path)] == [*["unreadable"] * 3, "tool.called"]


@pytest.mark.parametrize("chunk", [1, 7, 300, 4096, 1 << 20])
def test_a_log_is_read_from_its_end(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    path.touch(0o600)
    assert list(audit_files.read_back(path)) == []
    write(log, 5)
    monkeypatch.setattr(audit_files, "_CHUNK", chunk)
    assert [line["seq"] for line in audit_files.read_back(path)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_what_has_no_end_is_no_line(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(audit_files, "_CHUNK", chunk)
    path.touch(0o600)
    path.write_bytes(b'{"seq":1,"event":"forged"}')
    assert list(audit_files.read_back(path)) == []
    path.unlink()
    write(log, 2)
    path.write_bytes(path.read_bytes() + b'{"seq":3,"event":"forged"}')
    assert [line["seq"] for line in audit_files.read_back(path)] == [2, 1]


def test_the_files_before_are_known_by_where_they_end(log: AuditLog, path: Path) -> None:
    for name in ("audit.jsonl.9", "audit.jsonl-20261119", "audit.jsonl.1"):
        write(log, 2)
        path.rename(path.with_name(name))
    path.with_name("audit.jsonl.2.gz").write_bytes(gzip.compress(b"older"))
    path.with_name("audit.jsonl.empty").touch(0o600)
    write(log, 1)
    files, packed = audit_files.older(path)
    assert [file.name for file in files] == ["audit.jsonl.1", "audit.jsonl-20261119", "audit.jsonl.9"]
    assert [file.name for file in packed] == ["audit.jsonl.2.gz", "audit.jsonl.empty"]


def test_audit_tail_goes_on_in_the_files_that_were_moved_away(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    log = home.folder / "audit.jsonl"
    for name in ("alice", "bob", "carol"):
        home("user", "add", name)
        if name != "carol":
            log.rename(log.with_name(f"audit.jsonl.{name}"))

    def users(*arguments: str) -> list[str]:
        rows = home("audit", "tail", *arguments).good.splitlines()
        return [row.split("\t")[3] for row in rows]

    assert users() == ["alice", "bob", "carol"]
    assert users("-n", "2") == ["bob", "carol"]
    assert users("--user", "alice") == ["alice"]
    assert users("--since", "1h") == ["alice", "bob", "carol"]
    log.with_name("audit.jsonl.2.gz").write_bytes(b"packed")
    for arguments in ((), ("--since", "1h"), ("-n", "3")):
        done = home("audit", "tail", *arguments)
        assert (done.code, done.out.count("\n")) == (1, 3), arguments
        assert "the log is not whole: audit.jsonl.2.gz cannot be read" in done.err
    bob = log.with_name("audit.jsonl.bob")
    log.with_name("audit.jsonl.2.gz").write_bytes(gzip.compress(bob.read_bytes()))
    bob.unlink()
    assert users("--since", "1h") == ["alice", "bob", "carol"]
    assert users("--since", "1h", "-n", "2") == ["bob", "carol"]
    assert users() == ["alice", "bob", "carol"]
    assert users("-n", "2") == ["bob", "carol"]


def test_audit_tail_takes_no_planted_file_for_the_log_and_names_a_gap(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    log = home.folder / "audit.jsonl"
    for name in ("alice", "bob", "carol"):
        home("user", "add", name)
        log.rename(log.with_name(f"audit.jsonl.{name}"))
    home("user", "add", "dave")
    whole = log.read_bytes()
    assert home("audit", "tail").good.count("\n") == 4
    planted = log.with_name("audit.jsonl.1")
    planted.write_bytes(log.with_name("audit.jsonl.bob").read_bytes().replace(b"bob", b"eve"))
    done = home("audit", "tail")
    assert (done.code, "after line 2 comes line 2: the log was begun anew, or tampered with" in done.err) == (1, True)
    planted.write_bytes(b'{"seq":3,"event":"user.added","user":"eve"}\n')
    done = home("audit", "tail")
    assert (done.code, "eve" in done.out, "audit.jsonl.1 cannot be read as a part" in done.err) == (1, False, True)
    planted.unlink()
    log.write_bytes(whole + b"junk\n")
    done = home("audit", "tail", "-n", "2")
    assert (done.code, "audit.jsonl: 1 lines cannot be read" in done.err) == (1, True)
    log.write_bytes(whole)
    log.with_name("audit.jsonl.bob").unlink()
    for arguments in ((), ("--since", "1h")):
        done = home("audit", "tail", *arguments)
        assert (done.code, "the log is not whole: lines 2 to 2 are missing, between" in done.err) == (1, True)
    assert home("audit", "tail", "-n", "2").code == 0
    log.with_name("audit.jsonl.alice").unlink()
    assert "the log here begins with line 3, of" in home("audit", "tail").err


def test_an_end_that_is_missing_is_told_by_whatever_reads_the_log(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", "audit: {anchor_file: anchors}\n")
    log = home.folder / "audit.jsonl"
    home("user", "add", "alice")
    home.token("--user", "alice")
    home("audit", "rotate")
    readers = (("audit", "tail"), ("audit", "tail", "--since", "1h"), ("token", "list", "--usage"))
    for arguments in readers:
        assert home(*arguments).code == 0
    log.write_bytes(b"")
    for arguments in readers:
        done = home(*arguments)
        assert (done.code, "are missing at its end, says an anchor in anchors" in done.err) == (1, True), arguments


def test_a_name_of_several_lines_says_nothing_of_its_own(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for name in ("alice", "bob"):
        home("user", "add", name)
        if name == "alice":
            (home.folder / "audit.jsonl").rename(home.folder / "audit.jsonl.1\nno fault was found")
    assert "in audit.jsonl.1\\nno fault was found, audit.jsonl\n" in home("audit", "verify").good
    for name in ("notes\nwhole: 9 lines", "\udcff"):
        (home.folder / f"audit.jsonl.{name}").write_text("lock the door\n")
    (home.folder / "audit.jsonl.a\nb").mkdir()
    for arguments in (("verify",), ("tail",)):
        done = home("audit", *arguments)
        assert (done.code, [line for line in done.err.splitlines() if not line.startswith("mcpctl: ")]) == (1, [])


def test_a_call_that_was_killed_before_its_own_line_counts_as_one_in_every_answer(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    path, minute = home.folder / "audit.jsonl", 0

    def clock() -> datetime:
        nonlocal minute
        minute += 1
        return datetime(2026, 1, 1, 0, minute, tzinfo=UTC)

    log = AuditLog(path, KEY, clock)
    call: dict[str, Any] = {"token": "k3vq09zd", "user": "eve", "tool": "execute_statement", "database": "shop",
                            "role": "mcp_eve_w", "backend_pid": 7, "statement_hmac": "5a"}  # fmt: skip
    log.append("tool.begun", request_id="ended", relations=["sales.orders"], **call)
    log.append("tool.begun", request_id="killed", relations=["sales.orders"], **call)
    log.append("tool.called", request_id="ended", relations=["sales.orders"], rows=2, outcome="ok", **call)
    log.append("tool.begun", request_id="unknown", **call)  # as older versions wrote it
    log.append("tool.begun", request_id="late", relations=["sales.orders"], **call)
    log.append("tool.refused", request_id="late", relations=["sales.orders"], outcome="cut", **call)

    found = who_read.search(Reading(path), who_read.Target("sales", "orders"))
    assert [line["request_id"] for line in found.statements] == ["ended", "late", "killed"]
    assert found.unknown == {"begun": 1}
    assert top.count(Reading(path), "user")["eve"].count == usage.by_token(Reading(path))["k3vq09zd"].count == 4
    facts = report.gather(Reading(path), "k3vq09zd", None)
    assert {outcome: one.count for (_, outcome), one in facts.calls.items()} == {"ok": 1, "cut": 1, "begun": 2}
    assert (facts.asked, facts.backends[7].count, facts.roles["shop", "mcp_eve_w"].count) == (4, 4, 4)
    until = Reading(path, end=datetime(2026, 1, 1, 0, 6, tzinfo=UTC))  # its end lies behind that
    assert top.count(until, "user")["eve"].count == 3
    shown = home("audit", "tail", "--since", "2026-01-01", "--json").good
    assert shown.count("tool.begun") == 4


def test_what_lies_beside_the_log_stops_neither_reading_nor_writing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    log = home.folder / "audit.jsonl"
    home("user", "add", "alice")
    home("user", "add", "bob")
    log.rename(log.with_name("audit.jsonl.1"))
    log.with_name("audit.jsonl.1").chmod(0o644)  # a rotation may give it to a group that archives it
    log.with_name("audit.jsonl.notes").write_text("lock the door\n")
    log.with_name("audit.jsonl.folder").mkdir()
    log.with_name("audit.jsonl.link").symlink_to("/etc/passwd")
    done = home("audit", "tail")
    assert (done.code, [row.split("\t")[3] for row in done.out.splitlines()]) == (1, ["alice", "bob"])
    assert [f"audit.jsonl.{name} cannot be read" in done.err for name in ("folder", "link", "notes")] == [True] * 3
    home("user", "add", "carol")
    assert [line["seq"] for line in audit_files.read_back(log)] == [3]


def test_following_tells_what_was_moved_away_between_two_looks(log: AuditLog, path: Path) -> None:
    write(log, 2)

    def twice_moved(_: float) -> None:
        if path.with_name("audit.jsonl.2").exists():
            raise KeyboardInterrupt
        write(log, 1)
        path.rename(path.with_name("audit.jsonl.1"))
        write(log, 2)
        path.rename(path.with_name("audit.jsonl.2"))
        write(log, 1)

    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for line in audit_files.follow(path, twice_moved):
            told.append(line["seq"])
    assert told == [3, 4, 5, 6]


def test_following_begins_though_the_log_was_moved_away_just_now(log: AuditLog, path: Path) -> None:
    write(log, 2)
    path.rename(path.with_name("audit.jsonl.1"))

    def once(_: float) -> None:
        write(log, 1)

    newer = audit_files.follow(path, once)
    assert next(newer)["seq"] == 3


# -- following ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def followed(path: Path, script: list[Callable[[], object]]) -> list[Any]:
    """The seqs that `follow` tells while the script's steps are done, one whenever it has nothing more to tell."""
    steps = iter(script)

    def pause(_: float) -> None:
        step = next(steps, None)
        if step is None:
            raise Stopped
        step()

    told = []
    with pytest.raises(Stopped):
        for line in audit_files.follow(path, pause):
            told.append(line.get("seq", line["event"]))
    return told


def test_follow_tells_what_is_written_from_the_call_on_over_two_rotations(log: AuditLog, path: Path) -> None:
    write(log, 2)
    newer = audit_files.follow(path, lambda _: pytest.fail("it waited"))
    write(log, 1)
    assert next(newer)["seq"] == 3
    script: list[Callable[[], object]] = [
        lambda: write(log, 2),
        lambda: None,
        lambda: (write(log, 1), path.rename(path.with_name("audit.jsonl.1"))),
        lambda: None,
        lambda: write(log, 2),
        lambda: (write(log, 1), path.rename(path.with_name("audit.jsonl.2")), write(log, 1)),
    ]
    assert followed(path, script) == [4, 5, 6, 7, 8, 9, 10]


def test_follow_waits_for_the_end_of_a_line_and_forgets_a_half_that_was_taken_back(log: AuditLog, path: Path) -> None:
    write(log, 1)

    def torn() -> None:
        with path.open("ab") as file:
            file.write(b'{"seq":2,"tim')

    assert followed(path, [torn, lambda: None, lambda: (log.close(), write(log, 2))]) == [2, 3]


def test_follow_does_not_mix_the_half_of_a_moved_file_with_the_new_one(log: AuditLog, path: Path) -> None:
    write(log, 1)

    def torn_and_moved() -> None:
        with path.open("ab") as file:
            file.write(b'{"seq":2,"tim')
        path.rename(path.with_name("audit.jsonl.1"))
        write(log, 1)

    assert followed(path, [torn_and_moved]) == [2]


def test_follow_starts_again_where_the_file_was_emptied(log: AuditLog, path: Path) -> None:
    write(log, 3)
    assert followed(path, [lambda: os.truncate(path, 0), lambda: write(log, 1)]) == [4]


@pytest.mark.parametrize("more", [1, 9])
def test_follow_loses_nothing_when_the_log_is_copied_and_emptied(log: AuditLog, path: Path, more: int) -> None:
    """logrotate's copytruncate; with nine lines more the file is larger than it was, when we look again."""
    write(log, 3)

    def rotate() -> None:
        write(log, 2)
        shutil.copy(path, path.with_name("audit.jsonl.1"))
        os.truncate(path, 0)
        write(log, more)

    assert followed(path, [lambda: write(log, 1), rotate]) == list(range(4, 7 + more))
