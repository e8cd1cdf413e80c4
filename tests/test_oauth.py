"""The embedded OAuth 2.1 authorization server: the protocol from end to end, and what bad requests are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from mcpctl.server.reload import DRAIN
from oauth_flow import BACK, ON, App, Page, Person, Pkce, give_password
from site_of_mcpctl import Client, Shop, Site, eventually, in_background

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("oauth") / "site", newest_shop, ON)
    give_password(found, "alice")
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def app(served: Site) -> App:
    """One client for all: an address may register twenty in an hour."""
    return App(served)


@pytest.fixture(scope="module")
def person(served: Site) -> Person:
    return Person(served)


# -- from end to end --------------------------------------------------------------------------------------------------


def test_who_has_no_token_is_led_to_the_metadata_and_told_which_scope_to_ask_for(served: Site) -> None:
    base = served.url.removesuffix("/mcp")
    challenge = httpx.post(served.url, trust_env=False).headers["www-authenticate"]
    assert 'scope="mcp:read"' in challenge
    resource = httpx.get(challenge.split('"')[1], trust_env=False).json()
    assert resource["resource"] == served.url
    assert resource["authorization_servers"] == [base]
    assert resource["scopes_supported"] == ["mcp:read"], "what a client that asks for all of these asks the user for"
    assert httpx.get(f"{base}/.well-known/oauth-protected-resource", trust_env=False).json() == resource
    found = httpx.get(f"{base}/.well-known/oauth-authorization-server", trust_env=False).json()
    assert found == httpx.get(f"{base}/.well-known/oauth-authorization-server/mcp", trust_env=False).json()
    assert found["issuer"] == base
    assert found["code_challenge_methods_supported"] == ["S256"]
    assert found["authorization_response_iss_parameter_supported"] is True
    assert found["client_id_metadata_document_supported"] is True
    assert found["grant_types_supported"] == ["authorization_code", "refresh_token"]
    assert found["scopes_supported"] == ["mcp:read", "offline_access"]


def test_a_client_that_is_allowed_gets_tokens_that_call_renew_and_are_given_back(served: Site, app: App) -> None:
    person = Person(served)
    told = person.allow(app.asking())
    assert told.keys() == {"code", "state", "iss"}
    assert (told["state"], told["iss"]) == ("a state", app.base)
    answer = app.redeem(told["code"])
    assert answer.headers["cache-control"] == "no-store"
    tokens = answer.json()
    assert tokens["token_type"] == "Bearer"
    assert tokens["expires_in"] == 3600
    assert tokens["scope"] == "mcp:read"
    with Client(served.url, tokens["access_token"]) as client:
        assert client.rows("select 1") == [[1]]
        assert client.call("whoami").json()["result"]["structuredContent"]["user"] == "alice"
    renewed = app.refresh(tokens["refresh_token"]).json()
    assert renewed["access_token"] != tokens["access_token"]
    assert renewed["refresh_token"] != tokens["refresh_token"]
    assert app.works(renewed["access_token"])
    assert app.http.post("/revoke", data={"token": renewed["refresh_token"], "client_id": app.id}).status_code == 200
    assert not app.works(renewed["access_token"])
    assert app.refresh(renewed["refresh_token"]).json()["error"] == "invalid_grant"
    events = [line for line in served.audit() if line["event"].startswith("session.")][-2:]
    assert [line["event"] for line in events] == ["session.opened", "session.closed"]
    assert all(line["user"] == "alice" and app.id in line["reason"] for line in events)


def test_the_page_says_who_asks_for_what_and_what_cannot_be_believed(served: Site, app: App, person: Person) -> None:
    page = person.asked(app.asking(scope="mcp:write offline_access"))
    assert "Test client" in page.text
    assert "not verified" in page.text
    assert "127.0.0.1:41234" in page.text
    assert "change and delete data" in page.text
    assert "shop" in page.text
    assert "<code>mcp:write</code>" in page.text
    assert "<code>offline_access</code>" not in page.text
    assert "frame-ancestors 'none'" in page.answer.headers["content-security-policy"]


def test_who_says_no_tells_the_client_and_nothing_else(app: App, person: Person) -> None:
    told = person.send(person.asked(app.asking()), answer="deny").told
    assert told["error"] == "access_denied"
    assert (told["state"], told["iss"]) == ("a state", app.base)
    assert "code" not in told


def test_a_client_of_an_unproven_name_asks_each_time(app: App, person: Person) -> None:
    person.allow(app.asking())
    assert "It could" in person.open(f"/authorize?{app.asking()}").text


# -- what a client asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
        ({"scope": "mcp:everything"}, "invalid_scope"),
        ({"resource": "https://another.example/mcp"}, "invalid_target"),
        ({"resource": "http://127.0.0.1/mcp#part"}, "invalid_target"),
        ({"response_mode": "fragment"}, "invalid_request"),
        ({"request_uri": "https://another.example/r"}, "request_not_supported"),
        ({"prompt": "none login"}, "invalid_request"),
        ({"prompt": "none"}, "login_required"),
        ({"state": "ä"}, "invalid_request"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_where_the_client_is_answered(
    app: App, served: Site, changed: dict[str, str | None], error: str
) -> None:
    page = Person(served).open(f"/authorize?{app.asking(**changed)}")
    assert page.leads_to.startswith(f"{BACK}?")
    assert page.told["error"] == error
    assert page.told["iss"] == app.base
    assert page.told.get("state") == (None if "state" in changed else "a state")


@pytest.mark.parametrize("name", ["state", "scope", "code_challenge", "resource"])
def test_a_parameter_that_stands_there_twice_is_refused(app: App, served: Site, name: str) -> None:
    page = Person(served).open(f"/authorize?{app.asking()}&{name}=again")
    assert page.told["error"] == "invalid_request"


@pytest.mark.parametrize(
    "redirect",
    [
        "http://127.0.0.1:41234/back/",
        "http://127.0.0.1:41234/Back",
        "http://127.0.0.1:41234/back?more=1",
        "http://127.0.0.1:41234/back#part",
        "http://127.0.0.1:41234/back/../back",
        "http://127.0.0.1:41234/%62ack",
        "http://127.0.0.1.evil.example:41234/back",
        "http://127.0.0.1:41234@evil.example/back",
        "http://evil.example/back",
        "http://localhost:41234/back",
        "http://127.0.0.2:41234/back",
        "http://[::1]:41234/back",
        "http://127.0.0.1:99999/back",
        "https://127.0.0.1:41234/back",
        "HTTP://127.0.0.1:41234/back",
        "javascript:alert(1)",
        "",
    ],
)
def test_a_redirect_uri_that_almost_matches_gets_no_answer(app: App, served: Site, redirect: str) -> None:
    page = Page(Person(served).http.get(f"/authorize?{app.asking(redirect_uri=redirect)}"))
    if not redirect:  # left out: there is one, and it is the one that is meant
        assert 'name="password"' in page.text
        return
    assert page.status == 400
    assert "location" not in page.answer.headers
    assert "evil" not in page.text
    assert "refresh" not in page.text


def test_only_the_port_on_loopback_is_free(app: App, person: Person) -> None:
    told = person.allow(app.asking(redirect_uri="http://127.0.0.1:5/back"))
    assert app.redeem(told["code"]).json()["error"] == "invalid_grant"
    told = person.allow(app.asking(redirect_uri="http://127.0.0.1:5/back"))
    assert app.redeem(told["code"], redirect_uri="http://127.0.0.1:5/back").status_code == 200


@pytest.mark.parametrize("changed", [{"client_id": "client-nobody"}, {"client_id": None}, {"client_id": "https://x"}])
def test_who_is_no_client_gets_a_page_of_ours_and_no_redirect(
    app: App, served: Site, changed: dict[str, str | None]
) -> None:
    page = Page(Person(served).http.get(f"/authorize?{app.asking(**changed)}"))
    assert page.status == 400
    assert "location" not in page.answer.headers


def test_a_link_to_us_leads_nobody_to_a_place_that_anybody_has_registered(served: Site, app: App) -> None:
    """RFC 9700, section 4.11.2: until somebody has signed in, an error is told to them and not to a stranger's site."""
    stranger = App(served, unregistered=True)
    stranger.redirect = "https://evil.example/back"
    stranger.id = stranger.register().json()["client_id"]
    page = Page(Person(served).http.get(f"/authorize?{stranger.asking(scope='none')}"))
    assert page.status == 400
    assert "location" not in page.answer.headers
    signed_in = Person(served)
    signed_in.asked(stranger.asking())
    assert signed_in.open(f"/authorize?{stranger.asking(scope='none')}").told["error"] == "invalid_scope"


