"""What it costs to keep tenants apart: the same questions by four clients, once with a login role and a pool for each
(two tenants, two devices each), once over one shared pool.

Both are asked in turn, in rounds of one run on the same PostgreSQL, and the ratio of each round is printed with their
median. The numbers say something of the machine, the ratio something of mcpctl; neither decides anything.

    make bench            or: python benchmarks/tenants.py --calls 8000 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pg
import site_of_mcpctl as site
import two_tenants


def main() -> None:
    """Measure both kinds of tenants, and print a line for each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=4000, help="calls of a round, all clients together")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    asked = parser.parse_args()
    print(f"{pg.supported()[-1]}, {asked.calls} calls a round by four clients; seconds")
    for kind in two_tenants.KINDS:
        rounds = _measure(kind, asked.calls, asked.rounds)
        for apart, shared in rounds:
            print(f"{kind}: apart {apart:6.2f}  shared {shared:6.2f}  ratio {apart / shared:.2f}")
        ratios = [apart / shared for apart, shared in rounds]
        rate = asked.calls / statistics.median(apart for apart, _ in rounds)
        print(f"{kind}: median ratio {statistics.median(ratios):.2f}, {rate:.0f} calls a second apart")


def _measure(kind: str, calls: int, rounds: int) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder, site.shop(pg.supported()[-1]) as shop:
        both = (two_tenants.ACME, two_tenants.WIDGETS)
        town = two_tenants.settle(Path(folder) / "apart", shop, kind, houses=both)
        town.site.start(anew=True)
        try:
            return two_tenants.cost(town, Path(folder) / "shared", calls, rounds)
        finally:
            town.site.stop()


if __name__ == "__main__":
    main()
