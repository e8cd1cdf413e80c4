"""A client's own configuration file: where it is, and our entry merged into it. Everything else in it stays as it was,
to the byte; a copy of it is kept."""

import json
import os
import re
import stat
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpctl import jsonc
from mcpctl.errors import ConfigError, ConflictError, NotWrittenError, UsageError

if TYPE_CHECKING:
    from mcpctl.private_file import Fingerprint

COPY = ".before-mcpctl"
"""What the name of the kept copy ends in."""
_LARGEST = 64 << 20
_HEAD = re.compile(r"\s*\[{1,2}\s*([^\]#]*?)\s*\]{1,2}\s*(?:#.*)?\s*")
"""A line of TOML that begins a table."""


def place(client: str, home: Path, environ: Mapping[str, str], platform: str = sys.platform) -> Path:
    """The file that a client reads for one user on this system. UsageError for one that has none."""
    if platform == "win32":
        programs = Path(environ.get("APPDATA") or home / "AppData" / "Roaming")
    elif platform == "darwin":
        programs = home / "Library" / "Application Support"
    else:
        programs = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    places = {
        "claude-code": Path(environ.get("CLAUDE_CONFIG_DIR") or home) / ".claude.json",
        "claude-desktop": programs / "Claude" / "claude_desktop_config.json",
        "cursor": home / ".cursor" / "mcp.json",
        "vscode": programs / "Code" / "User" / "mcp.json",
        "codex": Path(environ.get("CODEX_HOME") or home / ".codex") / "config.toml",
        "gemini": home / ".gemini" / "settings.json",
    }
    if client not in places:
        raise UsageError(f"{client} has no file that could be written", "leave --write out, and it is printed")
    return places[client]


class ClientFile:
    """A client's file as it is now, and as it is to be: `old` and `new`. ConfigError, and nothing is written, where it
    cannot be understood."""

    def __init__(self, path: Path, client: str, name: str, snippet: str) -> None:
        from mcpctl.private_file import fingerprint

        self.path = Path(os.path.realpath(path))
        self._seen: Fingerprint = fingerprint(self.path)
        self.old = _read(self.path)
        try:
            make = [_with_table(self.old, name, snippet)] if client == "codex" else _with_entry(self.old, snippet)
            self._steps: list[str] = [self.old, *make]
        except (ValueError, RecursionError) as problem:
            raise ConfigError(
                f"{path} cannot be changed: {problem}", "nothing was written; mend it first, or add it by hand"
            ) from None

        self.new = self._steps[-1]

    @property
    def changes(self) -> bool:
        """Whether there is anything to write."""
        return self.old != self.new

    def diff(self) -> str:
        """What would change, step by step; nothing around it, not in the same line either, since other servers' secrets
        may stand there."""
        steps = [line for old, new in pairwise(self._steps) if old != new for line in _changed(old, new)]
        return "\n".join([f"--- {self.path}", f"+++ {self.path}", *steps])

    def write(self) -> Path | None:
        """Put the new content in place in one step, with owner and mode kept; where the copy of the old one is."""
        from mcpctl.private_file import fingerprint

        there = self._seen[1] >= 0
        copy = self.path.with_name(self.path.name + COPY) if there and self.old else None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = os.stat(self.path) if there else None
            if copy is not None:
                _put(copy, self.old, about)
            if fingerprint(self.path) != self._seen:
                raise ConflictError(f"{self.path} was changed meanwhile; it is left so", "try again")
            _put(self.path, self.new, about)
        except OSError as problem:
            raise NotWrittenError(
                f"cannot write {self.path}: {problem.strerror}; nothing was changed",
                "--file FILE names another",
            ) from None
        return copy


def _changed(old: str, new: str) -> list[str]:
    """The lines of a change, without what both texts begin and end with."""
    begin = _alike(zip(old, new, strict=False))
    end = _alike(zip(reversed(old[begin:]), reversed(new[begin:]), strict=False))
    told = [f"@@ line {old.count(chr(10), 0, begin) + 1} @@"]
    for sign, text in (("-", old), ("+", new)):
        if middle := text[begin : len(text) - end]:
            inside = begin > 0 and text[begin - 1] != "\n"
            told += [f"{sign}{line}" for line in f"{'…' if inside else ''}{middle}{'…' if end else ''}".splitlines()]
    return told


def _alike(pairs: Iterable[tuple[str, str]]) -> int:
    """How many pairs at the beginning have twice the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _read(path: Path) -> str:
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
            raise ConfigError(f"{path} is no file that a client's configuration could be", "--file FILE names another")
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}", "--file FILE names another") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} cannot be changed: it is not UTF-8", "nothing was written") from None


def _put(path: Path, text: str, about: os.stat_result | None) -> None:
    """Write a file beside, and rename it over `path`. A new one is its owner's alone."""
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(beside, flags, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            if about is not None and hasattr(os, "fchown"):
                if (about.st_uid, about.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), about.st_uid, about.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(about.st_mode))
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _with_entry(text: str, snippet: str) -> Iterator[str]:
    """JSON with our entry, after each step: servers by their name, questions (`inputs`) by their id."""
    for key, value in json.loads(snippet).items():
        if isinstance(value, list):
            for item in value:
                yield (text := jsonc.put_item(text, key, item, "id"))
        else:
            for name, entry in value.items():
                yield (text := jsonc.put(text, [key, name], entry))


def _with_table(text: str, name: str, snippet: str) -> str:
    """TOML with our table in place of the one of that name, or at the end. It is read again: what came of it has to be
    what was meant. ValueError where that cannot be had."""
    newline = "\r\n" if "\r\n" in text else "\n"
    wanted: dict[str, Any] = tomllib.loads(text.replace("\r\n", "\n"))
    ours = tomllib.loads(snippet)["mcp_servers"][name]
    servers = wanted.setdefault("mcp_servers", {})
    if isinstance(servers, dict) and servers.get(name) == ours:
        return text
    kept, at = _without_table(text.splitlines(keepends=True), ["mcp_servers", name])
    block = snippet.replace("\n", newline) + newline
    if at is None:
        head = "".join(kept)
        head += newline if head and not head.endswith("\n") else ""
        new = head + (newline if head.strip() else "") + block
    else:
        new = "".join([*kept[:at], block, *([newline] if kept[at:] else []), *kept[at:]])
    if isinstance(servers, dict):
        servers[name] = ours
    if tomllib.loads(new.replace("\r\n", "\n")) != wanted:
        raise ValueError(f"mcp_servers.{name} stands there in a form that is not changed here")
    return new


def _without_table(lines: list[str], path: list[str]) -> tuple[list[str], int | None]:
    """The lines without the table at that path and those below it, and where it began."""
    kept: list[str] = []
    at, inside = None, False
    for line in lines:
        head = _HEAD.fullmatch(line)
        if head is not None:
            inside = [one.strip().strip("\"'") for one in head[1].split(".")][: len(path)] == path
            at = len(kept) if inside and at is None else at
        if not inside or line.lstrip().startswith("#"):
            kept.append(line)
    return kept, at
