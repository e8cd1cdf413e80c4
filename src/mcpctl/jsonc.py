"""JSON as editors and desktop programs keep it, with comments and commas at the end, changed in one place: every other
byte stays as it was. RFC 8259, and what VS Code's settings take beside it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_BLANK = re.compile(r"(?:[ \t\r\n]|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_SCALAR = re.compile(r"[^\s,\]}/]+")
_DEEPEST = 100


@dataclass
class Node:
    """A value, and where it stands: `text[start:end]`. `value` has no comments; `members` are an object's, `items` an
    array's; `comma` tells whether one stands behind the last of them."""

    start: int
    end: int = 0
    value: Any = None
    members: dict[str, "Node"] = field(default_factory=dict)
    items: list["Node"] = field(default_factory=list)
    comma: bool = False

    @property
    def last(self) -> "Node | None":
        """The last member or item."""
        inside = [*self.members.values(), *self.items]
        return inside[-1] if inside else None


def parse(text: str) -> Node:
    """The value that a text is; the empty object for one that holds nothing. ValueError, with its line, for others."""
    begin = _blank(text, 1 if text.startswith("\ufeff") else 0)
    if begin == len(text):
        return Node(begin, begin, {})
    found = _value(text, begin, 0)
    if (end := _blank(text, found.end)) != len(text):
        raise _fault(text, end, "something stands behind its end")
    return found


def put(text: str, path: Sequence[str], value: Any) -> str:
    """The text with this value at these keys, whose objects are made where there are none. ValueError where something
    else stands on the way."""
    node = parse(text)
    if node.start == node.end:
        begun = text if text.rstrip(" \t")[-1:] in ("", "\n", "\ufeff") else text + "\n"
        return begun + _dumped(_nested(path, value), "", "  ", "\n") + "\n"
    for depth, key in enumerate(path):
        if not isinstance(node.value, dict):
            raise _fault(text, node.start, f"{'.'.join(path[:depth]) or 'it'} is no object")
        below = node.members.get(key)
        if below is None:
            return _inserted(text, node, f"{json.dumps(key, ensure_ascii=False)}: ", _nested(path[depth + 1 :], value))
        node = below
    return text if node.value == value else _replaced(text, node, value)


def put_item(text: str, key: str, value: dict[str, Any], same: str) -> str:
    """The text with this item in the array at that key of the whole, instead of one whose member `same` is equal."""
    node = parse(text).members.get(key)
    if node is None:
        return put(text, [key], [value])
    if not isinstance(node.value, list):
        raise _fault(text, node.start, f"{key} is no array")
    for item in node.items:
        if isinstance(item.value, dict) and item.value.get(same) == value[same]:
            return text if item.value == value else _replaced(text, item, value)
    return _inserted(text, node, "", value)


def _nested(path: Sequence[str], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _fault(text: str, at: int, what: str) -> ValueError:
    return ValueError(f"line {text.count(chr(10), 0, at) + 1}: {what}")


def _blank(text: str, at: int) -> int:
    """Where the next thing stands that is neither blank nor comment."""
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, depth: int) -> Node:
    if depth > _DEEPEST:
        raise _fault(text, at, "it is nested too deeply")
    if text[at : at + 1] in ("{", "["):
        return _inside(text, at, depth, "}" if text[at] == "{" else "]")
    found = (_STRING if text[at : at + 1] == '"' else _SCALAR).match(text, at)
    try:
        return Node(at, found.end() if found else at, json.loads(found[0] if found else "", parse_constant=_no_number))
    except ValueError:
        raise _fault(text, at, "a value was expected") from None


def _no_number(name: str) -> None:
    raise ValueError(name)


def _inside(text: str, at: int, depth: int, close: str) -> Node:
    """An object or array."""
    node = Node(at)
    at = _blank(text, at + 1)
    while text[at : at + 1] != close:
        if node.last is not None and not node.comma:
            raise _fault(text, at, f"a comma or {close} was expected")
        at = _member(text, at, depth, node) if close == "}" else _item(text, at, depth, node)
        node.comma = text[at : at + 1] == ","
        at = _blank(text, at + 1) if node.comma else at
    node.end = at + 1
    node.value = [one.value for one in node.items]
    if close == "}":
        node.value = {key: one.value for key, one in node.members.items()}
    return node


def _item(text: str, at: int, depth: int, node: Node) -> int:
    node.items.append(_value(text, at, depth + 1))
    return _blank(text, node.items[-1].end)


def _member(text: str, at: int, depth: int, node: Node) -> int:
    found = _STRING.match(text, at)
    if found is None:
        raise _fault(text, at, "a key in double quotes was expected")
    key = _value(text, at, depth).value
    if key in node.members:
        raise _fault(text, at, f"the key {key[:40]!r} stands there twice")
    at = _blank(text, found.end())
    if text[at : at + 1] != ":":
        raise _fault(text, at, "a colon was expected")
    node.members[key] = _value(text, _blank(text, at + 1), depth + 1)
    return _blank(text, node.members[key].end)


def _indent(text: str, at: int) -> str:
    """What the line begins with that this place is in."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]


def _dumped(value: Any, indent: str, step: str, newline: str) -> str:
    return json.dumps(value, indent=step, ensure_ascii=False).replace("\n", newline + indent)


def _shape(text: str) -> tuple[str, str]:
    """(one step of indentation, end of line), as the text has them."""
    first = re.search(r"^([ \t]+)[^\s/*]", text, re.MULTILINE)
    return (first[1] if first else "  "), ("\r\n" if "\r\n" in text else "\n")


def _replaced(text: str, node: Node, value: Any) -> str:
    step, newline = _shape(text)
    many = "\n" in text
    new = _dumped(value, _indent(text, node.start), step, newline) if many else json.dumps(value, ensure_ascii=False)
    return text[: node.start] + new + text[node.end :]


def _inserted(text: str, node: Node, name: str, value: Any) -> str:
    """The text with a further member or item at the end of `node`."""
    step, newline = _shape(text)
    close, last = node.end - 1, node.last
    outer = _indent(text, node.start)
    if last is None:
        inner = outer + step
        kept = text[node.start + 1 : close].rstrip()  # a comment, maybe
        new = newline + inner + name + _dumped(value, inner, step, newline) + newline + outer
        return text[: node.start + 1] + kept + new + text[close:]
    comma = "" if node.comma else ","
    if "\n" not in text[node.start : node.end]:
        new = f"{'' if node.comma else ', '}{name}{json.dumps(value, ensure_ascii=False)}"
        return text[:close] + (" " if node.comma else "") + new + text[close:]
    end = len(text[:close].rstrip())
    first = next(iter([*node.members.values(), *node.items]))
    inner = _indent(text, first.start)
    if not name and text[text.rfind("\n", 0, first.start) + 1 : first.start].strip():
        inner = outer + step
    new = newline + inner + name + _dumped(value, inner, step, newline)
    return text[: last.end] + comma + text[last.end : end] + new + text[end:]
