"""Where an OAuth client may be answered: which redirect URIs are taken, and when one is that which was registered.

Compared is the text, character by character (RFC 9700, section 4.1.3): no wildcard, no prefix, nothing normalized. Only
the port of a program on the user's own machine is free, since it gets another each time (RFC 8252, section 7.3).
"""

import re
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

LONGEST = 1000
"""Characters of one."""
_TEXT = re.compile(r"[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]+")
"""RFC 3986 without the #, so that there is no fragment either (RFC 6749, section 3.1.2)."""
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_REVERSED_NAME = re.compile(r"[a-z][a-z0-9+-]*(\.[a-z0-9+-]+)+")
"""A scheme that is the reversed name of a host somebody has (RFC 8252, section 7.1)."""
_LOOPBACK = re.compile(r"(http://(?:127\.0\.0\.1|\[::1\]|localhost))(?::[0-9]{1,5})?(?=[/?]|$)")


def check(uri: str, schemes: Collection[str] = ()) -> None:
    """ValueError, which says what would have been right, for what no client may be answered at. `schemes` of installed
    programs are taken although they have no dot."""
    if len(uri) > LONGEST or not _TEXT.fullmatch(uri):
        raise ValueError(f"a URI without a fragment, blanks or wildcards, of {LONGEST} characters at most")
    scheme, colon, rest = uri.partition(":")
    if not colon or not rest:
        raise ValueError("an absolute URI")
    if scheme in ("http", "https"):
        _check_host(uri)
    elif not (_REVERSED_NAME.fullmatch(scheme) or scheme in schemes):
        raise ValueError("https, http on loopback, or a scheme that is a reversed host name (com.example.app)")


def _check_host(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError:
        raise ValueError("a host that is one") from None
    if "@" in parts.netloc or "*" in parts.netloc or "\\" in uri or not _HOST.fullmatch(_without_port(parts.netloc)):
        raise ValueError("a host without user, password or wildcard")
    if port == 0:
        raise ValueError("a port that is one")
    if parts.scheme == "http" and not _LOOPBACK.match(uri):
        raise ValueError("https; http is for loopback alone (127.0.0.1, [::1], localhost)")


def _without_port(authority: str) -> str:
    host, colon, port = authority.rpartition(":")
    return host if colon and port.isdigit() else authority


def matching(uri: str, registered: Iterable[str]) -> bool:
    """Whether a client may be answered at `uri`, of those that it has registered."""
    found = _any_port(uri)
    return any(uri == one or (found is not None and found == _any_port(one)) for one in registered)


def _any_port(uri: str) -> tuple[str, str] | None:
    """(scheme and host, all behind the port) of one on loopback."""
    found = _LOOPBACK.match(uri)
    if found is None:
        return None
    port = uri[found.end(1) : found.end()].removeprefix(":")
    return (found[1], uri[found.end() :]) if not port or 0 < int(port) < 65536 else None


def is_web(uri: str) -> bool:
    """Whether it leads to a server of the web, and not to a program on the user's own machine, where any other could
    take its place."""
    return uri.startswith("https://")
