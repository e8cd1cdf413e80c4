"""Grants as values: names, targets, what is more and what is less, and how they stand in users.yaml."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import private_file
from mcpctl.errors import UsageError
from mcpctl.identity import grants, users
from mcpctl.identity.grants import EVERYTHING, PENDING, REVOKING, Grant, Target, identifier, parse, quoted, targets
from mcpctl.postgres import roles, scram
from site_of_mcpctl import record

NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: len(name.encode()) <= 63
)
TARGETS = st.builds(Target, NAMES, st.none() | NAMES)
SPELLED = st.lists(TARGETS.map(str), unique=True).map(tuple)
SEALED = {"read": "sealed:v1:a", "write": "sealed:v1:b"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(days=1)


# -- names --------------------------------------------------------------------------------------------------------


@given(TARGETS)
def test_every_name_that_postgresql_takes_is_read_back_as_it_was_written(target: Target) -> None:
    assert parse(str(target)) == target
    assert target.sql.isprintable()
    if str(target).isprintable():
        assert parse(target.sql) == target


@pytest.mark.parametrize(
    ("text", "schema", "table"),
    [
        ("sales", "sales", None),
        ("sales.orders", "sales", "orders"),
        ('"Odd name"."a.b"', "Odd name", "a.b"),
        ('"say ""no"""', 'say "no"', None),
        ("été.naïve", "été", "naïve"),
        ('public."ORDERS"', "public", "ORDERS"),
        ("x" * 63, "x" * 63, None),
        ("日本.表", "日本", "表"),
        ('"*"', "*", None),
    ],
)
def test_a_target_is_a_schema_or_a_table_in_it(text: str, schema: str, table: str | None) -> None:
    assert parse(text) == Target(schema, table)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a.",
        ".a",
        "a.b.c",
        "a b",
        '"',
        '""',
        '"a',
        'a"b',
        "Sales",
        "É",
        "a\n",
        " a",
        "x" * 64,
        "é" * 32,
        "a\x00b",
    ],
)
def test_what_could_mean_two_things_or_nothing_is_no_target(text: str) -> None:
    with pytest.raises(ValueError, match=r"PostgreSQL|is no name"):
        parse(text)


@pytest.mark.parametrize(
    "text, needed",
    [("We ird", '"We ird"'), ("We ird.orders", '"We ird".orders'), ("sales.my table", 'sales."my table"')],
)
def test_a_name_with_a_blank_is_shown_in_quotes_as_a_whole(text: str, needed: str) -> None:
    with pytest.raises(ValueError, match="has a blank") as caught:
        parse(text)
    assert str(caught.value).endswith(f": {needed}")
    parse(needed)


@given(NAMES)
def test_a_name_as_sql_is_one_quoted_identifier(name: str) -> None:
    found = identifier(name)
    assert found.isprintable()
    if not name.isprintable():
        assert found.startswith('U&"')
        found = found.removeprefix("U&").replace("\\\\", "\0")
        found = re.sub(r"\\(?:\+(.{6})|(.{4}))", lambda one: chr(int(one[1] or one[2], 16)), found).replace("\0", "\\")
    assert (found[0], found[-1]) == ('"', '"')
    assert found[1:-1].replace('""', "") == name.replace('"', "")
    assert found[1:-1].count('"') == 2 * name.count('"')


def test_a_reserved_word_is_shown_plain_and_quoted_in_sql() -> None:
    target = parse("public.order")
    assert (str(target), target.sql) == ("public.order", '"public"."order"')


@given(NAMES)
def test_only_small_ascii_letters_are_shown_without_quotes(name: str) -> None:
    plain = all(letter in "abcdefghijklmnopqrstuvwxyz_0123456789" for letter in name) and not name[0].isdigit()
    assert (quoted(name) == name) is plain


# -- what a command names -----------------------------------------------------------------------------------------


def test_without_a_schema_or_table_all_schemas_are_meant() -> None:
    assert targets([], []) == (EVERYTHING,)
    assert targets(["*"], []) == (EVERYTHING,)
    assert targets(['"sales"', "sales"], ["sales.orders"]) == ("sales", "sales.orders")
    assert targets(['"*"'], []) == ('"*"',)  # a schema of that name is not all schemas


@pytest.mark.parametrize(
    ("schemas", "tables", "why"),
    [
        (["sales.orders"], [], "names a table"),
        ([], ["sales"], "names a schema"),
        ([], ["*"], "no patterns"),
        ([], ["sales.o*"], r'there are no patterns; such a name needs quotes: "o\*"'),
        (["pg_catalog"], [], "system schemas"),
        (["information_schema"], [], "system schemas"),
        ([], ["pg_toast.x"], "system schemas"),
        (["Sales"], [], "upper case"),
        (["a b"], [], "is no name"),
    ],
)
def test_what_a_command_cannot_grant_is_refused_with_its_option(
    schemas: list[str], tables: list[str], why: str
) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        targets(schemas, tables)
    assert caught.value.message.startswith("--schema" if schemas else "--table")


