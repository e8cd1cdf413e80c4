"""The audit log: one chain whoever writes, whole lines whatever happens, and what goes into it."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain import KEY, lines, verify
from mcpctl import private_file
from mcpctl.audit import log as audit_log
from mcpctl.audit import verify as audit_verify
from mcpctl.audit.log import AuditLog
from mcpctl.errors import ConfigError, UnavailableError
from site_of_mcpctl import environment, eventually

NOW = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def opened(path: Path) -> AuditLog:
    return AuditLog(path, KEY, lambda: NOW)


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    found = opened(path)
    yield found
    found.close()


def write(log: AuditLog, count: int, **fields: Any) -> None:
    for number in range(count):
        log.append("tool.called", request_id=f"r{number}", **fields)


def test_a_line_holds_what_it_was_given_in_the_order_of_the_contract(log: AuditLog, path: Path) -> None:
    log.append("tool.called", rows=3, user="alice", statement="select 'é'", token=None, bytes=0, elapsed_ms=1.5)
    [found] = lines(path)
    assert list(found) == [
        "seq", "time", "event", "user", "statement", "rows", "bytes", "elapsed_ms", "key_id", "prev", "hash",
    ]  # fmt: skip
    assert found["time"] == "2026-11-20T12:00:00.123Z"
    assert (found["seq"], found["rows"], found["bytes"], found["statement"]) == (1, 3, 0, "select 'é'")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.with_name("audit.jsonl.lock").stat().st_mode & 0o777 == 0o600
    assert verify(path) == 1


def test_an_event_or_a_field_that_there_is_not_is_a_mistake_of_ours(log: AuditLog, path: Path) -> None:
    with pytest.raises(ValueError, match="no audit event"):
        log.append("tool.caled")
    with pytest.raises(ValueError, match="password"):
        log.append("tool.called", password="x")
    assert not path.exists()


@given(text=st.text(alphabet=st.characters(), max_size=50))
def test_whatever_a_statement_holds_the_line_is_printable_ascii_and_reads_back_the_same(text: str) -> None:
    body = AuditLog(Path("x"), KEY, lambda: NOW)._line(1, audit_log.FIRST, {"statement": text})[0]
    assert all(0x20 <= byte < 0x7F for byte in body[:-1])
    assert body.endswith(b"\n")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # two halves of a pair are one
    assert json.loads(body)["statement"] == whole


def test_a_token_in_a_statement_or_a_reason_is_cut_down_to_its_id(log: AuditLog, path: Path) -> None:
    token = f"mcp_24fu72po_{'6' * 43}_4Yyfcn"
    log.append("tool.called", statement=f"select '{token}', mcp_customer_orders", reason=f"no table '{token}'")
    [found] = lines(path)
    assert found["statement"] == "select 'mcp_24fu72po_…', mcp_customer_orders"
    assert found["reason"] == "no table 'mcp_24fu72po_…'"


def test_no_control_character_and_no_half_of_a_pair_reaches_the_file_raw(log: AuditLog, path: Path) -> None:
    nasty = "".join(map(chr, range(0xA0))) + '\u2028\u2029\u202e\u2066\udfff\ud800 \U000e0041\n{"seq":9}'
    log.append("tool.refused", reason=nasty, user=nasty, client_ip=nasty)
    assert all(0x20 <= byte < 0x7F for byte in path.read_bytes()[:-1])
    assert lines(path)[0]["reason"] == nasty
    assert verify(path) == 1


# -- the chain ---------------------------------------------------------------------------------------------------


@pytest.fixture
def written(log: AuditLog, path: Path) -> list[bytes]:
    write(log, 6, user="alice")
    assert verify(path) == 6
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda found: [found[0], found[1].replace(b"alice", b"alicf"), *found[2:]],
        lambda found: [found[0], found[1].replace(b'"user"', b' "user"'), *found[2:]],
        lambda found: [found[0], *found[2:]],
        lambda found: found[1:],
        lambda found: [found[1], found[0], *found[2:]],
        lambda found: [*found, found[-1]],
        lambda found: [*found[:3], found[0], *found[3:]],
        lambda found: [*found[:-1], found[-1][:-5]],
        lambda found: [*found, b"{}\n"],
        lambda found: [*found, b"\n"],
    ],
)
def test_a_line_that_is_changed_removed_added_or_moved_is_seen(
    written: list[bytes], tamper: Callable[[list[bytes]], list[bytes]]
) -> None:
    with pytest.raises(AssertionError):
        verify(b"".join(tamper(written)))


def test_a_line_made_with_another_key_is_seen(written: list[bytes], path: Path) -> None:
    last = lines(path)[-1]
    forged, _ = AuditLog(path, bytes(32), lambda: NOW)._line(last["seq"] + 1, last["hash"], {"event": "auth.ok"})
    with path.open("ab") as file:
        file.write(forged)
    with pytest.raises(AssertionError, match="hash"):
        verify(path)


def test_lines_cut_off_under_a_running_writer_leave_a_gap_that_is_seen(log: AuditLog, path: Path) -> None:
    write(log, 5)
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(data[:3]))
    write(log, 1)
    assert [line["seq"] for line in lines(path)] == [1, 2, 3, 6]
    with pytest.raises(AssertionError):
        verify(path)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_line_cut_off_under_one_writer_is_seen_though_another_has_written_on(
    log: AuditLog, path: Path, rotated: bool
) -> None:
    other = opened(path)
    write(other, 3)
    write(log, 1, user="alice")
    data = path.read_bytes().splitlines(keepends=True)
    with path.open("r+b") as file:
        file.truncate(sum(map(len, data[:3])))
    write(other, 2)
    moved = [other.rotate("")] if rotated else []
    write(log, 1)
    other.close()
    with pytest.raises(AssertionError):
        verify(*filter(None, moved), path)
    assert audit_verify.verify(path, KEY).fault


def test_a_file_that_is_copied_and_emptied_goes_on_for_every_writer(log: AuditLog, path: Path) -> None:
    other = opened(path)
    write(log, 3)
    write(other, 1)
    copy = path.with_name("audit.jsonl.1")
    copy.write_bytes(path.read_bytes())
    os.truncate(path, 0)
    write(other, 1)
    write(log, 1)
    other.close()
    assert verify(copy, path) == 6


_MANY = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from mcpctl.audit.log import AuditLog

log = AuditLog(Path(sys.argv[1]), bytes(range(32)), lambda: datetime.now(UTC))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    log.append("tool.called", user=sys.argv[2], statement="x" * (number * 7 % 500))
"""


