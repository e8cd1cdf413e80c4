"""mcpctl connect signs in at mcpctl itself: found by the URL alone, renewed, given back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import oauth_flow
from connecting import Bridge, modern, run
from oauth_flow import ON, give_password
from site_of_mcpctl import Shop, Site

BROWSER = f"{sys.executable} {oauth_flow.__file__} %s"
ASK = modern("tools/call", 1, name="query_database", arguments={"query": "select 1"})


def kept(folder: Path) -> Any:
    """What the bridge keeps."""
    (file,) = (folder / "mcpctl" / "connect").glob("*.json")
    return json.loads(file.read_bytes())["record"]


def is_one(answer: Any) -> bool:
    found: bool = answer["result"]["structuredContent"]["rows"] == [[1]]
    return found


@pytest.fixture
def make(make_site: Callable[..., Site], newest_shop: Shop) -> Callable[..., Site]:
    def made(extra: str = ON) -> Site:
        site = make_site(newest_shop, extra=extra)
        give_password(site, "alice")
        return site.start()

    return made


def test_the_bridge_needs_the_url_alone_and_what_it_signs_out_of_is_over(
    make: Callable[..., Site], tmp_path: Path
) -> None:
    site, home = make(), tmp_path / "home"
    with Bridge(home, site.url, BROWSER=BROWSER) as bridge:
        assert is_one(bridge.ask(ASK))
        assert bridge.said.count("sign in with your browser") == 1
        assert bridge.close() == 0
    token = kept(home)["tokens"]["access_token"]
    with Bridge(home, site.url) as again:
        assert is_one(again.ask(ASK)), "nobody signs in a second time"
        assert again.said == ""
    bearer = {"Authorization": f"Bearer {token}"}
    assert httpx.post(site.url, headers=bearer, trust_env=False).status_code != 401
    done = run(home, site.url, "--sign-out")
    assert done.returncode == 0, done.stderr
    assert httpx.post(site.url, headers=bearer, trust_env=False).status_code == 401
    assert not list((home / "mcpctl" / "connect").glob("*.json"))
    events = [one["event"] for one in site.audit()]
    assert [events.count(name) for name in ("client.registered", "session.opened", "session.closed")] == [1, 1, 1]
    called = [one for one in site.audit() if one["event"] == "tool.called"]
    assert {(one["user"], one["token"]) for one in called} == {("alice", token.split("_")[1])}


def test_a_token_that_is_refused_is_renewed_and_nobody_signs_in_again(
    make: Callable[..., Site], tmp_path: Path
) -> None:
    site, home = make(), tmp_path / "home"
    assert run(home, site.url, "--sign-in", BROWSER=BROWSER).stderr.endswith("signed in\n")
    (file,) = (home / "mcpctl" / "connect").glob("*.json")
    first = kept(home)["tokens"]
    file.write_text(file.read_text().replace(first["access_token"], first["access_token"][:-1] + "!"))
    with Bridge(home, site.url) as bridge:
        assert is_one(bridge.ask(ASK))
        assert bridge.said == ""
    second = kept(home)["tokens"]
    assert second["access_token"] != first["access_token"]
    assert second["refresh_token"] != first["refresh_token"]
