"""An issuer's metadata and keys: fetched as rarely and as strictly as they have to be."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from issuer import DISCOVERY, ED25519, P256, Answer, Clock, Issuer, as_json, ca_file, jwk, rsa_key, running, signed
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import ConfigError, UnauthorizedError, UnavailableError
from mcpctl.identity import fetching, jwks
from mcpctl.identity.fetching import LIMIT, Fetcher
from mcpctl.identity.oidc import Issuers

HOUR = 3600.0
ALL = ("RS256", "ES256", "EdDSA")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running() as found:
        yield found


class Asking:
    """One process's view of one issuer, over a time that the test sets."""

    def __init__(self, config: Oidc, seconds: float = 5.0) -> None:
        self.clock = Clock()
        self.runner = asyncio.Runner()
        self.issuers = Issuers({"shop": config}, self.clock, seconds=seconds)

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.issuers.close())
        self.runner.close()

    def verify(self, token: str) -> str:
        self.issuers.forget()
        return self.runner.run(self.issuers.verify(token)).subject

    def fails(self, token: str, kind: type[Exception] = UnavailableError) -> str:
        with pytest.raises(kind) as caught:
            self.verify(token)
        return str(caught.value)


def later(issuer: Issuer, clock: Clock, **more: Any) -> str:
    """A token that is good at that time."""
    return issuer.token(exp=int(clock.at.timestamp()) + 300, iat=None, **more)


# -- how often ------------------------------------------------------------------------------------------------------


