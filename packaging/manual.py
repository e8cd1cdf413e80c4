"""Man pages and shell completion, made from what `--help` is made of and from the config's own schema.

    python packaging/manual.py FOLDER

writes share/man/man1, share/man/man5, share/bash-completion, share/zsh and share/fish below FOLDER. It needs mcpctl
and Typer, and none of mcpctl's other dependencies: a wheel is built with it, and the Debian package takes the pages
from there. The form is man(7)'s.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from mcpctl import __version__, errors
from mcpctl.cli import tree
from mcpctl.cli.main import app
from mcpctl.config_keys import Settings

COMPLETIONS = {
    "bash": "share/bash-completion/completions/mcpctl",
    "zsh": "share/zsh/site-functions/_mcpctl",
    "fish": "share/fish/vendor_completions.d/mcpctl.fish",
}
"""Where each shell looks below a prefix."""

_FILES = {
    "/etc/mcpctl/config.yaml": "the settings; see mcpctl.yaml(5)",
    "$XDG_CONFIG_HOME/mcpctl/config.yaml, ~/.config/mcpctl/config.yaml": "a user's own, where there is none in /etc",
}
_ENVIRONMENT = {
    "MCPCTL_CONFIG": "the config file, where --config names none",
    "MCPCTL_SECTION__KEY": "a key of the config, such as MCPCTL_SERVER__PORT, in place of the file's",
    "MCPCTL_DATABASE_URL": "a database to ask; alone it is enough for mcpctl serve --stdio",
    "MCPCTL_TOKEN": "the token of who asks, for mcpctl serve --stdio and mcpctl connect",
    "NO_COLOR": "no colours on a terminal",
}
_CODES = {0: "Done; a predicate's yes.", 1: "Failed; a predicate's no.", 130: "Interrupted."}


def pages() -> dict[str, str]:
    """Path below share/man → the page, for the program, each of its commands, and the config file."""
    root = _root()
    made = {"man1/mcpctl.1": _program(root), "man5/mcpctl.yaml.5": _config()}
    for name, command in root.commands.items():
        made[f"man1/mcpctl-{name}.1"] = _noun(name, _context(command, name, root.context))
    return made


def completions() -> dict[str, str]:
    """Path → what a shell reads to complete words of mcpctl. It asks the program, and so knows what --help knows."""
    program = "import sys; sys.argv = ['mcpctl']; from mcpctl.cli.main import run; run()"
    made = {}
    for shell, path in COMPLETIONS.items():
        told = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "_MCPCTL_COMPLETE": f"source_{shell}"},
            capture_output=True,
            text=True,
            check=True,
        )
        made[path] = told.stdout.strip() + "\n"
    # zsh reads the file when the first TAB is pressed, and takes it for the function that completes
    made[COMPLETIONS["zsh"]] += '\n[ "$funcstack[1]" = _mcpctl ] && _mcpctl_completion "$@"\n'
    return made


def write(folder: Path) -> list[Path]:
    """All of it, below `folder`; the paths of the files."""
    contents = {f"share/man/{name}": text for name, text in pages().items()} | completions()
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]


# -- commands -------------------------------------------------------------------------------------------------------


def _root() -> Any:
    """The program with every command in it, and its context."""
    root: Any = typer.main.get_command(app)
    root.commands.update({name: tree.load(name) for name in root.commands})
    root.context = root.context_class(root, info_name="mcpctl", **root.context_settings)
    return root


def _context(command: Any, name: str, parent: Any) -> Any:
    return command.context_class(command, info_name=name, parent=parent, **command.context_settings)


def _program(root: Any) -> str:
    text = _head("mcpctl", 1, root.help)
    text += _section("SYNOPSIS", _usage(root.context))
    text += _section("DESCRIPTION", _paragraphs(root.help))
    text += _section("OPTIONS", _parameters(root.context))
    rows = {f"mcpctl-{name}(1)": child.help.split("\n\n")[0] for name, child in root.commands.items()}
    text += _section("COMMANDS", _tagged(rows))
    text += _section("EXIT STATUS", _tagged({str(code): meaning for code, meaning in sorted(_codes().items())}))
    text += _section("ENVIRONMENT", _tagged(_ENVIRONMENT))
    text += _section("FILES", _tagged(_FILES))
    return text + _see([*(f"mcpctl-{name}(1)" for name in root.commands), "mcpctl.yaml(5)"])


def _noun(name: str, context: Any) -> str:
    """The page of one of the program's commands, with those below it."""
    command = context.command
    text = _head(f"mcpctl-{name}", 1, command.help)
    below = [_context(child, word, context) for word, child in getattr(command, "commands", {}).items()]
    text += _section("SYNOPSIS", "\n.br\n".join(_usage(one) for one in below or [context]))
    text += _section("DESCRIPTION", _paragraphs(command.help))
    if below:
        text += _section("COMMANDS", "\n".join(_subcommand(one) for one in below))
    else:
        text += _section("OPTIONS", _parameters(context))
    text += _section("EXIT STATUS", _paragraphs("0 for done or yes; mcpctl(1) has the others."))
    return text + _see(["mcpctl(1)", "mcpctl.yaml(5)"])


def _subcommand(context: Any) -> str:
    parts = [f".SS {_roff(context.command_path)}", _paragraphs(context.command.help), _parameters(context)]
    return "\n".join(part for part in parts if part)


