"""Which experts the router chooses together: pairs counted against what popularity alone would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage  # type: ignore[import-untyped]
from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

from nexus_ray import plot_style as look
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.selection.panels import DIVERGING, colour_bar, hide_frame
from nexus_ray.selection.record import Selection
from nexus_ray.selection.scores import Floats

_MOST_COLUMNS = 6
_WIDTH_INCHES, _LARGEST_PANEL_INCHES = 11.0, 4.6
_STRIP_HEIGHT = 0.025  # of a panel
_POINTS_PER_INCH = 72
_MOST_LABELS = 48  # expert numbers along one row of panels
_BISECTIONS = 90
_FARTHEST = 1e9  # times the least possible sum: an expert that is in every pair has no finite solution
_INSIDE_SCALE = 0.97  # of the pairs; the rest, mostly pairs hardly ever seen, take the colour at the end
_LEAST_LIMIT = 1.0  # a factor of two: weaker ties stay pale instead of filling the colour scale


def co_selection_figure(selection: Selection, statistics: RouterStatistics) -> Any | None:
    """A map of pairs a layer, experts grouped by their company; None when no two are ever chosen together."""
    pairs = _pairs(selection, statistics)
    if not _without_diagonal(pairs).any():
        return None
    ratios = pair_log_ratios(pairs)
    layers = len(ratios)
    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(layers)))
    rows = math.ceil(layers / columns)
    size = min(_LARGEST_PANEL_INCHES, _WIDTH_INCHES / columns)
    figure = look.new_figure(columns * size + 0.9, rows * (size + 0.1) + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False)
    limit = max(_LEAST_LIMIT, float(np.quantile(np.abs(ratios), _INSIDE_SCALE)))
    scale = TwoSlopeNorm(0, -limit, limit)
    for layer, axes in enumerate(panels.flat):
        if layer < layers:
            image = _panel(axes, ratios[layer], set(selection.layers[layer].selected), scale, columns)
            pad = _POINTS_PER_INCH * _STRIP_HEIGHT * 1.5 * size + 4
            axes.set_title(f"layer {layer}", loc="left", fontsize=9, pad=pad, color=look.INK)
        else:
            axes.set_axis_off()
    _title(figure, selection, columns)
    colour_bar(figure, image, panels, "log2 of pairs observed / expected", percent=False)
    return figure


def _pairs(selection: Selection, statistics: RouterStatistics) -> NDArray[np.int64]:
    """[layers, experts, experts] tokens of the chosen sources for which both experts were selected."""
    chosen = [statistics.sources[name].co_selection().sum(axis=0) for name in selection.sources]
    return np.sum(chosen, axis=0)


def pair_log_ratios(together: NDArray[np.int64]) -> Floats:
    """[layers, experts, experts] log2 of observed over expected pairs; the diagonal is 0.

    Half a pair is added to both counts (Haldane 1956, Annals of Human Genetics 20), so that a pair too rare to judge
    is near 0 and one never seen stays finite.

    Args:
        together: [layers, experts, experts] tokens for which both experts were selected; the diagonal is not used.
    """
    observed = _without_diagonal(together)
    ratios: Floats = np.log2((observed + 0.5) / (expected_pairs(together) + 0.5))
    return _without_diagonal(ratios)


def expected_pairs(together: NDArray[np.int64]) -> Floats:
    """[layers, experts, experts] pairs if experts met by popularity alone, each in as many pairs as it really has.

    Quasi-independence (Goodman 1968, Journal of the American Statistical Association 63): off the diagonal the
    expectation is a_i a_j, with a such that every row has the observed sum. A plain product of frequencies would
    ignore that a token selects a fixed number of distinct experts, and so expect too many pairs of popular ones.

    With S the sum of a, row i says a_i (S - a_i) = row sum i: a quadratic for each a_i, so that only S has to be
    found. Its smaller root is taken; an expert that is in most of the pairs (a_i > S / 2) takes the larger one.
    """
    rows = _without_diagonal(together).sum(axis=-1)
    total, dominated = _sum_of_weights(rows)
    weights = _smaller_roots(rows, total)
    leader = dominated & (np.arange(rows.shape[-1]) == weights.argmax(axis=-1)[..., None])
    weights = np.where(leader, total - weights, weights)
    return _without_diagonal(weights[..., :, None] * weights[..., None, :])


def _sum_of_weights(rows: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """S [layers, 1] of `expected_pairs`, by bisection, and whether an expert of the layer takes the larger root."""
    low = 2 * np.sqrt(np.maximum(rows.max(axis=-1, keepdims=True), 1.0))
    high = low * _FARTHEST
    dominated = _smaller_roots(rows, low).sum(axis=-1, keepdims=True) < low
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        roots = _smaller_roots(rows, middle)
        total, largest = roots.sum(axis=-1, keepdims=True), roots.max(axis=-1, keepdims=True)
        too_small = np.where(dominated, 2 * largest > total, total > middle)
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    return high, dominated


def _smaller_roots(rows: Floats, total: Floats) -> Floats:
    """a <= total / 2 with a (total - a) = rows."""
    roots: Floats = 2 * rows / (total + np.sqrt(np.maximum(total**2 - 4 * rows, 0.0)))
    return roots


def _without_diagonal(matrices: NDArray[Any]) -> Floats:
    return np.where(np.eye(matrices.shape[-1], dtype=bool), 0.0, matrices)


def grouped_order(ratios: Floats) -> list[int]:
    """Experts in an order that puts those often chosen together side by side.

    Average linkage, leaves ordered optimally (Bar-Joseph et al. 2001, Bioinformatics 17).
    """
    if len(ratios) < 3:
        return list(range(len(ratios)))
    distances = _without_diagonal(ratios.max() - ratios)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    return [int(expert) for expert in leaves_list(tree)]


def _panel(axes: Any, ratios: Floats, selected: set[int], scale: Any, columns: int) -> Any:
    order = grouped_order(ratios)
    image = axes.imshow(ratios[np.ix_(order, order)], cmap=DIVERGING, norm=scale, interpolation="nearest")
    _grey_diagonal(axes, len(order))
    _mark_selected(axes, [place for place, expert in enumerate(order) if expert in selected], len(order))
    _expert_numbers(axes, order, columns)
    hide_frame(axes)
    return image


def _grey_diagonal(axes: Any, experts: int) -> None:
    squares = [Rectangle((place - 0.5, place - 0.5), 1, 1) for place in range(experts)]
    axes.add_collection(PatchCollection(squares, facecolor=look.PALE, edgecolor="none"))


def _mark_selected(axes: Any, places: Sequence[int], experts: int) -> None:
    """A strip above the columns of the selected experts: it stays visible where a cell is one pixel."""
    height = _STRIP_HEIGHT * experts
    marks = [Rectangle((place - 0.5, -0.5 - 1.3 * height), 1, height) for place in places]
    axes.add_collection(PatchCollection(marks, facecolor=look.YELLOW, edgecolor="none", clip_on=False), autolim=False)


def _expert_numbers(axes: Any, order: list[int], columns: int) -> None:
    """The number of each expert where there is room for it."""
    shown = order if len(order) * columns <= _MOST_LABELS else []
    axes.set_xticks(range(len(shown)), shown)
    axes.set_yticks(range(len(shown)), shown)
    axes.tick_params(labelsize=7, length=0, pad=2, colors=look.INK)


def _title(figure: Any, selection: Selection, columns: int) -> None:
    what = f"Experts chosen together for {' + '.join(selection.sources)}"
    how = "grouped by company (yellow above: selected)"
    text = ("\n" if columns == 1 else ", ").join((what, how))
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", color=look.INK)
