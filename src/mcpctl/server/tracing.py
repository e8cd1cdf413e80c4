"""OpenTelemetry traces: a span for each call, and within it one for each database that it asks.

What the spans are called and say is by OpenTelemetry's conventions for MCP and PostgreSQL. A caller's trace comes in
by `traceparent` and `tracestate`, in the request's `_meta` (SEP-414) or else in the HTTP headers (W3C Trace Context).
The libraries are an extra, `mcpctl[otel]`, and are imported only where the config has an endpoint.
"""

import asyncio
import importlib.util
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from threading import Thread
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any

from mcpctl import __version__
from mcpctl.calls import Calls
from mcpctl.config_keys import Tracing
from mcpctl.errors import ConfigError, Error
from mcpctl.facts import Answer, Facts, Request
from mcpctl.identity.principal import Principal
from mcpctl.tools.table import TOOLS

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

log = logging.getLogger("mcpctl.tracing")
Call = Callable[[Principal, str, "Mapping[str, Any] | None", Request], Awaitable[Answer]]
"""What answers a call: `Calls.call`, or that with a span around it."""
CARRIED = ("traceparent", "tracestate")
LINKED = "linked"
"""The name under which the HTTP request's own trace is carried, where its `_meta` has another."""
_EXPORT = 5.0
"""Seconds that the receiver has for one batch of spans."""
_LAST = 3.0
"""Seconds that the last spans have to leave when the server ends."""


def check(chosen: Tracing) -> None:
    """Refuse an endpoint where nothing can be sent. Raises ConfigError."""
    if chosen.endpoint is not None and _missing():
        raise ConfigError("tracing.endpoint needs OpenTelemetry's libraries", "pip install 'mcpctl[otel]'")


def _missing() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is None
    except ModuleNotFoundError:
        return True


class Traces:
    """Calls with spans around them. One for each config that comes into force."""

    def __init__(self, chosen: Tracing, calls: Calls) -> None:
        check(chosen)
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._calls = calls
        self._otel = trace
        self._propagator = TraceContextTextMapPropagator()
        about = {"service.version": __version__}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            about["service.name"] = "mcpctl"
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(chosen.sample)),
            resource=Resource.create(about),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(chosen.endpoint, timeout=_EXPORT)))
        self._tracer = self._provider.get_tracer("mcpctl", __version__)

    async def call(
        self, principal: Principal, name: str, arguments: Mapping[str, Any] | None, request: Request
    ) -> Answer:
        """`Calls.call`, within a span."""
        tool = name if name in TOOLS else "(unknown)"
        span, begun = self._begin(tool, principal, request), (time_ns(), monotonic())
        failed: str | None = "cancelled"
        try:
            answer = await self._calls.call(principal, name, arguments, request)
            failed = "tool_error" if answer.is_error else None
            return answer
        except Error as problem:
            failed = str(problem.status)
            raise
        finally:
            try:
                if span.is_recording() and request.facts is not None:
                    self._end(span, request.facts, begun, failed)
            except Exception:
                log.exception("request %s has no trace", request.id, extra={"about": {"request_id": request.id}})
            span.end()

    def _begin(self, tool: str, principal: Principal, request: Request) -> "Span":
        carried = request.carried or {}
        linked = self._context({"traceparent": carried.get(LINKED)})
        link = self._otel.get_current_span(linked).get_span_context()
        span = self._tracer.start_span(
            f"tools/call {tool}",
            self._context(carried),
            self._otel.SpanKind.SERVER,
            _known(
                {
                    "mcp.method.name": "tools/call",
                    "gen_ai.operation.name": "execute_tool",
                    "gen_ai.tool.name": tool,
                    "jsonrpc.request.id": None if request.rpc_id is None else str(request.rpc_id),
                    "network.transport": "pipe" if request.transport == "stdio" else "tcp",
                    "client.address": request.client_ip,
                    "mcpctl.request_id": request.id,
                    "mcpctl.token": principal.token,
                    "mcpctl.user": principal.user,
                    "mcpctl.tenant": principal.tenant,
                }
            ),
            [self._otel.Link(link)] if link.is_valid else [],
        )
        if span.is_recording():
            request.trace = f"{span.get_span_context().trace_id:032x}"
        return span

    def _context(self, carried: Mapping[str, Any]) -> "Context":
        """The trace that a caller says it is in; an empty one where that is none."""
        from opentelemetry.context import Context

        texts = {name: carried[name] for name in CARRIED if isinstance(carried.get(name), str)}
        return self._propagator.extract(texts, Context())

    def _end(self, span: "Span", facts: Facts, begun: tuple[int, float], failed: str | None) -> None:
        """Say how it ended, and what was asked of which database."""
        values = facts.values
        outcome = "limited" if facts.limited is not None else values.get("outcome")
        span.set_attributes(
            _known({"mcpctl.outcome": outcome, "mcpctl.rows": values.get("rows"), "error.type": failed})
        )
        within, alone = self._otel.set_span_in_context(span), len(facts.asked) == 1
        for database, since, until in facts.asked:
            child = self._tracer.start_span(
                database,
                within,
                self._otel.SpanKind.CLIENT,
                {"db.system.name": "postgresql", "db.namespace": database, **(_asked(values) if alone else {})},
                start_time=_at(begun, since),
            )
            if alone and failed is not None:
                child.set_status(self._otel.StatusCode.ERROR, outcome)
            child.end(_at(begun, until))
        if failed is not None:
            span.set_status(self._otel.StatusCode.ERROR, outcome)

    async def close(self) -> None:
        """Send what is left, for some seconds, and end."""
        ending = Thread(target=self._provider.shutdown, name="the last traces", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _LAST)


def _asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a call's audit line says of the one database that it has asked. The statement's text is there only where
    the config keeps it."""
    reason = str(values.get("reason") or "")
    state = reason.removeprefix("SQLSTATE ") if reason.startswith("SQLSTATE ") else None
    return _known(
        {
            "db.query.text": values.get("statement"),
            "db.response.status_code": state,
            "error.type": state,
            "db.response.returned_rows": values.get("rows"),
            "mcpctl.role": values.get("role"),
            "mcpctl.backend_pid": values.get("backend_pid"),
        }
    )


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _at(begun: tuple[int, float], moment: float) -> int:
    """A time of the monotonic clock as one of the wall's, in nanoseconds."""
    return begun[0] + int((moment - begun[1]) * 1e9)


def of_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, Any] | None:
    """The trace that an HTTP request says it is part of; None where there is none, or are several."""
    found = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    if len(found) != 1:
        return None
    states = [value.decode("latin-1") for name, value in headers if name == b"tracestate"]
    return {"traceparent": found[0], "tracestate": ",".join(states)}


def of_message(around: Mapping[str, Any] | None, meta: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """That of a message's `_meta`, with that of the HTTP request `around` it as a link; or else that one."""
    within = {name: value for name, value in (meta or {}).items() if name in CARRIED}
    if not isinstance(within.get("traceparent"), str):
        return around
    return {**within, LINKED: around["traceparent"]} if around is not None else within
