"""Ten thousand tokens in the file, a thousand of them active, two hundred with a pool: what that costs beside ten.

Start, memory of each process, calls, a revocation, other callers while the file changes, and a server that idles with
a thousand. Both servers run at once and are measured in turn, in short slices, so that what else the machine does
meets both.

    make bench            or: python benchmarks/scale.py --write
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import multiprocessing.synchronize
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from load import Caller, LostError, children, cpu_seconds, resident

import pg
import site_of_mcpctl as site
from mcpctl.identity import tokens
from mcpctl.identity.tokens import Token

FEW, MANY, ACTIVE, POOLS = 10, 10_000, 1000, 200
CLIENTS = 4
_LIMITS = "limits: {rate: 100000, burst: 100000, concurrent: 1000, connections: 450}\n"
_choice = random.Random(5)


class Town:
    """A site with so many tokens, of which some are active; `texts` has those, {id: token}."""

    def __init__(self, folder: Path, shop: site.Shop, count: int, active: int) -> None:
        self.at = site.Site(folder, shop, _LIMITS)
        self.texts: dict[str, str] = {}
        now = datetime.now(UTC)
        with self.at.tokens.edit() as entries:
            for number in range(count):
                name, text = tokens.mint(entries)
                over = None if number * active // count != (number + 1) * active // count else now
                hash = tokens.CHEAP_ARGON2ID.hash(text)
                ends = now + timedelta(days=90)
                entries[name] = Token(name, "alice", hash, now, ends, over, ("shop",), note="a laptop of Alice's")
                if over is None:
                    self.texts[name] = text

    def start(self, workers: int) -> float:
        """Start the server; seconds until it is ready."""
        begun = time.perf_counter()
        self.at.start("--workers", str(workers), anew=True)
        return time.perf_counter() - begun

    @property
    def pids(self) -> list[int]:
        assert self.at.process is not None
        return [self.at.process.pid, *children(self.at.process.pid)]

    def some(self, number: int) -> list[str]:
        return list(self.texts.values())[:number]


async def _calls(url: str, texts: Sequence[str], seconds: float) -> list[float]:
    """Seconds that each call of some clients has taken, who go through these tokens."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        mine = texts[number::CLIENTS]
        async with Caller(url) as caller:
            count = 0
            while (begun := time.perf_counter()) < end:
                reply = await caller.ask(mine[count % len(mine)], f"select {count} as n", count)
                took.append(time.perf_counter() - begun)
                assert reply.rows == [[count]], reply
                count += 1

    await asyncio.gather(*map(client, range(CLIENTS)))
    return took


def _p99(slices: Sequence[Sequence[float]]) -> float:
    """The median of the slices' own, in ms: what else the machine does meets some of them."""
    return statistics.median(statistics.quantiles(took, n=100)[98] for took in slices) * 1000


def _change(path: Path, pause: float, stop: multiprocessing.synchronize.Event, done: multiprocessing.Value) -> None:
    file = tokens.token_file(path)
    names = list(file.current())
    while not stop.wait(pause):
        with file.edit() as entries:
            name = _choice.choice(names)
            entries[name] = replace(entries[name], note=f"changed at {time.time()}")
        done.value += 1


@contextlib.contextmanager
def _changing(path: Path, pause: float) -> Iterator[None]:
    """Another process changes one token every now and then."""
    stop, done = multiprocessing.Event(), multiprocessing.Value("i", 0)
    process = multiprocessing.Process(target=_change, args=(path, pause, stop, done))
    process.start()
    try:
        site.eventually(lambda: done.value)
        yield
    finally:
        stop.set()
        process.join()


async def _revoke(town: Town) -> tuple[float, float, float]:
    """Revoke a token whose query runs: seconds from the command's start until its first 401, until the query is gone
    from PostgreSQL, and until the command is done."""
    name = next(iter(town.texts))
    text = town.texts.pop(name)
    mark = f"select pg_sleep(60) as {name.translate(str.maketrans('0123456789', 'ghijklmnop'))}"

    def running() -> bool:
        return any(mark in row[3] for row in town.at.shop.backends("state = 'active'"))

    marks: dict[str, float] = {}
    async with Caller(town.at.url) as caller, Caller(town.at.url) as long:
        asked = asyncio.create_task(long.ask(text, mark, 1))
        await asyncio.to_thread(site.eventually, running)
        begun = time.perf_counter()

        def note(what: str) -> None:
            marks.setdefault(what, time.perf_counter() - begun)

        async def refused() -> None:
            while "refused" not in marks:
                with contextlib.suppress(LostError):
                    if (await caller.ask(text, "select 1", 2)).status == 401:
                        note("refused")

        async def gone() -> None:
            await asked
            await asyncio.to_thread(site.eventually, lambda: not running())
            note("gone")

        async def command() -> None:
            words = [*site.COMMAND, "--config", str(town.at.config), "token", "revoke", name]
            process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.DEVNULL, env=site.environment())
            assert await process.wait() == 0
            note("done")

        await asyncio.gather(refused(), gone(), command())
    return marks["refused"], marks["gone"], marks["done"]


def _imports() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import typer, yaml"], check=True)
    return time.perf_counter() - begun


Row = tuple[str, str, str, str]
Towns = tuple[Town, Town]


def _starts(both: Towns, workers: int) -> Row:
    took: tuple[list[float], list[float]] = ([], [])
    for last in (False, False, True):
        for town, times in zip(both, took, strict=True):
            times.append(town.start(workers))
            if not last:
                town.at.stop()
    few, many = map(statistics.median, took)
    return ("ready, s", f"{few:.2f}", f"{many:.2f}", "2 more")


