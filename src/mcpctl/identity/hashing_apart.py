"""Argon2id in a process of its own: what a server checks passwords with.

In the server's own process a hash would hold its calls up, on whatever thread it runs:

- How large an answer of PostgreSQL becomes is seen by the process's virtual size (postgres/wire.py). 64 MiB that
  another thread maps meanwhile look like an answer that is far too large, and the call that runs is lost.
- A thread of low priority that wants Python's lock is handed it, and everybody waits until the system lets that thread
  run (CPython, Python/ceval_gil.h, FORCE_SWITCHING). Where calls keep all processors busy that is the longer, the lower
  its priority is.

A process beside it takes what processor time is left over, and its memory goes back to the system. On a machine that
has none left over it would never answer. So what it has not answered within a second is asked of another one, which has
the lowest priority, and always a little time; as long as the first one owes an answer, the other one is asked at once.
"""

import base64
import json
import secrets
import select
import subprocess
import sys
import threading
from typing import Any

import argon2
from argon2.exceptions import VerificationError, VerifyMismatchError

from mcpctl.identity import hashing_child
from mcpctl.identity.hashing_child import Share

_PATIENCE = 5.0
"""Seconds that a process has to end, which takes one hash at most."""
_TURN = 1.0
"""Seconds that idle time alone has for a hash, which takes a third of that where nothing else is done."""


class Child:
    """A process that takes one share of the time. It is started with the first hash, and again when it has died."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.owes = False
        """Whether it was asked something that it has not answered."""
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> None:
        """Raises VerificationError where it has ended, or cannot be started."""
        pipe = self._running().stdin
        if pipe is None:
            raise TypeError("a process without a pipe")
        try:
            pipe.write(line)
            pipe.flush()
        except OSError:
            raise self._ended() from None
        self.owes = True

    def answer(self, patience: float | None = None) -> bytes | None:
        """What it says, or None where it has said nothing within so many seconds."""
        pipe = self._running().stdout
        if pipe is None:
            raise TypeError("a process without a pipe")
        if patience is not None and not _readable(pipe.fileno(), patience):
            return None
        found = pipe.readline()
        if not found.endswith(b"\n"):
            raise self._ended()
        self.owes = False
        return found

    def free(self) -> bool:
        """Whether it owes nothing; what it says too late is no answer to anything any more. One that has died owing it
        is started again."""
        try:
            return not self.owes or self.answer(patience=0) is not None
        except VerificationError:
            return True

    def kill(self) -> None:
        """End it, from any thread; who reads from it sees the end."""
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> None:
        """End it, and close the pipes to it."""
        process, self.process, self.owes = self.process, None, False
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent is not
                    continue
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it dies as soon as the machine has time for that
            return

    def _running(self) -> "subprocess.Popen[bytes]":
        if self.process is None:
            try:
                self.process = subprocess.Popen(  # -P: no code from the folder that the server was started in
                    [sys.executable, "-P", "-m", hashing_child.__name__, self.share],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            except OSError as problem:
                raise VerificationError(f"no process can be started for it: {problem.strerror}") from None
        return self.process

    def _ended(self) -> VerificationError:
        self.end()
        return VerificationError("the process that checks passwords has ended")


class HashingApart(argon2.PasswordHasher):
    """Has hashes checked by processes. `like` is the profile of those that are made; `shares`, which time they take:
    the first one's, and if that does not come within `turn` seconds, the next one's. For one thread at a time."""

    def __init__(
        self,
        like: argon2.PasswordHasher,
        shares: tuple[Share, ...] = (Share.IDLE, Share.LOW) if sys.platform == "linux" else (Share.LOW,),
        turn: float = _TURN,
    ) -> None:
        super().__init__(like.time_cost, like.memory_cost, like.parallelism, like.hash_len, like.salt_len)
        self.children = [Child(share) for share in shares]
        self._turn = turn
        self._one = threading.Lock()
        self._over = False

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
        *before, last = self.children
        for child in before:
            if child.free() and (found := self._answer(child, line, self._turn)) is not None:
                return found
        found = self._answer(last, line, None)
        if found is None:
            raise TypeError("an answer that was waited for without end")
        return found

    def _answer(self, child: Child, line: bytes, patience: float | None) -> bytes | None:
        if self._over:
            raise VerificationError("the server stops")
        child.ask(line)
        return child.answer(patience)

    def close(self) -> None:
        """End the processes. Who still waits is told that nobody can say."""
        self._over = True
        for child in self.children:
            child.kill()
        with self._one:  # whoever waits for an answer has seen the end of it
            for child in self.children:
                child.end()


def _readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, or an end, within so many seconds. Not by select(2), which knows no
    descriptor beyond 1,023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")
