"""Claims as Keycloak, Entra ID and Auth0 write them, and what they come to here."""

from __future__ import annotations

from typing import Any

import pytest

from issuer import NOW
from mcpctl.config_oidc import BUILT_IN_ROLES
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import UnauthorizedError
from mcpctl.identity import guests, users
from mcpctl.identity.claims import Outside, at, outside
from mcpctl.policy.roles import BUILT_IN

SECONDS = int(NOW.timestamp())
KEYCLOAK: dict[str, Any] = {
    "exp": SECONDS + 300,
    "iat": SECONDS,
    "auth_time": SECONDS - 5,
    "jti": "onrtac:2f7a6d1e-2a63-4d4b-9c0e-0f6f2d0f6c1d",
    "iss": "https://id.example.org/realms/shop",
    "aud": ["mcpctl", "account"],
    "sub": "8c1f6f0e-7f7b-4d0c-9a53-6a8a2c1f3b11",
    "typ": "Bearer",
    "azp": "mcp-desktop",
    "sid": "9d6a8f6c-2f0d-4f52-9d52-6dcb64c5a0b8",
    "acr": "1",
    "allowed-origins": ["http://localhost:8001"],
    "realm_access": {"roles": ["offline_access", "mcp-tools", "uma_authorization", "default-roles-shop", "analyst"]},
    "resource_access": {
        "mcpctl": {"roles": ["mcp-developer"]},
        "account": {"roles": ["manage-account", "view-profile"]},
    },
    "scope": "openid profile email",
    "email_verified": True,
    "name": "Alice Example",
    "preferred_username": "alice",
    "email": "alice@example.org",
}
"""An access token of Keycloak's, with an audience mapper (Server Administration Guide, "Audience support")."""
ENTRA: dict[str, Any] = {
    "aud": "6e74172b-be56-4843-9ff4-e66a39bb12e3",
    "iss": "https://login.microsoftonline.com/72f988bf-86f1-41af-91ab-2d7cd011db47/v2.0",
    "iat": SECONDS,
    "nbf": SECONDS,
    "exp": SECONDS + 4200,
    "aio": "AXQAi/8IAAAAtAaZLo3ChMif6KOnttRB7eBq4",
    "azp": "6e74172b-be56-4843-9ff4-e66a39bb12e4",
    "azpacr": "0",
    "name": "Abe Lincoln",
    "oid": "690222be-ff1a-4d56-abd1-7e4f7d38e474",
    "preferred_username": "abeli@example.org",
    "rh": "I",
    "roles": ["Shop.Reader"],
    "scp": "access_as_user",
    "sub": "HKZpfaHyWadeOouYlitjrI-KffTm222X5rrV3xDqfKQ",
    "tid": "72f988bf-86f1-41af-91ab-2d7cd011db47",
    "uti": "fqiBqXLPj0eQa82S-IYFAA",
    "ver": "2.0",
}
"""An access token of Entra ID's, version 2.0 ("Access token claims reference")."""
AUTH0: dict[str, Any] = {
    "iss": "https://shop.eu.auth0.com/",
    "sub": "auth0|5f7c8ec7c33c6c004bbafe82",
    "aud": ["https://mcp.example.org", "https://shop.eu.auth0.com/userinfo"],
    "azp": "my_client_id",
    "exp": SECONDS + 86400,
    "iat": SECONDS,
    "scope": "openid profile read:shop",
    "permissions": ["read:shop"],
    "https://mcp.example.org/roles": ["reports"],
}
"""An access token of Auth0's with a custom claim ("Access Token Profiles", "Create Custom Claims")."""


def keycloak(**more: Any) -> Oidc:
    return Oidc(**{"issuer": KEYCLOAK["iss"], "audience": ("mcpctl",), "clients": ("mcp-desktop",)} | more)


def found(config: Oidc, claims: dict[str, Any]) -> Outside:
    return outside("id", config, claims, NOW)


def refusal(config: Oidc, claims: dict[str, Any]) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        found(config, claims)
    return caught.value.message


