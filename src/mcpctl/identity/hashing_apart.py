"""Argon2id in a process of its own: what a server checks passwords with.

In the server's own process a hash would hold its calls up, on whatever thread it runs:

- How large an answer of PostgreSQL becomes is seen by the process's virtual size (postgres/wire.py). 64 MiB that
  another thread maps meanwhile look like an answer that is far too large, and the call that runs is lost.
- A thread of low priority that wants Python's lock is handed it, and everybody waits until the system lets that thread
  run (CPython, Python/ceval_gil.h, FORCE_SWITCHING). Where calls keep all processors busy that is the longer, the lower
  its priority is.

A process of the lowest priority takes what processor time is left over, and its memory goes back to the system.
"""

import base64
import json
import secrets
import subprocess
import sys
import threading
from typing import Any

import argon2
from argon2.exceptions import VerificationError, VerifyMismatchError

from mcpctl.identity import hashing_child

NICENESS = 19
"""The lowest priority that there is (setpriority(2))."""
_PATIENCE = 5.0
"""Seconds that the process has to end, which takes one hash at most."""


class HashingApart(argon2.PasswordHasher):
    """Has hashes checked by a process, which is started with the first one, and again when it has died. `like` is the
    profile of those that are made. For one thread at a time."""

    def __init__(self, like: argon2.PasswordHasher, niceness: int = NICENESS) -> None:
        super().__init__(like.time_cost, like.memory_cost, like.parallelism, like.hash_len, like.salt_len)
        self._niceness = niceness
        self._one = threading.Lock()
        self._over = False
        self.child: subprocess.Popen[bytes] | None = None

    def nobodys(self) -> str:
        """A hash of the profile that no password fits. To make it costs no hash."""
        salt, tag = secrets.token_bytes(self.salt_len), secrets.token_bytes(self.hash_len)
        costs = f"m={self.memory_cost},t={self.time_cost},p={self.parallelism}"
        return f"$argon2id$v=19${costs}${_encoded(salt)}${_encoded(tag)}"

    def verify(self, hash: str | bytes, password: str | bytes) -> Any:
        """True; VerifyMismatchError where the password does not fit, VerificationError where nobody can say."""
        secret = password.encode() if isinstance(password, str) else password
        stored = hash.decode("ascii") if isinstance(hash, bytes) else hash
        line = json.dumps({"hash": stored, "password": base64.b64encode(secret).decode("ascii")})
        with self._one:
            found = self._ask(line.encode("ascii") + b"\n")
        if found == hashing_child.RIGHT:
            return True
        if found == hashing_child.WRONG:
            raise VerifyMismatchError("the password does not fit")
        raise VerificationError(found.decode("utf-8", "replace").strip())

    def _ask(self, line: bytes) -> bytes:
        child = self._running()
        if child.stdin is None or child.stdout is None:
            raise TypeError("a process without pipes")
        try:
            child.stdin.write(line)
            child.stdin.flush()
            found = child.stdout.readline()
        except OSError:
            found = b""
        if not found.endswith(b"\n"):
            self._end(child)
            self.child = None
            raise VerificationError("the process that checks passwords has ended")
        return found

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._over:
            raise VerificationError("the server stops")
        if self.child is None:
            try:
                self.child = subprocess.Popen(  # -P: no code from the folder that the server was started in
                    [sys.executable, "-P", "-m", hashing_child.__name__, str(self._niceness)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            except OSError as problem:
                raise VerificationError(f"no process can be started for it: {problem.strerror}") from None
        return self.child

    def close(self) -> None:
        """End the process. Who still waits is told that nobody can say."""
        self._over = True
        if (child := self.child) is not None:
            child.kill()
        with self._one:  # whoever waits for an answer has seen the end of it
            if self.child is not None:
                self._end(self.child)
                self.child = None

    @staticmethod
    def _end(child: "subprocess.Popen[bytes]") -> None:
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent is not
                    continue
        child.wait(_PATIENCE)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")
