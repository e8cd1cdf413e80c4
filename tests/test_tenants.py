"""Tenants: the file, what a grant may reach, and what a credential says of its tenant from one moment to the next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from command_line import Home
from mcpctl import private_file
from mcpctl.config_keys import Auth, Database
from mcpctl.errors import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import Grant
from mcpctl.identity.principal import Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.keyring import Keyring
from mcpctl.policy.access import Access
from mcpctl.postgres.logins import Logins

START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
ACME = Tenant("acme", START, "acme")
WIDGETS = Tenant("widgets", START, "widgets")
ACME_X = Tenant("acme-x", START, "both", "acme_x", "the other one")


@pytest.fixture
def places(tmp_path: Path) -> EntryFile[Tenant]:
    return tenants.tenant_file(tmp_path / "tenants.yaml")


# -- the file ---------------------------------------------------------------------------------------------------------


def test_without_a_file_there_are_no_tenants_and_the_first_one_makes_it(places: EntryFile[Tenant]) -> None:
    assert places.current() == {}
    tenants.add(places, ACME)
    assert places.path.stat().st_mode & 0o777 == 0o600
    assert places.current() == {"acme": ACME}
    assert "acme: {created_at: '2026-11-20T12:00:00Z', database: acme}" in places.path.read_text()


def test_what_was_written_is_read_again(places: EntryFile[Tenant]) -> None:
    for one in (ACME, WIDGETS, ACME_X, Tenant("odd", START, "both", '"Odd name"')):
        tenants.add(places, one)
    again = tenants.tenant_file(places.path)
    assert dict(again.current()) == dict(places.current())
    assert again.current()["acme-x"] == ACME_X


@pytest.mark.parametrize("name", ["", "Acme", "a" * 32, "1a", "-a", "a_b", "a.b", "acme\n", "ácme", "a b", "../a", "*"])
def test_a_name_that_is_none_is_refused(places: EntryFile[Tenant], name: str) -> None:
    with pytest.raises(UsageError):
        tenants.add(places, replace(ACME, name=name))
    assert not places.path.exists()


@pytest.mark.parametrize(
    "second, taken",
    [
        (replace(ACME, database="other"), "there is a tenant acme already"),
        (Tenant("b", START, "acme"), "the database acme is the tenant acme's"),
        (Tenant("b", START, "acme", "public"), "the database acme is the tenant acme's"),
        (Tenant("b", START, "both", "acme_x"), "the schema acme_x of both is the tenant acme-x's"),
        (Tenant("b", START, "both"), "the schema acme_x of both is the tenant acme-x's"),
    ],
)
def test_no_two_tenants_have_a_name_or_a_place_in_common(places: EntryFile[Tenant], second: Tenant, taken: str) -> None:
    tenants.add(places, ACME)
    tenants.add(places, ACME_X)
    with pytest.raises(ConflictError, match=taken):
        tenants.add(places, second)
    assert set(places.current()) == {"acme", "acme-x"}


def test_schemas_of_one_database_whose_names_begin_alike_are_places_of_their_own(places: EntryFile[Tenant]) -> None:
    for name, schema in (("acme", "acme"), ("acme-x", "acme_x"), ("acm", "acm"), ("upper", '"Acme"')):
        tenants.add(places, Tenant(name, START, "both", schema))
    assert len(places.current()) == 4


def test_a_tenant_with_users_stays_and_without_goes(places: EntryFile[Tenant]) -> None:
    tenants.add(places, ACME)
    with pytest.raises(ConflictError, match="alice belong to the tenant acme"):
        tenants.remove(places, "acme", {"alice": users.User("alice", START, tenant="acme")})
    with pytest.raises(NotFoundError, match="there is no tenant acme-x"):
        tenants.remove(places, "acme-x", {})
    assert tenants.remove(places, "acme", {"bob": users.User("bob", START, tenant="acme-x")}) == ACME
    assert places.current() == {}


@pytest.mark.parametrize(
    "fields, fault",
    [
        ("{database: acme}", "created_at: is missing"),
        ("{created_at: 2026-11-20T12:00:00Z}", "database: is missing"),
        ("{created_at: 2026-11-20T12:00:00Z, database: 5}", "database: is missing"),
        ("{created_at: 2026-11-20T12:00:00, database: acme}", "has no time zone"),
        ("{created_at: 2026-11-20T12:00:00Z, database: acme, schema: a.b}", "schema: expected a schema's name"),
        ("{created_at: 2026-11-20T12:00:00Z, database: acme, schema: Acme}", "has upper case"),
        ("{created_at: 2026-11-20T12:00:00Z, database: acme, schema: ''}", "is no name"),
        ("{created_at: 2026-11-20T12:00:00Z, database: acme, schemas: acme}", "schemas: there is no such key"),
        ("{created_at: 2026-11-20T12:00:00Z, database: acme, note: [a]}", "note: expected a text"),
        ("[acme]", "expected {key: value"),
    ],
)
def test_a_broken_entry_is_named_with_what_is_wrong(places: EntryFile[Tenant], fields: str, fault: str) -> None:
    private_file.create(places.path, f"version: 1\ntenants:\n  acme: {fields}\n".encode())
    with pytest.raises(ConfigError) as caught:
        places.current()
    assert fault in caught.value.message
    assert f"{places.path}:3" in caught.value.message


def test_a_file_that_others_may_read_is_not_believed(places: EntryFile[Tenant]) -> None:
    tenants.add(places, ACME)
    places.path.chmod(0o644)
    with pytest.raises(ConfigError, match="has mode 0644"):
        places.current()


# -- what a grant may reach -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tenant, database, targets, within",
    [
        (ACME, "acme", ("*",), ("*",)),
        (ACME, "acme", ("sales", "sales.orders"), ("sales", "sales.orders")),
        (ACME, "widgets", ("*",), None),
        (ACME, "acme-x", ("*",), None),
        (ACME_X, "both", ("*",), ("acme_x",)),
        (ACME_X, "both", ("acme_x.users",), ("acme_x.users",)),
        (ACME_X, "both", ('"acme_x".users',), ('"acme_x".users',)),
        (ACME_X, "both", ("acme",), None),
        (ACME_X, "both", ("acme.users",), None),
        (ACME_X, "both", ("acme_x.users", "acme_xx"), None),
        (ACME_X, "both", ("acme_x", "*"), None),
        (ACME_X, "both", ('"acme_x.users"',), None),
        (ACME_X, "both", ("public",), None),
    ],
)
def test_a_grant_stays_within_the_tenant(
    tenant: Tenant, database: str, targets: tuple[str, ...], within: tuple[str, ...] | None
) -> None:
    if within is not None:
        assert tenant.confine(database, targets) == within
        return
    with pytest.raises(UsageError, match=f"the tenant {tenant.name} has {tenant.where}"):
        tenant.confine(database, targets)


def _of_acme_x(*read: str, write: tuple[str, ...] = ()) -> Principal:
    grant = Grant("both", read, write, passwords={"read": "sealed", "write": "sealed"})
    return Principal("ab12cd34", "xen", "pool", roles=("mcp-admin",), tenant="acme-x", within=ACME_X,
                     grants={"both": grant})  # fmt: skip


def test_a_grant_that_reaches_beyond_the_tenant_opens_nothing() -> None:
    """It may have been made before the user's tenant was, or the tenant has moved since."""
    access = Access(Auth())
    assert access.may(_of_acme_x("acme_x"), "databases:both:read").allowed
    assert access.may(_of_acme_x("acme_x.a", write=("acme_x.a",)), "databases:both:write").allowed
    for beyond in (_of_acme_x("acme_x", "acme"), _of_acme_x("*"), _of_acme_x("acme_x", write=("public.t",))):
        decision = access.may(beyond, "databases:both:read")
        assert not decision.allowed
        assert "the user's grant reaches" in decision.reason
        assert access.may(beyond, "tools:whoami").allowed


