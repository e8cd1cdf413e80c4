"""Another password for a login: in PostgreSQL, and wherever it is kept, so that neither is without the other for longer
than one COMMIT takes.

Everything that PostgreSQL could refuse is done in an open transaction. Then the file is replaced, and then the COMMIT
is made. So a full disk, or a folder that cannot be written, changes nothing; and who is killed in between leaves a new
password in the file and the old one in PostgreSQL, which the next run mends, since it needs neither of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mcpctl import private_file
from mcpctl.config_keys import Settings
from mcpctl.departing import Departing
from mcpctl.errors import ConfigError, ConflictError, Error, NotFoundError, UsageError
from mcpctl.identity import users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import ACCESSES, login_role
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring, is_sealed
from mcpctl.postgres import administrator, passwords, roles, scram
from mcpctl.postgres.administrator import Administrator, Connection
from mcpctl.postgres.login import Login
from mcpctl.postgres.passwords import Backend

SHORTEST = 15
"""Characters that a given password has at least, as one to sign in with."""
PENDING = ".new.password"
"""How the file ends that keeps a password until a DBA has run the SQL for it. `key rotate` knows what ends so."""


@dataclass(frozen=True)
class Renewal:
    """One role whose password is to be another: where it is kept, and which pools log in with it. `login` reads the
    password anew each time. `user` is whose login role it is; None for one of the config's."""

    role: str
    login: Login
    databases: tuple[str, ...]
    pending: Path
    files: tuple[Path, ...] = ()
    user: str | None = None
    access: str = ""

    @property
    def pools(self) -> list[tuple[str, str | None]]:
        """What the server calls its logins (`Login.key`)."""
        return [(name, self.role if self.user is not None else None) for name in self.databases]


@dataclass
class Done:
    """A change that PostgreSQL has. `before` are the connections made until then, by the moment of the COMMIT;
    `plain`: the files whose password was not sealed before."""

    moment: str
    before: list[Backend]
    plain: list[Path] = field(default_factory=list)


