"""mcpctl user onboard: all of it, or nothing, or what stays and how to go on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mcpctl.identity import tokens
from mcpctl.identity.users import User
from mcpctl.postgres.embedded import Binaries
from place import Place, place
from site_of_mcpctl import COMMAND, environment


@pytest.fixture(scope="module")
def here(newest: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("onboard") / "site", newest) as found:
        yield found


def onboard(here: Place, user: str, *more: str) -> CompletedProcess[str]:
    wanted = ("--expiry", "1d", *(() if "--database" in more else ("--database", "shop")))
    return here.site.run("user", "onboard", user, *wanted, *more, check=False)


def people(here: Place) -> Mapping[str, User]:
    return here.users.current()


def made(here: Place) -> tuple[object, ...]:
    """All that a command could have left."""
    known = tokens.token_file(here.folder / "tokens.yaml").current()
    return dict(people(here)), dict(known), here.catalog()["roles"], sorted(here.folder.parent.rglob("*.token"))


def test_onboard_makes_all_of_it_and_names_no_step_that_it_has_done(here: Place) -> None:
    done = onboard(here, "ada", "--table", "public.orders", "--client", "cursor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mcp_")
    assert "ada added" in done.stderr
    assert "ada is on board" in done.stderr
    assert "next:" not in done.stderr
    grant = here.recorded("ada")
    assert grant is not None
    assert (grant.read, grant.state) == (("public.orders",), None)


@pytest.mark.parametrize(
    "more, code",
    [
        (("--schema", "nowhere"), 4),
        (("--table", "public.nothing"), 4),
        (("--schema", "Public"), 2),
        (("--database", "none"), 4),
        (("--client", "netscape"), 4),
        (("--role", "nobody"), 4),
        (("--tenant", "nowhere"), 4),
        (("--access", "admin"), 2),
        (("--expiry", "yesterday"), 2),
        (("--out", "no/such/folder/x.token"), 3),
    ],
)
def test_what_is_wrong_leaves_nothing(here: Place, more: tuple[str, ...], code: int, tmp_path: Path) -> None:
    before = made(here)
    done = onboard(here, "eve", *(str(tmp_path / one) if one.endswith(".token") else one for one in more))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert made(here) == before


def test_the_token_s_file_is_named_as_it_is_called(here: Place, tmp_path: Path) -> None:
    out = tmp_path / "my own.token"
    done = onboard(here, "moe", "--schema", "public", "--out", str(out))
    assert f"""the token: export MCP_TOKEN="$(cat '{out}')"\n""" in done.stderr
    assert "that `token add --out FILE` wrote" in onboard(here, "max", "--schema", "public").stderr


def test_the_command_that_opens_something_to_a_token_names_the_config(here: Place) -> None:
    here.add("kim")
    done = here.site.run("token", "add", "--user", "kim", "--expiry", "1d")
    command = f"mcpctl user grant kim --database shop --access read --apply --config {here.config}"
    assert f"mcpctl: hint: {command}\n" in done.stderr


def test_the_url_is_named_where_the_config_does_not_know_it(here: Place) -> None:
    before = here.config.read_text()
    here.config.write_text(before + "server: {port: 0}\n")
    try:
        done = onboard(here, "zoe")
        assert (done.returncode, done.stdout) == (2, "")
        assert "say --url" in done.stderr
        done = onboard(here, "zoe", "--url", "http://127.0.0.1:4711/mcp")
    finally:
        here.config.write_text(before)
    assert done.returncode == 0, done.stderr
    assert '"url": "http://127.0.0.1:4711/mcp"' in done.stderr


def test_a_folder_where_no_file_can_be_made_is_found_before_anything_is(here: Place, tmp_path: Path) -> None:
    before = (here.folder / "audit.jsonl").read_bytes()
    done = onboard(here, "eve", "--out", str(tmp_path / "no" / "eve.token"))
    assert done.returncode == 3
    assert "eve.token" in done.stderr
    assert (here.folder / "audit.jsonl").read_bytes() == before
    assert onboard(here, "eve", "--out", str(tmp_path / "eve.token")).returncode == 0
    assert (tmp_path / "eve.token").read_text().startswith("mcp_")


def test_a_user_who_was_there_before_stays_when_the_grant_fails(here: Place) -> None:
    here.add("old")
    before = made(here)
    done = onboard(here, "old", "--schema", "nowhere")
    assert done.returncode == 4
    assert "taken out" not in done.stderr
    assert made(here) == before
    here.site.run("user", "disable", "old")
    assert onboard(here, "old", "--schema", "public").returncode == 5
    assert here.recorded("old") is None


def test_what_fails_after_the_grant_says_what_stays_and_can_be_run_again(here: Place) -> None:
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, "--config", str(here.config), "user", "onboard", "ida", "--database", "shop"]
        done = subprocess.run(
            [*command, "--schema", "public", "--expiry", "1d"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment(), check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "could not be handed over" in done.stderr
    assert "ida and what is granted stay; when that is mended, the same command goes on from there" in done.stderr
    again = onboard(here, "ida", "--schema", "public")
    assert (again.returncode, again.stdout[:4]) == (0, "mcp_")


def test_a_file_that_is_there_already_is_a_conflict_as_with_token_add(here: Place, tmp_path: Path) -> None:
    out = tmp_path / "there.token"
    out.write_text("kept")
    before = made(here)
    done = onboard(here, "eve", "--out", str(out))
    assert (done.returncode, made(here), out.read_text()) == (5, before, "kept"), done.stderr
    added = here.site.run("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(out), check=False)
    assert added.returncode == 5


def test_write_access_that_no_role_uses_is_told_with_the_command_that_mends_it(here: Place) -> None:
    done = onboard(here, "una", "--table", "public.orders", "--access", "write")
    assert done.returncode == 0, done.stderr
    warning = "mcpctl: warning: una may not write yet: the role mcp-user has not the permission tools:execute_statement"
    assert warning in done.stderr
    mends = f"mcpctl user roles una mcp-tools --config {here.config}"
    assert f"mcpctl: hint: {mends}\n" in done.stderr
    here.site.run(*mends.split()[1:])
    grant = ("user", "grant", "una", "--database", "shop", "--table", "public.orders", "--access", "write")
    assert "may not write yet" not in here.site.run(*grant).stderr
    assert "may not write yet" not in onboard(here, "uno", "--access", "write", "--role", "mcp-tools").stderr
    with here.config.open("a") as file:
        file.write("auth: {read_only_users: [una], roles: {own: {permissions: [tools:whoami]}}}\n")
    assert "hint: take una out of auth.read_only_users, and: " in here.site.run(*grant).stderr
    here.site.run("user", "roles", "una", "own")
    assert "mcpctl user roles una own mcp-tools" in here.site.run(*grant).stderr
