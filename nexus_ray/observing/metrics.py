"""Recording metrics where the work is done: Ray's agent on each node exports them for Prometheus.

Where Ray does not run in this process nothing is recorded. Run and stage are labels of everything that is recorded
within a `labelled` block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nexus_ray.observing.registry import METRICS, Metric

logger = logging.getLogger(__name__)
_recorders: dict[str, Any] = {}
_labels: dict[str, str] = {}


@contextmanager
def labelled(**values: str) -> Iterator[None]:
    """Within the block, these labels (`run`, `stage`) stand on every metric of this process."""
    global _labels
    before, _labels = _labels, {**_labels, **values}
    try:
        yield
    finally:
        _labels = before


def present_labels() -> dict[str, str]:
    """The labels of this process, for those of others that work for it."""
    return dict(_labels)


def add(name: str, amount: float, **labels: str) -> None:
    """Count so many more; counters only go up."""
    if amount > 0:
        _record(name, "counter", lambda recorder, tags: recorder.inc(amount, tags), labels)


def put(name: str, value: float, **labels: str) -> None:
    """Say what a gauge stands at."""
    _record(name, "gauge", lambda recorder, tags: recorder.set(float(value), tags), labels)


def observe(name: str, value: float, **labels: str) -> None:
    """Add a value to a histogram."""
    _record(name, "histogram", lambda recorder, tags: recorder.observe(float(value), tags), labels)


def _record(name: str, kind: str, do: Callable[[Any, dict[str, str]], None], labels: Mapping[str, str]) -> None:
    metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    if not _ray_runs():
        return
    tags = {label: str({**_labels, **labels}.get(label, "")) for label in metric.labels}
    try:
        if name not in _recorders:
            _recorders[name] = _recorder(metric)
        do(_recorders[name], tags)
    except Exception as error:  # watching never ends the work that is watched
        logger.debug("metric %s is not recorded: %s", name, error)


def _ray_runs() -> bool:
    """Whether this process is connected to Ray; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _recorder(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    if metric.kind == "histogram":
        return Histogram(metric.name, metric.text, boundaries=list(metric.buckets), tag_keys=metric.labels)
    kinds = {"counter": Counter, "gauge": Gauge}
    return kinds[metric.kind](metric.name, metric.text, tag_keys=metric.labels)
