"""The wall clock is set back an hour, and forward a day, while mcpctl runs: what goes by it, and what does not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import mcpctl
from authenticating import START, House, enter, house, refused
from chain import KEY, lines, verify
from mcpctl import config
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnauthorizedError
from mcpctl.recorder import STRANGERS_IN_FULL, Recorder
from mcpctl.server.live import Place, Process
from mcpctl.server.parts import running
from site_of_mcpctl import Shop, Site

__all__ = ["house"]
BACK, FORWARD = timedelta(hours=-1), timedelta(days=1)


@pytest.mark.parametrize("noticed", ["by a request", "by the watch"])
def test_a_token_that_was_seen_to_expire_stays_so_when_the_clock_is_set_back(house: House, noticed: str) -> None:
    name, text = house.token(user="alice", expires_at=START + timedelta(minutes=10))
    principal = enter(house, text)
    house.later(minutes=10)
    if noticed == "by a request":
        assert "expired" in str(refused(house, text))
    else:
        assert house.door.expired() == [name]
    house.now += BACK
    assert "expired" in str(refused(house, text))
    assert not house.door.still_valid(principal)
    assert house.door.expired() == ([name] if noticed == "by a request" else [])
    house.change(name, expires_at=START + timedelta(days=2))  # the administrator gives it more time
    assert enter(house, text).token == name


def test_what_was_seen_to_expire_stays_so_when_the_config_is_read_again(
    make_site: Callable[..., Site], newest_shop: Shop
) -> None:
    at = make_site(newest_shop)
    _, text = at.token(seconds=600)

    async def main() -> None:
        settings, process = config.load(at.config, at.limits), Process(Place("here"))
        for later in (timedelta(hours=1), timedelta(0)):  # the second generation, while the clock is set back
            async with running(settings, files=True, process=process) as core:
                core.authenticator._now = lambda later=later: datetime.now(UTC) + later
                with pytest.raises(UnauthorizedError, match="expired"):
                    await core.authenticator.authenticate(text, "192.0.2.1")
                core.recorder.auth_ok("it", None, "192.0.2.1")

    asyncio.run(main())
    assert [line["event"] for line in at.audit()].count("auth.ok") == 1  # once an hour, whatever is reloaded


def test_a_clock_that_jumps_forward_ends_tokens_and_back_again_only_those_nobody_saw(house: House) -> None:
    used, used_text = house.token(user="alice", expires_at=START + timedelta(hours=2))
    _, other_text = house.token(user="alice", expires_at=START + timedelta(hours=2))
    enter(house, used_text)
    house.now += FORWARD
    assert house.door.next_expiry() == 0
    assert house.door.expired() == [used]
    house.now -= FORWARD
    assert "expired" in str(refused(house, used_text))
    enter(house, other_text)
    _, fresh = house.token(user="alice", expires_at=house.now + timedelta(minutes=1))
    enter(house, fresh)


def test_the_log_keeps_its_order_whatever_the_clock_says(tmp_path: Path) -> None:
    now = [START]
    log = AuditLog(tmp_path / "audit.jsonl", KEY, lambda: now[0])
    for step in (BACK, FORWARD, timedelta(0), BACK):
        now[0] += step
        log.append("tool.called")
    log.close()
    found = lines(tmp_path / "audit.jsonl")
    assert [line["seq"] for line in found] == [1, 2, 3, 4]
    assert found[0]["time"] < START.isoformat()  # as it was read: nobody makes times up
    verify(tmp_path / "audit.jsonl")


def test_what_is_counted_by_the_minute_goes_by_a_clock_that_is_never_set(tmp_path: Path) -> None:
    now, since = [START], [0.0]
    log = AuditLog(tmp_path / "audit.jsonl", KEY, lambda: now[0])
    recorder = Recorder(log, "full", refuse=True, clock=lambda: since[0])
    for step in (BACK, FORWARD, BACK):
        now[0] += step
        for _ in range(STRANGERS_IN_FULL):
            recorder.auth_refused("192.0.2.1", "no such token id")
    assert len(lines(tmp_path / "audit.jsonl")) == STRANGERS_IN_FULL
    log.close()


def test_a_token_made_after_the_clock_was_set_back_is_its_users(make_site: object, newest_shop: Shop) -> None:
    at: Site = make_site(newest_shop)  # type: ignore[operator]
    at.edit_user("alice", created_at=datetime.now(UTC) + timedelta(hours=1))
    made = at.run("token", "add", "--user", "alice", "--expiry", "1d").stdout.strip()
    new = at.run("token", "rotate", made.split("_")[1]).stdout.strip()
    shown = at.run("token", "show", new.split("_")[1]).stdout
    assert "blocked" not in shown
    at.start()
    with at.client(new) as client:
        assert client.rows("select 1") == [[1]]


WALL = re.compile(r"time\.time(_ns)?\(|datetime\.now\(")
GO_BY_IT = {  # who reads the wall clock without being handed it, and why a step does no harm there
    "identity/tokens.py": "the one clock that all is handed",
    "private_file.py": "a file's stamp, which is only ever compared for being another one",
    "server/live.py": "since when something is so, for people",
    "shared_counters.py": "when the machine was booted: rates of before are forgotten, and no harm is done",
    "postgres/own.py": "when a database was registered, for people",
}


def test_nothing_else_in_the_server_goes_by_the_wall_clock() -> None:
    source = Path(mcpctl.__file__).parent
    found = {
        str(file.relative_to(source))
        for file in source.rglob("*.py")
        if not file.is_relative_to(source / "cli") and WALL.search(file.read_text(encoding="utf-8"))
    }
    assert found <= GO_BY_IT.keys(), found - GO_BY_IT.keys()
