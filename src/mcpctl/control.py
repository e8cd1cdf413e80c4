"""The control sockets: how a command asks the processes that serve the same files what they did.

Each serving process listens on `control.<pid>.sock` (0600) in the runtime folder, which only its user and root may
open. One request and one answer are a line of JSON each. Whoever asks, asks all of them: a revocation is proved by
every worker, and there is no process in the middle.
"""

import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from mcpctl.errors import ConfigError

LONGEST_PATH = 100
_LINE = 65536


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
    path = folder / f"control.{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short(path) as name:
            made.bind(name)
    except OSError as problem:
        made.close()
        raise ConfigError(
            f"cannot make the control socket {path}: {problem.strerror}", "set server.runtime_dir to a folder of yours"
        ) from None
    finally:
        os.umask(before)
    made.listen(16)
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
        if _ask(path, {"do": "ping"}, 0.2, gone_is_none=True) is None:
            path.unlink(missing_ok=True)


def ask_all(folder: Path, request: dict[str, Any], seconds: float = 2.0) -> list[dict[str, Any]]:
    """Every serving process's answer; one that does not answer in time says {"error": …}."""
    deadline = monotonic() + seconds
    answers = []
    for path in sockets(folder):
        answer = _ask(path, request, max(0.05, deadline - monotonic()), gone_is_none=True)
        if answer is not None:
            answers.append(answer)
    return answers


def _ask(path: Path, request: dict[str, Any], seconds: float, *, gone_is_none: bool) -> dict[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(seconds)
        try:
            with short(path) as name:
                made.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except OSError as problem:
            return {"error": str(problem.strerror)}
        try:
            made.sendall(json.dumps(request).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n") and len(line) < _LINE:
                chunk = made.recv(_LINE)
                if not chunk:
                    break
                line += chunk
            answer = json.loads(line)
        except (OSError, ValueError):
            return {"error": "no answer in time"}
    return answer if isinstance(answer, dict) else {"error": "an answer that is none"}


Handler = Callable[[dict[str, Any]], Any]
