"""set_pg_configuration and get_pg_configuration, on clusters of the tests' own of the oldest and the newest version."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

import pg
import settings_site
import site_of_mcpctl as site
from mcpctl.postgres import settings
from settings_site import LISTED, ask, change, fact, grant, last_call, refusal, relist, with_carol


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def own(request: pytest.FixtureRequest) -> Iterator[site.Shop]:
    yield from settings_site.own_cluster(request.param)


@pytest.fixture(scope="module")
def running(own: site.Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[site.Site]:
    """A running site; carol may change what is listed."""
    found = with_carol(lambda shop, **more: site.Site(tmp_path_factory.mktemp("own") / "site", shop, **more), own)
    grant(found)
    yield found.start()
    assert found.stop() in (0, -15)


@pytest.fixture
def here(running: site.Site) -> Iterator[site.Site]:
    """The same, and afterwards the settings as they were."""
    yield running
    settings_site.reset(running.shop)


@pytest.fixture
def carol(here: site.Site) -> Iterator[site.Client]:
    with here.client(here.token("carol")[1]) as client:
        yield client


def in_a_new_session(shop: site.Shop, name: str) -> str:
    found: str = fact(shop, "SELECT current_setting(%s)", name)
    return found


def auto_conf(shop: site.Shop) -> str:
    return str(fact(shop, "SELECT pg_read_file('postgresql.auto.conf')"))


def test_a_changed_setting_is_in_force_and_the_answer_and_the_log_say_what_it_was(
    here: site.Site, carol: site.Client
) -> None:
    done = change(carol, "work_mem", "64MB")
    assert (done["name"], done["old_value"], done["new_value"], done["unit"]) == ("work_mem", "4096", "65536", "kB")
    assert (done["in_force"], done["pending_restart"], done["source"]) == (True, False, "configuration file")
    assert "null" in done["undo"]
    assert "note" not in done
    assert "source_file" not in done
    assert in_a_new_session(here.shop, "work_mem") == "64MB"
    line = last_call(here)
    assert line["reason"] == "ALTER SYSTEM work_mem: 4096 kB → 64MB"
    assert (line["outcome"], line["tool"], line["role"]) == ("ok", "set_pg_configuration", settings_site.ROLE)


def test_what_undo_says_gives_the_value_back_that_was_set_before(here: site.Site, carol: site.Client) -> None:
    change(carol, "work_mem", "8MB")
    done = change(carol, "work_mem", "16MB")
    assert '"8192"' in done["undo"]
    assert change(carol, "work_mem", "8192")["new_value"] == "8192"
    assert in_a_new_session(here.shop, "work_mem") == "8MB"


@pytest.mark.parametrize("back", [None, "reset", " RESET "])
def test_null_and_the_word_reset_go_back(here: site.Site, carol: site.Client, back: str | None) -> None:
    change(carol, "work_mem", "64MB")
    done = change(carol, "work_mem", back)
    assert (done["old_value"], done["new_value"], done["in_force"]) == ("65536", "4096", True)
    assert "work_mem" not in auto_conf(here.shop)
    assert in_a_new_session(here.shop, "work_mem") == "4MB"
    assert last_call(here)["reason"] == "ALTER SYSTEM work_mem: 65536 kB → (reset)"


def test_a_value_is_not_left_out_by_mistake(here: site.Site, carol: site.Client) -> None:
    assert "needs the argument value" in refusal(carol, "set_pg_configuration", name="work_mem")


def test_a_name_is_taken_in_upper_case_too(here: site.Site, carol: site.Client) -> None:
    assert change(carol, "WORK_MEM", "5MB")["new_value"] == "5120"
    assert change(carol, "DateStyle", "SQL, DMY")["new_value"] == "SQL, DMY"


@pytest.mark.newest
@pytest.mark.parametrize(
    "value",
    [
        "it's",
        "'; ALTER SYSTEM SET fsync = off; --",
        'say "%m" ',
        r"back\slash \' %p",
        "$$x$$ E'y'",
        "é 漢 😀",
        "",
        "reset?",
    ],
)
def test_a_value_with_quotes_arrives_as_it_is(here: site.Site, carol: site.Client, value: str) -> None:
    assert change(carol, "log_line_prefix", value)["new_value"] == value
    assert in_a_new_session(here.shop, "log_line_prefix") == value
    assert not re.search("^fsync", auto_conf(here.shop), flags=re.MULTILINE)


def test_a_value_that_postgresql_does_not_take_changes_nothing(here: site.Site, carol: site.Client) -> None:
    change(carol, "work_mem", "8MB")
    before = auto_conf(here.shop)
    said = refusal(carol, "set_pg_configuration", name="work_mem", value="much")
    assert 'invalid value for parameter "work_mem": "much"' in said
    assert "SQLSTATE: 22023" in said
    assert last_call(here)["reason"] == "ALTER SYSTEM work_mem: 8192 kB → much: SQLSTATE 22023"
    assert "newline" in refusal(carol, "set_pg_configuration", name="log_line_prefix", value="a\nfsync = off")
    assert "outside the valid range" in refusal(carol, "set_pg_configuration", name="work_mem", value="1")
    assert "cannot be changed" in refusal(carol, "set_pg_configuration", name="block_size", value="4096")
    assert "NUL" in refusal(carol, "set_pg_configuration", name="log_line_prefix", value="a\0b")
    assert auto_conf(here.shop) == before


def test_a_very_long_value_is_taken_up_to_the_bound_and_no_further(here: site.Site, carol: site.Client) -> None:
    long = "x" * settings.LONGEST
    assert change(carol, "log_line_prefix", long)["new_value"] == long
    assert len(last_call(here)["reason"]) < 1200
    assert "too long" in refusal(carol, "set_pg_configuration", name="log_line_prefix", value=long + "x")
    assert in_a_new_session(here.shop, "log_line_prefix") == long
    assert "too long to be set here" in change(carol, "log_line_prefix", "short")["undo"]


def test_a_list_setting_takes_several_values(here: site.Site, carol: site.Client) -> None:
    assert change(carol, "log_destination", "stderr, csvlog")["new_value"] == "stderr, csvlog"
    assert "syslogg" in refusal(carol, "set_pg_configuration", name="log_destination", value="stderr, syslogg")
    assert change(carol, "datestyle", "German, YMD")["new_value"] == "German, YMD"


def test_a_list_of_names_is_several_names_and_not_one(own: site.Shop, here: site.Site, carol: site.Client) -> None:
    done = change(carol, "temp_tablespaces", 'pg_default, "Fast, and odd"')
    assert done["new_value"] == 'pg_default, "Fast, and odd"'
    with own.admin() as connection:
        assert connection.execute("SHOW temp_tablespaces").fetchone() == ('pg_default, "Fast, and odd"',)
    assert change(carol, "temp_tablespaces", "")["in_force"] is True


def test_a_setting_that_needs_a_restart_says_so(here: site.Site, carol: site.Client) -> None:
    old = in_a_new_session(here.shop, "max_connections")
    done = change(carol, "max_connections", "77")
    assert (done["old_value"], done["new_value"]) == (old, "77")
    assert (done["in_force"], done["pending_restart"]) == (False, True)
    assert "restarted" in done["note"]
    assert "restart" in done["undo"]
    shown = ask(carol, "get_pg_configuration", name="max_connections")["settings"][0]
    assert (shown["value"], shown["pending_restart"], shown["context"]) == (old, True, "postmaster")
    assert change(carol, "work_mem", "7MB")["in_force"] is True
    assert change(carol, "max_connections", None)["pending_restart"] is False


@pytest.mark.parametrize(
    "name", ["maintenance_work_mem", "no_such_setting", 'work_mem"; --', "", "archive_command", "all"]
)
def test_a_name_that_is_not_listed_goes_no_further_whether_there_is_such_a_setting_or_not(
    here: site.Site, carol: site.Client, name: str
) -> None:
    before = auto_conf(here.shop)
    assert "is not among the settings" in refusal(carol, "set_pg_configuration", name=name, value="1")
    assert last_call(here)["event"] == "tool.refused"
    assert "is not among the settings" in refusal(carol, "get_pg_configuration", name=name)
    assert auto_conf(here.shop) == before


@contextlib.contextmanager
def without(here: site.Site, right: str) -> Iterator[None]:
    """While carol's role lacks a right."""
    with here.shop.admin() as connection:
        connection.execute(f"REVOKE {right} FROM {settings_site.ROLE}".encode())
        yield
        connection.execute(f"GRANT {right} TO {settings_site.ROLE}".encode())


