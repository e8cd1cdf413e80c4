"""Users' own databases as the server and the command line use them: register, list, log in, remove, cut.

Every worker looks at the store before each call and a few times a second, so that what was removed anywhere is cut
everywhere.
"""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from time import monotonic

from mcpctl.config_keys import Database, Pool, Settings
from mcpctl.errors import ConfigError, ConflictError, Error, ForbiddenError, UnavailableError, UsageError
from mcpctl.identity import users
from mcpctl.identity.blocked import store
from mcpctl.identity.own_databases import Key, OwnDatabase, OwnDatabases, check_name
from mcpctl.in_turn import in_turn
from mcpctl.keyring import Keyring
from mcpctl.postgres import own_login
from mcpctl.postgres.cutting import Cut
from mcpctl.postgres.own_login import Hosts, OwnLogin, Wanted
from mcpctl.postgres.pools import Pools
from mcpctl.state import State

log = logging.getLogger("mcpctl.own")
_AT_ONCE = 4
"""Registrations that one process checks at a time, of one user one."""
FAILURES, WINDOW = 10, 900.0
"""Registrations of one user that may fail in so many seconds: nobody tries passwords or ports from here."""
_REMEMBERED = 1000
_LONGEST_PASSWORD = 1000
_POOL = Database(pool=Pool(wait=10.0))
"""A server that hangs holds up nobody for longer than this."""


