"""Counters, gauges and histograms, and Prometheus' text format. Pure: nothing is asked for here, and nothing is sent.

Every label's value comes from a list that we have: tools, outcomes, events, the config's databases, the tenant file.
Never an address, a statement, or an id that a stranger has made up; so the number of series is bounded.

What a process counts has the label `worker`, the number of its place in the server. A worker that dies takes its counts
with it. Its successor begins at zero under the same label, which Prometheus takes for the restart that it is. One sum
over all workers would fall instead, and be read as a burst of calls.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from time import time
from typing import Any, NamedTuple

from mcpctl.last_minute import LastMinute

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds in seconds; the last bucket is without one."""
FEW = (0.01, 0.1, 1.0, 10.0)
"""Those of BUCKETS that are told of each tenant, of which there may be hundreds."""
DAYS, DAYS_LEFT = (1, 7, 30, 90), ("<1", "1-7", "7-30", "30-90", ">90", "never")
"""Where the classes of `mcpctl_tokens_by_days_left` end, and their names."""
REFUSED = "refused"
"""What `Metrics.count` hears, beside a refused call's own event, with the kind of the refusal as its reason."""
SEVERAL, OTHER = "several", "other"
"""Stand for the databases of a call to several at once, and for names that the config does not have."""
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Family(NamedTuple):
    """One metric. Counters get `_total` behind their name. `shared`: it is the whole server's, not one worker's.
    `buckets`: a histogram's."""

    kind: str
    labels: tuple[str, ...]
    help: str
    shared: bool = False
    buckets: tuple[float, ...] = BUCKETS


FAMILIES: dict[str, Family] = {
    "mcpctl_calls": Family("counter", ("tool", "database", "outcome"), "Calls of tools."),
    "mcpctl_call_seconds": Family("histogram", ("tool", "database"), "How long calls took."),
    "mcpctl_call_rows": Family("counter", ("database",), "Rows in answers."),
    "mcpctl_call_bytes": Family("counter", ("database",), "Bytes of rows in answers."),
    "mcpctl_calls_refused": Family("counter", ("reason",), "Calls that were refused, or too much."),
    "mcpctl_calls_running": Family("gauge", (), "Calls that run now."),
    "mcpctl_tenant_calls": Family("counter", ("tenant", "outcome"), "Calls of a tenant's users."),
    "mcpctl_tenant_rows": Family("counter", ("tenant",), "Rows in answers to a tenant's users."),
    "mcpctl_tenant_call_seconds": Family(
        "histogram", ("tenant",), "How long calls of a tenant's users took.", buckets=FEW
    ),
    "mcpctl_auth_refused": Family("counter", ("reason",), "Credentials that were refused."),
    "mcpctl_events": Family("counter", ("event",), "Events that the server meant for the audit log."),
    "mcpctl_cuts": Family("counter", ("reason",), "Tokens whose open work was ended."),
    "mcpctl_cut_queries": Family("counter", (), "Queries that were cancelled when their token ended."),
    "mcpctl_cut_backends_left": Family("counter", (), "Backends that were still there when a token was cut."),
    "mcpctl_audit_lines": Family("counter", (), "Audit lines written."),
    "mcpctl_audit_failures": Family("counter", (), "Audit lines that could not be written."),
    "mcpctl_audit_failing": Family("gauge", (), "1 while the audit log cannot be written."),
    "mcpctl_audit_last_line_timestamp_seconds": Family("gauge", (), "When this worker last wrote an audit line."),
    "mcpctl_audit_lag_seconds": Family("gauge", (), "For how long audit lines have not been on disk."),
    "mcpctl_audit_waiting_lines": Family("gauge", (), "Audit lines that wait until the log can be written."),
    "mcpctl_pools": Family("gauge", ("database",), "Open pools, one a token and database."),
    "mcpctl_pool_connections": Family("gauge", ("database", "state"), "Connections to PostgreSQL."),
    "mcpctl_pool_waiting": Family("gauge", ("database",), "Calls that wait for a connection."),
    "mcpctl_connection_budget": Family("gauge", (), "Connections that this worker may have."),
    "mcpctl_connection_errors": Family("counter", ("database",), "Connections that could not be made."),
    "mcpctl_database_up": Family("gauge", ("database",), "1 where PostgreSQL takes connections.", shared=True),
    "mcpctl_tokens": Family("gauge", ("status",), "Tokens in the token file.", shared=True),
    "mcpctl_tokens_by_days_left": Family("gauge", ("days",), "Living tokens, by the days that they have.", shared=True),
    "mcpctl_token_next_expiry_seconds": Family(
        "gauge", (), "Seconds until the next living token expires; left out where none does.", shared=True
    ),
    "mcpctl_files_broken": Family("gauge", (), "1 while nobody can say who may come in.", shared=True),
    "mcpctl_locked": Family("gauge", (), "1 during a lockdown.", shared=True),
    "mcpctl_config_loaded_timestamp_seconds": Family("gauge", (), "Since when the config is in force."),
    "mcpctl_config_changed": Family(
        "gauge", (), "1 while the config file is another than the one in force.", shared=True
    ),
    "mcpctl_tls_cert_expiry_seconds": Family("gauge", (), "Seconds until the certificate ends.", shared=True),
    "mcpctl_backup_last_timestamp_seconds": Family(
        "gauge", (), "When the newest backup in backup.directory was begun; 0 where there is none.", shared=True
    ),
    "mcpctl_workers": Family("gauge", ("state",), "Workers: wanted, and answering this scrape.", shared=True),
    "mcpctl_event_loop_lag_seconds": Family("gauge", (), "The longest delay of the event loop in the last 15 to 30 s."),
    "mcpctl_connections_turned_away": Family(
        "counter", (), "Connections of clients that were closed for want of file descriptors."
    ),
    "mcpctl_build_info": Family("gauge", ("version", "python"), "Always 1.", shared=True),
    "process_resident_memory_bytes": Family("gauge", (), "Memory in use."),
    "process_open_fds": Family("gauge", (), "Open file descriptors."),
    "process_max_fds": Family("gauge", (), "File descriptors that may be open."),
    "process_cpu_seconds": Family("counter", (), "Processor time used."),
    "process_start_time_seconds": Family("gauge", (), "When the process began."),
}

