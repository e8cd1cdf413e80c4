"""What every command needs: the config named on the command line, and the files with the right user's rights."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.errors import masked

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from mcpctl.audit.log import AuditLog
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Config file. Default: $MCPCTL_CONFIG, /etc/mcpctl/config.yaml, or the user's own.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _reason(text: str | None) -> str | None:
    """A reason that the log can take. A token in it is masked, a control character is a blank, and what is too long is
    cut off: no pasted text holds up a revocation."""
    if text is None:
        return None
    from mcpctl.config_values import CONTROL

    return CONTROL.sub(" ", masked(text)).strip()[:1000] or None


ReasonOption = Annotated[
    str | None, typer.Option("--reason", metavar="T", help="Why, for the audit log.", callback=_reason)
]


@dataclass(frozen=True)
class Invocation:
    """What was said before the command's own name, and who said it: asked before root is given up."""

    config: Path | None
    who: str


def invocation(config: Path | None) -> Invocation:
    """The invocation of this process."""
    import os

    who, sudo = user_name(), os.environ.get("SUDO_USER")
    return Invocation(config, f"{who} (SUDO_USER={sudo[:64]})" if sudo else who)


def user_name() -> str:
    """The system's user whom this process runs as now."""
    import os

    if not hasattr(os, "getuid"):
        return "somebody"
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    return f"uid {os.getuid()}"


def config_flag(source: Path | None) -> str:
    """What a command that we advise needs behind it to find this config file."""
    from mcpctl import config as configuration

    usual = source is None or configuration.find(None, {}) == source
    return "" if usual else f" --config {shlex.quote(str(source))}"


def settings(
    context: typer.Context,
    config: Path | None,
    *,
    needs_log: bool = True,
    forgiving: bool = False,
    mode: int = 0o640,
) -> "Settings":
    """The configuration, with root's rights given up in favour of the owner of the files.

    `needs_log`: what only takes a right away, or only looks, goes on where the audit log is not as it must be.
    `forgiving`: what an incident needs goes on where a fault is in what it does not need. `mode`: the most that
    the config file may have.
    """
    from dataclasses import replace

    from mcpctl import private_file

    begun_as_root = _is_root()
    found = loaded(context, config, forgiving=forgiving, mode=mode)
    if begun_as_root:
        from mcpctl.identity import blocked  # noqa: F401 - whoever we become may not be able to read this program

        found = replace(found, by_root=True)
        for path in (found.auth.token_file, found.auth.user_file):
            private_file.refuse_link(path)
        if needs_log:
            _refuse_links_of_log(found)
    private_file.become_owner(found.auth.token_file)
    return found


def read_password(file: str) -> str:
    """The password of a database in the file that an option names, or in stdin's first line for -."""
    return read_secret(file).decode("utf-8", "replace").rstrip("\r\n")


def read_secret(file: str, limit: int = 4096) -> bytes:
    """What is in the file that an option names, or stdin's first line for -.

    The file is the caller's and not the service's: it is read before root is given up, and root may read anybody's.
    """
    import os
    import sys

    from mcpctl import private_file

    if file == "-":
        return sys.stdin.buffer.readline(limit) if sys.stdin is not None else b""
    owner = os.lstat(file).st_uid if _is_root() and os.path.lexists(file) else None
    return private_file.read(Path(file), trusted_owner=owner, limit=limit).data


def loaded(context: typer.Context, config: Path | None, *, forgiving: bool = False, mode: int = 0o640) -> "Settings":
    """The configuration, as root still where the config file is root's."""
    import os

    from mcpctl import config as configuration
    from mcpctl.cli import output

    source = configuration.find(config or context.find_root().obj.config, os.environ)
    if source is not None:
        import_before(source)
    forgiven: list[str] = []
    found = configuration.load(source, forgiven=forgiven if forgiving else None, mode=mode)
    if forgiven:
        text = "the configuration is not in order, and this goes on by what it needs of it:\n  "
        output.warn(text + "\n  ".join(forgiven), "`mcpctl config check` tries again")
    import_before(found.auth.token_file)
    return found


