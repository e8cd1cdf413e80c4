"""What a principal may do: patterns, and a token's databases and permissions."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl.config import covers
from mcpctl.config_keys import Auth, Role
from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.policy import roles
from mcpctl.policy.access import Access, within
from mcpctl.tools.caller import WHOAMI
from mcpctl.tools.definition import Databases

PART = st.text(alphabet="abc_-.", min_size=1, max_size=3)


@pytest.mark.parametrize(
    "pattern, permission, covered",
    [
        ("*", "tools:query_database", True),
        ("*", "databases:sales:read", True),
        ("tools:*", "tools:query_database", True),
        ("tools:*", "databases:sales:read", False),
        ("tools:query_database", "tools:query_database", True),
        ("tools:query_database", "tools:query_database:x", False),
        ("tools:query", "tools:query_database", False),
        ("tools", "tools:query_database", False),
        ("databases:*", "databases:sales:read", True),
        ("databases:*:read", "databases:sales:read", True),
        ("databases:*:read", "databases:sales:write", False),
        ("databases:*:read", "databases:sales", False),
        ("databases:sales:*", "databases:sales:read", True),
        ("databases:sales:*", "databases:sales2:read", False),
        ("databases:sales:read", "databases:sales:read", True),
        ("databases:sales:read", "databases:sales", False),
        ("databases:sales:read:x", "databases:sales:read", False),
        ("*:sales:read", "databases:sales:read", True),
        ("*:*:read", "databases:sales:read", True),
        ("*:*:write", "databases:sales:read", False),
        ("databases:s*:read", "databases:sales:read", False),
        ("", "tools:whoami", False),
        ("", "", True),
        (":", "tools:whoami", False),
    ],
)
def test_a_pattern_covers_what_it_should_and_nothing_else(pattern: str, permission: str, covered: bool) -> None:
    assert covers(pattern, permission) is covered


@given(st.lists(PART, min_size=1, max_size=4), st.lists(PART, min_size=1, max_size=4))
def test_without_a_star_a_pattern_covers_itself_alone(one: list[str], other: list[str]) -> None:
    assert covers(":".join(one), ":".join(other)) is (one == other)


@given(st.lists(PART, min_size=1, max_size=4), st.data())
def test_a_star_in_any_place_covers_at_least_what_stood_there(parts: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(parts) - 1))
    pattern = [*parts[:place], "*", *parts[place + 1 :]]
    assert covers(":".join(pattern), ":".join(parts))


PATTERN = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3).map(":".join)


@given(PATTERN, PATTERN, st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(":".join))
def test_what_is_within_a_bound_is_what_both_cover(one: str, bound: str, permission: str) -> None:
    both = covers(one, permission) and covers(bound, permission)
    assert any(covers(found, permission) for found in within([one], [bound])) == both


def principal(databases: tuple[str, ...] | None = None, permissions: tuple[str, ...] | None = None) -> Principal:
    return Principal("ab12cd34", "alice", "pool", databases, permissions)


@pytest.mark.parametrize(
    "databases, permissions, permission, allowed, reason",
    [
        (None, None, "tools:query_database", True, "all that its user has"),
        (None, None, "databases:sales:read", True, "all that its user has"),
        (("sales",), None, "databases:sales:read", True, "all that its user has"),
        (("sales",), None, "databases:shop:read", False, "for the databases sales"),
        (("sales", "hr"), None, "databases:shop:read", False, "for the databases sales, hr"),
        ((), None, "databases:shop:read", False, "(none)"),
        (("sales",), None, "tools:query_database", True, ""),
        (None, ("tools:*",), "tools:whoami", True, "the token's permission tools:*"),
        (None, ("tools:*",), "databases:sales:read", False, "lacks the permission databases:sales:read"),
        (None, (), "tools:whoami", False, "lacks the permission"),
        (None, ("tools:whoami", "databases:*"), "databases:sales:read", True, "databases:*"),
        (("shop",), ("*",), "databases:sales:read", False, "for the databases shop"),
        (("shop",), ("*",), "databases:shop:read", True, "permission *"),
        (("sales",), None, "databases:sales2:read", False, ""),
    ],
)
def test_a_tokens_lists_narrow_what_its_user_has(
    databases: tuple[str, ...] | None, permissions: tuple[str, ...] | None, permission: str, allowed: bool, reason: str
) -> None:
    decision = Access(Auth()).may(principal(databases, permissions), permission)
    assert decision.allowed is allowed
    assert reason in decision.reason


@pytest.mark.parametrize(
    "given, permissions, left",
    [
        (("mcp-user",), ("*",), roles.BUILT_IN["mcp-user"]),
        (("mcp-user",), None, roles.BUILT_IN["mcp-user"]),
        (("mcp-user",), ("tools:execute_statement", "tools:whoami"), ("tools:whoami",)),
        (("mcp-user",), ("databases:sales:*",), ("databases:sales:read",)),
        (("mcp-user",), (), ()),
        (("mcp-admin",), ("tools:*",), ("tools:*",)),
        (("no-such-role",), ("*",), ()),
    ],
)
def test_what_a_token_has_is_what_its_user_has_too(
    given: tuple[str, ...], permissions: tuple[str, ...] | None, left: tuple[str, ...]
) -> None:
    assert Access(Auth()).patterns(replace(principal(permissions=permissions), roles=given)) == left


def test_a_reader_has_no_more_than_the_read_only_list() -> None:
    assert Access(Auth(read_only_users=("alice",))).patterns(of("mcp-admin")) == roles.READ_ONLY


def test_whoever_started_the_server_may_read_all_of_it() -> None:
    access = Access(Auth())
    assert access.may(LOCAL, "tools:query_database").allowed
    assert access.may(LOCAL, "databases:shop:read").allowed
    assert not access.may(LOCAL, "databases:shop:write").allowed


def of(*roles: str, user: str = "alice") -> Principal:
    return Principal("ab12cd34", user, "pool", roles=roles)


@pytest.mark.parametrize(
    "role, permission, allowed",
    [
        ("mcp-admin", "databases:shop:admin", True),
        ("mcp-admin", "sessions:revoke", True),
        ("mcp-developer", "tools:execute_statement", True),
        ("mcp-developer", "databases:shop:write", True),
        ("mcp-developer", "databases:shop:admin", False),
        ("mcp-developer", "sessions:revoke", False),
        ("mcp-tools", "databases:shop:write", True),
        ("mcp-tools", "tools:set_pg_configuration", False),
        ("mcp-user", "databases:shop:read", True),
        ("mcp-user", "databases:shop:write", False),
        ("mcp-user", "tools:execute_statement", False),
        ("no-such-role", "tools:whoami", False),
        ("analyst", "databases:sales:read", True),
        ("analyst", "databases:shop:read", False),
    ],
)
def test_a_role_gives_its_permissions_and_no_other(role: str, permission: str, allowed: bool) -> None:
    access = Access(Auth(roles={"analyst": Role(("tools:*", "databases:sales:read"))}))
    decision = access.may(of(role), permission)
    assert decision.allowed is allowed
    assert allowed or f"the role {role} has not the permission {permission}" in decision.reason


def test_a_user_without_roles_has_the_least_of_them() -> None:
    access = Access(Auth())
    assert access.roles_of(principal()) == ("mcp-user",)
    assert not access.may(of(), "tools:whoami").allowed, "an empty list is no list"


def test_the_configs_lists_make_admins_and_readers() -> None:
    access = Access(Auth(admin_users=("alice",), read_only_users=("bob", "carol")))
    assert access.may(of(user="alice"), "databases:shop:admin").allowed
    assert not access.may(of("mcp-admin", user="bob"), "databases:shop:write").allowed
    assert access.may(of("mcp-admin", user="bob"), "databases:shop:read").allowed
    assert not access.may(of("mcp-admin", user="bob"), "tools:execute_statement").allowed


@pytest.mark.parametrize(
    "who, expected",
    [
        (of("mcp-tools"), "databases:*:write"),
        (replace(of("mcp-tools"), closed={"acme": "a tenant's"}), "databases:shop:write"),
        (replace(of("mcp-tools"), databases=("shop",)), "databases:shop:write"),
        (replace(of("mcp-admin"), databases=("shop",)), "databases:shop:write"),
        (
            replace(of("mcp-tools"), tenant="t", within=Tenant("t", datetime(2026, 1, 1, tzinfo=UTC), "shop")),
            "databases:shop:write",
        ),
    ],
)
def test_whoami_names_the_databases_where_not_all_are_there_for_the_caller(who: Principal, expected: str) -> None:
    assert WHOAMI.tell
    held = {"lab": ["read"], "shop": ["read", "write"]}
    seen = Databases(dict.fromkeys(held), held, "shop", Access(Auth()).patterns(who))
    shown = WHOAMI.tell(who, seen).structured["permissions"]
    assert "databases:lab:write" not in shown, "nobody writes there, whatever the roles say"
    assert [one for one in shown if one.startswith("databases:")][-1] == expected
    assert any(one.startswith("tools:") for one in shown)
    assert "acme" not in str(shown)


def test_a_tenants_user_has_nothing_outside_of_it() -> None:
    place = Tenant("acme", datetime(2026, 1, 1, tzinfo=UTC), "acme")
    access = Access(Auth())
    inside = Principal("ab12cd34", "alice", "pool", roles=("mcp-admin",), tenant="acme", within=place)
    assert access.may(inside, "databases:acme:read").allowed
    for other in ("databases:acme2:read", "databases:acm:read", "databases:shop:admin"):
        assert "the tenant acme has the database acme" in access.may(inside, other).reason
    lost = Principal("ab12cd34", "alice", "pool", roles=("mcp-admin",), tenant="acme")
    assert not access.may(lost, "databases:acme:read").allowed, "a tenant that is gone opens nothing"
    assert not access.may(lost, "tools:whoami").allowed


@pytest.mark.parametrize(
    "before, after, fewer",
    [
        (None, ("mcp-user",), False),
        (("mcp-user",), ("mcp-tools",), False),
        (("mcp-tools",), ("mcp-developer",), False),
        (("mcp-developer",), ("mcp-admin",), False),
        (("mcp-user", "mcp-tools"), ("mcp-tools",), False),
        (("mcp-tools",), ("mcp-user",), True),
        (("mcp-admin",), ("mcp-developer",), True),
        (("mcp-tools",), None, True),
        (("mcp-user",), (), True),
        ((), None, False),
        (("sales",), ("mcp-user", "tools"), True),
        (("sales",), ("everything",), False),
    ],
)
def test_roles_are_compared_by_what_they_give(
    before: tuple[str, ...] | None, after: tuple[str, ...] | None, fewer: bool
) -> None:
    own = {"sales": ("databases:sales:*",), "tools": ("tools:*",), "everything": ("databases:*", "tools:*")}
    access = Access(Auth(roles={name: Role(permissions=given) for name, given in own.items()}))
    assert access.fewer(before, after) is fewer


def test_a_decision_is_remembered_for_that_very_principal_and_not_for_its_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    access = Access(Auth())
    kept_out = replace(principal(), closed={"shop": "shop is a tenant's alone"})
    assert kept_out == principal()
    for _ in range(2):
        assert access.may(principal(), "databases:shop:read").allowed
        assert not access.may(kept_out, "databases:shop:read").allowed
    monkeypatch.setattr(Access, "chain", lambda *_: pytest.fail("asked again"))
    assert access.may(kept_out, "databases:shop:read").reason == "shop is a tenant's alone"


def test_no_more_decisions_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcpctl.policy.access._REMEMBERED", 3)
    access, who = Access(Auth()), principal()
    for number in range(10):
        assert access.may(who, f"databases:d{number}:read").allowed
        assert not access.may(who, f"databases:d{number}:write").allowed
        assert len(access._decided) <= 3
