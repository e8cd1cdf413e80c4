"""Tenants: the file, what a grant may reach, and the commands."""

from __future__ import annotations

import json
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
    UsageError,
)
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import Grant
from mcpctl.identity.principal import Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.keyring import Keyring
from mcpctl.policy.access import Access
from mcpctl.postgres.logins import Logins
from site_of_mcpctl import READER, Shop, Site

START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
ACME = Tenant("acme", START, "acme")
WIDGETS = Tenant("widgets", START, "widgets")
ACME_X = Tenant("acme-x", START, "both", "acme_x", "the other one")


@pytest.fixture
def places(tmp_path: Path) -> EntryFile[Tenant]:
    found = tenants.tenant_file(tmp_path / "tenants.yaml")
    private_file.create(found.path, found.render({}))
    return found


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_new_file_has_no_tenants_and_a_lost_one_is_a_fault(places: EntryFile[Tenant]) -> None:
    assert places.current() == {}
    tenants.add(places, ACME)
    assert places.path.stat().st_mode & 0o777 == 0o600
    assert places.current() == {"acme": ACME}
    assert "acme: {created_at: '2026-11-20T12:00:00Z', database: acme}" in places.path.read_text()
    places.path.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match="there is no file") as caught:
            places.current()
    assert "restore it; only where there never were tenants" in (caught.value.hint or "")


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
    assert places.current() == {}


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
    with pytest.raises(ConflictError, match="alice belongs to the tenant acme"):
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
    places.path.write_bytes(f"version: 1\ntenants:\n  acme: {fields}\n".encode())
    with pytest.raises(ConfigError) as caught:
        places.current()
    assert fault in caught.value.message
    assert f"{places.path}:3" in caught.value.message


_AT = "created_at: 2026-11-20T12:00:00Z"


@pytest.mark.parametrize(
    "first, second, taken",
    [
        ("database: acme", "database: acme", "the database acme is the tenant acme's"),
        ("database: acme", "database: acme, schema: b", "the database acme is the tenant acme's"),
        ("database: acme, schema: a", "database: acme", "the schema a of acme is the tenant acme's"),
        ("database: acme, schema: a", "database: acme, schema: '\"a\"'", "the schema a of acme is the tenant acme's"),
    ],
)
@pytest.mark.parametrize("inside", [f"{{{_AT}, $}}", f"\n    {_AT}\n    $"], ids=["a line each", "by hand"])
def test_two_tenants_of_a_hand_edited_file_share_nothing(
    places: EntryFile[Tenant], first: str, second: str, taken: str, inside: str
) -> None:
    if "{" not in inside:
        first, second = first.replace(", ", "\n    "), second.replace(", ", "\n    ")
    acme, other = inside.replace("$", first), inside.replace("$", second)
    places.path.write_bytes(f"version: 1\ntenants:\n  acme: {acme}\n  b: {other}\n".encode())
    line = 4 if "{" in inside else 7 if "schema" in first else 6
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{places.path}:{line}: b: {taken}; give each a place of its own"):
            places.current()


def test_a_tenants_database_has_one_name(places: EntryFile[Tenant]) -> None:
    shared = Database(host="127.0.0.1", dbname="acme", user="reader")
    databases = {"acme": shared, "odd": replace(shared, host="localhost", user="other"), "b": Database(dbname="b")}
    twins = Logins(databases, Keyring(Path("/nonexistent"))).twins
    tenants.add(places, WIDGETS)
    assert tenants.tenant_file(places.path, twins).current()
    tenants.add(places, ACME)
    assert places.current()
    with pytest.raises(ConfigError, match=f"{places.path}:4: acme: acme and odd of the config are one database"):
        tenants.tenant_file(places.path, twins).current()


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
    asked = home("tenant", "remove", "acme")
    assert (asked.code, "removing tenant acme wants a yes" in asked.error) == (2, True)
    assert home("tenant", "remove", "acme", "--yes").good == "acme removed\n"
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