# -- more and less ------------------------------------------------------------------------------------------------


@given(SPELLED, SPELLED, SPELLED)
def test_who_writes_reads_and_who_no_longer_reads_does_not_write(
    first: tuple[str, ...], second: tuple[str, ...], third: tuple[str, ...]
) -> None:
    grant = Grant("db").more("read", first).more("write", second)
    assert set(grant.write) == set(second) <= set(grant.read) == {*first, *second}
    narrowed = grant.less("read", third) if third else grant.less("read", ())
    assert set(narrowed.write) <= set(narrowed.read)
    assert not set(narrowed.read) & set(third or grant.read)
    assert narrowed.rights <= grant.rights


@given(SPELLED, SPELLED)
def test_more_and_then_less_of_the_same_is_what_it_was(have: tuple[str, ...], more: tuple[str, ...]) -> None:
    before = Grant("db").more("read", have)
    new = tuple(one for one in more if one not in have)
    after = before.more("write", new) if new else before
    assert (after.less(None, new) if new else after) == before
    assert after.without(before, after) == (replace(before, state=REVOKING) if before.empty else before)


def test_taking_write_back_leaves_read() -> None:
    grant = Grant("db").more("write", ("a", "b"))
    assert grant.less("write", ("a",)) == Grant("db", read=("a", "b"), write=("b",))
    assert grant.less("write", ()) == Grant("db", read=("a", "b"))
    assert grant.less(None, ()).empty
    assert grant.more("admin", ()).less(None, ()).empty
    assert not grant.more("admin", ()).less("read", ()).empty


def test_a_grant_that_is_being_taken_back_lets_nobody_in() -> None:
    grant = Grant("db", read=("a",), passwords=SEALED)
    assert grant.has("read")
    assert replace(grant, state=PENDING).has("read")
    assert not replace(grant, state=REVOKING).has("read")
    assert not replace(grant, state=REVOKING).rights
    assert not grant.has("write")  # a password alone is no right
    assert not replace(grant, passwords={}).has("read")


def test_two_grants_are_the_same_whatever_key_their_passwords_are_sealed_with() -> None:
    grant = Grant("db", read=("a",), passwords=SEALED)
    assert grant.same(replace(grant, passwords={"read": "sealed:v1:other"}))
    assert not grant.same(replace(grant, state=PENDING))
    assert not grant.same(replace(grant, read=("a", "b")))


# -- narrowing ----------------------------------------------------------------------------------------------------


def test_only_what_was_narrowed_ends_what_is_open() -> None:
    alice = users.User("alice", NOW, grants={"db": Grant("db", read=("a", "b"), write=("a",), passwords=SEALED)})
    grant = alice.grants["db"]
    for same in (grant.more("read", ("c",)), replace(grant, state=PENDING), replace(grant, passwords={})):
        assert alice.with_grant(same).narrowed(alice, operator.ne) == {}
    less = (grant.less("write", ()), grant.less("read", ("b",)), replace(grant, state=REVOKING), grant.less(None, ()))
    for one in less:
        assert alice.with_grant(one).narrowed(alice, operator.ne) == {"db": "its user's grant on db was narrowed"}
    other = alice.with_grant(Grant("other", read=("x",)))
    assert replace(other, grants={"other": other.grants["other"]}).narrowed(other, operator.ne).keys() == {"db"}


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"created_at": LATER}, "its user is another one of that name"),
        ({"disabled_at": LATER}, "its user is disabled"),
        ({"roles": ()}, "its user's roles give less"),
        ({"tenant": "acme"}, "its user's tenant changed"),
    ],
)
def test_what_concerns_the_user_as_such_ends_everything(fields: dict[str, Any], why: str) -> None:
    alice = users.User("alice", NOW, grants={"db": Grant("db", read=("a",))})
    assert replace(alice, **fields).narrowed(alice, operator.ne) == {users.EVERYWHERE: why}


def test_a_grant_of_nothing_is_left_out_unless_it_is_still_to_be_taken_back() -> None:
    alice = users.User("alice", NOW, grants={"db": Grant("db", read=("a",))})
    assert alice.with_grant(Grant("db")).grants == {}
    assert alice.with_grant(Grant("db", state=REVOKING)).grants == {"db": Grant("db", state=REVOKING)}
    assert list(alice.with_grant(Grant("ab", read=("x",))).grants) == ["ab", "db"]


# -- users.yaml ---------------------------------------------------------------------------------------------------


