"""What `mcpctl doctor` looks at: files, keys, secrets in the open, databases, grants, what is still open in PostgreSQL.

Each check is a function that yields findings. Nothing is changed by looking.
"""

import asyncio
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import mcpctl
from mcpctl import certificates, keyring, private_file, reserve, rotation
from mcpctl.audit import files as audit_files
from mcpctl.audit import log as audit_log
from mcpctl.audit import usage
from mcpctl.config_keys import Settings
from mcpctl.errors import Error
from mcpctl.granting import Granting
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.blocked import Blocked, store
from mcpctl.identity.grants import ACCESSES, login_role
from mcpctl.identity.lockdown import Lockdown
from mcpctl.identity.own_databases import OwnDatabases
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator, arithmetic, harden, hba, roles, trial
from mcpctl.postgres.administrator import Administrator, Connection
from mcpctl.postgres.differences import BY_HAND
from mcpctl.postgres.login import is_here
from mcpctl.postgres.own_login import Hosts
from mcpctl.postgres.roles import GONE

OK, WARN, FAIL = "ok", "warn", "fail"
_MANY = 6


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, how it is, and what to do."""

    check: str
    status: str
    what: str
    hint: str | None = None


@dataclass
class Patient:
    """An installation as the doctor sees it. `dsns` are the administrator's, `admin` their file."""

    settings: Settings
    dsns: Mapping[str, str]
    admin: Path | None
    now: datetime
    environ: Mapping[str, str]

    def granting(self) -> Granting:
        """Its grants."""
        key = audit_log.read_key(self.settings.audit.key_file)
        return Granting(self.settings, Keyring(self.settings.keyring.file), audit_log.installation(key))


def examine(patient: Patient) -> list[Finding]:
    """Every finding of every check. A check that cannot be made is a finding, too."""
    found: list[Finding] = []
    own = {
        "files": _files,
        "tenants": _tenants,
        "keys": _keys,
        "own databases": _own,
        "secrets": _secrets,
        "certificate": _certificate,
        "program": _program,
        "tokens": _tokens,
        "token use": _token_use,
    }
    for name in patient.settings.auth.oidc:
        found += _tried(f"issuer {name}", partial(_issuer, patient, name))
    for name, check in own.items():
        found += _tried(name, partial(check, patient))
    for name in patient.settings.databases:
        found += _tried(f"database {name}", partial(_database, patient, name))
        if patient.settings.databases[name].roles == "per_user":
            found += _tried(f"database {name}", partial(_grants, patient, name))
    return list(dict.fromkeys(found))  # of several logins and users some are the same


