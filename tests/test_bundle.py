"""The desktop bundle: what is in it, and that what its manifest starts answers a question."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mcpctl import __version__

ROOT = Path(__file__).parent.parent


def loaded(name: str) -> ModuleType:
    about = importlib.util.spec_from_file_location(name, ROOT / "packaging" / "mcpb" / f"{name}.py")
    assert about is not None
    assert about.loader is not None
    found = importlib.util.module_from_spec(about)
    about.loader.exec_module(found)
    return found


build, bundle = loaded("build"), loaded("bundle")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    path = build.build(folder)
    assert path.name == f"mcpctl-{__version__}.mcpb"
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_the_same_source_makes_the_same_bundle(tmp_path: Path) -> None:
    one, two = build.build(tmp_path / "one"), build.build(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert [path.name for path in one.parent.iterdir()] == [one.name]


def test_the_manifest_has_the_version_and_keeps_the_token_out_of_the_command_line(unpacked: Path) -> None:
    manifest: dict[str, Any] = json.loads((unpacked / "manifest.json").read_text())
    assert (manifest["manifest_version"], manifest["version"]) == ("0.4", __version__)
    started = manifest["server"]["mcp_config"]
    assert (unpacked / manifest["server"]["entry_point"]).is_file()
    assert manifest["server"]["entry_point"] in started["args"]
    used = set(re.findall(r"\$\{user_config\.(\w+)\}", json.dumps(started)))
    assert used == manifest["user_config"].keys()
    assert "token" not in json.dumps(started["args"])
    assert started["env"] == {"MCPCTL_TOKEN": "${user_config.token}"}
    assert manifest["user_config"]["token"]["sensitive"] is True
    assert "demo" not in (unpacked / "pyproject.toml").read_text()


_BRIDGE = """
import builtins, sys
real, allowed = __import__, set(sys.argv.pop(1).split(","))

def only(name, globals=None, *more):
    top = name.partition(".")[0]
    asks = str((globals or {}).get("__name__")).partition(".")[0]
    if asks == "mcpctl" and top not in allowed and top not in sys.stdlib_module_names:
        raise ModuleNotFoundError(f"{name} is not in the bundle's dependencies", name=name)
    return real(name, globals, *more)

builtins.__import__ = only
import mcpctl.cli.connect, mcpctl.cli.main
for one in ("address", "browser", "credentials", "flow", "kept", "message", "pump", "remote", "sign_in"):
    __import__(f"mcpctl.bridge.{one}")
print(mcpctl.__file__)
"""


def test_the_bridge_imports_nothing_that_the_bundle_does_not_install(unpacked: Path) -> None:
    listed = re.findall(r'^  "([A-Za-z0-9_-]+)', (unpacked / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed == [*build.NEEDED, "keyring"]
    allowed = ",".join([*listed, "mcpctl", "mcp_types", "pydantic", "anyio"])  # the last three come with mcp
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(unpacked / 'src')!r})\n{_BRIDGE}", allowed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(unpacked)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["https://a.example/mcp"], ["connect", "--", "https://a.example/mcp"]),
        ([" https://a.example/mcp ", "${user_config.ca_file}"], ["connect", "--", "https://a.example/mcp"]),
        (["https://a.example/mcp", ""], ["connect", "--", "https://a.example/mcp"]),
        (["--sign-out", "/ca.pem"], ["connect", "--ca-file=/ca.pem", "--", "--sign-out"]),
    ],
)
def test_what_the_user_typed_is_a_url_and_no_option(given: list[str], wanted: list[str]) -> None:
    assert bundle.arguments(*given) == wanted


def test_what_the_manifest_starts_answers_a_question(unpacked: Path, live: Any) -> None:
    """As a host does, but with this Python for `uv run --directory FOLDER`; packaging/try-bundle.sh has uv."""
    manifest = json.loads((unpacked / "manifest.json").read_text())
    said = {"__dirname": str(unpacked), "user_config.url": live.url, "user_config.token": live.token}

    def filled(text: str) -> str:
        for name, value in said.items():
            text = text.replace(f"${{{name}}}", value)
        return text

    started = manifest["server"]["mcp_config"]
    command = [filled(one) for one in (started["command"], *started["args"])]
    assert command[:4] == ["uv", "run", "--directory", str(unpacked)]
    call = {"name": "query_database", "arguments": {"query": "select 41 + 1"}}
    version = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "host", "version": "1"}}
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(unpacked),
        **{key: filled(text) for key, text in started["env"].items()},
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command[4:]], cwd=unpacked, env=env, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        def ask(number: int, method: str, params: dict[str, Any]) -> Any:
            message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            assert answer["id"] == number
            return answer["result"]

        assert ask(1, "initialize", version)["serverInfo"]["name"] == "mcpctl"
        assert ask(2, "tools/call", call)["structuredContent"]["rows"] == [[42]]
        process.stdin.close()
        assert live.token not in process.stderr.read()
    assert process.returncode == 0


def test_the_registry_is_told_where_the_bundle_is_and_its_hash(tmp_path: Path) -> None:
    """The schema itself is not here; what it asks of an MCPB package is: server.json of 2025-12-11."""
    made = build.build(tmp_path)
    told = build.registry(made, "io.github.example", "https://github.com/example/mcpctl/releases/download/v1/")
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", told["name"])
    assert 1 <= len(told["description"]) <= 100
    package = told["packages"][0]
    assert package["identifier"] == f"https://github.com/example/mcpctl/releases/download/v1/{made.name}"
    assert re.fullmatch(r"[a-f0-9]{64}", package["fileSha256"])
    assert (package["registryType"], package["transport"]) == ("mcpb", {"type": "stdio"})
    for namespace, place in (("example", "https://a.example"), ("io.github.x", "http://a.example")):
        with pytest.raises(SystemExit):
            build.registry(made, namespace, place)
