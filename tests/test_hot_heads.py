"""What the hot lane reads of a head is what the parser reads, and nothing else in a head depends on it."""

from __future__ import annotations

from typing import Any

import httptools
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mcpctl.errors import UnauthorizedError, UsageError
from mcpctl.server import credentials
from mcpctl.server.hot import Apart, Found, Lane

_PIECES = st.sampled_from(
    [
        b"Content-Length:", b"content-LENGTH: ", b"Authorization: Bearer ", b"authorization:\tbearer  ",
        b"X-API-Key:", b"x-api-key: ", b"Authorization: Basic ", b"Host: x", b"Transfer-Encoding: chunked", b"Foo: ",
        b"X-Session-ID: ",
        b"Connection: close", b"5", b"17", b"12345678", b"token", b"a_b", b"a.b", b" ", b"\t", b"\r\n",
        b"\r\n", b"\r\n",
        b"\n", b"\r", b"\r\n ", b"\r\n\t", b":", b"\x00", b"\xe9", b",", b"\x0b", b"\x0c",
    ]
)  # fmt: skip
_LENGTHS = st.sampled_from([b"Content-Length: 5\r\n", b"content-length:\t7 \r\n", b"CONTENT-LENGTH:0012\r\n"])
_CREDENTIALS = st.sampled_from(
    [b"", b"Authorization: Bearer token\r\n", b"X-API-Key: a_b\t\r\n", b"authorization:bearer   Token \r\n"]
)
_OTHERS = st.sampled_from([b"", b"Foo: Content-Length: 9\r\n", b"Foo: \r\n", b"Connection: close\r\n"])


@st.composite
def _heads(draw: st.DrawFn) -> bytes:
    """A good head, into which something may have been put."""
    good = [draw(_LENGTHS), draw(_CREDENTIALS), b"Host: x\r\n", draw(_OTHERS)]
    head = b"".join(draw(st.permutations(good)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(head)))
        head = head[:at] + draw(_PIECES) + head[at:]
    return b"POST /mcp HTTP/1.1\r\n" + head + b"\r\n"


_LANE: Any = None


class _Heard:
    """What the parser says of one head."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.goes_on: bool | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.goes_on = self.parser.should_keep_alive()


def _parsed(head: bytes) -> tuple[str | None, int, list[tuple[bytes, bytes]], bool] | None:
    """(credential, length, the other headers, whether the connection goes on); None where it is refused."""
    heard = _Heard()
    try:
        heard.parser.feed_data(head)
        text = credentials.token(heard.headers)
    except (httptools.HttpParserError, UsageError, UnauthorizedError):
        return None
    lengths = [value for name, value in heard.headers if name == b"content-length"]
    if heard.goes_on is None or len(lengths) != 1:
        return None
    others = [one for one in credentials.without(heard.headers) if one[0] != b"content-length"]
    return text, int(lengths[0]), others, heard.goes_on


@given(_heads(), st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_]{0,127}", fullmatch=True), st.integers(0, 9999999))
@hypothesis_settings(max_examples=1000, deadline=None)
@example(b"POST /mcp HTTP/1.1\r\nAuthorization: Bearer a\r\nContent-Length: 5\r\n\r\n", "b", 0)
def test_what_is_read_of_a_head_is_what_the_parser_reads(head: bytes, text: str, length: int) -> None:
    parsed, apart = _parsed(head), Apart.of(head)
    if parsed is None or apart is None or apart.head != head:
        return
    lane = Lane.of(apart, Found(_LANE, None, [], 9, None, parsed[0] is not None), _LANE)
    if lane is None:
        return
    assert lane.read(head + b"body") == (*parsed[:2], len(head))
    words = {1: str(length).encode(), 2: text.encode()}
    other = apart.pieces[0] + b"".join(
        words[kind] + piece for kind, piece in zip(apart.order, apart.pieces[1:], strict=True)
    )
    assert lane.read(other) == (text if parsed[0] is not None else None, length, len(other))
    assert _parsed(other) == (text if parsed[0] is not None else None, length, *parsed[2:])


@pytest.mark.parametrize("credential", [b"", b"Authorization: Bearer a\r\n", b"X-API-Key: a\r\n"])
def test_a_plain_head_is_read(credential: bytes) -> None:
    head = b"POST /mcp HTTP/1.1\r\nHost: x\r\n" + credential + b"Content-Length: 12\r\n\r\n"
    apart = Apart.of(head)
    assert apart is not None
    lane = Lane.of(apart, Found(_LANE, None, [], 9, None, bool(credential)), _LANE)
    assert lane is not None
    assert lane.read(head) == ("a" if credential else None, 12, len(head))
    assert Lane.of(apart, Found(_LANE, None, [], 9, None, not credential), _LANE) is None
