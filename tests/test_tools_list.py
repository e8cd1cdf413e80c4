"""tools/list: what each may call, no more and no less, the same bytes every time, and few tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import site_of_mcpctl as site
from mcpctl.policy import roles
from mcpctl.postgres.embedded import Binaries
from mcpctl.tools.table import TOOLS
from site_of_mcpctl import Client, Site, eventually

PLAIN = ["query_database", "get_schema_info", "explain_query", "list_databases", "whoami"]
HEALTHY = ["query_database", "get_schema_info", "explain_query", "database_health", "list_databases", "whoami"]
ALL = [name for name, tool in TOOLS.items() if tool.access != "admin" and tool.own is None]
"""What there is where the config lists no settings, and no hosts for databases that users bring."""
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
_EXTRA = """\
auth:
  admin_users: [boss]
  read_only_users: [guest]
  roles:
    looker: {permissions: ["tools:query_database", "tools:whoami", "databases:shop:read"]}
    blind: {permissions: ["tools:whoami"]}
    writer: {permissions: ["tools:execute_statement", "databases:shop:write"]}
"""
USERS: dict[str, tuple[list[str], str | None]] = {
    "plain": ([], "read"),
    "ungranted": ([], None),
    "tools": (["mcp-tools"], "write"),
    "tools-reads": (["mcp-tools"], "read"),
    "tools-nothing": (["mcp-tools"], None),
    "developer": (["mcp-developer"], "write"),
    "admin": (["mcp-admin"], "write"),
    "boss": ([], "write"),
    "guest": (["mcp-admin"], "write"),
    "looker": (["looker"], "read"),
    "blind": (["blind"], None),
    "writer": (["writer"], "write"),
    "both": (["looker", "writer"], "write"),
}
"""Each user: roles, and the grant."""
SHOWN = {
    "plain": PLAIN,
    "ungranted": PLAIN,
    "tools": ALL,
    "tools-reads": HEALTHY,
    "tools-nothing": HEALTHY,
    "developer": ALL,
    "admin": ALL,
    "boss": ALL,
    "guest": HEALTHY,
    "looker": ["query_database", "whoami"],
    "blind": ["whoami"],
    "writer": ["execute_statement"],
    "both": ["query_database", "execute_statement", "whoami"],
}


@pytest.fixture(scope="module")
def served(newest: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with all those users, and two workers."""
    with site.shop(newest) as shop:
        site.keep_out(shop.cluster)
        at = Site(tmp_path_factory.mktemp("list") / "site", shop, per_user=True, extra=_EXTRA)
        for user, (given, access) in USERS.items():
            at.run("user", "add", user, *(word for role in given for word in ("--role", role)))
            if access is not None:
                at.grant(user, "--schema", "public", access=access)
        yield at.start("--workers", "2")
        at.stop()


def _list(client: Client) -> list[dict[str, Any]]:
    answer = client.http.post(client.url, json=LIST)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["result"]["tools"]
    return found


def _names(client: Client) -> list[str]:
    return [tool["name"] for tool in _list(client)]


def _size(listed: list[dict[str, Any]]) -> float:
    """Tokens at most: no tokenizer of a model makes more than one of 2.5 characters of such JSON on average."""
    return len(json.dumps(listed, separators=(",", ":"))) / 2.5


@pytest.mark.parametrize("user", USERS)
def test_each_user_is_shown_what_it_may_call_in_the_one_order(served: Site, user: str) -> None:
    with served.client(served.token(user)[1]) as client:
        assert _names(client) == SHOWN[user]


def test_there_is_a_user_here_for_every_built_in_role() -> None:
    given = {role for user, _ in USERS.values() for role in user or roles.DEFAULT}
    assert given >= set(roles.BUILT_IN)


@pytest.mark.parametrize("user", USERS)
def test_what_is_not_shown_is_refused_and_what_is_shown_is_not_refused_for_its_permission(
    served: Site, user: str
) -> None:
    arguments: dict[str, dict[str, str]] = {
        "query_database": {"query": "select 1"}, "explain_query": {"query": "select 1"},
        "execute_statement": {"statement": "select 1"},
    }  # fmt: skip
    with served.client(served.token(user)[1]) as client:
        for tool in TOOLS:
            result = client.call(tool, arguments.get(tool, {})).json()["result"]
            text = result["content"][0]["text"]
            if tool in SHOWN[user]:
                assert not result["isError"] or "there is no default database for you" in text, text
            else:
                assert result["isError"], (tool, text)


