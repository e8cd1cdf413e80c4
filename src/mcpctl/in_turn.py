"""One's turn to write the store, waited for without holding up the event loop: whoever else holds it, a backup or a
command, holds up nobody but those who want to write."""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from mcpctl.errors import BusyError

PATIENCE = 2.0
"""Seconds to wait for another writer, who needs some milliseconds."""
_FIRST, _LONGEST = 0.005, 0.1
"""Seconds between two tries: fewer the longer it takes, since a hundred may be waiting."""
T = TypeVar("T")


async def in_turn(work: Callable[[], T]) -> T:
    """What `work` returns, done when nobody else writes. It is tried again as long as it raises BusyError, and so must
    not mind that what it did before that is done once more. Raises BusyError after PATIENCE, and whatever it raises."""
    end, pause = monotonic() + PATIENCE, _FIRST
    while True:
        try:
            return work()
        except BusyError:
            if monotonic() + pause > end:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST)