def test_a_form_of_another_site_leads_nobody_to_such_a_place(served: Site) -> None:
    stranger = App(served, unregistered=True)
    stranger.redirect = "https://evil.example/back"
    stranger.id = stranger.register().json()["client_id"]
    for path in ("/authorize", "/login"):
        answer = Person(served).http.post(
            f"{path}?{stranger.asking(scope='none')}", data={"a": "b"}, headers={"Sec-Fetch-Site": "cross-site"}
        )
        assert answer.status_code == 403
        assert "evil.example" not in answer.text


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"code_verifier": Pkce().verifier}, "invalid_grant"),
        ({"code_verifier": ""}, "invalid_request"),
        ({"code": "A" * 43}, "invalid_grant"),
        ({"code": "' OR 1=1 --"}, "invalid_grant"),
        ({"redirect_uri": "http://127.0.0.1:41234/other"}, "invalid_grant"),
        ({"resource": "https://another.example/mcp"}, "invalid_target"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": "client_credentials"}, "unsupported_grant_type"),
        ({"grant_type": ""}, "invalid_request"),
        ({"client_id": "client-nobody"}, "invalid_client"),
        ({"client_id": ""}, "invalid_client"),
        ({"client_id": "https://app.example/client.json"}, "invalid_grant"),
    ],
)
def test_a_code_opens_nothing_where_one_thing_is_wrong(
    app: App, person: Person, changed: dict[str, str], error: str
) -> None:
    code = person.allow(app.asking())["code"]
    answer = app.redeem(code, **changed)
    assert answer.status_code == (401 if error == "invalid_client" else 400)
    assert answer.json()["error"] == error
    assert answer.headers["cache-control"] == "no-store"
    assert code not in answer.text


