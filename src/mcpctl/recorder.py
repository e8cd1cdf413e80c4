"""What goes into the audit log, how much of it, and what happens when it cannot be written."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any

from mcpctl.audit import AuditLog
from mcpctl.errors import UnavailableError

log = logging.getLogger("mcpctl.audit")
AGAIN = 3600.0
"""Seconds after which a credential's use from an address is noted once more."""
IN_FULL = 10
"""Refusals of one address in a minute that are written in full; further ones are counted in one line."""
_ADDRESSES = 10_000


class Recorder:
    """Writes events. `refuse` is whether a call may be answered while the log cannot be written."""

    def __init__(
        self, audit: AuditLog, statements: str, *, refuse: bool, clock: Callable[[], float] = monotonic
    ) -> None:
        self._audit = audit
        self._statements = statements
        self._refuse = refuse
        self._clock = clock
        self._failing = False
        self._greeted: OrderedDict[tuple[str | None, str | None], float] = OrderedDict()
        self._refused: OrderedDict[str | None, tuple[float, int]] = OrderedDict()

    def note(self, event: str, **fields: Any) -> None:
        """Write a line if it can be written. What must happen anyway (a revocation) uses this."""
        try:
            self._audit.append(event, **fields)
            self._failing = False
        except UnavailableError as problem:
            if not self._failing:
                log.error("%s%s", problem.message, f" ({problem.hint})" if problem.hint else "")
            self._failing = True

    def call(self, event: str, **fields: Any) -> None:
        """Write a call's line. Raises UnavailableError where it cannot be, and the config wants calls refused."""
        self.note(event, **fields)
        if self._failing and self._refuse:
            raise UnavailableError(
                "the audit log cannot be written, and no call is answered without it",
                "tell the administrator; calls are answered again as soon as it can be",
            )

    def before_call(self, **fields: Any) -> None:
        """While the log cannot be written nothing is run, either: the attempt itself is what is written first."""
        if self._failing and self._refuse:
            self.call("tool.refused", reason="the audit log could not be written just before", **fields)
            raise UnavailableError("the audit log could not be written just now", "ask again")

    def statement(self, text: str, *, described: bool) -> dict[str, str]:
        """How a statement is kept. What PostgreSQL described no columns of may hold a password: never its text."""
        if self._statements == "off":
            return {}
        if described and self._statements == "full":
            return {"statement": text}
        return {"statement_hmac": self._audit.statement_hmac(text)}

    def auth_ok(self, token: str | None, user: str | None, address: str | None, **fields: Any) -> None:
        """Once per credential and address an hour."""
        now = self._clock()
        who = (token, address)
        if now - self._greeted.get(who, -AGAIN) < AGAIN:
            return
        self._greeted[who] = now
        self._greeted.move_to_end(who)
        while len(self._greeted) > _ADDRESSES:
            self._greeted.popitem(last=False)
        self.note("auth.ok", token=token, user=user, client_ip=address, **fields)

    def auth_refused(self, address: str | None, reason: str, **fields: Any) -> None:
        """The first of an address and minute in full, the others counted: see `flush`."""
        now = self._clock()
        since, count = self._refused.get(address, (now, 0))
        self._refused[address] = (since, count + 1)
        if count < IN_FULL:
            self.note("auth.refused", client_ip=address, reason=reason, **fields)
        if len(self._refused) > _ADDRESSES:
            self._tell(*self._refused.popitem(last=False))

    def flush(self, *, everything: bool = False) -> None:
        """Write one counted line for each address whose minute is over."""
        now = self._clock()
        for address, (since, count) in list(self._refused.items()):
            if everything or now - since >= 60:
                del self._refused[address]
                self._tell(address, (since, count))

    def _tell(self, address: str | None, told: tuple[float, int]) -> None:
        if told[1] > IN_FULL:
            self.note("auth.refused", client_ip=address, reason=f"{told[1] - IN_FULL} more within a minute")
