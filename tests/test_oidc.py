"""Tokens of an outside issuer: which are taken, for whom, and which are not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from issuer import (
    AUDIENCE,
    ED25519,
    NOW,
    P256,
    Clock,
    Issuer,
    coded,
    jwk,
    raw,
    refusal,
    rsa_key,
    running,
    signed,
    use,
    verify,
)
from mcpctl.errors import UnauthorizedError
from mcpctl.identity.claims import Outside
from mcpctl.identity.oidc import Issuers

SECONDS = int(NOW.timestamp())


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running() as found:
        yield found


@pytest.fixture
def clock() -> Clock:
    return Clock()


# -- what is taken --------------------------------------------------------------------------------------------------


def test_a_good_token_stands_for_its_issuer_and_subject_with_roles_of_ours_alone(issuer: Issuer, clock: Clock) -> None:
    found = verify(clock, issuer.config(), issuer.token())
    assert found == Outside(
        source="shop",
        issuer=issuer.url,
        subject="5f0c-alice",
        tenant=None,
        roles=("mcp-user",),
        as_user=None,
        expires_at=NOW + timedelta(seconds=330),
        token_id="id-1",
        shown="alice",
    )
    with pytest.raises(FrozenInstanceError):
        found.subject = "somebody"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [(rsa_key(), "RS256"), (P256, "ES256"), (ED25519, "EdDSA")],
    ids=["RSA", "P-256", "Ed25519"],
)
def test_a_token_may_be_signed_in_each_of_the_three_ways(
    issuer: Issuer, clock: Clock, private: Any, algorithm: str
) -> None:
    issuer.publish(jwk(private, "k"))
    token = signed(issuer.claims(), private, "k", algorithm)
    assert verify(clock, issuer.config(), token).subject == "5f0c-alice"
    others = tuple(one for one in ("RS256", "ES256", "EdDSA") if one != algorithm)
    assert "alg is none of" in refusal(clock, issuer.config(algorithms=others), token)


@pytest.mark.parametrize("kind", ["JWT", "at+jwt", "AT+JWT", "application/at+jwt"])
def test_a_token_may_say_that_it_is_an_access_token(issuer: Issuer, clock: Clock, kind: str) -> None:
    token = signed(issuer.claims(), issuer.private, typ=kind)
    assert verify(clock, issuer.config(), token).subject == "5f0c-alice"


def test_each_of_several_issuers_answers_for_its_own_tokens_alone(issuer: Issuer, clock: Clock) -> None:
    with running() as other:
        other.private = rsa_key("other")
        other.publish(jwk(other.private, "one"))
        config = {"shop": issuer.config(), "other": other.config()}
        assert use(clock, config, lambda issuers: issuers.verify(other.token())).source == "other"
        forged = signed(other.claims(iss=issuer.url), other.private)
        with pytest.raises(UnauthorizedError, match="shop: its signature is wrong"):
            use(clock, config, lambda issuers: issuers.verify(forged))


def test_our_own_tokens_and_what_no_issuer_is_asked_about_are_for_others(issuer: Issuer, clock: Clock) -> None:
    issuers = Issuers({"shop": issuer.config()}, clock)
    assert issuers.takes(issuer.token())
    assert not issuers.takes("mcp_1hrspjl1_" + "a" * 43 + "_" + "b" * 6)
    assert not issuers.takes("an-opaque-token-of-theirs")
    assert issuers.takes("eyJ" + issuer.token()[3:])
    assert not Issuers({}, clock).takes(issuer.token())
    assert issuer.asked == []


# -- what is not ----------------------------------------------------------------------------------------------------


def public_pem(private: Any) -> bytes:
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    found: bytes = private.public_key().public_bytes(serialization.Encoding.PEM, kind)
    return found


def hs256(issuer: Issuer, key: bytes) -> str:
    """Signed with what everybody knows, as if it were a secret."""
    header = {"alg": "HS256", "typ": "JWT", "kid": "one"}
    text = ".".join(coded(json.dumps(one).encode()) for one in (header, issuer.claims()))
    return f"{text}.{coded(hmac.digest(key, text.encode(), hashlib.sha256))}"


def test_a_token_that_happens_to_spell_what_begins_one_of_ours_is_its_issuers(issuer: Issuer, clock: Clock) -> None:
    """A signature spells anything, and about one in 20,000 of RSA's spells that."""
    header = {"alg": "RS256", "kid": "one"}
    spelt = [issuer.claims(jti="x" * more, name="R*fqo\u0279)<::?") for more in range(1, 5)]
    made = [raw(header, json.dumps(one, ensure_ascii=False).encode(), issuer.private) for one in spelt]
    made = [one for one in made if "mcW_JuSk8Ojo_" in one]
    assert made
    assert verify(clock, issuer.config(), made[0]).subject == "5f0c-alice"