def test_a_tenant_with_a_schema_has_nothing_where_all_share_one_login() -> None:
    """The config may have been changed since the tenant was made; the one login would see every schema."""
    logins = Logins({"both": Database(dsn="host=/nowhere user=reader dbname=both")}, Keyring(Path("/nonexistent")))
    with pytest.raises(ForbiddenError, match="sees more than the schema of your tenant"):
        logins.of(_of_acme_x("acme_x"), "both", "read")
    whole = replace(_of_acme_x("acme_x"), within=replace(ACME_X, schema=None))
    assert logins.of(whole, "both", "read").name == "both"


# -- what a credential says -------------------------------------------------------------------------------------------


class Door:
    """An authenticator whose files have a user of acme, one of widgets, and one of nobody."""

    def __init__(self, folder: Path) -> None:
        self.tokens = tokens.token_file(folder / "tokens.yaml")
        self.users = users.user_file(folder / "users.yaml")
        self.tenants = tenants.tenant_file(folder / "tenants.yaml")
        private_file.create(self.tokens.path, self.tokens.render({}))
        private_file.create(self.users.path, self.users.render({}))
        tenants.add(self.tenants, ACME)
        tenants.add(self.tenants, WIDGETS)
        self.texts: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        for name, tenant in (("ann", "acme"), ("wil", "widgets"), ("sam", None)):
            users.add(self.users, name, None, START, tenant=tenant)
            entry, self.texts[name] = tokens.add(self.tokens, tokens.Wanted(user=name, expires_at=None), START)
            self.ids[name] = entry.id
        self.ended: list[dict[str, str]] = []
        self.door = Authenticator(self.tokens.path, self.users.path, self.tenants.path)
        self.door.ended = self.ended.append

    def enter(self, name: str) -> Principal:
        return asyncio.run(self.door.authenticate(self.texts[name], "192.0.2.1"))

    def refused(self, name: str) -> str:
        with pytest.raises(UnauthorizedError) as caught:
            self.enter(name)
        return caught.value.message

    def put(self, name: str, tenant: Tenant | None) -> None:
        """Change an entry by hand, which the command line never does."""
        with self.tenants.edit() as entries:
            entries.pop(name, None)
            if tenant is not None:
                entries[name] = tenant


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    found = Door(tmp_path)
    yield found
    found.door.close()


