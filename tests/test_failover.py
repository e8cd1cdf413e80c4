"""Several hosts in one connection string: a primary and a streaming standby, and the one taking the other's place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import pg
import site_of_mcpctl as site
from mcpctl import private_file
from mcpctl.config_keys import Database
from mcpctl.keyring import Keyring
from mcpctl.postgres.embedded import Cluster
from mcpctl.postgres.login import Login
from mcpctl.postgres.terminator import Terminator
from site_of_mcpctl import Shop, Site, eventually, in_background
from standby import caught_up, promote, standby
from test_cutting import STUBBORN, UNENDING
from under_load import Load

MakeSite = Callable[..., Site]
WHERE = "select current_setting('port'), pg_is_in_recovery()"


@dataclass
class Pair:
    shop: Shop
    other: Cluster

    def dsn(self, attributes: str, *, standby_first: bool = False) -> str:
        ports = [self.shop.cluster.port, self.other.port]
        first, second = reversed(ports) if standby_first else ports
        return (
            f"host=127.0.0.1,127.0.0.1 port={first},{second} dbname=shop user=shop_reader"
            f" target_session_attrs={attributes}"
        )

    def site(
        self,
        make_site: MakeSite,
        attributes: str,
        extra: str = "password_file: shop.password",
        *,
        standby_first: bool = False,
        user: str | None = None,
    ) -> Site:
        """A site whose database `pair` is found by several hosts."""
        dsn = self.dsn(attributes, standby_first=standby_first)
        more = f"  pair: {{dsn: '{dsn}', default: true, {extra}}}\n"
        at = make_site(self.shop, database="    required: false\n", extra=more)
        if user is not None:
            private_file.create(at.folder / "admin.dsn", at.admin_dsn().encode() + b"\n")
            at.user(user, "mcp-admin")
            for access in ("read", "write"):
                at.run("user", "grant", user, "--database", "pair", "--schema", "public", "--access", access, "--apply")
            caught_up(self.shop.cluster, self.other)
        return at.start()

    def both(self, query: str) -> list[tuple[object, ...]]:
        """The rows of a query on both, in one list."""
        found: list[tuple[object, ...]] = []
        for cluster in (self.shop.cluster, self.other):
            dsn = cluster.dsn_for("postgres", self.shop.cluster.superuser_password, "shop")
            with psycopg.connect(dsn, autocommit=True) as admin:
                found += admin.execute(query.encode()).fetchall()
        return found


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A primary and its standby, which stay what they are."""
    with _pair(request.param) as found:
        yield found


@contextlib.contextmanager
def _pair(binaries: object) -> Iterator[Pair]:
    with site.shop(binaries, tcp=True) as shop, standby(shop.cluster) as other:  # type: ignore[arg-type]
        caught_up(shop.cluster, other)
        yield Pair(shop, other)


def test_the_way_to_one_of_the_hosts_keeps_all_else_that_the_connection_string_says() -> None:
    """Also what is empty: without it libpq would look into the environment."""
    terminator = Terminator(Login("pair", Database(), Keyring(Path("/nonexistent"))))
    dsn = "host=a,b hostaddr=192.0.2.1,192.0.2.2 port=1,2 user=u passfile='' target_session_attrs=primary"
    assert terminator.beside(dsn) == dsn
    at_b = {"host": "b", "hostaddr": "192.0.2.2", "port": "2", "user": "u", "passfile": ""}
    assert conninfo_to_dict(terminator.beside(dsn, ("b", "192.0.2.2", "2"))) == at_b
    in_folder = {"host": "/run/p", "hostaddr": "", "port": "5432", "user": "u", "passfile": ""}
    assert conninfo_to_dict(terminator.beside(dsn, ("/run/p", "", "5432"))) == in_folder


@pytest.mark.parametrize(
    "attributes, in_recovery",
    [
        ("any", False),
        ("read-write", False),
        ("primary", False),
        ("read-only", True),
        ("standby", True),
        ("prefer-standby", True),
    ],
)
def test_a_database_of_several_hosts_is_asked_on_the_one_that_is_wanted(
    make_site: MakeSite, pair: Pair, attributes: str, in_recovery: bool
) -> None:
    at = pair.site(make_site, attributes)
    with at.client(at.token()[1]) as client:
        port = pair.other.port if in_recovery else pair.shop.cluster.port
        assert client.rows(WHERE) == [[str(port), in_recovery]]
        assert client.rows("select count(*) > 0 from orders") == [[True]]
        assert len(pair.both("SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'mcpctl%'")) == 2
        ports = pair.both("SELECT current_setting('port') FROM pg_stat_activity WHERE application_name LIKE 'mcpctl%'")
        assert set(ports) == {(str(port),)}


