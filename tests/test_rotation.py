"""A new key for what is sealed: interrupted at each step and run again, under load, and by two at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

import site_of_mcpctl as site
from command_line import Home
from mcpctl import config, keyring, private_file, rotation
from mcpctl.config_keys import Settings
from mcpctl.errors import Error
from mcpctl.identity import users
from mcpctl.identity.grants import Grant
from mcpctl.identity.own_databases import OwnDatabase, OwnDatabases
from mcpctl.keyring import Keyring
from mcpctl.state import State
from site_of_mcpctl import environment, eventually, in_background, record

PASSWORDS = {f"{user}:{access}": f"{user}-{access}-secret" for user in ("alice", "bob") for access in ("read", "write")}
FILES = ("one", "two")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation with passwords in all the places that there are: four in users.yaml, two in files, one plain."""
    found = Home(tmp_path / "home")
    named = [
        f"  {name}: {{host: /nonexistent, user: u, password_file: {name}.password}}\n" for name in (*FILES, "plain")
    ]
    named.append("  mine: {host: /nonexistent, roles: per_user}\n")
    found.config.write_text(found.config.read_text() + "".join(named))
    ring = Keyring(found.folder / "secret.key")
    file = users.user_file(found.folder / "users.yaml")
    for user in ("alice", "bob"):
        users.add(file, user, None, datetime.now(UTC))
        sealed = {access: ring.seal(PASSWORDS[f"{user}:{access}"]) for access in ("read", "write")}
        record(file, user, Grant("mine", read=("a",), write=("a",), passwords=sealed))
    for name in FILES:
        private_file.create(found.folder / f"{name}.password", ring.seal(f"{name} secret").encode() + b"\n")
    private_file.create(found.folder / "plain.password", b"in the open\n")
    return found


def settings(home: Home) -> Settings:
    return config.load(home.config, {})


def keys(home: Home) -> list[str]:
    return keyring.parse((home.folder / "secret.key").read_bytes(), home.folder / "secret.key")


def all_open(home: Home, alone: str | None = None) -> bool:
    """Every password opens to what it was with the file's keys, and `alone` with that one key."""
    ring = Keyring(home.folder / "secret.key")
    people = users.user_file(home.folder / "users.yaml").current()
    sealed = {
        f"{user.name}:{access}": text
        for user in people.values()
        for access, text in user.grants["mine"].passwords.items()
    }
    sealed |= {f"{name} secret": (home.folder / f"{name}.password").read_text().strip() for name in FILES}
    wanted = {**PASSWORDS, **{f"{name} secret": f"{name} secret" for name in FILES}}
    assert {what: ring.open(text, what) for what, text in sealed.items()} == wanted
    assert (home.folder / "plain.password").read_text() == "in the open\n"
    return alone is None or all(keyring.opens_alone(alone, text) for text in sealed.values())


def nobody(key: str) -> list[int]:
    return []


# -- one rotation -------------------------------------------------------------------------------------------------


def test_a_rotation_seals_everything_again_and_drops_the_old_key(home: Home) -> None:
    (old,) = keys(home)
    before = home.files()
    done = home("key", "rotate")
    assert done.good == f"key {keyring.key_id(keys(home)[0])}; 6 passwords sealed again\n"
    (new,) = keys(home)
    assert new != old
    assert all_open(home, new)
    assert not any(key in done.out + done.err for key in (old, new))
    changed = {name for name, data in home.files().items() if before.get(name) != data}
    assert {Path(name).name for name in changed} == {
        "users.yaml", "secret.key", "one.password", "two.password", "audit.jsonl", "audit.jsonl.lock",
    } - ({"audit.jsonl.lock"} if f"{home.folder}/audit.jsonl.lock" in before else set())  # fmt: skip
    assert not any(old.encode() in data for data in home.files().values())


