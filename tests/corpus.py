"""The corpus of the two lanes: requests, and the answers that they must have, written down in corpus/*.yaml.

An entry of a file says what is asked and what has to come back, in as few words as it takes. What it leaves out:

    query: …            a tools/call of query_database; `arguments` are put beside it (limit, database)
    tool: …             a tools/call of another tool, with `arguments`; `arguments: omit` leaves the key out
    params, message     the request's params, or the whole JSON-RPC message, as they are
    body, bytes         the body as it is, in UTF-8 or in Latin-1 (where YAML's \\xff is the byte ff)
    repeat              [text, text, how often the one before, text, …]: a body too large to write down
    id                  of the request, default 1;  meta  is added to `_meta`
    era                 `MCP-Protocol-Version`, or `none` for no such header; without it, an entry is asked twice:
                        as 2026-07-28 with its `_meta` and headers, and as 2025-06-18
    headers             {name: value} instead of the usual ones, null for none; `more_headers` come after them
    method, path        of HTTP, default POST /mcp
    lane                `express` (the default where `query` or `tool` stands) or `sdk`; `neither` where the request
                        is refused before either of them sees it

and what comes back, one of:

    columns, rows       rows of query_database; `cut: {rows: n}` or `{bytes: n}` where they were cut off
    answer              any other tool's structured content
    error               lines of an isError result
    result              a result of another method than tools/call; compared as JSON, since nobody fixes its key order
    rpc_error           {code, message, data, id}; without `message`, any text will do (where only the code is
                        specified); without `code`, any code
    json                the whole body;  empty: true  for none
    status              default 200; {era: status} where the eras differ

Any of them may be {15: …, 18: …}: what holds from that major version of PostgreSQL on. In texts, `$TOKEN` is the id of
the caller's token and `$EXPIRES` its end. The bytes of an expected answer are made here, with the standard library,
in the order that the protocol's examples have: neither lane's code has any part in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mcpctl import __version__

MODERN, LEGACY = "2026-07-28", "2025-06-18"
FOLDER = Path(__file__).parent / "corpus"
_DENIED = "42501"
_OF_OTHERS = {"other_users", "attacks", "requests"}
"""Files that hold no requests of the two lanes; see `statements`, `attacks` and tests/test_attack_requests.py."""
Headers = list[tuple[bytes, bytes]]
_KEYS = {
    "name", "query", "tool", "params", "message", "body", "bytes", "repeat", "arguments", "id", "meta", "era",
    "headers", "more_headers", "method", "path", "lane", "columns", "rows", "cut", "answer", "error", "result",
    "rpc_error", "json", "empty", "status",
}  # fmt: skip
_ANSWERS = {"columns", "answer", "error", "result", "rpc_error", "json", "empty"}
_MASKS = (
    (re.compile(rb'(\\?"elapsed_ms\\?":)\d+(\.\d+)?(e-\d+)?'), rb"\g<1>0"),
    (re.compile(rb"actual time=\d+\.\d+\.\.\d+\.\d+"), b"actual time=0..0"),
    (re.compile(rb'\\?"Planning:\\?",\\?"  Buffers: [^"\\]*\\?",'), b""),  # where the catalog was not in the cache yet
    (re.compile(rb"(Planning|Execution) Time: \d+\.\d+ ms"), rb"\g<1> Time: 0 ms"),
    (re.compile(rb"([Rr]equest) [0-9a-f]{16}\b"), rb"\g<1> 0"),
)


class Verbatim(float):
    """A number whose digits in JSON are those of the corpus."""

    text: str

    def __new__(cls, text: str) -> Verbatim:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __repr__(self) -> str:
        return self.text


def _marked(value: Any) -> Any:
    if isinstance(value, Verbatim):
        return f"\ue000{value.text}\ue000"
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    return [_marked(item) for item in value] if isinstance(value, list) else value


def dumps(value: Any) -> str:
    """Compact JSON, UTF-8 rather than escapes, with the corpus's own digits where it has any."""
    text = json.dumps(_marked(value), separators=(",", ":"), ensure_ascii=False)
    return re.sub('"\ue000(.*?)\ue000"', r"\1", text)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!number", lambda loader, node: Verbatim(node.value))
_Loader.add_constructor("!repeat", lambda loader, node: _times(loader, node))
_Loader.add_constructor("!numbers", lambda loader, node: [[number + 1] for number in range(int(node.value))])
_Loader.add_constructor("!nested", lambda loader, node: _nested(int(node.value)))


def _times(loader: Any, node: Any) -> str:
    """[text, how often, text, how often, …] as one text."""
    pairs: list[Any] = loader.construct_sequence(node)
    return "".join(unit * count for unit, count in zip(pairs[::2], pairs[1::2], strict=True))


