"""Builds the desktop bundle, dist/mcpctl-VERSION.mcpb, and with a place to publish it the registry's dist/server.json.

    build.py [--namespace io.github.NAME --download URL]

The bundle is a zip of the manifest, this source and a pyproject.toml with the dependencies of `mcpctl connect`, which
the host installs with uv (MCPB manifest specification 0.4, "UV Runtime"): one file for macOS, Windows and Linux. The
same source makes the same bytes. `--namespace` is yours in the registry, `--download` the folder of the bundle.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCHEMA = "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json"
_BEGINNING = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can hold."""
NEEDED = ("cryptography", "httpx2", "mcp", "rich", "typer")
"""What the bridge imports; the rest is the server's."""
_NAMESPACE = re.compile(r"[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)+")


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def contents(about: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file of the bundle by its name."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    manifest["version"] = about["version"]
    known = {re.match(r"[A-Za-z0-9_-]+", one)[0]: one for one in about["dependencies"]}  # type: ignore[index]
    wanted = [*(known[name] for name in NEEDED), *about["optional-dependencies"]["keyring"]]
    listed = "".join(f"  {json.dumps(one)},\n" for one in wanted)
    pyproject = (
        f'[project]\nname = "mcpctl-bundle"\nversion = "{about["version"]}"\n'
        f'requires-python = "{about["requires-python"]}"\ndependencies = [\n{listed}]\n\n[tool.uv]\npackage = false\n'
    )
    found = {
        "manifest.json": json.dumps(manifest, indent=2).encode() + b"\n",
        "pyproject.toml": pyproject.encode(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
        "src/bundle.py": (HERE / "bundle.py").read_bytes(),
    }
    source = ROOT / "src"
    for path in sorted((source / "mcpctl").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found[f"src/{path.relative_to(source).as_posix()}"] = path.read_bytes()
    return found


def build(folder: Path) -> Path:
    """Write the bundle into a folder; its path."""
    about = project()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mcpctl-{about['version']}.mcpb"
    beside = path.with_name(path.name + ".new")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in contents(about).items():
            entry = zipfile.ZipInfo(name, _BEGINNING)
            entry.external_attr = 0o100644 << 16
            bundle.writestr(entry, data, zipfile.ZIP_DEFLATED)
    beside.replace(path)
    return path


def registry(bundle: Path, namespace: str, download: str) -> dict[str, Any]:
    """What the MCP registry is told of the bundle (server.json, schema of 2025-12-11)."""
    if not _NAMESPACE.fullmatch(namespace):
        raise SystemExit(f"--namespace {namespace} is no name turned round, such as io.github.NAME")
    if not download.startswith("https://"):
        raise SystemExit("--download takes an https:// URL")
    about = project()
    return {
        "$schema": SCHEMA,
        "name": f"{namespace}/mcpctl",
        "title": "mcpctl",
        "description": "Ask your team's PostgreSQL through its mcpctl server: own login roles, limits, audit log",
        "version": about["version"],
        "packages": [
            {
                "registryType": "mcpb",
                "identifier": f"{download.rstrip('/')}/{bundle.name}",
                "fileSha256": hashlib.sha256(bundle.read_bytes()).hexdigest(),
                "transport": {"type": "stdio"},
            }
        ],
    }


def main() -> None:
    """Build, and print what was written."""
    parser = argparse.ArgumentParser(description="Build the desktop bundle.")
    parser.add_argument("--namespace", help="yours in the MCP registry, such as io.github.NAME")
    parser.add_argument("--download", help="where the bundle will be: an https:// URL of a folder")
    given = parser.parse_args()
    if (given.namespace is None) != (given.download is None):
        parser.error("--namespace and --download go together")
    bundle = build(ROOT / "dist")
    sys.stdout.write(f"{bundle}\n")
    if given.namespace is not None:
        told = bundle.with_name("server.json")
        told.write_text(
            json.dumps(registry(bundle, given.namespace, given.download), indent=2) + "\n", encoding="utf-8"
        )
        sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main()
