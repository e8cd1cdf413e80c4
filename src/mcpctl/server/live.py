"""What a serving process tells of itself: how it is, what runs, what each credential has open, what it has counted."""

import asyncio
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl import __version__
from mcpctl.audit.end import SharedEnd
from mcpctl.backup.names import newest
from mcpctl.calls import Calls
from mcpctl.config_keys import Settings
from mcpctl.errors import Error
from mcpctl.facts import Running
from mcpctl.identity import tokens
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal
from mcpctl.metrics import DAYS_LEFT, Metrics, Sample, days_class
from mcpctl.postgres.cutting import Outlived
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.pools import Pools, reachable
from mcpctl.postgres.token_pool import TokenPool
from mcpctl.private_file import fingerprint
from mcpctl.recorder import Greeted, Late, Recorder
from mcpctl.server.answers import Answer, Request, values
from mcpctl.shared_counters import SAVED_EVERY, Counters
from mcpctl.tools.table import TOOLS

_REACHED_WITHIN, _REACHED_FOR = 1.0, 2.0
"""Seconds that a database has to answer in, and for which it is then not asked again."""
_SHOWN = 10_000
"""Characters of a running statement that are told."""
_ENDS_WITHIN = 1.5
"""Seconds that a call has to end in: its query is cancelled, and its backend terminated where that is not enough."""
STOPPED = "an administrator has ended this call; your token is still good"
ENDED = "your session was ended by an administrator; your token is still good, so ask again"


@dataclass(frozen=True)
class Place:
    """Which process of which server this is: `server` is the same for all workers of one start."""

    server: str
    url: str | None = None
    worker: int = 0
    workers: int = 1


class Process:
    """What a process keeps while its config changes. `lag()` is how many seconds the event loop was late, `counters`
    what the limits count: all workers of a server have the same, and `told`, whom a command has told one of them to
    keep out although no file says so, {token: why}, "" for all, and `chain`, where the audit log ends. `kept_out` is
    who is let in by no generation, see Authenticator, and `outlived` which backends have outlived a cut, of any
    generation's."""

    def __init__(self, place: Place, counters: Counters | None = None, chain: SharedEnd | None = None) -> None:
        self.place = place
        self.chain = chain
        self.counters = counters or Counters()
        self.counters.as_worker(place.worker)
        self.metrics = Metrics()
        self.lag: Callable[[], float] = lambda: 0.0
        self.turned_away: Callable[[], int] = lambda: 0
        """Connections that were closed for want of file descriptors."""
        self.told = self.counters.told
        self.begun = time.time()
        self.over: dict[str, datetime | None] = {}
        self.greeted = Greeted()
        self.late = Late()
        self.outlived = Outlived()
        self.begins = True
        """Whether the server starts with it, which then wants every file in order."""
        self.ends: Callable[[], datetime | None] = lambda: None
        """When the certificate that is served ends."""
        self.kept_out: dict[str, Mapping[str, str]] = {}
        self.sockets: list[tuple[socket.socket, Path]] = []
        """The control sockets that it listens on, one for each generation."""

    async def save(self) -> None:
        """Save what is counted now and then: one worker does."""
        while True:
            await asyncio.sleep(SAVED_EVERY)
            await asyncio.to_thread(self.counters.save, self.counters.copy())


