"""One tools/call from Principal to result: decide, run, audit. Both lanes of the server end here."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from mcpctl.config import default_database
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, ForbiddenError, NotFoundError, UnauthorizedError, UnavailableError, UsageError
from mcpctl.identity.principal import Principal
from mcpctl.policy import access
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.cutting import Cut
from mcpctl.postgres.pools import Pools
from mcpctl.postgres.statement import NotAQuestionError, StatementError, elapsed
from mcpctl.postgres.token_pool import Session
from mcpctl.recorder import Recorder
from mcpctl.tools.definition import Databases, Result, Tool
from mcpctl.tools.table import TOOLS

log = logging.getLogger("mcpctl.calls")


@dataclass(frozen=True, slots=True)
class Request:
    """Where a call came from. `rpc_id` is the client's own number for it, `task` what to cancel to end it (None: the
    task that runs it)."""

    id: str
    client_ip: str | None
    transport: str
    rpc_id: str | int | None = None
    task: "asyncio.Task[Any] | None" = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: `text` for people and models, `structured` for programs (None with an error)."""

    text: str
    structured: dict[str, Any] | None
    is_error: bool = False


class UnknownToolError(NotFoundError):
    """There is no tool of that name for this caller."""


@dataclass
class _Facts:
    """What the audit line says of one call, gathered on the way."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)

    def session(self, session: Session, database: str) -> None:
        self.values.update(database=database, role=session.login, backend_pid=session.pid)


class Calls:
    """Everything a call needs, built once."""

    def __init__(self, settings: Settings, pools: Pools, recorder: Recorder) -> None:
        self._settings = settings
        self._pools = pools
        self._recorder = recorder
        self._default = default_database(settings)
        self._running: set[tuple[Principal, Request, asyncio.Task[Any]]] = set()

    def tools(self, principal: Principal) -> list[Tool]:
        """The tools that a principal may call, in a fixed order."""
        return [tool for tool in TOOLS.values() if access.may(principal, tool.permission).allowed]

    async def call(
        self, principal: Principal, name: str, arguments: Mapping[str, Any] | None, request: Request
    ) -> Answer:
        """Run one tool. What is wrong with the call is an Answer; UnknownToolError, UnauthorizedError (the token
        ended meanwhile) and UnavailableError (no audit log) are raised."""
        begun = monotonic()
        task = request.task or asyncio.current_task()
        entry = (principal, request, task) if task is not None else None
        facts = _Facts(name[:60])
        base = {"request_id": request.id, "token": principal.token, "user": principal.user, "tenant": principal.tenant,
                "client_ip": request.client_ip, "transport": request.transport, "tool": facts.tool}  # fmt: skip
        self._recorder.before_call()
        event, outcome, reason = "tool.called", "ok", None
        if entry is not None:
            self._running.add(entry)
        try:
            tool = self._find(principal, name)
            result = await self._run(tool, principal, arguments, facts)
            facts.values.update(rows=result.rows, bytes=result.bytes)
            return Answer(result.text, result.structured)
        except (UsageError, ForbiddenError, NotAQuestionError) as problem:
            event, outcome, reason = "tool.refused", "refused", problem.message
            return _failed(problem)
        except UnknownToolError as problem:
            event, outcome, reason = "tool.refused", "refused", problem.message
            raise
        except UnauthorizedError as problem:
            event, outcome, reason = "tool.refused", "cut", problem.message
            raise
        except StatementError as problem:  # its words may quote what only the caller may know
            outcome, reason = "error", f"SQLSTATE {problem.fields.get('sqlstate', 'none')}"
            return _failed(problem)
        except Error as problem:
            outcome, reason = "error", problem.message
            return _failed(problem)
        except asyncio.CancelledError:
            outcome, reason = "cancelled", "the client went away, or the server stops"
            if not self._pools.valid(principal):
                event, outcome, reason = "tool.refused", "cut", "the token ended while the call ran"
            raise
        except Exception:
            outcome, reason = "error", "internal error"
            log.exception("request %s: %s failed", request.id, facts.tool)
            return Answer(f"Internal error. Tell the administrator: request {request.id}.", None, is_error=True)
        finally:
            if entry is not None:
                self._running.discard(entry)
            self._recorder.call(
                event, **base, **facts.values, elapsed_ms=elapsed(begun), outcome=outcome, reason=reason
            )

    def _find(self, principal: Principal, name: str) -> Tool:
        tool = TOOLS.get(name)
        if tool is None:
            raise UnknownToolError(f"Unknown tool: {name[:60]}")
        decision = access.may(principal, tool.permission)
        if not decision.allowed:
            raise ForbiddenError(f"{tool.name}: {decision.reason}", "whoami shows what you have")
        return tool

    async def _run(
        self, tool: Tool, principal: Principal, arguments: Mapping[str, Any] | None, facts: _Facts
    ) -> Result:
        checked = tool.check(arguments)
        if tool.tell is not None:
            return tool.tell(principal, self._databases(principal))
        if tool.ask is None:
            raise TypeError(f"{tool.name} neither asks nor tells")
        database = self._database(principal, checked.pop("database", None))
        facts.values["database"] = database
        session = None
        try:
            async with self._borrow(principal, database, facts) as session:
                return await tool.ask(session, checked, self._bounds(database))
        finally:
            described, relations = (session.described, session.relations) if session else (False, None)
            if tool.statement is not None:
                kept = self._recorder.statement(checked[tool.statement], described=described)
                facts.values.update(kept, relations=relations)

    @contextlib.asynccontextmanager
    async def _borrow(self, principal: Principal, database: str, facts: _Facts) -> AsyncIterator[Session]:
        async with self._pools.borrow(principal, database) as session:
            facts.session(session, database)
            try:
                yield session
            except Error:
                if session.cut:
                    raise self._ended(principal) from None
                raise
            if session.cut:
                raise self._ended(principal)

    def _ended(self, principal: Principal) -> Error:
        """Why a session was cut under its call."""
        if self._pools.closed:
            return UnavailableError("the server is stopping", "ask again in a moment")
        return UnauthorizedError("the token ended while the call ran", token_id=principal.token)

    def _databases(self, principal: Principal) -> Databases:
        allowed = {
            name: database.description
            for name, database in self._settings.databases.items()
            if access.may(principal, f"databases:{name}:read").allowed
        }
        default = self._default_for(principal)
        return Databases(allowed, default)

    def _default_for(self, principal: Principal) -> str | None:
        if principal.databases is not None and len(principal.databases) == 1:
            return principal.databases[0]
        return self._default

    def _database(self, principal: Principal, name: str | None) -> str:
        """The database that is meant, if the principal may read it. One that it may not is as if it were not."""
        wanted = name or self._default_for(principal)
        if wanted is None:
            raise UsageError("there is no default database", "name one; list_databases shows those you may ask")
        decision = access.may(principal, f"databases:{wanted}:read")
        if wanted not in self._settings.databases or not decision.allowed:
            raise ForbiddenError(
                f"there is no database {wanted[:63]!r} for you", "list_databases shows those you may ask"
            )
        return wanted

    def _bounds(self, database: str) -> Bounds:
        every, own = self._settings.limits, self._settings.databases[database].limits
        return Bounds(
            own.max_rows or every.max_rows,
            own.max_bytes or every.max_bytes,
            own.statement_timeout or every.statement_timeout,
        )

    async def cut(self, token: str | None, reason: str) -> Cut:
        """End all that a token has open, running calls included."""
        done = await self._pools.cut(token, reason)
        for principal, _, task in list(self._running):
            if principal.token == token:
                task.cancel()
        return done

    def matching(self, token: str | None, rpc_id: str | int) -> int:
        """How many calls of that token and client's number run here."""
        return len(self._same(token, rpc_id))

    def cancel(self, token: str | None, rpc_id: str | int) -> None:
        """End the calls of that token and client's number."""
        for task in self._same(token, rpc_id):
            task.cancel()

    def _same(self, token: str | None, rpc_id: str | int) -> list[asyncio.Task[Any]]:
        return [
            task
            for principal, request, task in self._running
            if principal.token == token and request.rpc_id == rpc_id and type(request.rpc_id) is type(rpc_id)
        ]


def _failed(problem: Error) -> Answer:
    """An error as text: PostgreSQL's own words with SQLSTATE, detail, hint and position, or ours with its hint."""
    lines = [problem.message]
    fields = problem.fields if isinstance(problem, StatementError) else {"hint": problem.hint}
    for name in ("sqlstate", "detail", "hint", "position", "context"):
        if value := fields.get(name):
            lines.append(f"{name.upper() if name == 'sqlstate' else name.capitalize()}: {value}")
    return Answer("\n".join(lines), None, is_error=True)