class Renewing(Departing):
    """The passwords of one installation's logins."""

    def __init__(self, settings: Settings, keyring: Keyring, installation: str) -> None:
        super().__init__(settings, keyring, installation)
        self._keyring = keyring
        self._folder = settings.auth.token_file.parent

    # -- which -----------------------------------------------------------------------------------------------------

    def of_config(self, name: str, *, service: bool) -> Renewal:
        """The login of the config in a database: its one login, or that of service tokens. An Error says why it has no
        password that could be changed here."""
        per_user = self.logins.per_user(name)
        if service and not per_user:
            raise UsageError(f"in {name} all share one login", "leave --service out")
        if per_user and not service:
            raise UsageError(
                f"in {name} each user has a login role",
                "say --user U, --all-users, or --service for the login of service tokens",
            )
        own = self.logins.own(name)
        if not own:
            raise NotFoundError(f"{name} has no login for service tokens", f"it would be databases.{name}.service_dsn")
        role = passwords.role_of(own[0])
        if not role:
            raise ConfigError(f"databases.{name} names no user to log in as", f"set databases.{name}.user")
        found = {other: login for other in self._settings.databases for login in self.logins.own(other)}
        same = [name, *(one for one, login in found.items() if one != name and passwords.is_one(own[0], login))]
        files = tuple(dict.fromkeys(self._file_of(one) for one in same))
        pending = self._folder / f"{name}{'.service' if service else ''}{PENDING}"
        return Renewal(role, own[0], tuple(same), pending, files)

    def _file_of(self, name: str) -> Path:
        """Where the password of the config's login there is. ConfigError where it is nowhere that we write."""
        service, config = self.logins.per_user(name), self._settings.databases[name]
        key, path = "password_file", config.password_file
        if service:
            key, path = "service_password_file", config.service_password_file
        if path is not None:
            return path
        raise ConfigError(
            f"databases.{name} has no {key}, so its password is not kept where mcpctl could put a new one",
            f"put it into a file of the service's user, 0600, and name that: databases.{name}.{key}; where a unit "
            "hands it over (LoadCredential=), change it in PostgreSQL and at its source, and restart",
        )

    def of_user(self, name: str, database: str) -> list[Renewal]:
        """The login roles of a user in the cluster of a database. NotFoundError where there are none."""
        user, found = self.user(name), []
        if not self.logins.per_user(database):
            raise UsageError(f"in {database} all users share one login", "leave --user and --all-users out")
        for access in ACCESSES:
            where = tuple(self._where(user, database, access))
            if where:
                sealed = user.grants[where[0]].passwords[access]
                role = login_role(name, access)
                login = self.logins.with_role(database if database in where else where[0], role, sealed)
                pending = self._folder / f"{database}.{role}{PENDING}"
                found.append(Renewal(role, login, where, pending, (), name, access))
        if not found:
            raise NotFoundError(
                f"{name} has no login role in the cluster of {database}", f"`mcpctl user show {name}` shows the grants"
            )
        return found

    def _where(self, user: User, database: str, access: str) -> Iterator[str]:
        """The databases whose grants have one login role's password: they have one address, or one password."""
        here = user.grants.get(database)
        known = self._known(here.passwords[access], user.name) if here and access in here.passwords else None
        for one, grant in user.grants.items():
            if one not in self._settings.databases or access not in grant.passwords:
                continue
            same = self.logins.host(one).place == self.logins.host(database).place
            if one == database or same or known == self._known(grant.passwords[access], user.name):
                yield one

    def _known(self, sealed: str, user: str) -> str:
        return self._keyring.open(sealed, f"users.yaml: a password of {user}")

    def of_everybody(self, database: str) -> list[Renewal]:
        """The login roles of all users in the cluster of a database."""
        if not self.logins.per_user(database):
            raise UsageError(f"in {database} all users share one login", "leave --all-users out")
        found: list[Renewal] = []
        for name, user in self.people().items():
            if any(next(self._where(user, database, access), None) for access in ACCESSES):
                found += self.of_user(name, database)
        return found

    # -- by the administrator ----------------------------------------------------------------------------------------

    def apply(self, one: Renewal, who: Administrator, given: str | None) -> Done:
        """Make the change in PostgreSQL and in the files. Where it fails nothing is changed."""
        with who.connected() as connection:
            connection.execute(f"BEGIN; {roles.TURN}".encode())
            passwords.check(connection, one.role, None if one.user is None else self.mark(one.user))
            password = given or self._prepared(one) or scram.new_password()
            connection.execute(passwords.change(one.role, scram.verifier(one.role, password)).encode())
            kept = _Kept(one, self._file)
            sent = False
            try:
                plain = kept.put(self._seal, password)
                sent = True
                connection.execute(b"COMMIT")
            except BaseException:
                if not (sent and administrator.logs_in(self._renewed(one, password))):  # its answer alone was lost
                    kept.put_back()
                raise
            one.pending.unlink(missing_ok=True)
            moment, before = passwords.older(connection, one.role)
        return Done(moment, before, plain)

    def end_older(self, one: Renewal, who: Administrator, done: Done) -> list[Backend]:
        """End whoever connected before the change; those whom the server itself had not closed by then."""
        with who.connected() as connection:
            return self._end(connection, one, done)

    def _end(self, connection: Connection, one: Renewal, done: Done) -> list[Backend]:
        strangers = passwords.others(connection, one.role, done.moment)
        passwords.end_older(connection, self._now(one), one.role, done.moment)
        return strangers

    def _now(self, one: Renewal) -> Login:
        """The login with the password that is kept now."""
        if one.user is None:
            return one.login
        sealed = self.user(one.user).grants[one.databases[0]].passwords[one.access]
        return self.logins.with_role(one.login.name, one.role, sealed)

    def logs_in(self, one: Renewal) -> bool:
        """Whether PostgreSQL takes the password that is kept now."""
        return administrator.logs_in(self._now(one))

    # -- by a DBA ----------------------------------------------------------------------------------------------------

    def printed(self, one: Renewal, given: str | None) -> str:
        """The SQL for a DBA, with a password that is kept beside until it has run. Printed twice it is the same."""
        password = given or self._prepared(one) or scram.new_password()
        with self._file.edit():  # no key is dropped while we seal with it
            sealed = self._seal(password).encode() + b"\n"
            if one.pending.exists():
                with private_file.edit(one.pending) as held:
                    held.replace(sealed)
            else:
                private_file.create(one.pending, sealed)
        return passwords.script(one.role, scram.verifier(one.role, password))

    def believe(self, one: Renewal) -> Done:
        """Put the password into its place that a DBA has given the role. Error where PostgreSQL does not take it."""
        password = self._prepared(one)
        if password is None:
            raise ConflictError(f"no SQL was printed for {one.role}", "without --done it is")
        own = administrator.connect_as(self._renewed(one, password))
        if own is None:
            raise Error(f"PostgreSQL does not take the new password of {one.role} yet", "have the SQL run, then again")
        with own:
            moment, before = passwords.older(own, one.role)
        plain = _Kept(one, self._file).put(self._seal, password)
        one.pending.unlink(missing_ok=True)
        return Done(moment, before, plain)

    def end_by_itself(self, one: Renewal, done: Done) -> list[Backend]:
        """The same as `end_older`, where there is no administrator: any role may end its own connections."""
        own = administrator.connect_as(self._now(one))
        if own is None:
            raise Error(f"{one.role} cannot log in to end its older connections", "a DBA ends them")
        with own:
            return self._end(own, one, done)

    def _renewed(self, one: Renewal, password: str) -> Login:
        return replace(one.login, password=lambda: password)

    def _prepared(self, one: Renewal) -> str | None:
        """The password of a script that was printed, and has not been said to have run."""
        if not one.pending.exists():
            return None
        text = private_file.read(one.pending, limit=4096).data.decode("utf-8", "replace").strip()
        return self._keyring.open(text, f"the password in {one.pending}")

    def _seal(self, password: str) -> str:
        return self._keyring.seal(password, users.sealed_in(self.people()))


