"""The audit log at a million lines: how fast `verify` is, whether it finds one of each damage; what `tail -f` costs.

    python benchmarks/audit.py [LINES]

Measures on the CPU's clock, too, since a machine that does other things at the same time says little by its wall's.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chain import KEY
from command_line import Home
from mcpctl.audit.anchors import Anchor
from mcpctl.audit.log import FIRST, AuditLog, End
from mcpctl.audit.verify import Report, verify
from site_of_mcpctl import COMMAND, environment

_CALL = {
    "time": "2026-11-20T13:05:14.531Z", "event": "tool.called", "request_id": "4892c5db5717c0c4", "token": "1hrspjl1",
    "user": "alice", "client_ip": "127.0.0.1", "transport": "http", "tool": "query_database", "database": "shop",
    "role": "shop_reader", "backend_pid": 22143, "statement": "select count(*) from orders",
    "relations": ["public.orders"], "rows": 1, "bytes": 8, "elapsed_ms": 3.308, "outcome": "ok",
}  # fmt: skip
_FILES = 4
_IDLE = 10.0


def write(path: Path, lines: int) -> Anchor:
    """That many lines, in four files; the lines as the log makes them, without a lock for each."""
    log, end = AuditLog(path, KEY, lambda: datetime.now(UTC)), End(0, 0, 0, FIRST)
    for number in range(_FILES):
        with (path if number == _FILES - 1 else path.with_name(f"{path.name}.{number}")).open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for _ in range(lines // _FILES):
                line, digest = log._line(end, _CALL)
                end = End(0, 0, end.seq + 1, digest)
                file.write(line)
    return Anchor(end.seq, end.hash.encode(), None, "the benchmark")


def timed(path: Path, anchor: Anchor) -> Report:
    """Verify, and say how fast."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = verify(path, KEY, [anchor])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"verify: {report.lines / wall:,.0f} lines a second, {report.lines / cpu:,.0f} a second of CPU time")
    return report


def damages(path: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(kind, file, its content) of one damage of each kind, in the middle of the second file."""
    file = path.with_name(f"{path.name}.1")
    data = file.read_bytes()
    at = data.index(b"\n", len(data) // 2) + 1
    end = data.index(b"\n", at) + 1
    after = data.index(b"\n", end) + 1
    line, other = data[at:end], data[end:after]
    yield "changed", file, data[:at] + line.replace(b"alice", b"alicf") + data[end:]
    yield "removed", file, data[:at] + data[end:]
    yield "added", file, data[:at] + line.replace(b"alice", b"mallory") + data[at:]
    yield "reordered", file, data[:at] + other + line + data[after:]
    last = path.read_bytes()
    yield "cut", path, last[: last.rindex(b"\n", 0, -1) + 1]


def idle_tail(folder: Path) -> None:
    """What `audit tail -f` costs while nothing is written."""
    home = Home(folder)
    home("user", "add", "alice")
    process = subprocess.Popen(
        [*COMMAND, "--config", str(home.config), "audit", "tail", "-f"], stdout=subprocess.PIPE, env=environment()
    )
    try:
        if process.stdout is not None:
            process.stdout.readline()
        before = _cpu(process.pid)
        time.sleep(_IDLE)
        print(f"tail -f: {(_cpu(process.pid) - before) / _IDLE:.3%} of one CPU over {_IDLE:.0f} s")
    finally:
        process.kill()
        process.wait()


def _cpu(pid: int) -> float:
    """Seconds of CPU time of a process, to the nanosecond where the kernel tells."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(lines: int) -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log" / "audit.jsonl"
        path.parent.mkdir(mode=0o700)
        anchor = write(path, lines)
        report = timed(path, anchor)
        if report.fault is not None:
            sys.exit(f"a whole log is said not to be: {report.fault}")
        print(f"whole: {report.lines:,} lines; at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
        for kind, file, content in damages(path):
            before = file.read_bytes()
            file.write_bytes(content)
            fault = verify(path, KEY, [anchor]).fault
            file.write_bytes(before)
            print(f"{kind}: {fault}")
            if fault is None or fault.kind != kind:
                sys.exit(f"{kind} was not found")
        idle_tail(Path(folder) / "home")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
