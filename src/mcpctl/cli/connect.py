"""mcpctl connect: the bridge between a client that starts a program and a server that is elsewhere."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output

if TYPE_CHECKING:
    from mcpctl.bridge.kept import Kept
    from mcpctl.bridge.remote import Credential
    from mcpctl.bridge.sign_in import Options

_FOLDER = "connect"
_VARIABLE = "MCPCTL_TOKEN"


def connect(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server's URL, such as https://mcp.example.org/mcp.")],
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="The token, in a file of your own (0600).")
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option("--ca-file", metavar="FILE", help="Certificates in PEM to believe beside the system's."),
    ] = None,
    sign_in: Annotated[bool, typer.Option("--sign-in", help="Sign in, keep it, and end.")] = False,
    sign_out: Annotated[
        bool, typer.Option("--sign-out", help="End the sign-in, forget what is kept, and end.")
    ] = False,
    keep_token: Annotated[
        bool, typer.Option("--keep-token", help="Keep a token for this URL, from a prompt or stdin, and end.")
    ] = False,
    device: Annotated[bool, typer.Option("--device", help="Sign in with a code, on another device.")] = False,
    client_id: Annotated[
        str | None, typer.Option("--client-id", metavar="ID", help="Sign in as this client, registered beforehand.")
    ] = None,
    client_metadata_url: Annotated[
        str | None,
        typer.Option("--client-metadata-url", metavar="URL", help="Sign in with this Client ID Metadata Document."),
    ] = None,
    callback_port: Annotated[
        int, typer.Option("--callback-port", metavar="N", min=0, max=65535, help="Where the browser comes back to.")
    ] = 0,
) -> None:
    """Speak MCP on stdin and stdout for a server elsewhere: for clients that start a program.

    The token comes from --token-file, MCPCTL_TOKEN, or what is kept for the URL; where there is none and the server
    offers it, you sign in with your browser. Example: mcpctl connect https://mcp.example.org/mcp --token-file my.token
    """
    from mcpctl.bridge import address
    from mcpctl.errors import UsageError

    where = address.check(url)
    if sum((sign_in, sign_out, keep_token)) > 1:
        raise UsageError("--sign-in, --sign-out and --keep-token exclude each other", "choose one")
    if token_file is not None and (sign_in or sign_out or keep_token):
        raise UsageError("--token-file needs no sign-in, and is not kept", "leave one of them out")
    options = _options(device, client_id, client_metadata_url, callback_port)
    given = os.environ.pop(_VARIABLE, None)  # nothing that is started from here is to inherit it
    if keep_token:
        _keep_token(_kept(where))
    elif sign_in or sign_out:
        _once(where, ca_file, options, out=sign_out)
    else:
        _bridge(where, ca_file, options, token_file, given)


def _options(device: bool, client_id: str | None, metadata_url: str | None, port: int) -> "Options":
    from mcpctl.bridge import address
    from mcpctl.bridge.sign_in import Options
    from mcpctl.errors import UsageError

    if client_id is not None and metadata_url is not None:
        raise UsageError("--client-id and --client-metadata-url exclude each other", "choose one")
    if metadata_url is not None:
        checked = address.check(metadata_url)
        if not checked.startswith("https://") or checked.endswith("/") or "?" in checked:
            raise UsageError("--client-metadata-url is no URL of a document", "https://example.org/client.json is one")
    return Options(client_id, metadata_url, device, port)


def _kept(url: str) -> "Kept":
    from mcpctl import config
    from mcpctl.bridge.kept import Kept

    return Kept(config.default_folder() / _FOLDER, url)


def _keep_token(kept: "Kept") -> None:
    """Keep a token from stdin, instead of what was kept."""
    import getpass
    import sys

    from mcpctl.bridge import credentials

    terminal = sys.stdin.isatty()
    line = getpass.getpass("token: ", stream=sys.stderr) if terminal else sys.stdin.readline(1 << 16)
    sealed = kept.write({"bearer": credentials.checked(line, "stdin")})
    output.say(f"kept in {kept.path}{', sealed with a key in the system keyring' if sealed else ''}")


def _once(url: str, ca_file: Path | None, options: "Options", *, out: bool) -> None:
    """Sign in or out, without a client."""
    import asyncio

    from mcpctl.bridge import remote, sign_in

    _take_over()

    async def main() -> None:
        kept = _kept(url)
        async with remote.client(ca_file) as http:
            if out:
                found = await sign_in.sign_out(http, kept, options, output.say)
                output.say("signed out" if found else "nothing was kept for this URL")
                return
            said: list[str] = []  # who has just signed in was told so; who was signed in already was not

            def say(line: str) -> None:
                said.append(line)
                output.say(line)

            credential = sign_in.SignIn(http, kept, options, say)
            asked = await remote.look(url, http, credential)
            if not asked or sign_in.SIGNED_IN not in said:
                output.say(sign_in.SIGNED_IN if asked else "the server asks for no sign-in")

    asyncio.run(main())


def _bridge(url: str, ca_file: Path | None, options: "Options", token_file: Path | None, given: str | None) -> None:
    import asyncio

    from mcpctl.bridge import pump, remote

    stdin, stdout = _take_over()

    async def main() -> None:
        async with remote.client(ca_file) as http:
            credential = _credential(url, http, options, token_file, given)
            out = pump.Out(stdout)
            there = remote.Remote(url, http, credential, out.put, output.say)
            await pump.Pump(there, out.put).run(aiter(pump.Lines(stdin)), out.gone)

    asyncio.run(main())


def _credential(url: str, http: Any, options: "Options", token_file: Path | None, given: str | None) -> "Credential":
    from mcpctl.bridge import credentials, sign_in

    if token_file is not None:
        return credentials.Given(lambda: credentials.from_file(token_file), str(token_file))
    if given is not None:
        return credentials.Given(lambda: credentials.checked(given, _VARIABLE), _VARIABLE)
    return sign_in.SignIn(http, _kept(url), options, output.say)


def _take_over() -> tuple[Any, int]:
    """stdin and stdout for the protocol alone: what a browser or a library writes goes to stderr, and whatever reads
    stdin finds it empty."""
    stdin, stdout = os.fdopen(os.dup(0), "rb", closefd=False), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return stdin, stdout
