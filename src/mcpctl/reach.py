"""Which databases a principal may use, and how it logs in there."""

from mcpctl.config import NAME, default_database
from mcpctl.config_keys import Settings
from mcpctl.errors import ForbiddenError, NotFoundError, UsageError
from mcpctl.identity.grants import ACCESSES
from mcpctl.identity.principal import Principal
from mcpctl.policy.access import Access
from mcpctl.postgres.login import OWN, Login
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.tools.definition import Databases


class Reach:
    """The databases of the config and those that users have brought, as one principal may use them."""

    def __init__(self, settings: Settings, access: Access, logins: Logins, own: Own) -> None:
        self._settings = settings
        self._access = access
        self._logins = logins
        self._own = own
        self._default = default_database(settings)

    def databases(self, principal: Principal, access: str) -> list[str]:
        """The databases in which a principal has that access: by its roles and its token, and by a login there."""
        brought = self._own.names(principal.user) if access == "read" else []
        return [name for name in (*self._settings.databases, *brought) if self.has(principal, name, access)]

    def has(self, principal: Principal, database: str, access: str) -> bool:
        """Whether a principal has that access there."""
        if not self._access.may(principal, f"databases:{database}:{access}").allowed:
            return False
        try:
            self.login(principal, database, access)
        except (ForbiddenError, NotFoundError):
            return False
        return True

    def login(self, principal: Principal, database: str, access: str) -> Login:
        """Who logs in: as the config says, or as the user has who brought the database. Raises ForbiddenError or
        NotFoundError."""
        if database in self._settings.databases:
            return self._logins.of(principal, database, access)
        if principal.user is None or not self._own.on:
            raise NotFoundError(f"there is no database {database[:63]!r}")
        login = self._own.login(principal.user, database)
        if access != "read":
            raise ForbiddenError(f"{database!r} is a database of your own, which is only read here")
        return login

    def shown(self, database: str) -> str:
        """How the audit log calls a database: with own: before the name of one that a user has brought."""
        return database if database in self._settings.databases else OWN + database

    def known(self, principal: Principal) -> Databases:
        """What a tool that tells needs to know of the databases of a principal."""
        found: dict[str, list[str]] = {}
        for access in ACCESSES:
            for name in self.databases(principal, access):
                found.setdefault(name, []).append(access)
        config = self._settings.databases
        described = {name: config[name].description if name in config else None for name in found}
        own = frozenset(found.keys() - config.keys())
        return Databases(described, found, self.default(principal), self._access.patterns(principal), own)

    def default(self, principal: Principal) -> str | None:
        """The database that is meant where a call names none."""
        if principal.within is not None:
            return principal.within.database
        if principal.databases is not None and len(principal.databases) == 1:
            return principal.databases[0]
        if self._default is not None:
            return self._default
        readable = self.databases(principal, "read")
        return readable[0] if len(readable) == 1 else None

    def fixed(self, principal: Principal) -> bool:
        """Whether its default stays, whatever databases its user brings."""
        narrow = principal.databases is not None and len(principal.databases) == 1
        return principal.within is not None or narrow or self._default is not None

    def one(self, principal: Principal, name: str | None, access: str) -> str:
        """The database that is meant, if the principal may use it so. One that it may not is as if it were not."""
        wanted = name or self.default(principal)
        if name is None and access != "read" and (wanted is None or not self.has(principal, wanted, access)):
            have = self.databases(principal, access)
            if len(have) == 1:
                raise UsageError(
                    f"no database was named, and you have {access} access in {have[0]!r} alone",
                    f"name it as database: {have[0]}",
                )
        if wanted is None:
            raise UsageError("there is no default database", "name one; list_databases shows those you may ask")
        named = NAME.fullmatch(wanted) is not None  # what is no name may be a connection string: it is not repeated
        if named and wanted in self._settings.databases:
            self._access.check_scope(principal, f"databases:{wanted}:{access}")
        if not named or not self._access.may(principal, f"databases:{wanted}:{access}").allowed:
            raise _none(name, wanted if named else None)
        try:
            self.login(principal, wanted, access)
        except NotFoundError:
            raise _none(name, wanted) from None
        except ForbiddenError:  # why not is for those who may do something else there
            own = principal.user is not None and self._own.has(principal.user, wanted)
            config = wanted in self._settings.databases and not own
            if config and not any(self.has(principal, wanted, one) for one in ACCESSES):
                raise _none(name, wanted) from None
            raise
        return wanted


def _none(name: str | None, wanted: str | None) -> ForbiddenError:
    meant = f"database {wanted!r}" if wanted is not None else "database of such a name"
    return ForbiddenError(
        f"there is no {meant if name else 'default database'} for you", "list_databases shows those you may ask"
    )
