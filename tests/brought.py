"""What the tests of databases that users bring have in common: a site whose users may, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mcpctl.identity import users
from site_of_mcpctl import PASSWORD, READER, Client, Shop, Site

MakeSite = Callable[..., Site]
ON = "own_databases: {hosts: [127.0.0.1], allow_password_in_dsn: true, most: 3}\n"
HANDED_OVER = "own_databases: {hosts: [127.0.0.1]}\n"
TWO = "server: {workers: 2}\nlimits: {connections: 40}\n"
WORKER = "mcp-tools"


def dsn(shop: Shop, password: str | None = PASSWORD, user: str = READER, dbname: str = "shop") -> str:
    secret = f":{password.replace(chr(39), '%27').replace(' ', '%20')}" if password is not None else ""
    return f"postgresql://{user}{secret}@127.0.0.1:{shop.cluster.port}/{dbname}"


def users_of(at: Site) -> Site:
    """carol and dave, who may bring databases."""
    for name in ("carol", "dave"):
        users.add(users.user_file(at.folder / "users.yaml"), name, None, datetime.now(UTC), [WORKER])
    return at


def do(client: Client, tool: str, **arguments: Any) -> Any:
    answer = client.call(tool, arguments)
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    assert not result["isError"], result["content"][0]["text"]
    return result["structuredContent"]


def refused(client: Client, tool: str, **arguments: Any) -> str:
    answer = client.call(tool, arguments)
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    assert result["isError"], result
    text: str = result["content"][0]["text"]
    return text


def tools(client: Client) -> set[str]:
    answer = client.http.post(client.url, json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    return {tool["name"] for tool in answer.json()["result"]["tools"]}


OWN_TOOLS = {"register_database", "list_my_databases", "remove_database"}


def lines(at: Site, **wanted: Any) -> list[dict[str, Any]]:
    return [line for line in at.audit() if all(line.get(key) == value for key, value in wanted.items())]


def everything_written(at: Site) -> bytes:
    return b"".join(path.read_bytes() for path in at.folder.iterdir() if path.is_file())


def register(at: Site, shop: Shop, user: str = "carol", name: str = "lab", **options: Any) -> None:
    words = ("database", "register", user, name, "--dsn", dsn(shop, None), "--password-file", "-")
    at.run(*words, input=PASSWORD + "\n", **options)