def test_postgresql_refuses_what_it_was_not_told_to_let_the_role_change(here: site.Site, carol: site.Client) -> None:
    with without(here, "ALTER SYSTEM ON PARAMETER work_mem"):
        assert "SQLSTATE: 42501" in refusal(carol, "set_pg_configuration", name="work_mem", value="8MB")
    assert "work_mem" not in auto_conf(here.shop)


def test_a_role_that_may_not_reload_changes_nothing(here: site.Site, carol: site.Client) -> None:
    with without(here, "EXECUTE ON FUNCTION pg_reload_conf()"):
        assert "nothing was changed" in refusal(carol, "set_pg_configuration", name="work_mem", value="8MB")
    assert "work_mem" not in auto_conf(here.shop)


def test_a_value_that_something_else_wins_over_is_not_said_to_be_in_force(here: site.Site, carol: site.Client) -> None:
    done = change(carol, "fsync", "on")  # the embedded server is started with -c fsync=off
    assert (done["in_force"], done["new_value"], done["source"]) == (False, "off", "command line")
    assert "command line" in done["note"]
    with here.shop.admin() as connection:
        connection.execute("ALTER DATABASE shop SET work_mem = '3MB'")
    try:
        done = change(carol, "work_mem", "9MB")
        assert (done["in_force"], done["new_value"], done["source"]) == (False, "3072", "database")
    finally:
        with here.shop.admin() as connection:
            connection.execute("ALTER DATABASE shop RESET work_mem")


