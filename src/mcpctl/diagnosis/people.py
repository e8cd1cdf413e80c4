"""Users, tenants and tokens, as their files have them, and how the log says that the tokens are used."""

from collections.abc import Iterator, Mapping
from contextlib import closing

from mcpctl.audit import usage
from mcpctl.config_profile import PRODUCTION
from mcpctl.diagnosis.patient import Check, Finding, Patient, some
from mcpctl.errors import Error
from mcpctl.identity import passwords, tenants, tokens, users
from mcpctl.identity.blocked import Blocked, store
from mcpctl.identity.lockdown import Lockdown
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User


def lockdown(patient: Patient) -> Iterator[Finding]:
    """Whether all calls are refused."""
    if (said := Lockdown(patient.settings.auth.token_file).said()) is not None:
        yield Check("lockdown").fail("lockdown.on", said, "mcpctl lockdown --lift")


def files(patient: Patient) -> Iterator[Finding]:
    """Whether each file can be read, and each name in one is known to the others."""
    check, auth = Check("files"), patient.settings.auth
    who, what, where = (
        users.user_file(auth.user_file),
        tokens.token_file(auth.token_file),
        tenants.tenant_file(auth.tenant_file),
    )
    broken = False
    for read in (who.current, what.current, where.current):
        try:
            read()
        except Error as problem:
            broken = True
            yield check.broken(problem)
    if broken:
        return
    people, every, places = who.current(), what.current(), where.current()
    yield check.ok(f"{len(every)} tokens, {len(people)} users, {len(places)} tenants")
    if patient.pruned:
        return
    if not patient.settings.databases:
        yield check.warn("files.no-database", "the config names no database", "mcpctl database add NAME …")
    yield from _members(check, patient, people, places)
    for key, stranger in users.listed_strangers(auth, people):
        hint = "mend the name in the config, or take it out: whoever is made a user by that name is on the list, too"
        yield check.fail("files.unknown-user", f"{key} names {stranger}, and there is no such user", hint)
    for place in places.values():
        yield from _place(check, patient, place, people, places)


def _members(
    check: Check, patient: Patient, people: Mapping[str, User], places: Mapping[str, Tenant]
) -> Iterator[Finding]:
    for user in people.values():
        if user.tenant is not None and user.tenant not in places:
            what, hint = f"{user.name} belongs to the tenant {user.tenant}, which is gone", tenants.gone_hint(user)
            yield check.fail("files.tenant-gone", what, hint)
        for name in sorted(user.grants.keys() - patient.settings.databases.keys()):
            what, hint = f"{user.name} has a grant in {name}, which is not in the config", "put the database back"
            yield check.fail("files.database-gone", what, f"{hint}, or: mcpctl user remove {user.name}")
    for name, meant in dict.fromkeys(tenants.astray(places, people)):
        hint = f"mend tenants.yaml; where it is right: mcpctl user ungrant {name} --database {meant.database} --apply"
        what = f"{name}, of the tenant {meant.name}, has a grant in {meant.where}, which tenants.yaml does not give it"
        yield check.fail("files.grant-astray", what, hint)


def _place(
    check: Check, patient: Patient, place: Tenant, people: Mapping[str, User], places: Mapping[str, Tenant]
) -> Iterator[Finding]:
    if place.database not in patient.settings.databases:
        hint = (
            f"mend the name in tenants.yaml; or, where the database is gone from the config: mcpctl database add "
            f"{place.database}, or: mcpctl tenant remove {place.name}"
        )
        what = f"the tenant {place.name} has {place.where}, which is not in the config"
        yield check.fail("files.tenant-nowhere", what, hint)
    rightful = {name: one for name, one in people.items() if one.tenant is None or one.tenant in places}
    for name in tenants.strangers(place, rightful):  # of the others it is said above what to do
        hint = f"mcpctl user ungrant {name} --database {place.database} --apply"
        what = f"{name} has a grant in {place.where}, which is the tenant {place.name}'s"
        yield check.fail("files.stranger", what, hint)