class _Kept:
    """Where one role's password is kept, and what was there before."""

    def __init__(self, one: Renewal, file: EntryFile[User]) -> None:
        self._one = one
        self._file = file
        self._before: dict[Path, bytes] = {}
        self._sealed: dict[str, str] = {}
        self._new = ""

    def put(self, seal: Callable[[str], str], password: str) -> list[Path]:
        """Replace it everywhere; the files where it was not sealed."""
        with self._file.edit(though_full=True) as entries:  # no key is dropped while we seal with it
            self._new = seal(password)
            for path in self._one.files:
                with private_file.edit(path) as held:
                    held.replace(self._new.encode() + b"\n", though_full=True)
                    self._before[path] = held.data
            if (name := self._one.user) is not None:
                user = users.find(entries, name)
                self._sealed = {
                    database: user.grants[database].passwords[self._one.access]
                    for database in self._one.databases
                    if database in user.grants and self._one.access in user.grants[database].passwords
                }
                entries[name] = _with(user, self._one.access, dict.fromkeys(self._sealed, self._new))
        return [path for path, data in self._before.items() if not is_sealed(data.decode("utf-8", "replace"))]

    def put_back(self) -> None:
        """As it was before, but for what somebody else has changed since."""
        with self._file.edit(though_full=True) as entries:
            for path, data in self._before.items():
                with private_file.edit(path) as held:
                    if held.data == self._new.encode() + b"\n":
                        held.replace(data, though_full=True)
            user = entries.get(self._one.user or "")
            if user is not None:
                entries[user.name] = _with(user, self._one.access, self._sealed, self._new)


def _with(user: User, access: str, sealed: Mapping[str, str], instead: str | None = None) -> User:
    """The user with these passwords for an access, by database; `instead`: only where that one is there now."""
    for database, text in sealed.items():
        grant = user.grants.get(database)
        if grant is not None and access in grant.passwords and instead in (None, grant.passwords[access]):
            user = user.with_grant(replace(grant, passwords={**grant.passwords, access: text}))
    return user


def check_given(password: str) -> str:
    """A password that somebody gives, if PostgreSQL would read it as we do. UsageError for any other."""
    if len(password) < SHORTEST:
        raise UsageError(f"a password has at least {SHORTEST} characters", "leave it out, and one is made")
    if not (password.isascii() and password.isprintable()):
        raise UsageError("a password has visible ASCII characters alone", "leave it out, and one is made")
    return password
