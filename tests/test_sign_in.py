"""Sign-in over HTTP: a password becomes a session, a session is a principal, and it ends for good."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
import pytest

import oauth_flow
from mcpctl.server import sign_in as routes
from signed_in import ENABLED, FORMS, PASSWORD, ask, base, by, events, hashed, session, sign_in
from site_of_mcpctl import Shop, Site, eventually, in_background

SLEEP = {"query": "select pg_sleep(25)"}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
Make = Callable[..., Site]


@pytest.fixture
def signing(newest_shop: Shop, make_site: Make) -> Callable[..., Site]:
    """Makes a site where alice has a password, and bob has none. It is not started yet."""

    def make(extra: str = "") -> Site:
        site = make_site(newest_shop, extra=ENABLED + extra)
        site.edit_user("alice", password=hashed())
        return site

    return make


@pytest.fixture
def site(signing: Callable[..., Site]) -> Site:
    return signing().start()


# -- in -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_password_becomes_a_session_that_asks_like_a_token_on_every_lane(site: Site, form: str) -> None:
    answer = sign_in(site)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    found = answer.json()
    assert [*found] == ["session_id", "expires_at", "idle_seconds", "user"]
    assert (found["user"], found["idle_seconds"]) == ("alice", 3600)
    left = datetime.fromisoformat(found["expires_at"]).timestamp() - time.time()
    assert 86300 < left <= 86400
    with by(site, form, found["session_id"]) as client:
        for number in range(3):  # the second and the third go the hot way, where there is one
            assert client.rows(f"select {number}") == [[number]]
        listed = client.http.post(site.url, json=LIST).json()["result"]["tools"]
        assert {"query_database", "whoami"} <= {one["name"] for one in listed}
        who = client.call("whoami").json()["result"]["structuredContent"]
        assert who["user"] == "alice"


def test_each_session_has_a_pool_of_its_own(site: Site) -> None:
    (first, one), (second, other) = session(site), session(site)
    with site.client(one) as client, site.client(other) as another:
        client.rows("select 1")
        another.rows("select 1")
    names = {name for _, name, _, _ in site.shop.backends()}
    assert {f"mcpctl {first}", f"mcpctl {second}"} <= names


def test_a_session_is_opened_and_used_in_the_audit_log_and_the_password_is_nowhere(site: Site) -> None:
    name, text = session(site)
    with site.client(text) as client:
        client.rows("select 1")
    wrong = "my other secret phrase"
    sign_in(site, password=wrong)
    sign_in(site, "typed-my-secret-here", wrong)
    sign_in(site, "A Secret Where The Name Belongs", wrong)
    site.stop()
    opened = events(site, "session.opened")
    assert [(line["token"], line["user"], line["client_ip"], line["transport"]) for line in opened] == [
        (name, "alice", "127.0.0.1", "http")
    ]
    assert opened[0]["request_id"]
    refused = events(site, "auth.refused")
    assert [(line.get("user"), line["reason"]) for line in refused] == [
        ("alice", "wrong password"), (None, "no such user"), (None, "no such user"),
    ]  # fmt: skip
    assert next(line["token"] for line in site.audit() if line["event"] == "tool.called") == name
    kept = b"".join(path.read_bytes() for path in site.folder.rglob("*") if path.is_file())
    said = kept + "".join(site.stderr).encode()
    for secret in (PASSWORD, wrong, text, "typed-my-secret-here", "A Secret Where The Name Belongs"):
        assert secret.encode() not in said


def test_everything_that_is_wrong_with_the_two_is_one_answer(site: Site) -> None:
    site.user("carol")
    site.edit_user("carol", password=hashed())
    site.run("user", "disable", "carol")
    answers = [
        sign_in(site, user, password)
        for user, password in (
            ("alice", "wrong"), ("alice", ""), ("alice", "x" * 5000), ("alice", "\ud800"), ("nobody", PASSWORD),
            ("", ""), ("ALICE", PASSWORD), ("alice\n", PASSWORD), ("bob", PASSWORD), ("bob", ""), ("carol", PASSWORD),
        )
    ]  # fmt: skip
    said = {
        (one.status_code, one.text, one.headers["www-authenticate"], one.headers["cache-control"]) for one in answers
    }
    assert len(said) == 1
    assert answers[0].status_code == 401
    assert "token" not in answers[0].text
    site.stop()
    reasons = {line["reason"] for line in events(site, "auth.refused")}
    told_of = {"wrong password", "no such user", "its user carol is disabled"}
    assert reasons <= told_of | {line for line in reasons if "more within" in line}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"null", b"not json", b'{"user":"alice"}', b'{"user":"alice","password":1}',
        b'{"user":null,"password":"x"}', b'{"user":"alice","password":"x","more":1}',
        b'{"user":"alice","user":"bob","password":"x"}', b'{"user":"alice","password":"x"} ', b"[" * 16000,
        b'{"user":"al\xffice","password":"x"}', b'\xef\xbb\xbf{"user":"alice","password":"x"}',
    ],
)  # fmt: skip
def test_what_is_no_sign_in_is_read_as_none_and_not_repeated(body: bytes) -> None:
    if body.endswith(b"} "):  # white space is JSON's
        assert routes.read(body) == ("alice", "x")
        return
    with pytest.raises(routes.UsageError) as caught:
        routes.read(body)
    assert "alice" not in caught.value.message + str(caught.value.hint)


@pytest.mark.parametrize("key, body", [
    ("password", b'{"user":"alice","password":null}'),
    ("user", b'{"user":7,"password":"x"}'),
])  # fmt: skip
def test_a_sign_in_with_an_empty_variable_for_a_text_names_which_it_is(key: str, body: bytes) -> None:
    with pytest.raises(routes.UsageError, match=f"^the {key} of the sign-in is no text$"):
        routes.read(body)


def test_a_malformed_sign_in_is_refused_before_anything_is_hashed(site: Site) -> None:
    right = json.dumps({"user": "alice", "password": PASSWORD})
    kind = {"Content-Type": "application/json"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert sign_in(site, content=b"{", headers=kind).status_code == 400
    assert sign_in(site, content=right, headers=form).status_code == 415
    assert sign_in(site, content=right).status_code == 415
    large = json.dumps({"user": "alice", "password": "x" * (1 << 20)})
    assert sign_in(site, content=large, headers=kind).status_code == 413
    origin = {**kind, "Origin": "https://evil.example"}
    assert sign_in(site, content=right, headers=origin).status_code == 403
    assert sign_in(site, content=right, headers={**kind, "Host": "evil.example"}).status_code == 421
    in_url = httpx.post(f"{base(site)}/api/v1/auth?user=alice&password=x", content=right, headers=kind, trust_env=False)
    assert in_url.status_code == 400
    for method in ("GET", "PUT", "PATCH"):
        answer = ask(site, method, "/api/v1/auth", None)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST, DELETE")
    assert events(site, "session.opened", "auth.refused") == []


def test_without_sessions_in_the_config_there_is_nothing_there(newest_shop: Shop, make_site: Make) -> None:
    site = make_site(newest_shop)
    site.edit_user("alice", password=hashed())
    site.start()
    _, token = site.token()
    for method, path in (("POST", "/api/v1/auth"), ("DELETE", "/api/v1/auth"), ("GET", "/api/v1/admin/sessions")):
        unknown = ask(site, method, "/no/such/path", token)
        found = ask(site, method, path, token)
        assert (found.status_code, found.text) == (404, unknown.text)


def test_a_locked_server_tells_only_who_knows_the_password(site: Site) -> None:
    _, text = session(site)
    site.run("lockdown", "--reason", "drill")
    answer = sign_in(site)
    assert (answer.status_code, "locked" in answer.text) == (503, True)
    wrong = sign_in(site, password="wrong")
    assert (wrong.status_code, "locked" in wrong.text) == (401, False)
    site.run("lockdown", "--lift")
    assert sign_in(site).status_code == 200
    with site.client(text) as client:
        assert client.rows("select 1") == [[1]]


def test_who_was_wrong_ten_times_waits_and_uses_a_token_meanwhile(signing: Callable[..., Site]) -> None:
    site = signing()
    site.limits = {"MCPCTL_LIMITS__RATE": "1000", "MCPCTL_LIMITS__BURST": "1000"}
    site.start()
    _, token = site.token()
    _, text = session(site)
    for number in range(10):
        assert sign_in(site, ("alice", "nobody")[number % 2], "x" * 3000).status_code == 401  # no password: not hashed
    for user, password in (("alice", PASSWORD), ("alice", "wrong"), ("nobody", "wrong")):
        answer = sign_in(site, user, password)
        assert answer.status_code == 429
        assert 800 < int(answer.headers["retry-after"]) <= 900
        assert "wrong passwords" in answer.text
    for one in (token, text):
        with site.client(one) as client:
            assert client.rows("select 1") == [[1]]
    assert httpx.post(site.url, json=LIST, headers={"Authorization": "Bearer x"}, trust_env=False).status_code == 401


def test_a_tenant_s_networks_hold_for_its_users_passwords(signing: Callable[..., Site]) -> None:
    site = signing()
    site.run("tenant", "add", "acme", "--database", "shop", "--allow-ip", "10.0.0.0/8")
    site.edit_user("alice", tenant="acme")
    site.start()
    assert (sign_in(site).status_code, sign_in(site, password="wrong").status_code) == (401, 401)
    refused = events(site, "auth.refused")
    assert [line["reason"] for line in refused] == ["not from this address (127.0.0.1)", "wrong password"]


def test_a_log_that_cannot_be_written_lets_nobody_sign_in(site: Site) -> None:
    log = site.folder / "audit.jsonl"
    session(site)
    log.rename(site.folder / "moved.jsonl")
    log.mkdir()
    assert sign_in(site).status_code == 503
    log.rmdir()
    (site.folder / "moved.jsonl").rename(log)
    eventually(lambda: sign_in(site).status_code == 200)
    assert len(events(site, "session.opened")) == 2


def test_who_goes_away_before_they_are_answered_gets_no_session(site: Site) -> None:
    host, port = base(site).removeprefix("http://").split(":")
    body = json.dumps({"user": "alice", "password": PASSWORD})
    head = f"POST /api/v1/auth HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    kept, _ = session(site)
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    name, _ = session(site)  # its turn comes after the other's
    assert [line["token"] for line in events(site, "session.opened")] == [kept, name]


# -- out ------------------------------------------------------------------------------------------------------------


def test_who_signs_out_ends_this_session_and_no_other(site: Site) -> None:
    (name, text), (_, other) = session(site), session(site)
    answer = ask(site, "DELETE", "/api/v1/auth", text)
    assert (answer.status_code, answer.content) == (204, b"")
    assert ask(site, "DELETE", "/api/v1/auth", text).status_code == 401
    with site.client(other) as client:
        assert client.rows("select 1") == [[1]]
    _, token = site.token()
    assert ask(site, "DELETE", "/api/v1/auth", token).status_code == 403
    assert ask(site, "DELETE", "/api/v1/auth", None).status_code == 401
    closed = events(site, "session.closed")
    assert [(line["token"], line["user"], line["reason"]) for line in closed] == [(name, "alice", "signed out")]


def test_the_sixth_session_ends_the_one_idle_longest_and_a_restart_keeps_the_others(
    signing: Callable[..., Site],
) -> None:
    site = signing("")
    site.start()
    opened = [session(site) for _ in range(5)]
    time_of = {
        one["id"]: one["last_used_at"] for one in json.loads(site.run("session", "list", "--json").stdout)["signed_in"]
    }
    assert {*time_of} == {name for name, _ in opened}

    def used() -> bool:  # a use is noted when the last note is a second old or more
        with site.client(opened[0][1]) as client:
            client.call("whoami")
        found = json.loads(site.run("session", "list", "--json").stdout)["signed_in"]
        return found[0]["id"] == opened[0][0]

    eventually(used, 60, 1)
    opened.append(session(site))
    gone = opened[1]
    assert ask(site, "DELETE", "/api/v1/auth", gone[1]).status_code == 401
    closed = events(site, "session.closed")
    assert [(line["token"], line["reason"]) for line in closed] == [
        (gone[0], "another sign-in of its user took its place")
    ]
    site.stop()
    site.start()
    for name, text in opened:
        with site.client(text) as client:
            assert client.call("whoami").status_code == (401 if name == gone[0] else 200)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_session_whose_time_is_over_ends_with_what_it_has_running_and_one_line(
    signing: Callable[..., Site], workers: str
) -> None:
    site = signing()
    site.limits = {**site.limits, "MCPCTL_AUTH__SESSIONS__IDLE": "2s"}
    site.start("--workers", workers)
    name, text = session(site)
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        assert running.result(15).status_code == 401
    lines = eventually(lambda: events(site, "session.closed"))
    assert [(line["token"], line["user"], line["reason"]) for line in lines] == [(name, "alice", "not used for 2 s")]
    assert events(site, "token.expired") == []
    assert site.shop.backends("state = 'active'") == []


# -- those of others ------------------------------------------------------------------------------------------------


def admin(site: Site) -> str:
    site.user("root", "mcp-admin")
    return site.token("root")[1]


def test_an_administrator_sees_sessions_without_secrets_and_ends_them(site: Site) -> None:
    root = admin(site)
    (first, text), (second, _) = session(site), session(site)
    answer = ask(site, "GET", "/api/v1/admin/sessions", root)
    found = answer.json()["sessions"]
    assert [one["id"] for one in found] == [second, first]
    assert {key: found[0][key] for key in ("kind", "user", "address", "client")} == {
        "kind": "password", "user": "alice", "address": "127.0.0.1", "client": None,
    }  # fmt: skip
    assert {"created_at", "last_used_at", "ends_at", "expires_at"} < found[0].keys()
    assert text not in answer.text
    assert text.split("_")[2] not in answer.text
    assert ask(site, "HEAD", "/api/v1/admin/sessions", root).status_code == 200
    assert ask(site, "GET", "/api/v1/admin/sessions?user=bob", root).json() == {"sessions": []}
    assert ask(site, "DELETE", f"/api/v1/admin/sessions/{first}", root).status_code == 204
    assert ask(site, "DELETE", f"/api/v1/admin/sessions/{first}", root).status_code == 404
    assert ask(site, "DELETE", "/api/v1/admin/sessions?user=alice", root).json() == {"ended": [second]}
    assert ask(site, "GET", "/api/v1/admin/sessions", root).json() == {"sessions": []}
    closed = events(site, "session.closed")
    assert [(line["token"], line["user"], line["reason"]) for line in closed] == [
        (one, "alice", "ended over HTTP by root") for one in (first, second)
    ]


def test_where_only_clients_are_let_in_http_and_the_command_line_tell_the_same_of_them(
    newest_shop: Shop, make_site: Make
) -> None:
    site = make_site(newest_shop, extra=oauth_flow.ON)
    oauth_flow.give_password(site, "alice")
    site.start()
    root, app, person = admin(site), oauth_flow.App(site), oauth_flow.Person(site)
    first, second = app.connected(person), app.connected(person)
    ids = [one["access_token"].split("_")[1] for one in (second, first)]
    told = ask(site, "GET", "/api/v1/admin/sessions", root).json()["sessions"]
    assert told == json.loads(site.run("session", "list", "--json").stdout)["signed_in"]
    assert [(one["id"], one["kind"], one["client"]) for one in told] == [(one, "oauth", app.id) for one in ids]
    assert ask(site, "POST", "/api/v1/auth", None).status_code == 404
    assert ask(site, "DELETE", f"/api/v1/admin/sessions/{ids[0]}", root).status_code == 204
    assert not app.works(second["access_token"])
    assert 'name="password"' not in person.open("/connections").text
    assert ask(site, "DELETE", "/api/v1/admin/sessions?user=alice", root).json() == {"ended": [ids[1]]}
    assert not app.works(first["access_token"])
    assert 'name="password"' in person.open("/connections").text  # the browser, too, is to show it again


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "/api/v1/admin/sessions", 400), ("DELETE", "/api/v1/admin/sessions?user=", 400),
        ("DELETE", "/api/v1/admin/sessions?user=a&user=b", 400), ("GET", "/api/v1/admin/sessions?all=1", 400),
        ("DELETE", "/api/v1/admin/sessions/Snothere", 404), ("DELETE", "/api/v1/admin/sessions/", 404),
        ("DELETE", "/api/v1/admin/sessions/*", 404), ("DELETE", "/api/v1/admin/sessions/a/b", 404),
        ("POST", "/api/v1/admin/sessions", 405), ("GET", "/api/v1/admin/sessions/Sabcdefg", 405),
    ],
)  # fmt: skip
def test_what_an_administrator_may_not_mean_ends_nothing(
    make_site: Make, newest_shop: Shop, live_admin: tuple[Site, str], method: str, path: str, status: int
) -> None:
    site, root = live_admin
    assert ask(site, method, path, root).status_code == status
    assert ask(site, "GET", "/api/v1/admin/sessions", root).json()["sessions"]


@pytest.fixture(scope="module")
def live_admin(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    site = Site(tmp_path_factory.mktemp("admin") / "site", newest_shop, extra=ENABLED)
    site.edit_user("alice", password=hashed())
    site.start()
    session(site)
    yield site, admin(site)
    site.stop()


def test_who_lacks_the_permission_is_told_so_and_the_log_knows(newest_shop: Shop, make_site: Make) -> None:
    extra = "auth:\n  sessions: {enabled: true}\n  roles: {desk: {permissions: ['sessions:list']}}\n"
    site = make_site(newest_shop, extra=extra)
    site.edit_user("alice", password=hashed())
    site.user("desk", "desk")
    site.start()
    name, text = session(site)
    desk = site.token("desk")[1]
    assert ask(site, "GET", "/api/v1/admin/sessions", desk).json()["sessions"][0]["id"] == name
    for method, path, who in (
        ("DELETE", f"/api/v1/admin/sessions/{name}", desk), ("DELETE", "/api/v1/admin/sessions?user=alice", desk),
        ("GET", "/api/v1/admin/sessions", text), ("DELETE", f"/api/v1/admin/sessions/{name}", text),
        ("DELETE", "/api/v1/admin/sessions/Snothere", text),
    ):  # fmt: skip
        assert ask(site, method, path, who).status_code == 403
    assert ask(site, "GET", "/api/v1/admin/sessions", None).status_code == 401
    reasons = [(line["user"], line["reason"][:21]) for line in events(site, "auth.refused") if "user" in line]
    assert reasons[0] == ("desk", "may not sessions:end:")
    assert events(site, "session.closed") == []


def test_an_administrator_of_a_tenant_knows_of_no_session_of_others(signing: Callable[..., Site]) -> None:
    site = signing()
    site.run("tenant", "add", "acme", "--database", "shop")
    site.user("boss", "mcp-admin")
    site.edit_user("boss", tenant="acme")
    site.edit_user("bob", password=hashed(), tenant="acme")
    site.start()
    site.edit_user("alice", tenant="acme")
    (theirs, _) = session(site, "bob")
    site.user("carol")
    site.edit_user("carol", password=hashed())
    foreign, text = session(site, "carol")
    boss = site.token("boss")[1]
    assert [one["id"] for one in ask(site, "GET", "/api/v1/admin/sessions", boss).json()["sessions"]] == [theirs]
    assert ask(site, "DELETE", f"/api/v1/admin/sessions/{foreign}", boss).status_code == 404
    assert ask(site, "DELETE", "/api/v1/admin/sessions?user=carol", boss).json() == {"ended": []}
    assert ask(site, "DELETE", "/api/v1/auth", text).status_code == 204


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_session_that_is_ended_loses_its_running_query_within_a_second(
    signing: Callable[..., Site], workers: str
) -> None:
    site = signing().start("--workers", workers)
    root = admin(site)
    name, text = session(site)
    with site.client(text) as client:
        running = in_background(client.call, "query_database", SLEEP)
        eventually(lambda: site.shop.backends("state = 'active'"))
        begun = time.monotonic()
        assert ask(site, "DELETE", f"/api/v1/admin/sessions/{name}", root).status_code == 204
        eventually(lambda: not site.shop.backends("state = 'active'"))
        assert running.result(10).status_code == 401
        assert time.monotonic() - begun < 1
        assert client.call("whoami").status_code == 401


def test_what_one_worker_opens_and_ends_every_worker_knows_at_once(signing: Callable[..., Site]) -> None:
    site = signing().start("--workers", "2")
    for _ in range(4):
        _, text = session(site)
        for _ in range(8):  # each connection may be another worker's
            with site.client(text) as client:
                assert client.call("whoami").status_code == 200
        assert ask(site, "DELETE", "/api/v1/auth", text).status_code == 204
        for _ in range(8):
            with site.client(text) as client:
                assert client.call("whoami").status_code == 401
