"""mcpctl's commands, each in a process of its own that is forked from one which has imported everything already: an
import takes most of a command's time, and thousands are run. `python -m mcpctl` itself is run by the tests of the
command line (test_cli and others), and by every server."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, NoReturn


class Commands:
    """The process that the commands are forked from. One a test worker; it ends with it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        self._socket = ours
        atexit.register(self.end)

    def end(self) -> None:
        """Ends it."""
        self._socket.close()
        self._process.wait(10)

    def run(
        self, arguments: Sequence[str], input: bytes, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """What subprocess.run answers, with all output captured."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(input)
            stdin.seek(0)
            asked = {"arguments": [*arguments], "environment": dict(environment), "cwd": os.getcwd()}
            fds = [theirs.fileno(), stdin.fileno(), out.fileno(), err.fileno()]
            with theirs:
                socket.send_fds(self._socket, [json.dumps(asked).encode()], fds)
            pid = int(ours.recv(64))
            ours.settimeout(timeout)
            try:
                code = int(ours.recv(64))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired([*arguments], timeout) from None
            return subprocess.CompletedProcess([*arguments], code, _all_of(out), _all_of(err))


def _all_of(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _import_all() -> None:
    import mcpctl

    for found in pkgutil.walk_packages(mcpctl.__path__, "mcpctl."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def _serve(asked: socket.socket) -> None:
    _import_all()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits for a command
    while True:
        message, fds, _, _ = socket.recv_fds(asked, 1 << 20, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            _wait(json.loads(message), fds)
        for fd in fds:
            os.close(fd)


def _wait(asked: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run a command in a further process, and tell its pid and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answer, *standard = fds
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        _run(asked, standard)
    os.write(answer, str(pid).encode())
    os.write(answer, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _run(asked: dict[str, Any], standard: list[int]) -> NoReturn:
    from mcpctl.cli.main import run

    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.argv = ["mcpctl", *asked["arguments"]]
    code: Any = 1
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - the interpreter prints it, too
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
