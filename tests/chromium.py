"""A real browser for tests: headless Chromium, driven over a pipe by its DevTools protocol, with nothing installed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads commands from descriptor 3, and answers on 4."""
WAIT = 30.0
"""Seconds for one answer: the machine may be busy."""


class Browser:
    """One tab. `events` is what it has told since the last look, `said` what it has complained of since the page was
    opened: above all, of policies that the page breaks."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number = 0
        self._came = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []

    def attach(self) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = monotonic() + WAIT
        while True:
            found = self._next(until)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found}"
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def wait(self, method: str) -> dict[str, Any]:
        """The next event of that name, and all before it forgotten."""
        until = monotonic() + WAIT
        while True:
            found = self.events.pop(0) if self.events else self._next(until)
            if found.get("method") == method:
                params: dict[str, Any] = found["params"]
                return params

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._came:
            ready = select.select([self._back], [], [], max(0.0, until - monotonic()))[0]
            assert ready, "the browser does not answer"
            some = os.read(self._back, 1 << 20)
            assert some, "the browser has ended"
            self._came += some
        line, _, self._came = self._came.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Log.entryAdded":
            self.said.append(message["params"]["entry"]["text"])
        return message

    def go(self, url: str) -> None:
        """Open a page, and wait until it is whole."""
        self.events.clear()
        self.said.clear()
        loader = self.ask("Page.navigate", url=url)["loaderId"]
        while self.wait("Page.frameNavigated")["frame"]["loaderId"] != loader:
            pass  # the blank page that was there before, which may only now be whole
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; its policy does not bind DevTools."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def settle(self) -> None:
        """Wait until the page has been painted twice: by then it has its focus, and takes what is typed and clicked."""
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        self.ask("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def press(self, selector: str) -> None:
        """Click on the middle of an element, as a mouse does."""
        self.settle()
        box = self.run(
            f"(e=>(e.scrollIntoView(),JSON.stringify(e.getBoundingClientRect())))(document.querySelector('{selector}'))"
        )
        at = json.loads(box)
        where = {"x": at["x"] + at["width"] / 2, "y": at["y"] + at["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **where)

    def look(self, width: int, height: int, *, dark: bool) -> None:
        """Be a screen of this size, of somebody who likes it light or dark."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(shot))


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh browser with a profile of its own, ended at the end."""
    assert PROGRAM
    (low, to), (back, high) = os.pipe(), os.pipe()
    his, hers = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (low, high))
    os.close(low)
    os.close(high)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                sys.executable, "-c", START, str(his), str(hers), PROGRAM, "--headless=new", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            ],
            pass_fds=(his, hers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(his)
        os.close(hers)
        try:
            found = Browser(to, back)
            found.attach()
            yield found
        finally:
            process.kill()
            process.wait(WAIT)
            os.close(to)
            os.close(back)
