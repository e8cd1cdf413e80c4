"""How a client becomes one: it registers, or the config lists it; and which pages of other sites may ask."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import httpx
import pytest

from oauth_flow import ON, App, Person, give_password
from site_of_mcpctl import Client, Shop, Site, eventually

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("oauth-registration") / "site", newest_shop, ON).start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def app(served: Site) -> App:
    return App(served)


# -- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"redirect_uris": []}, "invalid_redirect_uri"),
        ({"redirect_uris": "https://a.example/"}, "invalid_redirect_uri"),
        ({"redirect_uris": ["http://a.example/back"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["https://a.example/back#part"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["https://*.example/back"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["https://user@a.example/back"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["cursor://callback"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["javascript:alert(1)"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["/back"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["https://a.example/" + "a" * 2000]}, "invalid_redirect_uri"),
        ({"redirect_uris": [f"https://a.example/{number}" for number in range(21)]}, "invalid_redirect_uri"),
        ({"grant_types": ["client_credentials"]}, "invalid_client_metadata"),
        ({"response_types": ["token"]}, "invalid_client_metadata"),
        ({"client_name": "a" * 201}, "invalid_client_metadata"),
        ({"client_name": "two\nlines"}, "invalid_client_metadata"),
        ({"client_name": 7}, "invalid_client_metadata"),
    ],
)
def test_a_registration_that_is_not_in_order_is_told_what_is_wrong(
    app: App, said: dict[str, object], error: str
) -> None:
    answer = app.register(**said)
    assert answer.status_code == 400
    assert answer.json()["error"] == error


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"[" * 5000, b'{"x":"' + b"a" * 20000 + b'"}'])
def test_a_registration_that_is_no_object_is_refused(app: App, body: bytes) -> None:
    answer = app.http.post("/register", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413)
    assert "error" in answer.json()


def test_what_is_registered_is_told_and_noted(app: App, served: Site) -> None:
    found = app.register(token_endpoint_auth_method="client_secret_basic", redirect_uris=["com.example.app:/back"])
    assert found.status_code == 201
    assert found.json()["token_endpoint_auth_method"] == "none"
    assert found.json()["redirect_uris"] == ["com.example.app:/back"]
    assert "client_secret" not in found.json()
    line = next(one for one in reversed(served.audit()) if one["event"] == "client.registered")
    assert found.json()["client_id"] in line["reason"]


def test_registrations_are_bounded_and_can_be_switched_off(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=ON).start()
    app = App(site)
    answers = [app.register() for _ in range(20)]
    assert [one.status_code for one in answers] == [201] * 19 + [429]
    assert answers[-1].headers["retry-after"] == "3600"
    closed = make_site(newest_shop, extra=f"{ON}    registration: false\n").start()
    base = closed.url.removesuffix("/mcp")
    assert httpx.post(f"{base}/register", json={}, trust_env=False).status_code == 404
    found = httpx.get(f"{base}/.well-known/oauth-authorization-server", trust_env=False).json()
    assert "registration_endpoint" not in found


def test_without_the_switch_there_is_no_authorization_server(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop).start()
    base = site.url.removesuffix("/mcp")
    for path in ("/.well-known/oauth-authorization-server", "/authorize", "/login", "/connections"):
        assert httpx.get(base + path, trust_env=False).status_code == 404
    assert "scope" not in httpx.post(site.url, trust_env=False).headers["www-authenticate"]


# -- clients of the config --------------------------------------------------------------------------------------------

LISTED = """auth:
  oauth:
    enabled: true
    clients:
      portal:
        title: The portal
        redirect_uris: ["https://portal.example/back"]
        secret_file: portal.secret
