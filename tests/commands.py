"""mcpctl's commands and servers, each in a process of its own that is forked from one which has imported everything
already: an import takes most of the time of a command and of a server's start, and thousands are run. `python -m
mcpctl` itself is run by the tests of the command line (test_cli and others), of stdio, of the demo, and by the servers
that are started `anew`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
        self,
        arguments: Sequence[str],
        input: bytes,
        environment: Mapping[str, str],
        timeout: float,
        cwd: str | os.PathLike[str] = "",
    ) -> subprocess.CompletedProcess[bytes]:
        """What subprocess.run answers, with all output captured."""
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(input)
            stdin.seek(0)
            started = self._started(arguments, environment, cwd or os.getcwd(), stdin, out, err)
            try:
                code = started.wait(timeout)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
                raise
            return subprocess.CompletedProcess([*arguments], code, _all_of(out), _all_of(err))

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Started:
        """What subprocess.Popen starts, without input, with our stdout and with a pipe of text as its stderr."""
        reading, writing = os.pipe()
        with open(os.devnull, "rb") as stdin, os.fdopen(writing, "wb") as err:
            started = self._started(arguments, environment, os.getcwd(), stdin, 1, err)
        started.stderr = os.fdopen(reading, encoding="utf-8")
        return started

    def _started(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        cwd: str | os.PathLike[str],
        *standard: IO[bytes] | int,
    ) -> Started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked = {"arguments": [*arguments], "environment": dict(environment), "cwd": os.fspath(cwd)}
        fds = [one if isinstance(one, int) else one.fileno() for one in standard]
        with theirs:
            socket.send_fds(self._socket, [json.dumps(asked).encode()], [theirs.fileno(), *fds])
        return Started([*arguments], ours)


class Started:
    """A command that runs: of subprocess.Popen what the tests use."""

    def __init__(self, arguments: list[str], told: socket.socket) -> None:
        self.args = arguments
        self.stderr: IO[str] | None = None
        self.returncode: int | None = None
        self._told = told
        self._lock = threading.Lock()
        self.pid = int(told.recv(64))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or a signal's number as a negative one."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._told], [], [], timeout)[0]:
                    assert timeout is not None
                    raise subprocess.TimeoutExpired(self.args, timeout)
                with self._told:
                    self.returncode = int(self._told.recv(64))
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
