"""Every metric that a run exports, by name: what it counts, in which unit, by which labels.

Ray's agents export them as `ray_NAME` (counters as `ray_NAME_total`), with labels of their own beside ours. The
service's are beside them in `serve/guard/metrics.py`, with the same prefix, and are read at the service's `/metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = ("run", "stage")
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as the code calls it.
        kind: of Prometheus.
        text: what it says.
        labels: by which it is split.
        buckets: upper bounds of a histogram's.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = RUN
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """Names in Prometheus."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}[self.kind]
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes)


_ALL = (
    Metric("nexus_ray_stage_running", "gauge", "1 while the stage is at work"),
    Metric("nexus_ray_stage_tokens", "counter", "Tokens processed, of training those in the loss", (*RUN, "source")),
    Metric(
        "nexus_ray_stage_tokens_per_second",
        "gauge",
        "Of a pool since it began, of training its last step",
    ),
    Metric("nexus_ray_stage_items", "counter", "Pieces of work done by pools"),
    Metric("nexus_ray_stage_item_seconds", "histogram", "Time that a piece of work took", RUN, _SECONDS),
    Metric("nexus_ray_stage_queue_items", "gauge", "Pieces of work that are not done, those at work among them"),
    Metric("nexus_ray_stage_busy_workers", "gauge", "1 while a worker of a pool is at a piece of work"),
    Metric("nexus_ray_stage_written_bytes", "counter", "Bytes of artefacts and target shards written"),
    Metric("nexus_ray_stage_worker_restarts", "counter", "Workers that died and were started again"),
    Metric("nexus_ray_warnings", "counter", "Warnings and errors that the command has logged"),
    Metric("nexus_ray_train_step", "gauge", "Optimiser steps finished"),
    Metric("nexus_ray_train_loss", "gauge", "Loss of the last step, nats a token, weighted as configured"),
    Metric("nexus_ray_train_validation_loss", "gauge", "The same on the validation sequences"),
    Metric("nexus_ray_train_gradient_norm", "gauge", "Gradient norm of the last step, before clipping"),
    Metric("nexus_ray_train_step_seconds", "gauge", "Time that the last step took"),
    Metric("nexus_ray_checkpoint_seconds", "gauge", "Time that writing the last recovery checkpoint took"),
    Metric("nexus_ray_checkpoint_bytes", "counter", "Bytes of recovery checkpoints written"),
    Metric("nexus_ray_cache_fetched_bytes", "counter", "Bytes of base models fetched into caches of nodes"),
)
METRICS = {metric.name: metric for metric in _ALL}