def test_a_token_without_a_signature_is_refused_whatever_it_calls_that(issuer: Issuer, clock: Clock) -> None:
    body = coded(json.dumps(issuer.claims()).encode())
    for algorithm in ("none", "None", "NONE", "nOnE"):
        head = coded(json.dumps({"alg": algorithm, "kid": "one"}).encode())
        assert "not signed" in refusal(clock, issuer.config(), f"{head}.{body}.")
        assert "not signed" in refusal(clock, issuer.config(), f"{head}.{body}.AAAA")
    head, body, _ = issuer.token().split(".")
    assert "not signed" in refusal(clock, issuer.config(), f"{head}.{body}.")


def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(issuer: Issuer, clock: Clock) -> None:
    published = json.dumps(jwk(issuer.private, "one")).encode()
    for key in (public_pem(issuer.private), published, b""):
        assert "its alg is none of" in refusal(clock, issuer.config(), hs256(issuer, key))


def test_a_token_that_was_changed_or_signed_by_another_is_refused(issuer: Issuer, clock: Clock) -> None:
    head, body, signature = issuer.token().split(".")
    other = coded(json.dumps(issuer.claims(sub="somebody")).encode())
    assert "signature is wrong" in refusal(clock, issuer.config(), f"{head}.{other}.{signature}")
    assert "signature is wrong" in refusal(clock, issuer.config(), signed(issuer.claims(), rsa_key("thief")))
    for wrong in (b"x", b"x" * 256, b"x" * 4000):
        assert "signature is wrong" in refusal(clock, issuer.config(), f"{head}.{body}.{coded(wrong)}")


def test_a_token_s_algorithm_has_to_be_that_of_its_key(issuer: Issuer, clock: Clock) -> None:
    token = signed(issuer.claims(), P256, "one", "ES256")
    assert "its key is for RS256" in refusal(clock, issuer.config(), token)


@pytest.mark.parametrize("name", ["crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "enc"])
def test_a_token_cannot_bring_its_own_key_or_reading(issuer: Issuer, clock: Clock, name: str) -> None:
    thief = rsa_key("thief")
    value = {"jwk": jwk(thief, "one"), "crit": ["exp"], "b64": True}.get(name, "http://127.0.0.1:1/keys")
    token = raw({"alg": "RS256", "kid": "one", name: value}, issuer.claims(), thief)
    assert f"its header has {name}" in refusal(clock, issuer.config(), token)
    assert issuer.asked == []


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/etc/passwd",
        "one' OR '1'='1",
        "one; DROP TABLE keys",
        "one\x00",
        "ONE",
        "one ",
        "\ud800",
    ],
)
def test_a_key_id_is_looked_up_and_nothing_else(issuer: Issuer, clock: Clock, kid: str) -> None:
    token = raw({"alg": "RS256", "kid": kid}, issuer.claims(), issuer.private)
    assert "no key of its key id" in refusal(clock, issuer.config(), token)


@pytest.mark.parametrize("kid", [None, "", 1, ["one"], {"one": 1}, "x" * 256])
def test_a_key_id_has_to_be_a_short_text(issuer: Issuer, clock: Clock, kid: Any) -> None:
    header = {"alg": "RS256", **({"kid": kid} if kid is not None else {})}
    assert "names no key" in refusal(clock, issuer.config(), raw(header, issuer.claims(), issuer.private))


