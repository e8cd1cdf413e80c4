"""Each database: its logins, what they may do there, and what is to be seen through them."""

from collections.abc import Iterator
from contextlib import closing
from time import monotonic

from mcpctl.diagnosis.patient import Check, Finding, Patient, some
from mcpctl.diagnosis.tenancy import canary_tables
from mcpctl.errors import Error
from mcpctl.identity import tenants
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator, arithmetic, harden, look, trial
from mcpctl.postgres.administrator import Connection
from mcpctl.postgres.login import Login, is_here
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.trial import About

_SKEW, _FAR = 5.0, 60.0
"""Seconds that two clocks may differ; from the second on tokens end, and lines are dated, too wrongly."""


def database(patient: Patient, check: Check) -> Iterator[Finding]:
    """The config's own logins there."""
    name = check.about or ""
    for login in Logins({name: patient.settings.databases[name]}, Keyring(patient.settings.keyring.file)).own(name):
        try:
            about = trial.log_in(login)
        except Error as problem:
            fault = "database.pooler" if "pooler" in problem.message else "database.unreachable"
            hint = problem.hint or "see PostgreSQL's own log"
            yield check.fail(fault, problem.message, hint, cause=problem.message)
            continue
        yield check.ok(f"{about.user} logs in: {about.words()}")
        yield from _powers(check, login, about)
        yield from _way(check, login, about)
        yield from version(check, about.version, patient)
        connection = administrator.connect_as(login)
        if connection is None:
            continue
        with closing(connection):
            yield from guard_nothing(patient, check, connection)
            if not about.privileged:
                yield from open_still(check, connection, None)
                yield from _writes(check, about, connection)
            yield from _others_schemas(patient, check, about, connection)
            yield from _room(patient, check, connection)
            yield from clock(patient, connection)


def _powers(check: Check, login: Login, about: About) -> Iterator[Finding]:
    try:
        about.check(login)
    except Error as problem:
        yield check.fail("database.privileged", problem.message, problem.hint or "")


def _way(check: Check, login: Login, about: About) -> Iterator[Finding]:
    """How it is reached."""
    if is_here(login.place[0]):
        return
    if about.tls is None:
        what = f"what {about.user} asks and reads there goes in clear over the network"
        yield check.warn("database.clear", what, "turn ssl on in PostgreSQL, and say sslmode: verify-full")
    elif login.about()["sslmode"] in ("require", "prefer"):
        hint = "say sslmode: verify-full, with sslrootcert where the CA is your own"
        what = "nobody checks who the other side is (sslmode require)"
        yield check.warn("database.sslmode", what, hint)


def version(check: Check, told: str, patient: Patient) -> Iterator[Finding]:
    """Whether that PostgreSQL is one that mcpctl is made for, and that its makers look after."""
    major = int(told.partition(".")[0])
    if major < look.OLDEST:
        what = f"it is PostgreSQL {told}, and mcpctl is made for {look.OLDEST} and later"
        yield check.fail("database.old", what, "move it to a later one (pg_upgrade)")
    elif (ends := look.ENDS.get(major)) is not None and patient.now.date() > ends:
        what = f"it is PostgreSQL {told}, which gets no more security updates from its makers, since {ends}"
        yield check.warn("database.old", what, "move it to a later one (pg_upgrade)")


def _writes(check: Check, about: About, connection: Connection) -> Iterator[Finding]:
    """The config's own login is for reading. That the server lets it write nothing is a second wall, not the first."""
    if writable := look.writable(connection):
        what = f"{about.user}, who is to read, may also write: {some(writable)}"
        hint = f'REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON {writable[0]} FROM "{about.user}"; or its groups, or PUBLIC'
        yield check.warn("database.can-write", what, f"{hint}; where it owns them, take another role")


def guard_nothing(patient: Patient, check: Check, connection: Connection) -> Iterator[Finding]:
    """Canaries that are no table there."""
    name = check.about or ""
    for one in administrator.missing(connection, canary_tables(patient, name)):
        what = f"the canary {name}.{one} is no table or view there, and guards nothing"
        hint = "canaries.tables takes names as PostgreSQL has them, without quotes"
        yield check.warn("database.no-canary", what, hint)


def open_still(check: Check, connection: Connection, role: str | None, *, functions: bool = True) -> Iterator[Finding]:
    """What a login could do behind its privileges' back; `functions`: with what every login may execute."""
    found = harden.still_open(connection, role) if functions else []
    if found:
        shown = some([one for one, _ in found])
        hint = f"mcpctl database harden {check.about} shows the SQL that takes them from PUBLIC"
        yield check.warn("database.functions", f"{role or 'the login'} may still execute {shown}", hint)
    for one in harden.definers(connection, role):
        who = f"{one.owner}, a superuser" if one.superuser else one.owner
        what = f"{one.signature} acts with the rights of {who} (SECURITY DEFINER)"
        hint = "see what it does; REVOKE EXECUTE ON FUNCTION … FROM PUBLIC, if it is not meant for all"
        yield check.warn("database.definer", what, hint)
    for view in harden.views(connection, role):
        what = f"the view {view.schema}.{view.name} reads as {view.owner}, whom no row policy stops"
        hint = "ALTER VIEW … SET (security_invoker = true), or give it to another owner"
        yield check.warn("database.view", what, hint)


def _others_schemas(patient: Patient, check: Check, about: About, connection: Connection) -> Iterator[Finding]:
    places = tenants.tenant_file(patient.settings.auth.tenant_file).current().values()
    for place in places:
        if place.database == check.about and place.own and administrator.may_use(connection, place.own):
            what = f"{about.user} may use {place.where}, which is the tenant {place.name}'s"
            hint = f'REVOKE ALL ON SCHEMA {place.schema} FROM "{about.user}", PUBLIC; and from its groups'
            yield check.fail("database.tenants-schema", what, hint)


def _room(patient: Patient, check: Check, connection: Connection) -> Iterator[Finding]:
    room = arithmetic.room(connection)
    if (most := patient.settings.limits.connections) > room:
        what = f"limits.connections is {most}, and it has {room} to give"
        yield check.warn("database.connections", what, "lower limits.connections, or raise max_connections")


def clock(patient: Patient, connection: Connection) -> Iterator[Finding]:
    """Whether PostgreSQL's machine and this one agree on the time. The way there counts for nothing."""
    before, begun = patient.present(), monotonic()
    theirs = look.time(connection)
    way = monotonic() - begun
    ahead = (theirs - before).total_seconds()
    skew = ahead if ahead < 0 else max(0.0, ahead - way)
    if abs(skew) <= _SKEW:
        return
    check = Check("clock")
    what = f"PostgreSQL's clock is {abs(skew):.0f} seconds {'ahead of' if skew > 0 else 'behind'} this machine's"
    hint = "see both with `timedatectl`, and have them kept: systemd-timesyncd or chrony"
    yield (check.fail if abs(skew) > _FAR else check.warn)("clock.skew", what, hint)
