"""The command tree: what a command imports, and what a word on the command line becomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperOption

from command_line import Home
from mcpctl.cli import tree
from mcpctl.cli.main import app
from site_of_mcpctl import environment

HEAVY = ("mcp", "starlette", "uvicorn", "pydantic", "rich", "psycopg", "cryptography", "ssl", "asyncio", "msgspec")
WORK = """
import sys
from mcpctl.cli import main
main._run(sys.argv[2:])
print([name for name in sys.argv[1].split() if name in sys.modules], file=sys.stderr)
print([name for name in sys.modules if name.startswith("mcpctl.cli.")], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("--help", []),
        ("--version", []),
        ("token --help", []),
        ("token list", []),
        ("token show 1234abcd", []),
        ("token revoke 1234abcd", []),
        ("user list", []),
        ("status", []),
        ("top", []),
        ("session list", []),
        ("lockdown", []),
        ("audit tail", ["msgspec"]),
        ("key rotate", ["cryptography"]),
    ],
)
def test_a_command_imports_only_what_it_needs(tmp_path: Path, words: str, needs: list[str]) -> None:
    home = Home(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", WORK, " ".join(HEAVY), "--config", str(home.config), *words.split()],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    heavy, ours = done.stderr.splitlines()[-2:]
    assert heavy == str(needs)
    assert "mcpctl.cli.serve" not in ours
    assert "mcpctl.cli.database" not in ours
    assert not words.startswith("--") or "mcpctl.cli.token" not in ours


def _options(command: Any) -> list[Any]:
    below = [option for child in getattr(command, "commands", {}).values() for option in _options(child)]
    return [param for param in command.params if isinstance(param, TyperOption)] + below


def test_what_is_read_plainly_is_what_typer_reads() -> None:
    by_typer: Any = TyperOption.process_value.__wrapped__  # type: ignore[attr-defined]
    context: Any = typer.Context(typer.main.get_command(app))
    for option in (option for name in tree.TOP for option in _options(tree.load(name))):
        for value in (None, option.default, *([[], ["a", "b"], ("",)] if option.multiple else ["", "x", " 7", "7"])):
            read: list[object] = []
            for reader in (TyperOption.process_value, by_typer):
                try:
                    read.append(reader(option, context, value))
                except typer.BadParameter as problem:
                    read.append(str(problem))
            assert read[0] == read[1], (option.name, value)
