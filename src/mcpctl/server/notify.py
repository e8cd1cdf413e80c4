"""What systemd is told of the server: ready, reloading, stopping, how it goes, and that it still answers.

One datagram each, to the socket that NOTIFY_SOCKET names (sd_notify(3)); without one nothing is told. Only the main
process tells anything, which is what `NotifyAccess=main` takes.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from time import monotonic, monotonic_ns

log = logging.getLogger("mcpctl.notify")
_PATIENCE = 1.0
"""Seconds that a full queue of systemd's is waited for where it must hear; a sign of life is left out instead."""
_LONGEST = 300
"""Characters of a status: `systemctl status` has one line for it."""


class Notifier:
    """What one process tells. `interval` is how many seconds systemd waits for a sign of life (sd_watchdog_enabled(3)),
    None where it waits for none, or for another process's."""

    def __init__(self, environ: Mapping[str, str], pid: int = 0, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._due = 0.0
        self._usual = ""
        self._silent = False
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.interval = _interval(environ, pid) if self._address else None

    def ready(self, usual: str) -> None:
        """All of it answers. `usual` is what the status says while nothing else is to be said."""
        self._usual = usual
        self._say("READY=1", _status(usual))

    def reloading(self) -> None:
        """The config is read again; ends with `reloaded`. The time tells systemd which of its reloads it is."""
        now = monotonic_ns() // 1000
        self._say("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=reading the config again")

    def reloaded(self, said: str) -> None:
        """It has been, or was refused."""
        self._say("READY=1", _status(f"{self._usual}; {said}"))

    def status(self, said: str) -> None:
        """How it goes; with nothing to say, the usual."""
        self._say(_status(f"{self._usual}; {said}" if said else self._usual))

    def stopping(self) -> None:
        """It ends."""
        self._say("STOPPING=1", "STATUS=letting the calls that run end")

    def alive(self) -> None:
        """Give a sign of life, twice as often as systemd waits for one; who calls it more often gives no more."""
        if self.interval is not None and self._clock() >= self._due:
            self._due = self._clock() + self.interval / 2
            self._say("WATCHDOG=1", patience=0)

    async def keep_alive(self) -> None:
        """Give signs of life for as long as the event loop runs this."""
        while self.interval is not None:
            self.alive()
            await asyncio.sleep(self.interval / 4)

    def _say(self, *lines: str, patience: float = _PATIENCE) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
                made.settimeout(patience)
                made.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as problem:
            if not self._silent:
                log.warning("systemd cannot be told anything: %s: %s", self._address.strip("\0"), problem)
            self._silent = True


def _address(name: str) -> str:
    """The address of a socket that is a file's, or, with @, an abstract one's (unix(7)). Others are none of ours."""
    if name.startswith("@") and len(name) > 1:
        return "\0" + name[1:]
    if name and not name.startswith("/"):
        log.warning("NOTIFY_SOCKET names no socket that can be told anything: %s", ascii(name))
    return name if name.startswith("/") else ""


def _interval(environ: Mapping[str, str], pid: int) -> float | None:
    """WATCHDOG_USEC in seconds, where it is meant for this process."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 63:
        return int(text) / 1e6
    log.warning("WATCHDOG_USEC is no number of microseconds: %s", ascii(text))
    return None


def _status(said: str) -> str:
    """A status in one line: a second one would tell systemd something else."""
    return f"STATUS={' '.join(said.split())[:_LONGEST]}"