def test_a_standby_answers_as_its_primary_does(make_site: MakeSite, pair: Pair) -> None:
    at = pair.site(make_site, "standby")
    at.user("carol", "mcp-admin")
    with at.client(at.token("carol")[1]) as client:
        for _ in range(2):  # judged, and remembered
            assert client.rows("select pg_is_in_recovery(), count(*) > 0 from orders") == [[True, True]]
        line = [line for line in at.audit() if line["event"] == "tool.called"][-1]
        assert line["relations"] == ["public.orders"]
        assert client.rows("select set_config('TimeZone', 'UTC', false)") == [["UTC"]]
        assert client.rows("show transaction_read_only") == [["on"]]
        assert "25006" in client.error("select txid_current()")
        result = client.call("database_health", {}).json()["result"]
        assert not result["isError"], result
        assert result["structuredContent"]["replication"]["is_standby"] is True
        assert not client.call("get_schema_info", {"table": "orders"}).json()["result"]["isError"]
        assert not client.call("explain_query", {"query": "select 1", "analyze": True}).json()["result"]["isError"]


def test_a_statement_that_writes_is_refused_by_a_standby_in_words(make_site: MakeSite, pair: Pair) -> None:
    at = pair.site(make_site, "standby", "roles: per_user, allow_open_hba: true", user="dave")
    with at.client(at.token("dave")[1]) as client:
        said = client.call("execute_statement", {"statement": "delete from orders", "database": "pair"}).json()[
            "result"
        ]
        assert said["isError"]
        assert "cannot set transaction read-write mode during recovery" in said["content"][0]["text"], said
        assert client.rows(WHERE, database="pair") == [[str(pair.other.port), True]]


def test_the_primary_is_killed_and_the_standby_promoted(make_site: MakeSite, newest: object) -> None:
    with _pair(newest) as pair:
        at = pair.site(make_site, "read-write")
        ready = at.url.removesuffix("/mcp") + "/ready"
        with Load(at, "pair", callers=3, query="select {tag}, pg_is_in_recovery()") as load:
            pair.shop.cluster.kill()
            eventually(lambda: load.refused)
            promote(pair.other)
            begun = time.monotonic()
            load.goes_on()
            assert time.monotonic() - begun < 10
            assert httpx.get(ready, trust_env=False).status_code == 200
        load.judge("127.0.0.1", str(pair.other.port), "shop_reader")
        assert load.refused
        with at.client(at.token()[1]) as client:
            assert client.rows(WHERE) == [[str(pair.other.port), False]]


def test_a_backend_is_ended_on_the_host_that_it_is_on(make_site: MakeSite, newest: object) -> None:
    """It would outlive a cancel and its closed socket. What could end it was lost, and is on another host now."""
    with _pair(newest) as pair:
        primary, second = pair.shop.cluster, pair.other
        with pair.shop.admin() as admin:
            admin.execute(STUBBORN)
            admin.execute("GRANT EXECUTE ON FUNCTION stubborn() TO shop_reader")
        caught_up(primary, second)
        second.stop_server()
        at = pair.site(make_site, "any", standby_first=True)
        id, text = at.token()
        with at.client(text) as client, at.client(at.token("bob")[1]) as b:
            assert client.rows(WHERE) == [[str(primary.port), False]]
            assert b.rows(WHERE) == [[str(primary.port), False]]
            running = in_background(client.call, "query_database", {"query": UNENDING})
            [[pid, *_]] = eventually(lambda: pair.shop.backends("state = 'active' AND query LIKE '%stubborn%'"))
            second.start_server()
            with pair.shop.admin() as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'mcpctl cut'"
                )
            assert b.rows(WHERE) == [[str(second.port), True]]  # the other connections follow it
            done = at.run("token", "revoke", id)
            assert "0 backends left" in done.stdout + done.stderr
            assert not pair.shop.backends(f"pid = {pid}")
            assert running.result().status_code == 401
