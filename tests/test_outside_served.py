"""Tokens of outside issuers at a running server: a real provider's, and what taking something away there does here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from issuer import AUDIENCE, Issuer, running
from mcpctl.identity import linking, users
from mcpctl.identity.links import Link
from site_of_mcpctl import Shop, Site, eventually, in_background
from test_oidc_provider import JWT, OPAQUE, Provider, provider

__all__ = ["provider"]
SLOW = "select pg_sleep(30)"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running() as found:
        yield found


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("the secret of mcpctl\n")
    return path


def served(folder: Path, shop: Shop, oidc: str, *, per_user: bool = False) -> Site:
    return Site(folder / "site", shop, f"auth:\n  oidc:\n{oidc}", per_user=per_user)


def entry(url: str, audience: str, *more: str, name: str = "shop") -> str:
    lines = [f"issuer: {url}", f"audience: ['{audience}']", "allow_http_loopback: true", *more]
    return f"    {name}:\n" + "".join(f"      {line}\n" for line in lines)


def asked(secret: Path) -> str:
    return f"introspection: {{client_id: mcpctl, client_secret_file: {secret}, cache: 1s}}"


def link(site: Site, user: str, url: str, subject: str) -> None:
    linking.link(users.user_file(site.folder / "users.yaml"), user, Link(url, subject))


def now_token(issuer: Issuer, **more: Any) -> str:
    seconds = int(datetime.now(UTC).timestamp())
    return issuer.token(**{"iat": seconds - 1, "exp": seconds + 600} | more)


def test_people_of_a_real_provider_ask_with_its_tokens_and_get_what_their_roles_give(
    provider: Provider, newest_shop: Shop, tmp_path: Path
) -> None:
    site = served(tmp_path, newest_shop, entry(provider.url, JWT))
    link(site, "alice", provider.url, "alice")
    site.start()
    try:
        token = provider.person(JWT)["access_token"]
        with site.client(token) as client:
            assert client.rows("select 1") == [[1]]
            who = client.call("whoami").json()["result"]["structuredContent"]
            assert who["user"] == "alice"
            assert client.call("database_health").json()["result"]["isError"] is False  # mcp-tools gives it
        line = next(one for one in site.audit() if one["event"] == "tool.called")
        assert (line["user"], line["token"][0]) == ("alice", "J")
        assert token not in (site.folder / "audit.jsonl").read_text()
        with site.client(provider.program(JWT)) as stranger:
            assert stranger.call("whoami").status_code == 401
    finally:
        site.stop()


def test_a_token_that_the_provider_revokes_ends_what_it_runs(
    provider: Provider, newest_shop: Shop, tmp_path: Path, secret: Path
) -> None:
    import httpx

    site = served(tmp_path, newest_shop, entry(provider.url, OPAQUE, asked(secret)))
    link(site, "alice", provider.url, "alice")
    site.start()
    try:
        token = provider.person(OPAQUE)["access_token"]
        with site.client(token) as client:
            assert client.rows("select 1") == [[1]]
            slow = in_background(client.call, "query_database", {"query": SLOW})
            eventually(lambda: newest_shop.backends("state = 'active'"))
            form = {"token": token, "client_id": "desktop"}
            assert httpx.post(provider.endpoints["revocation_endpoint"], data=form, trust_env=False).status_code == 200
            eventually(lambda: not newest_shop.backends("state = 'active'"), 15)
            assert slow.result().status_code == 401
            assert client.call("whoami").status_code == 401
    finally:
        site.stop()


def test_a_role_that_the_issuer_takes_away_is_gone(
    issuer: Issuer, newest_shop: Shop, tmp_path: Path, secret: Path
) -> None:
    site = served(tmp_path, newest_shop, entry(issuer.url, AUDIENCE, asked(secret)))
    link(site, "alice", issuer.url, "5f0c-alice")
    site.start()
    text, seconds = "opaque-0123456789abcdefghij", int(datetime.now(UTC).timestamp())

    def say(*roles: str) -> None:
        held = {"realm_access": {"roles": [*roles]}}
        issuer.about[text] = {"active": True, **issuer.claims(iat=seconds, exp=seconds + 600, **held)}

    try:
        say("mcp-tools")
        with site.client(text) as client:
            assert client.call("database_health").json()["result"]["isError"] is False
            say("mcp-user")
            eventually(lambda: client.call("database_health").json()["result"]["isError"], 15)
            assert client.rows("select 1") == [[1]]
            issuer.about[text] = {"active": False}
            eventually(lambda: client.call("whoami").status_code == 401, 15)
    finally:
        site.stop()


def test_disabling_the_user_cuts_what_their_outside_token_runs_within_a_second(
    issuer: Issuer, newest_shop: Shop, tmp_path: Path
) -> None:
    site = served(tmp_path, newest_shop, entry(issuer.url, AUDIENCE))
    link(site, "alice", issuer.url, "5f0c-alice")
    site.start()
    try:
        with site.client(now_token(issuer)) as client:
            slow = in_background(client.call, "query_database", {"query": SLOW})
            eventually(lambda: newest_shop.backends("state = 'active'"))
            said = site.run("user", "disable", "alice")
            eventually(lambda: not newest_shop.backends("state = 'active'"))
            assert "cut: 1 query, 0 backends left" in said.stdout
            assert slow.result().status_code == 401
            assert client.call("whoami").status_code == 401
        at = {line["event"]: datetime.fromisoformat(line["time"]) for line in site.audit()}
        assert at["query.cancelled"] - at["user.disabled"] < timedelta(seconds=1)
    finally:
        site.stop()


def test_a_guest_logs_in_as_the_user_made_for_their_role_and_is_disabled_alone(
    issuer: Issuer, login_shop: Shop, tmp_path: Path
) -> None:
    more = "just_in_time: {analyst: guests-r}", "roles: {analyst: mcp-user}"
    site = served(tmp_path, login_shop, entry(issuer.url, AUDIENCE, *more), per_user=True)
    site.user("guests-r")
    site.grant("guests-r", "--schema", "public")
    site.start("--workers", "2")
    analyst: Any = {"realm_access": {"roles": ["analyst"]}}
    try:
        with (
            site.client(now_token(issuer, **analyst)) as one,
            site.client(now_token(issuer, sub="two", preferred_username="Two", **analyst)) as two,
            site.client(now_token(issuer, sub="three")) as three,
        ):
            assert one.rows("select current_user") == [["mcp_guests-r_r"]]
            assert two.rows("select current_user") == [["mcp_guests-r_r"]]
            assert three.call("whoami").status_code == 401
            name = one.call("whoami").json()["result"]["structuredContent"]["user"]
            assert {"alice", "Two"} <= set(site.run("user", "list").stdout.split())
            slow = in_background(one.call, "query_database", {"query": SLOW})
            busy = "state = 'active' AND query LIKE '%pg_sleep(30)'"
            eventually(lambda: _busy(login_shop, busy))
            assert "cut: 1 query, 0 backends left" in site.run("user", "disable", name).stdout
            eventually(lambda: not _busy(login_shop, busy), 2)
            assert slow.result().status_code == 401
            assert one.call("whoami").status_code == 401
            assert two.rows("select 1") == [[1]]
            assert "disabled" in site.run("user", "show", name).stdout
            site.run("user", "enable", name)
            assert one.rows("select 1") == [[1]]
            site.run("user", "link", "bob", "--guest", name)
            assert one.call("whoami").json()["result"]["structuredContent"]["user"] == "bob"
            [listed] = [line for line in site.run("user", "list").stdout.splitlines() if line.startswith(name)]
            assert {"as bob", "linked"} <= set(listed.split("\t"))
        events = [line["event"] for line in site.audit()]
        assert ("user.disabled" in events, "user.enabled" in events, "user.linked" in events) == (True,) * 3
        assert site.run("user", "disable", "x-aaaaaaaaaaaaaaaaaaaa", check=False).returncode == 4
        said = site.run("user", "remove", name, "--yes", check=False)
        assert (said.returncode, "is a guest" in said.stderr) == (4, True)
    finally:
        site.stop()


def _busy(shop: Shop, where: str) -> list[Any]:
    return shop.look(f"SELECT pid FROM pg_stat_activity WHERE usename = 'mcp_guests-r_r' AND {where}")
