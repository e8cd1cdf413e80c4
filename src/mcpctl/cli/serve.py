"""mcpctl serve: the server."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, settings

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.server.listening import Listening


def serve(
    context: typer.Context,
    stdio: Annotated[bool, typer.Option("--stdio", help="Speak MCP on stdin and stdout.")] = False,
    http: Annotated[bool, typer.Option("--http", help="Speak MCP over HTTP. The default.")] = False,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on. Default 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port to listen on. Default 8080; 0 takes a free one."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate in PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key in PEM.")] = None,
    tls_chain: Annotated[
        Path | None, typer.Option("--tls-chain", metavar="FILE", help="Intermediate certificates in PEM.")
    ] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy of server.trusted_proxies does the TLS.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, max=64, help="Processes that share the port.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask nobody for a token. Loopback only.")] = False,
    config: ConfigOption = None,
) -> None:
    """Serve MCP: over HTTP on 127.0.0.1:8080 without a flag, or on stdin and stdout.

    On stdio the caller is the token in MCPCTL_TOKEN; without one, the local user. MCPCTL_DATABASE_URL alone is
    enough there. Anything but loopback needs --tls-cert and --tls-key, or --behind-proxy.
    """
    import os
    from functools import partial

    from mcpctl.errors import UsageError
    from mcpctl.server.hangup import Hangup

    if stdio and http:
        raise UsageError("--stdio and --http exclude each other", "choose one")
    hangup = Hangup()  # before all that takes long: who sends it means the config as it is then
    found = settings(context, config)
    _check_that_python_can_be_read()
    from mcpctl.server import logs, tracing

    logs.check(found)
    tracing.check(found.tracing)
    logs.set_up(found.log)
    if host is not None and not host.strip():
        raise UsageError("--host is empty", "name an address, such as 127.0.0.1, or leave it out")
    over_http = (host, port, tls_cert, tls_key, tls_chain, workers)
    if stdio or (found.server.stdio and not http):
        if behind_proxy or no_auth or any(value is not None for value in over_http):
            raise UsageError("the flags for HTTP do not go with --stdio", "leave them out")
        _check_administrator(found, public=False, http=False)
        hangup.release()
        _stdio(found)
        return
    from mcpctl.server import activation
    from mcpctl.server.notify import Notifier

    if (handed := activation.handed(os.environ, os.getpid())) is not None:
        if host is not None or port is not None:
            raise UsageError("--host and --port do not go with a socket of systemd's", "leave them out")
        host, port = handed.getsockname()[:2]
    flags = _Flags(host, port, tls_cert, tls_key, tls_chain, behind_proxy, workers, no_auth)
    listening = _listening(found, flags)
    from mcpctl.server import run

    _collect_garbage()
    read = partial(_read_again, found, flags)
    systemd = Notifier(os.environ, os.getpid())
    run.serve(listening, lambda url: output.say(f"serving at {url}"), read, hangup, systemd, handed)


@dataclass(frozen=True)
class _Flags:
    """What the command line says over the config."""

    host: str | None
    port: int | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_chain: Path | None
    behind_proxy: bool
    workers: int | None
    no_auth: bool


def _listening(found: "Settings", flags: _Flags) -> "Listening":
    """The config with the flags over it, checked as far as the command line can."""
    from dataclasses import replace

    from mcpctl.errors import UsageError
    from mcpctl.server.listening import Listening

    if (flags.tls_cert is None) != (flags.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together", "give both")
    server, tls = found.server, found.server.tls
    if flags.tls_cert is not None:
        tls = replace(tls, cert=flags.tls_cert, key=flags.tls_key, chain=flags.tls_chain)
    if flags.tls_chain is not None and tls.cert is None:
        raise UsageError("--tls-chain goes with --tls-cert and --tls-key", "give all three")
    if tls.client_ca is not None and tls.cert is None:
        raise UsageError("server.tls.client_ca goes with a certificate", "give --tls-cert and --tls-key")
    server = replace(
        server,
        host=flags.host or server.host,
        port=server.port if flags.port is None else flags.port,
        workers=flags.workers or server.workers,
        tls=replace(tls, chain=flags.tls_chain or tls.chain),
    )
    if server.sse and server.workers > 1:
        raise UsageError("server.sse goes with one worker only", "say --workers 1")
    if found.limits.connections < 2 * server.workers:
        raise UsageError(
            f"each of {server.workers} workers needs at least two of limits.connections, which is "
            f"{found.limits.connections}",
            f"say --workers {max(1, found.limits.connections // 2)}, or raise limits.connections",
        )
    _check_connection_limits(found, server.workers)
    made = Listening(replace(found, server=server), behind_proxy=flags.behind_proxy, no_auth=flags.no_auth)
    _check_administrator(found, public=made.public)
    return made


def _read_again(before: "Settings", flags: _Flags) -> "Listening":
    """The config as it is now, with the flags over it."""
    from dataclasses import replace

    from mcpctl import config

    return _listening(replace(config.load(before.source), by_root=before.by_root), flags)


def _check_connection_limits(found: "Settings", workers: int) -> None:
    """The CONNECTION LIMIT of a user's login role has room for a connection of each worker that the config has."""
    names = [name for name, database in found.databases.items() if database.roles == "per_user"]
    if names and workers > found.server.workers:
        output.warn(
            f"the users' login roles in {', '.join(names)} have room for {found.server.workers} workers, not for "
            f"{workers}: calls may fail with too many connections",
            f"set server.workers: {workers}, and grant again, which raises their CONNECTION LIMIT",
        )