def import_before(path: Path) -> None:
    """Root may run an mcpctl that the owner of `path` cannot read. Then all that a command may need is imported before
    it becomes that owner; else nothing is, since it can be imported when it is needed."""
    import os
    import pkgutil
    import sys
    from importlib import import_module

    import mcpctl

    found = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if not _is_root() or os.lstat(found).st_uid == 0 or all(map(_open_to_all, (mcpctl, typer, os))):
        return
    names = [*_LAZY, "mcpctl.server.tls", "mcpctl.server.credentials"]
    names += [module.name for module in pkgutil.walk_packages(mcpctl.__path__, "mcpctl.")]
    apart = ("mcpctl.__main__", "mcpctl.postgres.embedded", "mcpctl.server.", "mcpctl.bridge.")
    for name in names:
        if name in names[: len(_LAZY) + 2] or not name.startswith(apart):
            import_module(name)
    if sys.stdout.isatty():
        import_module("rich.live")
        import_module("rich.table")


_LAZY = ("_strptime", "concurrent.futures.thread", "difflib", "encodings.idna", "getpass", "psycopg", "ruamel.yaml")
"""What libraries, and we, import when it is needed."""


def _open_to_all(module: "ModuleType") -> bool:
    """Whether everybody can get at a module's file."""
    return all(place.stat().st_mode & 0o001 for place in Path(module.__file__ or "/").parents)


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
    from mcpctl import reserve
    from mcpctl.errors import ConfigError, Error, FullError

    if found.audit.on_failure != "refuse":
        return
    try:
        check_log(found)
        if reserve.spent(found.auth.token_file.parent):
            raise FullError("the disk is full: what room is left is for taking rights away", "make room")
    except FullError as problem:
        raise FullError(f"nothing was done: {problem.message}", problem.hint) from None
    except Error as problem:
        raise ConfigError(f"nothing was done: {problem.message}", problem.hint) from None


@contextlib.contextmanager
def undone_when_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, and the process after it: what was unpacked does not stay."""
    import signal

    came: list[int] = []

    def end(number: int, _: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {one: signal.getsignal(one) for one in numbers if signal.getsignal(one) == signal.SIG_DFL}
    try:
        for one in before:
            signal.signal(one, end)
        yield
    finally:
        for one, was in before.items():
            signal.signal(one, was)
        if came:
            signal.raise_signal(came[0])


def note(found: "Settings", event: str, **fields: Any) -> None:
    """An audit line of a command's. A log that cannot be written is a warning: it never stops a revocation."""
    note_all(found, [(event, fields)])


def note_all(found: "Settings", events: list[tuple[str, dict[str, Any]]]) -> None:
    """Several audit lines of one command. What cannot be written now is kept beside the log for the next writer."""
    from mcpctl.cli import output
    from mcpctl.errors import Error

    left = list(events)
    if not left:
        return
    try:
        with _audit_log(found) as log:
            try:
                while left:
                    log.append(left[0][0], transport="cli", **left[0][1])
                    del left[0]
                log.sync()
            except Error as problem:
                lost, held = _keep_all(found, log, left)
                if not lost:
                    later = "it is written there later"
                    if held:
                        later += ", but lost if the server stops before it can be: make room first, or write it down"
                    output.warn(f"done, but not in the audit log yet: {problem.message}", later)
                    return
                told = "the log will say that lines are missing" if log.lose(lost) else "write down what you did"
                output.warn(f"done, but not in the audit log ({lost} of {len(left)} lines): {problem.message}", told)
    except Error as problem:
        output.warn(f"done, but not in the audit log: {problem.message}", problem.hint)


