"""pg_hba.conf: what lets the users' login roles in from elsewhere is told, in whatever form it stands there, and of a
file that is taken PostgreSQL itself says that it keeps out who knows a password."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import trustme

import pg
import site_of_mcpctl as site
from mcpctl.errors import Error
from mcpctl.postgres import administrator, hba
from mcpctl.postgres.embedded import Cluster

SOCKET = hba.lines("local")
HERE = hba.lines("127.0.0.1/32")
OWN = "local all postgres scram-sha-256\nhost all postgres 127.0.0.1/32 scram-sha-256\n"
KNOWN = "known by heart"
EVERYBODY = "host all all all scram-sha-256"


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def cluster(request: pytest.FixtureRequest, certificates: Path) -> Iterator[Cluster]:
    ssl = None if request.param.bundled else (certificates / "cert.pem", certificates / "key.pem")  # built without TLS
    listen = {"listen_addresses": "127.0.0.1,::1"}
    with Cluster.start(request.param, tcp=True, ssl=ssl, settings=listen) as found:
        with psycopg.connect(found.dsn, autocommit=True) as connection:
            connection.execute("CREATE ROLE mcp_logins")
            connection.execute(f"CREATE ROLE mcp_alice_w LOGIN PASSWORD '{KNOWN}' IN ROLE mcp_logins")
            connection.execute("CREATE ROLE team ROLE mcp_alice_w")
            connection.execute("CREATE ROLE all_teams ROLE mcp_logins")
            connection.execute(f"CREATE ROLE onlooker LOGIN PASSWORD '{KNOWN}'")
            connection.execute("GRANT SELECT ON pg_hba_file_rules TO onlooker")
            connection.execute("GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO onlooker")
        yield found


def put(cluster: Cluster, *lines: str) -> Path:
    """The file with these lines behind the administrator's own, which PostgreSQL has been told to read."""
    file = cluster.folder / "data" / "pg_hba.conf"
    file.write_text(OWN + "\n".join(lines) + "\n", encoding="utf-8")
    site.reload(cluster)
    return file


def seen(cluster: Cluster) -> Error | None:
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        return administrator.keeps_logins_here(connection, "shop")


def told(cluster: Cluster, *lines: str) -> str | None:
    """What is said of a file with these lines."""
    put(cluster, *lines)
    found = seen(cluster)
    return None if found is None else found.message


def enters(cluster: Cluster) -> set[str]:
    """From where one comes in who knows the password of a role that writes."""
    found = set()
    for place in ("127.0.0.1", "::1", cluster.host):
        try:
            psycopg.connect(
                host=place, port=cluster.port, user="mcp_alice_w", password=KNOWN, dbname="postgres"
            ).close()
        except psycopg.OperationalError as problem:
            if "pg_hba.conf" not in str(problem):
                raise
        else:
            found.add("socket" if place == cluster.host else place)
    return found


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        ((*SOCKET, "local all all trust", EVERYBODY), {"socket"}),
        ((*HERE, "local all all trust", EVERYBODY), {"127.0.0.1"}),
        ((*hba.lines("::1/128"), EVERYBODY), {"::1"}),
        ((*hba.lines("192.0.2.7/32"), "local all all trust", "host all all 0.0.0.0/0 scram-sha-256"), set()),
        ((*hba.lines("192.0.2.7/32", tls=True), EVERYBODY), set()),
        (("host all +mcp_logins db.example.invalid scram-sha-256", *SOCKET, EVERYBODY), {"socket"}),
        (("host all +mcp_logins samehost scram-sha-256", *SOCKET, EVERYBODY), {"socket", "127.0.0.1", "::1"}),
        ((HERE[0], "host all +mcp_logins 0.0.0.0/0 reject", "host all +mcp_logins ::/0 reject", EVERYBODY),
         {"127.0.0.1"}),
        ((HERE[0], "host all +mcp_logins 0.0.0.0/0 reject", "host all all 0.0.0.0/0 scram-sha-256"), {"127.0.0.1"}),
        (("host all +mcp_logins,x all reject # not \"open\"", EVERYBODY), set()),
        (("host all other_role all trust", "host elsewhere all all trust", "host replication all all trust"), set()),
        ((), set()),
    ],
)  # fmt: skip
def test_a_file_that_keeps_the_logins_to_mcpctl_is_taken(
    cluster: Cluster, lines: tuple[str, ...], places: set[str]
) -> None:
    assert told(cluster, *lines) is None
    assert enters(cluster) == places


