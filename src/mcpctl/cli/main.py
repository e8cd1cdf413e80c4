"""The command line's one entry and one exit."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mcpctl import __version__
from mcpctl.cli.common import invocation
from mcpctl.cli.output import error, put, say
from mcpctl.cli.tree import Top, read_plainly
from mcpctl.errors import Error, UsageError

read_plainly()
app = typer.Typer(
    name="mcpctl",
    cls=Top,
    help="Authenticated, isolated, audited MCP access to PostgreSQL.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_READ_NO_CONFIG = ("connect", "demo", "init")


def _version(wanted: bool) -> None:
    if wanted:
        put(f"mcpctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Config file, for every command that reads one.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Authenticated, isolated, audited MCP access to PostgreSQL."""
    if config is not None and context.invoked_subcommand in _READ_NO_CONFIG:
        raise UsageError(
            f"{context.invoked_subcommand} reads no config, so --config {config} means nothing to it",
            "mcpctl init DIR makes one in that folder" if context.invoked_subcommand == "init" else "leave it out",
        )
    context.obj = invocation(config)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed or no, 2 usage, 3 config or file mode, 4 no such thing,
    5 conflict, 130 interrupted."""
    sys.exit(_run(arguments))


def _open_all_three() -> None:
    """stdin, stdout and stderr, where whoever started us has closed one: else the next file that is opened gets its
    number, and what is meant for a person goes into it."""
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, flags)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _call(arguments: list[str] | None) -> Any:
    """Run the command; what went wrong in a server's group of tasks is raised as itself."""
    try:
        return app(arguments, standalone_mode=False)
    except BaseExceptionGroup as group:
        problem: BaseException = group
        while isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        raise problem from None


def _run(arguments: list[str] | None) -> int:
    _open_all_three()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no failure
    try:
        done = _call(arguments)
    except Error as problem:
        error(problem.message, problem.hint)
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except PermissionError as problem:
        error(f"{problem.filename or 'a file'}: {problem.strerror}", "run as the owner of mcpctl's files, or as root")
        return 3
    except OSError as problem:
        error(f"{f'{problem.filename}: ' if problem.filename else ''}{problem.strerror or problem}", None)
        return 1
    except Exception as problem:
        told = getattr(problem, "format_message", None)
        if told is None:
            raise
        text = told()
        if not text or type(problem).__name__ == "NoArgsIsHelpError":  # the help says more than an error
            say(text or "")
            return 2
        context = getattr(problem, "ctx", None)
        path = context.command_path if context is not None else "mcpctl"
        error(text, f"`{path} --help` shows what it takes")
        return int(getattr(problem, "exit_code", 2))
    return done if isinstance(done, int) else 0