def test_the_server_s_own_value_is_shown_and_not_that_of_mcpctl_s_connections(
    here: site.Site, carol: site.Client
) -> None:
    assert change(carol, "statement_timeout", "45s")["old_value"] == "0"
    shown = ask(carol, "get_pg_configuration", name="statement_timeout")["settings"][0]
    assert (shown["value"], shown["unit"], shown["source"]) == ("45000", "ms", "configuration file")


@pytest.mark.parametrize("name", ["statement_timeout", "idle_session_timeout"])
@pytest.mark.parametrize("before", [None, "50s"])
def test_a_value_with_which_no_new_login_works_is_put_back(
    here: site.Site, carol: site.Client, name: str, before: str | None
) -> None:
    old = change(carol, name, before)
    said = refusal(carol, "set_pg_configuration", name=name, value="20ms")
    assert "so the old one was put back" in said
    assert "127.0.0.1" not in said
    line = last_call(here)
    assert line["reason"].startswith(f"ALTER SYSTEM {name}: {old['new_value']} ms → 20ms: with this value no new login")
    assert line["outcome"] == "error"
    assert in_a_new_session(here.shop, name) == (before or "0")
    assert (name in auto_conf(here.shop)) == (before is not None)
    assert change(carol, name, "70s")["in_force"] is True
    assert last_call(here)["backend_pid"] != line["backend_pid"], "its connection had no timeouts"


def test_a_value_that_locks_out_is_put_back_where_the_database_has_another_one(
    here: site.Site, carol: site.Client
) -> None:
    with here.shop.admin() as connection:
        connection.execute("ALTER DATABASE shop SET statement_timeout = '30s'")
    try:
        assert "put back" in refusal(carol, "set_pg_configuration", name="statement_timeout", value=" 20 ms ")
        assert "statement_timeout" not in auto_conf(here.shop)
        done = change(carol, "statement_timeout", "45s")
        assert (done["in_force"], done["source"]) == (False, "database")
    finally:
        with here.shop.admin() as connection:
            connection.execute("ALTER DATABASE shop RESET statement_timeout")


@pytest.mark.parametrize("value", [r"back\slash \' -c x", "\\", "x" * settings.LONGEST])
def test_a_value_that_a_new_login_asks_for_arrives_as_it_is(here: site.Site, carol: site.Client, value: str) -> None:
    change(carol, "application_name", value)  # mcpctl's own connections have another
    assert in_a_new_session(here.shop, "application_name") == value[:63]


def test_somebody_else_s_change_waits_until_a_value_has_been_tried(here: site.Site, carol: site.Client) -> None:
    here.run("user", "add", "heidi", "--role", "mcp-admin")
    grant(here, user="heidi")
    wrong = {"name": "statement_timeout", "value": "90ms"}
    with here.client(here.token("heidi")[1]) as heidi:
        for size in ("5MB", "6MB", "7MB"):
            trial = site.in_background(lambda: refusal(carol, "set_pg_configuration", **wrong))
            site.eventually(lambda: "90ms" in auto_conf(here.shop))
            assert change(heidi, "work_mem", size)["in_force"] is True
            assert "put back" in trial.result()


