"""The control sockets: who is asked, who is swept, and that nobody's silence costs another his answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcpctl import control
from mcpctl.errors import ConfigError
from site_of_mcpctl import environment


@contextlib.contextmanager
def process(folder: Path, name: str, answer: bytes | None) -> Iterator[list[Any]]:
    """What stands for a serving process; `answer` None is one that hangs. Yields what it was asked."""
    asked: list[Any] = []
    made = socket.socket(socket.AF_UNIX)
    with control.short(folder / f"control.{name}.sock") as path:
        made.bind(path)
    made.listen()
    open_: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = made.accept()
                open_.append(one)
                if answer is not None:
                    asked.append(json.loads(one.makefile("rb").readline() or b"null"))
                    one.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        made.shutdown(socket.SHUT_RDWR)
        made.close()
        thread.join(10)
        for one in open_:
            one.close()


def test_a_socket_is_private_from_its_first_moment_and_answers_by_its_name(tmp_path: Path) -> None:
    made, path = control.listen(tmp_path)
    with made:
        assert path.parent == tmp_path
        assert re.fullmatch(rf"control\.{os.getpid()}\.[0-9a-f]{{8}}\.sock", path.name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert control.sockets(tmp_path) == [path]
        assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_folder_with_a_very_long_name_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    made, _ = control.listen(folder)
    made.close()
    with process(folder, "1", b'{"queries": 1}\n'):
        assert {"queries": 1} in control.ask_all(folder, {"do": "settle"})


def test_a_folder_that_is_not_ours_to_write_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make the control socket"):
        control.listen(tmp_path / "none")


def test_everybody_is_asked_and_one_that_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    begun = time.monotonic()
    with (
        process(tmp_path, "1", None),
        process(tmp_path, "2", b'{"queries": 2}\n') as asked,
        process(tmp_path, "3", b"[]\n"),
        process(tmp_path, "4", b"rubbish"),
        process(tmp_path, "5", b'{"queries": 5}\n'),
    ):
        answers = control.ask_all(tmp_path, {"do": "settle", "tokens": ["a"]}, 0.5)
    assert answers[0] == {"error": "no answer in time"}
    assert (answers[1], answers[4]) == ({"queries": 2}, {"queries": 5})
    assert "error" in answers[2]
    assert "error" in answers[3]
    assert asked == [{"do": "settle", "tokens": ["a"]}]
    assert time.monotonic() - begun < 10


def test_a_long_answer_arrives_whole_and_who_is_silent_can_be_named(tmp_path: Path) -> None:
    sessions = ["x" * 100] * 5000
    line = json.dumps({"sessions": sessions}).encode() + b"\n"
    with process(tmp_path, "17.ab", line), process(tmp_path, "4.cd", None):
        answers = control.ask_each(tmp_path, {"do": "sessions"}, 1.0)
    assert answers == [(17, {"sessions": sessions}), (4, {"error": "no answer in time"})]


def test_what_dead_processes_left_is_swept_and_who_lives_is_not(tmp_path: Path) -> None:
    with process(tmp_path, "dead", b"{}\n"):
        pass
    (tmp_path / "control.file.sock").touch()
    (tmp_path / "control.link.sock").symlink_to(tmp_path / "control.dead.sock")
    with process(tmp_path, "alive", b"{}\n"), process(tmp_path, "hangs", None):
        made, mine = control.listen(tmp_path)
        made.close()
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"control.file.sock", "control.link.sock", "control.alive.sock", "control.hangs.sock", mine.name}
    assert control.ask_all(tmp_path, {"do": "ping"}) == []


_LISTEN = """
import sys
from pathlib import Path
from mcpctl import control
made, path = control.listen(Path(sys.argv[1]))
print(path.name, flush=True)
sys.stdin.readline()
print(path.exists())
"""


def test_processes_that_start_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    starting = [
        subprocess.Popen(
            [sys.executable, "-c", _LISTEN, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )
        for _ in range(12)
    ]  # fmt: skip
    names = {one.stdout.readline().strip() for one in starting if one.stdout is not None}
    assert {path.name for path in control.sockets(tmp_path)} == names
    assert len(names) == 12
    for one in starting:
        assert one.communicate("\n", timeout=30)[0] == "True\n"
