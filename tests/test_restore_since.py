"""mcpctl restore on what is not quite lost: lines that wait, older files, a restore that was cut off, a forged file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import kept
from command_line import Home
from mcpctl import config, private_file
from mcpctl.backup import opening, placing
from mcpctl.identity import users
from site_of_mcpctl import COMMAND, environment, eventually


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return kept.populated(tmp_path)


def test_what_only_the_log_or_what_waits_beside_it_tells_is_not_undone(home: Home, tmp_path: Path) -> None:
    revoked, _ = home.token("--user", "alice")
    logs = home.folder / "logs"
    logs.mkdir(0o700)
    with home.config.open("a") as file:
        file.write("audit: {file: logs/audit.jsonl}\n")
    (home.folder / "audit.jsonl").rename(logs / "audit.jsonl")
    text = home.config.read_text()
    home.config.write_text(text.replace("databases:\n", "databases:\n  old: {host: /nonexistent, user: reader}\n"))
    path = kept.made(home, tmp_path / "b.age")
    home("database", "remove", "old", "--yes").good  # noqa: B018
    home("lockdown", "--reason", "a leak").good  # noqa: B018
    (logs / "audit.jsonl").rename(logs / "away")
    (logs / "audit.jsonl").mkdir()  # no line can be written
    assert "not in the audit log yet" in home("token", "revoke", revoked).err
    (logs / "audit.jsonl").rmdir()
    (logs / "away").rename(logs / "audit.jsonl")
    kept.lose(home, *(one.name for one in home.folder.iterdir() if one != logs))
    done = kept.restored(home, path)
    assert done.code == 0, done.err
    assert "the server was locked, and stays so" in done.err
    assert "a leak" in home("lockdown").out
    assert kept.tokens(home) == {revoked: "revoked"}
    assert "the database old was removed since" in done.err
    assert list(config.load(home.config).databases) == ["shop"]
    assert "whole" in home("audit", "verify").good


def test_files_that_are_older_than_the_backup_lose_what_was_taken_away_until_then(home: Home, tmp_path: Path) -> None:
    removed, revoked = home.token("--user", "alice")[0], home.token("--user", "bob")[0]
    shutil.copytree(home.folder, tmp_path / "older", dirs_exist_ok=True)
    home("token", "remove", removed, "--yes").good  # noqa: B018
    home("token", "revoke", revoked).good  # noqa: B018
    home("user", "disable", "bob").good  # noqa: B018
    home("user", "roles", "alice", "mcp-user").good  # noqa: B018
    with users.user_file(home.folder / "users.yaml").edit() as entries:
        del entries["carol"]
    kept.note(home, "user.removed", user="carol")
    home("lockdown").good  # noqa: B018
    path = kept.made(home, tmp_path / "b.age")
    shutil.rmtree(home.folder)
    (tmp_path / "older").rename(home.folder)  # a disk of before
    done = kept.restored(home, path)
    assert done.code == 0, done.err
    assert kept.tokens(home) == {revoked: "revoked"}
    found = users.user_file(home.folder / "users.yaml").current()
    assert sorted(found) == ["alice", "bob"]
    assert found["bob"].disabled_at is not None
    assert found["alice"].roles == ()
    assert kept.sessions(home) == []
    assert "was locked already" in home("lockdown").out
    assert "whole" in home("audit", "verify").good


def test_nothing_is_changed_that_an_interrupted_restore_would_undo(home: Home, tmp_path: Path) -> None:
    name, _ = home.token("--user", "alice")
    path, journal = kept.made(home, tmp_path / "b.age"), home.folder / placing.UNFINISHED
    journal.touch(0o600)
    for line in (("token", "revoke", name), ("lockdown", "--lift"), ("backup", str(tmp_path / "c.age"))):
        done = home(*line, *(("--recipient", kept.FOR) if line[0] == "backup" else ()))
        assert done.code == 5, done.err
        assert "a restore was interrupted here" in done.error
    journal.unlink()
    assert kept.restored(home, path).code == 0
    home("token", "revoke", name).good  # noqa: B018


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write everywhere")
def test_as_root_a_backup_does_not_say_where_else_files_are_written_to(home: Home, tmp_path: Path) -> None:
    away = tmp_path / "cron.d"
    away.mkdir(0o700)
    (home.folder / "shop.password").rename(away / "job")
    home.config.write_text(
        home.config.read_text().replace("password_file: shop.password", f"password_file: {away}/job")
    )
    text, path = home.config.read_text(), kept.made(home, tmp_path / "b.age")
    shutil.rmtree(home.folder)
    (away / "job").unlink()
    home.folder.mkdir(0o700)
    done = kept.restored(home, path)
    assert done.code == 5, done.err
    assert f"{away}/job" in done.error
    assert list(away.iterdir()) == list(home.folder.iterdir()) == []
    private_file.create(home.config, text.encode())  # looked at, and put there
    assert kept.restored(home, path).code == 0
    assert (away / "job").exists()


def test_a_restore_that_is_told_to_end_leaves_nothing_of_what_it_has_unpacked(home: Home, tmp_path: Path) -> None:
    path, key = kept.made(home, tmp_path / "b.age"), kept.identity(tmp_path)
    before = home.files()
    with open(home.folder / "audit.jsonl.lock", "rb") as log:
        private_file.lock(log.fileno(), 1.0)  # it waits for that, when it has unpacked all
        line = [*COMMAND, "restore", str(path), "--identity", key, "--config", str(home.config)]
        with subprocess.Popen(line, env=environment(TMPDIR=str(tmp_path)), stderr=subprocess.DEVNULL) as run:
            eventually(lambda: len(list(home.folder.glob(f"{opening.STAGE}*/0*"))) > 5)
            run.terminate()
            assert run.wait(30) == -signal.SIGTERM
    assert home.files() == before
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("tmp")] == []
