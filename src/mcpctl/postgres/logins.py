"""Which login role a call uses: the config's own where roles are shared, the user's own where they are per user.

There is no way from one to the other: who has no grant in a database whose roles are per user is refused there.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError, ForbiddenError
from mcpctl.identity.grants import NARROWING, Grant, login_role
from mcpctl.identity.principal import Principal
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.postgres.login import Login, same_database

PER_USER = "per_user"
_REMEMBERED = 10_000


class Logins:
    """The logins of one configuration. Building it checks each as far as it can be without connecting.

    `brought(user, name)`, set by whoever knows, says whether a user has a database of their own of that name.
    """

    def __init__(self, databases: Mapping[str, Database], keyring: Keyring) -> None:
        self._keyring = keyring
        self.brought: Callable[[str, str], bool] = lambda user, name: False
        self._databases = databases
        self._found: dict[tuple[int, str, str], tuple[Principal, Login]] = {}
        self._own = {name: Login(name, database, keyring) for name, database in databases.items()}
        self._services = {
            name: Login(name, _service(database), keyring)
            for name, database in databases.items()
            if database.roles == PER_USER and database.service_dsn is not None
        }
        self.twins: dict[str, tuple[str, ...]] = {}
        """For each name that leads where others do: those others."""
        for name in databases:
            self.host(name).dsn()  # raises what is wrong with it
        for name, other in itertools.combinations(databases, 2):
            if not self.same(name, other):
                continue
            if self.per_user(name) and self.per_user(other):
                raise ConfigError(
                    f"databases.{other} and databases.{name} are the same database of PostgreSQL, and each would "
                    "take away what the other grants",
                    "leave one of them; or, where no tenant is, give one a login of its own with roles: shared",
                )
            for one, twin in ((name, other), (other, name)):
                self.twins[one] = (*self.twins.get(one, ()), twin)
        for name, login in self._services.items():
            login.dsn()
            if not same_database(login, self.host(name)):
                raise ConfigError(
                    f"databases.{name}.service_dsn leads to another database than {name} itself",
                    "give it the same host, port and dbname, and another user",
                )

    def same(self, one: str, other: str) -> bool:
        """Whether two names of the config may mean one database of PostgreSQL."""
        return same_database(self.host(one), self.host(other))

    def per_user(self, database: str) -> bool:
        """Whether each user logs in there with a role of their own."""
        return self._databases[database].roles == PER_USER

    def host(self, database: str) -> Login:
        """The database itself, whoever logs in: where it is."""
        if self.per_user(database):
            return replace(self._own[database], role="mcpctl", password=lambda: "")
        return self._own[database]

    def own(self, database: str) -> list[Login]:
        """The logins of the config itself there, whoever calls: its one login, or that of service tokens, or none."""
        if not self.per_user(database):
            return [self._own[database]]
        return [self._services[database]] if database in self._services else []

    def of_people(self, database: str, people: Mapping[str, User]) -> list[Login]:
        """Every user's own logins there."""
        return [
            self.with_role(database, login_role(user.name, access), sealed)
            for user in people.values()
            if (grant := user.grants.get(database)) is not None
            for access, sealed in grant.passwords.items()
            if grant.has(access)
        ]

    def of(self, principal: Principal, database: str, access: str) -> Login:
        """The login of a principal for read, write or admin there. ForbiddenError where it has none, or where the name
        may mean a database that its user has brought: nobody is answered from another one than they meant."""
        if principal.user is not None and self.brought(principal.user, database):
            raise ForbiddenError(
                f"{database!r} is a database of your own, and by now also one of the administrator's",
                "remove yours, and register it under another name; or the administrator renames the other",
            )
        if access == "admin" and principal.tenant is not None:
            raise ForbiddenError(
                "settings are the whole cluster's, and you belong to a tenant",
                "the administrator looks and changes them",
            )
        if not self.per_user(database):
            if principal.within is not None and principal.within.schema is not None:
                raise ForbiddenError(
                    f"in {database!r} all share one login, which sees more than the schema of your tenant",
                    "the administrator sets roles: per_user there",
                )
            if access == "read":
                return self._own[database]
            raise ForbiddenError(
                f"in {database!r} all share one login, which only reads", f"{access} access needs roles: per_user there"
            )
        if principal.user is None:
            return self._service(principal, database, access)
        found = self._found.get((id(principal), database, access))
        if found is None:
            found = principal, self.of_user(principal.person or "", principal.grants.get(database), database, access)
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[id(principal), database, access] = found  # the principal, so that its id stays its own
        return found[1]

    def _service(self, principal: Principal, database: str, access: str) -> Login:
        if access == "read" and database in self._services:
            return self._services[database]
        why = "only reads" if access != "read" else "needs the config's service_dsn there"
        raise ForbiddenError(f"in {database!r} each user has a login role, and {principal.name} {why}")

    def of_user(self, user: str, grant: Grant | None, database: str, access: str) -> Login:
        """The login role of a user by their grant; ForbiddenError where it does not reach that far."""
        if access == "admin" and not self._databases[database].settings:
            raise ForbiddenError(
                f"in {database!r} nobody may change settings",
                f"the administrator lists those that may be changed: databases.{database}.settings",
            )
        if grant is not None and grant.state == NARROWING and getattr(grant, access):
            raise ForbiddenError(
                f"your access in {database!r} is being narrowed, and PostgreSQL has not been seen to have done so",
                "the administrator has the SQL of `mcpctl user ungrant` run, and then: mcpctl grant diff",
            )
        if grant is None or not grant.has(access):
            raise ForbiddenError(
                f"you have no {access} access in {database!r}",
                f"the administrator gives it: mcpctl user grant {user} --database {database} --access {access} --apply",
            )
        return self.with_role(database, login_role(user, access), grant.passwords[access])

    def with_role(self, database: str, role: str, sealed: str) -> Login:
        """A login role with its sealed password, in that database."""
        return replace(
            self._own[database],
            role=role,
            password=lambda: self._keyring.open(sealed, f"the password of {role}"),
        )

    def check_sealed(self, people: Mapping[str, User]) -> None:
        """See that each sealed password opens. ConfigError (exit 3) names the key file and what does not."""
        for user in people.values():
            for grant in user.grants.values():
                for access, sealed in grant.passwords.items():
                    self._keyring.open(sealed, f"users.yaml: the password of {login_role(user.name, access)}")


def _service(database: Database) -> Database:
    return replace(
        database,
        dsn=database.service_dsn,
        host=None, port=None, dbname=None, user=None, sslmode=None, sslrootcert=None, sslcert=None, sslkey=None,
        password_file=database.service_password_file,
    )  # fmt: skip
