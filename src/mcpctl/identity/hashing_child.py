"""A process that checks passwords, one after the other: a line of JSON on stdin for each, a word on stdout.

It is started by hashing_apart.py, and ends when that closes its stdin, which the end of the server does, too.
"""

import base64
import json
import os
import signal
import sys

import argon2
from argon2.exceptions import Argon2Error, VerifyMismatchError

RIGHT, WRONG = b"right\n", b"wrong\n"


def main() -> None:
    """Answer until stdin ends; with the niceness that the first word says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the server, which ends us
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[1]))
    hasher = argon2.PasswordHasher()  # a hash says itself what it was made with
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        sys.stdout.buffer.write(answer(hasher, asked["hash"], base64.b64decode(asked["password"])))
        sys.stdout.buffer.flush()


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
