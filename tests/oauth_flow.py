"""A person with a browser, and an OAuth client, against the embedded authorization server."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import secrets
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx

from mcpctl.identity import passwords
from site_of_mcpctl import Client, Site, authorities

PASSWORD = "four words that nobody guesses"
ON = "auth:\n  oauth:\n    enabled: true\n"
BACK = "http://127.0.0.1:41234/back"


def give_password(site: Site, user: str, password: str = PASSWORD) -> None:
    site.edit_user(user, password=passwords.hashed(password))


class Web:
    """Asks one server, and keeps its cookies; each request has a connection of its own."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.cookies = httpx.Cookies()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        known: dict[str, Any] = {"verify": authorities(), "cookies": self.cookies}
        with httpx.Client(base_url=self.base, trust_env=False, timeout=30, **known) as client:
            answer = client.request(method, path, **more)
            self.cookies = client.cookies
        return answer

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("POST", path, **more)


@dataclass
class Pkce:
    """A verifier and what is sent of it first."""

    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(48))

    @property
    def challenge(self) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()


class App:
    """An OAuth client without a library, so that it can do wrong, too."""

    def __init__(self, site: Site, **said: Any) -> None:
        self.site = site
        self.base = site.url.removesuffix("/mcp")
        self.http = Web(self.base)
        self.pkce = Pkce()
        self.redirect = BACK
        self.id = "" if said.get("unregistered") else self.register(**said).json()["client_id"]

    def register(self, **said: Any) -> httpx.Response:
        body = {
            "client_name": "Test client",
            "redirect_uris": [self.redirect],
            "grant_types": ["authorization_code", "refresh_token"],
            "token_endpoint_auth_method": "none",
            **said,
        }
        return self.http.post("/register", json=body)

    def asking(self, **changed: str | None) -> str:
        """The query of a good request, with these parameters changed, or (None) left out."""
        given: dict[str, str | None] = {
            "response_type": "code",
            "client_id": self.id,
            "redirect_uri": self.redirect,
            "code_challenge": self.pkce.challenge,
            "code_challenge_method": "S256",
            "state": "a state",
            "resource": self.site.url,
            "scope": "mcp:read",
            **changed,
        }
        return urlencode({name: value for name, value in given.items() if value is not None})

    def token(self, **form: str) -> httpx.Response:
        return self.http.post("/token", data=form)

    def redeem(self, code: str, /, **changed: str) -> httpx.Response:
        return self.token(
            **{
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": self.redirect,
                "client_id": self.id,
                "code_verifier": self.pkce.verifier,
                "resource": self.site.url,
                **changed,
            }
        )

    def refresh(self, text: str, **changed: str) -> httpx.Response:
        given = {"grant_type": "refresh_token", "refresh_token": text, "client_id": self.id, **changed}
        return self.token(**given)

    def connected(self, person: Person, **changed: str | None) -> dict[str, Any]:
        """The tokens of a whole flow."""
        answer = self.redeem(person.allow(self.asking(**changed))["code"])
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def works(self, token: str) -> bool:
        with Client(self.site.url, token) as client:
            return client.call("whoami").status_code == 200


class Page:
    """One answer, as a person sees it."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.status = answer.status_code
        self.text = answer.text

    def forms(self) -> list[tuple[str, dict[str, str]]]:
        """(where it goes, what it carries unseen) of each form."""
        found = []
        for action, body in re.findall(r'<form[^>]*action="([^"]*)"[^>]*>(.*?)</form>', self.text, re.DOTALL):
            hidden = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', body)
            found.append((html.unescape(action), {name: html.unescape(value) for name, value in hidden}))
        return found

    @property
    def leads_to(self) -> str:
        """Where the browser goes on to."""
        if "location" in self.answer.headers:
            return str(self.answer.headers["location"])
        found = re.search(r'http-equiv="refresh" content="0;url=([^"]*)"', self.text)
        assert found is not None, (self.status, self.text)
        return html.unescape(found[1])

    @property
    def told(self) -> dict[str, str]:
        """What the client is told there."""
        return {name: value[0] for name, value in parse_qs(urlsplit(self.leads_to).query).items()}


class Person:
    """Somebody with a browser."""

    def __init__(self, site: Site, user: str = "alice", password: str = PASSWORD) -> None:
        self.base = site.url.removesuffix("/mcp")
        self.user = user
        self.password = password
        self.http = Web(self.base)

    def open(self, path: str) -> Page:
        """A page, with redirects to our own pages followed."""
        return self._followed(self.http.get(path))

    def _followed(self, answer: httpx.Response) -> Page:
        while answer.is_redirect and not answer.headers["location"].startswith(("http", "com.")):
            answer = self.http.get(answer.headers["location"])
        return Page(answer)

    def send(self, page: Page, form: int = 0, origin: str | None = None, **fields: str) -> Page:
        """Send a form of that page with these fields."""
        action, hidden = page.forms()[form]
        given = {**hidden, **fields}
        headers = {"Origin": origin or self.base}
        return self._followed(self.http.post(action, data=given, headers=headers))

    def sign_in(self, page: Page, **wrong: str) -> Page:
        return self.send(page, **{"user": self.user, "password": self.password, **wrong})

    def asked(self, query: str) -> Page:
        """The page that asks for consent."""
        page = self.open(f"/authorize?{query}")
        return self.sign_in(page) if 'name="password"' in page.text else page

    def allow(self, query: str) -> dict[str, str]:
        """Sign in if need be, say yes, and what the client is told."""
        page = self.asked(query)
        assert "It could" in page.text, page.text
        return self.send(page, answer="allow").told


if __name__ == "__main__":  # as a browser that a client opens: alice reads, allows, and is sent on
    asked = urlsplit(sys.argv[1])
    alice = Person(SimpleNamespace(url=f"{asked.scheme}://{asked.netloc}/mcp"))
    httpx.get(alice.send(alice.asked(asked.query), answer="allow").leads_to, trust_env=False, verify=authorities())