def _usage(context: Any) -> str:
    command = context.command
    pieces = [one.metavar for one in command.params if one.param_type_name == "argument" and one.metavar]
    pieces += ["COMMAND [ARGUMENTS]"] if hasattr(command, "commands") else []
    return f"\\fB{_roff(context.command_path)}\\fR [OPTIONS] {_roff(' '.join(pieces))}".rstrip()


def _parameters(context: Any) -> str:
    """Arguments and options, as --help tells of them."""
    records = (one.get_help_record(context) for one in context.command.get_params(context))
    return _tagged(dict(filter(None, records)))


def _codes() -> dict[int, str]:
    """Exit codes and their meaning, by the errors that have them."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Error)]
    found = dict(_CODES)
    for kind in kinds:
        if kind.exit_code not in found:
            found[kind.exit_code] = (kind.__doc__ or "").split("\n\n")[0]
    return found


# -- config.yaml ----------------------------------------------------------------------------------------------------


def _config() -> str:
    text = _head("mcpctl.yaml", 5, "the settings of mcpctl, in config.yaml")
    text += _section("SYNOPSIS", "\\fI/etc/mcpctl/config.yaml\\fR")
    text += _section(
        "DESCRIPTION",
        _paragraphs(
            "YAML, as plain data: no tags, no anchors. Every key may be left out. An unknown key, or a value that a "
            "key cannot take, is a fault, and nothing starts with one; mcpctl config check names all faults with "
            "their lines. Below, a point stands between a section and what is in it, and NAME for a name of your own."
            "\n\nA key may also be given in the environment, in capitals, with two underscores for each point: "
            "MCPCTL_SERVER__PORT. Paths are meant from the config's own folder."
            "\n\nThe file is 0600, or 0640 where it is root's and the group is the service's."
        ),
    )
    sections: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for key, found in _keys(Settings):
        sections.setdefault(key.rpartition(".")[0], []).append((key, found))
    bodies = [
        f".SS {_roff(name)}\n" + _tagged({key: _meaning(found) for key, found in fields})
        for name, fields in sections.items()
    ]
    text += _section("KEYS", "\n".join(bodies))
    text += _section("FILES", _tagged(_FILES))
    return text + _see(["mcpctl(1)", "mcpctl-config(1)"])


def _keys(cls: type, before: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key that a config may hold, with its field, by what the reader of the file goes by."""
    for found in dataclasses.fields(cls):
        about, key = found.metadata, before + found.name
        if "section" in about:
            yield from _keys(about["section"], f"{key}.")
        elif "named" in about:
            yield from _keys(about["named"], f"{key}.NAME.")
        elif about:
            yield key, found


def _meaning(found: dataclasses.Field[Any]) -> str:
    """What a key is for, what it takes, and its default."""
    default = found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
    takes = _takes(found.metadata["read"])
    written = _duration(default) if isinstance(default, float) and "duration" in takes else _plain(default)
    shown = "" if default in (None, (), {}, "") else f" Default: {written}."
    return f"{found.metadata['doc'].rstrip('.')}. Takes {takes}.{shown}"


def _takes(read: Any) -> str:
    """What a key's reader says that it wants."""
    try:
        read(object())
    except ValueError as problem:
        return str(problem)
    raise TypeError(f"{read} takes anything")


def _duration(seconds: float) -> str:
    """Seconds in the largest unit that they are a whole number of."""
    size, unit = next(
        (size, unit) for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if not seconds % size
    )
    return f"{seconds / size:g}{unit}"


def _plain(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


# -- roff -----------------------------------------------------------------------------------------------------------


def _roff(text: str) -> str:
    """Text that means nothing to roff. A hyphen is a minus, so that what is copied from a page can be run."""
    return text.replace("\\", "\\e").replace("-", "\\-")


def _line(text: str) -> str:
    """The same, as whole lines: none of them begins as a request does."""
    return re.sub(r"^([.'])", r"\\&\1", _roff(textwrap.fill(text, 72, break_on_hyphens=False)), flags=re.MULTILINE)


def _head(name: str, number: int, help: str) -> str:
    """What comes first, NAME included. The date is SOURCE_DATE_EPOCH's, so that building again gives the same."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH")
    day = (datetime.fromtimestamp(int(stamp), UTC) if stamp else datetime.now(UTC)).date()
    what = " ".join(help.split("\n\n")[0].split()).rstrip(".")
    title = f'.TH "{_roff(name.upper())}" "{number}" "{day}" "mcpctl {__version__}" "mcpctl"\n'
    return f"{title}.SH NAME\n{_roff(name)} \\- {_roff(what)}\n"


def _section(title: str, body: str) -> str:
    return f".SH {title}\n{body}\n" if body else ""


def _paragraphs(help: str | None) -> str:
    return "\n.PP\n".join(_line(part) for part in (help or "").split("\n\n"))


def _tagged(rows: dict[str, str]) -> str:
    return "\n".join(f".TP\n\\fB{_roff(name)}\\fR\n{_line(meaning)}" for name, meaning in rows.items())


def _see(names: list[str]) -> str:
    rows = [f".BR {_roff(name[:-3])} {name[-3:]}" for name in names]
    return _section("SEE ALSO", ",\n".join(rows))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
