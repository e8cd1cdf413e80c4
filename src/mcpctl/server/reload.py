"""The config read again while the server runs, whole or not at all.

What is in force in a process is a generation: the long-lived objects and the app that one reading of the config makes.
A reload builds the next one beside it, hands it the requests that come from then on, lets the calls that run end on
the old one, and takes that down.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from mcpctl import certificates
from mcpctl.audit.log import AuditLog, read_key
from mcpctl.config_keys import Settings
from mcpctl.errors import Error
from mcpctl.identity.sessions import rules_of
from mcpctl.identity.tokens import utcnow
from mcpctl.server import logs, tracing
from mcpctl.server.exchange import App, Receive, Scope, Send
from mcpctl.server.listening import Listening
from mcpctl.server.notify import Notifier
from mcpctl.server.parts import Core, digest
from mcpctl.server.tls import Certificates, aside

log = logging.getLogger("mcpctl.reload")
DRAIN = 5
"""Seconds that running calls have to end when their generation, or the server, is to end."""
Build = Callable[[Listening], AbstractAsyncContextManager[tuple[Core, App]]]
Read = Callable[[], Listening]
RELOADED = "the config was reloaded; ask again"
_STREAMS = "/sse"


class _Generation:
    """One reading of the config in force. It lives in a task of its own, which builds it and takes it down."""

    core: Core
    app: App

    def __init__(self, listening: Listening) -> None:
        self.listening = listening
        self.in_force = True
        self.busy: dict[asyncio.Task[Any], str] = {}
        self._cut = False
        self._over = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def begin(self, build: Build) -> None:
        """Build it; raises what building it raises, and then nothing of it is left."""
        up = asyncio.Event()
        self._life = asyncio.create_task(self._live(build, up))
        waiting = asyncio.create_task(up.wait())
        try:
            await asyncio.wait({self._life, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._life.done():
            self._life.result()

    async def _live(self, build: Build, up: asyncio.Event) -> None:
        async with build(self.listening) as (self.core, self.app):
            up.set()
            await self._over.wait()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        task = asyncio.current_task()
        if task is None:
            raise TypeError("a request without a task")
        self.busy[task] = scope["path"]
        scope.setdefault("state", {})["generation"] = self
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._cut or scope["path"] != _STREAMS:
                raise
            task.uncancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            del self.busy[task]

    async def drain(self) -> None:
        """Let the calls that run end, for some seconds; then cut them. Streams have no end: they are cut at once."""
        self._cut = True
        for task in [task for task, path in self.busy.items() if path == _STREAMS]:
            task.cancel()
        for seconds in (DRAIN, 1):
            if self.busy:
                await asyncio.wait(self.busy, timeout=seconds)
            for task in list(self.busy):
                task.cancel()

    async def end(self) -> None:
        """Take it down."""
        self._over.set()
        if self._life is not None:
            await self._life


class Serving:
    """What a process serves with: the ASGI app that stays while generations change. `applied` is told of each one that
    comes into force, `tells`: whether this process is the one that tells the administrator, of several."""

    def __init__(self, build: Build, applied: Callable[[Listening], None], *, tells: bool) -> None:
        self._build = build
        self._applied = applied
        self._tells = tells
        self._current: _Generation | None = None
        self._next: tuple[_Generation, tuple[certificates.Pair, Any] | None] | None = None
        self._old: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self.certificates: Certificates | None = None
        self.reload: Callable[[str], Any] | None = None
        """Answers a command that asks for a reload."""
        self.taken: Callable[[certificates.Pair], None] = lambda pair: None
        """Hears of each certificate that is served."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request with what is in force now."""
        await self.current.serve(scope, receive, send)

    @property
    def begun(self) -> bool:
        """Whether anything is in force yet."""
        return self._current is not None

    @property
    def current(self) -> _Generation:
        """The one in force."""
        if self._current is None:
            raise TypeError("nothing is in force yet")
        return self._current

    async def begin(self, listening: Listening) -> None:
        """Build the first generation."""
        first = _Generation(listening)
        await first.begin(self._build)
        self._take(first)
        if listening.tls:
            note = first.core.recorder.note
            self.certificates = Certificates(listening.settings, note, listening.pair, tells=self._tells)
            self.certificates.taken = self.taken
            self._watching = asyncio.create_task(self.certificates.watch())

    async def prepare(self, listening: Listening) -> None:
        """Build the next generation beside the one in force. Raises Error where it cannot be built, or an earlier one
        is still there, which has connections of its own."""
        await self.abandon()
        if self._old and (await asyncio.wait(self._old, timeout=DRAIN + 3))[1]:
            raise Error("what was in force before has not ended yet", "try again in a moment")
        held, pair = self.certificates, None
        if held is not None:
            pair = await aside(lambda: held.read(listening.settings.server.tls))
            if wrong := pair[0].out_of_date(utcnow()):
                log.warning("%s", wrong)
        made = _Generation(listening)
        await made.begin(self._build)
        self._next = (made, pair)

    async def abandon(self) -> None:
        """Take down what was prepared."""
        if self._next is not None:
            made, self._next = self._next[0], None
            made.core.quiet = True
            await made.end()

    def commit(self) -> None:
        """Put the prepared generation into force; the one before ends when its calls have."""
        if self._next is None:
            return
        (made, pair), self._next = self._next, None
        old = self.current
        old.in_force = False
        old.core.quiet = True
        old.core.pools.ends = RELOADED
        if (signed_in := old.core.authenticator.sessions) is not None:
            signed_in.only(rules_of(made.listening.settings.auth))
        self._take(made)
        if self.certificates is not None and pair is not None:
            self.certificates.note = made.core.recorder.note
            self.certificates.take(*pair)
        task = asyncio.create_task(self._retire(old))
        self._old.add(task)
        task.add_done_callback(self._old.discard)

    def _take(self, made: _Generation) -> None:
        self._current = made
        made.core.watch.reload = self.reload
        logs.change(made.listening.settings.log)
        self._applied(made.listening)

    async def _retire(self, old: _Generation) -> None:
        try:
            await old.drain()
            await old.end()
        except Exception:
            log.exception("what was in force before could not be taken down cleanly")

    async def end(self, *, at_once: bool = False) -> None:
        """Take everything down; `at_once`: also what earlier generations still run."""
        if self._watching is not None:
            self._watching.cancel()
        for task in list(self._old) if at_once else []:
            task.cancel()
        await asyncio.gather(*self._old, return_exceptions=True)
        await self.abandon()
        if self._current is not None:
            await self._current.end()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a reload: `said` in one line."""

    ok: bool
    said: str
    hint: str | None = None

    @property
    def told(self) -> str:
        """What the service's status says of it."""
        return f"config read again, {self.said}" if self.ok else f"config NOT read again: {self.said}"


