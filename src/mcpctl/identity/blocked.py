"""The tokens that the server itself has blocked, in `state.db`: since when, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.state import State, Version


@dataclass(frozen=True, slots=True)
class Block:
    """One row of blocked. `at` is RFC 3339 in UTC."""

    at: str
    reason: str

    @property
    def words(self) -> str:
        """Since when, and why."""
        return f"since {self.at}: {self.reason}"


class Blocked:
    """The rows of blocked, as they are now. `needed`: that there is no store is a fault, since nobody could say what
    was blocked; else it means that nothing is."""

    def __init__(self, state: State, *, needed: bool) -> None:
        self._state = state
        self._needed = needed
        self._version: Version | None = None
        self._rows: Mapping[str, Block] = {}

    def current(self) -> Mapping[str, Block]:
        """{token id: why}; read again only when somebody has written. ConfigError where the store cannot be believed,
        or has gone since we have seen it."""
        if not self._state.path.exists():
            if self._needed or self._version is not None:
                raise ConfigError(
                    f"there is no {self._state.path}, which says which tokens are blocked",
                    "restore it from your backup; where nothing is to be blocked: mcpctl token unblock --all",
                )
            return {}
        version = self._state.version()
        if version != self._version:
            rows = self._state.rows("SELECT token, at, reason FROM blocked")
            self._rows = {token: Block(at, reason) for token, at, reason in rows}
            self._version = version
        return self._rows

    def block(self, blocks: Mapping[str, Block]) -> None:
        """Block these tokens. One that is blocked already stays as it is."""
        with self._state.change() as connection:
            values = [(token, one.at, one.reason) for token, one in blocks.items()]
            connection.executemany("INSERT OR IGNORE INTO blocked VALUES (?, ?, ?)", values)

    def lift(self, token: str) -> Block:
        """Let a token in again. NotFoundError (exit 4) where it is not blocked."""
        with self._state.change() as connection:
            found = connection.execute("SELECT at, reason FROM blocked WHERE token = ?", (token,)).fetchone()
            if found is None:
                raise NotFoundError(f"token {token} is not blocked", "`mcpctl token list` shows which are")
            connection.execute("DELETE FROM blocked WHERE token = ?", (token,))
        return Block(*found)

    def lift_all(self) -> list[str]:
        """Let all in again, and make the store where there is none; their ids."""
        with self._state.change() as connection:
            found = [token for (token,) in connection.execute("SELECT token FROM blocked ORDER BY token")]
            connection.execute("DELETE FROM blocked")
        return found