NARROWED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("admin", {"permissions": ("tools:whoami",)}, ["whoami"]),
    ("admin", {"permissions": ()}, []),
    ("admin", {"permissions": ("tools:*", "databases:*:read")}, HEALTHY),
    ("admin", {"permissions": ("tools:*", "databases:shop:write")}, ALL),
    ("admin", {"permissions": ("*",), "databases": ("elsewhere",)}, HEALTHY),
    ("plain", {"permissions": ("*",)}, PLAIN),
    ("looker", {"permissions": ("tools:explain_query", "tools:whoami")}, ["whoami"]),
    ("writer", {"permissions": ("tools:execute_statement",)}, []),
    ("guest", {"permissions": ("tools:execute_statement", "databases:shop:write")}, []),
]


@pytest.mark.parametrize("user, limits, shown", NARROWED)
def test_a_token_narrows_what_its_user_is_shown(
    served: Site, user: str, limits: dict[str, Any], shown: list[str]
) -> None:
    with served.client(served.token(user, **limits)[1]) as client:
        assert _names(client) == shown


def test_a_grant_that_comes_or_goes_changes_the_list(served: Site) -> None:
    served.run("user", "add", "changing", "--role", "mcp-tools")
    with served.client(served.token("changing")[1]) as client:
        assert _names(client) == HEALTHY
        served.grant("changing", "--schema", "public", access="write")
        assert _names(client) == ALL
        served.run("user", "ungrant", "changing", "--database", "shop", "--access", "write", "--apply")
        assert _names(client) == HEALTHY


def test_the_same_question_gets_the_same_bytes_from_every_worker(served: Site) -> None:
    """Each connection is taken by one of the workers: control sockets say that there are two."""
    eventually(lambda: len(list(served.folder.glob("control.*.sock"))) == 2)
    for user in ("plain", "admin", "both"):
        bodies = set()
        for _ in range(2):
            _, text = served.token(user)
            for _ in range(12):
                with served.client(text) as client:
                    bodies.add(client.http.post(client.url, json=LIST).content)
        assert len(bodies) == 1


def test_the_list_of_a_plain_user_is_under_1500_tokens(served: Site) -> None:
    with served.client(served.token("plain")[1]) as client:
        listed = _list(client)
    assert [tool["name"] for tool in listed] == PLAIN
    assert _size(listed) < 1500


def test_all_definitions_together_are_under_1500_tokens() -> None:
    """Counted in words, numbers and runs of marks, of which a model's tokenizer makes one token each, or seldom two."""
    listed = [
        {
            "name": tool.name,
            "description": tool.description,
            "inputSchema": tool.input_schema,
            "outputSchema": tool.output,
        }
        for tool in TOOLS.values()
    ]
    pieces = re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9\s]+", json.dumps(listed, separators=(",", ":")))
    assert 1.4 * len(pieces) < 1500


def test_every_tool_says_what_it_is_and_whether_it_changes_anything(served: Site) -> None:
    with served.client(served.token("admin")[1]) as client:
        listed = {tool["name"]: tool for tool in _list(client)}
    assert list(listed) == ALL
    for name, tool in listed.items():
        assert tool["annotations"]["readOnlyHint"] is (name != "execute_statement")
        assert tool["annotations"].get("destructiveHint", False) is (name == "execute_statement")
        assert tool["description"]
        jsonschema.Draft202012Validator.check_schema(tool["inputSchema"])
        jsonschema.Draft202012Validator.check_schema(tool["outputSchema"])
        assert tool["inputSchema"]["additionalProperties"] is False


def test_every_answer_is_as_its_tools_schema_says(served: Site) -> None:
    """What a client validates: the structured content of each tool, of each of its forms."""
    calls: list[tuple[str, dict[str, Any]]] = [
        ("query_database", {"query": "select 1 as a, null as b, '{}'::json as c"}),
        ("query_database", {"query": "select n from generate_series(1, 9) as n", "limit": 2}),
        ("query_database", {"query": "select 1", "databases": ["shop"]}),
        ("query_database", {"query": "select nothing", "databases": ["shop"]}),
        ("get_schema_info", {}), ("get_schema_info", {"table": "orders"}),
        ("explain_query", {"query": "select * from orders"}),
        ("execute_statement", {"statement": "update orders set id = id where id = 1 returning id"}),
        ("execute_statement", {"statement": "update orders set id = id where false"}),
        ("database_health", {}), ("list_databases", {}), ("whoami", {}),
    ]  # fmt: skip
    with served.client(served.token("admin")[1]) as client:
        schemas = {tool["name"]: tool["outputSchema"] for tool in _list(client)}
        assert {name for name, _ in calls} == set(schemas)
        for name, arguments in calls:
            result = client.call(name, arguments).json()["result"]
            assert not result["isError"], result
            jsonschema.validate(result["structuredContent"], schemas[name])
