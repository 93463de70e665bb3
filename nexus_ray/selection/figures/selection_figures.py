"""Figures of an expert selection: which experts matter, which text uses them, and how far to trust it.

Drawn from `selection.json`, and from the router statistics for the pairs of experts, after both are saved: nothing is
lost when drawing fails, and any figure can be drawn again. Every number of layers and experts is drawn to scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nexus_ray import plot_style as look
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.selection.figures.co_selection import co_selection_figure
from nexus_ray.selection.figures.curves import concentration_figure, stability_figure, variance_figure
from nexus_ray.selection.figures.heatmaps import importance_figure, usage_figure
from nexus_ray.selection.record import Selection
from nexus_ray.storage import Place, remove

_FIGURES: dict[str, Callable[[Selection], Any | None]] = {
    "expert_importance.png": importance_figure,
    "expert_usage.png": usage_figure,
    "router_variance.png": variance_figure,
    "concentration.png": concentration_figure,
    "selection_stability.png": stability_figure,
}
_CO_SELECTION = "co_selection.png"


def plot_selection(selection: Selection, statistics: RouterStatistics | None, directory: Place) -> list[Place]:
    """Draw the figures of a selection as PNG below `directory` and return their paths.

    A figure that would show nothing is left out, and one that an earlier selection left is then removed: pairs,
    without statistics or when the router selects one expert at a time, and whatever is about the choice, when all
    experts of every layer hold the same weights.

    Raises:
        StorageError: the file system refused.
    """
    paths = [directory / name for name, draw in _FIGURES.items() if _save(draw(selection), directory / name)]
    pairs = co_selection_figure(selection, statistics) if statistics is not None else None
    return [*paths, directory / _CO_SELECTION] if _save(pairs, directory / _CO_SELECTION) else paths


def _save(figure: Any | None, path: Place) -> bool:
    """Whether there was something to save."""
    if figure is None:
        remove(path)
    else:
        look.save(figure, path)
    return figure is not None
