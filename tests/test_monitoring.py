"""What packaging/ has for Prometheus and Grafana: only what a server tells, and all of it. That a real Prometheus
answers the queries and fires the alerts, packaging/try-prometheus.sh tries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mcpctl.metrics import FAMILIES

PACKAGING = Path(__file__).parent.parent / "packaging"
RULES = PACKAGING / "prometheus" / "mcpctl.rules.yaml"
OF_PROMETHEUS = {"up"}
OF_NODE_EXPORTER = {"node_systemd_unit_state"}
LABELS = {"worker", "instance", "job", "le", "name", "state"}
"""Those of processes, of Prometheus, of histograms, and of node_exporter's units."""


def series() -> dict[str, set[str]]:
    """The names of all series that a server can have, with their labels."""
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {name + end: set(family.labels) for name, family in FAMILIES.items() for end in ends[family.kind]}


def names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    bare = re.sub(r'"[^"]*"|\{[^{}]*\}|\b(?:by|ignoring|on) \([^)]*\)', "", re.sub(r'"[^"]*"', "", expression))
    return set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\bup\b", bare)) - {
        "histogram_quantile", "count_over_time", "__rate_interval",
    }  # fmt: skip


def labels(expression: str) -> set[str]:
    """The labels that it names."""
    by = re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", expression)
    matched = re.findall(r"\{([^{}]*)\}", expression)
    return {one.strip() for part in by for one in part.split(",")} | {
        one for part in matched for one in re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"', part)
    }


def rules() -> dict[str, dict[str, Any]]:
    """The alerts by their names."""
    text = RULES.read_text(encoding="utf-8")
    found = re.findall(r"- alert: (\w+)\n +expr: >-\n +(.*)\n(?: +for: .*\n)? +labels: \{severity: (\w+)\}", text)
    assert len(found) == text.count("- alert:")
    return {name: {"expr": expr, "severity": severity} for name, expr, severity in found}


def dashboard() -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads((PACKAGING / "grafana" / "mcpctl.json").read_text(encoding="utf-8"))
    panels: list[dict[str, Any]] = found["panels"]
    assert all(panel.get("datasource", {}).get("uid", "${datasource}") == "${datasource}" for panel in panels)
    return panels


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard() for target in panel.get("targets", [])]


def test_rules_and_dashboard_ask_only_for_what_a_server_tells_by_labels_that_it_has() -> None:
    known = series()
    expressions = queries() + [rule["expr"] for rule in rules().values()]
    assert len(expressions) > 80
    for expression in expressions:
        asked = names(expression)
        assert asked, expression
        assert asked <= known.keys() | OF_PROMETHEUS | OF_NODE_EXPORTER, expression
        own = {label for name in asked & known.keys() for label in known[name]}
        assert labels(expression) <= own | LABELS, expression


def test_every_metric_has_its_panel_and_every_alert_is_named_in_one() -> None:
    asked = {name for expression in queries() for name in names(expression)}
    ends = ("", "_total", "_bucket", "_sum", "_count")
    assert [name for name in FAMILIES if not any(name + end in asked for end in ends)] == []
    told = " ".join(panel.get("description", "") for panel in dashboard())
    assert [name for name in rules() if not re.search(rf"\b{name}\b", told)] == []


def test_no_two_panels_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard()}) == len(dashboard())


def test_the_page_lists_every_alert_and_each_has_its_unit_test() -> None:
    page = (PACKAGING.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Mcpctl\w+)` \|", page, flags=re.MULTILINE) == [*rules()]
    tested = "".join(file.read_text(encoding="utf-8") for file in (PACKAGING / "prometheus").glob("*.test.yaml"))
    assert sorted(re.findall(r"- name: (\w+)", tested)) == sorted(rules())


def test_every_alert_is_tried_for_real_by_the_script() -> None:
    script = (PACKAGING / "try-prometheus.sh").read_text(encoding="utf-8")
    assert re.findall(r"^fires (\w+) ", script, flags=re.MULTILINE) != []
    assert set(re.findall(r"^fires (\w+) ", script, flags=re.MULTILINE)) == set(rules())


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should_and_not_before() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool: apt-get install prometheus")
    tests = [str(file) for file in sorted((PACKAGING / "prometheus").glob("*.test.yaml"))]
    for arguments in (["check", "rules", str(RULES)], ["check", "config", str(RULES.parent / "prometheus.yml")],
                      ["test", "rules", *tests]):  # fmt: skip
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
