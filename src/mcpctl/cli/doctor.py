"""mcpctl doctor: is the installation healthy?"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption

if TYPE_CHECKING:
    from pathlib import Path

    from mcpctl.config_keys import Settings
    from mcpctl.diagnosis.mending import Mended
    from mcpctl.diagnosis.patient import Finding

_STATUS = {"ok": "ok", "warn": "warning", "fail": "failed", "skip": "skipped"}


def doctor(
    context: typer.Context,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="Mend what can be without giving a right or losing anything, and say so; then look again."
        ),
    ] = False,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Also make calls with the token in this file (- for stdin), through the server to each database.",
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Look at everything: files, keys, secrets in the open, databases, grants, and what is still open in PostgreSQL.

    Without --fix nothing is changed. Exits 1 where something is wrong; a warning is something to know.

    Example: mcpctl doctor --fix
    """
    visit = Visit(context, config, _token(token_file))
    visit.arrive(fix)
    found = visit.examine()
    if fix:
        found = visit.mend(found)
    healthy = all(one.status != "fail" for one in found)
    if json:
        output.put_json(_as_json(healthy, found, visit.mended))
    else:
        for one in visit.mended:
            output.say(f"{'NOT mended' if one.problem else 'mended'}: {one.name}: {one.problem or one.words}")
        rows = [(one.status, one.check, one.what, one.hint) for one in found]
        shown = [[" ".join((cell or "").split("\n")) for cell in row] for row in rows]  # some have lines
        output.put_table(["STATUS", "CHECK", "WHAT", "WHAT TO DO"], shown)
    if not healthy:
        raise typer.Exit(1)


def _token(file: str | None) -> str | None:
    """The token, read before root is given up."""
    from mcpctl.cli.common import read_secret
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens

    if file is None:
        return None
    text = read_secret(file).decode("utf-8", "replace").strip()
    if tokens.token_id(text) is None:
        raise UsageError(f"--token-file {file} holds no token of mcpctl's", "the token that `token add` printed")
    return text


def _is_root() -> bool:
    """Whether nothing is closed to us. On Windows there is no such user, and no sudo either."""
    import os

    return not hasattr(os, "geteuid") or os.geteuid() == 0


def _as_root(found: "Finding") -> "Finding":
    """What may only be closed to us."""
    return replace(found, hint=f"{found.hint}; where it is a service's: sudo mcpctl doctor")


def _as_json(healthy: bool, found: "list[Finding]", mended: "list[Mended]") -> dict[str, Any]:
    return {
        "ok": healthy,
        "checks": [
            {
                "name": one.name,
                "check": one.check,
                "status": _STATUS[one.status],
                "message": one.what,
                "hint": one.hint,
                "fixable": one.mend is not None,
            }
            for one in found
        ],
        "mended": [{"name": one.name, "what": one.words, "problem": one.problem} for one in mended],
        "findings": [
            {"check": one.check, "status": one.status, "what": one.what, "hint": one.hint}
            for one in found
            if one.status != "skip"
        ],
    }


@dataclass
class Visit:
    """The installation, as far as it can be read. Root looks at its own files first, and then becomes the owner of the
    others, as every command does."""

    context: typer.Context
    config: "Path | None"
    token: str | None = field(default=None, repr=False)
    settings: "Settings | None" = None
    admin: "Path | None" = None
    dsns: dict[str, str] = field(default_factory=dict)
    early: "list[Finding]" = field(default_factory=list)
    mended: "list[Mended]" = field(default_factory=list)
    unread: bool = False
    pruned: bool = False
    by_root: bool = field(default_factory=_is_root)  # who became the files' owner since is root no more

    def arrive(self, fix: bool) -> None:
        """Read what there is; what cannot be is a finding."""
        import os

        from mcpctl import config as configuration
        from mcpctl.cli import administration
        from mcpctl.diagnosis import backups, mending, modes
        from mcpctl.diagnosis.patient import Check
        from mcpctl.errors import Error
        from mcpctl.identity.lockdown import UNFINISHED
        from mcpctl.postgres import administrator

        source = configuration.find(self.config or self.context.find_root().obj.config, os.environ)
        self.early = list(modes.early(source))
        if fix:
            self.mended = mending.mend(self.early)
            self.early = list(modes.early(source))
        check = Check("administrator")
        lines: administrator.Lines = {}
        if source is not None:
            self.admin = source.parent / administrator.FILE
            try:
                self.unread = administration.closed(self.admin)  # as for the daily check, which is the service's
                lines = {} if self.unread else administration.lines_of(self.admin)
            except Error as problem:
                self._unread(check.broken(problem))
        self._load()
        if self.settings is None and source is not None and os.path.lexists(source.with_name(UNFINISHED)):
            self.early.append(backups.interrupted(source.with_name(UNFINISHED)))  # it took the config away, at first
        if self.settings is not None and self.admin is not None:
            try:
                self.dsns = administrator.by_database(self.admin, lines, self.settings)
            except Error as problem:
                self._unread(check.broken(problem))

    def _unread(self, found: "Finding") -> None:
        self.early.append(found)
        self.unread = True

    def _load(self) -> None:
        """The configuration, whoever may read its file; of one with faults in it what is right."""
        from mcpctl.cli import common
        from mcpctl.diagnosis.patient import Check
        from mcpctl.errors import Error

        for forgiving in (False, True):
            try:
                found = common.settings(self.context, self.config, needs_log=False, forgiving=forgiving, mode=0o644)
            except Error as problem:
                if not forgiving:
                    broken = Check("config").broken(problem)
                    self.early.append(broken if self.by_root else _as_root(broken))
                continue
            except OSError as problem:
                name, hint = problem.filename or "a file", "run as the owner of mcpctl's files, or as root"
                self.early.append(Check("config").broken(Error(f"{name}: {problem.strerror}", hint)))
                return
            self.settings = found
            self.pruned = forgiving
            if forgiving:
                self.early.append(Check("databases").skip("left out until the configuration is mended"))
            return

    def examine(self) -> "list[Finding]":
        """All that is found now."""
        import os

        from mcpctl.diagnosis.examine import alone, examine
        from mcpctl.diagnosis.patient import Patient
        from mcpctl.identity import tokens

        now = tokens.utcnow()
        if self.settings is None:
            return alone(now, self.early)
        patient = Patient(self.settings, self.dsns, self.admin, now, os.environ)
        patient = replace(patient, admin_unread=self.unread, pruned=self.pruned, token=self.token)
        return examine(patient, self.early)

    def mend(self, found: "list[Finding]") -> "list[Finding]":
        """Do what can be done, write it down, and look again."""
        from mcpctl.cli.common import by_whom, note_all
        from mcpctl.diagnosis import mending

        known = set(self.early)
        self.mended += mending.mend(one for one in found if one not in known)
        done = [one for one in self.mended if one.problem is None]
        if not done:
            return found
        if self.settings is None:
            output.warn("done, but not in the audit log: without the config nobody knows where it is")
            return found
        whom = by_whom(self.context)
        note_all(self.settings, [("doctor.mended", {"reason": f"{one.name}: {one.words}; {whom}"}) for one in done])
        return self.examine()