@given(SPELLED, SPELLED, st.booleans(), st.sampled_from([None, PENDING, REVOKING]))
def test_a_grant_comes_back_from_its_values_as_it_was(
    read: tuple[str, ...], write: tuple[str, ...], admin: bool, state: str | None
) -> None:
    grant = Grant("db", read, write, admin, state, SEALED)
    assert grants.read("db", grants.as_values(grant)) == grant


@given(SPELLED)
def test_a_grant_comes_back_from_the_file_as_it_was_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, read: tuple[str, ...]
) -> None:
    file = users.user_file(tmp_path_factory.mktemp("users") / "users.yaml")
    private_file.create(file.path, file.render({}))
    users.add(file, "alice", None, NOW)
    grant = Grant("db", (*read, EVERYTHING), state=PENDING, passwords={"read": "sealed:v1:x"})
    record(file, "alice", grant)
    assert users.user_file(file.path).current()["alice"].grants["db"] == grant


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (["sales"], r"grants\.db: expected"),
        ({"reed": ["sales"]}, r"grants\.db\.reed: there is no such key"),
        ({"read": "sales"}, r"grants\.db\.read: expected a list"),
        ({"read": [1]}, r"grants\.db\.read: expected a list"),
        ({"read": ["a.b.c"]}, "is no name"),
        ({"read": ["Sales"]}, "upper case"),
        ({"state": "done"}, r"grants\.db\.state"),
        ({"admin": "yes"}, r"grants\.db\.admin"),
        ({"r": 1}, "sealed passwords"),
    ],
)
def test_a_broken_grant_is_refused_with_what_is_wrong(fields: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        grants.read("db", fields)


# -- SQL ----------------------------------------------------------------------------------------------------------


def terms(**more: object) -> roles.Terms:
    return roles.Terms(roles.mark("abc", "alice"), 9, 30.0, open_hba=True, **more)  # type: ignore[arg-type]


@given(TARGETS)
def test_no_name_ends_a_comment_or_a_block_of_the_script(target: Target) -> None:
    grant = Grant("db").more("write", (str(target),))
    verifiers = {one: scram.verifier(f"mcp_alice_{one[0]}", "p" * 43) for one in ("read", "write")}
    body = roles.grant_body("alice", grant, verifiers, terms())
    script = roles.script(body, f"mcpctl: alice in db: {target}")
    encoding, title, begin, rest = script.split("\n", 3)
    assert title.startswith("-- mcpctl: alice in db: ")
    assert "\r" not in title
    assert (encoding, begin) == ("SET client_encoding = 'UTF8';", "BEGIN;")
    assert rest == f"{body}COMMIT;\n"


def test_the_same_grant_makes_the_same_script_every_time() -> None:
    grant = Grant("db").more("read", ("sales",))
    verifiers = {"read": scram.verifier("mcp_alice_r", "p" * 43)}
    first = roles.grant_body("alice", grant, verifiers, terms())
    assert first == roles.grant_body("alice", grant, {"read": scram.verifier("mcp_alice_r", "p" * 43)}, terms())
    assert " NOLOGIN CONNECTION" not in first
    assert " NOLOGIN CONNECTION" in roles.grant_body("alice", grant, verifiers, terms(login=False))


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])))
def test_a_text_as_sql_doubles_its_quotes_and_backslashes(text: str) -> None:
    found = roles.literal(text).strip()
    inner = found.removeprefix("E")[1:-1].replace("''", "'").replace("\\\\", "\0")
    assert found.isprintable()
    assert (
        re.sub(r"\\(?:U(.{8})|u(.{4}))", lambda one: chr(int(one[1] or one[2], 16)), inner).replace("\0", "\\") == text
    )
    assert found.startswith("E'") == ("\\" in text or not text.isprintable())


def test_the_verifier_is_postgresqls_form_and_differs_by_role_and_password() -> None:
    password = scram.new_password()
    found = {scram.verifier(role, secret) for role in ("mcp_a_r", "mcp_b_r") for secret in (password, password[::-1])}
    assert len(found) == 4
    assert all(scram.VERIFIER.fullmatch(one) for one in found)
    assert not any(password in one for one in found)
    assert len({scram.new_password() for _ in range(100)}) == 100


def test_what_a_user_loses_in_one_database_stays_in_another(tmp_path: Path) -> None:
    file = users.user_file(tmp_path / "users.yaml")
    private_file.create(file.path, file.render({}))
    users.add(file, "alice", None, NOW)
    record(file, "alice", Grant("a", read=("x",), passwords={"read": "sealed:v1:1"}))
    record(file, "alice", Grant("b", read=("y",), passwords={"read": "sealed:v1:2"}))
    record(file, "alice", Grant("a"))
    assert list(users.user_file(file.path).current()["alice"].grants) == ["b"]
