"""What goes into the audit log, how much of it, and what happens while it cannot be written."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from chain import KEY, lines, verify
from mcpctl.audit.log import AuditLog
from mcpctl.config_keys import Limits
from mcpctl.errors import Error, LimitedError, UnavailableError
from mcpctl.policy.limits import LINES, TOKEN_LINES, Limiter
from mcpctl.private_file import lock, unlock
from mcpctl.recorder import AGAIN, STRANGERS_IN_FULL, Recorder
from mcpctl.shared_counters import Counters

NOW = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


class Book:
    """A recorder over a real log, with a clock that stands still."""

    def __init__(self, path: Path, statements: str = "full", refuse: bool = True) -> None:
        self.path = path
        self.now = 0.0
        self.log = AuditLog(path, KEY, lambda: NOW)
        limiter = Limiter(Limits(), Counters(), lambda: self.now)
        self.recorder = Recorder(self.log, statements, refuse=refuse, clock=lambda: self.now, line=limiter.line)

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.path) if line["event"] == event]


@pytest.fixture
def book(path: Path) -> Iterator[Book]:
    found = Book(path)
    yield found
    found.log.close()


def test_a_credential_is_noted_once_an_hour_for_each_address(book: Book) -> None:
    for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2", None, None):
        book.recorder.auth_ok("ab12cd34", "alice", address)
    book.recorder.auth_ok("other", "alice", "192.0.2.1")
    assert [(line["token"], line.get("client_ip")) for line in book.events("auth.ok")] == [
        ("ab12cd34", "192.0.2.1"), ("ab12cd34", "192.0.2.2"), ("ab12cd34", None), ("other", "192.0.2.1"),
    ]  # fmt: skip
    book.now = AGAIN - 0.001
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.2.1")
    assert len(book.events("auth.ok")) == 4
    book.now = AGAIN
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.2.1")
    assert len(book.events("auth.ok")) == 5


def test_of_a_credential_that_comes_from_ever_new_addresses_most_are_counted(book: Book) -> None:
    for number in range(500):
        book.recorder.auth_ok("ab12cd34", "alice", f"192.0.{number // 250}.{number % 250}")
        book.recorder.auth_ok("ipv6", "alice", f"2001:db8::{number:x}")
    book.recorder.auth_ok("other", "alice", "192.0.2.1")
    whose = [line["token"] for line in book.events("auth.ok")]
    assert {token: whose.count(token) for token in whose} == {"ab12cd34": TOKEN_LINES, "ipv6": 1, "other": 1}
    book.now = 60
    book.recorder.flush()
    last = book.events("auth.ok")[-1]
    assert (last["token"], last["reason"]) == ("ab12cd34", "490 more within a minute")
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.1.249")
    assert book.events("auth.ok")[-1]["client_ip"] == "192.0.1.249"


def test_a_credential_that_could_not_be_noted_is_noted_as_soon_as_it_can_be(book: Book) -> None:
    book.recorder.auth_ok("first", None, None)
    book.path.chmod(0o644)
    book.log.close()
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.2.1")
    book.path.chmod(0o600)
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.2.1")
    book.recorder.auth_ok("ab12cd34", "alice", "192.0.2.1")
    assert [line["token"] for line in book.events("auth.ok")] == ["first", "ab12cd34"]


def test_refusals_are_told_in_full_at_first_and_then_counted(book: Book) -> None:
    for number in range(STRANGERS_IN_FULL + 5):
        book.recorder.auth_refused("192.0.2.1", f"reason {number}")
    book.recorder.auth_refused("192.0.2.2", "another")
    assert [line["reason"] for line in book.events("auth.refused")] == [
        *(f"reason {number}" for number in range(STRANGERS_IN_FULL)), "another",
    ]  # fmt: skip
    book.now = 59.9
    book.recorder.flush()
    assert len(book.events("auth.refused")) == STRANGERS_IN_FULL + 1
    book.now = 60
    book.recorder.flush()
    last = book.events("auth.refused")[-1]
    assert (last["client_ip"], last["reason"]) == ("192.0.2.1", "5 more within a minute")
    book.recorder.auth_refused("192.0.2.1", "again in full")
    assert book.events("auth.refused")[-1]["reason"] == "again in full"


def test_a_minute_that_is_over_is_told_by_the_next_refusal_also_without_a_flush(book: Book) -> None:
    for _ in range(STRANGERS_IN_FULL + 3):
        book.recorder.auth_refused("192.0.2.1", "wrong")
    book.now = 61
    book.recorder.auth_refused("192.0.2.1", "later")
    assert [line["reason"] for line in book.events("auth.refused")][-2:] == ["3 more within a minute", "later"]


def test_what_was_counted_is_told_at_the_end(book: Book) -> None:
    for _ in range(STRANGERS_IN_FULL + 3):
        book.recorder.auth_refused(None, "wrong")
    book.recorder.flush(everything=True)
    assert book.events("auth.refused")[-1]["reason"] == "3 more within a minute"


def test_a_stranger_with_any_number_of_addresses_cannot_fill_the_disk(book: Book) -> None:
    for number in range(5000):
        book.recorder.auth_refused(f"2001:db8:0:0:{number:x}::1", "one network")
        book.recorder.auth_refused(f"2001:db8:1:{number:x}::1", "many networks")
        book.recorder.auth_refused(f"198.51.{number // 250}.{number % 250}", "many addresses")
    book.recorder.flush(everything=True)
    found = book.events("auth.refused")
    assert len(found) <= 2 * LINES + 1
    in_full = sum(line["reason"].startswith(("one", "many")) for line in found)
    counted = sum(int(line["reason"].split()[0]) for line in found if " more" in line["reason"])
    assert in_full + counted == 15000
    assert sum(line["reason"] == "one network" for line in found) <= STRANGERS_IN_FULL
    book.now = 61
    book.recorder.auth_refused("192.0.2.1", "in full again")
    assert book.events("auth.refused")[-1]["reason"] == "in full again"


def test_a_thousand_bogus_requests_a_second_write_less_than_a_megabyte_an_hour_all_workers_together(
    path: Path,
) -> None:
    """From as many addresses as anybody likes, each of the longest form, to workers that share what they count."""
    log, now = AuditLog(path, KEY, lambda: NOW), [0.0]
    limiter = Limiter(Limits(), Counters(), lambda: now[0])
    workers = [Recorder(log, "full", refuse=True, clock=lambda: now[0], line=limiter.line) for _ in range(4)]
    requests, minutes = 1000, 6
    for second in range(60 * minutes):
        now[0] = float(second)
        for number in range(requests // 20):  # one stands for twenty: only its turn at the quota matters
            recorder = workers[number % 4]
            which = second * requests + number
            address = (
                "192.0.2.1" if number % 5 == 0 else f"2001:db8:{which >> 16:x}:{which & 0xFFFF:x}:aaaa:bbbb:cccc:d"
            )
            reason = "not one of our tokens: form or checksum is wrong; too many wrong ones"
            recorder.auth_refused(address, reason, request_id="0" * 16, token="a" * 8, transport="http")
    for recorder in workers:
        recorder.flush(everything=True)
    log.close()
    size = path.stat().st_size
    at_first = LINES * 600
    assert (size - at_first) * 60 / minutes < 1_000_000, size
    found = lines(path)
    in_full = sum(" more" not in line["reason"] for line in found)
    counted = sum(int(line["reason"].split()[0]) for line in found if " more" in line["reason"])
    assert in_full + counted == 60 * minutes * requests // 20
    verify(path)


def test_one_refused_token_writes_less_than_half_a_megabyte_an_hour_all_workers_together(path: Path) -> None:
    log, now = AuditLog(path, KEY, lambda: NOW), [0.0]
    limiter = Limiter(Limits(), Counters(), lambda: now[0])
    workers = [Recorder(log, "full", refuse=True, clock=lambda: now[0], line=limiter.line) for _ in range(8)]
    minutes = 10
    for number in range(10 * 60 * minutes):
        now[0] = number / 10
        workers[number % 8].auth_refused(
            "2001:db8:aaaa:bbbb:cccc:d", "the token is revoked", proven=True,
            request_id="0" * 16, token="a" * 8, transport="http",
        )  # fmt: skip
    for recorder in workers:
        recorder.flush(everything=True)
    log.close()
    assert path.stat().st_size * 60 / minutes < 500_000
    found = lines(path)
    in_full = sum(" more" not in line["reason"] for line in found)
    counted = sum(int(line["reason"].split()[0]) for line in found if " more" in line["reason"])
    assert in_full > minutes
    assert in_full + counted == 10 * 60 * minutes


def test_a_thief_with_a_right_secret_is_in_the_log_whatever_strangers_do(book: Book) -> None:
    for number in range(500):
        book.recorder.auth_refused(f"198.51.{number // 250}.{number % 250}", "no such token id", token="00000000")
    for _ in range(TOKEN_LINES + 5):
        book.recorder.auth_refused("192.0.2.1", "the token is revoked", proven=True, token="ab12cd34")
    found = [line for line in book.events("auth.refused") if line.get("token") == "ab12cd34"]
    assert len(found) == TOKEN_LINES
    book.now = 60
    book.recorder.flush()
    found = [line for line in book.events("auth.refused") if line.get("token") == "ab12cd34"]
    assert found[TOKEN_LINES]["reason"] == "5 more within a minute"


def test_strangers_whose_token_has_the_form_of_one_are_counted_by_address_before_others(book: Book) -> None:
    for number in range(40):
        for _ in range(5):
            book.recorder.auth_refused(f"198.51.100.{number}", "no credential")
    for _ in range(5):
        book.recorder.auth_refused("192.0.2.1", "wrong secret", token="ab12cd34")
    book.now = 63
    book.recorder.flush()
    counted = [line for line in book.events("auth.refused") if "within" in line["reason"]]
    assert (counted[0]["client_ip"], counted[0]["reason"]) == ("192.0.2.1", "5 more within a minute")


def test_calls_of_a_known_token_that_are_too_many_are_told_in_full_at_first_and_then_counted(path: Path) -> None:
    """However many workers and limits there are."""
    now = [0.0]
    limiter = Limiter(Limits(), Counters(), lambda: now[0])
    log = AuditLog(path, KEY, lambda: NOW)
    workers = [Recorder(log, "full", refuse=True, clock=lambda: now[0], line=limiter.line) for _ in range(4)]
    who = {"token": "ab12cd34", "user": "alice", "tenant": None, "transport": "http"}
    for number in range(TOKEN_LINES + 5):
        for kind in ("token", "user"):
            problem = LimitedError(f"{kind} {number}", kind=kind, name="x", limit="rate", retry_after=1)
            workers[number % 4].limited(problem, **who, client_ip="192.0.2.1")
    now[0] = 60
    for one in workers:
        one.flush()
    log.close()
    found = lines(path)
    assert {line["outcome"] for line in found} == {"limited"}
    assert len(found[:TOKEN_LINES]) == TOKEN_LINES
    assert not any("within" in line["reason"] for line in found[:TOKEN_LINES])
    counted = [line["reason"] for line in found[TOKEN_LINES:]]
    assert sum(int(reason.split()[0]) for reason in counted) == 2 * (TOKEN_LINES + 5) - TOKEN_LINES
    assert {reason.partition(", ")[2] for reason in counted} == {
        "by the rate limit of the token", "by the rate limit of the user",
    }  # fmt: skip


@pytest.mark.parametrize(
    "statements, described, kept",
    [
        ("full", True, "statement"),
        ("full", False, "statement_hmac"),
        ("hash", True, "statement_hmac"),
        ("hash", False, "statement_hmac"),
        ("off", True, None),
        ("off", False, None),
    ],
)
def test_a_statement_is_kept_as_the_config_says_and_one_that_asks_nothing_never_as_text(
    path: Path, statements: str, described: bool, kept: str | None
) -> None:
    book = Book(path, statements)
    text = "alter role x password 'hunter2'"
    book.recorder.call("tool.called", book.recorder.statement(text, described=described))
    book.log.close()
    [line] = lines(path)
    assert {"statement", "statement_hmac"} & line.keys() == ({kept} if kept else set())
    assert (b"hunter2" in path.read_bytes()) == (kept == "statement")
    if kept == "statement_hmac":
        assert line[kept] == hmac.new(KEY, b"statement\0" + text.encode(), hashlib.sha256).hexdigest()


def test_a_call_is_refused_while_the_log_cannot_be_written_and_works_again_later(book: Book) -> None:
    book.recorder.call("tool.called", {"user": "alice"})
    book.path.chmod(0o644)
    book.log.close()
    with pytest.raises(UnavailableError) as caught:
        book.recorder.call("tool.called", {"user": "alice"})
    assert caught.value.status == 503
    assert str(book.path) not in f"{caught.value.message}{caught.value.hint}"  # a caller need not know where it is
    with pytest.raises(UnavailableError):
        book.recorder.before_call()  # nothing is run, either
    book.recorder.note("token.expired", token="ab12cd34")  # what must happen anyway happens
    book.path.chmod(0o600)
    book.recorder.before_call()
    book.recorder.call("tool.called", {"user": "alice"})
    assert [line["event"] for line in lines(book.path)] == [
        "tool.called", "token.expired", "audit.lost", "tool.called",
    ]  # fmt: skip
    assert book.events("audit.lost")[0]["reason"].startswith("2 lines could not be written")
    assert verify(book.path) == 4


def test_a_log_that_only_warns_lets_calls_go_on_and_says_so_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = Book(path, refuse=False)
    book.recorder.call("tool.called", {})
    book.path.chmod(0o644)
    book.log.close()
    for _ in range(3):
        book.recorder.before_call()
        book.recorder.call("tool.called", {})
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1


class Counting(AuditLog):
    """A log that knows how many lines each write had."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEY, lambda: NOW)
        self.writes: list[int] = []

    def add(self, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> None:
        super().add(*lines, at_once=at_once)
        self.writes.append(len(lines))


async def at_once(book: Book, names: Iterable[str]) -> list[Error | None]:
    """What calls that end in one turn of the event loop are told."""
    ending = [book.recorder.ended("tool.called", {"user": name, "outcome": "ok"}) for name in names]
    return await asyncio.gather(*ending)


def test_the_lines_of_calls_that_end_together_are_written_at_once_and_in_their_order(path: Path) -> None:
    book, log = Book(path), Counting(path)
    recorder = Recorder(log, "full", refuse=True)

    async def work() -> None:
        book.recorder = recorder
        assert await at_once(book, "abcd") == [None] * 4
        assert await at_once(book, "e") == [None]

    asyncio.run(work())
    assert log.writes == [4, 1]
    assert "".join(line["user"] for line in lines(path)) == "abcde"
    assert verify(path) == 5
    log.close()


def test_lines_of_calls_wait_for_who_writes_and_nobody_else_does(book: Book) -> None:
    """Another worker, or a command; where it has stopped, they are told so."""
    book.recorder.call("tool.called", {"user": "first"})
    held = os.open(f"{book.path}.lock", os.O_RDWR)

    async def work() -> None:
        lock(held)
        ending = [book.recorder.ended("tool.called", {"user": name}) for name in "ab"]
        for _ in range(5):
            await asyncio.sleep(0.002)  # it has been tried, and the loop goes on
        assert not any(one.done() for one in ending)
        ending.append(book.recorder.ended("tool.called", {"user": "c"}))
        unlock(held)
        assert await asyncio.gather(*ending) == [None] * 3
        lock(held)
        late = book.recorder.ended("tool.called", {"user": "d"})
        await asyncio.sleep(0.002)
        assert not late.done()
        book.now = 0.3
        assert isinstance(await late, UnavailableError)
        unlock(held)
        assert await book.recorder.ended("tool.called", {"user": "e"}) is None

    asyncio.run(work())
    os.close(held)
    users = [line.get("user", line["event"]) for line in lines(book.path)]
    assert users == ["first", "a", "b", "c", "audit.lost", "e"]
    assert verify(book.path) == 6


def test_what_is_noted_while_lines_wait_stands_behind_them(book: Book) -> None:
    book.recorder.call("tool.called", {"user": "first"})
    held = os.open(f"{book.path}.lock", os.O_RDWR)

    async def work() -> None:
        lock(held)
        ending = book.recorder.ended("tool.called", {"user": "a"})
        await asyncio.sleep(0.002)
        unlock(held)
        book.recorder.note("tool.refused", user="a")
        assert await ending is None

    asyncio.run(work())
    os.close(held)
    assert [line["event"] for line in lines(book.path)] == ["tool.called", "tool.called", "tool.refused"]


def test_none_of_the_calls_that_end_together_is_answered_where_their_lines_cannot_be_written(book: Book) -> None:
    async def work() -> list[Error | None]:
        assert await at_once(book, "a") == [None]
        book.path.chmod(0o644)
        book.log.close()
        return await at_once(book, "bcd")

    told = asyncio.run(work())
    assert [type(one) for one in told] == [UnavailableError] * 3
    assert len({id(one) for one in told}) == 3  # each has one of its own, with its own traceback
    book.path.chmod(0o600)
    book.recorder.catch_up()
    assert [line["event"] for line in lines(book.path)] == ["tool.called", "audit.lost"]
    assert book.events("audit.lost")[0]["reason"].startswith("3 lines could not be written")


def test_a_line_that_is_none_keeps_no_other_call_from_its_answer(path: Path) -> None:
    counted: list[tuple[str, Any, bool | None]] = []
    log = AuditLog(path, KEY, lambda: NOW)
    count = lambda event, fields, written: counted.append((event, fields.get("user"), written))  # noqa: E731
    recorder = Recorder(log, "full", refuse=True, count=count)

    async def work() -> list[Error | None]:
        ending = [recorder.ended("tool.called", {"user": name, "rows": rows}) for name, rows in
                  (("a", 1), ("b", object()), ("c", 3))]  # fmt: skip
        return await asyncio.gather(*ending)

    told = asyncio.run(work())
    assert [type(one) for one in told] == [type(None), UnavailableError, type(None)]
    assert recorder.waiting == 1
    assert [line["user"] for line in lines(path)] == ["a", "c"]
    assert counted == [("tool.called", "a", True), ("tool.called", "b", False), ("tool.called", "c", True)]
    assert verify(path) == 2
    log.close()


def test_what_may_hold_a_password_is_not_kept_in_memory(book: Book) -> None:
    hashing = Recorder(book.log, "hmac", refuse=True)
    for text, described in (("select 1", True), ("ALTER ROLE x PASSWORD 'geheim'", False)):
        first = hashing.statement(text, described=described)
        assert hashing.statement(text, described=described) == first
    assert list(book.log._digests) == ["select 1"]
    book.log.close()
    assert not book.log._digests


def two(book: Book) -> list[asyncio.Future[Error | None]]:
    """Two calls whose lines wait to be written."""
    ending = [book.recorder.ended("tool.called", {"user": name}) for name in "ab"]
    assert len(lines(book.path)) == 1
    return ending


def test_a_call_that_is_cancelled_while_its_line_is_written_has_it_all_the_same(book: Book) -> None:
    async def work() -> None:
        book.log.append("audit.rotated")
        first, second = two(book)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second

    asyncio.run(work())
    assert [line.get("user") for line in lines(book.path)] == [None, "a", "b"]


def test_lines_that_wait_to_be_written_together_are_not_lost_with_the_recorder(book: Book) -> None:
    async def work() -> None:
        book.log.append("audit.rotated")
        ending = two(book)
        book.recorder.close()
        assert [line.get("user") for line in lines(book.path)] == [None, "a", "b"]
        await asyncio.gather(*ending)

    asyncio.run(work())
    assert verify(book.path) == 3


def test_a_full_disk_takes_all_lines_of_one_write_or_none(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr
    assert [line["user"] for line in lines(path)] == ["first", "later"]
    assert verify(path) == 2


_FULL = """
import resource, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnavailableError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(Path(sys.argv[1]), bytes(range(32)), lambda: datetime(2026, 11, 20, tzinfo=UTC))
log.append("tool.called", user="first")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
try:
    log.add(*[("tool.called", {"user": f"user{number}"}) for number in range(10)])
except UnavailableError:
    print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.append("tool.called", user="later")
"""
