"""The compose file: what it sets is a config that a server takes, and so is what docs/containers.md has init make."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from command_line import run
from mcpctl import config

ROOT = Path(__file__).resolve().parent.parent


def services() -> dict[str, Any]:
    """Its services, with nothing set by who starts it."""
    text = (ROOT / "packaging" / "container" / "compose.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]
    return found


def test_what_it_sets_is_a_config_of_a_server_behind_the_door(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("databases: {shop: {host: 127.0.0.1, dbname: shop, user: a}}\n")
    path.chmod(0o600)
    found = config.load(path, services()["mcpctl"]["environment"])
    assert [str(one) for one in found.server.trusted_proxies] == ["127.0.0.1/32"]
    assert found.server.public_url == "https://localhost"


def test_its_postgresql_is_asked_for_tls_as_everywhere_off_the_machine(tmp_path: Path) -> None:
    assert "-cssl=on" in services()["postgres"]["command"]
    page = (ROOT / "docs" / "containers.md").read_text()
    (line,) = re.findall(r"mcpctl init /etc/mcpctl (--db-host postgres .*) > roles.sql", page)
    done = run("init", str(tmp_path / "new"), *shlex.split(line), "--no-check")
    assert "SCRAM-SHA-256$" in done.good
