"""What is known of one call when it ends, for its audit line and for who is charged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mcpctl.audit.log import MORE
from mcpctl.errors import LimitedError
from mcpctl.postgres.session import Session, Use


@dataclass(slots=True)
class Facts:
    """What the audit line says of one call, gathered on the way."""

    tool: str
    address: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)
    several: bool = False
    outcome: str = "ok"
    client_ip: str | None = None
    seconds: float = 0.0
    limited: LimitedError | None = None
    base: Mapping[str, Any] = field(default_factory=dict)

    def session(self, session: Session, database: str) -> None:
        """One of several databases that are asked at once adds to what the others have said."""
        self.uses[database] = session.use  # and never the session, which is another call's by the end of this one
        self.roles.append(session.login)
        self.values.update(
            database=self.values.get("database", database),
            role=",".join(dict.fromkeys(self.roles)),
            backend_pid=session.pid if len(self.uses) == 1 else None,
        )

    @property
    def relations(self) -> tuple[str, ...] | None:
        """What was read; with the database's name before it where several were asked, whoever of them answered."""
        if not self.several:
            return next((use.read for use in self.uses.values()), None)
        if all(use.relations is None for use in self.uses.values()):
            return None
        read = {name: (MORE,) if use.read is None else use.read for name, use in sorted(self.uses.items())}
        return tuple(f"{name}:{one}" for name, found in read.items() for one in found)

    @property
    def described(self) -> bool:
        """Whether PostgreSQL has described columns of the statement, wherever it came."""
        return any(use.described for use in self.uses.values())

    def reason(self, reason: str | None) -> str | None:
        """What was done, where the line must say it, before how it ended."""
        did = [use.did for use in self.uses.values() if use.did is not None]
        return ": ".join(did + ([reason] if reason is not None else [])) or None
