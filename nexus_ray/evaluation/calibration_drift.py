"""`nexus-ray drift`: the routers of base and student on the calibration text, compared by their moments."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from nexus_ray.checkpoints.overlay import CONFIG_FILE
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.calibration import Calibration
from nexus_ray.router.collect import collect, describe_statistics
from nexus_ray.router.comparison import as_rows, compare_routers
from nexus_ray.storage import Place, exists, member, write_json

_FIELDS = {
    "base_fingerprint": "base model",
    "tokenizer_sha256": "tokenizer",
    "calibration_sha256": "calibration text",
    "compute": "way of computing",
}
_FIGURES = {
    "usage_distance": "usage",
    "probability_distance": "probability",
    "covariance_distance": "covariance",
    "halves_distance": "halves (base)",
}


def measure_drift(config: Config, layout: RunLayout, overlay: Place | None = None) -> dict[str, Any]:
    """Collect the student's statistics on the text of the base's, and compare; writes `router_drift.json`.

    Args:
        config: the run; its statistics of the base must be there.
        layout: its paths.
        overlay: directory of the student's overlay; default: the run's trained one.

    Returns:
        {source: {figure: [a value a layer]}}, the figures of `LayerComparison`.

    Raises:
        ArtefactError: the base's statistics or the overlay are missing, damaged, or of another base or text.
    """
    overlay = overlay or layout.overlay
    if not exists(member(overlay, CONFIG_FILE)):
        raise ArtefactError(f"no overlay at {overlay}", "run `nexus-ray train CONFIG`, or name one with --overlay")
    base = RouterStatistics.load(layout.router_stats)
    _check_comparable(base.description, config, layout)
    student = collect(config, layout, overlay)
    result = {name: as_rows(compare_routers(moments, student.sources[name])) for name, moments in base.sources.items()}
    write_json(layout.router_drift, result)
    return result


def _check_comparable(base: Description, config: Config, layout: RunLayout) -> None:
    """Whether the student would be observed as the base was: same weights, text and computation."""
    now = describe_statistics(config, Calibration.load(layout.calibration), None)
    for field in ("base_fingerprint", "tokenizer_sha256", "calibration_sha256", "compute"):
        before, after = getattr(base, field), getattr(now, field)
        if before != after:
            raise ArtefactError(
                f"{layout.router_stats} was collected with another {_FIELDS[field]} ({before}, now {after})",
                "run `nexus-ray collect CONFIG --force`, or undo the change",
            )


def drift_table(result: dict[str, Any]) -> Table:
    """Means over the layers, and the layer that moved most, a row a source."""
    table = Table(title="Routers of the student against the base's", caption=_CAPTION, caption_justify="left")
    table.add_column("source")
    for heading in _FIGURES.values():
        table.add_column(heading, justify="right")
    table.add_column("most in layer", justify="right")
    for source, figures in result.items():
        table.add_row(
            source, *(_mean(figures[name]) for name in _FIGURES), str(int(np.argmax(figures["usage_distance"])))
        )
    return table


_CAPTION = (
    "usage, probability: total variation, 0 equal to 1 disjoint, of the experts' shares of selections and mean\n"
    "probabilities; covariance: relative change; halves: usage in one half of the text against the other, base alone"
)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3g}" if known else "-"
