"""Makes `nexus-ray.json` beside it, a Grafana dashboard: python deploy/grafana/make_dashboard.py.

Every metric of ours stands in `nexus_ray/observing/registry.py` or `serve/guard/metrics.py`; a test compares the names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("nexus-ray.json")
_COLUMNS, _HEIGHT = 24, 8  # of Grafana's grid
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_OURS = 'run=~"$run",stage=~"$stage"'
_RATE = "[$__rate_interval]"

Query = tuple[str, str]  # expression and legend
Panel = dict[str, Any]


def _sum(metric: str, by: str = "run, stage") -> str:
    return f"sum by ({by}) (ray_nexus_ray_{metric}{{{_OURS}}})"


def _max(metric: str) -> str:
    return f"max by (run, stage) (ray_nexus_ray_{metric}{{{_OURS}}})"


def _rate(metric: str, by: str = "run, stage") -> str:
    return f"sum by ({by}) (rate(ray_nexus_ray_{metric}_total{{{_OURS}}}{_RATE}))"


def _train(metric: str) -> str:
    return f"max by (run) (ray_nexus_ray_{metric}{{{_OURS}}})"


def _quantile(share: float, metric: str, by: str, labels: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({metric}_bucket{{{labels}}}{_RATE})))"


STAGES = "{{run}} {{stage}}"
ITEMS = "ray_nexus_ray_stage_item_seconds"
SECTIONS: dict[str, list[tuple[str, str, str, list[Query]]]] = {
    "Stages": [
        ("Stage at work", "none", "1 while it is", [(_max("stage_running"), STAGES)]),
        ("Tokens a second", "short", "counted by the workers", [(_rate("stage_tokens"), STAGES)]),
        (
            "Tokens a second, said by the stage",
            "short",
            "of a pool since it began, of training its last step",
            [(_sum("stage_tokens_per_second"), STAGES)],
        ),
        ("Tokens a second by source", "short", "", [(_rate("stage_tokens", "stage, source"), "{{stage}} {{source}}")]),
        (
            "Queue",
            "none",
            "pieces of work of a pool: not done, and at work",
            [
                (_sum("stage_queue_items"), f"{STAGES}: left"),
                (_sum("stage_busy_workers"), f"{STAGES}: at work"),
            ],
        ),
        (
            "Time of a piece of work",
            "s",
            "median and 95th percentile",
            [
                (_quantile(0.5, ITEMS, "stage", _OURS), "{{stage}} p50"),
                (_quantile(0.95, ITEMS, "stage", _OURS), "{{stage}} p95"),
            ],
        ),
        ("Pieces of work done", "ops", "a second", [(_rate("stage_items"), STAGES)]),
        (
            "Bytes",
            "Bps",
            "written as artefacts and checkpoints; fetched into caches of nodes",
            [
                (_rate("stage_written_bytes"), f"{STAGES}: artefacts"),
                (_rate("checkpoint_bytes"), f"{STAGES}: checkpoints"),
                (_rate("cache_fetched_bytes"), f"{STAGES}: fetched"),
            ],
        ),
        (
            "Worker deaths and warnings",
            "none",
            "since the processes that counted them began",
            [
                (_sum("stage_worker_restarts_total"), f"{STAGES}: worker deaths"),
                (_sum("warnings_total"), f"{STAGES}: warnings"),
            ],
        ),
    ],
    "Training": [
        (
            "Loss",
            "none",
            "nats a token",
            [(_train("train_loss"), "{{run}}"), (_train("train_validation_loss"), "{{run}}: validation")],
        ),
        ("Gradient norm", "none", "before clipping", [(_train("train_gradient_norm"), "{{run}}")]),
        ("Steps finished", "none", "", [(_train("train_step"), "{{run}}")]),
        (
            "Time of a step, of a checkpoint",
            "s",
            "the last ones",
            [(_train("train_step_seconds"), "{{run}}: step"), (_train("checkpoint_seconds"), "{{run}}: checkpoint")],
        ),
    ],
    "Cluster": [
        ("GPUs", "percent", "utilisation", [("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}")]),
        ("GPU memory used", "decmbytes", "", [("ray_node_gram_used", "{{instance}} {{GpuIndex}}")]),
        ("CPUs", "percent", "utilisation", [("ray_node_cpu_utilization", "{{instance}}")]),
        (
            "Memory used",
            "percent",
            "",
            [("100 * ray_node_mem_used_host / ray_node_mem_total_host", "{{instance}}")],
        ),
        ("Nodes", "none", "", [("sum by (node_type) (ray_cluster_active_nodes)", "{{node_type}}")]),
        (
            "Network",
            "Bps",
            "",
            [
                ("ray_node_network_receive_speed", "{{instance}}: in"),
                ("ray_node_network_send_speed", "{{instance}}: out"),
            ],
        ),
        ("Disk free", "bytes", "where Ray's files are", [("ray_node_disk_free", "{{instance}}")]),
        (
            "Worker processes that died unasked",
            "none",
            "those among them that Ray has killed because memory ran out",
            [
                ("sum(ray_node_manager_unexpected_worker_failure_total)", "all"),
                ("sum(ray_memory_manager_worker_eviction_total)", "out of memory"),
            ],
        ),
    ],
    "Service": [
        (
            "Requests a second",
            "reqps",
            "",
            [(f"sum by (route, status) (rate(nexus_ray_requests_total{_RATE}))", "{{route}} {{status}}")],
        ),
        (
            "Time of a request",
            "s",
            "median and 95th percentile",
            [
                (_quantile(0.5, "nexus_ray_request_seconds", "route", ""), "{{route}} p50"),
                (_quantile(0.95, "nexus_ray_request_seconds", "route", ""), "{{route}} p95"),
            ],
        ),
        (
            "Time to the first text of a stream",
            "s",
            "95th percentile",
            [(_quantile(0.95, "nexus_ray_first_piece_seconds", "instance", ""), "{{instance}}")],
        ),
        (
            "Tokens a second of answered requests",
            "short",
            "",
            [(f"sum by (model, kind) (rate(nexus_ray_tokens_total{_RATE}))", "{{model}} {{kind}}")],
        ),
        (
            "Requests in flight",
            "none",
            "",
            [
                ("sum(nexus_ray_requests_in_flight)", "answered"),
                ("sum(nexus_ray_engine_running)", "generating or waiting to"),
                ("sum(nexus_ray_engine_scoring)", "scoring or waiting to"),
            ],
        ),
        (
            "Age of the present forward pass",
            "s",
            "",
            [("max by (instance) (nexus_ray_engine_step_seconds)", "{{instance}}")],
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "nexus-ray",
        "title": "nexus-ray",
        "description": "Stages, training, cluster and service of nexus-ray; docs/observing.md has the metrics.",
        "tags": ["ray", "nexus-ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": list(_variables())},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _variables() -> Iterator[Panel]:
    yield {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "refresh": 1}
    for name, within in (("run", ""), ("stage", 'run=~"$run"')):
        query = f"label_values(ray_nexus_ray_stage_running{{{within}}}, {name})"
        yield {
            "name": name,
            "type": "query",
            "label": name.capitalize(),
            "datasource": _SOURCE,
            "definition": query,
            "query": {"query": query, "refId": f"{name}-variable"},
            "refresh": 2,
            "sort": 1,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _panels() -> Iterator[Panel]:
    number, top = 0, 0
    for section, panels in SECTIONS.items():
        number += 1
        row = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": section, "collapsed": False, "gridPos": row, "panels": []}
        top += 1
        across = 3 if len(panels) % 3 == 0 else 2 if len(panels) < 8 else 4
        width = _COLUMNS // across
        for index, (title, unit, description, queries) in enumerate(panels):
            number += 1
            place = {"h": _HEIGHT, "w": width, "x": index % across * width, "y": top + index // across * _HEIGHT}
            yield _panel(number, place, title, unit, description, queries)
        top += -(-len(panels) // across) * _HEIGHT


def _panel(number: int, place: dict[str, int], title: str, unit: str, description: str, queries: list[Query]) -> Panel:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for index, (expression, legend) in enumerate(queries)
    ]
    drawing = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": True}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": drawing}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
