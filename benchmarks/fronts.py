"""What a proxy before the server costs: nginx, HAProxy and Caddy with the files of packaging/proxies, and the
server's own TLS, in turn against the same server's plain HTTP.

Each takes short slices in turn, all over TLS, at one client and at sixteen; medians, and ratios to the server's own
TLS, are printed as a table. The proxy, the server, PostgreSQL and the clients share the machine.

    python benchmarks/fronts.py --seconds 2 --rounds 5 --report benchmarks/fronts.md
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import trustme
from load import Caller

import fronts
import pg
import site_of_mcpctl as site

CLIENTS = (1, 16)


class Way(NamedTuple):
    """One way to the server."""

    name: str
    url: str
    tls: ssl.SSLContext | None


class Taken(NamedTuple):
    """What one slice gave: calls a second, and the median of a call in milliseconds."""

    rate: float
    median: float


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of a slice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="where the table goes, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        token, ways = _ways(stack, Path(folder))
        taken: dict[tuple[str, int], list[Taken]] = {}
        for _ in range(asked.rounds):
            for many in CLIENTS:
                for way in ways:
                    one = asyncio.run(_slice(way, token, many, asked.seconds))
                    taken.setdefault((way.name, many), []).append(one)
    table = _table([way.name for way in ways], taken)
    print(table)
    if asked.report:
        asked.report.write_text(f"# Proxies in front\n\n{(__doc__ or '').split(chr(10) * 2)[1]}\n\n{table}\n")


def _ways(stack: ExitStack, folder: Path) -> tuple[str, list[Way]]:
    certificates = _certificates(folder)
    trust = ssl.create_default_context(cafile=certificates / "ca.pem")
    shop = stack.enter_context(site.shop(pg.supported()[-1]))
    there = [name for name in fronts.NAMES if fronts.program(name)]
    ports = dict(zip(there, fronts.free_ports(len(there)), strict=True))
    hosts = ", ".join(f"'localhost:{port}'" for port in ports.values())
    extra = f"server: {{allowed_hosts: [{hosts}], trusted_proxies: [127.0.0.1]}}\n"
    behind = site.Site(folder / "behind", shop, extra=extra)
    own = site.Site(folder / "own", shop)
    token = behind.token()[1]
    (own.folder / "tokens.yaml").write_bytes((behind.folder / "tokens.yaml").read_bytes())
    behind.start("--behind-proxy", anew=True)
    stack.callback(behind.stop)
    pair = ("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"))
    own.start(*pair, anew=True)
    stack.callback(own.stop)
    ways = [Way("mcpctl's own TLS", own.url.replace("127.0.0.1", "localhost"), trust)]
    upstream = int(behind.url.split(":")[2].split("/")[0])
    free = {
        "nginx": {"rate=100r/s": "rate=100000r/s", "burst=200": "burst=100000"},
        "haproxy": {"gt 1000": "gt 10000000"},
    }
    for name, port in ports.items():
        started = fronts.started(name, port, upstream, certificates, folder / name, free.get(name))
        ways.append(Way(name, stack.enter_context(started).url(), trust))
    return token, ways


def _certificates(folder: Path) -> Path:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    return folder


async def _slice(way: Way, token: str, many: int, seconds: float) -> Taken:
    times: list[float] = []
    until = monotonic() + seconds

    async def one() -> None:
        async with Caller(way.url, way.tls) as caller:
            while (begun := monotonic()) < until:
                reply = await caller.ask(token, "select 1", 1)
                assert reply.rows == [[1]], reply
                times.append(monotonic() - begun)

    begun = monotonic()
    await asyncio.gather(*(one() for _ in range(many)))
    return Taken(len(times) / (monotonic() - begun), statistics.median(times) * 1000)


def _table(names: list[str], taken: dict[tuple[str, int], list[Taken]]) -> str:
    lines = ["| way | " + " | ".join(f"calls/s, {many}: ratio | median, ms" for many in CLIENTS) + " |"]
    lines.append("|---" * (1 + 2 * len(CLIENTS)) + "|")
    base = {many: statistics.median(one.rate for one in taken[names[0], many]) for many in CLIENTS}
    for name in names:
        cells = []
        for many in CLIENTS:
            rate = statistics.median(one.rate for one in taken[name, many])
            median = statistics.median(one.median for one in taken[name, many])
            cells += [f"{rate:.0f}: {rate / base[many]:.2f}", f"{median:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
