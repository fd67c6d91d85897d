"""Alerts fire when they should, and every figure that an alert or a dashboard asks for is one that is exported."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.storage import Storage
from orchestrator.fleet import FAMILIES
from serving.engine import Engine, EngineSettings
from serving.metrics import Metrics
from training.pipeline import open_base

HERE = Path(__file__).parent
MONITORING = HERE.parent.parent / "k8s" / "components" / "monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
RULE = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
# of PromQL, where it is not a function
WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
    "bool",
}
ADDED = {
    "job",
    "pod",
    "instance",
    "namespace",
    "le",
    "ray_io_cluster",
    "ray_io_node_type",
    "component",
}  # in scraping


def names(expression: str) -> set[str]:
    """The figures that an expression asks for."""
    bare = re.sub(r"\b(by|without)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    found = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)
    return set(found) - WORDS


def labels(expression: str) -> set[str]:
    """The labels that an expression chooses or groups by."""
    chosen = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression)
    grouped = [
        word.strip() for group in re.findall(r"\bby\s*\(([^)]*)\)", expression) for word in group.split(",")
    ]
    return {*chosen, *grouped}


def queries() -> Iterator[tuple[str, str]]:
    for rule in ALERTS:
        yield rule["alert"], rule["expr"]
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", target["expr"]


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every figure, by its name: of an ingress and a replica that run, and of a campaign's."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    engine = Engine(open_base(str(tiny_base), None), storage, "cpu", 2, EngineSettings(1, 2**20))
    try:
        stats = {**engine.stats(), "replicas": 1.0, "unsafe": 0.0}
    finally:
        engine.close()
    metrics = Metrics()
    for kind in ("requests", "request_seconds", "generate_seconds", "images", "predictions", "webhooks"):
        metric = getattr(metrics, kind)
        child = metric.labels(*("x" for _ in metric._labelnames))
        child.observe(1) if kind.endswith("seconds") else child.inc()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.exposed(stats).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for own in FAMILIES:
        ends = ("_bucket", "_sum", "_count") if own.kind == "histogram" else ("",)
        found |= {own.exported + end: {*own.labels, "le"} for end in ends}
    return found


@cache
def of_ray() -> str:
    """The text of the dashboards that Ray ships: what they ask for, Ray exports."""
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))


def unknown(expression: str, exported: dict[str, set[str]]) -> set[str]:
    """Figures that nothing exports, and labels that none of the expression's figures has."""
    rays, found = of_ray(), names(expression)
    ours = found & exported.keys()
    missing = {name for name in found - ours - {"up"} if not re.search(rf"\b{name}\b", rays)}
    if ours == found:
        missing |= labels(expression) - ADDED - {label for name in ours for label in exported[name]}
    return missing


def test_every_query_asks_for_figures_that_are_exported(exported: dict[str, set[str]]) -> None:
    asked = list(queries())
    assert len(asked) > 50
    assert all(names(expression) for _, expression in asked)
    assert [(where, found) for where, query in asked if (found := unknown(query, exported))] == []


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("max(ray_raybooth_subject)", {"ray_raybooth_subject"}),
        ("sum(rate(raybooth_requests[5m]))", {"raybooth_requests"}),
        ('sum(ray_raybooth_subjects{status="queued"})', {"status"}),
        ("sum by (code) (rate(raybooth_requests_total[5m]))", {"code"}),
        ("sum(ray_serve_deployment_queued_querys)", {"ray_serve_deployment_queued_querys"}),
    ],
)
def test_a_query_for_nothing_is_found(
    expression: str, found: set[str], exported: dict[str, set[str]]
) -> None:
    assert unknown(expression, exported) == found


@pytest.mark.parametrize(
    ("expression", "figures"),
    [
        ('sum by (le, phase) (rate(a_bucket{b="c d"}[5m])) / max(e:f) > 3', {"a_bucket", "e:f"}),
        ("avg(x) < 5 and sum(y) > 0 or 6 * 3600 > z", {"x", "y", "z"}),
    ],
)
def test_names_are_read_out_of_expressions(expression: str, figures: set[str]) -> None:
    assert names(expression) == figures


def test_every_figure_of_a_campaign_is_documented() -> None:
    page = (HERE.parent.parent / "docs" / "kubernetes-reference.md").read_text(encoding="utf-8")
    assert [family.exported for family in FAMILIES if f"`{family.exported}" not in page] == []


def test_no_query_asks_for_a_subject() -> None:
    """There are too many, and the ports with figures ask nobody for a key."""
    assert not {"subject", "name", "key", "prompt"} & {
        label for _, query in queries() for label in labels(query)
    }


def test_every_alert_has_a_case_and_says_what_to_do() -> None:
    cases = (HERE / "alerts.test.yaml").read_text(encoding="utf-8")
    page = (HERE.parent.parent / "docs" / "kubernetes-reference.md").read_text(encoding="utf-8")
    for rule in ALERTS:
        assert f"| `{rule['alert']}` |" in page
        assert f'alertname="{rule["alert"]}"' in cases
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_promtool_finds_the_alerts_right(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("ALERTS ARE NOT TESTED: there is no promtool (Debian: apt-get install prometheus)")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULE["spec"]))
    shutil.copy(HERE / "alerts.test.yaml", tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "alerts.test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_as_grafana_wants_them() -> None:
    assert [file.stem for file in DASHBOARDS] == ["fleet", "serving"]
    for file in DASHBOARDS:
        board: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len({panel["title"] for panel in panels}) == len(panels)
        places = {
            (x, y)
            for panel in panels
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        }
        assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in panels), (
            "panels overlap"
        )
        assert max(x for x, _ in places) < 24
