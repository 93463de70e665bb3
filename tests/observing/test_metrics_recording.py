"""Metrics are recorded under their names and labels where Ray runs, cost nothing where it does not, and never raise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from nexus_ray.observing import metrics, trainings
from nexus_ray.observing.metrics import add, labelled, observe, put
from nexus_ray.observing.pools import WatchedWorker
from nexus_ray.observing.registry import METRICS, Metric


class Recorder:
    """Stands in for one of Ray's metrics."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "counter"
        self.values.append((value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "gauge"
        self.values.append((value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "histogram"
        self.values.append((value, tags))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    """What is recorded, by name, as if Ray ran."""
    recorders: dict[str, Recorder] = {}
    monkeypatch.setattr(metrics, "_ray_runs", lambda: True)
    monkeypatch.setattr(metrics, "_recorder", Recorder)
    monkeypatch.setattr(metrics, "_recorders", recorders)
    with labelled(run="demo", stage="collect"):
        yield recorders


def test_run_and_stage_stand_on_everything_and_others_where_they_are_given(recorded: dict[str, Recorder]):
    add("nexus_ray_stage_tokens", 5, source="play")
    with labelled(stage="train"):
        put("nexus_ray_train_loss", 2)
    observe("nexus_ray_stage_item_seconds", 0.5)
    place = {"run": "demo", "stage": "collect"}
    assert recorded["nexus_ray_stage_tokens"].values == [(5, place | {"source": "play"})]
    assert recorded["nexus_ray_train_loss"].values == [(2, place | {"stage": "train"})]
    assert recorded["nexus_ray_stage_item_seconds"].values == [(0.5, place)]


def test_counters_only_go_up(recorded: dict[str, Recorder]):
    add("nexus_ray_stage_tokens", 0)
    add("nexus_ray_stage_tokens", -1)
    assert not recorded


def test_a_metric_that_cannot_be_recorded_ends_nothing(recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch):
    def refuse(metric: Metric) -> Any:
        raise RuntimeError(metric.name)

    monkeypatch.setattr(metrics, "_recorder", refuse)
    put("nexus_ray_train_loss", 2)


def test_ray_is_not_even_imported_for_it():
    call = "from nexus_ray.observing.metrics import put; put('nexus_ray_train_loss', 1)"
    program = f"{call}; import sys; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_names_say_their_unit_and_all_begin_alike():
    for name, metric in METRICS.items():
        assert name.startswith("nexus_ray_")
        assert metric.labels[:2] == ("run", "stage")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert not name.endswith("_total"), "Ray adds it"


class Worker:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("fails"):
            return {"error": "DataError", "message": "no", "hint": None}
        return {"tokens": 30, "bytes": 100}


def test_a_worker_of_a_pool_counts_what_it_has_done(recorded: dict[str, Recorder]):
    worker = WatchedWorker(Worker, {}, {"run": "demo", "stage": "precompute"})
    place = {"run": "demo", "stage": "precompute"}
    result = worker({"shard": {"source": "play"}})
    assert result["tokens"] == 30
    worker({"fails": True})
    values = {name: recorder.values for name, recorder in recorded.items()}
    assert values["nexus_ray_stage_tokens"] == [(30, place | {"source": "play"})]
    assert values["nexus_ray_stage_written_bytes"] == [(100, place)]
    assert values["nexus_ray_stage_items"] == [(1, place)]
    assert [value for value, _ in values["nexus_ray_stage_busy_workers"]] == [1, 0, 1, 0]
    assert len(values["nexus_ray_stage_item_seconds"]) == 2
    assert "nexus_ray_stage_worker_restarts" not in values


def test_a_worker_that_raises_is_not_busy_any_more(recorded: dict[str, Recorder]):
    def broken(row: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        WatchedWorker(lambda: broken, {}, {})({})
    assert recorded["nexus_ray_stage_busy_workers"].values[-1][0] == 0


def test_a_training_shows_its_steps_losses_and_checkpoints(recorded: dict[str, Recorder]):
    step = {"loss": 2.5, "tokens": 64, "seconds": 0.5, "tokens_per_second": 128.0, "gradient_norm": 1.5}
    trainings.watch_training("step", 9, step)
    trainings.watch_training("validation", 9, {"loss": 2.25})
    trainings.watch_checkpoint(1.5, 4096)
    last = {name: recorder.values[-1][0] for name, recorder in recorded.items()}
    assert last == {
        "nexus_ray_train_step": 10,
        "nexus_ray_train_loss": 2.5,
        "nexus_ray_train_gradient_norm": 1.5,
        "nexus_ray_train_step_seconds": 0.5,
        "nexus_ray_stage_tokens_per_second": 128,
        "nexus_ray_stage_tokens": 64,
        "nexus_ray_train_validation_loss": 2.25,
        "nexus_ray_checkpoint_seconds": 1.5,
        "nexus_ray_checkpoint_bytes": 4096,
    }


def test_workers_that_failed_together_are_one_event_and_so_many_deaths(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
):
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trainings, "record", lambda event, **values: told.append({"event": event, **values}))
    failures = {1: RuntimeError("Traceback\nthe node is gone"), 0: RuntimeError("Traceback\nout of memory")}
    trainings.record_failures(failures)
    assert told == [{"event": "workers_failed", "ranks": [0, 1], "error": "RuntimeError", "reason": "out of memory"}]
    assert recorded["nexus_ray_stage_worker_restarts"].values[-1][0] == 2