def test_a_token_is_for_no_database_where_it_would_open_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", "  two: {host: /nonexistent, dbname: two, user: u}\n" + _TWO)
    assert home("tenant", "add", "acme", "--database", "shop").code == 0
    assert home("tenant", "add", "wid", "--database", "both", "--schema", "wid").code == 0
    for user, tenant in (("ann", "acme"), ("wil", "wid")):
        assert home("user", "add", user, "--tenant", tenant).code == 0
    assert home("user", "add", "sam").code == 0
    for arguments, code, said in (
        (("--user", "ann", "--database", "shop", "--database", "two"), 2, "acme has the database shop, not two"),
        (("--user", "wil", "--database", "shop"), 2, "the tenant wid has the schema wid of both, not shop"),
        (("--user", "sam", "--database", "shop"), 5, "the database shop is the tenant acme's alone"),
        (("--database", "shop"), 5, "the database shop is the tenant acme's alone"),
    ):
        refused = home("token", "add", "--expiry", "1d", *arguments)
        assert (refused.code, said in refused.error) == (code, True), refused.err
    assert tokens.token_file(home.folder / "tokens.yaml").current() == {}
    for arguments in (("ann", "--database", "shop"), ("sam", "--database", "two"), ("wil",)):
        home.token("--user", *arguments)


@pytest.mark.parametrize("client", ["claude-code", "claude-desktop", "cursor", "vscode", "codex", "gemini", "json"])
def test_a_client_may_have_servers_of_several_tenants_beside_each_other(home: Home, client: str) -> None:
    assert home("tenant", "add", "acme-x", "--database", "shop").code == 0
    assert home("user", "add", "ann", "--tenant", "acme-x").code == 0
    plain = home("client-config", client).good
    tenants = home("client-config", client, "--tenant", "acme-x").good
    by_token = home("client-config", client, "--token-id", home.token("--user", "ann")[0])
    assert by_token.good == tenants
    assert "tenant acme-x: active" in by_token.err
    if client not in ("vscode", "claude-desktop"):
        assert "MCP_TOKEN" in plain
        tenants = tenants.replace("MCP_TOKEN_ACME_X", "MCP_TOKEN")
    assert "mcpctl-acme-x" in tenants
    assert tenants.replace("mcpctl-acme-x", "mcpctl") == plain
    assert home("client-config", client, "--tenant", "none").code == 4


def test_who_is_taken_in_is_told_the_name_of_the_tenants_server(home: Home, tmp_path: Path) -> None:
    assert home("tenant", "add", "acme", "--database", "both").code == 0
    onboard = ("user", "onboard", "ann", "--database", "both", "--expiry", "1d", "--client", "cursor", "--print-sql")
    done = home(*onboard, "--tenant", "acme", "--out", str(tmp_path / "ann.token"))
    assert "CREATE ROLE" in done.good
    assert '"mcpctl-acme"' in done.err


def test_adding_a_tenant_says_what_it_does_not_hide(home: Home) -> None:
    schema = home("tenant", "add", "acme", "--database", "both", "--schema", "acme")
    assert "names of all schemas, tables and columns, and about how many rows they have, show" in schema.err
    assert "mcpctl database add acme" in schema.err
    assert "nobody could look whether the schema acme of both is there" in schema.err
    whole = home("tenant", "add", "wid", "--database", "shop")
    assert "the names of its databases and roles show to all" in whole.err


