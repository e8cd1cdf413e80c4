"""What is counted, the text that Prometheus reads, and the listener that it is read at."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from mcpctl import config
from mcpctl.errors import ConfigError
from mcpctl.identity import authenticate, standing
from mcpctl.last_minute import LastMinute
from mcpctl.metrics import FAMILIES, Metrics, days_class, exposition, reason_class
from mcpctl.recorder import STRANGERS_IN_FULL, Recorder
from site_of_mcpctl import Shop, Site, eventually, in_background

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
ON = "metrics: {port: 0}\n"


def call(**fields: Any) -> dict[str, Any]:
    base = {"tool": "query_database", "database": "shop", "outcome": "ok", "elapsed_ms": 3.0, "rows": 2, "bytes": 10,
            "token": "ab12cd34", "user": "alice", "tenant": None, "client_ip": "192.0.2.1"}  # fmt: skip
    return {**base, **fields}


def parsed(text: str) -> Series:
    """Every series, as Prometheus' own parser reads it; a series twice is a fault."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of the series of that name that have these labels."""
    wanted = set(labels.items())
    return sum(number for (found, own), number in series.items() if found == name and wanted <= own)


# -- counting -------------------------------------------------------------------------------------------------------


def test_a_call_is_counted_by_tool_database_and_outcome_with_its_rows_and_its_time() -> None:
    metrics = Metrics(["shop"])
    metrics.count("tool.called", call(), True)
    metrics.count("tool.called", call(elapsed_ms=40_000.0, outcome="error", rows=None, bytes=None), True)
    metrics.count("tool.refused", call(tenant="acme", outcome="limited", rows=None, elapsed_ms=0.5), False)
    series = parsed(exposition({"0": metrics.samples()}))
    assert value(series, "mcpctl_calls_total", tool="query_database", database="shop", outcome="ok", worker="0") == 1
    assert value(series, "mcpctl_calls_total", outcome="limited") == 1
    assert value(series, "mcpctl_call_rows_total", database="shop") == 2
    assert value(series, "mcpctl_call_seconds_bucket", le="0.001") == 1
    assert value(series, "mcpctl_call_seconds_bucket", le="0.005") == 2
    assert value(series, "mcpctl_call_seconds_bucket", le="30.0") == 2
    assert value(series, "mcpctl_call_seconds_bucket", le="+Inf") == value(series, "mcpctl_call_seconds_count") == 3
    assert value(series, "mcpctl_call_seconds_sum") == pytest.approx(40.0035)
    assert value(series, "mcpctl_tenant_calls_total", tenant="acme", outcome="limited") == 1
    assert value(series, "mcpctl_audit_lines_total") == 2
    assert value(series, "mcpctl_audit_failures_total") == 1


def test_how_long_calls_took_is_told_by_tool_and_database_and_in_few_buckets_by_tenant() -> None:
    metrics = Metrics(["shop", "sales"])
    for database, milliseconds in (("shop", 3.0), ("shop", 10.0), ("sales", 700.0), ("sales", 90_000.0)):
        metrics.count("tool.called", call(database=database, tenant="acme", elapsed_ms=milliseconds), True)
    metrics.count("tool.called", call(tenant="acme", outcome="error", elapsed_ms=50.0), True)
    metrics.count("tool.called", call(tenant="globex", elapsed_ms=1.0), True)
    series = parsed(exposition({"0": metrics.samples()}))
    assert value(series, "mcpctl_call_seconds_count", database="shop") == 4
    assert value(series, "mcpctl_call_seconds_bucket", database="sales", le="1.0") == 1
    told = {le: value(series, "mcpctl_tenant_call_seconds_bucket", tenant="acme", le=le)
            for le in ("0.01", "0.1", "1.0", "10.0", "+Inf")}  # fmt: skip
    assert told == {"0.01": 2, "0.1": 3, "1.0": 4, "10.0": 4, "+Inf": 5}
    assert value(series, "mcpctl_tenant_call_seconds_sum", tenant="acme") == pytest.approx(90.763)
    assert sum(name == "mcpctl_tenant_call_seconds_bucket" for name, _ in series) == 10


