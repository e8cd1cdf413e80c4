"""Where and how the server listens, and what of it stays as long as it runs."""

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass

from mcpctl.certificates import Pair
from mcpctl.config_keys import Settings
from mcpctl.config_profile import PRODUCTION
from mcpctl.errors import ConfigError, Error
from mcpctl.server import credentials
from mcpctl.server.door import Door


@dataclass(frozen=True)
class Listening:
    """The config's `server` with the command line's flags over it. `port`: the one in use, where the config says 0;
    `pair`: the certificate that was served last, for a worker that finds its files out of order."""

    settings: Settings
    behind_proxy: bool = False
    no_auth: bool = False
    port: int | None = None
    pair: Pair | None = None

    @property
    def tls(self) -> bool:
        """Whether it speaks HTTPS."""
        return self.settings.server.tls.cert is not None

    @property
    def public(self) -> bool:
        """Whether it is there for others than who has started it."""
        server = self.settings.server
        proxied = self.behind_proxy or server.public_url is not None or bool(server.trusted_proxies)
        return proxied or not credentials.is_loopback(server.host)

    def check(self) -> None:
        """Refuse what would send tokens or rows in clear, or let strangers in."""
        server = self.settings.server
        loopback = credentials.is_loopback(server.host)
        if self.behind_proxy and not server.trusted_proxies:
            raise ConfigError("--behind-proxy needs server.trusted_proxies", "name the proxy's address there")
        if self.behind_proxy and server.public_url is None and self.settings.auth.oauth.enabled:
            raise ConfigError(
                "auth.oauth behind a proxy needs server.public_url, which clients are told, and cookies belong to",
                "say there what browsers call the server by, such as https://mcp.example.org",
            )
        if not loopback and not self.tls and not self.behind_proxy:
            raise ConfigError(
                f"plain HTTP on {server.host} would send tokens and rows in clear",
                "give --tls-cert and --tls-key, or --behind-proxy with server.trusted_proxies, or listen on 127.0.0.1",
            )
        production = server.profile == PRODUCTION
        if production and (self.no_auth or not (self.tls or self.behind_proxy)):
            raise ConfigError(
                "server.profile is production: no server without tokens, nor without HTTPS or a proxy that speaks it",
                "leave --no-auth out, and set server.tls, or say --behind-proxy",
            )
        if self.no_auth and not loopback:
            raise ConfigError(f"--no-auth is for loopback only, not for {server.host}", "use tokens")
        if self.no_auth and (self.behind_proxy or server.public_url or server.trusted_proxies):
            raise ConfigError("--no-auth does not go with public_url, trusted_proxies or --behind-proxy", "use tokens")

    def check_successor(self, new: "Listening") -> None:
        """Refuse what cannot change while it runs: the socket is bound, the workers are there."""
        fixed: dict[str, Callable[[Listening], object]] = {
            "server.host": lambda one: one.settings.server.host,
            "server.port": lambda one: one.settings.server.port,
            "server.workers": lambda one: one.settings.server.workers,
            "server.runtime_dir": lambda one: one.settings.server.runtime_dir,
            "server.stdio": lambda one: one.settings.server.stdio,
            "server.tls.cert": lambda one: one.tls,
            "metrics.host": lambda one: one.settings.metrics.host,
            "metrics.port": lambda one: one.settings.metrics.port,
        }
        keys = [key for key, value in fixed.items() if value(self) != value(new)]
        if keys:
            raise ConfigError(f"{', '.join(keys)} cannot change while the server runs", "restart it")


def bind(host: str, port: int) -> Door:
    """The listening socket."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio turns Nagle's algorithm off for sockets that name their protocol, and else an answer takes 40 ms more.
        made = Door(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as problem:
        hint = "is another server there?"
        if isinstance(problem, socket.gaierror) or problem.errno == errno.EADDRNOTAVAIL:
            hint = "server.host and --host take an address of this machine, such as 127.0.0.1"
        elif problem.errno in (errno.EACCES, errno.EPERM):
            hint = "a port below 1024 is root's; docs/deployment.md has a socket that systemd holds"
        raise Error(f"cannot listen on {host} port {port}: {problem.strerror}", hint) from None
    made.set_inheritable(True)
    return made