def test_a_tenants_database_gets_no_second_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", f"{_TWO}  again: {{host: /nonexistent, dbname: shop, user: other}}\n")
    refused = home("tenant", "add", "acme", "--database", "shop")
    assert (refused.code, "shop is in PostgreSQL the same as again" in refused.error) == (5, True)
    text = home.config.read_text()
    home.config.write_text("".join(line for line in text.splitlines(keepends=True) if "again" not in line))
    assert home("tenant", "add", "acme", "--database", "shop").code == 0
    again = ("--host", "/nonexistent", "--dbname", "shop", "--user", "other", "--no-test")
    refused = home("database", "add", "again", *again)
    assert (refused.code, "where the tenant acme has the database shop" in refused.error) == (5, True)
    assert "again" not in home.config.read_text()
    assert home("tenant", "add", "wid", "--database", "both").code == 0
    refused = home("database", "add", "again", *again[:2], "--dbname", "both", "--roles", "per_user", "--no-test")
    assert (refused.code, "where the tenant wid has the database both" in refused.error) == (5, True)
    assert home("tenant", "remove", "wid", "--yes").code == 0
    refused = home("database", "add", "again", *again[:2], "--dbname", "both", "--roles", "per_user", "--no-test")
    assert (refused.code, "where no tenant is, give one a login" in refused.err) == (3, True)
    assert home("database", "add", "else", *again[:3], "else", *again[4:]).code == 0
    home.config.write_text(text)
    for command in (("config", "check"), ("serve", "--port", "0")):
        refused = home(*command)
        assert (refused.code, "tenants.yaml:3: acme: shop and again of the config" in refused.error) == (3, True)


# -- what decides by the file, and what mends it --------------------------------------------------------------------


def _lose(home: Home) -> bytes:
    """The tenant file as if there had never been any; what it held."""
    path = home.folder / "tenants.yaml"
    before = path.read_bytes()
    path.write_bytes(b"version: 1\ntenants: {}\n")
    return before


def test_what_decides_by_tenants_refuses_while_one_is_lost_and_what_mends_it_works(home: Home) -> None:
    assert home("tenant", "add", "acme", "--database", "both", "--schema", "acme").code == 0
    assert home("user", "add", "ann", "--tenant", "acme").code == 0
    assert home("user", "add", "sam").code == 0
    token = home.token("--user", "sam")[0]
    _lose(home)
    for command in (
        ("user", "grant", "sam", "--database", "both", "--schema", "acme", "--access", "read"),
        ("token", "add", "--user", "sam", "--expiry", "1d"),
        ("user", "add", "eve"),
        ("tenant", "add", "wid", "--database", "shop"),
        ("database", "remove", "both", "--yes"),
        ("can", "sam", "select", "acme.t", "--database", "both"),
    ):
        refused = home(*command)
        assert (refused.code, "there is no tenant acme, and the user ann" in refused.error) == (3, True), refused.err
    assert home("token", "revoke", token).code == 0
    assert home("user", "disable", "sam").code == 0
    assert home("tenant", "add", "acme", "--database", "both", "--schema", "acme").code == 0
    _lose(home)
    assert home("user", "remove", "ann", "--yes").code == 0
    assert home("user", "add", "eve").code == 0


def test_a_tenants_database_that_is_not_in_the_config_is_a_fault(home: Home) -> None:
    assert home("tenant", "add", "acme", "--database", "shop").code == 0
    path = home.folder / "tenants.yaml"
    path.write_text(path.read_text().replace("database: shop", "database: shopp"))
    for command in (
        ("config", "check"),
        ("serve", "--port", "0"),
        ("token", "add", "--expiry", "1d", "--database", "shop"),
        ("user", "add", "sam"),
    ):
        refused = home(*command)
        assert (refused.code, "tenants.yaml:3: acme: there is no database shopp" in refused.error) == (3, True)
    assert home("tenant", "remove", "acme", "--yes").code == 0
    assert home("user", "add", "sam").code == 0


def test_no_hint_is_to_be_refused(home: Home) -> None:
    assert home("tenant", "add", "acme", "--database", "both", "--schema", "acme").code == 0
    added = home("user", "add", "bob")
    assert (added.code, "user grant" in added.err) == (0, False)
    made = home("token", "add", "--user", "bob", "--expiry", "1d", "--database", "both")
    assert "mcpctl user grant bob --database both --schema S --access read" in made.err
    assert "user grant ann --database both --access read" in home("user", "add", "ann", "--tenant", "acme").err
    assert home("user", "remove", "ann", "--yes").code == 0
    assert home("tenant", "remove", "acme", "--yes").code == 0
    assert home("tenant", "add", "acme", "--database", "both").code == 0
    assert "user grant" not in home("token", "add", "--user", "bob", "--expiry", "1d").err


