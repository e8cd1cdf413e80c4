"""The remote server's URL, and which URLs a credential may be sent to."""

from urllib.parse import SplitResult, urlsplit, urlunsplit

from mcpctl.errors import UsageError, masked

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_PORTS = {"https": 443, "http": 80}


def check(url: str) -> str:
    """The URL of an MCP server, as it is kept and compared. Raises UsageError for one that must not be used.

    https, or http to this machine alone: else whoever is in between reads the token. No user, password or token of ours
    in it: they would stand in lists of processes, in logs and in clients' files.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(f"{url[:200]!r} is no URL", _EXAMPLE) from None
    if "@" in parts.netloc or masked(url) != url:
        raise UsageError("a URL must hold no user, password or token", "leave them out, and use --token-file")
    if parts.scheme not in _PORTS or not parts.hostname or any(ord(one) <= 32 or ord(one) == 127 for one in url):
        raise UsageError(f"{url[:200]!r} is no URL of an MCP server", _EXAMPLE)
    if parts.fragment:
        raise UsageError(f"{url[:200]!r} has a fragment, which no server sees", "leave out what stands behind the #")
    if not private(url):
        raise UsageError(
            f"{parts.scheme}://{parts.hostname} is not encrypted: everybody on the way could read the token",
            "say https://; http:// is for this machine alone",
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    where = host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"
    return urlunsplit(SplitResult(parts.scheme, where, parts.path or "/", parts.query, ""))


_EXAMPLE = "it looks like https://mcp.example.org/mcp"


def private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: by https, or within this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def shown(url: str) -> str:
    """A URL for a message: without a query, which may hold what is nobody's business."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
