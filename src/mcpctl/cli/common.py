"""What every command needs: the config named on the command line, and the files with the right user's rights."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mcpctl.audit import AuditLog
    from mcpctl.config_keys import Settings

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Config file. Default: $MCPCTL_CONFIG, /etc/mcpctl/config.yaml, or the user's own.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class Invocation:
    """What was said before the command's own name, and who said it: asked before root is given up."""

    config: Path | None
    who: str


def invocation(config: Path | None) -> Invocation:
    """The invocation of this process."""
    import os

    who = "somebody"
    if hasattr(os, "getuid"):
        who = f"uid {os.getuid()}"
        with contextlib.suppress(ImportError, KeyError):
            import pwd

            who = pwd.getpwuid(os.getuid()).pw_name
    sudo = os.environ.get("SUDO_USER")
    return Invocation(config, f"{who} (SUDO_USER={sudo[:64]})" if sudo else who)


def config_flag(source: Path | None) -> str:
    """What a command that we advise needs behind it to find this config file."""
    from mcpctl import config as configuration

    usual = source is None or configuration.find(None, {}) == source
    return "" if usual else f" --config {shlex.quote(str(source))}"


def settings(
    context: typer.Context, config: Path | None, *, needs_log: bool = True, modules: Sequence[str] = ()
) -> "Settings":
    """The configuration, with root's rights given up in favour of the owner of the files.

    `needs_log`: what only takes a right away, or only looks, goes on where the audit log is not as it must be.
    `modules`: what the command imports later, and the owner of the files may not be able to read.
    """
    from dataclasses import replace

    from mcpctl import config as configuration
    from mcpctl import private_file

    begun_as_root = _is_root()
    import_as_root(*modules)
    found = configuration.load(config or context.find_root().obj.config)
    if begun_as_root:
        found = replace(found, by_root=True)
        for path in (found.auth.token_file, found.auth.user_file):
            private_file.refuse_link(path)
        if needs_log:
            _refuse_links_of_log(found)
    private_file.become_owner(found.auth.token_file)
    return found


def import_as_root(*more: str) -> None:
    """Root may run an mcpctl that the owner of the files cannot read: what is needed later is imported before."""
    import sys
    from importlib import import_module

    if not _is_root():
        return
    names = [*more, "mcpctl.audit", "mcpctl.control", "mcpctl.identity.tenants", "encodings.idna"]
    if sys.stdout.isatty():
        names += ["rich.console", "rich.table", "rich.text"]
    for name in names:
        import_module(name)


def _is_root() -> bool:
    import os

    return hasattr(os, "geteuid") and os.geteuid() == 0


def _refuse_links_of_log(found: "Settings") -> None:
    from mcpctl import private_file

    lock = found.audit.file.with_name(found.audit.file.name + ".lock")
    for path in (found.audit.file, found.audit.key_file, lock):
        private_file.refuse_link(path)


def check_log(found: "Settings") -> None:
    """Raises where nothing could be written into the audit log now."""
    with _audit_log(found) as log:
        log.check()


def ready_to_note(found: "Settings") -> None:
    """Refuses what gives a right while it could not be written into the audit log, unless the config only warns."""
    from mcpctl.errors import ConfigError, Error

    if found.audit.on_failure != "refuse":
        return
    try:
        check_log(found)
    except Error as problem:
        raise ConfigError(f"nothing was done: {problem.message}", problem.hint) from None


def note(found: "Settings", event: str, **fields: Any) -> None:
    """An audit line of a command's. A log that cannot be written is a warning: it never stops a revocation."""
    note_all(found, [(event, fields)])


def note_all(found: "Settings", events: list[tuple[str, dict[str, Any]]]) -> None:
    """Several audit lines of one command."""
    from mcpctl.cli import output
    from mcpctl.errors import Error

    if not events:
        return
    try:
        with _audit_log(found) as log:
            for event, fields in events:
                log.append(event, transport="cli", **fields)
    except Error as problem:
        output.warn(f"done, but not in the audit log: {problem.message}", problem.hint)


@contextlib.contextmanager
def _audit_log(found: "Settings") -> "Iterator[AuditLog]":
    from mcpctl import audit
    from mcpctl.identity.tokens import utcnow

    if found.by_root:
        _refuse_links_of_log(found)
    log = audit.AuditLog(found.audit.file, audit.read_key(found.audit.key_file), utcnow)
    try:
        yield log
    finally:
        log.close()


def confirm(what: str, question: str, yes: bool) -> None:
    """Ask before `what` is done, unless --yes was said. UsageError where there is nobody to ask, Error for a no."""
    import sys

    from mcpctl.errors import Error, UsageError

    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{what} wants a yes, and there is no terminal to ask at", "say --yes")
    if not typer.confirm(question, err=True):
        raise Error("nothing was removed")


def by_whom(context: typer.Context, reason: str | None = None) -> str:
    """Who runs the command, for the audit line's reason."""
    from mcpctl.cli.output import masked

    who = context.find_root().obj.who
    return f"{masked(reason)}; by {who}" if reason else f"by {who}"


_ASKED_AT_ONCE = 1000


def proof(found: "Settings", names: list[str]) -> tuple[str, dict[str, Any] | None]:
    """What the running servers did about ended tokens, waiting 2 s at most: as words, and as values."""
    from mcpctl import control

    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    answers = control.ask_all(folder, {"do": "settle", "tokens": names[:_ASKED_AT_ONCE]})
    if not answers:
        return "no server runs", None
    for begin in range(_ASKED_AT_ONCE, len(names), _ASKED_AT_ONCE):
        answers += control.ask_all(folder, {"do": "settle", "tokens": names[begin : begin + _ASKED_AT_ONCE]})
    return told(answers)


def told(answers: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What the running servers say that they have cut: as words, and as values."""
    silent = sum("error" in answer for answer in answers)
    queries = sum(answer.get("queries", 0) for answer in answers)
    left = sum(answer.get("backends_left", 0) for answer in answers)
    pids = [pid for answer in answers for pid in answer.get("lingering", ())]
    words = (
        f"cut: {queries} {'query' if queries == 1 else 'queries'}, {left} {'backend' if left == 1 else 'backends'} left"
    )
    if pids:
        words += f" (pid {', '.join(map(str, pids))})"
    if silent:
        words += f"; {silent} of {len(answers)} server processes did not answer in time"
    return words, {"queries": queries, "backends_left": left, "lingering": pids, "silent": silent}
