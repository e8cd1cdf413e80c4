"""A new key for all that is sealed: store by store, so that it can be interrupted at any point and run again.

The new key is put before the old ones, below a comment that names it: only a rotation that finds this comment goes on
with that key. Each store is sealed again with it; and when nothing is left that an old key alone opens, the old ones
go, and the comment with them. Whoever seals meanwhile does so under the lock of users.yaml, or in a transaction of
state.db; both are held for the last look and the dropping.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mcpctl import keyring, private_file
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, Error
from mcpctl.identity import blocked, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.own_databases import OwnDatabases
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.state import State

_MANY = 5
Again = Callable[[str, str], str]
"""(sealed, what it is) → the same, sealed with the newest key."""


class Store(Protocol):
    """Something that holds sealed texts."""

    name: str

    def sealed(self) -> Iterable[tuple[str, str]]:
        """(sealed, what it is) of each text."""

    def reseal(self, again: Again) -> None:
        """Seal each text anew."""

    def held(self) -> AbstractContextManager[None]:
        """As long as it is held nobody seals anything for this store, unless the lock of users.yaml sees to that."""


class UserStore:
    """The passwords of login roles in users.yaml."""

    def __init__(self, file: EntryFile[User]) -> None:
        self.name = str(file.path)
        self._file = file

    def sealed(self) -> Iterator[tuple[str, str]]:
        """See Store."""
        return users.sealed_in(self._file.current())

    def reseal(self, again: Again) -> None:
        """See Store."""
        with self._file.edit() as entries:
            for user in list(entries.values()):
                for grant in user.grants.values():
                    passwords = {
                        access: again(text, f"a password of {user.name}") for access, text in grant.passwords.items()
                    }
                    if passwords != grant.passwords:
                        user = user.with_grant(replace(grant, passwords=passwords))
                entries[user.name] = user

    def held(self) -> AbstractContextManager[None]:
        """See Store."""
        return nullcontext()


class PasswordFile:
    """A password file of the config that `database add` has sealed."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def _text(self) -> str:
        return (
            private_file.read(self._path, limit=4096, **keyring.rules(self._path))
            .data.decode("utf-8", "replace")
            .strip()
        )

    def sealed(self) -> Iterator[tuple[str, str]]:
        """See Store."""
        if self._path.exists() and keyring.is_sealed(text := self._text()):
            yield text, f"the password in {self._path}"

    def reseal(self, again: Again) -> None:
        """See Store."""
        for text, what in self.sealed():
            with private_file.edit(self._path) as held:
                held.replace(again(text, what).encode() + b"\n")

    def held(self) -> AbstractContextManager[None]:
        """See Store."""
        return nullcontext()


def stores(settings: Settings, state: State) -> list[Store]:
    """Every store of an installation that may hold something sealed."""
    people = users.user_file(settings.auth.user_file)
    found: list[Store] = [UserStore(people)]
    if state.path.exists():
        found.append(OwnDatabases(state, Keyring(settings.keyring.file), people))
    named = [
        path
        for database in settings.databases.values()
        for path in (database.password_file, database.service_password_file)
        if path is not None
    ]
    named += settings.auth.token_file.parent.glob("*.password")  # `database add` seals first, then writes the config
    return [*found, *(PasswordFile(path) for path in dict.fromkeys(named))]


def rotate(settings: Settings, known_by_servers: Callable[[str], list[int]]) -> tuple[str, int, bool]:
    """Rotate the keys; (the new key's id, how many texts were sealed again, whether the key was made by an earlier run
    that was interrupted). `known_by_servers(id)` returns the pids of serving processes that do not know that key yet.

    Raises ConfigError (exit 3) where something cannot be opened, before anything is changed, and Error where a server
    has to be restarted first; then it goes on where it was.
    """
    state = blocked.store(settings)
    try:
        return _rotate(settings, state, known_by_servers)
    finally:
        state.close()


def _rotate(settings: Settings, state: State, known_by_servers: Callable[[str], list[int]]) -> tuple[str, int, bool]:
    path, kept = settings.keyring.file, stores(settings, state)
    ring = Keyring(path)
    everything = [item for store in kept for item in store.sealed()]
    if not path.exists() and not everything:
        key = keyring.new_key()
        private_file.create(path, key.encode() + b"\n")
        return keyring.key_id(key), 0, False
    check_opens(ring, everything)
    newest, made_before = _add_key(path)
    if ignorant := known_by_servers(keyring.key_id(newest)):
        raise Error(
            f"key {keyring.key_id(newest)} is in {path}, and the server (pid {', '.join(map(str, ignorant))}) has not "
            "been given it yet",
            "restart the server, so that systemd hands it the new file, and run `mcpctl key rotate` again",
        )
    count = 0

    def again(text: str, what: str) -> str:
        nonlocal count
        if keyring.opens_alone(newest, text):
            return text
        count += 1
        return ring.seal(ring.open(text, what))

    for store in kept:
        store.reseal(again)
    with users.user_file(settings.auth.user_file).edit(), ExitStack() as holding:
        kept = stores(settings, state)  # state.db may have been made meanwhile
        for store in kept:
            holding.enter_context(store.held())
        left = [what for store in kept for text, what in store.sealed() if not keyring.opens_alone(newest, text)]
        if left:
            raise Error(f"{left[0]} was sealed with an old key meanwhile; no key was dropped", "run it again")
        _drop_others(path, newest)
    return keyring.key_id(newest), count, made_before


def check_opens(ring: Keyring, everything: Sequence[tuple[str, str]]) -> None:
    """ConfigError (exit 3) where one of these, (sealed, what it is), cannot be opened; where the key file is gone it
    names the first few, and how they are taken away."""
    if everything and not ring.path.exists():
        more = f" and {len(everything) - _MANY} more" if len(everything) > _MANY else ""
        raise ConfigError(
            f"there is no key file {ring.path}, and sealed with it are: "
            f"{'; '.join(what for _, what in everything[:_MANY])}{more}",
            "restore it from your backup; if it is lost, take these away: mcpctl user remove U, mcpctl database "
            "unregister U NAME, mcpctl database remove D; then mcpctl key rotate makes a new one",
        )
    for text, what in everything:
        ring.open(text, what)


def _add_key(path: Path) -> tuple[str, bool]:
    """Put a new key first, under the file's lock; (the key, whether it was there already). Of two rotations at once the
    second goes on with the first's, and so does one after an interruption. Any other second key is the operator's, such
    as one for a backup, and no reason to keep the first."""
    with private_file.edit(path) as held:
        keys = keyring.parse(held.data, path)
        if _begun(keys[0]) in held.data.decode("utf-8", "replace").splitlines():
            return keys[0], True
        newest = keyring.new_key()
        _write(held, [newest, *keys], _begun(newest))
    return newest, False


def _begun(newest: str) -> str:
    """The comment that stands in the key file from a new key's making until the old ones are dropped."""
    return f"# the rotation to the key {keyring.key_id(newest)} has not ended"


def _drop_others(path: Path, newest: str) -> None:
    with private_file.edit(path) as held:
        if keyring.parse(held.data, path)[0] != newest:
            raise Error("another rotation has put its own key there meanwhile; no key was dropped", "run it again")
        _write(held, [newest])


def _write(held: private_file.Edit, keys: list[str], *above: str) -> None:
    data = ("\n".join([*above, *keys]) + "\n").encode("ascii")
    if keyring.parse(data, held.path) != keys:
        raise ConfigError(f"{held.path} could not be read again if it were written; nothing was changed")
    held.replace(data)
