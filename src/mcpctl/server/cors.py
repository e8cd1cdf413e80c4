"""Which pages of other sites may read our answers (Fetch, "CORS protocol"): those of `server.allowed_origins`.

The gatekeeper refuses every other origin before anything is done. No cookie goes along, since nothing says
Access-Control-Allow-Credentials.
"""

from collections.abc import Collection

from mcpctl.server import encoding
from mcpctl.server.credentials import Headers
from mcpctl.server.exchange import Scope, Send

_READABLE = b"www-authenticate, retry-after, x-request-id, mcp-protocol-version"
_SENT = (
    b"authorization, content-type, accept, mcp-protocol-version, mcp-method, mcp-name, mcp-session-id, last-event-id, "
    b"x-api-key, x-session-id"
)
_REMEMBERED = b"600"
"""Seconds for which a browser need not ask again."""


class Cors:
    """`origins` are the config's; our own pages need no such answer."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(one.encode() for one in origins)

    def headers(self, asked: Headers) -> list[tuple[bytes, bytes]]:
        """What an answer to these headers has, so that the page may read it."""
        if not self._origins:
            return []
        found = [value for name, value in asked if name == b"origin"]
        if len(found) != 1 or found[0] not in self._origins:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", found[0]),
            (b"access-control-expose-headers", _READABLE),
            (b"vary", b"Origin"),
        ]

    async def preflight(self, scope: Scope, send: Send, request_id: str, methods: bytes) -> bool:
        """Answer the question that a browser asks before a request; whether it was one."""
        asked = scope["headers"]
        if scope["method"] != "OPTIONS" or not any(name == b"access-control-request-method" for name, _ in asked):
            return False
        own = self.headers(asked)
        if len(own) > 1:
            own += [
                (b"access-control-allow-methods", methods),
                (b"access-control-allow-headers", _SENT),
                (b"access-control-max-age", _REMEMBERED),
            ]
        await send(
            {"type": "http.response.start", "status": 204, "headers": [*encoding.headers(b"", request_id), *own]}
        )
        await send({"type": "http.response.body", "body": b""})
        return True
