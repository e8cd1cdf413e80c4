"""Those whom an outside issuer vouches for, at the door: which user they are, what they may, and when it is over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from authenticating import HERE, THERE, House, house
from issuer import Answer, Issuer, as_json, running
from mcpctl.config_keys import Auth
from mcpctl.config_sign_in import Introspection
from mcpctl.errors import LimitedError, NotFoundError, UnauthorizedError, UnavailableError
from mcpctl.identity import guests, linking, tenants, users
from mcpctl.identity.guest_book import GuestBook
from mcpctl.identity.links import Link
from mcpctl.identity.oidc import Issuers
from mcpctl.identity.principal import Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.vouched import Visitors
from mcpctl.policy.access import Access
from mcpctl.state import State

__all__ = ["house"]
T = TypeVar("T")
LONG = timedelta(minutes=10)


class Site:
    """The house, and an issuer whose tokens open it."""

    def __init__(self, house: House, issuer: Issuer, folder: Path) -> None:
        self.house = house
        self.issuer = issuer
        self.state = State(folder / "state.db")
        self.book = GuestBook(self.state, lambda: house.now)

    def use(self, work: Callable[[Site], Coroutine[Any, Any, T]], **config: Any) -> T:
        """What `work` makes of it, on an event loop of its own."""

        async def run() -> T:
            visitors = Visitors(Issuers({"shop": self.issuer.config(**config)}, lambda: self.house.now))
            self.house.door.visitors, self.house.door.guests = visitors, self.book
            try:
                return await work(self)
            finally:
                await visitors.close()

        return asyncio.run(run())

    async def enter(self, text: str) -> Principal:
        return await self.house.door.authenticate(text, HERE)

    async def refused(self, text: str) -> str:
        with pytest.raises(UnauthorizedError) as caught:
            await self.enter(text)
        assert text not in caught.value.message
        return caught.value.message

    def token(self, **more: Any) -> str:
        """A token of the issuer's, made now."""
        seconds = int(self.house.now.timestamp())
        return self.issuer.token(**{"iat": seconds, "exp": seconds + 300} | more)

    def link(self, name: str, subject: str = "5f0c-alice") -> None:
        linking.link(self.house.users, name, Link(self.issuer.url, subject))


@pytest.fixture
def site(house: House, tmp_path: Path) -> Iterator[Site]:
    with running() as issuer:
        found = Site(house, issuer, tmp_path)
        yield found
        found.state.close()