# -- as they are written --------------------------------------------------------------------------------------------


def test_a_token_of_keycloak_s_gives_the_realm_s_roles_that_are_ours() -> None:
    who = found(keycloak(), KEYCLOAK)
    assert (who.issuer, who.subject, who.shown) == (KEYCLOAK["iss"], KEYCLOAK["sub"], "alice")
    assert who.roles == ("mcp-tools",)
    assert who.token_id == KEYCLOAK["jti"]
    assert "azp" in refusal(keycloak(clients=()), KEYCLOAK) or "several" in refusal(keycloak(clients=()), KEYCLOAK)


def test_the_roles_of_keycloak_s_clients_count_where_the_config_says_so() -> None:
    of_ours = keycloak(roles_claims=("resource_access.mcpctl.roles",))
    assert found(of_ours, KEYCLOAK).roles == ("mcp-developer",)
    of_all = keycloak(roles_claims=("realm_access.roles", "resource_access.*.roles"), roles={"analyst": "reports"})
    assert found(of_all, KEYCLOAK).roles == ("mcp-tools", "reports", "mcp-developer")


def test_keycloak_s_own_id_and_refresh_tokens_are_refused() -> None:
    for kind in ("ID", "Refresh", "Offline"):
        assert "no access token" in refusal(keycloak(), KEYCLOAK | {"typ": kind})


def test_keycloak_s_service_account_is_known_by_its_subject() -> None:
    claims = KEYCLOAK | {"azp": "nightly", "client_id": "nightly", "preferred_username": "service-account-nightly"}
    assert found(keycloak(clients=("nightly",)), claims).subject == KEYCLOAK["sub"]


def test_a_token_of_entra_s_can_be_known_by_the_person_s_own_id() -> None:
    config = Oidc(
        issuer=ENTRA["iss"], audience=(ENTRA["aud"],), roles_claims=("roles",), roles={"Shop.Reader": "mcp-user"}
    )
    who = found(config, ENTRA)
    assert (who.subject, who.roles, who.token_id, who.shown) == (
        ENTRA["sub"],
        ("mcp-user",),
        ENTRA["uti"],
        "abeli@example.org",
    )
    by_person = Oidc(issuer=ENTRA["iss"], audience=(ENTRA["aud"],), user_claim="oid", roles_claims=("roles",))
    assert found(by_person, ENTRA).subject == ENTRA["oid"]
    assert found(by_person, ENTRA).roles == ()
    assert "its oid is missing" in refusal(by_person, {name: ENTRA[name] for name in ENTRA if name != "oid"})


def test_a_token_of_auth0_s_has_its_roles_in_a_claim_that_is_a_url() -> None:
    config = Oidc(
        issuer=AUTH0["iss"], audience=("https://mcp.example.org",), clients=("my_client_id",),
        roles_claims=("https://mcp.example.org/roles", "permissions"),
        roles={"reports": "mcp-user", "read:shop": "mcp-tools"},
    )  # fmt: skip
    assert found(config, AUTH0).roles == ("mcp-user", "mcp-tools")


# -- roles ----------------------------------------------------------------------------------------------------------


def test_the_config_knows_the_built_in_roles() -> None:
    assert sorted(BUILT_IN_ROLES) == sorted(BUILT_IN)


@pytest.mark.parametrize("role", ["MCP-ADMIN", "mcp-admin ", "mcp_admin", "/mcp-admin", "admin", "*", "mcp-adm\u0131n"])
def test_a_role_that_is_only_like_one_of_ours_gives_nothing(role: str) -> None:
    assert found(keycloak(), KEYCLOAK | {"realm_access": {"roles": [role]}}).roles == ()


def test_a_role_of_the_config_is_given_through_the_map_alone() -> None:
    claims = KEYCLOAK | {"realm_access": {"roles": ["reports"]}}
    assert found(keycloak(), claims).roles == ()
    assert found(keycloak(roles={"staff": "reports"}), claims).roles == ()
    assert found(keycloak(roles={"reports": "reports"}), claims).roles == ("reports",)


