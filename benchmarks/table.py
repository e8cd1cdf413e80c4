"""What `peers.py` measured, as one table in words that need no reading of the code."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BASE = "Toolbox"
"""The server that the others are compared with, where it was measured; else the first one."""
WORDS = """\
- All numbers are medians over the rounds. In brackets: the median of the ratios to {base} in the same round.
- CPU: seconds that the server's own processes worked per 1,000 calls. PostgreSQL's work is not in it. What else runs on
  the machine changes it less than the calls a second; a server with many threads can use more than one core.
- p50 / p99: milliseconds in which half of the calls, or all but one in a hundred, were answered.
- {ran}
- Every answer had status 200 and held the value that was asked for. The first of each connection were parsed whole.
- All connections to PostgreSQL are TCP on the same machine, without TLS, and so are the clients'.
"""
WHAT = {
    "mcpctl": "a token that is checked, limits, an audit line a call, a login role and a pool of its own, a read-only"
    " transaction; one worker",
    "mcpctl, 2 workers": "the same with two processes that share the port, each with a pool of half the size",
    "mcpctl, 200 tokens": "the same, asked with 200 tokens in turn, each with a pool of its own",
    "Toolbox": "Google's MCP Toolbox (npm `@toolbox-sdk/server`), without authentication and without a log",
    "Toolbox with a JWT": "the same, which checks a JWT (RS256) with every call",
    "DBHub": "npm `@bytebase/dbhub` on Node 22, one bearer that all share, read only",
    "bare SDK": "the official SDK for Python with one tool and a pool of psycopg, without authentication",
}
_MUCH = 0.2
"""Cores that others keep busy."""
NOT_MEASURED = (
    "postgres-mcp (PyPI) is not measured: its newest release, 0.3.0, serves stdio and the older SSE transport alone,"
    " with five connections at most."
)


@dataclass(frozen=True)
class Load:
    """One thing that is measured: a question by so many clients. `wanted` is in each answer; None for `select 1`'s."""

    name: str
    query: str
    wanted: str | None
    clients: int


@dataclass(frozen=True)
class Slice:
    """What one server did in one slice."""

    rate: float  # calls a second
    cpu: float  # seconds of the server's processes per 1,000 calls
    p50: float  # milliseconds
    p99: float
    driver: float  # microseconds of the load generator per call
    foreign: float  # cores that others on the machine kept busy
    statements: float | None  # that PostgreSQL ran per call; None where it does not count them


Slices = Mapping[tuple[str, str], Sequence[Slice]]


@dataclass
class Table:
    """The report. `left_out` are lines on servers that could not be had."""

    postgresql: str
    python: str
    rounds: int
    seconds: float
    left_out: list[str] = field(default_factory=list)
    _load: tuple[float, float, float] = field(default_factory=os.getloadavg)  # before anything was started

    def text(self, servers: Sequence[tuple[str, str]], loads: Sequence[Load], slices: Slices) -> str:
        """All of it, as Markdown. `servers` are names and versions in the order of the columns."""
        names = [name for name, _ in servers]
        base = BASE if BASE in names else names[0]
        lines = [
            "# mcpctl beside other servers",
            "",
            f"{time.strftime('%Y-%m-%d', time.gmtime())}; {self.postgresql}, Python {self.python},"
            f" Linux {platform.release()}, {os.cpu_count()} cores. {self.rounds} rounds of slices of {self.seconds:g}"
            " s, all servers in turn. Made by `benchmarks/peers.py`.",
            "",
            *_foreign(slices, self._load),
            "",
            f"| | {' | '.join(names)} |",
            f"|---|{'---|' * len(names)}",
        ]
        for load in loads:
            for label, row in cells(load, slices, names, base).items():
                lines.append(f"| {load.name}: {label} | {' | '.join(row)} |")
        lines += ["", *WORDS.format(base=base, ran=_ran(slices)).splitlines(), ""]
        lines += [f"- {name} {version}: {WHAT[name]}." for name, version in servers if name in WHAT]
        lines += [f"- {one}" for one in [*self.left_out, NOT_MEASURED]]
        return "\n".join(lines)


def cells(load: Load, slices: Slices, names: Sequence[str], base: str) -> dict[str, list[str]]:
    """The rows of one load: label → a cell for each server."""

    def medians(what: str) -> list[float]:
        return [statistics.median(getattr(one, what) for one in slices[name, load.name]) for name in names]

    def with_ratios(what: str, digits: int) -> list[str]:
        pairs = [zip(slices[name, load.name], slices[base, load.name], strict=True) for name in names]
        ratios = [statistics.median(getattr(one, what) / getattr(other, what) for one, other in some) for some in pairs]
        return [f"{value:,.{digits}f} ({ratio:.2f})" for value, ratio in zip(medians(what), ratios, strict=True)]

    return {
        "calls a second": with_ratios("rate", 0),
        "CPU": with_ratios("cpu", 2),
        "p50 / p99": [f"{half:.2f} / {most:.2f}" for half, most in zip(medians("p50"), medians("p99"), strict=True)],
    }


def _foreign(slices: Slices, before: tuple[float, float, float]) -> list[str]:
    every = [one for some in slices.values() for one in some]
    foreign, driver = sorted(one.foreign for one in every), statistics.median(one.driver for one in every)
    busy = statistics.median(foreign)
    much = " That is much: trust the CPU more than the calls a second." if busy > _MUCH else ""
    return [
        f"Load average before: {before[0]:.2f}. Others kept {busy:.2f} cores busy meanwhile (median; at most"
        f" {foreign[-1]:.2f}).{much} The load generator itself took {driver:.0f} µs a call, on the same cores."
    ]


def _ran(slices: Slices) -> str:
    ran = [one.statements for some in slices.values() for one in some if one.statements is not None]
    if not ran:
        return "Whether each call ran its statement was not counted: this PostgreSQL has no `pg_stat_statements`."
    return f"PostgreSQL ran {min(ran):.2f} to {max(ran):.2f} statements a call, as `pg_stat_statements` counted them."
