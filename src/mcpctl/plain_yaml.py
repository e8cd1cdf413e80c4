"""YAML as plain data alone: keys, values and lists, each with the line on which it stands.

No tag, no anchor, no alias, no key twice, no second document, and no deeper than a person writes. It is built from
the parser's events, without recursion and without its composer, which a file of nested brackets crashes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_TEXT = "tag:yaml.org,2002:str"
_SURPRISING = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-9_.]+)+)")
"""What YAML 1.1 takes for a number in base 8 or 60, and nobody means: 010, 1:20."""
_QUOTED = r"'[ -&(-~\w]*(?:''[ -&(-~\w]*)*'"
_NETWORK = r"[0-9]+(?:\.[0-9]+){3}(?:/[0-9]+)?"
_SCALAR = rf"{_QUOTED}|{_NETWORK}|[^\W\d_][\w./'-]*(?: [\w./'-]+)*"
_SCALARS = re.compile(_SCALAR)
_PAIR = re.compile(rf"([a-z_]+): (?:({_SCALAR})|\[((?:(?:{_SCALAR})(?:, (?:{_SCALAR}))*)?)\])(?:, |\}})")
_OTHERWISE = {"yes", "no", "true", "false", "on", "off", "null"}
"""Words that YAML 1.1 takes for something else than a text."""
DEEPEST = 20
_TOO_DEEP = f"nested deeper than {DEEPEST}"


@dataclass
class Value:
    """One value or a list of them. `raw` is the text behind it, where it came from the environment."""

    value: Any
    where: str
    raw: str | None = None


@dataclass
class Branch:
    """Keys with what stands below them."""

    children: "dict[str, Value | Branch]"
    where: str


def parse(data: bytes, source: Path, faults: list[str]) -> Branch:
    """The file's keys and values. Faults are added, and what has one is left out."""
    empty = Branch({}, f"{source}:1")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        faults.append(f"{source}:{line}: not UTF-8")
        return empty
    found = _Reader(str(source), faults).read(text)
    if found is None or (isinstance(found, Value) and found.value is None):
        return empty
    if not isinstance(found, Branch):
        faults.append(f"{source}:1: expected keys and values")
        return empty
    return found


def value(text: str) -> Any:
    """What a lone value means in YAML: a text, number, truth value, nothing, or a list of them; else ValueError."""
    faults: list[str] = []
    found = _Reader("", faults).read(text)
    if faults or isinstance(found, Branch):
        raise ValueError("not one value")
    return found.value if found is not None else None


def one_line(text: str) -> dict[str, Any] | None:
    """The texts and lists of texts of a mapping on one line, in the plainest of the forms that YAML has for them; None
    for any other, which the parser has to read. Ten times as fast as the parser."""
    fields: dict[str, Any] = {}
    at = 1 if text.startswith("{") else len(text)
    while found := _PAIR.match(text, at):
        name, one, several = found.groups()
        texts = _SCALARS.findall(several) if one is None else [one]
        if name in fields or any(text.lower() in _OTHERWISE for text in texts):
            return None
        texts = [text[1:-1].replace("''", "'") if text[0] == "'" else text for text in texts]
        fields[name] = texts if one is None else texts[0]
        at = found.end()
        if text[at - 1] == "}":
            return fields if at == len(text) else None
    return None


def as_plain(tree: Value | Branch) -> Any:
    """A tree as plain dicts and values."""
    if isinstance(tree, Branch):
        return {name: as_plain(child) for name, child in tree.children.items()}
    return tree.value


@dataclass
class _Open:
    """A mapping (`keys`) or a list (`items`) whose end has not come yet."""

    where: str
    keys: "dict[str, Value | Branch] | None" = None
    items: "list[Any] | None" = None
    key: str | None = None
    key_where: str = ""


class _Reader:
    def __init__(self, source: str, faults: list[str]) -> None:
        self._source = source
        self._faults = faults
        self._stack: list[_Open] = []
        self._top: Value | Branch | None = None
        self._documents = 0

    def read(self, text: str) -> Value | Branch | None:
        """The one document, or None where there is none or it is beyond reading."""
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                if not self._take(event):
                    return None
        except yaml.YAMLError as problem:
            mark = getattr(problem, "problem_mark", None)
            line = mark.line + 1 if mark else 1 + text.count("\n", 0, getattr(problem, "position", 0) or 0)
            why = getattr(problem, "problem", None) or getattr(problem, "reason", None) or "cannot be read"
            if "nesting" in why:  # newer libyamls give up first, at a depth of their own
                self._faults.append(f"{self._source}:{line}: {_TOO_DEEP}")
            else:
                self._faults.append(f"{self._source}:{line}: not YAML: {why}")
            return None
        return self._top

    def _take(self, event: yaml.Event) -> bool:
        where = f"{self._source}:{event.start_mark.line + 1}" if event.start_mark else self._source
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._faults.append(f"{where}: a second document; one file holds one")
                return False
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._faults.append(f"{where}: anchors and aliases are not taken; write it out")
        elif getattr(event, "tag", None) is not None and isinstance(event, yaml.NodeEvent):
            self._faults.append(f"{where}: the tag {event.tag} is not plain data")  # type: ignore[attr-defined]
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if len(self._stack) >= DEEPEST:
                self._faults.append(f"{where}: {_TOO_DEEP}")
                return False
            if isinstance(event, yaml.MappingStartEvent):
                self._stack.append(_Open(where, keys={}))
            else:
                self._stack.append(_Open(where, items=[]))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = self._stack.pop()
            self._put(Branch(ended.keys, ended.where) if ended.keys is not None else Value(ended.items, ended.where))
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event, where)
        elif isinstance(event, yaml.AliasEvent):
            self._put(Value(None, where))
        return True

    def _scalar(self, event: yaml.ScalarEvent, where: str) -> None:
        around = self._stack[-1] if self._stack else None
        if around is not None and around.keys is not None and around.key is None:
            around.key, around.key_where = event.value, where
            if event.value in around.keys:
                self._faults.append(f"{where}: {event.value}: stands there twice")
            return
        self._put(Value(self._meaning(event, where), where))

    def _meaning(self, event: yaml.ScalarEvent, where: str) -> Any:
        if not event.implicit[0]:
            return event.value
        tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False))  # type: ignore[no-untyped-call]
        if tag == _TEXT or _SURPRISING.fullmatch(event.value):
            return event.value
        try:
            return _CONSTRUCTOR.construct_object(yaml.ScalarNode(tag, event.value))
        except (yaml.YAMLError, ValueError, OverflowError):
            self._faults.append(f"{where}: {event.value[:40]!r} looks like a number or time, and is none; quote a text")
            return None

    def _put(self, done: Value | Branch) -> None:
        """A value is complete: it goes to the key or into the list that waits for it."""
        if not self._stack:
            self._top = done
            return
        around = self._stack[-1]
        if around.items is not None:
            around.items.append(as_plain(done))
        elif around.keys is not None:
            if around.key is None:
                self._faults.append(f"{done.where}: a key must be a text")
                around.key = "?"
                return
            done.where = around.key_where
            around.keys[around.key] = done
            around.key = None
