"""On disk before the answer leaves: many calls share one fdatasync, none leaves before its own, failures are told."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chain import KEY, lines, verify
from mcpctl import config
from mcpctl.audit.anchors import Anchors
from mcpctl.audit.durable import Durable
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnavailableError
from mcpctl.facts import Answer, Request
from mcpctl.server.parts import running
from site_of_mcpctl import Shop, Site


def now() -> datetime:
    return datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


class Disk:
    """fdatasync, which can be held up, can fail, and notes how much of the file was there when it began."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.begun: list[int] = []
        self.done: list[int] = []
        self.problem: OSError | None = None

    def sync(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        self.begun.append(size)
        assert self.go.wait(30)
        if self.problem is not None:
            raise self.problem
        os.fdatasync(fd)
        self.done.append(size)


class Book:
    """A log on a disk of ours, and what makes it durable."""

    def __init__(self, path: Path, delay: float, refuse: bool = True) -> None:
        self.path, self.disk = path, Disk()
        self.log = AuditLog(path, KEY, now, self.disk.sync)
        self.said: list[str] = []
        anchors = Anchors(self.log, None, now, say=self.said.append)
        self.durable = Durable(self.log, anchors, delay, refuse=refuse)

    async def call(self) -> tuple[int, list[int]]:
        """End a call as `calls` does: where its line ended, and what was on disk when its answer left."""
        self.log.append("tool.called", user="alice")
        size = self.path.stat().st_size
        await self.durable.answering()
        return size, list(self.disk.done)


Make = Callable[..., Book]


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Make]:
    made: list[Book] = []

    def make(delay: float, refuse: bool = True) -> Book:
        made.append(Book(tmp_path / "audit.jsonl", delay, refuse))
        return made[-1]

    yield make
    for one in made:
        one.disk.go.set()
        one.log.close()


