"""What figures read from the records of `metrics.jsonl`: curves by tag, layers by step, moments of events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.training.watching.tags import numbers_of

SMOOTHING = 0.05  # of the run, the usual width of the moving average

Records = Sequence[Mapping[str, Any]]
Numbers = NDArray[np.float64]
Curve = tuple[Numbers, Numbers]


def curves_of(records: Records) -> dict[str, Curve]:
    """(finished steps, values) of every number, by the tag that trackers know it by."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for tag, value in numbers_of(record).items():
            points[tag].append((record["step"] + 1, value))
    tables = {tag: np.asarray(values, dtype=np.float64) for tag, values in points.items()}
    return {tag: (table[:, 0], table[:, 1]) for tag, table in tables.items()}


def events(records: Records, event: str) -> list[Mapping[str, Any]]:
    """The records of one event."""
    return [record for record in records if record.get("event") == event]


def layers_of(records: Records, measure: str) -> tuple[Numbers, Numbers] | None:
    """(finished steps [S], values [layers, S]) of a router's measure, NaN where there is none; None without any.

    Of the steps, or where they do not know it of the validations.
    """
    for event in ("step", "validation"):
        found = [record for record in events(records, event) if measure in record.get("router", {})]
        if found:
            break
    else:
        return None
    values = np.asarray([record["router"][measure] for record in found], dtype=np.float64).T
    return np.asarray([record["step"] + 1 for record in found], dtype=np.float64), values


def smooth(values: Numbers, share: float) -> Numbers:
    """Centred moving average over a share of the values, narrower at both ends; 0 leaves them as they are."""
    if not share:
        return values
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    smoothed: Numbers = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return smoothed


def raw_and_smooth(axes: Any, curve: Curve, line: Mapping[str, Any], label: str, smoothing: float) -> None:
    """A smoothed line over a faint one of the values themselves; only those without smoothing."""
    steps, values = curve
    if smoothing:
        axes.plot(steps, values, color=line["color"], alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(values, smoothing), label=label, **line)
