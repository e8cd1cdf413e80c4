"""On disk: before an answer leaves, or at most a moment later; many lines share one fdatasync(2)."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

from mcpctl.audit.anchors import Anchors
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnavailableError

Clock = Callable[[], float]
log = logging.getLogger("mcpctl.audit")
_TICK = 1.0
"""Seconds, where answers wait by themselves, until the lines of what is no call are on disk."""


class Durable:
    """Brings what one process has written onto the disk, on a thread, and then anchors it. `delay`: seconds until then
    at most; 0: each call's answer waits for it. `refuse`: whether a call is refused where it failed."""

    def __init__(
        self, audit: AuditLog, anchors: Anchors, delay: float, *, refuse: bool, clock: Clock = monotonic
    ) -> None:
        self._audit = audit
        self._anchors = anchors
        self._delay = delay
        self._refuse = refuse
        self._thread = ThreadPoolExecutor(1, "audit")  # its own: a flood of wrong tokens keeps the others busy
        self._syncing: asyncio.Task[None] | None = None
        self._clock = clock
        self._whole = clock()
        """When all that was written was on disk last."""

    @property
    def waits(self) -> bool:
        """Whether answers wait for the disk, so that `answering` has anything to do."""
        return not self._delay

    def lag(self) -> float:
        """For how many seconds, at most, lines of this process have not been on disk; 0 where all are."""
        end = self._audit.written
        if end is None or self._audit.synced >= end.seq:
            return 0.0
        return self._clock() - self._whole

    async def answering(self) -> None:
        """A call's line has been written, and its answer is about to leave. Raises UnavailableError where the line is
        not known to be on disk, though it is to be."""
        if not self.waits:
            return
        try:
            await self._sync()
        except UnavailableError as problem:
            log.error("%s", problem.message)
            if self._refuse:
                hint = "tell the administrator; calls are answered again as soon as it can be"
                raise UnavailableError("the audit log cannot be written", hint) from None

    async def run(self) -> None:
        """Sync and anchor: at the beginning, and then for ever."""
        anchor = True
        while True:
            await self._settle(anchor=anchor)
            await asyncio.sleep(self._delay or _TICK)
            anchor = self._anchors.due

    async def close(self) -> None:
        """The end: what is written is on disk and anchored."""
        await self._settle(anchor=True)
        self._thread.shutdown(wait=False)

    async def end(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Where the chain ends, as far as this process knows: what it has itself written last. Asked over the control
        socket."""
        end = self._audit.written
        return {"pid": os.getpid()} if end is None else {"pid": os.getpid(), "seq": end.seq, "hash": end.hash}

    async def _settle(self, *, anchor: bool) -> None:
        with contextlib.suppress(UnavailableError):  # the next append says so, and the recorder tells
            await self._sync()
            if anchor:
                await asyncio.get_running_loop().run_in_executor(None, self._anchors.write)

    async def _sync(self) -> None:
        """Return when all that has been written until now is on disk. Who comes while one sync runs shares the next."""
        end, begun = self._audit.written, self._clock()
        while end is not None and self._audit.synced < end.seq:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.ensure_future(self._sync_once())
                self._syncing.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(self._syncing)  # who is cancelled does not take it from the others
        self._whole = begun

    async def _sync_once(self) -> None:
        with self._audit.syncing() as work:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
