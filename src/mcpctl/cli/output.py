"""What a command prints. The rules:

- data on stdout, everything else on stderr;
- a table on a terminal, tab-separated without a head when piped; `--json` one object;
- `mcpctl: error: …` and `mcpctl: hint: …`; one place exits (`main.run`);
- nothing from a file or a log reaches the terminal with control characters in it.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E]}


def clean(text: object) -> str:
    """A value as text that cannot steer a terminal; nothing for None."""
    return "" if text is None else str(text).translate(_CONTROL)


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str, hint: str | None = None) -> None:
    """Something that did not stop the command, and should be known."""
    say(f"mcpctl: warning: {text}")
    if hint:
        say(f"mcpctl: hint: {hint}")


def error(message: str, hint: str | None) -> None:
    """Why the command failed."""
    say(f"mcpctl: error: {message}")
    if hint:
        say(f"mcpctl: hint: {hint}")


def put(text: str) -> None:
    """A line of data, on stdout."""
    print(text, flush=True)


def put_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def put_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows on stdout: for people on a terminal, for programs in a pipe."""
    shown = [[clean(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            print("\t".join(row))
        sys.stdout.flush()
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in shown:
        table.add_row(*(Text(cell) for cell in row))
    Console(no_color="NO_COLOR" in os.environ, highlight=False).print(table)