def test_tokens_are_classed_by_the_days_that_they_have_left() -> None:
    said = {days: days_class(days) for days in (-1, 0, 0.99, 1, 6.9, 7, 29, 30, 89, 90, 1000, None)}
    assert said == {
        -1: "<1", 0: "<1", 0.99: "<1", 1: "1-7", 6.9: "1-7", 7: "7-30", 29: "7-30", 30: "30-90", 89: "30-90",
        90: ">90", 1000: ">90", None: "never",
    }  # fmt: skip


def test_what_alerts_look_at_is_there_from_the_start_so_that_its_first_event_is_an_increase() -> None:
    series = parsed(exposition({"0": Metrics().samples()}))
    for reason in ("revoked", "expired", "user_gone", "user_disabled", "wrong_secret"):
        assert series["mcpctl_auth_refused_total", frozenset({("reason", reason), ("worker", "0")})] == 0
    assert series["mcpctl_cut_backends_left_total", frozenset({("worker", "0")})] == 0


def test_written_lines_and_failures_are_told_apart_and_what_was_never_counted_is_no_series() -> None:
    metrics = Metrics(["shop"])
    assert not re.search("mcpctl_(audit|call|event)", exposition({"0": metrics.samples()}))
    metrics.count("tool.called", call(), False)
    metrics.count("tool.refused", call(outcome="limited"), None)
    series = parsed(exposition({"0": metrics.samples()}))
    assert value(series, "mcpctl_audit_failures_total") == 1
    assert not any(name.startswith(("mcpctl_audit_l", "mcpctl_events")) for name, _ in series)
    begun = time.time()
    metrics.count("token.expired", {}, True)
    series = parsed(exposition({"0": metrics.samples()}))
    assert value(series, "mcpctl_audit_lines_total") == value(series, "mcpctl_events_total", event="token.expired") == 1
    assert value(series, "mcpctl_audit_failures_total") == 1
    assert begun <= value(series, "mcpctl_audit_last_line_timestamp_seconds") <= time.time()
    assert metrics.minute.used()["ab12cd34"].calls == 2


def test_what_callers_make_up_makes_no_series() -> None:
    metrics = Metrics(["shop"])
    for number in range(1000):
        metrics.count("tool.refused", call(database=f"made-up-{number}"), True)
        metrics.count("tool.called", call(database=f"own:mine{number}"), True)
        metrics.count("tool.called", call(database=f"shop,sales{number}", token=f"t{number}"), True)
        metrics.connection_failed(f"own:mine{number}")
        metrics.count("auth.refused", {"reason": f"not from this address (192.0.2.{number})"}, None)
        metrics.cut(f"role r{number} was taken", 1, 0)
    series = parsed(exposition({"0": metrics.samples()}))
    assert len(series) < 100
    assert value(series, "mcpctl_calls_total", database="other") == 1000
    assert value(series, "mcpctl_calls_total", database="several") == 1000
    assert value(series, "mcpctl_calls_total", database="own") == 1000
    assert value(series, "mcpctl_auth_refused_total", reason="address") == 1000
    assert value(series, "mcpctl_cuts_total", reason="narrowed") == 1000


def test_every_refusal_of_the_authenticator_has_a_kind_of_its_own() -> None:
    source = "".join(Path(one.__file__).read_text(encoding="utf-8") for one in (authenticate, standing))
    said = re.findall(r'(?:UnauthorizedError\(|_is_over\(|return )\s*f?"([a-z][^"]+)"', source)
    said = [text for text in said if text not in ("removed", "revoked", "changed", "expired", "signed out")]
    assert len(said) >= 7
    for text in said:
        assert reason_class(re.sub(r"\{[^}]*\}", "expired", text)) != "other", text


