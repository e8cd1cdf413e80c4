"""mcpctl connect: stdin and stdout on one side, a server elsewhere on the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import rig, robot
from connecting import (
    BROWSER,
    INITIALIZE,
    META,
    Bridge,
    Protected,
    Scripted,
    Seen,
    Visitor,
    at_home,
    modern,
    old,
    provider,
    scripted,
    told,
)
from mcpctl.bridge import address, message
from mcpctl.errors import UsageError
from site_of_mcpctl import COMMAND, Shop, Site, command, eventually

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


def test_the_token_of_the_environment_is_handed_on_to_nobody(shop_site: Site, tmp_path: Path) -> None:
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


@contextmanager
def bridged(script: Any, folder: Path, *arguments: str, **env: str) -> Iterator[tuple[Scripted, Bridge]]:
    with scripted(script) as server, Bridge(folder, server.url, *arguments, **env) as bridge:
        yield server, bridge


def echo(visitor: Visitor, seen: Seen) -> None:
    if "id" in json.loads(seen[2] or b"{}") and "method" in json.loads(seen[2]):
        visitor.result(seen[2], {})
    else:
        visitor.reply(202)


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
    def script(visitor: Visitor, seen: Seen) -> None:
        if b"initialized" in seen[2]:
            visitor.server.left.wait(0.2)  # nobody sets it: time for the request to overtake, if it could
        order.append(json.loads(seen[2])["method"])
        echo(visitor, seen)

    order: list[str] = []
    with bridged(script, tmp_path) as (_, bridge):
        bridge.send(told("notifications/initialized"), old("tools/list", 1))
        bridge.answer()
    assert order == ["notifications/initialized", "tools/list"]


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


def run(folder: Path, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return command("connect", *arguments, input=stdin, env=at_home(folder, **env))


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


# -- a person signs in ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> Path:
    found = rig.node_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def protected(node: Path) -> Iterator[Protected]:
    with provider(node) as issuer, Protected(issuer) as server:
        yield server


HELLO = modern("tools/call", 1, name="hello", arguments={"name": "Ann"})


def is_hello(answer: Any) -> bool:
    found: bool = answer["result"]["content"][0]["text"] == "hello Ann"
    return found


def record(folder: Path) -> Any:
    (file,) = (folder / "mcpctl" / "connect").glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    return json.loads(file.read_bytes())["record"]


def test_who_has_no_token_signs_in_with_the_browser_once(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url, BROWSER=BROWSER) as bridge:
        bridge.send(*({**HELLO, "id": number} for number in range(5)))
        assert all(is_hello(bridge.answer()) for _ in range(5))
        assert bridge.said.count("sign in with your browser") == 1
        bridge.send(modern("tools/call", 9, name="count", arguments={"to": 3}))
        bridge.answer()
        assert bridge.close() == 0
    token = record(tmp_path)["tokens"]["access_token"]
    assert token not in bridge.said
    with Bridge(tmp_path, protected.url) as bridge:
        assert is_hello(bridge.ask(HELLO))
        assert bridge.said == ""


def test_progress_passes(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url, BROWSER=BROWSER) as bridge:
        call = modern("tools/call", 1, name="count", arguments={"to": 3})
        call["params"]["_meta"] = {**META, "progressToken": "p"}
        bridge.send(call)
        came = [bridge.answer() for _ in range(4)]
    assert [one["params"]["progress"] for one in came[:3]] == [1, 2, 3]
    assert "counted to 3" in str(came[3])


def test_a_token_that_ends_is_renewed_and_nobody_signs_in_again(node: Path, tmp_path: Path) -> None:
    with provider(node, LIFE="2") as issuer, Protected(issuer) as server:
        with Bridge(tmp_path, server.url, BROWSER=BROWSER) as bridge:
            assert is_hello(bridge.ask(HELLO))
            first = record(tmp_path)["tokens"]
            assert is_hello(bridge.ask(HELLO))
            eventually(lambda: is_hello(bridge.ask(HELLO)) and len(set(server.verifier.seen)) >= 3, 30, 0.2)
            assert bridge.said.count("sign in with") == 1
        assert record(tmp_path)["tokens"]["refresh_token"] != first["refresh_token"]
        before = len(set(server.verifier.seen))
        eventually(lambda: expired(issuer, record(tmp_path)["tokens"]["access_token"]))
        with Bridge(tmp_path, server.url) as again:
            assert is_hello(again.ask(HELLO)), "after a restart, too, with an authorization server elsewhere"
            assert again.said == ""
        assert len(set(server.verifier.seen)) == before + 1


def expired(issuer: str, token: str) -> bool:
    found = httpx.post(
        f"{issuer}/token/introspection", data={"token": token}, auth=("resource-server", "of the test"), trust_env=False
    )
    return not found.json()["active"]


def revoke(issuer: str, token: str, client: str) -> None:
    data = {"token": token, "client_id": client}
    httpx.post(f"{issuer}/token/revocation", data=data, trust_env=False).raise_for_status()


def test_a_token_that_is_refused_in_the_middle_is_renewed_and_the_call_sent_again(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server, Bridge(tmp_path, server.url, BROWSER=BROWSER) as bridge:
        assert is_hello(bridge.ask(HELLO))
        kept = record(tmp_path)
        server.verifier.refused.add(kept["tokens"]["access_token"])
        assert is_hello(bridge.ask(HELLO))
        assert bridge.said.count("sign in with") == 1
        renewed = record(tmp_path)["tokens"]
        assert renewed["access_token"] != kept["tokens"]["access_token"]
        revoke(issuer, renewed["refresh_token"], kept["client"]["client_id"])
        assert is_hello(bridge.ask(HELLO)), "where it cannot be renewed, the person signs in anew"
        assert bridge.said.count("sign in with") == 2


def test_two_bridges_share_one_sign_in_and_do_not_use_a_refresh_token_twice(node: Path, tmp_path: Path) -> None:
    with (
        provider(node, LIFE="2") as issuer,
        Protected(issuer) as server,
        Bridge(tmp_path, server.url, BROWSER=BROWSER) as one,
        Bridge(tmp_path, server.url, BROWSER=BROWSER) as two,
    ):
        for bridge in (one, two):
            bridge.send(HELLO)
        assert all(is_hello(bridge.answer()) for bridge in (one, two))

        def both() -> bool:
            for bridge in (one, two):
                bridge.send(HELLO)
            assert all(is_hello(bridge.answer()) for bridge in (one, two))
            return len(set(server.verifier.seen)) >= 4

        eventually(both, 30, 0.1)
        assert (one.said + two.said).count("sign in with") == 1


def test_a_code_is_entered_elsewhere_where_there_is_no_browser(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url) as bridge:
        bridge.send(HELLO)
        eventually(lambda: "to sign in, open " in bridge.said, 20)
        page = bridge.said.partition("to sign in, open ")[2].split()[0]
        assert "success" in robot.visit(page).lower()
        assert is_hello(bridge.answer())
        assert bridge.close() == 0
    assert record(tmp_path)["tokens"]["refresh_token"]


def test_sign_in_and_sign_out_without_a_client(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server:
        done = run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert done.stderr.endswith("signed in\n")
        tokens = record(tmp_path)["tokens"]
        assert not expired(issuer, tokens["access_token"])
        assert run(tmp_path, server.url, "--sign-in").returncode == 0, "it is kept"
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "signed out\n")
        assert expired(issuer, tokens["access_token"])
        assert expired(issuer, tokens["refresh_token"])
        assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, done.stderr) == (0, "nothing was kept for this URL\n")


def test_a_sign_out_forgets_even_where_the_authorization_server_is_away(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server:
        assert run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER).returncode == 0
    done = run(tmp_path, server.url, "--sign-out")
    assert done.returncode == 1
    assert "cannot reach" in done.stderr
    assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))


def test_a_client_that_is_known_beforehand_signs_in_and_others_are_told_to_be(node: Path, tmp_path: Path) -> None:
    with provider(node, REGISTRATION="off") as issuer, Protected(issuer) as server:
        done = run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER)
        assert done.returncode == 1
        assert "--client-id" in done.stderr
        done = run(tmp_path, server.url, "--sign-in", "--client-id", "desktop", BROWSER=BROWSER)
        assert done.returncode == 0, done.stderr
        assert record(tmp_path)["client"]["client_id"] == "desktop"


def test_a_server_that_wants_a_token_and_offers_no_sign_in_says_so(shop_site: Site, tmp_path: Path) -> None:
    with Bridge(tmp_path, shop_site.url) as bridge:
        error = bridge.ask(modern("tools/list"))["error"]
        assert "offers no sign-in" in error["message"]
        assert "--keep-token" in error["data"]["hint"]


def test_a_token_is_kept_from_a_pipe_and_used_without_being_named(shop_site: Site, tmp_path: Path) -> None:
    token = shop_site.token()[1]
    done = run(tmp_path, shop_site.url, "--keep-token", stdin=token + "\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert token not in done.stderr
    with Bridge(tmp_path, shop_site.url) as bridge:
        assert bridge.ask(modern("tools/list"))["result"]["tools"]
    other = shop_site.url.replace("/mcp", "/mcp?other")
    with Bridge(tmp_path, other) as bridge:
        assert "error" in bridge.ask(modern("tools/list")), "it is kept for that URL alone"


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b'{"version":2}', b'{"version":1,"url":"x","record":{}}'])
def test_what_is_kept_and_cannot_be_understood_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    url = "https://example.org/mcp"
    assert run(tmp_path, url, "--keep-token", stdin="mcp_token").returncode == 0
    (file,) = (tmp_path / "mcpctl" / "connect").glob("*.json")
    file.write_bytes(content)
    done = run(tmp_path, url)
    assert done.returncode == 3
    assert "--sign-out" in done.stderr
    assert run(tmp_path, url, "--sign-out").returncode == 0
    assert not file.exists()


def test_what_is_kept_is_sealed_where_the_system_has_a_keyring(tmp_path: Path) -> None:
    keyring = {"PYTHON_KEYRING_BACKEND": "clients.vault.Vault", "PYTHONPATH": str(Path(__file__).parent)}
    with scripted(echo) as server:
        done = run(tmp_path, server.url, "--keep-token", stdin="mcp_token", **keyring)
        assert (done.returncode, "system keyring" in done.stderr) == (0, True), done.stderr
        (file,) = (tmp_path / "mcpctl" / "connect").glob("*.json")
        assert b"mcp_token" not in file.read_bytes()
        assert "mcp_token" not in (tmp_path / "vault.json").read_text()
        with Bridge(tmp_path, server.url, **keyring) as again:
            again.ask(modern("x"))
        assert server.seen[-1][1]["authorization"] == "Bearer mcp_token"
        done = run(tmp_path, server.url)
        assert (done.returncode, "no key" in done.stderr) == (3, True), "the file alone opens nothing"
        assert run(tmp_path, server.url, "--sign-out", **keyring).returncode == 0
        assert json.loads((tmp_path / "vault.json").read_text()) == {}


def metadata(server: Scripted, **changed: Any) -> dict[str, Any]:
    origin = server.url.removesuffix("/mcp")
    return {
        "issuer": origin, "authorization_endpoint": f"{origin}/authorize", "token_endpoint": f"{origin}/token",
        "registration_endpoint": f"{origin}/register", "code_challenge_methods_supported": ["S256"], **changed,
    }  # fmt: skip


def authorization(changed: dict[str, Any], resource: str | None = None) -> Any:
    """A server with an authorization server that is not as it should be."""

    def script(visitor: Visitor, seen: Seen) -> None:
        server, path = visitor.server, visitor.path
        origin = server.url.removesuffix("/mcp")
        if path.startswith("/.well-known/oauth-protected-resource"):
            about = {"resource": resource or server.url, "authorization_servers": [origin]}
            visitor.reply(200, json.dumps(about).encode())
        elif path.startswith("/.well-known/oauth-authorization-server"):
            visitor.reply(200, json.dumps(metadata(server, **changed)).encode())
        elif path == "/register":
            visitor.reply(201, json.dumps({**json.loads(seen[2]), "client_id": "c"}).encode())
        elif path.startswith("/mcp"):
            visitor.reply(
                401, www_authenticate=f'Bearer resource_metadata="{origin}/.well-known/oauth-protected-resource"'
            )
        else:
            visitor.reply(500)

    return script


@pytest.mark.parametrize("changed, resource, said", [
    ({"issuer": "https://evil.example.org"}, None, "issuer mismatch"),
    ({"code_challenge_methods_supported": None}, None, "PKCE"),
    ({"code_challenge_methods_supported": ["plain"]}, None, "PKCE"),
    ({"registration_endpoint": "http://example.org/register"}, None, "not encrypted"),
    ({"authorization_endpoint": "http://example.org/authorize"}, None, "not encrypted"),
    ({}, "https://other.example.org/mcp", "does not match"),
])  # fmt: skip
def test_an_authorization_server_that_is_not_as_it_must_be_is_not_signed_in_at(
    tmp_path: Path, changed: dict[str, Any], resource: str | None, said: str
) -> None:
    with bridged(authorization(changed, resource), tmp_path, BROWSER="false %s") as (_, bridge):
        error = bridge.ask(modern("x"))["error"]
        assert said in error["message"], error
        assert bridge.ask(modern("x", 2))["error"]["message"] == error["message"]
        assert "Traceback" not in bridge.said
        assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))


def test_only_the_browser_that_brings_the_state_back_counts(tmp_path: Path) -> None:
    with bridged(authorization({}), tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        eventually(lambda: "redirect_uri=" in bridge.said)
        asked = dict(httpx.QueryParams(bridge.said.partition("?")[2].split()[0]))
        back = asked["redirect_uri"]
        assert asked["code_challenge_method"] == "S256"
        for wrong in ({}, {"code": "c"}, {"code": "c", "state": "x"}, {"error": "e", "state": asked["state"][:-1]}):
            assert httpx.get(back, params=wrong, trust_env=False).status_code == 400
        assert httpx.get(back.replace("/callback", "/"), trust_env=False).status_code == 404
        assert httpx.post(back, params={"state": asked["state"]}, trust_env=False).status_code == 404
        assert bridge.silent
        given = {"state": asked["state"], "error": "access_denied", "error_description": "<b>no</b>"}
        page = httpx.get(back, params=given, trust_env=False)
        assert (page.status_code, "<b>" in page.text) == (200, False)
        assert "access_denied" in bridge.answer()["error"]["message"]


def test_a_sign_in_ends_with_stdin(tmp_path: Path) -> None:
    with bridged(authorization({}), tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        eventually(lambda: "redirect_uri=" in bridge.said)
        assert bridge.close(5) == 0


# -- start ----------------------------------------------------------------------------------------------------------

AS_ON_WINDOWS = """
import sys, types
import asyncio, httpx2, typer, yaml, logging, mcp.client.auth, webbrowser, tempfile, keyring, uuid
for name in ("fcntl", "pwd", "grp"):
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, LK_UNLCK=0, locking=lambda fd, mode, size: None)
from mcpctl.cli.main import run
run(sys.argv[1:])
"""


def test_it_needs_nothing_that_only_posix_has(protected: Protected, tmp_path: Path) -> None:
    before = [sys.executable, "-W", "ignore", "-c", AS_ON_WINDOWS]
    with Bridge(tmp_path, protected.url, before=before, BROWSER=BROWSER) as bridge:
        assert is_hello(bridge.ask(HELLO))
        assert bridge.close() == 0


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