@pytest.mark.parametrize("kind", ["logout+jwt", "dpop+jwt", "JWE", "", 1, None])
def test_another_kind_of_token_is_refused_by_its_header(issuer: Issuer, clock: Clock, kind: Any) -> None:
    token = raw({"alg": "RS256", "kid": "one", "typ": kind}, issuer.claims(), issuer.private)
    assert "no access token" in refusal(clock, issuer.config(), token)


@pytest.mark.parametrize(
    "more",
    [{"typ": "ID"}, {"typ": "Refresh"}, {"typ": "Offline"}, {"typ": "DPoP"}, {"typ": 1}, {"at_hash": "x"},
     {"events": {}}, {"cnf": {"jkt": "x"}}, {"token_type": "DPoP"}],
    ids=str,
)  # fmt: skip
def test_an_id_token_and_other_tokens_of_the_same_issuer_are_refused(
    issuer: Issuer, clock: Clock, more: dict[str, Any]
) -> None:
    assert "access token" in (why := refusal(clock, issuer.config(), issuer.token(**more))) or "bound to a key" in why


def test_a_token_that_could_as_well_be_an_id_token_is_refused(issuer: Issuer, clock: Clock) -> None:
    plain = issuer.claims(typ=None, azp="web")
    assert "nothing says" in refusal(clock, issuer.config(), signed(plain, issuer.private))
    assert verify(clock, issuer.config(), signed(plain, issuer.private, typ="at+jwt")).subject
    for name in ("scope", "scp", "client_id", "cid", "azpacr", "gty"):
        assert verify(clock, issuer.config(), signed(plain | {name: "x"}, issuer.private)).subject


def test_a_token_that_is_too_long_or_has_no_form_is_refused(issuer: Issuer, clock: Clock) -> None:
    token = issuer.token(filler="x" * 17000)
    for text in (token, "", "a.b", "a.b.c.d", "eyJ.eyJ.###", issuer.token() + "=", " " + issuer.token()):
        refusal(clock, issuer.config(), text)
    assert issuer.asked == []


def good(issuer: Issuer, text: str) -> bytes:
    """The claims with `text` put in before their end."""
    return json.dumps(issuer.claims()).encode()[:-1] + text.encode() + b"}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (', "sub": "admin"', "a key twice"),
        (', "x": {"a": 1, "a": 2}', "a key twice"),
        (', "x": NaN', "no number of JSON"),
        (', "x": -Infinity', "no number of JSON"),
        (', "x": 1e999', "too large"),
        (', "x": ' + "9" * 5000, "too long"),
        (', "x": ' + "[" * 21 + "]" * 21, "deeper than 20"),
        (', "x": ' + "[" * 6000, "deeper than 20"),
        (", ", "no JSON"),
    ],
)
def test_claims_that_can_be_read_in_two_ways_are_refused(issuer: Issuer, clock: Clock, text: str, why: str) -> None:
    token = raw({"alg": "RS256", "kid": "one"}, good(issuer, text), issuer.private)
    assert why in refusal(clock, issuer.config(), token)
    assert issuer.asked == []


def test_brackets_within_a_text_are_no_depth(issuer: Issuer, clock: Clock) -> None:
    assert verify(clock, issuer.config(), issuer.token(x='["{' * 30)).subject == "5f0c-alice"


@pytest.mark.parametrize("claims", [b"[]", b"1", b'"x"', b"null", b"\xff\xfe", b""])
def test_claims_that_are_no_object_are_refused(issuer: Issuer, clock: Clock, claims: bytes) -> None:
    token = raw({"alg": "RS256", "kid": "one"}, claims or b" ", issuer.private)
    assert "its claims " in refusal(clock, issuer.config(), token)


def test_a_token_written_with_other_spare_bits_is_another_text_and_refused(issuer: Issuer, clock: Clock) -> None:
    texts = (issuer.token(x="x" * length).split(".") for length in range(3))
    head, body, signature = next(parts for parts in texts if len(parts[1]) % 4 == 2)
    spare = body[:-1] + chr(ord(body[-1]) + 1)
    assert base64.urlsafe_b64decode(body + "==") == base64.urlsafe_b64decode(spare + "==")
    assert "is not in base64url" in refusal(clock, issuer.config(), f"{head}.{spare}.{signature}")


# -- time -----------------------------------------------------------------------------------------------------------


