"""mcpctl restore: bring back what is in a backup, but nothing that was taken away since."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from mcpctl.cli import output
from mcpctl.cli.common import (
    ConfigOption,
    JsonOption,
    by_whom,
    import_before,
    note,
    read_password,
    read_secret,
    settings,
    undone_when_ended,
)

if TYPE_CHECKING:
    from datetime import datetime

    from mcpctl.backup.age import Identities, Passphrase
    from mcpctl.backup.opening import Backup
    from mcpctl.backup.planning import Plan
    from mcpctl.config_keys import Settings


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup.")],
    identity: Annotated[
        str | None, typer.Option("--identity", metavar="FILE", help="The file of the private key that opens it.")
    ] = None,
    passphrase_file: Annotated[
        str | None,
        typer.Option("--passphrase-file", metavar="FILE", help="The passphrase is in that file; - for stdin."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at all of it, and say what would be changed; change nothing.")
    ] = False,
    revoke_all: Annotated[
        bool, typer.Option("--revoke-all", help="Revoke every token and end every session with it.")
    ] = False,
    other: Annotated[
        bool,
        typer.Option(
            "--other-installation", help="What is here is another installation's: move it aside, and keep it."
        ),
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Bring back what is in a backup, all of it or nothing, while no server runs.

    Files that are here stay, and so does the audit log: what was revoked, removed or disabled since the backup was made
    does not come back. A backup that is damaged, or another installation's, changes nothing.

    Example: mcpctl restore mcpctl-20261128T020000Z.tar.gz.age --identity backup.key
    """
    from mcpctl.backup import opening, placing, restoring
    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import utcnow

    if identity is not None and passphrase_file is not None:
        raise UsageError("a backup is opened by a key or by a passphrase, not by both", "leave one of them out")
    now = utcnow()
    with undone_when_ended(), _opened(file) as backup:
        key = _key(backup, identity, passphrase_file)
        here, place = _here(context, config)
        at = placing.journal_of(place, here.auth.token_file if here else None)
        if (journal := placing.unfinished(at)) is not None:
            _finish(context, journal, at, now, dry_run)
            return
        with opening.opened(backup, key, lambda manifest: place, restoring.near) as found:
            target = here or found.settings
            since = restoring.Since() if other else restoring.survey(found, target)
            if dry_run:
                done = restoring.planned(found, here, since, now, other=other, revoke_all=revoke_all)
            else:
                with restoring.quiet(target):
                    done = restoring.planned(found, here, since, now, other=other, revoke_all=revoke_all)
                    said = _said(file, found, done, revoke_all)
                    restoring.place(done, said, now, other=other)
                after = placing.unfinished(restoring.journal_of(done.settings))
                if after is not None:
                    restoring.finish(after, restoring.journal_of(done.settings), now, _noting(context))
            _tell(found, done, now, json=json, dry_run=dry_run, revoke_all=revoke_all)


def _opened(file: Path) -> BinaryIO:
    """The caller's file: opened before root is given up."""
    from mcpctl.errors import ConfigError, NotFoundError

    try:
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}", "is it the right name?") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{file} is no regular file", "name the backup itself")
    return os.fdopen(fd, "rb")


def _key(backup: BinaryIO, identity: str | None, passphrase_file: str | None) -> "Identities | Passphrase":
    import sys

    from mcpctl.backup import age
    from mcpctl.errors import UsageError

    if not age.needs_passphrase(backup):
        if identity is None:
            raise UsageError("the backup was encrypted for a recipient", "name the file of its private key: --identity")
        return age.identities(
            read_secret(identity, 1 << 20) if identity != "-" else sys.stdin.buffer.read(), "--identity"
        )
    if identity is not None:
        raise UsageError("the backup was encrypted with a passphrase", "leave --identity out")
    if passphrase_file is not None:
        return age.Passphrase(read_password(passphrase_file))
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("the backup was encrypted with a passphrase", "name the file that it is in: --passphrase-file")
    from getpass import getpass

    return age.Passphrase(getpass("Passphrase of the backup: "))


def _here(context: typer.Context, config: Path | None) -> "tuple[Settings | None, Path]":
    """The settings that hold here, if any do, and where the config is or is to be. Root is given up."""
    from mcpctl import config as configuration
    from mcpctl import private_file

    source = configuration.find(config or context.find_root().obj.config, os.environ)
    if source is not None and os.path.lexists(source):
        return settings(context, config, needs_log=False), source
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    place = source or (Path("/etc/mcpctl") if root else configuration.default_folder()) / "config.yaml"
    import_before(place)
    private_file.become_owner(place)
    return None, place


def _noting(context: typer.Context) -> Any:
    def write(found: "Settings", said: str) -> None:
        note(found, "backup.restored", reason=by_whom(context, said))

    return write


def _finish(context: typer.Context, journal: Any, at: Path, now: "datetime", dry_run: bool) -> None:
    from mcpctl.backup import restoring

    if dry_run:
        output.put("a restore was interrupted here; `mcpctl restore` would finish that one, and do nothing else")
        return
    restoring.finish(journal, at, now, _noting(context))
    output.put("a restore that was interrupted here is finished now, and nothing else was done")
    output.say("run the command again if another backup was meant")


def _said(file: Path, found: "Backup", done: "Plan", revoke_all: bool) -> str:
    said = found.manifest
    more = ", all tokens revoked and all sessions ended" if revoke_all else ""
    return f"{file.name} of {said.made_at}, {done.tokens} tokens, {done.users} users, log up to line {said.seq}{more}"


def _age(then: str, now: "datetime") -> str:
    from mcpctl.identity.users import read_time

    minutes = max(0, int((now - read_time(then, "made_at")).total_seconds() // 60))
    days, hours = divmod(minutes // 60, 24)
    return f"{days} days and {hours} hours" if days else f"{hours} hours and {minutes % 60} minutes"


def _tell(found: "Backup", done: "Plan", now: "datetime", *, json: bool, dry_run: bool, revoke_all: bool) -> None:
    age, said = _age(found.manifest.made_at, now), found.manifest
    if json:
        output.put_json(
            {
                "made_at": said.made_at,
                "host": said.host,
                "installation": said.installation,
                "dry_run": dry_run,
                "files": dict(done.lines),
                "tokens": done.tokens,
                "users": done.users,
                "merged": {kind: vars(one) for kind, one in done.merged.items()},
                "known_since": done.since.known,
                "warnings": done.warnings,
            }
        )
    else:
        output.say(f"made at {said.made_at} on {said.host} by mcpctl {said.version}, {age} ago")
        output.put_table(("file", "would be" if dry_run else "is"), done.lines)
        _tell_merged(done)
    for warning in done.warnings:
        output.warn(warning)
    if not done.since.known and not revoke_all:
        output.warn(
            f"what was revoked, removed or disabled in the {age} since the backup was made is not known here",
            "restore it with --revoke-all, or end all: mcpctl token revoke --all; mcpctl session revoke --all",
        )
    if dry_run:
        output.say("nothing was changed")
    elif not json:
        output.say(f"done: {done.tokens} tokens, {done.users} users. Next: mcpctl audit verify; mcpctl doctor")


def _tell_merged(done: "Plan") -> None:
    for kind, one in done.merged.items():
        for name, why in one.out:
            output.say(f"{kind}: {name} stays out: {why}")
        for name, why in one.less:
            output.say(f"{kind}: {name}: {why}")
        if one.lost:
            output.say(f"{kind}: made since the backup, and lost: {', '.join(one.lost)}")
