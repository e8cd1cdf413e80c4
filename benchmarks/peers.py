"""mcpctl beside other MCP servers for PostgreSQL: the same SQL, the same PostgreSQL, 16 connections each.

All servers stay up, and are asked in turn in short slices whose order changes from round to round, so that what else
the machine does hits all alike. The numbers say something of the machine, the ratios something of the servers.

    make bench            or: python benchmarks/peers.py --seconds 2 --rounds 7 --report RESULTS.md
    python benchmarks/peers.py --only mcpctl --server-src . --server-src ../other     two source trees of mcpctl
    python benchmarks/peers.py --only mcpctl --tokens           what 200 tokens cost beside one
    python benchmarks/peers.py --only mcpctl --workers 2        what a second worker gives
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import contenders
import load as processes
from contenders import Contender, MissingError
from table import Load, Slice, Table

import pg
import site_of_mcpctl as site
from mcpctl.postgres.embedded import Binaries

ROWS = "select i, 'row ' || i as name, i * 1.5 as price, now() as at, i % 2 = 0 as even from generate_series(1, 1000) i"
LOADS = [
    Load("`select 1`, 1 client", "select 1", None, 1),
    Load("`select 1`, 16 clients", "select 1", None, 16),
    Load("`select 1`, 64 clients", "select 1", None, 64),
    Load("1,000 rows, 16 clients", ROWS, "row 1000", 16),
]
MANY_TOKENS = 200
_SECONDS_AT_FIRST = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Bench:
    """A PostgreSQL, the servers, and what was measured so far. `counts`: whether PostgreSQL counts statements."""

    shop: site.Shop
    counts: bool
    slices: dict[tuple[str, str], list[Slice]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, one: Contender, load: Load, warm_up: float, seconds: float) -> None:
        """One slice. SystemExit where a server answers something else than was asked for."""
        before = self._statements(load)
        cpu: list[tuple[float, float, float]] = []  # of the server, of all of us, of the machine
        job = one.job(load.query, load.wanted, load.clients, warm_up=warm_up, seconds=seconds)
        command = [sys.executable, "-S", "-E", str(contenders.HERE / "driver.py")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.write(json.dumps(job))
            driver.stdin.close()
            found: dict[str, Any] = {"wrong": "the load generator said nothing"}
            for line in driver.stdout:
                found = json.loads(line)
                if "at" in found:
                    cpu.append((one.cpu(), self._ours(), machine()))
        if "wrong" in found:
            raise SystemExit(f"{one.name}, {load.name}: {found['wrong']}")
        server, ours, all_ = (after - begun for begun, after in zip(*cpu, strict=True))
        calls, took = found["calls"], found["seconds"]
        statements = (self._statements(load) - before) / found["all_calls"] if self.counts else None
        if statements is not None and statements < 1:
            raise SystemExit(f"{one.name}, {load.name}: PostgreSQL ran only {statements:.3f} statements a call")
        self.slices[one.name, load.name].append(
            Slice(
                rate=calls / took, cpu=server / calls * 1000, p50=found["p50"] * 1000, p99=found["p99"] * 1000,
                driver=found["cpu"] / calls * 1e6, foreign=max(0.0, all_ - ours) / took, statements=statements,
            )
        )  # fmt: skip

    def _statements(self, load: Load) -> int:
        """How often PostgreSQL ran that question."""
        if not self.counts:
            return 0
        like = "select $1%" if load.wanted is None else "%generate_series($%"
        query = "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE query ILIKE %s"
        with self.shop.admin() as connection:
            row = connection.execute(query, [like]).fetchone()
        assert row is not None
        return int(row[0])

    def _ours(self) -> float:
        """CPU seconds of this process and all that it has begun, PostgreSQL's among them."""
        pids = [os.getpid()]
        for pid in pids:
            pids += processes.children(pid)
        return sum(map(_spent, pids))


def _spent(pid: int) -> float:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return processes.cpu_seconds(pid)
    return 0.0


def machine() -> float:
    """CPU seconds that the machine has worked since it was started."""
    user, nice, system, _, _, irq, soft_irq, steal = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, irq, soft_irq, steal))) / _TICKS


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
        with shop.admin() as connection:
            connection.execute(f"ALTER ROLE {site.READER} CONNECTION LIMIT -1")  # the peers share that login
            if counts:
                connection.execute("CREATE EXTENSION pg_stat_statements")
        yield Bench(shop, counts)


def entered(folder: Path, shop: site.Shop, asked: argparse.Namespace) -> dict[str, AbstractContextManager[Contender]]:
    """All that are measured, none of them started yet."""
    made: dict[str, AbstractContextManager[Contender]] = {}
    for source in asked.server_src or [None]:
        name = "mcpctl" if source is None else f"mcpctl ({source.resolve().name})"
        variants = [("", 1, 1)]
        variants += [(f", {MANY_TOKENS} tokens", MANY_TOKENS, 1)] if asked.tokens else []
        variants += [(f", {asked.workers} workers", 1, asked.workers)] if asked.workers > 1 else []
        for more, tokens, workers in variants:
            each = name + more
            made[each] = contenders.mcpctl(folder / f"bench-{len(made)}", shop, source, each, tokens, workers)
    made["Toolbox"] = contenders.toolbox(folder, shop)
    made["Toolbox with a JWT"] = contenders.toolbox(folder, shop, jwt=True)
    made["DBHub"] = contenders.dbhub(folder, shop)
    made["bare SDK"] = contenders.bare_sdk(folder, shop)
    return {name: one for name, one in made.items() if not asked.only or name.startswith(tuple(asked.only))}


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of a slice that count")
    parser.add_argument("--warm-up", type=float, default=0.3, help="seconds before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="servers whose names begin so")
    parser.add_argument("--loads", nargs="*", default=[""], help="what is measured whose name holds one of these words")
    parser.add_argument("--server-src", type=Path, action="append", help="a source tree of mcpctl; may be repeated")
    parser.add_argument("--tokens", action="store_true", help=f"mcpctl with {MANY_TOKENS} tokens in turn, too")
    parser.add_argument("--workers", type=int, default=1, help="mcpctl with so many workers, too")
    parser.add_argument("--report", type=Path, help="write the table there, too")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the table."""
    asked = options()
    loads = [one for one in LOADS if any(word in one.name.replace("`", "") for word in asked.loads)]
    if not loads:
        raise SystemExit(f"--loads: none of {', '.join(one.name for one in LOADS)}")
    chance = random.Random()
    with tempfile.TemporaryDirectory() as folder, postgresql() as bench, contextlib.ExitStack() as stack:
        table = Table(str(bench.shop.cluster.binaries), contenders.python(), asked.rounds, asked.seconds)
        running: list[Contender] = []
        for name, entry in entered(Path(folder), bench.shop, asked).items():
            try:
                running.append(stack.enter_context(entry))
            except MissingError as problem:
                table.left_out.append(f"{name}: {problem}")
        for one in running:  # every connection and every pool is there before what counts begins
            bench.measure(one, LOADS[1], _SECONDS_AT_FIRST, asked.seconds)
        bench.slices.clear()
        for number in range(asked.rounds):
            print(f"round {number + 1} of {asked.rounds}", file=sys.stderr)
            for load in loads:
                for one in chance.sample(running, len(running)):
                    bench.measure(one, load, asked.warm_up, asked.seconds)
        text = table.text([(one.name, one.version) for one in running], loads, bench.slices)
    print(text)
    if asked.report:
        asked.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
