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


@dataclass(frozen=True, slots=True)
class Verdict:
    """`question`: PostgreSQL would open a cursor for it (SELECT, VALUES, TABLE, and nothing else).

    `relations` are the tables in PostgreSQL's plan for it, and those that it has read beside when it ran first,
    schema-qualified; None where it made none. `seen`: it has been looked at what it reads beside. `leaves_nothing`:
    PostgreSQL finds nothing in it that is PARALLEL UNSAFE, which is what may change the
    session for good (CREATE FUNCTION in its manual). `small`: its rows were small when it ran last.
    """

    question: bool
    relations: tuple[str, ...] | None
    leaves_nothing: bool
    seen: bool = False
    small: bool = False


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

    @staticmethod
    def key(login: str, text: bytes) -> Key:
        """What stands for a text of that login role: the short ones themselves, of the others a digest."""
        if len(text) <= _SHORT:
            return login, text
        return hashlib.blake2b(text, digest_size=16, key=login.encode()[:64]).digest()

    def get(self, key: Key) -> Verdict | None:
        """What is remembered, unless it is too old."""
        found = self._known.get(key)
        if found is None or monotonic() - found[0] > SECONDS:
            return None
        return found[1]

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
