"""What a tool is, and how its arguments are checked."""

import difflib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from mcpctl.errors import UsageError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.own import Own
from mcpctl.postgres.session import Session

encode = msgspec.json.Encoder().encode


class Result(msgspec.Struct, eq=False):
    """What a tool answers, as compact JSON; `structured` is the same as plain values.

    `command` is PostgreSQL's tag of what was done, for the audit line.
    """

    text: str
    rows: int | None = None
    bytes: int | None = None
    command: str | None = None

    @property
    def structured(self) -> dict[str, Any]:
        """Read from the text: whoever sends it on as it is does not need it."""
        found: dict[str, Any] = msgspec.json.decode(self.text)
        return found


def result(structured: dict[str, Any]) -> Result:
    """A result whose text is the JSON of its structured content."""
    return Result(encode(structured).decode())


@dataclass(frozen=True)
class Databases:
    """The databases of the config that a principal may name: {name: description} and {name: what for}; which one is the
    default; the permissions that its roles and its token give it; and which of the databases its user has brought."""

    described: Mapping[str, str | None]
    access: Mapping[str, list[str]]
    default: str | None
    permissions: tuple[str, ...]
    own: frozenset[str] = frozenset()


class UnknownArgumentError(UsageError):
    """The tool takes no argument of that name, which the message holds."""


Ask = Callable[[Session, dict[str, Any], Bounds], Awaitable[Result]]
Tell = Callable[[Principal, Databases], Result]
OfOwn = Callable[[Own, str, dict[str, Any], Callable[[str], bool]], Awaitable[Result]]
"""What is done with the databases that the user of that name has brought."""


@dataclass(frozen=True)
class Tool:
    """One row of the dispatch table. `permission` is what a caller needs; exactly one of `ask` (with a connection of
    the caller's own pool), `tell` (without) and `own` (for users, not for service tokens) is set. `access` is the right
    on the database that it needs, and so the login role it runs as. `statement` names the argument that the audit line
    keeps. `changes`: it changes something, here or there.
    """

    name: str
    description: str
    permission: str
    properties: dict[str, dict[str, Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    output: dict[str, Any] = field(default_factory=lambda: {"type": "object"})
    ask: Ask | None = None
    tell: Tell | None = None
    own: OfOwn | None = None
    statement: str | None = None
    access: str = "read"
    changes: bool = False

    @property
    def input_schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of the arguments."""
        schema: dict[str, Any] = {"type": "object", "properties": self.properties, "additionalProperties": False}
        if self.required:
            schema["required"] = list(self.required)
        return schema

    @cached_property
    def _plain(self) -> dict[str, type]:
        """The arguments of which nothing is asked but their type."""
        kinds = {"string": str, "boolean": bool}
        wanted = {name: str(schema.get("type")) for name, schema in self.properties.items()}
        return {name: kinds[kind] for name, kind in wanted.items() if kind in kinds}

    def check(self, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments, or UsageError naming what is missing, unknown or of the wrong type. null is left out,
        unless the argument takes it."""
        if arguments and self._is_plain(arguments):
            return dict(arguments)
        given = {
            name: value for name, value in (arguments or {}).items() if value is not None or self._takes_null(name)
        }
        for name in given:
            if name not in self.properties:
                close = difflib.get_close_matches(name, list(self.properties), 1, 0.6)
                meant = f"did you mean {close[0]}?" if close else f"there are: {', '.join(self.properties) or 'none'}"
                raise UnknownArgumentError(f"{self.name} takes no argument {name[:60]!r}", meant)
        for name in self.required:
            if name not in given:
                raise UsageError(
                    f"{self.name} needs the argument {name}", f"its schema: {encode(self.properties).decode()}"
                )
        return {name: self._checked(name, value) for name, value in given.items()}

    def _is_plain(self, arguments: Mapping[str, Any]) -> bool:
        """Whether all that is needed is there, and nothing is wrong with any of it."""
        kinds, plain = self._plain, True
        for name in arguments:
            plain = plain and type(arguments[name]) is kinds.get(name)
        for name in self.required:
            plain = plain and name in arguments
        return plain

    def _takes_null(self, name: str) -> bool:
        return "null" in _types(self.properties.get(name, {}))

    def _checked(self, name: str, value: Any) -> Any:
        schema = self.properties[name]
        expected = _types(schema)[0]
        if value is None:
            return None
        if expected == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON Schema 2020-12: 2.0 is an integer
        right = {
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "array": isinstance(value, list),
        }.get(expected, isinstance(value, int) and not isinstance(value, bool))
        if not right:
            wanted = "array of strings" if expected == "array" else expected
            raise UsageError(f"{self.name}: the argument {name} takes {wanted}, not {_json_type(value)}")
        for index, item in enumerate(value if expected == "array" else ()):
            if not isinstance(item, str):
                wrong = f"{name}[{index}] is {_json_type(item)}"
                raise UsageError(f"{self.name}: the argument {name} takes array of strings, and {wrong}")
        if expected == "array" and not 0 < len(value) <= schema["maxItems"]:
            raise UsageError(f"{self.name}: the argument {name} takes 1 to {schema['maxItems']} items")
        if expected == "integer" and not schema["minimum"] <= value:
            raise UsageError(f"{self.name}: the argument {name} is {schema['minimum']} at least")
        return value


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The types that an argument takes: one, or one and null."""
    found = schema.get("type", [])
    return [found] if isinstance(found, str) else list(found)


def _json_type(value: Any) -> str:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
