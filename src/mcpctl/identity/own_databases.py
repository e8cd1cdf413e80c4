"""The databases that users bring themselves: whose they are, where they are, and a password that only fits there.

The password is sealed together with the entry it is for, so that one that was moved to another user, host or login by
hand does not open.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

from mcpctl.config import NAME
from mcpctl.errors import ConfigError, ConflictError, NotFoundError, UsageError
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.users import User, read_time
from mcpctl.keyring import Keyring
from mcpctl.state import State, Version

Key = tuple[str, str]
"""(user, name)."""


@dataclass(frozen=True, slots=True)
class OwnDatabase:
    """One row of own_databases. `hostaddr` is the address that was resolved and checked when it was registered, and is
    the only one ever connected to. `created_at` is RFC 3339 in UTC."""

    user: str
    name: str
    host: str
    hostaddr: str
    port: int
    dbname: str
    login: str
    sealed: str = field(repr=False, compare=False)
    created_at: str

    @property
    def key(self) -> Key:
        """What it is called, and by whom."""
        return self.user, self.name

    @property
    def shown(self) -> str:
        """How the logs call it. No database of the config has a colon in its name."""
        return f"own:{self.name}"

    @property
    def bound(self) -> list[str | int]:
        """What its password is sealed for."""
        return [self.user, self.name, self.host, self.hostaddr, self.port, self.dbname, self.login]

    def belongs_to(self, user: User | None) -> bool:
        """Whether it is this user's, and not that of an earlier one of the name, as a backup may bring it back."""
        try:
            return user is not None and user.created_at <= read_time(self.created_at, "created_at")
        except ValueError:
            return False


_COLUMNS = ", ".join(column.name for column in fields(OwnDatabase))
_SELECT = f"SELECT {_COLUMNS} FROM own_databases ORDER BY user, created_at, name"  # noqa: S608 - a constant
_INSERT = f"REPLACE INTO own_databases ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - a constant


def check_name(name: str, taken: Mapping[str, Any]) -> None:
    """Raises UsageError for what cannot be a name, which is not repeated, since it may be a connection string;
    ConflictError for that of a database of the config."""
    if not NAME.fullmatch(name):
        raise UsageError("that cannot be a database's name", "a-z first, then a-z 0-9 - _, at most 63 characters")
    if name in taken:
        raise ConflictError(f"there is a database {name!r} already", "choose another name")


class OwnDatabases:
    """The rows of own_databases, as they are now, and whose they are by the user file."""

    def __init__(self, state: State, keyring: Keyring, people: EntryFile[User]) -> None:
        self.name = str(state.path)
        self._state = state
        self._keyring = keyring
        self._people = people
        self._version: Version | None = None
        self._rows: Mapping[Key, OwnDatabase] = {}
        self._users: Mapping[str, User] | None = None
        self._current: Mapping[Key, OwnDatabase] = {}

    def every(self) -> Mapping[Key, OwnDatabase]:
        """All rows, also those that are nobody's any more; read again only when somebody has written."""
        version = self._state.version()
        if version != self._version:
            self._rows = {row.key: row for row in (OwnDatabase(*values) for values in self._state.rows(_SELECT))}
            self._version = version
            self._users = None
        return self._rows

    def current(self) -> Mapping[Key, OwnDatabase]:
        """Those that belong to a user; one object until one of the files changes. ConfigError as from users.yaml."""
        rows, people = self.every(), self._people.current()
        if people is not self._users:
            self._current = {key: row for key, row in rows.items() if row.belongs_to(people.get(row.user))}
            self._users = people
        return self._current

    def of(self, user: str) -> list[OwnDatabase]:
        """One user's, the oldest first."""
        return [row for row in self.current().values() if row.user == user]

    def find(self, user: str, name: str) -> OwnDatabase:
        """A user's database, or NotFoundError (exit 4), which says the same whoever else has one of that name."""
        try:
            return self.current()[user, name]
        except KeyError:
            raise NotFoundError(
                f"you have no database {name[:63]!r}", "list_my_databases shows those you have"
            ) from None

    def check_room(self, user: str, name: str, most: int) -> None:
        """Raises ConflictError (exit 5) where the user has one of that name, or as many as one may have."""
        have = self.of(user)
        if any(row.name == name for row in have):
            raise ConflictError(f"there is a database {name!r} already", "remove it first, or choose another name")
        if len(have) >= most:
            raise ConflictError(f"a user may have {most} databases here", "remove one first")

    def add(self, row: OwnDatabase, password: str, most: int, beside: Iterable[tuple[str, str]] = ()) -> OwnDatabase:
        """Store it, in the place of an earlier user's of that name, unless another key than the keyring's has sealed
        what is there, or `beside` it (ConfigError). It is sealed within the transaction, which a rotation of the keys
        waits for, and the other way round: no key is dropped that something was sealed with meanwhile."""
        with self._state.change() as connection:
            self.check_room(row.user, row.name, most)
            text = json.dumps({"for": row.bound, "password": password})
            row = replace(row, sealed=self._keyring.seal(text, (*self.sealed(), *beside)))
            connection.execute(_INSERT, astuple(row))
        return row

    def remove(self, user: str, name: str, *, whosever: bool = False) -> OwnDatabase:
        """Take one away; with `whosever` an earlier user's of that name, too. Raises NotFoundError (exit 4)."""
        with self._state.change() as connection:
            row = (self.every().get((user, name)) if whosever else None) or self.find(user, name)
            connection.execute("DELETE FROM own_databases WHERE user = ? AND name = ?", row.key)
        return row

    def remove_all(self, user: str) -> list[str]:
        """Take all of a user's away, and of an earlier one's of that name; their names."""
        with self._state.change() as connection:
            found = [row.name for row in self.every().values() if row.user == user]
            if found:  # what cannot be a name may be no text that SQLite takes
                connection.execute("DELETE FROM own_databases WHERE user = ?", (user,))
        return found

    def password(self, row: OwnDatabase) -> str:
        """The password of exactly this row. ConfigError (exit 3) where it does not open, or is another row's."""
        what = f"the password of {row.user}'s own database {row.name}"
        again = f"mcpctl database unregister {row.user} {row.name}"
        self._keyring.keys()  # a key file that is lost or broken is no reason to take anything away
        try:
            values = json.loads(self._keyring.open(row.sealed, what))
        except ConfigError as problem:
            raise ConfigError(problem.message, f"restore the key file that it was sealed with, or: {again}") from None
        if values["for"] != row.bound:
            raise ConfigError(
                f"{what} was sealed for another entry than that in {self._state.path}",
                f"somebody has changed the file by hand: {again}, and register it anew",
            )
        return str(values["password"])

    def check_sealed(self) -> None:
        """See that each password opens. ConfigError (exit 3) names the key file and what does not."""
        for row in self.current().values():
            self.password(row)

    # -- for a rotation of the keys --------------------------------------------------------------------------------

    def sealed(self) -> Iterator[tuple[str, str]]:
        """See rotation.Store."""
        for row in self.every().values():
            yield row.sealed, f"the password of {row.user}'s own database {row.name}"

    def reseal(self, again: Any) -> None:
        """See rotation.Store."""
        with self._state.change() as connection:
            for row in self.every().values():
                sealed = again(row.sealed, f"the password of {row.user}'s own database {row.name}")
                if sealed != row.sealed:
                    connection.execute(
                        "UPDATE own_databases SET sealed = ? WHERE user = ? AND name = ?", (sealed, *row.key)
                    )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """As long as the block runs nobody seals anything for this store."""
        with self._state.change():
            yield
