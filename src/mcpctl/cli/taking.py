"""What takes a token's rights away where its file cannot be written at all: the running servers are told."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mcpctl.cli.common import told

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings


@contextlib.contextmanager
def taking(found: "Settings", names: list[str]) -> "Iterator[None]":
    """Around a change that ends these tokens. Where it cannot be written, each running server keeps them out until it
    restarts, and the Error says that this is all that was done (exit 1)."""
    from mcpctl import control
    from mcpctl.errors import Error, FullError, NotWrittenError

    try:
        yield
    except (FullError, NotWrittenError) as problem:
        folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
        answers = control.ask_all(folder, {"do": "bar", "tokens": names}) if names else []
        if not answers:
            said = "no server runs" if names else "it was not done"
            raise Error(f"{problem.message}; {said}", f"{problem.hint}: the files still say what they said") from None
        words, _ = told(answers)
        raise Error(
            f"{problem.message}; but the running servers keep {', '.join(names)} out until they restart ({words})",
            "make room and run this again: the files still say that it may come in",
            exit_code=1,
        ) from None
