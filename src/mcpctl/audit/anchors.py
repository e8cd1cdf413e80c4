"""Anchors: short lines, kept elsewhere, that say where the log ended at a time.

A tail that was cut off leaves no trace in the log itself. So the server says every few seconds where the chain ends: on
stderr, which under systemd is the journal, and in `audit.anchor_file`. `verify` holds the log against them. An anchor
carries an HMAC under the audit key, so that whoever lacks it can only withhold one.
"""

import hmac
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic

from mcpctl import private_file
from mcpctl.audit.log import AuditLog, key_id, stamp
from mcpctl.errors import Error

log = logging.getLogger("mcpctl.audit")
EVERY = 10.0
"""Seconds between two anchors of one process, at least."""
MOST = 100_000
"""Anchors of another key that are counted; of this key's all are kept, since a log that was cut back and written on is
shown by the old ones alone."""
_DOMAIN = b"mcpctl audit anchor\0"  # no chain hash and no statement's HMAC is of a text that begins so
_FORM = re.compile(
    rb"mcpctl audit anchor seq=([0-9]{1,18}) hash=([0-9a-f]{64}) time=([0-9TZ:.+-]{1,40}) key_id=([0-9a-f]{8})"
    rb" hmac=([0-9a-f]{64})"
)
_LONGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Anchor:
    """The line `seq` had this `hash` (hex) at that time (None: now); `source` is who says so."""

    seq: int
    hash: bytes
    time: str | None
    source: str

    def __str__(self) -> str:
        return f"{self.source} ({self.time})" if self.time else self.source


def text(key: bytes, seq: int, digest: str, when: str) -> str:
    """An anchor as one line, without its end."""
    proof = _proof(key, f"{seq} {digest} {when}".encode("ascii"))
    return f"mcpctl audit anchor seq={seq} hash={digest} time={when} key_id={key_id(key)} hmac={proof}"


def _proof(key: bytes, said: bytes) -> str:
    return hmac.digest(key, _DOMAIN + said, "sha256").hex()


@dataclass(frozen=True, slots=True)
class Strange:
    """Something that looks like an anchor and was not written with this key; `line` is its number in `source`."""

    source: str
    line: int
    seq: int
    key_id: str


def read(
    key: bytes, lines: Iterable[bytes], source: str, ignored: Collection[str] = ()
) -> tuple[list[Anchor], list[Strange]]:
    """The anchors in any text, such as a journal's, each once; and those of another key, but the `ignored` key_ids,
    or forged."""
    found: dict[bytes, Anchor] = {}
    strange: list[Strange] = []
    ours, said_by = key_id(key), f"an anchor in {source}"
    for number, line in enumerate(lines, 1):
        for seq, digest, when, whose, proof in _FORM.findall(line):
            if not hmac.compare_digest(_proof(key, b"%s %s %s" % (seq, digest, when)).encode("ascii"), proof):
                named = whose.decode("ascii")
                if (named == ours or named not in ignored) and len(strange) < MOST:
                    strange.append(Strange(source, number, int(seq), named))
                continue
            if digest not in found:
                found[digest] = Anchor(int(seq), digest, when.decode("ascii"), said_by)
    return list(found.values()), strange


def read_file(key: bytes, path: Path, ignored: Collection[str] = ()) -> tuple[list[Anchor], list[Strange]]:
    """The anchors in `audit.anchor_file`."""
    with os.fdopen(private_file.open_checked(path, os.O_RDONLY), "rb") as file:
        return read(key, iter(lambda: file.readline(_LONGEST), b""), path.name, ignored)


class Anchors:
    """Writes one process's anchors: of what it has itself written last."""

    def __init__(
        self,
        audit: AuditLog,
        path: Path | None,
        now: Callable[[], datetime],
        clock: Callable[[], float] = monotonic,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        self._audit = audit
        self._path = path
        self._now = now
        self._clock = clock
        self._say = say or _to_stderr
        self._written = (0, 0)
        self._at = clock()
        self._failing = False

    @property
    def due(self) -> bool:
        """Whether there is something new to say, and the last was a while ago or about a file that was moved away."""
        end = self._audit.written
        if end is None or end.seq == self._written[0]:
            return False
        return self._clock() - self._at >= EVERY or end.inode != self._written[1]

    def write(self) -> None:
        """Write one now, if there is something new to say. It may wait for a disk, and so is for a thread. What fails
        is a warning."""
        end = self._audit.written
        if end is None or end.seq == self._written[0]:
            return
        self._written, self._at = (end.seq, end.inode), self._clock()
        line = text(self._audit.key, end.seq, end.hash, stamp(self._now()))
        self._say(line)
        if self._path is not None:
            self._keep(self._path, line)

    def _keep(self, path: Path, line: str) -> None:
        try:
            fd = private_file.open_checked(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(fd, line.encode("ascii") + b"\n")
            finally:
                os.close(fd)
        except (Error, OSError) as problem:
            if not self._failing:
                log.warning("audit.anchor_file: %s", getattr(problem, "message", problem))
            self._failing = True
            return
        self._failing = False


def _to_stderr(line: str) -> None:
    """Whatever the level of the log is. Not to a terminal, which keeps nothing."""
    try:
        if sys.stderr is not None and not sys.stderr.isatty():
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
    except (OSError, ValueError):  # whoever kept it is gone, and so is every other way to tell
        return