def test_a_code_that_was_tried_with_a_wrong_verifier_is_used_up(app: App, person: Person) -> None:
    code = person.allow(app.asking())["code"]
    assert app.redeem(code, code_verifier=Pkce().verifier).status_code == 400
    assert app.redeem(code).json()["error"] == "invalid_grant"


def test_a_code_that_is_used_twice_ends_its_connection(app: App, person: Person, served: Site) -> None:
    code = person.allow(app.asking())["code"]
    tokens = app.redeem(code).json()
    assert app.works(tokens["access_token"])
    assert app.redeem(code).json()["error"] == "invalid_grant"
    assert not app.works(tokens["access_token"])
    assert app.refresh(tokens["refresh_token"]).status_code == 400
    line = next(one for one in reversed(served.audit()) if one["event"] == "session.closed")
    assert line["reason"] == "the code was shown twice"


# -- refresh tokens ---------------------------------------------------------------------------------------------------


def test_a_refresh_token_that_is_used_twice_ends_the_whole_connection(app: App, person: Person, served: Site) -> None:
    first = app.connected(person)
    second = app.refresh(first["refresh_token"]).json()
    assert app.works(second["access_token"])
    assert app.refresh(first["refresh_token"]).json()["error"] == "invalid_grant"
    assert not app.works(second["access_token"])
    assert app.refresh(second["refresh_token"]).json()["error"] == "invalid_grant"
    line = next(one for one in reversed(served.audit()) if one["event"] == "session.closed")
    assert line["reason"] == "the refresh token was shown twice"


def test_a_refresh_token_that_another_client_shows_ends_the_connection(app: App, person: Person, served: Site) -> None:
    tokens, other = app.connected(person), App(served)
    assert app.refresh(tokens["refresh_token"], client_id=other.id).json()["error"] == "invalid_grant"
    assert not app.works(tokens["access_token"])


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scope": "mcp:read mcp:write"}, "invalid_scope"),
        ({"resource": "https://another.example/mcp"}, "invalid_target"),
        ({"refresh_token": ""}, "invalid_request"),
        ({"refresh_token": "mcr_S1234567_" + "A" * 43 + "_AAAAAA"}, "invalid_grant"),
    ],
)
def test_a_refresh_that_asks_for_other_things_is_refused_and_ends_nothing(
    app: App, person: Person, changed: dict[str, str], error: str
) -> None:
    tokens = app.connected(person)
    assert app.refresh(tokens["refresh_token"], **changed).json()["error"] == error
    assert app.works(tokens["access_token"])
    assert app.refresh(tokens["refresh_token"]).status_code == 200


