"""mcpctl client-config: what a client's own configuration needs, for one token. The token itself is never in it."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

NAME = "mcpctl"
"""What the snippets call the server; with -TENANT behind it, so that one person may have several."""
PLACEHOLDER = "PUT-THE-TOKEN-HERE"
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The server's URL. Default: server.public_url, or host and port."),
]


def variable(name: str) -> str:
    """Where the snippets let a client find the token of the server of that name: a tenant's has one of its own."""
    tenant = name.removeprefix(f"{NAME}-") if name.startswith(f"{NAME}-") else ""
    return f"MCP_TOKEN{'_' if tenant else ''}{tenant.replace('-', '_').upper()}"


def _http(name: str, url: str, bearer: str, *, key: str = "mcpServers", typed: bool = False) -> str:
    entry = {**({"type": "http"} if typed else {}), "url": url, "headers": {"Authorization": f"Bearer {bearer}"}}
    return json.dumps({key: {name: entry}})


def _vscode(name: str, url: str) -> str:
    asked = {"type": "promptString", "id": f"{name}-token", "description": f"Token of {name}", "password": True}
    headers = {"Authorization": f"Bearer ${{input:{name}-token}}"}
    return json.dumps({"inputs": [asked], "servers": {name: {"type": "http", "url": url, "headers": headers}}})


def _codex(name: str, url: str) -> str:
    return f'[mcp_servers.{name}]\nurl = {json.dumps(url)}\nbearer_token_env_var = "{variable(name)}"'


def _curl(name: str, url: str) -> str:
    return (
        f'printf \'header = "Authorization: Bearer %s"\\n\' "${variable(name)}" | curl -s -K - {shlex.quote(url)} '
        "-H 'Content-Type: application/json' -H 'Accept: application/json' "
        '-d \'{"jsonrpc":"2.0","id":1,"method":"tools/list"}\''
    )


def _generic(name: str, url: str) -> str:
    return json.dumps({"name": name, "url": url, "auth": {"type": "bearer", "token": f"${{{variable(name)}}}"}})


CLIENTS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "claude-code": (".mcp.json", lambda name, url: _http(name, url, f"${{{variable(name)}}}", typed=True)),
    "cursor": ("~/.cursor/mcp.json", lambda name, url: _http(name, url, f"${{env:{variable(name)}}}")),
    "vscode": (".vscode/mcp.json", _vscode),
    "codex": ("~/.codex/config.toml", _codex),
    "gemini": ("~/.gemini/settings.json", lambda name, url: _http(name, url, f"${variable(name)}", typed=True)),
    "curl": ("", _curl),
    "json": ("", _generic),
}
"""Each client that connects over HTTP: its file, and what goes into it for a server's name and URL."""


def desktop(name: str, config: str) -> str:
    """What Claude Desktop starts on this machine; the token goes into `env`, in a file that is its user's alone."""
    arguments = ["-P", "-m", "mcpctl", "serve", "--stdio", "--config", config]
    entry = {"command": sys.executable, "args": arguments, "env": {"MCPCTL_TOKEN": PLACEHOLDER}}
    return json.dumps({"mcpServers": {name: entry}})


def bridged(name: str, url: str) -> str:
    """What Claude Desktop starts on another machine, where mcpctl is installed: the bridge to this server. The token is
    where `mcpctl connect` keeps it, and not in the file."""
    return json.dumps({"mcpServers": {name: {"command": "mcpctl", "args": ["connect", url]}}})


def check(client: str) -> None:
    """Raises NotFoundError (exit 4) for a client that is not known here."""
    from mcpctl.errors import NotFoundError

    if client not in CLIENTS and client != "claude-desktop":
        hint = f"there are {', '.join((*CLIENTS, 'claude-desktop'))}; ChatGPT needs the URL alone, see docs/oauth.md"
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
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="T", help="For a token of this tenant's users.")
    ] = None,
    url: UrlOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Print what a client's configuration needs to connect. The token itself is not in it.

    Example: mcpctl client-config cursor --token-id 1hrspjl1
    """
    show(context, client, token_id, tenant, url, json, config)


def show(
    context: typer.Context,
    client: str,
    token_id: str | None,
    tenant: str | None,
    url: str | None,
    json: bool,
    config: Path | None,
    token: Path | None = None,
) -> None:
    """What `client_config` prints; `token` is the file that holds the token, where that is known."""
    from mcpctl.errors import UsageError
    from mcpctl.identity import tenants, tokens, users

    if tenant is not None and token_id is not None:
        raise UsageError("--tenant and --token-id exclude each other", "the token knows its tenant")
    found = settings(context, config, needs_log=False)
    check(client)
    entry = tokens.show(tokens.token_file(found.auth.token_file), token_id) if token_id is not None else None
    user = users.user_file(found.auth.user_file).current().get(entry.user or "") if entry is not None else None
    if tenant is not None:
        tenants.find(tenants.tenant_file(found.auth.tenant_file).current(), tenant)
    elif user is not None:
        tenant = user.tenant
    name = f"{NAME}-{tenant}" if tenant is not None else NAME
    where = url or url_of(found)
    if client == "claude-desktop":
        text = desktop(name, str(found.source or "")) if url is None else bridged(name, url)
        file = "claude_desktop_config.json"
    else:
        file, make = CLIENTS[client]
        text = make(name, where)
    held = variable(name)
    if json:
        output.put_json({"client": client, "file": file or None, "url": where, "snippet": text, "variable": held})
        return
    output.put(text)
    if file:
        output.say(f"into: {file}")
    if client == "claude-desktop" and url is not None:
        output.say(f"the token, on that machine: mcpctl connect {shlex.quote(url)} --keep-token")
        output.say("there the command needs its absolute path")
    elif client not in ("claude-desktop", "vscode"):
        which = "" if token else ", with the file that `token add --out FILE` wrote"
        output.say(f'the token: export {held}="$(cat {shlex.quote(str(token or "FILE"))})"{which}')
    if entry is not None:
        ends = f"until {tokens.rfc3339(entry.expires_at)}" if entry.expires_at else "without an end"
        whose = f"{entry.user or 'a service'}{f', tenant {tenant}' if tenant is not None else ''}"
        output.say(f"token {entry.id} of {whose}: {entry.status(tokens.utcnow())}, {ends}")


def url_of(found: "Settings") -> str:
    """The URL that the config gives the server. UsageError where it gives it none."""
    from mcpctl.errors import UsageError

    server = found.server
    if server.public_url is None and server.port == 0:
        raise UsageError("server.port is 0, so nobody knows the port from the config", "say --url")
    host = f"[{server.host}]" if ":" in server.host else server.host
    scheme = "https" if server.tls.cert is not None else "http"
    return f"{server.public_url or f'{scheme}://{host}:{server.port}'}/mcp"
