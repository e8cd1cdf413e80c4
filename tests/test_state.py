"""The embedded store: private, whole, for many processes at once."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mcpctl.errors import ConfigError, UnavailableError
from mcpctl.state import SCHEMA_VERSION, State
from site_of_mcpctl import environment

ROW = "INSERT INTO own_databases VALUES (?, ?, 'h', '10.0.0.1', 5432, 'd', 'u', 'sealed', '2026-01-01T00:00:00Z')"


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")


def names(state: State) -> list[str]:
    return [name for (name,) in state.rows("SELECT name FROM own_databases ORDER BY name")]


def add(state: State, name: str) -> None:
    with state.change() as connection:
        connection.execute(ROW, ("alice", name))


def test_the_file_and_what_sqlite_puts_beside_it_are_for_their_owner_alone(state: State) -> None:
    before = os.umask(0)
    try:
        add(state, "a")
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.path.parent.iterdir()}
    finally:
        os.umask(before)
        state.close()
    assert found == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}


@pytest.mark.parametrize("way", ["open to others", "a link", "a text", "empty", "another program's", "a newer form"])
def test_a_file_that_cannot_be_believed_is_refused(state: State, tmp_path: Path, way: str) -> None:
    path = state.path
    path.touch(0o600)
    if way == "open to others":
        path.unlink()
        add(state, "a")
        state.close()
        path.chmod(0o640)
    elif way == "a link":
        path.unlink()
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        path.symlink_to(tmp_path / "open" / "state.db")
    elif way == "a text":
        path.write_text("version: 1\n" * 1000)
    elif way != "empty":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (a)")
            if way == "a newer form":
                connection.execute(f"PRAGMA application_id = {0x6D637063}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        connection.close()
    with pytest.raises(ConfigError) as told:
        state.rows("SELECT 1")
    assert str(path) in told.value.message
    assert told.value.hint
    if way == "empty":
        assert told.value.hint.startswith("restore it from your backup")


def test_what_several_processes_write_at_once_is_all_there(tmp_path: Path) -> None:
    """The first of them makes the file, whichever that is."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom mcpctl.state import State\n"
        f"state, row = State(Path(sys.argv[1])), {ROW!r}\n"
        "sys.stdin.readline()\n"
        "for number in range(25):\n"
        "    with state.change() as connection:\n"
        "        connection.execute(row, (sys.argv[2], str(number)))\n"
        "state.close()\n"
    )
    path = tmp_path / "state.db"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(number)], stdin=subprocess.PIPE, env=environment()
        )
        for number in range(4)
    ]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write(b"go\n")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    state = State(path)
    assert state.rows("SELECT user, count(*) FROM own_databases GROUP BY 1") == [(str(n), 25) for n in range(4)]
    state.close()
    assert [file.name for file in tmp_path.iterdir()] == ["state.db"]


def test_the_version_differs_after_a_write_of_our_own_or_of_somebody_else(state: State) -> None:
    other = State(state.path)
    versions = [state.version(), state.version()]
    assert versions[0] == versions[1]
    add(state, "a")
    versions.append(state.version())
    add(other, "b")
    versions.append(state.version())
    assert len(set(versions)) == 3
    assert names(state) == ["a", "b"]
    other.close()
    state.close()


def test_a_change_that_fails_leaves_nothing(state: State) -> None:
    add(state, "a")
    with pytest.raises(KeyError), state.change() as connection:
        connection.execute(ROW, ("alice", "b"))
        raise KeyError
    assert names(state) == ["a"]
    state.close()


def test_a_restored_file_is_the_one_that_is_read_from_then_on(state: State, tmp_path: Path) -> None:
    add(state, "old")
    backup = State(tmp_path / "backup.db")
    add(backup, "restored")
    backup.close()
    before = state.version()
    os.replace(tmp_path / "backup.db", state.path)
    for name in ("state.db-wal", "state.db-shm"):
        (tmp_path / name).unlink()
    assert state.version() != before
    assert names(state) == ["restored"]
    state.close()


def test_a_store_that_has_gone_is_not_made_anew_in_passing_by_whoever_knew_it(state: State) -> None:
    """An empty one would say that no guest is disabled and no token blocked."""
    add(state, "a")
    for end in ("", "-wal", "-shm"):
        state.path.with_name(f"{state.path.name}{end}").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="there is no"):
        add(state, "b")
    assert not state.path.exists()
    add(State(state.path), "c")  # as a command or the next start does
    assert names(state) == ["c"]


def test_a_file_that_is_written_over_in_its_place_is_noticed(state: State) -> None:
    add(state, "a")
    assert names(state) == ["a"]
    state.path.write_bytes(b"x" * 8192)
    with pytest.raises(ConfigError, match="written over") as told:
        state.version()
    assert "mcpctl token unblock --all" in str(told.value.hint)
    state.close()


def test_one_of_two_in_a_process_closes_and_other_processes_and_the_other_still_see_each_others_writes(
    state: State, tmp_path: Path
) -> None:
    """As at a reload, or where the new generation refuses the file: SQLite's locks must stay."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom mcpctl.state import State\n"
        "state = State(Path(sys.argv[1]))\n"
        f"with state.change() as connection:\n    connection.execute({ROW!r}, ('bob', sys.argv[2]))\n"
        "print(*[name for (name,) in state.rows('SELECT name FROM own_databases ORDER BY name')])\n"
        "state.close()\n"
    )

    def elsewhere(name: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, str(state.path), name],
            check=True, capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        assert (tmp_path / "state.db-wal").exists()
        return done.stdout.split()

    add(state, "a")
    other = State(state.path)
    add(other, "b")
    other.close()
    assert elsewhere("c") == ["a", "b", "c"]
    assert names(state) == ["a", "b", "c"]
    state.path.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        State(state.path).version()
    state.path.chmod(0o600)
    assert elsewhere("d") == ["a", "b", "c", "d"]
    add(state, "e")
    assert elsewhere("f") == names(state) == ["a", "b", "c", "d", "e", "f"]
    state.close()
    assert [file.name for file in tmp_path.iterdir()] == ["state.db"]


def test_a_store_that_lacks_a_table_cannot_be_believed_and_is_not_held_by_anybody(state: State) -> None:
    """SQLite's words for it have "locked" in them."""
    with state.change() as connection:
        connection.execute("DROP TABLE blocked")
    with pytest.raises(ConfigError, match="no such table: blocked"):
        state.rows("SELECT token FROM blocked")
    state.close()


def test_whoever_waits_for_another_writer_too_long_is_told_so(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcpctl.state._PATIENCE", 0.05)
    other = State(state.path)
    with state.change(), pytest.raises(UnavailableError, match="held by another process"), other.change():
        pass
    assert names(other) == []
    add(other, "a")
    assert names(state) == ["a"]
    other.close()
    state.close()