def people(patient: Patient) -> Iterator[Finding]:
    """Users who can ask nothing."""
    check, every = Check("users"), users.user_file(patient.settings.auth.user_file).current()
    databases = patient.settings.databases
    own = bool(patient.settings.own_databases.hosts)
    if databases and not own and all(one.roles == "per_user" for one in databases.values()):
        empty = [one.name for one in every.values() if not one.grants and one.disabled_at is None]
        if empty:
            what = f"can ask nothing, having no grant in any database: {some(empty)}"
            hint = f"mcpctl user grant {empty[0]} --database {next(iter(databases))} --access read --apply"
            yield check.warn("users.no-grants", what, f"{hint}, or: mcpctl user disable {empty[0]}")
    kept = sum(one.password is not None for one in every.values())
    what = f"passwords of {kept} users are kept as hashes, whose strength nobody sees; `mcpctl user passwd` takes none"
    yield check.ok(f"{what} below {passwords.LEAST} characters, nor a repetitive one")


def every_token(patient: Patient) -> Iterator[Finding]:
    """Tokens that should be renewed or ended."""
    check, settings = Check("tokens"), patient.settings
    people = users.user_file(settings.auth.user_file).current()
    every = tokens.token_file(settings.auth.token_file).current()
    found = [(one, tokens.standing(one, people, patient.now)) for one in every.values()]
    living = [one for one, standing in found if standing in ("active", "expiring", "disabled")]
    yield check.ok(f"{len(living)} are alive")
    if never := [one.id for one in living if one.expires_at is None]:
        found_so = check.fail if settings.server.profile == PRODUCTION else check.warn
        hint = f"mcpctl token rotate {never[0]} --expiry 90d"
        yield found_so("tokens.never-expire", f"never expire: {some(never)}", hint)
    if soon := [one for one, standing in found if standing == "expiring"]:
        named = some(f"{one.id} on {one.expires_at:%Y-%m-%d}" for one in soon)
        hint = f"for who needs it longer: mcpctl token rotate {soon[0].id} --expiry 90d --overlap 24h"
        yield check.warn("tokens.expiring", f"expire within {tokens.EXPIRING.days} days: {named}", hint)
    if old := tokens.aged(living, patient.now):
        hint = f"mcpctl token rotate {old[0]} --overlap 24h"
        yield check.warn("tokens.old", f"older than a year: {some(old)}", hint)
    if orphans := [one.id for one, standing in found if standing == "blocked"]:
        yield check.warn("tokens.no-user", f"their user is gone: {some(orphans)}", f"mcpctl token revoke {orphans[0]}")
    known = settings.databases.keys()
    lost = [one.id for one in living if one.databases and not set(one.databases) & known]
    if lost and not patient.pruned:
        hint = f"mcpctl token revoke {lost[0]}"
        yield check.warn("tokens.no-database", f"for no database that there is: {some(lost)}", hint)
    yield from _blocked(check, patient, every)


def _blocked(check: Check, patient: Patient, there: Mapping[str, Token]) -> Iterator[Finding]:
    """Who is blocked, and canaries that are not there."""
    with closing(store(patient.settings)) as state:
        blocked = Blocked(state).current()
    for name, one in blocked.items():
        yield check.fail("tokens.blocked", f"token {name} is blocked {one.words}", f"mcpctl token unblock {name}")
    if missing := [name for name in patient.settings.canaries.tokens if name not in there]:
        what = f"canaries.tokens names {some(missing)}, and there is no such token"
        yield check.warn("tokens.no-canary", what, "make one with `mcpctl token add`, and name that")


def token_use(patient: Patient) -> Iterator[Finding]:
    """Tokens that several people seem to use, and those that nobody does."""
    check, log = Check("token-use"), patient.settings.audit.file
    for name, places in usage.shared(log, patient.now).items():
        what = f"{name} came from {places} addresses within a day: is it shared?"
        hint = f"give each their own; `mcpctl incident report --token {name} --since 1d` shows from where"
        yield check.warn("tokens.shared", what, hint)
    people = users.user_file(patient.settings.auth.user_file).current()
    living = [
        one
        for one in tokens.token_file(patient.settings.auth.token_file).current().values()
        if tokens.standing(one, people, patient.now) in ("active", "expiring")
        and one.id not in patient.settings.canaries.tokens  # nobody should use those
    ]
    if idle := usage.unused({one.id: one.created_at for one in living}, log, patient.now):
        what = f"not used for {usage.DAYS.days} days, or never: {some(idle)}"
        hint = f"ask whose it is; where nobody needs it: mcpctl token revoke {idle[0]}"
        yield check.warn("tokens.unused", what, hint)