_REFUSED = (
    ("no credential", "no_credential"),
    ("not one of our tokens", "malformed"),
    ("no such token id", "unknown"),
    ("wrong secret", "wrong_secret"),
    ("too many wrong passwords", "too_many_passwords"),
    ("too many sign-ins", "busy"),
    ("too many", "too_many"),
    ("the token is expired", "expired"),
    ("the token is revoked", "revoked"),
    ("the token is blocked", "blocked"),
    ("not from this address", "address"),
    ("a token in the URL", "in_url"),
    ("another scheme", "malformed"),
    ("two credentials", "malformed"),
    ("the header ", "malformed"),
    ("no such session", "unknown"),
    ("wrong password", "wrong_password"),
    ("may not ", "forbidden"),
    ("no such user", "unknown"),
    ("no password", "no_password"),
    ("its user's password was changed", "password_changed"),
)
_USER = ((" is gone", "user_gone"), (" is disabled", "user_disabled"))
_CUT = (
    "removed", "revoked", "changed", "expired", "blocked", "its user is gone", "signed out",
    "its user's password was changed",
)  # fmt: skip

_FROM_ZERO: dict[tuple[str, tuple[str, ...]], float] = {
    ("mcpctl_cut_queries", ()): 0,
    ("mcpctl_cut_backends_left", ()): 0,
    **{("mcpctl_auth_refused", (name,)): 0 for _, name in (*_REFUSED, *_USER)},
}
"""What alerts look at: increase() does not see the first event of a series that was not there before."""


