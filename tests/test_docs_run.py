"""The commands of the documentation's pages, run in their order by a real shell against a real site."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl import private_file
from mcpctl.postgres.embedded import Binaries
from page_shell import Shell, replaced, script, shell

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(shutil.which("psql") is None, reason="the pages' commands need psql")


@pytest.fixture(scope="module")
def cluster_shop(newest: Binaries) -> Iterator[site.Shop]:
    with site.shop(newest, tcp=True) as found:
        site.keep_out(found.cluster)
        yield found


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that is ours until it is let go: bound and not listening, so that a server may listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def postgres(shop: site.Shop, **more: str) -> dict[str, str]:
    """What psql needs to be the superuser."""
    cluster = shop.cluster
    found = {"PGHOST": cluster.host, "PGPORT": str(cluster.port), "PGUSER": "postgres"}
    return {**found, "PGPASSWORD": cluster.superuser_password, **more}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_quick_start(cluster_shop: site.Shop, certificates: Path, tmp_path: Path) -> None:
    demo = site.Site(tmp_path / "demo", cluster_shop, per_user=True)
    demo.run("user", "add", "demo")
    demo.grant("demo")
    etc, home = tmp_path / "etc", tmp_path / "home"
    home.mkdir()
    etc.mkdir(0o700)
    for name, ours in (("fullchain.pem", "cert.pem"), ("privkey.pem", "key.pem")):
        private_file.create(etc / name, (certificates / ours).read_bytes())
    own = home / ".config" / "mcpctl"
    with free_port() as plain, free_port() as secure:
        words = {
            "http://127.0.0.1:8080": f"http://127.0.0.1:{plain}",
            "unset MCPCTL_CONFIG": f"systemctl stop mcpctl; export MCPCTL_CONFIG={own}/config.yaml; unset",
            "mcpctl init --db-host 127.0.0.1": f"mcpctl init {own} --port {plain} --db-host 127.0.0.1",
            "sudo mcpctl init --db-host db.example.org": f"systemctl stop mcpctl; export MCPCTL_CONFIG={etc}/config.yaml;"
            f" mcpctl init {etc} --port {secure} --db-user mcpctl_second --db-host 127.0.0.1",
            "--db-name shop": f"--db-port {cluster_shop.cluster.port} --db-name shop",
            "mcp.example.org:8443": f"localhost:{secure}",
            "/etc/mcpctl": etc,
            "token revoke 1hrspjl1": "token revoke $(mcpctl token list | cut -f1)",
        }  # fmt: skip
        env = {"MCPCTL_CONFIG": str(demo.config), "MCP_TOKEN": demo.token("demo")[1], "SSL_CERT_FILE": str(certificates / "ca.pem")}
        with shell(home, postgres(cluster_shop, **env)) as found:
            begun = found.run(f"```sh\nmcpctl --config {demo.config} serve --port {plain}\n```\n")
            said = found.run(replaced(page("quick-start.md"), words))
    assert "serving at" in begun
    assert said.count('"structuredContent"') == 2
    assert "cut: 0 queries, 0 backends left" in said
