"""The pages of sign-in: what a person sees who lets a client in. Text in, an answer out; nothing is stored or decided.

No page has or needs a script, and none loads anything: the style is in the page, named by its hash in the policy. What
strangers have written goes through `shown` and is escaped.

Who answers a form's POST never redirects to another origin: Chromium and WebKit hold each hop behind a form to the
page's `form-action` (w3c/webappsec-csp#8), also what the client's own server redirects to, which nobody can list. It
answers `Pages.leaving`, from which the browser goes on by itself.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from mcpctl.errors import UsageError
from mcpctl.server.shown import Place, place, shown
from mcpctl.server.wording import changes, in_words

_HERE = Path(__file__).parent / "templates"
_POLICY = (
    "default-src 'none'; style-src 'sha256-{style}'; img-src data:; form-action {forms}; frame-ancestors 'none'; "
    "base-uri 'none'"
)
_DENIED = ", ".join(
    f"{feature}=()"
    for feature in (
        "accelerometer", "camera", "clipboard-read", "display-capture", "geolocation", "gyroscope", "hid", "microphone",
        "midi", "payment", "serial", "usb", "xr-spatial-tracking",
    )
)  # fmt: skip
"""What a browser could be asked for. Passkeys and password managers are left alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A page as it is sent; the request's id is added by whoever sends it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks. `name` is what it calls itself, `returns_to` its redirect URI. `host` is where it has proved to be at
    home: where its metadata document was read (Client ID Metadata Documents); None if it has only said who it is.
    `listed`: this server's config names it, so that its name is the administrator's word."""

    name: str
    returns_to: str
    host: str | None = None
    listed: bool = False

    @property
    def title(self) -> str:
        """Its name, fit to be shown."""
        seen = shown(self.name)
        return seen if seen.strip("\ufffd… ") else "A client without a name"

    @property
    def place(self) -> Place:
        """Where it wants to be answered. UsageError: see `shown.place`."""
        return place(self.returns_to)


@dataclass(frozen=True, slots=True)
class Form:
    """Where a form goes, its token (`forms.FormTokens.issue`), and what else it carries unseen."""

    action: str
    token: str
    hidden: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """One thing that is asked for: its name in the protocol, what it allows in plain words, and whether that changes
    anything."""

    name: str
    words: str
    changes: bool = False

    @classmethod
    def of(cls, permission: str) -> "Scope":
        """The scope that is a permission. UsageError for what is none."""
        return cls(permission, in_words(permission), changes(permission))


@dataclass(frozen=True, slots=True)
class Connection:
    """What a user has allowed. `id` is sent back in the field `end`; `address` is where the client
    asked for its tokens from."""

    id: str
    client: Client
    scopes: Sequence[Scope]
    databases: Sequence[str]
    since: datetime
    last_used: datetime | None = None
    address: str | None = None

    @property
    def home(self) -> str | None:
        """The host that the client is known by."""
        return self.client.host and shown(self.client.host)

    @property
    def place(self) -> Place | None:
        """Where it is answered; None where such a place is not taken any more. The page has to be there to end it."""
        try:
            return self.client.place
        except UsageError:
            return None


class Pages:
    """Makes all pages of one server. `origin` is what browsers call it by: scheme, host, port."""

    def __init__(self, origin: str, *, connections: str = "/login/connections") -> None:
        self._site = {"origin": origin, "host": origin.partition("://")[2], "connections": connections}

    def sign_in(
        self,
        form: Form,
        *,
        client: Client | None = None,
        user: str = "",
        problem: str | None = None,
        retry_after: int = 0,
    ) -> Answer:
        """Asks for `user` and `password`. `problem` is said above them; with `retry_after` seconds it is 429, too many
        tries, else 401. The same for a name that there is not."""
        status = 429 if retry_after else 401 if problem else 200
        if retry_after:
            problem = f"Too many tries. Try again in {_duration(retry_after)}."
        said = problem and shown(problem, 200)
        facts = {"form": form, "client": client, "user": shown(user, 200), "problem": said, "wrong": status == 401}
        more = [(b"retry-after", str(retry_after).encode())] if retry_after else []
        return self._page("sign_in", status, facts, client=client, more=more)

    def consent(
        self, form: Form, *, client: Client, user: str, scopes: Sequence[Scope], databases: Sequence[str]
    ) -> Answer:
        """Asks whether the client may: the field `answer` is `allow` or `deny`."""
        facts = {"form": form, "client": client, "user": user, "scopes": scopes, "databases": databases}
        return self._page("consent", 200, facts, client=client)

    def connections(
        self, end: Form, sign_out: Form, *, user: str, connections: Sequence[Connection], done: str | None = None
    ) -> Answer:
        """What the user has allowed. The form `end` sends either `end` (an id) or `end_all` (`yes`). `done` says what
        the last one did."""
        facts = {"end": end, "sign_out": sign_out, "user": user, "connections": connections, "done": done}
        return self._page("connections", 200, facts)

    def failed(self, status: int, what: str, request_id: str, to_do: str | None = None) -> Answer:
        """One page for all that goes wrong. `what` and `to_do` are an Error's message and hint, fit for strangers."""
        return self._page("failed", status, {"what": what, "request_id": request_id, "to_do": to_do})

    def done(self, what: str, more: str = "") -> Answer:
        """Says what has been done, `more` about it, and that the window can be closed."""
        return self._page("done", 200, {"what": what, "more": more})

    def leaving(self, client: Client, url: str) -> Answer:
        """Sends the browser to `url`, the client's redirect URI with its answer: at once, and by a link.

        UsageError where the URL leads nowhere, or elsewhere than the client's `returns_to`.
        """
        there = place(url)
        if there != client.place:
            raise UsageError("the answer would go elsewhere than to the client", "start again from the client")
        return self._page("leaving", 200, {"client": client, "url": url, "place": there}, client=client)

    def _page(
        self,
        name: str,
        status: int,
        facts: Mapping[str, Any],
        *,
        client: Client | None = None,
        more: Sequence[tuple[bytes, bytes]] = (),
    ) -> Answer:
        text = self._templates.get_template(f"{name}.html").render(**facts, site=self._site, style=self._style)
        body = text.encode("utf-8", "replace")
        has_form = name in ("sign_in", "consent", "connections")
        return Answer(status, [*self._headers(body, has_form, client), *more], body)

    def _headers(self, body: bytes, has_form: bool, client: Client | None) -> list[tuple[bytes, bytes]]:
        """Referrer-Policy: with `no-referrer` a browser sends `Origin: null` with our own forms (Fetch, "append a
        request Origin header"); `same-origin` keeps it from everybody else as well. Cross-Origin-Opener-Policy: a
        client's page may have opened this one in a window and wait for it there; it would be cut off, for good."""
        opened = client is not None and client.place.kind != "app"
        policy = _POLICY.format(style=self._style_hash, forms="'self'" if has_form else "'none'")
        return [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"content-security-policy", policy.encode()),
            (b"x-frame-options", b"DENY"),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin" if has_form else b"no-referrer"),
            (b"cross-origin-opener-policy", b"unsafe-none" if opened else b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"permissions-policy", _DENIED.encode()),
        ]

    @cached_property
    def _style(self) -> str:
        return (_HERE / "style.css").read_text(encoding="utf-8")

    @cached_property
    def _style_hash(self) -> str:
        return b64encode(sha256(self._style.encode()).digest()).decode()

    @cached_property
    def _templates(self) -> Any:
        """Read when the first page is made: most servers never make one."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        found = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        found.filters |= {"shown": shown, "time": _time, "iso": _iso}
        return found


def _duration(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} second{'' if seconds == 1 else 's'}"
    return f"{-(-seconds // 60)} minutes"


def _time(when: datetime) -> str:
    there = when.astimezone(UTC)
    return f"{there.day} {there:%B %Y, %H:%M} UTC"


def _iso(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
