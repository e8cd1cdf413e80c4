"""The commands of the documentation's pages, run in their order by a real shell against a real site."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import kept
import site_of_mcpctl as site
import test_pgedge
from mcpctl import private_file
from mcpctl.postgres.embedded import Binaries
from page_shell import Shell, replaced, shell

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(
    not (shutil.which("psql") and shutil.which("curl")), reason="the pages' commands need psql and curl"
)


def part(text: str, begin: str, end: str) -> str:
    """A page from one line on, up to another one."""
    assert begin in text
    return begin + (text.partition(begin)[2] if begin else text).partition(end or "\0")[0]


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
            "sudo mcpctl init --db-host db.example.org":
            f"systemctl stop mcpctl; export MCPCTL_CONFIG={etc}/config.yaml;"
            f" mcpctl init {etc} --port {secure} --db-user mcpctl_second --db-host 127.0.0.1",
            "--db-name shop": f"--db-port {cluster_shop.cluster.port} --db-name shop",
            "mcp.example.org:8443": f"localhost:{secure}",
            "/etc/mcpctl": etc,
            "token revoke 1hrspjl1": "token revoke $(mcpctl token list | cut -f1)",
        }  # fmt: skip
        env = {
            "MCPCTL_CONFIG": str(demo.config),
            "MCP_TOKEN": demo.token("demo")[1],
            "SSL_CERT_FILE": str(certificates / "ca.pem"),
        }
        with shell(home, postgres(cluster_shop, **env)) as found:
            begun = found.run(f"```sh\nmcpctl --config {demo.config} serve --port {plain}\n```\n")
            said = found.run(replaced(page("quick-start.md"), words))
    assert "serving at" in begun
    assert said.count('"structuredContent"') == 2
    assert "cut: 0 queries, 0 backends left" in said


@contextlib.contextmanager
def at_work(
    shop: site.Shop, folder: Path, extra: str = "", database: str = "", **env: str
) -> Iterator[tuple[site.Site, Shell]]:
    """A shell beside an installation whose server runs, with a free port, and an administrator."""
    made = site.Site(folder, shop, extra=extra, database=database)
    private_file.create(folder / "admin.dsn", made.admin_dsn().encode() + b"\n")
    home = folder.with_name(f"{folder.name}-home")
    home.mkdir()
    with free_port() as port:
        more = {"MCPCTL_CONFIG": str(made.config), "MCPCTL_SERVER__PORT": str(port), **env}
        with shell(home, postgres(shop, **more)) as found:
            found.run("```sh\nsystemctl start mcpctl\n```\n")
            yield made, found


def per_user(shop: site.Shop, name: str, dbname: str = "shop", more: str = "") -> str:
    """A database of the config whose users have login roles."""
    cluster = shop.cluster
    return f"  {name}: {{host: {cluster.host}, port: {cluster.port}, dbname: {dbname}, roles: per_user{more}}}\n"


def test_onboarding(cluster_shop: site.Shop, tmp_path: Path) -> None:
    where = f"--host {cluster_shop.cluster.host} --port {cluster_shop.cluster.port}"
    with cluster_shop.admin() as connection:
        connection.execute("CREATE DATABASE trial")
        connection.execute("REVOKE ALL ON DATABASE trial FROM PUBLIC")
    other = per_user(cluster_shop, "people") + per_user(cluster_shop, "trial", "trial")
    words = {
        "psql -d shop": "psql -d trial",
        "--database shop --schema $one": "--database trial --schema $one",
        "--tenant $one --database shop": "--tenant $one --database trial",
        "--host 127.0.0.1": where,
        "--database shop": "--database people",
        "--database stock": "--database shop",
        "databases:stock:read": "databases:shop:read",
    }  # fmt: skip
    with at_work(cluster_shop, tmp_path / "site", database=other) as (_, found):
        said = found.run(replaced(page("onboarding.md"), words))
    assert "acme-ann removed" in said


def test_incidents(cluster_shop: site.Shop, tmp_path: Path) -> None:
    where = f"--host {cluster_shop.cluster.host} --port {cluster_shop.cluster.port} --dbname shop"
    with cluster_shop.admin() as connection:
        connection.execute("CREATE SCHEMA sales")
        connection.execute("CREATE TABLE sales.customers (id int); CREATE TABLE sales.orders (id int)")
        connection.execute(
            "CREATE ROLE leaked_reader LOGIN PASSWORD 'the leaked one, with 16';"
            " GRANT CONNECT ON DATABASE shop TO leaked_reader"
        )
    more = per_user(cluster_shop, "sales", more=", default: true")
    with at_work(cluster_shop, tmp_path / "site", database=more) as (made, found):
        made.run("user", "grant", "alice", "--database", "sales", "--schema", "sales", "--access", "read", "--apply")
        one, _ = made.token(databases=("sales",))
        two, _ = made.token(databases=("shop", "sales"))
        made.run(
            "user", "grant", "alice", "--database", "sales", "--table", "sales.customers", "--access", "read", "--apply"
        )
        words = {
            "1hrspjl1": one, "7k2m9qxd": two, "mcpctl_reader": "leaked_reader",
            "mcpctl-20261128T020000Z.tar.gz.age": "backup.age",
            "anchors-from-elsewhere.txt": "anchors.txt",
        }  # fmt: skip
        found.run(f"```sh\nage-keygen -o backup.key\nmcpctl backup backup.age --recipient {kept.FOR}\n```\n")
        found.run(
            f"```sh\nmcpctl database remove shop --yes; rm {made.folder}/shop.password\n"
            f"printf 'the leaked one, with 16' | mcpctl database add shop {where} --user leaked_reader"
            " --password-file -\nmcpctl config reload\n```\n"
        )
        text = replaced(page("incidents.md"), words)
        said = found.run(part(text, "", "**Look that it is done**"))
        (token,) = (found.there / "new-tokens").glob(f"alice-{two}.token")
        with site.Client(
            f"http://127.0.0.1:{found.env['MCPCTL_SERVER__PORT']}/mcp", token.read_text().strip()
        ) as client:
            assert client.rows("select session_user", database="shop") == [["leaked_reader"]]
        said += found.run(part(text, "**Look that it is done**", "**3. Keep the evidence**"))
        (found.there / "anchors.txt").write_text(found.told)
        said += found.run(part(text, "**3. Keep the evidence**", ""))
    assert "cut: 0 queries, 0 backends left" in said


def test_is_it_healthy(cluster_shop: site.Shop, tmp_path: Path) -> None:
    with at_work(cluster_shop, tmp_path / "site") as (_, found):
        assert "warn" in found.run(page("doctor.md"))


def test_backups(cluster_shop: site.Shop, tmp_path: Path) -> None:
    nights = tmp_path / "backups"
    nights.mkdir(0o700)
    clean, rehearsal = tmp_path / "clean", tmp_path / "rehearsal"
    clean.mkdir(0o700)
    rehearsal.mkdir(0o700)
    public = re.findall(r"age1[a-z0-9]{58}", page("backup.md"))[0]
    name = "mcpctl-20261128T020000Z.tar.gz.age"
    new = f"mcpctl restore {name} --identity backup.key\nmcpctl audit verify\nmcpctl config check"
    words = {
        new: f"export MCPCTL_CONFIG={clean}/config.yaml\n" + new.replace("\n", "; "),
        "/srv/rehearsal": rehearsal,
        name: f"$(ls {nights}/*.age | head -n 1)",
        "mcpctl backup /var/backups/mcpctl ": "mcpctl backup first.age ",
        "directory: /var/backups/mcpctl": "",
        public: kept.FOR,
    }
    extra = f"backup: {{directory: {nights}, recipients: [{kept.FOR}]}}\n"
    with at_work(cluster_shop, tmp_path / "site", extra) as (_, found):
        for one, text in (("tokens", test_pgedge.TOKENS), ("users", test_pgedge.USERS)):
            private_file.create(found.there / f"pgedge-postgres-mcp-{one}.yaml", text.encode())
        found.run(replaced(page("backup.md"), words))


def test_troubleshooting_and_what_else_is_run_each_day(cluster_shop: site.Shop, tmp_path: Path) -> None:
    with at_work(cluster_shop, tmp_path / "site") as (made, found):
        private_file.create(found.there / "alice.token", made.token()[1].encode())
        port = found.env["MCPCTL_SERVER__PORT"]
        words = {"127.0.0.1:8080": f"127.0.0.1:{port}", "pg_isready -h 127.0.0.1": "pg_isready"}
        found.run(replaced(page("troubleshooting.md"), words))
        for name in ("reload.md", "monitoring.md"):
            found.run(page(name))
        found.run(replaced(page("audit.md"), {"/var/log/mcpctl": made.folder}))
