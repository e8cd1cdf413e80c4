"""File changes and expiry: notices what ended, cuts it, and tells the command line what was done."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mcpctl import control
from mcpctl.audit.log import EVENTS, FIELDS
from mcpctl.calls import Calls
from mcpctl.errors import ConfigError, Error, LockedError, UnavailableError
from mcpctl.identity.authenticate import LOCKED, Authenticator
from mcpctl.identity.sessions import is_id
from mcpctl.identity.tokens import EXPIRING, utcnow
from mcpctl.postgres.cutting import RENEWED, Cut
from mcpctl.postgres.own import Own
from mcpctl.postgres.pools import Pools
from mcpctl.recorder import Recorder
from mcpctl.server.answers import Answers, values
from mcpctl.shared_table import Table

log = logging.getLogger("mcpctl.watch")
TICK = 0.2
"""Seconds between two looks at the files; a request looks as well, so this bounds only what runs unattended."""
_SWEEP = 5.0
_SESSIONS = 60.0
"""Seconds between two looks for sessions whose time was over while nobody used them."""
RELOAD = 60.0
"""Seconds that a command may wait for a reload of the config."""
_ASKED_FOR = 10.0
"""Seconds in which a command may ask what was cut."""
_REMEMBERED = 100_000
_REQUEST = 4 << 20


class Watch:
    """One per process. `end_streams` ends what is open over HTTP of tokens that are no longer valid; `keys` are the ids
    of the keys that it opens passwords with, `own` the databases that users have brought. `was_cut(reason,
    queries, backends left)` hears of each cut. `reload` has the config read again. `told` is the process's."""

    def __init__(
        self,
        authenticator: Authenticator,
        calls: Calls,
        pools: Pools,
        recorder: Recorder,
        folder: Path,
        end_streams: Callable[[], int],
        keys: Callable[[], list[str]] = list,
        own: Own | None = None,
        told: Table | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._calls = calls
        self._pools = pools
        self._recorder = recorder
        self._folder = folder
        self.end_streams = end_streams
        self.reload: Callable[[str], Awaitable[Any]] | None = None
        self._databases = own
        self.answers = Answers(self._settle, calls, own, keys)
        self.answers.add({"reload": self._reloaded, "lock": self._locked, "bar": self._barred, "note": self._noted})
        self.answers.add({"kept_out": self._kept_out, "renewed": self._renewed})
        self.was_cut: Callable[[str, int, int], None] = lambda reason, queries, left: None
        self.told = told or Table()
        self._heard: Mapping[str, str] = {}
        self._cuts: dict[str, asyncio.Task[Cut]] = {}
        self._warned: dict[str, int] = {}
        self._broken: str | None = None
        self._own: Path | None = None
        self._lock_seen = self._lock_noted = authenticator.lockdown.on()
        authenticator.ended = self._ended

    def _ended(self, ids: dict[str, str]) -> None:
        """A reload found these ended. Called before the request that noticed is answered."""
        for token, reason in ids.items():
            self._cuts[token] = asyncio.create_task(self._cut(token, reason), name=reason)
        while len(self._cuts) > _REMEMBERED:
            self._cuts.pop(next(iter(self._cuts)))

    async def _cut(self, token: str, reason: str) -> Cut:
        self.end_streams()
        done = await self._calls.cut(token or None, reason)
        log.info("token %s: %s: cut: %s", token, reason, done, extra={"about": {"token": token or None}})
        self.was_cut(reason, done.queries, done.backends_left)
        if done.queries:
            self._recorder.note("query.cancelled", token=token or None, reason=f"{reason}: {done}")
        if reason == "expired" and is_id(token):
            self._sweep_sessions()
        elif reason == "expired":
            self._recorder.note("token.expired", token=token, reason=str(done))
        if not done.backends_left:  # a command that has caused it asks soon; whoever comes later has cut nothing
            seconds = 0.0 if reason == "expired" else _ASKED_FOR
            asyncio.get_running_loop().call_later(seconds, self._forget, token, asyncio.current_task())
        return done

    def _sweep_sessions(self) -> None:
        """End the sessions whose time is over: one line each, by whichever worker comes first."""
        found = self._authenticator.sessions
        if found is None:
            return
        with contextlib.suppress(UnavailableError):  # another worker writes: it is tried again
            for session, why in found.sweep():
                user = self._authenticator.person(session.user or "")
                tenant = user.tenant if user is not None else None
                self._recorder.note("session.closed", token=session.id, user=session.user, tenant=tenant, reason=why)

    def _forget(self, token: str, task: asyncio.Task[Cut] | None) -> None:
        if self._cuts.get(token) is task:
            del self._cuts[token]

    async def run(self) -> None:
        """Look after the files, the expiries and the idle pools, for ever."""
        async with asyncio.TaskGroup() as group:  # a pool that is slow to close holds no expiry up
            group.create_task(self._keep_looking())
            group.create_task(self._keep_sweeping())
            if self._authenticator.visitors is not None:
                group.create_task(self._keep_asking())
            group.create_task(self._keep_sweeping_sessions())

    async def look_for_lock(self) -> None:
        """Where no files say who may come in, look for the lockdown alone, for ever."""
        while True:
            with contextlib.suppress(LockedError):
                self._authenticator.check_lock()
            await asyncio.sleep(TICK)

    async def _keep_looking(self) -> None:
        while True:
            try:
                self._look()
                self._note_lock()
            except Exception:
                log.exception("looking after the files failed; it is tried again")
            expiry = self._authenticator.next_expiry()
            await asyncio.sleep(TICK if expiry is None else min(TICK, expiry + 0.001))

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            try:
                await self._pools.sweep()
                self._recorder.flush()
                self._recorder.catch_up()
                self._remind()
            except Exception:
                log.exception("looking after the pools failed; it is tried again")

    async def _keep_asking(self) -> None:
        """Have the issuers say again whom they vouch for: what they have taken away ends what runs, too."""
        while True:
            await asyncio.sleep(_SWEEP)
            try:
                await self._authenticator.look_again()
            except Exception:
                log.exception("asking the issuers failed; it is tried again")

    async def _keep_sweeping_sessions(self) -> None:
        while True:
            try:
                self._sweep_sessions()
            except Exception:
                log.exception("looking after the sessions failed; it is tried again")
            await asyncio.sleep(_SESSIONS)

    def _look(self) -> None:
        self.hear()
        try:
            self._authenticator.refresh()
        except Error as problem:
            if self._broken != problem.message:
                log.error("calls are refused: %s%s", problem.message, f" ({problem.hint})" if problem.hint else "")
            self._broken = problem.message
        else:
            if self._broken is not None:
                log.info("calls are answered again")
            self._broken = None
        expired = self._authenticator.expired()
        if expired:
            self._ended(dict.fromkeys(expired, "expired"))
        if self._databases is not None:
            self._databases.look()
        self._calls.canaries.look()

    def _note_lock(self) -> None:
        """Note a lockdown that was made or lifted by hand, in one process, when it is seen for the second time.
        A command notes its own, and has told us by then."""
        on = self._authenticator.lockdown.on()
        before, self._lock_seen = self._lock_seen, on
        if on != before or on == self._lock_noted:
            return
        self._lock_noted = on
        if self._own == next(iter(control.sockets(self._folder)), None):
            path = self._authenticator.lockdown.path
            reason = f"{path} was {'made' if on else 'removed'} by hand"
            self._recorder.note("server.locked" if on else "server.unlocked", reason=reason)

    def _remind(self) -> None:
        """Warn 14, 7 and 1 days before a token ends, once each."""
        if self._broken is not None:
            return
        now = utcnow()
        soon = now + EXPIRING
        for token in self._authenticator.tokens.current().values():
            if token.expires_at is None or token.expires_at > soon or token.status(now) != "expiring":
                continue
            left = token.expires_at - now
            days = next(days for days in (1, 7, EXPIRING.days) if left <= timedelta(days=days))
            if self._warned.get(token.id) != days and token.expires_at - token.created_at > timedelta(days=days):
                self._warned[token.id] = days
                log.warning("token %s (%s) ends within %d days", token.id, token.user or "service", days)

    # -- the control socket --------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def listening(self, there: list[tuple[socket.socket, Path]], *, begins: bool) -> Any:
        """Answer on the control socket as long as the block runs. Where there are no such sockets, don't. `there` are
        those of this process; `begins`: whether the server starts, which then wants one."""
        found = self._listen(there, begins) if hasattr(socket, "AF_UNIX") else None
        if found is None:
            yield
            return
        made, path = found
        self._own = path
        there.append(found)
        server = await asyncio.start_unix_server(self._serve, sock=made, limit=_REQUEST)
        try:
            yield
        finally:
            server.close()
            there.remove(found)
            if all(path != other for _, other in there):
                with contextlib.suppress(OSError):  # swept by whoever can
                    path.unlink(missing_ok=True)

    def _listen(self, there: list[tuple[socket.socket, Path]], begins: bool) -> tuple[socket.socket, Path] | None:
        """A socket, where none can be made that which is there; a dead worker's place is taken without one, too."""
        try:
            return control.listen(self._folder)
        except ConfigError as problem:
            if there:
                return there[-1][0].dup(), there[-1][1]
            if begins:
                raise
            log.error("no command reaches this worker: %s", problem.message)
            return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(5) as bound:
                request = json.loads(await reader.readline())
                if request["do"] == "reload":
                    bound.reschedule(asyncio.get_running_loop().time() + RELOAD)
                answer = await self.answers(request)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ValueError, KeyError, TypeError, TimeoutError, OSError, asyncio.CancelledError) as problem:
            log.debug("control socket: %r", problem)
        finally:
            writer.close()

    async def _reloaded(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.reload is None:
            return {"error": "this server keeps the config that it was started with"}
        outcome = await self.reload(str(request["id"]))
        return {"pid": os.getpid(), "ok": outcome.ok, "said": outcome.said, "hint": outcome.hint}

    async def _locked(self, request: dict[str, Any]) -> dict[str, Any]:
        """Look whether we are locked; with `now`, be it in memory alone, or no longer."""
        lock = self._authenticator.lockdown
        before = lock.held
        if "now" in request:
            now = bool(request["now"])
            self.told.change({"": "locked"} if now else {}, less=[] if now else [""])
            self.hear()
        self._lock_noted = lock.on()
        return {**values(await self._settle(None)), "lifted": before and not lock.held}

    async def _barred(self, request: dict[str, Any]) -> dict[str, Any]:
        """Keep tokens out whose end could not be written into their file."""
        tokens = [str(token) for token in request["tokens"]]
        self._bar(tokens)
        return values(await self._settle(tokens))

    def _bar(self, tokens: list[str]) -> None:
        self.told.change(dict.fromkeys(tokens, "revoked, but not in the file"))
        self.hear()

    def hear(self) -> None:
        """Keep out whom a command has told this worker, or another one, to keep out."""
        if (told := self.told.read()) != self._heard:
            self._heard = told
            self._authenticator.lockdown.held = "" in told
            self._lock_noted = self._authenticator.lockdown.on()
            self._authenticator.keep_out("command", told)

    async def _kept_out(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"barred": [*self.told.read()], "blocked": self._calls.canaries.unwritten.read()}

    async def learn(self) -> None:
        """Keep out whom other servers keep out without any file saying so."""
        for answer in await self.ask_others({"do": "kept_out"}):
            self._bar(answer.get("barred", []))
            self._calls.canaries.unwritten.change(answer.get("blocked", {}))
        self._calls.canaries.look()

    async def _renewed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Close what is open as logins, [database, role or null], whose password is another one now: the next
        connection takes the new one."""
        self._look()
        done = Cut()
        for database, role in request["logins"]:
            key = (str(database), role and str(role))
            for pool in self._pools.all:
                if pool.login.key == key:
                    pool.ended = RENEWED
            one = await self._pools.cut_login(key, RENEWED)
            done.queries += one.queries
            done.lingering += one.lingering
        done.backends_left = len(done.lingering)
        return values(done)

    async def _noted(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take a line of a command's that found no room for it anywhere, and write it when there is some."""
        event, fields = str(request["event"]), dict(request["fields"])
        if event not in EVENTS or fields.keys() - set(FIELDS):
            return {"error": "no line of the audit log's"}
        self._recorder.note(event, **fields)
        return {}

    async def _settle(self, tokens: list[str] | None, user: str | None = None) -> Cut:
        """Take note of the files, and wait until what ended is cut: what was done for these tokens, and whatever else
        this user has come in with, or by a lockdown; and what is left of theirs now, also of an earlier cut."""
        self._look()
        done = Cut()
        if tokens is not None and user is not None:
            tokens = [*dict.fromkeys([*tokens, *(one for one in self._cuts if self._authenticator.whose(one) == user)])]
        locked = [token for token, task in self._cuts.items() if task.get_name() == LOCKED]
        for token in locked if tokens is None else tokens:
            task = self._cuts.get(token)
            if task is not None:
                done.queries += (await asyncio.shield(task)).queries
                if not self._pools.outlived([token]):
                    self._cuts.pop(token, None)  # told once: whoever revokes it again has cut nothing
        done.lingering = self._pools.outlived(tokens)
        done.backends_left = len(done.lingering)
        return done

    async def cancel_elsewhere(self, token: str | None, number: str | int, here: int) -> None:
        """End the one call of that token and number, wherever it runs; not when there is more than one."""
        others = self._others()
        if not others:
            if here == 1:
                self._calls.cancel(token, number)
            return
        found = await self._ask_them(others, {"do": "matching", "token": token, "id": number})
        if here + sum(answer.get("matching", 0) for answer in found) != 1:
            return
        if here == 1:
            self._calls.cancel(token, number)
        for path, answer in zip(others, found, strict=True):
            if answer.get("matching"):
                await self._ask(path, {"do": "cancel", "token": token, "id": number})

    async def ask_others(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """What the other processes that serve these files answer; {} of one that does not within a second."""
        return await self._ask_them(self._others(), request)

    def _others(self) -> list[Path]:
        return [path for path in control.sockets(self._folder) if path != self._own]

    async def _ask_them(self, others: list[Path], request: dict[str, Any]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._ask(path, request) for path in others))

    async def _ask(self, path: Path, request: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(1):
                with control.short(path) as name:
                    reader, writer = await asyncio.open_unix_connection(name, limit=_REQUEST)
                writer.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await reader.readline())
                writer.close()
                return answer if isinstance(answer, dict) else {}
        except (OSError, ValueError, TimeoutError):
            return {}
