"""A user's new password, from where commands take one: a file, stdin, or a prompt; never argv."""

import sys
from typing import Annotated

import typer

from mcpctl.cli.common import read_secret

FileOption = Annotated[
    str | None,
    typer.Option(
        "--password-file", metavar="FILE", help="Where the password is, 0600; - is stdin. One line end is dropped."
    ),
]
_ROOM = 1 << 20
"""Bytes of such a file that are read: more than any password has, which is then what is said."""


def read(file: str) -> str:
    """The password in that file, or in stdin's first line for -; for root before that is given up."""
    from mcpctl.errors import UsageError

    data = read_secret(file, _ROOM)
    data = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError("the password is not in UTF-8", "write the file anew, in UTF-8") from None


def asked_for(name: str) -> str:
    """The password, typed twice on the terminal without being shown. UsageError where there is no terminal."""
    import getpass

    from mcpctl.errors import UsageError

    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "the password is asked for, and there is no terminal to ask at",
            "name a 0600 file with --password-file, or - for stdin",
        )
    try:
        found = getpass.getpass(f"new password for {name}: ", stream=sys.stderr)
        again = getpass.getpass("the same again: ", stream=sys.stderr)
    except EOFError:
        raise UsageError("no password was typed; nothing was changed", "run it again") from None
    if found != again:
        raise UsageError("the two passwords differ; nothing was changed", "run it again")
    return found


def hashed(text: str, name: str) -> str:
    """The hash to keep of the user's new password, where it may be one."""
    from mcpctl.identity import passwords

    passwords.check_new(text, name)
    return passwords.hashed(text)
