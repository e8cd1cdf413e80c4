"""The server over HTTP: who gets in, what a bad request is told, and how it lives with a database that is down."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import site_of_mcpctl as site
from mcpctl.policy import roles
from site_of_mcpctl import COMMAND, Client, Shop, Site, environment, eventually

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("server") / "site", newest_shop).start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def token(served: Site) -> str:
    return served.token()[1]


def _base(at: Site) -> str:
    return at.url.removesuffix("/mcp")


def _raw(at: Site, request: bytes) -> bytes:
    """Bytes in, bytes out, on a connection of its own."""
    host, port = urlsplit(at.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as wire:
        wire.sendall(request)
        answer = b""
        while chunk := wire.recv(65536):
            answer += chunk
    return answer


def _post(at: Site, body: bytes, token: str | None, *more: str) -> tuple[int, bytes]:
    lines = [
        "POST /mcp HTTP/1.1", f"Host: {urlsplit(at.url).netloc}", "Content-Type: application/json",
        "Accept: application/json", f"Content-Length: {len(body)}", "Connection: close", *more,
    ]  # fmt: skip
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    answer = _raw(at, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)
    return int(answer.split(b" ", 2)[1]), answer


WHOAMI = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "whoami"}}).encode()


def test_without_a_token_the_answer_is_401_with_a_challenge_that_leads_to_the_metadata(served: Site) -> None:
    answer = httpx.post(served.url, content=WHOAMI, trust_env=False)
    assert answer.status_code == 401
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith('Bearer resource_metadata="')
    metadata = httpx.get(challenge.split('"')[1], trust_env=False)
    assert metadata.status_code == 200
    assert metadata.json()["resource"] == served.url
    assert httpx.get(_base(served) + "/.well-known/oauth-protected-resource", trust_env=False).json() == metadata.json()


def _spoiled(token: str) -> dict[str, str]:
    return {
        "cut": token[:-1],
        "doubled": token + token,
        "with a typo": token[:20] + ("a" if token[20] != "a" else "b") + token[21:],
        "with another id": "mcp_zzzzzzzz" + token[12:],
        "empty": "",
        "something else": "Bearer",
        "long": "mcp_" + "x" * 5000,
        "in quotes": f'"{token}"',
    }


@pytest.mark.parametrize("how", _spoiled("mcp_aaaaaaaa_" + "b" * 43 + "_cccccc"))
def test_a_spoiled_token_gets_the_one_401_and_no_reason(served: Site, token: str, how: str) -> None:
    status, answer = _post(served, WHOAMI, _spoiled(token)[how])
    assert status == 401
    assert b'error="invalid_token"' in answer
    assert b"Unauthorized: a valid token is needed" in answer
    reasons = [line for line in served.audit() if line["event"] == "auth.refused"]
    assert reasons
    assert all(token not in json.dumps(line) for line in reasons)


def test_a_token_in_another_scheme_or_place_is_refused_and_in_x_api_key_taken(served: Site, token: str) -> None:
    assert _post(served, WHOAMI, None, f"Authorization: Basic {token}")[0] == 401
    assert _post(served, WHOAMI, None, f"X-API-Key: {token}")[0] == 200
    assert _post(served, WHOAMI, token, f"X-API-Key: {token}")[0] == 400
    assert _post(served, WHOAMI, token, f"Authorization: Bearer {token}")[0] == 400
    packed = "".join(f"%{ord(letter):02x}" for letter in token)
    for query in (f"?token={token}", f"?x={token}", "?access_token=x", f"?x={packed}", "?%74oken=x"):
        with served.client(token) as client:
            answer = client.http.post(served.url + query, content=WHOAMI)
        assert answer.status_code == 400
        assert token not in answer.text
    assert token not in "".join(served.stderr)


def test_a_request_target_may_be_a_whole_url_whose_host_then_counts(served: Site, token: str) -> None:
    host, port = urlsplit(served.url).netloc.split(":")
    for named, sent, wanted in (
        (f"{host}:{port}", f"{host}:{port}", b"200"),
        (f"{host}:{port}", "evil.example.com", b"200"),
        ("evil.example.com", f"{host}:{port}", b"421"),
    ):
        with socket.create_connection((host, int(port)), 10) as wire:
            wire.sendall(
                f"POST http://{named}/mcp HTTP/1.1\r\nHost: {sent}\r\nAuthorization: Bearer {token}\r\n"
                "Content-Type: application/json\r\nAccept: application/json\r\nConnection: close\r\n"
                f"Content-Length: {len(WHOAMI)}\r\n\r\n".encode()
                + WHOAMI
            )
            assert wire.recv(65536).split(b" ")[1] == wanted


def test_no_answer_waits_for_the_clients_delayed_ack(served: Site, token: str) -> None:
    """Which costs 40 ms (RFC 1122 4.2.3.2 with Nagle's algorithm), each time but the first few."""
    with served.client(token) as a:
        took = []
        for _ in range(20):
            begun = time.monotonic()
            a.rows("select 1")
            took.append(time.monotonic() - begun)
    assert sorted(took)[10] < 0.035, took


def test_host_and_origin_must_be_our_own(served: Site, token: str) -> None:
    netloc = urlsplit(served.url).netloc
    with served.client(token) as client:
        for headers, status in (
            ({"Host": "evil.example.com"}, 421),
            ({"Host": netloc + ".evil.example.com"}, 421),
            ({"Origin": "https://evil.example.com"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": f"http://{netloc}"}, 200),
            ({}, 200),
        ):
            assert client.http.post(served.url, content=WHOAMI, headers=headers).status_code == status, headers


BODIES = {
    "nothing": (b"", 400),
    "broken JSON": (b'{"jsonrpc":"2.0",', 400),
    "a million deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    "a million lists deep": (b"[" * 1_000_000, 400),
    "a batch": (b"[" + WHOAMI + b"]", 400),
    "a number": (b"42", 400),
    "invalid UTF-8": (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"\xff\xfe"}}', 400),
    "no method": (b'{"jsonrpc":"2.0","id":1}', 400),
    "too much": (b'"' + b"x" * 2_000_000 + b'"', 413),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_told_so_and_the_server_lives_on(served: Site, token: str, what: str) -> None:
    body, wanted = BODIES[what]
    with served.client(token) as client:
        answer = client.http.post(served.url, content=body)
        assert answer.status_code == wanted, answer.text
        assert "error" in answer.json()
        assert client.call("whoami").status_code == 200


def test_a_body_without_a_length_is_bounded_while_it_is_read(served: Site, token: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    with served.client(token) as client:
        answer = client.http.post(served.url, content=chunks())
    assert answer.status_code == 413


def test_who_sends_far_too_much_still_hears_why(served: Site, token: str) -> None:
    """Some clients send all before they read; a connection that is closed at once resets their answer away."""
    host, port = urlsplit(served.url).netloc.split(":")
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nAccept: application/json\r\nContent-Length: {8 << 20}\r\n\r\n"
    ).encode()
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            wire.sendall(head + bytes(8 << 20))
            assert wire.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (("Content-Encoding: gzip",), 415),
        (("Content-Length: 5",), 400),
        (("Transfer-Encoding: chunked",), 400),
    ],
)
def test_conflicting_or_strange_framing_is_refused(
    served: Site, token: str, lines: tuple[str, ...], wanted: int
) -> None:
    assert _post(served, WHOAMI, token, *lines)[0] == wanted


def test_other_methods_and_paths_say_what_is_there(served: Site, token: str) -> None:
    with served.client(token) as client:
        for method in ("GET", "DELETE", "PUT", "OPTIONS"):
            answer = client.http.request(method, served.url)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert client.http.get(_base(served) + "/nothing").status_code == 404
        assert client.http.post(_base(served) + "/health").status_code == 405
        assert client.http.get(_base(served) + "/sse").status_code == 404
    assert httpx.get(_base(served) + "/health", trust_env=False).json() == {"status": "ok"}


def test_permissions_and_databases_of_a_token_narrow_what_it_sees_and_may(served: Site) -> None:
    _, text = served.token(permissions=("tools:query_database", "tools:whoami", "databases:shop:read"))
    with served.client(text) as client:
        answer = client.http.post(served.url, json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
        assert [tool["name"] for tool in answer.json()["result"]["tools"]] == ["query_database", "whoami"]
        assert client.rows("select 1") == [[1]]
        refused = client.call("explain_query", {"query": "select 1"}).json()["result"]
        assert refused["isError"]
        assert "lacks the permission tools:explain_query" in refused["content"][0]["text"]
        told = client.call("whoami").json()["result"]["structuredContent"]
        assert told["permissions"] == ["tools:query_database", "tools:whoami", "databases:shop:read"]
    with served.client(served.token(permissions=("*",))[1]) as client:
        told = client.call("whoami").json()["result"]["structuredContent"]
        assert told["permissions"] == list(roles.BUILT_IN["mcp-user"])
    _, text = served.token(databases=("other",))
    with served.client(text) as client:
        assert "there is no database 'shop' for you" in client.error("select 1", database="shop")


def test_another_version_an_encoded_path_and_a_batch_are_refused_in_our_words(served: Site, token: str) -> None:
    assert _raw(served, b"POST /mcp HTTP/1.2\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 505")
    assert httpx.post(f"{_base(served)}/%6dcp").status_code == 404
    status, answer = _post(served, b"[" + WHOAMI + b"]", token)
    assert status == 400
    assert b'"code":-32600' in answer
    assert b"no batch" in answer
    assert b"pydantic" not in answer


def test_each_token_has_a_pool_of_its_own_and_the_log_says_so(make_site: MakeSite, shop: Shop) -> None:
    at = make_site(shop).start()
    with at.client(at.token()[1]) as a, at.client(at.token()[1]) as b:
        assert a.rows("select pg_backend_pid()") != b.rows("select pg_backend_pid()")
        assert a.rows("select pg_backend_pid()") == a.rows("select pg_backend_pid()")
    eventually(lambda: sum("pool opened for token " in line for line in at.stderr) == 2)
    text = "".join(at.stderr)
    assert "Connection isolation: ENABLED (per-token database connections)" in text
    opened = [line for line in at.stderr if "pool opened for token " in line]
    assert opened[1].rstrip().endswith(": 2 left")
    assert [line["event"] for line in at.audit()].count("pool.opened") == 2
    at.stop()
    assert not shop.backends("application_name LIKE 'mcpctl%'")


def test_a_superusers_login_is_refused_unless_the_config_says_so(make_site: MakeSite, newest_shop: Shop) -> None:
    for allowed in ("", "    allow_privileged_login: true\n"):
        at = make_site(newest_shop, database=allowed)
        (at.folder / "shop.password").write_text(newest_shop.cluster.superuser_password)
        at.config.write_text(at.config.read_text().replace(f"user: {site.READER}", "user: postgres"))
        at.start()
        with at.client(at.token()[1]) as a:
            if allowed:
                assert a.rows("select 1") == [[1]]
            else:
                assert "its login is a superuser" in a.error("select 1")


def test_a_broken_token_file_closes_the_door_until_it_is_mended(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    path = at.folder / "tokens.yaml"
    with at.client(at.token()[1]) as a:
        assert a.rows("select 1") == [[1]]
        good = path.read_text()
        path.write_text(good + "  nonsense\n")
        answer = a.call("whoami")
        assert answer.status_code == 503
        assert str(at.folder) not in answer.text
        path.write_text(good)
        assert a.rows("select 1") == [[1]]
        path.chmod(0o644)
        assert a.call("whoami").status_code == 503
        path.chmod(0o600)
        assert a.rows("select 1") == [[1]]


def test_calls_are_refused_while_the_audit_log_cannot_be_written_and_a_revocation_is_not(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    for how, status in (("refuse", 503), ("warn", 200)):
        at = make_site(newest_shop, extra=f"audit: {{on_failure: {how}}}\n").start()
        name, text = at.token()
        with at.client(text) as a:
            assert a.rows("select 1") == [[1]]
            log = at.folder / "audit.jsonl"
            log.rename(at.folder / "moved")
            log.mkdir()
            for _ in range(2):
                assert a.call("whoami").status_code == status
            log.rmdir()
            (at.folder / "moved").rename(log)
            eventually(lambda: a.call("whoami").status_code == 200)
            log.rename(at.folder / "moved")
            log.mkdir()
            done = at.run("token", "revoke", name)
            assert "not in the audit log" in done.stderr
            assert a.call("whoami").status_code == 401


def test_tls_is_1_2_at_least(live_tls: object, certificates: Path) -> None:
    url = urlsplit(live_tls.url)  # type: ignore[attr-defined]
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with (
        socket.create_connection((url.hostname, url.port)) as wire,
        context.wrap_socket(wire, server_hostname="localhost") as secure,
    ):
        assert secure.version() in ("TLSv1.2", "TLSv1.3")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection((url.hostname, url.port)) as wire, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(wire)


def test_a_chain_in_a_file_of_its_own_is_sent_too(make_site: MakeSite, newest_shop: Shop, tmp_path: Path) -> None:
    import trustme

    root = trustme.CA()
    between = root.create_child_ca()
    issued = between.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    between.cert_pem.write_to_path(tmp_path / "chain.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    root.cert_pem.write_to_path(tmp_path / "root.pem")
    at = make_site(newest_shop)
    flags = [f"--tls-{name}={tmp_path / name}.pem" for name in ("cert", "key", "chain")]
    (tmp_path / "key.pem").chmod(0o644)
    refused = at.run("serve", *flags, check=False)
    assert refused.returncode == 3
    assert "can be read by anybody" in refused.stderr
    (tmp_path / "key.pem").chmod(0o600)
    at.start(*flags)
    context = ssl.create_default_context(cafile=str(tmp_path / "root.pem"))
    with Client(at.url, at.token()[1], verify=context) as client:
        assert client.rows("select 1") == [[1]]


def test_what_would_send_tokens_in_clear_does_not_start(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    for arguments, said in (
        (("--host", "0.0.0.0"), "plain HTTP on 0.0.0.0"),
        (("--host", "::"), "plain HTTP on ::"),
        (("--host", "0.0.0.0", "--behind-proxy"), "needs server.trusted_proxies"),
        (("--host", "0.0.0.0", "--no-auth"), "plain HTTP"),
        (("--behind-proxy", "--no-auth"), "trusted_proxies"),
        (("--tls-cert", "nothing.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-cert", "nothing.pem", "--tls-key", "nothing.pem"), "cannot be used"),
        (("--stdio", "--port", "1"), "do not go with --stdio"),
        (("--stdio", "--http"), "exclude each other"),
    ):
        done = at.run("serve", *arguments, check=False)
        assert done.returncode in (2, 3), arguments
        assert said in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_server_for_others_does_not_start_where_it_could_read_the_administrators_login(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop)
    (at.folder / "admin.dsn").touch(0o600)
    at.start()
    assert "admin.dsn can be read by the user whom the server runs as" in "".join(at.stderr)
    at.stop()
    wrapped = [*COMMAND, "--config", str(at.config), "serve", "--port", "0"]  # a unit whose ExecStart is a shell
    started = subprocess.run(
        wrapped, env=environment(INVOCATION_ID="0" * 32), capture_output=True, text=True, timeout=60,
        start_new_session=True,
    )  # fmt: skip
    assert (started.returncode, "holds a login that can make roles" in started.stderr) == (3, True), started.stderr
    at.config.write_text(at.config.read_text() + "server: {trusted_proxies: [127.0.0.1]}\n")
    for arguments in ((), ("--behind-proxy",), ("--host", "0.0.0.0", "--behind-proxy")):
        done = at.run("serve", "--port", "0", *arguments, check=False)
        assert (done.returncode, "holds a login that can make roles" in done.stderr) == (3, True), done.stderr


def test_no_auth_is_loud_and_takes_nothing_that_was_forwarded(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start("--no-auth")
    assert "AUTHENTICATION IS OFF" in "".join(at.stderr)
    with Client(at.url, None) as client:
        assert client.rows("select 1") == [[1]]
        for name in ("X-Forwarded-For", "Client-IP", "Fly-Client-IP", "Via", "CDN-Loop", "X-Remote-Addr", "CF-RAY"):
            assert client.http.post(at.url, content=WHOAMI, headers={name: "1.2.3.4"}).status_code == 403
            assert client.http.get(f"{_base(at)}/health", headers={name: "1.2.3.4"}).status_code == 403
        assert client.http.post(f"{at.url}?token=x", content=WHOAMI).status_code == 400
        assert client.http.post(at.url, content=WHOAMI, headers={"Host": "evil.example"}).status_code == 421


def test_the_clients_address_behind_a_proxy_is_the_last_that_is_no_proxy(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="server: {trusted_proxies: [127.0.0.1, 10.0.0.0/8]}\n").start("--behind-proxy")
    with at.client(at.token()[1]) as client:
        for forwarded in (
            "6.6.6.6, 192.0.2.7, 10.1.2.3",
            "192.0.2.7",
            "192.0.2.7, ::ffff:10.1.2.3",
        ):
            assert client.http.post(at.url, content=WHOAMI, headers={"X-Forwarded-For": forwarded}).status_code == 200
        odd = {"X-Forwarded-For": "::1%<b>, 10.1.2.3"}
        assert client.http.post(at.url, content=WHOAMI, headers=odd).status_code == 400
    called = [line["client_ip"] for line in at.audit() if line["event"] == "tool.called"]
    assert called == ["192.0.2.7", "192.0.2.7", "192.0.2.7"]


def test_a_proxy_that_comes_over_ipv4_to_a_socket_of_both_is_known(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra="server: {trusted_proxies: [127.0.0.1], allowed_hosts: ['127.0.0.1']}\n")
    at.start("--host", "::", "--behind-proxy")
    port = urlsplit(at.url).port
    with at.client(at.token()[1]) as client:
        told = {"X-Forwarded-For": "192.0.2.7", "Host": "127.0.0.1"}
        assert client.http.post(f"http://127.0.0.1:{port}/mcp", content=WHOAMI, headers=told).status_code == 200
    assert [line["client_ip"] for line in at.audit() if line["event"] == "tool.called"] == ["192.0.2.7"]


def test_the_old_sse_transport_is_served_when_asked_for_and_ends_with_its_token(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra="server: {sse: true}\n").start()
    name, text = at.token()
    _, other = at.token("bob")
    headers = {"Authorization": f"Bearer {text}"}
    with (
        httpx.Client(headers=headers, trust_env=False, timeout=20) as client,
        client.stream("GET", _base(at) + "/sse") as stream,
    ):
        lines = stream.iter_lines()
        endpoint = next(line for line in lines if line.startswith("data: ")).removeprefix("data: ")
        about = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        call = {"jsonrpc": "2.0", "id": 5, "method": "initialize", "params": about}
        with Client(_base(at) + endpoint, other) as stranger:
            assert stranger.http.post(stranger.url, json=call).status_code == 404
        with Client(_base(at) + endpoint, text) as poster:
            assert poster.http.post(poster.url, json=call).status_code == 202
            answer = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
            assert answer["id"] == 5
            poster.http.post(poster.url, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
            query = {"name": "query_database", "arguments": {"query": "select 7 as seven"}}
            poster.http.post(poster.url, json={"jsonrpc": "2.0", "id": 6, "method": "tools/call", "params": query})
            answer = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
            assert json.loads(answer["result"]["content"][0]["text"])["rows"] == [[7]]
            query = {"name": "query_database", "arguments": {"query": "select pg_sleep(60)"}}
            poster.http.post(poster.url, json={"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": query})
        eventually(lambda: newest_shop.backends("state = 'active' AND query LIKE '%sleep(60)%'"))
        at.run("token", "revoke", name)
        for _ in lines:  # the stream ends
            pass
    eventually(lambda: not newest_shop.backends("query LIKE '%sleep(60)%'"), 1)
    at.stop()
    assert not [line for line in at.stderr if "Traceback" in line or "ERROR" in line]