def test_a_linked_identity_comes_in_as_its_user_with_the_issuers_roles(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        found = await site.enter(site.token())
        assert (found.user, found.person, found.claimed, found.as_user) == ("alice", "alice", ("mcp-user",), None)
        assert (found.token or "").startswith("J")
        access = Access(Auth())
        assert access.may(found, "tools:query_database").allowed
        assert not access.may(found, "tools:execute_statement").allowed
        more = await site.enter(site.token(realm_access={"roles": ["mcp-tools"]}))
        assert access.may(more, "tools:execute_statement").allowed

    site.use(work)


def test_roles_in_users_yaml_and_those_of_the_issuer_bound_each_other(site: Site) -> None:
    site.link("alice")
    users.set_roles(site.house.users, "alice", ["mcp-tools"])

    async def work(_: Site) -> None:
        access = Access(Auth())
        less = await site.enter(site.token())
        assert access.may(less, "tools:query_database").allowed
        refused = access.may(less, "tools:execute_statement")
        assert not refused.allowed
        assert "by its issuer it has the roles mcp-user" in refused.reason
        admin = await site.enter(site.token(realm_access={"roles": ["mcp-admin"]}))
        assert access.may(admin, "tools:execute_statement").allowed
        assert not access.may(admin, "tools:set_pg_configuration").allowed

    site.use(work)


def test_an_identity_without_a_user_is_refused(site: Site) -> None:
    async def work(_: Site) -> None:
        assert "is linked to no user" in await site.refused(site.token())

    site.use(work)


def test_a_name_that_changes_hands_does_not_change_whose_a_token_is(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        assert "is linked to no user" in await site.refused(
            site.token(sub="9999-mallory", preferred_username="alice", email="alice@example.org")
        )

    site.use(work)


def test_a_renewed_token_keeps_its_pool_and_what_is_open_ends_with_the_last(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        door = site.house.door
        first_text = site.token()
        first = await site.enter(first_text)
        site.house.later(minutes=4)
        second = await site.enter(site.token())
        assert (second.pool, second.token, second.edition) == (first.pool, first.token, first.edition)
        site.house.later(minutes=2)
        assert "expired" in await site.refused(first_text)
        assert door.still_valid(first)
        assert door.expired() == []
        site.house.later(minutes=4)
        assert door.expired() == [first.token]
        assert not door.still_valid(second)

    site.use(work)


def test_disabling_unlinking_or_removing_the_user_ends_it_at_the_next_look(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        door, text = site.house.door, site.token()
        first = await site.enter(text)
        users.disable(site.house.users, "alice", site.house.now)
        door.refresh()
        assert site.house.ended == [{first.token: "its user is disabled"}]
        assert "is disabled" in await site.refused(text)
        users.disable(site.house.users, "alice", None)
        again = await site.enter(text)
        linking.unlink(site.house.users, "alice", Link(site.issuer.url, "5f0c-alice"))
        door.refresh()
        assert site.house.ended[-1] == {again.token: "its identity is not linked to alice any more"}
        assert not door.still_valid(again)
        await site.refused(text)
        site.link("alice")
        third = await site.enter(text)
        users.remove(site.house.users, "alice")
        door.refresh()
        assert site.house.ended[-1] == {third.token: "its user is gone"}
        await site.refused(text)

    site.use(work)


def test_an_identity_that_is_linked_to_another_user_is_the_other_one_at_once(site: Site) -> None:
    site.link("alice")
    users.add(site.house.users, "bob", None, site.house.now)

    async def work(_: Site) -> None:
        text = site.token()
        first = await site.enter(text)
        linking.unlink(site.house.users, "alice", Link(site.issuer.url, "5f0c-alice"))
        site.link("bob")
        second = await site.enter(text)
        assert (first.user, second.user) == ("alice", "bob")
        assert first.pool != second.pool
        assert not site.house.door.still_valid(first)

    site.use(work)


def test_a_tenant_that_is_not_the_users_is_refused(site: Site) -> None:
    site.link("alice")
    path = site.house.tokens.path.with_name("tenants.yaml")
    file = tenants.tenant_file(path)
    with file.edit() as entries:
        entries["acme"] = Tenant("acme", site.house.now, "shop")
    with site.house.users.edit() as people:
        people["carol"] = users.User("carol", site.house.now, tenant="acme")
    linking.link(site.house.users, "carol", Link(site.issuer.url, "carol-1"))

    async def work(_: Site) -> None:
        assert "its tenant acme is not that of its user" in await site.refused(site.token(tenant="acme"))
        assert (await site.enter(site.token(sub="carol-1", tenant="acme"))).tenant == "acme"

    site.use(work, tenant_claim="tenant")


def test_an_issuer_that_cannot_be_asked_says_nothing_about_a_token(site: Site) -> None:
    site.link("alice")
    site.issuer.answers["/keys"] = Answer(status=500)

    async def work(_: Site) -> None:
        with pytest.raises(UnavailableError):
            await site.enter(site.token())
        for _ in range(20):
            with pytest.raises(UnavailableError):
                await site.enter(site.token())

    site.use(work)


def test_our_own_tokens_are_never_shown_to_an_issuer(site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 40)
    (tmp_path / "secret").chmod(0o600)
    _, text = site.house.token()

    async def work(_: Site) -> None:
        await site.enter(text)
        await site.refused(text[:-1] + ("0" if text[-1] != "0" else "1"))
        await site.refused(text.replace("mcp_", "mcs_S").replace("mcs_S", "mcs_", 1))

    site.use(work, introspection=Introspection(client_id="mcpctl", client_secret_file=tmp_path / "secret"))
    assert site.issuer.asked == []


def introspected(site: Site, folder: Path) -> dict[str, Any]:
    (folder / "secret").write_text("s" * 40)
    (folder / "secret").chmod(0o600)
    return {"introspection": Introspection(client_id="mcpctl", client_secret_file=folder / "secret")}


OPAQUE = "opaque-token-0123456789abcdef"


def test_what_the_issuer_takes_away_ends_what_runs_within_its_minute(site: Site, tmp_path: Path) -> None:
    site.link("alice")

    def say(**more: Any) -> None:
        seconds = int(site.house.now.timestamp())
        claims = site.issuer.claims(iat=seconds, exp=seconds + 3600, **more)
        site.issuer.answers["/introspect"] = as_json({"active": True, **claims})

    async def work(_: Site) -> None:
        door = site.house.door
        say(realm_access={"roles": ["mcp-tools"]})
        first = await site.enter(OPAQUE)
        say(realm_access={"roles": ["mcp-user"]})
        await door.look_again()
        assert door.still_valid(first), "an answer holds for a minute at most"
        site.house.later(seconds=60)
        await door.look_again()
        assert not door.still_valid(first)
        assert site.house.ended == [{first.token: "no longer vouched for"}]
        second = await site.enter(OPAQUE)
        assert second.claimed == ("mcp-user",)
        site.issuer.answers["/introspect"] = as_json({"active": False})
        site.house.later(seconds=60)
        await door.look_again()
        assert not door.still_valid(second)
        await site.refused(OPAQUE)

    site.use(work, **introspected(site, tmp_path))


def test_a_dead_token_is_asked_about_once_in_half_a_minute(site: Site, tmp_path: Path) -> None:
    site.issuer.answers["/introspect"] = as_json({"active": False})

    async def work(_: Site) -> None:
        for _ in range(20):
            await site.refused(OPAQUE)
        assert site.issuer.count("/introspect") == 1
        site.house.later(seconds=30)
        await site.refused(OPAQUE)
        assert site.issuer.count("/introspect") == 2

    site.use(work, **introspected(site, tmp_path))


def test_who_shows_much_garbage_at_a_slow_issuer_keeps_nobody_else_out(site: Site, tmp_path: Path) -> None:
    site.link("alice")
    gate = threading.Event()
    good = site.issuer.claims(**_now(site))
    site.issuer.about[OPAQUE] = {"active": True, **good}

    async def work(_: Site) -> None:
        site.issuer.answers["/introspect"] = as_json({"active": False}, gate=gate)
        door = site.house.door
        strangers = [asyncio.create_task(door.authenticate(f"garbage-number-{n:05}", HERE)) for n in range(64)]
        while site.issuer.count("/introspect") < 8:
            await asyncio.sleep(0.01)
        told = [task.exception() for task in strangers if task.done()]
        assert len(told) == 64 - 16
        assert {type(one) for one in told} == {LimitedError}
        other = asyncio.create_task(door.authenticate(OPAQUE, THERE))
        await asyncio.sleep(0)
        del site.issuer.answers["/introspect"]
        gate.set()
        assert (await other).user == "alice"
        await asyncio.gather(*strangers, return_exceptions=True)

    site.use(work, **introspected(site, tmp_path))


def _now(site: Site) -> dict[str, int]:
    seconds = int(site.house.now.timestamp())
    return {"iat": seconds, "exp": seconds + 3600}


def test_an_issuer_that_is_away_ends_nothing_that_runs_and_lets_nobody_new_in(site: Site, tmp_path: Path) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        door = site.house.door
        seconds = int(site.house.now.timestamp())
        good = site.issuer.claims(iat=seconds, exp=seconds + 3600)
        site.issuer.answers["/introspect"] = as_json({"active": True, **good})
        first = await site.enter(OPAQUE)
        site.issuer.answers["/introspect"] = Answer(status=500)
        site.house.later(seconds=61)
        await door.look_again()
        assert door.still_valid(first)
        with pytest.raises(UnavailableError):
            await site.enter(OPAQUE)
        site.house.later(hours=1)
        assert door.expired() == [first.token]

    site.use(work, **introspected(site, tmp_path))


# -- guests ------------------------------------------------------------------------------------------------------------

GUESTS = {"just_in_time": {"analyst": "analysts"}, "roles": {"analyst": "mcp-user"}}
ANALYST = {"realm_access": {"roles": ["analyst"]}}


@pytest.fixture
def group(site: Site) -> None:
    users.add(site.house.users, "analysts", None, site.house.now)


@pytest.mark.usefixtures("group")
def test_a_guest_has_a_name_of_their_own_and_the_login_roles_of_the_user_made_for_their_role(site: Site) -> None:
    async def work(_: Site) -> None:
        found = await site.enter(site.token(**ANALYST))
        assert found.user == guests.name_of(site.issuer.url, "5f0c-alice")
        assert (found.person, found.as_user, found.claimed) == ("analysts", "analysts", ("mcp-user",))
        other = await site.enter(site.token(sub="other", **ANALYST))
        assert other.user != found.user
        assert other.pool != found.pool
        assert [(one.shown, one.as_user) for one in site.book.known.values()] == [("alice", "analysts")] * 2
        assert "is linked to no user" in await site.refused(site.token(sub="third"))

    site.use(work, **GUESTS)


@pytest.mark.usefixtures("group")
def test_a_disabled_guest_is_cut_at_the_next_look_and_the_others_stay(site: Site, tmp_path: Path) -> None:
    async def work(_: Site) -> None:
        text = site.token(**ANALYST)
        first, other = await site.enter(text), await site.enter(site.token(sub="other", **ANALYST))
        command = State(tmp_path / "state.db")
        GuestBook(command, lambda: site.house.now).disable(first.user or "", site.house.now)
        site.house.door.refresh()
        assert site.house.ended == [{first.token: f"its user {first.user} is disabled"}]
        assert not site.house.door.still_valid(first)
        assert site.house.door.still_valid(other)
        assert "is disabled" in await site.refused(text)
        GuestBook(command, lambda: site.house.now).disable(first.user or "", None)
        assert (await site.enter(text)).user == first.user
        command.close()

    site.use(work, **GUESTS)


@pytest.mark.usefixtures("group")
def test_a_guest_who_gets_a_user_of_their_own_is_that_user_from_then_on(site: Site) -> None:
    async def work(_: Site) -> None:
        text = site.token(**ANALYST)
        first = await site.enter(text)
        site.link("alice")
        site.house.door.refresh()
        assert site.house.ended == [{first.token: "its identity is linked to alice by now"}]
        assert (await site.enter(text)).user == "alice"

    site.use(work, **GUESTS)


@pytest.mark.usefixtures("group")
def test_guests_go_with_the_user_whose_login_roles_they_have(site: Site) -> None:
    async def work(_: Site) -> None:
        text = site.token(**ANALYST)
        first = await site.enter(text)
        users.disable(site.house.users, "analysts", site.house.now)
        site.house.door.refresh()
        assert not site.house.door.still_valid(first)
        assert "analysts is disabled" in await site.refused(text)

    site.use(work, **GUESTS)


@pytest.mark.usefixtures("group")
def test_while_nobody_can_say_who_is_disabled_no_guest_is_let_in(site: Site) -> None:
    site.link("alice", "linked-1")

    async def work(_: Site) -> None:
        text, linked = site.token(**ANALYST), site.token(sub="linked-1", **ANALYST)
        first = await site.enter(text)
        whole = site.state.path.read_bytes()
        site.state.path.write_bytes(b"x" * 100)
        assert "is disabled" in await site.refused(text)
        assert not site.house.door.still_valid(first)
        assert (await site.enter(linked)).user == "alice"
        site.state.close()
        for path in site.state.path.parent.glob("state.db*"):
            path.unlink()
        site.state.path.touch(0o600)
        site.state.path.write_bytes(whole)

    site.use(work, **GUESTS)


def test_guests_are_read_again_when_something_of_them_has_changed_and_not_with_each_write(
    site: Site, tmp_path: Path
) -> None:
    other = GuestBook(State(tmp_path / "state.db"), lambda: site.house.now)

    async def work(_: Site) -> None:
        name = (await site.enter(site.token())).user or ""
        assert not site.book.look()
        with other._state.change() as connection:
            connection.execute("UPDATE session_changes SET last = last + 1")
        assert not site.book.look()
        for when in (site.house.now, None):
            assert other.disable(name, when)
            assert site.book.look()
            assert site.book.known[name].disabled_at == when

    users.add(site.house.users, "reader", None, site.house.now)
    site.use(work, just_in_time={"mcp-user": "reader"})
    other._state.close()


def test_a_guest_who_never_came_cannot_be_disabled(site: Site) -> None:
    with pytest.raises(NotFoundError):
        site.book.disable("x-nobody", datetime.now(UTC))


def test_who_shows_many_tokens_ends_nothing_of_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcpctl.identity.vouched._MOST", 20)
    users.add(site.house.users, "bob", None, site.house.now)
    site.link("alice")
    site.link("bob", "9a1c-bob")

    async def work(_: Site) -> None:
        found, door = await site.enter(site.token()), site.house.door
        many = [await site.enter(site.token(sub="9a1c-bob", jti=f"number {number}")) for number in range(25)]
        await door.look_again()
        assert site.house.ended == []
        assert door.still_valid(found)
        assert door.still_valid(many[0])
        assert await site.enter(site.token(sub="9a1c-bob", jti="number 0")) == many[0]

    site.use(work)


def test_looking_again_forgets_those_who_have_gone(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        found = await site.enter(site.token())
        site.house.now += LONG
        assert site.house.door.expired() == [found.token]
        await site.house.door.look_again()
        assert found.token not in site.house.door._seen

    site.use(work)
