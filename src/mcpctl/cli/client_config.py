"""mcpctl client-config: what a client's own configuration needs, for one token. The token itself is never in it."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from mcpctl.cli.client_files import ClientFile
    from mcpctl.config_keys import Settings
    from mcpctl.identity.tokens import Token

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
    "chatgpt": ("", lambda name, url: url),
    "curl": ("", _curl),
    "json": ("", _generic),
}
"""Each client that connects over HTTP: its file, and what goes into it for a server's name and URL."""


def desktop(name: str, config: str, *, token: bool = True) -> str:
    """What Claude Desktop starts on this machine; a token goes into `env`, in a file that is its user's alone. Without
    one the caller is the local user."""
    env = {"env": {"MCPCTL_TOKEN": PLACEHOLDER}} if token else {}
    return json.dumps({"mcpServers": {name: {**_ourselves("serve", "--stdio", "--config", config), **env}}})


def _ourselves(*arguments: str) -> dict[str, object]:
    """How a program that has another PATH than a terminal starts this mcpctl."""
    return {"command": sys.executable, "args": ["-P", "-m", "mcpctl", *arguments]}


def bridged(name: str, url: str, *, here: bool = False) -> str:
    """What Claude Desktop starts on a machine where mcpctl is installed, another one or `here`: the bridge to this
    server. The token is where `mcpctl connect` keeps it, and not in the file."""
    entry = _ourselves("connect", url) if here else {"command": "mcpctl", "args": ["connect", url]}
    return json.dumps({"mcpServers": {name: entry}})


def check(client: str) -> None:
    """Raises NotFoundError (exit 4) for a client that is not known here."""
    from mcpctl.errors import NotFoundError

    if client not in CLIENTS and client != "claude-desktop":
        hint = f"there are {', '.join((*CLIENTS, 'claude-desktop'))}"
        raise NotFoundError(f"there is no client {client[:40]!r} here", hint)


@dataclass(frozen=True)
class Writing:
    """That the client's file is to be written: which one, if not the client's own, or only shown what would change."""

    file: Path | None
    dry: bool
    home: Path
    user: int | None

    @classmethod
    def asked(cls, write: bool, file: Path | None, dry: bool) -> "Writing | None":
        """What the flags ask for; the home is remembered before root is given up."""
        if not (write or file or dry):
            return None
        try:
            home = Path.home()
        except RuntimeError:  # a uid without an entry in the password file, and no HOME
            home = Path("/nonexistent")
        return cls(file, dry, home, os.geteuid() if hasattr(os, "geteuid") else None)

    def merged(self, client: str, name: str, snippet: str) -> "ClientFile":
        """The client's file with the entry in it. UsageError where it would be another person's."""
        from mcpctl.cli.client_files import ClientFile, place
        from mcpctl.errors import UsageError

        own = place(client, self.home, os.environ)
        changed = self.user is not None and os.geteuid() != self.user
        if changed or (self.user == 0 and os.environ.get("SUDO_USER") and self.file is None):
            hint = "run it as the one who uses the client, with --url URL; no config is read then"
            raise UsageError("the client's file is not root's, nor mcpctl's", hint)
        return ClientFile(self.file or own, client, name, snippet)


