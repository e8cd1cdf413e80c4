"""What sign-ins cost: others who sign in, those who call meanwhile, and whoever measures how long a refusal takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import argon2
import pytest

import timing
from mcpctl import config
from mcpctl.identity import passwords
from mcpctl.identity.hashing_apart import HashingApart
from mcpctl.identity.hashing_child import Share
from mcpctl.identity.password_queue import Passwords
from mcpctl.server import exchange, run
from mcpctl.server.http import Http
from mcpctl.server.parts import running
from signed_in import ENABLED, PASSWORD
from site_of_mcpctl import UNLIMITED, Shop, Site
from storming import round_of, with_users

CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=4096, parallelism=1, hash_len=32, salt_len=16)
KINDS = ("alice", "nobody", "bob", "carol")


@pytest.fixture
def cheap(newest_shop: Shop, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose user file takes a cheap hash: alice's. Bob has none, carol is disabled, and nobody is no user."""
    monkeypatch.setattr(passwords, "_FORM", re.compile(r"\$argon2id\$.*"))
    site = make_site(newest_shop, extra=ENABLED)
    site.user("carol")
    for name in ("alice", "carol"):
        site.edit_user(name, password=passwords.hashed(PASSWORD, CHEAP))
    site.run("user", "disable", "carol", check=False)
    return site


@contextlib.asynccontextmanager
async def app(site: Site) -> AsyncIterator[Http]:
    """The server's own app, whose passwords are checked with the cheap profile, by a process as quick as any."""
    listening = run.Listening(config.load(site.config, UNLIMITED))
    async with running(listening.settings, files=True) as core, run._app(listening, core) as found:
        assert core.signing_in is not None
        core.signing_in._passwords.close()
        core.signing_in._passwords = Passwords(HashingApart(CHEAP, (Share.EQUAL,)))
        try:
            yield found
        finally:
            core.signing_in._passwords.close()


async def post(app: Http, user: str, password: str = "wrong and quite as long") -> int:
    """One sign-in; its status."""
    body, sent = json.dumps({"user": user, "password": password}).encode(), list[exchange.Message]()

    receive = exchange._replay(body)

    async def send(message: exchange.Message) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:8080"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/api/v1/auth", "raw_path": b"/api/v1/auth", "query_string": b"",
        "headers": headers, "client": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return int(sent[0]["status"])


def cpu_of(app: Http) -> Callable[[], float]:
    """A clock of the CPU time that this process has had and the one that checks its passwords, which is there."""
    (sign_in,) = app._parts.additions
    hasher = sign_in._signing_in._passwords._hasher  # type: ignore[attr-defined]
    [one] = hasher.children
    assert one.process is not None
    child = one.process.pid
    number = ~child << 3 | 2  # clock_getcpuclockid(3), as Linux makes it: the process's scheduler clock
    return lambda: timing.cpu() + time.clock_gettime(number)


async def compared(site: Site, name: str, more: float = 0.0) -> float:
    """By how much a refusal of `name` takes longer than alice's; `more` is a part of one that is planted."""
    async with app(site) as found:
        assert await post(found, "alice") == 401
        clock = cpu_of(found)
        taken = []
        for _ in range(20):
            begun = clock()
            assert await post(found, "alice") == 401
            taken.append(clock() - begun)
        planted = more * statistics.median(taken)

        async def other() -> None:
            assert await post(found, name) == 401
            until = timing.cpu() + planted
            while timing.cpu() < until:
                pass

        def alices() -> Awaitable[object]:
            return post(found, "alice")

        return timing.difference(await timing.tried(other, alices, clock=clock))


@pytest.mark.parametrize("name", KINDS[1:])
def test_a_refusal_takes_as_long_whoever_is_named(cheap: Site, name: str) -> None:
    assert abs(asyncio.run(compared(cheap, name))) < timing.SAME


def test_the_same_test_finds_five_percent_more(cheap: Site) -> None:
    assert asyncio.run(compared(cheap, "nobody", 0.05)) > timing.SAME


def test_the_right_password_is_let_in_by_the_app_that_is_measured(cheap: Site) -> None:
    async def tried() -> int:
        async with app(cheap) as found:
            return await post(found, "alice", PASSWORD)

    assert asyncio.run(tried()) == 200


def test_a_storm_of_sign_ins_is_answered_takes_a_bounded_memory_and_leaves_calls_their_way(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    site = make_site(newest_shop, extra=ENABLED)
    names = with_users(site, 10)
    site.start(anew=True)
    _, token = site.token()
    seen = round_of(site, token, names, 1000 / 60, 3)
    assert seen.statuses.keys() <= {200, 429}, seen
    assert seen.statuses[200] >= 3, seen
    assert seen.memory < 2 * (64 + 32), seen  # a second process takes over on a machine that is busy
    assert seen.longest < 30, seen
    assert seen.ratio > 0.3, seen  # how much it is on a machine of one's own, benchmarks/sign_in_storm.py says
