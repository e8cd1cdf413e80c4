"""The pages of sign-in: what a stranger has written does no harm there, and everybody can use them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sign_in_pages as sample
from mcpctl.errors import UsageError
from mcpctl.policy.roles import BUILT_IN
from mcpctl.server.pages import Answer, Client, Pages, Scope
from mcpctl.server.shown import NAME, Place, place, shown
from mcpctl.server.wording import changes, in_words
from mcpctl.tools.table import TOOLS

EVERY = sample.every()
WITH_FORM = [name for name in EVERY if name.startswith(("sign-in", "consent", "connections"))]
VOID = {"meta", "link", "input"}
ALLOWED = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "main", "p", "span", "bdi", "b", "strong", "h1",
    "h2", "form", "label", "input", "button", "dl", "dt", "dd", "ul", "li", "code", "div", "time", "a",
}  # fmt: skip


class Page(HTMLParser):
    """A page as its elements: (tag, attributes), the texts of each, and what is wrong with their nesting."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[int] = []
        self.texts: dict[int, str] = {}
        self.feed(answer.body.decode())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for number in self.open:
            self.texts[number] = self.texts.get(number, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    def text(self, tag: str) -> str:
        """The words of the first element of this kind."""
        number = next(at for at, (found, _) in enumerate(self.elements) if found == tag)
        return " ".join(self.texts[number].split())


def headers(answer: Answer) -> dict[str, str]:
    found = {name.decode(): value.decode() for name, value in answer.headers}
    assert len(found) == len(answer.headers)
    return found


def policy(answer: Answer) -> dict[str, str]:
    parts = (part.partition(" ") for part in headers(answer)["content-security-policy"].split("; "))
    return {name: value for name, _, value in parts}


# -- what strangers have written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_no_page_has_anything_but_plain_elements_that_fit_into_each_other(name: str) -> None:
    page = Page(EVERY[name])
    assert {tag for tag, _ in page.elements} <= ALLOWED
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key == "style"]


@pytest.mark.parametrize("name", [name for name in EVERY if name.endswith("worst")])
def test_markup_in_names_is_text_and_controls_are_gone(name: str) -> None:
    answer = EVERY[name]
    assert "<script>alert(1)</script>\"'&" in Page(answer).text("main") + Page(answer).text("title")
    text = answer.body.decode()
    assert not [one for one in text if unicodedata.category(one) in ("Cf", "Cc", "Cs") and one != "\n"]
    assert "W" * 501 not in text
    assert len(answer.body) < 20_000


def test_a_quote_in_a_users_name_or_a_hidden_field_stays_in_its_attribute() -> None:
    form = sample.form("/login?a=\"><script>'")
    page = Page(Pages(sample.ORIGIN).sign_in(form, user="\" onfocus='x' <"))
    fields = {field["name"]: field for field in page.all("input")}
    assert fields["user"]["value"] == "\" onfocus='x' <"
    assert page.all("form")[0]["action"] == form.action
    assert fields["form_token"]["value"] == form.token
    assert fields["request"]["value"] == form.hidden["request"]


@given(st.text(), st.integers(2, 100))
def test_whatever_is_shown_is_short_and_each_character_of_it_is_seen(text: str, limit: int) -> None:
    found = shown(text, limit)
    assert len(found) <= limit
    assert not {unicodedata.category(one) for one in found} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert shown(found, limit) == found
    assert found == " ".join(found.split())


@pytest.mark.parametrize(
    "name, said",
    [
        ("Claude", "Claude"),
        ("  Claude \n Desktop\t", "Claude Desktop"),
        ("Ünïcödé 日本語 العربية 🎉", "Ünïcödé 日本語 العربية 🎉"),
        ("a\u202eb", "a\ufffdb"),
        ("a\u200bb", "a\ufffdb"),
        ("z" + "\u0301" * 50 + "o", "z\u0301\u0301o"),
        ("x" * NAME, "x" * NAME),
        ("x" * (NAME + 1), "x" * (NAME - 1) + "…"),
        (" " * 10_000 + "x", "…"),
        ("\ud800", "\ufffd"),
    ],
)
def test_names_are_shown_as_they_are_as_far_as_that_is_safe(name: str, said: str) -> None:
    assert shown(name) == said


