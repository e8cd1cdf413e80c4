"""mcpctl doctor on outside issuers: whether they can be asked, as the first of their tokens would have the server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from issuer import Answer, Issuer, as_json, running
from mcpctl.config_keys import Auth, Settings
from mcpctl.config_sign_in import Introspection
from mcpctl.diagnosis.examine import examine
from mcpctl.diagnosis.patient import FAIL, OK, WARN, Finding, Patient
from mcpctl.identity import linking, tokens, users
from mcpctl.identity.links import Link
from mcpctl.private_file import create


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running() as found:
        yield found


def findings(folder: Path, issuer: Issuer, **config: Any) -> list[Finding]:
    path = folder / "users.yaml"
    if not path.exists():
        file = users.user_file(path)
        create(path, file.render({}))
        users.add(file, "alice", None, datetime.now(UTC))
    tokens_path = folder / "tokens.yaml"
    if not tokens_path.exists():
        create(tokens_path, tokens.token_file(tokens_path).render({}))
    auth = Auth(token_file=tokens_path, user_file=path, oidc={"shop": issuer.config(**config)})
    patient = Patient(replace(Settings(), auth=auth), {}, None, datetime.now(UTC), {})
    return [one for one in examine(patient) if one.check == "issuer shop"]


def test_an_issuer_that_answers_is_fine_once_somebody_is_linked(issuer: Issuer, tmp_path: Path) -> None:
    first = findings(tmp_path, issuer)
    assert [one.status for one in first] == [OK, WARN]
    assert "no user is linked" in first[1].what
    linking.link(users.user_file(tmp_path / "users.yaml"), "alice", Link(issuer.url, "s"))
    second = findings(tmp_path, issuer)
    assert [one.status for one in second] == [OK]
    assert "1 keys, 1 users linked" in second[0].what


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/.well-known/openid-configuration", Answer(status=404), "404"),
        ("/keys", Answer(status=500), "500"),
        ("/keys", as_json({"keys": []}), "key"),
    ],
)
def test_what_is_wrong_with_an_issuer_is_said(
    issuer: Issuer, tmp_path: Path, path: str, answer: Answer, said: str
) -> None:
    issuer.answers[path] = answer
    found = findings(tmp_path, issuer)
    assert [one.status for one in found] == [FAIL]
    assert said in found[0].what
    assert found[0].hint


def test_a_secret_of_ours_that_the_issuer_refuses_is_found(issuer: Issuer, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("s" * 40)
    asked = Introspection(client_id="mcpctl", client_secret_file=secret)
    assert findings(tmp_path, issuer, introspection=asked)[0].status == OK
    issuer.answers["/introspect"] = Answer(status=401)
    found = findings(tmp_path, issuer, introspection=asked)
    assert [one.status for one in found] == [FAIL]
    assert "refuses us" in found[0].what
