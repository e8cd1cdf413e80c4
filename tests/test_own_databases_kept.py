"""Databases that users bring, as they are kept: the keys, the store, the address, and a server there that hangs."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

import pg
import site_of_mcpctl as site
from brought import (
    ON,
    MakeSite,
    do,
    dsn,
    everything_written,
    refused,
    register,
    users_of,
)
from hostile import silent
from mcpctl import config, keyring, private_file
from mcpctl.errors import UnavailableError
from mcpctl.identity import users
from mcpctl.identity.own_databases import OwnDatabase, OwnDatabases
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.postgres import own_login
from mcpctl.postgres.own import FAILURES, Own
from mcpctl.postgres.own_login import Wanted
from mcpctl.state import State
from site_of_mcpctl import PASSWORD, READER, Client, Shop, Site, eventually

LATER = "2100-01-01T00:00:00Z"
"""When a row was made that is whoever's there is."""


@pytest.fixture(scope="module")
def newest_shop() -> Iterator[Shop]:
    with site.shop(pg.oldest_and_newest()[-1], tcp=True) as found:
        yield found


@pytest.fixture
def shop(newest_shop: Shop) -> Shop:
    return newest_shop


@pytest.fixture
def at(make_site: MakeSite, shop: Shop) -> Site:
    return users_of(make_site(shop, extra=ON, tcp=True)).start()


@pytest.fixture
def carol(at: Site) -> Iterator[Client]:
    with at.client(at.token("carol")[1]) as found:
        yield found


# -- the keys and the file --------------------------------------------------------------------------------------------


def test_a_rotation_of_the_keys_seals_it_anew_while_it_is_asked(at: Site, shop: Shop, carol: Client) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    before = (at.folder / "secret.key").read_text()
    assert "1 password sealed again" in at.run("key", "rotate").stdout
    assert (at.folder / "secret.key").read_text() != before
    with at.client(at.token("carol")[1]) as fresh:  # a pool of its own, which opens the password
        assert fresh.rows("select 1", database="lab") == [[1]]
    at.stop()
    at.start()
    with at.client(at.token("carol")[1]) as again:
        assert again.rows("select 1", database="lab") == [[1]]


@pytest.mark.parametrize(
    "column", ["user = 'dave'", "host = 'evil.example.org'", "hostaddr = '127.0.0.2'", "login = 'x'"]
)
def test_a_row_that_was_changed_by_hand_does_not_open(make_site: MakeSite, newest_shop: Shop, column: str) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    with sqlite3.connect(at.folder / "state.db") as connection:
        connection.execute(f"UPDATE own_databases SET {column}")
    connection.close()
    done = at.run("serve", "--port", "0", check=False)
    assert done.returncode == 3
    assert "sealed for another entry" in done.stderr


