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


def test_what_a_dba_is_to_take_back_is_seen_to_be_gone_by_whoever_can_log_in(here: Place) -> None:
    """A role that is gone is refused with the same words as one whose password somebody has changed."""
    (here.folder / "admin.dsn").rename(here.folder / "aside")

    def run(*command: str, code: int = 0) -> str:
        done = here.site.run(*command, check=False)
        assert done.returncode == code, done
        return done.stdout + " ".join(done.stderr.split())

    def grant(user: str) -> None:
        wanted = ("--database", "other", "--schema", "public", "--access", "read")
        here.psql(here.site.run("user", "grant", user, *wanted).stdout, "other")
        assert f"{user} in other: confirmed" in run("grant", "diff", "--user", user)

    ungrant = ("user", "ungrant", "alice", "--database", "other")
    try:
        grant("alice")
        here.do("ALTER ROLE mcp_alice_r PASSWORD 'mine'")
        script = here.site.run(*ungrant).stdout
        unseen = "nobody can log in there and look; `mcpctl user ungrant … --done` where the DBA has run the SQL"
        assert unseen in run("grant", "diff", "--user", "alice", code=1)
        grant("bob")
        assert "no read access is recorded" in run("grant", "diff", "--user", "alice", code=1)
        assert "it is not so in PostgreSQL: mcp_alice_r: has rights here" in run(*ungrant, "--done", code=1)
        here.psql(script, "other")
        assert "alice in other: confirmed" in run("grant", "diff", "--user", "alice")
        assert here.query("SELECT FROM pg_roles WHERE rolname ~ '^mcp_alice'") == []
        here.psql(here.site.run("user", "ungrant", "bob", "--database", "other").stdout, "other")
        assert unseen in run("grant", "diff", code=1)
        assert run(*ungrant[:2], "bob", *ungrant[3:], "--done") == "bob in other: nothing\n"
        assert "agree" in run("grant", "diff")
        assert "is being taken back as a whole" in run(*ungrant, "--done", code=2)
    finally:
        (here.folder / "aside").rename(here.folder / "admin.dsn")


def test_a_name_that_is_not_granted_cannot_be_taken_back_while_another_is_to_be_granted(here: Place) -> None:
    here.site.run("user", "grant", "bob", "--database", "shop", "--table", "public.customers", "--access", "read")
    done = here.site.run(
        "user", "ungrant", "bob", "--database", "shop", "--table", "public.custmers", "--apply", check=False
    )
    assert (done.returncode, "bob has no grant on public.custmers in shop" in done.stderr) == (2, True)
    assert here.query("SELECT FROM pg_roles WHERE rolname ~ '^mcp_bob'") == []
    here.ungrant("bob")
