"""The control sockets: how a command asks the processes that serve the same files what they did.

Each serving process listens on `control.<pid>.<random>.sock` (0600) in the runtime folder, which only its user and root
may open. One request and one answer are a line of JSON each. Whoever asks, asks all of them: a revocation is proved by
every worker, and there is no process in the middle.
"""

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from mcpctl.errors import ConfigError

LONGEST_PATH = 100
_CHUNK = 65536
_LONGEST_ANSWER = 16 << 20


def folder_of(runtime_dir: Path | None, token_file: Path) -> Path:
    """Where the sockets are."""
    return runtime_dir or token_file.parent


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """A name for a socket's path that fits into the 107 bytes that it may have (unix(7))."""
    if len(os.fsencode(path)) <= LONGEST_PATH or not Path("/proc/self/fd").exists():
        yield str(path)
        return
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(folder: Path) -> tuple[socket.socket, Path]:
    """This process's socket, 0600 from its first moment; what dead processes left is swept first."""
    sweep(folder)
    path = folder / f"control.{os.getpid()}.{os.urandom(4).hex()}.sock"  # containers that share it share pids
    early = path.with_name(f".{path.name}")  # it gets its name when it listens: nobody takes it for a dead one's
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        early.unlink(missing_ok=True)
        with short(early) as name:
            made.bind(name)
        made.listen(16)
        early.replace(path)
    except OSError as problem:
        made.close()
        raise ConfigError(
            f"cannot make the control socket {path}: {problem.strerror}", "set server.runtime_dir to a folder of yours"
        ) from None
    finally:
        os.umask(before)
    made.setblocking(False)
    return made, path


def sockets(folder: Path) -> list[Path]:
    """The control sockets in the folder that are owned by us; nothing else is ever connected to."""
    found = []
    for path in sorted(folder.glob("control.*.sock")):
        with contextlib.suppress(OSError):
            about = os.lstat(path)
            if stat.S_ISSOCK(about.st_mode) and about.st_uid == os.geteuid():
                found.append(path)
    return found


def sweep(folder: Path) -> None:
    """Remove the sockets of processes that are gone."""
    for path in sockets(folder):
        if is_dead(path):
            with contextlib.suppress(OSError):  # a folder that cannot be written; whoever asks passes it over
                path.unlink(missing_ok=True)


def is_dead(path: Path) -> bool:
    """Whether nobody listens at that socket any more."""
    if isinstance(found := _connect(path, 0.2), socket.socket):
        found.close()
    return found is None


def ask_all(folder: Path, request: dict[str, Any], seconds: float = 2.0) -> list[dict[str, Any]]:
    """Every serving process's answer; one that does not answer in time says {"error": …}."""
    return [answer for _, answer in ask_each(folder, request, seconds)]


def ask_each(folder: Path, request: dict[str, Any], seconds: float = 2.0) -> list[tuple[int, dict[str, Any]]]:
    """(pid, answer) of every serving process, as `ask_all` has it. The pid is that of the socket's name.

    All are asked before the first answer is waited for: one that hangs costs the others nothing.
    """
    deadline = monotonic() + seconds
    asked = [
        (_pid(path), _send(found, request))
        for path in sockets(folder)
        if (found := _connect(path, seconds)) is not None
    ]
    return [(pid, found if isinstance(found, dict) else _receive(found, deadline)) for pid, found in asked]


def _pid(path: Path) -> int:
    name = path.name.split(".")[1]
    return int(name) if name.isascii() and name.isdigit() else 0


def ask_one(folder: Path, request: dict[str, Any], seconds: float = 2.0) -> bool:
    """Ask the serving processes one after the other, until one has done it; whether one has."""
    for path in sockets(folder):
        if (found := _connect(path, seconds)) is None:
            continue
        asked = _send(found, request)
        answer = asked if isinstance(asked, dict) else _receive(asked, monotonic() + seconds)
        if "error" not in answer:
            return True
    return False


def _connect(path: Path, seconds: float) -> "socket.socket | dict[str, Any] | None":
    """A connection, {"error": …}, or None where nobody listens any more."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(seconds)
    try:
        with short(path) as name:
            made.connect(name)
    except OSError as problem:
        made.close()
        gone = isinstance(problem, ConnectionRefusedError | FileNotFoundError)
        return None if gone else {"error": str(problem.strerror or problem)}
    return made


def _send(found: "socket.socket | dict[str, Any]", request: dict[str, Any]) -> "socket.socket | dict[str, Any]":
    if isinstance(found, dict):
        return found
    try:
        found.sendall(json.dumps(request).encode() + b"\n")
    except OSError as problem:
        found.close()
        return {"error": str(problem.strerror or problem)}
    return found


def _receive(made: socket.socket, deadline: float) -> dict[str, Any]:
    line = bytearray()
    with made:
        try:
            while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
                made.settimeout(max(0.05, deadline - monotonic()))
                chunk = made.recv(_CHUNK)
                if not chunk:
                    break
                line += chunk
            answer = json.loads(line)
        except (OSError, ValueError):
            return {"error": "no answer in time"}
    return answer if isinstance(answer, dict) else {"error": "an answer that is none"}
