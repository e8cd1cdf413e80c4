"""mcpctl client-config: what a client's own configuration needs, for one token. The token itself is never in it."""

import json
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

VARIABLE = "MCP_TOKEN"
"""Where the snippets let a client find the token."""
PLACEHOLDER = "PUT-THE-TOKEN-HERE"


def _http(name: str, url: str, bearer: str, *, key: str = "mcpServers", typed: bool = False) -> str:
    entry = {**({"type": "http"} if typed else {}), "url": url, "headers": {"Authorization": f"Bearer {bearer}"}}
    return json.dumps({key: {name: entry}})


def _vscode(name: str, url: str) -> str:
    asked = {"type": "promptString", "id": "mcp-token", "description": f"Token of {name}", "password": True}
    headers = {"Authorization": "Bearer ${input:mcp-token}"}
    return json.dumps({"inputs": [asked], "servers": {name: {"type": "http", "url": url, "headers": headers}}})


def _codex(name: str, url: str) -> str:
    return f'[mcp_servers.{name}]\nurl = {json.dumps(url)}\nbearer_token_env_var = "{VARIABLE}"'


def _curl(name: str, url: str) -> str:
    return (
        f'printf \'header = "Authorization: Bearer %s"\\n\' "${VARIABLE}" | curl -s -K - {shlex.quote(url)} '
        "-H 'Content-Type: application/json' -H 'Accept: application/json' "
        '-d \'{"jsonrpc":"2.0","id":1,"method":"tools/list"}\''
    )


def _generic(name: str, url: str) -> str:
    return json.dumps({"name": name, "url": url, "auth": {"type": "bearer", "token": f"${{{VARIABLE}}}"}})


CLIENTS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "claude-code": (".mcp.json", lambda name, url: _http(name, url, f"${{{VARIABLE}}}", typed=True)),
    "cursor": ("~/.cursor/mcp.json", lambda name, url: _http(name, url, f"${{env:{VARIABLE}}}")),
    "vscode": (".vscode/mcp.json", _vscode),
    "codex": ("~/.codex/config.toml", _codex),
    "gemini": ("~/.gemini/settings.json", lambda name, url: _http(name, url, f"${VARIABLE}", typed=True)),
    "curl": ("", _curl),
    "json": ("", _generic),
}
"""Each client that connects over HTTP: its file, and what goes into it for a server's name and URL."""


def desktop(name: str, config: str) -> str:
    """What Claude Desktop starts on this machine; the token goes into `env`, in a file that is its user's alone."""
    arguments = ["-m", "mcpctl", "serve", "--stdio", "--config", config]
    entry = {"command": sys.executable, "args": arguments, "env": {"MCPCTL_TOKEN": PLACEHOLDER}}
    return json.dumps({"mcpServers": {name: entry}})


def check(client: str) -> None:
    """Raises NotFoundError (exit 4) for a client that is not known here."""
    from mcpctl.errors import NotFoundError

    if client not in CLIENTS and client != "claude-desktop":
        hint = f"there are {', '.join((*CLIENTS, 'claude-desktop'))}; ChatGPT connects with OAuth only"
        raise NotFoundError(f"there is no client {client[:40]!r} here", hint)


def client_config(
    context: typer.Context,
    client: Annotated[
        str,
        typer.Argument(
            metavar="CLIENT", help="claude-code, claude-desktop, cursor, vscode, codex, gemini, curl, json."
        ),
    ],
    token_id: Annotated[
        str | None,
        typer.Option("--token-id", metavar="ID", help="For this token: its user, tenant, databases, expiry."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="The server's URL. Default: server.public_url, or host and port."),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Print what a client's configuration needs to connect. The token itself is not in it.

    Example: mcpctl client-config cursor --token-id 1hrspjl1
    """
    from mcpctl.identity import tokens, users

    found = settings(context, config, needs_log=False)
    check(client)
    entry = tokens.show(tokens.token_file(found.auth.token_file), token_id) if token_id is not None else None
    user = users.user_file(found.auth.user_file).current().get(entry.user or "") if entry is not None else None
    name = (user.tenant if user is not None else None) or "mcpctl"
    where = url or _url(found)
    if client == "claude-desktop":
        file, text = "claude_desktop_config.json", desktop(name, str(found.source or ""))
    else:
        file, make = CLIENTS[client]
        text = make(name, where)
    if json:
        output.put_json({"client": client, "file": file or None, "url": where, "snippet": text, "variable": VARIABLE})
        return
    output.put(text)
    if file:
        output.say(f"into: {file}")
    if client not in ("claude-desktop", "vscode"):
        output.say(f'the token: export {VARIABLE}="$(cat FILE)", with the file that `token add --out FILE` wrote')
    if entry is not None:
        ends = f"until {tokens.rfc3339(entry.expires_at)}" if entry.expires_at else "without an end"
        tenant = f", tenant {user.tenant}" if user is not None and user.tenant else ""
        output.say(f"token {entry.id} of {entry.user or 'a service'}{tenant}: {entry.status(tokens.utcnow())}, {ends}")


def _url(found: "Settings") -> str:
    from mcpctl.errors import UsageError

    server = found.server
    if server.public_url is None and server.port == 0:
        raise UsageError("server.port is 0, so nobody knows the port from the config", "say --url")
    host = f"[{server.host}]" if ":" in server.host else server.host
    scheme = "https" if server.tls.cert is not None else "http"
    return f"{server.public_url or f'{scheme}://{host}:{server.port}'}/mcp"
