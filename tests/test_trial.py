"""A login that is tried: what it could become counts; and the administrator's password is told to nobody in clear."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pg
from hostile import Hostile, hostile
from mcpctl.config_keys import Database
from mcpctl.errors import ConfigError, Error, ForbiddenError
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator, privileges, trial
from mcpctl.postgres import login as login_
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.embedded import Cluster
from mcpctl.postgres.login import Login, same_database
from mcpctl.postgres.logins import Logins
from site_of_mcpctl import Shop

NO_KEYS = Keyring(Path("/nonexistent/secret.key"))


@pytest.mark.parametrize("group", ["postgres", "pg_read_server_files", "pg_execute_server_program"])
def test_a_member_of_a_role_with_too_much_power_has_it_too(shop: Shop, group: str, tmp_path: Path) -> None:
    with shop.admin() as admin:
        admin.execute(f"CREATE ROLE sneaky LOGIN PASSWORD 'its own' IN ROLE {group}".encode())
    try:
        dsn = shop.cluster.dsn_for("sneaky", "its own", "postgres")
        with shop.admin() as admin:
            admin.execute("GRANT CONNECT ON DATABASE postgres TO sneaky")
        login = Login("shop", Database(dsn=dsn), NO_KEYS)
        about = trial.log_in(login)
        assert about.privileged
        with pytest.raises(Error, match="can become a superuser"):
            about.check(login)
        with pytest.raises(ForbiddenError):
            privileges.connect(login)
    finally:
        with shop.admin() as admin:
            admin.execute("REVOKE CONNECT ON DATABASE postgres FROM sneaky")
            admin.execute("DROP ROLE sneaky")


def test_of_a_certificate_that_nobody_knows_it_is_said_what_names_its_ca(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("SSL error: certificate verify failed")

    monkeypatch.setattr(psycopg, "connect", refused)
    with pytest.raises(Error, match="certificate verify failed") as found:
        trial.answers(Login("shop", Database(host="/nowhere"), NO_KEYS))
    assert "--db-sslrootcert" in str(found.value.hint)


@pytest.fixture
def fake() -> Iterator[Hostile]:
    """A server that speaks no TLS and asks for the password in clear."""
    with hostile() as found:
        yield found


def test_the_administrators_password_is_not_told_in_clear_to_whoever_answers(fake: Hostile) -> None:
    login = Login("shop", Database(host="127.0.0.1", port=fake.port), NO_KEYS)
    who = Administrator(login, f"postgresql://postgres:CANARY@127.0.0.1:{fake.port}/")
    with pytest.raises(Error, match="cannot reach"):
        who.connect()
    assert fake.connections
    assert b"CANARY" not in fake.heard


def test_no_login_tells_its_password_in_clear_unless_the_config_lets_it(fake: Hostile, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.touch(0o600)
    secret.write_text("CANARY")
    for more, told in (("", False), (" require_auth=password", True)):
        dsn = f"host=127.0.0.1 port={fake.port} dbname=shop user=reader{more}"
        with pytest.raises(Error):
            trial.log_in(Login("shop", Database(dsn=dsn, password_file=secret), NO_KEYS))
        assert (b"CANARY" in fake.heard) is told
    assert fake.connections == 2


def test_who_shows_a_certificate_may_ask_for_the_password_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PostgreSQL does for LDAP and PAM. An older libpq cannot be told how the server may ask."""

    def required(dsn: str) -> object:
        return conninfo_to_dict(Login("shop", Database(dsn=dsn), NO_KEYS).dsn()).get("require_auth")

    assert required("host=db.example.org") is None
    assert required("host=db.example.org sslmode=require") == "!password"
    assert required("host=localhost sslmode=verify-full sslrootcert=ca.pem") is None
    assert required("host=/run/postgresql sslmode=verify-full sslrootcert=ca.pem") == "!password"
    monkeypatch.setattr(login_, "KNOWS_REQUIRE_AUTH", False)
    assert required("host=localhost") is None