def test_the_tenant_comes_from_the_credential_with_its_place(door: Door) -> None:
    assert (door.enter("ann").tenant, door.enter("ann").within) == ("acme", ACME)
    assert (door.enter("wil").tenant, door.enter("wil").within) == ("widgets", WIDGETS)
    assert (door.enter("sam").tenant, door.enter("sam").within) == (None, None)


def test_a_tenant_that_goes_cuts_its_own_tokens_and_no_other_and_lets_them_in_again_when_it_comes_back(
    door: Door,
) -> None:
    before = {name: door.enter(name) for name in ("ann", "wil", "sam")}
    door.put("acme", None)
    assert door.refused("ann") == "its tenant acme is gone"
    assert door.ended == [{door.ids["ann"]: "its user's tenant changed"}]
    assert [door.door.still_valid(before[name]) for name in before] == [False, True, True]
    assert door.enter("wil") == before["wil"]
    door.put("acme", ACME)
    assert door.enter("ann").within == ACME
    assert not door.door.still_valid(before["ann"]), "what was opened before is over for good"


def test_a_tenant_that_moves_cuts_what_was_open_and_opens_the_new_place_alone(door: Door) -> None:
    before, other = door.enter("ann"), door.enter("wil")
    moved = Tenant("acme", START, "both", "acme")
    door.put("acme", moved)
    after = door.enter("ann")
    assert door.ended == [{door.ids["ann"]: "its user's tenant changed"}]
    assert not door.door.still_valid(before)
    assert after.within == moved
    assert not Access(Auth()).may(after, "databases:acme:read").allowed
    assert door.door.still_valid(other)


def test_a_user_who_changes_tenants_is_cut_and_sees_the_new_one_alone(door: Door) -> None:
    before = door.enter("ann")
    with door.users.edit() as entries:
        entries["ann"] = replace(entries["ann"], tenant="widgets")
    after = door.enter("ann")
    assert (after.tenant, after.within) == ("widgets", WIDGETS)
    assert door.ended == [{door.ids["ann"]: "its user's tenant changed"}]
    assert not door.door.still_valid(before)


def test_a_user_of_nobody_who_comes_to_a_tenant_is_cut_too(door: Door) -> None:
    before = door.enter("sam")
    with door.users.edit() as entries:
        entries["sam"] = replace(entries["sam"], tenant="acme")
    assert door.enter("sam").within == ACME
    assert not door.door.still_valid(before)


def test_a_tenant_file_that_is_gone_refuses_the_tenants_users_and_lets_the_others_in(door: Door) -> None:
    door.enter("ann")
    good = door.tenants.path.read_bytes()
    door.tenants.path.unlink()
    assert door.refused("ann") == "its tenant acme is gone"
    assert door.refused("wil") == "its tenant widgets is gone"
    assert door.enter("sam").within is None
    private_file.create(door.tenants.path, good)
    assert door.enter("ann").within == ACME


