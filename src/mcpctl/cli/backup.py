"""mcpctl backup: all that an installation cannot be made from again, in one encrypted file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, note, read_password, read_secret, settings

if TYPE_CHECKING:
    from mcpctl.backup.age import Passphrase, Recipients
    from mcpctl.backup.making import Made
    from mcpctl.config_keys import Settings


def backup(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A new file, or a folder for one. Default: in backup.directory."),
    ] = None,
    recipient: Annotated[
        list[str] | None,
        typer.Option("--recipient", metavar="KEY", help="Who may open it: age1… or ssh-ed25519 …. Repeatable."),
    ] = None,
    recipient_file: Annotated[
        str | None, typer.Option("--recipient-file", metavar="FILE", help="A file of such keys, one a line.")
    ] = None,
    passphrase_file: Annotated[
        str | None,
        typer.Option(
            "--passphrase-file", metavar="FILE", help="Encrypt with the passphrase in that file; - for stdin."
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Back up config, tokens, users, keys, passwords, what the server remembers, and the audit log, while it runs.

    The file is encrypted for recipients, of the config or named here, or with a passphrase, which is asked for where
    there is a terminal. Without one it is for recipients alone. In backup.directory what is older than backup.keep
    goes.

    Example: mcpctl backup --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p
    """
    from datetime import timedelta

    from mcpctl.backup import making, names
    from mcpctl.identity.tokens import utcnow

    _check_flags(recipient, recipient_file, passphrase_file)
    named = [(text, "--recipient") for text in recipient or ()]
    if recipient_file is not None:
        from mcpctl.backup.age import listed

        named += [(text, "--recipient-file") for text in listed(read_secret(recipient_file, 1 << 20))]
    passphrase = read_password(passphrase_file) if passphrase_file is not None else None
    found = settings(context, config)
    now = utcnow()
    to = _whom_for(found, named, passphrase)
    where, ours = _target(found, file, names.of(now))
    made = making.make(found, to, where, now, _about())
    removed = making.prune(where, now, timedelta(seconds=found.backup.keep)) if ours else ()
    many = f"{len(made.manifest.files)} files, {made.size} bytes, sha256 {made.sha256}, up to line {made.manifest.seq}"
    gone = f"; removed {len(removed)} older" if removed else ""
    note(found, "backup.made", reason=by_whom(context, f"{where}: {many}{gone}"))
    _tell(found, made, removed, json)


def _check_flags(recipient: list[str] | None, recipient_file: str | None, passphrase_file: str | None) -> None:
    from mcpctl.errors import UsageError

    if passphrase_file is None:
        return
    if recipient or recipient_file:
        raise UsageError("a backup is for recipients or has a passphrase, not both", "leave one of them out")
    if not _has_terminal():
        raise UsageError(
            "nobody is at a terminal, so the passphrase would lie on the machine that it protects",
            "encrypt for a recipient: --recipient, or backup.recipients in the config",
        )


def _has_terminal() -> bool:
    """Whether a person is there: systemd and cron start a process without a terminal of its own (tty(4))."""
    import os

    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _whom_for(found: "Settings", named: list[tuple[str, str]], passphrase: str | None) -> "Recipients | Passphrase":
    from mcpctl.backup import age
    from mcpctl.errors import UsageError

    if passphrase is not None:
        return _checked(passphrase)
    named = named or [(text, "backup.recipients") for text in found.backup.recipients]
    if named:
        return age.Recipients([key for text, where in named for key in age.recipients([text], where).keys])
    if not (_has_terminal() and sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError(
            "it is not said whom the backup is for",
            "name a public key with --recipient, or in backup.recipients; age-keygen -o backup.key makes one",
        )
    return _asked()


def _asked() -> "Passphrase":
    from getpass import getpass

    from mcpctl.errors import UsageError

    first = _checked(getpass("Passphrase for the backup: "))
    if getpass("Again: ") != first.text:
        raise UsageError("the two are not the same", "nothing was made; try again")
    return first


def _checked(text: str) -> "Passphrase":
    from mcpctl.backup import age
    from mcpctl.errors import UsageError

    if len(text) < age.LEAST:
        raise UsageError(
            f"the passphrase has {len(text)} characters, and needs {age.LEAST}",
            "take several words that nobody guesses",
        )
    return age.Passphrase(text)


def _target(found: "Settings", file: Path | None, name: str) -> tuple[Path, bool]:
    """Where it is written to, and whether the folder is ours to keep in order."""
    from mcpctl.backup import making
    from mcpctl.errors import UsageError

    if file is not None:
        file = file.absolute()
        return (file / name, False) if file.is_dir() else (file, False)
    if found.backup.directory is None:
        raise UsageError("it is not said where the backup goes", "name a FILE, or set backup.directory in the config")
    return making.folder(found.backup.directory) / name, True


def _about() -> tuple[str, str]:
    import socket

    from mcpctl import __version__

    return __version__, socket.gethostname()


def _tell(found: "Settings", made: "Made", removed: tuple[Path, ...], json: bool) -> None:
    from dataclasses import asdict

    from mcpctl.backup import contents

    said = made.manifest
    out = [(key, path) for key, path in contents.left_out(found)]
    if made.fault is not None:
        output.warn(f"the audit log was not whole already: {made.fault}", "the backup has it as it is; audit verify")
    for path in made.missing:
        output.warn(f"there is no {path}, so it is not in the backup")
    if json:
        output.put_json(
            {
                "file": str(made.path),
                "bytes": made.size,
                "sha256": made.sha256,
                **asdict(said),
                "fault": made.fault,
                "missing": [str(path) for path in made.missing],
                "not_in_it": [str(path) for _, path in out],
                "removed": [str(path) for path in removed],
            }
        )
        return
    output.put(str(made.path))
    output.say(f"{len(said.files)} files, {made.size} bytes, sha256 {made.sha256}")
    output.say(f"{said.tokens} tokens, {said.users} users, the audit log up to line {said.seq}")
    for key, path in out:
        output.say(f"not in it: {path} ({key})")
    for path in removed:
        output.say(f"removed, since it is older than backup.keep: {path}")
