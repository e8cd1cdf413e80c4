"""Files that only their owner may read: what is refused, and that nobody ever meets half a file."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcpctl import private_file
from mcpctl.errors import ConfigError, ConflictError, FullError, NotFoundError, NotWrittenError
from site_of_mcpctl import environment, eventually

ROOT = os.geteuid() == 0
NOBODY = 65534
needs_root = pytest.mark.skipif(not ROOT, reason="only root can make files of another user")
not_root = pytest.mark.skipif(ROOT, reason="root follows no link, and is kept out by no mode")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    found = tmp_path / "secret.yaml"
    private_file.create(found, b"one\n")
    return found


def unwritable(real: Callable[..., int], number: int) -> Callable[..., int]:
    """An os.open that opens what is there for reading alone."""

    def opened(name: str | Path, flags: int, *more: int, **options: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number))
        return real(name, flags, *more, **options)

    return opened


def refusal(path: Path, **options: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        private_file.read(path, **options)
    assert caught.value.exit_code == 3
    assert str(path.name) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_what_was_created_is_0600_whatever_the_umask_says_and_is_read_back(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        private_file.create(tmp_path / "a", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert private_file.read(tmp_path / "a").data == b"content"


def test_create_refuses_what_is_there_already_and_leaves_it(path: Path) -> None:
    with pytest.raises(ConflictError) as caught:
        private_file.create(path, b"other")
    assert caught.value.exit_code == 5
    assert path.read_bytes() == b"one\n"


def test_create_does_not_write_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ConflictError):
        private_file.create(tmp_path / "link", b"x")
    assert not (tmp_path / "target").exists()


def test_a_create_that_fails_in_the_middle_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FullError, match="No space left"):
        private_file.create(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o700, 0o644, 0o666, 0o777])
def test_a_mode_that_gives_more_than_it_may_is_refused_and_said_how_to_mend(path: Path, mode: int) -> None:
    path.chmod(mode)
    problem = refusal(path)
    assert f"{mode:04o}" in problem.message
    assert problem.hint == f"chmod 0600 {path}"
    path.chmod(0o600)
    assert private_file.read(path).data == b"one\n"


def test_a_tighter_mode_is_fine_and_the_config_may_be_0640_but_not_0644(path: Path) -> None:
    path.chmod(0o400)
    assert private_file.read(path).data == b"one\n"
    path.chmod(0o640)
    assert private_file.read(path, mode=0o640).data == b"one\n"
    path.chmod(0o644)
    refusal(path, mode=0o640)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS], ids=["immutable", "mode", "read-only"])
def test_a_file_that_can_be_believed_but_not_opened_for_writing_is_one_that_was_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", unwritable(os.open, number))
    with pytest.raises(NotWrittenError, match="cannot be written"), private_file.edit(path):
        raise AssertionError("it was opened")
    if number != errno.EROFS:
        path.chmod(0o644)
        with pytest.raises(ConfigError, match="has mode 0644"), private_file.edit(path):
            raise AssertionError("it was opened")


@needs_root
def test_a_file_of_another_user_is_refused_unless_that_owner_is_trusted(path: Path) -> None:
    os.chown(path, NOBODY, -1)
    assert "belongs to another user" in refusal(path).message
    assert private_file.read(path, trusted_owner=NOBODY).data == b"one\n"


def test_a_folder_that_anybody_may_write_to_is_refused_and_one_above_it_too(path: Path) -> None:
    path.parent.chmod(0o777)
    assert "can be written by anybody" in refusal(path).message
    path.parent.chmod(0o700)
    below = path.parent / "a" / "b"
    below.mkdir(parents=True, mode=0o700)
    private_file.create(below / "secret.yaml", b"two")
    (path.parent / "a").chmod(0o777)
    assert "can be written by anybody" in refusal(below / "secret.yaml").message
    (path.parent / "a").chmod(0o1777)  # sticky, as /tmp is: nobody else can rename what is ours
    assert private_file.read(below / "secret.yaml").data == b"two"


def test_a_link_into_a_folder_that_others_can_write_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    private_file.create(other / "secret.yaml", b"planted")
    other.chmod(0o770)
    path.unlink()
    path.symlink_to(other / "secret.yaml")
    refusal(path)
    with pytest.raises(ConfigError), private_file.edit(path):
        raise AssertionError("it was opened")
    assert (other / "secret.yaml").read_bytes() == b"planted"


@needs_root
def test_root_follows_no_link_at_all(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))
    assert "root follows none" in refusal(path).message


@not_root
def test_a_link_into_a_folder_of_ones_own_is_followed_and_stays_a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))
    with private_file.edit(path) as held:
        held.replace(b"two")
    assert path.is_symlink()
    assert private_file.read(path).data == b"two"


def test_a_link_that_leads_round_in_a_circle_or_nowhere_is_refused(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)
    refusal(path)
    path.unlink()
    path.symlink_to(path.with_name("not-there") / "x")
    refusal(path)


def within(seconds: float, work: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, which must end in time."""
    return subprocess.run(
        [sys.executable, "-c", work, *arguments], capture_output=True, text=True, timeout=seconds, env=environment()
    )


