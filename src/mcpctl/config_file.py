"""Changing config.yaml as a person would: the other lines, their order and their comments stay.

By ruamel.yaml (MIT), which keeps what PyYAML's reader throws away, but for blanks within a line. What is written is
read again first, by our own reader, so that a file which could not be used is never put in place.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcpctl import plain_yaml, private_file
from mcpctl.errors import ConfigError, ConflictError, Error, NotFoundError

_FIRST_KEY = re.compile(rb"^( +)[^\s#-]", re.MULTILINE)
_FIRST_ITEM = re.compile(rb"^( *)[^\s#-].*:[ \t]*(?:#.*)?\r?\n( *)- ", re.MULTILINE)
"""What tells how far the file's keys and the dashes of its lists are indented."""


def add(path: Path, section: str, name: str, values: dict[str, Any], check: Callable[[Path], None]) -> None:
    """Put an entry into a section. ConflictError (exit 5) where there is one of that name. `check(path)` reads a file
    as the server would, and raises for one that it could not use."""

    def change(tree: Any) -> None:
        entries = tree.get(section)
        if entries is None:
            tree[section] = entries = {}
        if name in entries:
            raise ConflictError(f"{path} has {section}.{name} already", "remove it first, or change it there by hand")
        entries[name] = values

    _change(path, change, check)


def remove(path: Path, section: str, name: str, check: Callable[[Path], None]) -> None:
    """Take an entry out of a section. NotFoundError (exit 4) where there is none of that name."""

    def change(tree: Any) -> None:
        if name not in (tree.get(section) or {}):
            raise NotFoundError(
                f"{path} has no {section}.{name}", "the environment may have it, where it cannot be changed"
            )
        del tree[section][name]

    _change(path, change, check)


def _change(path: Path, change: Callable[[Any], None], check: Callable[[Path], None]) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1 << 20
    with private_file.edit(path, mode=0o640) as held:
        try:
            tree = yaml.load(held.data)
        except YAMLError as problem:
            raise ConfigError(f"{path} cannot be changed: {problem}", "mend it by hand first") from None
        key, item = _FIRST_KEY.search(held.data), _FIRST_ITEM.search(held.data)
        dash = max(0, len(item[2]) - len(item[1])) if item is not None else 0
        yaml.indent(mapping=len(key[1]) if key is not None else 2, sequence=dash + 2, offset=dash)
        yaml.explicit_start = held.data.startswith(b"---")
        tree = {} if tree is None else tree
        change(tree)
        out = io.BytesIO()
        yaml.dump(tree, out)
        data = out.getvalue()
        if b"\r\n" in held.data:
            data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        faults: list[str] = []
        plain_yaml.parse(data, path, faults)
        if faults:
            raise ConfigError(f"{path} could not be read again if it were written; nothing was changed", faults[0])
        _check_apart(path, data, check)
        held.replace(data)


def _check_apart(path: Path, data: bytes, check: Callable[[Path], None]) -> None:
    """Read the new content as a file of its own beside the old one, whose paths are relative to the same folder."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    private_file.create(beside, data)
    try:
        check(beside)
    except Error as problem:
        told = re.sub(re.escape(str(beside)) + r":\d+: ", "", problem.message)  # nobody has a file with that line
        if told != problem.message:
            told = f"with this change {told}"
            problem.hint = "nothing was written; docs/reference/config.md says what each key takes"
        problem.message = told.replace(str(beside), str(path))
        raise
    finally:
        beside.unlink(missing_ok=True)
