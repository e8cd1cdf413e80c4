"""server.profile: what production refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcpctl import config
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError
from mcpctl.server.listening import Listening

GOOD = """\
server: {profile: production, tls: {cert: c.pem, key: k.pem}}
auth: {max_token_lifetime: 90d}
databases: {shop: {host: /run, user: reader}}
"""


def load(folder: Path, text: str) -> Settings:
    file = folder / "config.yaml"
    file.touch(0o600)
    file.write_text(text)
    return config.load(file, {})


def test_production_takes_a_config_that_is_for_real_and_development_takes_any(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).server.profile == "production"
    proxied = GOOD.replace("tls: {cert: c.pem, key: k.pem}", "trusted_proxies: [192.0.2.1]")
    assert load(tmp_path, proxied).server.trusted_proxies
    assert load(tmp_path, "databases: {shop: {host: /run}}").server.profile == "development"


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        (", tls: {cert: c.pem, key: k.pem}", "", "server.tls"),
        ("max_token_lifetime: 90d", "token_lifetime: 90d", "auth.max_token_lifetime"),
        ("max_token", "credentials_in_url: true, max_token", "auth.credentials_in_url"),
        ("databases:", "audit: {on_failure: warn}\ndatabases:", "audit.on_failure"),
        ("user: reader", "user: reader, allow_privileged_login: true", "databases.shop.allow_privileged_login"),
    ],
)
def test_production_refuses_what_is_only_for_trying(tmp_path: Path, before: str, after: str, key: str) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError) as problem:
        load(tmp_path, GOOD.replace(before, after))
    assert f": {key}: server.profile is production" in problem.value.message
    assert problem.value.message.count("\n") == 1


def test_production_starts_neither_without_tokens_nor_in_clear(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    Listening(found).check()
    with pytest.raises(ConfigError, match="no server without tokens"):
        Listening(found, no_auth=True).check()
    proxied = load(tmp_path, GOOD.replace("tls: {cert: c.pem, key: k.pem}", "trusted_proxies: [192.0.2.1]"))
    Listening(proxied, behind_proxy=True).check()
    with pytest.raises(ConfigError, match="nor without HTTPS"):
        Listening(proxied).check()