def client_config(
    context: typer.Context,
    client: Annotated[
        str,
        typer.Argument(
            metavar="CLIENT",
            help="claude-code, claude-desktop, cursor, vscode, codex, gemini, chatgpt, curl, json.",
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
    write: Annotated[
        bool, typer.Option("--write", help="Put it into the client's own file; all else there stays as it is.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Put it into this file; implies --write.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what --write would change, and change nothing.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Print what a client's configuration needs to connect, or put it there. The token itself is not in it.

    Example: mcpctl client-config cursor --url https://mcp.example.org/mcp --write
    """
    writing = Writing.asked(write, file, dry_run)
    show(context, client, token_id, tenant, url, json, config, writing=writing)


def show(
    context: typer.Context,
    client: str,
    token_id: str | None,
    tenant: str | None,
    url: str | None,
    json: bool,
    config: Path | None,
    token: Path | None = None,
    writing: Writing | None = None,
) -> None:
    """What `client_config` prints; `token` is the file that holds the token, where that is known."""
    from mcpctl.errors import UsageError

    if tenant is not None and token_id is not None:
        raise UsageError("--tenant and --token-id exclude each other", "the token knows its tenant")
    check(client)
    if url is not None:
        from mcpctl.bridge import address

        address.check(url)
    found = None
    if url is None or tenant is not None or token_id is not None:
        found = _settings(context, config)
    entry, tenant = _whose(found, token_id, tenant) if found is not None else (None, None)
    name = f"{NAME}-{tenant}" if tenant is not None else NAME
    where = url or (url_of(found) if found is not None else "")
    if client == "claude-desktop":
        source = str(found.source or "") if found is not None else ""
        text = desktop(name, source, token=writing is None) if url is None else bridged(name, url, here=bool(writing))
        file = "claude_desktop_config.json"
    else:
        file, make = CLIENTS[client]
        text = make(name, where)
    merged = writing.merged(client, name, text) if writing is not None else None
    if merged is not None and writing is not None and not json:
        _put_merged(merged, dry=writing.dry)
    elif merged is not None and writing is not None and not writing.dry and merged.changes:
        merged.write()
    if json:
        done = {} if merged is None else {"file": str(merged.path), "changed": merged.changes}
        told = {"client": client, "file": file or None, "url": where, "snippet": text, "variable": variable(name)}
        output.put_json({**told, **done})
        return
    if merged is None:
        output.put(text)
        if file:
            output.say(f"into: {file}")
    _tell_of_token(client, name, url, token, here=merged is not None)
    if entry is not None:
        _tell_of(entry, tenant)


def _settings(context: typer.Context, config: Path | None) -> "Settings":
    from mcpctl.errors import NotFoundError

    try:
        return settings(context, config, needs_log=False)
    except NotFoundError as problem:
        if problem.message == "there is no config file":  # as on the machine of a client
            problem.hint = "say --url URL, the server's, such as https://mcp.example.org/mcp; then none is needed"
        raise


def _whose(found: "Settings", token_id: str | None, tenant: str | None) -> "tuple[Token | None, str | None]":
    """The token that is named, and the tenant that it, or --tenant, says. NotFoundError where there is none."""
    from mcpctl.identity import tenants, tokens, users

    entry = tokens.show(tokens.token_file(found.auth.token_file), token_id) if token_id is not None else None
    user = users.user_file(found.auth.user_file).current().get(entry.user or "") if entry is not None else None
    if tenant is not None:
        tenants.find(tenants.tenant_file(found.auth.tenant_file).current(), tenant)
    elif user is not None:
        tenant = user.tenant
    return entry, tenant


def _put_merged(merged: "ClientFile", *, dry: bool) -> None:
    """Write the client's file, or show what would change in it."""
    from mcpctl.errors import masked

    if not merged.changes:
        output.put(f"{merged.path} has it already")
    elif dry:
        output.put(masked(merged.diff()))
        output.say("nothing was written")
    else:
        copy = merged.write()
        output.put(f"{merged.path} written")
        if copy is not None:
            output.say(f"as it was before: {copy}")
        output.say("start the client again, where it runs")


def _tell_of_token(client: str, name: str, url: str | None, token: Path | None, *, here: bool) -> None:
    """How the client finds the token; on stderr."""
    held = variable(name)
    if client == "chatgpt":
        output.say("Settings → Connectors → Create, in developer mode: this URL, and OAuth")
        output.say("it needs auth.oauth (docs/oauth.md), and a server that the internet reaches; a token is not taken")
    elif client == "claude-desktop" and url is not None:
        program = f"{shlex.quote(sys.executable)} -m mcpctl" if here else "mcpctl"
        output.say(f"the token{'' if here else ', on that machine'}: {program} connect {shlex.quote(url)} --keep-token")
        if not here:
            output.say("there the command needs its absolute path")
    elif client not in ("claude-desktop", "vscode"):
        which = "" if token else ", with the file that `token add --out FILE` wrote"
        output.say(f'the token: export {held}="$(cat {shlex.quote(str(token or "FILE"))})"{which}')


def _tell_of(entry: "Token", tenant: str | None) -> None:
    """The facts of the token that was named; on stderr."""
    from mcpctl.identity import tokens

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