def days_class(days: float | None) -> str:
    """The class of a token that has so many days left, or no end (None)."""
    if days is None:
        return "never"
    return next((name for end, name in zip(DAYS, DAYS_LEFT, strict=False) if days < end), DAYS_LEFT[-2])


def reason_class(reason: str) -> str:
    """The kind of a refusal of a credential: one of a dozen words, whatever the reason names."""
    for begin, name in _REFUSED:
        if reason.startswith(begin):
            return name
    return next((name for end, name in _USER if reason.endswith(end)), OTHER)


@dataclass(slots=True)
class _Calls:
    """Calls of the same labels. `buckets`: how long they took, and last the sum."""

    buckets: list[float] = field(default_factory=lambda: [0.0] * (len(BUCKETS) + 2))
    calls: int = 0
    rows: int = 0
    bytes: int = 0


Value = float | list[float]
Sample = tuple[str, list[str], Value]
"""A family's name, the values of its labels, and its value; a histogram's is its buckets and, last, the sum."""


class Metrics:
    """What one process counts. `databases` are the names of the config's."""

    def __init__(self, databases: Iterable[str] = (), minute: LastMinute | None = None) -> None:
        self._databases: frozenset[str] = frozenset(databases)
        self._values: dict[tuple[str, tuple[str, ...]], float] = dict(_FROM_ZERO)
        self._calls: dict[tuple[str, str | None, str, str | None], _Calls] = {}
        self._lines = self._failures = 0
        self._last_line = 0.0
        self.minute = minute or LastMinute()

    def know(self, databases: Iterable[str]) -> None:
        """Take note of the databases of a config that comes into force: each has a series of its own."""
        self._databases |= frozenset(databases)

    def _add(self, name: str, labels: tuple[str, ...], value: float = 1) -> None:
        key = (name, labels)
        self._values[key] = self._values.get(key, 0) + value

    def _database(self, name: str | None) -> str:
        if name is None or name in self._databases:
            return name or ""
        return SEVERAL if "," in name else "own" if ":" in name else OTHER

    def count(self, event: str, fields: Mapping[str, Any], written: bool | None) -> None:
        """One event with the fields of its audit line. `written`: whether the line is in the log; None where there is
        to be none, as for the refusals of strangers beyond the first."""
        if event == "tool.called" or event == "tool.refused":
            self._call(fields)
            if written is None:
                return
        elif event == REFUSED:
            self._add("mcpctl_calls_refused", (fields["reason"],))
            return
        elif event == "auth.refused" and written is None:
            self._add("mcpctl_auth_refused", (reason_class(fields["reason"]),))
            self.minute.stranger()
            return
        else:
            self._add("mcpctl_events", (event,))
        if written:
            self._lines += 1
            self._last_line = time()
        else:
            self._failures += 1

    def _call(self, fields: Mapping[str, Any]) -> None:
        """Kept together, since this is on every call's way, and told apart when somebody asks."""
        value = fields.get
        tool, outcome = value("tool") or "", fields["outcome"]
        used = self._calls.get(key := (tool, value("database"), outcome, value("tenant")))
        if used is None:
            used = self._begin(*key)
        rows, size, seconds = value("rows") or 0, value("bytes") or 0, (value("elapsed_ms") or 0.0) / 1000
        used.calls += 1
        used.rows += rows
        used.bytes += size
        used.buckets[bisect_left(BUCKETS, seconds)] += 1
        used.buckets[-1] += seconds
        self.minute.call(value("token"), value("user"), value("client_ip"), outcome, rows, size, seconds)

    def _begin(self, tool: str, database: str | None, outcome: str, tenant: str | None) -> "_Calls":
        """Where calls with these labels are counted; of a database that the config does not have, with others."""
        key = (tool, self._database(database), outcome, tenant)
        if key not in self._calls:
            self._calls[key] = _Calls()
        return self._calls[key]

    def cut(self, reason: str, queries: int, backends_left: int) -> None:
        """A token's open work was ended."""
        self._add("mcpctl_cuts", (reason.replace("'", "").replace(" ", "_") if reason in _CUT else "narrowed",))
        self._add("mcpctl_cut_queries", (), queries)
        self._add("mcpctl_cut_backends_left", (), backends_left)

    def connection_failed(self, database: str) -> None:
        """A connection to that database could not be made."""
        self._add("mcpctl_connection_errors", (self._database(database),))

    def samples(self) -> list[Sample]:
        """All that was counted."""
        summed: dict[tuple[str, tuple[str, ...]], float] = dict(self._values)
        times: dict[tuple[str, tuple[str, ...]], list[float]] = {}

        def add(name: str, labels: tuple[str, ...], value: float) -> None:
            summed[name, labels] = summed.get((name, labels), 0) + value

        for (tool, database, outcome, tenant), used in self._calls.items():
            add("mcpctl_calls", (tool, database or "", outcome), used.calls)
            add("mcpctl_call_rows", (database or "",), used.rows)
            add("mcpctl_call_bytes", (database or "",), used.bytes)
            _merge(times, ("mcpctl_call_seconds", (tool, database or "")), used.buckets)
            if tenant is not None:
                add("mcpctl_tenant_calls", (tenant, outcome), used.calls)
                add("mcpctl_tenant_rows", (tenant,), used.rows)
                _merge(times, ("mcpctl_tenant_call_seconds", (tenant,)), fewer(used.buckets, FEW))
        if self._lines:
            add("mcpctl_audit_lines", (), self._lines)
            add("mcpctl_audit_last_line_timestamp_seconds", (), self._last_line)
        if self._failures:
            add("mcpctl_audit_failures", (), self._failures)
        found: list[Sample] = [(name, list(labels), value) for (name, labels), value in summed.items()]
        return found + [(name, list(labels), buckets) for (name, labels), buckets in times.items()]