@pytest.mark.parametrize("roles", [[1], [["mcp-admin"]], {"mcp-admin": True}, 1, True, [None]], ids=repr)
def test_roles_that_are_no_texts_are_refused(roles: Any) -> None:
    assert "is no text and no list" in refusal(keycloak(), KEYCLOAK | {"realm_access": {"roles": roles}})


@pytest.mark.parametrize(
    "value", [None, [], "", {}, {"roles": None}, {"roles": []}, {"other": ["mcp-admin"]}], ids=repr
)
def test_a_token_without_roles_may_do_nothing(value: Any) -> None:
    assert found(keycloak(), KEYCLOAK | {"realm_access": value}).roles == ()


def test_a_path_leads_through_objects_alone() -> None:
    claims = {"a": {"b": {"x": 1, "y": 2}, "c": {"x": 3}, "d": [{"x": 4}]}, "p://q.r": 5, "p://q": {"r": 6}, "a.b": 7}
    assert list(at(claims, "a.b.x")) == [1]
    assert list(at(claims, "a.*.x")) == [1, 3]
    assert list(at(claims, "p://q.r")) == [5]
    assert list(at(claims, "a.d.x")) == list(at(claims, "a.b.x.y")) == list(at(claims, "z")) == []


# -- tenant, name, guests -------------------------------------------------------------------------------------------


def test_where_tokens_name_the_tenant_each_has_to() -> None:
    config = keycloak(tenant_claim="organization.tenant")
    assert found(config, KEYCLOAK | {"organization": {"tenant": "acme"}}).tenant == "acme"
    assert found(keycloak(), KEYCLOAK | {"organization": {"tenant": "acme"}}).tenant is None
    for value in (None, {}, {"tenant": ["acme"]}, {"tenant": "Acme"}, {"tenant": ""}, {"tenant": "a/../b"}):
        assert "names no tenant" in refusal(config, KEYCLOAK | {"organization": value})


@pytest.mark.parametrize(
    ("said", "shown"),
    [("Al\x1b[2Jice\r\n\u202e", "Al[2Jice"), ("\u00c9lo\u00efse \u4e2d", "\u00c9lo\u00efse \u4e2d"),
     ("x" * 500, "x" * 64), (" \x00 ", None), (17, None), (None, None), ("\ud800a", "a")],
)  # fmt: skip
def test_the_name_that_people_see_is_one_clean_line(said: Any, shown: str | None) -> None:
    assert found(keycloak(), KEYCLOAK | {"preferred_username": said}).shown == shown


def test_a_person_without_a_user_is_let_in_as_the_first_of_the_config_whose_role_they_hold() -> None:
    people = {"analyst": "shop-reader", "mcp-tools": "shop-writer"}
    who = guests.guest(found(keycloak(just_in_time=people), KEYCLOAK))
    assert who == guests.Guest(guests.name_of(KEYCLOAK["iss"], KEYCLOAK["sub"]), ("mcp-tools",), "shop-reader")
    assert guests.guest(found(keycloak(), KEYCLOAK)) is None
    assert guests.guest(found(keycloak(just_in_time={"nobody": "shop-reader"}), KEYCLOAK)) is None


def test_a_guest_s_name_stays_and_is_nobody_else_s() -> None:
    name = guests.name_of("https://id.example.org", "a")
    assert name == "x-" + name[2:] == guests.name_of("https://id.example.org", "a")
    assert users.OUTSIDE.fullmatch(name)
    assert users.NAME.fullmatch(name)
    others = {guests.name_of(*one) for one in (("https://id.example.org", "b"), ("https://id.example.or", "ga"))}
    assert name not in others
    assert len(others) == 2


def test_a_guest_s_name_is_the_one_that_it_always_was() -> None:
    assert guests.name_of("https://id.example.org", "a") == "x-htfofgacvvtqh44dqdka"
