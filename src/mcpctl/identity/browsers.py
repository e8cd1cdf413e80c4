"""Browsers in which somebody has signed in with a password: to allow clients and to end what was allowed, nothing more.

What a browser's cookie holds opens no tool: it is no session (`sessions.py`). It is kept as a SHA-256 of its 256 random
bits, for half a day at most, and is good only while its user has the password that it was opened with.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from mcpctl.identity import oauth, tokens
from mcpctl.identity.users import User
from mcpctl.state import State

LIFE = timedelta(hours=12)
"""Somebody who works all day signs in once (NIST SP 800-63B-4, section 2.2.3: 24 h at most where that is enough)."""
_KEY = 32
_FORM_KEY = "SELECT key FROM form_keys WHERE name = 'form'"


class Browsers:
    """The signed-in browsers of an installation, and the key of the forms that they send."""

    def __init__(
        self,
        state: State,
        people: Callable[[], Mapping[str, User]],
        now: Callable[[], datetime] = tokens.utcnow,
    ) -> None:
        self._state = state
        self._people = people
        self._now = now

    def key(self) -> bytes:
        """The key that form tokens are made with: the same for all workers and after a restart."""
        if not (rows := self._state.rows(_FORM_KEY)):
            with self._state.change() as connection:
                connection.execute("INSERT OR IGNORE INTO form_keys VALUES ('form', ?)", (secrets.token_bytes(_KEY),))
                rows = connection.execute(_FORM_KEY).fetchall()
        return bytes(rows[0][0])

    def sign_in(self, cookie: str, user: str, mark: str) -> None:
        """Note that this user has signed in where that cookie is, which must be a new one."""
        now = self._now()
        with self._state.change() as connection:
            connection.execute("DELETE FROM browsers WHERE ends < ?", (now.timestamp(),))
            connection.execute(
                "INSERT INTO browsers (hash, user, mark, made, ends) VALUES (?, ?, ?, ?, ?)",
                (_digest(cookie), user, mark, now.timestamp(), (now + LIFE).timestamp()),
            )

    def user(self, cookie: str | None) -> User | None:
        """Who has signed in where that cookie is, if they still may."""
        if cookie is None:
            return None
        rows = self._state.rows(
            "SELECT user, mark, made FROM browsers WHERE hash = ? AND ends > ?",
            (_digest(cookie), self._now().timestamp()),
        )
        people = self._people()
        for name, mark, made in rows:
            if oauth.stands(people, name, mark, datetime.fromtimestamp(made, UTC)):
                return people[name]
        return None

    def sign_out(self, cookie: str) -> None:
        """Forget who has signed in there."""
        with self._state.change() as connection:
            connection.execute("DELETE FROM browsers WHERE hash = ?", (_digest(cookie),))


def forget(state: State, user: str | None) -> None:
    """Sign a user out of all browsers, or (None) everybody: they sign in again, and are asked again what clients may.
    What they have allowed, and no client has fetched yet, opens nothing. Raises UnavailableError."""
    if not state.path.exists():
        return
    with state.change() as connection:
        for table in ("browsers", "oauth_codes", "oauth_consents"):
            connection.execute(f"DELETE FROM {table} WHERE ? IN (user, '')", (user or "",))  # noqa: S608 - of constants


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
