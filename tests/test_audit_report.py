"""mcpctl audit report: a week beside the one before, and audit tail's search."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from command_line import Home
from mcpctl.audit.log import AuditLog, read_key

NOW = datetime.now(UTC)
NOON = NOW.replace(hour=12, minute=0) - timedelta(days=1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


class Writer:
    """Writes calls of a token at a time, as the server does."""

    def __init__(self, home: Home) -> None:
        self.now = NOW
        self.log = AuditLog(home.folder / "audit.jsonl", read_key(home.folder / "audit.key"), lambda: self.now)

    def __call__(self, when: datetime, token: str, times: int = 1, **fields: Any) -> None:
        self.now = when
        base = {"event": "tool.called", "user": "alice", "client_ip": "192.0.2.1", "rows": 1} | fields
        for _ in range(times):
            self.log.append(base["event"], token=token, **{key: one for key, one in base.items() if key != "event"})


def test_a_report_says_what_is_unusual_beside_as_long_a_time_before(home: Home) -> None:
    write, before = Writer(home), NOON - timedelta(days=7)
    write(before, "usual000", 110)
    write(before, "louder00", 25)
    write(before, "greedy00", 30, rows=100)
    write(before, "denied00", 25)
    write(NOON, "usual000", 40)
    write(NOON, "louder00", 130, client_ip="198.51.100.9")
    write(NOON, "greedy00", 2, rows=50_000)
    write(NOON, "denied00", 12, event="tool.refused", rows=None, reason="you have no read access in 'shop'")
    write(NOON, "first000", 1)
    write(NOON, "stranger", 1, event="auth.refused", reason="12 more within a minute")
    write(NOON + timedelta(hours=3), "usual000", 1)
    write(NOON, "louder00", 1, event="token.rotated")
    found = json.loads(home("audit", "report", "--json").good)
    said = {one["token"]: one["unusual"] for one in found["tokens"]}
    assert said == {
        "usual000": ["at new hours: 15 UTC"],
        "louder00": ["5 times the calls", "1 new addresses"],
        "greedy00": ["33 times the rows"],
        "denied00": ["12 calls refused"],
        "first000": ["not used before"],
    }
    use = next(one for one in found["tokens"] if one["token"] == "usual000")
    assert (use["calls"], use["before"]["calls"], use["user"], sum(use["hours"])) == (41, 110, "alice", 41)
    assert found["refusals"] == {"you have no read access in 'shop'": 12, "more within a minute, counted": 12}
    assert found["events"]["token.rotated"] == 1
    assert not any(name.startswith("tool.") for name in found["events"])

    done = home("audit", "report")
    tables = [part.splitlines() for part in done.good.split("\n\n")]
    assert [len(part) for part in tables[:2]] == [5, 2]
    assert tables[0][0].split("\t")[0] == "louder00"  # two things are unusual about it
    assert "5 of 5 tokens are unusual" in done.err
    assert len(home("audit", "report", "-n", "2").good.split("\n\n")[0].splitlines()) == 2


def test_a_report_of_no_past_or_of_too_long_a_past_is_refused_and_a_broken_log_is_told(home: Home) -> None:
    for since in ("2999-01-01", "soon", "0001-01-02"):
        assert home("audit", "report", "--since", since).code == 2
    write = Writer(home)
    for _ in range(3):
        write(NOW, "usual000")
    path = home.folder / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::2]))
    done = home("audit", "report")
    assert done.code == 1
    assert "usual000" in done.out
    assert "the log is not whole" in done.err
    path.unlink()
    assert home("audit", "report").code == 4


def test_audit_tail_searches_statements_reasons_and_tables_in_a_time(home: Home) -> None:
    write = Writer(home)
    write(NOON, "a", statement="SELECT Card_Number FROM cards")
    write(NOON, "b", statement="SELECT 1", relations=["sales.cards"])
    write(NOW, "c", event="tool.refused", reason="there is no 'cards' for you")
    write(NOW, "d", statement="SELECT 'card'")

    def found(*arguments: str) -> list[str]:
        lines = home("audit", "tail", "--json", *arguments).good.splitlines()
        return [json.loads(line)["token"] for line in lines if "token" in json.loads(line)]

    assert found("--grep", "CARDS") == ["a", "b", "c"]
    assert found("--grep", "card_number") == ["a"]
    assert found("--since", "7d", "--until", "1h") == ["a", "b"]
    assert found("--grep", "nothing of it") == []
    assert home("audit", "tail", "--until", "soon").code == 2
