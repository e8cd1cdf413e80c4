"""One tools/call from Principal to result: decide, run, audit. Both lanes of the server end here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from mcpctl.canaries import Canaries
from mcpctl.config import NAME
from mcpctl.config_keys import Database, Settings
from mcpctl.config_values import PARAMETER
from mcpctl.errors import (
    Error,
    ForbiddenError,
    LimitedError,
    NotFoundError,
    ScopeError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from mcpctl.facts import Answer, Facts, Request, Running, noted, refusal, uncancelled
from mcpctl.identity.own_databases import check_name
from mcpctl.identity.principal import Principal
from mcpctl.policy.access import Access
from mcpctl.policy.limits import Limiter
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.cutting import RENEWED, Cut
from mcpctl.postgres.login import OWN, Login
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.postgres.pools import NarrowedError, Pools, ended
from mcpctl.postgres.session import Session
from mcpctl.postgres.statement import NotAQuestionError, elapsed
from mcpctl.reach import Reach
from mcpctl.recorder import Recorder
from mcpctl.shared_counters import Slot
from mcpctl.tools.definition import Result, Tool, UnknownArgumentError
from mcpctl.tools.query import said, together
from mcpctl.tools.settings import GET, SET
from mcpctl.tools.table import TOOLS

log = logging.getLogger("mcpctl.calls")
_REMEMBERED = 10_000
_LATER = 2.0
"""Seconds beyond statement_timeout that one of several databases has, its connection's making included."""


class UnknownToolError(NotFoundError):
    """There is no tool of that name for this caller."""


class _Way(NamedTuple):
    """Where a call of one caller's leads, and what its answer may be, by the config and the caller's rights."""

    principal: Principal
    database: str
    shown: str
    login: Login
    bounds: Bounds


