"""A private YAML file of named entries, one entry a line: tokens.yaml and users.yaml.

    version: 1
    tokens:
      ab12cd34: {user: alice, hash: "$argon2id$…", …}

The command line writes it, under its lock, as a whole; the server only reads. Of a changed file only the lines
between the first and the last that differ are parsed, and an entry that has not changed is not written out again, so
that one change in ten thousand costs one. A file that a person has laid out differently is read as well, as a whole.
What a person has written beside the entries (comments) is lost with the next change.
"""

import contextlib
import io
import operator
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import yaml

from mcpctl import plain_yaml, private_file, reserve
from mcpctl.errors import ConfigError, Error, NotFoundError, NotWrittenError
from mcpctl.identity.lockdown import refuse_unfinished
from mcpctl.plain_yaml import Branch
from mcpctl.private_file import Fingerprint

E = TypeVar("E")


@dataclass(frozen=True)
class Shape(Generic[E]):
    """What stands in such a file: its top key, how a name looks, and an entry to and from plain values.

    `read` gets (name, values) and returns the entry or raises ValueError saying what is wrong. `together` finds what no
    entry shows alone: (name, what is wrong).
    """

    top: str
    name: re.Pattern[str]
    read: Callable[[str, dict[str, Any]], E]
    write: Callable[[E], dict[str, Any]]
    together: Callable[[Mapping[str, E]], Iterable[tuple[str, str]]] = lambda entries: ()


class _OneLine(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _text)


