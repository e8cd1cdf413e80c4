"""Scopes: what each allows, and which are asked for."""

from __future__ import annotations

from mcpctl import config_oauth
from mcpctl.config import TOOLS, check_permission, covers
from mcpctl.config_sign_in import Oauth, OauthScope
from mcpctl.policy import scopes
from mcpctl.policy.scopes import PERMISSIONS, Scopes


def may(name: str, permission: str) -> bool:
    return any(covers(pattern, permission) for pattern in PERMISSIONS[name])


def test_the_config_knows_the_built_in_scopes() -> None:
    assert tuple(PERMISSIONS) == config_oauth.BUILT_IN
    for patterns in PERMISSIONS.values():
        for pattern in patterns:
            check_permission(pattern, ["shop"])


def test_each_tool_is_in_a_scope_and_reading_changes_nothing() -> None:
    for tool in TOOLS:
        assert any(may(name, f"tools:{tool}") for name in PERMISSIONS), tool
    for permission in ("tools:execute_statement", "tools:set_pg_configuration", "tools:register_database",
                       "databases:shop:write", "databases:shop:admin"):  # fmt: skip
        assert not may("mcp:read", permission)
    assert not may("mcp:write", "databases:shop:admin")
    assert not may("mcp:admin", "databases:shop:write")


def test_the_smallest_scope_that_covers_all_is_the_one_to_ask_for() -> None:
    known = Scopes(Oauth())
    assert known.covering(["tools:query_database", "databases:shop:read"]) == ("mcp:read",)
    assert known.covering(["tools:execute_statement", "databases:shop:write"]) == ("mcp:write",)
    assert known.covering(["tools:execute_statement", "databases:shop:admin"]) == ("mcp:write", "mcp:admin")
    assert known.covering(["tools:no_such_tool"]) == ()


def test_a_scope_of_ones_own_is_narrower_and_told_in_its_words() -> None:
    own = OauthScope(("tools:query_database", "databases:shop:read"), "Ask the shop")
    known = Scopes(Oauth(enabled=True, scopes={"shop:read": own, "shop:all": OauthScope(("databases:shop:*",))}))
    assert known.names == (*PERMISSIONS, "shop:read", "shop:all")
    assert known.covering(["tools:query_database", "databases:shop:read"]) == ("shop:read",)
    assert known.words("shop:read") == "Ask the shop"
    assert known.words("shop:all") == "databases:shop:*"
    assert (known.changes("shop:read"), known.changes("shop:all"), known.changes("mcp:read")) == (False, True, False)
    assert known.permissions(["gone", "shop:read"]) == ("tools:query_database", "databases:shop:read")
    assert known.known(["shop:read", "x", "offline_access", "shop:read"]) == ("shop:read", scopes.OFFLINE)
