"""Anchors: what the server says elsewhere of where the log ends, and what `verify` makes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chain import KEY, lines
from command_line import Home
from mcpctl.audit import anchors as audit_anchors
from mcpctl.audit.anchors import EVERY, Anchors, read, read_file
from mcpctl.audit.log import AuditLog, key_id, read_key
from mcpctl.audit.verify import verify
from site_of_mcpctl import Shop, Site

OTHER = bytes(range(1, 33))


def now() -> datetime:
    return datetime(2026, 11, 20, 12, 0, 0, 5000, tzinfo=UTC)


class Book:
    """A log and its anchors, with a clock that stands still."""

    def __init__(self, folder: Path) -> None:
        self.path, self.file = folder / "audit.jsonl", folder / "elsewhere"
        self.clock = 0.0
        self.said: list[str] = []
        self.log = AuditLog(self.path, KEY, now)
        self.anchors = Anchors(self.log, self.file, now, lambda: self.clock, self.said.append)

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.log.append("tool.called")


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    found = Book(tmp_path)
    yield found
    found.log.close()


def test_an_anchor_says_where_the_chain_ends_and_is_read_back_from_any_text(book: Book) -> None:
    assert not book.anchors.due
    book.anchors.write()
    assert book.said == []
    book.write(3)
    book.anchors.write()
    [line] = book.said
    assert line.startswith("mcpctl audit anchor seq=3 hash=")
    assert book.file.read_text() == line + "\n"
    assert book.file.stat().st_mode & 0o777 == 0o600
    journal = ["Nov 20 12:00:00 host mcpctl[1]: " + line, "something else", "mcpctl audit anchor seq=x", line]
    [found], said = read(KEY, (f"{one}\n".encode() for one in journal), "the journal")
    assert (found.seq, found.hash.decode(), found.time) == (3, lines(book.path)[2]["hash"], "2026-11-20T12:00:00.005Z")
    assert said == []
    assert read_file(KEY, book.file)[0][0].seq == 3


def test_anchors_are_written_every_ten_seconds_where_something_was_and_when_the_log_was_moved_away(book: Book) -> None:
    book.write()
    book.anchors.write()
    book.write()
    assert not book.anchors.due
    book.clock = EVERY
    assert book.anchors.due
    book.anchors.write()
    assert not book.anchors.due
    book.clock = 100 * EVERY
    assert not book.anchors.due  # nothing is new
    book.write()
    book.anchors.write()
    book.path.rename(book.path.with_name("audit.jsonl.1"))
    book.write()
    assert book.anchors.due
    assert len(book.said) == 3


def test_an_anchor_file_that_cannot_be_written_is_one_warning_until_it_can_be(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    book.file.mkdir()
    for _ in range(3):
        book.write()
        book.anchors.write()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert len(book.said) == 3
    book.file.rmdir()
    book.write()
    book.anchors.write()
    assert len(read_file(KEY, book.file)[0]) == 1


def test_an_anchor_that_is_forged_or_of_another_key_is_told_apart(book: Book) -> None:
    book.write(3)
    book.anchors.write()
    good = book.said[0]
    others = audit_anchors.text(OTHER, 9, "0" * 64, "2026")
    text = [one.encode() for one in (good, good.replace("seq=3", "seq=8"), good.replace("12:00", "13:00"), others)]
    found, strange = read(KEY, text, "the journal")
    assert [one.seq for one in found] == [3]
    assert [(one.line, one.seq, one.key_id) for one in strange] == [
        (2, 8, key_id(KEY)), (3, 3, key_id(KEY)), (4, 9, key_id(OTHER)),
    ]  # fmt: skip
    assert [one.line for one in read(KEY, text, "the journal", (key_id(KEY), key_id(OTHER)))[1]] == [2, 3]
    assert verify(book.path, KEY, found).fault is None


def test_a_log_that_was_written_anew_with_another_key_is_not_whole(tmp_path: Path) -> None:
    """The key is never dropped. A journal that holds two installations needs --ignore-key."""
    home = Home(tmp_path / "home", "audit: {anchor_file: anchors}\n")
    home("user", "add", "alice")
    home("audit", "rotate")
    journal = home.folder / "journal"
    journal.write_text("something else\n" + (home.folder / "anchors").read_text())
    assert home("audit", "verify", "--anchors", str(journal)).code == 0
    for one in home.folder.glob("audit.jsonl*"):
        one.unlink()
    old = key_id(read_key(home.folder / "audit.key"))
    (home.folder / "audit.key").write_text(OTHER.hex() + "\n")
    (home.folder / "anchors").unlink()
    home("user", "add", "bob")
    done = home("audit", "verify", "--anchors", str(journal))
    assert done.code == 1
    assert f"journal, line 2 (seq 2): 1 anchor of another key, the first of key_id {old}" in done.error
    done = home("audit", "verify", "--anchors", str(journal), "--ignore-key", old)
    assert (done.code, "there is no anchor of this log in it, and there should be one" in done.error) == (1, True)
    home("audit", "rotate")
    with journal.open("a") as file:
        file.write((home.folder / "anchors").read_text())
    assert home("audit", "verify", "--anchors", str(journal), "--ignore-key", old).code == 0


def test_a_tail_that_was_cut_off_is_found_by_an_anchor(book: Book) -> None:
    for _ in range(5):
        book.write()
        book.anchors.write()
    found, _ = read_file(KEY, book.file)
    assert [one.seq for one in found] == [1, 2, 3, 4, 5]
    assert verify(book.path, KEY, found).anchors == 5
    book.path.write_bytes(b"".join(book.path.read_bytes().splitlines(keepends=True)[:2]))
    fault = verify(book.path, KEY, found).fault
    assert fault is not None
    assert (fault.kind, fault.file, fault.line, fault.seq) == ("cut", "audit.jsonl", 3, 3)
    assert "3 lines after seq 2, says an anchor in elsewhere (2026-11-20T12:00:00.005Z)" in fault.reason


@pytest.mark.parametrize("turned", [False, True])
def test_a_log_that_was_cut_back_and_written_on_is_shown_by_an_old_anchor_among_any_number(
    book: Book, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    monkeypatch.setattr(audit_anchors, "MOST", 2)
    book.write(2)
    book.anchors.write()
    book.log.close()
    book.path.write_bytes(book.path.read_bytes().splitlines(keepends=True)[0])
    for _ in range(5):
        book.log.append("tool.refused")
        book.anchors.write()
    told = [one.encode() for one in (reversed(book.said) if turned else book.said)]
    found, _ = read(KEY, told + told[:1], "the journal")
    assert len(found) == 5
    fault = verify(book.path, KEY, found).fault
    assert fault is not None
    assert (fault.kind, fault.line, fault.seq) == ("changed", 2, 2)
    assert "the log was cut off before it, and written on" in fault.reason


# -- a server ----------------------------------------------------------------------------------------------------

MakeSite = Callable[..., Site]


def test_a_server_anchors_its_log_elsewhere_and_knows_itself_where_it_ends(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="audit: {sync: answer, anchor_file: elsewhere/anchors}\n")
    (at.folder / "elsewhere").mkdir(mode=0o700)
    log, kept = at.folder / "audit.jsonl", at.folder / "elsewhere" / "anchors"
    at.start()
    with at.client(at.token()[1]) as client:
        client.rows("select 1")
        moved = Path(at.run("audit", "rotate").stdout.strip())
        client.rows("select 2")
    assert [line["event"] for line in at.audit()] == ["audit.rotated", "tool.called"]
    done = at.run("audit", "verify")
    assert f"in {moved.name}, audit.jsonl" in done.stdout
    assert "anchors agree, up to seq " in done.stdout
    whole = log.read_bytes()
    log.write_bytes(whole[: whole.index(b"\n") + 1])
    done = at.run("audit", "verify", check=False)
    assert done.returncode == 1
    assert "the tail is cut off: 1 line after seq" in done.stderr
    assert "says the running server, pid" in done.stderr
    log.write_bytes(whole)
    at.stop()
    written = [line for line in at.stderr if line.startswith("mcpctl audit anchor ")]
    last = at.audit()[-1]
    assert last["event"] == "server.stopped"
    assert written[-1].split()[3:5] == [f"seq={last['seq']}", f"hash={last['hash']}"]
    assert set(written) < set(kept.read_text().splitlines(keepends=True))  # the rotation's is the command's
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    for lost in (lambda: kept.write_text(""), lambda: kept.write_text("hello\n"), kept.unlink):
        lost()
        done = at.run("audit", "verify", check=False)
        assert (done.returncode, f"cut: {kept}: there is no anchor of this log in it" in done.stderr) == (1, True)
    assert "warning: audit.anchor_file: there is no file" in done.stderr
    done = at.run("audit", "verify", "--anchors", "-", check=False, input="".join(at.stderr))
    assert done.returncode == 1
    assert f"is not whole: cut: audit.jsonl, line {len(at.audit()) + 1} (seq {last['seq']})" in done.stderr


def test_each_of_several_workers_anchors_what_it_has_written(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--workers", "2")
    at.stop()
    anchored = {line.split()[3] for line in at.stderr if line.startswith("mcpctl audit anchor ")}
    ours = [line["seq"] for line in at.audit() if line["event"].startswith("server.")]
    assert len(ours) == 4
    assert anchored == {f"seq={seq}" for seq in ours}
    assert at.run("audit", "verify", "--anchors", "-", input="".join(at.stderr)).stdout.count("4 anchors agree") == 1
