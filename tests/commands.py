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
        user: tuple[int, int] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """What subprocess.run answers, with all output captured. `user`: whose uid and gid it has, without groups."""
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(input)
            stdin.seek(0)
            started = self.started(arguments, environment, cwd or os.getcwd(), stdin, out, err, user=user)
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
            started = self.started(arguments, environment, os.getcwd(), stdin, 1, err)
        started.stderr = os.fdopen(reading, encoding="utf-8")
        return started

    def talk(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Started:
        """What subprocess.Popen starts with pipes of bytes as its stdin, stdout and stderr."""
        (stdin, ours), (out_of, stdout), (err_of, stderr) = (os.pipe() for _ in range(3))
        try:
            started = self.started(arguments, environment, os.getcwd(), stdin, stdout, stderr)
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
        started.stdin = os.fdopen(ours, "wb")
        started.stdout, started.errors = os.fdopen(out_of, "rb"), os.fdopen(err_of, "rb")
        return started

    def started(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        cwd: str | os.PathLike[str],
        *standard: IO[bytes] | int,
        user: tuple[int, int] | None = None,
    ) -> Started:
        """A command with these as its stdin, stdout and stderr."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked = {"arguments": [*arguments], "environment": dict(environment), "cwd": os.fspath(cwd), "user": user}
        fds = [one if isinstance(one, int) else one.fileno() for one in standard]
        with theirs:
            socket.send_fds(self._socket, [json.dumps(asked).encode()], [theirs.fileno(), *fds])
        return Started([*arguments], ours)


class Started:
    """A command that runs: of subprocess.Popen what the tests use."""

    def __init__(self, arguments: list[str], told: socket.socket) -> None:
        self.args = arguments
        self.stderr: IO[str] | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.errors: IO[bytes] | None = None
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
    from mcpctl.cli.common import _LAZY

    for name in _LAZY:
        importlib.import_module(name)


def _serve(asked: socket.socket) -> None:
    """Start what is asked for, and tell of each its pid and then its exit code."""
    _import_all()
    gc.freeze()
    ended, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([asked, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _tell_of_the_ended(running)
        if asked in ready:
            message, fds, _, _ = socket.recv_fds(asked, 1 << 20, 4)
            if not message:
                return
            answer, *standard = fds
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                asked.close()
                for fd in (ended, noted, answer, *running.values()):
                    os.close(fd)
                _run(json.loads(message), standard)
            running[pid] = answer
            _tell(answer, pid)
            for fd in standard:
                os.close(fd)


def _tell_of_the_ended(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        answer = running.pop(pid)
        _tell(answer, os.waitstatus_to_exitcode(status))
        os.close(answer)


def _tell(answer: int, number: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked has gone
        os.write(answer, str(number).encode())


def _run(asked: dict[str, Any], standard: list[int]) -> NoReturn:
    from mcpctl.cli.main import run

    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = os.fdopen(0, closefd=False)  # what the interpreter has made of others knows what they can
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    if asked["user"]:
        os.setgroups([])
        os.setgid(asked["user"][1])
        os.setuid(asked["user"][0])
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
