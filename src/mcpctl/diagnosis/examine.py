"""All checks, one after the other, each alone and for a bounded time; those that go over the network at once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from time import monotonic

from mcpctl.diagnosis import (
    auditing,
    backups,
    calling,
    certificate,
    databases,
    grants,
    issuers,
    keys,
    machine,
    modes,
    people,
    server,
    tenancy,
)
from mcpctl.diagnosis.patient import FAIL, SKIP, Check, Finding, Patient, short
from mcpctl.errors import Error, masked

PATIENCE = 20.0
"""Seconds that one check may take, and all of those over the network together."""
Work = Callable[[], Iterator[Finding]]


def examine(patient: Patient, early: Sequence[Finding] = (), patience: float = PATIENCE) -> list[Finding]:
    """Every finding of every check, after those that were made early. A check that cannot be made is a finding, too."""
    found = here(patient, early, patience)
    return list(dict.fromkeys([*found, *elsewhere(patient, found, patience)]))  # of several logins some are the same


def here(patient: Patient, early: Sequence[Finding] = (), patience: float = PATIENCE) -> list[Finding]:
    """What is found on this machine, without asking anybody."""
    found = list(_told(iter(early), ()))
    for name, work in _HERE.items():
        if patient.pruned and name in _BY_ALL_OF_IT:
            found.append(Check(name).skip("left out until the configuration is mended"))
            continue
        found += _told(_run([(Check(name), partial(work, patient))], patience), found)
    return found


def elsewhere(patient: Patient, before: Sequence[Finding] = (), patience: float = PATIENCE) -> list[Finding]:
    """What is found by asking the server, the issuers and the databases, all at once."""
    return list(_told(_run(list(_elsewhere(patient)), patience), before))


def alone(now: datetime, early: Sequence[Finding]) -> list[Finding]:
    """What is found where there is no configuration to go by."""
    rest = ", ".join(name for name in _HERE if name != "versions")
    left = Check("others").skip(f"without the configuration nobody looked at: {rest}, databases", "mend that first")
    return [*_told(iter(early), ()), left, *machine.versions(now)]


_HERE: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "modes": modes.modes,
    "leftovers": modes.leftovers,
    "disk": machine.disk,
    "backups": backups.backups,
    "restores": backups.restores,
    "lockdown": people.lockdown,
    "files": people.files,
    "state": keys.state,
    "administrator": modes.admin_file,
    "keys": keys.keys,
    "own-databases": keys.own_databases,
    "secrets": keys.secrets,
    "certificate": certificate.certificate,
    "program": machine.program,
    "versions": lambda patient: machine.versions(patient.now),
    "unit": machine.unit,
    "users": people.people,
    "tokens": people.every_token,
    "token-use": people.token_use,
    "audit": auditing.audit,
}


_BY_ALL_OF_IT = ("own-databases", "secrets", "certificate")
"""What cannot be judged by a part of the configuration."""


def _elsewhere(patient: Patient) -> Iterator[tuple[Check, Work]]:
    yield Check("server"), partial(server.server, patient)
    if patient.token is not None:
        yield Check("calls"), partial(calling.calls, patient, patient.token)
    yield Check("tenants"), partial(tenancy.second_names, patient)
    for name in patient.settings.auth.oidc:
        check = Check("issuer", name)
        yield check, partial(issuers.issuer, patient, check)
    for name, database in patient.settings.databases.items():
        check = Check("database", name)
        yield check, partial(databases.database, patient, check)
        if database.roles == "per_user":
            yield check, partial(grants.grants, patient, check)


class _Running:
    """A check in a thread of its own, which is left behind where it hangs."""

    def __init__(self, check: Check, work: Work) -> None:
        self.check, self._work = check, work
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for one in self._work():
                self._found.append(one)
        except Error as problem:
            self._found.append(self.check.broken(problem))
        except Exception as problem:  # noqa: BLE001 - one check that fails is no reason not to make the others
            what = f"it could not be looked at: {type(problem).__name__}: {masked(short(problem))}"
            hint = "look at what it names; where that is in order, it is a fault of mcpctl's: report it"
            self._found.append(self.check.fail(f"{self.check.kind}.broken", what, hint))

    def found(self, left: float, patience: float) -> list[Finding]:
        """What it has found within the seconds that are left of those that it was given."""
        self._thread.join(left)
        if not self._thread.is_alive():
            return self._found
        what = f"it took longer than {patience:.0f} seconds, and was left"
        hint = "what it looks at hangs: a lock, a disk, or the network"
        return [*self._found, self.check.fail(f"{self.check.kind}.slow", what, hint)]


def _run(checks: Sequence[tuple[Check, Work]], patience: float) -> Iterator[Finding]:
    until = monotonic() + patience
    for one in [_Running(check, work) for check, work in checks]:
        yield from one.found(max(0.0, until - monotonic()), patience)


def _told(found: Iterator[Finding], before: Sequence[Finding]) -> Iterator[Finding]:
    """The same, without what only repeats a cause that was told."""
    causes = {one.cause: one for one in before if one.status == FAIL and one.cause is not None}
    for one in found:
        first = next((before for cause, before in causes.items() if cause in one.what), None)
        if one.status == FAIL and first is not None and one.name.endswith((".broken", ".unreachable")):
            what = f"left out until this is mended: {first.what}"
            yield Finding(one.name.partition(".")[0], one.check, SKIP, what)
            continue
        if one.status == FAIL and one.cause is not None:
            causes[one.cause] = one
        yield one
