"""What the Debian package is built from fits together. packaging/try-debian.sh tries the package itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
SCRIPTS = [PACKAGING / "lock", PACKAGING / "try-debian.sh", PACKAGING / "deb" / "build"]
MAINTAINERS = [PACKAGING / "deb" / name for name in ("preinst", "postinst", "prerm", "postrm")]


def locked() -> dict[str, str]:
    """The versions of requirements.lock by name."""
    text = (PACKAGING / "requirements.lock").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", text, re.MULTILINE))


def test_the_lock_has_a_version_that_fits_for_all_that_a_server_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [one for name in extras.keys() - {"demo", "keyring"} for one in extras[name]]
    versions = locked()
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in versions, f"{name}: run packaging/lock"
        assert requirement.specifier.contains(versions[name]), f"{name} {versions[name]}: run packaging/lock"


def test_every_version_in_the_lock_comes_with_hashes() -> None:
    text = (PACKAGING / "requirements.lock").read_text()
    parts = re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(parts) == len(locked())
    assert all("--hash=sha256:" in part for part in parts)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_can_be_run_as_it_comes(script: Path) -> None:
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_has_nothing_to_say_against_a_script() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS, *MAINTAINERS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("asked", ["", "audit\nbackups\n", "# both\n", "audit, everything\n"])
def test_a_purge_keeps_both_for_no_word_both_words_and_words_that_are_neither(tmp_path: Path, asked: str) -> None:
    assert kept(tmp_path, asked) == "audit backups"


def test_a_purge_keeps_what_one_word_says_and_without_the_file_nothing(tmp_path: Path) -> None:
    assert kept(tmp_path, "backups\n") == "backups"
    assert kept(tmp_path, "# why\naudit") == "audit"
    assert kept(tmp_path, None) == ""


def kept(folder: Path, asked: str | None) -> str:
    """What postrm makes of the administrator's file."""
    if asked is not None:
        (folder / "keep-on-purge").write_text(asked)
    else:
        (folder / "keep-on-purge").unlink(missing_ok=True)
    function = re.search(r"^kept\(\) \{.*?^\}", (PACKAGING / "deb" / "postrm").read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None
    script = f"set -e; CONFIG={folder}; {function[0]}; kept"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_a_purge_puts_a_log_beside_the_config_over_no_newer_one(tmp_path: Path) -> None:
    system(tmp_path)
    (tmp_path / "etc/mcpctl/audit.jsonl").write_text("older")
    (tmp_path / "var/log/mcpctl/audit.jsonl").write_text("newer")
    purge(tmp_path)
    (place,) = (tmp_path / "var/log/mcpctl").iterdir()
    assert (place / "audit.jsonl").read_text() == "newer"
    assert (place / "audit.key").exists()
    assert (place / "config/audit.jsonl").read_text() == "older"


def test_a_purge_means_what_a_link_in_a_folders_place_leads_to(tmp_path: Path) -> None:
    system(tmp_path)
    for name in ("var/log/mcpctl", "var/lib/mcpctl"):
        elsewhere = tmp_path / "elsewhere" / name
        elsewhere.parent.mkdir(parents=True)
        (tmp_path / name).rename(elsewhere)
        (tmp_path / name).symlink_to(elsewhere)
    (tmp_path / "var/log/mcpctl/audit.jsonl").write_text("a line")
    purge(tmp_path)
    (place,) = (tmp_path / "elsewhere/var/log/mcpctl").iterdir()
    assert (place / "audit.jsonl").exists()
    assert f"-R --no-dereference root:root {place.parent}\n" in (tmp_path / "given").read_text()
    assert not (tmp_path / "elsewhere/var/lib/mcpctl").exists()
    assert not (tmp_path / "var/lib/mcpctl").is_symlink()
    assert not (tmp_path / "etc/mcpctl").exists()


def test_a_folder_that_stays_is_left_to_no_later_user(tmp_path: Path) -> None:
    system(tmp_path)
    (tmp_path / "etc/mcpctl/keep-on-purge").unlink()
    (tmp_path / "var/log/mcpctl/purged-20260101T000000Z").mkdir()
    purge(tmp_path)
    assert (tmp_path / "given").read_text() == f"chown root:root {tmp_path}/var/log/mcpctl\n"


@pytest.mark.parametrize(("number", "taken"), [(105, True), (1001, False)])
def test_a_purge_takes_away_the_systems_user_and_no_person(tmp_path: Path, number: int, taken: bool) -> None:
    system(tmp_path)
    purge(tmp_path, f"mcpctl:x:{number}:{number}::/:/bin/sh")
    said = (tmp_path / "given").read_text()
    assert ("userdel mcpctl" in said, "groupdel mcpctl" in said) == (taken, taken)


def system(root: Path) -> None:
    """The folders as an installation has them, with a key, a state and the file that asks to keep."""
    for name in ("etc/mcpctl", "var/lib/mcpctl", "var/log/mcpctl", "var/backups/mcpctl"):
        (root / name).mkdir(parents=True)
    for name in ("etc/mcpctl/audit.key", "etc/mcpctl/keep-on-purge", "var/lib/mcpctl/state.db"):
        (root / name).touch()


def purge(root: Path, entry: str = "") -> None:
    """Run postrm, for a system in this folder, where users and groups have this entry. What concerns users and systemd
    is done by nobody; `given` says what would be."""
    script = re.sub(r"(?<=[ =])/(?=(etc|var|run)/)", f"{root}/", (PACKAGING / "deb" / "postrm").read_text())
    stubs = f"getent() {{ echo '{entry}'; }}; systemctl() {{ :; }}; deluser() {{ false; }}; delgroup() {{ false; }};"
    for name in ("chown", "userdel", "groupdel"):
        stubs += f'{name}() {{ echo {name} "$@" >>{root}/given; }};'
    subprocess.run(["sh", "-c", f"{stubs}{script}", "postrm", "purge"], check=True, capture_output=True)
