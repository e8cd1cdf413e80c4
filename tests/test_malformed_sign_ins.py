"""What is malformed at the sign-in endpoints in another way than a credential: its status, and that the reason and the
request's id are inside, and nothing secret outside."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import httpx
import pytest

from mcpctl.errors import Error, UsageError
from mcpctl.server.noted import Noted
from oauth_flow import ON, PASSWORD, App, Person, give_password
from site_of_mcpctl import Shop, Site, eventually, visit

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
SECRET = "a-secret-that-is-nowhere-said"
LARGE = SECRET * 40_000
"""Over a megabyte."""


@pytest.fixture(scope="module")
def site(newest_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    extra = ON + "  sessions: {enabled: true}\n"
    found = Site(tmp_path_factory.mktemp("malformed") / "site", newest_shop, extra)
    give_password(found, "alice")
    found.start()
    yield found
    found.stop()


def body_of(path: str, secret: str = SECRET) -> tuple[str, str]:
    """(kind, body) that is well formed there."""
    if path == "/api/v1/auth":
        return JSON, json.dumps({"user": "alice", "password": secret})
    if path == "/register":
        return JSON, json.dumps({"redirect_uris": ["http://127.0.0.1/back"], "client_name": "x", "more": secret})
    name = {"/token": "code", "/revoke": "token"}.get(path, "password")
    return FORM, f"form_token=x&user=alice&client_id=x&{name}={secret}"


def post(site: Site, path: str, content: str, kind: str, **headers: str) -> httpx.Response:
    base = site.url.removesuffix("/mcp")
    given = {"Content-Type": kind, "Sec-Fetch-Site": "same-origin", **headers}
    return visit("POST", base + path, content=content, headers=given, timeout=60)


def check_inside(site: Site, answer: httpx.Response) -> None:
    """Its id is in the header, the reason with that id in the server's log or the audit log, the secret nowhere."""
    number = answer.headers["x-request-id"]

    def inside() -> list[str]:
        told = [line for line in site.stderr if f"request {number}: " in line]
        audit = [one for one in site.audit() if one["event"] == "auth.refused" and one.get("request_id") == number]
        return told + [one["reason"] for one in audit]

    eventually(lambda: any(inside()))
    kept = "".join(site.stderr) + json.dumps(site.audit())
    for text in (answer.text, str(answer.headers), kept):
        assert SECRET not in text
        assert PASSWORD not in text


ENDPOINTS = ("/api/v1/auth", "/token", "/revoke", "/register", "/login")
WRONG = {"large": 413, "kind": 415, "packed": 415, "host": 421, "origin": 403, "encoding": 400, "query": 400}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [(path, wrong) for path in ENDPOINTS for wrong in WRONG if (path, wrong) != ("/register", "query")],
)
def test_what_is_malformed_has_its_status_outside_and_its_reason_inside(site: Site, path: str, wrong: str) -> None:
    kind, body = body_of(path)
    changed: dict[str, dict[str, str]] = {
        "large": {"content": body_of(path, LARGE)[1]},
        "kind": {"kind": "text/plain"},
        "packed": {"Content-Encoding": "gzip"},
        "host": {"Host": "evil.example"},
        "origin": {"Origin": "https://evil.example"},
        "encoding": {"content": "%zz"},
        "query": {"path": f"{path}?password={SECRET}"},
    }
    answer = post(site, **{"path": path, "content": body, "kind": kind, **changed[wrong]})
    assert answer.status_code == WRONG[wrong], answer.text
    check_inside(site, answer)


@pytest.mark.parametrize(
    ("query", "status", "given"),
    [
        ("", 400, {}), (f"client_id={SECRET}", 400, {}), ("client_id=%zz", 400, {}), (f"state={SECRET * 400}", 400, {}),
        ("", 421, {"Host": "evil.example"}), ("", 403, {"Origin": "https://evil.example"}),
    ],
)  # fmt: skip
def test_a_malformed_request_for_consent_gets_a_page_with_its_id_and_its_reason_is_inside(
    site: Site, query: str, status: int, given: dict[str, str]
) -> None:
    answer = visit("GET", f"{site.url.removesuffix('/mcp')}/authorize?{query}", headers=given)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"] in answer.text
    check_inside(site, answer)


def test_a_form_of_another_site_is_refused_and_the_log_knows(site: Site) -> None:
    person, app = Person(site), App(site)
    app.connected(person)
    page = person.open("/connections")
    answer = person.send(page, origin="https://evil.example", end_all="yes").answer
    assert answer.status_code == 403
    check_inside(site, answer)
    assert "Test client" in person.open("/connections").text


def test_a_password_of_1025_characters_is_a_wrong_one_and_one_of_a_megabyte_is_no_sign_in(site: Site) -> None:
    kind, large = body_of("/api/v1/auth", "x" * (1 << 20))
    assert post(site, "/api/v1/auth", large, kind).status_code == 413
    for length in (1024, 1025):
        answer = post(site, "/api/v1/auth", body_of("/api/v1/auth", "x" * length)[1], kind)
        assert answer.status_code == 401
        check_inside(site, answer)


def test_a_client_that_is_none_is_told_so_and_the_log_knows(site: Site) -> None:
    answer = post(site, "/token", f"grant_type=refresh_token&refresh_token={SECRET}&client_id=nobody", FORM)
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    check_inside(site, answer)


@pytest.mark.parametrize("path", [*ENDPOINTS, "/authorize"])
def test_too_many_are_told_when_to_come_again_and_the_audit_log_knows(
    make_site: Callable[..., Site], newest_shop: Shop, path: str
) -> None:
    extra = f"{ON}  sessions: {{enabled: true}}\nlimits: {{addresses: {{rate: 0.001, burst: 1}}}}\n"
    site = make_site(newest_shop, extra=extra).start()
    kind, body = body_of(path)
    answers = [post(site, path, body, kind) for _ in range(3)]
    answer = answers[-1]
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    check_inside(site, answer)


def test_of_many_the_log_has_one_a_minute_and_their_number(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    noted = Noted(lambda: now)
    with caplog.at_level(logging.INFO, "mcpctl.sign_in"):
        for number in range(5):
            noted("/token", UsageError("the body is to be a form"), str(number))
            noted("/token", Error(f"Host {number} is none of ours", status=421), str(number))
        now = 61.0
        noted("/token", UsageError("the body is to be a form"), "5")
    assert [one.getMessage() for one in caplog.records] == [
        "request 0: /token: 400, the body is to be a form",
        "request 0: /token: 421, Host 0 is none of ours",
        "request 5: /token: 400, the body is to be a form (4 more before)",
    ]
