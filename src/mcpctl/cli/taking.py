"""What takes a right away where that cannot be written, or not now: the running servers are told."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpctl.cli import output
from mcpctl.cli.common import note_all, proof, told

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.errors import Failures
    from mcpctl.identity.entry_file import EntryFile
    from mcpctl.identity.tokens import Token

WAITED, TOLD = 2.0, 5.0
"""Seconds that another may hold the file until that is said, and until the servers are told."""


@contextlib.contextmanager
def taking(found: "Settings", names: list[str], why: str, path: Path | None = None) -> "Iterator[None]":
    """Around a change of the token file, or of `path`, that ends these tokens. Where it cannot be written, whatever the
    reason, each running server keeps them out until it restarts, and the Error says that this is all that was done
    (exit 1); so does the log, with `why`. Who holds the file is named."""
    from threading import Timer

    from mcpctl import control
    from mcpctl.errors import Error, FullError, NotWrittenError

    file = path or found.auth.token_file
    answers: list[dict[str, Any]] = []

    def bar() -> None:
        folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
        answers.extend(control.ask_all(folder, {"do": "bar", "tokens": names}) if names else [])

    def say() -> None:
        output.say(f"waiting for {_holder(file)} to let go of {file}")

    timers = [Timer(WAITED, say), Timer(TOLD, bar)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except (FullError, NotWrittenError, OSError) as problem:
        said, hint = (problem.message, problem.hint) if isinstance(problem, Error) else (str(problem), None)
        if not answers:
            bar()
        if not answers:
            nobody = "no server runs" if names else "it was not done"
            raise Error(f"{said}; {nobody}", f"{hint or 'look at the disk'}: the files say what they said") from None
        words, _ = told(answers)
        only = f"by the running servers alone, until they restart, since {file.name} could not be written; {why}"
        whose = _users(found)
        note_all(found, [("token.revoked", {"token": id, "user": whose.get(id), "reason": only}) for id in names])
        raise Error(
            f"{said}; but the running servers keep {', '.join(names)} out until they restart ({words})",
            f"{hint or 'look at the disk'}, and run this again: the files still say that it may come in",
            exit_code=1,
        ) from None
    finally:
        for timer in timers:
            timer.cancel()


def revoked(
    found: "Settings",
    names: list[str],
    why: str,
    *,
    file: "EntryFile[Token] | None" = None,
    every: bool = False,
    but: "Collection[str]" = (),
) -> "tuple[list[tuple[Token, bool]], str, dict[str, Any] | None]":
    """Revoke these tokens, which are all but `but` where it is `every` one; write it down; have the servers cut what
    they have open. The entries, with whether each was alive, and what the servers did, as words and as values.
    `file`: that of the tokens, where it was read before, so that no line of it is read twice."""
    from mcpctl.identity import tokens

    with taking(found, names, why):
        file = file or tokens.token_file(found.auth.token_file)
        done = tokens.revoke(file, None if every else names, tokens.utcnow(), but)
    fresh = [entry for entry, alive in done if alive]
    # The servers see the file by themselves meanwhile; whoever interrupts the wait for their proof leaves a record.
    note_all(found, [("token.revoked", {"token": entry.id, "user": entry.user, "reason": why}) for entry in fresh])
    return done, *proof(found, [entry.id for entry, _ in done])


def _users(found: "Settings") -> dict[str, str | None]:
    """Whose each token is, where the file can still be read."""
    from mcpctl.errors import Error
    from mcpctl.identity import tokens

    with contextlib.suppress(Error):
        return {one.id: one.user for one in tokens.token_file(found.auth.token_file).current().values()}
    return {}


def known_of(file: "EntryFile[Token]", ids: list[str], missing: "Failures") -> list[str]:
    """Those of the ids that there are; all, where the disk lets nobody read the file. What is not there beside others
    goes into `missing`; Error where there is none."""
    from mcpctl.errors import NotWrittenError
    from mcpctl.identity import tokens

    known: list[str] = []
    for name in dict.fromkeys(ids):
        with missing:
            try:
                tokens.show(file, name)
            except NotWrittenError as problem:
                output.warn(problem.message)
            known.append(name)
    if not known:
        missing.check()
    return known


def _holder(path: Path) -> str:
    """Which process holds the file's lock, as far as the system says (proc_locks(5))."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                return f"process {words[4]} ({Path(f'/proc/{words[4]}/comm').read_text(encoding='utf-8').strip()})"
    return "another process"
