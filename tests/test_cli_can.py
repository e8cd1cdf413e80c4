"""mcpctl can and who-can on the command line: exit codes, the chain's words, and what they say of what there is not."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import site_of_mcpctl as site
from mcpctl.identity import tokens, users
from mcpctl.identity.grants import Grant
from mcpctl.identity.links import Link
from mcpctl.keyring import Keyring
from site_of_mcpctl import Shop, Site


@dataclass
class House:
    """A site with nora, who reads a schema and writes a table of it, otto, who only reads, and pia, who has nothing."""

    at: Site
    nora: str
    narrow: str
    service: str


@pytest.fixture(scope="session")
def house(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> House:
    with login_shop.admin() as admin:
        admin.execute(
            "CREATE SCHEMA house; CREATE TABLE house.rooms (id int, name text); CREATE TABLE house.keys (id int);"
            'CREATE TABLE house."Odd name" (id int); CREATE TABLE house.ruled (id int); CREATE SCHEMA cellar;'
            "CREATE TABLE cellar.wine (id int); ALTER TABLE house.ruled ENABLE ROW LEVEL SECURITY;"
            "CREATE TABLE house.some (id int); ALTER TABLE house.some ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY small ON house.some USING (id < 10)"
        )
    cluster = login_shop.cluster
    service = f"    service_dsn: postgresql://{site.READER}@/shop?host={cluster.host}&port={cluster.port}\n"
    folder = tmp_path_factory.mktemp("house") / "site"
    at = Site(folder, login_shop, per_user=True, database=service + "    service_password_file: shop.password\n")
    at.user("nora", "mcp-tools")
    at.user("otto", "mcp-tools")
    at.user("pia")
    at.grant("nora", "--schema", "house")
    at.grant("nora", "--table", "house.rooms", access="write")
    at.grant("otto", "--schema", "house")
    return House(
        at, at.token("nora")[0], at.token("nora", permissions=("tools:whoami",))[0], at.token(None)[0]
    )  # fmt: skip


def _can(house: House, *arguments: str) -> tuple[int, list[list[str]]]:
    """(exit code, the lines of the chain); the first line is yes or no."""
    done = house.at.run("can", *arguments, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, [line.split("\t") for line in done.stdout.splitlines()]


def test_a_yes_exits_0_and_tells_each_link_from_the_token_to_the_limits(house: House) -> None:
    code, [word, *chain] = _can(house, "nora", "select", "house.rooms")
    assert (code, word) == (0, ["yes"])
    assert all(link[1] == "yes" for link in chain)
    links = {link[0]: link[2] for link in chain}
    assert list(dict.fromkeys(link[0] for link in chain)) == [
        "token", "user", "tools:query_database", "databases:shop:read", "grant", "login role", "postgresql",
        "row security", "limits",
    ]  # fmt: skip
    assert links["token"].startswith("any of the user's tokens (2 living: ")
    assert links["user"] == "nora is there, and not disabled"
    assert links["tools:query_database"] == "the role mcp-tools has tools:query_database"
    assert links["databases:shop:read"] == "the role mcp-tools has databases:*:read"
    assert links["grant"] == "users.yaml: read house, house.rooms in shop"
    assert links["login role"] == "mcp_nora_r"
    assert ["postgresql", "yes", "has_schema_privilege(house, USAGE) = yes"] in chain
    assert ["postgresql", "yes", "has_table_privilege(house.rooms, SELECT) = yes"] in chain
    assert links["row security"] == "none: every row"
    assert links["limits"] == "1000 rows, 1048576 bytes and 30 s a call, 4 connections a token"


@pytest.mark.parametrize(
    "arguments, link, why",
    [
        (("nora", "select", "cellar.wine"), "postgresql", "has_schema_privilege(cellar, USAGE) = no"),
        (("nora", "update", "house.keys"), "postgresql", "has_table_privilege(house.keys, UPDATE) = no"),
        (("otto", "insert", "house.rooms"), "grant", "you have no write access in 'shop'"),
        (("pia", "select", "house.rooms"), "grant", "you have no read access in 'shop'"),
        (("pia", "delete", "house.rooms"), "tools:execute_statement", "the role mcp-user has not the permission"),
        (("pia", "call", "execute_statement"), "tools:execute_statement", "the role mcp-user has not"),
        (("pia", "call", "query_database"), "grant", "you have no read access in 'shop'"),
    ],
)
def test_a_no_exits_1_and_ends_with_the_link_that_says_it(
    house: House, arguments: tuple[str, ...], link: str, why: str
) -> None:
    code, [word, *chain] = _can(house, *arguments)
    assert (code, word) == (1, ["no"])
    [*before, refusing] = chain
    assert {one[1] for one in before} == {"yes"}
    assert refusing[1] == "no"
    assert refusing[0] == link
    assert why in refusing[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("nora", "insert", "house.rooms"),
        ("nora", "UPDATE", "house.rooms"),
        ("nora", "delete", "house.rooms"),
        ("nora", "select", 'house."Odd name"'),
        ("nora", "call", "execute_statement"),
        ("nora", "call", "whoami"),
        ("pia", "call", "list_databases"),
        ("nora", "select", "house.rooms", "--database", "shop"),
    ],
)
def test_what_a_user_may_do_exits_0(house: House, arguments: tuple[str, ...]) -> None:
    assert _can(house, *arguments)[0] == 0


def test_row_security_is_told_with_its_policies_or_that_no_row_is_left(house: House) -> None:
    for table, words in (
        ("house.ruled", "on, and no policy lets this role through: no row"),
        ("house.some", "some rows only, by small (permissive): (id < 10)"),
    ):
        code, chain = _can(house, "nora", "select", table)
        assert code == 0
        assert ["row security", "yes", words] in chain


def test_what_any_login_may_still_execute_is_told(house: House) -> None:
    with house.at.shop.admin() as admin:
        admin.execute("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC")
        try:
            code, chain = _can(house, "nora", "select", "house.rooms")
        finally:
            admin.execute("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    assert code == 0
    said = [reason for link, _, reason in chain[1:] if link == "hardening"]
    assert said == ["still open to any login: pg_export_snapshot(), … (1); see database harden"]


def test_with_a_token_its_own_limits_and_its_end_count(house: House) -> None:
    assert _can(house, "nora", "select", "house.rooms", "--token", house.nora)[0] == 0
    code, chain = _can(house, "nora", "select", "house.rooms", "--token", house.narrow)
    assert code == 1
    assert chain[-1][0] == "tools:query_database"
    assert chain[-1][2] == "this token lacks the permission tools:query_database"
    assert _can(house, "nora", "call", "whoami", "--token", house.narrow)[0] == 0
    over = house.at.token("nora")[0]
    tokens.revoke(house.at.tokens, [over], datetime.now(UTC))
    code, chain = _can(house, "nora", "select", "house.rooms", "--token", over)
    assert code == 1
    assert chain[1][:2] == ["token", "no"]
    assert f"{over} is revoked" in chain[1][2]
    assert len(chain) == 2, "nothing is asked behind it"


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("nobody", "select", "house.rooms"), 4, "there is no user nobody"),
        (("nora", "select", "house.none"), 4, "there is no table house.none in shop"),
        (("nora", "call", "no_such_tool"), 4, "there is no tool no_such_tool"),
        (("nora", "select", "house.rooms", "--database", "none"), 4, "there is no database none in the config"),
        (("nora", "select", "house.rooms", "--token", "zzzzzzzz"), 4, "there is no token zzzzzzzz"),
        (("otto", "select", "house.rooms", "--token", "NARROW"), 2, "is not one of otto's"),
        (("nora", "drop", "house.rooms"), 2, "'drop' is no action"),
        (("nora", "select", "house"), 2, "house names no table"),
        (("nora", "select", "House.Rooms"), 2, "has upper case"),
        (("nora", "select"), 2, "an action needs a target"),
    ],
)
def test_what_there_is_not_is_an_error_and_no_answer(
    house: House, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = house.at.run("can", *(house.narrow if one == "NARROW" else one for one in arguments), check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert done.stderr.count("mcpctl: error: ") == 1


def test_json_is_one_object_with_the_same_chain(house: House) -> None:
    for table, allowed in (("house.rooms", True), ("cellar.wine", False)):
        done = house.at.run("can", "nora", "select", table, "--json", check=False)
        found = json.loads(done.stdout)
        assert done.returncode == (0 if allowed else 1)
        assert {key: found[key] for key in found if key != "chain"} == {
            "user": "nora", "action": "select", "target": table, "allowed": allowed,
        }  # fmt: skip
        _, [_, *chain] = _can(house, "nora", "select", table)
        assert [[one["link"], "yes" if one["allowed"] else "no", one["reason"]] for one in found["chain"]] == chain


def test_the_user_alone_gets_a_table_of_all_that_they_may_do(house: House) -> None:
    code, rows = _can(house, "nora")
    assert code == 0
    tables = {row[1]: row[2] for row in rows if row[0] == "shop"}
    assert tables["house.rooms"] == "select,insert,update,delete"
    assert tables["house.keys"] == "select"
    assert tables["house.ruled (row security)"] == "select"
    assert tables['house."Odd name"'] == "select"
    assert not [name for name in tables if name.startswith("cellar")]
    assert {row[1] for row in rows if row[0] == ""} >= {"query_database", "execute_statement", "whoami"}
    found: dict[str, Any] = json.loads(house.at.run("can", "nora", "--json").stdout)
    assert [[one["database"], one["what"], one["right"]] for one in found["rights"]] == rows
    assert {row[1] for row in _can(house, "nora", "--token", house.narrow)[1]} == {"whoami"}
    assert {row[1] for row in _can(house, "pia")[1] if row[0] == "shop"} == set()


def test_the_table_says_of_each_what_the_single_question_says(house: House) -> None:
    cases = ("invoker", "calling", "ruled_by", "changed")
    with house.at.shop.admin() as admin:
        admin.execute(
            "CREATE FUNCTION cellar.fn() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END';"
            "REVOKE EXECUTE ON FUNCTION cellar.fn() FROM PUBLIC;"
            "CREATE VIEW house.invoker WITH (security_invoker) AS TABLE cellar.wine;"
            "CREATE VIEW house.calling AS SELECT id, cellar.fn() FROM house.keys;"
            "CREATE TABLE house.ruled_by (id int); ALTER TABLE house.ruled_by ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY p ON house.ruled_by USING (EXISTS (SELECT FROM cellar.wine));"
            "CREATE VIEW house.changed AS SELECT id * 2 AS dbl, name FROM house.rooms;"
            "GRANT SELECT ON house.invoker, house.calling, house.ruled_by, house.changed TO mcp_nora_r;"
            "GRANT SELECT, UPDATE (name) ON house.changed TO mcp_nora_w"
        )
        try:
            tables = {row[1]: row[2] for row in _can(house, "nora")[1] if row[0] == "shop"}
            single = {one: _can(house, "nora", "select", f"house.{one}")[0] for one in cases}
            update = _can(house, "nora", "update", "house.changed")[0]
        finally:
            admin.execute(
                "DROP VIEW house.invoker, house.calling, house.changed; DROP TABLE house.ruled_by;"
                "DROP FUNCTION cellar.fn()"
            )
    assert (single, update) == ({"invoker": 1, "calling": 1, "ruled_by": 1, "changed": 0}, 0)
    assert {name: right for name, right in tables.items() if name[6:].startswith(cases)} == {
        "house.changed": "select,update (name)"
    }


def test_the_tokens_of_an_earlier_user_of_that_name_are_none_of_the_living(house: House) -> None:
    house.at.user("zoe", "mcp-tools")
    old, _ = house.at.token("zoe")
    later = datetime.now(UTC) + timedelta(seconds=5)
    house.at.edit_user("zoe", created_at=later)
    words = "any of the user's tokens (none is alive, so nobody can use it now); one may be limited further (--token)"
    assert _can(house, "zoe", "call", "whoami")[1][1] == ["token", "yes", words]
    listed = house.at.run("token", "list").stdout.splitlines()
    assert [line.split("\t")[6] for line in listed if line.startswith(old)] == ["blocked"]


def test_who_is_linked_is_told_that_the_issuers_tokens_are_not_looked_at(house: House) -> None:
    house.at.user("lea", "mcp-user")
    house.at.edit_user("lea", links=(Link("https://id.example.org", "1"),))
    words = (
        "any of the user's tokens (none is alive; not looked at: those of 1 linked identities, "
        "with roles of their issuer's); one may be limited further (--token)"
    )
    assert _can(house, "lea", "call", "whoami")[1][1] == ["token", "yes", words]


def test_who_may_read_some_columns_only_may_read_and_the_columns_are_said(house: House) -> None:
    with house.at.shop.admin() as admin:
        admin.execute('CREATE TABLE cellar.some (a int, "B" int, c int); GRANT USAGE ON SCHEMA cellar TO mcp_nora_r;'
                      'GRANT SELECT (a, "B") ON cellar.some TO mcp_nora_r')  # fmt: skip
        try:
            code, chain = _can(house, "nora", "select", "cellar.some")
            assert (code, ["postgresql", "yes", 'on the columns a, "B" only'] in chain) == (0, True)
            assert ["shop", "cellar.some", 'select (a, "B")'] in _can(house, "nora")[1]
            who = house.at.run("who-can", "select", "cellar.some").stdout
            assert who == 'nora\tmcp_nora_r, on the columns a, "B" only\n'
        finally:
            admin.execute("DROP TABLE cellar.some; REVOKE USAGE ON SCHEMA cellar FROM mcp_nora_r")


@pytest.mark.newest
def test_a_table_that_is_locked_is_not_known_and_hides_no_other(house: House) -> None:
    known = _can(house, "nora")[1]
    with house.at.shop.admin() as admin, admin.transaction():
        admin.execute("LOCK TABLE house.keys IN ACCESS EXCLUSIVE MODE")
        for command in (("can", "nora"), ("who-can",)):
            done = house.at.run(*command, "select", "house.keys", check=False)
            assert (done.returncode, done.stdout) == (1, "")
            assert "house.keys, or what it reads, is locked, and was for 2 s: whether select is all" in done.stderr
            assert "nobody" not in done.stderr
        begun = time.monotonic()
        assert house.at.run("can", "pia", "insert", "house.keys", check=False).stdout.startswith("no")
        assert house.at.run("can", "nora", "update", "house.keys", check=False).stdout.startswith("no")
        code, found = _can(house, "nora")
        assert time.monotonic() - begun < 20
    assert code == 1
    assert found == [[*row[:2], "not known"] if row[1] == "house.keys" else row for row in known]


def test_an_insert_into_what_is_locked_waits_no_longer(house: House) -> None:
    with house.at.shop.admin() as admin, admin.transaction():
        admin.execute("LOCK TABLE house.rooms IN ACCESS EXCLUSIVE MODE")
        done = house.at.run("can", "nora", "insert", "house.rooms", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is locked, and was for 2 s: whether insert is allowed is not known" in done.stderr


def test_a_database_that_is_down_is_an_error_and_hides_no_other(login_shop: Shop, tmp_path: Path) -> None:
    gone = f"  gone:\n    host: {tmp_path}\n    dbname: gone\n    roles: per_user\n"
    at = Site(tmp_path / "site", login_shop, per_user=True, database=gone)
    with (at.folder / "admin.dsn").open("a") as lines:
        lines.write(f"gone: postgresql://postgres@/?host={tmp_path}\n")
    at.user("rita", "mcp-tools")
    at.grant("rita", "--table", "public.orders")
    sealed = Keyring(at.folder / "secret.key").seal("x")
    site.record(users.user_file(at.folder / "users.yaml"), "rita", Grant("gone", ("s",), passwords={"read": sealed}))

    def run(*arguments: str) -> tuple[list[str], str]:
        done = at.run(*arguments, check=False)
        assert done.returncode == 1
        assert done.stderr.count("mcpctl: error: ") == 1
        return done.stdout.splitlines(), done.stderr

    down = "mcpctl: error: the database gone cannot be reached: "
    for command in (("who-can",), ("can", "rita")):
        out, error = run(*command, "select", "s.t", "--database", "gone")
        assert (out, "nobody" in error.replace(str(tmp_path), "")) == ([], False)  # it may be nobody's own folder
        assert down in error
    out, error = run("can", "rita")
    assert "shop\tpublic.orders\tselect" in out
    assert down in error
    assert run("grant", "diff")[0] == []
    with login_shop.admin() as admin:
        admin.execute("REVOKE SELECT ON public.orders FROM mcp_rita_r")
    out, error = run("grant", "diff")
    assert out == ["rita\tshop\tmcp_rita_r: lacks SELECT on public.orders"]
    assert "mcpctl: error: the administrator cannot reach gone: " in error
    assert "agree" not in error


def test_who_can_lists_users_and_service_tokens_with_their_login_role(house: House) -> None:
    def who(*arguments: str) -> tuple[int, list[str]]:
        done = house.at.run("who-can", *arguments, check=False)
        return done.returncode, done.stdout.splitlines()

    assert who("select", "house.rooms") == (0, ["nora\tmcp_nora_r", "otto\tmcp_otto_r"])
    assert who("update", "house.rooms") == (0, ["nora\tmcp_nora_w"])
    assert who("select", "house.ruled") == (
        0, ["nora\tmcp_nora_r, and sees no row", "otto\tmcp_otto_r, and sees no row"],
    )  # fmt: skip
    assert who("select", "cellar.wine") == (1, [])
    code, found = who("select", "public.orders")
    assert (code, found) == (0, [f"service token {house.service}\tshop: its service_dsn"])
    done = json.loads(house.at.run("who-can", "update", "house.rooms", "--json").stdout)
    assert done == {"action": "update", "target": "house.rooms", "who": [{"who": "nora", "as": "mcp_nora_w"}]}
    assert who("select", "house.none")[0] == 4
    assert who("call", "no_such_tool")[0] == 4
    assert "nora\t" in who("call", "whoami")[1]


def test_a_disabled_user_can_nothing_and_is_not_listed(house: House) -> None:
    house.at.edit_user("otto", disabled_at=datetime.now(UTC))
    try:
        code, chain = _can(house, "otto", "select", "house.rooms")
        assert code == 1
        assert chain[-1][:2] == ["user", "no"]
        assert "otto is disabled since" in chain[-1][2]
        assert _can(house, "otto") == (0, [])
        assert house.at.run("who-can", "select", "house.rooms").stdout.splitlines() == ["nora\tmcp_nora_r"]
    finally:
        house.at.edit_user("otto", disabled_at=None)
