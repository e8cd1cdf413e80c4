"""Makes the pictures of the README and the docs anew: `make pictures`.

Nothing in them is invented: a demo is started, users ask it real questions, `mcpctl top`'s own screen is drawn from
what its server answers, and Chromium opens the sign-in page of a server that offers sign-in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

import chromium  # noqa: E402 - the tests' own

PROGRAM = [sys.executable, "-m", "mcpctl"]
WIDTH, HEIGHT = 150, 16
ASKED = [
    ("alice", "select count(*) from orders a, orders b, orders c where a.shipping + b.shipping > c.shipping", 3.0),
    ("alice", "select category, sum(stock) from products group by category", 0.0),
    ("bob", "select c.country, count(*) from customers c, orders a, orders b where a.id < b.id group by 1", 1.0),
    ("reports", "select pg_sleep(20), count(*) from order_items", 0.5),
    ("reports", "select * from orders limit 500", 0.0),
    ("bob", "select nothing from nowhere", 0.0),
]
"""Who asks what, and for how many seconds before the picture: 0 for what has ended by then."""

_FONTS = re.compile(r"@font-face\s*\{[^}]*\}\s*")
"""What rich has a picture load from elsewhere; the reader's own fixed font serves."""
CONFIG = """server: {port: 0}
databases: {shop: {host: /var/run/postgresql, dbname: shop, user: shop_reader}}
auth: {oauth: {enabled: true}}
"""


@contextlib.contextmanager
def demo() -> Iterator[dict[str, Any]]:
    """A demo that runs, and what it says of itself."""
    process = subprocess.Popen(
        [*PROGRAM, "demo", "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(30)


def mcpctl(config: str, *arguments: str) -> str:
    done = subprocess.run([*PROGRAM, "--config", config, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ask(url: str, token: str, query: str) -> None:
    params = {"name": "query_database", "arguments": {"query": query}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    with contextlib.suppress(httpx.HTTPError):  # the demo ends under those that run
        httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def top(file: Path) -> None:
    """`mcpctl top`, with a call marked."""
    from rich.console import Console

    from mcpctl import config as configuration
    from mcpctl.cli import live, top_screen

    with demo() as there:
        tokens = {}
        for name in dict.fromkeys(who for who, _, _ in ASKED):
            mcpctl(there["config"], "user", "add", name)
            grant = ("--database", "shop", "--schema", "public", "--access", "read", "--apply")
            mcpctl(there["config"], "user", "grant", name, *grant)
            tokens[name] = mcpctl(there["config"], "token", "add", "--user", name, "--expiry", "1d")
        begun = time.monotonic()
        for name, query, before in sorted(ASKED, key=lambda one: (one[2] > 0, -one[2])):
            if before:
                threading.Timer(4.0 - before, ask, (there["url"], tokens[name], query)).start()
            else:
                ask(there["url"], tokens[name], query)
        time.sleep(max(0.0, 5.0 - (time.monotonic() - begun)))
        found = configuration.load(Path(there["config"]), {})
        screen = top_screen.Screen(
            lambda: top_screen.Seen(*live._look(found, 20, True)),
            lambda call: "", lambda token: "", lambda: time.strftime("%H:%M:%S"), sql=True,
        )  # fmt: skip
        screen.look()
        screen.press(b"j")
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            console = Console(width=WIDTH, height=HEIGHT, record=True, file=nowhere, force_terminal=True)
            console.print(screen.drawn(WIDTH, HEIGHT))
            file.write_text(_FONTS.sub("", console.export_svg(title="mcpctl top --sql")), encoding="utf-8")


def sign_in(file: Path) -> None:
    """The page on which a user signs in, of a server that offers it."""
    from mcpctl.cli import init

    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder) / "mcpctl"
        init.make(mine, CONFIG)
        server = subprocess.Popen(
            [*PROGRAM, "--config", str(mine / "config.yaml"), "serve"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert server.stderr is not None
            url = next(line.split()[-1] for line in server.stderr if line.startswith("serving at "))
            with chromium.browser() as browser:
                browser.look(760, 560, dark=False)
                browser.go(url.removesuffix("/mcp") + "/login")
                browser.settle()
                browser.picture(file)
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    top(HERE / "top.svg")
    if chromium.PROGRAM:
        sign_in(HERE / "sign-in.png")
    else:
        sys.exit("no Chromium here: sign-in.png is as it was")
