"""Whether a tenant's database, or one with canaries, has a second name."""

from collections.abc import Iterator

from mcpctl.diagnosis.patient import Check, Finding, Patient, some
from mcpctl.errors import Error
from mcpctl.granting import Granting
from mcpctl.identity import tenants
from mcpctl.postgres import trial
from mcpctl.postgres.administrator import Administrator


def canary_tables(patient: Patient, name: str) -> list[str]:
    """The canaries in that database, as schema.table."""
    return [one[len(name) + 1 :] for one in patient.settings.canaries.tables if one.startswith(f"{name}.")]


def second_names(patient: Patient) -> Iterator[Finding]:
    """By the config, as for the server, and by what answers."""
    check, granting, config = Check("tenants"), patient.granting(), patient.settings.databases
    every = tenants.tenant_file(patient.settings.auth.tenant_file, granting.logins.twins).current().values()
    theirs = {one.database for one in every} & config.keys()
    watched = {name for name in config if canary_tables(patient, name)}
    if not theirs | watched or len(config) < 2:
        return
    seen = {name: _answering(patient, granting, name) for name in config}
    for name in sorted(theirs):
        for other in [one for one in config if one != name and seen[one] == seen[name] is not None]:
            what = f"{other} is in PostgreSQL the same as {name}, where a tenant is"
            hint = "leave one of them in the config: a tenant's database has one name"
            yield check.fail("tenants.second-name", what, hint)
    for name in sorted(watched):
        for other in [one for one in config if one != name and seen[one] == seen[name] is not None]:
            apart = name not in granting.logins.twins.get(other, ())
            if apart and set(canary_tables(patient, name)) - set(canary_tables(patient, other)):
                what = f"{other} is in PostgreSQL the same as {name}, whose canaries are not seen there"
                hint = "write the host of both alike, or name the canaries for both"
                yield check.warn("tenants.canaries-unseen", what, hint)
    if unseen := [name for name, answering in seen.items() if answering is None]:
        what = f"nobody could see whether another database is in PostgreSQL the same as {some(unseen)}"
        yield check.warn("tenants.unseen", what, f"mcpctl database test {unseen[0]}")


def _answering(patient: Patient, granting: Granting, name: str) -> tuple[str, int] | None:
    """What tells a database of the config from all others; None where nobody was let in to look."""
    logins = granting.logins
    if about := trial.one_of((*logins.own(name), *logins.of_people(name, granting.people()))):
        return about.answering
    try:
        with Administrator.of(patient.dsns, logins.host(name)).connected() as connection:
            return trial.answering(connection)
    except Error:
        return None