def test_a_value_with_which_no_new_login_works_is_put_back_though_the_client_has_gone(
    here: site.Site, carol: site.Client
) -> None:
    change(carol, "statement_timeout", "50s")
    body = carol.http.build_request(
        "POST",
        here.url,
        json={
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "set_pg_configuration", "arguments": {"name": "statement_timeout", "value": "90ms"}},
        },
    )
    with here.shop.admin() as watching:
        watching.execute("SET statement_timeout = 0")
        gone = send(body)
        tried = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query ~ '^SELECT pg_catalog.pg_sleep'"
        site.eventually(lambda: watching.execute(tried).rowcount)
        gone.close()
    line = site.eventually(lambda: line if "90ms" in (line := last_call(here))["reason"] else None)
    assert "was put back" in line["reason"]
    assert in_a_new_session(here.shop, "statement_timeout") == "50s"


def send(request: httpx.Request) -> socket.socket:
    """Send a request, and read no answer."""
    connection = socket.create_connection((request.url.host, request.url.port))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


@pytest.mark.newest
def test_a_configuration_file_with_a_fault_is_told_of_instead_of_success(here: site.Site, carol: site.Client) -> None:
    file = here.shop.cluster.folder / "data" / "postgresql.conf"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole + b"\nwork_mem = = 'x\n")
        done = change(carol, "work_mem", "12MB")
        assert done["in_force"] is False
        assert "has not taken it yet" in done["note"]
        assert "work_mem = '12MB'" in auto_conf(here.shop)
    finally:
        file.write_bytes(whole)
    assert change(carol, "work_mem", "12MB")["in_force"] is True


def test_all_that_may_be_changed_is_listed_and_what_was_changed(here: site.Site, carol: site.Client) -> None:
    change(carol, "work_mem", "64MB")
    found = ask(carol, "get_pg_configuration")
    shown = {one["name"].lower(): one for one in found["settings"]}
    assert set(shown) | {"my.thing"} == set(LISTED)
    assert found["not_shown"] == ["my.thing"]
    assert shown["work_mem"] == {
        "name": "work_mem", "value": "65536", "unit": "kB", "context": "user", "source": "configuration file",
        "pending_restart": False, "boot_value": "4096",
    }  # fmt: skip
    changed = {one["name"]: one for one in found["changed"]}
    assert changed["work_mem"]["value"] == "65536"
    assert changed["fsync"]["source"] == "command line"
    assert "maintenance_work_mem" not in changed


def test_a_listed_setting_that_postgresql_does_not_show_is_not_said_to_be_in_force(
    here: site.Site, carol: site.Client
) -> None:
    assert "shows your login no setting 'my.thing'" in refusal(carol, "get_pg_configuration", name="my.thing")
    if here.shop.cluster.binaries.version < (16, 0):  # it takes no name that nothing has defined
        assert "SQLSTATE: 42704" in refusal(carol, "set_pg_configuration", name="my.thing", value="1")
        assert last_call(here)["reason"] == "ALTER SYSTEM my.thing: (not shown) → 1: SQLSTATE 42704"
        return
    done = change(carol, "my.thing", "1")
    assert (done["old_value"], done["new_value"], done["in_force"]) == (None, "1", False)
    assert "does not show" in done["note"]
    assert "my.thing = '1'" in auto_conf(here.shop)


def test_changes_at_the_same_time_are_all_in_force(here: site.Site) -> None:
    wanted = {"work_mem": "9MB", "log_line_prefix": "at once", "log_destination": "csvlog", "statement_timeout": "50s"}
    token = here.token("carol")[1]

    def one(name: str, value: str) -> Any:
        with here.client(token) as client:
            return change(client, name, value)

    running = [site.in_background(one, name, value) for name, value in wanted.items()]
    assert [each.result()["in_force"] for each in running] == [True] * len(wanted)
    assert {name: in_a_new_session(here.shop, name) for name in wanted} == wanted


def test_a_change_outlives_a_restart_and_what_waited_for_it_is_then_in_force(
    here: site.Site, carol: site.Client
) -> None:
    change(carol, "work_mem", "64MB")
    change(carol, "max_connections", "77")
    here.shop.cluster.restart()
    assert in_a_new_session(here.shop, "work_mem") == "64MB"
    shown = site.eventually(lambda: shown_or_not(carol, "max_connections"))
    assert (shown["value"], shown["pending_restart"]) == ("77", False)


def shown_or_not(client: site.Client, name: str) -> Any:
    """A setting as it is shown; None while the server comes back."""
    answer = client.call("get_pg_configuration", {"name": name}).json()["result"]
    return None if answer["isError"] else answer["structuredContent"]["settings"][0]


