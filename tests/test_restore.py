"""mcpctl restore: everything comes back, nothing that was taken away does, and what is wrong changes nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kept
import signed_in
from command_line import Home
from mcpctl import config
from mcpctl.backup import age, opening, placing, restoring
from mcpctl.backup.archive import Entry
from mcpctl.config_keys import Settings
from mcpctl.identity import tokens, users
from mcpctl.identity.own_databases import OwnDatabases
from mcpctl.identity.tokens import utcnow
from mcpctl.keyring import Keyring
from mcpctl.state import State
from site_of_mcpctl import PASSWORD, Site
from site_of_mcpctl import Shop as PgShop


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return kept.populated(tmp_path)


def _events(home: Home) -> list[str]:
    return [json.loads(line)["event"] for line in (home.folder / "audit.jsonl").read_text().splitlines()]


def test_on_a_machine_that_lost_everything_all_of_it_is_good_again(home: Home, tmp_path: Path) -> None:
    name, _ = home.token("--user", "alice")
    home("audit", "rotate").good  # noqa: B018
    path = kept.made(home, tmp_path / "b.age")
    before, signed_in = home.files(), kept.sessions(home)
    shutil.rmtree(home.folder)
    dry = kept.restored(home, path, "--dry-run")
    assert "nothing was changed" in dry.err
    assert not home.folder.exists()
    done = kept.restored(home, path)
    assert done.code == 0, done.err
    assert "is not known here" in done.err
    assert "--revoke-all" in done.err
    same = {one for one in before if "/audit.jsonl" not in one and not one.endswith((".db", "-wal", "-shm", "key"))}
    assert {one: home.files()[one] for one in same} == {one: before[one] for one in same}
    assert kept.tokens(home) == {name: "active"}
    assert kept.sessions(home) == signed_in != []
    assert _events(home)[-1] == "backup.restored"
    assert "whole" in home("audit", "verify").good
    ring = Keyring(home.folder / "secret.key")
    with closing(State(home.folder / "state.db")) as store:
        own = OwnDatabases(store, ring, users.user_file(home.folder / "users.yaml"))
        assert own.password(next(iter(own.every().values()))) == "own"
    assert ring.open((home.folder / "shop.password").read_text(), "it") == "sealed"
    assert "sealed again" in home("key", "rotate").good
    left = [one.name for one in home.folder.iterdir() if "restore" in one.name or one.name == "lockdown"]
    assert left == []


def test_what_was_taken_away_since_does_not_come_back(home: Home, tmp_path: Path) -> None:
    made = [home.token("--user", who)[0] for who in ("alice", "bob", "carol", "alice", "alice")]
    path = kept.made(home, tmp_path / "b.age")
    revoked, _, _, removed, rotated = made
    home("token", "revoke", revoked).good  # noqa: B018
    home("token", "remove", removed, "--yes").good  # noqa: B018
    home("token", "rotate", rotated).good  # noqa: B018
    late, _ = home.token("--user", "alice")
    home("user", "disable", "bob").good  # noqa: B018
    home("user", "roles", "alice", "mcp-user").good  # noqa: B018
    home("session", "revoke", "--all").good  # noqa: B018
    home("database", "unregister", "alice", "mine").good  # noqa: B018
    people = users.user_file(home.folder / "users.yaml")
    with people.edit() as entries:
        del entries["carol"]
    with (home.folder / "lines").open("w") as out:
        out.write("")
    kept.note(home, "user.removed", user="carol")
    kept.note(home, "grant.removed", user="bob", database="shop")
    kept.lose(home, "tokens.yaml", "users.yaml", "state.db", "lines")
    done = kept.restored(home, path)
    assert done.code == 0, done.err
    assert "is not known here" not in done.err
    assert late in done.err
    assert kept.tokens(home) == {revoked: "revoked", made[1]: "disabled", made[2]: "blocked", rotated: "revoked"}
    found = people.current()
    assert "carol" not in found
    assert found["bob"].disabled_at is not None
    assert found["bob"].grants == {}
    assert found["alice"].roles == ()
    assert found["alice"].grants["shop"].read == ("public",)
    assert kept.sessions(home) == []
    with closing(State(home.folder / "state.db")) as store:
        assert store.rows("SELECT * FROM own_databases") == []
        assert store.rows("SELECT * FROM browsers") == []
    assert "whole" in home("audit", "verify").good


def test_files_that_are_here_stay_and_what_they_lack_comes_back_where_no_log_says_that_it_went(
    home: Home, tmp_path: Path
) -> None:
    name, _ = home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    before = home.files()
    assert kept.restored(home, path).code == 0
    after = home.files()
    assert {one for one in before if before[one] != after[one]} <= {str(home.folder / "audit.jsonl")}
    file = tokens.token_file(home.folder / "tokens.yaml")
    with file.edit() as entries:
        entries.clear()
    assert kept.restored(home, path).code == 0
    assert kept.tokens(home) == {name: "active"}
    with file.edit() as entries:
        entries.clear()
    (home.folder / "audit.jsonl").unlink()
    done = kept.restored(home, path)
    assert kept.tokens(home) == {}
    assert "no log says why" in done.err
    assert "whole" in home("audit", "verify").good


def test_what_comes_back_is_sealed_with_the_key_that_is_here(home: Home, tmp_path: Path) -> None:
    path = kept.made(home, tmp_path / "b.age")
    home("key", "rotate").good  # noqa: B018
    keys = (home.folder / "secret.key").read_bytes()
    kept.lose(home, "users.yaml", "shop.password", "state.db")
    assert kept.restored(home, path).code == 0
    assert (home.folder / "secret.key").read_bytes() == keys
    ring = Keyring(home.folder / "secret.key")
    for sealed, what in users.sealed_in(users.user_file(home.folder / "users.yaml").current()):
        assert ring.open(sealed, what) == "a password"
    assert ring.open((home.folder / "shop.password").read_text().strip(), "it") == "sealed"


def test_with_revoke_all_nothing_of_before_opens_anything(home: Home, tmp_path: Path) -> None:
    name, _ = home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    shutil.rmtree(home.folder)
    done = kept.restored(home, path, "--revoke-all")
    assert done.code == 0, done.err
    assert kept.tokens(home) == {name: "revoked"}
    assert kept.sessions(home) == []


def test_of_two_logs_the_one_that_goes_on_from_the_other_is_in_force(home: Home, tmp_path: Path) -> None:
    home.token("--user", "alice")
    first = (home.folder / "audit.jsonl").read_bytes()
    home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    (home.folder / "audit.jsonl").write_bytes(first)  # as after an older copy of the disk
    done = kept.restored(home, path)
    assert "ended before the backup's" in done.err
    assert next(home.folder.glob("log-before-restore-*/audit.jsonl")).read_bytes() == first
    assert "whole" in home("audit", "verify").good
    (home.folder / "audit.jsonl").write_bytes(first)
    kept.note(home, "user.added", user="dave")
    ours = (home.folder / "audit.jsonl").read_bytes()
    kept.note(home, "user.added", user="erin")
    done = kept.restored(home, path)
    assert "both are kept" in done.err
    assert (home.folder / "audit.jsonl").read_bytes().startswith(ours)
    assert len(next(home.folder.glob("log-of-backup-*/audit.jsonl")).read_bytes()) > len(first)
    assert "whole" in home("audit", "verify").good


def test_a_backup_of_another_installation_changes_nothing_unless_that_is_said(home: Home, tmp_path: Path) -> None:
    name, _ = home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    other = Home(tmp_path / "other")
    other("user", "add", "zoe").good  # noqa: B018
    before = other.files()
    for lost in ("", "audit.key"):
        if lost:
            (other.folder / lost).unlink()
            before.pop(str(other.folder / lost))
        done = kept.restored(other, path)
        assert done.code == 5, done.err
        assert "another installation" in done.error
        assert other.files() == before
    done = kept.restored(other, path, "--other-installation")
    assert done.code == 0, done.err
    assert kept.tokens(other) == {name: "active"}
    assert b"zoe" in next(other.folder.glob("before-restore-*/users.yaml")).read_bytes()
    assert "whole" in other("audit", "verify").good


SHM = Path("/dev/shm")


@pytest.mark.skipif(not SHM.is_dir() or SHM.stat().st_dev == Path("/tmp").stat().st_dev, reason="there is one disk")
def test_another_installations_files_on_another_disk_are_moved_aside_though_it_is_interrupted(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    with tempfile.TemporaryDirectory(dir=SHM) as disk:
        other = Home(tmp_path / "other", f"audit: {{file: {disk}/audit.jsonl}}\n")
        other("user", "add", "zoe").good  # noqa: B018
        theirs = Path(disk, "audit.jsonl").read_bytes()
        at, to = Path(disk, "audit.jsonl"), tmp_path / "other" / "aside" / "audit.jsonl"
        step = placing.Step(placing.MOVE, str(at), str(to))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(placing, "_carry_over", interrupted)
            placing._do(step)
        for _ in range(2):  # what a run does that goes on, and one that finds it done
            placing._do(step)
        assert (at.exists(), to.read_bytes(), to.stat().st_mode & 0o777) == (False, theirs, 0o600)
        to.rename(tmp_path / "back")
        shutil.copy(tmp_path / "back", at)
        at.chmod(0o600)
        done = kept.restored(other, path, "--other-installation")
        assert done.code == 0, done.err
        assert kept.tokens(other) == {name: "active"}
        assert next(other.folder.glob("before-restore-*/audit.jsonl")).read_bytes() == theirs
        assert [one.name for one in Path(disk).iterdir() if "leaving" in one.name] == []
        assert "whole" in other("audit", "verify").good


@pytest.mark.skipif(not SHM.is_dir() or SHM.stat().st_dev == Path("/tmp").stat().st_dev, reason="there is one disk")
def test_where_another_disk_has_no_room_for_what_is_moved_aside_nothing_is_changed(home: Home, tmp_path: Path) -> None:
    path = kept.made(home, tmp_path / "b.age")
    with tempfile.TemporaryDirectory(dir=SHM) as disk:
        other = Home(tmp_path / "other", f"audit: {{file: {disk}/audit.jsonl}}\n")
        other("user", "add", "zoe").good  # noqa: B018
        os.truncate(Path(disk, "audit.jsonl"), 1 << 42)  # sparse
        before = other.files()
        for more in (["--dry-run"], []):
            done = kept.restored(other, path, "--other-installation", *more)
            assert (done.code, "is on another disk and has no room" in done.error) == (1, True), done.err
        assert (other.files(), list(other.folder.glob("before-restore-*"))) == (before, [])


def interrupted(path: Path, to: Path) -> None:
    raise KeyboardInterrupt


def test_a_damaged_backup_changes_nothing(home: Home, tmp_path: Path) -> None:
    path = kept.made(home, tmp_path / "b.age")
    data, before = path.read_bytes(), home.files()
    bad = [
        data[:-1],
        data[: len(data) // 2],
        data[:300],
        b"",
        b"no backup",
        data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    ]
    for one in bad:
        path.write_bytes(one)
        done = kept.restored(home, path)
        assert done.code == 3, (len(one), done.err)
        assert done.error
        assert home.files() == before
    assert home("restore", str(tmp_path / "none"), "--identity", kept.identity(tmp_path)).code == 4
    assert home("restore", str(tmp_path), "--identity", kept.identity(tmp_path)).code == 3


Change = Callable[[Any, list[bytes]], tuple[Any, list[bytes]]]


def _entry(index: int, **changed: Any) -> Change:
    def change(said: Any, files: list[bytes]) -> tuple[Any, list[bytes]]:
        entries = list(said.files)
        entries[index] = replace(entries[index], **changed)
        return replace(said, files=tuple(entries)), files

    return change


def _content(kind: str, make: Callable[[bytes], bytes]) -> Change:
    import hashlib

    def change(said: Any, files: list[bytes]) -> tuple[Any, list[bytes]]:
        entries = list(said.files)
        index = next(at for at, one in enumerate(entries) if one.kind == kind)
        data = make(files[index])
        digest = hashlib.sha256(data).hexdigest()
        entries[index] = replace(entries[index], size=len(data), sha256=digest)
        return replace(said, files=tuple(entries)), [*files[:index], data, *files[index + 1 :]]

    return change


def _trigger(data: bytes) -> bytes:
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.deserialize(data[:18] + b"\x01\x01" + data[20:])
        fresh.execute("CREATE TRIGGER t AFTER UPDATE ON guests BEGIN DELETE FROM blocked; END")
        return fresh.serialize()


HOSTILE: dict[str, Change] = {
    "a name with a path": _entry(1, name="../../tokens.yaml"),
    "a kind of its own": _entry(1, kind="program"),
    "a log that is elsewhere": _entry(-1, key="/../../x"),
    "the same twice": lambda said, files: (replace(said, files=(*said.files, said.files[0])), [*files, files[0]]),
    "no tokens": lambda said, files: (replace(said, files=said.files[:1] + said.files[2:]), files[:1] + files[2:]),
    "a mode with setuid": _entry(0, mode="4755"),
    "more tokens than it says": lambda said, files: (replace(said, tokens=9), files),
    "another installation's name": lambda said, files: (replace(said, installation="0" * 12), files),
    "a log that ends elsewhere": lambda said, files: (replace(said, seq=said.seq + 1), files),
    "a log that was changed": _content("log", lambda data: data.replace(b"alice", b"mallo")),
    "tokens that are none": _content("tokens", lambda data: b"version: 1\ntokens: {x: &a [*a]}\n"),
    "another audit.key": _content("audit.key", lambda data: b"0" * 64),
    "another secret.key": _content("secret.key", lambda data: b"A" * 43 + b"="),
    "a store with a trigger": _content("state", _trigger),
    "a store that is none": _content("state", lambda data: b"SQLite format 3\0" + b"\xff" * 9000),
    "a config that is none": _content("config", lambda data: b"server: {port: nowhere}\n"),
}


def test_a_hostile_backup_changes_nothing(home: Home, tmp_path: Path) -> None:
    home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    said, files = kept.parts(path)
    before, other = home.files(), Home(tmp_path / "empty")
    shutil.rmtree(other.folder)
    for what, change in HOSTILE.items():
        one = kept.sealed(tmp_path / "hostile.age", kept.packed(*change(said, files)))
        for at in (home, other):
            done = kept.restored(at, one)
            assert done.code == 3, (what, done.code, done.err)
            assert done.error
        assert home.files() == before, what
        assert not other.folder.exists() or other.files() == {}, what


def test_no_link_and_no_bomb_is_unpacked_and_nothing_that_the_manifest_does_not_say(home: Home, tmp_path: Path) -> None:
    before, outside = home.files(), tmp_path / "outside"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        link = tarfile.TarInfo("manifest.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        made.addfile(link)
    bombs = [out.getvalue()]
    for size in (1 << 40, 3 << 20):
        head = tarfile.TarInfo("manifest.json")
        head.size = size
        bombs.append(gzip.compress(head.tobuf(tarfile.GNU_FORMAT) + b"0" * (3 << 20)))
    pax = tarfile.TarInfo("manifest.json")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 40
    bombs.append(gzip.compress(pax.tobuf(tarfile.USTAR_FORMAT) if pax.size < 8**11 else pax.tobuf(tarfile.GNU_FORMAT)))
    entry = Entry("config.yaml", "config", "", "x", "0600", 1 << 40, "0" * 64)
    said = json.dumps({"format": "mcpctl backup", "format_version": 1, "version": "", "made_at": "", "host": "",
                       "installation": "", "tokens": 0, "users": 0, "seq": 0, "hash": "", "whole": True,
                       "files": [vars(entry)]}).encode()  # fmt: skip
    head = tarfile.TarInfo("manifest.json")
    head.size = len(said)
    bombs.append(gzip.compress(head.tobuf(tarfile.GNU_FORMAT) + said.ljust(-(-len(said) // 512) * 512, b"\0")))
    good = gzip.decompress(kept.plain(kept.made(home, tmp_path / "b.age")))
    before = home.files()
    assert b"mcp-tools" in good
    bombs += [
        gzip.compress(good.replace(b"mcp-tools", b"mcp-admin")),
        gzip.compress(good + b"x"),
        gzip.compress(good)[:-4],
    ]
    for bomb in bombs:
        done = kept.restored(home, kept.sealed(tmp_path / "bomb.age", bomb))
        assert done.code == 3, done.err
        assert home.files() == before
    assert not outside.exists()


class _KilledError(BaseException):
    pass


def _until(home: Home, path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Restore as far as so many steps; whether it was killed then."""
    done, real = 0, placing._do

    def counted(step: placing.Step) -> None:
        nonlocal done
        if done == steps:
            raise _KilledError
        done += 1
        real(step)

    monkeypatch.setattr(placing, "_do", counted)
    here: Settings | None = config.load(home.config) if home.config.exists() else None
    try:
        with (
            path.open("rb") as file,
            opening.opened(file, age.Identities([kept.KEY]), lambda said: home.config, restoring.near) as found,
            restoring.quiet(here or found.settings),
        ):
            since = restoring.survey(found, here or found.settings)
            plan = restoring.planned(found, here, since, utcnow(), other=False, revoke_all=False)
            restoring.place(plan, "said", utcnow(), other=False)
    except _KilledError:
        return True
    finally:
        monkeypatch.undo()
    return False