async def until(told: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not told():
            await asyncio.sleep(0.001)


def test_many_calls_share_few_syncs_and_no_answer_leaves_before_its_own(book: Make) -> None:
    found = book(0.0)

    async def main() -> list[tuple[int, list[int]]]:
        found.disk.go.clear()
        first = asyncio.create_task(found.call())
        await until(lambda: found.disk.begun)
        others = [asyncio.create_task(found.call()) for _ in range(100)]
        await until(lambda: len(lines(found.path)) == 101)  # the loop goes on while the disk does not
        assert not any(task.done() for task in (first, *others))
        found.disk.go.set()
        return await asyncio.gather(first, *others)

    for size, done in asyncio.run(main()):
        assert max(done) >= size
    assert len(found.disk.done) == 2
    assert verify(found.path) == 101


def test_a_call_that_is_cancelled_takes_the_sync_from_nobody(book: Make) -> None:
    found = book(0.0)

    async def main() -> None:
        found.disk.go.clear()
        gone, stays = asyncio.create_task(found.call()), asyncio.create_task(found.call())
        await until(lambda: found.disk.begun)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert not stays.done()
        found.disk.go.set()
        size, done = await stays
        assert max(done) >= size

    asyncio.run(main())


def test_with_a_delay_no_answer_waits_and_the_disk_has_it_a_little_later(book: Make) -> None:
    found = book(0.01)

    async def main() -> None:
        running = asyncio.create_task(found.durable.run())
        found.disk.go.clear()
        size, done = await found.call()
        assert done == []
        found.disk.go.set()
        await until(lambda: found.disk.done and max(found.disk.done) >= size)
        await found.durable._sync()
        begun = len(found.disk.begun)
        await asyncio.sleep(0.1)
        assert len(found.disk.begun) == begun  # nothing was written, so there is nothing to do
        running.cancel()

    asyncio.run(main())


def test_it_tells_for_how_long_lines_have_not_been_on_disk(book: Make) -> None:
    one, clock = book(1.0), 100.0
    durable = Durable(one.log, Anchors(one.log, None, now), 1.0, refuse=True, clock=lambda: clock)
    assert durable.lag() == 0
    one.log.append("tool.called")
    clock += 5
    assert durable.lag() == 5
    one.disk.problem = OSError(errno.EIO, "no disk")
    asyncio.run(durable._settle(anchor=False))
    clock += 5
    assert durable.lag() == 10
    one.disk.problem = None
    asyncio.run(durable._settle(anchor=False))
    assert durable.lag() == 0
    clock += 60
    one.log.append("tool.called")
    clock += 1
    assert durable.lag() == 61  # at most: it is not known when the line was written


def test_a_sync_that_fails_refuses_the_call_and_those_that_follow_until_the_disk_is_in_order(book: Make) -> None:
    found = book(0.0)
    found.disk.problem = OSError(errno.EIO, "Input/output error")

    def refused(work: Callable[[], object]) -> None:
        with pytest.raises(UnavailableError) as caught:
            work()
        assert caught.value.status == 503

    refused(lambda: asyncio.run(found.call()))
    refused(found.log.check)
    refused(lambda: found.log.append("tool.called"))
    assert len(lines(found.path)) == 1
    found.disk.problem = None
    found.log.check()
    assert asyncio.run(found.call())[1]
    assert verify(found.path) == 2


def test_a_log_that_only_warns_lets_the_answer_leave(book: Make, caplog: pytest.LogCaptureFixture) -> None:
    found = book(0.0, refuse=False)
    found.disk.problem = OSError(errno.EIO, "Input/output error")
    asyncio.run(found.call())
    assert "cannot be written: Input/output error" in caplog.text


def test_what_was_moved_away_before_it_was_on_disk_is_brought_there(book: Make) -> None:
    found = book(1.0)
    found.log.append("tool.called")
    size = found.path.stat().st_size
    found.path.rename(found.path.with_name("audit.jsonl.1"))
    found.log.append("tool.called")
    assert found.disk.done == []  # no writer waits for the disk
    found.log.sync()
    assert found.disk.done == [size, found.path.stat().st_size]
    assert found.log.synced == 2


def test_a_log_that_cannot_be_opened_any_more_keeps_nothing_from_ending(book: Make) -> None:
    found = book(1.0)
    found.log.append("tool.called")
    found.path.unlink()
    found.path.mkdir()
    with pytest.raises(UnavailableError):
        found.log.append("tool.called")
    asyncio.run(asyncio.wait_for(found.durable.close(), 30))
    found.log.close()
    asyncio.run(asyncio.wait_for(Durable(found.log, found.durable._anchors, 1.0, refuse=True).close(), 30))


def test_the_beginning_and_the_end_are_on_disk_before_they_are_anchored(book: Make) -> None:
    found = book(1.0)

    async def main() -> None:
        found.log.append("server.started")
        found.disk.problem = OSError(errno.EIO, "Input/output error")
        await found.durable._settle(anchor=True)
        assert found.said == []
        found.disk.problem = None
        await found.durable._settle(anchor=True)
        await found.durable._settle(anchor=True)
        assert [line.split()[3] for line in found.said] == ["seq=1"]
        found.log.append("server.stopped")
        await found.durable.close()
        assert [line.split()[3] for line in found.said] == ["seq=1", "seq=2"]

    asyncio.run(main())
    assert found.log.synced == 2
    assert asyncio.run(found.durable.end({}))["seq"] == 2


def test_no_calls_answer_leaves_before_its_line_is_on_disk_and_where_that_fails_a_line_says_so(
    make_site: Callable[..., Site], newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="audit: {sync: answer}\n")
    disk = Disk()

    def called() -> int:
        return sum(line["event"] == "tool.called" for line in at.audit())

    async def main() -> None:
        async with running(config.load(at.config, at.limits), files=False) as core:
            local = core.authenticator.local()
            core.calls._answering.__self__._audit._sync = disk.sync  # type: ignore[attr-defined]

            def call(tool: str, **arguments: str) -> asyncio.Task[Answer]:
                return asyncio.create_task(core.calls.call(local, tool, arguments, Request("r", None, "stdio")))

            sleeping = call("query_database", query="select pg_sleep(60)")
            await until(lambda: newest_shop.backends("query LIKE '%pg_sleep(60)%' AND state = 'active'"))
            disk.go.clear()
            sleeping.cancel()
            await until(lambda: called() == 1)
            calls = [call("whoami") for _ in range(20)]
            await until(lambda: called() == 21)
            assert not any(task.done() for task in (sleeping, *calls))
            disk.go.set()
            assert not any(answer.is_error for answer in await asyncio.gather(*calls))
            await asyncio.wait([sleeping])
            assert sleeping.cancelled()
            assert len(disk.done) <= 3  # 21 calls
            disk.problem = OSError(errno.EIO, "Input/output error")
            with pytest.raises(UnavailableError):
                await call("whoami")
            assert (at.audit()[-1]["event"], at.audit()[-1]["outcome"]) == ("tool.called", "ok")
            disk.problem = None
            core.recorder.catch_up()
            told = at.audit()[-1]
            assert (told["event"], told["outcome"], told["request_id"]) == ("tool.refused", "error", "r")
            assert "its answer did not leave" in told["reason"]

    asyncio.run(main())
