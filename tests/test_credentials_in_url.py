"""A credential in the URL: refused, unless the config says so in so many words, and then kept nowhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from mcp import ClientSession
from mcp.client.sse import sse_client

from mcpctl.server import credentials
from mcpctl.server.hot import Apart, Found, Lane
from signed_in import ENABLED, base, hashed, session
from site_of_mcpctl import Shop, Site

LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
WHOAMI = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "whoami", "arguments": {}}}
ALL = credentials.IN_URL["/mcp"]
TOKEN, SESSION = "mcp_1hrspjl1_x", "mcs_S3k9a0z1_x"


def presented(query: str, *headers: tuple[bytes, bytes], names: Any = ALL) -> tuple[str | None, bytes]:
    return credentials.presented({"query_string": query.encode(), "headers": headers}, names)


def test_the_credential_is_taken_out_of_the_query() -> None:
    assert presented(f"token={TOKEN}") == (TOKEN, b"")
    assert presented(f"a=1&api_key={SESSION}&b=2") == (SESSION, b"a=1&b=2")
    assert presented(f"session_id={SESSION}") == (SESSION, b"")
    assert presented("token=mc%70_a") == ("mcp_a", b"")
    assert presented("a=1") == (None, b"a=1")
    assert presented("token=") == ("", b"")


@pytest.mark.parametrize(
    "query",
    [
        f"token={TOKEN}&token={TOKEN}", f"token={TOKEN}&api_key={TOKEN}", f"token=&session_id={SESSION}",
        f"Token={TOKEN}", f"%74oken={TOKEN}", f"access_token={TOKEN}", f"x={TOKEN}", f"token={TOKEN}&x=mcp_a",
        f"authorization=Bearer+{TOKEN}", f"token={'x' * 300}",
    ],
)  # fmt: skip
def test_two_of_them_or_another_spelling_is_refused(query: str) -> None:
    with pytest.raises(credentials.UsageError):
        presented(query)


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"x-session-id"])
def test_one_in_the_url_beside_a_header_is_two(name: bytes) -> None:
    with pytest.raises(credentials.UsageError, match="two credentials"):
        presented(f"session_id={TOKEN}", (name, b"Basic nonsense"))


def test_what_is_called_a_session_has_to_be_one() -> None:
    with pytest.raises(credentials.UnauthorizedError):
        presented(f"session_id={TOKEN}")


def test_where_the_config_is_silent_no_name_is_taken() -> None:
    for name in ALL:
        with pytest.raises(credentials.UsageError):
            presented(f"{name.decode()}={TOKEN}", names=())


def test_a_head_with_a_credential_in_its_target_is_never_one_that_is_known() -> None:
    head = f"POST /mcp?token={TOKEN} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n".encode()
    apart = Apart.of(head)
    assert apart is not None
    nothing: Any = None
    assert Lane.of(apart, Found(nothing, None, [], 100, credential=True), nothing) is None
    assert Lane.of(apart, Found(nothing, None, [], 100, credential=False), nothing) is not None


@pytest.fixture
def site(newest_shop: Shop, make_site: Callable[..., Site]) -> Site:
    site = make_site(newest_shop, extra=f"{ENABLED}server: {{sse: true}}\n")
    site.edit_user("alice", password=hashed())
    return site


def post(site: Site, query: str, body: Any = LIST, **more: Any) -> httpx.Response:
    return httpx.post(f"{site.url}?{query}", json=body, trust_env=False, timeout=60, **more)


def test_by_default_it_is_refused_everywhere(site: Site) -> None:
    site.start()
    _, token = site.token()
    for name in ("token", "api_key", "session_id"):
        assert post(site, f"{name}={token}").status_code == 400
        assert httpx.get(f"{base(site)}/sse?{name}={token}", trust_env=False).status_code == 400


def test_where_the_config_says_so_it_is_taken_on_every_lane_and_kept_nowhere(site: Site) -> None:
    site.limits = {**site.limits, "MCPCTL_AUTH__CREDENTIALS_IN_URL": "true"}
    site.start()
    (_, token), (_, text) = site.token(), session(site)
    (_, other) = site.token("bob")
    with httpx.Client(trust_env=False, timeout=60) as client:
        for query, who in (
            (f"token={token}", "alice"),
            (f"session_id={text}", "alice"),
            (f"api_key={other}", "bob"),
        ) * 3:
            answer = client.post(f"{site.url}?{query}", json=WHOAMI)  # one connection: no head is taken for another's
            assert answer.json()["result"]["structuredContent"]["user"] == who
            assert client.post(f"{site.url}?{query}", json=LIST).status_code == 200
    assert post(site, f"token={token}", headers={"Authorization": f"Bearer {token}"}).status_code == 400
    assert post(site, f"token={token}&api_key={token}").status_code == 400
    assert post(site, "token=mcp_wrong").status_code == 401
    assert post(site, f"session_id={token}").status_code == 401
    for path in ("/health", "/ready", "/api/v1/auth", "/api/v1/admin/sessions"):
        answer = httpx.get(f"{base(site)}{path}?token={token}", trust_env=False)
        assert answer.status_code in (200, 400, 405), path  # of no use, and of no harm
    site.stop()
    kept = b"".join(path.read_bytes() for path in site.folder.rglob("*") if path.is_file())
    said = kept.decode("latin-1") + "".join(site.stderr)
    for secret in (token, text, other):
        assert secret not in said
        assert secret.split("_")[2] not in said
    assert "auth.credentials_in_url" in "".join(site.stderr)


def test_an_old_client_that_has_it_in_the_url_can_open_a_stream_and_ask(site: Site) -> None:
    site.limits = {**site.limits, "MCPCTL_AUTH__CREDENTIALS_IN_URL": "true"}
    site.start()
    _, text = session(site)

    async def asked() -> Any:
        async with sse_client(f"{base(site)}/sse?session_id={text}") as streams, ClientSession(*streams) as client:
            await client.initialize()
            found = await client.call_tool("whoami", {})
            return found.structured_content

    assert json.loads(json.dumps(asyncio.run(asked())))["user"] == "alice"
