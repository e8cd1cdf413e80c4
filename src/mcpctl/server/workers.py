"""Several workers: forked, started again when they die, told to reload and to stop, by a supervisor that serves nobody.

The supervisor and each worker have a pipe. Its end tells a worker that the supervisor is gone, and the supervisor that
the worker is.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from math import inf
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

from mcpctl.certificates import Pair
from mcpctl.errors import ConfigError, Error
from mcpctl.server import logs, loop, reload
from mcpctl.server.hangup import Hangup
from mcpctl.server.listening import Listening
from mcpctl.server.notify import Notifier
from mcpctl.server.reload import DRAIN, Outcome, Read, Requests, Serving, Waiting

log = logging.getLogger("mcpctl")
_TICK = 0.25
_ANSWER = 15.0
"""Seconds in which every worker has to have built what a reload asks for, what was in force before gone."""
_DRAINED, _STOPPED = DRAIN + 10.0, 5.0
"""Seconds after which a worker that was told to drain, or to stop now, hangs: longer than either takes."""
_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
_LIVED = 60.0
"""Seconds after which a worker's death is no longer that of one that dies again and again."""
Work = Callable[[Listening, "Link", int], Coroutine[Any, Any, object]]
"""What a worker does, with its link and its place (0 is the first)."""


class Link:
    """A worker's end of the pipe. `first`: whether the server is starting, and it takes no dead one's place. `stop` is
    called when the supervisor is gone. `interval`: seconds within which systemd wants a sign of life."""

    def __init__(self, pipe: "Connection[Any, Any]", *, first: bool = True, interval: float | None = None) -> None:
        self.first = first
        self._interval = interval
        self._pipe = pipe
        self._orders: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._waiting = Waiting()
        self.stop: Callable[[], None] = lambda: None

    def up(self) -> None:
        """Say that this worker answers."""
        self._send("up", None)

    def taken(self, pair: Pair) -> None:
        """Say which certificate is served: broken files keep no worker from taking a dead one's place."""
        self._send("pair", pair)

    async def outcome(self, name: str) -> Outcome:
        """Have the supervisor reload for a command, and wait for what became of it."""
        self._send("reload", name)
        return await self._waiting.outcome(name)

    async def keep_alive(self) -> None:
        """Give the supervisor signs of life for as long as the event loop runs this: it gives none of its own for a
        worker that hangs."""
        while self._interval is not None:
            self._send("alive", None)
            await asyncio.sleep(self._interval / 6)

    async def obey(self, serving: Serving) -> None:
        """Do what the supervisor says, for ever."""
        here = asyncio.get_running_loop()
        here.add_reader(self._pipe.fileno(), self._receive)
        try:
            while True:
                await self._do(serving, *await self._orders.get())
        finally:
            here.remove_reader(self._pipe.fileno())

    def _receive(self) -> None:
        try:
            self._orders.put_nowait(self._pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self.stop()

    def _send(self, word: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which `_receive` sees
            self._pipe.send((word, content))

    async def _do(self, serving: Serving, word: str, content: Any) -> None:
        match word:
            case "prepare":
                number, listening = content
                problem = None
                try:
                    with reload.whole():
                        await serving.prepare(listening)
                except Error as fault:
                    problem = (fault.message, fault.hint)
                self._send("prepared", (number, problem))
            case "commit":
                serving.commit()
            case "abandon":
                await serving.abandon()
            case "outcome":
                self._waiting.tell(*content)


@dataclass(eq=False)
class _Worker:
    """A worker as the supervisor sees it."""

    place: int
    pid: int
    pipe: "Connection[Any, Any]"
    begun: float = field(default_factory=monotonic)
    up: bool = False
    hung_up: bool = False
    seen: float = field(default_factory=monotonic)
    """When it gave a sign of life."""

    def send(self, word: str, content: Any = None) -> None:
        """Tell it; one that is gone is found out elsewhere."""
        with contextlib.suppress(OSError):
            self.pipe.send((word, content))


class Supervisor:
    """One per server. `ready` is called once every worker answers; `systemd` is told how it goes."""

    def __init__(
        self,
        listening: Listening,
        bound: socket.socket,
        ready: Callable[[], None],
        work: Work,
        read: Read | None,
        hangup: Hangup | None,
        systemd: Notifier | None = None,
    ) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("several workers need fork, which this system has not", "set server.workers to 1")
        self._listening = listening
        self._bound = bound
        self._ready: Callable[[], None] | None = ready
        self._work = work
        self._read = read
        self._hangup = hangup
        self._systemd = systemd or Notifier({})
        self._serve_all = True
        self._workers: list[_Worker] = []
        self._due: dict[int, float] = dict.fromkeys(range(listening.settings.server.workers), 0.0)
        self._deaths: dict[int, int] = {}
        self._requests = Requests()
        self._told: list[int] = []
        self._failed = False
        self._number = 0
        self._until = inf

    def run(self) -> list[int]:
        """Watch over the workers until told to stop; returns the signals that came."""
        numbers = stopping(self._hangup)
        for number in numbers:
            signal.signal(number, self._stop)
        if self._hangup is not None:
            self._hangup.stop = self._stop
            self._hangup.told = lambda: None  # it comes between two looks
        woken_read, woken_write = os.pipe()
        for fd in (woken_read, woken_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(woken_write, warn_on_full_buffer=False)
        try:
            while self._workers or (self._due and not self._over):
                self._look(woken_read)
        finally:
            signal.set_wakeup_fd(-1)
            os.close(woken_read)
            os.close(woken_write)
        for number in numbers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._failed:
            raise Error("a worker did not start", "the log above says why")
        return self._told

    @property
    def _over(self) -> bool:
        return bool(self._told) or self._failed

    def _stop(self, number: int, _: Any) -> None:
        """The first signal has every worker drain; a second has them stop now. Who hangs is killed in the end."""
        self._told.append(number)
        self._systemd.stopping()
        self._end_workers()

    def _end_workers(self) -> None:
        self._until = min(self._until, monotonic() + (_DRAINED if len(self._told) < 2 else _STOPPED))
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        if monotonic() < self._until:
            return
        self._until = inf
        for worker in self._workers:
            log.error("worker %d was told to end and did not; it is killed", worker.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)

    def _look(self, woken: int) -> None:
        if self._over:
            self._bound.close()  # else the system would go on taking connections that nobody answers
        else:
            self._fork_due()
        self._listen([woken], _TICK)
        self._bury()
        self._kill_late()
        if self._ready is not None and not self._due and all(one.up for one in self._workers) and not self._over:
            self._ready()
            self._ready = None
        self._tell()
        if self._hangup is not None and self._hangup.asked:
            self._hangup.asked = False
            self._requests.ask("")
        if self._over and (names := self._requests.take()):
            self._answer(names, Outcome(False, "the server stops"))
        # not while one is being started with what was in force when it was forked
        all_up = self._ready is None and not self._over and all(one.up for one in self._workers)
        if all_up and (names := self._requests.take()):
            self._systemd.reloading()
            outcome = self._reload()
            self._systemd.reloaded(outcome.told)
            self._answer(names, outcome)

    def _tell(self) -> None:
        """Say in the service's status when a worker is missing, and when none is any more."""
        missing = len(self._due) + sum(not one.up for one in self._workers)
        if self._ready is None and not self._over and self._serve_all == bool(missing):
            self._serve_all = not missing
            all_of_them = self._listening.settings.server.workers
            verb = "is" if missing == 1 else "are"
            self._systemd.status(f"{missing} of {all_of_them} workers {verb} being started again" if missing else "")

    def _give_sign(self) -> None:
        """Tell systemd that the server answers: as long as each worker there is does, and there is one."""
        if (patience := self._systemd.interval) is None:
            return
        late = monotonic() - patience / 2
        if self._over or (self._workers and all(one.seen > late for one in self._workers)):
            self._systemd.alive()

    def _listen(self, others: list[int], seconds: float) -> list[tuple[_Worker, Any]]:
        """Wait for what workers say, no longer than that; what they have said of a reload under way."""
        self._give_sign()
        by_pipe = {one.pipe: one for one in self._workers if not one.hung_up}
        said = []
        for found in wait([*by_pipe, *others], seconds):
            if isinstance(found, int):
                with contextlib.suppress(BlockingIOError):
                    os.read(found, 4096)
                continue
            worker = by_pipe[found]  # type: ignore[index]
            try:
                word, content = worker.pipe.recv()
            except (EOFError, OSError):
                worker.hung_up = True
                continue
            worker.seen = monotonic()
            if word == "alive":
                continue
            if word == "up":
                worker.up = True
            elif word == "pair":
                self._listening = replace(self._listening, pair=content)
            elif word == "reload":
                self._ask(worker, content)
            else:
                said.append((worker, content))
        return said

    def _ask(self, worker: _Worker, name: str) -> None:
        if (outcome := self._requests.answered(name)) is not None:
            worker.send("outcome", ({name}, outcome))
        else:
            self._requests.ask(name)

    def _answer(self, names: set[str], outcome: Outcome) -> None:
        self._requests.answer(names, outcome)
        for worker in self._workers:
            worker.send("outcome", (names, outcome))

    def _reload(self) -> Outcome:
        """Read the config, have every worker build what it says, and have all of them take it, or none."""
        old = self._listening
        try:
            if self._read is None:
                raise Error("this server keeps the config that it was started with", "restart it")
            with reload.whole():
                new = reload.successor(old, self._read)
                self._prepare(new)
        except Error as problem:
            for worker in self._workers:
                worker.send("abandon")
            return reload.refused(old, problem)
        for worker in self._workers:
            worker.send("commit")
        self._listening = replace(new, pair=self._listening.pair)
        logs.change(new.settings.log)
        return reload.settled(old, new)

    def _prepare(self, new: Listening) -> None:
        """Have every worker build it, also one that takes a dead one's place meanwhile."""
        asked: set[_Worker] = set()
        missing: set[_Worker] = set()
        self._number += 1
        until = monotonic() + _ANSWER
        while missing := {one for one in missing | self._ask_further(asked, new) if not one.hung_up}:
            if self._over or monotonic() > until:
                raise Error("the server stops" if self._over else "a worker did not answer in time", "try again")
            for worker, (number, problem) in self._listen([], _TICK):
                if number != self._number:  # of an earlier one, which another worker could not do
                    continue
                missing.discard(worker)
                if problem is not None:
                    raise Error(*problem)
            self._bury()
            if not self._over:
                self._fork_due()

    def _ask_further(self, asked: "set[_Worker]", new: Listening) -> "set[_Worker]":
        """Have those build it that were not asked yet."""
        further = set(self._workers) - asked
        for worker in further:
            worker.send("prepare", (self._number, new))
        asked |= further
        return further

    def _bury(self) -> None:
        """Note the workers that have ended, and when another takes their place."""
        for worker in list(self._workers):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            self._workers.remove(worker)
            worker.hung_up = True
            worker.pipe.close()
            if self._over:
                continue
            if self._ready is not None:
                self._failed = True
                self._end_workers()
                continue
            again = self._deaths.get(worker.place, 0) if monotonic() - worker.begun < _LIVED else 0
            self._deaths[worker.place] = again + 1
            pause = min(_LONGEST_PAUSE, _PAUSE * 2**again)
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            often = f", the {again + 1}th time in a row" if again > 2 else ""
            log.error("worker %d died (%s)%s; another takes its place in %g s", worker.pid, how, often, pause)
            self._due[worker.place] = monotonic() + pause

    def _fork_due(self) -> None:
        for place in [place for place, due in self._due.items() if due <= monotonic()]:
            del self._due[place]
            self._fork(place)

    def _fork(self, place: int) -> None:
        numbers = stopping(None)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # the supervisor's handler, in the worker, would swallow one
        if self._over:  # it came just before
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        ours, theirs = Pipe()
        pid = os.fork()
        if pid:
            theirs.close()
            self._workers.append(_Worker(place, pid, ours))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in numbers:  # a terminal's Ctrl-C and hangup are the supervisor's to judge
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            for pipe in (ours, *(one.pipe for one in self._workers)):
                pipe.close()
            loop.run(self._serve(theirs, place))
            status = 0
        except Error as problem:
            log.error("%s", problem.message)
        except Exception:
            log.exception("worker %d failed", os.getpid())
        finally:
            os._exit(status)

    async def _serve(self, pipe: "Connection[Any, Any]", place: int) -> None:
        link = Link(pipe, first=self._ready is not None, interval=self._systemd.interval)
        await self._work(self._listening, link, place)


def stopping(hangup: Hangup | None) -> list[int]:
    """The signals that end the server; HUP, where nobody else takes it."""
    names = ("SIGTERM", "SIGINT", "SIGHUP") if hangup is None else ("SIGTERM", "SIGINT")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