@dataclass
class EntryFile(Generic[E]):
    """One such file. `current()` is for the server, `edit()` for the command line. `missing` is the hint where it is
    not there, `elsewhere` where the fault of a broken one may be, beside the file itself."""

    path: Path
    shape: Shape[E]
    _entries: dict[str, E] = field(default_factory=dict)
    _fingerprint: Fingerprint | None = None
    _by_line: dict[str, E] = field(default_factory=dict)
    _marks: "array[int]" = field(default_factory=lambda: array("q"))
    _broken: ConfigError | None = None
    version: int = 0
    missing: str = "restore it from your backup; only where none of the files is there, mcpctl init makes them"
    elsewhere: str = ""

    def current(self) -> Mapping[str, E]:
        """The entries of the file as it is now: one stat, and a parse where it has changed.

        `version` counts the contents seen. Raises ConfigError while the file is missing or broken.
        """
        now = private_file.fingerprint(self.path)
        if now != self._fingerprint or now == private_file.ABSENT:
            self._fingerprint = None  # what cannot even be read is tried again each time: its folder may be at fault
            try:
                content = private_file.read(self.path)
            except NotWrittenError:
                raise
            except Error as problem:
                hint = self.missing if isinstance(problem, NotFoundError) else problem.hint
                raise ConfigError(problem.message, hint) from None
            self._fingerprint = content.fingerprint
            try:
                self._entries = self._parse(content.data)
            except ConfigError as problem:
                self._broken = problem
                raise
            self._broken = None
            self.version += 1
        if self._broken:
            raise ConfigError(self._broken.message, self._broken.hint)
        return self._entries

    def _same_where_equal(self, entries: dict[str, E]) -> dict[str, E]:
        """The entries, with the objects that are known already for what has not changed."""
        return {name: old if (old := self._entries.get(name)) == entry else entry for name, entry in entries.items()}

    @contextlib.contextmanager
    def edit(self, *, though_full: bool = False) -> Iterator[dict[str, E]]:
        """The entries, held under the file's lock; what the block leaves in them is written when it ends well.
        `though_full` as in `private_file.Edit.replace`; it does not wait for ever for another who holds the file."""
        with private_file.edit(self.path, patience=private_file.PATIENCE if though_full else None) as held:
            refuse_unfinished(self.path)
            before = self._parse(held.data)
            entries = dict(before)
            yield entries
            if entries != before:
                lines = zip(before, _entry_lines(held.data), strict=True) if before is self._by_line else ()
                data = self.render(entries, {name: line for name, line in lines if entries.get(name) is before[name]})
                if self._parse(data) != entries:
                    raise ConfigError(f"{self.path} could not be read again if it were written; nothing was changed")
                held.replace(data, though_full=though_full)
                reserve.keep(held.path.parent)

    def render(self, entries: Mapping[str, E], written: Mapping[str, bytes] = MappingProxyType({})) -> bytes:
        """The file's bytes for these entries, of which some may be `written` already."""
        if not entries:
            return f"version: 1\n{self.shape.top}: {{}}\n".encode()
        lines = [
            written.get(name) or f"  {name}: {self._flow(entry)}\n".encode("utf-8", "surrogatepass")
            for name, entry in entries.items()
        ]
        return b"".join([self._head, *lines])

    @property
    def _head(self) -> bytes:
        return f"version: 1\n{self.shape.top}:\n".encode()

    def _flow(self, entry: E) -> str:
        """An entry on one line: a text with a line break in it, or anything else that is not to be seen, is escaped."""
        values = {key: value for key, value in self.shape.write(entry).items() if value is not None}
        plainest = plain_yaml.in_one_line(values)
        if plain_yaml.one_line(plainest) == values:
            return plainest
        return yaml.dump(
            values, Dumper=_OneLine, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
        ).strip()

    def _parse(self, data: bytes) -> dict[str, E]:
        faults: list[str] = []
        entries = self._lines(data)
        if entries is None or any(self.shape.together(entries)):
            entries = self._same_where_equal(self._whole(data, faults))
        if faults:
            raise ConfigError(
                "\n  ".join([f"{self.path} is not in order:", *faults]),
                f"mend {self.path}, or restore it{self.elsewhere}",
            )
        return entries

    def _lines(self, data: bytes) -> dict[str, E] | None:
        """The entries where every line is one as we write it; None where the file must be read as a whole.

        Of the content before, a mark of 64 bits for each line is kept: enough to know it again, and no copy of it.
        """
        if not data.startswith(self._head) or not data.endswith(b"\n"):
            return None
        known, old, new = self._by_line, self._marks, array("q", map(hash, _entry_lines(data)))
        before = _alike(old, new)
        after = min(_alike(reversed(old), reversed(new)), len(old) - before, len(new) - before)
        fresh = self._fresh(islice(_entry_lines(data), before, len(new) - after))
        if fresh is None:
            return None
        entries = dict(islice(known.items(), before))
        entries.update(self._same_where_equal(fresh))
        entries.update(islice(known.items(), len(old) - after, None))
        if len(entries) != len(new):  # a name stands there twice
            return None
        self._by_line, self._marks = entries, new
        return entries

    def _fresh(self, lines: Iterable[bytes]) -> dict[str, E] | None:
        """The entries of some of its lines; None where one is not as we write it."""
        fresh: dict[str, Any] = {}
        parsed: dict[str, str] = {}
        try:
            for line in lines:
                text = line.decode("utf-8")
                name, _, values = text[2:-1].partition(": ")
                if not text.startswith("  ") or not self.shape.name.fullmatch(name) or name in fresh:
                    return None
                fields = plain_yaml.one_line(values)
                fresh[name] = None if fields is None else self.shape.read(name, fields)
                if fields is None:
                    parsed[name] = text
                    if len(text.splitlines()) > 1:  # YAML knows more ends of a line than one
                        return None
        except ValueError:  # the reader of the whole says what is wrong, and where
            return None
        faults: list[str] = []
        found = self._whole(self._head + "".join(parsed.values()).encode(), faults) if parsed else {}
        if faults or list(found) != list(parsed):  # as many keys as lines, in their order: so no line needs another
            return None
        return {**fresh, **found}

    def _whole(self, data: bytes, faults: list[str]) -> dict[str, E]:
        tree = plain_yaml.parse(data, self.path, faults)
        entries: dict[str, E] = {}
        values = plain_yaml.as_plain(tree)
        if faults:
            return entries
        for key, child in tree.children.items():
            if key not in ("version", self.shape.top):
                faults.append(f"{child.where}: {key}: there is no such key; there are version and {self.shape.top}")
        version = values.get("version")
        if type(version) is not int or version != 1:
            where = tree.children["version"].where if "version" in values else str(self.path)
            faults.append(f"{where}: version: is {version!r}, and this mcpctl knows 1")
        named = values.get(self.shape.top)
        entries_tree = tree.children.get(self.shape.top)
        if entries_tree is not None and named is None:
            return entries
        if not isinstance(entries_tree, Branch):
            faults.append(f"{self.path}: {self.shape.top}: is missing, or has no entries with names")
            return entries
        for name, fields in named.items():
            where = entries_tree.children[name].where
            if not self.shape.name.fullmatch(name):
                faults.append(f"{where}: {name!r} cannot be a name here")
            elif not isinstance(fields, dict):
                faults.append(f"{where}: {name}: expected {{key: value, …}}")
            else:
                try:
                    entries[name] = self.shape.read(name, fields)
                except ValueError as problem:
                    faults.append(f"{where}: {name}: {problem}")
        faults += [
            f"{entries_tree.children[name].where}: {name}: {text}" for name, text in self.shape.together(entries)
        ]
        return entries


def _entry_lines(data: bytes) -> Iterator[bytes]:
    return islice(io.BytesIO(data), 2, None)


def _alike(old: Iterable[int], new: Iterable[int]) -> int:
    """How many are the same in both, one after the other from the first on."""
    return sum(takewhile(bool, map(operator.eq, old, new)))
