"""Whether two things take the same time, told from many tries of each, on a machine that others use, too."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

TRIES = 500
SAME = 0.02
"""By how much the medians may differ, as a part of one."""

Try = Callable[[], Awaitable[object]]


def cpu() -> float:
    """Seconds of CPU that all threads of this process have had: what others do on the machine does not count."""
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


async def tried(
    first: Try, second: Try, tries: int = TRIES, clock: Callable[[], float] = cpu
) -> list[tuple[float, float]]:
    """What each of so many pairs of tries took, by that clock; a coin says which of the two comes first."""
    pairs = []
    with _undisturbed():
        for _ in range(tries):
            taken = {}
            for one in random.sample([first, second], 2):
                begun = clock()
                await one()
                taken[one] = clock() - begun
            pairs.append((taken[first], taken[second]))
    return pairs


def difference(pairs: list[tuple[float, float]]) -> float:
    """By how much the first of each pair takes longer than the second, as a part of it: the median over the pairs. Both
    of a pair were tried at almost the same moment, so a machine that becomes slower in the middle changes nothing, and
    neither does a try that something else held up."""
    return math.expm1(statistics.median(math.log(one / other) for one, other in pairs))


@contextmanager
def _undisturbed() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
