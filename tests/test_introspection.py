"""Tokens that an issuer is asked about (RFC 7662)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from issuer import NOW, Answer, Clock, Issuer, as_json, refusal, rsa_key, running, signed, use, verify
from mcpctl.config_sign_in import Introspection, Oidc
from mcpctl.errors import ConfigError, UnauthorizedError, UnavailableError
from mcpctl.identity.oidc import Issuers

SECONDS = int(NOW.timestamp())


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running() as found:
        yield found


@pytest.fixture
def clock() -> Clock:
    return Clock()


OPAQUE = "2YotnFZFEjr1zCsicMWpAA.opaque"


def asking(issuer: Issuer, folder: Path, **more: Any) -> Oidc:
    secret = folder / "secret"
    secret.touch(0o600)
    secret.write_text("s e:c+r%t\n")
    return issuer.config(introspection=Introspection(**{"client_id": "mcp ctl", "client_secret_file": secret, **more}))


def test_an_opaque_token_is_what_its_issuer_says_of_it(issuer: Issuer, clock: Clock, tmp_path: Path) -> None:
    issuer.about[OPAQUE] = {"active": True, "token_type": "Bearer", **issuer.claims(iss=None)}
    found = verify(clock, asking(issuer, tmp_path), OPAQUE)
    assert (found.issuer, found.subject, found.roles) == (issuer.url, "5f0c-alice", ("mcp-user",))
    assert issuer.forms == [{"token": [OPAQUE], "token_type_hint": ["access_token"]}]
    assert issuer.logins == ["mcp+ctl:s+e%3Ac%2Br%25t"]  # RFC 6749, section 2.3.1


def test_an_opaque_token_that_is_not_active_or_not_for_us_is_refused(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    config = asking(issuer, tmp_path)
    assert "not active" in refusal(clock, config, OPAQUE)
    for more, why in (({"aud": "other"}, "aud"), ({"exp": None}, "exp"), ({"exp": SECONDS - 31}, "expired"),
                      ({"iss": "https://other.example.org"}, "iss"), ({"sub": None}, "sub")):  # fmt: skip
        issuer.about[OPAQUE] = {"active": True, **issuer.claims(**more)}
        assert why in refusal(clock, config, OPAQUE)


@pytest.mark.parametrize("answer", [{}, {"active": "true"}, {"active": 1}])
def test_an_issuer_that_does_not_say_whether_a_token_is_active_says_nothing(
    issuer: Issuer, clock: Clock, tmp_path: Path, answer: dict[str, Any]
) -> None:
    issuer.about[OPAQUE] = {**issuer.claims(), **answer}
    with pytest.raises(UnavailableError, match="does not say"):
        verify(clock, asking(issuer, tmp_path), OPAQUE)


def test_an_issuer_that_refuses_our_client_or_asks_for_nothing_is_no_bad_token(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    config = asking(issuer, tmp_path)
    issuer.answers["/introspect"] = Answer(b"{}", 401)
    with pytest.raises(UnavailableError, match="refuses us") as caught:
        verify(clock, config, OPAQUE)
    assert "client_secret_file" in (caught.value.hint or "")
    assert OPAQUE not in caught.value.message
    issuer.answers["/.well-known/openid-configuration"] = as_json(issuer.metadata(introspection_endpoint=None))
    with pytest.raises(UnavailableError, match="names no introspection_endpoint"):
        verify(clock, config, OPAQUE)


def test_an_answer_holds_for_fifty_seconds_and_no_longer_than_its_token(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    async def work(issuers: Issuers) -> None:
        issuer.about[OPAQUE] = {"active": True, **issuer.claims()}
        found = await issuers.verify(OPAQUE)
        assert issuers.known(OPAQUE) is found
        assert issuers.known(OPAQUE[:-1]) is None
        issuer.about.clear()
        clock.pass_(49)
        assert await issuers.verify(OPAQUE) is found
        clock.pass_(1)
        with pytest.raises(UnauthorizedError, match="not active"):
            await issuers.verify(OPAQUE)
        clock.pass_(30)
        issuer.about[OPAQUE] = {"active": True, **issuer.claims(exp=int(clock.at.timestamp()) + 5 - 30)}
        await issuers.verify(OPAQUE)
        clock.pass_(5)
        assert issuers.known(OPAQUE) is None
        assert issuer.count("/introspect") == 3

    use(clock, {"shop": asking(issuer, tmp_path)}, work)


def test_what_was_remembered_can_be_forgotten_at_once(issuer: Issuer, clock: Clock, tmp_path: Path) -> None:
    async def work(issuers: Issuers) -> None:
        issuer.about[OPAQUE] = {"active": True, **issuer.claims()}
        await issuers.verify(OPAQUE)
        issuer.about.clear()
        issuers.forget()
        with pytest.raises(UnauthorizedError):
            await issuers.verify(OPAQUE)

    use(clock, {"shop": asking(issuer, tmp_path)}, work)


def test_what_was_being_asked_when_all_was_forgotten_is_not_remembered(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    async def work(issuers: Issuers) -> None:
        gate = threading.Event()
        issuer.answers["/introspect"] = as_json({"active": True, **issuer.claims()}, gate=gate)
        running = asyncio.ensure_future(issuers.verify(OPAQUE))
        while "/introspect" not in issuer.asked:
            await asyncio.sleep(0.005)
        issuers.forget()
        gate.set()
        await running
        assert issuers.known(OPAQUE) is None
        await issuers.verify(OPAQUE)
        assert issuers.known(OPAQUE) is not None

    use(clock, {"shop": asking(issuer, tmp_path)}, work)


def test_made_up_tokens_reach_the_issuer_a_few_at_a_time_and_the_rest_is_told_to_wait(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    async def work(issuers: Issuers) -> None:
        gate = threading.Event()
        issuer.answers["/introspect"] = as_json({"active": False}, gate=gate)
        tried = [asyncio.ensure_future(issuers.verify(f"{OPAQUE}{number}")) for number in range(100)]
        while issuer.count("/introspect") < 8:
            await asyncio.sleep(0.005)
        refused = [one.exception() for one in tried if one.done()]
        assert len(refused) == 100 - 64
        assert all(isinstance(one, UnavailableError) and "too many" in one.message for one in refused)
        assert issuer.count("/introspect") == 8
        gate.set()
        await asyncio.gather(*tried, return_exceptions=True)
        assert issuer.count("/introspect") == 64

    use(clock, {"shop": asking(issuer, tmp_path)}, work)


def test_what_was_found_before_a_clock_was_set_back_is_looked_at_anew(issuer: Issuer, clock: Clock) -> None:
    async def work(issuers: Issuers) -> None:
        token = issuer.token()
        await issuers.verify(token)
        assert issuers.known(token) is not None
        clock.pass_(-1)
        assert issuers.known(token) is None

    use(clock, {"shop": issuer.config()}, work)


def test_our_own_token_with_a_slip_in_it_is_never_shown_to_an_issuer(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    ours = "mcp_1hrspjl1_" + "a" * 43 + "_" + "b" * 6
    for text in (ours, "x" + ours, ours.upper(), ours[:-3], ours[:40]):
        refusal(clock, asking(issuer, tmp_path), text)
    assert issuer.asked == []


def test_a_jwt_s_issuer_can_be_asked_too_and_its_newer_word_counts(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    config, token = asking(issuer, tmp_path, tokens="jwt"), issuer.token(realm_access={"roles": ["mcp-admin"]})
    assert "not active" in refusal(clock, config, token)
    issuer.about[token] = {"active": True, "realm_access": {"roles": ["mcp-user"]}}
    assert verify(clock, config, token).roles == ("mcp-user",)
    issuer.about[token] = {"active": True, "sub": "somebody"}
    assert "somebody else's" in refusal(clock, config, token)
    assert "no issuer" in refusal(clock, config, OPAQUE)
    forged = signed(issuer.claims(), rsa_key("thief"))
    asked = issuer.count("/introspect")
    refusal(clock, config, forged)
    assert issuer.count("/introspect") == asked


def test_a_secret_that_others_can_read_or_that_is_empty_is_refused(
    issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    config = asking(issuer, tmp_path)
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ConfigError, match=r"auth\.oidc\.shop: .*is empty"):
        Issuers({"shop": config}, clock)
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ConfigError):
        Issuers({"shop": config}, clock)
