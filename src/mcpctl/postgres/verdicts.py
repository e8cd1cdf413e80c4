"""What PostgreSQL said of a text before it ran, remembered so that a known question is one round trip."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic

from mcpctl.postgres.shape import Types

Key = bytes | tuple[str, bytes]
MOST = 4096
_SHORT = 1024
SECONDS = 5.0
"""How long a verdict is believed: a view may be replaced, a partition added, row security changed meanwhile."""
CHUNK = 16
"""Rows that libpq gathers of a text that did not run yet, or had large ones: each may be as large as an answer."""
SMALL_CHUNK = 256
"""The same of a text whose rows were small when it ran last; if they are not any more, libpq's growth bounds them."""
ALL = 0
"""All of them, of a text that had few rows, and small ones, when it ran last: one result instead of two."""
FEW = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """`question`: PostgreSQL would open a cursor for it (SELECT, VALUES, TABLE, and nothing else).

    `relations` are the tables in PostgreSQL's plan for it, and those that it has read beside when it ran first,
    schema-qualified; None where it made none. `seen`: it has been looked at what it reads beside. `leaves_nothing`:
    PostgreSQL finds nothing in it that is PARALLEL UNSAFE, which is what may change the
    session for good (CREATE FUNCTION in its manual). `chunk`: how many rows libpq gathers before we see them.
    """

    question: bool
    relations: tuple[str, ...] | None
    leaves_nothing: bool
    seen: bool = False
    chunk: int = CHUNK


@dataclass
class Verdicts:
    """The verdicts and the types of one database, bounded in number and age.

    Only questions are remembered: EXECUTE, CALL, FETCH and their like can change under the same text.
    """

    types: Types = field(default_factory=Types)
    _known: OrderedDict[Key, tuple[float, Verdict]] = field(default_factory=OrderedDict)

    def forget(self) -> None:
        """Forget all, types too: an OID says something only in the PostgreSQL that gave it."""
        self.types = Types()
        self._known.clear()

    def of(self, login: str, text: bytes) -> tuple[Key, Verdict | None]:
        """What stands for a text of that login role (the short ones themselves, of the others a digest), and what is
        remembered of it, unless it is too old."""
        key: Key = (login, text)
        if len(text) > _SHORT:
            key = hashlib.blake2b(text, digest_size=16, key=login.encode()[:64]).digest()
        found = self._known.get(key)
        return key, None if found is None or monotonic() - found[0] > SECONDS else found[1]

    def remember(self, key: Key, verdict: Verdict) -> None:
        """Keep it, and let go of the oldest beyond the bound."""
        if not verdict.question:
            return
        self._known[key] = (monotonic(), verdict)
        self._known.move_to_end(key)
        while len(self._known) > MOST:
            self._known.popitem(last=False)

    def amend(self, key: Key, known: Verdict, verdict: Verdict) -> None:
        """Know more of a text of which `known` is still what is known; it grows no younger by it."""
        found = self._known.get(key)
        if found is not None and found[1] is known:
            self._known[key] = (found[0], verdict)
