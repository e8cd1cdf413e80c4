"""Real clients visit a running server: over HTTP, over TLS, over stdio, in both eras of the protocol."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent

from clients import rig

TOOLS = ["query_database", "get_schema_info", "explain_query", "list_databases", "whoami"]
QUESTION = {"query": "select 1 as one"}
MODERN = "2026-07-28"


@dataclass(frozen=True)
class Place:
    """Where a server is, and how to be let in."""

    target: str | Sequence[str]
    token: str
    ca: Path | None = None

    @property
    def env(self) -> dict[str, str]:
        return {} if isinstance(self.target, str) else {"MCPCTL_TOKEN": self.token}


@dataclass(frozen=True)
class Visit:
    """What a client saw. `modern` is None where the client does not tell which era it spoke."""

    tools: list[str]
    structured: dict[str, Any]
    text: str
    modern: bool | None


@pytest.fixture(params=["http", "tls", "stdio", "bridge"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "tls":
        secure = request.getfixturevalue("live_tls")
        return Place(secure.url, secure.token, Path(secure.ca))
    live = request.getfixturevalue("live")
    if request.param == "http":
        return Place(live.url, live.token)
    command = request.getfixturevalue("mcpctl_command")
    if request.param == "bridge":
        return Place([*command, "connect", live.url], live.token)
    return Place([*command, "serve", "--stdio", "--config", str(live.config)], live.token)


@pytest.fixture(scope="session")
def node() -> Path:
    found = rig.node_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def inspector(place: Place, era: rig.Era) -> Visit:
    def ask(*args: str) -> Any:
        return rig.inspector(place.target, *args, token=place.token, era=era, ca=place.ca, env=place.env)

    listed = ask("--method", "tools/list")
    call = ("--method", "tools/call", "--tool-name", "query_database", "--tool-args-json", json.dumps(QUESTION))
    result = ask(*call)
    return _visit([tool["name"] for tool in listed["tools"]], result, None)


def typescript(place: Place, era: rig.Era) -> Visit:
    seen = rig.typescript(
        place.target, "query_database", QUESTION, token=place.token, era=era, ca=place.ca, env=place.env
    )
    return _visit(seen["tools"], seen["result"], seen["era"] == "modern")


def typescript_old(place: Place, _era: rig.Era) -> Visit:
    seen = rig.typescript(
        place.target, "query_database", QUESTION, token=place.token, ca=place.ca, env=place.env, old=True
    )
    assert seen["version"] != MODERN
    return _visit(seen["tools"], seen["result"], False)


def _visit(tools: list[str], result: dict[str, Any], modern: bool | None) -> Visit:
    assert not result.get("isError"), result
    return Visit(tools, result["structuredContent"], result["content"][0]["text"], modern)


def python(place: Place, era: rig.Era) -> Visit:
    return anyio.run(_python, place, MODERN if era == "modern" else era)


async def _python(place: Place, mode: str) -> Visit:
    if not isinstance(place.target, str):
        command, *args = place.target
        return await _python_visit(Client(StdioServerParameters(command=command, args=args, env=place.env), mode=mode))
    async with httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {place.token}"},
        verify=ssl.create_default_context(cafile=place.ca) if place.ca else True,
        timeout=30,
    ) as http:
        return await _python_visit(Client(streamable_http_client(place.target, http_client=http), mode=mode))


async def _python_visit(client: Client) -> Visit:
    async with client:
        listed = await client.list_tools()
        result = await client.call_tool("query_database", QUESTION)
        assert not result.is_error, result
        first = result.content[0]
        assert isinstance(first, TextContent)
        assert isinstance(result.structured_content, dict)
        names = [tool.name for tool in listed.tools]
        return Visit(names, result.structured_content, first.text, client.protocol_version == MODERN)


ON_NODE: list[tuple[Callable[[Place, rig.Era], Visit], rig.Era]] = [
    (inspector, "modern"),
    (inspector, "auto"),
    (inspector, "legacy"),
    (typescript, "modern"),
    (typescript, "auto"),
    (typescript, "legacy"),
    (typescript_old, "legacy"),
]


def _assert_saw_the_server(visit: Visit, era: rig.Era) -> None:
    assert visit.tools == TOOLS
    elapsed = visit.structured["elapsed_ms"]
    assert isinstance(elapsed, int | float)
    assert elapsed >= 0
    assert visit.structured == {
        "columns": [{"name": "one", "type": "integer"}],
        "rows": [[1]],
        "row_count": 1,
        "truncated": False,
        "elapsed_ms": elapsed,
    }
    assert json.loads(visit.text) == visit.structured
    if visit.modern is not None:
        assert visit.modern == (era != "legacy")


def _name(value: object) -> str | None:
    return getattr(value, "__name__", None)


VISITS = [
    *(("http", client, era) for client, era in ON_NODE),
    ("tls", inspector, "modern"), ("tls", typescript, "auto"), ("tls", typescript_old, "legacy"),
    ("stdio", inspector, "auto"), ("stdio", inspector, "modern"), ("stdio", typescript, "modern"),
    ("stdio", typescript_old, "legacy"),
    ("bridge", inspector, "legacy"), ("bridge", typescript, "auto"), ("bridge", typescript, "modern"),
    ("bridge", typescript_old, "legacy"),
]  # fmt: skip
"""Each client in each of its eras over HTTP; over the others each client, and each era."""


@pytest.mark.parametrize(("place", "client", "era"), VISITS, ids=_name, indirect=["place"])
@pytest.mark.usefixtures("node")
def test_a_client_on_node_lists_the_tools_and_gets_rows(
    client: Callable[[Place, rig.Era], Visit], era: rig.Era, place: Place
) -> None:
    _assert_saw_the_server(client(place, era), era)


@pytest.mark.parametrize("era", ["modern", "auto", "legacy"])
def test_the_python_client_lists_the_tools_and_gets_rows(era: rig.Era, place: Place) -> None:
    _assert_saw_the_server(python(place, era), era)


@pytest.mark.parametrize(("client", "era"), ON_NODE, ids=_name)
@pytest.mark.usefixtures("node")
def test_a_client_on_node_with_a_wrong_token_is_told_and_does_not_hang(
    client: Callable[[Place, rig.Era], Visit], era: rig.Era, live: Any
) -> None:
    with pytest.raises(rig.ClientError) as told:
        client(Place(live.url, "no-token-at-all"), era)
    assert live.token not in str(told.value)


@pytest.mark.parametrize("client", [inspector, typescript, typescript_old], ids=_name)
@pytest.mark.usefixtures("node")
def test_a_client_on_node_refuses_a_certificate_of_an_unknown_authority(
    client: Callable[[Place, rig.Era], Visit], live_tls: Any
) -> None:
    with pytest.raises(rig.ClientError):
        client(Place(live_tls.url, live_tls.token, ca=None), "legacy")


@pytest.mark.parametrize(
    ("revision", "scenario"),
    [(revision, scenario) for revision, scenarios in rig.NEUTRAL.items() for scenario in scenarios],
)
@pytest.mark.usefixtures("node")
def test_the_conformance_suite_passes(revision: rig.Revision, scenario: str, live: Any) -> None:
    results = {found.name: found for found in rig.conformance(live.url, live.token, revision)}
    assert results[scenario].failures == ()
    assert results[scenario].status == "passed"
