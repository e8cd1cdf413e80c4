"""The tokens that the server itself has blocked, in `state.db`: since when, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcpctl.config_keys import Settings
from mcpctl.errors import NotFoundError
from mcpctl.state import SHORTLY, State, Version


@dataclass(frozen=True, slots=True)
class Block:
    """One row of blocked. `at` is RFC 3339 in UTC."""

    at: str
    reason: str

    @property
    def words(self) -> str:
        """Since when, and why."""
        return f"since {self.at}: {self.reason}"


def store(settings: Settings, patience: float | None = None) -> State:
    """The store of an installation; `patience` as State's. Where it has canaries nobody makes an empty one in passing:
    nobody could say then who was blocked, and all would be let in."""
    wanted = settings.canaries
    there = bool(wanted.tokens or wanted.tables)
    return State(settings.server.state_file, must_exist=there, patience=patience)


class Blocked:
    """The rows of blocked, as they are now. That there is no store is a fault where it must exist; else it means that
    nothing is blocked."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._version: Version | None = None
        self._rows: Mapping[str, Block] = {}

    def current(self) -> Mapping[str, Block]:
        """{token id: why}; read again only when somebody has written. ConfigError where the store cannot be believed,
        or has gone since we have seen it."""
        if not self._state.path.exists():
            if self._state.must_exist or self._version is not None:
                raise self._state.missing()
            return {}
        version = self._state.version()
        if version != self._version:
            rows = self._state.rows("SELECT token, at, reason FROM blocked")
            self._rows = {token: Block(at, reason) for token, at, reason in rows}
            self._version = version
        return self._rows

    def block(self, blocks: Mapping[str, Block]) -> None:
        """Block these tokens. One that is blocked already stays as it is. Whoever holds the store is not waited for."""
        with self._state.change(SHORTLY) as connection:
            values = [(token, one.at, one.reason) for token, one in blocks.items()]
            connection.executemany("INSERT OR IGNORE INTO blocked VALUES (?, ?, ?)", values)

    def lift(self, token: str) -> Block:
        """Let a token in again. NotFoundError (exit 4) where it is not blocked."""
        if (found := self.current().get(token)) is None:  # looked at first: to fail makes no store
            raise NotFoundError(f"token {token} is not blocked", "`mcpctl token list` shows which are")
        with self._state.change() as connection:
            connection.execute("DELETE FROM blocked WHERE token = ?", (token,))
        return found

    def lift_all(self) -> list[str]:
        """Let all in again, and make the store where there is none; their ids."""
        with self._state.change() as connection:
            found = [token for (token,) in connection.execute("SELECT token FROM blocked ORDER BY token")]
            connection.execute("DELETE FROM blocked")
        return found
