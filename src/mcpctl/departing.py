"""The end of a user in PostgreSQL: where their login roles are, LOGIN taken from them, and what they leave behind."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mcpctl.config_keys import Settings
from mcpctl.errors import Error, Failures, NotFoundError
from mcpctl.identity import users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import ACCESSES, identifier, login_role
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator, roles
from mcpctl.postgres.administrator import Administrator, Connection
from mcpctl.postgres.logins import Logins


@dataclass
class Removed:
    """What the end of a user took along: login roles, and what they owned by database; what PostgreSQL warned of."""

    roles: list[str] = field(default_factory=list)
    owned: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Departing:
    """The users of one installation, and their login roles wherever they are. `installation` marks its roles; see
    `audit_log.installation`."""

    def __init__(self, settings: Settings, keyring: Keyring, installation: str) -> None:
        self._settings = settings
        self._installation = installation
        self._file: EntryFile[User] = users.user_file(settings.auth.user_file)
        self.logins = Logins(settings.databases, keyring)

    def user(self, name: str) -> User:
        """The user's entry, or NotFoundError (exit 4)."""
        return users.find(self._file.current(), name)

    def people(self) -> Mapping[str, User]:
        """All users."""
        return self._file.current()

    def mark(self, user: str) -> str:
        """The COMMENT of the user's login roles."""
        return roles.mark(self._installation, user)

    def check_administrators(self, user: User, dsns: Mapping[str, str]) -> None:
        """Raises NotFoundError where no administrator reaches some of the user's login roles."""
        if lacking := self.unreached(user, dsns):
            raise NotFoundError(
                f"there is no administrator for the database {next(iter(lacking))}, where {user.name} has a grant",
                f"put a connection string into {administrator.FILE}; or have a DBA run what `mcpctl user ungrant "
                f"{user.name} --database {next(iter(lacking))} --print-sql` prints, and then: mcpctl grant diff, and "
                f"mcpctl user remove {user.name}",
            )

    def unreached(self, user: User, dsns: Mapping[str, str]) -> dict[str, list[str]]:
        """The user's login roles that no administrator reaches, by a database of their cluster."""
        reached = {one.login.place for one in self._administrators(user.grants, dsns)}
        return {
            name: [login_role(user.name, access) for access in ACCESSES if access in grant.passwords]
            for name, grant in user.grants.items()
            if name in self._settings.databases and self.logins.host(name).place not in reached
        }

    def _administrators(self, databases: Iterable[str], dsns: Mapping[str, str]) -> list[Administrator]:
        """One for each cluster of these databases, as far as there are any."""
        known = [one for one in databases if one in self._settings.databases and one in dsns]
        places = {self.logins.host(one).place: one for one in known}
        return [Administrator.of(dsns, self.logins.host(one)) for one in places.values()]

    def _there(self, connection: Connection, name: str) -> list[str]:
        """The user's login roles in that cluster; one that somebody else made is none of them."""
        found = administrator.login_roles(connection)
        wanted = [login_role(name, access) for access in ACCESSES]
        return [role for role in wanted if role in found and found[role].mark == self.mark(name)]

    def _everywhere(self, user: User, dsns: Mapping[str, str], warnings: list[str]) -> Iterator[Administrator]:
        """One for each cluster in which the user has a login role: recorded, and then what is left over from an earlier
        grant. What was not seen goes into `warnings`."""
        warnings += [
            f"{user.name} has a grant in {one}, which is not in the config; whether a login role is there was not seen"
            for one in user.grants
            if one not in self._settings.databases
        ]
        recorded = self._administrators(user.grants, dsns)
        yield from recorded
        known = {who.login.place for who in recorded}
        for who in self._administrators(filter(self.logins.per_user, self._settings.databases), dsns):
            if who.login.place in known:
                continue
            try:
                with who.connected() as connection:
                    left = self._there(connection, user.name)
            except Error as problem:
                warnings.append(f"{problem.message}; whether {user.name} has left a role there was not seen")
                continue
            if left:
                yield who

    def set_login(self, name: str, dsns: Mapping[str, str], warnings: list[str], *, on: bool) -> Iterator[str]:
        """Give the user's login roles LOGIN or NOLOGIN, which also ends their connections; each role, when it is so.
        Neither a cluster that cannot be reached nor a role keeps others from it; the Error comes at the end. What was
        not seen goes into `warnings`."""
        return self._set_login(name, self._everywhere(self.user(name), dsns, warnings), on=on)

    def _set_login(self, name: str, administrators: Iterable[Administrator], *, on: bool) -> Iterator[str]:
        failed = Failures()
        for who in administrators:
            with failed, who.connected() as connection:
                yield from administrator.set_login(who, connection, self._there(connection, name), failed, on=on)
        failed.check()

    def end(self, name: str, dsns: Mapping[str, str]) -> Removed:
        """Take every login role of a user away, in all databases of each cluster, whether a grant is recorded there or
        not. The user's entry is not touched.
        Where it fails half-way, the Error says what was done; what is left is done by the next run."""
        done, locked, failed = Removed(), list[str](), Failures()
        administrators = list(self._everywhere(self.user(name), dsns, done.warnings))
        with failed:
            for role in self._set_login(name, administrators, on=False):
                locked.append(role)
        for who in administrators:
            with failed, who.connected() as connection:
                for role in self._there(connection, name):
                    with failed:
                        self._end_role(who, role, name, done)
                done.warnings += who.warnings
        try:
            failed.check()
        except Error as problem:
            left = [one for one in locked if one not in done.roles]
            raise Error(
                f"{problem.message}; dropped so far: {', '.join(done.roles) or 'no role'}; without LOGIN, and still "
                f"there: {', '.join(left) or 'none'}",
                f"{problem.hint or 'see doctor'}; then mcpctl user remove {name} --yes again, which goes on from there",
                exit_code=problem.exit_code,
            ) from None
        return done

    def _end_role(self, who: Administrator, role: str, name: str, done: Removed) -> None:
        with who.connected() as connection:
            administrator.check_gone(connection, role)  # it would outlive the role
        for dbname in who.databases_of(role):
            with who.connected(dbname) as connection:
                done.owned += [f"{role} owned {one} in {dbname}" for one in administrator.owned(connection, role)]
                connection.execute(roles.leave_here(role, self.mark(name)).encode())
        with who.connected() as connection:
            if role in administrator.login_roles(connection):
                shut = administrator.shut_with(connection, role)
                why = [f"it has something in the database {one}, which allows no connections" for one in shut]
                raise Error(
                    f"role {role} has no LOGIN any more, and stays: {'; '.join(why or who.warnings) or 'see doctor'}",
                    f"ALTER DATABASE {identifier(shut[0])} ALLOW_CONNECTIONS true"
                    if shut
                    else "take from it what others have granted",
                )
        done.roles.append(role)
