"""mcpctl status and mcpctl top: how the running server is, and what it does."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Home, on_a_terminal
from mcpctl.cli.live import ago
from site_of_mcpctl import Shop, Site, eventually, in_background


def test_without_a_server_the_answer_is_no(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    done = home("status")
    assert (done.code, done.err) == (1, "")
    assert done.out == f"no server runs (looked in {home.folder})\n"
    assert json.loads(home("status", "--json").out) == {"up": False, "servers": [], "silent": [], "audit_seq": None}
    assert "mcpctl: error: no server runs" in home("top").error


def test_who_revokes_hears_of_a_server_that_listens_where_the_config_does_not_say(
    newest_shop: Shop, make_site: Callable[..., Site], tmp_path: Path
) -> None:
    at = make_site(newest_shop)
    name, _ = at.token()
    (tmp_path / "run").mkdir(0o700)
    at.limits = {"MCPCTL_SERVER__RUNTIME_DIR": str(tmp_path / "run")}  # as a drop-in of its unit may say
    at.start()
    done = at.run("token", "revoke", name)
    assert done.stdout == f"{name} revoked\nno server runs\n"
    assert f"no server listens in {at.folder}, and another process has" in done.stderr
    at.stop()
    assert "warning" not in at.run("token", "revoke", name).stderr


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (277_200, "3 d 5 h"), (-5, "0 s")],
)
def test_a_time_is_its_two_largest_units(seconds: float, shown: str) -> None:
    assert ago(seconds) == shown


def test_the_status_tells_what_there_is_to_know(
    newest_shop: Shop, make_site: Callable[..., Site], certificates: Path
) -> None:
    gone = "    default: true\n  gone: {host: /nonexistent, dbname: shop, user: reader, required: false}\n"
    site = make_site(newest_shop, database=gone)
    tls = ("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"))
    site.start("--workers", "2", *tls)
    token = site.token(seconds=90 * 86400)[1]
    site.token()
    with site.client(token, verify=ssl.create_default_context(cafile=certificates / "ca.pem")) as client:
        client.error("select 1/0")
        client.rows("select 1")
    found = json.loads(site.run("status", "--json").stdout)
    assert found["up"]
    (server,) = found["servers"]
    assert len(server["pids"]) == server["workers"] == 2
    assert server["url"] == site.url
    shop = server["databases"]["shop"]
    assert (shop["up"], shop["pools"]) == (True, 1)
    assert 1 <= shop["connections"] <= 3  # one, the kept one, and one whose call has just failed
    assert server["databases"]["gone"]["up"] is False
    assert server["connections"] == shop["connections"]
    assert (server["budget"], server["running"], server["audit"]) == (20, 0, None)
    assert server["minute"] == {"calls": 2, "failed": 1, "refused": 0, "strangers": 0}
    assert server["tokens"]["active"] == server["tokens"]["expiring"] == 1
    assert server["tls_not_after"] > server["since"]
    assert found["audit_seq"] == site.audit()[-1]["seq"]

    rows = dict(line.split("\t") for line in site.run("status").stdout.splitlines())
    assert rows["serving at"] == site.url
    assert rows["processes"].startswith("2 of 2 answer: ")
    assert re.fullmatch(r"takes connections; 1 pool, \d connections?", rows["database shop"])
    assert rows["database gone"].startswith("DOES NOT TAKE CONNECTIONS")
    assert rows["tokens"] == "1 active, 1 expiring"
    assert rows["last minute"] == "2 calls, 1 failed, 0 refused; 0 credentials refused"
    assert rows["audit log"].startswith("can be written; last line ")
    assert re.fullmatch(r"ends \S+, in .+", rows["certificate"])
    assert "WHAT" in on_a_terminal(["--config", str(site.config), "status"]).out


def test_the_status_says_what_is_out_of_order(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start()
    with site.config.open("a") as file:
        file.write("# changed\n")
    (site.folder / "tokens.yaml").chmod(0o644)
    rows = site.run("status").stdout
    assert "config\tthe file has changed since" in rows
    assert "tokens\tA FILE IS BROKEN OR MISSING: nobody is let in" in rows


def test_a_server_that_hangs_is_named_and_not_waited_for(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start()
    assert site.process is not None
    os.kill(site.process.pid, signal.SIGSTOP)
    try:
        done = site.run("status", "--json", check=False)
    finally:
        os.kill(site.process.pid, signal.SIGCONT)
    assert done.returncode == 1
    assert json.loads(done.stdout)["silent"] == [site.process.pid]
    assert f"process {site.process.pid}: no answer in time" in done.stderr


def test_top_tells_what_runs_and_who_used_most(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop).start()
    (alice, token), (bob, other) = site.token("alice"), site.token("bob")
    secret = "select pg_sleep(20) /* \x1b[31m */"
    with site.client(token) as client, site.client(other) as second:
        second.rows("select generate_series(1, 5)")
        running = in_background(client.call, "query_database", {"query": secret})
        eventually(lambda: json.loads(site.run("top", "--json", "--sql").stdout)["running"][0]["statement"])
        found = json.loads(site.run("top", "--json").stdout)
        (one,) = found["running"]
        pid = site.shop.backends("state = 'active'")[0][0]
        assert (one["user"], one["token"], one["tool"]) == ("alice", alice, "query_database")
        assert (one["database"], one["backend_pid"], one["client_ip"]) == ("shop", pid, "127.0.0.1")
        assert "statement" not in one
        assert [(used["token"], used["calls"], used["rows"]) for used in found["last_minute"]] == [(bob, 1, 5)]
        lines = [line.split("\t") for line in site.run("top").stdout.splitlines()]
        assert [line[0] for line in lines] == ["running", "last_minute"]
        assert lines[0][2:6] == ["alice", alice, "query_database", "shop"]
        assert lines[1][1:4] == ["bob", bob, "1"]
        shown = site.run("top", "--sql").stdout
        assert "pg_sleep(20) /* \\x1b[31m */" in shown
        assert "\x1b" not in shown
        watched = on_a_terminal(
            ["--config", str(site.config), "top", "--interval", "0.2"], answers=[("1 call runs", "q")]
        )
        assert watched.code == 0
        assert alice in watched.out
        ended = on_a_terminal(["--config", str(site.config), "top"], until=lambda text: "1 call runs" in text)
        assert ended.code in (130, -signal.SIGINT)  # a second Ctrl-C, where the machine is slow
        site.run("session", "revoke", alice)
        running.result()


def test_top_shows_no_statement_that_the_config_does_not_keep(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    site = make_site(newest_shop, extra="audit: {statements: hash}\n").start()
    done = site.run("top", "--sql", check=False)
    assert done.returncode == 2
    assert "the config keeps none in full" in done.stderr


def test_what_still_runs_on_the_config_before_is_counted(make_site: Callable[..., Site], newest_shop: Shop) -> None:
    at = make_site(newest_shop).start()
    with at.client(at.token()[1]) as a:
        running = in_background(a.rows, "select pg_sleep(3)::text")
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        at.run("config", "reload")
        (server,) = json.loads(at.run("status", "--json").stdout)["servers"]
        assert server["running"] == 1
        running.result()
