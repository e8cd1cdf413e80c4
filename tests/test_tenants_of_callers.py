"""What a credential says of its tenant from one moment to the next, and who is let in while the tenant file is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mcpctl import private_file
from mcpctl.config_keys import Auth, Database
from mcpctl.errors import ConfigError, ForbiddenError, UnauthorizedError, UnavailableError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.grants import Grant
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.keyring import Keyring
from mcpctl.policy.access import Access
from mcpctl.postgres.logins import Logins

START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
ACME = Tenant("acme", START, "acme")
WIDGETS = Tenant("widgets", START, "widgets")


class Door:
    """An authenticator whose files have a user of acme, one of widgets, and one of nobody."""

    def __init__(self, folder: Path) -> None:
        self.tokens = tokens.token_file(folder / "tokens.yaml")
        self.users = users.user_file(folder / "users.yaml")
        self.tenants = tenants.tenant_file(folder / "tenants.yaml")
        private_file.create(self.tokens.path, self.tokens.render({}))
        private_file.create(self.users.path, self.users.render({}))
        private_file.create(self.tenants.path, self.tenants.render({}))
        tenants.add(self.tenants, ACME)
        tenants.add(self.tenants, WIDGETS)
        self.texts: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        for name, tenant in (("ann", "acme"), ("wil", "widgets"), ("sam", None)):
            users.add(self.users, name, None, START, tenant=tenant)
            entry, self.texts[name] = tokens.add(self.tokens, tokens.Wanted(user=name, expires_at=None), START)
            self.ids[name] = entry.id
        self.ended: list[dict[str, str]] = []
        databases = ("acme", "widgets", "both")
        self.door = Authenticator(self.tokens.path, self.users.path, self.tenants.path, databases=databases)
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


def test_a_tenant_that_is_gone_lets_nobody_in_since_its_database_would_be_everybodys(door: Door) -> None:
    before = {name: door.enter(name) for name in ("ann", "wil", "sam")}
    door.put("acme", None)
    for name in before:
        with pytest.raises(UnavailableError, match="there is no tenant acme, and the user ann belongs to it"):
            door.enter(name)
    door.put("acme", ACME)
    assert {name: door.enter(name) for name in before} == before


def test_a_tenant_that_moves_cuts_what_was_open_and_opens_the_new_place_alone(door: Door) -> None:
    before, other = door.enter("ann"), door.enter("wil")
    moved = Tenant("acme", START, "both", "acme")
    door.put("acme", moved)
    after = door.enter("ann")
    assert door.ended == [{door.ids["ann"]: "its user's tenant changed"}]
    assert not door.door.in_force(before, "both")
    assert door.door.in_force(after, "both")
    assert after.within == moved
    assert not Access(Auth()).may(after, "databases:acme:read").allowed
    assert door.door.in_force(other, "both")


def test_a_user_who_changes_tenants_is_cut_and_sees_the_new_one_alone(door: Door) -> None:
    before = door.enter("ann")
    with door.users.edit() as entries:
        entries["ann"] = replace(entries["ann"], tenant="widgets")
    after = door.enter("ann")
    assert (after.tenant, after.within) == ("widgets", WIDGETS)
    assert door.ended == [{door.ids["ann"]: "its user's tenant changed"}]
    assert not door.door.in_force(before, "acme")
    assert door.door.in_force(after, "acme")


def test_a_user_of_nobody_who_comes_to_a_tenant_is_cut_too(door: Door) -> None:
    before = door.enter("sam")
    with door.users.edit() as entries:
        entries["sam"] = replace(entries["sam"], tenant="acme")
    assert door.enter("sam").within == ACME
    assert not door.door.in_force(before, "acme")


@pytest.mark.parametrize("left", [None, b"version: 1\ntenants:\n"], ids=["gone", "emptied"])
def test_a_tenant_file_that_is_lost_lets_nobody_in_until_it_is_back(door: Door, left: bytes | None) -> None:
    door.enter("ann")
    good = door.tenants.path.read_bytes()
    door.tenants.path.unlink()
    if left is not None:
        private_file.create(door.tenants.path, left)
    for name in ("ann", "wil", "sam"):
        with pytest.raises(UnavailableError, match=r"there is no (file|tenant)"):
            door.enter(name)
    door.tenants.path.unlink(missing_ok=True)
    private_file.create(door.tenants.path, good)
    assert door.enter("ann").within == ACME


def test_a_lost_file_lets_nobody_in_where_no_user_belongs_to_a_tenant(door: Door) -> None:
    """The tenant's database would be open to everybody else; an editor moves the file aside while it writes."""
    users.remove(door.users, "ann")
    users.remove(door.users, "wil")
    assert set(door.enter("sam").closed) == {"acme", "widgets"}
    aside = door.tenants.path.rename(door.tenants.path.with_suffix(".bak"))
    with pytest.raises(UnavailableError, match="there is no file"):
        door.enter("sam")
    aside.rename(door.tenants.path)
    assert set(door.enter("sam").closed) == {"acme", "widgets"}