def test_in_a_database_without_an_encoding_text_is_text_too(newest_shop: Shop) -> None:
    with newest_shop.admin() as admin:
        admin.execute("CREATE DATABASE plain TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        dsn = newest_shop.cluster.dsn_for("postgres", newest_shop.cluster.superuser_password, "plain")
        connection = administrator.connect_as(Login("plain", Database(dsn=dsn), NO_KEYS))
        assert connection is not None
        with connection:
            assert connection.execute("SELECT 'lo_create(oid)'::text").fetchone() == ("lo_create(oid)",)
    finally:
        with newest_shop.admin() as admin:
            admin.execute("DROP DATABASE plain WITH (FORCE)")


def test_libpq_is_shown_the_cas_of_this_machine_unless_somebody_has_said_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An OpenSSL that came in a wheel knows of none."""
    places = ssl.get_default_verify_paths()
    here = places._replace(cafile=None, capath=str(tmp_path))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: here)

    def shown(dsn: str, **said: str) -> tuple[str | None, str | None]:
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            monkeypatch.setenv(name, said.get(name, ""))
            if name not in said:
                monkeypatch.delenv(name)
        Login("shop", Database(dsn=dsn), NO_KEYS).dsn()
        return os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")

    assert shown("host=db.example.org") == (None, str(tmp_path))
    assert shown("host=db.example.org", SSL_CERT_DIR="/mine") == (None, "/mine")
    assert shown("host=db.example.org sslmode=verify-full sslrootcert=/ca.pem") == (None, None)
    assert shown("host=localhost") == (None, None)


def test_the_systems_cas_are_found_though_the_openssl_of_libpqs_wheel_looks_elsewhere(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = next((found for found in pg.supported() if not found.bundled), None)
    if binaries is None:
        pytest.skip("the PostgreSQL of the wheel is built without TLS, and the system has none")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    paths = ssl.get_default_verify_paths()._replace(cafile=str(certificates / "ca.pem"), capath=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    pair = (certificates / "cert.pem", certificates / "key.pem")
    with Cluster.start(binaries, tcp=True, ssl=pair) as cluster:
        dsn = make_conninfo(cluster.dsn, host="localhost", sslmode="verify-full", sslrootcert="system")
        assert trial.log_in(Login("shop", Database(dsn=dsn), NO_KEYS)).privileged


ELSEWHERE = [
    "host=127.0.0.1 hostaddr=192.0.2.2",
    "host=192.0.2.2 hostaddr=127.0.0.1",
    "hostaddr=127.0.0.1,192.0.2.2",
    "host=localhost,db.example.org",
    "host=/run/postgresql,db.example.org",
]


@pytest.mark.parametrize("way", [*ELSEWHERE, "PGHOSTADDR", "PGHOST", "PGSERVICE"])
def test_any_host_or_address_that_is_another_machine_makes_it_one(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = way if "=" in way else "host=127.0.0.1" if way != "PGHOST" else "hostaddr=127.0.0.1"
    if way == "PGSERVICE":
        (tmp_path / "services").write_text("[there]\nhostaddr=192.0.2.2\n")
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    if way.startswith("PG"):
        monkeypatch.setenv(way, "there" if way == "PGSERVICE" else "192.0.2.2")
    assert conninfo_to_dict(Login("shop", Database(dsn=dsn), NO_KEYS).dsn())["sslmode"] == "verify-full"
    who = Administrator(Login("shop", Database(host="127.0.0.1"), NO_KEYS), f"{dsn} user=postgres password=CANARY")
    assert conninfo_to_dict(who._conninfo(None))["sslmode"] == "verify-full"
    with pytest.raises(ConfigError, match=r"databases\.shop\.dsn: sslmode disable may send"):
        Login("shop", Database(dsn=f"{dsn} sslmode=disable"), NO_KEYS).dsn()
    plain = Administrator(
        Login("shop", Database(host="127.0.0.1", sslmode="disable"), NO_KEYS), f"{who.dsn} sslmode=disable"
    )
    with pytest.raises(ConfigError, match=r"sslmode disable may send"):
        plain._conninfo(None)


def test_the_administrators_line_is_held_to_the_rules_of_the_config(tmp_path: Path) -> None:
    login = Login("shop", Database(host="db.example.org"), NO_KEYS)
    with pytest.raises(ConfigError, match=r"admin\.dsn, for shop: sslmode prefer"):
        Administrator(login, "host=db.example.org user=postgres sslmode=prefer")._conninfo(None)
    file = tmp_path / administrator.FILE
    file.touch(0o600)
    file.write_text("# one line of comment\nhost=a user=postgres service=elsewhere\n")
    with pytest.raises(ConfigError, match=r"admin.dsn:2: not taken: service"):
        administrator.lines(file)


SAME = [
    ("host=/run/postgresql", "host=127.0.0.1"),
    ("host=/run/postgresql/", "host=/run/postgresql"),
    ("host=LOCALHOST", "host=localhost."),
    ("host=127.1", "host=::1"),
    ("host=127.0.0.2", "host=::ffff:127.0.0.1 port=5432"),
    ("host=db.example.org hostaddr=192.0.2.1", "host=192.0.2.1"),
    ("host=a,b port=5432,5433", "host=c,B. port=5432,5433"),
]
OTHER = [
    ("host=/run/postgresql", "host=/tmp"),
    ("host=a", "host=a port=5433"),
    ("host=a,b port=5432,5433", "host=a,b port=5433,5432"),
    ("host=a hostaddr=192.0.2.1", "host=a hostaddr=192.0.2.2"),
    ("host=/run/postgresql", "host=192.0.2.1"),
]


def test_names_of_one_database_are_known_for_what_they_are() -> None:
    for pairs, wanted in ((SAME, True), (OTHER, False)):
        for pair in pairs:
            one, other = (Login("shop", Database(dsn=f"{dsn} dbname=shop user=u"), NO_KEYS) for dsn in pair)
            assert same_database(one, other) is same_database(other, one) is wanted, pair
    one, other = (Login("shop", Database(dsn=f"host=a dbname={name}"), NO_KEYS) for name in ("shop", "other"))
    assert not same_database(one, other)


@pytest.mark.parametrize("service", ["dbname=shop", "host=b dbname=shop", "host=a port=5433 dbname=shop", "host=a"])
def test_a_service_login_that_leads_elsewhere_is_a_fault(service: str) -> None:
    """Whoever has a token for a service in the one would be answered from the other."""
    settings = Database(host="a", dbname="shop", roles="per_user", service_dsn=f"{service} user=reports")
    with pytest.raises(ConfigError, match=r"databases\.d\.service_dsn leads to another database"):
        Logins({"d": settings}, NO_KEYS)
    Logins({"d": replace(settings, service_dsn="host=A. port=5432 dbname=shop user=reports")}, NO_KEYS)


def test_a_ca_that_is_not_there_is_named_and_not_what_libpq_advises() -> None:
    lost = 'connection failed: root certificate file "/etc/ca.pem" does not exist'
    advice = "Either provide the file, use the system's trusted roots with sslrootcert=system, or change sslmode"
    assert trial.reason(psycopg.OperationalError(f"{lost}\n{advice} to disable it.\n")) == lost
    assert trial.hint_of(lost, "else").startswith("sslrootcert names the CA")
    assert trial.hint_of("Connection refused", "else") == "else"
