"""HTTPS while it runs: a renewed certificate is taken for new connections, and its end is told in time."""

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, TypeVar

from mcpctl import certificates
from mcpctl.certificates import Pair, context, expires, out_of_date
from mcpctl.config_keys import Settings, Tls
from mcpctl.errors import ConfigError
from mcpctl.identity.tokens import utcnow

__all__ = ["Certificates", "context", "expires", "out_of_date"]
log = logging.getLogger("mcpctl.tls")
_LOOK = 1.0
"""Seconds between two looks at the files. A change is taken at the second look that finds the files the same: whoever
renews writes them one after the other."""
_PATIENCE = 10.0
"""Seconds after which files that do not fit together are no longer a renewal under way."""
REMINDERS = (1, 7, 14, 30)
"""Days before a certificate's end at which it is told."""
T = TypeVar("T")
RENEWED = "config.certificate_renewed"


class _Live(ssl.SSLContext):
    """What the listening socket is given: each new connection gets the context of its moment, whole. To load another
    pair into a context in use would leave an RSA certificate there beside an ECDSA one."""

    current: ssl.SSLContext
    clients = 0
    """How often it has become another whom a client certificate lets in."""

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """Begin a connection."""
        self.current.sslobject_class = _Handshake
        begun = self.current.wrap_bio(*arguments, **named)
        if isinstance(begun, _Handshake):
            begun.live, begun.clients = self, self.clients
        return begun


class _Handshake(ssl.SSLObject):
    """A connection's TLS, whose handshake fails where it has become another meanwhile whom it may let in."""

    live: _Live
    clients: int

    def do_handshake(self) -> None:
        super().do_handshake()
        if self.clients != self.live.clients:
            raise ssl.SSLError("it was begun with another client CA")


class Certificates:
    """The pair that a process serves with, and the eye on its files. `note` writes audit lines; `tells`: whether this
    process is the one that tells the administrator, of several that do the same; `last`: what is served where the files
    are not in order at the start. `taken` hears of another pair, `hang_up` ends the connections that were let in by
    another client CA."""

    def __init__(
        self,
        settings: Settings,
        note: Callable[..., None],
        last: Pair | None = None,
        *,
        tells: bool = True,
        now: Callable[[], datetime] = utcnow,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.note = note
        self._tells = tells
        self._now = now
        self._clock = clock
        self._told: tuple[str, int] | None = None
        self.live = _Live(ssl.PROTOCOL_TLS_SERVER)
        self.taken: Callable[[Pair], None] = lambda pair: None
        self.hang_up: Callable[[], None] = lambda: None
        tls = settings.server.tls
        try:
            pair = certificates.read(tls)
            made = pair.context()
        except ConfigError as problem:
            if last is None:
                raise
            pair = replace(last, tls=tls)
            made = pair.context()
            log.error("the earlier certificate is served on: %s (%s)", problem.message, problem.hint)
        self._use(pair, made)

    def take(self, pair: Pair, made: ssl.SSLContext) -> None:
        """Serve new connections with it from now on, and tell where that is a change; open ones keep what they have."""
        old = self._pair
        changed = [part for part in certificates.PARTS if pair.contents.get(part) != old.contents.get(part)]
        self._use(pair, made)
        self.taken(pair)
        if "client_ca" in changed or pair.tls.client_certificate != old.tls.client_certificate:
            self.live.clients += 1
            self.hang_up()
        if changed and self._tells:
            ends = ["cert"] if changed != ["client_ca"] else []
            ends += ["client_ca"] if "client_ca" in changed and "client_ca" in pair.contents else []
            said = [f"{', '.join(changed)} of server.tls", *(f"{part} {pair.told(part)}" for part in ends)]
            log.info("renewed: %s", "; ".join(said))
            self.note(RENEWED, reason="; ".join(said))

    def _use(self, pair: Pair, made: ssl.SSLContext) -> None:
        self._pair = pair
        self.live.current = made
        self._done: object = None  # the files may have changed since they were read
        self._before: object = None
        self._since: float | None = None
        self._warned = False

    @property
    def ends(self) -> datetime:
        """When the certificate that is served ends."""
        return self._pair.own.not_valid_after_utc

    async def watch(self) -> None:
        """Look after the files and the dates, for ever."""
        while True:
            try:
                before = self._pair
                found = await aside(self._find)  # a file system that does not answer holds nobody up
                if self._pair is before:
                    self._found(found)
                self.remind()
            except Exception:
                log.exception("looking after the certificate failed; it is tried again")
            await asyncio.sleep(_LOOK)

    def look(self) -> None:
        """Take what the files hold now, where that is new, at rest, and fits together; else keep what there is."""
        self._found(self._find())

    def _found(self, found: tuple[Pair, ssl.SSLContext, object] | None) -> None:
        if found is not None:
            self.take(*found[:2])
            self._done = found[2]

    def _find(self) -> tuple[Pair, ssl.SSLContext, object] | None:
        tls = self._pair.tls
        seen = certificates.stamps(tls)
        if seen == self._done:
            return None
        if seen != self._before:
            self._before = seen
            return None
        try:
            return (*self.read(tls), seen)
        except ConfigError as problem:
            self._wait(problem)
            return None

    def read(self, tls: Tls) -> tuple[Pair, ssl.SSLContext]:
        """What the files hold. Raises ConfigError where it may not take the place of what is served."""
        pair = certificates.read(tls)
        made = pair.context()
        if (wrong := pair.out_of_date(self._now())) and not self._pair.out_of_date(self._now()):
            raise ConfigError(wrong, "put a certificate there that counts now")
        return pair, made

    def _wait(self, problem: ConfigError) -> None:
        """Say once that the files do not fit together, and once more when that lasts."""
        if not self._tells:
            return
        if self._since is None:
            self._since = self._clock()
            log.info("the certificate's files have changed, and are not in order yet: %s", problem.message)
        elif not self._warned and self._clock() - self._since > _PATIENCE:
            self._warned = True
            log.warning("the earlier certificate is served on: %s (%s)", problem.message, problem.hint)

    def remind(self) -> None:
        """Warn 30, 14, 7 and 1 days before the certificate ends, and when it has, once each. One that lives no longer
        than that is not warned of so early."""
        if not self._tells:
            return
        own = self._pair.own
        begin, end = own.not_valid_before_utc, own.not_valid_after_utc
        left = end - self._now()
        days = next((days for days in (0, *REMINDERS) if left <= timedelta(days=days)), None)
        told = (self._pair.digest, days or 0)
        if days is None or self._told == told or end - begin <= timedelta(days=days):
            return
        self._told = told
        when = f"ends within {days} days, on {end.date()}" if days else f"has ended on {end.date()}: clients refuse it"
        log.warning("the certificate %s %s", self._pair.tls.cert, when)


async def aside(work: Callable[[], T]) -> T:
    """Do it on a thread that nobody waits for at the end: it may hang for as long as the file system does."""
    done: Future[T] = Future()

    def run() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(work())
        except Exception as problem:  # noqa: BLE001 - who waits is told
            done.set_exception(problem)

    threading.Thread(target=run, name="certificate", daemon=True).start()
    return await asyncio.wrap_future(done)