def test_every_refused_credential_is_counted_however_few_are_listed(tmp_path: Path) -> None:
    class Book:
        lines, others = 0, None

        def add(self, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> None:
            self.lines += len(lines)

    book, metrics = Book(), Metrics()
    recorder = Recorder(book, "full", refuse=True, count=metrics.count)  # type: ignore[arg-type]
    for _ in range(500):
        recorder.auth_refused("192.0.2.1", "wrong secret")
    series = parsed(exposition({"0": metrics.samples()}))
    assert value(series, "mcpctl_auth_refused_total", reason="wrong_secret") == 500
    assert value(series, "mcpctl_events_total", event="auth.refused") == book.lines == STRANGERS_IN_FULL
    assert metrics.minute.strangers() == 500


def test_refused_sign_ins_are_told_on_stderr_with_the_address_last_and_boundedly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Book:
        others = None

        def add(self, *lines: tuple[str, dict[str, Any]], at_once: bool = False) -> None:
            pass

    recorder = Recorder(Book(), "full", refuse=True)  # type: ignore[arg-type]
    for _ in range(100):
        recorder.auth_refused("2001:db8::7", "wrong secret")
    recorder.auth_refused("192.0.2.9", "not from this address (192.0.2.9)")
    recorder.auth_refused("192.0.2.9", "no credential")
    lines = [record.getMessage() for record in caplog.records]
    page = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")
    pattern = re.findall(r"^failregex = (.*)$", page, flags=re.MULTILINE)[0].replace("<HOST>", "(?P<host>[0-9a-f.:]+)")
    for before in (
        "vm mcpctl[714]: ",  # the journal's
        " WARNING mcpctl.audit: ",  # a file's, without its time
        "vm mcpctl[714]: 2026-11-20 13:05:10,188 WARNING mcpctl.audit: ",  # text that the journal was handed
    ):
        found = [re.search(pattern, before + line) for line in lines]
        hosts = [one["host"] if one else None for one in found]
        assert hosts == ["2001:db8::7"] * STRANGERS_IN_FULL + ["192.0.2.9", None]
    for forged in (" DEBUG mcpctl.sql: request 1f: select 1 -- ", "", "vm mcpctl[714]: request 1f: select 1 -- "):
        assert re.search(pattern, f"{forged}{lines[0]}") is None
    assert lines[0] == "Unauthorized: wrong secret client=2001:db8::7"
    assert lines[-2] == "Unauthorized: not from this address (192.0.2.9) client=192.0.2.9"
    assert len(lines) == STRANGERS_IN_FULL + 2


def test_the_last_minute_forgets_what_is_older() -> None:
    now = 1000.0
    minute = LastMinute(lambda: now)
    minute.call("ab12cd34", "alice", "192.0.2.1", "ok", 2)
    now += 30
    minute.call("ab12cd34", "alice", "192.0.2.2", "error", 2)
    minute.call("other", "alice", "192.0.2.1", "limited")
    minute.stranger()
    used = minute.used()
    assert (used["ab12cd34"].calls, used["ab12cd34"].failed, used["ab12cd34"].rows) == (2, 1, 4)
    assert used["ab12cd34"].addresses == {"192.0.2.1", "192.0.2.2"}
    assert used["other"].refused == 1
    now += 40
    assert minute.used()["ab12cd34"].calls == 1
    now += 40
    assert minute.used() == {}
    assert minute.strangers() == 0


# -- the text -------------------------------------------------------------------------------------------------------


def test_the_text_is_what_both_of_prometheus_parsers_read() -> None:
    metrics = Metrics(["shop"])
    metrics.count("tool.called", call(tenant='a"b\\c\nd'), True)
    metrics.count("token.expired", {}, True)
    two = {"0": metrics.samples(), "1": metrics.samples(), "": [("mcpctl_database_up", ["shop"], 1.0)]}
    series = parsed(exposition(two))
    assert value(series, "mcpctl_tenant_calls_total", tenant='a"b\\c\nd', worker="1") == 1
    assert value(series, "mcpctl_database_up") == 1
    found = list(openmetrics.text_string_to_metric_families(exposition(two, openmetrics=True)))
    assert {family.name for family in found} == {name for samples in two.values() for name, _, _ in samples}
    for family in found:
        assert (family.type, family.documentation) == (FAMILIES[family.name].kind, FAMILIES[family.name].help)


def test_the_page_lists_every_metric_and_no_other() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.MULTILINE)
    expected = [
        (name + ("_total" if family.kind == "counter" else ""), ", ".join(f"`{label}`" for label in family.labels))
        for name, family in FAMILIES.items()
    ]
    assert [(name, labels.strip()) for name, labels in listed] == expected


def test_the_alert_rules_name_metrics_that_there_are() -> None:
    rules = (Path(__file__).parent.parent / "packaging" / "prometheus" / "mcpctl.rules.yaml").read_text("utf-8")
    names = set(re.findall(r"\b((?:mcpctl|process)_[a-z_]+)\b", rules))
    known = {
        name + end
        for name, family in FAMILIES.items()
        for end in (["_bucket", "_sum", "_count"] if family.kind == "histogram" else
                    ["_total"] if family.kind == "counter" else [""])
    }  # fmt: skip
    assert names
    assert names <= known, names - known


