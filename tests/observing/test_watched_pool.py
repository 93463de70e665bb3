"""A pool on a real Ray: a worker that dies is told, and Ray's agent exports what the workers and the driver count."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nexus_ray.cluster import map_over_pool
from nexus_ray.config import ResourcesSection
from nexus_ray.observing import telling, telling_stage
from nexus_ray.observing.story import read_story

_PATIENCE_SECONDS = 120  # agents export every few seconds, a busy machine later


def make_worker() -> type:
    """A worker that dies once, at piece 3; made here so that it travels to other processes whole, not by name."""

    class Counting:
        def __init__(self, marker: Path) -> None:
            self.marker = marker

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if row["index"] == 3 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"index": row["index"], "tokens": 10, "bytes": 7}

    return Counting


def scrape() -> dict[tuple[str, str], float]:
    """(name, stage) to the sum of what this node's agent exports for the test's run, as Prometheus reads it."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("run") == "watched-pool":
                key = (sample.name, sample.labels["stage"])
                sums[key] = sums.get(key, 0) + sample.value
    return sums


@pytest.mark.usefixtures("ray_session")
def test_a_death_is_told_and_tokens_bytes_and_restarts_are_exported(tmp_path: Path):
    directory = tmp_path / "watched-pool"
    resources = ResourcesSection(workers=1, cpus_per_worker=1)
    items = [{"index": index, "source": "play" if index < 4 else "prose"} for index in range(6)]
    arguments = {"marker": tmp_path / "died"}
    with telling(directory), telling_stage("collect") as tally:
        rows = list(map_over_pool(make_worker(), arguments, items, resources, "count", ("tokens", 60)))
    assert sorted(row["index"] for row in rows) == list(range(6))
    assert {key for row in rows for key in row} == {"index", "tokens", "bytes"}, "nothing of ours is left in a result"
    assert (tally.tokens, tally.restarts, tally.shards_bytes) == (60, 1, 42)
    [command] = read_story(directory).commands
    assert [incident.kind for incident in command.incidents if incident.kind != "warning"] == ["worker"]
    assert (command.stages[0].tokens, command.stages[0].restarts) == (60, 1)
    _wait_for_metrics()


def _wait_for_metrics() -> None:
    """What workers counted before the death may be lost with them; what came after it is not."""
    wanted = ("stage_tokens_total", "stage_written_bytes_total", "stage_worker_restarts_total", "stage_queue_items")
    keys = {(f"ray_nexus_ray_{name}", "collect") for name in wanted}
    queue = ("ray_nexus_ray_stage_queue_items", "collect")
    deadline, found = time.monotonic() + _PATIENCE_SECONDS, scrape()
    while not (keys <= found.keys() and found[queue] == 0) and time.monotonic() < deadline:
        time.sleep(2)
        found = scrape()
    assert keys <= found.keys()
    assert found[queue] == 0
    assert 0 < found["ray_nexus_ray_stage_tokens_total", "collect"] <= 60
    assert found["ray_nexus_ray_stage_worker_restarts_total", "collect"] == 1
