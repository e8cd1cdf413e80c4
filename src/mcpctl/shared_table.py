"""A table of words in memory that all workers of a server share, and that outlives each of them."""

import contextlib
import json
import mmap
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from struct import Struct
from typing import Any

_ROOM = 4 << 20
"""Bytes of JSON that it may be: 100 000 tokens. What is never written takes no memory."""
_EDITION = Struct("Q")
"""Which edition is in force, and above its 32 bits how long that is: one write, which nobody is killed within."""


class Table:
    """{name: words}. Made before the workers are forked. `held`: what one of them holds while it changes something.

    A change is written beside the edition that is in force, and then put into its place: one that was killed meanwhile
    has changed nothing.
    """

    def __init__(self, held: AbstractContextManager[None] | None = None) -> None:
        self._held = held or contextlib.nullcontext()
        self._map = mmap.mmap(-1, _EDITION.size + 2 * _ROOM)
        self._edition = 0
        self._words: Mapping[str, Any] = {}

    def read(self) -> Mapping[str, Any]:
        """What it says now. ValueError where it cannot be believed."""
        (now,) = _EDITION.unpack_from(self._map)
        if now != self._edition:
            with self._held:
                self._load()
        return self._words

    def change(self, more: Mapping[str, Any], less: Iterable[str] = ()) -> None:
        """Add these words, and take out those of these names. ValueError where there is no room."""
        with self._held:
            self._load()
            gone = set(less)
            words = {name: said for name, said in {**self._words, **more}.items() if name not in gone}
            data = json.dumps(words).encode()
            if words == self._words:
                return
            if len(data) > _ROOM:
                raise ValueError("no room")
            number = (self._edition + 1) & 0xFFFFFFFF
            at = _place(number)
            self._map[at : at + len(data)] = data
            _EDITION.pack_into(self._map, 0, len(data) << 32 | number)

    def _load(self) -> None:
        (now,) = _EDITION.unpack_from(self._map)
        if now != self._edition:
            at = _place(now)
            self._words = json.loads(self._map[at : at + (now >> 32)])
            self._edition = now


def _place(edition: int) -> int:
    return _EDITION.size + edition % 2 * _ROOM
