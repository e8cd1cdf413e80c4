"""The keyring: what is a key, what it opens, and what is said when it does not."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import Home, run
from mcpctl import keyring, private_file
from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError
from mcpctl.identity import users
from mcpctl.identity.grants import Grant
from mcpctl.keyring import Keyring
from mcpctl.postgres.login import Login
from site_of_mcpctl import record

SECRET = "the database's own password"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "secret.key"
    private_file.create(found, keyring.new_key().encode() + b"\n")
    return found


# -- the file -----------------------------------------------------------------------------------------------------


def test_a_file_holds_one_key_a_line_the_newest_first(path: Path) -> None:
    one, two = keyring.new_key(), keyring.new_key()
    data = f"# made by hand\n\n{one}\r\n  {two}\n".encode()
    assert keyring.parse(data, path) == [one, two]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"# only a comment\n", b"short\n", b"\xff\xfe\n", b"A" * 43 + b"\n", b"A" * 44 + b"\n",
        base64.urlsafe_b64encode(b"x" * 31) + b"\n", base64.urlsafe_b64encode(b"x" * 33) + b"\n",
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused_with_its_line_and_not_shown(path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        keyring.parse(data, path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 3
    for word in data.split():
        assert word == b"#" or word.decode("latin-1") not in caught.value.message or len(word) < 8


def test_a_file_that_others_may_read_is_refused(path: Path) -> None:
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        Keyring(path).keys()


# -- seal and open ------------------------------------------------------------------------------------------------


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_sealed_is_opened_again_and_shows_nothing(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("keys") / "secret.key"
    private_file.create(path, keyring.new_key().encode())
    ring = Keyring(path)
    sealed = ring.seal(text)
    assert keyring.is_sealed(sealed)
    assert sealed.isascii()
    assert "\n" not in sealed
    assert ring.open(sealed, "it") == text
    assert sealed != ring.seal(text)
    assert not keyring.is_sealed(text)


def test_a_text_is_sealed_with_the_first_key_and_opened_with_any(path: Path) -> None:
    old, new = path.read_text().strip(), keyring.new_key()
    before = Keyring(path).seal(SECRET)
    path.write_text(f"{new}\n{old}\n")
    ring = Keyring(path)
    after = ring.seal(SECRET)
    assert [ring.open(one, "it") for one in (before, after)] == [SECRET, SECRET]
    assert (keyring.opens_alone(old, before), keyring.opens_alone(new, before)) == (True, False)
    assert (keyring.opens_alone(old, after), keyring.opens_alone(new, after)) == (False, True)
    assert ring.ids() == [keyring.key_id(new), keyring.key_id(old)]


@pytest.mark.parametrize("sealed", ["plain text", "", "sealed:v2:abc", "sealed:v1:", "sealed:v1:junk", "sealed:v1:é"])
def test_what_was_not_sealed_with_a_key_of_the_file_names_the_file_and_what_it_is(path: Path, sealed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Keyring(path).open(sealed, "the password of mcp_alice_r")
    assert "the password of mcp_alice_r" in caught.value.message
    assert caught.value.exit_code == 3


def test_a_changed_byte_opens_nothing(path: Path) -> None:
    ring = Keyring(path)
    sealed = ring.seal(SECRET)
    for at in range(len(keyring.PREFIX), len(sealed) - 2, 7):
        changed = sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :]
        with pytest.raises(ConfigError, match="cannot be opened"):
            ring.open(changed, "it")


def test_a_key_that_was_once_there_still_opens_in_this_process_and_in_no_other(path: Path) -> None:
    ring = Keyring(path)
    sealed = ring.seal(SECRET)
    private_file.create(path.with_name("next"), keyring.new_key().encode())
    path.with_name("next").replace(path)
    assert ring.open(sealed, "it") == SECRET
    assert not keyring.opens_alone(ring.keys()[0], ring.seal(SECRET)[::-1])
    with pytest.raises(ConfigError, match=f"cannot be opened with any key of {path}"):
        Keyring(path).open(sealed, "it")


def test_a_file_that_goes_away_stops_what_seals_and_what_opens(path: Path) -> None:
    ring = Keyring(path)
    sealed = ring.seal(SECRET)
    path.unlink()
    for work in (lambda: ring.open(sealed, "it"), lambda: ring.seal(SECRET)):
        with pytest.raises(ConfigError, match=f"there is no key file {path}"):
            work()
    assert ring.ids() == []


# -- systemd's credential -----------------------------------------------------------------------------------------


def test_a_server_reads_systemds_credential_where_it_was_given_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir(mode=0o700)
    environ = {"CREDENTIALS_DIRECTORY": str(folder)}
    assert keyring.place(path, {}) == path
    assert keyring.place(path, environ) == path
    credential = folder / "secret.key"
    private_file.create(credential, keyring.new_key().encode())
    assert keyring.place(path, environ) == credential
    credential.chmod(0o440)  # as systemd makes it
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert len(Keyring(credential).keys()) == 1
    path.chmod(0o440)  # which is for a credential alone
    with pytest.raises(ConfigError, match="0440"):
        Keyring(path).keys()
    credential.chmod(0o444)
    with pytest.raises(ConfigError, match="0444"):
        Keyring(credential).keys()


def test_the_password_of_a_database_may_be_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "shop.password"
    private_file.create(secret, b"told to nobody\n")
    secret.chmod(0o440)
    login = Login("shop", Database(host="/run/postgresql", user="r", password_file=secret), Keyring(tmp_path / "none"))
    with pytest.raises(ConfigError, match="0440"):
        login.dsn()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="0440"):
        login.dsn()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert "password='told to nobody'" in login.dsn()


# -- a command and a server without the right key -----------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation in which alice has a grant with a sealed password."""
    found = Home(tmp_path / "home")
    text = found.config.read_text().replace("user: reader", "roles: per_user")
    found.config.write_text(text)
    found("user", "add", "alice")
    sealed = Keyring(found.folder / "secret.key").seal(SECRET)
    file = users.user_file(found.folder / "users.yaml")
    record(file, "alice", Grant("shop", read=("public",), passwords={"read": sealed}))
    return found


@pytest.mark.parametrize("fault", ["missing", "wrong", "broken"])
def test_no_server_starts_and_config_check_fails_where_a_password_does_not_open(home: Home, fault: str) -> None:
    key = home.folder / "secret.key"
    if fault == "missing":
        key.unlink()
    else:
        key.write_text(keyring.new_key() if fault == "wrong" else "no key at all\n")
    for command in (("serve", "--port", "0"), ("config", "check"), ("key", "rotate")):
        done = home(*command)
        assert done.code == 3, (command, done)
        assert str(key) in done.error
        assert SECRET not in done.err
    assert home("doctor").code == 1
    assert str(key) in home("doctor").out


def test_a_server_without_sealed_passwords_needs_no_key(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    (home.folder / "secret.key").unlink()
    assert home("config", "check").code == 0
    assert "`mcpctl key rotate` makes it" in home("doctor").out
    made = home("key", "rotate").good
    assert made.startswith("key ")
    assert (home.folder / "secret.key").stat().st_mode & 0o777 == 0o600
    assert os.stat(home.folder / "secret.key").st_size == 45
    assert run("--config", str(home.config), "key", "rotate").good != made
