"""What a DSN may say, where it may lead, and that nothing of ours goes along."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import threading
from pathlib import Path

import pytest
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from hostile import hostile
from mcpctl.config_keys import Database, OwnDatabases
from mcpctl.errors import ConfigError, Error, ForbiddenError, UnavailableError, UsageError
from mcpctl.identity.own_databases import OwnDatabase
from mcpctl.keyring import Keyring
from mcpctl.lookups import LOOKUPS, Lookups
from mcpctl.postgres import own_login
from mcpctl.postgres.own_login import Hosts, OwnLogin, Wanted

SECRET = "the user's own secret"


def login(host: str = "db.example.org", hostaddr: str = "10.1.2.3", port: int = 5432, **rules: object) -> OwnLogin:
    row = OwnDatabase("carol", "lab", host, hostaddr, port, "sales", "reader", "", "2026-01-01T00:00:00Z")
    settings = OwnDatabases(**rules)  # type: ignore[arg-type]
    return OwnLogin(row.shown, Database(), Keyring(Path("none")), row.login, lambda: SECRET, row=row, rules=settings)


# -- the DSN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://reader@db.example.org:5433/sales",
        "postgres://reader@DB.Example.org.:5433/sales",
        "host=db.example.org port=5433 dbname=sales user=reader",
        "host = 'db.example.org' port='5433' dbname = 'sales' user = 'reader'",
    ],
)
def test_a_dsn_in_any_of_libpq_s_forms_is_read(dsn: str) -> None:
    assert own_login.parse(dsn) == Wanted("db.example.org", 5433, "sales", "reader")


def test_a_password_is_read_and_never_shown() -> None:
    found = own_login.parse("postgresql://reader:s%3Acret@[2001:DB8::1]/sales")
    assert found == Wanted("2001:db8::1", 5432, "sales", "reader", "s:cret")
    assert "cret" not in repr(found)


GOOD = "host=db.example.org dbname=sales user=reader password=hidden"


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "hidden",
        "postgresql://",
        "dbname=sales user=reader password=hidden",
        "host=db.example.org user=reader password=hidden",
        "host=db.example.org dbname=sales password=hidden",
        GOOD.replace("db.example.org", "/var/run/postgresql"),
        GOOD.replace("db.example.org", "@abstract"),
        GOOD.replace("db.example.org", "a.example.org,b.example.org"),
        GOOD.replace("db.example.org", "fe80::1%eth0"),
        GOOD.replace("db.example.org", "127.1"),
        GOOD.replace("db.example.org", "2130706433"),
        GOOD.replace("db.example.org", "0x7f000001"),
        GOOD.replace("db.example.org", "0177.0.0.1"),
        GOOD.replace("db.example.org", "-x"),
        GOOD.replace("db.example.org", "'db example'"),
        GOOD.replace("db.example.org", "dänemark.example"),
        GOOD + " port=0",
        GOOD + " port=65536",
        GOOD + " port=5432,5433",
        GOOD + " port=१२",
        GOOD.replace("sales", "s" * 64),
        GOOD + "\n",
        GOOD + "\0",
        GOOD + " " * 3000,
        "postgresql://reader:hidden@a.example.org:1,b.example.org:2/sales",
    ],
)
def test_a_dsn_that_says_anything_else_is_refused_without_being_shown(dsn: str) -> None:
    with pytest.raises(UsageError) as told:
        own_login.parse(dsn)
    assert "hidden" not in f"{told.value.message} {told.value.hint}"


@pytest.mark.parametrize(
    "keyword",
    sorted({option.keyword.decode() for option in pq.Conninfo.get_defaults()} - set(own_login._MAY_SAY)),
)
def test_every_other_keyword_that_libpq_knows_is_refused(keyword: str) -> None:
    with pytest.raises(UsageError, match=f"not {keyword}"):
        own_login.parse(f"{GOOD} {keyword}=1")


# -- where it may lead ------------------------------------------------------------------------------------------------

EVERYWHERE = ("0.0.0.0/0", "::/0", "db.example.org")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.1.1", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "100.100.100.200", "168.63.129.16", "::1", "::", "fe80::1", "ff02::1",
        "fd00:ec2::254",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2001:0:1::",
    ],
)  # fmt: skip
def test_what_is_this_machine_the_link_or_metadata_is_refused_unless_it_is_named_itself(address: str) -> None:
    found = ipaddress.ip_address(address)
    assert not Hosts(EVERYWHERE).allow("db.example.org", found)
    assert not Hosts(EVERYWHERE).allow(str(found), found)
    assert Hosts([str(own_login.plain(found))]).allow("db.example.org", found)


@pytest.mark.parametrize(
    ("named", "host", "address", "allowed"),
    [
        (["db.example.org"], "db.example.org", "93.184.216.34", True),
        (["db.example.org"], "db.example.org", "10.0.0.5", True),
        (["db.example.org"], "other.example.org", "10.0.0.5", False),
        (["db.example.org"], "x.db.example.org", "10.0.0.5", False),
        (["10.0.0.0/8"], "other.example.org", "10.0.0.5", True),
        (["10.0.0.0/8"], "other.example.org", "11.0.0.5", False),
        (["10.0.0.0/8"], "other.example.org", "::ffff:10.0.0.5", True),
        (["127.0.0.0/8"], "localhost", "127.0.0.1", True),
        (["127.0.0.0/8"], "localhost", "::1", False),
        (["localhost"], "localhost", "127.0.0.1", True),
        (["localhost"], "localhost", "::1", True),
        (["localhost"], "localhost", "169.254.169.254", False),
        (["localhost"], "127.0.0.1", "127.0.0.1", False),
        (["169.254.0.0/16"], "meta", "169.254.169.254", True),
        (["2001:db8::/32"], "six", "2001:db8::1", True),
        ([], "db.example.org", "10.0.0.5", False),
    ],
)
def test_only_what_the_config_names_is_let_in(named: list[str], host: str, address: str, allowed: bool) -> None:
    assert Hosts(named).allow(host, ipaddress.ip_address(address)) is allowed


def find(named: list[str], host: str, *answers: str) -> tuple[list[str], int]:
    """The addresses that would be tried, and how often the resolver was asked."""
    asked = 0

    async def resolver(host: str, port: int) -> list[str]:
        nonlocal asked
        asked += 1
        return list(answers)

    wanted = Wanted(host, 5432, "sales", "reader")
    return asyncio.run(own_login.addresses(wanted, Hosts(named), resolver)), asked


def test_of_a_host_s_addresses_the_first_good_one_of_each_family_is_tried() -> None:
    answers = ("169.254.169.254", "fe80::1%2", "10.0.0.1", "10.0.0.2", "2001:db8::1")
    assert find(["db.example.org"], "db.example.org", *answers) == (["10.0.0.1", "2001:db8::1"], 1)


def test_a_host_that_is_not_there_and_one_that_may_not_be_used_are_told_alike() -> None:
    told = []
    for answers in ((), ("192.168.0.1",)):
        with pytest.raises(ForbiddenError) as problem:
            find(["10.0.0.0/8"], "inner.example.org", *answers)
        told.append((problem.value.message, problem.value.hint))
    assert told[0] == told[1]


def test_where_names_alone_are_let_in_no_other_name_is_even_looked_up() -> None:
    async def never(host: str, port: int) -> list[str]:
        raise AssertionError(host)

    with pytest.raises(ForbiddenError):
        asyncio.run(own_login.addresses(Wanted("other", 5432, "d", "u"), Hosts(["db.example.org"]), never))


def test_the_system_s_resolver_is_asked() -> None:
    async def ask(host: str) -> list[str]:
        return await own_login.Resolver()(host, 5432)

    assert "127.0.0.1" in asyncio.run(ask("localhost"))
    assert asyncio.run(ask("no-such-host.invalid")) == []


def test_names_whose_servers_never_answer_hold_up_no_other_look_up() -> None:
    """The loop has five threads more than processors, in which the config's hosts are looked up."""
    answer = threading.Event()

    def hangs(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        answer.wait(30)
        raise OSError

    async def come() -> None:
        resolver = own_login.Resolver(Lookups(hangs))
        wanted, hosts = Wanted("db.example.org", 5432, "sales", "reader"), Hosts(["db.example.org"])
        users = [asyncio.create_task(own_login.addresses(wanted, hosts, resolver)) for _ in range(LOOKUPS)]
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        with pytest.raises(UnavailableError, match="too many"):
            await own_login.addresses(wanted, hosts, resolver)
        answer.set()
        found = await asyncio.gather(*users, return_exceptions=True)
        assert {type(one) for one in found} == {ForbiddenError}

    try:
        asyncio.run(come())
    finally:
        answer.set()


# -- what goes along --------------------------------------------------------------------------------------------------


def test_the_connection_string_holds_every_keyword_that_a_variable_could_set() -> None:
    values = conninfo_to_dict(login().dsn())
    by_variable = {option.keyword.decode() for option in pq.Conninfo.get_defaults() if option.envvar}
    assert by_variable - values.keys() == {"service"}
    expected = {
        "host": "db.example.org", "hostaddr": "10.1.2.3", "port": "5432", "dbname": "sales", "user": "reader",
        "password": SECRET, "require_auth": "scram-sha-256", "sslmode": "verify-full", "sslrootcert": "system",
        "sslcertmode": "disable", "sslcert": "", "options": "", "gssencmode": "disable",
    }  # fmt: skip
    assert expected.items() <= values.items()


@pytest.mark.parametrize(
    ("address", "rules", "mode", "root"),
    [
        ("127.0.0.1", {}, "prefer", ""),
        ("::1", {}, "prefer", ""),
        ("10.0.0.1", {"sslmode": "require"}, "require", ""),
        ("10.0.0.1", {"sslmode": "verify-ca", "sslrootcert": Path("ca.pem")}, "verify-ca", "ca.pem"),
        ("10.0.0.1", {"sslrootcert": Path("ca.pem")}, "verify-full", "ca.pem"),
    ],
)
def test_what_leaves_this_machine_is_encrypted(address: str, rules: dict[str, object], mode: str, root: str) -> None:
    values = conninfo_to_dict(login(hostaddr=address, **rules).dsn())
    assert (values["sslmode"], values["sslrootcert"]) == (mode, root)


def ours(tmp_path: Path, port: int) -> dict[str, str]:
    """An environment of the server's that is full of secrets and of settings."""
    password = tmp_path / "pgpass"
    password.touch(0o600)
    password.write_text(f"*:*:*:*:FROM-PGPASS\n127.0.0.1:{port}:sales:reader:FROM-PGPASS\n")
    (tmp_path / "client.pem").write_text("no certificate")
    return {
        "PGPASSWORD": "FROM-THE-ENVIRONMENT",
        "PGPASSFILE": str(password),
        "PGSSLCERT": str(tmp_path / "client.pem"),
        "PGSSLKEY": str(tmp_path / "client.pem"),
        "PGSSLMODE": "require",
        "PGSSLROOTCERT": str(tmp_path / "client.pem"),
        "PGOPTIONS": "-c search_path=from_the_environment",
        "PGAPPNAME": "FROM-THE-ENVIRONMENT",
        "PGCLIENTENCODING": "LATIN1",
        "PGREQUIREAUTH": "none",
        "PGHOST": "elsewhere.invalid",
        "PGHOSTADDR": "10.255.255.1",
        "PGUSER": "FROM-THE-ENVIRONMENT",
        "PGDATABASE": "FROM-THE-ENVIRONMENT",
        "PGTARGETSESSIONATTRS": "read-only",
        "PGCHANNELBINDING": "require",
        "PGGSSENCMODE": "prefer",
        "PGCONNECT_TIMEOUT": "1",
        "PGSSLNEGOTIATION": "direct",
        "PGLOADBALANCEHOSTS": "random",
        "PGMINPROTOCOLVERSION": "3.2",
        "HOME": str(tmp_path),
    }


def test_a_hostile_server_hears_what_the_user_said_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hostile() as server:
        for name, value in ours(tmp_path, server.port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UnavailableError, match="another way than SCRAM-SHA-256"):
            asyncio.run(own_login.check(login("localhost", "127.0.0.1", server.port)))
        expected = {"user": "reader", "database": "sales", "client_encoding": "UTF8", "application_name": "mcpctl"}
        assert server.startups == [expected]
        assert b"FROM-" not in server.heard
        assert b"from_the_environment" not in server.heard
        assert SECRET.encode() not in server.heard, "not the user's own password either: it was asked for in clear"


@pytest.mark.parametrize("name", own_login._SENT_ANYWAY)
def test_a_variable_that_libpq_cannot_be_told_to_leave_alone_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        own_login.check_environment({name: "x"})
    own_login.check_environment({"PATH": "x", "PGPASSWORD": "x"})


def test_libpq_does_send_a_password_of_the_environment_where_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see, if it were not prevented: the same server, asked with the four keywords alone."""
    import psycopg

    with hostile() as server:
        for name in ("PGPASSWORD", "PGOPTIONS"):
            monkeypatch.setenv(name, ours(tmp_path, server.port)[name])
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"host=127.0.0.1 port={server.port} dbname=sales user=reader sslmode=disable")
        assert b"FROM-THE-ENVIRONMENT" in server.heard
        assert b"from_the_environment" in server.heard


def test_the_words_of_whatever_answers_there_are_not_passed_on() -> None:
    for text in ("SSH-2.0-OpenSSH_9.2", "-ERR unknown command", "FATAL: etwas anderes"):
        told: Error = own_login._why(OSError(text))
        assert not re.search("SSH|ERR|etwas", f"{told.message} {told.hint}")
