"""What a storm of sign-ins takes from the callers: one who calls alone, then while a thousand people a minute sign in.

As many sign-ins as the machine can hash succeed, the others are told when to come again (429); the ratio of the calls
is printed for each round, and the memory that the server took above what it had. The numbers say something of the
machine, which the storm's own program shares; the ratio something of mcpctl.

    python benchmarks/sign_in_storm.py --rate 1000 --seconds 60 --rounds 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pg
import site_of_mcpctl as site
from mcpctl.identity import passwords
from signed_in import ENABLED, PASSWORD
from storming import round_of, with_users


def main() -> None:
    """Measure, and print a line for each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rate", type=int, default=1000, help="sign-ins a minute")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of each half of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    begun = time.perf_counter()
    passwords.hashed(PASSWORD)
    print(f"one hash, alone: {1000 * (time.perf_counter() - begun):.0f} ms")
    ratios = []
    with tempfile.TemporaryDirectory() as folder, site.shop(pg.supported()[-1]) as shop:
        at = site.Site(Path(folder) / "site", shop, ENABLED)
        names = with_users(at, 50)
        at.start("--workers", str(asked.workers), anew=True)
        token = at.token()[1]
        try:
            for _ in range(asked.rounds):
                seen = round_of(at, token, names, asked.rate / 60, asked.seconds)
                ratios.append(seen.ratio)
                print(
                    f"alone {seen.alone:7.1f} calls/s, beside the storm {seen.beside:7.1f}, ratio {seen.ratio:.2f}; "
                    f"sign-ins: {seen.statuses[200]} let in, {seen.statuses[429]} told to come again, "
                    f"{sum(seen.statuses.values()) - seen.statuses[200] - seen.statuses[429]} others; the longest took "
                    f"{seen.longest:.1f} s; {seen.memory:.0f} MiB more memory at most"
                )
        finally:
            at.stop()
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