def successor(old: Listening, read: Read) -> Listening:
    """What the config says now, checked as at the start. Raises Error where it cannot come into force."""
    new = read()
    new.check()
    logs.check(new.settings)
    tracing.check(new.settings.tracing)
    old.check_successor(new)
    if new.settings.audit != old.settings.audit:  # else every call would be refused from now on
        with _book(new.settings) as book:
            book.check()
    return dataclasses.replace(new, port=old.port, pair=old.pair)


def settled(old: Listening, new: Listening) -> Outcome:
    """A reload that came into force; written into the audit log, of the old settings too where that is another."""
    fields = [one.name for one in dataclasses.fields(Settings) if one.metadata]
    changed = [name for name in fields if getattr(old.settings, name) != getattr(new.settings, name)]
    said = ", ".join(changed) if changed else "nothing in the config; keys and passwords were read again"
    for settings in {one.audit.file: one for one in (old.settings, new.settings)}.values():
        _note(settings, "config.reloaded", f"changed: {said}; config {digest(new.settings)}")
    log.info("the config was read again; changed: %s", said)
    return Outcome(True, f"changed: {said}")


def refused(old: Listening, problem: Error) -> Outcome:
    """A reload that was not made: what was in force is in force."""
    hint = f" ({problem.hint})" if problem.hint else ""
    log.error("the config was not read again, what was in force stays: %s%s", problem.message, hint)
    _note(old.settings, "config.reload_refused", " ".join(problem.message.split())[:2000])
    return Outcome(False, problem.message, problem.hint)


