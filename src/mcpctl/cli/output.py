"""What a command prints. The rules:

- data on stdout, everything else on stderr;
- a table on a terminal, tab-separated without a head when piped; `--json` one object;
- `mcpctl: error: …` and `mcpctl: hint: …`; one place exits (`main.run`);
- nothing from a file or a log reaches the terminal with control characters in it;
- a token goes to stdout, where it is asked for, and never into a message.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from mcpctl.errors import masked


def clean(text: object) -> str:
    """A value as text that cannot steer a terminal, nor turn its direction; nothing for None."""
    found = "" if text is None else str(text)
    return found if found.isprintable() else "".join(map(_seen, found))


def _seen(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _lines(text: str) -> str:
    return "\n".join(map(clean, text.split("\n")))


_NARROWEST = 40


def _print(text: str) -> bool:
    """Print to stdout; False where whoever read it is gone. That is no failure: the command goes on, unheard, so that
    its exit code is what it would have been."""
    try:
        sys.stdout.write(f"{text}\n")  # in one piece: several commands may write to one file
        sys.stdout.flush()
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the last flush, at the exit, does not fail again
        if not isinstance(problem, BrokenPipeError):
            raise
        return False
    return True


def say(text: str) -> None:
    """A line for the person, on stderr. Where nobody reads it, the exit code says enough."""
    try:
        sys.stderr.write(_lines(masked(text)) + "\n")  # in one piece: workers write there, too
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as in _print: else the last flush fails, and Python exits 120
    except OSError:
        pass


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


def put(text: str) -> bool:
    """A line of data, on stdout; False where its reader is gone."""
    return _print(_lines(text))


def put_json(value: Any) -> bool:
    """One JSON object on stdout; what is not ASCII is escaped, so that any terminal and any encoding can take it.
    False where its reader is gone."""
    return _print(json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f"))


def put_table(
    head: Sequence[str], rows: Sequence[Sequence[object]], widths: Sequence[int] = (), *, with_head: bool = True
) -> bool:
    """Rows on stdout: for people on a terminal, for programs in a pipe. `widths` are the least ones, for rows that
    come bit by bit. False where its reader is gone."""
    shown = [[clean(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        return not shown or _print("\n".join("\t".join(row) for row in shown))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = bool(os.environ.get("NO_COLOR"))
    table = Table(box=None, pad_edge=False, header_style="" if plain else "bold", show_header=with_head)
    for index, name in enumerate(head):
        table.add_column(name, overflow="fold", min_width=widths[index] if widths else None)
    for row in shown:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(no_color=plain, highlight=False)
    console.width = max(console.width, _NARROWEST)
    console.print(table)
    return True
