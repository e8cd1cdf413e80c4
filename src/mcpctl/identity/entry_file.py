"""A private YAML file of named entries, one entry a line: tokens.yaml and users.yaml.

    version: 1
    tokens:
      ab12cd34: {user: alice, hash: "$argon2id$…", …}

The command line writes it, under its lock, as a whole; the server only reads. An entry whose line has not changed
is neither parsed nor written out again, so that one change in ten thousand costs one. A file that a person has laid
out differently is read as well, as a whole. What a person has written beside the entries (comments) is lost with the
next change.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from mcpctl import plain_yaml, private_file, reserve
from mcpctl.errors import ConfigError, Error, NotFoundError, NotWrittenError
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
    _lines: dict[str, E] = field(default_factory=dict)
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
                self._entries = self._same_where_equal(self._parse(content.data))
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
            before = self._parse(held.data)
            entries = dict(before)
            yield entries
            if entries != before:
                data = self.render(entries)
                if self._parse(data) != entries:
                    raise ConfigError(f"{self.path} could not be read again if it were written; nothing was changed")
                held.replace(data, though_full=though_full)
                reserve.keep(held.path.parent)

    def render(self, entries: Mapping[str, E]) -> bytes:
        """The file's bytes for these entries."""
        if not entries:
            return f"version: 1\n{self.shape.top}: {{}}\n".encode()
        written = {id(entry): line for line, entry in self._lines.items()}
        lines = [f"version: 1\n{self.shape.top}:"]
        for name, entry in entries.items():
            lines.append(written.get(id(entry)) or f"  {name}: {self._flow(entry)}")
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")

    def _flow(self, entry: E) -> str:
        """An entry on one line: a text with a line break in it, or anything else that is not to be seen, is escaped."""
        values = {key: value for key, value in self.shape.write(entry).items() if value is not None}
        return yaml.dump(
            values, Dumper=_OneLine, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
        ).strip()

    def _parse(self, data: bytes) -> dict[str, E]:
        faults: list[str] = []
        entries = self._by_line(data)
        if entries is None or any(self.shape.together(entries)):
            entries = self._whole(data, faults)
        if faults:
            raise ConfigError(
                "\n  ".join([f"{self.path} is not in order:", *faults]),
                f"mend {self.path}, or restore it{self.elsewhere}",
            )
        return entries

    def _by_line(self, data: bytes) -> dict[str, E] | None:
        """The entries where every line is one as we write it; None where the file must be read as a whole."""
        try:
            head, top, *lines = data.decode("utf-8").splitlines()
        except (UnicodeDecodeError, ValueError):
            return None
        if head != "version: 1" or top != f"{self.shape.top}:":
            return None
        names: dict[str, str] = {}
        for line in lines:
            name = line[2:].partition(":")[0]
            if not line.startswith("  ") or not self.shape.name.fullmatch(name) or name in names:
                return None
            names[name] = line
        new = {name: line for name, line in names.items() if line not in self._lines}
        faults: list[str] = []
        text = "\n".join(["version: 1", top, *new.values()]) + "\n"
        found = self._whole(text.encode(), faults)
        if faults or list(found) != list(new):  # as many keys as lines, in their order: so no line needs another
            return None
        entries = {name: found.get(name) or self._lines[line] for name, line in names.items()}
        self._lines = {names[name]: entry for name, entry in entries.items()}
        return entries

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