def test_the_connection_is_closed_after_a_change_and_after_a_look(here: site.Site, carol: site.Client) -> None:
    change(carol, "work_mem", "64MB")
    first = last_call(here)["backend_pid"]
    ask(carol, "get_pg_configuration")
    second = last_call(here)["backend_pid"]
    change(carol, "work_mem", None)
    assert len({first, second, last_call(here)["backend_pid"]}) == 3


def test_the_tools_are_shown_and_open_to_those_alone_who_may_change_something(
    here: site.Site, carol: site.Client
) -> None:
    here.run("user", "add", "dora", "--role", "mcp-developer")
    grant(here, user="dora")
    both = {"get_pg_configuration", "set_pg_configuration"}
    shown = {one["name"]: one for one in listed(here, "carol")}
    assert both <= set(shown)
    assert shown["get_pg_configuration"]["annotations"]["readOnlyHint"] is True
    assert shown["set_pg_configuration"]["annotations"]["destructiveHint"] is True
    for user in ("dora", "alice"):  # a role without databases:*:admin; one without a grant
        assert both.isdisjoint(one["name"] for one in listed(here, user))
        with here.client(here.token(user)[1]) as client:
            refusal(client, "set_pg_configuration", name="work_mem", value="8MB")
    with here.client(here.token("carol", permissions=("tools:*", "databases:*:read"))[1]) as client:
        refusal(client, "set_pg_configuration", name="work_mem", value="8MB")
    assert "work_mem" not in auto_conf(here.shop)


def listed(here: site.Site, user: str) -> list[dict[str, Any]]:
    with here.client(here.token(user)[1]) as client:
        answer = client.http.post(here.url, json={"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}})
    found: list[dict[str, Any]] = answer.json()["result"]["tools"]
    return found


def test_whoever_has_admin_access_only_reads_no_table_by_it(here: site.Site, carol: site.Client) -> None:
    assert "you have no read access in 'shop'" in carol.error("select 1")
    with here.shop.admin() as connection:
        connection.execute(f"SET ROLE {settings_site.ROLE}".encode())
        for statement in ("SELECT * FROM public.orders", "INSERT INTO public.orders DEFAULT VALUES", "TABLE pg_authid"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_nothing_is_changed_where_the_config_lists_nothing(own: site.Shop, make_site: settings_site.Make) -> None:
    found = with_carol(make_site, own, user="erin")
    grant(found, user="erin")
    relist(found, f"settings: [{', '.join(LISTED)}]", "settings: []")
    found.start()
    try:
        assert "set_pg_configuration" not in {one["name"] for one in listed(found, "erin")}
        with found.client(found.token("erin")[1]) as client:
            refusal(client, "set_pg_configuration", name="work_mem", value="8MB")
            refusal(client, "get_pg_configuration")
    finally:
        found.stop()


def test_where_the_default_is_not_the_one_with_admin_access_that_one_is_named_and_the_log_says_what_was_tried(
    own: site.Shop, make_site: settings_site.Make
) -> None:
    other = f"""  mine: {{host: {own.cluster.host}, port: {own.cluster.port}, dbname: postgres, user: {site.READER},
    password_file: shop.password, default: true}}
"""
    found = with_carol(make_site, own, settings_site.config(("work_mem",), other), user="gina")
    grant(found, user="gina")
    found.start()
    try:
        with found.client(found.token("gina")[1]) as client:
            said = refusal(client, "get_pg_configuration", name="WORK_MEM")
            assert "no database was named, and you have admin access in 'shop' alone" in said
            line = last_call(found)
            assert (line["event"], line["database"]) == ("tool.refused", "mine")
            assert line["reason"].startswith("WORK_MEM: no database was named")
            change(client, "work_mem", "5MB", database="shop")
            said = refusal(client, "set_pg_configuration", name="fsync=a b", value="hush", database="host=x")
            line = last_call(found)
            assert "shop" not in said
            assert "database" not in line
            assert not re.search("fsync|hush|host=", str(line))
    finally:
        found.stop()
        settings_site.reset(own)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b", ["a", "b"]),
        ('"A, b" ,C', ["A, b", "c"]),
        ('"say ""x""",y', ['say "x"', "y"]),
        ("", [""]),
        ('a "b', ['a "b']),
    ],
)
def test_a_list_of_names_is_read_as_postgresql_reads_one(text: str, names: list[str]) -> None:
    assert settings.items(text) == names
