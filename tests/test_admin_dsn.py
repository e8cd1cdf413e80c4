"""admin.dsn: whose login it is, and where it goes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import pg
from mcpctl.errors import ConfigError
from mcpctl.postgres import administrator
from place import Place, place


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("dsn") / "site", pg.oldest_and_newest()[-1]) as found:
        yield found


def test_a_line_is_for_one_database_or_for_all_others(tmp_path: Path) -> None:
    file = tmp_path / "admin.dsn"
    file.touch(0o600)
    file.write_text("# the administrator\n\nsales: host=a user=b\npostgresql://c@d/e\n")
    assert administrator.lines(file) == {"sales": (3, "host=a user=b"), "": (4, "postgresql://c@d/e")}
    faults = {
        "a: host=x\na: host=y\n": ":2: a second line for a",
        "secret-word\n": ":1: is no libpq",
        "a: host=h port=secret-word\n": ":1: its port is none",
        "host=a\nb: postgresql://c:secret-word@/\n": ":2: names no host; the config cannot say where",
    }
    for text, why in faults.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=why) as caught:
            administrator.lines(file)
        assert "secret-word" not in caught.value.message
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        administrator.lines(file)


def test_what_the_config_says_leads_the_administrator_nowhere(here: Place) -> None:
    """It may be the service user's: who listens where it leads could pass the login on, and what he likes with it."""
    config = here.config.read_text()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        moved = config.replace(f"host: {here.cluster.host}", "host: 127.0.0.1", 1).replace(
            f"port: {here.cluster.port}", f"port: {listening.getsockname()[1]}", 1
        )
        here.config.write_text(moved)
        try:
            for command in (
                ("user", "grant", "alice", "--database", "shop", "--access", "read", "--apply"),
                ("database", "harden", "shop", "--apply"),
            ):
                done = here.site.run(*command, check=False)
                told = "there is no administrator for the database shop"
                assert (done.returncode, told in done.stderr) == (4, True), done.stderr
                with pytest.raises(BlockingIOError):
                    listening.accept()
        finally:
            here.config.write_text(config)


def test_a_line_for_a_database_that_the_config_has_not_is_a_fault(here: Place) -> None:
    file = here.folder / "admin.dsn"
    before = file.read_text()
    file.write_text(f"{before}# a typo\nshopp: host=a user=postgres\n")
    try:
        done = here.site.run("grant", "diff", check=False)
    finally:
        file.write_text(before)
    told = f"{file}:{before.count(chr(10)) + 2}: there is no database shopp in the config"
    assert (done.returncode, told in done.stderr) == (3, True), done.stderr
