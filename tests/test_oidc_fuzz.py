"""Whatever a stranger or an issuer sends is refused in words, and breaks nothing."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from issuer import AUDIENCE, NOW, P256, coded, jwk, raw, rsa_key
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import UnauthorizedError
from mcpctl.identity import jwks, signed, strict_json
from mcpctl.identity.claims import Outside, outside
from mcpctl.identity.oidc import Issuers

ISSUER = "https://id.example.org"
SECONDS = int(NOW.timestamp())
GOOD: dict[str, Any] = {
    "iss": ISSUER, "sub": "s", "aud": AUDIENCE, "exp": SECONDS + 60, "typ": "Bearer", "azp": "a", "scope": "x",
    "realm_access": {"roles": ["mcp-user"]}, "groups": ["g"], "tenant": "t", "jti": "j", "preferred_username": "n",
}  # fmt: skip
CONFIG = Oidc(
    issuer=ISSUER, audience=(AUDIENCE,), roles_claims=("realm_access.roles", "groups", "*.*"), tenant_claim="tenant",
    just_in_time={"g": "u"},
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FEWER = settings(max_examples=300, deadline=None)


@FEWER
@given(name=st.sampled_from([*GOOD, "nbf", "iat", "cnf", "client_id"]), value=VALUES)
def test_any_value_of_any_claim_is_taken_or_refused(name: str, value: Any) -> None:
    with contextlib.suppress(UnauthorizedError):
        found = outside("id", CONFIG, GOOD | {name: value}, NOW)
        assert isinstance(found, Outside)
        assert (found.issuer, found.tenant is not None) == (ISSUER, True)
        assert set(found.roles) <= {"mcp-user", "mcp-tools", "mcp-developer", "mcp-admin"}


@FEWER
@given(name=st.sampled_from(["kty", "crv", "n", "e", "x", "y", "kid", "alg", "use", "key_ops"]), value=VALUES)
def test_any_value_in_a_key_leaves_it_out_or_in(name: str, value: Any) -> None:
    for private in (rsa_key(), P256):
        jwks.usable({"keys": [jwk(private, "k") | {name: value}]}, ("RS256", "ES256", "EdDSA"))


@FEWER
@given(name=st.sampled_from(["alg", "kid", "typ", "b64", "crit", "cty", "x5t"]), value=VALUES)
def test_any_value_in_a_header_is_taken_or_refused(name: str, value: Any) -> None:
    header = json.dumps({"alg": "RS256", "kid": "k", "typ": "JWT"} | {name: value}).encode()
    key = jwks.Key("RS256", rsa_key().public_key())
    with contextlib.suppress(UnauthorizedError):
        signed.check(signed.read(raw(header, GOOD, rsa_key())), key)


@FEWER
@given(text=st.text() | st.from_regex(r"eyJ[A-Za-z0-9_.-]*", fullmatch=True) | st.binary().map(coded))
def test_any_text_is_read_or_refused(text: str) -> None:
    issuers = Issuers({}, lambda: NOW)
    assert not issuers.takes(text)
    assert issuers.known(text) is None
    with contextlib.suppress(UnauthorizedError):
        signed.read(text)
    with contextlib.suppress(UnauthorizedError):
        signed.read(f"{coded(text.encode('utf-8', 'replace'))}.{coded(b'{}')}.AAAA")


@FEWER
@given(value=st.dictionaries(st.text(), VALUES) | VALUES, data=st.binary())
def test_any_bytes_are_an_object_or_none(value: Any, data: bytes) -> None:
    for one in (data, json.dumps(value).encode()):
        with contextlib.suppress(ValueError):
            assert isinstance(strict_json.read(one), dict)
