"""The proxies of packaging/proxies as processes: the files as they are shipped, with this machine's ports and paths."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from site_of_mcpctl import eventually

SHIPPED = Path(__file__).parents[1] / "packaging" / "proxies"
NAMES = ("nginx", "haproxy", "caddy")
_NGINX = """\
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/mcpctl.conf;
}}
"""


@dataclass(frozen=True)
class Front:
    """A proxy that runs: `log` is where it writes what was asked."""

    name: str
    port: int
    log: Path

    def url(self, path: str = "/mcp") -> str:
        return f"https://localhost:{self.port}{path}"


def program(name: str) -> str | None:
    """Where it is; Debian keeps daemons where an ordinary user's PATH does not look."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


def free_ports(many: int) -> list[int]:
    """Ports that nobody had a moment ago, each another."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(many)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def started(
    name: str, port: int, upstream: int, certificates: Path, folder: Path, changed: dict[str, str] | None = None
) -> Iterator[Front]:
    """The proxy on `port`, in front of what listens on `upstream`. `changed`: what else is another than shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    front = Front(name, port, folder / "asked.log")
    command = {"nginx": _nginx, "haproxy": _haproxy, "caddy": _caddy}[name](
        front, upstream, certificates, changed or {}
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "said.log").open("wb") as said:
        out = front.log.open("wb") if name == "haproxy" else said
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env=environment)
        try:
            eventually(lambda: _answers(process, port, folder))
            yield front
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            out.close()


def _answers(process: subprocess.Popen[bytes], port: int, folder: Path) -> bool:
    assert process.poll() is None, (folder / "said.log").read_text(errors="replace")
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _put(shipped: str, to: Path, changes: dict[str, str]) -> None:
    """The shipped file with these changes, each of which must find its place."""
    text = (SHIPPED / shipped).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{shipped} has no {old!r}"
        text = text.replace(old, new)
    to.write_text(text, encoding="utf-8")


def _nginx(front: Front, upstream: int, certificates: Path, changed: dict[str, str]) -> list[str]:
    folder = front.log.parent
    changes = {
        "    listen [::]:443 ssl http2;\n": "",
        "443 ssl": f"127.0.0.1:{front.port} ssl",
        "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        "mcp.example.org": "localhost",
        "/etc/ssl/mcpctl/fullchain.pem": str(certificates / "cert.pem"),
        "/etc/ssl/mcpctl/privkey.pem": str(certificates / "key.pem"),
        "/var/log/nginx/mcpctl.log": str(front.log),
    }
    _put("nginx.conf", folder / "mcpctl.conf", changes | changed)
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder))
    return [
        program("nginx") or "nginx",
        "-p",
        str(folder),
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        str(folder / "error.log"),
    ]


def _haproxy(front: Front, upstream: int, certificates: Path, changed: dict[str, str]) -> list[str]:
    folder = front.log.parent
    both = folder / "mcpctl.pem"
    both.touch(0o600)
    both.write_bytes((certificates / "cert.pem").read_bytes() + (certificates / "key.pem").read_bytes())
    changes = {
        "bind :443": f"bind 127.0.0.1:{front.port}",
        "/etc/haproxy/mcpctl.pem": str(both),
        "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        "log /dev/log local0": "log stdout format raw local0",
        "maxconn 10000": "maxconn 1000",  # so that an ordinary user's file descriptors are enough
    }
    _put("haproxy.cfg", folder / "haproxy.cfg", changes | changed)
    return [program("haproxy") or "haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


def _caddy(front: Front, upstream: int, certificates: Path, changed: dict[str, str]) -> list[str]:
    folder = front.log.parent
    changes = {
        "{\n\tservers {": "{\n\tadmin off\n\tauto_https disable_redirects\n\tservers {",
        "{$MCP_HOST:mcp.example.org} {": f"https://localhost:{front.port} {{\n"
        f"\tbind 127.0.0.1\n\ttls {certificates / 'cert.pem'} {certificates / 'key.pem'}",
        "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        "/var/log/caddy/mcpctl.log": str(front.log),
    }
    _put("Caddyfile", folder / "Caddyfile", changes | changed)
    return [program("caddy") or "caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