@pytest.mark.parametrize(
    ("line", "before", "behind", "place"),
    [
        (EVERYBODY, (), (), "::1"),
        ("local all all trust", (), (), "socket"),
        (EVERYBODY, (), SOCKET, "::1"),
        ("host all +mcp_logins 127.0.0.1/32 trust", (), SOCKET, "127.0.0.1"),
        ("local all +mcp_logins trust", (), ("host all +mcp_logins all reject",), "socket"),
        # more than single hosts
        ("host all +mcp_logins 0.0.0.0/0 scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +mcp_logins 0.0.0.0/1 scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +mcp_logins 128.0.0.0/1 scram-sha-256", (), SOCKET, None),
        ("host all +mcp_logins 10.0.0.0/8 scram-sha-256", (), SOCKET, None),
        ("host all +mcp_logins 127.0.0.0/31 scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +mcp_logins ::/127 scram-sha-256", (), SOCKET, "::1"),
        ("host all +mcp_logins ::/0 scram-sha-256", (), SOCKET, "::1"),
        ("host all +mcp_logins all scram-sha-256", (), SOCKET, "::1"),
        ("host all +mcp_logins samenet scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +mcp_logins .example.invalid scram-sha-256", (), SOCKET, None),
        ("hostssl all +mcp_logins all scram-sha-256 clientcert=verify-ca", (), SOCKET, None),
        # by another name than the group's
        ("host all /^mcp_ 0.0.0.0/0 scram-sha-256", (), SOCKET, None),
        ("host all mcp_wendy_w,mcp_alice_w 0.0.0.0/0 scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +team 0.0.0.0/0 scram-sha-256", (), SOCKET, "127.0.0.1"),
        ("host all +all_teams ::/0 scram-sha-256", (), SOCKET, "::1"),
        ("host /^post all 0.0.0.0/0 scram-sha-256", (), SOCKET, None),
        ("host sameuser,postgres all all scram-sha-256", (), SOCKET, "::1"),
        # walls with a hole
        (EVERYBODY, (*HERE[:2], "host all +mcp_logins 0.0.0.0/0 reject"), (), "::1"),
        (EVERYBODY, (HERE[0], "host all +mcp_logins ::/0 reject"), (), "127.0.0.1"),
        ("local all all trust", (HERE[0], HERE[2]), (), "socket"),
        (EVERYBODY, ("host postgres +mcp_logins all reject",), (), None),
        (EVERYBODY, ("host sameuser +mcp_logins all reject",), (), "::1"),
        (EVERYBODY, ("host replication +mcp_logins all reject",), (), "::1"),
        (EVERYBODY, ("host all +mcp_logins 127.0.0.1/32 reject",), (), "::1"),
        (EVERYBODY, ("host other +mcp_logins all reject",), (), "::1"),
        (EVERYBODY, ("host all +mcp_logins 10.0.0.0/8 reject",), (), "::1"),
        (EVERYBODY, ("host all +mcp_logins samehost scram-sha-256",), (), "::1"),
        (EVERYBODY, ("host all +mcp_logins 127.0.0.1/32 reject", "host all +mcp_logins samenet reject"), (), None),
        (EVERYBODY, ("hostssl all +mcp_logins all reject",), (), "::1"),
        (EVERYBODY, ("host all mcp_logins all reject",), (), "::1"),
        # quotes, which pg_hba_file_rules does not show
        (EVERYBODY, ('host all "+mcp_logins" all reject',), (), "::1"),
        (EVERYBODY, ('host "all" +mcp_logins all reject',), (), "::1"),
        (EVERYBODY, ('host all +mcp_logins "all" reject',), (), "::1"),
        (EVERYBODY, ('host all \\', '"+mcp_logins" all reject # +mcp_logins'), (), "::1"),
        ("local all all trust", ('local all "+mcp_logins" scram-sha-256',), (), "socket"),
    ],
)  # fmt: skip
def test_a_file_that_lets_the_logins_in_from_elsewhere_is_told(
    cluster: Cluster, line: str, before: tuple[str, ...], behind: tuple[str, ...], place: str | None
) -> None:
    """`place`: from where one does come in, where that can be shown here."""
    said = told(cluster, *before, line, *behind)
    assert said is not None
    assert "lets the login roles of mcpctl in from elsewhere" in said
    assert f"line {len(OWN.splitlines()) + len(before) + 1}: {line.split()[0]} " in said
    assert place is None or place in enters(cluster)