def _tried(check: str, work: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from work()
    except Error as problem:
        yield Finding(check, FAIL, problem.message, problem.hint)


def _issuer(patient: Patient, name: str) -> Iterator[Finding]:
    """Whether an outside issuer can be asked, as the first of its tokens would have us."""
    from mcpctl.identity.oidc import Issuers  # it brings httpx2 and PyJWT

    one = patient.settings.auth.oidc[name]
    people = users.user_file(patient.settings.auth.user_file).current()

    async def ask() -> int:
        issuers = Issuers({name: one}, lambda: patient.now)
        try:
            return await issuers.tried()
        finally:
            await issuers.close()

    count = asyncio.run(ask())
    if not count:
        yield Finding(f"issuer {name}", FAIL, f"{one.issuer} has no key that can be used", "are its algorithms listed?")
        return
    linked = sum(any(link.issuer == one.issuer for link in user.links) for user in people.values())
    asked = ", answers about tokens" if one.introspection.client_id is not None else ""
    yield Finding(f"issuer {name}", OK, f"{one.issuer} is reached{asked}; {count} keys, {linked} users linked")
    if not linked and not one.just_in_time:
        hint = "mcpctl user link U --issuer …, or just_in_time"
        yield Finding(f"issuer {name}", WARN, f"no user is linked to {one.issuer}, so none of its tokens opens", hint)


def _files(patient: Patient) -> Iterator[Finding]:
    auth = patient.settings.auth
    places = tenants.tenant_file(auth.tenant_file).current()
    counted = len(tokens.token_file(auth.token_file).current()), len(users.user_file(auth.user_file).current())
    chained = audit_log.read_key(patient.settings.audit.key_file)
    audit_files.end_of(patient.settings.audit.file, audit_log.key_id(chained))
    yield Finding("files", OK, f"{counted[0]} tokens, {counted[1]} users; owners and modes are as they must be")
    if hasattr(os, "posix_fallocate") and not reserve.there(auth.token_file.parent):
        what = f"no room is kept for a full disk: {reserve.of(auth.token_file.parent)} is not there"
        yield Finding("files", WARN, what, "make room on that disk: the next change of a token or user makes it")
    if (said := Lockdown(auth.token_file).said()) is not None:
        yield Finding("lockdown", FAIL, said, "mcpctl lockdown --lift")
    people = users.user_file(auth.user_file).current()
    for user in people.values():
        if user.tenant is not None and user.tenant not in places:
            hint = tenants.gone_hint(user)
            yield Finding("files", FAIL, f"{user.name} belongs to the tenant {user.tenant}, which is gone", hint)
        for name in sorted(user.grants.keys() - patient.settings.databases.keys()):
            what, hint = f"{user.name} has a grant in {name}, which is not in the config", "put the database back"
            yield Finding("files", FAIL, what, f"{hint}, or: mcpctl user remove {user.name}")
    for name, meant in dict.fromkeys(tenants.astray(places, people)):
        hint = f"mend tenants.yaml; where it is right: mcpctl user ungrant {name} --database {meant.database} --apply"
        what = f"{name}, of the tenant {meant.name}, has a grant in {meant.where}, which tenants.yaml does not give it"
        yield Finding("files", FAIL, what, hint)
    for key, stranger in users.listed_strangers(auth, people):
        hint = "mend the name in the config, or take it out: whoever is made a user by that name is on the list, too"
        yield Finding("files", FAIL, f"{key} names {stranger}, and there is no such user", hint)
    for place in places.values():
        if place.database not in patient.settings.databases:
            hint = (
                f"mend the name in tenants.yaml; or, where the database is gone from the config: mcpctl database add "
                f"{place.database}, or: mcpctl tenant remove {place.name}"
            )
            yield Finding("files", FAIL, f"the tenant {place.name} has {place.where}, which is not in the config", hint)
        rightful = {name: one for name, one in people.items() if one.tenant is None or one.tenant in places}
        for name in tenants.strangers(place, rightful):  # of the others it is said above what to do
            hint = f"mcpctl user ungrant {name} --database {place.database} --apply"
            yield Finding(
                "files", FAIL, f"{name} has a grant in {place.where}, which is the tenant {place.name}'s", hint
            )
    admin = patient.admin
    if admin is not None and admin.exists() and os.access(admin, os.R_OK):
        owner = patient.settings.auth.token_file.stat().st_uid
        if admin.stat().st_uid == owner:
            yield Finding(
                "files",
                WARN,
                f"{admin} belongs to the user whom the server runs as, who could make roles with it",
                "for one person's own installation that is so; else: chown root, and run the server as another user",
            )


def _tenants(patient: Patient) -> Iterator[Finding]:
    """Whether a tenant's database has a second name: by the config, as for the server, and by what answers. And one
    with canaries, which are not seen through a name that the server does not know for the same."""
    granting, config = patient.granting(), patient.settings.databases
    every = tenants.tenant_file(patient.settings.auth.tenant_file, granting.logins.twins).current().values()
    theirs = {one.database for one in every} & config.keys()
    watched = {name for name in config if _canary_tables(patient, name)}
    if not theirs | watched or len(config) < 2:
        return
    seen = {name: _answering(patient, granting, name) for name in config}
    for name in sorted(theirs):
        for other in [one for one in config if one != name and seen[one] == seen[name] is not None]:
            yield Finding(
                "tenants", FAIL, f"{other} is in PostgreSQL the same as {name}, where a tenant is",
                "leave one of them in the config: a tenant's database has one name",
            )  # fmt: skip
    for name in sorted(watched):
        for other in [one for one in config if one != name and seen[one] == seen[name] is not None]:
            apart = name not in granting.logins.twins.get(other, ())
            if apart and set(_canary_tables(patient, name)) - set(_canary_tables(patient, other)):
                yield Finding(
                    "tenants", WARN, f"{other} is in PostgreSQL the same as {name}, whose canaries are not seen there",
                    "write the host of both alike, or name the canaries for both",
                )  # fmt: skip
    if unseen := [name for name, answering in seen.items() if answering is None]:
        what = f"nobody could see whether another database is in PostgreSQL the same as {_some(unseen)}"
        yield Finding("tenants", WARN, what, f"mcpctl database test {unseen[0]}")


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


def _keys(patient: Patient) -> Iterator[Finding]:
    ring = Keyring(patient.settings.keyring.file)
    with closing(store(patient.settings)) as state:
        everything = [item for store in rotation.stores(patient.settings, state) for item in store.sealed()]
    rotation.check_opens(ring, everything)
    if not ring.path.exists():
        yield Finding("keys", WARN, f"there is no {ring.path}, and nothing is sealed", "`mcpctl key rotate` makes it")
        return
    old = len(ring.keys()) - 1
    yield Finding("keys", OK, f"{len(everything)} sealed passwords open with {ring.path}")
    if old:
        what = "an old key is still there: a rotation was interrupted, or you have put it there"
        yield Finding("keys", WARN, what, "mcpctl key rotate")


def _own(patient: Patient) -> Iterator[Finding]:
    """Databases that users have brought, and that one of the config has the name of, or that are out of reach, or an
    earlier user's."""
    settings = patient.settings
    if not settings.server.state_file.exists():
        return
    people = users.user_file(settings.auth.user_file)
    with closing(store(settings)) as state:
        brought = OwnDatabases(state, Keyring(settings.keyring.file), people).every()
    hosts = Hosts(settings.own_databases.hosts)
    for row in brought.values():
        if not row.belongs_to(people.current().get(row.user)):
            yield Finding(
                "own databases", WARN, f"{row.user}'s own database {row.name} is an earlier user's of that name, who "
                "is gone: nobody can ask it", f"mcpctl database unregister {row.user} {row.name}",
            )  # fmt: skip
            continue
        if not hosts.allow(row.host, ipaddress.ip_address(row.hostaddr)):
            yield Finding(
                "own databases", WARN, f"{row.user}'s own database {row.name} at {row.host} ({row.hostaddr}) cannot be "
                "asked: own_databases.hosts does not let anybody go there",
                f"mcpctl database unregister {row.user} {row.name}, or name its host again",
            )  # fmt: skip
        if row.name not in settings.databases:
            continue
        yield Finding(
            "own databases", FAIL, f"{row.user} has a database {row.name} of their own, and can ask neither it nor the "
            "config's", f"mcpctl database unregister {row.user} {row.name}, or give the config's another name",
        )  # fmt: skip


def _secrets(patient: Patient) -> Iterator[Finding]:
    """Passwords and tokens in the open, where their owner put them."""
    for name, value in sorted(patient.environ.items()):
        whole = name in ("PGPASSWORD", "MCPCTL_TOKEN")
        dsn = name == "MCPCTL_DATABASE_URL" or (name.startswith("MCPCTL_DATABASES__") and name.endswith("DSN"))
        if value and (whole or (dsn and ("password" in value or "@" in value.rpartition("/")[0]))):
            yield Finding(
                "secrets", WARN, f"the variable {name} may hold a secret, which /proc shows to this user and root",
                "mcpctl database add NAME --ask-password seals it",
            )  # fmt: skip
    for name, database in patient.settings.databases.items():
        for path in (database.password_file, database.service_password_file):
            if path is None or not path.exists() or keyring.rules(path):  # a credential of systemd's is not in the open
                continue
            text = private_file.read(path, limit=4096).data.decode("utf-8", "replace")
            if not keyring.is_sealed(text):
                only = " (only while nobody has a grant there)" if path == database.service_password_file else ""
                yield Finding(
                    "secrets", WARN, f"{path} holds the password of {name} as plain text",
                    f"to seal it: move it to another FILE; mcpctl database remove {name}{only}; "
                    f"mcpctl database add {name} … --password-file FILE",
                )  # fmt: skip


def _certificate(patient: Patient) -> Iterator[Finding]:
    """Whether the certificate, its key and its chain fit together, and for how long they count."""
    if patient.settings.server.tls.cert is None:
        return
    pair = certificates.read(patient.settings.server.tls)
    pair.context()
    end, path = pair.own.not_valid_after_utc, patient.settings.server.tls.cert
    if wrong := pair.out_of_date(patient.now):
        yield Finding("certificate", FAIL, wrong, "renew it; a server that runs takes the new files by itself")
    elif end - patient.now < timedelta(days=30):
        yield Finding("certificate", WARN, f"{path} ends on {end.date()}", "renew it, and see why nothing has")
    else:
        yield Finding("certificate", OK, f"{path} and its key fit together, and count until {end.date()}")


def _program(patient: Patient) -> Iterator[Finding]:
    """Whether the user that serves could change the program that serves."""
    if not hasattr(os, "geteuid"):
        return
    package = Path(mcpctl.__file__).parent
    if os.geteuid() != 0 and os.access(package, os.W_OK):
        yield Finding(
            "program", WARN, f"uid {os.geteuid()}, who runs this, could change the program in {package}",
            "install it as root, such as in /opt/mcpctl, for a server that others use",
        )  # fmt: skip
    elif patient.settings.auth.token_file.stat().st_uid == 0:
        yield Finding("program", WARN, "mcpctl's files are root's, so the server runs as root", "see the README")
    else:
        yield Finding("program", OK, "the user that serves cannot change the program")


def _tokens(patient: Patient) -> Iterator[Finding]:
    people = users.user_file(patient.settings.auth.user_file).current()
    found = [
        (one, tokens.standing(one, people, patient.now))
        for one in tokens.token_file(patient.settings.auth.token_file).current().values()
    ]
    living = [one for one, standing in found if standing in ("active", "expiring", "disabled")]
    never = [one.id for one in living if one.expires_at is None]
    orphans = [one.id for one, standing in found if standing == "blocked"]
    lost = [one.id for one in living if one.databases and not set(one.databases) & patient.settings.databases.keys()]
    yield Finding("tokens", OK, f"{len(living)} are alive")
    if never:
        yield Finding("tokens", WARN, f"never expire: {_some(never)}", "mcpctl token rotate ID --expiry 90d")
    if old := tokens.aged(living, patient.now):
        yield Finding("tokens", WARN, f"older than a year: {_some(old)}", "mcpctl token rotate ID")
    yield from _canaries(patient, {one.id for one, _ in found})
    if orphans:
        yield Finding("tokens", WARN, f"their user is gone: {_some(orphans)}", "mcpctl token revoke ID")
    if lost:
        yield Finding("tokens", WARN, f"for no database that there is: {_some(lost)}", "mcpctl token revoke ID")


def _token_use(patient: Patient) -> Iterator[Finding]:
    """Tokens that several people seem to use."""
    for name, places in usage.shared(patient.settings.audit.file, patient.now).items():
        yield Finding(
            "token use", WARN, f"{name} came from {places} addresses within a day: is it shared?",
            f"give each their own; `mcpctl incident report --token {name} --since 1d` shows from where",
        )  # fmt: skip


def _canaries(patient: Patient, there: set[str]) -> Iterator[Finding]:
    """Who is blocked, and canaries that are not there."""
    with closing(store(patient.settings)) as state:
        blocked = Blocked(state).current()
    for name, one in blocked.items():
        yield Finding("tokens", FAIL, f"token {name} is blocked {one.words}", f"mcpctl token unblock {name}")
    if missing := [name for name in patient.settings.canaries.tokens if name not in there]:
        yield Finding("tokens", WARN, f"canaries.tokens names {_some(missing)}, and there is no such token")


def _canary_tables(patient: Patient, name: str) -> list[str]:
    """The canaries in that database, as schema.table."""
    return [one[len(name) + 1 :] for one in patient.settings.canaries.tables if one.startswith(f"{name}.")]


def _guard_nothing(patient: Patient, check: str, name: str, connection: Connection) -> Iterator[Finding]:
    for one in administrator.missing(connection, _canary_tables(patient, name)):
        what = f"the canary {name}.{one} is no table or view there, and guards nothing"
        yield Finding(check, WARN, what, "canaries.tables takes names as PostgreSQL has them, without quotes")


def _database(patient: Patient, name: str) -> Iterator[Finding]:
    check, logins = f"database {name}", patient.granting().logins
    places = tenants.tenant_file(patient.settings.auth.tenant_file).current().values()
    for login in logins.own(name):
        about = trial.log_in(login)
        about.check(login)
        yield Finding(check, OK, f"{about.user} logs in: {about.words()}")
        if login.about()["sslmode"] in ("require", "prefer") and about.tls is not None and not is_here(login.place[0]):
            hint = "say sslmode: verify-full, with sslrootcert where the CA is your own"
            yield Finding(check, WARN, "nobody checks who the other side is (sslmode require)", hint)
        connection = administrator.connect_as(login)
        if connection is None:
            continue
        with closing(connection):
            yield from _guard_nothing(patient, check, name, connection)
            yield from _open_still(check, name, connection, None)
            for place in places:
                if place.database == name and place.own and administrator.may_use(connection, place.own):
                    yield Finding(
                        check, FAIL, f"{about.user} may use {place.where}, which is the tenant {place.name}'s",
                        f'REVOKE ALL ON SCHEMA {place.schema} FROM "{about.user}", PUBLIC; and from its groups',
                    )  # fmt: skip
            room = arithmetic.room(connection)
            if (most := patient.settings.limits.connections) > room:
                yield Finding(
                    check, WARN, f"limits.connections is {most}, and it has {room} to give",
                    "lower limits.connections, or raise max_connections",
                )  # fmt: skip


def _open_still(
    check: str, name: str, connection: Connection, role: str | None, *, functions: bool = True
) -> Iterator[Finding]:
    """What a login could do behind its privileges' back; `functions`: with what every login may execute."""
    found = harden.still_open(connection, role) if functions else []
    if found:
        shown = _some([one for one, _ in found])
        hint = f"mcpctl database harden {name} shows the SQL that takes them from PUBLIC"
        yield Finding(check, WARN, f"{role or 'the login'} may still execute {shown}", hint)
    for one in harden.definers(connection, role):
        who = f"{one.owner}, a superuser" if one.superuser else one.owner
        yield Finding(
            check, WARN, f"{one.signature} acts with the rights of {who} (SECURITY DEFINER)",
            "see what it does; REVOKE EXECUTE ON FUNCTION … FROM PUBLIC, if it is not meant for all",
        )  # fmt: skip
    for view in harden.views(connection, role):
        yield Finding(
            check, WARN, f"the view {view.schema}.{view.name} reads as {view.owner}, whom no row policy stops",
            "ALTER VIEW … SET (security_invoker = true), or give it to another owner",
        )  # fmt: skip


def _grants(patient: Patient, name: str) -> Iterator[Finding]:
    check, granting = f"database {name}", patient.granting()
    asked: set[str] = set()
    for user in granting.people().values():
        grant = user.grants.get(name)
        if grant is None:
            continue
        wrong = granting.disagreements(user, grant, patient.dsns)
        for one in wrong:
            again = f"mcpctl user grant {user.name} … again mends it; `mcpctl grant diff` shows all"
            if GONE in one:
                again = "take it back so, or make it and grant it again"
            yield Finding(check, FAIL, one, "run that SQL as a superuser" if BY_HAND in one else again)
        if not wrong:
            yield Finding(check, OK, f"{user.name}: PostgreSQL has what is recorded")
        connection = granting.connection(user, grant, patient.dsns)
        if connection is None:
            continue
        with closing(connection):
            for access in ACCESSES:
                role = login_role(user.name, access)
                if grant.has(access) and f"{role}: is not there" not in wrong:
                    yield from _open_still(check, name, connection, role, functions=access not in asked)
                    asked.add(access)
    for database, sentence in granting.strays(patient.dsns, name):
        everybodys = sentence.startswith((f"{hba.GROUP}:", f"{roles.HEIR}:"))
        hint = "REVOKE it" if everybodys else "DROP OWNED BY and DROP ROLE it, or add the user again"
        yield Finding(f"database {database}", FAIL if everybodys else WARN, sentence, hint)
    yield from _administered(patient, granting, name, check)


def _administered(patient: Patient, granting: Granting, name: str, check: str) -> Iterator[Finding]:
    """What only an administrator may see."""
    if name not in patient.dsns:
        hint = f"put a connection string into {administrator.FILE}, or look yourself: docs/users-and-grants.md"
        yield Finding(check, WARN, "without an administrator nobody looked at pg_hba.conf and the connections", hint)
        return
    who = Administrator.of(patient.dsns, granting.logins.host(name))
    with who.connected() as connection:
        yield from _guard_nothing(patient, check, name, connection)
        room, worst = arithmetic.room(connection), granting.worst(name)
        enough = worst <= room
        yield Finding(
            check, OK if enough else WARN, f"all grants could hold {worst} connections, and it has {room} to give",
            None if enough else f"lower databases.{name}.pool.max_per_user, or raise max_connections",
        )  # fmt: skip
        places = tenants.tenant_file(patient.settings.auth.tenant_file).current().values()
        theirs = [one for one in places if one.database == name and one.own]
        public = [one for one in theirs if administrator.public_may_use(connection, one.own or "")]
        kept = administrator.keeps_logins_here(connection, name)
    for place in public:
        yield Finding(
            check, FAIL, f"PUBLIC may use {place.where}, and so may every tenant",
            f"REVOKE ALL ON SCHEMA {place.schema} FROM PUBLIC",
        )  # fmt: skip
    if kept is not None:
        yield Finding(check, WARN, kept.message, kept.hint)
    elif not who.warnings:
        yield Finding(check, OK, "pg_hba.conf keeps the users' login roles to mcpctl")
    for unseen in who.warnings:
        yield Finding(check, WARN, unseen)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more
