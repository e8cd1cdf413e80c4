"""PostgreSQL's settings: what they are, and one of them changed for the whole cluster.

ALTER SYSTEM cannot stand in a transaction block, so it goes alone, on a connection that is closed afterwards. It writes
`postgresql.auto.conf`; `pg_reload_conf()` has all processes read the files again; `pg_conf_load_time()` says when this
one has. PostgreSQL judges the value, and one that it does not take changes nothing. PostgreSQL's manual: ALTER SYSTEM,
"pg_settings", "Configuration Settings Functions".

    RESET ALL · sync · look · sync · ALTER SYSTEM · sync · pg_reload_conf() · sync · look · sync · look · …

RESET ALL comes first, since a look must show the server's values, and not those that mcpctl gives its connections.

With some values no new login would come to its first statement (`statement_timeout` of 1 ms), and nobody could take
them back here. So a new connection of the same login, which asks for the value itself, is tried before a change is
done; meanwhile no timeout ends this one, which puts the old value back where that fails.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import psycopg
from psycopg import sql

from mcpctl.errors import Error, UsageError
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.said import StatementError, error
from mcpctl.postgres.session import Session
from mcpctl.postgres.statement import Exchange
from mcpctl.postgres.wire import Wire

log = logging.getLogger("mcpctl.settings")

LONGEST = 8000
"""Characters of a value. Every process of PostgreSQL reads it at each reload, in a time that grows with its square."""
_NOTED = 1000
"""Characters of a value in the audit line."""
_WAIT = 5.0
"""Seconds that the new value has to show, and a login has to connect; a server reloads within milliseconds unless it is
very busy."""
_PAUSE = 0.02
_LISTS_OF_NAMES = frozenset({"temp_tablespaces"})
"""Settings whose items ALTER SYSTEM takes one by one (GUC_LIST_QUOTE). PostgreSQL has five others, and the config
refuses each of them (`dangerous_settings`)."""
_ITEM = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^",]*))\s*(?:,|$)')
_SPLITS = re.compile(r"[\s\\]")
"""What libpq's options have with a backslash before it, where it is to stand in a value."""

_COLUMNS = f"""SELECT name, pg_catalog.left(setting, {LONGEST}), unit, context, source,
 pg_catalog.left(boot_val, {LONGEST}), pending_restart, sourcefile, sourceline FROM pg_catalog.pg_settings WHERE """
_NAMED = f"{_COLUMNS}pg_catalog.lower(name) = ANY ($1::text[]) ORDER BY pg_catalog.lower(name)".encode()
_CHANGED = f"""{_COLUMNS}source NOT IN ('default', 'override', 'client', 'session')
 ORDER BY pg_catalog.lower(name)""".encode()
_MAY_RELOAD = b"SELECT pg_catalog.has_function_privilege('pg_catalog.pg_reload_conf()', 'EXECUTE')"
_RELOAD = b"SELECT pg_catalog.pg_conf_load_time()::text, pg_catalog.pg_reload_conf()"
_LOADED = b"SELECT pg_catalog.pg_conf_load_time()::text"
_UNTIMED = b"""SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
 WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_session_timeout')"""


@dataclass(frozen=True)
class Setting:
    """A row of pg_settings. `value` and `boot_value` are without a unit, which is `unit`; `file` and `line` are where
    it stands, None where it stands in no file or this role may not see it."""

    name: str
    value: str
    unit: str | None
    context: str
    source: str
    boot_value: str | None
    pending_restart: bool
    file: str | None
    line: int | None

    def __str__(self) -> str:
        return f"{self.value[:_NOTED]} {self.unit or ''}".rstrip()

    @property
    def again(self) -> str | None:
        """What to set to have it as it is now; None where its entry in postgresql.auto.conf is to go. What stands in a
        file is set again, since which file that is may not be seen."""
        elsewhere = self.file is not None and not self.file.endswith("postgresql.auto.conf")
        return None if self.source != "configuration file" or elsewhere else self.value


