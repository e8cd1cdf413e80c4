"""Man pages and shell completion know what the program knows."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_reference import COMMANDS, KEYS, once, options

ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manual", ROOT / "packaging" / "manual.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def share(manual: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was written, below a prefix."""
    folder = tmp_path_factory.mktemp("prefix")
    manual.write(folder)
    return folder / "share"


def needs(program: str) -> Any:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program} here")


def plain(page: Path) -> str:
    """A page's text, without what roff makes of it."""
    return re.sub(r"\\f[BRI]", "", page.read_text()).replace("\\-", "-").replace("\\e", "\\")


def test_every_command_and_every_option_of_it_has_its_place_in_a_man_page(share: Path) -> None:
    for path, command in COMMANDS.items():
        text = plain(share / "man" / "man1" / f"{'-'.join(('mcpctl', *path[:1]))}.1")
        part = text
        if len(path) == 2:
            part = text.partition(f".SS mcpctl {' '.join(path)}\n")[2].partition("\n.S")[0]
        assert " ".join((command.help or "").split())[:40] in " ".join(part.split()), path
        shown = re.findall(r"^\.TP\n(.*)", part, re.MULTILINE)
        for option in [] if hasattr(command, "commands") and path else options(command):
            assert any(set(option.opts) <= set(re.split(r"[, ]+", name)) for name in shown), (path, option.opts)


def test_every_key_of_the_config_stands_in_its_man_page_with_what_it_takes(share: Path) -> None:
    text = plain(share / "man" / "man5" / "mcpctl.yaml.5")
    shown = re.findall(r"^\.TP\n(.*)\n(?=(?:.*\n)*?.*Takes)", text, re.MULTILINE)
    assert set(KEYS) == {once(key) for key in shown if "/" not in key}


def test_a_page_made_again_for_the_same_date_is_the_same(manual: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795896206")
    assert manual.pages() == manual.pages()
    assert '"2026-11-28"' in manual.pages()["man1/mcpctl.1"]


@needs("man")
def test_man_has_nothing_to_say_against_a_page(share: Path) -> None:
    for page in sorted(share.glob("man/*/*")):
        done = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", page],
            env={"PATH": PATH, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MANROFFSEQ": ""},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), page


@needs("mandoc")
def test_mandoc_has_nothing_to_say_against_a_page(share: Path) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *share.glob("man/*/*")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_completes_commands_and_options(share: Path) -> None:
    def completed(*words: str) -> list[str]:
        script = f"source {share}/bash-completion/completions/mcpctl; COMP_WORDS=({' '.join(words)}); "
        script += f"COMP_CWORD={len(words) - 1}; _mcpctl_completion mcpctl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(
            ["bash", "--norc", "-c", script], env={"PATH": PATH}, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("mcpctl", "toke") == ["token"]
    assert completed("mcpctl", "token", "re") == ["revoke", "remove"]
    assert completed("mcpctl", "token", "add", "--exp") == ["--expiry"]


@needs("fish")
def test_fish_completes_commands_and_options(share: Path, tmp_path: Path) -> None:
    script = f"source {share}/fish/vendor_completions.d/mcpctl.fish; complete -C 'mcpctl token re'; "
    script += "complete -C 'mcpctl token add --exp'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        env={"PATH": PATH, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["remove", "revoke", "--expiry"]


@needs("zsh")
def test_zsh_completes_at_the_first_tab(share: Path, tmp_path: Path) -> None:
    folder = share / "zsh" / "site-functions"
    begin = f"PS1=; fpath=({folder} $fpath); autoload -U compinit; compinit -u -d {tmp_path}/dump; echo be''gin\n"
    terminal, shells = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"],
        env={"PATH": PATH, "TERM": "dumb", "HOME": "/"},
        stdin=shells,
        stdout=shells,
        stderr=shells,
        start_new_session=True,
    )
    try:
        os.write(terminal, begin.encode())
        assert read_until(terminal, "begin\r\n")
        os.write(terminal, b"mcpctl token rev\t")
        assert read_until(terminal, "revoke")
    finally:
        shell.kill()
        shell.wait()
        os.close(shells)
        os.close(terminal)


def read_until(terminal: int, wanted: str, seconds: float = 60) -> bool:
    """Whether a terminal shows this in time."""
    shown, end = "", time.monotonic() + seconds
    while wanted not in shown:
        if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            raise AssertionError(shown)
        shown += os.read(terminal, 4096).decode(errors="replace")
    return True