def _keep_all(found: "Settings", log: "AuditLog", left: list[tuple[str, dict[str, Any]]]) -> tuple[int, bool]:
    """Keep these lines for the log; how many of them are lost, and whether a server has some in its memory alone."""
    from mcpctl.errors import Error

    held = False
    for kept, (event, fields) in enumerate(left):
        try:
            held |= _keep(found, log, event, {"transport": "cli", **fields})
        except Error:
            return len(left) - kept, held
    return 0, held


def _keep(found: "Settings", log: "AuditLog", event: str, fields: dict[str, Any]) -> bool:
    """Keep a line beside the log, or, where the disk has no room for that either, in a running server (True)."""
    from mcpctl import control
    from mcpctl.errors import Error

    fields = {"happened_at": log.time(), **fields}
    try:
        log.keep(event, **fields)
        return False
    except Error:
        folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
        if not control.ask_one(folder, {"do": "note", "event": event, "fields": fields}):
            raise
        return True


@contextlib.contextmanager
def _audit_log(found: "Settings") -> "Iterator[AuditLog]":
    from mcpctl.audit import log as audit_log
    from mcpctl.identity.tokens import utcnow

    if found.by_root:
        _refuse_links_of_log(found)
    key, spare = audit_log.read_key(found.audit.key_file), found.auth.token_file.parent
    log = audit_log.AuditLog(found.audit.file, key, utcnow, spare=spare)
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

    who = context.find_root().obj.who
    return f"{masked(reason)}; by {who}" if reason else f"by {who}"


_ASKED_AT_ONCE = 1000


def proof(found: "Settings", names: list[str], user: str | None = None) -> tuple[str, dict[str, Any] | None]:
    """What the running servers did about ended tokens, and whatever else this user has come in with, waiting 2 s at
    most: as words, and as values."""
    answers = asked_to_settle(found, names, user)
    if answers:
        return told(answers)
    _say_where_one_may_run(found)
    return "no server runs", None


def _say_where_one_may_run(found: "Settings") -> None:
    """A server whose control sockets are elsewhere, such as by a drop-in of its unit, is not asked; it has its store
    open, where it has one."""
    from contextlib import closing

    from mcpctl import control
    from mcpctl.cli import output
    from mcpctl.state import State

    store = found.server.state_file
    if store.exists() and os.access(store, os.W_OK):
        with closing(State(store)) as state:
            if not state.is_alone():
                folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
                output.warn(
                    f"no server listens in {folder}, and another process has {store} open",
                    "a server with another server.runtime_dir sees the files by itself, within a second; "
                    f"who it is: fuser -v {store}",
                )


def asked_to_settle(found: "Settings", names: list[str], user: str | None = None) -> list[dict[str, Any]]:
    """What each of the running servers has cut of these tokens and sessions, which have ended, and of whatever else
    this user has come in with."""
    from mcpctl import control

    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    answers = control.ask_all(folder, {"do": "settle", "tokens": names[:_ASKED_AT_ONCE], "user": user})
    for begin in range(_ASKED_AT_ONCE, len(names) if answers else 0, _ASKED_AT_ONCE):
        answers += control.ask_all(folder, {"do": "settle", "tokens": names[begin : begin + _ASKED_AT_ONCE]})
    return answers


def living_tokens(found: "Settings") -> dict[str, list["Token"]]:
    """The living tokens of each user, a disabled one's too, and none of an earlier user of that name."""
    from mcpctl.identity import tokens, users

    now, people = tokens.utcnow(), users.user_file(found.auth.user_file).current()
    living: dict[str, list[Token]] = {}
    for token in tokens.token_file(found.auth.token_file).current().values():
        if token.user is not None and tokens.standing(token, people, now) in ("active", "expiring", "disabled"):
            living.setdefault(token.user, []).append(token)
    return living


def proof_of_user(found: "Settings", user: str, sessions: "Iterable[str]" = ()) -> tuple[str, dict[str, Any] | None]:
    """What the running servers did about what a user has lost, as `proof` tells it; `sessions` are theirs."""
    return proof(found, [*(token.id for token in living_tokens(found).get(user, [])), *sessions], user)


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
