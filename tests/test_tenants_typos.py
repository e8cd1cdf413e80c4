"""What a tenant's sysadmin is told: a typo in tenants.yaml by its name, and nothing of places that are others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Home

_MORE = "".join(f"  {one}: {{host: /nonexistent, dbname: {one}, roles: per_user}}\n" for one in ("globex", "spare"))
_GRANT = ("user", "grant", "bob", "--schema", "s", "--access", "read", "--database")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """globex has the database globex, and globex-ann a grant there."""
    found = Home(tmp_path / "home", _MORE)
    assert found("tenant", "add", "globex", "--database", "globex").code == 0
    for user in (("globex-ann", "--tenant", "globex"), ("bob",)):
        assert found("user", "add", *user).code == 0
    assert found("user", "grant", "globex-ann", "--database", "globex", "--access", "read").code == 0
    return found


def _mistyped(home: Home, right: str, wrong: str) -> None:
    path = home.folder / "tenants.yaml"
    path.write_text(path.read_text().replace(right, wrong))


def _failures(home: Home, check: str = "files") -> dict[str, str]:
    found = json.loads(home("doctor", "--json").out)["findings"]
    return {one["what"]: one["hint"] for one in found if (one["check"], one["status"]) == (check, "fail")}


def test_a_database_that_the_config_has_not_is_mended_in_the_file_first(home: Home) -> None:
    _mistyped(home, "database: globex", "database: globx")
    hint = _failures(home)["the tenant globex has the database globx, which is not in the config"]
    assert hint.startswith("mend the name in tenants.yaml; or")


def test_the_networks_of_a_tenant_are_noted_and_shown_and_one_that_is_none_makes_no_tenant(home: Home) -> None:
    wrong = home("tenant", "add", "acme", "--database", "spare", "--allow-ip", "10.1.0.1/16")
    assert (wrong.code, "--allow-ip takes an address or network" in wrong.error) == (2, True)
    networks = ("--allow-ip", "10.1.0.0/16", "--allow-ip", "2001:db8::/32")
    assert home("tenant", "add", "acme", "--database", "spare", *networks).code == 0
    assert home("tenant", "list").out.splitlines()[-1].endswith("\t10.1.0.0/16,2001:db8::/32")
    found = json.loads(home("tenant", "list", "--json").out)["tenants"]
    assert [one["allow_ips"] for one in found] == [None, ["10.1.0.0/16", "2001:db8::/32"]]


def test_a_limit_of_somebody_whom_there_is_not_is_told_as_a_typo(home: Home) -> None:
    right = "limits: {users: {named: {bob: {rate: 1}}}, tenants: {named: {globex: {rate: 1}}}}\n"
    before = home.config.read_text()
    home.config.write_text(before + right)
    assert "typo" not in home("config", "check").err
    home.config.write_text(before + right.replace("bob", "bop") + "# end\n")
    done = home("config", "check")
    assert (done.code, "limits.users.named names bop, and there is no such user" in done.err) == (0, True)


def test_a_tenant_of_another_name_takes_nobodys_grant_away(home: Home) -> None:
    _mistyped(home, "globex: {", "globx: {")
    said = _failures(home)
    assert list(said) == ["globex-ann belongs to the tenant globex, which is gone"]
    refused = home("config", "check")
    for hint in (*said.values(), refused.err):
        assert "mend the name in tenants.yaml, or put it back: mcpctl tenant add globex" in hint


def test_a_grant_outside_of_a_tenants_place_is_told_and_keeps_others_out(home: Home) -> None:
    assert _failures(home) == {}
    _mistyped(home, "database: globex", "database: spare")
    what = "globex-ann, of the tenant globex, has a grant in the database globex, which tenants.yaml does not give it"
    assert _failures(home)[what].startswith("mend tenants.yaml; where it is right: mcpctl user ungrant globex-ann")
    refused = home(*_GRANT, "globex")
    said = "globex-ann, of the tenant globex, has a grant in the database globex: is tenants.yaml right?"
    assert (refused.code, said in refused.error) == (5, True)
    _mistyped(home, "database: spare", "database: globex")
    assert home(*_GRANT, "spare").code == 0


def test_a_grant_outside_of_a_tenants_schema_keeps_others_out_of_that_schema(home: Home) -> None:
    assert home("tenant", "add", "north", "--database", "spare", "--schema", "north").code == 0
    assert home("user", "add", "nora", "--tenant", "north").code == 0
    assert home("user", "grant", "nora", "--database", "spare", "--access", "read").code == 0
    _mistyped(home, "schema: north", "schema: nroth")
    for schema, code in (("north", 5), ("public", 0)):
        done = home("user", "grant", "bob", "--database", "spare", "--schema", schema, "--access", "read")
        assert done.code == code, done.err
    assert any(one.startswith("nora, of the tenant north, has a grant in the schema north") for one in _failures(home))


def test_a_new_token_is_told_of_the_databases_alone_that_tenants_let_it_use(home: Home) -> None:
    home.config.write_text(home.config.read_text() + "limits: {connections: 10}\n")
    assert home("tenant", "add", "south", "--database", "spare", "--schema", "south").code == 0
    assert home("tenant", "add", "acme", "--database", "shop").code == 0
    made = home("token", "add", "--user", "globex-ann", "--expiry", "1d")
    assert "could want" not in made.err
    home.config.write_text(home.config.read_text().replace(_MORE, _MORE + "  open: {host: /x, roles: per_user}\n"))
    made = home("token", "add", "--user", "bob", "--expiry", "1d")
    assert "bob has no grant in open, so the token opens nothing there" in made.err


def test_doctor_shows_a_message_of_several_lines_as_one(home: Home) -> None:
    path = home.folder / "tenants.yaml"
    path.write_text("version: 1\ntenants:\n  a: {database: 5}\n  b: {database: 5}\n")
    (said,) = (line for line in home("doctor").out.splitlines() if line.startswith("fail\tfiles\t"))
    assert "tenants.yaml:3: a: database: is missing" in said
    assert f" {path}:4: b: database: is missing" in said
    assert "x0a" not in said


def test_where_a_tenant_has_all_of_a_database_nothing_is_outside_of_it(home: Home) -> None:
    refused = home("user", "grant", "bob", "--database", "globex", "--access", "read")
    assert refused.code == 5
    assert "mcpctl: hint: make a user who belongs to the tenant: user add --tenant\n" in refused.err


def test_a_rotated_token_s_limits_are_told_to_be_its_own(home: Home) -> None:
    old = json.loads(home("token", "add", "--user", "bob", "--expiry", "9d", "--json").good)["id"]
    with home.config.open("a") as file:
        file.write(f"limits: {{tokens: {{named: {{{old}: {{rate: 1}}}}}}}}\n")
    assert old not in home("config", "check").err
    done = home("token", "rotate", old, "--json")
    new = json.loads(done.out)["id"]
    assert f"limits.tokens.named names {old}: its successor {new} has no limits of its own" in done.err
    assert f"limits.tokens.named names {old}, and there is no such token" in home("config", "check").err
