"""What is known of one call when it ends, for its audit line and for who is charged."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from mcpctl.audit.log import MORE
from mcpctl.errors import Error, ForbiddenError, LimitedError, ScopeError, UsageError
from mcpctl.postgres.session import Session, Use

_REFUSALS = ((ScopeError, "scope"), (ForbiddenError, "forbidden"), (UsageError, "arguments"))


def refusal(problem: Error) -> str:
    """The kind of a refusal of a call, one of four words: `not_a_question` is what reading tools do not run."""
    return next((name for kind, name in _REFUSALS if isinstance(problem, kind)), "not_a_question")


class Facts(Struct, eq=False):
    """What the audit line says of one call, gathered on the way."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)
    several: bool = False
    outcome: str = "ok"
    client_ip: str | None = None
    seconds: float = 0.0
    limited: LimitedError | None = None
    refusal: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)

    def session(self, session: Session, database: str) -> None:
        """One of several databases that are asked at once adds to what the others have said."""
        self.uses[database] = session.use  # and never the session, which is another call's by the end of this one
        self.roles.append(session.login)
        values, first = self.values, len(self.uses) == 1
        values.setdefault("database", database)
        values["role"] = session.login if len(self.roles) == 1 else ",".join(dict.fromkeys(self.roles))
        values["backend_pid"] = session.pid if first else None

    @property
    def relations(self) -> tuple[str, ...] | None:
        """What was read; with the database's name before it where several were asked, whoever of them answered."""
        if not self.several:
            for use in self.uses.values():
                return use.read
            return None
        if all(use.relations is None for use in self.uses.values()):
            return None
        read = {name: (MORE,) if use.read is None else use.read for name, use in sorted(self.uses.items())}
        return tuple(f"{name}:{one}" for name, found in read.items() for one in found)

    @property
    def described(self) -> bool:
        """Whether PostgreSQL has described columns of the statement, wherever it came."""
        described = False
        for use in self.uses.values():
            described = described or use.described
        return described

    def reason(self, reason: str | None) -> str | None:
        """What was done, where the line must say it, before how it ended."""
        did = [use.did for use in self.uses.values() if use.did is not None]
        return ": ".join([*did, reason] if reason else did) or None if did else reason or None
