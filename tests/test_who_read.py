"""mcpctl audit who-read: whose statements touched a table, by PostgreSQL's plan; and what the log cannot tell, told."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from command_line import Done, Home
from mcpctl.audit import who_read
from mcpctl.audit.anchors import text
from mcpctl.audit.log import AuditLog, read_key
from mcpctl.audit.reading import Reading
from mcpctl.errors import UsageError
from mcpctl.tools.table import TOOLS
from site_of_mcpctl import Client, Shop, Site

TABLES = """
DROP SCHEMA IF EXISTS sales CASCADE; CREATE SCHEMA sales;
CREATE TABLE sales.secret (id int PRIMARY KEY, name text); INSERT INTO sales.secret VALUES (1, 'a'), (2, 'b');
CREATE TABLE sales.other (id int, name text); INSERT INTO sales.other VALUES (1, 'x');
CREATE TABLE sales."Order.Lines" (id int);
CREATE VIEW sales.behind AS SELECT name FROM sales.secret;
CREATE MATERIALIZED VIEW sales.kept AS SELECT name FROM sales.secret;
CREATE TABLE sales.parted (id int) PARTITION BY RANGE (id);
CREATE TABLE sales.part_1 PARTITION OF sales.parted FOR VALUES FROM (0) TO (10);
CREATE TABLE sales.part_2 PARTITION OF sales.parted FOR VALUES FROM (10) TO (20);
CREATE FUNCTION sales.count_them() RETURNS bigint LANGUAGE plpgsql STABLE AS $$BEGIN
 RETURN (SELECT count(*) FROM sales.secret); END$$;
