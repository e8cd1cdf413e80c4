"""A disk that is full, for real: nothing that is there is damaged, rights are taken and none is given, calls are
refused, and all goes on by itself when there is room."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from chain import lines, verify
from command_line import Home
from mcpctl import control, private_file, reserve
from mcpctl.cli.taking import known_of
from mcpctl.errors import Failures, FullError, NotWrittenError, UnavailableError
from mcpctl.identity import tokens
from mcpctl.identity.lockdown import Lockdown
from mcpctl.state import State
from site_of_mcpctl import Shop, Site, eventually
from test_control import process
from test_workers import children


class Disk:
    """A small file system of its own, that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        with self.ballast.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    def empty(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m,mode=0755", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def home(disk: Disk) -> Home:
    return Home(disk.folder / "home")


def whole(folder: Path) -> None:
    """The log's chain holds, and nobody has left half a file."""
    log = folder / "audit.jsonl"
    assert verify(log, key=bytes.fromhex((folder / "audit.key").read_text())) == len(lines(log))
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_no_right_is_given_on_a_full_disk_and_every_file_is_as_it_was(disk: Disk, home: Home, tmp_path: Path) -> None:
    name, _ = home.token()
    home("user", "add", "alice")
    disk.fill()
    before = home.files()
    for command in (
        ("token", "add", "--expiry", "1d"),
        ("token", "rotate", name),
        ("user", "add", "bob"),
        ("user", "roles", "alice", "mcp-admin"),
        ("tenant", "add", "acme", "--database", "shop"),
        ("database", "add", "more", "--dsn", "host=/tmp dbname=more user=x", "--no-test"),
    ):
        done = home(*command)
        assert done.code == 1, (command, done.code, done.err)
        assert "disk is full" in done.error or "No space left" in done.error, done.err
        assert done.out == ""
        assert home.files() == before
    disk.empty()
    home("token", "rotate", name)
    whole(home.folder)


def test_no_right_is_given_where_the_log_is_elsewhere_either(disk: Disk, tmp_path: Path) -> None:
    home = Home(disk.folder / "home", extra=f"audit: {{file: {tmp_path}/audit.jsonl}}\n")
    token, _ = home.token()
    disk.fill()
    before = home.files()
    for command in (
        ("token", "add", "--expiry", "1d"),
        ("token", "rotate", token),
        ("user", "add", "bob"),
        ("database", "add", "more", "--dsn", "host=/tmp dbname=more user=x", "--no-test"),
    ):
        done = home(*command)
        assert done.code == 1, (command, done.code, done.err)
        assert "No space left" in done.error or "is the disk full" in done.error  # who is blocked cannot be read
        for name in ("state.db-wal", "state.db-shm"):  # SQLite's, empty
            (home.folder / name).unlink(missing_ok=True)
        assert home.files() == before


def test_rights_are_taken_on_a_full_disk_with_the_room_that_is_kept_for_it(disk: Disk, home: Home) -> None:
    kept, name, other = home.token()[0], home.token()[0], home.token()[0]
    home("user", "add", "alice")
    assert reserve.there(home.folder)
    disk.fill()
    assert home("token", "revoke", name).code == 0
    assert not reserve.of(home.folder).exists()
    assert home("token", "remove", other, "--yes").code == 0
    assert home("user", "disable", "alice").code == 0
    for command in (("user", "enable", "alice"), ("token", "add", "--expiry", "1d")):
        done = home(*command)
        assert done.code == 1
        assert "nothing was done: the disk is full: what room is left is for taking rights away" in done.error
    found = tokens.token_file(home.folder / "tokens.yaml").current()
    assert {one.id: one.status(tokens.utcnow()) for one in found.values()} == {kept: "active", name: "revoked"}
    whole(home.folder)
    disk.empty()
    assert home("token", "add", "--expiry", "1d").code == 0
    assert reserve.there(home.folder)
    events = [line["event"] for line in lines(home.folder / "audit.jsonl")]
    assert [event for event in events if event in ("token.revoked", "token.removed", "user.disabled")] == [
        "token.revoked", "token.removed", "user.disabled",
    ]  # fmt: skip
    whole(home.folder)


def test_without_the_reserve_the_file_is_written_over(disk: Disk, home: Home) -> None:
    name, _ = home.token()
    reserve.give_up(home.folder)
    disk.fill()
    done = home("token", "revoke", name)
    assert done.code == 0
    assert tokens.token_file(home.folder / "tokens.yaml").current()[name].revoked_at is not None


def test_what_is_made_anew_leaves_nothing_on_a_full_disk(disk: Disk) -> None:
    disk.fill()
    with pytest.raises(FullError):
        private_file.create(disk.folder / "new", b"x" * 100)
    assert not (disk.folder / "new").exists()


def test_the_store_is_as_it_was_after_a_change_that_found_no_room(disk: Disk) -> None:
    state = State(disk.folder / "state.db")
    row = "INSERT INTO own_databases VALUES ('a', ?, 'h', '10.0.0.1', 5432, ?, 'u', 's', '2026-01-01T00:00:00Z')"
    with state.change() as connection:
        connection.execute(row, ("kept", "d"))
    disk.fill()
    with pytest.raises(UnavailableError, match="full"), state.change() as connection:
        for number in range(50):
            connection.execute(row, (str(number), "d" * 65536))
    assert state.rows("SELECT name FROM own_databases") == [("kept",)]
    disk.empty()
    with state.change() as connection:
        connection.execute(row, ("later", "d"))
    assert len(state.rows("SELECT name FROM own_databases")) == 2
    state.close()


def test_a_server_refuses_calls_on_a_full_disk_and_serves_again_by_itself(disk: Disk, newest_shop: Shop) -> None:
    at = Site(disk.folder / "site", newest_shop).start()
    try:
        _, text = at.token()
        other, second = at.token("bob")
        with at.client(text) as a, at.client(second) as b:
            assert a.rows("select 1") == [[1]]
            assert b.rows("select 1") == [[1]]
            disk.fill()
            reserve.give_up(at.folder)
            disk.fill()
            answer = eventually(lambda: found if (found := a.call("whoami")).status_code != 200 else None)
            assert answer.status_code == 503
            assert "audit log cannot be written" in answer.text
            assert a.call("query_database", {"query": "select 1"}).status_code == 503
            ready = at.url.removesuffix("/mcp") + "/ready"
            assert httpx.get(ready, trust_env=False).status_code == 503
            assert at.run("token", "revoke", other).stdout.count("0 backends left") == 1
            assert b.call("whoami").status_code in (401, 503)
            disk.empty()
            assert httpx.get(ready, trust_env=False).status_code == 200
            assert eventually(lambda: a.call("whoami").status_code == 200)
            assert b.call("whoami").status_code == 401
            assert a.rows("select 2") == [[2]]
        events = eventually(
            lambda: found if "token.revoked" in (found := [line["event"] for line in at.audit()]) else None
        )
        assert events.count("token.revoked") == 1
    finally:
        at.stop()
    whole(at.folder)


@pytest.fixture
def read_only(disk: Disk, home: Home) -> Iterator[Home]:
    """An installation with a token, whose disk an error has made read-only."""
    home("user", "add", "alice")
    home.token("--user", "alice")
    mount = ["mount", "-o", "remount", str(disk.folder)]
    subprocess.run([*mount[:2], "remount,ro", str(disk.folder)], check=True)
    try:
        yield home
    finally:
        subprocess.run(mount, check=True)


def test_on_a_disk_that_cannot_be_written_the_servers_are_told(read_only: Home, tmp_path: Path) -> None:
    home, (name,) = read_only, tokens.token_file(read_only.folder / "tokens.yaml").current()
    there = {"MCPCTL_SERVER__RUNTIME_DIR": str(tmp_path)}
    commands = (("revoke", name), ("revoke", "--all"), ("remove", name, "--yes"))
    for command in commands:
        done = home("token", *command)
        assert (done.code, "Read-only file system; no server runs" in done.error) == (1, True), done.err
    with process(tmp_path, "1", b"{}\n") as asked:
        for command in commands:
            done = home("token", *command, env=there)
            assert (done.code, f"the running servers keep {name} out until they restart" in done.error) == (1, True)
        assert home("user", "disable", "alice", env=there).code == 1
        assert [one for one in asked if one["do"] == "bar"] == [{"do": "bar", "tokens": [name]}] * 4
        done = home("lockdown", env=there)
        assert (done.code, "the running servers are locked until they restart" in done.error) == (1, True)
        assert home("lockdown", "--lift", env=there).code == 0
        assert [one["now"] for one in asked if one["do"] == "lock"] == [True, False]
    done = home("lockdown")
    assert (done.code, "no server answers here" in done.error) == (1, True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_a_folder_that_cannot_be_written_keeps_no_worker_from_starting_and_no_config_from_coming_into_force(
    disk: Disk, make_site: Callable[..., Site], newest_shop: Shop
) -> None:
    at: Site = make_site(newest_shop, extra=f"server: {{runtime_dir: {disk.folder}}}\nlimits: {{max_rows: 5}}\n")
    _, text = at.token()
    at.start("--workers", "2")
    subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    try:
        for before, after in (("5", "3"), ("3", "4")):
            at.config.write_text(at.config.read_text().replace(f"max_rows: {before}", f"max_rows: {after}"))
            assert at.run("config", "reload").stdout == "changed: limits\n"
        with at.client(text) as a:
            assert len(a.rows("select generate_series(1, 9)")) == 4
        first = children(at)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(children(at)) == 2 and not set(first) & set(children(at)))
        with at.client(text) as a:
            assert len(a.rows("select generate_series(1, 9)")) == 4
        eventually(lambda: "".join(at.stderr).count("no command reaches this worker: cannot make the control") == 2)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk.folder)], check=True)
    assert control.ask_all(disk.folder, {"do": "ping"}) == []
    assert at.process is not None
    at.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(control.ask_all(disk.folder, {"do": "ping"})) == 2)
    at.stop()
    events = [line["event"] for line in at.audit()]
    assert [events.count(f"server.{what}") for what in ("started", "stopped")] == [4, 2]
    assert "Traceback" not in "".join(at.stderr)


def test_ids_are_kept_out_also_where_their_file_cannot_even_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotWrittenError("cannot read it: Input/output error")

    monkeypatch.setattr(private_file, "read", broken)
    file = tokens.token_file(tmp_path / "tokens.yaml")
    assert known_of(file, ["aaaaaaaa", "bbbbbbbb", "aaaaaaaa"], Failures()) == ["aaaaaaaa", "bbbbbbbb"]


@pytest.mark.parametrize("kept", [True, False], ids=["with the reserve", "without"])
def test_the_server_can_be_locked_on_a_full_disk(disk: Disk, home: Home, kept: bool) -> None:
    if not kept:
        reserve.give_up(home.folder)
    disk.fill()
    assert home("lockdown", "--reason", "a bad night").code == 0
    assert Lockdown(home.folder / "tokens.yaml").on()
    assert home("lockdown", "--lift").code == 0
    disk.empty()
    home("user", "add", "alice")
    whole(home.folder)