def _check_that_python_can_be_read() -> None:
    """Started by root, the server becomes the owner of its files, and goes on importing as that user."""
    import os

    import mcpctl
    from mcpctl.errors import ConfigError

    for file in map(Path, (os.__file__, mcpctl.__file__)):
        if not os.access(file, os.R_OK):
            closed = next((place for place in reversed(file.parents) if not os.access(place, os.X_OK)), file)
            raise ConfigError(
                f"uid {os.geteuid()}, who owns mcpctl's files and whom the server becomes, cannot read {file}",
                f"{closed} is closed to it: install mcpctl where that user may read it, such as /opt/mcpctl, with a "
                "Python that it may read, too",
            )


def _check_administrator(found: "Settings", *, public: bool, http: bool = True) -> None:
    """The administrator's login must be out of the server's reach, where the server is a service of its own: `public`,
    or started as one."""
    import os

    from mcpctl.errors import ConfigError
    from mcpctl.postgres.administrator import FILE

    file = found.source.parent / FILE if found.source is not None else None
    if file is None or not os.access(file, os.R_OK):
        return
    gave_up_root = found.by_root and hasattr(os, "geteuid") and os.geteuid() != 0
    by_systemd = os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()) or (http and _in_a_unit())
    if public or gave_up_root or by_systemd:
        raise ConfigError(
            f"{file} holds a login that can make roles, and this server could read it",
            f"run the server as a user of its own; chown root:root {file}; chmod 0600 {file}: only the command line, "
            "run as root, is to read it",
        )
    output.warn(f"{file} can be read by the user whom the server runs as", "fine for one person; not for a service")


def _in_a_unit() -> bool:
    """Whether systemd has started this process, or a wrapper of it. What a desktop starts inherits the variable from a
    unit of its user's, too: a terminal tells those."""
    import os

    if not os.environ.get("INVOCATION_ID"):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return True
    return False


def _collect_garbage() -> None:
    """Not in what has been imported, and less often than usual from now on: rows are many objects, and no cycles. The
    usual 700 take a quarter of a large answer's time."""
    import gc

    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _stdio(found: "Settings") -> None:
    """One person's server. Without a config file its audit log and key are made in the user's own folder."""
    import os
    import signal

    from mcpctl import private_file
    from mcpctl.audit import log as audit_log
    from mcpctl.server import stdio
    from mcpctl.server.parts import running

    _collect_garbage()
    token = stdio.token_from_environment()
    if found.source is None and not found.audit.key_file.exists():
        before = os.umask(0o077)
        found.audit.key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private_file.create(found.audit.key_file, audit_log.new_key())
        os.umask(before)

    async def main() -> None:
        async with running(found, files=token is not None) as core:
            told = await stdio.serve_until_told(core, token)
        if told is not None:  # all is closed; the exit status tells what ended it
            signal.signal(told, signal.SIG_DFL)
            signal.raise_signal(told)

    stdio.run(main())