def _nested(depth: int) -> list[Any]:
    """Empty lists in each other, that many."""
    found: list[Any] = []
    for _ in range(depth - 1):
        found = [found]
    return found


@dataclass(frozen=True)
class Request:
    """An HTTP request, but for its Host and Authorization."""

    method: str
    path: str
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Expected:
    """What has to come back. `body` None: any text of a JSON-RPC error with the code `code` (None: any) for `id`."""

    status: int
    content_type: bytes | None
    body: bytes | None
    as_json: bool = False
    code: int | None = None
    id: Any = None


@dataclass(frozen=True)
class Entry:
    """One request and its answer; `era` is the protocol version of its header."""

    name: str
    file: str
    era: str
    spec: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.file}: {self.name} ({self.era})"

    @property
    def lane(self) -> str:
        found = self.spec.get("lane") or ("express" if self._is_call else "sdk")
        return str(found)

    @property
    def _is_call(self) -> bool:
        return "query" in self.spec or "tool" in self.spec

    @property
    def _modern(self) -> bool:
        return self.era == MODERN

    # -- what is asked -------------------------------------------------------------------------------------------

    def request(self) -> Request:
        message = self._message()
        headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        if self.era != "none":
            headers["mcp-protocol-version"] = self.era
        if self._modern and isinstance(message, dict):
            headers["mcp-method"] = str(message.get("method"))
            params = message.get("params")
            if isinstance(params, dict) and isinstance(named := params.get("name", params.get("uri")), str):
                headers["mcp-name"] = named
        headers |= self.spec.get("headers", {})
        lines = [(name, value) for name, value in headers.items() if value is not None]
        lines += [(name, value) for name, value in self.spec.get("more_headers", [])]
        return Request(
            self.spec.get("method", "POST"),
            self.spec.get("path", "/mcp"),
            [(name.encode(), value.encode()) for name, value in lines],
            self._body(message),
        )

    def _message(self) -> Any:
        spec = self.spec
        if "message" in spec:
            return spec["message"]
        return {"jsonrpc": "2.0", "id": spec.get("id", 1), "method": "tools/call", "params": self._params()}

    def _params(self) -> Any:
        spec = self.spec
        if "params" in spec:
            return spec["params"]
        params: dict[str, Any] = {"name": spec.get("tool", "query_database")}
        if spec.get("arguments") != "omit":
            given = spec.get("arguments", {})
            params["arguments"] = {"query": spec["query"], **given} if "query" in spec else given
        meta: dict[str, Any] = {}
        if self._modern:
            meta = envelope()
        meta |= spec.get("meta", {})
        return params | ({"_meta": meta} if meta else {})

    def _body(self, message: Any) -> bytes:
        spec = self.spec
        if "body" in spec:
            return str(spec["body"]).encode()
        if "bytes" in spec:
            return str(spec["bytes"]).encode("latin-1")
        if "repeat" in spec:
            parts = spec["repeat"]
            times = [following if isinstance(following, int) else 1 for following in [*parts[1:], 1]]
            texts = [part * count for part, count in zip(parts, times, strict=True) if isinstance(part, str)]
            return "".join(texts).encode()
        return dumps(message).encode()

    # -- what has to come back -----------------------------------------------------------------------------------

    def expected(self, major: int, facts: Mapping[str, str]) -> Expected:
        """The answer on that version of PostgreSQL; `facts` stand for `$NAME`s."""
        status = self.spec.get("status", 200)
        if isinstance(status, dict):
            status = next(value for era, value in status.items() if str(era) == self.era)
        if self.spec.get("empty"):
            return Expected(status, None, b"")
        json_type = b"application/json"
        if (error := self.spec.get("rpc_error")) is not None:
            return self._expected_error(status, error)
        if "json" in self.spec:
            return Expected(status, json_type, _filled(dumps(self.spec["json"]), facts))
        result = self.spec["result"] if "result" in self.spec else self._tool_result(major)
        body = dumps({"jsonrpc": "2.0", "id": self._answered_id, "result": result})
        return Expected(status, json_type, _filled(body, facts), as_json="result" in self.spec)

    @property
    def _answered_id(self) -> Any:
        message = self._message()
        return message.get("id") if isinstance(message, dict) else None

    def _expected_error(self, status: int, error: dict[str, Any]) -> Expected:
        number = error.get("id", self._answered_id)
        if "message" not in error:
            return Expected(status, b"application/json", None, code=error.get("code"), id=number)
        inner = {key: error[key] for key in ("code", "message", "data") if key in error}
        body = dumps({"jsonrpc": "2.0", "id": number, "error": inner})
        return Expected(status, b"application/json", body.encode())

    def _tool_result(self, major: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self._modern:
            result["_meta"] = {"io.modelcontextprotocol/serverInfo": {"name": "mcpctl", "version": __version__}}
        if "error" in self.spec:
            text, structured = "\n".join(_of(self.spec["error"], major)), None
        else:
            structured = self._rows(major) if "columns" in self.spec else _of(self.spec["answer"], major)
            text = dumps(structured)
        result["content"] = [{"type": "text", "text": text}]
        if structured is not None:
            result["structuredContent"] = structured
        result["isError"] = structured is None
        if self._modern:
            result["resultType"] = "complete"
        return result

    def _rows(self, major: int) -> dict[str, Any]:
        rows = _of(self.spec.get("rows", []), major)
        cut = self.spec.get("cut")
        answer: dict[str, Any] = {
            "columns": [{"name": name, "type": kind} for name, kind in _of(self.spec["columns"], major)],
            "rows": rows,
            "row_count": len(rows),
            "truncated": cut is not None,
            "elapsed_ms": 0,
        }
        if cut is not None:
            answer["note"] = _note(cut)
        return answer


@dataclass(frozen=True)
class Statement:
    """A statement, and how it ends by the tool that is asked for it: `rows`, `none` where it is not run, a SQLSTATE."""

    name: str
    statement: str
    ends: Mapping[str, Any]

    def end(self, tool: str, major: int) -> str:
        """How it ends on that major version of PostgreSQL."""
        return str(_of(self.ends[tool], major))


def envelope() -> dict[str, Any]:
    """The `_meta` of a request of 2026-07-28."""
    return {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": {"name": "corpus", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }


def _note(cut: Mapping[str, int]) -> str:
    if "rows" in cut:
        where = f"at {cut['rows']} rows"
    else:
        where = f"before its bytes were more than {cut['bytes']}, the most that an answer may have here"
    return (
        f"The answer was cut off {where}. For the rest: ask for fewer columns or rows (WHERE, LIMIT and OFFSET with an "
        "ORDER BY), aggregate, or take a part of a long value with substr()."
    )


def _of(value: Any, major: int) -> Any:
    """What holds on that major version, where it depends on it."""
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
        return value[max(key for key in value if key <= major)]
    return value


def _filled(text: str, facts: Mapping[str, str]) -> bytes:
    for name, value in facts.items():
        text = text.replace(f"${name}", value)
    return text.encode()


def mask(body: bytes) -> bytes:
    """The body without what differs from one call to the next: times, and the ids of requests."""
    for pattern, instead in _MASKS:
        body = pattern.sub(instead, body)
    return body


def _entries(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    return found


def statements(name: str) -> list[Statement]:
    """The statements of corpus/NAME.yaml."""
    found = []
    for entry in _entries(FOLDER / f"{name}.yaml"):
        ends = {tool: entry.pop(tool, _DENIED) for tool in ("query", "execute")}
        found.append(Statement(**entry, ends=ends))
    names = [one.name for one in found]
    if double := {one for one in names if names.count(one) > 1}:
        raise ValueError(f"named twice: {double}")
    return found


@dataclass(frozen=True)
class Attack:
    """A hostile statement, and what it is after."""

    kind: str
    text: str


def attacks() -> list[Attack]:
    """Those of attacks.yaml; and what is no question (refused.yaml), as it is, and in what runs it as a text."""
    kinds: Any = yaml.load((FOLDER / "attacks.yaml").read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    found = [Attack(kind, text) for kind, texts in kinds.items() for text in texts]
    for text in dict.fromkeys(entry["query"] for entry in _entries(FOLDER / "refused.yaml")):
        found.append(Attack("refused", text))
        found.append(Attack("refused, by a function", f"select run($r${text}$r$)"))
        found.append(Attack("refused, by XML", f"select query_to_xml($r${text}$r$, true, false, '')"))
    return list({one.text: one for one in found}.values())


def load() -> list[Entry]:
    """Every entry of every file, each era a case of its own."""
    found: list[Entry] = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for spec in _entries(path) if path.stem not in _OF_OTHERS else []:
            if wrong := spec.keys() - _KEYS or (len(spec.keys() & _ANSWERS) != 1 and {"one answer"}):
                raise ValueError(f"{path.name}: {spec.get('name')}: {wrong}")
            eras = [str(spec["era"])] if "era" in spec else [MODERN, LEGACY]
            found += [Entry(spec["name"], path.stem, era, spec) for era in eras]
    titles = [entry.title for entry in found]
    if double := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(f"named twice: {double}")
    return found
