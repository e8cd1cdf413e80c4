"""mcpctl client-config --write: our entry in a client's own file, and nothing else changed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from command_line import Done, run
from mcpctl import jsonc
from mcpctl.cli import client_config, client_files
from mcpctl.errors import ConflictError, UsageError

URL = "https://mcp.example.org/mcp"
WRITTEN = ["claude-code", "claude-desktop", "cursor", "vscode", "codex", "gemini"]
SECRET = "sk-another-server's-own"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def written(home: Path, client: str, *more: str) -> Done:
    places = dict.fromkeys(("XDG_CONFIG_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR", "SUDO_USER"), "")
    return run("client-config", client, "--url", URL, "--write", *more, env={"HOME": str(home), **places}, cwd=home)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("client", WRITTEN)
def test_a_client_without_a_file_gets_one_of_its_users_alone_with_no_secret_in_it(home: Path, client: str) -> None:
    path = Path(written(home, client).good.removesuffix(" written\n"))
    assert path == client_files.place(client, home, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert URL in text
    assert client_config.PLACEHOLDER not in text
    assert sorted(files(home)) == [str(path.relative_to(home))]
    assert written(home, client).good == f"{path} has it already\n"
    assert path.read_text() == text


@pytest.mark.parametrize("client", [client for client in WRITTEN if client != "codex"])
def test_what_else_stands_in_json_stays_and_a_copy_is_kept(home: Path, client: str) -> None:
    path = client_files.place(client, home, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    before = f'{{\n\t// mine\n\t"mcpServers": {{"other": {{"env": {{"KEY": "{SECRET}"}}}}}},\n\t"theme": "dark",\n}}\n'
    path.write_text(before)
    path.chmod(0o640)
    shown = written(home, client, "--dry-run")
    assert path.read_text() == before
    assert "nothing was written" in shown.err
    assert f"+++ {path}" in shown.good
    assert SECRET not in shown.out  # it stands in the line that changes
    done = written(home, client)
    copy = path.with_name(path.name + client_files.COPY)
    assert str(copy) in done.err
    assert copy.read_text() == before
    assert {stat.S_IMODE(one.stat().st_mode) for one in (path, copy)} == {0o640}
    after = path.read_text()
    assert "\t// mine\n" in after
    assert '\t"theme": "dark",\n' in after
    assert SECRET in after
    assert set(jsonc.parse(after).value["mcpServers" if client != "vscode" else "servers"]) >= {"mcpctl"}


def test_toml_keeps_comments_and_other_tables_and_takes_the_old_entry_out(home: Path) -> None:
    path = home / ".codex" / "config.toml"
    path.parent.mkdir()
    path.write_text(
        'model = "x" # mine\n\n[mcp_servers.mcpctl]\nurl = "old"\n\n[mcp_servers.mcpctl.env] # old\nA = "1"\n\n'
        '# of another\n[mcp_servers.other] # it\ncommand = "c"\n'
    )
    assert written(home, "codex").code == 0
    text = path.read_text()
    assert text.startswith('model = "x" # mine\n\n[mcp_servers.mcpctl]\n')
    assert '# of another\n[mcp_servers.other] # it\ncommand = "c"\n' in text
    assert tomllib.loads(text)["mcp_servers"] == {
        "mcpctl": {"url": URL, "bearer_token_env_var": "MCP_TOKEN"}, "other": {"command": "c"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("client", "content"),
    [
        ("cursor", b'{"mcpServers": {'), ("cursor", b"[]"), ("cursor", b'{"mcpServers": 3}'), ("cursor", b"\xff\xfe{}"),
        ("codex", b"[mcp_servers"), ("codex", b'mcp_servers = {mcpctl = {url = "old"}}\n'),
        ("codex", b"mcp_servers = 1\n"),
        ("codex", b'text = """\n[mcp_servers.mcpctl]\n"""\n'), ("vscode", b'{"inputs": {}}'),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_or_has_another_form_is_left_alone(home: Path, client: str, content: bytes) -> None:
    path = client_files.place(client, home, {})
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    done = written(home, client)
    assert (done.code, done.out) == (3, "")
    assert "cannot be changed" in done.error
    assert files(home) == {str(path.relative_to(home)): content}


def test_a_link_is_followed_and_stays_one_and_a_folder_is_refused(home: Path) -> None:
    real = home / "dotfiles" / "cursor.json"
    real.parent.mkdir()
    real.write_text("{}\n")
    (home / ".cursor").mkdir()
    link = home / ".cursor" / "mcp.json"
    link.symlink_to("../dotfiles/cursor.json")
    assert written(home, "cursor").good == f"{real} written\n"
    assert link.is_symlink()
    assert URL in real.read_text()
    (home / "folder").mkdir()
    assert "no file that a client" in written(home, "cursor", "--file", str(home / "folder")).error
    (home / "file").touch()
    assert "cannot write" in written(home, "cursor", "--file", str(home / "file" / "below.json")).error


def test_another_file_can_be_named_and_what_changes_meanwhile_is_not_written_over(home: Path) -> None:
    named = home / "project" / ".mcp.json"
    assert written(home, "claude-code", "--file", str(named)).good == f"{named} written\n"
    assert json.loads(named.read_text())["mcpServers"]["mcpctl"]["headers"] == {"Authorization": "Bearer ${MCP_TOKEN}"}
    ours = client_files.ClientFile(named, "cursor", "mcpctl", client_config.CLIENTS["cursor"][1]("mcpctl", URL))
    named.write_text("{}")
    with pytest.raises(ConflictError, match="changed meanwhile"):
        ours.write()
    assert named.read_text() == "{}"


def test_each_system_has_its_own_places(home: Path) -> None:
    assert client_files.place("claude-desktop", home, {}, "darwin") == (
        home / "Library" / "Application Support" / "Claude" / "claude_desktop_config.json"
    )
    roaming = {"APPDATA": str(home / "Roaming")}
    assert client_files.place("vscode", home, roaming, "win32") == home / "Roaming" / "Code" / "User" / "mcp.json"
    assert client_files.place("vscode", home, {}, "linux") == home / ".config" / "Code" / "User" / "mcp.json"
    assert client_files.place("codex", home, {"CODEX_HOME": "/elsewhere"}, "linux") == Path("/elsewhere/config.toml")
    for client in ("chatgpt", "curl", "json"):
        with pytest.raises(UsageError):
            client_files.place(client, home, {})


def test_claude_desktop_is_started_with_this_python_and_no_token(home: Path) -> None:
    written(home, "claude-desktop")
    text = client_files.place("claude-desktop", home, {}).read_text()
    entry = json.loads(text)["mcpServers"]["mcpctl"]
    assert entry == {"command": sys.executable, "args": ["-P", "-m", "mcpctl", "connect", URL]}


def test_no_config_is_needed_where_the_url_is_said_and_a_url_in_clear_is_refused(home: Path) -> None:
    done = run("client-config", "chatgpt", "--url", URL, env={"HOME": str(home)})
    assert done.good == f"{URL}\n"
    assert "OAuth" in done.err
    refused = run("client-config", "cursor", "--url", "http://mcp.example.org/mcp", "--write", env={"HOME": str(home)})
    assert (refused.code, "not encrypted" in refused.error) == (2, True)
    refused = run("client-config", "cursor", "--url", f"{URL}?token=mcp_ab12cd34_{'x' * 43}_abc123", "--write")
    assert (refused.code, "no user, password or token" in refused.error) == (2, True)
    values = json.loads(written(home, "gemini", "--json").good)
    assert (values["changed"], values["file"]) == (True, str(home / ".gemini" / "settings.json"))
    assert files(home).keys() == {".gemini/settings.json"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_by_sudo_does_not_write_a_file_of_roots(home: Path) -> None:
    done = run("client-config", "cursor", "--url", URL, "--write", env={"HOME": str(home), "SUDO_USER": "alice"})
    assert (done.code, "as the one who uses the client" in done.error) == (2, True)
    assert files(home) == {}


_WITHOUT = """
import builtins, importlib, sys

real, absent = __import__, {"fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog", "uvloop", "readline"}

def as_on_windows(name, globals=None, *more):
    if name.partition(".")[0] in absent and str((globals or {}).get("__name__")).startswith("mcpctl"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *more)

builtins.__import__ = as_on_windows
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ok")
"""  # what libraries import, they know when


def test_what_a_desktop_runs_is_imported_without_the_modules_that_windows_lacks() -> None:
    """Bridge, stdio server, client-config and what they load on their way."""
    names = [
        "mcpctl.cli.main", "mcpctl.cli.connect", "mcpctl.cli.client_config", "mcpctl.cli.client_files",
        "mcpctl.cli.serve",
        "mcpctl.bridge.pump", "mcpctl.bridge.remote", "mcpctl.bridge.sign_in", "mcpctl.bridge.kept",
        "mcpctl.bridge.flow",
        "mcpctl.bridge.browser", "mcpctl.server.stdio", "mcpctl.server.run", "mcpctl.server.protocol", "mcpctl.config",
        "mcpctl.cli.init", "mcpctl.cli.token", "mcpctl.cli.user",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _WITHOUT, *names], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
