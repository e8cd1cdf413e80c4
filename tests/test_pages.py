"""The pages of the documentation say of roles and tools what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcpctl.config_keys import Auth, Pool, Settings
from mcpctl.identity.grants import ACCESSES
from mcpctl.identity.principal import Principal
from mcpctl.policy.access import Access
from mcpctl.policy.roles import BUILT_IN
from mcpctl.tools.table import TOOLS

DOCS = Path(__file__).parent.parent / "docs"
LISTED = "`read_only_users` at most"
"""The column for whoever stands on that list, and has every role."""
READING = {"yes": True, "no": False}


def table() -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of roles in docs/users-and-grants.md."""
    text = (DOCS / "users-and-grants.md").read_text(encoding="utf-8").partition("\n## Roles\n")[2]
    found = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert found
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    return lines[0], lines[2:]


def expected() -> Iterator[tuple[str, str, str]]:
    """(tool, permission, right on the database) of each row that there must be."""
    for name, tool in TOOLS.items():
        yield f"`{name}`", f"`{tool.permission}`", f"`{tool.access}`" if tool.ask is not None else "none"
    for right in ACCESSES:
        yield "any", f"`databases:NAME:{right}`", ""


def test_the_table_of_roles_has_a_row_for_each_tool_and_right_and_a_column_for_each_role() -> None:
    head, rows = table()
    assert sorted(head[3:]) == sorted([*BUILT_IN, LISTED])
    assert [tuple(row[:3]) for row in rows] == list(expected())


@pytest.mark.parametrize("role", [*BUILT_IN, LISTED])
def test_the_table_of_roles_says_what_a_role_gives(role: str) -> None:
    head, rows = table()
    listed = role == LISTED
    access = Access(Auth(read_only_users=("somebody",) if listed else ()))
    who = Principal("1", "somebody", "", roles=tuple(BUILT_IN) if listed else (role,))
    for row in rows:
        permission = row[1].strip("`").replace("NAME", "sales")
        assert READING[row[head.index(role)]] == access.may(who, permission).allowed, row[:2]


def test_the_pages_name_the_built_in_limits_that_the_code_has() -> None:
    text = " ".join((DOCS / "users-and-grants.md").read_text(encoding="utf-8").split())
    assert f"`pool.max_per_user` connections ({Pool().max_per_user})" in text
    limits = Settings().limits
    assert f"{limits.max_rows} rows, {limits.max_bytes} bytes and {limits.statement_timeout:g} s a call" in text