def _merge(into: dict[Any, list[float]], key: Any, buckets: list[float]) -> None:
    before = into.get(key)
    into[key] = list(buckets) if before is None else [one + more for one, more in zip(before, buckets, strict=True)]


def fewer(buckets: list[float], bounds: tuple[float, ...]) -> list[float]:
    """The same counts in the buckets of `bounds`, which are some of BUCKETS; the sum stays last."""
    found = [0.0] * (len(bounds) + 1)
    for bound, count in zip((*BUCKETS, inf), buckets[:-1], strict=True):
        found[bisect_left(bounds, bound)] += count
    return [*found, buckets[-1]]


def exposition(samples: Mapping[str, Iterable[Sample]], *, openmetrics: bool = False) -> str:
    """The text that Prometheus reads. `samples` are by worker; what is the whole server's is below one of them."""
    of_family: dict[str, list[str]] = {}
    for worker, found in samples.items():
        for name, values, value in found:
            family = FAMILIES[name]
            labels = [*zip(family.labels, values, strict=True)]
            if not family.shared:
                labels.append(("worker", worker))
            of_family.setdefault(name, []).extend(_lines(name, family, labels, value))
    lines = []
    for name, family in FAMILIES.items():
        if name in of_family:
            shown = f"{name}_total" if family.kind == "counter" and not openmetrics else name
            lines += [f"# HELP {shown} {family.help}", f"# TYPE {shown} {family.kind}", *of_family[name]]
    return "\n".join([*lines, "# EOF"] if openmetrics else lines) + "\n"


def _lines(name: str, family: Family, labels: list[tuple[str, str]], value: Value) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{name}{'_total' if family.kind == 'counter' else ''}{_labels(labels)} {_number(value)}"
        return
    below = 0.0
    for bound, count in zip([*map(str, family.buckets), "+Inf"], value[:-1], strict=True):
        below += count
        yield f"{name}_bucket{_labels([*labels, ('le', bound)])} {_number(below)}"
    yield f"{name}_sum{_labels(labels)} {_number(value[-1])}"
    yield f"{name}_count{_labels(labels)} {_number(below)}"


def _labels(labels: list[tuple[str, str]]) -> str:
    escaped = [(name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if escaped else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
