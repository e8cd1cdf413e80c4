"""What a stranger can take from the others: a good client on one address, first alone, then while somebody on
another sends a thousand bogus tokens a second.

Rounds of both in turn on the same server; the ratio of the good client's calls is printed for each round, and the
median. Then what a served call costs the server in CPU time, and what an answer to the stranger does. The numbers say
something of the machine (the stranger's program runs on it, too), the ratios something of mcpctl.

    python benchmarks/flood.py --rate 1000 --seconds 5 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import multiprocessing.synchronize
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from load import Caller, LostError, cpu_seconds

import pg
import site_of_mcpctl as site
from mcpctl.identity import tokens

STRANGER = "127.0.0.2"
_CONNECTIONS = 20
_BODY = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'


def main() -> None:
    """Measure, and print a line for each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rate", type=int, default=1000, help="bogus tokens a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each half of a round")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    free = "{rate: 100000, burst: 100000}"
    limits = f"limits: {{tokens: {free}, users: {free}, addresses: {{named: {{127.0.0.1: {free}}}}}}}\n"
    with tempfile.TemporaryDirectory() as folder, site.shop(pg.supported()[-1]) as shop:
        at = site.Site(Path(folder) / "site", shop, limits)
        at.limits = {}  # else the tests' own, which are none
        token, known = at.token()[1], at.token()[1]
        at.start(anew=True)
        try:
            ratios = [_round(at, token, known, asked) for _ in range(asked.rounds)]
        finally:
            at.stop()
        written = (at.folder / "audit.jsonl").read_bytes()
        refusals = sum(len(line) + 1 for line in written.splitlines() if b'"auth.refused"' in line)
    print(f"median ratio {statistics.median(ratios):.2f}; {refusals} bytes of refusals in the audit log")


def _round(at: site.Site, token: str, known: str, asked: argparse.Namespace) -> float:
    alone, served = _spent(at, lambda: asyncio.run(_good(at.url, token, asked.seconds)))
    with _stranger(at.url, known, asked.rate) as answers:
        beside = asyncio.run(_good(at.url, token, asked.seconds))
    with _stranger(at.url, known, asked.rate) as refused:
        _, spent = _spent(at, lambda: time.sleep(asked.seconds))
    each, stranger = served / (alone * asked.seconds), spent / max(1, sum(refused.values()))
    print(
        f"alone {alone:7.1f} calls/s, beside the flood {beside:7.1f}, ratio {beside / alone:.2f}; "
        f"CPU of a call {each * 1e6:.0f} us, of an answer to the stranger {stranger * 1e6:.0f} us; "
        f"stranger: {dict(answers + refused)}"
    )
    return beside / alone


def _spent(at: site.Site, act: Callable[[], float | None]) -> tuple[float, float]:
    """What it returns, and the CPU seconds of the server meanwhile."""
    assert at.process is not None
    before = cpu_seconds(at.process.pid)
    found = act()
    return found or 0.0, cpu_seconds(at.process.pid) - before


@contextlib.contextmanager
def _stranger(url: str, known: str, rate: int) -> Iterator[Counter[str]]:
    """A process that floods meanwhile; afterwards its answers are counted."""
    stop = multiprocessing.Event()
    said: multiprocessing.Queue[Counter[str]] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_flooding, args=(url, known, rate, stop, said))
    answers: Counter[str] = Counter()
    process.start()
    try:
        yield answers
    finally:
        stop.set()
        answers.update(said.get(timeout=30))
        process.join()


async def _good(url: str, token: str, seconds: float) -> float:
    """Calls a second of one client, one after the other."""
    end, done = monotonic() + seconds, 0
    async with Caller(url, source="127.0.0.1") as caller:
        while monotonic() < end:
            reply = await caller.ask(token, f"select {done} as n", done)
            if reply.rows != [[done]]:
                raise SystemExit(f"the good client was not answered: {reply}")
            done += 1
    return done / seconds


def _flooding(
    url: str, known: str, rate: int, stop: multiprocessing.synchronize.Event, said: multiprocessing.Queue[Counter[str]]
) -> None:
    answers: Counter[str] = Counter()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_flood(url, known, rate, stop, answers))
    said.put(answers)


async def _flood(
    url: str, known: str, rate: int, stop: multiprocessing.synchronize.Event, answers: Counter[str]
) -> None:
    """Bogus tokens of each kind at that rate, over many connections: none of ours, no such id, a wrong secret."""
    begun, sent = monotonic(), 0

    bogus = ["mcp_" + "x" * length for length in range(1, 80)]
    bogus += [tokens.mint()[1] for _ in range(80)]
    bogus += [tokens.signed(known[:13] + tokens.mint()[1][13:-7]) for _ in range(80)]

    async def one() -> None:
        nonlocal sent
        async with Caller(url, source=STRANGER) as caller:
            while not stop.is_set():
                if (ahead := begun + sent / rate - monotonic()) > 0:
                    await asyncio.sleep(ahead)
                    continue
                sent += 1
                try:
                    answers[str((await caller.post(bogus[sent % len(bogus)], _BODY)).status)] += 1
                except LostError:
                    answers["lost"] += 1

    await asyncio.gather(*(one() for _ in range(_CONNECTIONS)))


if __name__ == "__main__":
    main()
