"""SIGHUP: the config is to be read again, or the terminal has gone away. Imports nothing of ours: it is there early."""

import os
import signal
from collections.abc import Callable
from types import FrameType


class Hangup:
    """Takes SIGHUP for this process from now on, and remembers it until somebody can do something about it.

    `told` is called when the config is to be read again, `stop` when the terminal is gone that the server was started
    in: then it ends, as without a handler. Whoever started it with nohup wants it to go on.
    """

    def __init__(self) -> None:
        self.asked = False
        self.told: Callable[[], None] = lambda: None
        self.stop: Callable[[int, FrameType | None], None] = _die
        if hasattr(signal, "SIGHUP"):
            self._before = signal.getsignal(signal.SIGHUP)
            self._terminal = self._before != signal.SIG_IGN and _terminal()
            signal.signal(signal.SIGHUP, self._came)

    def release(self) -> None:
        """Let it be as it was before; what has come meanwhile comes again."""
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self._before)
            if self.asked:
                signal.raise_signal(signal.SIGHUP)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._terminal and not _terminal():
            self.stop(number, frame)
        else:
            self.asked = True
            self.told()


def _die(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _terminal() -> bool:
    """Whether this process has a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
