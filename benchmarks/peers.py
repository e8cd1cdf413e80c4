"""mcpctl beside other MCP servers for PostgreSQL: the same SQL, the same PostgreSQL, 16 connections each.

All servers stay up, and are asked in turn in short slices whose order changes from round to round, so that what else
the machine does hits all alike. The numbers say something of the machine, the ratios something of the servers.

    make bench            or: python benchmarks/peers.py --seconds 2 --rounds 7
    python benchmarks/peers.py --server-src . --server-src ../other --only mcpctl     two source trees of mcpctl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import contenders
from contenders import Contender, MissingError

import pg
import site_of_mcpctl as site
from mcpctl.postgres.embedded import Binaries

ONE = ("select 1", "1")
MANY = (
    "select i, 'row ' || i as name, i * 1.5 as price, now() as at, i % 2 = 0 as even from generate_series(1, 1000) i",
    "row 1000",
)


@dataclass(frozen=True)
class Load:
    """One thing that is measured: a question, by so many clients."""

    name: str
    query: str
    wanted: str
    clients: int


LOADS = [
    Load("select 1, 1 client", *ONE, 1),
    Load("select 1, 16 clients", *ONE, 16),
    Load("select 1, 64 clients", *ONE, 64),
    Load("1,000 rows, 16 clients", *MANY, 16),
]


@dataclass
class Slice:
    """What one server did in one slice: calls a second, its CPU seconds per 1,000 calls, milliseconds, statements that
    PostgreSQL ran per call."""

    rate: float
    cpu: float
    p50: float
    p99: float
    driver: float
    statements: float | None


@dataclass
class Bench:
    """A PostgreSQL, the servers, and what was measured so far."""

    shop: site.Shop
    counts: bool
    slices: dict[tuple[str, str], list[Slice]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, one: Contender, load: Load, warm_up: float, seconds: float) -> None:
        """One slice."""
        before = self._statements(load)
        job = one.job(load.query, load.wanted, load.clients, warm_up=warm_up, seconds=seconds)
        driver = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).parent / "driver.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert driver.stdin is not None
        assert driver.stdout is not None
        with driver:
            driver.stdin.write(json.dumps(job))
            driver.stdin.close()
            cpu = []
            for line in driver.stdout:
                found = json.loads(line)
                if "at" in found:
                    cpu.append(one.cpu())
        if "wrong" in found:
            raise SystemExit(f"{one.name}, {load.name}: {found['wrong']}")
        ran = (self._statements(load) - before) / found["all_calls"] if self.counts else None
        if ran is not None and ran < 1:
            raise SystemExit(f"{one.name}, {load.name}: only {ran:.3f} statements ran per call")
        calls, seconds = found["calls"], found["seconds"]
        self.slices[one.name, load.name].append(
            Slice(calls / seconds, (cpu[1] - cpu[0]) / calls * 1000, found["p50"] * 1000, found["p99"] * 1000,
                  found["cpu"] / calls * 1e6, ran)
        )  # fmt: skip

    def _statements(self, load: Load) -> int:
        if not self.counts:
            return 0
        like = "%generate_series(%" if "generate_series" in load.query else "select $1%"
        query = "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE query ILIKE %s"
        with self.shop.admin() as connection:
            row = connection.execute(query, [like]).fetchone()
        assert row is not None
        return int(row[0])

    def median(self, one: str, load: str, what: str) -> float:
        """The median over the rounds."""
        return statistics.median(getattr(each, what) for each in self.slices[one, load])


def newest() -> tuple[Binaries, bool]:
    """The newest PostgreSQL that can count statements, else the newest; and whether it can."""
    found = pg.supported()
    able = [one for one in found if any((one.folder.parent / "lib").rglob("pg_stat_statements.so"))]
    return (able or found)[-1], bool(able)


@contextlib.contextmanager
def postgresql() -> Iterator[Bench]:
    """A PostgreSQL of our own, with the demo's shop in it."""
    binaries, counts = newest()
    settings = {"max_connections": "400"} | ({"shared_preload_libraries": "pg_stat_statements"} if counts else {})
    with site.shop(binaries, tcp=True, settings=settings) as shop:
        if counts:
            with shop.admin() as connection:
                connection.execute("CREATE EXTENSION pg_stat_statements")
        yield Bench(shop, counts)


def started(stack: contextlib.ExitStack, folder: Path, bench: Bench, asked: argparse.Namespace) -> list[Contender]:
    """Every server that can be had; a line for each other."""
    made: list[tuple[str, Any]] = []
    for number, source in enumerate(asked.server_src or [None]):
        name = "mcpctl" if source is None else f"mcpctl ({source.resolve().name})"
        made.append((name, contenders.mcpctl(folder / f"mcpctl-{number}", bench.shop, source, name)))
    made.append(("Toolbox", contenders.toolbox(folder, bench.shop)))
    running = []
    for name, one in made:
        if asked.only and not any(name.startswith(word) for word in asked.only):
            continue
        try:
            running.append(stack.enter_context(one))
        except MissingError as problem:
            print(f"left out: {name}: {problem}")
    return running


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of a slice that count")
    parser.add_argument("--warm-up", type=float, default=0.3, help="seconds before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="servers whose names begin so")
    parser.add_argument("--loads", nargs="*", help="only what is measured under names that hold one of these words")
    parser.add_argument("--server-src", type=Path, action="append", help="a source tree of mcpctl; may be repeated")
    asked = parser.parse_args()
    loads = [one for one in LOADS if not asked.loads or any(word in one.name for word in asked.loads)]
    with tempfile.TemporaryDirectory() as folder, postgresql() as bench, contextlib.ExitStack() as stack:
        running = started(stack, Path(folder), bench, asked)
        chance = random.Random()
        for _ in range(asked.rounds):
            for load in loads:
                for one in chance.sample(running, len(running)):
                    bench.measure(one, load, asked.warm_up, asked.seconds)
        for load in loads:
            for one in running:
                show(bench, one.name, load.name)


def show(bench: Bench, one: str, load: str) -> None:
    rate, cpu, p50, p99, driver = (bench.median(one, load, what) for what in ("rate", "cpu", "p50", "p99", "driver"))
    print(f"{load:24} {one:20} {rate:8.0f} calls/s  {cpu:6.3f} CPU s/1,000 calls  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms"
          f"  driver {driver:.0f} µs/call  statements/call {bench.slices[one, load][0].statements}")  # fmt: skip


if __name__ == "__main__":
    main()
