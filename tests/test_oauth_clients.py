"""The official Python client goes all the way by itself: discovery, registration or metadata document, the pages in a
browser, code, token, call, step-up, refresh, revoke."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import httpx2
import pytest
from mcp import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken

import chromium
import oauth_servers
from oauth_flow import ON, PASSWORD, App, Person, give_password
from oauth_servers import Callback, Documents
from site_of_mcpctl import UNLIMITED, Shop, Site

BROWSER = pytest.mark.skipif(not chromium.PROGRAM, reason="there is no Chromium on this machine: apt install chromium")
Decide = Callable[[str], None]
"""What somebody does with the URL that a client opens."""


class Kept:
    """What a client keeps between two starts."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.info: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.info

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.info = client_info


@pytest.fixture
def back() -> Iterator[Callback]:
    with oauth_servers.callback() as found:
        yield found


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Documents, Path]]:
    with oauth_servers.documents(tmp_path_factory.mktemp("documents")) as found:
        yield found


@pytest.fixture(scope="module")
def served(
    newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory, described: tuple[Documents, Path]
) -> Iterator[Site]:
    extra = f'{ON}    allow_metadata_from: ["127.0.0.0/8", "::1"]\n'
    found = Site(tmp_path_factory.mktemp("oauth-clients") / "site", newest_shop, extra)
    found.limits = {**UNLIMITED, "SSL_CERT_FILE": str(described[1])}
    found.user("carol", "mcp-tools")
    for name in ("alice", "carol"):
        give_password(found, name)
    found.start()
    yield found
    found.stop()


def by_http(site: Site, user: str) -> Decide:
    person = Person(site, user)

    def decide(url: str) -> None:
        told = person.send(person.asked(url.partition("?")[2]), answer="allow")
        with httpx2.Client(trust_env=False) as web:
            web.get(told.leads_to)

    return decide


def in_chromium(tab: chromium.Browser, user: str) -> Decide:
    def type_into(field: str, text: str) -> None:
        tab.settle()
        tab.run(f"document.querySelector('#{field}').focus()")
        tab.ask("Input.insertText", text=text)

    def pressed(selector: str) -> None:
        tab.events.clear()
        tab.press(selector)
        tab.wait("Page.loadEventFired")

    def decide(url: str) -> None:
        tab.go(url)
        if tab.run("document.querySelector('#password') !== null"):
            type_into("user", user)
            type_into("password", PASSWORD)
            pressed("button[type=submit]")
        assert tab.run("document.querySelector('h1').textContent").startswith("Allow"), tab.run(
            "document.body.innerText"
        )
        pressed("button[value=allow]")

    return decide


async def _visit(site: Site, back: Callback, decide: Decide, kept: Kept, document: str | None, write: bool) -> None:
    opened: list[str] = []

    async def redirect(url: str) -> None:
        opened.append(url)
        await anyio.to_thread.run_sync(decide, url)

    async def come_back() -> AuthorizationCodeResult:
        told = await anyio.to_thread.run_sync(back.told)
        return AuthorizationCodeResult(code=told["code"], state=told["state"], iss=told["iss"])

    said = OAuthClientMetadata.model_validate({"redirect_uris": [back.url], "client_name": "Official client"})
    auth = OAuthClientProvider(site.url, said, kept, redirect, come_back, client_metadata_url=document)
    async with (
        httpx2.AsyncClient(auth=auth, timeout=60, trust_env=False) as http,
        Client(streamable_http_client(site.url, http_client=http)) as client,
    ):
        assert not (await client.call_tool("query_database", {"query": "select 1"})).is_error
        assert len(opened) == 1
        assert kept.tokens is not None
        before, auth.context.token_expiry_time = kept.tokens, 1.0
        assert not (await client.call_tool("whoami")).is_error
        assert kept.tokens.access_token != before.access_token
        assert kept.tokens.refresh_token != before.refresh_token
        assert len(opened) == 1
        if write:  # the client is told which scope is lacking, and asks for it
            await client.call_tool("execute_statement", {"statement": "select 1"})
            assert len(opened) == 2
            assert "mcp:write" in (kept.tokens.scope or "")
    assert kept.info is not None
    form = {"token": kept.tokens.refresh_token or "", "client_id": kept.info.client_id or ""}
    async with httpx2.AsyncClient(trust_env=False) as http:
        assert (await http.post(f"{site.url.removesuffix('/mcp')}/revoke", data=form)).status_code == 200
        bearer = {"Authorization": f"Bearer {kept.tokens.access_token}"}
        assert (await http.post(site.url, headers=bearer)).status_code == 401


def test_the_official_client_registers_and_steps_up(served: Site, back: Callback) -> None:
    kept = Kept()
    anyio.run(_visit, served, back, by_http(served, "carol"), kept, None, True)
    assert kept.info is not None
    assert (kept.info.client_id or "").startswith("client-")


def test_the_official_client_is_known_by_its_document(
    served: Site, back: Callback, described: tuple[Documents, Path]
) -> None:
    kept = Kept()
    document = described[0].client("/official.json", redirect_uris=[back.url])
    anyio.run(_visit, served, back, by_http(served, "alice"), kept, document, False)
    assert kept.info is not None
    assert kept.info.client_id == document
    assert "/official.json" in described[0].asked


@BROWSER
def test_somebody_types_the_password_into_a_browser_and_lets_the_official_client_in(
    served: Site, back: Callback
) -> None:
    with chromium.browser() as tab:
        anyio.run(_visit, served, back, in_chromium(tab, "alice"), Kept(), None, False)
        assert tab.said == []
        base = served.url.removesuffix("/mcp")
        tab.go(f"{base}/connections")
        assert tab.run("document.querySelector('h1').textContent") == "My connections"


def test_a_document_that_anybody_has_put_somewhere_makes_no_link_to_us_lead_there(
    served: Site, described: tuple[Documents, Path]
) -> None:
    stranger = App(served, unregistered=True)
    stranger.redirect = "https://evil.example/back"
    stranger.id = described[0].client("/stranger.json", redirect_uris=[stranger.redirect])
    page = Person(served).http.get(f"/authorize?{stranger.asking(scope='none')}")
    assert page.status_code == 400
    assert "location" not in page.headers