def test_a_restore_that_was_killed_at_any_step_is_finished_by_the_next(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = home.token("--user", "alice")
    path = kept.made(home, tmp_path / "b.age")
    steps = 0
    while True:
        shutil.rmtree(home.folder)
        if not _until(home, path, steps, monkeypatch):
            break
        assert (home.folder / "lockdown").exists()  # no server answers a call on half of it
        (home.folder / f"{opening.STAGE}0123").mkdir()  # as SIGKILL leaves it
        done = kept.restored(home, path)
        assert "is finished now" in done.out, done.err
        assert kept.tokens(home) == {name: "active"}
        assert _events(home)[-1] == "backup.restored"
        assert not [one for one in home.folder.iterdir() if "restore" in one.name or one.name == "lockdown"]
        steps += 4
    assert steps > 8


def test_what_a_killed_restore_had_unpacked_is_removed_by_the_next(home: Home, tmp_path: Path) -> None:
    path = kept.made(home, tmp_path / "b.age")
    left = home.folder / f"{opening.STAGE}0123"
    left.mkdir()
    (left / "x").write_text("x")
    beside = home.folder / ".users.yaml.restored"
    beside.write_text("x")
    kept.lose(home, "users.yaml")
    at_work = home.folder / f"{opening.STAGE}4567"
    at_work.mkdir()
    with placing.alone(at_work):
        assert kept.restored(home, path).code == 0
    assert at_work.exists()
    assert not left.exists()
    assert not beside.exists()


def test_a_server_that_lost_everything_serves_again(
    newest_shop: PgShop, make_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = make_site(newest_shop, extra=f"{signed_in.ENABLED}audit: {{anchor_file: anchors}}\n")
    ring, password = Keyring(site.folder / "secret.key"), site.folder / "shop.password"
    password.write_text(ring.seal(PASSWORD) + "\n")
    site.edit_user("alice", password=signed_in.hashed())
    name, text = site.token()
    site.start()
    _, session = signed_in.session(site)
    with site.client(text) as client, site.client(session) as other:
        assert client.rows("SELECT 1") == other.rows("SELECT 1") == [[1]]
    path, key = tmp_path / "b.age", kept.identity(tmp_path)
    site.run("backup", str(path), "--recipient", kept.FOR)
    before = (site.folder / "tokens.yaml").read_bytes()
    done = site.run("restore", str(path), "--identity", key, check=False)
    assert done.returncode == 5
    assert "a server runs on these files" in done.stderr
    site.stop()
    shutil.rmtree(site.folder)
    site.run("restore", str(path), "--identity", key)
    assert (site.folder / "tokens.yaml").read_bytes() == before
    assert "whole" in site.run("audit", "verify").stdout
    site.start()
    with site.client(text) as client, site.client(session) as other:
        assert client.rows("SELECT 1") == other.rows("SELECT 1") == [[1]]
    site.run("token", "revoke", name)
    site.stop()
    assert "whole" in site.run("audit", "verify").stdout
    (site.folder / "tokens.yaml").unlink()
    site.run("restore", str(path), "--identity", key)
    site.start()
    with site.client(text) as client, site.client(session) as other:
        assert client.call("query_database", {"query": "SELECT 1"}).status_code == 401
        assert other.rows("SELECT 1") == [[1]]
