"""What every command needs: the config named on the command line, and the files with the right user's rights."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Config file. Default: $MCPCTL_CONFIG, /etc/mcpctl/config.yaml, or the user's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Clock = Callable[[], datetime]


def settings(context: typer.Context, config: Path | None) -> "Settings":
    """The configuration, with root's rights given up in favour of the owner of the files."""
    from mcpctl import config as configuration
    from mcpctl import private_file

    found = configuration.load(config or context.find_root().obj)
    private_file.become_owner(found.auth.token_file)
    return found


def note(found: "Settings", event: str, **fields: Any) -> None:
    """An audit line of a command's. A log that cannot be written is a warning: it never stops a revocation."""
    from mcpctl import audit
    from mcpctl.cli import output
    from mcpctl.errors import Error
    from mcpctl.identity.tokens import utcnow

    try:
        log = audit.AuditLog(found.audit.file, audit.read_key(found.audit.key_file), utcnow)
        try:
            log.append(event, transport="cli", **fields)
        finally:
            log.close()
    except Error as problem:
        output.warn(f"done, but not in the audit log: {problem.message}", problem.hint)


def by_whom(reason: str | None = None) -> str:
    """Who runs the command, for the audit line's reason."""
    import getpass
    import os

    try:
        who = getpass.getuser()
    except (KeyError, OSError):
        who = f"uid {os.getuid()}"
    sudo = os.environ.get("SUDO_USER")
    who = f"{who} (sudo by {sudo})" if sudo else who
    return f"{reason}; by {who}" if reason else f"by {who}"
