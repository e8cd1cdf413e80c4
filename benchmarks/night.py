"""A bad night in ten minutes: many clients and tokens, which expire, are rotated and revoked all the time, while
PostgreSQL is restarted twice, the certificate renewed three times and one worker killed.

What must hold, and is looked at: no wrong answer; no answer to a dead token more than a second after its death; every
answered call in the audit log exactly once, and its chain whole; memory and descriptors flat; no connection to
PostgreSQL beyond the budget, and none left at the end. Exit status 1 where one of them does not hold.

    make soak             or: python benchmarks/night.py --minutes 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import ssl
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import trustme
from cryptography import x509
from load import Caller, LostError, Reply, children, descriptors, resident

import pg
import site_of_mcpctl as site
from mcpctl.errors import Error
from mcpctl.identity import tokens

GRACE = 1.0
"""Seconds after its death in which an answer to a token may still arrive."""
BUDGET = 40
_LIMITS = f"limits: {{rate: 100000, burst: 100000, concurrent: 1000, connections: {BUDGET}}}\n"
_EVERY = 5.0
_RENEWED = 15.0
"""Seconds until a renewed certificate has to be served."""
_choice = random.Random(4)


@dataclass
class Held:
    """A token as the load knows it; `dies` is when it must be dead, by the monotonic clock."""

    id: str
    text: str
    dies: float


@dataclass
class Seen:
    """What the clients saw, and what is wrong with it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Note that something is wrong; the first hundred in words."""
        self.outcomes["FAULT"] += 1
        if len(self.faults) < 100:
            self.faults.append(text)


class Night:
    """One run."""

    def __init__(self, at: site.Site, authority: trustme.CA, clients: int, living: int) -> None:
        self.at = at
        self.authority = authority
        self.clients = clients
        self.living = living
        self.held: list[Held] = []
        self.seen = Seen()
        self.over = False
        self.events: list[str] = []

    def note(self, text: str) -> None:
        """Say what happens."""
        self.events.append(f"{datetime.now(UTC):%H:%M:%S} {text}")
        print(self.events[-1], flush=True)

    # -- the load ----------------------------------------------------------------------------------------------------

    async def ask(self, number: int) -> None:
        """One client: a living or, one time in ten, a dead token; another question each time."""
        count = 0
        trust = ssl.create_default_context()
        self.authority.configure_trust(trust)
        async with Caller(self.at.url, trust) as caller:
            while not self.over:
                held = _choice.choice(self.held)
                count += 1
                name = f"{number}.{count}"
                query = f"select '{name}' as name, {count} as n, (select count(*) from orders) > 0 as filled"  # noqa: S608 - made of numbers
                if count % 50 == 0:
                    query += f", pg_sleep({_choice.random():.2f})::text"
                try:
                    reply = await caller.ask(held.text, query, count)
                except LostError:
                    self.seen.outcomes["connection lost"] += 1
                    await asyncio.sleep(0.05)
                    continue
                except TimeoutError:
                    self.seen.fault(f"{name}: no answer")
                    continue
                late = monotonic() - held.dies
                self.judge(name, count, reply, late)

    def judge(self, name: str, count: int, reply: Reply, late: float) -> None:
        """Whether that answer may be, `late` seconds after the token's death."""
        if reply.status != 200:
            self.seen.outcomes[f"HTTP {reply.status}"] += 1
            if reply.status not in (401, 429, 503):
                self.seen.fault(f"{name}: HTTP {reply.status} {reply.text[:100]}")
            if reply.status in (401, 429) and late < -GRACE:
                self.seen.fault(f"{name}: refused {-late:.1f} s before the token's end")
            return
        self.seen.answered[reply.request_id] += 1
        if late > GRACE:
            self.seen.fault(f"{name}: answered {late:.2f} s after the token's death")
        rows = reply.rows
        if rows is None:
            self.seen.outcomes["tool error: " + reply.text.split("\n")[0][:60]] += 1
        elif rows[0][:3] != [name, count, True] or len(rows) != 1:
            self.seen.fault(f"{name}: wrong answer {rows!r}")
        else:
            self.seen.outcomes["right answer"] += 1

    # -- what happens to tokens --------------------------------------------------------------------------------------

    def add(self, seconds: float) -> None:
        """A further token that lives so long."""
        now = datetime.now(UTC)
        entry, text = tokens.add(
            self.at.tokens, tokens.Wanted("alice", expires_at=now + timedelta(seconds=seconds)), now
        )
        self.held.append(Held(entry.id, text, monotonic() + seconds))

    async def churn(self) -> None:
        """Ten times a second one token is revoked, rotated, removed, or left to expire; the dead are tried for a while,
        and the living kept at their number."""
        while not self.over:
            await asyncio.sleep(0.1)
            now = monotonic()
            self.held = [held for held in self.held if held.dies > now - 10]
            alive = [held for held in self.held if held.dies > now + 1]
            for _ in range(min(10, self.living - len(alive))):
                self.add(_choice.uniform(3, 120))
            held = _choice.choice(alive or self.held)
            kind = _choice.choice(("revoke", "rotate", "remove"))
            try:
                self.end(held, kind)
            except Error as problem:  # it expired while we chose
                self.seen.outcomes[f"{kind}: {type(problem).__name__}"] += 1

    def end(self, held: Held, kind: str) -> None:
        """End a token as the commands do."""
        now = datetime.now(UTC)
        if kind == "revoke":
            tokens.revoke(self.at.tokens, [held.id], now)
        elif kind == "remove":
            tokens.remove(self.at.tokens, held.id)
        else:
            _, new, text = tokens.rotate(self.at.tokens, held.id, None, None, now)
            left = (new.expires_at - now).total_seconds() if new.expires_at else 0.0
            self.held.append(Held(new.id, text, monotonic() + left))
        held.dies = min(held.dies, monotonic())
        self.seen.outcomes[kind] += 1

    # -- what happens to the rest ------------------------------------------------------------------------------------

    async def disasters(self, seconds: float) -> None:
        """Each at its time."""
        begun = monotonic()
        plan = [(0.15, self.renew), (0.25, self.restart), (0.4, self.renew), (0.5, self.kill), (0.65, self.restart)]
        for part, act in [*plan, (0.8, self.renew)]:
            await asyncio.sleep(max(0.0, begun + part * seconds - monotonic()))
            await act()
        await asyncio.sleep(max(0.0, begun + seconds - monotonic()))
        self.over = True

    async def renew(self) -> None:
        """A new certificate and key, written one after the other, as renewals are."""
        serial = write_pair(self.authority, self.at.folder)
        self.note("certificate renewed")
        begun = monotonic()
        while await asyncio.to_thread(self.serial) != serial:
            if monotonic() - begun > _RENEWED:
                self.seen.fault(f"the new certificate is not served after {_RENEWED:g} s")
                return
            await asyncio.sleep(0.2)
        self.note(f"and served after {monotonic() - begun:.1f} s")

    def serial(self) -> int:
        """The number of the certificate that is served now."""
        where = urlsplit(self.at.url)
        pem = ssl.get_server_certificate((str(where.hostname), where.port or 443))
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    async def restart(self) -> None:
        """PostgreSQL restarts."""
        await asyncio.to_thread(self.at.shop.cluster.restart)
        self.note("PostgreSQL restarted")

    async def kill(self) -> None:
        """One worker is killed."""
        assert self.at.process is not None
        victim = children(self.at.process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        self.note(f"worker {victim} killed")

    async def measure(self) -> None:
        """Memory, descriptors and backends, every few seconds."""
        assert self.at.process is not None
        begun = monotonic()
        while not self.over:
            await asyncio.sleep(_EVERY)
            pids = children(self.at.process.pid)
            memory = max(map(resident, pids), default=0)
            files = max(map(descriptors, pids), default=0)
            try:
                backends = len(await asyncio.to_thread(self.at.shop.backends))
            except site.psycopg.Error:
                continue
            if backends > BUDGET:
                self.seen.fault(f"{backends} connections to PostgreSQL, where {BUDGET} may be")
            self.seen.samples.append((monotonic() - begun, memory, files, backends))

    async def run(self, seconds: float) -> None:
        """All of it at once."""
        for _ in range(self.living):
            self.add(_choice.uniform(3, 120))
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self.ask(number))
            for task in (self.churn(), self.disasters(seconds), self.measure()):
                group.create_task(task)

    # -- afterwards --------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Each answered call exactly once in the log, and the chain whole."""
        logged: Counter[str] = Counter()
        for line in (self.at.folder / "audit.jsonl").read_bytes().splitlines():
            found = json.loads(line)
            if found["event"] in ("tool.called", "tool.refused"):
                logged[found.get("request_id", "")] += 1
        missing = [name for name in self.seen.answered if logged[name] != 1]
        if missing:
            self.seen.fault(f"{len(missing)} answered calls are not in the log exactly once, such as {missing[:3]}")
        twice = [name for name, times in logged.items() if times > 1]
        if twice:
            self.seen.fault(f"{len(twice)} calls are in the log more than once, such as {twice[:3]}")
        done = self.at.run("audit", "verify", check=False)
        if done.returncode:
            self.seen.fault(f"audit verify: {done.stdout}{done.stderr}")
        self.note(f"{sum(logged.values())} calls in the log, {len(self.seen.answered)} answers; {done.stdout.strip()}")

    def flat(self) -> None:
        """Memory and descriptors of the last third no more than of the middle one, but for some noise."""
        third = len(self.seen.samples) // 3
        if third < 2:
            return
        for column, what, slack in ((1, "bytes of memory", 24 << 20), (2, "descriptors", 100)):
            before = max(sample[column] for sample in self.seen.samples[third : 2 * third])
            after = max(sample[column] for sample in self.seen.samples[2 * third :])
            if after > before * 1.1 + slack:
                self.seen.fault(f"{what} grew from {before} to {after}")

    def report(self, seconds: float, binaries: object) -> str:
        """What was seen, as a page."""
        lines = [f"# A bad night: {seconds:g} s, {self.clients} clients, {self.living} living tokens, {binaries}", ""]
        lines += [f"- {name}: {count}" for name, count in self.seen.outcomes.most_common()]
        lines += ["", "## Events", "", *(f"- {event}" for event in self.events)]
        lines += [
            "",
            "## Memory, descriptors, connections",
            "",
            "| s | MiB | descriptors | connections |",
            "|--|--|--|--|",
        ]
        step = max(1, len(self.seen.samples) // 20)
        lines += [
            f"| {at:.0f} | {m >> 20} | {files} | {backends} |" for at, m, files, backends in self.seen.samples[::step]
        ]
        lines += ["", "## Faults", "", *([f"- {fault}" for fault in self.seen.faults] or ["None."])]
        return "\n".join(lines) + "\n"


def write_pair(authority: trustme.CA, folder: Path) -> int:
    """A certificate for this machine and its key, into the files that the server reads; its number."""
    made = authority.issue_cert("127.0.0.1", "localhost")
    for name, content in (
        ("tls.key", made.private_key_pem.bytes()),
        ("tls.crt", b"".join(pem.bytes() for pem in made.cert_chain_pems)),
    ):
        new = folder / f"{name}.new"
        new.touch(0o600)
        new.write_bytes(content)
        new.replace(folder / name)
    return x509.load_pem_x509_certificate(made.cert_chain_pems[0].bytes()).serial_number


def main() -> None:
    """Run a night, print what was seen, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "night.md")
    asked = parser.parse_args()
    binaries = pg.supported()[-1]
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as folder, site.shop(binaries) as shop:
        at = site.Site(Path(folder) / "site", shop, _LIMITS, database="    pool: {max_idle: 5s}\n")
        at.limits = {}  # else the tests' own, which are none
        write_pair(authority, at.folder)
        at.start("--tls-cert", str(at.folder / "tls.crt"), "--tls-key", str(at.folder / "tls.key"),
                 "--workers", str(asked.workers), anew=True)  # fmt: skip
        night = Night(at, authority, asked.clients, asked.tokens)
        try:
            asyncio.run(night.run(asked.minutes * 60))
        finally:
            code = at.stop()
        night.note(f"the server stopped with {code}")
        if left := shop.backends():
            night.seen.fault(f"connections that were left behind: {left}")
        night.audit()
        night.flat()
        said = night.report(asked.minutes * 60, binaries)
    print(said)
    asked.report.write_text(said, encoding="utf-8")
    sys.exit(1 if night.seen.faults else 0)


if __name__ == "__main__":
    main()