def test_who_still_has_a_grant_in_another_tenants_place_is_granted_nothing(home: Home) -> None:
    for name in ("north", "south"):
        assert home("tenant", "add", name, "--database", "both", "--schema", name).code == 0
    grant = ("user", "grant", "nora", "--database", "both", "--access", "read")
    assert home("user", "add", "nora", "--tenant", "north").code == 0
    assert home(*grant).code == 0
    path = home.folder / "users.yaml"
    moved = path.read_text()
    for tenant, said in (("south", "nora has a grant on north in both"), ("null", "is the tenant north's alone")):
        path.write_text(moved.replace("tenant: north", f"tenant: {tenant}"))
        before = path.read_text()
        refused = home(*grant, "--schema", "south" if tenant == "south" else "public")
        assert (refused.code, said in refused.error, path.read_text()) == (5, True, before), refused.err
    assert home("user", "ungrant", "nora", "--database", "both").code == 0
    assert home(*grant, "--schema", "public").code == 0


def test_who_loses_a_database_that_becomes_a_tenants_is_named(home: Home) -> None:
    for user in ("sam", "ida"):
        assert home("user", "add", user).code == 0
    named = [home.token("--database", "shop")[0], home.token("--user", "sam", "--database", "shop")[0]]
    home.token("--user", "sam")
    added = home("tenant", "add", "acme", "--database", "shop")
    assert "shop is closed from now on to whoever belongs to no tenant: sam, ida\n" in added.err
    assert f"2 living tokens name shop, and may ask it no more: {', '.join(named)}\n" in added.err
    assert "closed" not in home("tenant", "add", "wid", "--database", "both").err


def test_a_schema_that_service_tokens_reach_becomes_no_tenants(newest_shop: Shop, tmp_path: Path) -> None:
    cluster = newest_shop.cluster
    service = f"    service_dsn: postgresql://{READER}@/shop?host={cluster.host}&port={cluster.port}\n"
    service += "    service_password_file: shop.password\n"
    at = Site(tmp_path / "site", newest_shop, per_user=True, database=service)
    add = ("tenant", "add", "north", "--database", "shop", "--schema", "north_5")

    def failures() -> list[str]:
        found = json.loads(at.run("doctor", "--json", check=False).stdout)["findings"]
        return [one["what"] for one in found if one["status"] == "fail"]

    with newest_shop.admin() as connection:
        connection.execute(f"CREATE SCHEMA north_5; GRANT USAGE ON SCHEMA north_5 TO {READER}".encode())
        try:
            refused = at.run(*add, check=False)
            assert (refused.returncode, f"as {READER}, who may use the schema north_5 of shop" in refused.stderr) == (
                5,
                True,
            )
            assert f'REVOKE ALL ON SCHEMA north_5 FROM "{READER}", PUBLIC' in refused.stderr
            connection.execute(f"REVOKE ALL ON SCHEMA north_5 FROM {READER}".encode())
            at.run(*add)
            typo = at.run("tenant", "add", "south", "--database", "shop", "--schema", "north_55", check=False)
            assert (typo.returncode, "there is no schema north_55 in shop" in typo.stderr) == (4, True)
            assert failures() == []
            connection.execute(b"GRANT USAGE ON SCHEMA north_5 TO PUBLIC")
            assert failures() == [
                f"{READER} may use the schema north_5 of shop, which is the tenant north's",
                "PUBLIC may use the schema north_5 of shop, and so may every tenant",
            ]
        finally:
            connection.execute(b"DROP SCHEMA north_5")
