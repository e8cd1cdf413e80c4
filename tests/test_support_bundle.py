"""mcpctl support-bundle: what it tells, and what it does not. That no secret is in it test_secrets looks for, too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Home
from mcpctl.cli.support_bundle import Hidden
from site_of_mcpctl import PASSWORD, Shop, Site


def test_it_tells_what_a_report_needs_without_statements_secrets_and_names(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    log = "log: {file: server.log, sql_debug: true, level: debug}\nlimits: {max_rows: 77}\n"
    oidc = "auth: {oidc: {corner: {issuer: 'https://id.geheim.example', audience: [mcpctl]}}}\n"
    site = make_site(newest_shop, extra=log + oidc).start()
    (alice, token), (bob, _) = site.token("alice", note="for the geheim project"), site.token("bob")
    with site.client(token) as client:
        client.rows("select 'geheim' as word")
        client.error("create role geheim password 'geheim'")
        client.call("query_database", {"query": "select 'geheim'", "database": "elsewhere"})
    with site.client("mcp_nobody") as stranger:
        stranger.call("whoami")
    done = site.run("support-bundle")
    assert done.stderr == ""
    text = done.stdout
    site.run("token", "revoke", bob, "--reason", "for Mallory Smith")
    site.run("user", "add", "carol")
    site.run("user", "remove", "carol", "--yes")
    text += site.run("support-bundle").stdout
    secrets = [token, PASSWORD, (site.folder / "audit.key").read_text().strip(), "geheim", "hmac"]
    names = ["alice", alice, bob, "shop_reader", "shop", "corner", "carol", "Mallory", "127.0.0.1"]
    for one in [*secrets, *names[:-1]]:
        assert one not in text, one
    assert text.startswith("This is for whoever helps you with mcpctl")
    assert re.search(r"^mcpctl \d+\.\d+\.\d+, Python 3\.", text, re.MULTILINE)
    for said in (
        "limits.max_rows: 77", "log.level: debug", "log.file: (given)", "auth.oidc.1.issuer: (given)",
        "databases.1.password_file: (given)", "worker 0 of 1: version ", "1 of 1 databases up",
        '"event": "tool.called", "transport": "http", "tool": "query_database", "outcome": "ok"',
        '"outcome": "refused"',
        "DEBUG mcpctl.calls: tool.called query_database: database1: ok", "WARNING mcpctl.audit: Unauthorized: ",
    ):  # fmt: skip
        assert said in text, (said, text)
    assert re.search(r"^(ok|warn|fail): files: ", text, re.MULTILINE)
    assert json.loads(site.run("support-bundle", "--json").stdout)["versions"][0] in text


def test_a_connection_string_names_nobody_nor_does_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    (home.folder / "fred.pw").touch(0o600)
    databases = "{ledger: {dsn: 'host=/geheim dbname=accounts user=fred', password_file: fred.pw}}"
    for extra in ("", "tracing: {endpoint: 'http://collector.example:1'}\nlimits: {users: {fred: {rate: no}}}\n"):
        home.config.write_text(f"databases: {databases}\n{extra}")
        text = home("support-bundle").good
        for one in ("geheim", "accounts", "fred", "ledger", "collector.example"):
            assert one not in text.replace("fred.pw", ""), (one, text)
        assert ("fail: database database1: " in text) == (not extra), text


def test_where_something_cannot_be_told_the_rest_is(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    (home.folder / "users.yaml").write_text("broken")
    (home.folder / "audit.jsonl").mkdir()
    text = home("support-bundle").good
    assert "no server runs" in text
    assert "cannot be told: " in text
    assert "journalctl -u mcpctl" in text
    assert "fail: files: " in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alice asked bob, not malice or alice2", "user1 asked user2, not malice or alice2"),
        ("from 192.0.2.7 and 2001:db8::1, again 192.0.2.7", "from address1 and address2, again address1"),
        ("on 127.0.0.1 at 12:30:45 in 2026-11-28T12:30:45.123Z", None),
        ("version 3.11.2 of 15.4", None),
        ("anna@example.org", "mail1"),
        ("mcp_alice_r; databases.own.dsn and databases.1.dsn", "mcp_alice_r; databases.name1.dsn and databases.1.dsn"),
        (
            "http://127.0.0.1:80/mcp https://id.example.org:8/x, https://id.example.org",
            "http://127.0.0.1:80/mcp https://host1:8/x, https://host1",
        ),
        ("password pa$$word here", "password *** here"),
        ("mcp_abcdefgh_" + "x" * 43 + "_AbC123", "mcp_abcdefgh_…"),
    ],
)
def test_names_addresses_and_secrets_have_words_of_their_own(text: str, told: str | None) -> None:
    hidden = Hidden(["pa$$word", "", "x"], [("user", "alice"), ("user", "bob"), ("user", "")])
    assert hidden(text) == (told or text)
