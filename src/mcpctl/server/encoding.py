"""One way to write JSON for every answer that leaves over HTTP, whichever lane made it: compact UTF-8."""

import json
from typing import Any

import msgspec

encode = msgspec.json.Encoder().encode


def again(body: bytes) -> bytes:
    """A JSON body of the SDK's, written as the express lane writes. What is not JSON stays as it is."""
    try:
        return encode(json.loads(body))
    except (ValueError, RecursionError, TypeError):
        return body


def rpc_error(code: int, message: str, data: dict[str, Any] | None = None) -> bytes:
    """A JSON-RPC error that belongs to no request."""
    error: dict[str, Any] = {"code": code, "message": message}
    if data:
        error["data"] = data
    return encode({"jsonrpc": "2.0", "id": None, "error": error})
