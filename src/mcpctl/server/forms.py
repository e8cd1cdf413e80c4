"""Forms that a browser sends, and how it is known that it was one of our own pages that sent them.

Three locks, each enough by itself: the cookie does not come with another site's POST (`SameSite`), the browser itself
says who has sent the form (`Origin`, `Sec-Fetch-Site`), and a token in the form belongs to this browser and to what the
form is for. Nothing here knows who is signed in, and nothing is stored.
"""

import hmac
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from hashlib import sha256
from urllib.parse import unquote_to_bytes

from mcpctl.errors import Error, ForbiddenError, UsageError
from mcpctl.server.credentials import Headers, header

BODY = 64 << 10
"""Bytes of a form at most. A password may have 1 KiB; the rest is room for what percent-encoding makes of it."""
KEY = 32
"""Bytes of the key at least: as many as the hash has (RFC 2104, section 3)."""
LIFE = timedelta(hours=1)
"""How long a page may be looked at before its form is sent."""
_FORM = "application/x-www-form-urlencoded"
_CHARSET = re.compile(r'charset="?utf-8"?', re.IGNORECASE)
_ENCODED = re.compile(rb"(?:[!-$'-<>-~]|%[0-9A-Fa-f]{2})*")
"""What may stand in an encoded name or value: every visible ASCII character but `%`, `&` and `=`."""
_TOKEN = re.compile(r"([1-9][0-9]{0,10})\.([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[A-Za-z0-9_-]{43}")


# -- a form's body ----------------------------------------------------------------------------------------------------


