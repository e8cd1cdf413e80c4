"""auth.oidc: what is no config is said, all of it, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcpctl import config
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import ConfigError

GOOD = "issuer: https://id.example.org/realms/shop, audience: mcpctl"


def load(folder: Path, oidc: str, roles: str = "", **environ: str) -> dict[str, Oidc]:
    file = folder / "config.yaml"
    file.touch(0o600)
    file.write_text(f"databases: {{shop: {{host: localhost}}}}\nauth:\n  oidc:\n{oidc}\n{roles}", encoding="utf-8")
    return config.load(file, environ).auth.oidc


def fault(folder: Path, oidc: str, roles: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, oidc, roles, **environ)
    assert caught.value.exit_code == 3
    return caught.value.message


def test_an_issuer_needs_no_more_than_its_url_and_our_audience(tmp_path: Path) -> None:
    found = load(tmp_path, f"    keycloak: {{{GOOD}}}")["keycloak"]
    assert (found.issuer, found.audience) == ("https://id.example.org/realms/shop", ("mcpctl",))
    assert (found.algorithms, found.jwks_cache, found.clock_skew) == (("RS256", "ES256", "EdDSA"), 3600.0, 30.0)
    assert found.just_in_time == {}


def test_roles_are_mapped_by_any_name_that_an_issuer_has(tmp_path: Path) -> None:
    text = (
        f"    keycloak:\n      {GOOD.replace(', ', chr(10) + '      ')}\n      roles:\n        /staff/Ä ä: mcp-tools\n"
    )
    text += '        "1234": reports\n      just_in_time: {/staff/dba: shop-admin}'
    found = load(tmp_path, text, "  roles: {reports: {permissions: ['tools:whoami']}}")["keycloak"]
    assert found.roles == {"/staff/Ä ä": "mcp-tools", "1234": "reports"}
    assert found.just_in_time == {"/staff/dba": "shop-admin"}


def test_roles_can_be_mapped_by_a_variable(tmp_path: Path) -> None:
    text = f"    keycloak: {{{GOOD}}}"
    variable = "MCPCTL_AUTH__OIDC__KEYCLOAK__ROLES"
    assert load(tmp_path, text, **{variable: "{staff: mcp-user}"})["keycloak"].roles == {"staff": "mcp-user"}
    for value in ("{staff: mcp-user", "staff", "[staff]", "3"):
        assert f"environment {variable}: auth.oidc.keycloak.roles: takes texts" in fault(
            tmp_path, text, **{variable: value}
        )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("isuer: x", "isuer: there is no such key; did you mean issuer?"),
        ("algorithms: [none]", "algorithms: takes a list of RS256, ES256, EdDSA"),
        ("algorithms: [RS256, HS256]", "algorithms: takes a list of RS256, ES256, EdDSA"),
        ("algorithms: []", "algorithms: takes a list of RS256, ES256, EdDSA"),
        ("user_claim: email", "user_claim: takes one of sub, oid, uid"),
        ("user_claim: preferred_username", "user_claim: takes one of sub, oid, uid"),
        ("roles_claims: realm_access..roles", "roles_claims: takes a claim's name"),
        ("clock_skew: 6m", "clock_skew: takes a duration of 5m at most"),
        ("jwks_cache: 2s", "jwks_cache: takes a duration from 1m to 24h"),
        ("roles: {staff: mcp-amdin}", "roles: staff: there is no role mcp-amdin"),
        ("roles: {mcp-user: mcp-admin}", "roles: mcp-user: is ours by its own name"),
        ("roles: {staff: [mcp-user]}", "roles: takes a text"),
        ("roles: [staff]", "roles: takes texts by texts"),
        ("just_in_time: true", "just_in_time: takes texts by texts"),
        ("introspection: {client_id: mcpctl}", "introspection: client_id and client_secret_file go together"),
        ("introspection: {cache: 5m}", "introspection.cache: takes a duration of 60s at most"),
        ("introspection: {tokens: some}", "introspection.tokens: takes one of opaque, jwt, all"),
        ("introspection: {client_secret: x}", "introspection.client_secret: there is no such key"),
    ],
)
def test_what_is_wrong_with_an_issuer_is_said(tmp_path: Path, more: str, told: str) -> None:
    assert f"config.yaml:4: auth.oidc.id.{told}" in fault(tmp_path, f"    id: {{{GOOD}, {more}}}")


@pytest.mark.parametrize(
    ("issuer", "told"),
    [
        ("http://id.example.org", "needs https"),
        ("http://127.0.0.1:8081/realms/shop", "allow_http_loopback"),
        ("id.example.org", "takes a URL"),
        ("ftp://id.example.org", "takes a URL"),
        ("https://user:secret@id.example.org", "takes a URL"),
        ("https://id.example.org/?x=1", "takes a URL"),
        ("https://id.example.org/#x", "takes a URL"),
        ("https://id.example.org/a/../b", "takes a URL"),
        ("https://", "takes a URL"),
        ("[a]", "takes a text"),
    ],
)
def test_an_issuer_is_an_https_url(tmp_path: Path, issuer: str, told: str) -> None:
    text = issuer if issuer.startswith("[") else f'"{issuer}"'
    assert told in fault(tmp_path, f"    id: {{issuer: {text}, audience: mcpctl}}")


def test_an_issuer_on_this_machine_may_do_without_tls_where_that_is_said(tmp_path: Path) -> None:
    text = "    id: {issuer: 'http://%s:8081', audience: mcpctl, allow_http_loopback: true}"
    assert load(tmp_path, text % "127.0.0.1")["id"].allow_http_loopback
    assert "needs https" in fault(tmp_path, text % "10.0.0.1")


def test_an_issuer_without_a_url_or_an_audience_is_refused(tmp_path: Path) -> None:
    told = fault(
        tmp_path, "    a: {audience: mcpctl}\n    b: {issuer: 'https://id.example.org', audience: []}\n    c: {}"
    )
    assert "auth.oidc.a: needs issuer" in told
    assert "auth.oidc.b: needs audience" in told
    assert "auth.oidc.c: needs issuer" in told


def test_one_issuer_stands_there_once_and_one_alone_is_asked_about_opaque_tokens(tmp_path: Path) -> None:
    asked = "introspection: {client_id: mcpctl, client_secret_file: s%s}"
    other = "issuer: https://other.example.org, audience: mcpctl"
    told = fault(tmp_path, f"    a: {{{GOOD}, {asked % ''}}}\n    b: {{{other}, {asked % ''}}}\n    c: {{{GOOD}}}")
    assert "auth.oidc.b.introspection.tokens: opaque tokens go to a" in told
    assert "auth.oidc.c.issuer: is that of auth.oidc.a, too" in told
    assert load(tmp_path, f"    a: {{{GOOD}, {asked % ''}}}\n    b: {{{other}, {asked % ', tokens: jwt'}}}")


def test_files_are_looked_for_beside_the_config(tmp_path: Path) -> None:
    more: Any = "ca_file: ca.pem, introspection: {client_id: x, client_secret_file: secret}"
    found = load(tmp_path, f"    id: {{{GOOD}, {more}}}")["id"]
    assert found.ca_file == tmp_path / "ca.pem"
    assert found.introspection.client_secret_file == tmp_path / "secret"
