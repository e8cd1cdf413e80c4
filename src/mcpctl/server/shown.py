"""How a page shows what strangers have written: names that clients give themselves, and where they want to be answered.

A name on a page of sign-in is what an attacker would choose best. It is cut, keeps to its line and its direction, and
has no character that nobody sees. Escaping is not done here: the templates do it, for everything.
"""

import re
import unicodedata
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from mcpctl.errors import UsageError

NAME = 80
"""Characters of a name that are shown."""
_STACKED = 2
"""Marks on one letter: some scripts need as many, and more run into the lines around."""
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode's categories of what has no shape: controls, among them those that turn the direction of a text round."""
_BLANK = "\u115f\u1160\u3164\uffa0\u2800\u00ad\u034f"
"""Letters and marks that look like nothing."""
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_NO_PLACE = frozenset(
    {
        "about", "blob", "chrome", "data", "file", "filesystem", "ftp", "intent", "jar", "javascript", "mailto",
        "resource", "sms", "tel", "vbscript", "view-source", "ws", "wss",
    }
)  # fmt: skip
"""Schemes that lead into the page or the browser itself, or to what takes no answer."""
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_URL = 8 << 10


def shown(text: str, limit: int = NAME) -> str:
    """The text for a person's eyes: at most `limit` characters, and each of them is seen."""
    kept = " ".join(_unstacked("".join(map(_seen, text[: limit * 2]))).split())
    return kept if len(kept) <= limit and len(text) <= limit * 2 else kept[: limit - 1].rstrip() + "…"


def _seen(character: str) -> str:
    if character.isspace():
        return " "
    unseen = unicodedata.category(character) in _UNSEEN or character in _BLANK
    return "\ufffd" if unseen else character


def _unstacked(text: str) -> str:
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        if marks <= _STACKED:
            kept.append(character)
    return "".join(kept)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a browser is sent. `kind` is web (`name` is the host, and the port if it is not the scheme's), loopback (a
    program on the user's own machine) or app (`name` is the scheme that an installed program has registered)."""

    kind: str
    name: str


def place(uri: str) -> Place:
    """Where this redirect URI leads; UsageError where a browser might see another place in it than we do, or none.

    http is for loopback alone (RFC 8252, section 7.3).
    """
    found = _URI.fullmatch(uri) if len(uri) <= _URL else None
    scheme = found[1].lower() if found else ""
    if not scheme or scheme in _NO_PLACE:
        raise _no_place()
    if scheme not in ("http", "https"):
        return Place("app", f"{scheme}:")
    host, port = _authority(uri)
    if _is_loopback(host):
        return Place("loopback", _joined(host, port))
    if scheme == "http":
        raise _no_place()
    return Place("web", _joined(host, None if port == 443 else port))


def _authority(uri: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _no_place() from None
    if not host or parts.username is not None or parts.password is not None or not _HOST.fullmatch(host):
        raise _no_place()
    return host, port


def _joined(host: str, port: int | None) -> str:
    named = f"[{host}]" if ":" in host else host
    return named if port is None else f"{named}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _no_place() -> UsageError:
    return UsageError(
        "the place to go back to cannot be trusted",
        "it is to be https, http on loopback, or a scheme of an installed program's own",
    )