@dataclass(frozen=True)
class Changed:
    """What a change has done. `before` and `after` are None where PostgreSQL does not show the setting to this role;
    `loaded` is whether this connection's process has read the files again."""

    before: Setting | None
    after: Setting | None
    loaded: bool


async def look(session: Session, names: Sequence[str], bounds: Bounds) -> tuple[list[Setting], list[Setting]]:
    """(the settings of these names, all that differ from PostgreSQL's own), as far as the role may see them."""
    exchange = _Settings(session, bounds)
    return await statement.guarded(exchange, exchange.look(names))


async def change(session: Session, name: str, value: str | None, bounds: Bounds) -> Changed:
    """Change a setting (its name in lower case); None takes out what an earlier change has written. Raises
    StatementError with PostgreSQL's words where it does not take name or value, and then nothing is changed; Error
    where no new login worked with it, which says whether the old value was put back."""
    if value is not None:
        statement.encode(value)
        if len(value) > LONGEST:
            raise UsageError(f"a value of {len(value)} characters is too long", f"it may have {LONGEST}")
    exchange = _Settings(session, bounds)
    return await statement.guarded(exchange, exchange.change(name, value))


def items(value: str) -> list[str]:
    """The names of a list, as PostgreSQL reads one: in lower case unless quoted. What is no list is one item."""
    found, at = [], 0
    while at < len(value):
        item = _ITEM.match(value, at)
        if item is None:
            return [value]
        found.append(item[2].strip().lower() if item[1] is None else item[1].replace('""', '"'))
        at = item.end()
    return found or [""]


