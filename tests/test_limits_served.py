"""Limits as clients meet them: over HTTP with several workers, after a restart, and on stdio."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from authenticating import forged
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually, in_background

MakeSite = Callable[..., Site]
SLEEP = {"query": "select pg_sleep(60)"}


def _site(make_site: MakeSite, shop: Shop, limits: str, workers: int = 2) -> Site:
    at = make_site(shop, extra=f"limits: {{{limits}}}\nserver: {{workers: {workers}}}\n")
    at.limits = {}
    return at


def _ask(at: Site, token: str, query: str = "select 1") -> httpx.Response:
    """One call over a connection of its own, so that any worker may have it."""
    with at.client(token) as client:
        return client.call("query_database", {"query": query})


def _workers(at: Site) -> list[int]:
    assert at.process is not None
    children = Path(f"/proc/{at.process.pid}/task/{at.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def _said(answer: httpx.Response) -> str:
    """The text of a tool's error."""
    result = answer.json()["result"]
    assert result["isError"]
    text: str = result["content"][0]["text"]
    return text


def test_all_workers_together_let_in_what_one_token_may_and_say_429_and_when(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = _site(make_site, newest_shop, "rate: 0.001, burst: 20, tokens: {burst: 6}").start()
    name, token = at.token()
    answers = [_ask(at, token) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 6
    refused = answers[-1]
    assert 900 < int(refused.headers["retry-after"]) <= 1000
    error = refused.json()["error"]
    assert f"0.001 a second, and 6 at once, are the limit of the token {name}; again in" in error["message"]
    for path in ("health", "ready", ".well-known/oauth-protected-resource"):
        for _ in range(30):
            assert httpx.get(at.url.replace("mcp", path), trust_env=False).status_code == 200
    lines = [line for line in at.audit() if line["event"].startswith("tool.")]
    assert [(line["token"], line["outcome"]) for line in lines] == [(name, "ok")] * 6 + [(name, "limited")] * 6
    other = at.token("bob")[1]
    assert [_ask(at, other).status_code for _ in range(9)] == [200] * 6 + [429] * 3
    assert [_ask(at, other).status_code for _ in range(3)] == [429] * 3  # of the address's 20 all are gone
    assert "the limit of the address 127.0.0.1" in _ask(at, token).json()["error"]["message"]
    assert at.audit()[-1]["token"] == name  # known, although nobody has asked whether it is still right


def test_calls_at_once_are_counted_in_all_workers_and_those_of_a_killed_one_are_not(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = _site(make_site, newest_shop, "rate: 1000, burst: 1000, users: {concurrent: 2}").start()
    tokens = [at.token()[1] for _ in range(2)]
    running = "state = 'active' AND query LIKE '%pg_sleep(60)%'"
    calls = [in_background(_safely, at, token) for token in tokens]
    eventually(lambda: len(newest_shop.backends(running)) == 2)
    refused = [_ask(at, token) for token in tokens * 3]
    assert {answer.status_code for answer in refused} == {429}
    assert "2 are the limit of the user alice" in refused[0].json()["error"]["message"]
    assert refused[0].headers["retry-after"] == "1"
    assert _ask(at, at.token("bob")[1]).status_code == 200
    killed = _workers(at)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for call in calls:
        call.result()
    eventually(lambda: len(_workers(at)) == 2 and not {*_workers(at)} & {*killed})
    eventually(lambda: _safely(at, tokens[0], "select 1") == 200, 20)


def _safely(at: Site, token: str, query: str = SLEEP["query"]) -> int:
    """The status of a call; 0 where its worker was killed."""
    try:
        return _ask(at, token, query).status_code
    except httpx.TransportError:
        return 0


def test_streams_are_bounded_by_the_calls_at_once_of_a_token_and_user_and_take_none_of_them(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(
        newest_shop, extra="limits: {tokens: {concurrent: 2}, users: {concurrent: 3}}\nserver: {sse: true}\n"
    )
    at.limits = {}
    at.start()
    (_, one), (_, two), (_, other) = at.token(), at.token(), at.token("bob")
    with contextlib.ExitStack() as streams, httpx.Client(trust_env=False, timeout=20) as client:

        def status(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            stream = client.stream("GET", at.url.replace("/mcp", "/sse"), headers=headers)
            return streams.enter_context(stream).status_code

        assert [status(token) for token in (one, one, one, two, two, other)] == [200, 200, 429, 200, 429, 200]
        assert _ask(at, one).status_code == 200
        streams.close()
        eventually(lambda: status(one) == 200)
    refused = [line["reason"] for line in at.audit() if line["event"] == "tool.refused"]
    assert len([reason for reason in refused if "too many streams" in reason]) >= 2


def test_a_budget_is_a_tool_s_error_that_says_until_when_and_outlives_a_restart(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    limits = "users: {named: {alice: {max_rows: 4, budgets: {day: {rows: 10}}}}}, tenants: {max_rows: 2}"
    at = _site(make_site, newest_shop, limits).start()
    _, token = at.token()
    rows = "select * from generate_series(1, 9)"
    for _ in range(3):
        found = _ask(at, token, rows).json()["result"]["structuredContent"]
        assert (found["row_count"], found["truncated"]) == (4, True)
    text = "the budget of the user alice is used up: 12 of 10 rows this day, until 00:00 UTC"
    assert text in _said(_ask(at, token, rows))
    at.stop()
    at.start()
    answer = _ask(at, at.token()[1], rows)
    assert answer.status_code == 200
    assert text in _said(answer)
    line = [line for line in at.audit() if line["event"] == "tool.refused"][-1]
    assert (line["outcome"], line["reason"]) == ("limited", text)
    assert _ask(at, at.token("bob")[1]).json()["result"]["isError"] is False
    assert (at.folder / "limits.bin").stat().st_mode & 0o777 == 0o600


def test_behind_a_proxy_the_address_that_it_saw_counts_and_none_that_a_client_makes_up(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    limits = "rate: 0.001, burst: 100, addresses: {burst: 3}"
    server = "server: {trusted_proxies: [127.0.0.1]}\n"
    at = make_site(newest_shop, extra=f"limits: {{{limits}}}\n{server}")
    at.limits = {}
    at.start("--behind-proxy")
    _, token = at.token()

    def ask(forwarded: str) -> int:
        with at.client(token) as client:
            client.http.headers["X-Forwarded-For"] = forwarded
            return client.call("whoami").status_code

    assert [ask(f"203.0.113.{number}, 192.0.2.7") for number in range(5)] == [200] * 3 + [429] * 2
    assert [ask(f"2001:db8::{number}") for number in range(5)] == [200] * 3 + [429] * 2
    assert ask("192.0.2.8") == 200


def test_wrong_tokens_are_429_in_the_end_and_a_right_one_from_there_is_let_in(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = _site(make_site, newest_shop, "rate: 1000, burst: 1000").start()
    _, token = at.token()
    wrong = [_ask(at, forged(token, number)) for number in range(13)]
    assert [answer.status_code for answer in wrong] == [401] * 10 + [429] * 3
    assert 800 < int(wrong[-1].headers["retry-after"]) <= 900
    assert "www-authenticate" not in wrong[-1].headers
    assert _ask(at, token).status_code == 200
    with at.client(None) as nobody:
        assert nobody.call("whoami").status_code == 401  # no credential is no failed sign-in


@pytest.mark.parametrize("with_token", [True, False])
def test_on_stdio_what_is_too_much_is_a_tool_s_error_that_says_the_same(
    make_site: MakeSite, newest_shop: Shop, with_token: bool
) -> None:
    at = _site(make_site, newest_shop, "rate: 0.001, burst: 2", workers=1)
    name, token = at.token()
    asked = [
        {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {
            "name": "query_database", "arguments": {"query": "select 1"}, "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {}}}}
        for number in range(3)
    ]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, "--config", str(at.config), "serve", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment(**({"MCPCTL_TOKEN": token} if with_token else {})),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    answers: list[Any] = []
    for message in asked:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline())["result"])
    process.communicate(timeout=10)
    assert [answer["isError"] for answer in answers] == [False, False, True]
    whose = f"the token {name}" if with_token else "the local user"
    text = answers[2]["content"][0]["text"]
    assert f"too many calls: 0.001 a second, and 2 at once, are the limit of {whose}; again in" in text
    assert [line["outcome"] for line in at.audit() if line["event"].startswith("tool.")] == ["ok", "ok", "limited"]
    assert not (at.folder / "limits.bin").exists()  # one person's process counts for itself