class Own:
    """The databases that users of one installation have brought. `pools` is None for a command, which has none open."""

    def __init__(
        self, settings: Settings, keyring: Keyring, pools: Pools | None, ask: own_login.Resolve | None = None
    ) -> None:
        self._settings = settings
        self._rules = settings.own_databases
        self._hosts = Hosts(self._rules.hosts)
        self._keyring = keyring
        self._pools = pools
        self._ask = ask or own_login.Resolver()
        self._state = store(settings, None if pools is None else 0.0)
        self._people = users.user_file(settings.auth.user_file)
        self._rows = OwnDatabases(self._state, keyring, self._people)
        self._seen: Mapping[Key, OwnDatabase] = {}
        self._cuts: dict[Key, asyncio.Task[Cut]] = {}
        self._cutting: set[asyncio.Task[Cut]] = set()
        self._checking: set[str] = set()
        self._failed: dict[str, list[float]] = {}
        self._broken: str | None = None
        self.started = False
        """Whether it has anything to look for."""

    @property
    def on(self) -> bool:
        """Whether the config names a host that such a database may be on."""
        return bool(self._rules.hosts)

    @property
    def state(self) -> State:
        """The store: one process has it open once, since closing a second descriptor would drop SQLite's locks."""
        return self._state

    @property
    def takes_passwords(self) -> bool:
        """Whether a password may come in a DSN, where a model sees it."""
        return self._rules.allow_password_in_dsn

    @property
    def taken(self) -> Mapping[str, object]:
        """The names that databases of the config have."""
        return self._settings.databases

    def start(self) -> None:
        """See that what is stored opens, and that the environment takes no part. Raises ConfigError (exit 3)."""
        if self.on:
            own_login.check_environment()
            self._rows.check_sealed()
            self._seen = self._rows.current()
            self.started = True

    def close(self) -> None:
        """Close the store."""
        self._state.close()

    # -- who has which -----------------------------------------------------------------------------------------------

    def of(self, user: str) -> list[OwnDatabase]:
        """A user's databases, the oldest first. One whose name a database of the config has by now is among them."""
        with self._told():
            return self._rows.of(user)

    def names(self, user: str | None) -> list[str]:
        """The names by which a user can ask them."""
        if user is None or not self.on:
            return []
        return [row.name for row in self.of(user) if row.name not in self._settings.databases]

    def has(self, user: str, name: str) -> bool:
        """Whether a user had one of that name at the last look: no file is read, and a broken store stops nobody."""
        return (user, name) in self._seen

    def everybody(self) -> Mapping[Key, OwnDatabase]:
        """All users'; none where no store has been made yet."""
        with self._told():
            return self._rows.current() if self._state.path.exists() else {}

    def login(self, user: str, name: str) -> OwnLogin:
        """The login of a user's database. NotFoundError where the user has none of that name, ForbiddenError where the
        config no longer lets anybody go there."""
        with self._told():
            row = self._rows.find(user, name)
        return self.login_of(row)

    def login_of(self, row: OwnDatabase) -> OwnLogin:
        """Its login; ForbiddenError where the config no longer lets anybody go there."""
        self._check_host(row)
        return self._login(row)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What is wrong with the store or the keys is the administrator's to know, and goes into the log."""
        try:
            yield
        except (ConfigError, UnavailableError) as problem:
            if self._pools is None:  # a command of the administrator's
                raise
            self._complain(problem)
            raise UnavailableError(
                "users' own databases cannot be used right now", "ask again in a moment, or tell the administrator"
            ) from None

    def reaches(self, row: OwnDatabase) -> bool:
        """Whether the config still lets anybody go where it is."""
        return self._hosts.allow(row.host, ipaddress.ip_address(row.hostaddr))

    def _check_host(self, row: OwnDatabase) -> None:
        if not self.reaches(row):
            raise ForbiddenError(
                f"{row.host} is no longer one of the hosts that databases may be on here",
                "remove the database, or ask the administrator",
            )

    def _login(self, row: OwnDatabase, password: str | None = None) -> OwnLogin:
        return OwnLogin(
            row.name,
            _POOL,
            self._keyring,
            row.login,
            (lambda: self._rows.password(row)) if password is None else (lambda: password),
            row=row,
            rules=self._rules,
        )

    # -- register and remove -----------------------------------------------------------------------------------------

    async def register(self, user: str, name: str, wanted: Wanted, password: str) -> OwnDatabase:
        """Log in there once, and store it, sealed, for that user alone. Raises an Error with what was wrong."""
        if not self.on:
            raise ForbiddenError("users' own databases are off here", "the administrator sets own_databases.hosts")
        own_login.check_environment()
        self.check_name(user, name)
        with self._told():
            self._rows.check_room(user, name, self._rules.most)
        _check_password(password)
        if user in self._checking or len(self._checking) >= _AT_ONCE:
            raise UnavailableError("another registration is being checked", "register it again in a moment")
        self._checking.add(user)
        try:
            async with asyncio.timeout(own_login.CHECK):
                row = await self._checked(user, name, wanted, password)
        except Error:
            self._failed.setdefault(user, []).append(monotonic())
            raise
        except TimeoutError:
            self._failed.setdefault(user, []).append(monotonic())
            raise UnavailableError(
                f"nothing was stored: {wanted.host} did not let anybody in within {own_login.CHECK:g} s",
                "are host and port right?",
            ) from None
        finally:
            self._checking.discard(user)
        with self._told():
            return await in_turn(lambda: self._add(row, password))

    def _add(self, row: OwnDatabase, password: str) -> OwnDatabase:
        return self._rows.add(row, password, self._rules.most, users.sealed_in(self._people.current()))

    def check_name(self, user: str, name: str) -> None:
        """Raises UsageError or ConflictError for a name that cannot be, which counts as a try that failed: nobody asks
        here for names of databases that they may not see. UnavailableError after too many such."""
        self._check_attempts(user)
        try:
            check_name(name, self._settings.databases)
        except ConflictError:
            self._failed.setdefault(user, []).append(monotonic())
            raise

    def _check_attempts(self, user: str) -> None:
        recent = [when for when in self._failed.pop(user, ()) if monotonic() - when < WINDOW]
        if recent:
            self._failed[user] = recent
        if len(recent) >= FAILURES:
            raise UnavailableError(
                f"{FAILURES} registrations of yours have failed within {WINDOW / 60:g} minutes",
                "wait as long, or let the administrator register it: mcpctl database register",
            )

    async def _checked(self, user: str, name: str, wanted: Wanted, password: str) -> OwnDatabase:
        """The row of the first address at which PostgreSQL lets that login in."""
        addresses = await own_login.addresses(wanted, self._hosts, self._ask)
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        for number, address in enumerate(addresses, 1):
            row = OwnDatabase(user, name, wanted.host, address, wanted.port, wanted.dbname, wanted.user, "", now)
            try:
                await own_login.check(self._login(row, password))
            except UnavailableError:
                if number == len(addresses):
                    raise
                continue
            break
        return row

    async def remove(self, user: str, name: str) -> tuple[OwnDatabase, Cut]:
        """Take one away and cut what this process has open of it; the other workers cut theirs within a moment. A
        command takes an earlier user's away, too."""
        with self._told():
            row = await in_turn(lambda: self._rows.remove(user, name, whosever=self._pools is None))
        return row, await self.settle(user, name)

    def remove_all(self, user: str) -> list[str]:
        """Take all of a user's away; their names."""
        return self._rows.remove_all(user)

    # -- what was removed --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take note of what was removed anywhere, and begin to cut it."""
        if not self.started:
            return
        try:
            now = self._rows.current()
        except Error as problem:  # whoever asks such a database is refused until it is mended; the others go on
            self._complain(problem)
            return
        self._broken = None
        if now is not self._seen:
            before, self._seen = self._seen, now
            for key, row in before.items():
                if now.get(key) != row:
                    self._cut(row)

    def _complain(self, problem: Error) -> None:
        if self._broken != problem.message:
            log.error("users' own databases are refused: %s (%s)", problem.message, problem.hint)
        self._broken = problem.message

    def _cut(self, row: OwnDatabase) -> None:
        if self._pools is None:
            return
        reason = f"{row.user}'s database {row.name} was removed"
        task = asyncio.create_task(self._pools.cut_login(self._login(row).key, reason))
        self._cutting.add(task)  # one of the same name may be removed again before this one has ended
        task.add_done_callback(self._cutting.discard)
        self._cuts[row.key] = task
        while len(self._cuts) > _REMEMBERED:
            self._cuts.pop(next(iter(self._cuts)))

    async def settle(self, user: str, name: str) -> Cut:
        """Take note of the store, and wait until what was removed under that name is cut: what was done."""
        self.look()
        task = self._cuts.get((user, name))
        if task is None:
            return Cut()
        done = await asyncio.shield(task)
        if not done.backends_left:
            self._cuts.pop((user, name), None)  # told once
        return done


def _check_password(password: str) -> None:
    if not password or not password.isprintable() or len(password) > _LONGEST_PASSWORD:
        raise UsageError(
            f"the password is empty, has control characters, or is longer than {_LONGEST_PASSWORD} characters"
        )
