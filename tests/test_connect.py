"""mcpctl connect: stdin and stdout on one side, a server elsewhere on the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from connecting import (
    INITIALIZE,
    Bridge,
    Seen,
    Visitor,
    at_home,
    bridged,
    echo,
    modern,
    old,
    run,
    scripted,
    told,
)
from mcpctl.bridge import address, message
from mcpctl.errors import UsageError
from site_of_mcpctl import COMMAND, Shop, Site, eventually

# -- a real server of ours, with a token ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop_site(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("connect") / "site", newest_shop).start()
    yield found
    found.stop()


def token_file(folder: Path, token: str) -> str:
    path = folder / "my.token"
    path.touch(0o600)
    path.write_text(token + "\n")
    return str(path)


def question(query: str, id: Any = 1) -> dict[str, Any]:
    return modern("tools/call", id, name="query_database", arguments={"query": query})


def test_a_token_from_a_file_asks_in_both_eras(shop_site: Site, tmp_path: Path) -> None:
    with Bridge(tmp_path, shop_site.url, "--token-file", token_file(tmp_path, shop_site.token()[1])) as bridge:
        assert "2026-07-28" in bridge.ask(modern("server/discover"))["result"]["supportedVersions"]
        assert bridge.ask(question("select 6 * 7", "a"))["result"]["structuredContent"]["rows"] == [[42]]
    with Bridge(tmp_path, shop_site.url, "--token-file", str(tmp_path / "my.token")) as bridge:
        assert bridge.ask(old("initialize", 1, **INITIALIZE))["result"]["protocolVersion"] == "2025-11-25"
        bridge.send(told("notifications/initialized"))
        call = old("tools/call", 2, name="query_database", arguments={"query": "select 6 * 7"})
        assert bridge.ask(call)["result"]["structuredContent"]["rows"] == [[42]]
        assert bridge.close() == 0
        assert bridge.said == ""


def test_the_token_of_the_environment_is_taken(shop_site: Site, tmp_path: Path) -> None:
    with Bridge(tmp_path, shop_site.url, MCPCTL_TOKEN=shop_site.token()[1]) as bridge:
        assert bridge.ask(modern("tools/list"))["result"]["tools"]
        assert bridge.close() == 0


def test_a_token_that_is_revoked_is_told_with_what_to_do_and_a_new_one_in_the_file_is_taken(
    shop_site: Site, tmp_path: Path
) -> None:
    number, token = shop_site.token()
    file = token_file(tmp_path, token)
    with Bridge(tmp_path, shop_site.url, "--token-file", file) as bridge:
        assert bridge.ask(question("select 1"))["result"]["structuredContent"]["rows"] == [[1]]
        shop_site.run("token", "revoke", number)
        error = bridge.ask(question("select 2"))["error"]
        assert "does not take the token of" in error["message"]
        assert "new one" in error["data"]["hint"]
        assert token not in bridge.said
        token_file(tmp_path, shop_site.token()[1])
        assert bridge.ask(question("select 3"))["result"]["structuredContent"]["rows"] == [[3]]


def test_a_new_token_in_the_file_is_taken_also_where_too_many_wrong_ones_came_before(tmp_path: Path) -> None:
    def guarded(visitor: Visitor, seen: Seen) -> None:
        if seen[1]["authorization"] == "Bearer right":
            visitor.result(seen[2], {})
        else:
            visitor.reply(429, b'{"error": "too many wrong tokens"}')

    file = token_file(tmp_path, "wrong")
    with scripted(guarded) as server, Bridge(tmp_path, server.url, "--token-file", file) as bridge:
        assert "429" in bridge.ask(modern("tools/list", 1))["error"]["message"]
        assert len(server.seen) == 1
        token_file(tmp_path, "right")
        assert bridge.ask(modern("tools/list", 2))["result"] == {}


def running(site: Site) -> int:
    return len(site.shop.backends("query LIKE '%pg_sleep(60)%' AND state = 'active'"))


@pytest.mark.parametrize("era", ["modern", "old"])
def test_what_the_client_cancels_ends_in_the_database(shop_site: Site, tmp_path: Path, era: str) -> None:
    with Bridge(tmp_path, shop_site.url, "--token-file", token_file(tmp_path, shop_site.token()[1])) as bridge:
        call = question("select pg_sleep(60)", 7)
        if era == "old":
            bridge.ask(old("initialize", 1, **INITIALIZE))
            del call["params"]["_meta"]
        bridge.send(call)
        eventually(lambda: running(shop_site) == 1)
        bridge.send(told("notifications/cancelled", requestId=7))
        eventually(lambda: running(shop_site) == 0)
        alive = question("select 1", 8)
        assert bridge.ask(alive)["result"]["structuredContent"]["rows"] == [[1]], "and nothing is said of call 7"


def test_the_end_of_stdin_ends_the_call_and_the_bridge_at_once(shop_site: Site, tmp_path: Path) -> None:
    with Bridge(tmp_path, shop_site.url, "--token-file", token_file(tmp_path, shop_site.token()[1])) as bridge:
        bridge.send(question("select pg_sleep(60)"))
        eventually(lambda: running(shop_site) == 1)
        assert bridge.close(3) == 0
        assert bridge.silent
        eventually(lambda: running(shop_site) == 0)


def test_a_client_that_reads_no_more_ends_the_bridge(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with scripted(echo) as server:
        process = subprocess.Popen(
            [*COMMAND, "connect", server.url], stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE,
            env=at_home(tmp_path),
        )  # fmt: skip
        os.close(writing)
        os.close(reading)
        assert process.stdin is not None
        assert process.stderr is not None
        with process.stdin, process.stderr:
            process.stdin.write(json.dumps(modern("x")).encode() + b"\n")
            process.stdin.flush()
            assert process.wait(30) == 0
            assert process.stderr.read() == b""


def test_tls_is_believed_with_the_authority_that_is_named_and_else_told(
    live_tls: Any, certificates: Path, tmp_path: Path
) -> None:
    file = token_file(tmp_path, live_tls.token)
    url = live_tls.url.replace("127.0.0.1", "localhost")
    with Bridge(tmp_path, url, "--token-file", file, "--ca-file", str(certificates / "ca.pem")) as bridge:
        assert bridge.ask(modern("tools/list"))["result"]["tools"]
    with Bridge(tmp_path, url, "--token-file", file) as bridge:
        error = bridge.ask(modern("tools/list"))["error"]
        assert "certificate" in error["message"]
        assert "--ca-file" in error["data"]["hint"]
        assert bridge.close() == 0


# -- what is sent, and what comes back ------------------------------------------------------------------------------


def test_a_message_arrives_byte_by_byte_with_its_headers(tmp_path: Path) -> None:
    line = json.dumps(modern("tools/call", "ü", name="größe", arguments={"x": 1e400}), ensure_ascii=False)
    line = line.replace("Infinity", "1.0e400").replace(": ", ":  ")
    with bridged(echo, tmp_path) as (server, bridge):
        bridge.raw(line.encode() + b"\r\n")
        assert bridge.answer()["id"] == "ü"
        bridge.ask(modern("resources/read", 2, uri="file:///a"))
    _, headers, body = server.seen[0]
    assert body == line.encode()
    assert headers["mcp-protocol-version"] == "2026-07-28"
    assert headers["mcp-method"] == "tools/call"
    assert headers["mcp-name"] == "=?base64?Z3LDtsOfZQ==?="
    assert {"application/json", "text/event-stream"} == set(headers["accept"].split(", "))
    assert "authorization" not in headers
    assert server.seen[1][1]["mcp-name"] == "file:///a"


def test_an_old_session_has_its_version_and_its_session_id_and_is_ended(tmp_path: Path) -> None:
    def script(visitor: Visitor, seen: Seen) -> None:
        if b'"initialize"' in seen[2]:
            visitor.result(seen[2], {"protocolVersion": "2025-06-18"}, mcp_session_id="s1")
        elif seen[0] == "GET":
            visitor.stream(b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/tools/list_changed"}')
            visitor.server.script = lambda visitor, seen: visitor.reply(405)
        else:
            echo(visitor, seen)

    with bridged(script, tmp_path) as (server, bridge):
        bridge.ask(old("initialize", 1, **INITIALIZE))
        bridge.send(told("notifications/initialized"))
        assert bridge.answer()["method"] == "notifications/tools/list_changed"
        assert bridge.close() == 0
    assert "mcp-protocol-version" not in server.seen[0][1]
    for _, headers, _ in server.seen[1:]:
        assert (headers["mcp-protocol-version"], headers["mcp-session-id"]) == ("2025-06-18", "s1")
    assert server.seen[-1][0] == "DELETE"


def test_a_question_of_the_servers_is_handed_on_and_its_answer_taken_back(tmp_path: Path) -> None:
    answered = threading.Event()

    def script(visitor: Visitor, seen: Seen) -> None:
        if b"elicit-1" in seen[2]:
            visitor.reply(202)
            answered.set()
            return
        visitor.stream(
            b": a comment", b'data: {"jsonrpc":"2.0","id":"elicit-1","method":"elicitation/create","params":{}}'
        )
        assert answered.wait(20)
        visitor.wfile.write(b'data: {"jsonrpc":"2.0",\ndata: "id":1,"result":{"done":true}}\n\n')

    with bridged(script, tmp_path) as (server, bridge):
        bridge.send(old("tools/call", 1, name="x"))
        assert bridge.answer()["method"] == "elicitation/create"
        bridge.send({"jsonrpc": "2.0", "id": "elicit-1", "result": {"action": "decline"}})
        assert bridge.answer()["result"] == {"done": True}
    assert json.loads(server.seen[1][2])["result"] == {"action": "decline"}


def test_arguments_that_the_server_wants_in_headers_are_there(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {
        "region": {"type": "string", "x-mcp-header": "Region"},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean", "x-mcp-header": "On"}}}}}  # fmt: skip

    def script(visitor: Visitor, seen: Seen) -> None:
        visitor.result(seen[2], {"tools": [{"name": "t", "inputSchema": schema}]})

    with bridged(script, tmp_path) as (server, bridge):
        bridge.ask(modern("tools/list"))
        bridge.ask(modern("tools/call", 2, name="t", arguments={"region": "süd", "deep": {"on": True}}))
    assert server.seen[1][1]["mcp-param-region"] == message.value("süd") != "süd"
    assert server.seen[1][1]["mcp-param-on"] == "true"


def test_many_calls_run_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(50, timeout=20)

    def script(visitor: Visitor, seen: Seen) -> None:
        together.wait()
        echo(visitor, seen)

    with bridged(script, tmp_path) as (_, bridge):
        bridge.send(*(modern("tools/call", number, name="x") for number in range(50)))
        assert sorted(bridge.answer()["id"] for _ in range(50)) == list(range(50))


def test_what_is_cancelled_closes_its_stream_and_sends_nothing_else(tmp_path: Path) -> None:
    def script(visitor: Visitor, seen: Seen) -> None:
        visitor.stream(b'data: {"jsonrpc":"2.0","method":"notifications/progress","params":{"progress":1}}')
        visitor.wait_until_left()

    with bridged(script, tmp_path) as (server, bridge):
        bridge.send(modern("tools/call", 1, name="x"))
        assert bridge.answer()["method"] == "notifications/progress"
        bridge.send(told("notifications/cancelled", requestId="1"))  # no call of ours: 1 is another id than "1"
        bridge.send(told("notifications/cancelled", requestId=1))
        assert server.left.wait(10)
        assert bridge.close() == 0
        assert bridge.silent
    assert len(server.seen) == 1


def test_an_older_server_is_told_what_is_cancelled(tmp_path: Path) -> None:
    def script(visitor: Visitor, seen: Seen) -> None:
        if seen[0] == "POST" and b"cancelled" in seen[2]:
            visitor.reply(202)
            return
        visitor.stream(b": begun")
        visitor.wait_until_left()

    with bridged(script, tmp_path) as (server, bridge):
        bridge.send(old("tools/call", 1, name="x"))
        eventually(lambda: server.seen)
        bridge.send(told("notifications/cancelled", requestId=1))
        assert server.left.wait(10)
    assert json.loads(server.seen[1][2])["params"] == {"requestId": 1}


def test_a_stream_that_breaks_off_is_asked_for_again_where_its_events_have_ids(tmp_path: Path) -> None:
    def script(visitor: Visitor, seen: Seen) -> None:
        if seen[0] == "POST":
            visitor.stream(b"id: e1\nretry: 10\ndata:")
        else:
            assert seen[1]["last-event-id"] == "e1"
            visitor.stream(b'id: e2\ndata: {"jsonrpc":"2.0","id":1,"result":{}}')

    with bridged(script, tmp_path) as (_, bridge):
        assert bridge.ask(old("tools/call", 1, name="x"))["result"] == {}


def test_a_notification_before_a_request_arrives_before_it(tmp_path: Path) -> None:
    overtaken = threading.Event()

    def script(visitor: Visitor, seen: Seen) -> None:
        if b"tools/list" in seen[2]:
            overtaken.set()
        else:
            early.append(overtaken.wait(0.3))  # the answer takes a while, and the request comes only behind it
        echo(visitor, seen)

    early: list[bool] = []
    with bridged(script, tmp_path) as (_, bridge):
        bridge.send(told("notifications/initialized"), old("tools/list", 1))
        bridge.answer()
    assert early == [False]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [
    "", "foo", "mcp.example.org/mcp", "https://", "ftp://example.org/", "https://[::1/mcp", "https://example.org:port/",
    "http://example.org/mcp", "http://127.0.0.1.example.org/mcp", "http://localhost.example.org/",
    "https://alice:secret@example.org/mcp", "https://mcp_x@example.org/", "https://example.org/mcp#token",
    "https://example.org/m cp", "https://example.org/mcp\n", "file:///etc/passwd", "http://0.0.0.0/mcp",
])  # fmt: skip
def test_a_url_that_no_credential_may_be_sent_to_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        address.check(url)
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize("url", ["https://Example.org:443/mcp", "http://[::1]:80/mcp", "http://localhost/mcp?x=1"])
def test_a_url_is_kept_in_one_spelling(url: str) -> None:
    assert address.check(address.check(url)) == address.check(url) != url or "?" in url


@pytest.mark.parametrize("arguments, code, said", [
    (["http://example.org/mcp"], 2, "not encrypted"),
    (["https://a:b@example.org/mcp"], 2, "user, password or token"),
    (["https://example.org/mcp", "--sign-in", "--sign-out"], 2, "exclude each other"),
    (["https://example.org/mcp", "--sign-out", "--token-file", "x"], 2, "--token-file"),
    (["https://example.org/mcp", "--client-id", "x", "--client-metadata-url", "https://y/z"], 2, "exclude each other"),
    (["https://example.org/mcp", "--client-metadata-url", "http://127.0.0.1/z"], 2, "no URL of a document"),
    (["https://example.org/mcp", "--ca-file", "nowhere.pem"], 3, "nowhere.pem"),
    (["https://example.org/mcp", "--ca-file", __file__], 3, "no certificate"),
    (["https://example.org/mcp", "--token-file", "nowhere.token"], 3, "there is no file"),
])  # fmt: skip
def test_what_cannot_begin_says_why_on_stderr(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "mcpctl: hint: " in done.stderr
    assert not list(tmp_path.iterdir()), "and nothing was made"


@pytest.mark.parametrize("content, mode, said", [
    ("mcp_abc\n", 0o644, "has mode 0644"),
    ("", 0o600, "holds no token"),
    ("two words", 0o600, "something else than one token"),
    ("a\nb", 0o600, "something else than one token"),
])  # fmt: skip
def test_a_token_file_that_others_read_or_that_holds_no_token_is_refused(
    tmp_path: Path, content: str, mode: int, said: str
) -> None:
    file = tmp_path / "my.token"
    file.write_text(content)
    file.chmod(mode)
    done = run(tmp_path, "https://example.org/mcp", "--token-file", str(file))
    assert (done.returncode, done.stdout) == (3, "")
    assert said in done.stderr


NO_MESSAGES: list[tuple[bytes, int, Any]] = [
    (b"garbage", -32700, None),
    (b'{"jsonrpc":"2.0","id":1,"method":"a"}{"jsonrpc":"2.0","id":2,"method":"a"}', -32700, None),
    (b'[{"jsonrpc":"2.0","id":1,"method":"a"}]', -32600, None),
    (b"\xff\xfe{}", -32700, None),
    (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', -32700, None),
    (b"[" * 100000, -32700, None),
    (b'"text"', -32600, None),
    (b'{"id":5,"method":"a"}', -32600, 5),
    (b'{"jsonrpc":"2.0","id":5}', -32600, 5),
    (b'{"jsonrpc":"2.0","id":5,"method":7}', -32600, 5),
    (b'{"jsonrpc":"2.0","id":null,"method":"a"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":1.5,"method":"a"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":true,"method":"a"}', -32600, None),
]  # fmt: skip


def test_a_line_that_is_no_message_is_answered_and_the_next_one_is_taken(tmp_path: Path) -> None:
    with bridged(echo, tmp_path) as (server, bridge):
        for line, code, number in NO_MESSAGES:
            bridge.raw(line + b"\n\n  \n")
            found = bridge.answer()
            assert (found["id"], found["error"]["code"]) == (number, code), line[:80]
        bridge.ask(modern("tools/list", 9))
    assert len(server.seen) == 1


def test_lines_of_a_megabyte_pass_both_ways(tmp_path: Path) -> None:
    def script(visitor: Visitor, seen: Seen) -> None:
        visitor.result(seen[2], {"text": json.loads(seen[2])["params"]["text"]})

    with bridged(script, tmp_path) as (_, bridge):
        text = "ä" * (1 << 20)
        assert bridge.ask(modern("x", 1, text=text))["result"]["text"] == text


def answers(*what: Any, **headers: str) -> Any:
    return lambda visitor, seen: visitor.reply(*what, **headers)


def broken_off(visitor: Visitor, _: Seen) -> None:
    visitor.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"json')
    visitor.close_connection = True


def hung_up(visitor: Visitor, _: Seen) -> None:
    visitor.close_connection = True


NO_ANSWERS: list[tuple[Any, str]] = [
    (answers(200, b"<html>", "text/html"), "text/html, which is not MCP"),
    (answers(200, b"hello"), "no JSON-RPC"),
    (answers(200, b"[]"), "no JSON-RPC"),
    (answers(200, b'{"jsonrpc":"2.0","id":2,"result":{}}'), "another call"),
    (answers(200, b'{"jsonrpc":"2.0","id":"1","result":{}}'), "another call"),
    (answers(202), "answers nothing"),
    (answers(404, b"<html>", "text/html"), "is not there"),
    (answers(500, b"oh"), "500"),
    (answers(503, b"", retry_after="7"), "503"),
    (answers(307, b"", location="https://evil.example.org/mcp?x=1"), "redirects to https://evil.example.org/mcp,"),
    (broken_off, "broke off"),
    (lambda visitor, seen: visitor.stream(b'data: {"jsonrpc":"2.0","method":"x"}'), "broke off"),
    (lambda visitor, seen: visitor.stream(b"data: garbage"), "no JSON-RPC"),
    (hung_up, "broke off"),
]  # fmt: skip


def test_a_server_that_is_no_mcp_server_is_told_as_an_error_and_outlived(tmp_path: Path) -> None:
    with bridged(echo, tmp_path, MCPCTL_TOKEN="mcp_secret") as (server, bridge):
        for script, said in NO_ANSWERS:
            server.script = script
            bridge.send(modern("tools/list", 1))
            while "method" in (found := bridge.answer()):
                pass
            assert found["id"] == 1
            assert said in found["error"]["message"], found
        server.script = echo
        assert bridge.ask(modern("tools/list", 2))["result"] == {}
        assert bridge.close() == 0
    assert "mcp_secret" not in bridge.said


def test_an_error_of_the_servers_own_passes_and_has_the_id_of_the_request(tmp_path: Path) -> None:
    own = b'{"jsonrpc":"2.0",\r\n"id":null,"error":{"code":-32022,"message":"no","data":{"supported":["2025-11-25"]}}}'
    with bridged(answers(400, own), tmp_path) as (_, bridge):
        found = bridge.ask(modern("server/discover", "d"))
    assert found["error"] == {"code": -32022, "message": "no", "data": {"supported": ["2025-11-25"]}}


def test_a_pretty_answer_is_one_line(tmp_path: Path) -> None:
    with bridged(answers(200, b'{\n "jsonrpc": "2.0",\r\n "id": 1,\n "result": {"a": "\\n"}\n}\n'), tmp_path) as (
        _,
        bridge,
    ):
        assert bridge.ask(modern("x"))["result"] == {"a": "\n"}


def test_a_server_that_is_away_is_told_as_an_error_and_found_when_it_is_back(tmp_path: Path) -> None:
    with scripted(echo) as server:
        pass
    with Bridge(tmp_path, server.url) as bridge:
        bridge.send(told("notifications/initialized"))
        assert "cannot reach" in bridge.ask(modern("tools/list", 1))["error"]["message"]
        with scripted(echo, server.server_port):
            assert bridge.ask(modern("tools/list", 2))["result"] == {}
        assert bridge.close() == 0


# -- start ----------------------------------------------------------------------------------------------------------


def test_a_start_with_a_token_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    with scripted(echo) as server:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "mcpctl", "connect", server.url],
            input="", capture_output=True, text=True, env=at_home(tmp_path, MCPCTL_TOKEN="mcp_x"), timeout=60,
        )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "httpx2" in loaded
    slow = {"mcp", "mcp_types", "pydantic", "yaml", "keyring", "cryptography", "psycopg", "starlette", "mcpctl.config"}
    assert not loaded & slow


def test_a_config_for_claude_desktop_elsewhere_starts_the_bridge(shop_site: Site) -> None:
    done = shop_site.run("client-config", "claude-desktop", "--url", "https://mcp.example.org/mcp")
    entry = json.loads(done.stdout)["mcpServers"]["mcpctl"]
    assert entry["args"] == ["connect", "https://mcp.example.org/mcp"]
    assert "--keep-token" in done.stderr
    assert "serve" in shop_site.run("client-config", "claude-desktop").stdout
