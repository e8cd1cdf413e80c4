"""Fuzzing of the HTTP surface over real sockets: hostile requests and honest ones, mutated, for minutes on end, while
an honest client asks. It fails for a 5xx that is none of the documented ones, for a connection that is neither answered
nor closed, for an honest request that is not answered, for a traceback in the server's log, and where memory or
descriptors grow.

The mutators are our own: schemathesis needs an OpenAPI schema, and what is behind this door is one URL that takes
JSON-RPC; the parsers worth attacking (HTTP, JSON, tokens, SQL's text) lie below any schema.

    make soak                     or: python benchmarks/soak.py --minutes 2 --report soak.md
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import attacked
import corpus
import pg
import site_of_mcpctl as site
from mcpctl import __version__

PATIENT = 0.02
"""How many of the connections wait until the server has closed them; the others leave after `HASTE` seconds."""
HASTE, HANGS = 0.3, 60.0
"""Seconds without an answer after which we leave; and after which an unanswered connection hangs (a head has 20 s, a
body 30, and whoever is looked at twice another 20)."""
DOCUMENTED = {501, 503, 505}
MIB = 1 << 20


@dataclass
class Found:
    """What came of it, so far."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    sent: int = 0
    silent: int = 0
    honest: list[float] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, what: str) -> None:
        with self.lock:
            self.faults.append(what)


def mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds, changed a few times or not at all."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 8, 100)))
        what = chance.randrange(8)
        if what == 0:
            data[at:end] = chance.randbytes(end - at)
        elif what == 1:
            del data[at:end]
        elif what == 2:
            data[at:at] = data[at:end] * chance.choice((1, 2, 50))
        elif what == 3:
            data[at:at] = chance.choice((b"\r\n", b"\n", b"\0", b"{", b'"', b"[" * 500, b": ", b"\xff", b"9" * 30))
        elif what == 4:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
        elif what == 5:
            del data[at:]
        elif what == 6 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        else:
            data += chance.choice(seeds)
    return bytes(data[: 4 * MIB])


def seeds(at: site.Site) -> list[bytes]:
    """The corpus of hostile requests, and calls of every tool with statements that are none too dear."""
    names = attacked.credentials(at)
    host = at.url.split("/")[2]
    found = [case.send for case in attacked.cases(host, names) if case.send]
    dear = ("dear", "hardened")
    texts = [one.text for one in corpus.attacks() if one.kind not in dear] + ["select 1", "table customers"]
    for text in texts:
        params = {"name": "query_database", "arguments": {"query": text}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        body = corpus.dumps(message).encode(errors="replace")
        head = f"POST /mcp HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {names['TOKEN']}\r\nAccept: */*\r\n"
        head += f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        found.append(head.encode() + body)
    return found


def visit(address: tuple[str, int], data: bytes, chance: random.Random, found: Found) -> None:
    """Send it, in one piece or in several, and look at what is answered."""
    patient = chance.random() < PATIENT
    answer, closed = b"", False
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=HANGS if patient else HASTE) as wire:
        try:
            while data:
                size = chance.choice((len(data), len(data), chance.randrange(1, len(data) + 1)))
                wire.sendall(data[:size])
                data = data[size:]
            while more := wire.recv(65536):
                answer += more
            closed = True
        except TimeoutError:
            pass
        except OSError:
            closed = True
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
    with found.lock:
        found.sent += 1
        found.silent += not statuses
        found.statuses.update(statuses)
    if bad := [status for status in statuses if status >= 500 and status not in DOCUMENTED]:
        found.fault(f"answered {bad}: {answer[:300]!r}")
    if patient and not closed:
        found.fault(f"neither answered nor closed in {HANGS:g} s; answered so far {statuses}")


def measured(at: site.Site) -> tuple[int, int]:
    """The server's resident memory in bytes, and its descriptors."""
    assert at.process is not None
    here = Path(f"/proc/{at.process.pid}")
    lines = (here / "status").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    return memory, sum(1 for _ in (here / "fd").iterdir())


def ask(at: site.Site, token: str, until: float, found: Found) -> None:
    """The honest client, once a second; and a look at the server."""
    begun = time.monotonic()
    while (now := time.monotonic()) < until:
        try:
            with at.client(token) as client:
                status = client.call("whoami").status_code
            if status != 200:
                found.fault(f"the honest client was answered {status}")
        except OSError as problem:
            found.fault(f"the honest client: {problem!r}")
        found.honest.append(time.monotonic() - now)
        found.samples.append((now - begun, *measured(at)))
        time.sleep(1)


def soak(seconds: float, clients: int, seed: int) -> tuple[Found, list[str]]:
    """(what was found, the report's lines)."""
    found = Found()
    with tempfile.TemporaryDirectory() as folder, site.shop(pg.supported()[-1]) as shop:
        at = site.Site(Path(folder) / "site", shop, extra="limits: {statement_timeout: 1s}\n")
        _, token = at.token("bob")
        inputs = seeds(at.start(anew=True))
        host, port = at.url.split("/")[2].split(":")
        until = time.monotonic() + seconds

        def work(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            while time.monotonic() < until:
                visit((host, int(port)), mutated(chance, inputs), chance, found)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        threads.append(threading.Thread(target=ask, args=(at, token, until, found)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        site.eventually(lambda: measured(at)[1] <= found.samples[0][2] + clients, 90)
        found.samples.append((seconds, *measured(at)))
        found.faults += [f"in the server's log: {line.strip()}" for line in at.stderr if "Traceback" in line]
        at.stop()
    _judge(found)
    return found, _report(found, seconds, clients, seed, len(inputs))


def _judge(found: Found) -> None:
    """Whether memory and descriptors stayed flat, once all had been seen: from the second quarter to the last."""
    quarter = max(1, len(found.samples) // 4)
    for index, what, slack in ((1, "memory", 16 * MIB), (2, "descriptors", 50)):
        then = statistics.median(one[index] for one in found.samples[quarter : 2 * quarter])
        last = statistics.median(one[index] for one in found.samples[-quarter:])
        if last > then * 1.1 + slack:
            found.fault(f"{what} grew from {then:.0f} to {last:.0f}")


def _report(found: Found, seconds: float, clients: int, seed: int, inputs: int) -> list[str]:
    honest = sorted(found.honest)
    lines = [
        "# Soak: the HTTP surface under fuzzing",
        "",
        f"mcpctl {__version__}, {pg.supported()[-1]}, Python {sys.version.split()[0]}; {seconds / 60:g} minutes,"
        f" {clients} clients, {inputs} inputs to mutate, seed {seed}.",
        "",
        f"- {found.sent} connections, {found.sent / seconds:.0f} a second; {found.silent} had no answer: no request"
        " was whole, or we had left",
        f"- answers: {', '.join(f'{number} × {status}' for status, number in sorted(found.statuses.items()))}",
        f"- the honest client: {len(honest)} calls, median {honest[len(honest) // 2] * 1000:.0f} ms, slowest"
        f" {honest[-1] * 1000:.0f} ms",
        f"- faults: {len(found.faults)}",
        *(f"    - {fault}" for fault in found.faults[:20]),
        "",
        "| second | memory, MiB | descriptors |",
        "|---|---|---|",
    ]
    step = len(found.samples) // 12 + 1
    shown = [*found.samples[:-1:step], found.samples[-1]]
    return lines + [f"| {at:.0f} | {memory / MIB:.1f} | {files} |" for at, memory, files in shown]


def main() -> None:
    """Soak, print the report, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "soak.md")
    asked = parser.parse_args()
    found, lines = soak(asked.minutes * 60, asked.clients, asked.seed)
    asked.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
