"""mcpctl backup: what is in it, whom it is for, and which older ones go."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import kept
from command_line import Home, on_a_terminal, run
from mcpctl import private_file
from mcpctl.backup import age, making, names
from mcpctl.errors import ConfigError
from mcpctl.identity import tokens
from site_of_mcpctl import in_background

PASSPHRASE = "several words that nobody guesses"


def _home(tmp_path: Path, extra: str = "") -> Home:
    home = Home(tmp_path / "home", extra)
    home("user", "add", "alice").good  # noqa: B018
    return home


def test_a_backup_holds_all_that_an_installation_is_and_says_what_it_wrote(tmp_path: Path) -> None:
    extra = "audit: {anchor_file: anchors}\nserver: {tls: {cert: c.pem, key: k.pem}}\n"
    home = _home(
        tmp_path,
        "  hr: {host: /nonexistent, user: reader, password_file: hr.password, sslcert: c.crt, sslkey: c.key}\n" + extra,
    )
    for name, text in (("hr.password", "the-plain-password"), ("admin.dsn", "root's"), ("anchors", "")):
        private_file.create(home.folder / name, text.encode())
    for name, mode in (("c.crt", 0o644), ("c.key", 0o600)):
        (home.folder / name).write_text("x")
        (home.folder / name).chmod(mode)
    name, _ = home.token("--user", "alice")
    home("audit", "rotate").good  # noqa: B018
    home("lockdown").good  # noqa: B018
    last = json.loads((home.folder / "audit.jsonl").read_text().splitlines()[-1])["seq"]
    done = home("backup", str(tmp_path / "b.age"), "--recipient", kept.FOR, "--json")
    said, path = json.loads(done.good), tmp_path / "b.age"
    rotated = next(home.folder.glob("audit.jsonl.2*")).name
    assert sorted(kept.names(path)) == sorted(
        ["manifest.json", "config.yaml", "tokens.yaml", "users.yaml", "tenants.yaml", "secret.key", "audit.key",
         "lockdown", "state.db", "anchors", "log/audit.jsonl", f"log/{rotated}",
         *(f"secrets/00{number}" for number in (1, 2, 3))]
    )  # fmt: skip
    data = path.read_bytes()
    assert (said["bytes"], said["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (said["tokens"], said["users"], said["seq"], said["whole"]) == (1, 1, last, True)
    assert said["not_in_it"] == [str(home.folder / "c.pem"), str(home.folder / "k.pem")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, files = kept.parts(path)
    assert b"the-plain-password" in files
    assert not any(b"root's" in one for one in files)
    line = home("audit", "tail", "-n", "1", "--json").good
    assert json.loads(line)["event"] == "backup.made"
    assert said["sha256"] in line
    assert name in kept.parts(path)[1][1].decode()
    assert not list(tmp_path.glob(".*"))


def test_nobody_at_a_terminal_can_encrypt_for_recipients_alone(tmp_path: Path) -> None:
    home, out = _home(tmp_path), tmp_path / "b.age"
    secret = tmp_path / "pw"
    private_file.create(secret, PASSPHRASE.encode())
    for words in ([], ["--passphrase-file", str(secret)], ["--recipient", str(kept.KEY)]):
        alone = {"start_new_session": True} if words[:1] == ["--passphrase-file"] else {}
        done = run("--config", str(home.config), "backup", str(out), *words, **alone)
        assert done.code == 2, (words, done.err)
        assert str(kept.KEY) not in done.error
        assert not out.exists()
    assert home("backup", "--recipient", kept.FOR).code == 2  # nobody has said where to
    config = home.config.read_text()
    home.config.write_text(f"{config}backup: {{directory: {tmp_path / 'all'}, recipients: [{kept.KEY}]}}\n")
    assert "AGE-SECRET" not in home("backup").error
    home.config.write_text(f"{config}backup: {{directory: {tmp_path / 'all'}, recipients: [{kept.FOR}]}}\n")
    path = Path(home("backup").good.strip())
    assert re.fullmatch(r"mcpctl-[0-9]{8}T[0-9]{6}Z\.tar\.gz\.age", path.name)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "config.yaml" in kept.names(path)


def test_a_passphrase_is_asked_for_twice_and_opens_it(tmp_path: Path) -> None:
    home, out = _home(tmp_path), tmp_path / "b.age"
    words = ["--config", str(home.config), "backup", str(out)]
    done = on_a_terminal(words, answers=[("Passphrase", "short\n")])
    assert done.code == 2
    done = on_a_terminal(words, answers=[("Passphrase", PASSPHRASE + "\n"), ("Again", PASSPHRASE + "\n")])
    assert done.code == 0, done.out
    assert PASSPHRASE not in done.out
    before = home.files()
    assert home("restore", str(out)).code == 2
    assert home("restore", str(out), "--identity", kept.identity(tmp_path)).code == 2
    done = home("restore", str(out), "--passphrase-file", "-", "--dry-run", stdin=PASSPHRASE + "\n")
    assert "nothing was changed" in done.err, done.err
    assert done.code == 0
    assert home.files() == before


def test_what_is_older_than_a_week_goes_when_a_newer_one_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    home = _home(tmp_path, f"backup: {{directory: {folder}, recipients: [{kept.FOR}]}}\n")
    folder.mkdir(0o700)
    now = datetime.now(UTC)
    old, young = (folder / names.of(now - timedelta(days=days)) for days in (8, 6))
    others = [folder / "mcpctl-old.tar.gz.age", folder / "shop-20200101T000000Z.tar.gz.age", folder / "notes"]
    for one in (old, young, *others, folder / ".mcpctl-20200101T000000Z.tar.gz.age.0123456789ab.tmp"):
        one.write_bytes(b"x")
    tokens_file = home.folder / "tokens.yaml"
    text = tokens_file.read_bytes()
    tokens_file.write_bytes(b"broken: [")
    assert home("backup").code == 3
    assert old.exists()  # the last good one, as far as anybody knows
    tokens_file.write_bytes(text)
    done = home("backup")
    path = Path(done.good.strip())
    assert f"removed, since it is older than backup.keep: {old}" in done.err
    assert sorted(folder.iterdir()) == sorted([path, young, *others])
    before = path.read_bytes()
    assert home("backup", str(path), "--recipient", kept.FOR).code == 5
    assert path.read_bytes() == before


def test_a_backup_waits_for_a_change_that_has_begun(tmp_path: Path) -> None:
    home = _home(tmp_path)
    file = tokens.token_file(home.folder / "tokens.yaml")
    with file.edit() as entries:
        done = in_background(kept.made, home, tmp_path / "b.age")
        name, text = tokens.mint()
        new = tokens.Token(name, None, tokens.CHEAP_ARGON2ID.hash(text), datetime.now(UTC), databases=("shop",))
        entries[name] = new
        assert done.runs
    done.result()
    assert kept.parts(tmp_path / "b.age")[0].tokens == 1


def test_what_cannot_be_written_is_no_backup() -> None:
    """The library keeps what goes wrong at its end to itself: nobody is told of a backup that is not there."""
    with open(os.open("/dev/full", os.O_WRONLY), "wb") as full:
        to = age.recipients([kept.FOR], "here")
        for size in (1, 10, 1 << 20):
            with pytest.raises(OSError, match="No space"), age.encrypting(to, full.fileno()) as sink:
                sink.write(b"x" * size)


def test_a_folder_that_others_can_write_to_gets_no_backup(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    os.chmod(folder, 0o777)  # noqa: S103
    with pytest.raises(ConfigError, match="can be written by anybody"):
        making.folder(folder / "in it")
    assert not (folder / "in it").exists()
