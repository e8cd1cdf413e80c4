"""How quick the command line and stdio are, and what an idle server takes.

Each command is run in turn with its yardstick, what it cannot do without (`import typer, yaml`, or `import mcp.server`
and a connection to PostgreSQL), and the ratio of each pair is taken. The medians are printed: the times say something
of the machine, the ratios of mcpctl.

    make bench            or: python benchmarks/commands.py --rounds 31 --write
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pg
import site_of_mcpctl as site
from mcpctl.identity import tokens

REPORT = Path(__file__).with_suffix(".md")
SCRIPT = "from mcpctl.cli.main import run; run()"  # what the installed `mcpctl` is
META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}
QUERY = {"name": "query_database", "arguments": {"query": "select 1"}}
MODERN = [{"id": 1, "method": "tools/call", "params": {**QUERY, "_meta": META}}]
OLDER = [
    {"id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}},
    {"method": "notifications/initialized"},
    {"id": 2, "method": "tools/list"},
    {"id": 3, "method": "tools/call", "params": QUERY},
]  # fmt: skip
Sample = tuple[float, float]
"""Seconds by the clock, and of the processor."""


def environment() -> dict[str, str]:
    """That of the tests, in which Python may keep what it has compiled."""
    return {key: value for key, value in site.environment().items() if key != "PYTHONDONTWRITEBYTECODE"}


def timed(work: Callable[[], None]) -> Sample:
    """How long this took, with the processes that it started."""
    before, begin = os.times(), time.perf_counter()
    work()
    took, after = time.perf_counter() - begin, os.times()
    return took, sum(after[2:4]) - sum(before[2:4])


def python(code: str, *arguments: str) -> None:
    """Run this code in a new interpreter, unheard."""
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), check=True, capture_output=True)


def write_tokens(at: site.Site, count: int) -> list[str]:
    """The token file with this many tokens of alice's; their ids."""
    now = datetime.now(UTC)
    _, text = at.token()
    (first,) = list(at.tokens.current().values())[:1]
    entries = {}
    while len(entries) < count:
        name, text = tokens.mint(entries)
        ends = now + timedelta(days=90)
        entries[name] = replace(first, id=name, created_at=now, expires_at=ends, hash=tokens.CHEAP_ARGON2ID.hash(text))
    at.tokens.path.write_bytes(at.tokens.render(entries))
    return list(entries)


def answered(at: site.Site, messages: list[dict[str, object]]) -> float:
    """Seconds from the start of `mcpctl serve --stdio` until the last of these messages has been answered."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "--config", str(at.config), "serve", "--stdio"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for message in messages:
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            process.stdin.flush()
            if "id" in message:
                answer = json.loads(process.stdout.readline())
        took = time.perf_counter() - begin
        assert answer["result"].get("isError") is not True, answer
        process.stdin.close()
    return took


def commands(at: site.Site, rounds: int) -> Iterator[str]:
    """The lines of the table of commands."""
    ids, revoked = write_tokens(at, 100), iter(())
    kinds: dict[str, Callable[[], list[str]]] = {
        "mcpctl --help": lambda: ["--help"],
        "mcpctl token list, 100 tokens": lambda: ["token", "list"],
        "mcpctl token show": lambda: ["token", "show", ids[0]],
        "mcpctl token revoke, of 100": lambda: ["token", "revoke", next(revoked)],
        "mcpctl token revoke, of 10,000": lambda: ["token", "revoke", next(revoked)],
        "mcpctl audit tail": lambda: ["audit", "tail"],
    }
    for name, words in kinds.items():
        if "revoke" in name:
            revoked = iter(write_tokens(at, 10_000 if "10,000" in name else 100))
        least, ours = [], []
        for _ in range(rounds + 1):
            given = words()
            least.append(timed(lambda: python("import typer, yaml")))
            ours.append(timed(lambda: python(SCRIPT, "--config", str(at.config), *given)))  # noqa: B023 - run at once
        yield row(name, least[1:], ours[1:])


def row(name: str, least: list[Sample], ours: list[Sample]) -> str:
    """A line of a table: the medians in milliseconds, that of the ratios, and the ratio of processor time."""
    yardstick, took = (statistics.median(one for one, _ in samples) * 1e3 for samples in (least, ours))
    ratio = statistics.median(ours[0] / least[0] for least, ours in zip(least, ours, strict=True))
    work = sum(cpu for _, cpu in ours) / sum(cpu for _, cpu in least)
    return f"| {name} | {yardstick:.0f} | {took:.0f} | {ratio:.2f} | {work:.2f} |"


def stdio(at: site.Site, dsn: str, rounds: int) -> Iterator[str]:
    """The lines of the table of stdio's first answers."""
    for name, messages in (("a call at once", MODERN), ("initialize, tools/list, then a call", OLDER)):
        least, ours = [], []
        for _ in range(rounds + 1):
            imported = timed(lambda: python("import mcp.server"))
            connected = timed(lambda: psycopg.connect(dsn).close())
            least.append((imported[0] + connected[0], imported[1]))
            took = []
            work = timed(lambda: took.append(answered(at, messages)))[1]  # noqa: B023 - run at once
            ours.append((took[0], work))
        yield row(name, least[1:], ours[1:])


def idle(at: site.Site, shop: site.Shop, seconds: float) -> str:
    """The line of the table of an idle server."""
    write_tokens(at, 1_000)
    at.start(anew=True)
    assert at.process is not None
    pids = [at.process.pid, *_children(at.process.pid)]
    time.sleep(2)
    before = sum(map(_cpu, pids))
    time.sleep(seconds)
    used = (sum(map(_cpu, pids)) - before) / seconds
    memory = sum(_memory(pid) for pid in pids) / 1e6
    connections = len(shop.backends())
    at.stop()
    return f"| {len(pids)} | {memory:.0f} | {used * 100:.2f} | {connections} |"


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    """Bytes of memory; of what processes share each has its part."""
    found = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(found["Pss"].split()[0]) * 1024


def main() -> None:
    """Measure, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs that count, of each kind")
    parser.add_argument("--idle", type=float, default=20, help="seconds to watch an idle server")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {REPORT.name}, too")
    asked = parser.parse_args()
    lines = [f"# Commands, stdio and idleness: medians of {asked.rounds} pairs, Python {sys.version.split()[0]}", ""]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        shop = stack.enter_context(site.shop(pg.supported()[-1]))
        at = site.Site(Path(folder) / "site", shop)
        head = "| yardstick, ms | mcpctl, ms | ratio | ratio of processor time |\n|--|--|--|--|--|"
        lines += [f"| beside `import typer, yaml` {head}", *commands(at, asked.rounds), ""]
        dsn = shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop")
        lines += [
            f"| first answer beside `import mcp.server` and a connection {head}",
            *stdio(at, dsn, asked.rounds),
            "",
        ]
        lines += ["| processes, idle with 1,000 tokens | MB | % of a core | connections |", "|--|--|--|--|"]
        lines += [idle(at, shop, asked.idle)]
    print("\n".join(lines))
    if asked.write:
        REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
