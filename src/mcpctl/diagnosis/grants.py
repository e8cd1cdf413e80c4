"""Each grant: whether PostgreSQL has what is recorded, and what only an administrator may see."""

from collections.abc import Iterator
from contextlib import closing

from mcpctl.diagnosis.databases import clock, guard_nothing, open_still, version
from mcpctl.diagnosis.patient import Check, Finding, Patient
from mcpctl.errors import UnavailableError
from mcpctl.granting import Granting
from mcpctl.identity import tenants
from mcpctl.identity.grants import ACCESSES, PENDING, Grant, login_role
from mcpctl.postgres import administrator, arithmetic, hba, roles
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.differences import BY_HAND
from mcpctl.postgres.roles import GONE


def grants(patient: Patient, check: Check) -> Iterator[Finding]:
    """Of a database whose roles are per user."""
    granting, name = patient.granting(), check.about or ""
    asked: set[str] = set()
    for user in granting.people().values():
        grant = user.grants.get(name)
        if grant is None:
            continue
        wrong = granting.disagreements(user, grant, patient.dsns)
        for one in wrong:
            yield check.fail("grants.differ", one, _remedy(one, user.name, grant))
        if not wrong:
            yield check.ok(f"{user.name}: PostgreSQL has what is recorded")
        connection = granting.connection(user, grant, patient.dsns)
        if connection is None:
            continue
        with closing(connection):
            for access in ACCESSES:
                role = login_role(user.name, access)
                if grant.has(access) and f"{role}: is not there" not in wrong:
                    yield from open_still(check, connection, role, functions=access not in asked)
                    asked.add(access)
    for sentence, database in _strays(patient, granting, name).items():
        there = Check("database", database)
        if sentence.startswith((f"{hba.GROUP}:", f"{roles.HEIR}:")):
            yield there.fail("grants.group", sentence, "REVOKE it")
        else:
            yield there.warn("grants.stray", sentence, "DROP OWNED BY and DROP ROLE it, or add the user again")
    yield from _administered(patient, granting, check)


def _strays(patient: Patient, granting: Granting, name: str) -> dict[str, str]:
    """By sentence, where each stray of the cluster was seen; they are told of the first database there that answers."""
    found: dict[str, str] = {}
    first = None
    for one in filter(patient.dsns.__contains__, granting.cluster(name)):
        try:
            there = granting.strays(patient.dsns, (one,))
        except UnavailableError:
            if one == name:
                raise
            continue  # its own check tells it
        first = first or one
        if first != name:
            return {}
        for database, sentence in there:
            found.setdefault(sentence, database)
    return found


def _remedy(sentence: str, user: str, grant: Grant) -> str:
    if BY_HAND in sentence:
        return "run that SQL as a superuser"
    if GONE in sentence:
        return "take it back so, or make it and grant it again"
    if grant.state is not None:  # to grant it again would give back what is being taken
        change = "grant" if grant.state == PENDING else "ungrant"
        return f"have the SQL run that `mcpctl user {change}` printed in {grant.database}; then: mcpctl grant diff"
    return f"mcpctl user grant {user} … again mends it; `mcpctl grant diff` shows all"


def _administered(patient: Patient, granting: Granting, check: Check) -> Iterator[Finding]:
    """What only an administrator may see."""
    name = check.about or ""
    if name not in patient.dsns and patient.admin_unread:
        yield check.skip(f"nobody looked at pg_hba.conf and the connections: {administrator.FILE} could not be read")
        return
    if name not in patient.dsns:
        hint = f"put a connection string into {administrator.FILE}, or look yourself: docs/users-and-grants.md"
        what = "without an administrator nobody looked at pg_hba.conf and the connections"
        yield check.warn("grants.no-administrator", what, hint)
        return
    who = Administrator.of(patient.dsns, granting.logins.host(name))
    with who.connected() as connection:
        yield from guard_nothing(patient, check, connection)
        yield from version(check, connection.info.parameter_status("server_version") or "0", patient)
        yield from clock(patient, connection)
        room, worst = arithmetic.room(connection), granting.worst(name)
        what = f"all grants could hold {worst} connections, and it has {room} to give"
        if worst <= room:
            yield check.ok(what)
        else:
            hint = f"lower databases.{name}.pool.max_per_user, or raise max_connections"
            yield check.warn("grants.connections", what, hint)
        places = tenants.tenant_file(patient.settings.auth.tenant_file).current().values()
        theirs = [one for one in places if one.database == name and one.own]
        public = [one for one in theirs if administrator.public_may_use(connection, one.own or "")]
        kept = administrator.keeps_logins_here(connection, name)
    for place in public:
        what, hint = f"PUBLIC may use {place.where}, and so may every tenant", f"REVOKE ALL ON SCHEMA {place.schema}"
        yield check.fail("grants.public-schema", what, f"{hint} FROM PUBLIC")
    if kept is not None:
        yield check.warn("grants.hba", kept.message, kept.hint or "see docs/users-and-grants.md")
    elif not who.warnings:
        yield check.ok("pg_hba.conf keeps the users' login roles to mcpctl")
    for unseen in who.warnings:
        yield check.warn(
            "grants.unseen", unseen, "a superuser sees it: docs/users-and-grants.md says which right it is"
        )