@pytest.mark.newest
def test_a_refresh_for_fewer_scopes_gives_what_these_allow_until_the_next(make_site: MakeSite, shop: Shop) -> None:
    site = make_site(shop, extra=ON)
    site.user("carol", "mcp-tools")
    give_password(site, "carol")
    site.start()
    app = App(site)
    tokens = app.connected(Person(site, "carol"), scope="mcp:write")
    narrow = app.refresh(tokens["refresh_token"], scope="mcp:read").json()
    assert narrow["scope"] == "mcp:read"  # which mcp:write allows, too
    told = _raw_call(site, narrow["access_token"], "execute_statement", statement="select 1")
    assert told.status_code == 403
    assert 'error="insufficient_scope"' in told.headers["www-authenticate"]
    wide = app.refresh(narrow["refresh_token"]).json()
    assert wide["scope"] == "mcp:write"
    assert _raw_call(site, wide["access_token"], "execute_statement", statement="select 1").status_code == 200


def test_a_client_that_wants_no_refresh_token_gets_none(served: Site, person: Person) -> None:
    app = App(served, grant_types=["authorization_code"])
    assert "refresh_token" not in app.connected(person)


def test_an_access_token_is_no_refresh_token_and_the_other_way_round(app: App, person: Person) -> None:
    tokens = app.connected(person)
    assert app.refresh(tokens["access_token"]).json()["error"] == "invalid_grant"
    assert not app.works(tokens["refresh_token"])
    assert app.works(tokens["access_token"])


@pytest.mark.newest
def test_disabling_a_user_and_another_password_end_what_they_have_allowed(make_site: MakeSite, shop: Shop) -> None:
    site = make_site(shop, extra=ON)
    for name in ("alice", "bob"):
        give_password(site, name)
    site.start()
    app = App(site)
    tokens = {name: app.connected(Person(site, name)) for name in ("alice", "bob")}
    person = Person(site, "alice")
    code = person.allow(app.asking())["code"]
    site.run("user", "disable", "bob")
    give_password(site, "alice", "five other words, all of them new")
    for name in ("alice", "bob"):
        assert app.refresh(tokens[name]["refresh_token"]).json()["error"] == "invalid_grant"
        eventually(lambda name=name: not app.works(tokens[name]["access_token"]))
    assert app.redeem(code).json()["error"] == "invalid_grant"
    assert 'name="password"' in person.open("/connections").text


# -- revocation -------------------------------------------------------------------------------------------------------


def test_revoking_an_access_token_ends_the_connection_and_other_clients_cannot(
    app: App, person: Person, served: Site
) -> None:
    tokens, other = app.connected(person), App(served)
    for text in (tokens["access_token"], tokens["refresh_token"], "nonsense", "mcs_S0000000_" + "A" * 43 + "_AAAAAA"):
        assert other.http.post("/revoke", data={"token": text, "client_id": other.id}).status_code == 200
    assert app.works(tokens["access_token"])
    answer = app.http.post("/revoke", data={"token": tokens["access_token"], "client_id": app.id})
    assert (answer.status_code, answer.content) == (200, b"")
    assert not app.works(tokens["access_token"])
    assert app.refresh(tokens["refresh_token"]).status_code == 400
    assert app.http.post("/revoke", data={"client_id": app.id}).json()["error"] == "invalid_request"


# -- scopes -----------------------------------------------------------------------------------------------------------


def _raw_call(site: Site, token: str, name: str, **arguments: object) -> httpx.Response:
    with Client(site.url, token) as client:
        return client.call(name, arguments)