class Live:
    """One for each config that comes into force. What it answers is for the server's own user and root, on the control
    socket."""

    def __init__(
        self,
        settings: Settings,
        process: Process,
        authenticator: Authenticator,
        logins: Logins,
        pools: Pools,
        calls: Calls,
        recorder: Recorder,
        lag: Callable[[], float],
    ) -> None:
        self._process = process
        self.place = process.place
        self._authenticator = authenticator
        self._logins = logins
        self._pools = pools
        self._calls = calls
        self._recorder = recorder
        self._lag = lag
        self._metrics = process.metrics
        self.settings = settings
        self._config_since = time.time()
        self._config = fingerprint(settings.source) if settings.source is not None else None
        self._reached: tuple[float, dict[str, bool]] | None = None

    def answers(self) -> Mapping[str, Answer]:
        """What can be asked, by name."""
        return {
            "status": self._status,
            "running": self._running,
            "sessions": self._sessions,
            "end_session": self._end_session,
            "end_call": self._end_call,
            "metrics": self._counted,
        }

    async def _status(self, request: Request) -> dict[str, Any]:
        used = self._metrics.minute.used().values()
        return {
            **asdict(self.place),
            "pid": os.getpid(),
            "version": __version__,
            "since": self._process.begun,
            "config": str(self.settings.source) if self.settings.source is not None else None,
            "config_since": self._config_since,
            "config_changed": self.config_changed,
            "tls_not_after": self.tls_not_after(),
            "databases": await self._databases(),
            "budget": self._pools.budget,
            "tokens": self.tokens()[0],
            "kept_out": self._kept_out(),
            "running": len(self._calls.running()),
            "minute": {
                "calls": sum(one.calls for one in used),
                "failed": sum(one.failed for one in used),
                "refused": sum(one.refused for one in used),
                "strangers": self._metrics.minute.strangers(),
            },
            "audit": self._recorder.fault(),
            "lockdown": self._authenticator.lockdown.said(),
        }

    def _kept_out(self) -> list[str]:
        """Tokens that a command had us keep out, and that the file, as far as it can be read, still lets in."""
        told = sorted(name for name in self._authenticator.kept_out("command") if name)  # "" is a lockdown
        try:
            found = self._authenticator.read().tokens
        except Error:
            return told
        return [name for name in told if name in found and found[name].revoked_at is None]

    async def _databases(self) -> dict[str, dict[str, Any]]:
        """By name: whether it takes connections, and this process's pools and connections there."""
        up = await self.reached()
        found: dict[str, dict[str, Any]] = {
            name: {"up": up[name], "pools": 0, "connections": 0} for name in self.settings.databases
        }
        for pool in self._pools.all:
            one = found.setdefault(pool.login.shown, {"up": None, "pools": 0, "connections": 0})
            one["pools"] += 1
            one["connections"] += pool.count
        for name in self._pools.kept:
            found.setdefault(name, {"up": None, "pools": 0, "connections": 0})["connections"] += 1
        return found

    async def reached(self) -> dict[str, bool]:
        """Whether each database of the config takes connections; one that does not say so in a second does not."""
        if self._reached is None or time.monotonic() - self._reached[0] > _REACHED_FOR:
            names = [*self.settings.databases]
            found = await asyncio.gather(*map(self._is_up, names))
            self._reached = (time.monotonic(), dict(zip(names, found, strict=True)))
        return self._reached[1]

    async def _is_up(self, name: str) -> bool:
        try:
            async with asyncio.timeout(_REACHED_WITHIN):
                return await reachable(self._logins.host(name))
        except (TimeoutError, Error):
            return False

    @property
    def config_changed(self) -> bool:
        """Whether the config file is another than the one in force."""
        return self.settings.source is not None and fingerprint(self.settings.source) != self._config

    def tls_not_after(self) -> float | None:
        """When the certificate that is served ends, as Unix time; None without one."""
        found = self._process.ends()
        return found.timestamp() if found is not None else None

    def tokens(self) -> tuple[dict[str, int] | None, list[float | None]]:
        """How many tokens there are by status, None while a file is broken, and then nobody is let in; and how many
        seconds each living one has, None where it has no end."""
        now = tokens.utcnow()
        try:
            found = self._authenticator.read()
        except Error:
            return None, []
        counts = dict.fromkeys(("active", "expiring", "expired", "revoked", "disabled", "blocked"), 0)
        left: list[float | None] = []
        for token in found.tokens.values():
            status = tokens.standing(token, found.people, now, self._authenticator.kept_out("canary"))
            counts[status] = counts.get(status, 0) + 1
            if status in ("active", "expiring"):
                left.append(None if token.expires_at is None else (token.expires_at - now).total_seconds())
        return counts, left

    async def _running(self, request: Request) -> dict[str, Any]:
        sql = bool(request.get("sql")) and self.settings.audit.statements == "full"
        used = {
            token: {**asdict(one), "addresses": sorted(one.addresses)}
            for token, one in self._metrics.minute.used().items()
            if token is not None
        }
        return {"running": [_told(one, sql) for one in self._calls.running()], "minute": used}

    async def _sessions(self, request: Request) -> dict[str, Any]:
        """What each token has open here: calls and pools."""
        open_: dict[str, tuple[Principal, list[TokenPool], list[Running]]] = {}
        for pool in self._pools.all:
            if (token := pool.principal.token) is not None:
                open_.setdefault(token, (pool.principal, [], []))[1].append(pool)
        for one in self._calls.running():
            if (token := one.principal.token) is not None:
                open_.setdefault(token, (one.principal, [], []))[2].append(one)
        used = self._metrics.minute.used()
        now, clock = time.time(), time.monotonic()
        return {
            "sessions": [
                {
                    "id": token,
                    "user": who.user,
                    "since": min([pool.opened for pool in pools] + [now - clock + one.begun for one in calls]),
                    "last_call": now if calls else now - clock + max(pool.last_used for pool in pools),
                    "addresses": sorted(
                        {one.request.client_ip for one in calls if one.request.client_ip}
                        | (used[token].addresses if token in used else set())
                    ),
                    "running": len(calls),
                    "pools": sorted({pool.login.shown for pool in pools}),
                    "backends": sorted(session.pid for pool in pools for session in pool.sessions.values()),
                }
                for token, (who, pools, calls) in open_.items()
            ]
        }

    async def _end_session(self, request: Request) -> dict[str, Any]:
        """End what a token has open here; `open` says whether there was anything."""
        token = str(request["token"])
        open_ = [pool.principal for pool in self._pools.all] + [one.principal for one in self._calls.running()]
        there = any(principal.token == token for principal in open_)
        return {"open": there, **values(await self._calls.end(token, ENDED))}

    async def _end_call(self, request: Request) -> dict[str, Any]:
        """End one call that runs here; `there` says whether one did, and `ended` whether it has, its query with it."""
        one = self._calls.stop(str(request["id"]), STOPPED)
        until = time.monotonic() + _ENDS_WITHIN
        while one in (running := self._calls.running()) and time.monotonic() < until:  # noqa: ASYNC110 - so long at most
            await asyncio.sleep(0.01)
        return {"there": one is not None, "ended": one not in running}

    async def _counted(self, request: Request) -> dict[str, Any]:
        return {**asdict(self.place), "samples": self.samples()}

    def samples(self) -> list[Sample]:
        """What this process has counted, and how it is."""
        found = self._metrics.samples()
        found += [
            ("mcpctl_calls_running", [], len(self._calls.running())),
            ("mcpctl_audit_failing", [], float(self._recorder.failing)),
            ("mcpctl_audit_waiting_lines", [], self._recorder.waiting),
            ("mcpctl_audit_lag_seconds", [], self._lag()),
            ("mcpctl_connection_budget", [], self._pools.budget),
            ("mcpctl_config_loaded_timestamp_seconds", [], self._config_since),
            ("process_start_time_seconds", [], self._process.begun),
            ("process_cpu_seconds", [], time.process_time()),
            ("mcpctl_event_loop_lag_seconds", [], self._process.lag()),
            ("mcpctl_connections_turned_away", [], self._process.turned_away()),
            *_connections(self._pools),
            *_process(),
        ]
        return found

    async def shared(self, answering: int) -> list[Sample]:
        """What is the whole server's, of which one worker tells."""
        counts, left = self.tokens()
        found: list[Sample] = [
            ("mcpctl_build_info", [__version__, platform.python_version()], 1),
            ("mcpctl_workers", ["wanted"], self.place.workers),
            ("mcpctl_workers", ["answering"], answering),
            ("mcpctl_config_changed", [], float(self.config_changed)),
            ("mcpctl_files_broken", [], float(counts is None)),
            ("mcpctl_locked", [], float(self._authenticator.lockdown.on())),
        ]
        found += [("mcpctl_tokens", [status], count) for status, count in (counts or {}).items()]
        found += [("mcpctl_database_up", [name], float(up)) for name, up in (await self.reached()).items()]
        if counts is not None:
            found += _by_days_left(left)
        if (folder := self.settings.backup.directory) is not None:
            when = await asyncio.to_thread(newest, folder)  # it may be on a disk that is far away
            found.append(("mcpctl_backup_last_timestamp_seconds", [], when.timestamp() if when else 0))
        if (end := self.tls_not_after()) is not None:
            found.append(("mcpctl_tls_cert_expiry_seconds", [], end - time.time()))
        return found