class Calls:
    """Everything a call needs, built once. HTTP enters by `limiter` before it reads the body; the other transports'
    calls enter here. `answering` is awaited before each answer, if there is anything to wait for."""

    def __init__(
        self,
        settings: Settings,
        logins: Logins,
        own: Own,
        pools: Pools,
        recorder: Recorder,
        limiter: Limiter,
        canaries: Canaries,
        answering: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.limiter = limiter
        self.canaries = canaries
        self._settings = settings
        self._access = Access(settings.auth)
        self._own = own
        self._pools = pools
        self._recorder = recorder
        self._answering = answering
        self.reach = Reach(settings, self._access, logins, own)
        self._running: set[Running] = set()
        self._ways: dict[tuple[int, str, str | None, str | None], _Way] = {}

    def tools(self, principal: Principal) -> list[Tool]:
        """The tools that a principal may call, in a fixed order: with a right on one database at least, where the tool
        needs more there than to read."""
        return [
            tool
            for tool in TOOLS.values()
            if self._access.may(principal, tool.permission).allowed
            and (tool.access == "read" or self.reach.databases(principal, tool.access))
            and (tool.own is None or self._brings(principal))
        ]

    def _brings(self, principal: Principal) -> bool:
        """Whether a principal may have databases of its own here: a user, where the config has a place for them."""
        return self._own.on and principal.user is not None and principal.tenant is None and principal.as_user is None

    async def call(
        self, principal: Principal, name: str, arguments: Mapping[str, Any] | None, request: Request
    ) -> Answer:
        """Run one tool. What is wrong with the call is an Answer; UnknownToolError, UnauthorizedError (the token
        ended meanwhile) and UnavailableError (no audit log) are raised."""
        begun = monotonic()
        own = request.task if request.direct else asyncio.current_task()
        task = request.task or own
        facts = request.facts = Facts(
            name if name in TOOLS else "(unknown)", client_ip=request.client_ip, trace=request.trace, task=own
        )
        entry = None
        if task is not None and own is not None:
            entry = Running(principal, request, task, own, facts, arguments or {}, begun)
        base = {"request_id": request.id, "token": principal.token, "user": principal.user, "tenant": principal.tenant,
                "client_ip": request.client_ip, "transport": request.transport, "tool": facts.tool}  # fmt: skip
        facts.base = base
        if self._recorder.failing:
            self._recorder.before_call()
        if self._own.started:
            self._own.look()
        event, outcome, reason, narrowed = "tool.called", "ok", None, None
        if entry is not None:
            self._running.add(entry)
        slots: Sequence[Slot] = ()
        try:
            if request.transport != "http":
                slots = self.limiter.enter(principal, request.client_ip, visited=request.transport == "sse")
            if self.limiter.budgets:
                self.limiter.check(principal, request.client_ip)
            tool = self._find(principal, name)
            result = await self._run(tool, principal, arguments, facts)
            request.databases.update(facts.uses)
            facts.values.update(rows=result.rows, bytes=result.bytes)
            reason, outcome = result.command, facts.outcome
            answer = Answer(result.text)
        except LimitedError as problem:
            facts.limited = problem
            return _failed(problem)
        except NarrowedError as problem:
            event, outcome, reason = "tool.refused", "cut", problem.message
            return _failed(problem)
        except (UsageError, ForbiddenError, NotAQuestionError) as problem:
            told = noted(problem) if isinstance(problem, UnknownArgumentError) else problem.message
            event, outcome, reason, facts.refusal = "tool.refused", "refused", told, refusal(problem)
            if not facts.uses and facts.tool in (GET.name, SET.name):
                reason = self._tried(principal, arguments or {}, facts) + told
            if isinstance(problem, ScopeError) and request.transport == "http":  # which tells the client to ask for it
                raise
            return _failed(problem)
        except UnknownToolError:
            event, outcome, reason, facts.refusal = "tool.refused", "refused", "there is no such tool", "unknown_tool"
            raise
        except UnauthorizedError as problem:
            event, outcome, reason = "tool.refused", "cut", problem.message
            raise
        except Error as problem:
            outcome, reason = "error", noted(problem)
            return _failed(problem)
        except asyncio.CancelledError:
            if facts.stopped is not None and uncancelled():
                event, outcome, reason = "tool.refused", "cut", facts.stopped
                return _failed(NarrowedError(facts.stopped))
            outcome, reason = "cancelled", f"the client went away, or {self.ends}"
            if not self._pools.valid(principal):
                event, outcome, reason = "tool.refused", "cut", ended(principal)
            raise
        except Exception:
            outcome, reason = "error", "internal error"
            log.exception("request %s: %s failed", request.id, facts.tool, extra={"about": base})
            return Answer(f"Internal error. Tell the administrator: request {request.id}.", is_error=True)
        finally:
            if entry is not None:
                self._running.discard(entry)
            if slots:
                self.limiter.leave(slots)
            if facts.limited is not None:
                self._recorder.limited(facts.limited, **base)
            else:
                try:
                    facts.values.update(elapsed_ms=elapsed(begun), outcome=outcome, reason=facts.reason(reason))
                    line = {**base, **facts.values}
                    if outcome == "ok" and (self._running or self._recorder.shared):
                        narrowed = await self._write(principal, line, facts)
                    else:
                        self._recorder.call(event, line, facts.trace, facts.refusal)
                finally:
                    if self.limiter.budgets:
                        self._charge(principal, facts)
            if self._answering is not None:
                try:
                    await self._answering()
                except UnavailableError:  # the line that stands there, or is lost, may say ok
                    withheld = "its answer did not leave: its line was not known to be on disk"
                    self._recorder.note("tool.refused", **base, outcome="error", reason=withheld)
                    raise
        return answer if narrowed is None else _failed(narrowed)

    async def _write(self, principal: Principal, line: dict[str, Any], facts: Facts) -> NarrowedError | None:
        """Have the line of a call that went well written with those of the others that end now. What ends meanwhile
        keeps its answer back, which another line says: what is returned, or raised as `Pools.check` does."""
        try:
            if (unwritten := await self._recorder.ended("tool.called", line, facts.trace)) is not None:
                raise unwritten
            for database in facts.uses:
                self._pools.check(principal, database)
            return None
        except (NarrowedError, UnauthorizedError, asyncio.CancelledError) as problem:
            gone = isinstance(problem, asyncio.CancelledError)
            reason = f"its answer did not leave: {f'the client went away, or {self.ends}' if gone else problem}"
            self._recorder.note("tool.refused", **facts.base, outcome="cancelled" if gone else "cut", reason=reason)
            if isinstance(problem, NarrowedError):
                return problem
            raise

    def _charge(self, principal: Principal, facts: Facts) -> None:
        """Charge a call to the budgets, however it ended."""
        rows, size = facts.values.get("rows") or 0, facts.values.get("bytes") or 0
        self.limiter.charge(principal, facts.client_ip, rows=rows, size=size, seconds=facts.seconds)

    def _tried(self, principal: Principal, arguments: Mapping[str, Any], facts: Facts) -> str:
        """Note the database that a call meant which never came there, and say the setting, as far as each has the form
        of a name: what has not may be a connection string, or whatever the caller has sent."""
        database, setting = arguments.get("database") or self.reach.default(principal), arguments.get("name")
        if isinstance(database, str) and NAME.fullmatch(database):
            brought = principal.user is not None and self._own.has(principal.user, database)
            facts.values.setdefault("database", OWN + database if brought else database)
        return f"{setting}: " if isinstance(setting, str) and PARAMETER.fullmatch(setting.lower()) else ""

    def _find(self, principal: Principal, name: str) -> Tool:
        tool = TOOLS.get(name)
        if tool is None:
            raise UnknownToolError(f"Unknown tool: {name[:60]}")  # told the caller, and not logged: it may be anything
        decision = self._access.may(principal, tool.permission)
        if not decision.allowed:
            self._access.check_scope(principal, tool.permission)
            hint = "whoami shows what you have" if name != "whoami" else "ask the administrator for a role that may"
            raise ForbiddenError(f"{tool.name}: {decision.reason}", hint)
        if tool.own is not None and principal.tenant is not None:
            raise ForbiddenError(f"{tool.name}: you belong to a tenant, whose users have its place alone")
        if tool.own is not None and not self._brings(principal):
            raise ForbiddenError(
                f"{tool.name}: only users can bring databases, where the config names hosts for them (own_databases)"
            )
        return tool

    async def _run(self, tool: Tool, principal: Principal, arguments: Mapping[str, Any] | None, facts: Facts) -> Result:
        checked = tool.check(arguments)
        if tool.tell is not None:
            return tool.tell(principal, self.reach.known(principal))
        if tool.own is not None:
            return await self._run_own(tool, principal, checked, facts)
        if tool.ask is None:
            raise TypeError(f"{tool.name} neither asks nor tells")
        one, several = checked.pop("database", None), checked.pop("databases", None)
        try:
            if several is None:
                way = self._way(tool, principal, one, facts.client_ip)
                facts.values["database"] = way.shown
                return await self._ask(tool, way, checked, way.bounds, facts)
            if one is not None:
                raise UsageError(f"{tool.name} takes database or databases, not both", "leave one of them out")
            names = [self.reach.one(principal, name, tool.access) for name in dict.fromkeys(several)]
            facts.values["database"] = ",".join(self.reach.shown(name) for name in names)
            facts.several, facts.task = len(names) > 1, None
            return await self._ask_several(tool, principal, names, checked, facts)
        finally:
            if tool.statement is not None:
                described = tool.access == "read" and facts.described
                kept = self._recorder.statement(checked[tool.statement], described=described)
                facts.values.update(kept, relations=facts.relations)
                self._recorder.ran(kept, facts.base, facts.trace)

    def _way(self, tool: Tool, principal: Principal, database: str | None, address: str | None) -> _Way:
        """Where a call leads that names this database, or none. A principal and the config never change, so what was
        found is remembered; but a user may bring a database of that name at any time."""
        asked = (id(principal), tool.access, database, address)
        known = self._ways.get(asked)
        if known is not None and not (principal.user is not None and self._own.has(principal.user, known.database)):
            return known
        name = self.reach.one(principal, database, tool.access)
        login = self.reach.login(principal, name, tool.access)
        found = _Way(principal, name, self.reach.shown(name), login, self._bounds(login.settings, principal, address))
        if name in self._settings.databases and (database is not None or self.reach.fixed(principal)):
            if len(self._ways) >= _REMEMBERED:
                self._ways.clear()
            self._ways[asked] = found  # the principal, so that its id stays its own
        return found

    async def _run_own(self, tool: Tool, principal: Principal, arguments: dict[str, Any], facts: Facts) -> Result:
        """Do something with the databases that the caller's user has brought. A token for some databases only neither
        brings others nor takes them away."""
        if tool.own is None or principal.user is None:
            raise TypeError(f"{tool.name} is not for {principal.name}")
        name = arguments.get("name")
        if name is not None:
            check_name(name, {})  # what is none may be a connection string, which is neither logged nor repeated
            facts.values["database"] = OWN + name
            decision = self._access.may(principal, f"databases:{name}:read")
            if not decision.allowed and name not in principal.closed:  # a tenant's is taken, as any of the config
                raise ForbiddenError(f"{tool.name}: {decision.reason}", "whoami shows what you have")
        return await tool.own(
            self._own,
            principal.user,
            arguments,
            lambda name: self._access.may(principal, f"databases:{name}:read").allowed,
        )

    def _ask(
        self, tool: Tool, way: _Way, arguments: dict[str, Any], bounds: Bounds, facts: Facts
    ) -> Coroutine[Any, Any, Result]:
        """Ask one database."""
        ask = self._in_turn if way.login.for_settings else self._asked
        return ask(tool, way, arguments, bounds, facts)

    async def _in_turn(self, tool: Tool, way: _Way, arguments: dict[str, Any], bounds: Bounds, facts: Facts) -> Result:
        """Ask as one who sees to a database's settings."""
        async with self._pools.turn(way.login):
            return await self._asked(tool, way, arguments, bounds, facts)

    async def _asked(self, tool: Tool, way: _Way, arguments: dict[str, Any], bounds: Bounds, facts: Facts) -> Result:
        """Ask on a connection of the caller's own pool."""
        if tool.ask is None:
            raise TypeError(f"{tool.name} asks nothing")
        principal, login = way.principal, way.login
        session = await self._pools.take(principal, login, facts.task)
        try:
            facts.session(session, login.name)
            begun = monotonic()
            session.use.trace = facts.trace
            session.use.guard = self.canaries.guard(principal, facts.client_ip, login.shown)
            if tool.changes:
                session.use.lasts = partial(self._begins, arguments.get(tool.statement or ""), facts)
            try:
                result = await tool.ask(session, arguments, bounds)
            except Error:
                if session.cut:
                    raise self._ended(principal, login, session) from None
                raise
            except asyncio.CancelledError:
                if session.cut and self._removed(principal) and uncancelled():
                    raise self._ended(principal, login, session) from None
                raise
            finally:
                facts.spent(login.shown, begun)
            if session.cut:
                raise self._ended(principal, login, session)
        finally:
            if not self._pools.put_back(session):
                await self._pools.give_back(session)
        self._pools.check(principal, login.name)
        return result

    def _begins(self, text: str | None, facts: Facts) -> None:
        """Write down what is about to stay: where the process is killed, the call's own line never comes. Raises
        UnavailableError as the recorder does."""
        kept: dict[str, Any] = {}
        if text is not None:
            kept = {**self._recorder.statement(text, described=False), "relations": facts.relations}
        self._recorder.call("tool.begun", {**facts.base, **facts.values, **kept, "reason": facts.reason(None)})

    async def _ask_several(
        self, tool: Tool, principal: Principal, names: list[str], arguments: dict[str, Any], facts: Facts
    ) -> Result:
        """Ask several at the same time. What goes wrong with one stands beside the others' rows; what ends the call as
        a whole (the token's end, the client's going) ends it."""

        async def ask(name: str) -> Result | Error:
            seconds = _LATER
            try:
                way = self._way(tool, principal, name, facts.client_ip)
                facts.values.setdefault("database", way.shown)
                seconds += way.bounds.seconds
                bounds = replace(way.bounds, bytes=way.bounds.bytes // len(names))
                async with asyncio.timeout(seconds):
                    return await self._ask(tool, way, dict(arguments), bounds, facts)
            except UnauthorizedError:
                raise
            except Error as problem:
                return problem
            except TimeoutError:
                return UnavailableError(f"database {name!r} gave no answer in {seconds:g} s", "ask it alone, or later")

        tasks = [asyncio.ensure_future(ask(name)) for name in names]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            facts.uses = {self.reach.shown(name): use for name, use in facts.uses.items()}
        results = {name: self._still(principal, name, one) for name, one in zip(names, found, strict=True)}
        failed = [f"{self.reach.shown(name)}: {noted(one)}" for name, one in results.items() if isinstance(one, Error)]
        facts.outcome = "ok" if not failed else "partial" if len(failed) < len(names) else "error"
        done = together(results)
        done.command = "; ".join(failed) or None
        return done

    def _still(self, principal: Principal, name: str, found: Result | Error) -> Result | Error:
        """What was found, unless the right to it was taken while the others were waited for."""
        try:
            self._pools.check(principal, name)
        except NarrowedError as problem:
            return problem
        return found

    def _removed(self, principal: Principal) -> bool:
        """Whether what was cut is this one database's alone: neither the token nor the server ends."""
        return self._pools.valid(principal) and not self._pools.closed

    def _ended(self, principal: Principal, login: Login, session: Session) -> Error:
        """Why a session was cut under its call."""
        if self._pools.closed:
            return UnavailableError(self.ends, "ask again in a moment")
        try:
            self._pools.check(principal, login.name)
        except Error as problem:
            return problem
        if session.pool.ended == RENEWED:
            return UnavailableError(RENEWED, "your token is fine; ask again")
        return NarrowedError(session.pool.ended or f"the database {login.name!r} was removed while the call ran")

    def _bounds(self, database: Database, principal: Principal, address: str | None) -> Bounds:
        every, own = self._settings.limits, database.limits
        rows, size = own.max_rows or every.max_rows, own.max_bytes or every.max_bytes
        seconds = own.statement_timeout or every.statement_timeout
        return Bounds(*self.limiter.smallest(principal, address, rows, size, seconds))

    async def cut(self, token: str | None, reason: str) -> Cut:
        """End all that a token has open where it has no longer the rights that it had, running calls included. What it
        was let in for since, with the rights that it has now, goes on."""
        done = await self._pools.cut(token, reason)
        for one in list(self._running):
            if one.principal.token == token and not self._pools.valid(one.principal):
                one.task.cancel()
        return done

    async def end(self, token: str, reason: str) -> Cut:
        """End all that a token has open now, running calls included, although it stays valid: its next call begins
        anew. `reason` is what its calls are told."""
        victims = [one for one in self._running if one.principal.token == token]
        done = await self._pools.end(token, reason)
        for one in self._running.intersection(victims):
            one.task.cancel()
        return done

    def stop(self, request_id: str, reason: str) -> Running | None:
        """Have one running call end, whose caller is told `reason`; None where none of that id runs here."""
        one = next((one for one in self._running if one.request.id == request_id), None)
        if one is not None:
            one.facts.stopped = reason
            one.own.cancel()
        return one

    @property
    def ends(self) -> str:
        """Why calls are cut where neither a client nor an administrator does it."""
        return self._pools.ends

    def running(self) -> list[Running]:
        """What runs now, the longest first."""
        return sorted(self._running, key=lambda one: one.begun)

    def matching(self, token: str | None, rpc_id: str | int) -> int:
        """How many calls of that token and client's number run here."""
        return len(self._same(token, rpc_id))

    def cancel(self, token: str | None, rpc_id: str | int) -> None:
        """End the calls of that token and client's number."""
        for task in self._same(token, rpc_id):
            task.cancel()

    def _same(self, token: str | None, rpc_id: str | int) -> list[asyncio.Task[Any]]:
        return [
            one.task
            for one in self._running
            if one.principal.token == token
            and one.request.rpc_id == rpc_id
            and type(one.request.rpc_id) is type(rpc_id)
        ]


def _failed(problem: Error) -> Answer:
    return Answer(said(problem), is_error=True)
