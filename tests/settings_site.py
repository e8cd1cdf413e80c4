"""A site whose user changes settings: what the tests of admin access have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg

import site_of_mcpctl as site

ROLE = "mcp_carol_a"
LISTED = (
    "work_mem", "log_line_prefix", "max_connections", "temp_tablespaces", "log_destination", "datestyle",
    "statement_timeout", "idle_session_timeout", "fsync", "block_size", "my.thing",
    "application_name",
)  # fmt: skip
Make = Callable[..., site.Site]


def config(settings: Sequence[str] = LISTED, more: str = "") -> str:
    """What is added to the config of the database `shop`."""
    return f"    settings: [{', '.join(settings)}]\n{more}"


def relist(found: site.Site, old: str, new: str) -> None:
    """Change a text of the config."""
    text = found.config.read_text()
    assert old in text
    found.config.write_text(text.replace(old, new))


def with_carol(make_site: Make, shop: site.Shop, database: str = "", user: str = "carol", **options: Any) -> site.Site:
    """A site with an administrator, and with carol, who has the role mcp-admin and no grant yet."""
    found = make_site(shop, database=database or config(), per_user=True, **options)
    found.run("user", "add", user, "--role", "mcp-admin")
    return found


def grant(found: site.Site, *more: str, access: str = "admin", user: str = "carol", **options: Any) -> Any:
    arguments = ("user", "grant", user, "--database", "shop", "--access", access, *(more or ("--apply",)))
    return found.run(*arguments, **options)


def privileges(shop: site.Shop, role: str = ROLE) -> dict[str, set[str]]:
    """The settings that a role was given something on: {name: {privilege, …}}."""
    held: dict[str, set[str]] = {}
    with shop.admin() as connection:
        for name, privilege in connection.execute(
            "SELECT p.parname, a.privilege_type FROM pg_parameter_acl p, aclexplode(p.paracl) a "
            "WHERE a.grantee = to_regrole(%s)",
            (role,),
        ):
            held.setdefault(name, set()).add(privilege)
    return held


def fact(shop: site.Shop, query: str, *parameters: Any) -> Any:
    """The first cell of a superuser's query."""
    with shop.admin() as connection:
        row = connection.execute(query.encode(), parameters).fetchone()
    return row[0] if row is not None else None


def reset(shop: site.Shop) -> None:
    """Take back what a test has set, and wait until the server has."""
    with shop.admin() as connection:
        [since] = connection.execute("SELECT pg_conf_load_time()::text").fetchone() or [None]
        connection.execute("ALTER SYSTEM RESET ALL")
        connection.execute("SELECT pg_reload_conf()")
        site.eventually(
            lambda: connection.execute("SELECT pg_conf_load_time()::text <> %s", (since,)).fetchone() == (True,)
        )


def clean(shop: site.Shop) -> None:
    """Take back what a test has left in the cluster, so that the next one begins with its own."""
    reset(shop)
    with shop.admin() as connection:
        for (role,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ '^mcp_'").fetchall():
            for (name,) in connection.execute("SELECT datname FROM pg_database WHERE datallowconn").fetchall():
                dsn = shop.cluster.dsn_for("postgres", shop.cluster.superuser_password, name)
                with psycopg.connect(dsn, autocommit=True) as there:
                    there.execute(f'DROP OWNED BY "{role}"'.encode())
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
            connection.execute(end, (role,))
            connection.execute(f'DROP ROLE "{role}"'.encode())


def own_cluster(binaries: Any) -> Iterator[site.Shop]:
    """A cluster that nobody else's tests use: its settings are changed."""
    with site.shop(binaries) as found:
        yield found


def ask(client: site.Client, tool: str, **arguments: Any) -> Any:
    answer = client.call(tool, arguments).json()["result"]
    assert not answer["isError"], answer["content"][0]["text"]
    return answer["structuredContent"]


def change(client: site.Client, name: str, value: str | None, **more: Any) -> Any:
    return ask(client, "set_pg_configuration", name=name, value=value, **more)


def refusal(client: site.Client, tool: str, **arguments: Any) -> str:
    answer = client.call(tool, arguments).json()["result"]
    assert answer["isError"], answer
    text: str = answer["content"][0]["text"]
    return text


def last_call(here: site.Site) -> dict[str, Any]:
    return [line for line in here.audit() if line["event"] in ("tool.called", "tool.refused")][-1]