def _memory(both: Towns, when: str) -> list[Row]:
    rows = []
    names = ["supervisor", *(f"worker {number}" for number in range(1, len(both[0].pids)))]
    for name, *pids in zip(names, *(town.pids for town in both), strict=True):
        few, many = map(resident, pids)
        each = f"{(many - few) / (MANY - FEW):.0f} B a token"
        rows.append((f"{name}, {when}, MiB", f"{few / 2**20:.1f}", f"{many / 2**20:.1f} ({each})", "1 KB a token"))
    return rows


def _speed(both: Towns, used: int, seconds: float, rounds: int, what: str) -> list[Row]:
    took: tuple[list[list[float]], list[list[float]]] = ([], [])
    cost: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for town, slices, costs in zip(both, took, cost, strict=True):
            before = sum(map(cpu_seconds, town.pids))
            slices.append(asyncio.run(_calls(town.at.url, town.some(used), seconds)))
            costs.append((sum(map(cpu_seconds, town.pids)) - before) / len(slices[-1]) * 1000)
    rates = [statistics.median(map(len, slices)) / seconds for slices in took]
    few, many = map(_p99, took)
    return [
        (f"calls a second{what}", f"{rates[0]:.0f}", f"{rates[1]:.0f}", "as many"),
        (f"the server's CPU for a call{what}, ms", *(f"{statistics.median(costs):.2f}" for costs in cost), "as much"),
        (f"p99 of a call{what}, ms", f"{few:.1f}", f"{many:.1f}", "as long"),
    ]


def _reloads(town: Town, seconds: float, rounds: int) -> Row:
    usual: list[list[float]] = []
    during: list[list[float]] = []
    for _ in range(rounds):
        usual.append(asyncio.run(_calls(town.at.url, town.some(8), seconds)))
        with _changing(town.at.tokens.path, 0.5):
            during.append(asyncio.run(_calls(town.at.url, town.some(8), seconds)))
    shown = f"{_p99(during):.1f} ({_p99(during) / _p99(usual):.1f} × {_p99(usual):.1f})"
    return ("p99 of a call while one token changes every half second, ms", "", shown, "2 × the usual")


def _revocations(both: Towns, rounds: int) -> list[Row]:
    took: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
    bases = []
    for _ in range(rounds):
        bases.append(_imports())
        for town, times in zip(both, took, strict=True):
            times.append(asyncio.run(_revoke(town)))
    base = statistics.median(bases)
    few, many = ([statistics.median(column) for column in zip(*times, strict=True)] for times in took)
    words = ("first 401 after the start of `token revoke`, s", "its query gone, s", "`token revoke` done, s")
    wanted = ("1", "1", f"1.6 × {base:.2f} (the imports alone) + 1.5")
    return [
        (word, f"{one:.2f}", f"{other:.2f}", most)
        for word, one, other, most in zip(words, few, many, wanted, strict=True)
    ]


def _idle(folder: Path, shop: site.Shop, seconds: float) -> list[Row]:
    town = Town(folder, shop, ACTIVE, ACTIVE)
    town.start(1)
    try:
        asyncio.run(_calls(town.at.url, town.some(8), 1.0))
        town.at.stop()
        town.start(1)
        time.sleep(2.0)  # what is left of the start
        (pid,) = town.pids
        begun, used = time.perf_counter(), cpu_seconds(pid)
        time.sleep(seconds)
        share = (cpu_seconds(pid) - used) / (time.perf_counter() - begun)
        return [
            ("idle with 1,000 tokens: memory, MiB", "", f"{resident(pid) / 2**20:.1f}", "100"),
            ("CPU, % of a core", "", f"{share * 100:.2f}", "1"),
            ("connections to PostgreSQL", "", str(len(shop.backends())), "0"),
        ]
    finally:
        town.at.stop()


def _measure(folder: Path, shop: site.Shop, asked: argparse.Namespace) -> Iterator[Row]:
    with shop.admin() as connection:
        connection.execute("ALTER ROLE shop_reader CONNECTION LIMIT -1")
    yield from _idle(folder / "idle", shop, asked.idle)
    both = Town(folder / "few", shop, FEW, FEW), Town(folder / "many", shop, MANY, ACTIVE)
    try:
        yield _starts(both, asked.workers)
        yield from _memory(both, "after the start")
        yield from _speed(both, 8, asked.slice, asked.rounds, "")
        yield _reloads(both[1], asked.slice, asked.rounds * 2)
        yield from _memory(both, "after calls and changes")
        yield from _revocations(both, min(asked.rounds, FEW - 2))
        asyncio.run(_calls(both[1].at.url, both[1].some(POOLS), asked.slice * 4))
        yield from _speed(both, POOLS, asked.slice, asked.rounds, f", {POOLS} tokens in turn where there are as many")
    finally:
        for town in both:
            town.at.stop()


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slice", type=float, default=2.0, help="seconds of one slice")
    parser.add_argument("--rounds", type=int, default=5, help="slices of each")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of idling")
    parser.add_argument("--write", action="store_true", help="put the table into scale.md")
    asked = parser.parse_args()
    binaries = pg.supported()[-1]
    with tempfile.TemporaryDirectory() as folder, site.shop(binaries, settings={"max_connections": "600"}) as shop:
        rows = []
        for row in _measure(Path(folder), shop, asked):
            print(*row, sep="\t", flush=True)
            rows.append(row)
    head = f"# {MANY:,} tokens, {ACTIVE:,} of them active: {asked.workers} workers, {CLIENTS} clients, {binaries}\n"
    busy = f"Load average {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores, with what else the machine does.\n"
    lines = [head, busy, f"| | {FEW} tokens | {MANY:,} tokens | at most |", "|--|--|--|--|"]
    said = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
    if asked.write:
        (Path(__file__).parent / "scale.md").write_text(said, encoding="utf-8")


if __name__ == "__main__":
    main()
