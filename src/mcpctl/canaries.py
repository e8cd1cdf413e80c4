"""Canaries: tokens and tables that nobody should use. Whoever does is blocked at once, and somebody is told.

A table counts as touched when PostgreSQL's own plan for a statement reads it, which is known before a row leaves.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mcpctl.config_keys import Settings
from mcpctl.errors import Error, ForbiddenError, UnauthorizedError, UnavailableError
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.blocked import Block, Blocked
from mcpctl.identity.principal import Principal
from mcpctl.identity.tokens import Token, rfc3339, utcnow
from mcpctl.postgres.said import StatementError
from mcpctl.postgres.session import Guard
from mcpctl.recorder import Recorder
from mcpctl.shared_table import Table
from mcpctl.state import State

log = logging.getLogger("mcpctl.canaries")


class Canaries:
    """Those of one installation, and the tokens that they have blocked. `unwritten` are those that the store has had
    no room for yet, {token: (at, reason)}, by any worker; they outlive this object."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        authenticator: Authenticator,
        recorder: Recorder,
        twins: Mapping[str, Sequence[str]] = {},
        unwritten: Table | None = None,
        now: Callable[[], datetime] = utcnow,
    ) -> None:
        wanted = settings.canaries
        self._tables: dict[str, set[str]] = {}
        for one in wanted.tables:
            database, _, table = one.partition(".")
            self._tables.setdefault(database, set()).add(table)
        self._twins = twins
        self._blocked = Blocked(state)
        self._authenticator = authenticator
        self._recorder = recorder
        self._now = now
        self.unwritten = unwritten or Table()
        self._known: dict[str, str] = {}
        self._needed = state.must_exist
        self._said: str | None = None
        authenticator.canaries = frozenset(wanted.tokens)
        authenticator.tripped = self._used

    def start(self) -> None:
        """Take note of who is blocked. Raises an Error where nobody can say."""
        self._known = {token: one.words for token, one in self._blocked.current().items()}
        self._keep_out()

    def _keep_out(self) -> None:
        new = {token: one.words for token, one in self._new().items()}
        self._authenticator.keep_out("canary", {**new, **self._known})

    def _new(self) -> dict[str, Block]:
        return {token: Block(*one) for token, one in self.unwritten.read().items()}

    def look(self) -> None:
        """Take note of who is blocked now. While nobody can say, nobody is let in; while the store is only busy or
        full, or there is no canary, those count whom we know of."""
        before, self._said, self._authenticator.broken = self._said, None, None
        try:
            if new := self._new():
                self._blocked.block(new)
                self.unwritten.change({}, less=new)
            self.start()
        except Error as problem:
            self._said = problem.message
            if self._needed and not isinstance(problem, UnavailableError):
                self._authenticator.broken = problem
            elif before != problem.message:
                log.warning("who is blocked is as it was: %s", problem.message)
            self._keep_out()

    def _used(self, token: Token, address: str | None) -> None:
        if token.id not in self._authenticator.kept_out("canary"):
            self._trip(token.id, token.user, address, "it is a canary, and was used", {})

    def guard(self, principal: Principal, address: str | None, database: str) -> Guard | None:
        """What looks at the relations that a statement of that caller's reads there; None where there is nothing to
        look for. It raises where one is a canary, or where nobody can say what is read."""
        if not self._tables:
            return None
        names = (database, *self._twins.get(database, ()))
        tables = {table for name in names for table in self._tables.get(name, ())}
        if not tables:
            return None

        def look(relations: tuple[str, ...] | None) -> None:
            if relations is None:
                raise StatementError(
                    "PostgreSQL did not say which tables this reads, and so it is not answered",
                    {"hint": "if it was cut off, ask for fewer rows with LIMIT"},
                )
            if touched := sorted(tables & set(relations)):
                what = ", ".join(f"{database}.{one}" for one in touched)
                fields = {"database": database, "relations": touched}
                self._trip(principal.token, principal.user, address, f"it touched the canary {what}", fields)
                if principal.token is None:
                    raise ForbiddenError("that is not for anybody")
                raise UnauthorizedError("the token was blocked by a canary", token_id=principal.token)

        return look

    def _trip(
        self, token: str | None, user: str | None, address: str | None, why: str, fields: Mapping[str, Any]
    ) -> None:
        """Block the token, if there is one, and tell."""
        who = f"token {token} ({user or 'service'})" if token is not None else "a caller without a token"
        extra = {"about": {"token": token, "user": user, "client_ip": address}}
        log.error("ALERT canary: %s, from %s: %s", who, address or "this machine", why, extra=extra)
        self._recorder.note("token.blocked", token=token, user=user, client_ip=address, reason=why, **fields)
        if token is not None:
            self.unwritten.change({token: (rfc3339(self._now()), why)})
            self.look()
