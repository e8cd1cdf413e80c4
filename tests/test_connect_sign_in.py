"""mcpctl connect signs in, keeps what that leads to, and renews it."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from clients import rig, robot
from connecting import (
    BROWSER,
    META,
    Bridge,
    Protected,
    Scripted,
    Seen,
    Visitor,
    bridged,
    echo,
    modern,
    provider,
    run,
    scripted,
)
from mcpctl.bridge.kept import Kept
from site_of_mcpctl import Shop, Site, eventually


@pytest.fixture(scope="module")
def shop_site(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("connect") / "site", newest_shop).start()
    yield found
    found.stop()


# -- a person signs in ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> Path:
    found = rig.node_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def protected(node: Path) -> Iterator[Protected]:
    with provider(node) as issuer, Protected(issuer) as server:
        yield server


STARTS = 30.0
"""Seconds that a bridge may take to start and to ask for a sign-in, on a machine with much else to do."""
HELLO = modern("tools/call", 1, name="hello", arguments={"name": "Ann"})


def is_hello(answer: Any) -> bool:
    found: bool = answer["result"]["content"][0]["text"] == "hello Ann"
    return found


def record(folder: Path) -> Any:
    (file,) = (folder / "mcpctl" / "connect").glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    return json.loads(file.read_bytes())["record"]


def test_who_has_no_token_signs_in_with_the_browser_once(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url, BROWSER=BROWSER) as bridge:
        bridge.send(*({**HELLO, "id": number} for number in range(5)))
        assert all(is_hello(bridge.answer()) for _ in range(5))
        assert bridge.said.count("sign in with your browser") == 1
        bridge.send(modern("tools/call", 9, name="count", arguments={"to": 3}))
        bridge.answer()
        assert bridge.close() == 0
    token = record(tmp_path)["tokens"]["access_token"]
    assert token not in bridge.said
    with Bridge(tmp_path, protected.url) as bridge:
        assert is_hello(bridge.ask(HELLO))
        assert bridge.said == ""


def test_progress_passes(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url, BROWSER=BROWSER) as bridge:
        call = modern("tools/call", 1, name="count", arguments={"to": 3})
        call["params"]["_meta"] = {**META, "progressToken": "p"}
        bridge.send(call)
        came = [bridge.answer() for _ in range(4)]
    assert [one["params"]["progress"] for one in came[:3]] == [1, 2, 3]
    assert "counted to 3" in str(came[3])


def test_a_token_that_ends_is_renewed_and_nobody_signs_in_again(node: Path, tmp_path: Path) -> None:
    with provider(node, LIFE="2") as issuer, Protected(issuer) as server:
        with Bridge(tmp_path, server.url, BROWSER=BROWSER) as bridge:
            assert is_hello(bridge.ask(HELLO))
            first = record(tmp_path)["tokens"]
            assert is_hello(bridge.ask(HELLO))
            eventually(lambda: is_hello(bridge.ask(HELLO)) and len(set(server.verifier.seen)) >= 3, 30, 0.2)
            assert bridge.said.count("sign in with") == 1
        assert record(tmp_path)["tokens"]["refresh_token"] != first["refresh_token"]
        before = len(set(server.verifier.seen))
        eventually(lambda: expired(issuer, record(tmp_path)["tokens"]["access_token"]))
        with Bridge(tmp_path, server.url) as again:
            assert is_hello(again.ask(HELLO)), "after a restart, too, with an authorization server elsewhere"
            assert again.said == ""
        assert len(set(server.verifier.seen)) == before + 1


def expired(issuer: str, token: str) -> bool:
    found = httpx.post(
        f"{issuer}/token/introspection", data={"token": token}, auth=("resource-server", "of the test"), trust_env=False
    )
    return not found.json()["active"]


def revoke(issuer: str, token: str, client: str) -> None:
    data = {"token": token, "client_id": client}
    httpx.post(f"{issuer}/token/revocation", data=data, trust_env=False).raise_for_status()


def test_a_token_that_is_refused_in_the_middle_is_renewed_and_the_call_sent_again(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server, Bridge(tmp_path, server.url, BROWSER=BROWSER) as bridge:
        assert is_hello(bridge.ask(HELLO))
        kept = record(tmp_path)
        server.verifier.refused.add(kept["tokens"]["access_token"])
        assert is_hello(bridge.ask(HELLO))
        assert bridge.said.count("sign in with") == 1
        renewed = record(tmp_path)["tokens"]
        assert renewed["access_token"] != kept["tokens"]["access_token"]
        revoke(issuer, renewed["refresh_token"], kept["client"]["client_id"])
        assert is_hello(bridge.ask(HELLO)), "where it cannot be renewed, the person signs in anew"
        assert bridge.said.count("sign in with") == 2


def test_two_bridges_share_one_sign_in_and_do_not_use_a_refresh_token_twice(node: Path, tmp_path: Path) -> None:
    with (
        provider(node, LIFE="2") as issuer,
        Protected(issuer) as server,
        Bridge(tmp_path, server.url, BROWSER=BROWSER) as one,
        Bridge(tmp_path, server.url, BROWSER=BROWSER) as two,
    ):
        for bridge in (one, two):
            bridge.send(HELLO)
        assert all(is_hello(bridge.answer()) for bridge in (one, two))

        def both() -> bool:
            for bridge in (one, two):
                bridge.send(HELLO)
            assert all(is_hello(bridge.answer()) for bridge in (one, two))
            return len(set(server.verifier.seen)) >= 4

        eventually(both, 30, 0.1)
        assert (one.said + two.said).count("sign in with") == 1


def test_a_code_is_entered_elsewhere_where_there_is_no_browser(protected: Protected, tmp_path: Path) -> None:
    with Bridge(tmp_path, protected.url) as bridge:
        bridge.send(HELLO)
        eventually(lambda: "to sign in, open " in bridge.said, 20)
        page = bridge.said.partition("to sign in, open ")[2].split()[0]
        assert "success" in robot.visit(page).lower()
        assert is_hello(bridge.answer())
        assert bridge.close() == 0
    assert record(tmp_path)["tokens"]["refresh_token"]


def test_who_enters_a_code_elsewhere_has_the_bridge_prove_that_it_asked_for_it(tmp_path: Path) -> None:
    came: dict[str, httpx.QueryParams] = {}

    def script(visitor: Visitor, seen: Seen) -> None:
        if visitor.path in ("/device", "/token"):
            came[visitor.path] = httpx.QueryParams(seen[2].decode())
            code = {"device_code": "d", "user_code": "u", "verification_uri": "https://id.example.org/u"}
            token = {"access_token": "t", "token_type": "Bearer"}
            answer = {**code, "expires_in": 60, "interval": 0} if visitor.path == "/device" else token
            visitor.reply(200, json.dumps(answer).encode())
        elif visitor.path == "/mcp" and seen[1].get("authorization") == "Bearer t":
            echo(visitor, seen)
        else:
            authorization({"device_authorization_endpoint": visitor.server.url.replace("/mcp", "/device")})(
                visitor, seen
            )

    with bridged(script, tmp_path, "--device") as (_, bridge):
        assert bridge.ask(modern("x"))["result"] == {}
    digest = hashlib.sha256(came["/token"]["code_verifier"].encode()).digest()
    assert came["/device"]["code_challenge_method"] == "S256"
    assert came["/device"]["code_challenge"] == base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_sign_in_and_sign_out_without_a_client(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server:
        done = run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert done.stderr.endswith("\nsigned in\n")
        assert done.stderr.count("\nsigned in") == 1, done.stderr
        tokens = record(tmp_path)["tokens"]
        assert not expired(issuer, tokens["access_token"])
        again = run(tmp_path, server.url, "--sign-in")
        assert (again.returncode, again.stderr) == (0, "signed in\n"), "it is kept"
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "signed out\n")
        assert expired(issuer, tokens["access_token"])
        assert expired(issuer, tokens["refresh_token"])
        assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, done.stderr) == (0, "nothing was kept for this URL\n")


def test_a_sign_out_is_one_where_access_tokens_are_never_taken_back(tmp_path: Path) -> None:
    hints: list[str] = []

    def script(visitor: Visitor, seen: Seen) -> None:
        hints.append(parse_qs(seen[2].decode())["token_type_hint"][0])
        refused = hints[-1] == "access_token" or len(hints) > 2
        visitor.reply(400 if refused else 200, b'{"error": "unsupported_token_type"}' if refused else b"")

    with scripted(script) as server:
        about = metadata(server, revocation_endpoint=f"{server.url}/revoke")
        client = {
            "client_id": "c",
            "token_endpoint_auth_method": "none",
            "redirect_uris": ["http://127.0.0.1/callback"],
        }
        tokens = {"access_token": "a", "token_type": "Bearer", "refresh_token": "r"}
        kept = Kept(tmp_path / "mcpctl" / "connect", server.url, lambda: None)
        kept.write({"tokens": tokens, "client": client, "server": about})
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, "ends by itself" in done.stderr) == (0, True), done.stderr
        assert hints == ["refresh_token", "access_token"]
        kept.write({"tokens": tokens, "client": client, "server": about})
        done = run(tmp_path, server.url, "--sign-out")
        assert (done.returncode, "did not confirm its end" in done.stderr) == (1, True), "of a refresh token it is none"


def test_a_sign_out_forgets_even_where_the_authorization_server_is_away(node: Path, tmp_path: Path) -> None:
    with provider(node) as issuer, Protected(issuer) as server:
        assert run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER).returncode == 0
    done = run(tmp_path, server.url, "--sign-out")
    assert done.returncode == 1
    assert "cannot reach" in done.stderr
    assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))


def test_a_client_that_is_known_beforehand_signs_in_and_others_are_told_to_be(node: Path, tmp_path: Path) -> None:
    with provider(node, REGISTRATION="off") as issuer, Protected(issuer) as server:
        done = run(tmp_path, server.url, "--sign-in", BROWSER=BROWSER)
        assert done.returncode == 1
        assert "--client-id" in done.stderr
        done = run(tmp_path, server.url, "--sign-in", "--client-id", "desktop", BROWSER=BROWSER)
        assert done.returncode == 0, done.stderr
        assert record(tmp_path)["client"]["client_id"] == "desktop"


def test_a_server_that_wants_a_token_and_offers_no_sign_in_says_so(shop_site: Site, tmp_path: Path) -> None:
    with Bridge(tmp_path, shop_site.url) as bridge:
        error = bridge.ask(modern("tools/list"))["error"]
        assert "offers no sign-in" in error["message"]
        assert "--keep-token" in error["data"]["hint"]


def test_a_token_is_kept_from_a_pipe_and_used_without_being_named(shop_site: Site, tmp_path: Path) -> None:
    token = shop_site.token()[1]
    done = run(tmp_path, shop_site.url, "--keep-token", stdin=token + "\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert token not in done.stderr
    with Bridge(tmp_path, shop_site.url) as bridge:
        assert bridge.ask(modern("tools/list"))["result"]["tools"]
    other = shop_site.url.replace("/mcp", "/mcp?other")
    with Bridge(tmp_path, other) as bridge:
        assert "error" in bridge.ask(modern("tools/list")), "it is kept for that URL alone"


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b'{"version":2}', b'{"version":1,"url":"x","record":{}}'])
def test_what_is_kept_and_cannot_be_understood_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    url = "https://example.org/mcp"
    assert run(tmp_path, url, "--keep-token", stdin="mcp_token").returncode == 0
    (file,) = (tmp_path / "mcpctl" / "connect").glob("*.json")
    file.write_bytes(content)
    done = run(tmp_path, url)
    assert done.returncode == 3
    assert "--sign-out" in done.stderr
    assert run(tmp_path, url, "--sign-out").returncode == 0
    assert not file.exists()


def test_what_is_kept_is_sealed_where_the_system_has_a_keyring(tmp_path: Path) -> None:
    keyring = {"PYTHON_KEYRING_BACKEND": "clients.vault.Vault", "PYTHONPATH": str(Path(__file__).parent)}
    with scripted(echo) as server:
        done = run(tmp_path, server.url, "--keep-token", stdin="mcp_token", **keyring)
        assert (done.returncode, "system keyring" in done.stderr) == (0, True), done.stderr
        (file,) = (tmp_path / "mcpctl" / "connect").glob("*.json")
        assert b"mcp_token" not in file.read_bytes()
        assert "mcp_token" not in (tmp_path / "vault.json").read_text()
        with Bridge(tmp_path, server.url, **keyring) as again:
            again.ask(modern("x"))
        assert server.seen[-1][1]["authorization"] == "Bearer mcp_token"
        done = run(tmp_path, server.url)
        assert (done.returncode, "there is no keyring in this session" in done.stderr) == (3, True), (
            "the file alone opens nothing"
        )
        assert run(tmp_path, server.url, "--sign-out", **keyring).returncode == 0
        assert json.loads((tmp_path / "vault.json").read_text()) == {}


def metadata(server: Scripted, **changed: Any) -> dict[str, Any]:
    origin = server.url.removesuffix("/mcp")
    return {
        "issuer": origin, "authorization_endpoint": f"{origin}/authorize", "token_endpoint": f"{origin}/token",
        "registration_endpoint": f"{origin}/register", "code_challenge_methods_supported": ["S256"], **changed,
    }  # fmt: skip


def authorization(changed: dict[str, Any], resource: str | None = None, token: bytes = b"") -> Any:
    """A server with an authorization server that is not as it should be; `token`: what it says to a code."""

    def script(visitor: Visitor, seen: Seen) -> None:
        server, path = visitor.server, visitor.path
        origin = server.url.removesuffix("/mcp")
        if path.startswith("/.well-known/oauth-protected-resource"):
            about = {"resource": resource or server.url, "authorization_servers": [origin]}
            visitor.reply(200, json.dumps(about).encode())
        elif path.startswith("/.well-known/oauth-authorization-server"):
            visitor.reply(200, json.dumps(metadata(server, **changed)).encode())
        elif path == "/register":
            visitor.reply(201, json.dumps({**json.loads(seen[2]), "client_id": "c"}).encode())
        elif path == "/token":
            visitor.reply(200, token)
        elif path.startswith("/mcp"):
            visitor.reply(
                401, www_authenticate=f'Bearer resource_metadata="{origin}/.well-known/oauth-protected-resource"'
            )
        else:
            visitor.reply(500)

    return script


@pytest.mark.parametrize("changed, resource, said", [
    ({"issuer": "https://evil.example.org"}, None, "issuer mismatch"),
    ({"code_challenge_methods_supported": None}, None, "PKCE"),
    ({"code_challenge_methods_supported": ["plain"]}, None, "PKCE"),
    ({"registration_endpoint": "http://example.org/register"}, None, "not encrypted"),
    ({"authorization_endpoint": "http://example.org/authorize"}, None, "not encrypted"),
    ({}, "https://other.example.org/mcp", "does not match"),
])  # fmt: skip
def test_an_authorization_server_that_is_not_as_it_must_be_is_not_signed_in_at(
    tmp_path: Path, changed: dict[str, Any], resource: str | None, said: str
) -> None:
    with bridged(authorization(changed, resource), tmp_path, BROWSER="false %s") as (_, bridge):
        error = bridge.ask(modern("x"))["error"]
        assert said in error["message"], error
        assert bridge.ask(modern("x", 2))["error"]["message"] == error["message"]
        assert "Traceback" not in bridge.said
        assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))


def test_only_the_browser_that_brings_the_state_back_counts(tmp_path: Path) -> None:
    with bridged(authorization({}), tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        eventually(lambda: "redirect_uri=" in bridge.said, STARTS)
        asked = dict(httpx.QueryParams(bridge.said.partition("?")[2].split()[0]))
        back = asked["redirect_uri"]
        assert asked["code_challenge_method"] == "S256"
        for wrong in ({}, {"code": "c"}, {"code": "c", "state": "x"}, {"error": "e", "state": asked["state"][:-1]}):
            assert httpx.get(back, params=wrong, trust_env=False).status_code == 400
        assert httpx.get(back.replace("/callback", "/"), trust_env=False).status_code == 404
        assert httpx.post(back, params={"state": asked["state"]}, trust_env=False).status_code == 404
        assert bridge.silent
        given = {"state": asked["state"], "error": "access_denied", "error_description": "<b>no</b>"}
        page = httpx.get(back, params=given, trust_env=False)
        assert (page.status_code, "<b>" in page.text) == (200, False)
        assert "access_denied" in bridge.answer()["error"]["message"]


def come_back(bridge: Bridge, **more: str) -> None:
    """What a browser brings back."""
    eventually(lambda: "redirect_uri=" in bridge.said, STARTS)
    asked = dict(httpx.QueryParams(bridge.said.rpartition("?")[2].split()[0]))
    given = {"state": asked["state"], "code": "c", **more}
    assert httpx.get(asked["redirect_uri"], params=given, trust_env=False).status_code == 200


@pytest.mark.parametrize("iss, said", [("https://evil.example.org", "iss mismatch"), ("", "iss mismatch")])
def test_an_answer_of_another_authorization_server_is_refused(tmp_path: Path, iss: str, said: str) -> None:
    with bridged(authorization({"authorization_response_iss_parameter_supported": True}), tmp_path) as (server, bridge):
        bridge.send(modern("x"))
        come_back(bridge, iss=iss)
        assert said in bridge.answer()["error"]["message"]
        assert not [seen for seen in server.seen if b"code_verifier" in seen[2]], "and the code goes nowhere"


@pytest.mark.parametrize("token", [
    b"<html>", b"[]", b'{"access_token":"very secret","token_type":"DPoP"}', b'{"refresh_token":"very secret"}',
])  # fmt: skip
def test_a_token_that_is_none_is_told_without_what_came(tmp_path: Path, token: bytes) -> None:
    with bridged(authorization({}, token=token), tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        come_back(bridge)
        line = bridge.line()
        assert b"sign-in failed" in line
        assert "secret" not in f"{line!r}{bridge.said}"
        assert not list((tmp_path / "mcpctl" / "connect").glob("*.json"))


def test_a_metadata_document_is_the_client_where_the_authorization_server_takes_those(tmp_path: Path) -> None:
    url = "https://client.example.org/mcpctl.json"
    script = authorization({"client_id_metadata_document_supported": True})
    with bridged(script, tmp_path, "--client-metadata-url", url) as (server, bridge):
        bridge.send(modern("x"))
        eventually(lambda: "redirect_uri=" in bridge.said, STARTS)
        assert httpx.QueryParams(bridge.said.partition("?")[2].split()[0])["client_id"] == url
    assert not [seen for seen in server.seen if b"redirect_uris" in seen[2]], "nothing was registered"


def test_a_call_that_needs_more_scope_asks_the_person_for_more(tmp_path: Path) -> None:
    asks_for = {None: (401, "read"), "Bearer t1": (403, "write")}

    def script(visitor: Visitor, seen: Seen) -> None:
        shown = seen[1].get("authorization")
        if visitor.path == "/token":
            tokens.append(f"t{len(tokens) + 1}")
            visitor.reply(200, json.dumps({"access_token": tokens[-1], "token_type": "Bearer"}).encode())
        elif visitor.path != "/mcp" or seen[0] != "POST":
            base(visitor, seen)
        elif shown in asks_for:
            status, scope = asks_for[shown]
            error = ', error="insufficient_scope"' if status == 403 else ""
            visitor.reply(status, www_authenticate=f'Bearer scope="{scope}"{error}')
        else:
            echo(visitor, seen)

    tokens: list[str] = []
    base = authorization({})
    with bridged(script, tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        come_back(bridge)
        eventually(lambda: bridge.said.count("redirect_uri=") == 2, STARTS)
        assert "scope=read+write" in bridge.said.rpartition("?")[2]
        come_back(bridge)
        assert bridge.answer()["result"] == {}
    assert tokens == ["t1", "t2"]


def test_a_sign_in_ends_with_stdin(tmp_path: Path) -> None:
    with bridged(authorization({}), tmp_path) as (_, bridge):
        bridge.send(modern("x"))
        eventually(lambda: "redirect_uri=" in bridge.said, STARTS)
        assert bridge.close(5) == 0


AS_ON_WINDOWS = """
import sys, types
import asyncio, httpx2, typer, yaml, logging, mcp.client.auth, webbrowser, tempfile, keyring, uuid
for name in ("fcntl", "pwd", "grp"):
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, LK_UNLCK=0, locking=lambda fd, mode, size: None)
from mcpctl.cli.main import run
run(sys.argv[1:])
"""


def test_it_needs_nothing_that_only_posix_has(protected: Protected, tmp_path: Path) -> None:
    before = [sys.executable, "-W", "ignore", "-c", AS_ON_WINDOWS]
    with Bridge(tmp_path, protected.url, before=before, BROWSER=BROWSER) as bridge:
        assert is_hello(bridge.ask(HELLO))
        assert bridge.close() == 0
