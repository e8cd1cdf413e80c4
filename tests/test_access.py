"""What a principal may do: patterns, and a token's databases and permissions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl.identity.principal import LOCAL, Principal
from mcpctl.policy.access import covers, may

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
    decision = may(principal(databases, permissions), permission)
    assert decision.allowed is allowed
    assert reason in decision.reason


def test_whoever_started_the_server_may_do_all_of_it() -> None:
    assert may(LOCAL, "tools:query_database").allowed
    assert may(LOCAL, "databases:shop:read").allowed
