"""The audit log: whether it is whole, and can be written."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mcpctl.audit import anchors, files, late, verify
from mcpctl.audit import log as audit_log
from mcpctl.diagnosis.patient import Check, Finding, Mend, Patient
from mcpctl.errors import Error

LARGEST = 256 << 20
"""Bytes of the log that are gone through in passing; some seconds."""
_AHEAD = timedelta(seconds=60)


def audit(patient: Patient) -> Iterator[Finding]:
    """Whether the log's end is this key's, every line is as it was written, and nothing waits to be written."""
    check, settings = Check("audit"), patient.settings.audit
    key = audit_log.read_key(settings.key_file)
    end = files.end_of(settings.file, audit_log.key_id(key))
    if end is None:
        yield check.ok("no line has been written yet")
    else:
        yield from _whole(check, patient, key)
        yield from _ahead(check, patient)
    waiting = [one for one in late.places(settings.file, patient.settings.auth.token_file.parent) if late.waits(one)]
    if waiting:
        what = f"lines wait in {waiting[0]}: the log could not be written when they were"
        mend = Mend("have the lines that wait written into the log", lambda: None)  # each that is written takes them in
        yield check.warn("audit.late", what, "the next line that is written takes them in", mend)


def _whole(check: Check, patient: Patient, key: bytes) -> Iterator[Finding]:
    settings = patient.settings.audit
    size = sum(one.stat().st_size for one in _all(settings.file))
    if size > LARGEST:
        yield check.skip(f"the log has {size >> 20} MiB, too much to go through now", "mcpctl audit verify")
        return
    known: list[anchors.Anchor] = []
    if settings.anchor_file is not None and settings.anchor_file.exists():
        known, _ = anchors.read_file(key, settings.anchor_file)
    report = verify.verify(settings.file, key, known)
    if report.fault is not None and report.fault.kind != "missing":
        hint = "keep all files as they are, and see docs/audit.md; `mcpctl audit verify` tells more"
        yield check.fail("audit.changed", f"the log is not whole: {report.fault.kind}: {report.fault}", hint)
    elif report.fault is not None:
        hint = "where older files are removed on purpose it is well: mcpctl audit verify --kept 90d"
        yield check.skip(f"the log's beginning is gone: {report.fault}", hint)
    else:
        yield check.ok(f"{report.lines} lines are as they were written")


def _all(path: Path) -> list[Path]:
    older, others = files.older(path)
    return [one for one in (path, *older, *others) if one.is_file()]


def _ahead(check: Check, patient: Patient) -> Iterator[Finding]:
    """Whether the last line is of a time that is still to come."""
    try:
        text = str(next(files.read_back(patient.settings.audit.file), {}).get("time"))
        last = datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)
    except (Error, ValueError):
        return
    if last - patient.now > _AHEAD:
        what = f"the log's last line is of {text}, and this machine says that it is {patient.now:%Y-%m-%dT%H:%M:%SZ}"
        hint = "set the clock (timedatectl), and have it kept: systemd-timesyncd or chrony"
        yield Check("clock").warn("clock.backwards", what, hint)
