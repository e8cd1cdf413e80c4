"""Whether there is a backup to restore from, where the config says that there are some; and what a restore left."""

import shlex
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from mcpctl.backup import names, restoring
from mcpctl.diagnosis.patient import Check, Finding, Mend, Patient, some

OLD = timedelta(days=2)
"""One night's run may have been missed, as where the machine was off."""


def backups(patient: Patient) -> Iterator[Finding]:
    """When the newest was made, and whether a run without anybody there could make one."""
    check, wanted = Check("backups"), patient.settings.backup
    if wanted.directory is None:
        yield check.skip("no backup.directory is configured", "docs/backup.md")
        return
    if not wanted.recipients:
        hint = "name a public key: backup.recipients: [age1…]; docs/backup.md says how to make one"
        yield check.warn("backups.no-recipient", "backup.recipients is empty, so that no timer can make one", hint)
    if not wanted.directory.is_dir():
        hint = "`mcpctl backup` makes it; or is a disk not mounted?"
        yield check.warn("backups.no-folder", f"there is no folder {wanted.directory} for backups", hint)
        return
    newest = names.newest(wanted.directory)
    hint = "systemctl status mcpctl-backup.timer mcpctl-backup.service; by hand: mcpctl backup"
    if newest is None:
        yield check.warn("backups.none", f"there is no backup in {wanted.directory}", hint)
        return
    when = f"{newest:%Y-%m-%d %H:%M} UTC"
    if patient.now - newest > OLD:
        what = f"the newest backup in {wanted.directory} is of {when}, more than {OLD.days} days ago"
        yield check.warn("backups.old", what, hint)
    elif wanted.recipients:
        yield check.ok(f"the newest in {wanted.directory} is of {when}")


def interrupted(journal: Path) -> Finding:
    """What is said of a restore whose journal still stands."""
    what, hint = f"a restore was interrupted, and half of it is done: {journal}", "finish it, as the same user"
    return Check("restores").fail("restores.unfinished", what, f"{hint}: mcpctl restore FILE")


def restores(patient: Patient) -> Iterator[Finding]:
    """Whether a restore was interrupted, and what one that was killed has left."""
    check = Check("restores")
    if (journal := restoring.unfinished(patient.settings)) is not None:
        yield interrupted(journal)
    elif left := restoring.unpacked(patient.settings):
        what = (
            f"the content of a backup, keys and all, left unpacked by a restore that was killed: {some(map(str, left))}"
        )
        mend = Mend(f"rm -r {some(map(str, left))}", partial(restoring.remove, left))
        yield check.fail("restores.unpacked", what, f"rm -r {shlex.quote(str(left[0]))}", mend)
