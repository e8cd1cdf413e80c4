"""mcpctl audit verify, rotate: is the log whole, and a new file for it."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NamedTuple

import typer

from mcpctl.cli import output
from mcpctl.cli.audit import app
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, settings

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from mcpctl.audit.anchors import Anchor, Strange
    from mcpctl.audit.verify import Fault, Report
    from mcpctl.config_keys import Settings

_STAMPED = re.compile(r"\.[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")
"""How `rotate` ends a name."""


@app.command("verify")
def verify(
    context: typer.Context,
    anchors: Annotated[
        str | None,
        typer.Option(
            "--anchors", metavar="FILE", help="Any text with anchors in it, such as the server's log; - for stdin."
        ),
    ] = None,
    kept: Annotated[
        str | None,
        typer.Option("--kept", metavar="90d", help="Lines older than that may be gone: they are removed on purpose."),
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option("--ignore-key", metavar="ID", help="Leave out anchors of this key_id: another installation's."),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say whether the audit log is whole, and if not, name the first line that was changed, removed, added or moved.

    Exits 1 where it is not. Goes through all files, packed ones (.gz) too, and writes nothing.

    Example: journalctl -u mcpctl -o cat | mcpctl audit verify --anchors -
    """
    import dataclasses

    from mcpctl.audit import log as audit_log
    from mcpctl.audit import verify as audit_verify
    from mcpctl.errors import Error

    since = _kept_since(kept)
    text = _opened(anchors)  # the caller's: before root is given up
    found = settings(context, config)
    key = audit_log.read_key(found.audit.key_file)
    elsewhere = known_ends(found, key, anchors or "", text, ignore_key or ())
    report = audit_verify.verify(found.audit.file, key, elsewhere.anchors, since)
    report.remarks += elsewhere.remarks
    report.fault = fault = report.fault or elsewhere.fault()
    if json:
        output.put_json({"whole": fault is None, **dataclasses.asdict(report)})
        if fault is not None:
            raise typer.Exit(1)
        return
    for remark in report.remarks:
        output.warn(remark)
    if fault is not None:
        hint = "say how long you keep lines, such as --kept 90d, if you remove old files on purpose"
        more = hint if fault.kind == "missing" and kept is None else "keep all files as they are; see docs/audit.md"
        raise Error(f"the audit log is not whole: {fault.kind}: {fault}", more)
    _tell(report)


def _kept_since(kept: str | None) -> "datetime | None":
    from datetime import timedelta

    from mcpctl.config_values import duration
    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import utcnow

    if kept is None:
        return None
    try:
        return utcnow() - timedelta(seconds=duration(kept))
    except (ValueError, OverflowError):
        raise UsageError(f"--kept {kept!r} is no duration", "say how long lines are kept, such as 90d") from None


def _opened(anchors: str | None) -> BinaryIO | None:
    from mcpctl.errors import NotFoundError

    if anchors is None or anchors == "-":
        return sys.stdin.buffer if anchors else None
    try:
        return Path(anchors).open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {anchors}", "name the file with the server's log, or -") from None


class Elsewhere(NamedTuple):
    """Where the log ended, as others know it; what looks like an anchor, and is not of this key; what is to be said;
    and the text in which anchors were looked for in vain."""

    anchors: "list[Anchor]"
    strange: "list[Strange]"
    remarks: list[str]
    without: str | None

    def fault(self) -> "Fault | None":
        """What is wrong with the anchors themselves."""
        from mcpctl.audit.verify import Fault

        if self.strange:
            first, many = self.strange[0], len(self.strange)
            reason = (
                f"{many} {'anchor' if many == 1 else 'anchors'} of another key, the first of key_id {first.key_id}: "
                "the log or its key was replaced, or these are another log's (then --ignore-key), or forged"
            )
            return Fault("changed", first.source, first.line, first.seq, reason)
        if self.without is not None:
            return Fault("cut", self.without, 0, None, "there is no anchor of this log in it, and there should be one")
        return None