def test_keys_are_fetched_once_an_hour_and_not_before_they_are_needed(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        assert issuer.asked == []
        for _ in range(3):
            asking.verify(issuer.token())
        assert issuer.asked == [DISCOVERY, "/keys"]
        asking.clock.pass_(HOUR - 1)
        asking.verify(later(issuer, asking.clock))
        assert issuer.count("/keys") == 1
        asking.clock.pass_(1)
        asking.verify(later(issuer, asking.clock))
        assert issuer.count("/keys") == 2


def test_a_new_key_is_fetched_when_a_token_names_it(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        asking.verify(issuer.token())
        asking.clock.pass_(31)
        issuer.publish(jwk(P256, "two"))
        assert asking.verify(signed(issuer.claims(), P256, "two", "ES256"))
        assert "no key of its key id" in asking.fails(issuer.token(), UnauthorizedError)  # the old one is withdrawn


def test_made_up_key_ids_reach_the_issuer_once_in_thirty_seconds(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        asking.verify(issuer.token())
        asking.clock.pass_(30)
        for number in range(50):
            asking.fails(signed(issuer.claims(), issuer.private, f"made-up-{number}"), UnauthorizedError)
        assert issuer.count("/keys") == 2
        asking.clock.pass_(30)
        asking.fails(signed(issuer.claims(), issuer.private, "made-up"), UnauthorizedError)
        assert issuer.count("/keys") == 3


def test_callers_at_the_same_time_share_one_fetch_and_one_that_leaves_ends_it_for_nobody(issuer: Issuer) -> None:
    issuer.answers["/keys"].gate = gate = threading.Event()

    async def work(issuers: Issuers) -> None:
        token = issuer.token()
        callers = [asyncio.ensure_future(issuers.verify(token)) for _ in range(20)]
        while "/keys" not in issuer.asked:
            await asyncio.sleep(0.005)
        callers[0].cancel()
        assert not any(one.done() for one in callers[1:])
        gate.set()
        found = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert {getattr(one, "subject", None) for one in found[1:]} == {"5f0c-alice"}

    with Asking(issuer.config()) as asking:
        asking.runner.run(work(asking.issuers))
    assert issuer.asked == [DISCOVERY, "/keys"]


# -- when the issuer is down ----------------------------------------------------------------------------------------


def test_an_issuer_that_is_down_is_no_bad_token_and_asked_again_after_thirty_seconds(issuer: Issuer) -> None:
    good = issuer.answers.pop(DISCOVERY)
    with Asking(issuer.config()) as asking:
        for _ in range(5):
            assert "cannot reach the issuer" in asking.fails(issuer.token())
        tried = len(issuer.asked)
        assert tried == 2  # both of the places where metadata can be
        issuer.answers[DISCOVERY] = good
        asking.clock.pass_(29)
        asking.fails(issuer.token())
        asking.clock.pass_(1)
        assert asking.verify(issuer.token())


def test_an_error_that_is_told_many_times_keeps_nothing_of_the_times_before(issuer: Issuer) -> None:
    del issuer.answers[DISCOVERY]
    with Asking(issuer.config()) as asking:
        depths = []
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                asking.verify(issuer.token())
            depths.append(len(caught.traceback))
    assert depths[1] == depths[2]


def test_keys_outlive_their_time_by_an_hour_while_the_issuer_is_down_and_no_longer(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        asking.verify(issuer.token())
        good = issuer.answers.pop("/keys")
        asking.clock.pass_(HOUR)
        assert asking.verify(later(issuer, asking.clock))
        assert issuer.count("/keys") == 2
        asking.verify(later(issuer, asking.clock))
        assert issuer.count("/keys") == 2
        unknown = signed(issuer.claims(exp=None), rsa_key("new"), "new")
        assert "cannot reach" in asking.fails(unknown)  # it may be good: we cannot know
        asking.clock.pass_(HOUR - 1)
        assert asking.verify(later(issuer, asking.clock))
        asking.clock.pass_(1)
        assert "cannot reach" in asking.fails(later(issuer, asking.clock))
        asking.clock.pass_(30)
        issuer.answers["/keys"] = good
        assert asking.verify(later(issuer, asking.clock))


def test_keys_from_a_future_that_a_clock_was_set_back_from_do_not_last_for_ever(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        asking.clock.pass_(10 * HOUR)
        asking.verify(later(issuer, asking.clock))
        asking.clock.pass_(-10 * HOUR)
        del issuer.answers["/keys"]
        assert "cannot reach" in asking.fails(issuer.token())


def test_a_caller_hardly_waits_for_an_issuer_that_hangs_while_its_old_keys_hold(issuer: Issuer) -> None:
    with Asking(issuer.config(), seconds=30) as asking:
        asking.verify(issuer.token())
        asking.clock.pass_(HOUR)
        issuer.answers["/keys"].gate = gate = threading.Event()
        assert asking.verify(later(issuer, asking.clock))
        assert not gate.is_set()


# -- what it answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [DISCOVERY, "/keys"])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(b"{}", 404), "404"),
        (Answer(b"{}", 500), "status 500"),
        (Answer(b"", 302, {"Location": "/elsewhere"}), "a redirect, which is not followed"),
        (Answer(b" " * (LIMIT + 1)), f"longer than {LIMIT} bytes"),
        (Answer(b"<html>"), "is no JSON"),
        (Answer(b"[]"), "is no JSON object"),
        (Answer(b'{"keys": [], "keys": []}'), "a key twice"),
        (Answer(b"{}", 200, {"Content-Type": "text/html"}), "not said to be JSON"),
        (Answer(b"{}", 200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}), "is packed"),
        (Answer(b"{}"), ""),
    ],
    ids=["gone", "broken", "redirect", "huge", "html", "list", "twice", "type", "packed", "empty"],
)
def test_a_bad_answer_is_a_fault_of_the_issuer_s_and_said(issuer: Issuer, path: str, answer: Answer, why: str) -> None:
    issuer.answers[path] = answer
    issuer.answers["/elsewhere"] = as_json({"keys": []})
    with Asking(issuer.config()) as asking:
        told = asking.fails(issuer.token())
    assert told.startswith(f"cannot reach the issuer {issuer.url}: ")
    assert why in told
    assert "/elsewhere" not in issuer.asked


@pytest.mark.parametrize("how", ["silent", "dripping"])
def test_an_issuer_that_is_slow_is_given_up(issuer: Issuer, how: str) -> None:
    answer = issuer.answers["/keys"]
    answer.gate, answer.drip = (threading.Event(), None) if how == "silent" else (None, threading.Event())
    with Asking(issuer.config(), seconds=0.3) as asking:
        assert "no answer within 0.3 s" in asking.fails(issuer.token())


def test_metadata_has_to_name_its_issuer_to_the_letter(issuer: Issuer) -> None:
    for other in (issuer.url + "/", issuer.url.upper(), "https://other.example.org", None, [issuer.url]):
        issuer.answers[DISCOVERY] = as_json(issuer.metadata(issuer=other))
        with Asking(issuer.config()) as asking:
            assert "names another issuer" in asking.fails(issuer.token())
    assert "/keys" not in issuer.asked


@pytest.mark.parametrize(
    "uri",
    ["http://id.example.org/keys", "file:///etc/passwd", "https://u:p@127.0.0.1/keys", "//x", "http://[", "", None, 1],
)
def test_keys_are_fetched_over_https_alone(issuer: Issuer, uri: Any) -> None:
    issuer.answers[DISCOVERY] = as_json(issuer.metadata(jwks_uri=uri))
    with Asking(issuer.config()) as asking:
        told = asking.fails(issuer.token())
    assert any(why in told for why in ("is not https", "no jwks_uri", "address that is none"))


def test_an_issuer_on_loopback_needs_leave_to_be_asked_without_tls(issuer: Issuer) -> None:
    with Asking(issuer.config(allow_http_loopback=False)) as asking:
        assert "is not https" in asking.fails(issuer.token())
    assert issuer.asked == []


def test_metadata_may_stand_where_oauth_alone_has_it(issuer: Issuer) -> None:
    issuer.answers["/.well-known/oauth-authorization-server"] = issuer.answers.pop(DISCOVERY)
    with Asking(issuer.config()) as asking:
        assert asking.verify(issuer.token())


def test_metadata_of_an_issuer_with_a_path_is_looked_for_in_the_two_places_that_there_are() -> None:
    assert jwks.well_known("https://id.example.org/realms/shop") == (
        "https://id.example.org/realms/shop/.well-known/openid-configuration",
        "https://id.example.org/.well-known/oauth-authorization-server/realms/shop",
    )
    assert jwks.well_known("https://shop.auth0.com/")[0] == "https://shop.auth0.com/.well-known/openid-configuration"


# -- TLS ------------------------------------------------------------------------------------------------------------


def test_an_issuer_has_to_show_a_certificate_of_the_ca_in_the_config(tmp_path: Path) -> None:
    ca = trustme.CA()
    with running(ca) as issuer:
        trusting = issuer.config(allow_http_loopback=False, ca_file=ca_file(ca, tmp_path))
        with Asking(trusting) as asking:
            assert asking.verify(issuer.token())
        with Asking(issuer.config(ca_file=None)) as asking:
            assert "certificate" in asking.fails(issuer.token()).lower()


def test_a_ca_that_is_named_is_believed_by_every_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ssl.create_default_context

    def as_of_3_13(**options: Any) -> ssl.SSLContext:
        context = usual(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_of_3_13)
    made = fetching._trusting(ca_file(trustme.CA(), tmp_path))
    assert not made.verify_flags & ssl.VERIFY_X509_STRICT
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert fetching._trusting(None).verify_flags & ssl.VERIFY_X509_STRICT


def test_a_ca_file_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "gone.pem"):
        with pytest.raises(ConfigError, match=rf"{path.name}: cannot be used as a CA"):
            Fetcher(path)


# -- which keys -----------------------------------------------------------------------------------------------------


def kept(*keys: Any) -> list[str]:
    return list(jwks.usable({"keys": list(keys)}, ALL))


def test_each_good_key_is_for_the_one_algorithm_that_it_fits() -> None:
    found = jwks.usable({"keys": [jwk(rsa_key(), "r"), jwk(P256, "p"), jwk(ED25519, "e")]}, ALL)
    assert {name: key.algorithm for name, key in found.items()} == {"r": "RS256", "p": "ES256", "e": "EdDSA"}
    assert list(jwks.usable({"keys": [jwk(rsa_key(), "r"), jwk(P256, "p")]}, ("ES256",))) == ["p"]


@pytest.mark.parametrize(
    "more",
    [{"use": "enc"}, {"use": None}, {"kty": "oct", "k": "c2VjcmV0"}, {"kty": "EC"}, {"kty": None}, {"alg": "RS512"},
     {"alg": "PS256"}, {"alg": "HS256"}, {"alg": 1}, {"kid": None}, {"kid": ""}, {"kid": 1}, {"key_ops": ["encrypt"]},
     {"key_ops": "verify"}, {"n": ""}, {"n": "!!"}, {"n": 1}, {"n": "A" * 5000}, {"e": "Ag"}, {"e": "AQAAAAE"},
     {"e": None}, {"d": "AQ"}],
    ids=str,
)  # fmt: skip
def test_a_key_that_is_not_for_checking_signatures_with_rs256_is_left_out(more: dict[str, Any]) -> None:
    assert kept(jwk(rsa_key(), "bad") | more, jwk(P256, "good")) == ["good"]


def test_a_key_whose_private_half_is_published_is_anybody_s_and_left_out() -> None:
    for private, kind in ((rsa_key(), RSAAlgorithm), (P256, ECAlgorithm), (ED25519, OKPAlgorithm)):
        whole: Any = kind.to_jwk(private, as_dict=True)
        whole.pop("key_ops", None)
        assert kept(whole | {"kid": "bad"}, jwk(private, "good")) == ["good"]


def test_weak_keys_and_other_curves_are_left_out() -> None:
    others = [ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256K1()), rsa_key("weak", 1024)]
    keys = [jwk(one, str(number)) for number, one in enumerate(others)]
    assert kept(*keys, jwk(ed448.Ed448PrivateKey.generate(), "448"), "no key", None, 1) == []


def test_a_key_set_that_is_none_is_a_fault() -> None:
    for found in (
        {},
        {"keys": None},
        {"keys": {}},
        {"keys": [{}] * 101},
        {"keys": [jwk(P256, "a"), jwk(ED25519, "a")]},
    ):
        with pytest.raises(ValueError):
            jwks.usable(found, ALL)


def test_a_key_set_without_a_key_for_us_closes_the_door_at_once(issuer: Issuer) -> None:
    with Asking(issuer.config()) as asking:
        asking.verify(issuer.token())
        issuer.publish()
        asking.clock.pass_(HOUR)
        assert "has no key for RS256" in asking.fails(later(issuer, asking.clock))


def test_the_age_of_the_keys_can_be_told(issuer: Issuer) -> None:
    clock = Clock()
    keys = jwks.IssuerKeys(issuer.url, ALL, timedelta(hours=1), Fetcher(http_on_loopback=True), clock)
    assert keys.age() is None

    async def fetch() -> None:
        await keys.find("one", "RS256")

    asyncio.run(fetch())
    clock.pass_(7)
    assert keys.age() == timedelta(seconds=7)
