"""The operator's files as somebody else may leave them: each is refused with a message that names it, at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mcpctl import config, private_file
from mcpctl.errors import ConfigError, Error
from mcpctl.identity import tenants, tokens, users

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
SECRET = "hunter2-in-the-file"
READ: dict[str, Callable[[Path], Any]] = {
    "config.yaml": lambda path: config.load(path, {}),
    "tokens.yaml": lambda path: tokens.token_file(path).current(),
    "users.yaml": lambda path: users.user_file(path).current(),
    "tenants.yaml": lambda path: tenants.tenant_file(path).current(),
}
TOP = {"config.yaml": "audit", "tokens.yaml": "tokens", "users.yaml": "users", "tenants.yaml": "tenants"}
LAUGHS = "".join(f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]\n" for n in range(9))
TEXTS = {
    "a billion laughs": f"l0: &l0 [lol]\n{LAUGHS}",
    "an alias": "version: 1\na: &a {b: c}\nTOP: *a\n",
    "a merge": "version: 1\nTOP:\n  <<: {x: 1}\n",
    "a tag of Python": "version: 1\nTOP: !!python/object/apply:os.system ['id']\n",
    "a tag": "version: 1\nTOP: !mine {}\n",
    "a key twice": "version: 1\nTOP: {}\nTOP: {}\n",
    "two documents": "version: 1\nTOP: {}\n---\nversion: 1\n",
    "a key that is a list": "version: 1\n? [a]\n: b\n",
    "five thousand deep": "version: 1\nTOP: " + "{a: " * 5000,
    "a hundred thousand lists deep": "TOP: " + "[" * 100_000,
    "a NUL": "version: 1\nTOP: {a\0b: {}}\n",
    "a bell": "version: 1\nTOP: {'\x07': {}}\n",
    "UTF-16": "version: 1\nTOP: {}\n".encode("utf-16").decode("latin-1"),
    "bytes that are no UTF-8": "version: 1\nTOP: {a: \xff\xfe}\n",
    "a list": "- version: 1\n",
    "a text": f"{SECRET}\n",
    "JSON that is cut": '{"version": 1, "TOP": {',
    "an unknown key": "version: 1\nTOP: {}\nmore: 1\n",
    "an entry that is a text": "version: 1\nTOP: {ab12cd34: x}\n",
    "an entry that is code": "version: 1\nTOP: {'; rm -rf /': {}}\n",
    "tabs": "version: 1\nTOP:\n\tab12cd34: {}\n",
    "quotes that are left open": "version: 1\nTOP: {'ab\n",
    "half a mebibyte of a name": "version: 1\nTOP: {" + "x" * (512 << 10) + ": {}}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def _refused(read: Callable[[Path], Any], path: Path) -> None:
    """Refused with a message that names the file and tells no secret, in no time."""
    begun = time.monotonic()
    with pytest.raises(Error) as caught:
        read(path)
    assert time.monotonic() - begun < 10
    assert caught.value.exit_code in (3, 4)
    assert path.name in caught.value.message
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("what", TEXTS)
def test_a_hostile_text_is_refused_and_its_file_named(folder: Path, name: str, what: str) -> None:
    path = folder / name
    data = TEXTS[what].replace("TOP", TOP[name]).encode("latin-1" if "\xff" in TEXTS[what] else "utf-8")
    private_file.create(path, data)
    _refused(READ[name], path)


def _link(path: Path) -> None:
    path.symlink_to("/proc/self/environ")


def _mode(path: Path) -> None:
    path.touch()
    path.chmod(0o666)


def _hole(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 65 << 20)


def _others(path: Path) -> None:
    path.touch(0o600)
    path.parent.chmod(0o777)


KINDS: dict[str, Callable[[Path], object]] = {
    "a link to the environment": _link,
    "a link to itself": lambda path: path.symlink_to(path),
    "a FIFO": lambda path: os.mkfifo(path, 0o600),
    "a folder": lambda path: path.mkdir(0o700),
    "what all may write": _mode,
    "a file of 65 MiB": _hole,
    "in a folder that all may write to": _others,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_refused_and_named(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    KINDS[kind](path)
    try:
        _refused(READ[name], path)
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize("name", [name for name in READ if name != "config.yaml"])
def test_a_file_of_another_user_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    private_file.create(path, f"version: 1\n{TOP[name]}: {{}}\n".encode())
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError):
        READ[name](path)


def test_a_file_that_is_replaced_all_the_time_is_always_read_whole(folder: Path) -> None:
    path = folder / "tokens.yaml"
    written = tokens.token_file(path)
    private_file.create(path, written.render({}))
    enough = threading.Event()

    def write() -> None:
        while not enough.is_set():
            tokens.add(written, tokens.Wanted(), NOW)
            with written.edit() as entries:
                for name in list(entries)[20:]:
                    del entries[name]

    writer = threading.Thread(target=write)
    writer.start()
    read = tokens.token_file(path)
    try:
        seen = set()
        while len(seen) < 30:
            seen.add(frozenset(read.current()))
            assert len(read.current()) <= 21
    finally:
        enough.set()
        writer.join()
