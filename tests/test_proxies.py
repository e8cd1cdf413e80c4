"""Behind nginx, HAProxy and Caddy, with the files that packaging/proxies ships."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

import fronts
from fronts import Front
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

LOW = {  # as low that a test reaches them at once
    "nginx": {"rate=100r/s": "rate=1r/s", "burst=200": "burst=5"},
    "haproxy": {"gt 1000": "gt 5"},
}
ADDRESS = "127.0.0.9"
"""Where the client is, other than the proxy."""


@pytest.fixture(scope="module")
def served(lasting_shop: Shop, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    names = [*fronts.NAMES, *(f"low-{name}" for name in fronts.NAMES)]
    ports = dict(zip(names, fronts.free_ports(len(names)), strict=True))
    hosts = ", ".join(f"'localhost:{port}'" for port in ports.values())
    extra = f"server: {{sse: true, allowed_hosts: [{hosts}], trusted_proxies: [127.0.0.1]}}\n"
    folder = tmp_path_factory.mktemp("behind")
    at = Site(folder / "site", lasting_shop, extra=extra).start("--behind-proxy")
    yield Served(at, ports, certificates, folder)
    at.stop()
    assert not [line for line in at.stderr if "Traceback" in line]


class Served:
    """A server that proxies come to, and where each of them may be."""

    def __init__(self, at: Site, ports: dict[str, int], certificates: Path, folder: Path) -> None:
        self.at = at
        self.ports = ports
        self.certificates = certificates
        self.folder = folder
        self.trust = ssl.create_default_context(cafile=certificates / "ca.pem")

    def front(self, stack: ExitStack, name: str, place: str, changed: dict[str, str] | None = None) -> Front:
        if fronts.program(name) is None:
            pytest.skip(f"{name} is not installed")
        upstream = int(self.at.url.split(":")[2].split("/")[0])
        found = fronts.started(name, self.ports[place], upstream, self.certificates, self.folder / place, changed)
        return stack.enter_context(found)

    def options(self) -> dict[str, Any]:
        return {"transport": httpx.HTTPTransport(verify=self.trust, local_address=ADDRESS)}


@pytest.fixture(scope="module", params=fronts.NAMES)
def front(served: Served, request: pytest.FixtureRequest) -> Iterator[Front]:
    with ExitStack() as stack:
        yield served.front(stack, request.param, request.param)


def test_calls_and_large_answers_pass_and_the_address_is_the_clients_whatever_it_says(
    served: Served, front: Front
) -> None:
    name, token = served.at.token()
    with Client(front.url(), token, **served.options()) as client:
        assert client.rows("select 7") == [[7]]
        client.http.headers["X-Forwarded-For"] = "6.6.6.6"
        client.http.headers["Forwarded"] = "for=6.6.6.6"
        rows = client.rows("select repeat('x', 5000) from generate_series(1, 200)")
    assert len(rows) == 200
    called = [line["client_ip"] for line in served.at.audit() if line.get("token") == name and line.get("tool")]
    assert called == [ADDRESS, ADDRESS]
    asked = eventually(lambda: [line for line in front.log.read_text().splitlines() if "/mcp" in line])
    assert ADDRESS in asked[-1]
    assert token not in front.log.read_text()


def test_a_stream_is_passed_on_as_it_comes_and_ends_with_its_token(served: Served, front: Front) -> None:
    name, token = served.at.token()
    headers = {"Authorization": f"Bearer {token}"}
    with (
        httpx.Client(headers=headers, timeout=20, **served.options()) as client,
        client.stream("GET", front.url("/sse")) as stream,
    ):
        lines = stream.iter_lines()
        endpoint = next(line for line in lines if line.startswith("data: ")).removeprefix("data: ")
        about = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        with Client(front.url(endpoint), token, **served.options()) as poster:
            asked = {"jsonrpc": "2.0", "id": 5, "method": "initialize", "params": about}
            assert poster.http.post(poster.url, json=asked).status_code == 202
        answer = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
        assert answer["id"] == 5
        served.at.run("token", "revoke", name)
        for _ in lines:  # the stream ends
            pass


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_who_hangs_up_ends_the_call(served: Served, front: Front, version: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    _, token = served.at.token()
    seconds = f"{300 + fronts.NAMES.index(front.name)}.{version[0]}"
    body = {"name": "query_database", "arguments": {"query": f"select pg_sleep({seconds})"}}
    asked = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": body})
    head = f'header = "Authorization: Bearer {token}"\nheader = "Accept: application/json"\n'
    command = [
        "curl",
        "-s",
        f"--http{version}",
        "--cacert",
        str(served.certificates / "ca.pem"),
        "-K",
        "-",
        "--json",
        asked,
    ]
    process = subprocess.Popen([*command, front.url()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stdin is not None
    process.stdin.write(head)
    process.stdin.close()
    try:
        running = f"state = 'active' AND query LIKE '%sleep({seconds})%'"
        eventually(lambda: served.at.shop.backends(running))
    finally:
        process.terminate()
        process.wait(5)
    eventually(lambda: not served.at.shop.backends(running), 2)


def test_what_is_too_large_or_too_often_is_refused(served: Served, front: Front) -> None:
    with ExitStack() as stack:
        low = served.front(stack, front.name, f"low-{front.name}", LOW.get(front.name))
        known = {"Authorization": f"Bearer {served.at.token()[1]}", "Content-Type": "application/json"}
        with httpx.Client(timeout=20, **served.options()) as client:
            assert client.post(low.url(), content=b"x" * (1024 * 1024 + 1), headers=known).status_code == 413
            seen = [client.post(low.url(), json={}).status_code for _ in range(8)]
            assert (429 in seen) == (front.name in LOW)  # Debian's Caddy knows no limits
            assert client.get(low.url("/health")).status_code == 200


def test_a_call_that_has_broken_off_is_never_sent_again(served: Served, front: Front) -> None:
    heard: list[bytes] = []
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=_break_off, args=(server, heard), daemon=True).start()
        there = fronts.free_ports(1)[0]
        upstream = server.getsockname()[1]
        where = served.folder / f"broken-{front.name}"
        stack.enter_context(fronts.started(front.name, there, upstream, served.certificates, where))
        with httpx.Client(timeout=20, **served.options()) as client:
            url = f"https://localhost:{there}/mcp"
            assert client.post(url, content=b"first").status_code == 200
            with contextlib.suppress(httpx.RemoteProtocolError):  # HAProxy hangs up, too
                assert client.post(url, content=b"second").status_code == 502
        called = [b"first", b"second"]
        for version in (
            ("1.1", "2") if shutil.which("curl") is not None else ()
        ):  # whose clients may be told to try again
            subprocess.run(
                ["curl", "-sk", f"--http{version}", "-d", version, url], capture_output=True, timeout=20, check=True
            )
            called.append(version.encode())
    assert [body for body in heard if body] == called


def _break_off(server: socket.socket, heard: list[bytes]) -> None:
    """Answers what says "first" and its health check, and hangs up at everything else."""

    def one(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                health, length = b"/health" in line, 0
                while line := lines.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                body = lines.read(length)
                if not health:
                    heard.append(body)
                if not health and body != b"first":
                    return
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the test is over
            return
        in_background(one, connection)