_KILLED = """
import os, sys
from pathlib import Path
from mcpctl import config, private_file, rotation
number, after = int(sys.argv[2]), sys.argv[3] == "after"
replace, seen = private_file.Edit.replace, 0
def counted(self, data, **more):
    global seen
    seen += 1
    if seen == number and not after:
        os.kill(os.getpid(), 9)
    replace(self, data, **more)
    if seen == number:
        os.kill(os.getpid(), 9)
private_file.Edit.replace = counted
rotation.rotate(config.load(Path(sys.argv[1]), {}), lambda key: [])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rotation_that_is_killed_at_any_step_loses_nothing_and_can_be_run_again(home: Home, when: str) -> None:
    steps = 0
    while True:
        (old,) = keys(home)
        steps += 1
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, str(home.config), str(steps), when],
            capture_output=True, text=True, timeout=60, env=environment(),
        )  # fmt: skip
        assert all_open(home)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        rotation.rotate(settings(home), nobody)
        (new,) = keys(home)
        assert new != old
        assert all_open(home, new)
    assert steps == 6  # the key, users.yaml, two files, the key again; then there is nothing left to be killed at


def test_an_interrupted_rotation_goes_on_with_the_key_that_it_had_made(home: Home) -> None:
    (old,) = keys(home)
    with pytest.raises(Error, match="has not been given it yet"):
        rotation.rotate(settings(home), lambda key: [42])
    new, kept = keys(home)
    assert kept == old
    assert "an old key is still there" in home("doctor").out
    done = home("key", "rotate")
    assert "of a rotation that had begun earlier" in done.err
    assert keys(home) == [new]
    assert (home.folder / "secret.key").read_text() == f"{new}\n"
    assert "an old key is still there" not in home("doctor").out


@pytest.mark.parametrize("which", ["an older one", "the same", "both needed", "only the second needed"])
def test_a_second_key_of_the_operators_is_no_interrupted_rotation(home: Home, which: str) -> None:
    """Whoever rotates since a key has leaked ends with one that nobody had, whatever else stands in the file."""
    file = home.folder / "secret.key"
    (first,) = keys(home)
    second = first if which == "the same" else keyring.new_key()
    if which == "only the second needed":
        first, second = second, first
    elif which == "both needed":
        file.write_text(second)
        (home.folder / "one.password").write_text(Keyring(file).seal("one secret"))
    file.write_text(f"# the old one is for a backup\n{first}\n{second}\n")
    done = home("key", "rotate")
    (new,) = keys(home)
    assert done.good == f"key {keyring.key_id(new)}; 6 passwords sealed again\n"
    assert done.err == ""
    assert new not in (first, second)
    assert all_open(home, new)


def test_a_rotation_with_two_keys_that_is_interrupted_goes_on(home: Home) -> None:
    (old,) = keys(home)
    older = keyring.new_key()
    (home.folder / "secret.key").write_text(f"{old}\n{older}\n")
    for _ in range(2):
        with pytest.raises(Error, match="has not been given it yet"):
            rotation.rotate(settings(home), lambda key: [42])
    new, *others = keys(home)
    assert others == [old, older]
    rotation.rotate(settings(home), nobody)
    assert keys(home) == [new]
    assert all_open(home, new)


def test_what_cannot_be_opened_stops_a_rotation_before_it_changes_anything(home: Home) -> None:
    (home.folder / "two.password").write_text(f"{keyring.PREFIX}{'A' * 100}\n")
    before = {name: data for name, data in home.files().items() if "audit" not in name}
    done = home("key", "rotate")
    assert done.code == 3
    assert "two.password" in done.error
    assert {name: data for name, data in home.files().items() if "audit" not in name} == before


def test_what_is_sealed_with_a_lost_key_is_named_with_what_takes_it_away(home: Home) -> None:
    with closing(State(settings(home).server.state_file)) as state:
        people = users.user_file(home.folder / "users.yaml")
        row = OwnDatabase("alice", "lab", "h", "10.0.0.1", 5432, "d", "u", "", users.rfc3339(datetime.now(UTC)))
        OwnDatabases(state, Keyring(home.folder / "secret.key"), people).add(row, "secret", 3)
        with people.edit() as entries:
            entries |= {name: replace(one, grants={}) for name, one in entries.items()}
    (home.folder / "secret.key").unlink()
    refused = home("key", "rotate")
    said = "sealed with it are: the password of alice's own database lab; the password in "
    assert (refused.code, said in refused.error, "database unregister U NAME" in refused.err) == (3, True, True)
    assert said in home("doctor").out
    assert home("database", "unregister", "alice", "lab").code == 0
    assert [home("database", "remove", name, "--yes").code for name in FILES] == [0, 0]
    assert home("key", "rotate").code == 0


def test_a_password_that_is_not_in_the_config_yet_is_sealed_again_too(home: Home) -> None:
    """`database add` has sealed it, and has not come to writing the config."""
    sealed = Keyring(home.folder / "secret.key").seal("a new one")
    private_file.create(home.folder / "new.password", sealed.encode())
    rotation.rotate(settings(home), nobody)
    assert (
        Keyring(home.folder / "secret.key").open((home.folder / "new.password").read_text().strip(), "it")
        == "a new one"
    )


def test_what_was_sealed_with_the_old_key_meanwhile_keeps_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = keys(home)
    late = Keyring(home.folder / "secret.key").seal("one secret")
    reseal = rotation.PasswordFile.reseal

    def slow(self: rotation.PasswordFile, again: rotation.Again) -> None:
        reseal(self, again)
        (home.folder / "one.password").write_text(late + "\n")

    monkeypatch.setattr(rotation.PasswordFile, "reseal", slow)
    with pytest.raises(Error, match="no key was dropped"):
        rotation.rotate(settings(home), nobody)
    assert old in keys(home)
    assert all_open(home)
    monkeypatch.undo()
    rotation.rotate(settings(home), nobody)
    assert all_open(home, keys(home)[0])


def test_rotations_at_once_lose_no_password(home: Home) -> None:
    gate = threading.Barrier(4)

    def rotate() -> str | None:
        gate.wait(10)
        try:
            rotation.rotate(settings(home), nobody)
        except Error as problem:
            return problem.hint or problem.message
        return None

    for _ in range(10):
        work = [in_background(rotate) for _ in range(4)]
        said = {one.result() for one in work}
        assert None in said
        assert said <= {None, "run it again"}
        assert all_open(home)
    rotation.rotate(settings(home), nobody)
    assert all_open(home, keys(home)[0])


def test_a_rotation_that_another_has_overtaken_drops_no_key(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    reseal = rotation.UserStore.reseal
    overtaken: list[str] = []

    def slow(self: rotation.UserStore, again: rotation.Again) -> None:
        reseal(self, again)
        if not overtaken:
            overtaken.append(keys(home)[0])
            rotation.rotate(settings(home), nobody)  # ends this one's work
            with pytest.raises(Error, match="has not been given it yet"):
                rotation.rotate(settings(home), lambda key: [42])  # and begins a further one

    monkeypatch.setattr(rotation.UserStore, "reseal", slow)
    with pytest.raises(Error, match="no key was dropped"):
        rotation.rotate(settings(home), nobody)
    assert len(keys(home)) == 2
    assert overtaken[0] == keys(home)[1]
    assert all_open(home)


# -- a running server ---------------------------------------------------------------------------------------------


def test_a_server_that_does_not_know_the_new_key_stops_the_rotation(
    newest_shop: site.Shop, make_site: Callable[..., site.Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_site(newest_shop, per_user=True)
    found.grant("alice", "--table", "public.orders")
    folder = tmp_path / "credentials"
    folder.mkdir(mode=0o700)

    def give() -> None:
        """As systemd does at a start: a copy of the file as it is then."""
        (folder / "secret.key").unlink(missing_ok=True)
        private_file.create(folder / "secret.key", (found.folder / "secret.key").read_bytes(), mode=0o400)

    give()
    _, token = found.token()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    found.start()
    pid = found.process.pid if found.process else 0
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    try:
        with found.client(token) as client:
            for _ in range(2):
                done = found.run("key", "rotate", check=False)
                assert done.returncode == 1
                assert f"the server (pid {pid}) has not been given it yet" in done.stderr
                assert "restart the server" in done.stderr
                assert len(Keyring(found.folder / "secret.key").keys()) == 2
                assert client.rows("SELECT 1") == [[1]]
        found.stop()
        give()
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
        found.start()
        monkeypatch.delenv("CREDENTIALS_DIRECTORY")
        assert found.run("key", "rotate").stdout.endswith("1 password sealed again\n")
        with found.client(token) as client:
            assert client.rows("SELECT 1") == [[1]]
    finally:
        found.stop()
        newest_shop_clean(newest_shop, "alice")


def test_no_call_fails_while_the_key_is_rotated_again_and_again(
    newest_shop: site.Shop, make_site: Callable[..., site.Site]
) -> None:
    found = make_site(newest_shop, per_user=True)
    config_text = found.config.read_text()
    found.config.write_text(
        config_text.replace(
            "    roles: per_user\n", "    roles: per_user\n    pool: {max_lifetime: 100ms, max_per_user: 40}\n"
        )
        + "limits: {connections: 40}\n"
    )
    for user in ("alice", "bob"):
        found.grant(user, "--table", "public.orders")
    ids = {user: [found.token(user)[1] for _ in range(2)] for user in ("alice", "bob")}
    found.start("--workers", "2")
    stop, done, failed = threading.Event(), [0] * 4, []
    old = (found.folder / "secret.key").read_text()

    def call(number: int, user: str, token: str) -> None:
        role = f"mcp_{user}_r"
        while not stop.is_set():
            with found.client(token) as client:  # a connection each time, so that both workers are met
                for _ in range(5):
                    answer = client.call("query_database", {"query": "SELECT session_user::text"})
                    if answer.status_code != 200 or f'[["{role}"]]' not in answer.text.replace(" ", ""):
                        failed.append(answer.text)
                        return
                    done[number] += 1

    clients = [(user, token) for user, tokens in ids.items() for token in tokens]
    work = [in_background(call, number, *one) for number, one in enumerate(clients)]
    try:
        seen = {old}
        for _ in range(5):
            before = list(done)
            eventually(lambda before=before: failed or all(now > then for now, then in zip(done, before, strict=True)))
            found.run("key", "rotate")
            (key,) = (found.folder / "secret.key").read_text().split()
            assert key not in seen
            seen.add(key)
        before = list(done)
        eventually(lambda: failed or all(now > then + 20 for now, then in zip(done, before, strict=True)), 30)
    finally:
        stop.set()
        for one in work:
            one.result()
    assert not failed, failed[0]
    people = users.user_file(found.folder / "users.yaml").current().values()
    assert all(keyring.opens_alone(key, text) for text, _ in users.sealed_in({one.name: one for one in people}))
    opened = sum(line["event"] == "pool.opened" for line in found.audit())
    assert opened >= len(clients)
    assert found.stop() in (0, -15)
    newest_shop_clean(newest_shop, "alice", "bob")


def newest_shop_clean(shop: site.Shop, *people: str) -> None:
    """Leave no role behind in a cluster that other tests use."""
    with shop.admin() as connection:
        for user in people:
            connection.execute(f"DROP OWNED BY mcp_{user}_r".encode())
            connection.execute(f"DROP ROLE mcp_{user}_r".encode())
        connection.execute("DROP ROLE IF EXISTS mcp_logins")
