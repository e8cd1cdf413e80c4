"""The pages of the documentation say of roles and tools what the code does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcpctl.cli import client_config
from mcpctl.config_keys import Auth, Pool, Settings
from mcpctl.identity.grants import ACCESSES
from mcpctl.identity.principal import Principal
from mcpctl.policy.access import Access
from mcpctl.policy.roles import BUILT_IN
from mcpctl.tools.table import TOOLS
from test_reference import ROOT, blocks

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


# -- clients ---------------------------------------------------------------------------------------------------------

URL = "https://mcp.example.org/mcp"


@pytest.mark.parametrize("client", [name for name in client_config.CLIENTS if name != "curl"])
def test_the_page_on_clients_has_for_each_what_client_config_prints(client: str) -> None:
    _, make = client_config.CLIENTS[client]
    assert f"\n{make('mcpctl', URL)}\n```\n" in (DOCS / "clients.md").read_text(encoding="utf-8")


def test_the_page_on_clients_has_the_bridge_as_client_config_prints_it_but_with_an_absolute_path() -> None:
    printed = client_config.bridged("mcpctl", URL).replace(
        '"mcpctl", "args"', '"/home/alice/mcpctl/bin/mcpctl", "args"'
    )
    assert f"\n{printed}\n```\n" in (DOCS / "clients.md").read_text(encoding="utf-8")


# -- threats ---------------------------------------------------------------------------------------------------------

TESTS = Path(__file__).parent


def threats(text: str) -> list[list[str]]:
    """The rows of the table of threats: threat, wall, tests."""
    lines = text.partition("\n## Threats, walls and tests\n")[2].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def untested(rows: list[list[str]]) -> list[str]:
    """What is wrong with such rows: no threat, wall or test, or a test that there is not."""
    found = []
    for row in rows:
        named = re.findall(r"`([^`]+)::([^`]+)`", row[2]) if len(row) == 3 and all(row) else []
        if not named or row[2] != ", ".join(f"`{file}::{test}`" for file, test in named):
            found.append(f"not a threat, a wall and tests: {row}")
        found += [f"{file}::{test} is not there" for file, test in named if test not in _tests(file)]
    return found


def _tests(file: str) -> set[str]:
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {item.name for item in tree.body if isinstance(item, kinds) and item.name.startswith("test_")}


def test_every_threat_of_the_table_has_a_wall_and_a_test_that_is_there() -> None:
    rows = threats((DOCS / "security.md").read_text(encoding="utf-8"))
    assert len(rows) >= 30
    assert untested(rows) == []


def named(text: str) -> list[tuple[str, str]]:
    """Each test that a text names: its file, and its name, which is empty where the file alone is named."""
    return re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_each_test_that_a_page_names_is_there(page: Path) -> None:
    for file, test in named(page.read_text(encoding="utf-8")):
        assert (TESTS / file).is_file(), file
        assert not test or test in _tests(file), f"{file}::{test}"


def test_each_must_of_mcps_authorization_names_a_test() -> None:
    lines = (DOCS / "oauth.md").read_text(encoding="utf-8").partition("| MUST | test |\n|---|---|\n")[2].splitlines()
    assert len(lines) >= 15
    for line in lines:
        cell = line.strip("|").split("|")[1].strip()
        assert cell == ", ".join(f"`{file}::{test}`" for file, test in named(cell) if test), line


@pytest.mark.parametrize(
    "row",
    [
        "| a | b | `test_pages.py::test_that_is_not_there` |",
        "| a | b | `test_no_file.py::test_a` |",
        "| a | b | `test_pages.py::threats` |",
        "| a | b |  |",
        "| a | b | test_pages.py |",
        "| a |  | `test_pages.py::test_every_threat_of_the_table_has_a_wall_and_a_test_that_is_there` |",
    ],
)
def test_a_row_without_a_test_that_is_there_is_seen(row: str) -> None:
    table = f"\n## Threats, walls and tests\n\n| threat | what stands against it | test |\n|---|---|---|\n{row}\n"
    assert untested(threats(table))


def test_the_readme_begins_with_make_targets_that_there_are() -> None:
    first = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "sh")[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert first.splitlines() == ["make demo", "make test"]
    for line in first.splitlines():
        assert re.search(rf"^{line.split()[1]}\b.*:", makefile, flags=re.MULTILINE), line