# -- the listener ---------------------------------------------------------------------------------------------------


def listener(site: Site) -> str:
    """Where the server says that its metrics are."""
    return eventually(lambda: next(iter(re.findall(r"metrics at (\S+)", "".join(site.stderr))), None))


def scrape(url: str, **options: Any) -> Series:
    answer = httpx.get(url, trust_env=False, **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def test_one_scrape_tells_of_all_workers_and_nothing_is_added_up_that_falls_when_one_dies(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    site = make_site(newest_shop, extra=ON).start("--workers", "3")
    url, (_, token) = listener(site), site.token()

    def asked_all() -> bool:
        with site.client(token) as client:  # a connection of its own, so that any worker may get it
            client.rows("select 1")
        series = scrape(url)
        workers = {dict(labels)["worker"] for name, labels in series if name == "mcpctl_calls_total"}
        return workers == {"0", "1", "2"}

    eventually(asked_all, 30)
    before = scrape(url)
    assert value(before, "mcpctl_workers", state="answering") == value(before, "mcpctl_workers", state="wanted") == 3
    assert value(before, "mcpctl_tokens", status="active") + value(before, "mcpctl_tokens", status="expiring") == 1
    assert 0 < value(before, "mcpctl_token_next_expiry_seconds") <= 3600
    assert value(before, "mcpctl_database_up", database="shop") == 1
    assert value(before, "mcpctl_pool_connections", database="shop", state="idle") >= 1
    assert value(before, "process_resident_memory_bytes", worker="1") > 1e6
    assert value(before, "mcpctl_config_changed") == 0

    pids = json.loads(site.run("status", "--json").stdout)["servers"][0]["pids"]
    os.kill(pids[0], signal.SIGKILL)
    began = value(before, "process_start_time_seconds", worker="0")
    eventually(lambda: value(scrape(url), "process_start_time_seconds", worker="0") > began, 30)
    after = scrape(url)
    for (name, labels), number in before.items():
        if name == "mcpctl_calls_total" and dict(labels)["worker"] != "0":
            assert after[name, labels] >= number  # the others' counts are what they were; worker 0 begins at zero
    assert value(after, "mcpctl_calls_total", worker="0") == 0
    with site.config.open("a") as file:
        file.write("# changed\n")
    assert value(scrape(url), "mcpctl_config_changed") == 1


def test_a_worker_that_hangs_is_left_out_and_counted(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    site = make_site(newest_shop, extra=ON).start("--workers", "2")
    url = listener(site)
    pids = json.loads(site.run("status", "--json").stdout)["servers"][0]["pids"]
    os.kill(pids[0], signal.SIGSTOP)
    try:
        done = site.run("status", check=False)
        assert done.returncode == 0
        assert f"process {pids[0]}: no answer in time" in done.stderr
        assert "1 of 2 answer" in done.stdout

        def told() -> bool:  # a connection that the stopped one was given is not answered
            try:
                return value(scrape(url, timeout=5), "mcpctl_workers", state="answering") == 1
            except httpx.TimeoutException:
                return False

        eventually(told, 40)
    finally:
        os.kill(pids[0], signal.SIGCONT)


def test_revocations_refusals_and_events_are_counted_where_they_happen(
    newest_shop: Shop, make_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = make_site(newest_shop, extra=f"{ON}backup: {{directory: {tmp_path}}}\n").start()
    url, (name, token) = listener(site), site.token()
    with site.client(token) as client:
        client.rows("select 1")
        assert "no question" in client.error("delete from customers")
        client.error("select 1", database="globex")
        client.call("query_database", {"qeury": "select 1"})
        client.call("made_up")
        running = in_background(client.call, "query_database", {"query": "select pg_sleep(30)"})
        eventually(lambda: site.shop.backends("state = 'active'"))
        assert value(scrape(url), "mcpctl_calls_running") == 1
        site.run("token", "revoke", name)
        assert running.result().status_code == 401
        assert client.call("whoami").status_code == 401
    series = scrape(url)
    assert value(series, "mcpctl_cuts_total", reason="revoked") == value(series, "mcpctl_cut_queries_total") == 1
    assert value(series, "mcpctl_auth_refused_total", reason="revoked") == 1
    assert value(series, "mcpctl_calls_total", outcome="cut") == 1
    assert value(series, "mcpctl_events_total", event="pool.closed") == 1
    refused = ("not_a_question", "forbidden", "arguments", "unknown_tool")
    assert [value(series, "mcpctl_calls_refused_total", reason=reason) for reason in refused] == [1, 1, 1, 1]
    assert value(series, "mcpctl_tokens", status="revoked") == 1
    assert value(series, "mcpctl_tokens_by_days_left") == 0
    assert value(series, "mcpctl_audit_waiting_lines") == 0
    assert value(series, "mcpctl_audit_lag_seconds") < 60
    told = {name.removesuffix("_total").removesuffix("_count") for name, _ in series}
    assert {name for name in FAMILIES if name not in told} == {  # which need what did not happen here
        "mcpctl_audit_failures", "mcpctl_connection_errors", "mcpctl_tenant_calls", "mcpctl_tenant_rows",
        "mcpctl_tenant_call_seconds", "mcpctl_tls_cert_expiry_seconds", "mcpctl_token_next_expiry_seconds",
        "mcpctl_pools", "mcpctl_pool_connections", "mcpctl_pool_waiting",
    }  # fmt: skip
    assert value(series, "mcpctl_audit_failing") == 0
    assert value(series, "mcpctl_backup_last_timestamp_seconds") == 0
    for when in ("20261127T020000Z", "20261128T020000Z"):
        (tmp_path / f"mcpctl-{when}.tar.gz.age").touch()
    made = datetime(2026, 11, 28, 2, tzinfo=UTC).timestamp()
    assert value(scrape(url), "mcpctl_backup_last_timestamp_seconds") == made
    assert abs(value(series, "mcpctl_audit_last_line_timestamp_seconds") - time.time()) < 60


def test_connections_that_fail_are_counted_by_database(newest_shop: Shop, make_site: Callable[..., Site]) -> None:
    gone = "  gone: {host: /nonexistent, dbname: shop, user: reader, required: false}\n"
    site = make_site(newest_shop, database=gone, extra=ON).start()
    url, (_, token) = listener(site), site.token()
    with site.client(token) as client:
        client.error("select 1", database="gone")
    series = scrape(url)
    assert value(series, "mcpctl_connection_errors_total", database="gone") >= 1
    assert value(series, "mcpctl_database_up", database="gone") == 0
    assert value(series, "mcpctl_database_up", database="shop") == 1


def test_the_listener_answers_what_it_is_for_and_turns_the_rest_away(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    site = make_site(newest_shop, extra=ON).start()
    url = listener(site)
    host, port = re.findall(r"//(.*):(\d+)/", url)[0]
    found = httpx.get(url, headers={"Accept": "application/openmetrics-text"}, trust_env=False)
    assert found.headers["content-type"].startswith("application/openmetrics-text")
    assert list(openmetrics.text_string_to_metric_families(found.text))
    assert httpx.get(url.replace("/metrics", "/"), trust_env=False).status_code == 404
    assert httpx.post(url, trust_env=False).status_code == 405
    assert httpx.get(url, headers={"Host": "evil.example"}, trust_env=False).status_code == 421
    assert httpx.get(url, headers={"Host": "[::1]"}, trust_env=False).status_code == 200
    assert httpx.get(site.url.replace("/mcp", "/metrics"), trust_env=False).status_code == 404
    for sent in (b"rubbish\r\n\r\n", b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as one:
            one.sendall(sent)
            one.shutdown(socket.SHUT_WR)
            assert not one.recv(65536).startswith(b"HTTP/1.1 200")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(40)]
    for _ in range(5):  # more at once than there is room for, and they keep nobody out who asks
        assert httpx.get(url, trust_env=False).status_code == 200
    for name in ("[::1]", f"[::1]:{port}", "localhost"):
        assert httpx.get(url, headers={"Host": name}, trust_env=False).status_code == 200
    for one in silent:
        one.close()


def test_another_address_than_loopback_needs_the_config_to_say_so(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    file.write_text("metrics: {host: 0.0.0.0, port: 9464}\n")
    with pytest.raises(ConfigError, match=r"metrics\.host: is not this machine's alone"):
        config.load(file, {})
    file.write_text("metrics: {host: 0.0.0.0, port: 9464, allow_remote: true}\n")
    assert config.load(file, {}).metrics.allow_remote
    file.write_text("metrics: {host: 0.0.0.0}\n")
    assert config.load(file, {}).metrics.port is None
