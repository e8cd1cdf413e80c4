"""One call: where it came from, and what is known of it when it ends, for its audit line and for who is charged."""

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import Any

from msgspec import Struct, field, json

from mcpctl.audit.log import MORE
from mcpctl.errors import Error, ForbiddenError, LimitedError, ScopeError, UsageError
from mcpctl.identity.principal import Principal
from mcpctl.postgres.catalog import NothingThereError
from mcpctl.postgres.said import StatementError
from mcpctl.postgres.session import Session, Use
from mcpctl.tools.definition import UnknownArgumentError

_REFUSALS = ((ScopeError, "scope"), (ForbiddenError, "forbidden"), (UsageError, "arguments"))


def refusal(problem: Error) -> str:
    """The kind of a refusal of a call, one of four words: `not_a_question` is what reading tools do not run."""
    return next((name for kind, name in _REFUSALS if isinstance(problem, kind)), "not_a_question")


class Facts(Struct, eq=False):
    """What the audit line says of one call, gathered on the way. `task`: what runs it, where that is one alone.
    `stopped`: why an administrator has it end, `asked`: which databases it had a connection to, from when to when by
    the monotonic clock, where its `trace` is wanted."""

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
    trace: str | None = None
    stopped: str | None = None
    asked: list[tuple[str, float, float]] = field(default_factory=list)
    task: "asyncio.Task[Any] | None" = None

    def session(self, session: Session, database: str) -> None:
        """One of several databases that are asked at once adds to what the others have said."""
        self.uses[database] = session.use  # and never the session, which is another call's by the end of this one
        self.roles.append(session.login)
        values, first = self.values, len(self.uses) == 1
        values.setdefault("database", database)
        values["role"] = session.login if len(self.roles) == 1 else ",".join(dict.fromkeys(self.roles))
        values["backend_pid"] = session.pid if first else None

    def spent(self, database: str, begun: float) -> None:
        """Count the time since then, for which the call had a connection to this database."""
        now = monotonic()
        self.seconds += now - begun
        if self.trace is not None:
            self.asked.append((database, begun, now))

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
        did: list[str] | None = None
        for use in self.uses.values():
            if use.did is not None:
                did = [*(did or ()), use.did]
        if did is None:
            return reason or None
        return ": ".join([*did, reason] if reason else did) or None


class Answer(Struct, eq=False):
    """What goes back: `text` for people and models, which is JSON but for an error's."""

    text: str
    is_error: bool = False

    @property
    def structured(self) -> dict[str, Any] | None:
        """The same for programs, read from the text; None with an error."""
        found: dict[str, Any] | None = None if self.is_error else json.decode(self.text)
        return found


class Request(Struct, eq=False):
    """Where a call came from. `rpc_id` is the client's own number for it, `task` what to cancel to end it (None: the
    task that runs it), `direct` whether it is that very task, `databases` what its answer holds
    something of. `carried`: what the client says of the trace that it is part of, `trace` its id where it is collected,
    and `facts` what is known of the call, once it has begun.
    """

    id: str
    client_ip: str | None
    transport: str
    rpc_id: str | int | None = None
    task: "asyncio.Task[Any] | None" = None
    direct: bool = False
    databases: set[str] = field(default_factory=set)
    carried: Mapping[str, Any] | None = None
    trace: str | None = None
    facts: Facts | None = None


class Running(Struct, eq=False):
    """A call that has not ended. `task` is its request's, and `own` the call's, which may be one within it; `begun` is
    of the monotonic clock, `arguments` are as they came."""

    principal: Principal
    request: Request
    task: "asyncio.Task[Any]"
    own: "asyncio.Task[Any]"
    facts: Facts
    arguments: Mapping[str, Any]
    begun: float


def noted(problem: Error) -> str:
    """What the audit line says of an error. PostgreSQL's own words may quote what only the caller may know."""
    if isinstance(problem, UnknownArgumentError):  # its name is whatever the caller has sent
        return "an argument that the tool does not take"
    if isinstance(problem, StatementError):
        return f"SQLSTATE {problem.fields.get('sqlstate', 'none')}"
    return "there is nothing of that name to read" if isinstance(problem, NothingThereError) else problem.message


def uncancelled() -> bool:
    """Take back the one cancel of this task; False where somebody else has cancelled it too."""
    task = asyncio.current_task()
    return task is not None and task.uncancel() == 0