"""


def test_a_client_of_the_config_shows_its_secret_and_is_remembered(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=LISTED)
    give_password(site, "alice")
    secret = "s" * 40
    (site.folder / "portal.secret").touch(0o600)
    (site.folder / "portal.secret").write_text(secret + "\n")
    site.start()
    app, person = App(site, unregistered=True), Person(site)
    app.id, app.redirect = "portal", "https://portal.example/back"
    code = person.allow(app.asking())["code"]
    assert app.redeem(code).status_code == 401
    assert app.redeem(code, client_secret="t" * 40).status_code == 401
    assert app.redeem(code, client_secret=secret).status_code == 200
    again = person.open(f"/authorize?{app.asking()}")
    assert again.leads_to.startswith("https://portal.example/back?code=")
    form = {
        "grant_type": "authorization_code",
        "code": again.told["code"],
        "code_verifier": app.pkce.verifier,
    }
    answer = app.http.post("/token", data=form, auth=("portal", "t" * 40))
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert app.http.post("/token", data=form, auth=("portal", secret)).status_code == 200
    for changed in ({"prompt": "consent"}, {"scope": "mcp:read mcp:write"}):
        assert "It could" in person.open(f"/authorize?{app.asking(**changed)}").text
    assert person.open(f"/authorize?{app.asking(prompt='none')}").told.keys() == {"code", "state", "iss"}
    assert not any(secret in line for line in site.stderr)


# -- pages of other origins -------------------------------------------------------------------------------------------


def test_pages_of_allowed_origins_read_the_answers_and_no_others(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=f'{ON}server:\n  allowed_origins: ["https://inspector.example"]\n')
    give_password(site, "alice")
    site.start()
    app = App(site)
    good, evil = {"Origin": "https://inspector.example"}, {"Origin": "https://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    places = ("/mcp", "/token", "/register", "/revoke", "/.well-known/oauth-authorization-server",
              "/.well-known/oauth-protected-resource/mcp")  # fmt: skip
    for place in places:
        answer = app.http.ask("OPTIONS", place, headers={**good, **asks})
        assert answer.status_code == 204, (place, answer.text)
        assert answer.headers["access-control-allow-origin"] == "https://inspector.example"
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        refused = app.http.ask("OPTIONS", place, headers={**evil, **asks})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
    unknown = app.http.post("/mcp", headers=good)
    assert unknown.status_code == 401
    assert unknown.headers["access-control-allow-origin"] == "https://inspector.example"
    assert "www-authenticate" in unknown.headers["access-control-expose-headers"]
    token = app.connected(Person(site))["access_token"]
    with Client(site.url, token) as client:
        client.http.headers["Origin"] = "https://inspector.example"
        for _ in range(3):
            found = client.call("whoami")
            assert found.headers["access-control-allow-origin"] == "https://inspector.example"
    assert "access-control-allow-origin" not in app.http.get("/connections", headers=good).headers


# -- whom clients speak to --------------------------------------------------------------------------------------------


def test_behind_a_public_name_it_is_the_issuer_and_the_cookie_is_this_host_s_alone(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    site = make_site(newest_shop, extra=f"{ON}server:\n  public_url: https://mcp.example.org\n").start("--port", port)
    assert site.url == "https://mcp.example.org/mcp"
    here = f"http://127.0.0.1:{port}"
    named = {"Host": "mcp.example.org"}
    found = httpx.get(f"{here}/.well-known/oauth-authorization-server", headers=named, trust_env=False).json()
    assert found["issuer"] == "https://mcp.example.org"
    assert found["token_endpoint"] == "https://mcp.example.org/token"
    cookie = httpx.get(f"{here}/login", headers=named, trust_env=False).headers["set-cookie"]
    assert cookie.startswith("__Host-mcpctl=")
    assert "; Secure" in cookie
    assert "Domain" not in cookie


def test_behind_a_proxy_it_does_not_guess_what_browsers_call_it_by(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(
        newest_shop, extra=f"{ON}server: {{trusted_proxies: [127.0.0.1], allowed_hosts: [mcp.example.org]}}\n"
    )
    done = at.run("serve", "--port", "0", "--behind-proxy", check=False)
    assert done.returncode == 3
    assert "needs server.public_url" in done.stderr


@pytest.mark.parametrize("ours", [True, False])
def test_the_metadata_names_ourselves_first_and_then_the_issuers_of_the_config(
    make_site: MakeSite, newest_shop: Shop, ours: bool
) -> None:
    issuer = "https://id.example.org/realms/shop"
    oidc = f"  oidc:\n    staff: {{issuer: {issuer}, audience: mcp}}\n"
    site = make_site(newest_shop, extra=(ON if ours else "auth:\n") + oidc).start()
    base = site.url.removesuffix("/mcp")
    found = httpx.get(f"{base}/.well-known/oauth-protected-resource/mcp", trust_env=False).json()
    assert found["authorization_servers"] == [*([base] if ours else []), issuer]


def test_it_can_be_switched_on_and_off_while_the_server_runs(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=ON)
    give_password(site, "alice")
    site.start()
    app = App(site)
    token = app.connected(Person(site))["access_token"]
    before = site.config.read_text()
    site.config.write_text(before.replace("enabled: true", "enabled: false"))
    site.run("config", "reload")
    assert not app.works(token)
    assert app.http.get("/connections").status_code == 404
    site.config.write_text(before)
    site.run("config", "reload")
    assert app.works(token)


def test_what_the_config_takes_away_is_taken_from_connections_that_are_open(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    own = """    clients: {board: {redirect_uris: ["https://board.example/back"]}}
    scopes: {desk: {permissions: ["tools:query_database", "tools:whoami", "databases:shop:read"]}}
"""
    at = make_site(newest_shop, extra=ON + own)
    give_password(at, "alice")
    at.start()
    app = App(at, unregistered=True)
    app.id, app.redirect = "board", "https://board.example/back"
    token = app.connected(Person(at), scope="desk")["access_token"]
    before = at.config.read_text()

    def reloaded(old: str, new: str) -> None:
        at.config.write_text(before.replace(old, new))
        at.run("config", "reload")

    with Client(at.url, token) as client:
        assert client.rows("select 1") == [[1]]
        reloaded('"tools:whoami", ', '"tools:whoami", "tools:get_schema_info", ')
        assert client.call("get_schema_info").status_code == 403  # which nobody was asked for
        assert client.rows("select 1") == [[1]]
        reloaded('"tools:query_database", ', "")
        assert eventually(lambda: client.call("query_database", {"query": "select 1"}).status_code == 403)
        assert client.call("whoami").status_code == 200
        reloaded("board: {", "other: {")
        assert eventually(lambda: client.call("whoami").status_code == 401)
    assert [one["reason"] for one in at.audit() if one["event"] == "session.closed"] == [
        "its client board is not in the config any more"
    ]