@pytest.mark.parametrize("name", ["", "   ", "\u3164\u2800", "\u202e\u200b", " " * 10_000])
def test_a_client_whose_name_nobody_can_see_is_said_to_have_none(name: str) -> None:
    assert Client(name, "https://a.example/").title == "A client without a name"


@pytest.mark.parametrize(
    "uri, found",
    [
        ("https://claude.ai/api/mcp/auth_callback", Place("web", "claude.ai")),
        ("https://CLAUDE.ai:443/x", Place("web", "claude.ai")),
        ("https://claude.ai:8443/x", Place("web", "claude.ai:8443")),
        ("http://127.0.0.1:33418/callback", Place("loopback", "127.0.0.1:33418")),
        ("http://localhost/callback", Place("loopback", "localhost")),
        ("http://[::1]:9/", Place("loopback", "[::1]:9")),
        ("cursor://anysphere.cursor-mcp/oauth", Place("app", "cursor:")),
        ("com.example.app:/back", Place("app", "com.example.app:")),
    ],
)
def test_a_page_says_where_a_redirect_leads(uri: str, found: Place) -> None:
    assert place(uri) == found


@pytest.mark.parametrize(
    "uri",
    [
        "", "claude.ai", "//claude.ai/", "https:claude.ai", "https:///claude.ai", "https://", "http://claude.ai/",
        "http://127.0.0.1.evil.example/", "http://127.1/", "http://2130706433/", "https://claude.ai@evil.example/",
        "https://:x@evil.example/", "https://evil.example\\@claude.ai/", "https://evil.example\t/", "https://a b/",
        "https://evil.example%2eclaude.ai/", "https://clаude.ai/", "https://a.example:99999/", "https://a.example:x/",
        "https://[::1/", "https://a.example/\r\nx", "https://a.example/\"", "https://a.example/<",
        "javascript:alert(1)", "JavaScript:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd", "blob:https://a.example/x",
        "view-source:https://a.example/", " https://a.example/", "https://a.example/" + "x" * 9000, "1a://x",
    ],
)  # fmt: skip
def test_a_redirect_that_could_lead_elsewhere_than_it_says_is_refused(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        place(uri)
    assert caught.value.hint


def test_nobody_is_sent_elsewhere_than_to_the_client() -> None:
    pages = Pages(sample.ORIGIN)
    for url in ("https://evil.example/?code=x", "http://127.0.0.1/?code=x", "javascript:alert(1)"):
        with pytest.raises(UsageError):
            pages.leaving(sample.CLAUDE, url)


# -- headers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_each_page_comes_with_headers_that_let_nothing_in(name: str) -> None:
    answer = EVERY[name]
    found, allowed = headers(answer), policy(answer)
    style = re.search(rb"<style>(.*?)</style>", answer.body, re.DOTALL)
    assert style
    digest = b64encode(sha256(style[1]).digest()).decode()
    assert allowed == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "form-action": "'self'" if name in WITH_FORM else "'none'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    assert found["content-type"] == "text/html; charset=utf-8"
    assert int(found["content-length"]) == len(answer.body)
    assert found["cache-control"] == "no-store"
    assert found["x-frame-options"] == "DENY"
    assert found["x-content-type-options"] == "nosniff"
    assert found["referrer-policy"] == ("same-origin" if name in WITH_FORM else "no-referrer")
    assert "camera=()" in found["permissions-policy"]


def test_only_a_page_on_which_a_clients_page_waits_keeps_the_window_that_opened_it() -> None:
    kept = {name for name in EVERY if headers(EVERY[name])["cross-origin-opener-policy"] == "unsafe-none"}
    assert {"sign-in-client", "consent", "consent-loopback", "leaving"} <= kept
    assert not kept & {"sign-in", "consent-app", "connections", "failed", "done", "leaving-app"}


def test_the_status_says_what_the_page_says() -> None:
    statuses = {name: EVERY[name].status for name in ("sign-in", "sign-in-wrong", "sign-in-limited", "failed")}
    assert statuses == {"sign-in": 200, "sign-in-wrong": 401, "sign-in-limited": 429, "failed": 400}
    assert headers(EVERY["sign-in-limited"])["retry-after"] == "90"
    assert "Try again in 90 seconds" in Page(EVERY["sign-in-limited"]).text("main")
    more = Pages(sample.ORIGIN).sign_in(sample.form("/login"), retry_after=121)
    assert "Try again in 3 minutes" in Page(more).text("main")


def test_jinja_is_not_imported_before_a_page_is_made() -> None:
    script = (
        "import sys; from mcpctl.server.pages import Pages; p = Pages('https://a.example'); "
        "a = 'jinja2' in sys.modules; p.done('x'); print(__import__('json').dumps([a, 'jinja2' in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    assert json.loads(found.stdout) == [False, True]


# -- for everybody --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_no_page_loads_anything(name: str) -> None:
    for tag, attributes in Page(EVERY[name]).elements:
        assert not attributes.keys() & {"src", "srcset", "background", "poster", "formaction", "ping"}
        if tag == "link":
            assert (attributes["href"] or "").startswith("data:image/svg+xml,")
    style = EVERY[name].body.partition(b"<style>")[2].partition(b"</style>")[0]
    assert b"url(" not in style
    assert b"@import" not in style


@pytest.mark.parametrize("name", EVERY)
def test_each_page_says_its_language_its_state_and_whose_it_is(name: str) -> None:
    page = Page(EVERY[name])
    assert page.all("html") == [{"lang": "en"}]
    assert page.text("title").endswith(" – mcpctl on db.example.com")
    assert page.text("header") == "mcpctl on db.example.com"
    assert [len(page.all(tag)) for tag in ("title", "main", "header", "h1")] == [1, 1, 1, 1]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_the_titles_of_different_states_differ() -> None:
    ordinary = [name for name in EVERY if not name.endswith("worst")]
    titles = {Page(EVERY[name]).text("title").partition(" – mcpctl")[0] for name in ordinary}
    assert {
        "Sign in", "Not signed in: Name or password is wrong.",
        "Not signed in: Too many tries. Try again in 90 seconds.",
        "Allow Claude?", "My connections", "Cursor was ended. – My connections", "You are signed out", "Back to Claude",
        "Error: The client asks to be answered at an address that it has not registered",
    } <= titles  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_each_field_has_a_label_and_what_describes_it_is_there(name: str) -> None:
    page = Page(EVERY[name])
    labels = {label["for"] for label in page.all("label")}
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for field in page.all("input"):
        assert field["type"] == "hidden" or field["id"] in labels
    for _, attributes in page.elements:
        assert set((attributes.get("aria-describedby") or "").split()) <= ids


def test_password_managers_know_the_fields() -> None:
    fields = {field["name"]: field for field in Page(EVERY["sign-in"]).all("input")}
    assert fields["user"]["autocomplete"] == "username"
    assert fields["password"]["autocomplete"] == "current-password"
    assert "maxlength" not in fields["password"] | fields["user"]
    assert "value" not in fields["password"]


def test_an_error_is_an_alert_that_both_fields_point_to() -> None:
    page = Page(EVERY["sign-in-wrong"])
    fields = {field["name"]: field for field in page.all("input")}
    for name in ("user", "password"):
        assert "problem" in (fields[name]["aria-describedby"] or "").split()
        assert fields[name]["aria-invalid"] == "true"
    assert next(one for _, one in page.elements if one.get("role") == "alert")["id"] == "problem"
    assert "autofocus" in fields["password"]
    assert "aria-invalid" not in EVERY["sign-in-limited"].body.decode().partition("<body>")[2]
    assert fields["user"]["value"] == "anna"


def test_consent_names_client_user_scopes_databases_and_where_the_answer_goes() -> None:
    page = Page(EVERY["consent"])
    said = page.text("main")
    for words in ("Claude", "anna", "claude.ai verified", "Read data in the database sales", "warehouse-eu"):
        assert words in said
    assert "not verified" not in said
    buttons = [(button["name"], button["value"], button.get("class")) for button in page.all("button")]
    assert buttons == [("answer", "deny", None), ("answer", "allow", None)]


@pytest.mark.parametrize(
    "name, warned",
    [("consent-loopback", "Any program on this device"), ("consent-app", "Any program on this device"),
     ("consent-stranger", "Do you know mcp.example.net?")],
)  # fmt: skip
def test_consent_warns_where_a_client_only_says_who_it_is(name: str, warned: str) -> None:
    said = Page(EVERY[name]).text("main")
    assert "It says of itself that it is" in said
    assert "not verified" in said
    assert warned in said


def test_what_makes_changes_is_marked() -> None:
    assert "Run statements that change or delete data makes changes" in Page(EVERY["consent-loopback"]).text("main")
    assert "makes changes" not in Page(EVERY["consent"]).text("main")


def test_each_connection_can_be_ended_by_a_button_that_names_it_and_all_by_one() -> None:
    page = Page(EVERY["connections"])
    buttons = [(button.get("name"), button.get("value")) for button in page.all("button")]
    assert buttons == [(None, None), ("end", "c1"), ("end", "c2"), ("end", "c3"), ("end_all", "yes")]
    said = page.text("main")
    for words in (
        "End Claude Code",
        "28 March 2026, 09:05 UTC, from 2001:db8:4006:812::200e",
        "28 November 2026, 09:05 UTC",
        "never",
        "End all 3",
    ):
        assert words in said
    assert "end_all" not in EVERY["connections-ended"].body.decode()
    assert "Nothing has access in your name" in Page(EVERY["connections-none"]).text("main")


def test_what_was_allowed_under_older_rules_can_still_be_ended() -> None:
    form, old = sample.form("/x"), sample.connection(1, Client("Old", "http://no-more.example/"))
    page = Page(Pages(sample.ORIGIN).connections(form, form, user="anna", connections=[old]))
    assert "is not taken any more" in page.text("main")
    assert ("end", "c1") in [(button.get("name"), button.get("value")) for button in page.all("button")]


def test_a_client_that_asks_for_nothing_is_said_to_do_so() -> None:
    page = Pages(sample.ORIGIN).consent(sample.form("/x"), client=sample.CLAUDE, user="anna", scopes=(), databases=())
    assert "Nothing but know that you have signed in" in Page(page).text("main")


def test_the_error_page_has_what_it_is_the_request_and_what_to_do() -> None:
    said = Page(EVERY["failed"]).text("main")
    for words in ("that it has not registered", "9f2c4e1ab0837d55", "Start again from the client"):
        assert words in said
    assert "What to do" not in Page(Pages(sample.ORIGIN).failed(500, "Internal error", "x")).text("main")


def test_the_page_that_leads_back_does_so_at_once_and_by_a_link() -> None:
    url = f"{sample.CLAUDE.returns_to}?code=abc&state=x%22y&iss={sample.ORIGIN}"
    page = Page(EVERY["leaving"])
    assert {"http-equiv": "refresh", "content": f"0;url={url}"} in page.all("meta")
    assert [link["href"] for link in page.all("a")] == [url]
    assert page.all("form") == []


# -- plain words ----------------------------------------------------------------------------------------------------


def test_there_are_words_for_every_tool_and_for_all_that_a_role_gives() -> None:
    permissions = [f"tools:{tool}" for tool in TOOLS]
    permissions += [permission for role in BUILT_IN.values() for permission in role]
    permissions += [f"databases:{name}:{right}" for name in ("sales", "*") for right in ("read", "write", "admin", "*")]
    permissions += ["tools:*", "tools:get_*", "databases:*"]
    words = {in_words(permission) for permission in permissions}
    assert len(words) == len(set(permissions)) - 1  # `databases:*` and `databases:*:*` are the same
    assert in_words("databases:sales:read") == "Read data in the database sales"


def test_what_only_reads_is_not_marked_as_making_changes_and_all_else_is() -> None:
    reading = {"tools:query_database", "databases:*:read", "databases:sales:read", *(f"tools:{tool}" for tool in TOOLS)}
    reading -= {f"tools:{tool}" for tool in TOOLS if TOOLS[tool].access != "read"}
    reading -= {"tools:register_database", "tools:remove_database"}
    assert [one for one in sorted(reading) if changes(one)] == []
    for one in ("*", "tools:*", "tools:execute_statement", "databases:sales:write", "databases:*:admin", "databases:*"):
        assert Scope.of(one).changes


@pytest.mark.parametrize(
    "permission", ["", "read", "tools:", "tools:drop_all", "databases:sales:own", "tools:a b", "*:*"]
)
def test_what_is_no_permission_has_no_words(permission: str) -> None:
    with pytest.raises(UsageError):
        in_words(permission)
