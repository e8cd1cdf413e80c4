"""A real OpenID provider (npm oidc-provider): people and programs sign in there, and their tokens are taken here."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from clients import rig
from mcpctl.config_sign_in import Introspection, Oidc
from mcpctl.errors import UnauthorizedError, UnavailableError
from mcpctl.identity.claims import Outside
from mcpctl.identity.oidc import Issuers

JWT, OPAQUE = "https://mcp.example.org", "https://opaque.example.org"
CALLBACK = "http://127.0.0.1/callback"


@dataclass
class Provider:
    """The running provider, and its endpoints by their names in its metadata."""

    url: str
    endpoints: dict[str, Any]

    def program(self, resource: str, client: str = "nightly") -> str:
        """A program's token, by its client's credentials."""
        form = {"grant_type": "client_credentials", "resource": resource, "scope": "read"}
        return str(self.tokens(form, client)["access_token"])

    def tokens(self, form: dict[str, str], client: str | None = None) -> dict[str, Any]:
        auth = (client, f"the secret of {client}".replace(" ", "+")) if client else None
        answer = httpx.post(self.endpoints["token_endpoint"], data=form, auth=auth, trust_env=False)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def person(self, resource: str) -> dict[str, Any]:
        """What a desktop gets once alice has signed in and agreed in her browser: authorization code with PKCE."""
        verifier = secrets.token_urlsafe(32)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        wanted = {
            "client_id": "desktop", "response_type": "code", "redirect_uri": CALLBACK, "resource": resource,
            "scope": "openid offline_access read", "prompt": "consent", "state": "s",
            "code_challenge": challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        code = self.browse(wanted)
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK, "client_id": "desktop"}
        return self.tokens(form | {"code_verifier": verifier, "resource": resource})

    def browse(self, wanted: dict[str, str]) -> str:
        with httpx.Client(trust_env=False) as browser:
            answer = browser.get(self.endpoints["authorization_endpoint"], params=wanted)
            for _ in range(20):
                if answer.is_redirect:
                    place = str(httpx.URL(self.url).join(answer.headers["location"]))
                    if place.startswith(CALLBACK):
                        return parse_qs(urlsplit(place).query)["code"][0]
                    answer = browser.get(place)
                else:
                    form = re.search(r'<form[^>]* action="([^"]+)"', answer.text)
                    prompt = re.search(r'name="prompt" value="(\w+)"', answer.text)
                    assert form, answer.text
                    assert prompt, answer.text
                    filled = {"prompt": prompt[1], "login": "alice", "password": "any"}
                    answer = browser.post(str(httpx.URL(self.url).join(form[1])), data=filled)
        raise AssertionError(f"no code came: {answer.text}")


@contextmanager
def started(node: Path, home: str) -> Iterator[Provider]:
    process = subprocess.Popen(
        [str(node), str(rig.HERE / "provider.mjs")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=home,
        env={"PATH": os.defpath, "HOME": home, "MCPCTL_TEST_NODE_DIR": str(rig.node_dir())},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        metadata = httpx.get(f"{url}/.well-known/openid-configuration", trust_env=False).json()
        yield Provider(url, metadata)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    node = rig.node_or_reason()
    if isinstance(node, str):
        pytest.skip(node)
    with tempfile.TemporaryDirectory(prefix="mcpctl-provider-") as home, started(node, home) as found:
        yield found


def config(provider: Provider, audience: str, secret: Path | None = None, tokens: str = "opaque") -> Oidc:
    asked = Introspection(client_id="mcpctl", client_secret_file=secret, tokens=tokens) if secret else Introspection()
    return Oidc(issuer=provider.url, audience=(audience,), allow_http_loopback=True, introspection=asked)


def verify(config: Oidc, token: str) -> Outside:
    async def run() -> Outside:
        issuers = Issuers({"real": config}, lambda: datetime.now(UTC))
        try:
            return await issuers.verify(token)
        finally:
            await issuers.close()

    return asyncio.run(run())


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("the secret of mcpctl\n")
    return path


def test_a_program_s_token_stands_for_its_client(provider: Provider) -> None:
    found = verify(config(provider, JWT), provider.program(JWT))
    assert (found.issuer, found.subject, found.roles) == (provider.url, "nightly", ("mcp-tools",))
    assert found.token_id


def test_a_person_s_token_stands_for_them_and_neither_their_id_token_nor_their_refresh_token_does(
    provider: Provider,
) -> None:
    answer = provider.person(JWT)
    assert verify(config(provider, JWT), answer["access_token"]).subject == "alice"
    for audience in (JWT, "desktop"):
        with pytest.raises(UnauthorizedError):
            verify(config(provider, audience), answer["id_token"])
    with pytest.raises(UnauthorizedError):
        verify(config(provider, JWT), answer["refresh_token"])


def test_a_renewed_token_stands_for_the_same_identity(provider: Provider) -> None:
    first = provider.person(JWT)
    form = {"grant_type": "refresh_token", "refresh_token": first["refresh_token"], "client_id": "desktop"}
    second = provider.tokens(form | {"resource": JWT})
    before, after = (verify(config(provider, JWT), one["access_token"]) for one in (first, second))
    assert (before.issuer, before.subject) == (after.issuer, after.subject)
    assert before.token_id != after.token_id


def test_a_token_for_another_resource_is_refused(provider: Provider) -> None:
    with pytest.raises(UnauthorizedError, match="for somebody else"):
        verify(config(provider, JWT), provider.program("https://elsewhere.example.org"))


def test_an_opaque_token_of_a_person_s_is_asked_about_until_it_is_revoked(provider: Provider, secret: Path) -> None:
    asked, answer = config(provider, OPAQUE, secret), provider.person(OPAQUE)
    token = answer["access_token"]
    assert verify(asked, token).subject == "alice"
    with pytest.raises(UnauthorizedError, match="no issuer"):
        verify(config(provider, OPAQUE), token)
    with pytest.raises(UnauthorizedError):
        verify(asked, answer["refresh_token"])
    form = {"token": token, "client_id": "desktop"}
    assert httpx.post(provider.endpoints["revocation_endpoint"], data=form, trust_env=False).status_code == 200
    with pytest.raises(UnauthorizedError, match="not active"):
        verify(asked, token)


def test_a_wrong_secret_of_ours_is_said_and_is_no_bad_token(provider: Provider, secret: Path) -> None:
    secret.write_text("another\n")
    with pytest.raises(UnavailableError, match="refuses us"):
        verify(config(provider, OPAQUE, secret), provider.person(OPAQUE)["access_token"])
