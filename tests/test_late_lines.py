"""What could not be written into the audit log is written later: once, in its order, with the time when it happened."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import runpy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from chain import KEY, lines, verify
from command_line import Home
from mcpctl import config, reserve
from mcpctl.audit import late
from mcpctl.audit.log import AuditLog
from mcpctl.cli.common import note_all
from mcpctl.errors import Error, UnavailableError
from mcpctl.recorder import LATE, Recorder
from mcpctl.server import reload
from mcpctl.server.listening import Listening
from mcpctl.server.live import Place, Process
from mcpctl.server.parts import running
from test_control import process

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class Book:
    """A recorder over a real log that can be taken away, with a clock that is told."""

    def __init__(self, folder: Path, refuse: bool = True) -> None:
        self.path = folder / "audit.jsonl"
        self.now = NOON
        self.log = AuditLog(self.path, KEY, lambda: self.now)
        self.recorder = Recorder(self.log, "full", refuse=refuse, clock=lambda: 0.0)
        self.recorder.note("server.started")

    def take_away(self) -> None:
        self.log.close()
        self.path.chmod(0o644)

    def give_back(self) -> None:
        self.path.chmod(0o600)

    def told(self) -> list[tuple[Any, ...]]:
        return [(one["event"], one.get("token"), one.get("happened_at"), one["time"]) for one in lines(self.path)[1:]]


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    found = Book(tmp_path)
    yield found
    found.log.close()


def test_what_must_happen_anyway_is_written_when_the_log_is_back_before_anything_else(book: Book) -> None:
    book.take_away()
    for name in ("first", "second"):
        book.now += timedelta(minutes=1)
        book.recorder.note("token.expired", token=name)
    book.recorder.catch_up()
    book.give_back()
    book.now += timedelta(minutes=1)
    book.recorder.note("pool.closed", token="third")
    assert book.told() == [
        ("token.expired", "first", "2026-11-20T12:01:00.000Z", "2026-11-20T12:03:00.000Z"),
        ("token.expired", "second", "2026-11-20T12:02:00.000Z", "2026-11-20T12:03:00.000Z"),
        ("pool.closed", "third", None, "2026-11-20T12:03:00.000Z"),
    ]
    assert verify(book.path) == 4


def test_it_is_written_also_while_nothing_else_happens(book: Book) -> None:
    book.take_away()
    book.recorder.note("token.expired", token="first")
    book.give_back()
    book.recorder.catch_up()
    book.recorder.catch_up()
    assert [one[:2] for one in book.told()] == [("token.expired", "first")]


def test_of_more_than_are_kept_the_number_is_told(book: Book) -> None:
    book.take_away()
    for number in range(LATE + 5):
        book.now += timedelta(seconds=1)
        book.recorder.note("token.expired", token=str(number))
    book.give_back()
    book.recorder.catch_up()
    found = lines(book.path)[1:]
    assert [one.get("token") for one in found] == [*(str(number) for number in range(5, LATE + 5)), None]
    said = "5 lines could not be written between 2026-11-20T12:00:01.000Z and 2026-11-20T12:00:05.000Z"
    assert (found[-1]["event"], found[-1]["reason"]) == ("audit.lost", said)


def test_calls_that_were_answered_without_a_line_are_counted(tmp_path: Path) -> None:
    book = Book(tmp_path, refuse=False)
    book.take_away()
    book.recorder.call("tool.called", {})
    book.now += timedelta(seconds=9)
    book.recorder.call("tool.called", {})
    book.give_back()
    book.recorder.call("tool.called", {})
    book.log.close()
    events = [(one["event"], one.get("reason")) for one in lines(book.path)[1:]]
    said = "2 lines could not be written between 2026-11-20T12:00:00.000Z and 2026-11-20T12:00:09.000Z"
    assert events == [("audit.lost", said), ("tool.called", None)]


def test_a_server_that_stops_leaves_what_it_has_beside_the_log_for_the_next(book: Book) -> None:
    book.take_away()
    book.recorder.note("token.expired", token="first")
    book.recorder.note("server.stopped")
    book.recorder.close()
    assert late.place(book.path).stat().st_mode & 0o777 == 0o600
    book.give_back()
    book.now += timedelta(hours=1)
    book.log.append("server.started")
    assert [one[:3] for one in book.told()] == [
        ("token.expired", "first", "2026-11-20T12:00:00.000Z"),
        ("server.stopped", None, "2026-11-20T12:00:00.000Z"),
        ("server.started", None, None),
    ]
    assert not late.place(book.path).exists()


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_each_kept_line_is_written_once_also_when_its_writer_dies_in_between(book: Book, written: int) -> None:
    for name in ("first", "second", "third"):
        book.log.keep("token.revoked", token=name)

    class Died(BaseException):
        pass

    count = 0

    def append(event: str, fields: dict[str, Any]) -> None:
        nonlocal count
        if count == written:
            raise Died
        count += 1
        book.log._append_late(event, fields)

    before = late.place(book.path).read_bytes()
    with book.log._locked():
        try:
            late.write(book.path, None, lambda: book.log._find_end().seq, append)
        except Died:
            pass
        else:  # it dies after the last line, and before the file is gone
            fd = os.open(late.place(book.path), os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(fd, b"%19d\n" % 1 + before.partition(b"\n")[2])
            os.close(fd)
    book.log.keep("token.revoked", token="later")
    AuditLog(book.path, KEY, lambda: NOON).append("server.started")
    assert [one[1] for one in book.told()] == ["first", "second", "third", "later", None]
    assert verify(book.path) == 6


def test_a_rotation_that_comes_first_writes_them_too(book: Book) -> None:
    book.log.keep("token.revoked", token="first")
    with book.log._locked(), pytest.raises(KeyboardInterrupt):
        late.write(book.path, None, lambda: book.log._find_end().seq, _dies)
    moved = book.log.rotate("")
    assert moved is not None
    assert [one.get("token") for one in lines(moved)] == [None, "first"]
    book.log.append("server.started")
    assert [one["event"] for one in lines(book.path)] == ["audit.rotated", "server.started"]
    assert verify(moved, book.path) == 4


def _dies(event: str, fields: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def test_what_is_beside_the_log_and_none_of_ours_is_told_and_not_written(book: Book) -> None:
    book.log.keep("token.revoked", token="first")
    with late.place(book.path).open("ab") as file:
        for depth in (2, *range(980, 1000), 100_000):
            file.write(b'{"event":"token.revoked","reason":%s%s}\n' % (b"[" * depth, b"]" * depth))
        file.write(b'{"event":"made.up"}\n{"event":"token.revoked","made_up":1}\n[]\n{"eve')
    book.log.keep("token.revoked", token="second")
    book.log.append("server.started")
    events = [one[:2] for one in book.told()]
    assert events[0] == ("token.revoked", "first")
    assert events[1:27] == [("audit.lost", None)] * 26
    assert events[27:] == [("token.revoked", "second"), ("server.started", None)]


def test_a_line_from_outside_says_nothing_of_its_place_in_the_chain(book: Book) -> None:
    book.log.keep("tool.called", seq="x", time="2000", key_id="y", prev="z", hash="0" * 64, user="alice")
    book.log.append("server.started")
    assert [one.get("user") for one in lines(book.path)] == [None, "alice", None]
    assert lines(book.path)[1]["time"] == "2026-11-20T12:00:00.000Z"
    assert verify(book.path) == 3


@pytest.mark.parametrize("first", ["beside the log", "elsewhere"])
def test_where_there_is_no_room_beside_the_log_lines_are_kept_beside_the_token_file_and_each_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    spare, other = tmp_path / "tokens", tmp_path / "log"
    spare.mkdir()
    other.mkdir()
    reserve.keep(spare)
    log = AuditLog(other / "audit.jsonl", KEY, lambda: NOON, spare=spare)
    log.append("server.started")
    beside, elsewhere = late.places(log.path, spare)
    log.keep("token.revoked", token="first")
    writing, full = os.write, {beside: True, elsewhere: True}

    def write(fd: int, data: bytes) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if full.get(path, False) and not (path == elsewhere and not reserve.there(spare)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return writing(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        log.keep("token.revoked", token="second")
    assert not reserve.there(spare)
    begun = elsewhere if first == "elsewhere" else beside
    with log._locked():
        end = log._find_end().seq
    begun.write_bytes(b"%019d" % end + begun.read_bytes()[19:])
    log.append("token.added", token="third")
    found = [one["token"] for one in lines(log.path)[1:]]
    assert found == (["second", "first", "third"] if first == "elsewhere" else ["first", "second", "third"])
    assert not beside.exists()
    assert not elsewhere.exists()
    log.close()


def test_lines_that_cannot_even_be_kept_are_counted(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    book.take_away()
    book.recorder.note("token.expired", token="first")
    book.recorder._lose("2026-11-20T12:00:00.000Z")

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", no_room)
        book.recorder.close()
    book.log.lose(3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", no_room)
        AuditLog(book.path.with_name("other.jsonl"), KEY, lambda: NOON).lose(3)
    book.log.keep("token.revoked", token="later")
    book.give_back()
    book.log.append("server.started")
    reasons = [one.get("reason") for one in lines(book.path)[1:]]
    assert reasons == [None, "at least 4 lines could neither be written nor be kept", None]
    other = AuditLog(book.path.with_name("other.jsonl"), KEY, lambda: NOON)
    assert late.place(other.path).stat().st_size == 0
    other.append("server.started")
    assert [one["event"] for one in lines(other.path)] == ["audit.lost", "server.started"]
    other.close()


def test_of_more_lines_than_can_be_kept_a_command_tells_the_number_and_so_does_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    log = home.folder / "audit.jsonl"
    home("user", "add", "bob")
    log.chmod(0o644)
    monkeypatch.setattr(late, "_MOST", 400)
    note_all(config.load(home.config, {}), [("token.revoked", {"token": str(number)}) for number in range(10)])
    said = capsys.readouterr().err
    found = re.search(r"not in the audit log \(([0-9]) of 10 lines\)", said)
    assert found, said
    assert "the log will say that lines are missing" in said
    log.chmod(0o600)
    monkeypatch.undo()
    home("user", "add", "alice")
    events = [(one["event"], one.get("reason")) for one in lines(log)]
    assert sum(event == "token.revoked" for event, _ in events) == 10 - int(found[1])
    assert ("audit.lost", f"at least {found[1]} lines could neither be written nor be kept") in events


def test_of_a_line_that_only_a_server_has_a_command_says_that_it_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    home("user", "add", "bob")
    (home.folder / "audit.jsonl").chmod(0o644)
    found = config.load(home.config, {})
    note_all(found, [("token.revoked", {"token": "first"})])
    assert "hint: it is written there later\n" in capsys.readouterr().err

    def no_room(*_: object, **__: object) -> None:
        raise UnavailableError("no room")

    monkeypatch.setattr(AuditLog, "keep", no_room)
    with process(home.folder, "1", b"{}\n"):
        note_all(found, [("token.revoked", {"token": "second"})])
    assert "it is written there later, but lost if the server stops before it can be" in capsys.readouterr().err


def test_what_a_server_has_lost_is_told_after_its_end_too(book: Book) -> None:
    book.take_away()
    book.recorder._lose("2026-11-20T12:00:00.000Z")
    book.recorder.close()
    book.give_back()
    book.log.append("server.started")
    assert lines(book.path)[1]["reason"].startswith("1 lines could not be written between 2026-11-20T12:00:00.000Z")


def test_what_only_a_server_has_outlives_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    home("user", "add", "bob")
    settings, log = config.load(home.config, {}), home.folder / "audit.jsonl"

    def no_room(*_: object, **__: object) -> None:
        raise UnavailableError("no room")

    async def run() -> None:
        process = Process(Place("one"))
        async with running(settings, files=True, process=process) as first:
            log.chmod(0o644)
            first.recorder._audit.close()
            first.recorder.note("token.revoked", token="ab12cd34")
            first.recorder._lose("2026-11-20T12:00:00.000Z")
            first.quiet = True
        async with running(settings, files=True, process=process, again=True):
            log.chmod(0o600)

    monkeypatch.setattr(AuditLog, "keep", no_room)
    asyncio.run(run())
    told = [(one["event"], one.get("token"), one.get("reason")) for one in lines(log)][-3:]
    assert [one[:2] for one in told] == [("token.revoked", "ab12cd34"), ("audit.lost", None), ("server.stopped", None)]
    assert str(told[1][2]).startswith("1 lines could not be written between 2026-11-20")


def test_a_reload_without_the_log_is_in_the_log_later_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    home("user", "add", "bob")
    settings, log = config.load(home.config, {}), home.folder / "audit.jsonl"
    found = Listening(settings)
    log.chmod(0o644)
    reload.settled(found, found)
    reload.refused(found, Error("a typo"))
    with monkeypatch.context() as patched:
        patched.setattr(late, "_MOST", 1)
        reload.refused(found, Error("another"))
    log.chmod(0o600)
    home("user", "add", "alice")
    told = [(one["event"], one["reason"].split(";")[0], "happened_at" in one) for one in lines(log)[-4:]]
    assert told[0][:2] == ("config.reloaded", "changed: nothing in the config")
    assert told[1] == ("config.reload_refused", "a typo", True)
    assert told[2][:2] == ("audit.lost", "at least 1 lines could neither be written nor be kept")


def test_what_is_kept_is_bounded_and_what_is_too_much_is_said(book: Book) -> None:
    with pytest.raises(UnavailableError, match="is full"):
        for _ in range(20):
            book.log.keep("token.revoked", reason="x" * 65536)
    assert late.place(book.path).stat().st_size <= 1 << 20


def test_a_revocation_by_a_command_without_the_log_is_in_the_log_later(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    name, _ = home.token()
    log = home.folder / "audit.jsonl"
    log.chmod(0o644)
    done = home("token", "revoke", name, "--reason", "it leaked")
    assert done.code == 0
    assert "warning: done, but not in the audit log yet" in done.err
    log.chmod(0o600)
    home("user", "add", "alice")
    revoked, added = lines(log)[-2:]
    assert (revoked["event"], revoked["token"], revoked["transport"]) == ("token.revoked", name, "cli")
    assert revoked["reason"].startswith("it leaked; by ")
    assert revoked["happened_at"] <= revoked["time"]
    assert added["event"] == "user.added"
    assert verify(log, key=bytes.fromhex((home.folder / "audit.key").read_text())) == len(lines(log))


def test_what_is_there_is_what_lexists_says_also_where_access_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    names = [str(tmp_path / name) for name in ("file", "link", "none", "file/none")]
    assert [late.is_there(name) for name in names] == [True, True, False, False]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_, **__: False)
        patch.setattr(os, "supports_follow_symlinks", {os.access})
        forbidden = runpy.run_path(late.__file__)["is_there"]
        assert [forbidden(name) for name in names] == [True, True, False, False]