def _book(settings: Settings) -> AbstractContextManager[AuditLog]:
    key, spare = read_key(settings.audit.key_file), settings.auth.token_file.parent
    return contextlib.closing(AuditLog(settings.audit.file, key, utcnow, spare=spare))


def _note(settings: Settings, event: str, reason: str) -> None:
    """Write a reload's line, or keep it beside the log, as a command does."""
    try:
        with _book(settings) as book:
            try:
                book.append(event, reason=reason)
            except Error as problem:
                log.error("%s: %s", event, problem.message)
                _keep(book, event, reason)
    except Error as problem:
        log.error("%s: %s", event, problem.message)


def _keep(book: AuditLog, event: str, reason: str) -> None:
    try:
        book.keep(event, reason=reason)
    except Error as problem:
        log.error("1 line is lost to the audit log: %s: %s", event, problem.message)
        book.lose(1)


class Requests:
    """Who has asked for a reload, by the id that a command gave itself; a signal has none. What is asked while one runs
    is done after it, since the config may have changed meanwhile; however many ask then, it is done once."""

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._underway: set[str] = set()
        self._answered: dict[str, Outcome] = {}

    def ask(self, name: str) -> None:
        """Note that one is wanted, unless that one has been made, or is being made: a command asks every worker."""
        if name not in self._answered and name not in self._underway:
            self._wanted.add(name)

    def take(self) -> set[str]:
        """Who asks; from now on whoever asks wants another one."""
        taken, self._wanted = self._wanted, set()
        self._underway = taken - {""}
        return taken

    def answer(self, names: set[str], outcome: Outcome) -> None:
        """Note what became of it."""
        self._underway = set()
        self._answered.update(dict.fromkeys(names - {""}, outcome))
        while len(self._answered) > 100:
            del self._answered[next(iter(self._answered))]

    def answered(self, name: str) -> Outcome | None:
        """What became of the one that was asked for by that name."""
        return self._answered.get(name)


class Waiting:
    """Commands that wait for a reload's outcome, in one process."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[Outcome]] = {}

    async def outcome(self, name: str) -> Outcome:
        """What became of the reload of that name."""
        found = self._futures.setdefault(name, asyncio.get_running_loop().create_future())
        return await asyncio.shield(found)

    def tell(self, names: set[str], outcome: Outcome) -> None:
        """Answer them."""
        for name in names:
            if (found := self._futures.pop(name, None)) is not None and not found.done():
                found.set_result(outcome)


class Alone:
    """Reloads in the one process that serves. `over`: whether it is about to stop; `systemd` is told of each."""

    def __init__(self, serving: Serving, read: Read, over: Callable[[], bool], systemd: Notifier) -> None:
        self._serving = serving
        self._read = read
        self._over = over
        self._systemd = systemd
        self._requests = Requests()
        self._waiting = Waiting()
        self._news = asyncio.Event()

    def ask(self, name: str = "") -> None:
        """Have it done soon."""
        self._requests.ask(name)
        self._news.set()

    async def outcome(self, name: str) -> Outcome:
        """Have it done for a command, and wait for what became of it."""
        self.ask(name)
        return self._requests.answered(name) or await self._waiting.outcome(name)

    async def run(self) -> None:
        """Reload whenever somebody asks, for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            if names := self._requests.take():
                self._systemd.reloading()
                outcome = await self._reload()
                self._systemd.reloaded(outcome.told)
                self._requests.answer(names, outcome)
                self._waiting.tell(names, outcome)

    async def _reload(self) -> Outcome:
        old = self._serving.current.listening
        try:
            if self._over():
                raise Error("the server stops")
            with whole():
                new = successor(old, self._read)
                await self._serving.prepare(new)
        except Error as problem:
            return refused(old, problem)
        self._serving.commit()
        return settled(old, new)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Whatever goes wrong within is an Error: nothing that is wrong with a reload may end the server."""
    try:
        yield
    except Error:
        raise
    except Exception:
        log.exception("a reload failed")
        raise Error("internal error", "the log says more") from None
