"""The express lane: the one hot request, `tools/call`, without the SDK's streams and models.

It answers only what it knows to the last byte, and hands everything else to the SDK; a differential test holds both
lanes to the same answers. What the SDK would validate of a request's `_meta`, the SDK's own validator is asked about
once, and the verdict remembered by the `_meta`'s bytes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from mcp_types import (
    CLIENT_CAPABILITIES_META_KEY,
    CLIENT_INFO_META_KEY,
    INVALID_PARAMS,
    PROTOCOL_VERSION_META_KEY,
    SERVER_INFO_META_KEY,
    methods,
)
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, LATEST_HANDSHAKE_VERSION, MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from mcpctl import __version__
from mcpctl.facts import Answer

Headers = Sequence[tuple[bytes, bytes]]
Route = tuple[bool, str]
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_SAFE = 2**53 - 1
_MOST_METAS = 1000
_MOST_NESTED = 150
_MODERN_META = {PROTOCOL_VERSION_META_KEY, CLIENT_CAPABILITIES_META_KEY, CLIENT_INFO_META_KEY}
_PASSED = {"progressToken", "traceparent", "tracestate", "baggage"}
"""What the SDK looks at in no `_meta` of a tools/call. The trace's part is SEP-414's."""
_ROUTING = (b"mcp-protocol-version", b"mcp-method", b"mcp-name")


class Call(msgspec.Struct):
    """A tools/call that the express lane can answer."""

    id: int | str
    name: str
    arguments: dict[str, Any] | None
    modern: bool
    carried: dict[str, Any] | None = None
    """What its `_meta` says of the trace that the call is part of."""


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    progressToken: int | str | msgspec.UnsetType = msgspec.UNSET
    traceparent: Any = msgspec.UNSET
    tracestate: Any = msgspec.UNSET
    baggage: Any = msgspec.UNSET


class _Params(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    meta: _Meta | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="_meta")


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    """A tools/call as clients of the older era send it."""

    jsonrpc: Literal["2.0"]
    id: int | str
    method: Literal["tools/call"]
    params: _Params


_decode_plain = msgspec.json.Decoder(_Plain).decode


class Express:
    """Reads requests and writes answers; remembers which `_meta` the SDK found in order."""

    def __init__(self) -> None:
        self._metas: OrderedDict[bytes, None] = OrderedDict()

    def read(self, headers: Headers, body: bytes, routed: Route | None) -> Call | None:
        """The call in a POST to /mcp, or None where the SDK is to see to it. `routed` is `route` of the headers."""
        if routed is None:
            return None
        if body.count(b"[") + body.count(b"{") > _MOST_NESTED:
            return None  # it may be nested deeper than the SDK's parser goes
        modern, named = routed
        if not modern:
            try:
                plain = _decode_plain(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass  # it is looked at below, whatever it is
            else:
                given = plain.params.arguments
                found = Call(plain.id, plain.params.name, None if given is msgspec.UNSET else given, False)
                if plain.params.meta is not msgspec.UNSET:
                    found.carried = _carried(msgspec.structs.asdict(plain.params.meta))
                return found if _is_good_number(plain.id) else None
        try:
            message = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if not isinstance(message, dict) or message.keys() != {"jsonrpc", "id", "method", "params"}:
            return None
        number, params = message["id"], message["params"]
        if message["jsonrpc"] != "2.0" or message["method"] != "tools/call" or not isinstance(params, dict):
            return None
        if not _is_good_number(number):
            return None
        name, arguments, meta = params.get("name"), params.get("arguments"), params.get("_meta")
        if not isinstance(name, str) or not params.keys() <= {"name", "arguments", "_meta"}:
            return None
        if not isinstance(arguments, dict) and "arguments" in params:
            return None
        if modern and (named != name or not name.isascii() or name.startswith("=?")):
            return None
        if not self._meta_is_good(meta, "_meta" in params, modern, name, headers):
            return None
        return Call(number, name, arguments, modern, _carried(meta) if meta is not None else None)

    def route(self, headers: Headers) -> Route | None:
        """Whether headers are those of a modern tools/call, and of which tool, or of an older one; None for others."""
        found: dict[bytes, bytes] = {}
        for key, value in headers:
            if key in _ROUTING:
                if key in found:
                    return None
                found[key] = value
            elif key.startswith(b"mcp-param-"):
                return None
        if b"mcp-protocol-version" not in found:
            return False, ""
        version = found[b"mcp-protocol-version"].decode("latin-1")
        if version in HANDSHAKE_PROTOCOL_VERSIONS:
            return False, ""
        if version not in MODERN_PROTOCOL_VERSIONS or found.get(b"mcp-method") != b"tools/call":
            return None
        named = found.get(b"mcp-name")
        return (True, named.decode("latin-1")) if named is not None else None

    def _meta_is_good(self, meta: Any, given: bool, modern: bool, name: str, headers: Headers) -> bool:
        if not given:
            return not modern
        if not isinstance(meta, dict):
            return False
        if not isinstance(meta.get("progressToken", 0), str | int) or isinstance(meta.get("progressToken"), bool):
            return False
        rest = {key: value for key, value in meta.items() if key not in _PASSED}
        if not modern:
            return not rest
        version = rest.get(PROTOCOL_VERSION_META_KEY)
        if not rest.keys() <= _MODERN_META or version not in MODERN_PROTOCOL_VERSIONS:
            return False
        if (b"mcp-protocol-version", str(version).encode()) not in headers:
            return False
        if CLIENT_CAPABILITIES_META_KEY not in rest:
            return False
        digest = hashlib.blake2b(_encode(rest), digest_size=16).digest()
        if digest in self._metas:
            return True
        try:
            methods.validate_client_request("tools/call", str(version), {"name": name, "_meta": rest})
        except (ValidationError, KeyError):
            return False
        self._metas[digest] = None
        while len(self._metas) > _MOST_METAS:
            self._metas.popitem(last=False)
        return True

    def answer(self, call: Call, answer: Answer) -> tuple[int, bytes]:
        """(HTTP status, body) of a call's answer, as the SDK would have written it."""
        result: dict[str, Any] = {}
        if call.modern:
            result["_meta"] = {SERVER_INFO_META_KEY: {"name": "mcpctl", "version": __version__}}
        result["content"] = [{"type": "text", "text": answer.text}]
        if not answer.is_error:
            result["structuredContent"] = msgspec.Raw(answer.text.encode())
        result["isError"] = answer.is_error
        if call.modern:
            result["resultType"] = "complete"
        return 200, _encode({"jsonrpc": "2.0", "id": call.id, "result": result})

    def unknown_tool(self, call: Call, message: str) -> tuple[int, bytes]:
        """The protocol's error for a tool that there is not: HTTP 400 in the modern era, 200 before."""
        error = {"code": INVALID_PARAMS, "message": message}
        return 400 if call.modern else 200, _encode({"jsonrpc": "2.0", "id": call.id, "error": error})


def _carried(meta: dict[str, Any]) -> dict[str, Any] | None:
    found = {name: meta.get(name, msgspec.UNSET) for name in ("traceparent", "tracestate")}
    known = {name: value for name, value in found.items() if value is not msgspec.UNSET}
    return known if "traceparent" in known else None


def _is_good_number(number: object) -> bool:
    return (type(number) is int and -_SAFE <= number <= _SAFE) or (type(number) is str and len(number) <= 200)


__all__ = ["LATEST_HANDSHAKE_VERSION", "Call", "Express", "Headers", "Route"]
