"""A real browser shows the pages of sign-in well, takes their policy, and sends their forms as `forms` wants them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import chromium
import sign_in_pages as sample
from mcpctl.errors import ForbiddenError
from mcpctl.server import forms
from mcpctl.server.forms import Cookie, FormTokens
from mcpctl.server.pages import Answer, Client, Pages, Scope

pytestmark = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="no Chromium to look at the pages with: apt install chromium"
)
PHONE, DESK = (390, 844), (1280, 800)
BROWSER = "b" * 43
CONTRAST = """
(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const s = getComputedStyle(e);
    if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) {
      const found = ratio(rgb(s.color), behind(e));
      if (found < 4.5) bad.push([e.tagName, e.textContent.slice(0, 30), found]);
    }
    if (e.matches('input:not([type=hidden]), button:not(.main)')) {
      const found = ratio(rgb(s.borderTopColor), behind(e.parentElement));
      if (found < 3) bad.push([e.tagName, 'border', found]);
    }
  }
  return JSON.stringify(bad);
})()
"""
"""What has less contrast than WCAG 2.2 asks for: 4.5 of text (1.4.3), 3 of the edges of what can be used (1.4.11)."""
SMALL = """
JSON.stringify([...document.querySelectorAll('button, .button, input:not([type=hidden])')]
  .map(e => e.getBoundingClientRect()).filter(r => r.width < 44 || r.height < 44).map(r => [r.width, r.height]))
