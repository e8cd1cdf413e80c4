"""A shell for the commands of a page: what a reader types, line by line, in one bash, against a real site.

mcpctl is a small program on the shell's PATH that has the command forked by this process (commands.py), so that pipes,
redirections and variables are the shell's own. `sudo` is left out, and systemctl starts and stops the server itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import commands
import kept
from site_of_mcpctl import environment, starter

SECONDS = 120
_CLIENT = """#!{python} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
    door.connect({door!r})
    asked = [os.path.basename(sys.argv[0]), *sys.argv[1:]], os.getcwd(), dict(os.environ)
    socket.send_fds(door, [json.dumps(asked).encode()], [0, 1, 2])
    code = int(door.recv(64))
sys.exit(code)
"""
_BEGIN = (
    "set -eE -o pipefail; trap 'echo \"line $LINENO: $BASH_COMMAND: exit $?\" >&2' ERR;"
    ' sudo() { if [ "$1" = -u ]; then shift 2; fi; "$@"; };'
    ' expect() { local code=$1 got=0; shift; "$@" || got=$?; [ "$got" = "$code" ]; };'
)
_EXITS = re.compile(r"^(?P<command>.*\S)\s+# exits (?P<code>\d+)$")


def script(page: str) -> str:
    """The blocks of a page that are marked as `sh`, each line where it is in the page; all else is empty. A line that
    ends with `# exits N` must do so, every other one exits 0. What would go on without end (`tail -f`) does not."""
    lines, within = [], ""
    for line in page.splitlines():
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            within = "" if within else fence[1] or "text"
        elif within == "sh":
            line = line.strip().replace("audit tail -f", "audit tail -n 1")
            ends = _EXITS.match(line)
            lines.append(f"expect {ends['code']} {ends['command'].removeprefix('sudo ')}" if ends else line)
            continue
        lines.append("")
    return "\n".join(lines) + "\n"


class Shell:
    """`there` is the folder that the shell is in, and its home; `env` what it has beside this process's own."""

    def __init__(self, there: Path, env: Mapping[str, str]) -> None:
        self.there = there
        self._short = Path(tempfile.mkdtemp(prefix="mcpctl-page-"))  # a socket's path is 107 bytes at most
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(str(self._short / "door"))
        self._door.listen()
        for name in ("mcpctl", "systemctl", "age-keygen"):
            program = self._short / name
            program.write_text(_CLIENT.format(python=sys.executable, door=str(self._short / "door")))
            program.chmod(0o755)
        path = f"{self._short}:{environment()['PATH']}"
        self.env = environment(**{"HOME": str(there), "PATH": path, "NO_COLOR": "1", **env})
        self._server: commands.Started | None = None
        self._reader = threading.Thread()
        self.told = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self, page: str) -> str:
        """Run a page's commands; returns what they have said. AssertionError with its end where one fails."""
        done = subprocess.run(
            ["bash", "-c", _BEGIN + script(page)], cwd=self.there, env=self.env, timeout=SECONDS, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def close(self) -> None:
        """End the server, and take what made the shell away."""
        self._stop()
        self._door.close()
        shutil.rmtree(self._short)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._answer, args=self._door.accept()[:1], daemon=True).start()

    def _answer(self, asked: socket.socket) -> None:
        with asked:
            message, fds, _, _ = socket.recv_fds(asked, 1 << 20, 3)
            (name, *arguments), there, env = json.loads(message)
            code = 1
            try:
                code = self._do(name, arguments, there, env, fds)
            finally:
                for fd in fds:
                    os.close(fd)
                with contextlib.suppress(OSError):
                    asked.send(str(code).encode())

    def _do(self, name: str, arguments: list[str], there: str, env: dict[str, str], fds: list[int]) -> int:
        if name == "age-keygen":
            kept.identity(Path(there))
            return 0
        if name == "systemctl":
            if {"stop", "restart"} & {*arguments}:
                self._stop()
            return self._serve([], env, fds) if {"start", "restart", "--now"} & {*arguments} else 0
        if "serve" in arguments:
            return self._serve([one for one in arguments if one != "serve"], env, fds)
        return starter().started(arguments, env, there, *fds).wait(60)

    def _serve(self, arguments: list[str], env: dict[str, str], fds: list[int]) -> int:
        """Start the server; it is left alone when it serves."""
        self._server = starter().start(["serve", *arguments], env)
        told = self._server.stderr
        assert told is not None
        for line in told:
            os.write(fds[2], line.encode())
            self.told += line
            if line.startswith("serving at "):
                self._reader = threading.Thread(target=self._read, args=(told,), daemon=True)
                self._reader.start()
                return 0
        told.close()
        return 1

    def _read(self, told: IO[str]) -> None:
        for line in told:
            self.told += line

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(20)
            self._reader.join(10)
            assert self._server.stderr is not None
            self._server.stderr.close()
            self._server = None


@contextlib.contextmanager
def shell(there: Path, env: Mapping[str, str]) -> Iterator[Shell]:
    """A shell that is taken away afterwards."""
    found = Shell(there, env)
    try:
        yield found
    finally:
        found.close()


def replaced(page: str, words: Mapping[str, Any]) -> str:
    """A page with our own places in it. Each word has to be there: else the page no longer says what is meant."""
    for word, ours in words.items():
        assert word in page, word
        page = page.replace(word, str(ours))
    return page