GRANT USAGE ON SCHEMA sales TO shop_reader; GRANT SELECT ON ALL TABLES IN SCHEMA sales TO shop_reader;
"""
READS = {
    "select name from sales.secret": ["sales.secret"],
    "select s.name from sales.other o join sales.secret s using (id)": ["sales.other", "sales.secret"],
    "with x as (select * from sales.secret) select count(*) from x": ["sales.secret"],
    "select 1 where exists (select from sales.secret)": ["sales.secret"],
    "select (select max(id) from sales.secret)": ["sales.secret"],
    "table sales.secret": ["sales.secret"],
    "select * from sales.behind": ["sales.behind", "sales.secret"],
    "select * from sales.kept": ["sales.kept"],
    'select * from sales."Order.Lines"': ["sales.Order.Lines"],
    "select * from sales.parted": ["sales.part_1", "sales.part_2", "sales.parted"],
    "select * from sales.parted where id = 3": ["sales.part_1", "sales.parted"],
    "select * from sales.part_2": ["sales.part_2"],
    "select 'sales.secret' -- sales.secret": [],
    'select /* from sales.secret */ \'select * from sales.secret\', "n" from (values (1)) as "sales.secret" (n)': [],
    "select sales.count_them()": ["sales.secret"],
}
"""What each statement reads. A function is opaque to its plan, and not to its locks; a materialized view is its own."""


@pytest.fixture
def at(make_site: Callable[..., Site], shop: Shop) -> Site:
    with shop.admin() as admin:
        admin.execute(TABLES.encode())
    return make_site(shop).start()


@pytest.fixture
def alice(at: Site) -> Iterator[Client]:
    with at.client(at.token()[1]) as found:
        yield found


def who(at: Site, target: str, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(at.run("audit", "who-read", target, "--json", *arguments).stdout)
    return found


def asked(at: Site, target: str, *arguments: str) -> list[str]:
    return [line["statement"] for line in who(at, target, *arguments)["statements"]]


def test_who_read_tells_what_the_plan_reads_and_nothing_that_only_the_text_names(at: Site, alice: Client) -> None:
    for statement in READS:
        alice.ask(statement)
    lines = [line for line in at.audit() if line["event"] == "tool.called"]
    assert {line["statement"]: line["relations"] for line in lines} == READS
    for table in ("secret", "other", "behind", "kept", "parted", "part_1", "part_2", '"Order.Lines"'):
        name = f"sales.{table}"
        expected = [statement for statement, read in READS.items() if name.replace('"', "") in read]
        assert expected
        assert asked(at, name) == asked(at, f"shop.{name}") == asked(at, name, "--database", "shop") == expected
    assert asked(at, "sales.*") == asked(at, "shop.sales.*") == [statement for statement, read in READS.items() if read]
    [row] = who(at, "sales.secret")["who"]
    assert (row["user"], row["database"], row["count"], row["rows"]) == ("alice", "shop", 8, 11)


def test_who_read_says_what_it_cannot_know(at: Site, alice: Client) -> None:
    alice.ask("select 1")
    done = at.run("audit", "who-read", "sales.secret")
    assert (done.stdout, "nobody" in done.stderr, "does not say what they read" in done.stderr) == ("", True, False)
    assert "what functions read may be missing here" in done.stderr
    alice.ask("explain select * from sales.secret")
    alice.call("explain_query", {"query": "select * from sales.secret"})
    alice.call("explain_query", {"query": "select * from sales.secret", "analyze": True})
    alice.error("select * from sales.nothing")
    alice.call("get_schema_info", {"table": "sales.secret"})
    done = at.run("audit", "who-read", "sales.secret")
    assert [row.split("\t")[3] for row in done.stdout.splitlines()] == ["1"]  # analyze runs it
    assert "of 3 statements the log does not say what they read (2 ok, 1 error)" in done.stderr


def test_what_a_function_reads_in_a_block_that_is_rolled_back_is_seen(at: Site, alice: Client) -> None:
    """Its locks are released with it."""
    with at.shop.admin() as admin:
        admin.execute(
            b"CREATE FUNCTION sales.rolled_back(query text) RETURNS int LANGUAGE plpgsql AS $$BEGIN "
            b"EXECUTE query; RAISE 'undone'; EXCEPTION WHEN raise_exception THEN RETURN 1; END$$"
        )
    alice.ask("select * from sales.other")  # whose counters are not the next statements'
    reads = {
        "select 1": [],
        "select count(*) from sales.secret": ["sales.secret"],
        "select from sales.secret where id = 2": ["sales.secret"],
        "select from sales.secret where id = 4711": ["sales.secret"],
        "select from sales.secret where ctid = '(0,1)'": ["sales.secret"],
        "select from sales.kept": ["sales.kept"],
        'select from sales."Order.Lines"': ["sales.Order.Lines"],
        "select from sales.part_1": ["sales.part_1"],
    }
    for query in reads:
        for _ in range(2):
            alice.ask(f"select sales.rolled_back($q${query}$q$)")
    found = [line["relations"] for line in at.audit() if line["event"] == "tool.called"]
    assert found[1:] == [read for read in reads.values() for _ in range(2)]


def test_functions_in_what_was_cut_off_or_failed_may_have_read_anything(at: Site, alice: Client) -> None:
    for _ in range(2):
        alice.ask("select sales.count_them() from generate_series(1, 3000)")
    alice.error("select 1 / (sales.count_them() - 2)")
    alice.ask("select name from sales.secret, generate_series(1, 3000)")
    lines = [line["relations"] for line in at.audit() if line["event"] == "tool.called"]
    # whether the first had come to its end before it was cut off, is known of the second
    assert all(line in (["?"], ["sales.secret"], ["sales.secret", "?"]) for line in lines[:3]), lines
    assert lines[3][0] == "sales.secret"  # and more, unless it was at its end before it was cut off
    assert "statements the log does not say" in at.run("audit", "who-read", "sales.secret").stderr
    found = who(at, "sales.secret")
    assert found["unknown"] + len(found["statements"]) == 4


# -- the log's files --------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


class Clock:
    """A minute later at each look."""

    def __init__(self) -> None:
        self.minute = 0

    def __call__(self) -> datetime:
        self.minute += 1
        return datetime(2026, 1, 1, self.minute // 60, self.minute % 60, tzinfo=UTC)


def fill(home: Home, count: int = 5, clock: Clock | None = None, **more: Any) -> AuditLog:
    log = AuditLog(home.folder / "audit.jsonl", read_key(home.folder / "audit.key"), clock or Clock())
    line = {"token": "abcd1234", "user": "alice", "tool": "query_database", "database": "shop", "role": "r", "rows": 2}
    for _ in range(count):
        log.append("tool.called", **{**line, "statement": "x", "relations": ["sales.orders"], "outcome": "ok", **more})
    log.close()
    return log


def found(home: Home, *arguments: str) -> Done:
    return home("audit", "who-read", "sales.orders", *arguments)


def test_all_files_of_the_log_are_read_packed_ones_and_copies_too(home: Home) -> None:
    path, clock = home.folder / "audit.jsonl", Clock()
    for name in ("audit.jsonl.3.gz", "audit.jsonl.2", "audit.jsonl-20260101"):
        fill(home, 5, clock)
        if name.endswith(".gz"):
            path.rename(path.with_name("audit.jsonl.3"))
        else:
            path.rename(path.with_name(name))
    fill(home, 5, clock)
    old = path.with_name("audit.jsonl.3")
    path.with_name("audit.jsonl.3.gz").write_bytes(gzip.compress(old.read_bytes()))
    old.unlink()
    path.with_name("audit.jsonl.copy").write_bytes(path.read_bytes())
    [row] = found(home).good.splitlines()
    assert row.split("\t") == [
        "alice", "abcd1234", "shop", "20", "40", "2026-01-01T00:01:00.000Z", "2026-01-01T00:20:00.000Z",
    ]  # fmt: skip
    between = found(home, "--since", "2026-01-01T00:07:00Z", "--until", "2026-01-01T00:18:00Z").good
    assert between.split("\t")[3] == "11"
    assert found(home, "--until", "2026-01-01T00:01:00Z").good == ""
    assert found(home, "--since", "9999d").code == 0


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[1:])), "lines 1 to 1 are missing"),
        (lambda path: path.unlink(), "the log here begins with line 6, of 2026-01-01T00:06:00.000Z"),
        (lambda path: path.write_bytes(b"junk"), "audit.jsonl.1 cannot be read as a part of the log"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())[:-20]), "audit.jsonl.1 cannot be unpacked"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\n"), "audit.jsonl.1: 1 lines cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes() + b"half"), ""),
        (
            lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:2])),
            "lines 3 to 5 are missing, between 2026-01-01T00:02:00.000Z and 2026-01-01T00:06:00.000Z",
        ),
    ],
)
def test_a_hole_in_the_log_is_never_a_silent_nobody(home: Home, damage: Callable[[Path], object], told: str) -> None:
    path, clock = home.folder / "audit.jsonl", Clock()
    fill(home, 5, clock)
    path.rename(path.with_name("audit.jsonl.1"))
    fill(home, 5, clock)
    damage(path.with_name("audit.jsonl.1"))
    if "lines 1 to 1" in told:
        told = "the log here begins with line 2"
    done = found(home)
    assert told in done.err
    assert done.code == (0 if "begins with" in told or not told else 1)
    assert done.out.startswith("alice\tabcd1234\tshop\t")
    later = found(home, "--since", "2026-01-01T00:08:00Z")
    assert later.out.split("\t")[3] == "3"
    assert "begins with" not in later.err
    if "missing" in told:
        assert later.code == 0  # what is missing was before


def test_a_log_that_was_begun_anew_is_counted_and_said(home: Home) -> None:
    path, clock = home.folder / "audit.jsonl", Clock()
    fill(home, 3, clock)
    path.rename(path.with_name("elsewhere"))
    fill(home, 2, clock)
    path.write_bytes(path.with_name("elsewhere").read_bytes() + path.read_bytes())
    done = found(home)
    assert (done.code, done.out.split("\t")[3]) == (1, "5")
    assert "after line 3 comes line 1: the log was begun anew, or tampered with" in done.err


def test_a_clock_that_was_wrong_hides_no_line_and_is_told(home: Home) -> None:
    path, clock = home.folder / "audit.jsonl", Clock()
    for minutes, name in ((600, "audit.jsonl.2"), (0, "audit.jsonl.1"), (30, "audit.jsonl")):
        clock.minute = minutes
        fill(home, 5, clock)
        if name != path.name:
            path.rename(path.with_name(name))
    done = found(home)
    assert (done.code, done.out.split("\t")[3]) == (0, "15")
    assert "the clock was set back at line 6, from 2026-01-01T10:05:00.000Z to 2026-01-01T00:01:00.000Z" in done.err
    assert found(home, "--since", "2026-01-01T05:00:00Z").good.split("\t")[3] == "15"
    fill(home, 5, clock)
    assert found(home, "--since", "2026-01-01T00:38:00Z").good.split("\t")[3] == "20"


@pytest.mark.parametrize("rest", [0, 4])
def test_an_end_that_is_missing_is_never_a_silent_nobody(tmp_path: Path, rest: int) -> None:
    home = Home(tmp_path / "home", "audit: {anchor_file: anchors}\n")
    path, clock = home.folder / "audit.jsonl", Clock()
    log = fill(home, 5, clock)
    [end] = [line for line in path.read_bytes().splitlines(keepends=True) if line.startswith(b'{"seq":5,')]
    (home.folder / "anchors").touch(0o600)
    (home.folder / "anchors").write_text(text(log.key, 5, json.loads(end)["hash"], "2026") + "\n")
    assert found(home).code == 0
    if rest:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:rest]))
    else:
        path.unlink()
    for done in (found(home, "--database", "shop"), home("incident", "report", "--user", "alice")):
        assert done.code == 1
        assert f"lines {rest + 1} to 5 are missing at its end, says an anchor in anchors (2026)" in done.err
    if not rest:
        assert "nobody, in what could be read" in found(home).err


def test_no_current_file_is_said(home: Home) -> None:
    fill(home, 5)
    (home.folder / "audit.jsonl").rename(home.folder / "audit.jsonl.1")
    done = found(home)
    assert (done.code, "there is no audit.jsonl, only files that it was before" in done.err) == (0, True)


def test_a_file_is_left_out_only_where_all_that_is_known_of_it_is_older(home: Home) -> None:
    path, clock = home.folder / "audit.jsonl", Clock()
    for number in (3, 2, 1):
        fill(home, 5, clock)
        path.rename(path.with_name(f"audit.jsonl.{number}"))
    fill(home, 5, clock)
    reading = Reading(path, datetime(2026, 1, 1, 0, 14, tzinfo=UTC))
    assert [line["seq"] for line in reading.lines(lambda line: True)] == list(range(14, 21))
    assert (reading.starts, reading.faults, reading.remarks) == ((11, "2026-01-01T00:11:00.000Z"), [], [])
    old = path.with_name("audit.jsonl.3")
    old.write_bytes(gzip.compress(old.read_bytes()))
    reads = []
    for year in (2027, 2025):
        os.utime(old, (0, datetime(year, 1, 1, tzinfo=UTC).timestamp()))
        reading = Reading(path, datetime(2026, 1, 1, 0, 14, tzinfo=UTC))
        assert len(list(reading.lines(lambda line: True))) == 7
        reads.append(reading.starts and reading.starts[0])
        assert (reading.faults, reading.missing_before) == ([], None)
    assert reads == [1, 11]


def test_what_a_caller_or_an_intruder_has_put_into_a_line_hides_and_crashes_nothing(home: Home) -> None:
    fill(home, 1, statement="select '\ud800'")
    path = home.folder / "audit.jsonl"
    head = b'{"seq":%d,"time":"2026-01-01T00:0%d:00.000Z","event":"tool.called","role":"r",'
    more = (
        b'"relations":["sales.orders",3],"user":["x"],"token":{},"database":4,"rows":"y","statement":5,"outcome":[]}\n',
        b'"relations":7,"tool":"query_database","x":"sales.orders\\"","client_ip":[1],"backend_pid":[2],"token":"t"}\n',
        b'"relations":["sales.orders"' + b"[" * 100_000 + b"}\n",
    )
    path.write_bytes(path.read_bytes() + b"".join(head % (n, n) + one for n, one in enumerate(more, 2)))
    done = found(home)
    assert (done.code, len(done.out.splitlines())) == (1, 2)
    assert "audit.jsonl: 1 lines cannot be read" in done.err
    assert len(json.loads(found(home, "--json").out)["statements"]) == 2
    assert home("incident", "report", "--token", "t").code == 0
    assert home("audit", "top", "--since", "2026-01-01", "--by", "table").code == 1


def test_no_log_at_all_is_an_error(home: Home) -> None:
    assert found(home).code == 4


def test_of_several_databases_and_own_ones_each_is_told_apart(home: Home) -> None:
    several = ["own:lab:sales.orders", "shop:sales.orders", "shop:public.place"]
    fill(home, 1, database="shop,own:lab", relations=several)
    fill(home, 1, database="own:lab")
    rows = sorted(row.split("\t")[2:4] for row in found(home).good.splitlines())
    assert rows == [["own:lab", "2"], ["shop", "1"]]
    assert found(home, "--database", "own:lab").good.split("\t")[3] == "2"
    assert home("audit", "who-read", "own:lab.sales.orders").good.split("\t")[3] == "2"
    assert home("audit", "who-read", "public.place", "--database", "own:lab").good == ""


def test_of_several_databases_one_that_is_not_known_is_counted(home: Home) -> None:
    fill(home, 1, database="lab,shop", relations=["lab:?", "shop:public.place"])
    assert "of 1 statements the log does not say what they read (1 ok)" in found(home).err
    assert "does not say" not in found(home, "--database", "shop").err
    assert "of 1 statements" in found(home, "--database", "lab").err


def test_a_database_called_own_hides_no_user_s_own(home: Home) -> None:
    fill(home, 1, database="own,own:lab", relations=["own:lab:sales.orders", "own:public.place"])
    assert found(home, "--database", "own:lab").good.split("\t")[2] == "own:lab"
    home.config.write_text("databases: {own: {dsn: postgresql://r@127.0.0.1/x}}\n")
    done = home("config", "check")
    assert (done.code, "databases.own: the log names users' own databases own:NAME" in done.err) == (3, True), done.err


def test_a_database_that_nothing_knows_is_an_error_and_not_nobody(home: Home) -> None:
    fill(home, 1, statement=',"database":"shpo"', database="store")
    done = found(home, "--database", "shpo")
    assert (done.code, "there is no database shpo in the config, and no line" in done.error) == (4, True)
    assert home("audit", "who-read", "public.none", "--database", "store").code == 0  # the log knows it
    assert found(home, "--database", "store", "--since", "1h").code == 4
    home.config.write_text("databases: {shpo: {dsn: postgresql://r@127.0.0.1/x}}\n")
    assert found(home, "--database", "shpo").code == 0
    assert "no line fits" in home("audit", "tail", "--token", "nonesuch").err


def test_a_schema_that_is_called_as_a_database_is_said_where_nobody_read_it(home: Home) -> None:
    fill(home, 1)
    home.config.write_text("databases: {shop: {dsn: postgresql://r@127.0.0.1/x}, sales: {dsn: postgresql://r@h/x}}\n")
    done = home("audit", "who-read", "shop.*")
    assert (done.code, done.out, "for that say shop.SCHEMA.*" in done.err) == (0, "", True), done.err
    assert "is taken for" not in found(home).err + home("audit", "who-read", "shop.*", "--database", "shop").err
    assert home("audit", "who-read", "shop:sales.orders").good == found(home).good


def test_verbose_shows_statements_that_can_forge_nothing(home: Home) -> None:
    fill(home, 1, statement="select 1;\n2026-01-01T00:00:00.000Z  mallory\x1b[2J")
    shown = found(home, "--verbose").good.splitlines()
    assert [line[:4] for line in shown] == ["alic", "", "2026", "    ", "    "]
    assert "\x1b" not in "".join(shown)
    assert shown[-1].endswith("mallory\\x1b[2J")


def test_only_the_last_statements_are_kept(home: Home) -> None:
    fill(home, 5)
    done = who_read.search(Reading(home.folder / "audit.jsonl"), who_read.parse("sales.orders", None), kept=2)
    assert (done.more, [line["seq"] for line in done.statements]) == (3, [4, 5])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sales.orders", who_read.Target("sales", "orders")),
        ("shop.sales.orders", who_read.Target("sales", "orders", "shop")),
        ("own:lab.sales.orders", who_read.Target("sales", "orders", "own:lab")),
        ("sales.*", who_read.Target("sales", None)),
        ("my-shop.sales.*", who_read.Target("sales", None, "my-shop")),
        ('"Odd.schema"."T"', who_read.Target("Odd.schema", "T")),
        ('shop."Odd.schema".*', who_read.Target("Odd.schema", None, "shop")),
        ("shop:sales.orders", who_read.Target("sales", "orders", "shop")),
        ("own:lab:sales.*", who_read.Target("sales", None, "own:lab")),
        ('shop:"a:b"."50%"', who_read.Target("a:b", "50%", "shop")),
        ("größe.t$1", who_read.Target("größe", "t$1")),
    ],
)
def test_a_target_is_read_as_people_write_it(text: str, expected: who_read.Target) -> None:
    assert who_read.parse(text, None) == expected


@pytest.mark.parametrize(
    "text",
    [
        "orders", "Sales.orders", "*", "a.b.c.d", "", ".", "a..b", "sales.", "sales.orders.x.*", "*.*", "pub*.*",
        "public.t*", "public.%", "*.t", "shop.*.t", "shop.*.*", "public.t;", "public.t'", "own:sales.t", "a:b:c.d",
    ],
)  # fmt: skip
def test_what_names_no_table_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as|name|upper|schema"):
        who_read.parse(text, None)


def test_the_tools_that_take_a_statement_are_those_that_who_read_knows() -> None:
    assert tuple(name for name, tool in TOOLS.items() if tool.statement is not None) == who_read.ASKING