"""
"""What a thumb would miss: WCAG 2.2 asks for 24 by 24 (2.5.8), phones for 44."""


@dataclass
class Site:
    """A server of these pages: what is asked, by method and path, and what came. `origin` is where it is."""

    answers: dict[str, Callable[[], Answer]] = field(default_factory=dict)
    came: list[tuple[str, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    origin: str = ""


@contextmanager
def site() -> Iterator[Site]:
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
            asked = f"{self.command} {self.path.partition('?')[0]}"
            found.came.append((f"{self.command} {self.path}", raw, body))
            made = found.answers.get(asked, lambda: Answer(404, [(b"content-length", b"0")], b""))()
            self.send_response(made.status)
            for name, value in made.headers:
                self.send_header(name.decode(), value.decode())
            self.end_headers()
            self.wfile.write(made.body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        found.origin = f"http://127.0.0.1:{server.server_port}"
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.browser() as found:
        yield found


@pytest.fixture
def server() -> Iterator[Site]:
    with site() as found:
        yield found


def here(answer: Answer) -> Answer:
    """The page as it is, but that it stays."""
    return Answer(200, answer.headers, answer.body.replace(b'http-equiv="refresh"', b'http-equiv="x-refresh"'))


@pytest.mark.parametrize("name", sample.every())
def test_a_page_is_good_to_look_at_on_every_screen(browser: chromium.Browser, server: Site, name: str) -> None:
    """Light and dark, on a phone and on a desk: nothing is wider than the screen, pale, or too small to be hit; the
    style is let through by the policy, nothing else is asked for, and the browser has nothing to complain of."""
    page = here(sample.every()[name])
    page.headers[1] = (b"content-length", str(len(page.body)).encode())
    server.answers["GET /"] = lambda: page
    for width, height in (PHONE, DESK, (320, 640)):
        for dark in (False, True):
            browser.look(width, height, dark=dark)
            browser.go(server.origin)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("getComputedStyle(document.querySelector('main')).borderTopWidth") == "1px"
            shade = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (shade == "rgb(19, 22, 26)") is dark
            assert json.loads(browser.run(CONTRAST)) == []
            assert json.loads(browser.run(SMALL)) == []
            assert browser.said == []
    assert {asked for asked, _, _ in server.came} == {"GET /"}


def sign_in(server: Site, tokens: FormTokens, *, client: Client | None = None) -> None:
    """The page asks for the password, sets the cookie, and what is sent is looked at later."""
    pages = Pages(server.origin)
    form = sample.Form("/login", tokens.issue(BROWSER, "sign-in"), {"request": "r"})
    cookie = Cookie("mcpctl", https=False).set(BROWSER)

    def page() -> Answer:
        made = pages.sign_in(form, client=client)
        return Answer(made.status, [*made.headers, cookie], made.body)

    server.answers["GET /login"] = page


def test_what_is_typed_arrives_with_everything_that_is_looked_at(browser: chromium.Browser, server: Site) -> None:
    tokens = FormTokens(bytes(32), lambda: datetime(2026, 11, 28, tzinfo=UTC))
    sign_in(server, tokens)
    server.answers["POST /login"] = lambda: Pages(server.origin).done("You are signed in")
    browser.go(f"{server.origin}/login")
    browser.settle()
    assert browser.run("document.activeElement.name") == "user"
    browser.ask("Input.insertText", text="anna")
    browser.press("#password")
    browser.ask("Input.insertText", text="päss & wörd=1+1")
    browser.events.clear()
    browser.press("button")
    browser.wait("Page.loadEventFired")
    assert browser.run("document.querySelector('h1').innerText") == "You are signed in"
    headers, body = next((headers, body) for asked, headers, body in server.came if asked == "POST /login")
    forms.check_sender(headers, server.origin)
    assert Cookie("mcpctl", https=False).read(headers) == BROWSER
    found = forms.read(headers, body, required=("user", "password", "form_token", "request"))
    assert (found["user"], found["password"], found["request"]) == ("anna", "päss & wörd=1+1", "r")
    tokens.check(found["form_token"], BROWSER, "sign-in")


def test_a_form_on_another_site_is_refused_by_each_lock(browser: chromium.Browser, server: Site) -> None:
    """The other site is one by name (localhost is not 127.0.0.1), and knows all that is in our form but the token."""
    sign_in(server, FormTokens(bytes(32), lambda: datetime(2026, 11, 28, tzinfo=UTC)))
    server.answers["POST /login"] = lambda: Pages(server.origin).done("You are signed in")
    action = f"{server.origin}/login"
    evil = (
        f'<form method="post" action="{action}"><input name="user" value="mallory"><button>x</button></form>'.encode()
    )
    plain = [(b"content-type", b"text/html"), (b"content-length", str(len(evil)).encode())]
    with site() as other:
        other.answers["GET /"] = lambda: Answer(200, plain, evil)
        browser.go(f"{server.origin}/login")
        browser.go(other.origin.replace("127.0.0.1", "localhost"))
        browser.events.clear()
        browser.press("button")
        browser.wait("Page.loadEventFired")
    headers = next(headers for asked, headers, _ in server.came if asked == "POST /login")
    assert Cookie("mcpctl", https=False).read(headers) is None
    with pytest.raises(ForbiddenError, match="another site"):
        forms.check_sender(headers, server.origin)
    with pytest.raises(ForbiddenError, match="another site"):
        forms.check_sender([pair for pair in headers if pair[0] != b"sec-fetch-site"], server.origin)


def consent(server: Site, client: Client) -> None:
    form = sample.Form("/login/consent", sample.TOKEN)
    scopes = [Scope.of("databases:sales:read")]
    page = Pages(server.origin).consent(form, client=client, user="anna", scopes=scopes, databases=("sales",))
    server.answers["GET /consent"] = lambda: page


def test_after_allow_the_browser_goes_on_to_the_client_wherever_that_sends_it(
    browser: chromium.Browser, server: Site
) -> None:
    """Also where the client's own server redirects again, to an origin that nobody here knows of."""
    with site() as client, site() as further:
        asking = Client("Claude", f"{client.origin}/callback")
        consent(server, asking)
        url = f"{asking.returns_to}?code=abc&state=%22x%27"
        server.answers["POST /login/consent"] = lambda: Pages(server.origin).leaving(asking, url)
        onward = [(b"location", f"{further.origin}/end".encode()), (b"content-length", b"0")]
        client.answers["GET /callback"] = lambda: Answer(302, onward, b"")
        further.answers["GET /end"] = lambda: Pages(further.origin).done("There")
        browser.go(f"{server.origin}/consent")
        browser.press("button[value=allow]")
        while not browser.wait("Page.frameNavigated")["frame"]["url"].endswith("/end"):
            pass
        browser.wait("Page.loadEventFired")
        assert browser.run("document.querySelector('h1').innerText") == "There"
        assert [asked for asked, _, _ in client.came] == ["GET /callback?code=abc&state=%22x%27"]
        assert not [value for _, headers, _ in client.came for name, value in headers if name == b"referer"]
        assert server.came[-1][2] == b"form_token=" + sample.TOKEN.encode() + b"&answer=allow"


def test_a_redirect_behind_the_form_would_have_been_blocked(browser: chromium.Browser, server: Site) -> None:
    """Why there is a page in between: should this fail one day, it is needed no more."""
    with site() as client:
        consent(server, Client("Claude", f"{client.origin}/callback"))
        onward = [(b"location", f"{client.origin}/callback?code=abc".encode()), (b"content-length", b"0")]
        server.answers["POST /login/consent"] = lambda: Answer(303, onward, b"")
        browser.go(f"{server.origin}/consent")
        browser.press("button[value=allow]")
        while "form-action" not in browser.wait("Log.entryAdded")["entry"]["text"]:
            pass
        assert client.came == []
