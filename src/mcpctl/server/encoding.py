"""One way to write JSON for every answer that leaves over HTTP, whichever lane made it: compact UTF-8."""

import json
from typing import Any

import msgspec

encode = msgspec.json.Encoder().encode


_RESULT = ("_meta", "content", "structuredContent", "isError", "resultType")
_CONTENT = ("type", "text")


def again(body: bytes) -> bytes:
    """A JSON body of the SDK's, written as the express lane writes. What is not JSON stays as it is."""
    try:
        message = json.loads(body)
        result = message.get("result") if isinstance(message, dict) else None
        if isinstance(result, dict) and "isError" in result:
            result["content"] = [_ordered(item, _CONTENT) for item in result["content"]]
            message["result"] = _ordered(result, _RESULT)
        return encode(message)
    except (ValueError, RecursionError, TypeError):
        return body


def _ordered(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The same with its keys in this order, and what has none behind them."""
    return {name: found[name] for name in names if name in found} | found


def headers(body: bytes, request_id: str) -> list[tuple[bytes, bytes]]:
    """What every answer over HTTP has."""
    found = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"x-request-id", request_id.encode()),
    ]
    return found if body else found[1:]


def lines(length: int, request_id: str) -> bytes:
    """`headers` of a body of so many bytes, as they are sent."""
    return _LINES % (length, request_id.encode())


_LINES = b"".join(
    b"%b: %b\r\n" % (name, {b"content-length": b"%d", b"x-request-id": b"%b"}.get(name, value))
    for name, value in headers(b"{}", "")
)


def rpc_error(
    code: int, message: str, data: dict[str, Any] | None = None, *, request: str | int | None = None
) -> bytes:
    """A JSON-RPC error; without `request` one that belongs to none."""
    error: dict[str, Any] = {"code": code, "message": message}
    if data:
        error["data"] = data
    return encode({"jsonrpc": "2.0", "id": request, "error": error})
