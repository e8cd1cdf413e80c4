"""auth.oauth in the config: what goes together, and what does not; and its paths in the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcpctl import config
from mcpctl.config_sign_in import Oauth, OauthClient
from mcpctl.errors import ConfigError
from mcpctl.server import oauth
from mcpctl.server.authorization import listed
from mcpctl.server.oauth_pages import SignInPages
from test_reference import chapters, page, rows

SHOP = "databases: {shop: {host: localhost}}\n"


def fault(tmp_path: Path, oauth: str, server: str = "") -> str:
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    file.write_text(f"{SHOP}auth: {{oauth: {{{oauth}}}}}\n{server}")
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    return caught.value.message


@pytest.mark.parametrize(
    ("oauth", "server", "told"),
    [
        ("enabled: true", "server: {host: 0.0.0.0}", "needs server.public_url"),
        ("enabled: true", "server: {host: 0.0.0.0, public_url: 'http://mcp.example.org'}", "needs https"),
        ("lifetime: 1h, idle: 2h", "", "is above auth.oauth.lifetime"),
        ("access_lifetime: 2h, idle: 1h", "", "is above auth.oauth.idle"),
        ("access_lifetime: 25h", "", "from 1m to 24h"),
        ("app_schemes: [javascript]", "", "no scheme of an installed program"),
        ("app_schemes: ['Cursor:']", "", "schemes such as cursor"),
        ("default_scopes: ['mcp:all']", "", "there is no scope mcp:all"),
        ("scopes: {'mcp:mine': {permissions: ['tools:whoami']}}", "", "have a meaning already"),
        ("scopes: {offline_access: {permissions: ['tools:whoami']}}", "", "have a meaning already"),
        ("scopes: {'two words': {permissions: ['tools:whoami']}}", "", "a name is"),
        ("scopes: {mine: {permissions: ['tools:who']}}", "", "did you mean tools:whoami"),
        ("enabled: true, clients: {portal: {}}", "", "needs redirect_uris"),
        ("clients: {portal: {redirect_uris: ['http://portal.example/']}}", "", "is not taken"),
        ("registrations: 0", "", "from 1 to"),
    ],
)
def test_what_does_not_go_together_is_a_fault_with_its_place(
    tmp_path: Path, oauth: str, server: str, told: str
) -> None:
    found = fault(tmp_path, oauth, server)
    assert told in found
    assert "config.yaml:" in found
    assert "auth.oauth" in found


@pytest.mark.parametrize(
    "server", ["", "server: {host: '::1'}", "server: {host: 0.0.0.0, public_url: 'https://mcp.example.org'}"]
)
def test_on_loopback_and_behind_https_it_can_be_switched_on(tmp_path: Path, server: str) -> None:
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    file.write_text(f"{SHOP}auth: {{oauth: {{enabled: true, scopes: {{'shop:read': {{}}}}}}}}\n{server}")
    assert config.load(file, {}).auth.oauth.enabled


def test_a_secret_that_can_be_guessed_starts_no_server(tmp_path: Path) -> None:
    file = tmp_path / "portal.secret"
    file.touch(0o600)
    file.write_text("short\n")
    oauth = Oauth(clients={"portal": OauthClient(("https://portal.example/",), None, file)})
    with pytest.raises(ConfigError, match=r"portal has fewer than 32"):
        listed(oauth)
    file.chmod(0o644)
    with pytest.raises(ConfigError):
        listed(oauth)


def test_the_reference_lists_exactly_the_routes_of_the_authorization_server() -> None:
    nothing: Any = None
    parts = oauth.Parts(nothing, nothing, nothing, nothing, nothing, nothing, nothing, registration=True)
    pages = SignInPages(parts, nothing, nothing, nothing, nothing)
    documented = [row[0].strip("`") for row in rows(chapters(page("http.md"))["The authorization server's endpoints"])]
    assert sorted(documented) == sorted([*oauth.Endpoints(parts)(nothing), *pages(nothing)])