def test_the_server_starts_with_no_other_key_than_it_was_sealed_with(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    (at.folder / "secret.key").write_text(keyring.new_key() + "\n")
    done = at.run("serve", "--port", "0", check=False)
    assert done.returncode == 3
    assert "carol's own database lab cannot be opened" in done.stderr
    assert "mcpctl database unregister carol lab" in done.stderr


def test_a_key_file_that_is_broken_has_a_hint_of_its_own(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    file = at.folder / "secret.key"
    text = file.read_text()
    for mode, content in ((0o644, text), (0o600, "junk")):
        file.write_text(content)
        file.chmod(mode)
        done = at.run("config", "check", check=False)
        assert (done.returncode, "keyring.file: " in done.stderr) == (3, True), done.stderr
        assert "unregister" not in done.stderr
        assert "state_file" not in done.stderr
    file.unlink()
    done = at.run("config", "check", check=False)
    assert (done.returncode, "there is no key file" in done.stderr, "unregister" in done.stderr) == (3, True, False)


def test_nothing_is_sealed_with_another_key_than_what_is_there(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True)).start()
    register(at, newest_shop)
    file = at.folder / "secret.key"
    right = file.read_text()
    file.write_text(keyring.new_key() + "\n")
    with at.client(at.token("carol")[1]) as carol:
        assert "cannot be used right now" in refused(carol, "register_database", name="b", dsn=dsn(newest_shop))
    words = ("database", "register", "carol", "b", "--dsn", dsn(newest_shop, None), "--password-file", "-")
    done = at.run(*words, input=PASSWORD + "\n", check=False)
    told = f"{file} holds another key than the password of carol's own"
    assert (done.returncode, told in done.stderr) == (3, True)
    more = ("database", "add", "more", "--host", "127.0.0.1", "--user", "u", "--password-file", "-", "--no-test")
    done = at.run(*more, input=PASSWORD + "\n", check=False)
    assert (done.returncode, told in done.stderr, (at.folder / "more.password").exists()) == (3, True, False)
    file.write_text(right)
    register(at, newest_shop, name="b")


def test_a_name_of_the_config_counts_as_a_try_that_failed(at: Site, shop: Shop, carol: Client) -> None:
    for _ in range(FAILURES):
        assert "there is a database 'shop' already" in refused(carol, "register_database", name="shop", dsn="junk")
    for name in ("shop", "free"):
        assert "have failed within 15 minutes" in refused(carol, "register_database", name=name, dsn="junk")


def test_a_host_that_the_config_no_longer_names_is_not_connected_to(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    at.config.write_text(at.config.read_text().replace("[127.0.0.1]", "[10.0.0.0/8]"))
    told = "carol's own database lab at 127.0.0.1 (127.0.0.1) cannot be asked"
    assert told in at.run("doctor", check=False).stdout
    at.start()
    with at.client(at.token("carol")[1]) as carol:
        assert "no longer one of the hosts" in carol.error("select 1", database="lab")
        (row,) = do(carol, "list_my_databases")["databases"]
        assert row["note"].startswith("closed: its host is no longer")
        do(carol, "remove_database", name="lab")


def test_what_an_earlier_user_of_that_name_has_brought_is_not_a_later_one_s(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    """Such as in a state.db that was restored from a backup."""
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    at.start()
    with at.client(at.token("carol")[1]) as carol:
        assert carol.rows("select 1", database="lab") == [[1]]
    file = users.user_file(at.folder / "users.yaml")
    with file.edit() as people:
        people["carol"] = replace(people["carol"], created_at=datetime.now(UTC))
    with at.client(at.token("carol")[1]) as carol:
        eventually(lambda: not newest_shop.backends("application_name LIKE 'mcpctl%'"))
        assert "there is no database 'lab' for you" in carol.error("select 1", database="lab")
        assert do(carol, "list_my_databases")["databases"] == []
        assert "lab" not in do(carol, "whoami")["databases"]
        assert "you have no database 'lab'" in refused(carol, "remove_database", name="lab")
        told = "carol's own database lab is an earlier user's of that name"
        assert told in at.run("doctor", check=False).stdout
        assert "own:lab" not in at.run("can", "carol", check=False).stdout
        assert at.run("config", "check").returncode == 0
        do(carol, "register_database", name="lab", dsn=dsn(newest_shop))  # in its place
        assert carol.rows("select 1", database="lab") == [[1]]
    assert told not in at.run("doctor", check=False).stdout
    with file.edit() as people:
        people["carol"] = replace(people["carol"], created_at=datetime.now(UTC))
    assert at.run("database", "unregister", "carol", "lab").returncode == 0
    assert told not in at.run("doctor", check=False).stdout


def test_a_database_is_not_added_under_a_name_that_a_user_has(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    before = everything_written(at)
    done = at.run("database", "add", "lab", "--host", "/nonexistent", "--no-test", check=False)
    assert done.returncode == 5
    assert "carol has a database lab of their own" in done.stderr
    assert "mcpctl database unregister carol lab" in done.stderr
    assert everything_written(at) == before


def test_a_name_that_has_come_to_mean_two_databases_is_answered_from_neither(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)
    text = at.config.read_text()
    shop = text[text.index("  shop:") : text.index("own_databases")]
    at.config.write_text(text.replace(shop, shop + shop.replace("  shop:", "  lab:") + "    default: true\n"))
    told = "carol has a database lab of their own, and can ask neither"
    assert told in at.run("doctor", check=False).stdout
    for user, name, code in (("carol", "lab", 1), ("carol", "own:lab", 1), ("dave", "lab", 0), ("dave", "own:lab", 1)):
        done = at.run("can", user, "select", "public.orders", "--database", name, check=False)
        assert done.returncode == code, (user, name, done.stdout)
    at.start()
    with at.client(at.token("carol")[1]) as carol, at.client(at.token("dave")[1]) as dave:
        text = carol.error("select 1", database="lab")
        assert "'lab' is a database of your own, and by now also one of the administrator's" in text
        assert [one["name"] for one in do(carol, "list_databases")["databases"]] == ["shop"]
        assert "hidden" in do(carol, "list_my_databases")["databases"][0]["note"]
        assert carol.rows("select 1", database="shop") == [[1]]
        assert dave.rows("select 1", database="lab") == [[1]]
        do(carol, "remove_database", name="lab")
        assert carol.rows("select 1", database="lab") == [[1]]
    assert told not in at.run("doctor", check=False).stdout


def test_can_tells_of_it_and_asks_it_only_where_the_question_is_about_it(
    make_site: MakeSite, newest_shop: Shop
) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    register(at, newest_shop)

    def can(*words: str) -> tuple[int, str]:
        done = at.run(*words, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    place = f"{READER} at 127.0.0.1 (127.0.0.1) port {newest_shop.cluster.port}, database shop"
    listed = f"own:lab\tcarol's alone, only read, as {place}\tselect\n"
    for name in ("lab", "own:lab"):
        code, said = can("can", "carol", "select", "public.orders", "--database", name)
        assert (code, f"login role\tyes\t{place}" in said, "has_table_privilege" in said) == (0, True, True)
    code, said = can("can", "carol", "insert", "public.orders", "--database", "lab")
    assert (code, "own:lab is only read here" in said) == (1, True)
    code, said = can("can", "dave", "select", "public.orders", "--database", "own:lab")
    assert (code, "dave has none of that name" in said) == (1, True)
    assert can("who-can", "select", "public.orders", "--database", "own:lab") == (0, f"carol\t{place}\n")
    for name in ("nothing", "own:shop"):
        assert can("can", "carol", "select", "public.orders", "--database", name)[0] == 4
    with sqlite3.connect(at.folder / "state.db") as connection:  # whoever connects finds nobody there
        connection.execute("UPDATE own_databases SET port = 1")
    connection.close()
    assert listed.replace(str(newest_shop.cluster.port), "1") in can("can", "carol")[1]
    assert "own:" not in can("can", "dave")[1]
    assert "own:" not in can("can", "carol", "--token", at.token("carol", databases=("shop",))[0])[1]
    assert can("can", "carol", "select", "public.orders")[0] == 0


def test_a_store_that_breaks_while_the_server_runs_refuses_what_was_brought_and_nothing_else(
    at: Site, shop: Shop, carol: Client
) -> None:
    do(carol, "register_database", name="lab", dsn=dsn(shop))
    (at.folder / "state.db").chmod(0o644)
    (at.folder / "state.db").rename(at.folder / "kept")
    (at.folder / "state.db").write_text("no store")
    assert carol.rows("select 1", database="shop") == [[1]]
    text = carol.error("select 1", database="lab")
    assert "state.db" not in text
    (at.folder / "state.db").unlink()
    (at.folder / "kept").rename(at.folder / "state.db")
    (at.folder / "state.db").chmod(0o600)
    assert carol.rows("select 1", database="lab") == [[1]]


def test_what_users_bring_takes_half_of_the_connections_at_most(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON + "limits: {connections: 8}\n", tcp=True)).start()
    with at.client(at.token("carol")[1]) as carol:
        for name in ("a", "b", "c"):
            do(carol, "register_database", name=name, dsn=dsn(newest_shop))
    clients = [at.client(at.token("carol")[1]) for _ in range(6)]
    for client, name in zip(clients, "abcabc", strict=True):
        assert client.rows("select 1", database=name) == [[1]]
    brought = newest_shop.backends("application_name LIKE 'mcpctl%'")
    assert len(brought) <= 4
    with at.client(at.token("alice")[1]) as alice:
        assert alice.rows("select 1") == [[1]]
    for client in clients:
        client.http.close()


def test_a_server_that_lets_in_and_then_says_nothing_holds_nobody_up(
    make_site: MakeSite, newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_login, "LOOK", 0.3)
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    found = config.load(at.config, at.limits)
    with silent(newest_shop.cluster.port) as server:
        own = Own(found, Keyring(found.keyring.file), None)
        wanted = Wanted("127.0.0.1", server.port, "shop", READER)
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="no login was possible there in time"):
            asyncio.run(own.register("carol", "lab", wanted, PASSWORD))
        assert time.monotonic() - begun < 5
        assert own.of("carol") == []
        assert server.let_in == 1
        # one that turns silent later: it was registered while it answered
        hangs = OwnDatabase("carol", "lab", "127.0.0.1", "127.0.0.1", server.port, "shop", READER, "", LATER)
        own._rows.add(hangs, PASSWORD, 3)
        own.close()
        at.start()
        with at.client(at.token("carol")[1]) as carol, at.client(at.token("dave")[1]) as dave:
            hanging = site.in_background(lambda: carol.error("select 1", database="lab"))
            eventually(lambda: server.let_in >= 2)
            do(dave, "register_database", name="lab", dsn=dsn(newest_shop))
            assert dave.rows("select 1", database="lab") == [[1]]
            text = hanging.result(25)
            assert "database 'lab' cannot be reached" in text
            assert dave.rows("select 1", database="lab") == [[1]]


def test_a_host_is_resolved_once_and_only_that_address_is_connected_to(make_site: MakeSite, newest_shop: Shop) -> None:
    """A second answer of the DNS would lead elsewhere; the name itself means nothing here."""
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    answers = [["169.254.169.254", "127.0.0.1"], ["127.0.0.2"]]

    async def resolver(host: str, port: int) -> list[str]:
        return answers.pop(0)

    found = config.load(at.config, at.limits)
    own = Own(found, Keyring(found.keyring.file), None, resolver)
    wanted = Wanted("lab.invalid", newest_shop.cluster.port, "shop", READER)
    row = asyncio.run(own.register("carol", "lab", wanted, PASSWORD))
    own.close()
    assert (row.host, row.hostaddr) == ("lab.invalid", "127.0.0.1")
    assert len(answers) == 1
    at.start()
    with at.client(at.token("carol")[1]) as carol:
        assert carol.rows("select host(inet_server_addr())", database="lab") == [["127.0.0.1"]]


def test_nothing_is_sealed_while_a_rotation_looks_for_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a key could be dropped that something was sealed with a moment before."""
    monkeypatch.setattr("mcpctl.state._PATIENCE", 0.05)
    private_file.create(tmp_path / "secret.key", keyring.new_key().encode() + b"\n")
    ring = Keyring(tmp_path / "secret.key")
    people = users.user_file(tmp_path / "users.yaml")
    private_file.create(people.path, people.render({"carol": User("carol", datetime.now(UTC))}))
    rotating, registering = (OwnDatabases(State(tmp_path / "state.db"), ring, people) for _ in range(2))
    row = OwnDatabase("carol", "lab", "h", "10.0.0.1", 5432, "d", "u", "", LATER)
    with rotating.held(), pytest.raises(UnavailableError):
        registering.add(row, PASSWORD, 3)
    assert list(rotating.sealed()) == []
    kept = registering.add(row, PASSWORD, 3)
    assert [text for text, _ in rotating.sealed()] == [kept.sealed]
    assert rotating.password(kept) == PASSWORD
    assert PASSWORD not in repr(kept)
    assert kept.sealed not in repr(kept)
    for one in (rotating, registering):
        one._state.close()


def test_nobody_tries_passwords_from_here(at: Site, shop: Shop, carol: Client) -> None:
    for _ in range(FAILURES):
        assert "does not take that user" in refused(carol, "register_database", name="lab", dsn=dsn(shop, "guess"))
    assert "have failed within 15 minutes" in refused(carol, "register_database", name="lab", dsn=dsn(shop))
    register(at, shop)  # the administrator still can
    assert carol.rows("select 1", database="lab") == [[1]]


def test_a_user_s_end_does_not_wait_for_a_store_that_is_broken(make_site: MakeSite, newest_shop: Shop) -> None:
    at = users_of(make_site(newest_shop, extra=ON, tcp=True))
    (at.folder / "state.db").touch(0o600)
    (at.folder / "state.db").write_text("no store")
    done = at.run("user", "remove", "carol", "--yes")
    assert "what carol has brought is still stored" in done.stderr
    assert [line["user"] for line in at.audit() if line["event"] == "user.removed"] == ["carol"]
    checked = at.run("config", "check", check=False)
    assert checked.returncode == 3
    assert "server.state_file" in checked.stderr


def test_no_login_role_of_mcpctls_own_is_brought(make_site: MakeSite, newest_shop: Shop) -> None:
    """pg_hba.conf lets them in from here; one whose password its user has changed would outlive the user's token."""
    at = users_of(make_site(newest_shop, extra=ON, tcp=True)).start()
    with newest_shop.admin() as admin:
        admin.execute("CREATE ROLE mcp_logins; CREATE ROLE mcp_kim_w LOGIN PASSWORD 'hacked' IN ROLE mcp_logins")
        admin.execute("GRANT CONNECT ON DATABASE shop TO mcp_kim_w")
    try:
        with at.client(at.token("carol")[1]) as carol:
            cluster = newest_shop.cluster
            theirs = f"postgresql://mcp_kim_w:hacked@127.0.0.1:{cluster.port}/shop"
            said = refused(carol, "register_database", name="kims", dsn=theirs)
            assert "that login is one of mcpctl's own" in said
            assert do(carol, "list_my_databases")["databases"] == []
    finally:
        with newest_shop.admin() as admin:
            admin.execute("DROP OWNED BY mcp_kim_w; DROP ROLE mcp_kim_w, mcp_logins")


def test_what_names_no_table_is_not_logged_and_what_is_no_name_is_not_repeated(at: Site, carol: Client) -> None:
    sql = "alter role joe password CANARY"
    for wrong in ({"table": "postgresql://u:CANARY@h/d"}, {"schema": "host=h password=CANARY"}, {"table": sql}):
        assert "of that name" in refused(carol, "get_schema_info", **wrong)
    for wrong in ({"table": "CANARY"}, {"schema": "CANARY"}, {"table": "public.CANARY"}):  # a password may look so
        assert "CANARY" in refused(carol, "get_schema_info", **wrong)
    assert b"CANARY" not in (at.folder / "audit.jsonl").read_bytes()
