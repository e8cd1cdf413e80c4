"""The table that workers share: whole after any death, and never larger than its room."""

from __future__ import annotations

import os

import pytest

from mcpctl import shared_table
from mcpctl.shared_table import Table


def test_what_one_worker_has_written_outlives_it_and_what_it_was_killed_within_changes_nothing() -> None:
    table = Table()
    table.change({"a": "first"})
    child = os.fork()
    if not child:
        table.change({"b": ["at", "why"]}, less=["a"])
        at = shared_table._place(table._edition)
        table._map[at : at + 7] = b"{ torn "
        os._exit(0)
    os.waitpid(child, 0)
    assert table.read() == {"b": ["at", "why"]}
    assert table.read() is table.read()
    table.change({"a": "again"})
    assert table.read() == {"b": ["at", "why"], "a": "again"}


def test_without_room_it_says_what_it_said() -> None:
    table = Table()
    table.change({"a": "first"})
    with pytest.raises(ValueError, match="no room"):
        table.change({"b": "x" * shared_table._ROOM})
    table.change({"a": "first"})
    assert table.read() == {"a": "first"}