def test_who_calls_without_a_token_needs_no_file_and_where_one_is_the_tenants_file(tmp_path: Path) -> None:
    door = Authenticator(tmp_path / "tokens.yaml", tmp_path / "users.yaml")
    assert door.local() is LOCAL
    private_file.create(tmp_path / "users.yaml", b"version: 1\nusers: {}\n")
    with pytest.raises(ConfigError, match="there is no file"):
        door.local()
    private_file.create(tmp_path / "tenants.yaml", b"version: 1\ntenants: {}\n")
    assert door.local() is LOCAL
    door.close()


def test_a_tenant_file_that_is_broken_lets_nobody_in_until_it_is_mended(door: Door) -> None:
    door.enter("ann")
    good = door.tenants.path.read_bytes()
    twice = good.replace(b"database: widgets", b"database: acme")
    listed = good.replace(b"database: acme", b"database: [acme]")
    for broken in (good + b"  acme: {}\n", twice, b"", listed, b"\xff"):
        door.tenants.path.write_bytes(broken)
        for name in ("ann", "wil", "sam"):
            with pytest.raises(UnavailableError):
                door.enter(name)
    door.tenants.path.write_bytes(good)
    assert door.enter("ann").within == ACME
    door.tenants.path.chmod(0o644)
    with pytest.raises(UnavailableError):
        door.enter("sam")


def test_a_tenant_whose_database_is_lost_lets_nobody_in_but_a_new_one_may_come_with_its_database(door: Door) -> None:
    """`database add` and `tenant add` are seen by a server that knows the database from its next start on."""
    assert set(door.enter("sam").closed) == {"acme", "widgets"}
    for name in ("new", "newer"):
        door.put(name, Tenant(name, START, name))
        assert name in door.enter("sam").closed
    door.put("acme", Tenant("acme", START, "acmee"))
    for name in ("ann", "sam"):
        with pytest.raises(UnavailableError, match="acme: there is no database acmee in the config"):
            door.enter(name)
    door.put("acme", ACME)
    assert door.enter("ann").within == ACME
    again = Authenticator(door.tokens.path, door.users.path, door.tenants.path, databases=("acme", "widgets"))
    with pytest.raises(ConfigError, match="new: there is no database new"):
        again.read()
    again.close()


@pytest.mark.parametrize("granted", ["*", "north", "north.t"])
def test_a_grant_in_a_schema_that_has_become_a_tenants_opens_nothing_there(door: Door, granted: str) -> None:
    with door.users.edit() as entries:
        grant = Grant("both", (granted,), passwords={"read": "sealed"})
        entries["sam"] = replace(entries["sam"], grants={"both": grant})
    access, before = Access(Auth()), door.enter("sam")
    assert access.may(before, "databases:both:read").allowed
    door.put("north", Tenant("north", START, "both", "north"))
    decision = access.may(door.enter("sam"), "databases:both:read")
    why = "the user's grant reaches the schema north of both, which is the tenant north's"
    assert (decision.allowed, decision.reason) == (False, why)
    assert door.ended == [{door.ids["sam"]: "both is a tenant's alone now"}]
    assert not door.door.in_force(before, "both")
    with door.users.edit() as entries:
        entries["sam"] = replace(entries["sam"], grants={"both": replace(grant, read=("public",))})
    assert access.may(door.enter("sam"), "databases:both:read").allowed


def test_who_belongs_to_a_tenant_is_told_that_settings_are_not_theirs(door: Door) -> None:
    shared = {"acme": Database(dsn="host=/nowhere user=reader dbname=acme", roles="per_user", settings=("work_mem",))}
    with pytest.raises(ForbiddenError, match="settings are the whole cluster's") as caught:
        Logins(shared, Keyring(Path("/nonexistent"))).of(door.enter("ann"), "acme", "admin")
    assert "--access admin" not in (caught.value.hint or "")
