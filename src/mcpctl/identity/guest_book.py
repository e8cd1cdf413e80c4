"""The guests who have come: people whom an issuer vouches for and who are no users here, in `state.db`.

`guests.py` says what they are called and as whom they log in. Here is remembered who they were, so that one can be
disabled, or linked to a user.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mcpctl.errors import NotFoundError, UnavailableError
from mcpctl.identity.vouched import Vouched
from mcpctl.state import SHORTLY, State, Version

_NOTED = timedelta(hours=1)
"""How old the time of the last visit may be before it is noted again."""
_MARK = "SELECT count(*), total(seen), count(disabled), total(disabled) FROM guests"
"""Differs with each change of a guest, and costs a fraction of reading them all: others write into it all day."""


@dataclass(frozen=True, slots=True)
class Known:
    """One guest. `shown` is what their issuer calls them, for people to read."""

    name: str
    issuer: str
    subject: str
    shown: str | None
    as_user: str
    since: datetime
    seen: datetime
    disabled_at: datetime | None


class GuestBook:
    """The guests of an installation. One thread's."""

    def __init__(self, state: State, now: Callable[[], datetime]) -> None:
        self._state = state
        self._now = now
        self._version: Version | None = None
        self._mark: object = None
        self.known: Mapping[str, Known] = {}
        """Them, by name, at the last look."""

    def look(self) -> bool:
        """Know what the store says now; whether that is something new. UnavailableError while it is busy; ConfigError
        where it cannot be believed, or has gone since."""
        if not self._state.path.exists():
            if self._version is not None:
                raise self._state.missing()
            return False
        version = self._state.version()
        if version == self._version:
            return False
        mark = (version[0], *self._state.rows(_MARK))
        if mark == self._mark:
            self._version = version
            return False
        rows = self._state.rows(
            "SELECT name, issuer, subject, shown, as_user, since, seen, disabled FROM guests ORDER BY since"
        )
        self.known = {
            row[0]: Known(*row[:5], *(None if stamp is None else _time(stamp) for stamp in row[5:])) for row in rows
        }
        self._version, self._mark = version, mark
        return True

    def forget(self) -> None:
        """Know nobody; the next look reads all."""
        self._version, self._mark, self.known = None, None, {}

    def note(self, guest: Vouched) -> None:
        """Note that a guest is here. Raises UnavailableError where one who is new cannot be noted: nobody could
        disable them."""
        old, now = self.known.get(guest.user or ""), self._now()
        same = old is not None and (old.shown, old.as_user) == (guest.shown, guest.as_user)
        if old is not None and same and now - old.seen < _NOTED:
            return
        values = (guest.user, guest.issuer, guest.subject, guest.shown, guest.as_user, now.timestamp(), now.timestamp())
        try:
            with self._state.change(SHORTLY) as connection:
                connection.execute(
                    "INSERT INTO guests (name, issuer, subject, shown, as_user, since, seen) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET shown = excluded.shown, "
                    "as_user = excluded.as_user, seen = excluded.seen",
                    values,
                )
        except UnavailableError:
            if old is None:
                raise
        self.look()

    def find(self, name: str) -> Known:
        """The guest of that name, by the last look; NotFoundError (exit 4) for one who never came."""
        try:
            return self.known[name]
        except KeyError:
            raise NotFoundError(f"there is no guest {name}", "`mcpctl user list` shows who has come") from None

    def disable(self, name: str, when: datetime | None) -> bool:
        """Set or, with None, clear the time since which a guest is disabled; whether that changed anything.
        NotFoundError (exit 4) for one who never came."""
        self.look()
        old = self.find(name)
        if (old.disabled_at is None) == (when is None):
            return False
        with self._state.change() as connection:
            connection.execute(
                "UPDATE guests SET disabled = ? WHERE name = ?", (None if when is None else when.timestamp(), name)
            )
        self.look()
        return True


def _time(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC)
