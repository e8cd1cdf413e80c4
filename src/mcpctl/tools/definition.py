"""What a tool is, and how its arguments are checked."""

import difflib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mcpctl.errors import UsageError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.token_pool import Session

encode = msgspec.json.Encoder().encode


@dataclass
class Result:
    """What a tool answers: `structured` as plain values, and `text`, the same as compact JSON."""

    structured: dict[str, Any]
    text: str
    rows: int | None = None
    bytes: int | None = None


def result(structured: dict[str, Any]) -> Result:
    """A result whose text is the JSON of its structured content."""
    return Result(structured, encode(structured).decode())


@dataclass(frozen=True)
class Databases:
    """The databases of the config that a principal may name: {name: description}, and which one is the default."""

    described: Mapping[str, str | None]
    default: str | None


Ask = Callable[[Session, dict[str, Any], Bounds], Awaitable[Result]]
Tell = Callable[[Principal, Databases], Result]


@dataclass(frozen=True)
class Tool:
    """One row of the dispatch table. `permission` is what a caller needs; exactly one of `ask` (with a connection of
    the caller's own pool) and `tell` (without) is set. `statement` names the argument that the audit line keeps."""

    name: str
    description: str
    permission: str
    properties: dict[str, dict[str, Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    output: dict[str, Any] = field(default_factory=lambda: {"type": "object"})
    ask: Ask | None = None
    tell: Tell | None = None
    statement: str | None = None

    @property
    def input_schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of the arguments."""
        schema: dict[str, Any] = {"type": "object", "properties": self.properties, "additionalProperties": False}
        if self.required:
            schema["required"] = list(self.required)
        return schema

    def check(self, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments, or UsageError naming what is missing, unknown or of the wrong type. null is left out."""
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        for name in given:
            if name not in self.properties:
                close = difflib.get_close_matches(name, list(self.properties), 1, 0.6)
                meant = f"did you mean {close[0]}?" if close else f"there are: {', '.join(self.properties) or 'none'}"
                raise UsageError(f"{self.name} takes no argument {name[:60]!r}", meant)
        for name in self.required:
            if name not in given:
                raise UsageError(
                    f"{self.name} needs the argument {name}", f"its schema: {encode(self.properties).decode()}"
                )
        return {name: self._checked(name, value) for name, value in given.items()}

    def _checked(self, name: str, value: Any) -> Any:
        schema = self.properties[name]
        expected = schema["type"]
        if expected == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON Schema 2020-12: 2.0 is an integer
        right = {"string": isinstance(value, str), "boolean": isinstance(value, bool)}.get(
            expected, isinstance(value, int) and not isinstance(value, bool)
        )
        if not right:
            raise UsageError(f"{self.name}: the argument {name} takes {expected}, not {_json_type(value)}")
        if expected == "integer" and not schema["minimum"] <= value:
            raise UsageError(f"{self.name}: the argument {name} is {schema['minimum']} at least")
        return value


def _json_type(value: Any) -> str:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)