def many(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _MANY, str(path), name, str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def let_go(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def test_several_processes_that_write_at_once_make_one_chain(path: Path) -> None:
    processes = [many(path, f"p{number}", 2000) for number in range(3)]
    let_go(processes)
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert verify(path) == 6000
    writers = [line["user"] for line in lines(path)]
    assert {name: writers.count(name) for name in set(writers)} == {"p0": 2000, "p1": 2000, "p2": 2000}
    changes = sum(one != other for one, other in itertools.pairwise(writers))
    assert changes > 2  # they did take turns


_UNTIL = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from mcpctl.audit.log import AuditLog

log = AuditLog(Path(sys.argv[1]), bytes(range(32)), lambda: datetime.now(UTC))
count = 0
while not Path(sys.argv[2]).exists():
    log.append("tool.called", statement="x" * (count * 7 % 500))
    count += 1
print(count)
"""


def test_the_chain_goes_on_over_rotations_while_several_processes_write(path: Path) -> None:
    enough = path.with_name("enough")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _UNTIL, str(path), str(enough)], stdout=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(2)
    ]
    moved: list[Path] = []
    for number in range(5):
        eventually(lambda: path.exists() and path.stat().st_size > 20_000, 60)
        moved.append(path.with_name(f"audit.jsonl.{number}"))
        with path.with_name("audit.jsonl.lock").open("r+b") as lock:  # as `audit rotate` does it
            private_file.lock(lock.fileno())
            path.rename(moved[-1])
    eventually(path.exists, 60)
    enough.touch()
    counts = [int(process.communicate(timeout=60)[0]) for process in writers]
    assert [process.returncode for process in writers] == [0, 0]
    assert verify(*moved, path) == sum(counts)


def test_a_new_file_goes_on_from_memory_and_a_fresh_process_from_the_moved_ones(log: AuditLog, path: Path) -> None:
    write(log, 3)
    path.rename(path.with_name("audit.jsonl-20261120"))
    write(log, 2)  # from memory
    path.rename(path.with_name("audit.jsonl.1"))
    os.utime(path.with_name("audit.jsonl-20261120"))  # the age of a file says nothing
    fresh = opened(path)
    write(fresh, 2)
    fresh.close()
    write(log, 1)
    assert verify(path.with_name("audit.jsonl-20261120"), path.with_name("audit.jsonl.1"), path) == 8


def test_a_file_beside_it_that_is_none_of_this_log_changes_nothing(log: AuditLog, path: Path) -> None:
    write(log, 3)
    other = AuditLog(path.parent / "audit.jsonl.from-old-host", bytes(32), lambda: NOW)
    write(other, 9)
    other.close()
    planted = b'{"seq":999999,"hash":"' + b"0" * 64 + b'"}\n'
    path.with_name("audit.jsonl-x").write_bytes(planted)
    path.rename(path.with_name("audit.jsonl.1"))
    write(log, 1)
    path.rename(path.with_name("audit.jsonl.2"))
    fresh = opened(path)
    write(fresh, 1)
    moved = fresh.rotate("")
    fresh.close()
    assert moved is not None
    assert verify(path.with_name("audit.jsonl.1"), path.with_name("audit.jsonl.2"), moved, path) == 6


def test_a_rotation_goes_on_from_the_end_that_it_has_seen_whatever_is_beside_it(log: AuditLog, path: Path) -> None:
    further = opened(path.with_name("further"))
    write(further, 9)
    further.close()
    write(log, 3)
    further.path.rename(path.with_name("audit.jsonl.restored"))  # of the same key
    moved = log.rotate("")
    assert moved is not None
    assert verify(moved, path) == 4


def test_a_new_file_that_was_made_empty_goes_on_too_and_one_packed_away_is_remembered(
    log: AuditLog, path: Path
) -> None:
    write(log, 3)
    kept = path.read_bytes()
    path.unlink()
    private_file.create(path, b"")
    write(log, 2)
    assert verify(kept, path) == 5


def test_the_half_of_a_line_in_a_moved_file_is_no_obstacle(log: AuditLog, path: Path) -> None:
    write(log, 3)
    whole = path.read_bytes()
    moved = path.with_name("audit.jsonl.1")
    path.rename(moved)
    moved.write_bytes(whole + b'{"seq":4,"ti')
    fresh = opened(path)
    write(fresh, 1)
    fresh.close()
    assert verify(whole, path) == 4
    assert moved.read_bytes() == whole + b'{"seq":4,"ti'


@pytest.mark.parametrize("torn", [b"{", b'{"seq":4,"time":"2026', b'{"seq":4' + b"x" * 200_000])
def test_the_half_of_a_line_that_a_crash_left_is_cut_off_and_the_chain_goes_on(path: Path, torn: bytes) -> None:
    first = opened(path)
    write(first, 3)
    first.close()
    with path.open("ab") as file:
        file.write(torn)
    second = opened(path)
    write(second, 2)
    second.close()
    assert verify(path) == 5


def test_a_file_that_is_not_ours_is_never_cut_nor_written_to(path: Path) -> None:
    for content in (b"somebody's only copy", b"a\nb\n", b"{}\n", b'{"seq":1}\n', b"\n\nx"):
        path.unlink(missing_ok=True)
        private_file.create(path, content)
        log = opened(path)
        with pytest.raises(UnavailableError):
            write(log, 1)
        log.close()
        assert path.read_bytes() == content


def test_a_very_long_line_is_found_again(path: Path) -> None:
    for _ in range(3):
        log = opened(path)
        log.append("tool.called", statement="x" * 300_000)
        log.close()
    assert verify(path) == 3


def test_a_lock_file_that_somebody_removed_does_not_part_the_writers(log: AuditLog, path: Path) -> None:
    write(log, 1)
    path.with_name("audit.jsonl.lock").unlink()
    other = opened(path)
    other.append("auth.ok")
    with path.with_name("audit.jsonl.lock").open("r+b") as lock:
        private_file.lock(lock.fileno())
        wrote = threading.Event()
        threads = [threading.Thread(target=lambda one=one: (write(one, 1), wrote.set())) for one in (log, other)]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        assert not wrote.wait(0.1)  # both wait for the lock that there is now
        private_file.unlock(lock.fileno())
    for thread in threads:
        thread.join(20)
    other.close()
    assert verify(path) == 4


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_disk_that_takes_a_part_of_a_line_gets_it_taken_back(
    log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(log, 2)
    before = path.read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:50]))
    with pytest.raises(UnavailableError, match="disk is full"):
        write(log, 1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write(log, 1)
    assert verify(path) == 3


def test_a_full_disk_is_known_before_anything_is_done(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.check()
    real = os.fstatvfs

    def full(fd: int) -> os.statvfs_result:
        values = list(real(fd))
        values[4] = 0  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "fstatvfs", full)
    with pytest.raises(UnavailableError, match="disk is full"):
        log.check()


_FULL = """
import resource, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from mcpctl.audit.log import AuditLog
from mcpctl.errors import UnavailableError

path = Path(sys.argv[1])
log = AuditLog(path, bytes(range(32)), lambda: datetime.now(UTC))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
refused = 0
for number in range(100):
    try:
        log.append("tool.called", statement="x" * (number % 90))
    except UnavailableError:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("tool.called")
print(refused)
"""


def test_a_limit_of_the_real_kernel_leaves_whole_lines_and_a_whole_chain(path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    assert verify(path) == 100 - int(done.stdout) + 1


@pytest.mark.parametrize("fault", ["mode", "link", "lock is a link", "lock mode", "folder", "fifo"])
def test_a_log_that_cannot_be_trusted_is_not_written_and_is_again_when_mended(path: Path, fault: str) -> None:
    log = opened(path)
    write(log, 1)
    log.close()
    target = path.with_name("target")
    lock = path.with_name("audit.jsonl.lock")
    other = path.parent / "open"
    other.mkdir()
    other.chmod(0o777)
    match fault:
        case "mode":
            path.chmod(0o644)
        case "link":
            path.rename(target)
            path.symlink_to(other / "audit.jsonl")
        case "lock is a link":
            lock.unlink()
            lock.symlink_to(other / "lock")
        case "lock mode":
            lock.chmod(0o666)
        case "folder":
            path.parent.chmod(0o777)
        case _:
            path.rename(target)
            os.mkfifo(path, 0o600)
    with pytest.raises(UnavailableError) as caught:
        write(log, 1)
    assert str(path.parent) in caught.value.message
    assert list(other.iterdir()) == []
    path.parent.chmod(0o700)
    if target.exists():
        path.unlink()
        target.rename(path)
    path.chmod(0o600)
    if fault.startswith("lock"):
        lock.unlink()
    write(log, 1)
    log.close()
    assert verify(path) == 2


def test_the_key_is_64_hex_digits_in_a_private_file_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.key"
    private_file.create(path, audit_log.new_key())
    assert len(audit_log.read_key(path)) == 32
    for content in (b"", b"x" * 64, b"00" * 31, b"00" * 33, b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="does not hold 64 hex digits"):
            audit_log.read_key(path)
