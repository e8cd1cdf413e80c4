"""A name that comes back is somebody else: nothing of the one before opens, whoever was remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mcpctl import private_file
from mcpctl.errors import UnauthorizedError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal

START = datetime(2026, 11, 1, tzinfo=UTC)


class House:
    def __init__(self, folder: Path) -> None:
        self.now = START
        self.tokens = tokens.token_file(folder / "tokens.yaml")
        self.users = users.user_file(folder / "users.yaml")
        self.tenants = tenants.tenant_file(folder / "tenants.yaml")
        for file in (self.tokens, self.users, self.tenants):
            private_file.create(file.path, file.render({}))  # type: ignore[arg-type]
        for name in ("ta", "tb"):
            tenants.add(self.tenants, tenants.Tenant(name, self.now, f"d{name}"))
        self.ended: dict[str, str] = {}
        self.authenticator = Authenticator(self.tokens.path, self.users.path, self.tenants.path, now=lambda: self.now)
        self.authenticator.ended = self.ended.update

    def later(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now

    def add(self, tenant: str | None = None, *roles: str) -> None:
        users.add(self.users, "sam", None, self.later(), roles or None, tenant)

    def token(self) -> str:
        return tokens.add(self.tokens, tokens.Wanted(user="sam"), self.later())[1]

    def enter(self, text: str) -> Principal:
        return asyncio.run(self.authenticator.authenticate(text, None))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    found = House(tmp_path)
    yield found
    found.authenticator.close()


@pytest.mark.parametrize("used", [True, False], ids=["remembered", "never used"])
@pytest.mark.parametrize("noticed", [True, False], ids=["the removal was noticed", "it was not"])
def test_a_token_of_a_user_who_was_removed_opens_nothing_when_the_name_comes_back(
    house: House, used: bool, noticed: bool
) -> None:
    house.add("ta", "mcp-admin")
    old = house.token()
    if used:
        assert house.enter(old).tenant == "ta"
    users.remove(house.users, "sam")
    if noticed:
        with pytest.raises(UnauthorizedError, match="is gone"):
            house.enter(old)
    house.add("tb")
    with pytest.raises(UnauthorizedError, match="given to another sam"):
        house.enter(old)
    new = house.enter(house.token())
    assert (new.tenant, new.roles) == ("tb", None)
    if used:
        assert house.ended


def test_a_database_that_becomes_a_tenants_alone_is_closed_to_who_had_it(house: House) -> None:
    house.add()
    text = house.token()
    before = house.enter(text)
    assert set(before.closed) == {"dta", "dtb"}
    tenants.add(house.tenants, tenants.Tenant("tc", house.later(), "dtc"))
    after = house.enter(text)
    assert set(after.closed) == {"dta", "dtb", "dtc"}
    assert "dtc is a tenant's alone now" in house.ended.values()
    assert [house.authenticator.in_force(before, name) for name in ("dtc", "dtd")] == [False, True]
    assert house.authenticator.in_force(after, "dtc")
