"""Hosts that others name: looked up without holding up anybody, and bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mcpctl.errors import UnavailableError
from mcpctl.lookups import LOOKUPS, Lookups
from mcpctl.server import loop


def test_name_servers_that_never_answer_hold_up_nobody_else_and_are_bounded() -> None:
    """The loop's own threads are what the databases' hosts are resolved in."""
    answer, asked = threading.Event(), list[str]()

    def never(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        answer.wait(30)
        raise OSError

    async def come() -> None:
        look = Lookups(never)
        waiting = [asyncio.create_task(look(f"host{n}.example", 443)) for n in range(LOOKUPS)]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="too many"):
            await look("one-more.example", 443)
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        for one in waiting:
            one.cancel()
        with pytest.raises(UnavailableError, match="too many"):  # nobody waits, and the thread is still there
            await look("one-more.example", 443)
        answer.set()
        async with asyncio.timeout(10):
            while look.running:
                await asyncio.sleep(0.01)
        with pytest.raises(OSError):
            await look("one-more.example", 443)

    try:
        loop.run(come())
    finally:
        answer.set()
    assert len(asked) == LOOKUPS + 1