def read(headers: Headers, body: bytes, *, required: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
    """The fields of a form (URL Standard, application/x-www-form-urlencoded): each of `required`, some of `optional`.

    An Error with 415 for another kind of body, 413 for one that is too long, and 400 for a field that stands there
    twice, is missing or unknown, or is not UTF-8. No message has a value in it: it may be a password.
    """
    _check_type(header(headers, b"content-type"))
    if len(body) > BODY:
        raise Error(f"the form is longer than {BODY} bytes", "send less", status=413)
    found: dict[str, str] = {}
    for part in body.split(b"&", len(required) + len(optional)) if body else ():
        name, is_value, value = part.partition(b"=")
        field = _decoded(name, "the name of a field")
        if field not in required and field not in optional:
            raise UsageError("the form has a field that is not known here", _RELOAD)
        if field in found or not is_value:
            raise UsageError(f"the field {field} stands there twice, or without a value", _RELOAD)
        found[field] = _decoded(value, f"the field {field}")
    if missing := [field for field in required if field not in found]:
        raise UsageError(f"the form lacks the field {missing[0]}", _RELOAD)
    return found


_RELOAD = "open the page again, and send its form as it is"


def _check_type(given: str | None) -> None:
    kind, *parameters = [part.strip() for part in (given or "").split(";")]
    if kind.lower() != _FORM or any(part and not _CHARSET.fullmatch(part) for part in parameters):
        raise Error("the body is to be a form in UTF-8", f"send Content-Type: {_FORM}", status=415)


def _decoded(encoded: bytes, what: str) -> str:
    if not _ENCODED.fullmatch(encoded):
        raise UsageError(f"{what} is not encoded as forms are", _RELOAD)
    try:
        text = unquote_to_bytes(encoded.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not UTF-8", _RELOAD) from None
    if "\0" in text:
        raise UsageError(f"{what} has a NUL in it", _RELOAD)
    return text


# -- who has sent it --------------------------------------------------------------------------------------------------


def check_sender(headers: Headers, origin: str) -> None:
    """Raise ForbiddenError unless the browser says that a page of `origin` (scheme, host, port) has sent this.

    Every browser says so for a POST: all by Origin (RFC 6454), those since 2023 also by Sec-Fetch-Site (W3C, Fetch
    Metadata). Each that is there has to be right. `Origin: null` is wrong: a frame in a sandbox sends it, and our own
    pages do not, since their Referrer-Policy is `same-origin` (with `no-referrer` they would).
    """
    site, sender = header(headers, b"sec-fetch-site"), header(headers, b"origin")
    if sender is None and site is None:
        raise ForbiddenError("the request does not say which page has sent it", "use a browser that is up to date")
    if site not in (None, "same-origin") or sender not in (None, origin):
        raise ForbiddenError("the form was sent by another site", f"open the page at {origin}, and send it from there")


class FormTokens:
    """Makes and checks the tokens of forms: HMAC-SHA-256 over end, browser and purpose (OWASP, signed double-submit).

    `key` is the same in all workers, and after a reload: else a form that was shown before is refused.
    """

    def __init__(self, key: bytes, now: Callable[[], datetime], *, life: timedelta = LIFE) -> None:
        if len(key) < KEY:
            raise ValueError(f"the key of the form tokens has {len(key)} bytes, not {KEY}")
        self._key = key
        self._now = now
        self._life = life

    def issue(self, browser: str, purpose: str) -> str:
        """A token for a form that this browser is shown. `browser` is the id in its cookie, `purpose` what the form
        does and to what, such as `consent <request id>`."""
        until = int((self._now() + self._life).timestamp())
        return f"{until}.{self._mac(until, browser, purpose)}"

    def check(self, presented: str, browser: str | None, purpose: str) -> None:
        """Raise ForbiddenError unless it was issued to this browser, for this, and is not too old."""
        found = _TOKEN.fullmatch(presented)
        until = int(found[1]) if found else 0
        expected = self._mac(until, browser or "", purpose)
        if not hmac.compare_digest(found[2] if found else "", expected) or browser is None:
            raise ForbiddenError(
                "the form is not this browser's", "allow cookies for this site, and open the page again"
            )
        if until <= self._now().timestamp():
            raise ForbiddenError("the page was open for too long", "open it again")

    def _mac(self, until: int, browser: str, purpose: str) -> str:
        said = b"".join(len(part).to_bytes(4) + part for part in (browser.encode(), purpose.encode()))
        digest = hmac.digest(self._key, b"mcpctl form 1\0" + until.to_bytes(8) + said, sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()


# -- the cookie -------------------------------------------------------------------------------------------------------


def new_id() -> str:
    """256 random bits for a cookie: 43 characters."""
    return secrets.token_urlsafe(32)


class Cookie:
    """One cookie of ours (RFC 6265bis), whose values are `new_id`'s.

    `SameSite=Lax`: a client's page leads the browser to /authorize, and there it has to be known who is signed in.
    With Strict the cookie would not come along, and everybody would sign in again each time. Lax lets it come with a
    GET that a person follows, which changes nothing here, and never with another site's POST.

    Over https the name begins with `__Host-`: no other host of the domain, and no page over http, can set it. Over
    http, on loopback only, that is not to be had: programs on other ports of that machine share its cookies.
    """

    def __init__(self, name: str, *, https: bool) -> None:
        self.name = f"__Host-{name}" if https else name
        self._marks = "; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if https else "")

    def read(self, headers: Headers) -> str | None:
        """The value that the browser sends; None where there is none, or none of ours.

        UsageError where it comes twice: somebody else has set one of them, and nobody can tell which.
        """
        given = b";".join(value for name, value in headers if name == b"cookie").split(b";")
        pairs = (pair.strip(b" \t").partition(b"=") for pair in given)
        found = [value for name, _, value in pairs if name == self.name.encode()]
        if len(found) > 1:
            raise UsageError(
                f"the cookie {self.name} comes twice", "delete this site's cookies, and open the page again"
            )
        text = found[0].decode("latin-1") if found else ""
        return text if _ID.fullmatch(text) else None

    def set(self, value: str, life: timedelta | None = None) -> tuple[bytes, bytes]:
        """The header that sets it, for `life`, or (None) until the browser is closed."""
        if not _ID.fullmatch(value):
            raise ValueError("a cookie's value is made by new_id")
        age = "" if life is None else f"; Max-Age={int(life.total_seconds())}"
        return b"set-cookie", f"{self.name}={value}{self._marks}{age}".encode()

    def drop(self) -> tuple[bytes, bytes]:
        """The header that takes it away."""
        return b"set-cookie", f"{self.name}={self._marks}; Max-Age=0".encode()
