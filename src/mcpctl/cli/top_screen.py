"""The screen of `mcpctl top`: what runs, who used most, and keys that end it.

The rules:
- a key acts on the line that is marked, and the mark follows its call: when that has ended, nothing is marked, so that
  no key meets whoever stands there next;
- nothing is asked: in an incident a key is enough. Ending a query is `x`; ending a token for good takes the shift key;
- however it ends (q, Ctrl-C, a signal, an error), the terminal is as it was.
"""

import contextlib
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from mcpctl.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Rows = list[list[object]]
Mark = tuple[str, str]
"""What is marked: a call by its id, or a token by its own."""
RUNNING = ("SECONDS", "USER", "TOKEN", "TOOL", "DATABASE", "BACKEND", "ADDRESS")
USED = ("USER", "TOKEN", "CALLS", "FAILED", "REFUSED", "ROWS", "BYTES", "SECONDS", "ADDRESSES")
KEYS = "j k or arrows: mark   x: end the query   X: revoke the token   q: quit"
_KEY = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|\x1b.?|[^\x1b]", re.DOTALL)
_MOVES = {b"j": 1, b"\x1b[B": 1, b"\x1bOB": 1, b"k": -1, b"\x1b[A": -1, b"\x1bOA": -1}
_ENDS = (b"q", b"Q", b"\x04", b"")
_BETWEEN, _LEAST = 2, 6
"""Columns of the screen between two of the table's, and how many the last of these has at least."""
_AROUND = 7
"""Lines of the screen that are no call's and no token's."""


@dataclass
class Seen:
    """One look: what runs, the longest first; what each token used in the last minute, the most first; the pids of
    processes that did not answer; and why there was none (then the others are of the look before)."""

    running: list[dict[str, Any]] = field(default_factory=list)
    used: list[dict[str, Any]] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    failed: str | None = None


def running_rows(running: list[dict[str, Any]], sql: bool) -> Rows:
    """The lines of what runs."""
    names = ("user", "token", "tool", "database", "backend_pid", "client_ip")
    return [
        [f"{one['seconds']:.1f}", *(one[name] for name in names)] + ([_one_line(one)] if sql else []) for one in running
    ]


def _one_line(one: dict[str, Any]) -> str:
    """A statement as one line. One of which PostgreSQL describes no columns may hold a password."""
    text = one.get("statement", "")
    return "(not shown)" if text is None else " ".join(text.split())


def used_rows(used: list[dict[str, Any]]) -> Rows:
    """The lines of who used most."""
    names = ("user", "token", "calls", "failed", "refused", "rows", "bytes")
    return [[*(one[name] for name in names), f"{one['seconds']:.1f}", ",".join(one["addresses"])] for one in used]


