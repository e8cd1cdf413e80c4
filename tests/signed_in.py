"""A site whose users may sign in: with a password that is hashed once, since each hash costs a tenth of a second."""

from __future__ import annotations

import functools
import json
from typing import Any

import httpx

from mcpctl.identity import passwords
from site_of_mcpctl import Client, Site, visit

PASSWORD = "correct horse battery staple"
ENABLED = "auth:\n  sessions: {enabled: true}\n"
FORMS = ("Authorization", "X-API-Key", "X-Session-ID")
"""Headers that take a session."""


@functools.cache
def hashed(text: str = PASSWORD) -> str:
    return passwords.hashed(text)


def base(site: Site) -> str:
    return site.url.removesuffix("/mcp")


def sign_in(site: Site, user: str = "alice", password: str = PASSWORD, **more: Any) -> httpx.Response:
    body = json.dumps({"user": user, "password": password})
    more = more or {"content": body, "headers": {"Content-Type": "application/json"}}
    return visit("POST", f"{base(site)}/api/v1/auth", timeout=60, **more)


def session(site: Site, user: str = "alice", password: str = PASSWORD) -> tuple[str, str]:
    """(id, text) of a new session."""
    answer = sign_in(site, user, password)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["session_id"]
    return text.split("_")[1], text


def ask(site: Site, method: str, path: str, text: str | None, **more: Any) -> httpx.Response:
    headers = {} if text is None else {"Authorization": f"Bearer {text}"}
    return visit(method, base(site) + path, headers=headers, timeout=60, **more)


def by(site: Site, form: str, text: str) -> Client:
    """A caller who sends the session in that header."""
    client = Client(site.url, None)
    client.http.headers[form] = f"Bearer {text}" if form == "Authorization" else text
    return client


def events(site: Site, *names: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] in names]
