"""The keys, what is sealed with them, and secrets that are in the open or too short."""

import ipaddress
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from mcpctl import keyring, private_file, rotation
from mcpctl.diagnosis.patient import Check, Finding, Patient
from mcpctl.errors import Error, UnavailableError
from mcpctl.identity import users
from mcpctl.identity.blocked import store
from mcpctl.identity.own_databases import OwnDatabases
from mcpctl.keyring import Keyring
from mcpctl.postgres.own_login import Hosts

LEAST = 16
"""Characters of a database's password."""


def keys(patient: Patient) -> Iterator[Finding]:
    """Whether all that is sealed opens."""
    check, ring = Check("keys"), Keyring(patient.settings.keyring.file)
    if ring.path.exists():
        try:
            ring.keys()  # whatever else cannot be read
        except Error as problem:
            yield check.fail("keys.broken", problem.message, problem.hint or "restore it", cause=str(ring.path))
            return
    with closing(store(patient.settings)) as state:
        everything = [item for store in rotation.stores(patient.settings, state) for item in store.sealed()]
    try:
        rotation.check_opens(ring, everything)
    except Error as problem:  # whoever opens another of them meets it, too
        hint = problem.hint or "restore the key file"
        yield check.fail("keys.broken", problem.message, hint, cause=str(ring.path))
        return
    if not ring.path.exists():
        what = f"there is no {ring.path}, and nothing is sealed"
        yield check.warn("keys.none", what, "`mcpctl key rotate` makes it")
        return
    old = len(ring.keys()) - 1
    yield check.ok(f"{len(everything)} sealed passwords open with {ring.path}")
    if old:
        what = "an old key is still there: a rotation was interrupted, or you have put it there"
        yield check.warn("keys.old", what, "mcpctl key rotate")


def state(patient: Patient) -> Iterator[Finding]:
    """Whether what the server itself remembers can be read, all of it."""
    check, path = Check("state"), patient.settings.server.state_file
    try:
        with closing(store(patient.settings)) as found:
            said = found.rows("PRAGMA quick_check(1)") if path.exists() else [("ok",)]
    except UnavailableError:
        raise  # somebody holds it, or the disk is full
    except Error as problem:
        yield check.fail("state.broken", problem.message, problem.hint or "restore it", cause=str(path))
        return
    if said != [("ok",)]:
        hint = "stop the server, and restore it from your backup"
        yield check.fail("state.broken", f"{path} is damaged: {said[0][0]}", hint, cause=str(path))
    else:
        yield check.ok(f"{path} is whole")


def own_databases(patient: Patient) -> Iterator[Finding]:
    """Databases that users have brought, and that one of the config has the name of, or that are out of reach, or an
    earlier user's."""
    check, settings = Check("own-databases"), patient.settings
    if not settings.server.state_file.exists():
        return
    people = users.user_file(settings.auth.user_file)
    with closing(store(settings)) as state:
        brought = OwnDatabases(state, Keyring(settings.keyring.file), people).every()
    hosts = Hosts(settings.own_databases.hosts)
    for row in brought.values():
        whose, gone = f"{row.user}'s own database {row.name}", f"mcpctl database unregister {row.user} {row.name}"
        if not row.belongs_to(people.current().get(row.user)):
            what = f"{whose} is an earlier user's of that name, who is gone: nobody can ask it"
            yield check.warn("own-databases.nobodys", what, gone)
            continue
        if not hosts.allow(row.host, ipaddress.ip_address(row.hostaddr)):
            where = f"{whose} at {row.host} ({row.hostaddr}) cannot be asked"
            what = f"{where}: own_databases.hosts does not let anybody go there"
            yield check.warn("own-databases.host", what, f"{gone}, or name its host again")
        if row.name in settings.databases:
            what = f"{row.user} has a database {row.name} of their own, and can ask neither it nor the config's"
            yield check.fail("own-databases.hidden", what, f"{gone}, or give the config's another name")


def secrets(patient: Patient) -> Iterator[Finding]:
    """Passwords and tokens in the open, where their owner put them, and passwords that can be guessed."""
    check = Check("secrets")
    for name, value in sorted(patient.environ.items()):
        whole = name in ("PGPASSWORD", "MCPCTL_TOKEN")
        dsn = name == "MCPCTL_DATABASE_URL" or (name.startswith("MCPCTL_DATABASES__") and name.endswith("DSN"))
        if value and (whole or (dsn and ("password" in value or "@" in value.rpartition("/")[0]))):
            what = f"the variable {name} may hold a secret, which /proc shows to this user and root"
            yield check.warn("secrets.variable", what, "mcpctl database add NAME --ask-password seals it")
    for name, database in patient.settings.databases.items():
        for path in (database.password_file, database.service_password_file):
            if path is not None and path.exists() and not keyring.rules(path):  # systemd's are not in the open
                yield from _password(check, patient, name, path, path == database.service_password_file)


def _password(check: Check, patient: Patient, name: str, path: Path, service: bool) -> Iterator[Finding]:
    text = private_file.read(path, limit=4096).data.decode("utf-8", "replace").rstrip("\r\n")
    if not keyring.is_sealed(text):
        only = " (only while nobody has a grant there)" if service else ""
        hint = f"to seal it: move it to another FILE; mcpctl database remove {name}{only}; "
        hint += f"mcpctl database add {name} … --password-file FILE"
        yield check.warn("secrets.plain", f"{path} holds the password of {name} as plain text", hint)
    else:
        with suppress(Error):  # that it does not open is said of the keys
            text = Keyring(patient.settings.keyring.file).open(text, f"the password in {path}")
    if 0 < len(text) < LEAST:
        what = f"the password of {name} in {path} has {len(text)} characters, and could be guessed"
        hint = f"give its role {LEAST} or more: \\password in psql; then the file anew"
        yield check.warn("secrets.short", what, f"{hint} (`openssl rand -base64 24` makes one)")
