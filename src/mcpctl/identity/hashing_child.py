"""A process that checks passwords, one after the other: a line of JSON on stdin for each, a word on stdout.

It is started by hashing_apart.py, and ends when that closes its stdin, which the end of the server does, too.
"""

import base64
import enum
import json
import os
import signal
import sys

import argon2
from argon2.exceptions import Argon2Error, VerifyMismatchError

RIGHT, WRONG = b"right\n", b"wrong\n"
NICENESS = 19
"""The lowest priority that there is (setpriority(2))."""


class Share(enum.StrEnum):
    """Which processor time it takes."""

    IDLE = "idle"
    """What one processor has left that nobody else wants (SCHED_IDLE, sched(7)). Argon2's four threads would be on all
    of them, and take a third of the pace of a caller who is served there, low as their priority is."""
    LOW = "low"
    """That of the lowest priority, on all processors: little where they are busy, but never none."""
    EQUAL = "equal"
    """What everybody takes."""


def main() -> None:
    """Answer until stdin ends, with the share that the first word says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the server, which ends us
    take(Share(sys.argv[1]))
    hasher = argon2.PasswordHasher()  # a hash says itself what it was made with
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        sys.stdout.buffer.write(answer(hasher, asked["hash"], base64.b64decode(asked["password"])))
        sys.stdout.buffer.flush()


def take(share: Share) -> None:
    """Take no more than that. A process that once has idle time alone cannot have more again, unless it is root's."""
    if share is not Share.EQUAL and hasattr(os, "nice"):
        os.nice(NICENESS)
    if share is Share.IDLE and sys.platform == "linux":
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {mine[os.getpid() % len(mine)]})  # those of several workers, each on its own
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def answer(hasher: argon2.PasswordHasher, stored: str, password: bytes) -> bytes:
    """Whether the password fits, or why nobody can say."""
    try:
        hasher.verify(stored, password)
    except VerifyMismatchError:
        return WRONG
    except (Argon2Error, MemoryError) as problem:
        return (" ".join(str(problem).split()) or type(problem).__name__).encode() + b"\n"
    return RIGHT


if __name__ == "__main__":
    main()