@pytest.mark.parametrize("method", ["cert", "scram-sha-256 clientcert=verify-full"])
def test_who_must_show_a_certificate_of_the_role_may_come_from_anywhere(
    cluster: Cluster, tmp_path: Path, method: str
) -> None:
    if cluster.binaries.bundled:
        pytest.skip("the bundled servers are built without TLS")
    authority = trustme.CA()
    signed_by = cluster.folder / "data" / "ca.pem"
    authority.cert_pem.write_to_path(signed_by)
    signed_by.chmod(0o644)
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET ssl_ca_file = 'ca.pem'")
    assert told(cluster, f"hostssl all +mcp_logins all {method}", *SOCKET, EVERYBODY) is None
    assert enters(cluster) == {"socket"}
    there = {"host": "::1", "port": cluster.port, "user": "mcp_alice_w", "password": KNOWN, "sslmode": "require"}
    for name, comes_in in (("mcp_alice_w", True), ("mcp_bob_w", False)):
        issued = authority.issue_cert("client.invalid", common_name=name)
        issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / name)
        (tmp_path / name).chmod(0o600)
        own = {"sslcert": str(tmp_path / name), "sslkey": str(tmp_path / name), "dbname": "postgres"}
        if comes_in:
            psycopg.connect(**there, **own).close()  # type: ignore[arg-type]
            continue
        with pytest.raises(psycopg.OperationalError, match="authentication failed"):
            psycopg.connect(**there, **own)  # type: ignore[arg-type]


def test_what_to_write_instead_is_told(cluster: Cluster) -> None:
    put(cluster, "host all +mcp_logins 10.0.0.0/8 scram-sha-256")
    found = seen(cluster)
    assert found is not None
    assert "host all +mcp_logins 10.0.0.0 255.0.0.0 scram-sha-256" in found.message
    assert found.hint is not None
    assert "a single address" in found.hint
    assert found.exit_code == 5


def test_a_group_that_an_included_list_names_in_quotes_is_no_wall(cluster: Cluster) -> None:
    names = cluster.folder / "data" / "names"
    names.write_text('"+mcp_logins"\n')
    names.chmod(0o644)
    assert told(cluster, "host all @names all reject", EVERYBODY) is not None
    assert "::1" in enters(cluster)


def test_a_rule_in_an_included_file_counts_at_its_place(cluster: Cluster) -> None:
    more = cluster.folder / "data" / "open.conf"
    more.write_text("\n" * 10 + EVERYBODY + "\n")
    more.chmod(0o644)
    said = told(cluster, "include open.conf", *SOCKET)
    assert said is not None
    if cluster.version[0] < 16:
        assert "does not take pg_hba.conf as it stands: line 3" in said
        return
    assert "open.conf line 11" in said
    assert told(cluster, *SOCKET, "include open.conf") is None
    assert enters(cluster) == {"socket"}
    more.write_text('host all "+mcp_logins" all reject\nhost all all all scram-sha-256\n')
    assert told(cluster, "include open.conf") is not None
    more.write_text("host all +mcp_logins all reject\nhost all all all scram-sha-256\n")
    assert told(cluster, "include open.conf") is None
    assert enters(cluster) == set()
    later = more.stat().st_mtime + 60
    os.utime(more, (later, later))
    found = seen(cluster)
    assert found is not None
    assert "has been changed since" in found.message


def test_a_file_that_was_not_read_yet_counts_for_nothing(cluster: Cluster) -> None:
    file = put(cluster, *SOCKET, EVERYBODY)
    assert seen(cluster) is None
    before = file.stat().st_mtime
    os.utime(file, (before, before + 60))  # PostgreSQL tells whole seconds
    found = seen(cluster)
    os.utime(file, (before, before))
    assert found is not None
    assert "has been changed since PostgreSQL has read it" in found.message
    assert found.hint is not None
    assert "pg_reload_conf" in found.hint


def test_a_file_that_postgresql_does_not_take_counts_for_nothing(cluster: Cluster) -> None:
    """It goes by the last one that it has taken, and says that it has loaded its files."""
    put(cluster, EVERYBODY)
    said = told(cluster, *SOCKET, "host all all nonsense")
    assert said is not None
    assert "does not take pg_hba.conf as it stands: line 5: " in said
    assert "::1" in enters(cluster)


def test_who_may_not_read_the_file_is_told_what_nobody_saw(cluster: Cluster) -> None:
    put(cluster, "local all onlooker scram-sha-256", 'host all "+mcp_logins" all reject', EVERYBODY)
    heard: list[str | None] = []
    with psycopg.connect(cluster.dsn_for("onlooker", KNOWN, "postgres"), autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        assert administrator.keeps_logins_here(connection, "shop") is None
        assert connection.execute("SHOW search_path").fetchone() == ('"$user", public',)
    assert len(heard) == 1
    assert "nobody saw whether +mcp_logins stands in quotes" in str(heard[0])
    put(cluster, "local all onlooker scram-sha-256", EVERYBODY)
    with psycopg.connect(cluster.dsn_for("onlooker", KNOWN, "postgres"), autocommit=True) as connection:
        found = administrator.keeps_logins_here(connection, "shop")
    assert found is not None
    assert "in from elsewhere" in found.message