def test_a_tenant_file_that_is_broken_lets_nobody_in_until_it_is_mended(door: Door) -> None:
    door.enter("ann")
    good = door.tenants.path.read_bytes()
    for broken in (good + b"  acme: {}\n", b"", good.replace(b"database: acme", b"database: [acme]"), b"\xff"):
        door.tenants.path.write_bytes(broken)
        for name in ("ann", "wil", "sam"):
            with pytest.raises(UnavailableError):
                door.enter(name)
    door.tenants.path.write_bytes(good)
    assert door.enter("ann").within == ACME
    door.tenants.path.chmod(0o644)
    with pytest.raises(UnavailableError):
        door.enter("sam")


# -- the commands -----------------------------------------------------------------------------------------------------

_TWO = "  both: {host: /nonexistent, dbname: both, roles: per_user}\n"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", _TWO)


def test_a_tenant_is_made_listed_and_removed_by_the_command_line(home: Home) -> None:
    made = json.loads(home("tenant", "add", "acme", "--database", "shop", "--note", "Acme Inc.", "--json").good)
    assert (made["tenant"], made["database"], made["schema"], made["note"]) == ("acme", "shop", None, "Acme Inc.")
    second = home("tenant", "add", "wid", "--database", "both", "--schema", "wid")
    assert second.good == "wid added: the schema wid of both\n"
    assert home("user", "add", "ann", "--tenant", "acme").good == "ann added\n"
    listed = {one["tenant"]: one for one in json.loads(home("tenant", "list", "--json").good)["tenants"]}
    assert (listed["acme"]["users"], listed["wid"]["users"]) == (1, 0)
    assert listed["wid"]["schema"] == "wid"
    assert home("tenant", "list").good.splitlines()[0].split("\t")[:4] == ["acme", "shop", "", "1"]
    refused = home("tenant", "remove", "acme")
    assert (refused.code, "ann belong" in refused.error) == (5, True)
    assert home("user", "remove", "ann", "--yes").good.startswith("ann removed\n")
    assert home("tenant", "remove", "acme").good == "acme removed\n"
    assert json.loads(home("tenant", "list", "--json").good)["tenants"][0]["tenant"] == "wid"
    events = [(line["event"], line["tenant"]) for line in _audit(home) if line["event"].startswith("tenant.")]
    assert events == [("tenant.added", "acme"), ("tenant.added", "wid"), ("tenant.removed", "acme")]


def _audit(home: Home) -> list[dict[str, str]]:
    return [json.loads(line) for line in (home.folder / "audit.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("tenant", "add", "acme", "--database", "nowhere"), 4, "there is no database nowhere"),
        (("tenant", "add", "acme", "--database", "shop", "--schema", "acme"), 2, "all users share one login"),
        (("tenant", "add", "acme", "--database", "both", "--schema", "a.b"), 2, "names a table"),
        (("tenant", "add", "acme", "--database", "both", "--schema", "*"), 2, "takes one schema"),
        (("tenant", "add", "acme", "--database", "both", "--schema", "pg_catalog"), 2, "PostgreSQL's own"),
        (("tenant", "add", "Acme", "--database", "both"), 2, "cannot be a tenant's name"),
        (("tenant", "add", "acme"), 2, "--database"),
        (("tenant", "remove", "acme"), 4, "there is no tenant acme"),
        (("user", "add", "ann", "--tenant", "acme"), 4, "there is no tenant acme"),
    ],
)
def test_what_makes_no_tenant_is_refused_and_changes_nothing(
    home: Home, arguments: tuple[str, ...], code: int, said: str
) -> None:
    before = home.files()
    done = home(*arguments)
    assert (done.code, said in done.error) == (code, True), done.err
    changed = {path for path, data in home.files().items() if before.get(path) != data}
    assert not [path for path in changed if path.endswith(".yaml")]


def test_adding_a_tenant_says_what_it_does_not_hide(home: Home) -> None:
    schema = home("tenant", "add", "acme", "--database", "both", "--schema", "acme")
    assert "names of all schemas, tables and columns, and about how many rows they have, show" in schema.err
    assert "mcpctl database add acme" in schema.err
    whole = home("tenant", "add", "wid", "--database", "shop")
    assert "the names of its databases and roles show to all" in whole.err
