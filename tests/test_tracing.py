"""OpenTelemetry traces, as a real receiver of OTLP gets them: what a call is part of, what it asks, what it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from command_line import Home
from mcpctl.config_keys import Tracing
from mcpctl.errors import ConfigError
from mcpctl.server import tracing
from site_of_mcpctl import Client, Shop, Site, eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "11111111111111111111111111111111"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
NAME = "select current_setting('application_name')"


class Receiver:
    """Where an OTLP exporter sends: an HTTP server that reads what comes with the protocol's own classes."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    receiver.resource = attributes(group.resource)
                    for scope in group.scope_spans:
                        receiver.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def of(self, request: str) -> tuple[Span, list[Span]]:
        """A request's span, and those within it."""
        (span,) = [one for one in self.spans if attributes(one).get("mcpctl.request_id") == request]
        return span, [one for one in self.spans if one.parent_span_id == span.span_id]


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.server.shutdown()
    found.server.server_close()


def ask(client: Client, query: str, meta: dict[str, Any] | None = None, **headers: str) -> str:
    """Ask, and the request's id."""
    params: dict[str, Any] = {"name": "query_database", "arguments": {"query": query}}
    if meta is not None:
        params["_meta"] = meta
    body = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
    answer = client.http.post(client.url, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    client.said = answer.json()["result"]["content"][0]["text"]  # type: ignore[attr-defined]
    return str(answer.headers["x-request-id"])


@contextmanager
def served(site: Site, *arguments: str) -> Iterator[Site]:
    site.start(*arguments)
    yield site
    assert site.stop() in (0, -15)


def test_a_call_is_a_span_of_its_callers_trace_in_both_lanes_and_postgresql_knows_it(
    newest_shop: Shop, make_site: Callable[..., Site], receiver: Receiver
) -> None:
    with served(make_site(newest_shop, extra=f"tracing: {{endpoint: '{receiver.url}'}}\n")) as site:
        token, text = site.token()
        with site.client(text) as client:
            slow = {"anything/else": 1}  # which the express lane leaves to the SDK
            asked = {
                "express": ask(client, NAME, {"traceparent": PARENT}),
                "sdk": ask(client, NAME, {"traceparent": PARENT, **slow}),
                "header": ask(client, NAME, traceparent=PARENT),
                "header, sdk": ask(client, NAME, slow, traceparent=PARENT),
                "both": ask(client, NAME, {"traceparent": PARENT}, traceparent=PARENT.replace(TRACE, OTHER)),
            }
            named = f"mcpctl {token} {TRACE}"
            assert json.loads(client.said)["rows"] == [[named]]  # type: ignore[attr-defined]
            again = ask(client, NAME)
            assert TRACE not in client.said  # type: ignore[attr-defined]
            wrong = [ask(client, NAME, {"traceparent": one}) for one in ("00-zz-b7-01", 5, None, ["x"])]
            failed, refused = ask(client, "select 1/0"), ask(client, "create table t ()")
            unsampled = ask(client, NAME, {"traceparent": PARENT[:-1] + "0"})
            assert json.loads(client.said)["rows"] == [[f"mcpctl {token}"]]  # type: ignore[attr-defined]
        idle = {name for _, name, _, _ in newest_shop.backends("state = 'idle'")}
        assert idle <= {f"mcpctl {token}", "mcpctl cut"}
        audit = {line["request_id"]: line for line in site.audit() if line["event"].startswith("tool.")}
        assert not any({"trace", "trace_id"} & line.keys() for line in audit.values())
    for lane, request in asked.items():
        span, (child,) = receiver.of(request)
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, "b7ad6b7169203331"), lane
        assert (span.kind, child.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
        assert child.trace_id == span.trace_id
        assert [link.trace_id.hex() for link in span.links] == ([OTHER] if lane == "both" else [])
        about, of_database, line = attributes(span), attributes(child), audit[request]
        assert span.name == "tools/call query_database"
        assert about["mcp.method.name"] == "tools/call"
        assert about["gen_ai.tool.name"] == "query_database"
        assert (about["mcpctl.user"], about["mcpctl.token"], about["mcpctl.outcome"]) == ("alice", token, "ok")
        assert (about["jsonrpc.request.id"], about["network.transport"]) == ("7", "tcp")
        assert (of_database["db.system.name"], of_database["db.namespace"]) == ("postgresql", "shop")
        assert of_database["db.query.text"] == NAME
        assert of_database["mcpctl.backend_pid"] == line["backend_pid"]
        assert of_database["db.response.returned_rows"] == 1
        assert span.start_time_unix_nano <= child.start_time_unix_nano < child.end_time_unix_nano
        assert child.end_time_unix_nano <= span.end_time_unix_nano + 1_000_000
        assert "error.type" not in about
    for request in (again, *wrong):
        span, _ = receiver.of(request)
        assert (span.trace_id.hex() == TRACE, span.parent_span_id) == (False, b"")
    span, (child,) = receiver.of(failed)
    assert (span.status.code, child.status.code) == (Status.STATUS_CODE_ERROR, Status.STATUS_CODE_ERROR)
    assert attributes(span)["error.type"] == "tool_error"
    assert attributes(child)["error.type"] == attributes(child)["db.response.status_code"] == "22012"
    span, (child,) = receiver.of(refused)
    assert attributes(span)["mcpctl.outcome"] == "refused"
    assert "db.query.text" not in attributes(child)
    assert not [one for one in receiver.spans if attributes(one).get("mcpctl.request_id") == unsampled]
    assert receiver.resource["service.name"] == "mcpctl"


def test_statements_stay_out_of_traces_where_they_stay_out_of_the_audit_log_and_logs_know_the_trace(
    newest_shop: Shop, make_site: Callable[..., Site], receiver: Receiver
) -> None:
    log = "log: {level: debug, format: json, file: server.log}\naudit: {statements: hash}\n"
    with served(
        make_site(newest_shop, extra=f"{log}tracing: {{endpoint: '{receiver.url}'}}\n"), "--workers", "2"
    ) as at:
        with at.client(at.token()[1]) as client:
            request = ask(client, "select 'hidden'", {"traceparent": PARENT})
        found = [json.loads(line) for line in (at.folder / "server.log").read_text().splitlines()]
        assert [one["request_id"] for one in found if one.get("trace_id") == TRACE] == [request]
    _, (child,) = receiver.of(request)
    assert "hidden" not in str(child)


def test_a_part_of_the_calls_is_what_the_config_says_and_a_dead_receiver_holds_up_nothing(
    newest_shop: Shop, make_site: Callable[..., Site], receiver: Receiver
) -> None:
    at = make_site(newest_shop, extra=f"tracing: {{endpoint: '{receiver.url}', sample: 0}}\n").start()
    with at.client(at.token()[1]) as client:
        ask(client, NAME)
        wanted = ask(client, NAME, {"traceparent": PARENT})
        text = (
            at.config.read_text()
            .replace(receiver.url, "http://127.0.0.1:9/v1/traces")
            .replace("sample: 0", "sample: 1")
        )
        at.config.write_text(text)
        at.run("config", "reload")
        eventually(lambda: receiver.spans)  # those of the config before leave when it ends
        ask(client, NAME, {"traceparent": PARENT, "tracestate": "Unauthorized: client=192.0.2.7"})
    assert {attributes(one).get("mcpctl.request_id") for one in receiver.spans} == {wanted, None}
    assert at.stop() in (0, -15)
    assert "Traceback" not in "".join(at.stderr)
    assert "192.0.2.7" not in "".join(at.stderr)  # no text of a caller's in the log


def test_the_config_says_what_is_wrong_with_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    before = home.config.read_text()
    for text in ("{endpoint: 'ftp://x/'}", "{endpoint: 'http://u:geheim@x/'}", "{endpoint: x}", "{sample: 2}"):
        home.config.write_text(f"{before}tracing: {text}\n")
        done = home("config", "check")
        assert (done.code, "tracing." in done.error, "geheim" in done.err) == (3, True, False), done.err
    monkeypatch.setattr(tracing, "_missing", lambda: True)
    with pytest.raises(ConfigError, match=r"needs OpenTelemetry") as found:
        tracing.check(Tracing(endpoint="http://127.0.0.1:4318/v1/traces"))
    assert found.value.hint == "pip install 'mcpctl[otel]'"