class Screen:
    """What is shown, and what the keys do. `look()` finds what there is, `cut(call)` ends a call and `revoke(token)` a
    token; both say in words what they did, or raise an Error."""

    def __init__(
        self,
        look: Callable[[], Seen],
        cut: Callable[[dict[str, Any]], str],
        revoke: Callable[[str], str],
        clock: Callable[[], str],
        *,
        sql: bool,
    ) -> None:
        self._find = look
        self._cut = cut
        self._revoke = revoke
        self._clock = clock
        self._sql = sql
        self._mark: Mark | None = None
        self._said = ""
        self.seen = Seen()

    def look(self) -> None:
        """Look again; what was marked and is not there any more is not marked."""
        self.seen = self._find()
        if self._mark not in self._marks():
            self._mark = None

    def _marks(self) -> list[Mark]:
        calls = [("call", one["id"]) for one in self.seen.running]
        return calls + [("token", one["token"]) for one in self.seen.used]

    def press(self, key: bytes) -> None:
        """Do what a key does; what came of it is shown until the next one."""
        self._said = ""
        marks = self._marks()
        if key in _MOVES and marks:
            at = marks.index(self._mark) + _MOVES[key] if self._mark is not None else 0
            self._mark = marks[max(0, min(at, len(marks) - 1))]
        elif key in (b"x", b"X"):
            self._said = self._do(key)

    def _do(self, key: bytes) -> str:
        from mcpctl.errors import Error

        kind, name = self._mark or ("", "")
        call = next((one for one in self.seen.running if kind == "call" and one["id"] == name), None)
        token = call["token"] if call is not None else name
        if not kind:
            return "mark a line first: j, k or the arrows"
        if key == b"x" and call is None:
            return "that is no call that runs: X revokes the token"
        if key == b"X" and not token:
            return "that call has no token"
        warned = io.StringIO()
        try:
            with contextlib.redirect_stderr(warned):  # it would stand across the screen
                done = self._cut(call) if key == b"x" and call is not None else self._revoke(token)
        except Error as problem:
            done = f"NOT DONE: {problem.message}{f' ({problem.hint})' if problem.hint else ''}"
        except OSError as problem:
            done = f"NOT DONE: {problem}"
        return " ".join([*done.split(), *warned.getvalue().split()])

    def drawn(self, width: int, height: int) -> "RenderableType":
        """All of it, in so many columns and lines."""
        from rich.console import Group
        from rich.text import Text

        seen, room = self.seen, max(2, height - _AROUND)
        below = min(len(seen.used), max(1, room // 2, room - len(seen.running)))
        above = min(len(seen.running), room - below)
        told = f"; no answer from {', '.join(map(str, seen.silent))}" if seen.silent else ""
        told += f"; {seen.failed}" if seen.failed else ""
        calls = f"{len(seen.running)} {'call runs' if len(seen.running) == 1 else 'calls run'}"
        shown = f" ({above} shown)" if above < len(seen.running) else ""
        return Group(
            Text(output.clean(f"{self._clock()}  {calls}{shown}{told}"), no_wrap=True, overflow="ellipsis"),
            self._table(
                [*RUNNING, *(["STATEMENT"] if self._sql else [])],
                [("call", one["id"]) for one in seen.running],
                running_rows(seen.running, self._sql),
                above,
                width,
            ),
            Text("\nin the last minute", no_wrap=True, overflow="ellipsis"),
            self._table(USED, [("token", one["token"]) for one in seen.used], used_rows(seen.used), below, width),
            Text(
                output.clean(self._said) or KEYS, no_wrap=True, overflow="ellipsis", style="bold" if self._said else ""
            ),
        )

    def _table(
        self, head: "tuple[str, ...] | list[str]", marks: list[Mark], rows: Rows, room: int, width: int
    ) -> "Table":
        """So many of the lines, with the marked one among them."""
        from rich.table import Table
        from rich.text import Text

        at = marks.index(self._mark) if self._mark in marks else 0
        first = max(0, at - room + 1)
        shown = [(marks[one], [Text(output.clean(cell)) for cell in rows[one]]) for one in range(len(rows))]
        shown = shown[first : first + room]
        made = Table(box=None, pad_edge=False, expand=False)
        made.add_column("", width=1, no_wrap=True)
        left, fitting = width - 1, 0
        for number, name in enumerate(head):  # from the left, each as wide as it wants to be: a cut id is of no use
            wanted = max([len(name), *(row[number].cell_len for _, row in shown)])
            left -= _BETWEEN
            if left < min(wanted, _LEAST):
                break
            made.add_column(name, width=min(wanted, left), overflow="ellipsis", no_wrap=True)
            left, fitting = left - wanted, number + 1
        for mark, row in shown:
            here = mark == self._mark
            made.add_row(">" if here else " ", *row[:fitting], style="reverse" if here else None)
        return made


def show(screen: Screen, interval: float) -> None:
    """Show it again and again, on the whole terminal, until q or Ctrl-C. A signal that ends it is raised again when the
    terminal is as it was, so that the exit status tells the truth."""
    from rich.console import Console
    from rich.live import Live

    # What a shell or a library has put there once does not follow the terminal, when that has another size.
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    console, told = Console(highlight=False, _environ=environ), list[int]()
    with _signals(told) as woken, _keys():
        screen.look()
        with Live(screen.drawn(*console.size), console=console, screen=True, auto_refresh=False) as live:
            _run(screen, live, (woken, told), interval, lambda: screen.drawn(*console.size))
    for number in told[:1]:
        signal.raise_signal(number)


def _run(
    screen: Screen, live: Any, told: tuple[int, list[int]], interval: float, drawn: "Callable[[], RenderableType]"
) -> None:
    woken, ends = told
    keys = [sys.stdin.fileno()] if sys.stdin is not None and sys.stdin.isatty() else []
    while not ends:
        ready, _, _ = select.select([woken, *keys], [], [], interval)
        if woken in ready:
            os.read(woken, 4096)  # another size, or the end
        pressed = [key for fd in ready if fd != woken for key in _pressed(fd)]
        if any(key in _ENDS for key in pressed):
            return
        for key in pressed:
            screen.press(key)
        if not ready or any(key in (b"x", b"X") for key in pressed):
            screen.look()
        live.update(drawn(), refresh=True)


def _pressed(fd: int) -> list[bytes]:
    """The keys that were hit; b"" where the terminal is gone."""
    try:
        data = os.read(fd, 1024)
    except OSError:
        data = b""
    return _KEY.findall(data) or [b""]


@contextlib.contextmanager
def _signals(told: list[int]) -> Iterator[int]:
    """Signals that end a program are noted instead; the descriptor can be read when one has come, and when the terminal
    has another size. A second one ends it where it is."""

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if len(told) > 1:
            raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda number, frame: None)}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Have each key as soon as it is hit, unseen. Ctrl-Z does nothing, since it would leave the terminal as it is."""
    import termios
    import tty

    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        now = termios.tcgetattr(fd)
        now[6][termios.VSUSP] = bytes([os.fpathconf(fd, "PC_VDISABLE") & 0xFF])
        termios.tcsetattr(fd, termios.TCSANOW, now)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