def test_a_token_ends_with_its_last_second_and_the_skew(issuer: Issuer, clock: Clock) -> None:
    token = issuer.token(exp=SECONDS + 60)
    clock.pass_(60 + 29)
    assert verify(clock, issuer.config(), token).expires_at == clock.at + timedelta(seconds=1)
    clock.pass_(1)
    assert "expired" in refusal(clock, issuer.config(), token)
    assert "expired" in refusal(Clock(), issuer.config(clock_skew=0.0), issuer.token(exp=SECONDS - 1))
    assert "expired" in refusal(Clock(), issuer.config(clock_skew=0.0), issuer.token(exp=SECONDS))


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_a_token_from_the_future_is_refused_beyond_the_skew(issuer: Issuer, clock: Clock, name: str) -> None:
    assert verify(clock, issuer.config(), issuer.token(**{name: SECONDS + 30})).subject
    assert "future" in refusal(clock, issuer.config(), issuer.token(**{name: SECONDS + 31}))


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", [str(SECONDS + 300), -1, 10**15, True, [1], {}, 253402300800], ids=repr)
def test_times_are_numbers_of_seconds_that_there_are(issuer: Issuer, clock: Clock, name: str, value: Any) -> None:
    assert f"its {name} is no time" in refusal(clock, issuer.config(), issuer.token(**{name: value}))


def test_a_time_may_have_a_fraction_and_lie_at_the_end_of_all_days(issuer: Issuer, clock: Clock) -> None:
    end = verify(clock, issuer.config(), issuer.token(exp=SECONDS + 300.5)).expires_at
    assert end == NOW + timedelta(seconds=330.5)
    assert verify(clock, issuer.config(), issuer.token(exp=253402300799)).expires_at.year == 9999


# -- whose it is, and for whom --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp"])
def test_a_token_without_what_it_needs_is_refused(issuer: Issuer, clock: Clock, name: str) -> None:
    why = refusal(clock, issuer.config(), issuer.token(**{name: None}))
    assert name in why


@pytest.mark.parametrize("value", ["", "x" * 256, "a\nb", "a\x1b[2J", "ünïcode", 17, ["a"]], ids=repr)
def test_a_subject_is_a_short_text_in_ascii(issuer: Issuer, clock: Clock, value: Any) -> None:
    assert "its sub is missing" in refusal(clock, issuer.config(), issuer.token(sub=value))
    assert "its jti is" in refusal(clock, issuer.config(), issuer.token(jti=value))


def test_an_issuer_is_compared_to_the_letter(issuer: Issuer, clock: Clock) -> None:
    for other in (issuer.url + "/", issuer.url.upper(), issuer.url[:-1], ["x"], 1, {"a": 1}):
        assert "iss" in refusal(clock, issuer.config(), issuer.token(iss=other))
    assert issuer.asked == []


@pytest.mark.parametrize("aud", ["https://other.example.org", AUDIENCE + "/", AUDIENCE[:-1], [], [1], {"a": 1}, 1, ""])
def test_a_token_for_somebody_else_is_refused(issuer: Issuer, clock: Clock, aud: Any) -> None:
    assert "aud" in refusal(clock, issuer.config(), issuer.token(aud=aud))


def test_a_token_for_several_needs_a_client_that_the_config_names(issuer: Issuer, clock: Clock) -> None:
    both = [AUDIENCE, "account"]
    assert "several audiences" in refusal(clock, issuer.config(), issuer.token(aud=both, azp="desktop"))
    known = issuer.config(clients=("desktop", "web"))
    assert verify(clock, known, issuer.token(aud=both, azp="web")).subject
    for more in ({"azp": "other"}, {"azp": 1}, {"azp": ["web"]}, {}):
        assert "azp" in refusal(clock, known, issuer.token(aud=both, **more))
    assert "azp" in refusal(clock, known, issuer.token(azp="other"))
    assert verify(clock, issuer.config(), issuer.token(aud=[AUDIENCE, AUDIENCE])).subject
    assert verify(clock, known, issuer.token(client_id="web")).subject
    assert "azp" in refusal(clock, known, issuer.token(client_id="web", azp="other"))
