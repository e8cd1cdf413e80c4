"""Two strangers on Node at the authorization server: the TypeScript client, and the conformance suite's scenarios."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import httpx
import pytest

import chromium
import oauth_servers
from clients import rig
from oauth_flow import ON, Person, give_password
from site_of_mcpctl import Shop, Site
from test_oauth_clients import BROWSER, by_http, in_chromium

LISTED = '    clients:\n      conformance: {redirect_uris: ["http://127.0.0.1/callback"]}\n'
SUITE = "@modelcontextprotocol/conformance/dist/index.js"


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("oauth-on-node") / "site", newest_shop, ON + LISTED)
    give_password(found, "alice")
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def node() -> Path:
    found = rig.node_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@contextmanager
def _running(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "MCPCTL_TEST_NODE_DIR": str(rig.node_dir())},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _says(process: subprocess.Popen[str], pattern: str) -> str:
    """The next line that fits."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line.strip()
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("typed", [False, pytest.param(True, marks=BROWSER)], ids=["by forms", "in Chromium"])
def test_the_typescript_client_registers_calls_renews_and_gives_back(served: Site, node: Path, typed: bool) -> None:
    with contextlib.ExitStack() as stack:
        back = stack.enter_context(oauth_servers.callback())
        tab = stack.enter_context(chromium.browser()) if typed else None
        process = stack.enter_context(_running(node, rig.HERE / "oauth.mjs"))
        assert process.stdin is not None
        process.stdin.write(json.dumps({"url": served.url, "redirect": back.url}) + "\n")
        process.stdin.flush()
        opened = json.loads(_says(process, '"open"|"error"'))
        (in_chromium(tab, "alice") if tab is not None else by_http(served, "alice"))(opened["open"])
        process.stdin.write(json.dumps({"query": urlencode(back.told())}) + "\n")
        process.stdin.flush()
        found = json.loads(_says(process, '"client"|"error"'))
    assert "error" not in found, found
    assert found["client"]["client_id"].startswith("client-")
    assert found["opened"] == 1
    assert found["renewed"]
    assert "mcp:read" in found["scope"]
    assert found["result"]["structuredContent"]["rows"] == [[1]]
    assert (found["revoked"], found["after"]) == (200, 401)


@pytest.mark.parametrize("revision", ["2025-11-25", "2026-07-28"])
def test_the_conformance_suite_finds_an_authorization_server(served: Site, node: Path, revision: str) -> None:
    base = served.url.removesuffix("/mcp")
    with oauth_servers.callback() as free:
        port = str(urlsplit(free.url).port)
    suite = rig.node_dir() / "node_modules" / SUITE
    asked = ["--client-id", "conformance", "--resource", served.url, "--port", port, "--spec-version", revision]
    with _running(node, suite, "authorization", "--url", base, *asked) as process:
        url = _says(process, "^http.*/authorize")
        person = Person(served)
        page = person.send(person.asked(urlsplit(url).query), answer="allow")
        httpx.get(page.leads_to, trust_env=False)
        assert process.stdout is not None
        rest = process.stdout.read()
    assert re.search(r"^Total: [3-9] passed, 0 failed$", rest, re.MULTILINE), rest