@pytest.mark.newest
def test_what_only_the_scope_lacks_is_403_with_the_scope_to_ask_for(make_site: MakeSite, shop: Shop) -> None:
    site = make_site(shop, extra=ON)
    site.user("carol", "mcp-tools")
    for name in ("alice", "carol"):
        give_password(site, name)
    site.start()
    app = App(site)
    token = app.connected(Person(site, "carol"))["access_token"]
    for _ in range(3):  # the ordinary way, and the hot one
        answer = _raw_call(site, token, "execute_statement", statement="select 1")
        assert answer.status_code == 403
        challenge = answer.headers["www-authenticate"]
        assert 'error="insufficient_scope"' in challenge
        assert 'scope="mcp:write"' in challenge
        assert "/.well-known/oauth-protected-resource/mcp" in challenge
    with Client(site.url, token) as client:
        assert client.rows("select 1") == [[1]]
        refused = [client.call("execute_statement", {"statement": "select 1"}).status_code for _ in range(3)]
        assert refused == [403, 403, 403]
    assert [one["outcome"] for one in site.audit() if one["event"] == "tool.refused"] == ["refused"] * 6
    more = app.connected(Person(site, "carol"), scope="mcp:read mcp:write")["access_token"]
    assert _raw_call(site, more, "execute_statement", statement="select 1").status_code == 200
    theirs = app.connected(Person(site, "alice"))["access_token"]  # whose role has it not, whatever the scope
    answer = _raw_call(site, theirs, "execute_statement", statement="select 1")
    assert answer.status_code == 200
    assert answer.json()["result"]["isError"]


def test_a_scope_gives_nothing_that_the_user_has_not(app: App, person: Person, served: Site) -> None:
    token = app.connected(person, scope="mcp:admin mcp:write")["access_token"]
    answer = _raw_call(served, token, "execute_statement", statement="select 1")
    assert answer.json()["result"]["isError"]


# -- switched off -----------------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize("workers", ["1", "2"])
def test_switched_off_by_a_reload_nothing_of_a_connection_runs_on_and_switched_on_it_is_as_it_was(
    make_site: MakeSite, shop: Shop, workers: str
) -> None:
    site = make_site(shop, extra=ON)
    give_password(site, "alice")
    site.start("--workers", workers)
    app = App(site)
    tokens = app.connected(Person(site))
    with Client(site.url, tokens["access_token"]) as client:
        running = in_background(client.call, "query_database", {"query": "select pg_sleep(25)"})
        eventually(lambda: shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        site.config.write_text(site.config.read_text().replace("enabled: true", "enabled: false"))
        site.run("config", "reload")
        begun = time.monotonic()
        assert running.result(10).status_code == 401
        eventually(lambda: not shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        took = time.monotonic() - begun
    assert took < DRAIN / 2  # within a second, on a machine that has nothing else to do
    assert not app.works(tokens["access_token"])
    assert app.refresh(tokens["refresh_token"]).status_code == 404
    site.config.write_text(site.config.read_text().replace("enabled: false", "enabled: true"))
    site.run("config", "reload")
    assert app.works(tokens["access_token"])
    site.config.write_text(site.config.read_text().replace("enabled: true", "enabled: false"))
    site.run("config", "reload")
    assert "ended" in site.run("session", "revoke", "--all").stdout  # also while it is off
    site.config.write_text(site.config.read_text().replace("enabled: false", "enabled: true"))
    site.run("config", "reload")
    assert not app.works(tokens["access_token"])
    assert app.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"


# -- bodies and methods -----------------------------------------------------------------------------------------------


def test_a_token_request_is_a_form_with_each_parameter_once(app: App) -> None:
    twice = b"grant_type=authorization_code&grant_type=refresh_token&client_id=" + app.id.encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert app.http.post("/token", content=twice, headers=form).json()["error"] == "invalid_request"
    assert app.http.post("/token", json={"grant_type": "authorization_code"}).status_code == 415
    assert app.http.post("/token?client_id=x", content=twice, headers=form).status_code == 400
    assert app.http.post("/token", content=b"a=%zz", headers=form).status_code == 400
    assert app.http.post("/token", content=b"a=" + b"b" * 10_000, headers=form).status_code == 413
    assert app.http.get("/token").status_code == 405
    assert app.http.ask("PUT", "/authorize").status_code == 405
