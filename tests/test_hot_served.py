"""The hot lane over a real server: it answers as the ordinary one does, and refuses what that one refuses."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mcpctl.identity import tokens
from site_of_mcpctl import Shop, Site, eventually, in_background
from visiting import answer

MakeSite = Callable[..., Site]


def test_tokens_in_turn_on_one_connection_are_told_apart(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    (first, one), (second, two), (third, three) = at.token("alice"), at.token("bob"), at.token()
    wrong = tokens.signed(two[:13] + tokens.mint()[1][13:-7])
    asked = [(one, 200), (two, 200), (wrong, 401), (one, 200), (three[:30], 401), (two, 200)]
    with _wire(at) as wire, _wire(at) as other:
        for text, status in asked:
            assert _ask(at, wire, text, "select 1")[0] == status
        lines = [line for line in at.audit() if line["event"] in ("tool.called", "auth.refused")]
        said = [(line["event"], line.get("token"), line.get("user"), line["client_ip"]) for line in lines]
        assert said == [
            ("tool.called", first, "alice", "127.0.0.1"),
            ("tool.called", second, "bob", "127.0.0.1"),
            ("auth.refused", second, None, "127.0.0.1"),
            ("tool.called", first, "alice", "127.0.0.1"),
            ("auth.refused", None, None, "127.0.0.1"),
            ("tool.called", second, "bob", "127.0.0.1"),
        ]
        tokens.revoke(at.tokens, [second], datetime.now(UTC))  # at once: what is idle for five seconds is closed
        for here in (wire, other):
            assert [_ask(at, here, text, "select 1")[0] for text in (two, one, two)] == [401, 200, 401]
        wire.sendall(_request(at, three, "", method="tools/list"))  # nobody has heard of that token yet
        assert answer(wire)[0].startswith(b"HTTP/1.1 200")
        assert [line["token"] for line in at.audit() if line["event"] == "auth.ok"] == [first, second, third]


def test_the_address_that_a_proxy_names_is_each_requests_own(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="server: {trusted_proxies: [127.0.0.1]}\n").start("--behind-proxy")
    _, token = at.token(allow_ips=(ip_network("198.51.100.7"),))
    _, everywhere = at.token()

    def ask(wire: socket.socket, text: str, *addresses: str) -> int:
        named = "".join(f"X-Forwarded-For: {address}\r\n" for address in addresses).encode()
        wire.sendall(_request(at, text, "select 1").replace(b"Accept:", named + b"Accept:", 1))
        return int(answer(wire)[0].split(b" ")[1])

    good, bad = "198.51.100.7", "198.51.100.8"
    with _wire(at) as wire:
        for _ in range(2):
            assert [ask(wire, everywhere, where) for where in (good, bad)] == [200, 200]
            assert [ask(wire, token, where) for where in (good, bad, good)] == [200, 401, 200]
        assert ask(wire, everywhere) == 400  # it names none
    called = [line["client_ip"] for line in at.audit() if line["event"] == "tool.called"]
    assert called == [good, bad, good, good] * 2


_PRESENTED = [
    "", "Authorization: Bearer a.b", "Authorization: Bearer mcp_x", "Authorization: bearer  " + "x" * 129,
    "X-API-Key: a", "X-API-Key: a.b", "Authorization: Bearer", "Authorization: Basic eA", "X-Session-ID: a",
    "Authorization: Bearer a\r\nX-API-Key: b", "Authorization: Bearer a\r\n b", "Authorization: Bearer a\tb",
]  # fmt: skip


@pytest.mark.parametrize("presented", _PRESENTED)
def test_what_is_refused_is_refused_again_for_the_same_reason(served: Site, presented: str) -> None:
    _, token = served.token()
    asked = _request(served, token, "select 1").replace(f"Authorization: Bearer {token}".encode(), presented.encode())
    asked = asked.replace(b"\r\n\r\nContent-Type", b"\r\nContent-Type")
    heard: list[bytes] = []
    with _wire(served) as wire:
        assert _ask(served, wire, token, "select 1")[0] == 200
        for _ in range(3):
            wire.sendall(asked)
            head, body = answer(wire)
            heard.append(re.sub(rb"date: .*\r\n|x-request-id: .*\r\n", b"", head) + body)
            if b"connection: close" in head:
                return
    assert re.match(rb"HTTP/1.1 401", heard[0])
    assert (b"invalid_token" in heard[0]) is bool(presented)
    assert len(set(heard)) == 1


def test_what_goes_from_the_hot_way_to_the_ordinary_one_is_counted_once(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="limits: {addresses: {rate: 0.001, burst: 8}}\n")
    at.limits = {}
    token = at.start().token()[1]
    with _wire(at) as wire:
        assert _ask(at, wire, token, "select 1")[0] == 200
        for _ in range(7):
            wire.sendall(_request(at, token, "", method="tools/list"))
            assert answer(wire)[0].startswith(b"HTTP/1.1 200")


@contextlib.contextmanager
def _wire(at: Site, certificates: Path | None = None) -> Iterator[socket.socket]:
    host, port = urlsplit(at.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        if certificates is None:
            yield plain
            return
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        with context.wrap_socket(plain, server_hostname=host) as wire:
            yield wire


def _ask(at: Site, wire: socket.socket, token: str, query: str, name: str = "query_database") -> tuple[int, bytes]:
    head, body = _answer(at, wire, token, query, name)
    return int(head.split(b" ")[1]), body


def _answer(at: Site, wire: socket.socket, token: str, query: str, name: str) -> tuple[bytes, bytes]:
    wire.sendall(_request(at, token, query, name))
    return answer(wire)


def _request(at: Site, token: str, query: str, name: str = "query_database", method: str = "tools/call") -> bytes:
    params = {"name": name, "arguments": {"query": query}} if method == "tools/call" else {}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    lines = [
        "POST /mcp HTTP/1.1", f"Host: {urlsplit(at.url).netloc}", f"Authorization: Bearer {token}",
        "Content-Type: application/json", "Accept: application/json", f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("hot") / "site", newest_shop, extra="limits: {request_bytes: 4KiB}\n").start()
    yield found
    found.stop()


def test_both_lanes_say_the_same(served: Site) -> None:
    mine, token = served.token()
    queries = ["select 1", "select 'é', null", "drop table x", "select 1/0", "x" * 5000]
    for number, query in enumerate(queries):
        for name in ("query_database", "no_such_tool"):
            said = []
            with _wire(served) as wire:
                for _ in range(2):
                    asked = _request(served, token, query, name)  # the first with a head that is not known
                    wire.sendall(asked.replace(b"Accept:", b"X-Try: %d-%b\r\nAccept:" % (number, name.encode()), 1))
                    head, body = answer(wire)
                    lines = [
                        line for line in head.split(b"\r\n") if not re.match(rb"date|content-length|x-request-id", line)
                    ]
                    said.append((lines, re.sub(rb"elapsed_ms\W+[\d.]+", b"", body)))
                    if b"connection: close" in lines:
                        break
            assert said[0] == said[-1]
    calls = [line for line in served.audit() if line["event"] == "tool.called" and line["token"] == mine]
    calls = [line for line in calls if line.get("statement") == "select 1"]
    assert len(calls) == 2
    same = [{key: line[key] for key in ("user", "token", "tool", "client_ip", "transport", "rows")} for line in calls]
    assert same[0] == same[1]
    assert len({line["request_id"] for line in calls}) == 2


def test_who_goes_away_in_a_hot_call_ends_it(newest_shop: Shop, served: Site) -> None:
    _, token = served.token()
    with _wire(served) as wire:
        assert _ask(served, wire, token, "select 1")[0] == 200
        wire.sendall(_request(served, token, "select pg_sleep(43)"))
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"))
    eventually(lambda: not newest_shop.backends("query LIKE '%pg_sleep(43)%' AND state = 'active'"), 5)
    eventually(lambda: [line for line in served.audit() if line.get("outcome") == "cancelled"])


def _run(at: Site, wire: socket.socket, token: str, *command: str) -> str:
    """What a command says; calls go on meanwhile, so that the connection stays."""
    running = in_background(at.run, *command)
    while running.runs:
        _ask(at, wire, token, "select 1")
    return str(running.result().stdout)


def test_what_has_changed_between_two_hot_calls_counts(
    make_site: MakeSite, newest_shop: Shop, certificates: Path
) -> None:
    pair = ("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"))
    at = make_site(newest_shop).start(*pair)
    name, token = at.token()
    wrong = at.token()[1][:-1] + "?"
    with _wire(at, certificates) as wire:
        for _ in range(3):
            assert _ask(at, wire, token, "select 1")[0] == 200
        _run(at, wire, token, "lockdown")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [503, 503]
        _run(at, wire, token, "lockdown", "--lift")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [200, 200]
        assert _ask(at, wire, wrong, "select 1")[0] == 401
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [200, 200]
        assert _run(at, wire, token, "config", "reload").startswith("changed: ")
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(3)] == [200, 200, 200]
        _run(at, wire, token, "token", "revoke", name)
        assert [_ask(at, wire, token, "select 1")[0] for _ in range(2)] == [401, 401]
    name, token = at.token()
    with _wire(at, certificates) as wire:
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select pg_sleep(44)"))
        eventually(lambda: newest_shop.backends("query LIKE '%pg_sleep(44)%' AND state = 'active'"))
        assert "cut: 1 query, 0 backends left" in at.run("token", "revoke", name).stdout
        assert answer(wire)[0].startswith(b"HTTP/1.1 401")
    name, token = at.token()
    with _wire(at, certificates) as wire:
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select 'late', pg_sleep(1)"))
        eventually(lambda: newest_shop.backends("query LIKE '%late%' AND state = 'active'"))
        assert at.process is not None
        at.process.send_signal(signal.SIGTERM)
        head, body = answer(wire)
        assert b"connection: close" in head
        assert b"late" in body


def test_a_hot_answer_that_is_read_slowly_counts_as_a_call_and_ends_with_its_token_after_a_reload(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="limits: {max_bytes: 16MiB, max_rows: 100000, tokens: {concurrent: 1}}\n").start()
    name, token = at.token()
    url = urlsplit(at.url)
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect((url.hostname, url.port))
        assert _ask(at, wire, token, "select 1")[0] == 200
        wire.sendall(_request(at, token, "select repeat('x', 1000) from generate_series(1, 4000)"))
        assert wire.recv(12) == b"HTTP/1.1 200"
        with _wire(at) as other:
            assert _ask(at, other, token, "select 1")[0] == 429, "a call that is being answered runs"
        at.run("config", "reload")
        at.run("token", "revoke", name)
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := wire.recv(1 << 20):
                read += len(chunk)
                assert read < 6 << 20, "all of it has left"


def test_who_reads_no_answer_is_not_asked_for_more_and_gets_none_after_a_revocation(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop).start()
    name, token = at.token("alice")
    host, port = urlsplit(at.url).netloc.split(":")
    request = _request(at, token, "select repeat('x', 31000)")
    called = 0

    def goes_on() -> bool:
        return sum(line["event"] == "tool.called" for line in at.audit()) > called

    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect((host, int(port)))
        wire.settimeout(20)
        while called < 300:  # far more than the system keeps of what nobody reads
            wire.sendall(request)
            try:
                eventually(goes_on, 2)
            except AssertionError:
                break
            called += 1
        assert called < 300
        assert at.run("token", "revoke", name).returncode == 0
        read = b""
        with contextlib.suppress(ConnectionResetError):
            while more := wire.recv(1 << 20):
                read += more
    assert 0 < read.count(b"HTTP/1.1 200 ") < called
