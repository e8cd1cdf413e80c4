"""A storm of sign-ins, and a caller who works meanwhile: what each of them gets."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

from signed_in import PASSWORD, hashed
from site_of_mcpctl import Client, Site


@dataclass
class Seen:
    """What came of one round: calls a second alone and beside the storm, the storm's statuses, the most memory of the
    server above what it had before, in MiB, and how long the longest of the sign-ins waited, in seconds."""

    alone: float = 0.0
    beside: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    memory: float = 0.0
    longest: float = 0.0

    @property
    def ratio(self) -> float:
        return self.beside / self.alone


def with_users(site: Site, count: int) -> list[str]:
    """So many users with the one password."""
    names = [f"user{number}" for number in range(count)]
    for name in names:
        site.user(name)
        site.edit_user(name, password=hashed())
    return names


def call(url: str, token: str, seconds: float, wire: Connection) -> None:
    """In a process of its own: say when the first call is answered, and then how many are in so many seconds, one after
    the other."""
    done = 0
    with Client(url, token) as client:
        client.rows("select 1")
        wire.send("begun")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert client.rows(f"select {done}") == [[done]]
            done += 1
    wire.send(done / seconds)


def resident(pid: str) -> float:
    """Resident memory of a process in MiB; 0 of one that has ended."""
    try:
        found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    except OSError:
        return 0.0
    return int(found[0].split()[1]) / 1024 if found else 0.0


class Calling:
    """Somebody who calls, from now on: `rate` is how many calls a second were answered."""

    def __init__(self, site: Site, token: str, seconds: float) -> None:
        processes = multiprocessing.get_context("spawn")
        self._wire, theirs = processes.Pipe()
        self._process = processes.Process(target=call, args=(site.url, token, seconds, theirs), daemon=True)
        self._process.start()
        theirs.close()
        assert self._wire.recv() == "begun"

    def rate(self) -> float:
        found = float(self._wire.recv())
        self._process.join()
        self._wire.close()
        return found


async def storm(site: Site, names: list[str], rate: float, seconds: float) -> Seen:
    """Sign-ins at that rate, a second, whatever becomes of those before."""
    seen = Seen()

    async def one(number: int) -> None:
        begun = time.monotonic()
        status, head = await sign_in(site, names[number % len(names)])
        if status == 429:
            assert 1 <= int(head.lower().partition("retry-after: ")[2].split()[0]) <= 10, head
        seen.statuses[status] += 1
        seen.longest = max(seen.longest, time.monotonic() - begun)

    begun, tasks = time.monotonic(), []
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    return seen


async def sign_in(site: Site, user: str) -> tuple[int, str]:
    """One sign-in by hand: what a library would take for it is taken from the calls. Its status, and the head."""
    host, port = urlsplit(site.url).netloc.split(":")
    body = json.dumps({"user": user, "password": PASSWORD})
    head = f"POST /api/v1/auth HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 120)).decode()
    finally:
        writer.close()
    return int(answer.split()[1]), answer


def round_of(site: Site, token: str, names: list[str], rate: float, seconds: float) -> Seen:
    """Calls alone, and then beside a storm."""
    assert site.process is not None
    alone = Calling(site, token, seconds).rate()
    peak = Peak(site.process.pid)
    calling = Calling(site, token, seconds)
    seen = asyncio.run(storm(site, names, rate, seconds))
    seen.alone, seen.beside, seen.memory = alone, calling.rate(), peak.stop()
    return seen


class Peak:
    """The most resident memory of a process and of those that it has started, looked at a hundred times a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = self._most = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> float:
        threads = Path(f"/proc/{self._pid}/task").iterdir()
        children = [pid for task in threads for pid in (task / "children").read_text().split()]
        return sum(resident(pid) for pid in {str(self._pid), *children})

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._now())

    def stop(self) -> float:
        """By how many MiB it was more than at the beginning."""
        self._over.set()
        self._thread.join()
        return self._most - self._before