def known_ends(
    found: "Settings", key: bytes, name: str = "", text: BinaryIO | None = None, ignored: "Collection[str]" = ()
) -> Elsewhere:
    """Where the log ended, as others know it. All of it is older than the look at the log that follows."""
    from mcpctl import control
    from mcpctl.audit import anchors
    from mcpctl.errors import Error

    name = "stdin" if name == "-" else name
    known, strange = anchors.read(key, text or (), name, ignored)
    elsewhere = Elsewhere(known, strange, [], name if text is not None and not known else None)
    if found.audit.anchor_file is not None:
        more: list[anchors.Anchor] = []
        try:
            more, others = anchors.read_file(key, found.audit.anchor_file, ignored)
            known += more
            strange += others
        except Error as problem:
            elsewhere.remarks.append(f"audit.anchor_file: {problem.message}")
        if not more:  # a server writes one when it starts, and whoever cuts the log off would empty this file, too
            elsewhere = elsewhere._replace(without=elsewhere.without or str(found.audit.anchor_file))
    answers = control.ask_all(control.folder_of(found.server.runtime_dir, found.auth.token_file), {"do": "audit_end"})
    for answer in answers:
        if isinstance(seq := answer.get("seq"), int):
            source = f"the running server, pid {answer.get('pid')}"
            known.append(anchors.Anchor(seq, str(answer.get("hash")).encode(), None, source))
    if silent := sum("error" in answer for answer in answers):
        elsewhere.remarks.append(f"{silent} of {len(answers)} server processes did not say where the log ends for them")
    return elsewhere


def _tell(report: "Report") -> None:
    many = f"{report.lines} {'line' if report.lines == 1 else 'lines'}"
    numbers = f", seq {report.first} to {report.last}, in {', '.join(report.files)}" if report.lines else ""
    output.put(f"whole: {many}{numbers}")
    if report.lines:
        output.put(f"the last hash is {report.hash}")
    if report.anchors:
        agree = "1 anchor agrees" if report.anchors == 1 else f"{report.anchors} anchors agree"
        output.put(f"{agree}, up to seq {report.anchored}")
    else:
        output.put("no anchor: a tail that was cut off would not be seen")


@app.command("rotate")
def rotate(
    context: typer.Context,
    gzip: Annotated[
        bool, typer.Option("--gzip", help="Also pack what earlier rotations have moved away, but the newest of it.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Move the audit log away, to a name that ends with the time, and go on in a new file; prints the new name.

    The chain goes on. Servers need not be told. An empty log stays where it is.
    """
    from mcpctl.audit import files as audit_files
    from mcpctl.audit import log as audit_log
    from mcpctl.audit.anchors import Anchors
    from mcpctl.identity.tokens import utcnow

    found = settings(context, config)
    key, spare = audit_log.read_key(found.audit.key_file), found.auth.token_file.parent
    log = audit_log.AuditLog(found.audit.file, key, utcnow, spare=spare)
    try:
        moved = log.rotate(f"; {by_whom(context)}")
        log.sync()
        if moved is not None and found.audit.anchor_file is not None:
            Anchors(log, found.audit.anchor_file, utcnow, say=lambda line: None).write()
    finally:
        log.close()
    packed = []
    if gzip:
        ours = [one for one in audit_files.older(found.audit.file)[0] if _is_ours(one, found.audit.file)]
        packed = [done for one in reversed(ours[1:]) if (done := audit_files.pack(one)) is not None]
    if json:
        output.put_json({"moved": str(moved) if moved else None, "packed": [str(one) for one in packed]})
        return
    if moved is None:
        output.say("the audit log is empty: nothing was moved")
    for one in ([moved] if moved else []) + packed:
        output.put(str(one))


def _is_ours(one: Path, log: Path) -> bool:
    return bool(_STAMPED.fullmatch(one.name.removeprefix(log.name)))
