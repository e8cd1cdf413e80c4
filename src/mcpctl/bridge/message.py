"""One JSON-RPC message as the client wrote it, what the bridge has to know of it, and the headers that it goes with.

The bytes go on as they came. Nothing here imports the SDK, which takes longer than all the rest of the bridge's start.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PARSE_ERROR, INVALID_REQUEST, NOT_FOUND, INTERNAL, NO_ANSWER = -32700, -32600, -32601, -32603, -32000
"""JSON-RPC 2.0, section 5.1; -32000 is what the official SDKs call a connection that is closed."""
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_PLAIN = re.compile(r"[\x20-\x7e]*")
_ENCODED = re.compile(r"=\?base64\?.*\?=")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

Id = str | int | None
Where = Mapping[str, Mapping[tuple[str, ...], str]]
"""Tool → the path of an argument → the header that repeats it."""


class NotAMessageError(Exception):
    """A line that is none: JSON-RPC's code, words, and the id to answer, where it has one."""

    def __init__(self, code: int, said: str, request: Id = None) -> None:
        super().__init__(said)
        self.code = code
        self.said = said
        self.request = request


@dataclass(frozen=True)
class Message:
    """A message, and its line without the line feed."""

    line: bytes
    fields: Mapping[str, Any]

    @property
    def method(self) -> str | None:
        """None for an answer."""
        found = self.fields.get("method")
        return found if isinstance(found, str) else None

    @property
    def request(self) -> Id:
        """The id that it must be answered by; None for a notification and for an answer."""
        return answerable(self.fields) if self.method is not None else None

    @property
    def params(self) -> Mapping[str, Any]:
        found = self.fields.get("params")
        return found if isinstance(found, dict) else {}

    @property
    def version(self) -> str | None:
        """The protocol version in its own envelope: there since 2026-07-28."""
        meta = self.params.get("_meta")
        found = meta.get(VERSION_KEY) if isinstance(meta, dict) else None
        return found if isinstance(found, str) else None


def answerable(fields: Any) -> Id:
    """The id of a JSON-RPC object that can be answered."""
    given = fields.get("id") if isinstance(fields, dict) else None
    return given if isinstance(given, str) or type(given) is int else None


def read(line: bytes) -> Message:
    """The message of a line. Raises NotAMessageError: for what is no JSON in UTF-8, for two messages in one line, for a
    batch, and for an id that nobody can answer."""
    try:
        text = line.decode("utf-8")
        fields = json.loads(text)
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        said = "Parse error: a line is one message, as JSON in UTF-8"
        raise NotAMessageError(PARSE_ERROR, said) from None
    if isinstance(fields, list):
        raise NotAMessageError(INVALID_REQUEST, "Invalid request: one message a line, no batch")
    if not isinstance(fields, dict) or fields.get("jsonrpc") != "2.0" or not fields.keys() & {
        "method", "result", "error",
    }:  # fmt: skip
        said = "Invalid request: a message is one JSON-RPC 2.0 object"
        raise NotAMessageError(INVALID_REQUEST, said, answerable(fields))
    if "method" in fields and not isinstance(fields["method"], str):
        raise NotAMessageError(INVALID_REQUEST, "Invalid request: a method is a text", answerable(fields))
    if "id" in fields and answerable(fields) is None and "error" not in fields:
        raise NotAMessageError(INVALID_REQUEST, "Invalid request: an id is a text or a whole number")
    return Message(line.strip(), fields)


def error(request: Id, code: int, said: str, **data: Any) -> bytes:
    """A JSON-RPC error of the bridge's own, as a line without the line feed."""
    told = {"code": code, "message": said, **({"data": data} if data else {})}
    return json.dumps({"jsonrpc": "2.0", "id": request, "error": told}).encode()


def one_line(text: bytes) -> bytes:
    """JSON without line ends: a raw one can only stand between its words (RFC 8259, section 7)."""
    return text.replace(b"\r", b" ").replace(b"\n", b" ").strip()


def value(text: str) -> str:
    """A text as the value of a header, in base64 where it would not arrive as it is (MCP 2026-07-28, Streamable HTTP,
    "Value Encoding")."""
    if _PLAIN.fullmatch(text) and text == text.strip() and not _ENCODED.fullmatch(text):
        return text
    return f"=?base64?{base64.b64encode(text.encode('utf-8')).decode('ascii')}?="


def headers(message: Message, agreed: str | None, repeated: Where) -> dict[str, str]:
    """The headers that MCP asks for beside a message. `agreed`: the version that an `initialize` has led to, for
    messages that do not carry one themselves; `repeated`: which arguments the server wants in headers, too."""
    found = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    if message.version is None:
        if agreed is not None and message.method != "initialize":
            found["MCP-Protocol-Version"] = value(agreed)
        return found
    found["MCP-Protocol-Version"] = value(message.version)
    if message.method is not None:
        found["Mcp-Method"] = value(message.method)
        name = message.params.get(_NAMED.get(message.method, ""))
        if isinstance(name, str):
            found["Mcp-Name"] = value(name)
            if message.method == "tools/call":
                found.update(_arguments(repeated.get(name, {}), message.params.get("arguments")))
    return found


def _arguments(repeated: Mapping[tuple[str, ...], str], arguments: Any) -> Iterator[tuple[str, str]]:
    for path, header in repeated.items():
        given = arguments
        for key in path:
            given = given.get(key) if isinstance(given, dict) else None
        if isinstance(given, bool):
            yield f"Mcp-Param-{header}", "true" if given else "false"
        elif isinstance(given, str | int):
            yield f"Mcp-Param-{header}", value(str(given))


def repeated(tools: Any) -> dict[str, dict[tuple[str, ...], str]]:
    """What the answer to `tools/list` says should stand in headers: properties marked `x-mcp-header`."""
    found = {}
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            found[tool["name"]] = dict(_marked(tool.get("inputSchema"), ()))
    return found


def _marked(schema: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for name, below in properties.items() if isinstance(properties, dict) and len(path) < 16 else ():
        header = below.get("x-mcp-header") if isinstance(below, dict) else None
        if isinstance(header, str) and _TOKEN.fullmatch(header):
            yield (*path, name), header
        yield from _marked(below, (*path, name))