class _Settings(Exchange):
    @property
    def _wait(self) -> float:
        """Seconds for each of the steps of a change, all of which are within the exchange's own time."""
        return min(_WAIT, (self.bounds.seconds + 1) / 5)

    async def look(self, names: Sequence[str]) -> tuple[list[Setting], list[Setting]]:
        self._leaves_nothing = False  # the connection has lost its settings
        with self.wire() as wire:
            await self._one(wire, b"RESET ALL")
            return await self._named(wire, names), _settings(await self._one(wire, _CHANGED))

    async def change(self, name: str, value: str | None) -> Changed:
        self._leaves_nothing = False
        with self.wire() as wire:
            await self._one(wire, b"RESET ALL")
            before = next(iter(await self._named(wire, [name])), None)
            if (await self._one(wire, _MAY_RELOAD))[0][0] != b"t":
                raise Error(
                    "your login may not have a change applied, so nothing was changed",
                    "the administrator grants admin access again: it comes with EXECUTE on pg_reload_conf()",
                )
            self.session.use.did = _told(name, before, value)
            self.session.use.lasts()
            applied = asyncio.ensure_future(self._applied(wire, name, value, before))
            try:
                loaded = await asyncio.shield(applied)
            except asyncio.CancelledError:
                await statement.despite_cancel(applied)  # else what locks everybody out could stay
                raise
            return Changed(before, next(iter(await self._named(wire, [name])), None), loaded)

    async def _applied(self, wire: Wire, name: str, value: str | None, before: Setting | None) -> bool:
        """Change it, have it read, and try a login; whether it was read. Ends within the exchange's own time."""
        async with asyncio.timeout(5 * self._wait):
            await self._one(wire, _UNTIMED)
            await self._one(wire, self._command(name, value))
            loaded = await self._loaded(wire)
            if loaded and (fault := await self._login_fault(_option(name, value, before))) is not None:
                await self._put_back(wire, name, before, fault)
            await self._one(wire, b"RESET ALL")
            return loaded

    async def _login_fault(self, asked: str) -> str | None:
        """Why no new connection of this login that asks for these options comes to its first statement; None where one
        does."""
        terminator = self.session.pool.terminator
        try:
            await terminator.try_anew(self._wait, asked)
        except (psycopg.Error, Error, TimeoutError, OSError) as problem:
            log.warning("database %s: a login that was tried: %s", terminator.login.shown, problem)
            return (isinstance(problem, psycopg.Error) and problem.diag.message_primary) or "no connection"
        return None

    async def _put_back(self, wire: Wire, name: str, before: Setting | None, fault: str) -> None:
        try:
            await self._one(wire, self._command(name, None if before is None else before.again))
            done = await self._loaded(wire)
        except Error:
            done = False
        said = f"with this value no new login could work ({fault})"
        if not done:
            raise Error(
                f"{said}, and the old one could not be put back",
                f"tell the administrator, at once: as a superuser, ALTER SYSTEM RESET {name}; SELECT pg_reload_conf()",
            )
        raise Error(f"{said}, so the old one was put back", "a timeout of a second or more lets a login work")

    def _command(self, name: str, value: str | None) -> bytes:
        """ALTER SYSTEM, quoted by libpq for this very connection."""
        if value is None:
            command = sql.SQL("ALTER SYSTEM RESET {}").format(sql.Identifier(name))
        else:
            parts = items(value) if name in _LISTS_OF_NAMES else [value]
            literals = sql.SQL(", ").join(map(sql.Literal, parts))
            command = sql.SQL("ALTER SYSTEM SET {} TO {}").format(sql.Identifier(name), literals)
        return command.as_bytes(self.session.conn)

    async def _loaded(self, wire: Wire) -> bool:
        """Have the files read again, and wait until this connection's process has; whether it has."""
        try:
            [(since, told)] = await self._one(wire, _RELOAD)
        except StatementError as problem:
            message = f"it is written to postgresql.auto.conf, and not applied: {problem.message}"
            raise StatementError(message, problem.fields) from None
        until = monotonic() + self._wait
        while told == b"t" and monotonic() < until:
            if (await self._one(wire, _LOADED))[0][0] != since:
                return True
            await asyncio.sleep(_PAUSE)
        return False

    async def _named(self, wire: Wire, names: Sequence[str]) -> list[Setting]:
        array = "{" + ",".join(names) + "}"  # they are of the form that the config takes
        return _settings(await self._one(wire, _NAMED, array.encode()))

    async def _one(self, wire: Wire, text: bytes, *params: bytes) -> list[tuple[bytes | None, ...]]:
        """The cells of one statement that stands alone. Raises what PostgreSQL said instead."""
        self._pgconn.send_query_params(text, list(params) or None)
        wire.sync()
        await wire.flush()
        result = await wire.command()
        await wire.synced()
        if not self.has_rows(result):
            raise error(result)
        return [
            tuple(result.get_value(row, column) for column in range(result.nfields)) for row in range(result.ntuples)
        ]


def _settings(rows: list[tuple[bytes | None, ...]]) -> list[Setting]:
    found = []
    for row in rows:
        cells = [None if cell is None else cell.decode("utf-8", "replace") for cell in row]
        name, value, unit, context, source, boot, pending, file, line = cells
        found.append(
            Setting(
                name or "",
                value or "",
                unit,
                context or "",
                source or "",
                boot,
                pending == "t",
                file,
                None if line is None else int(line),
            )
        )
    return found


def _option(name: str, value: str | None, before: Setting | None) -> str:
    """The value as an option of libpq's, which counts whatever the database or the role has made its own default by
    ALTER: other databases have no such default. Only of what any login may set; the startup packet has 10 kB in all."""
    if value is None or len(value) > _NOTED or before is None or before.context != "user":
        return ""
    escaped = _SPLITS.sub(r"\\\g<0>", value)
    return f"-c {name}={escaped}"


def _told(name: str, before: Setting | None, value: str | None) -> str:
    """A change as the audit line says it."""
    old = "(not shown)" if before is None else str(before)
    new = "(reset)" if value is None else value[:_NOTED]
    return f"ALTER SYSTEM {name}: {old} → {new}"
