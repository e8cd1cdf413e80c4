"""What is a JSON-RPC message, and what is said of anything else (JSON-RPC 2.0, section 5.1).

The SDK takes some of it all the same: a call whose id is null for a notification, which nobody answers, other encodings
than UTF-8, halves of surrogate pairs, and a request of 2026-07-28 without its header for one of an older revision.
"""

import json
from collections.abc import Sequence
from typing import Any

from mcp_types import HEADER_MISMATCH, INVALID_REQUEST, PARSE_ERROR, PROTOCOL_VERSION_META_KEY

VERSION_HEADER = b"mcp-protocol-version"


class NotAMessageError(Exception):
    """Why it is none: a code of JSON-RPC's or MCP's, words, and the id to answer, where it has one."""

    def __init__(self, code: int, said: str, request: str | int | None = None) -> None:
        super().__init__(said)
        self.code = code
        self.said = said
        self.request = request


def read(data: bytes) -> Any:
    """The JSON of a message: in UTF-8 (RFC 8259, section 8.1), and with an id, if any, that can be answered.

    Raises NotAMessageError.
    """
    found = None
    try:
        found = json.loads(data.decode("utf-8"))
        if b"\\u" in data:
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        number = answerable(found)
        known = number if not isinstance(number, str) or number.isascii() else None
        said = "Parse error: a message is JSON in UTF-8, without halves of surrogate pairs"
        raise NotAMessageError(PARSE_ERROR, said, known) from None
    if isinstance(found, list):
        raise NotAMessageError(INVALID_REQUEST, "Invalid request: one message a request, no batch")
    if isinstance(found, dict) and "id" in found and "method" in found and answerable(found) is None:
        raise NotAMessageError(INVALID_REQUEST, "Invalid request: an id is a text or a whole number")
    return found


def answerable(message: Any) -> str | int | None:
    """The id that a message asks to be answered by."""
    given = message.get("id") if isinstance(message, dict) else None
    return given if isinstance(given, str) or type(given) is int else None


def check_version(message: Any, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise NotAMessageError where a body names a protocol version and the header is another, or is not there; or where
    there are two of them. Who filters by the headers must not be deceived."""
    values = [value for key, value in headers if key == VERSION_HEADER]
    params = message.get("params") if isinstance(message, dict) else None
    meta = params.get("_meta") if isinstance(params, dict) else None
    named = meta.get(PROTOCOL_VERSION_META_KEY) if isinstance(meta, dict) else None
    if len(values) > 1 or (isinstance(named, str) and values != [named.encode("utf-8")]):
        raise NotAMessageError(
            HEADER_MISMATCH,
            "mcp-protocol-version header does not match the request envelope's protocol version",
            answerable(message),
        )


def cancelled(message: Any) -> str | int | None:
    """The number of the call that a `notifications/cancelled` is about; None where it is no such notification."""
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0" or "id" in message:
        return None
    params = message.get("params")
    if message.get("method") != "notifications/cancelled" or not isinstance(params, dict):
        return None
    return answerable({"id": params.get("requestId")})
