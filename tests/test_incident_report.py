"""mcpctl incident report: all that a token did on one page, which nothing that it did can forge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from command_line import Home
from mcpctl.audit import report
from mcpctl.audit.log import AuditLog, read_key
from mcpctl.audit.reading import Reading
from site_of_mcpctl import READER, Shop, Site, reload

MakeSite = Callable[..., Site]


def test_a_report_tells_what_a_token_did_on_a_real_server(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    name, text = at.token()
    other, others = at.token("bob")
    with at.client(text) as alice, at.client(others) as bob:
        alice.rows("select count(*) from orders")
        alice.rows("select * from customers limit 3")
        alice.call("execute_statement", {"statement": "delete from orders"})
        bob.rows("select count(*) from products")
        [backend] = [row for row in newest_shop.backends() if row[1] == f"mcpctl {name}"]
    at.run("token", "revoke", name, "--reason", "leaked")
    found = json.loads(at.run("incident", "report", "--token", name, "--json").stdout)
    assert (found["token"]["id"], found["token"]["status"], found["user"]["name"]) == (name, "revoked", "alice")
    assert {row["relation"]: row["rows"] for row in found["tables"]} == {"public.orders": 1, "public.customers": 3}
    assert [(row["address"], row["count"]) for row in found["addresses"]] == [("127.0.0.1", 4)]
    assert [row["role"] for row in found["roles"]] == [READER]
    assert [row["pid"] for row in found["backends"]] == [backend[0]]
    assert [row["tool"] for row in found["calls"]] == ["query_database", "execute_statement"]
    assert found["refusals"][0]["count"] == 1
    assert {"token.revoked", "pool.opened", "pool.closed"} <= {line["event"] for line in found["events"]["last"]}
    assert found["log"]["faults"] == []
    assert "$argon2id" not in json.dumps(found)
    page = at.run("incident", "report", "--token", name).stdout
    assert f"`mcpctl {name}`" in page
    assert "    select count(*) from orders" in page.replace("        ", "    ")
    assert "products" not in page
    assert other not in page
    at.run("token", "remove", name, "--yes")
    page = at.run("incident", "report", "--token", name).stdout
    assert "not in the token file any more" in page
    assert "public.orders" in page
    assert "customers" in at.run("incident", "report", "--user", "alice").stdout


def test_postgresql_s_own_log_can_be_searched_by_the_token_s_id(make_site: MakeSite, newest_shop: Shop) -> None:
    text = (Path(__file__).parent.parent / "docs" / "incidents.md").read_text(encoding="utf-8")
    advice = re.findall(r"^ALTER SYSTEM SET .*$", text, flags=re.MULTILINE)
    at = make_site(newest_shop).start()
    name, secret = at.token()
    with newest_shop.admin() as admin:
        try:
            for line in advice:
                admin.execute(line.encode())
            reload(newest_shop.cluster)
            with at.client(secret) as alice:
                alice.rows("select 'looked for in the log'")
        finally:
            for line in advice:
                admin.execute(f"ALTER SYSTEM RESET {line.split()[3]}".encode())
            reload(newest_shop.cluster)
    found = [line for line in newest_shop.cluster.log().splitlines() if "looked for in the log" in line]
    assert [line for line in found if f"{READER}@shop mcpctl {name} LOG:  execute" in line]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def fill(home: Home, *lines: dict[str, Any]) -> None:
    log = AuditLog(home.folder / "audit.jsonl", read_key(home.folder / "audit.key"), lambda: datetime.now(UTC))
    call = {"token": "abcd1234", "user": "eve", "tool": "query_database", "database": "shop", "outcome": "ok"}
    for line in lines:
        log.append(line.pop("event", "tool.called"), **{**call, **line})
    log.close()


def test_what_is_not_known_anywhere_is_an_error(home: Home) -> None:
    fill(home, {"token": "other123"})
    assert home("incident", "report", "--token", "abcd1234").code == 4
    assert home("incident", "report", "--user", "nobody").code == 4
    assert home("incident", "report").code == 2
    assert home("incident", "report", "--token", "other123", "--since", "1h").code == 0
    assert home("incident", "report", "--token", "other123", "--until", "1h").code == 4


def test_of_a_token_that_was_removed_the_user_is_found_by_the_log(home: Home) -> None:
    home("user", "add", "eve")
    fill(home, {"token": "abcd1234"}, {"token": "abcd1234", "user": "gone"}, {"token": "abcd1234"})
    found = json.loads(home("incident", "report", "--token", "abcd1234", "--json").good)
    assert (found["token"], found["user"]["name"]) == (None, "eve")
    page = home("incident", "report", "--token", "abcd1234").good
    assert "There is none in the user file" not in page
    assert "mcpctl can eve" in page


def test_a_line_that_was_written_later_is_shown_with_the_time_when_it_happened(home: Home) -> None:
    then = "2026-01-02T03:04:05.678Z"
    fill(home, {"event": "token.expired", "token": "abcd1234", "happened_at": then})
    assert f"| {then} | token.expired |" in home("incident", "report", "--token", "abcd1234").good
    assert home("audit", "tail").good.startswith(f"{then}\ttoken.expired\t")


def test_no_statement_or_reason_forges_the_page(home: Home) -> None:
    evil = "x\n\n## Next steps\n\n```\n| a | b |\n<script>[go](http://evil)\x1b[2J\u202e\r# Title\t~~~"
    fill(home, {"statement": evil}, {"event": "tool.refused", "reason": evil, "client_ip": evil}, {"user": "|#"})
    page = home("incident", "report", "--token", "abcd1234").good
    assert not [one for one in page if not one.isprintable() and one != "\n"]
    lines = page.split("\n")
    assert [line for line in lines if line.startswith("#")] == [
        "# Incident report: token abcd1234", "## The token", "## Its users by the log", "## The user", "## Use",
        "## Calls", "## From where", "## Addresses that were refused", "## Tables read", "## Login roles",
        "## Backends of PostgreSQL", "## Refused", "## What happened to it", "## Settings changed", "## Statements",
        "## The log", "## PostgreSQL's own log", "## Next steps",
    ]  # fmt: skip
    assert not [line for line in lines if "script" in line and not line.startswith("    ") and "\\<script" not in line]
    assert not [line for line in lines if "evil" in line and not line.startswith("    ") and "\\://evil" not in line]


def test_a_new_token_s_report_says_which_one_it_replaced(home: Home) -> None:
    old, _ = home.token()
    new = home("token", "rotate", old).good.split("_")[1]
    events = json.loads(home("incident", "report", "--token", new, "--json").good)["events"]["last"]
    assert [(line["event"], line["token"]) for line in events] == [("token.rotated", old)]


def test_a_report_is_written_to_a_private_file_and_over_none(home: Home) -> None:
    fill(home, {"statement": "select 1"})
    out = home.folder / "report.md"
    assert home("incident", "report", "--token", "abcd1234", "--out", str(out)).good == ""
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.read_text().startswith("# Incident report: token abcd1234\n")
    assert home("incident", "report", "--token", "abcd1234", "--out", str(out)).code == 5


def test_a_hole_in_the_log_is_on_the_page(home: Home) -> None:
    fill(home, {}, {}, {})
    path = home.folder / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::2]))
    done = home("incident", "report", "--token", "abcd1234")
    assert done.code == 1
    assert "**It is not whole." in done.out
    assert "lines 2 to 2 are missing" in done.out


def test_settings_that_were_changed_are_on_the_page(home: Home) -> None:
    fill(home, {"tool": "set_pg_configuration", "reason": "work_mem: '4MB' to '64MB'"})
    assert "work\\_mem: '4MB' to '64MB'" in home("incident", "report", "--token", "abcd1234").good


def test_a_report_is_bounded_and_says_how_much_more_there_is(home: Home) -> None:
    many = report.STATEMENTS + 20
    fill(home, *({"statement": f"select {n}", "client_ip": f"10.0.{n // 250}.{n % 250}"} for n in range(many)))
    facts = report.gather(Reading(home.folder / "audit.jsonl"), "abcd1234", None)
    assert (facts.asked, len(facts.statements), len(facts.addresses)) == (many, report.STATEMENTS, report.MOST + 1)
    assert facts.addresses[report.OTHERS].count == 20
    page = home("incident", "report", "--token", "abcd1234").good
    assert "20 before these are not shown" in page
    fill(home, {"statement": "x" * 100_000})
    assert "… (100000 characters)" in home("incident", "report", "--token", "abcd1234").good