def test_a_fifo_a_folder_and_a_device_are_refused_at_once(path: Path) -> None:
    fifo = path.with_name("fifo.yaml")
    os.mkfifo(fifo, 0o600)
    work = (
        "import sys; from pathlib import Path; from mcpctl import private_file\n"
        "from mcpctl.errors import ConfigError\n"
        "try:\n    private_file.read(Path(sys.argv[1]))\n"
        "except ConfigError as problem:\n    print(problem.message)"
    )
    for name in (str(fifo), str(path.parent), "/dev/tty", "/dev/null", "/dev/zero"):
        done = within(20, work, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(name) or "cannot open" in done.stdout, done.stdout
    with pytest.raises(ConfigError, match="not a regular file"), private_file.edit(fifo):
        raise AssertionError("it was opened")


def test_a_file_that_is_missing_or_has_a_file_for_a_folder_is_said_so(path: Path) -> None:
    for missing in (path.with_name("none"), path / "below"):
        with pytest.raises(NotFoundError) as caught:
            private_file.read(missing)
        assert caught.value.exit_code == 3


def test_a_file_that_is_far_too_large_is_refused(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2 << 20)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        private_file.read(path, limit=1 << 20)


def test_a_name_that_is_too_long_is_an_error_and_no_crash(path: Path) -> None:
    with pytest.raises(ConfigError):
        private_file.read(path.with_name("x" * 300))


def test_a_replace_keeps_mode_and_owner_and_leaves_nothing_beside_it(path: Path) -> None:
    path.chmod(0o400 if ROOT else 0o600)
    before = path.stat()
    with private_file.edit(path) as held:
        assert held.data == b"one\n"
        held.replace(b"two\n")
    after = path.stat()
    assert path.read_bytes() == b"two\n"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@needs_root
def test_a_replace_keeps_a_group_that_is_another(path: Path) -> None:
    os.chown(path, -1, 4711)
    with private_file.edit(path) as held:
        held.replace(b"two\n")
    assert path.stat().st_gid == 4711


def test_an_edit_that_is_left_by_an_error_changes_nothing(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), private_file.edit(path):
        raise ZeroDivisionError
    assert path.read_bytes() == b"one\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_replace_that_fails_changes_nothing_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with private_file.edit(path) as held:
        monkeypatch.setattr(os, call, full)
        with pytest.raises(FullError, match="nothing was changed"):
            held.replace(b"two\n")
    assert path.read_bytes() == b"one\n"
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_file_that_an_editor_put_there_meanwhile_is_not_overwritten(path: Path) -> None:
    with private_file.edit(path) as held:
        other = path.with_name("editor")
        private_file.create(other, b"by hand\n")
        other.replace(path)
        with pytest.raises(ConfigError, match="by somebody else"):
            held.replace(b"two\n")
    assert path.read_bytes() == b"by hand\n"


def test_what_killed_writers_left_is_swept_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "odd[name]*.yaml"
    private_file.create(path, b"one\n")
    left = [tmp_path / f".{path.name}.{number:012x}.tmp" for number in range(3)]
    kept = [tmp_path / ".other.yaml.000000000000.tmp", tmp_path / "odd[name]*.yaml.tmp", tmp_path / ".oddn.x.tmp"]
    for found in (*left, *kept):
        found.touch()
    with private_file.edit(path):
        pass
    assert not any(found.exists() for found in left)
    assert all(found.exists() for found in kept)


def test_the_lock_keeps_others_out_until_it_is_let_go_and_they_see_what_was_written(path: Path) -> None:
    work = (
        "import sys; from pathlib import Path; from mcpctl import private_file\n"
        "print('begun', flush=True)\n"
        "with private_file.edit(Path(sys.argv[1])) as held:\n"
        "    print('inside', held.data.decode().strip(), flush=True)\n"
        "    held.replace(held.data + b'three\\n')"
    )
    with private_file.edit(path) as held:
        other = subprocess.Popen(
            [sys.executable, "-c", work, str(path)], stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        if Path("/proc/locks").exists():  # it proves that the two did meet, where the kernel says so
            eventually(lambda: locked_by(other.pid) or other.poll() is not None)
        assert other.poll() is None
        held.replace(b"two\n")
    assert other.communicate(timeout=20)[0] == "inside two\n"
    assert other.returncode == 0
    assert path.read_bytes() == b"two\nthree\n"


@pytest.mark.parametrize("patience", [0.0, 0.05])
def test_what_takes_a_right_away_waits_no_longer_than_its_patience_for_the_lock(path: Path, patience: float) -> None:
    with (
        private_file.edit(path),
        pytest.raises(NotWrittenError, match="held by another process"),
        private_file.edit(path, patience=patience),
    ):
        pass


def locked_by(pid: int) -> bool:
    """Whether the process waits for a lock (a line of /proc/locks with an arrow)."""
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_threads_that_add_at_once_lose_nothing(path: Path) -> None:
    path.write_bytes(b"0")

    def add() -> None:
        for _ in range(20):
            with private_file.edit(path) as held:
                held.replace(str(int(held.data) + 1).encode())

    threads = [threading.Thread(target=add) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert path.read_bytes() == b"100"


_WRITER = """
import json, sys
from pathlib import Path
from mcpctl import private_file

print("ready", flush=True)
while True:
    with private_file.edit(Path(sys.argv[1])) as held:
        number = json.loads(held.data)["number"] + 1
        held.replace(json.dumps({"number": number, "filling": "x" * (number * 37 % 20000), "end": number}).encode())
"""


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_a_writer_killed_at_a_hundred_random_moments_always_leaves_a_whole_file(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "counted.json"
    private_file.create(path, json.dumps({"number": 0, "end": 0}).encode())
    chance = random.Random(20261120)
    left, last = 0, 0

    def start() -> subprocess.Popen[str]:
        made = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment()
        )
        writers.append(made)
        return made

    def number_above(least: int) -> bool:
        return bool(json.loads(private_file.read(path).data)["number"] > least)

    waiting = [start() for _ in range(4)]  # they start while another one works: a start takes longer than a life
    for turn in range(100):
        writer = waiting.pop(0)
        waiting.append(start())
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.stdout.close()
        if turn % 2:  # on a slow machine the others may be killed before they have written anything
            eventually(functools.partial(number_above, last), 60, 0.001)
        threading.Event().wait(chance.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        found = json.loads(private_file.read(path).data)
        assert found["number"] == found["end"] >= last
        last = found["number"]
        left += bool(list(tmp_path.glob(".counted.json.*.tmp")))
    for writer in waiting:
        writer.kill()
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
    assert last >= 50  # they did write
    with private_file.edit(path):
        pass
    assert list(tmp_path.glob(".counted.json.*.tmp")) == [], f"{left} times something had been left"