def _by_days_left(left: list[float | None]) -> list[Sample]:
    """Living tokens by how many days they have, and when the next of them ends."""
    days = Counter(days_class(None if seconds is None else seconds / 86400) for seconds in left)
    found: list[Sample] = [("mcpctl_tokens_by_days_left", [name], days[name]) for name in DAYS_LEFT]
    ends = [seconds for seconds in left if seconds is not None]
    return [*found, ("mcpctl_token_next_expiry_seconds", [], min(ends))] if ends else found


def _told(one: Running, sql: bool) -> dict[str, Any]:
    """A running call; its statement only where PostgreSQL has described columns of it: another may hold a password."""
    facts, tool = one.facts, TOOLS.get(one.facts.tool)
    found = {
        "id": one.request.id,
        "seconds": round(time.monotonic() - one.begun, 3),
        "token": one.principal.token,
        "user": one.principal.user,
        "tenant": one.principal.tenant,
        "tool": facts.tool,
        "database": facts.values.get("database"),
        "backend_pid": facts.values.get("backend_pid"),
        "client_ip": one.request.client_ip,
        "transport": one.request.transport,
    }
    if sql and tool is not None and tool.statement is not None and tool.access == "read":
        found["statement"] = str(one.arguments.get(tool.statement, ""))[:_SHOWN] if facts.described else None
    return found


def _connections(pools: Pools) -> list[Sample]:
    """By database; those that users have brought are one, since only the config's names are bounded."""
    count: dict[tuple[str, str], float] = {}

    def add(name: str, database: str, state: str, more: float) -> None:
        database = "own" if ":" in database else database
        key = (name, "\0".join([database, state] if state else [database]))
        count[key] = count.get(key, 0) + more

    for pool in pools.all:
        name = pool.login.shown
        add("mcpctl_pools", name, "", 1)
        add("mcpctl_pool_waiting", name, "", pool.waiting)
        add("mcpctl_pool_connections", name, "busy", len(pool.out))
        add("mcpctl_pool_connections", name, "connecting", pool.connecting)
        add("mcpctl_pool_connections", name, "idle", max(0, pool.count - pool.connecting - len(pool.out)))
    for name in pools.kept:
        add("mcpctl_pool_connections", name, "kept", 1)
    return [(name, labels.split("\0"), value) for (name, labels), value in count.items()]


def _process() -> list[Sample]:
    """What the system says of this process; nothing where it has no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        import resource

        return [
            ("process_resident_memory_bytes", [], pages * resource.getpagesize()),
            ("process_open_fds", [], len(os.listdir("/proc/self/fd"))),
            ("process_max_fds", [], resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ]
    except (OSError, ImportError):
        return []
