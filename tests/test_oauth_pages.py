"""The pages of the authorization server: who signs in, what they allow, what they end; and whose forms are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest

from oauth_flow import ON, PASSWORD, App, Page, Person, give_password
from site_of_mcpctl import Shop, Site

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def served(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("oauth-pages") / "site", newest_shop, ON)
    for name in ("alice", "bob"):
        give_password(found, name)
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def app(served: Site) -> App:
    return App(served)


# -- sign in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"password": "not the password at all"},
        {"password": ""},
        {"password": "x" * 20_000},
        {"user": "nobody-here"},
        {"user": "<script>alert(1)</script>"},
        {"user": ""},
        {"user": "alice' OR '1'='1"},
    ],
)
def test_who_is_wrong_about_one_thing_is_told_the_same_and_is_not_signed_in(
    served: Site, app: App, wrong: dict[str, str]
) -> None:
    person = Person(served)
    page = person.sign_in(person.open(f"/authorize?{app.asking()}"), **wrong)
    assert page.status == 401
    assert "User name or password is wrong." in page.text
    assert "<script>" not in page.text
    assert wrong.get("password", "?") not in page.text or not wrong.get("password")
    assert 'name="password"' in person.open(f"/authorize?{app.asking()}").text


def test_no_password_comes_into_a_log(served: Site, app: App) -> None:
    person = Person(served)
    page = person.open(f"/authorize?{app.asking()}")
    person.sign_in(page, password="a password that is typed in vain")
    person.sign_in(page)
    written = (served.folder / "audit.jsonl").read_text() + "".join(served.stderr)
    for secret in (PASSWORD, "typed in vain", *person.http.cookies.values()):
        assert secret not in written
    assert any(one["event"] == "auth.refused" for one in served.audit())


def test_signing_in_gives_the_browser_another_cookie_which_no_script_reads(served: Site, app: App) -> None:
    person = Person(served)
    page = person.open(f"/authorize?{app.asking()}")
    before = person.http.cookies["mcpctl"]
    action, hidden = page.forms()[0]
    answer = person.http.post(
        action, data={**hidden, "user": "alice", "password": PASSWORD}, headers={"Origin": person.base}
    )
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/authorize?")
    set_cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in set_cookie
    assert "SameSite=Lax" in set_cookie
    assert "Max-Age=43200" in set_cookie
    assert person.http.cookies["mcpctl"] != before
    stranger = Person(served)  # who has set the cookie before, as he might in a place where browsers are shared
    stranger.http.cookies.set("mcpctl", before)
    assert 'name="password"' in stranger.open("/connections").text


def test_prompt_login_asks_for_the_password_once_more(served: Site, app: App) -> None:
    person = Person(served)
    person.asked(app.asking())
    page = person.open(f"/authorize?{app.asking(prompt='login')}")
    assert 'name="password"' in page.text
    assert "It could" in person.sign_in(page).text


@pytest.mark.parametrize("prompt", ["select_account", "login select_account", "consent select_account"])
def test_prompt_select_account_asks_who_it_is_once(served: Site, app: App, prompt: str) -> None:
    person = Person(served)
    person.asked(app.asking())
    page = person.open(f"/authorize?{app.asking(prompt=prompt)}")
    assert 'name="password"' in page.text
    assert "It could" in person.sign_in(page).text


def test_prompt_none_shows_nobody_a_page(served: Site, app: App) -> None:
    person = Person(served)
    assert person.open(f"/authorize?{app.asking(prompt='none')}").told["error"] == "login_required"
    person.asked(app.asking())
    assert person.open(f"/authorize?{app.asking(prompt='none')}").told["error"] == "consent_required"


# -- whose forms are taken --------------------------------------------------------------------------------------------


def test_a_form_of_another_site_is_refused(served: Site, app: App) -> None:
    person = Person(served)
    page = person.asked(app.asking())
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        answer = person.send(page, origin=origin, answer="allow")
        assert answer.status == 403
        assert "code=" not in answer.text
    action, hidden = page.forms()[0]
    answer = Page(person.http.post(action, data={**hidden, "answer": "allow"}))
    assert answer.status == 403
    site = {"Origin": person.base, "Sec-Fetch-Site": "cross-site"}
    assert person.http.post(action, data={**hidden, "answer": "allow"}, headers=site).status_code == 403
    assert "code" in person.send(page, answer="allow").told


def test_a_form_of_another_browser_or_for_something_else_is_refused(served: Site, app: App) -> None:
    one, two = Person(served), Person(served)
    page, other = one.asked(app.asking()), two.asked(app.asking())
    _, hidden = page.forms()[0]
    assert two.send(other, answer="allow", form_token=hidden["form_token"]).status == 403
    more = one.asked(app.asking(scope="mcp:write"))
    assert one.send(more, answer="allow", form_token=hidden["form_token"]).status == 403
    assert one.send(page, answer="allow", form_token="").status == 403
    assert one.send(page, answer="perhaps").status == 400
    assert one.send(page, answer="allow", more="1").status == 400


def test_what_the_client_asks_for_is_checked_once_more_behind_the_form(served: Site, app: App) -> None:
    """Whoever changes the URL between the page and its form has a form that belongs to another page."""
    person = Person(served)
    page = person.asked(app.asking())
    action, hidden = page.forms()[0]
    for changed in (action.replace("mcp%3Aread", "mcp%3Awrite"), action.replace("41234", "41235")):
        answer = person.http.post(changed, data={**hidden, "answer": "allow"}, headers={"Origin": person.base})
        assert answer.status_code == 403
        assert "code=" not in answer.text


def test_one_user_s_form_says_nothing_for_another(served: Site, app: App) -> None:
    person = Person(served)
    page = person.asked(app.asking())
    person.send(person.open("/connections"), form=0)  # sign out
    again = Person(served, "bob")
    again.http = person.http
    again.asked(app.asking())
    assert again.send(page, answer="allow").status == 403


def test_pages_refuse_frames_scripts_and_other_methods(served: Site, app: App) -> None:
    person = Person(served)
    for path in (f"/authorize?{app.asking()}", "/login", "/authorize", "/login?client_id=x"):
        answer = person.http.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "x-request-id" in answer.headers
        assert "<script" not in answer.text
    assert person.http.ask("DELETE", "/connections").status_code == 405
    assert person.http.ask("HEAD", "/login").status_code == 200


def test_a_request_for_another_host_is_answered_by_a_page_that_names_none(served: Site, app: App) -> None:
    answer = Person(served).http.get(f"/authorize?{app.asking()}", headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert 'href="http://evil' not in answer.text


def test_what_a_client_calls_itself_cannot_break_the_page(served: Site) -> None:
    app = App(served, client_name="<b onclick=alert(1)>\u202eevil")
    page = Person(served).asked(app.asking(state="</form><script>"))
    assert "<b onclick" not in page.text
    assert "\u202e" not in page.text
    assert "<script>" not in page.text


def test_a_query_that_is_too_long_or_no_query_is_told_so(served: Site, app: App) -> None:
    person = Person(served)
    assert person.http.get(f"/authorize?{app.asking()}&x={'a' * 8000}").status_code == 400
    assert person.http.get(f"/authorize?client_id=%zz&redirect_uri={quote('http://127.0.0.1/')}").status_code == 400
    assert person.http.get("/authorize").status_code == 400
    assert person.http.get("/connections?x=1").status_code == 400


# -- my connections ---------------------------------------------------------------------------------------------------


def _ids(page: Page) -> list[str]:
    return re.findall(r'name="end" value="([^"]+)"', page.text)


def test_a_user_sees_what_they_have_allowed_and_ends_it(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=ON)
    for name in ("alice", "bob"):
        give_password(site, name)
    site.start()
    app, alice, bob = App(site, client_name="The notebook"), Person(site, "alice"), Person(site, "bob")
    tokens = [app.connected(alice) for _ in range(3)]
    theirs = app.connected(bob)
    page = alice.open("/connections")
    assert page.text.count("The notebook") >= 3
    assert "Ask your databases questions" in page.text
    names = _ids(page)
    assert len(names) == 3
    assert theirs["access_token"].split("_")[1] not in names
    ended = alice.send(page, form=1, end=names[0])
    assert "The notebook was ended." in ended.text
    assert sum(app.works(one["access_token"]) for one in tokens) == 2
    foreign = alice.send(page, form=1, end=theirs["access_token"].split("_")[1])
    assert "nothing left to end" in foreign.text
    assert app.works(theirs["access_token"])
    assert "2 connections were ended." in alice.send(page, form=1, end_all="yes").text
    assert not any(app.works(one["access_token"]) for one in tokens)
    assert app.refresh(tokens[2]["refresh_token"]).status_code == 400
    assert app.works(theirs["access_token"])
    closed = [one for one in site.audit() if one["event"] == "session.closed"]
    assert [(one["user"], one["reason"]) for one in closed] == [("alice", "its user has ended it")] * 3


def test_a_connection_that_was_used_says_so_at_once(served: Site, app: App) -> None:
    person = Person(served, "bob")
    token = app.connected(person)["access_token"]
    assert "never" in person.open("/connections").text
    assert app.works(token)
    said = person.open("/connections").text
    assert "never" not in said


def test_who_is_listed_by_the_config_is_the_administrators_word_and_nobody_is_warned_of_it(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    listed = '    clients:\n      portal: {title: Reports portal, redirect_uris: ["https://portal.example.org/back"]}\n'
    site = make_site(newest_shop, extra=ON + listed)
    give_password(site, "alice")
    site.start()
    app, person = App(site, unregistered=True), Person(site)
    app.id, app.redirect = "portal", "https://portal.example.org/back"
    page = person.asked(app.asking(redirect_uri=app.redirect))
    assert "has set up" in page.text
    assert "not verified" not in page.text
    assert "Anybody can use that name" not in page.text
    assert app.redeem(person.send(page, answer="allow").told["code"]).status_code == 200
    assert "Set up by the administrator" in person.open("/connections").text


def test_who_is_disabled_or_whose_sessions_are_ended_is_signed_out_of_all_browsers(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = make_site(newest_shop, extra=ON)
    for name in ("alice", "bob"):
        give_password(at, name)
    at.start()
    app, person, other = App(at), Person(at), Person(at, "bob")
    for how in (("user", "disable", "alice"), ("session", "revoke", "--user", "alice"), ("session", "revoke", "--all")):
        other.asked(app.asking())
        code = person.allow(app.asking())["code"]
        at.run(*how)
        at.run("user", "enable", "alice")
        assert 'name="password"' in person.open(f"/authorize?{app.asking()}").text, how
        assert ('name="password"' in other.open(f"/authorize?{app.asking()}").text) == ("--all" in how)
        assert app.redeem(code).json()["error"] == "invalid_grant"


def test_a_browser_is_signed_in_where_its_user_s_tenant_may_be_alone(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop, extra=ON)
    give_password(at, "alice")
    at.run("tenant", "add", "acme", "--database", "shop", "--allow-ip", "127.0.0.0/8")
    at.edit_user("alice", tenant="acme")
    at.start()
    app, person = App(at), Person(at)
    asking = person.asked(app.asking())
    assert "It could" in asking.text
    assert person.open("/connections").status == 200
    file = at.folder / "tenants.yaml"
    file.write_text(file.read_text().replace("127.0.0.0/8", "10.0.0.0/8"))
    for page in (person.open(f"/authorize?{app.asking()}"), person.send(asking, answer="allow")):
        assert 'name="password"' in page.text
    assert 'name="password"' in person.open("/connections").text
    assert person.sign_in(person.open("/login")).status == 401


def test_a_client_whose_connection_the_operator_has_ended_asks_again(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(
        newest_shop, extra=f"{ON}    clients: {{board: {{redirect_uris: ['https://board.example/back']}}}}\n"
    )
    give_password(at, "alice")
    at.start()
    app, person = App(at, unregistered=True), Person(at)
    app.id, app.redirect = "board", "https://board.example/back"
    app.redeem(person.allow(app.asking())["code"])
    assert "code" in person.open(f"/authorize?{app.asking()}").told
    (session,) = (one["token"] for one in at.audit() if one["event"] == "session.opened")
    at.run("session", "revoke", session)
    assert "It could" in person.open(f"/authorize?{app.asking()}").text


def test_signing_out_leaves_the_clients_connected(served: Site, app: App) -> None:
    person = Person(served)
    token = app.connected(person)["access_token"]
    cookie = person.http.cookies["mcpctl"]
    page = person.send(person.open("/connections"), form=0)
    assert "You are signed out" in page.text
    person.http.cookies.set("mcpctl", cookie)
    assert 'name="password"' in person.open("/connections").text
    assert app.works(token)


def test_one_connection_more_than_allowed_ends_the_one_idle_longest(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=f"{ON}    per_user: 2\n")
    give_password(site, "alice")
    site.start()
    app, person = App(site), Person(site)
    tokens = [app.connected(person) for _ in range(3)]
    assert [app.works(one["access_token"]) for one in tokens] == [False, True, True]


def test_a_locked_server_lets_nobody_sign_in_and_renews_nothing(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=ON)
    give_password(site, "alice")
    site.start()
    app, person = App(site), Person(site)
    tokens, page = app.connected(person), person.asked(app.asking())
    site.run("lockdown")
    assert person.http.get(f"/authorize?{app.asking()}").status_code == 503
    assert person.send(page, answer="allow").status == 503
    answer = app.refresh(tokens["refresh_token"])
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    site.run("lockdown", "--lift")
    assert app.refresh(tokens["refresh_token"]).status_code == 200


def test_connections_outlive_a_restart_and_all_workers_know_them(make_site: MakeSite, newest_shop: Shop) -> None:
    site = make_site(newest_shop, extra=f"{ON}server:\n  workers: 2\n")
    give_password(site, "alice")
    site.start()
    app = App(site)
    person = Person(site)
    for _ in range(4):
        tokens = app.connected(person)
        assert all(app.works(tokens["access_token"]) for _ in range(4))
    site.stop()
    site.start()
    app.base, app.http.base = (site.url.removesuffix("/mcp"),) * 2
    assert app.works(tokens["access_token"])
