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
from nexus_ray.selection.figures.panels import DIVERGING, Beyond, colour_bar, hide_frame
from nexus_ray.selection.record import Selection
from nexus_ray.selection.scores import Floats

_MOST_COLUMNS = 6
_WIDTH_INCHES, _LARGEST_PANEL_INCHES = 11.0, 4.6
_STRIP_HEIGHT = 0.025  # of a panel
_POINTS_PER_INCH = 72
_MOST_LABELS = 48  # expert numbers along one row of panels
_BISECTIONS = 90
_FARTHEST = 1e9  # times the least possible sum: an expert that is in every pair has no finite solution
_INSIDE_SCALE = 0.97  # of the judged pairs; the rest take the colour at the end
_LEAST_LIMIT = 1.0  # a factor of two: weaker ties stay pale instead of filling the colour scale
_DEVIATIONS = 3  # standard deviations of a count, from which on it is not luck
_ENOUGH_PAIRS = 4 * _DEVIATIONS**2  # expected, of which half as many would be that far off


def co_selection_figure(selection: Selection, statistics: RouterStatistics) -> Any | None:
    """A map of pairs a layer, experts grouped by their company; None when no two are ever chosen together."""
    pairs = _pairs(selection, statistics)
    if not _without_diagonal(pairs).any():
        return None
    ratios, judged = pair_log_ratios(pairs), judged_pairs(pairs)
    layers = len(ratios)
    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(layers)))
    rows = math.ceil(layers / columns)
    size = min(_LARGEST_PANEL_INCHES, _WIDTH_INCHES / columns)
    figure = look.new_figure(columns * size + 0.9, rows * (size + 0.1) + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False)
    scale, beyond = _scale(ratios[judged])
    for layer, axes in enumerate(panels.flat):
        if layer < layers:
            known = np.where(judged[layer], ratios[layer], 0.0)
            order = grouped_order(known)
            image = _panel(axes, np.where(judged[layer], known, np.nan), order, scale, columns)
            _mark_selected(axes, [at for at, expert in enumerate(order) if expert in selection.layers[layer].selected])
            pad = _POINTS_PER_INCH * _STRIP_HEIGHT * 1.5 * size + 4
            axes.set_title(f"layer {layer}", loc="left", fontsize=9, pad=pad, color=look.INK)
        else:
            axes.set_axis_off()
    _title(figure, selection, columns)
    colour_bar(figure, image, panels, "log2 of pairs observed / expected", percent=False, beyond=beyond)
    return figure


def _scale(ratios: Floats) -> tuple[TwoSlopeNorm, Beyond]:
    """Colours for most of the judged ratios [pairs], and at which ends of the scale there are more."""
    limit = max(_LEAST_LIMIT, float(np.quantile(np.abs(ratios), _INSIDE_SCALE)) if len(ratios) else 0.0)
    ends: dict[tuple[bool, bool], Beyond] = {
        (False, False): "neither",
        (True, False): "min",
        (False, True): "max",
        (True, True): "both",
    }
    return TwoSlopeNorm(0, -limit, limit), ends[bool((ratios < -limit).any()), bool((ratios > limit).any())]


def _pairs(selection: Selection, statistics: RouterStatistics) -> NDArray[np.int64]:
    """[layers, experts, experts] tokens of the chosen sources for which both experts were selected."""
    chosen = [statistics.sources[name].co_selection().sum(axis=0) for name in selection.sources]
    return np.sum(chosen, axis=0)


def pair_log_ratios(together: NDArray[np.int64]) -> Floats:
    """[layers, experts, experts] log2 of observed over expected pairs; the diagonal is 0.

    Half a pair is added to both counts (Haldane 1956, Annals of Human Genetics 20), so that a pair never seen stays
    finite. Ratios of rare pairs are mostly luck: `judged_pairs` says which to look at.

    Args:
        together: [layers, experts, experts] tokens for which both experts were selected; the diagonal is not used.
    """
    observed = _without_diagonal(together)
    ratios: Floats = np.log2((observed + 0.5) / (expected_pairs(together) + 0.5))
    return _without_diagonal(ratios)


def judged_pairs(together: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[layers, experts, experts] whether enough pairs were seen or expected to tell company from luck; no diagonal.

    That is where the observed count is three standard deviations from the expected one, or so many pairs are expected
    that half as many would be. The standard deviation is the root of the expected count (Poisson), as if tokens were
    independent; tokens of one text are less than that, so pairs near the limit may still be luck.

    Args:
        together: as in `pair_log_ratios`.
    """
    expected = expected_pairs(together)
    distance = np.abs(_without_diagonal(together) - expected)
    told = (distance > 0) & (distance >= _DEVIATIONS * np.sqrt(expected))
    return (told | (expected >= _ENOUGH_PAIRS)) & ~np.eye(together.shape[-1], dtype=bool)


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


def _panel(axes: Any, ratios: Floats, order: list[int], scale: Any, columns: int) -> Any:
    """Ratios [experts, experts] of a layer in this order; NaN is grey."""
    axes.set_facecolor(look.PALE)
    image = axes.imshow(ratios[np.ix_(order, order)], cmap=DIVERGING, norm=scale, interpolation="nearest")
    _expert_numbers(axes, order, columns)
    hide_frame(axes)
    return image


def _mark_selected(axes: Any, places: Sequence[int]) -> None:
    """A strip above the columns of the selected experts: it stays visible where a cell is one pixel."""
    height = _STRIP_HEIGHT * len(axes.images[0].get_array())
    marks = [Rectangle((place - 0.5, -0.5 - 1.3 * height), 1, height) for place in places]
    axes.add_collection(PatchCollection(marks, facecolor=look.YELLOW, edgecolor="none", clip_on=False), autolim=False)


def _expert_numbers(axes: Any, order: list[int], columns: int) -> None:
    """The number of each expert where there is room for it."""
    shown = order if len(order) * columns <= _MOST_LABELS else []
    axes.set_xticks(range(len(shown)), shown)
    axes.set_yticks(range(len(shown)), shown)
    axes.tick_params(labelsize=7, length=0, pad=2, colors=look.INK)


def _title(figure: Any, selection: Selection, columns: int) -> None:
    colours = ("yellow above: selected", "grey: too few pairs to tell from luck")
    what = f"Experts chosen together for {' + '.join(selection.sources)}, grouped by company"
    text = "\n".join((what, ("\n" if columns == 1 else "; ").join(colours)))
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold", color=look.INK)
