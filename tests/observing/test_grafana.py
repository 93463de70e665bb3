"""The Grafana dashboard is what its maker makes, asks only for metrics that exist, and no panel lies on another."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard
from prometheus_client import CollectorRegistry
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from nexus_ray.observing.registry import METRICS

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "grafana" / "nexus-ray.json"
RAY_S_OWN = Path(ray.dashboard.__file__).parent / "modules" / "metrics" / "dashboards"
_METRIC = re.compile(r"\b(?:ray_|nexus_ray_)\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    queries = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return queries + [variable["definition"] for variable in variables if "definition" in variable]


def names(dashboard: dict[str, Any]) -> set[str]:
    return {name for expression in expressions(dashboard) for name in _METRIC.findall(expression)}


def exported_by_the_service() -> set[str]:
    """Names as the service's own registry exports them."""
    from serve.guard import metrics

    class Engine:
        def state(self) -> None:
            raise AssertionError("nobody asks")

    registry = metrics.Metrics(Engine())._registry
    assert isinstance(registry, CollectorRegistry)
    return {name for name in registry._names_to_collectors if name.startswith("nexus_ray")}


def test_the_file_is_what_its_maker_makes(dashboard: dict[str, Any]):
    path = FILE.with_name("make_dashboard.py")
    spec = importlib.util.spec_from_file_location("make_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert dashboard == maker.dashboard(), "run `python deploy/grafana/make_dashboard.py`"


def test_our_metrics_are_those_that_the_code_exports(dashboard: dict[str, Any]):
    ours = {name for metric in METRICS.values() for name in metric.exported}
    asked = {name for name in names(dashboard) if name.startswith("ray_nexus_ray_")}
    assert asked <= ours
    shown = {metric.name for metric in METRICS.values() if asked & set(metric.exported)}
    assert shown == set(METRICS), "every metric is shown somewhere"


def test_the_service_s_metrics_are_those_that_it_exports(dashboard: dict[str, Any]):
    asked = {name for name in names(dashboard) if name.startswith("nexus_ray_")}
    assert asked
    assert asked <= exported_by_the_service()


def test_ray_s_own_metrics_are_known_to_ray(dashboard: dict[str, Any]):
    """Ray's own dashboards, which are installed with it, ask for these names, or its agent on each node sets them."""
    asked = {name for name in names(dashboard) if name.startswith("ray_") and not name.startswith("ray_nexus_ray")}
    known = {name for path in RAY_S_OWN.glob("*.py") for name in _METRIC.findall(path.read_text())}
    known |= {f"ray_{name}" for name in METRICS_GAUGES}
    assert "ray_node_gpus_utilization" in asked
    assert asked <= known


def test_labels_in_queries_are_labels_of_the_metric(dashboard: dict[str, Any]):
    for expression in expressions(dashboard):
        for name, labels in re.findall(r"ray_(nexus_ray_\w+?)(?:_total|_bucket)?\{([^}]*)\}", expression):
            asked = set(re.findall(r"(\w+)=~", labels))
            assert asked <= set(METRICS[name].labels), expression


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_the_data_source_is_a_variable_and_so_are_run_and_stage(dashboard: dict[str, Any]):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "stage"]
    assert variables["datasource"]["type"] == "datasource"
    sources = [place for panel in panels(dashboard) for place in (panel, *panel["targets"])]
    assert {source["datasource"]["uid"] for source in sources} == {"${datasource}"}
    ours = [expression for expression in expressions(dashboard) if "ray_nexus_ray" in expression]
    assert all("$run" in expression for expression in ours if "label_values" not in expression)


def test_brackets_of_queries_close(dashboard: dict[str, Any]):
    closing = {")": "(", "]": "[", "}": "{"}
    for expression in expressions(dashboard):
        open_ones: list[str] = []
        for character in expression:
            if character in closing.values():
                open_ones.append(character)
            elif character in closing:
                assert open_ones.pop() == closing[character], expression
        assert not open_ones, expression
