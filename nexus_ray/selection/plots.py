"""Figures of an expert selection: which experts matter, which text uses them, and how far to trust it.

Drawn from `selection.json` alone, so nothing is lost when drawing fails and any figure can be drawn again. Every
number of layers and experts is drawn to scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, PowerNorm, TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nexus_ray import plot_style as look
from nexus_ray.selection.scores import Floats
from nexus_ray.selection.selection import Selection

_BLUES = ("#FFFFFF", "#C6DDF0", "#56A3D9", look.BLUE, "#0B2A45")
_SEQUENTIAL = LinearSegmentedColormap.from_list("white_to_blue", _BLUES)
_DIVERGING = LinearSegmentedColormap.from_list("orange_to_blue", [look.ORANGE, "#FFFFFF", look.BLUE])
_PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
_SCORES = {"pca": "PCA importance", "usage": "Selection count", "reap": "REAP saliency"}
_WITHOUT_STRUCTURE = {"pca": "independent experts", "usage": "equal use", "reap": "equal experts"}
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#8CC5EA", look.BLUE, "#0B1D33"])


def plot_selection(selection: Selection, directory: Path) -> list[Path]:
    """Draw all figures of a selection as PNG below `directory` and return their paths.

    Raises:
        StorageError: the file system refused.
    """
    figures = {
        "expert_importance.png": _importance_figure(selection),
        "expert_usage.png": _usage_figure(selection),
        "router_variance.png": _variance_figure(selection),
        "selection_stability.png": _stability_figure(selection),
    }
    for name, figure in figures.items():
        look.save(figure, directory / name)
    return [directory / name for name in figures]


def _importance_figure(selection: Selection) -> Any:
    """Heatmap of layers x experts, the selected ones marked."""
    height = _heatmap_height(selection)
    figure = look.new_figure(11, height + 1.3)
    axes = figure.add_subplot()
    values = np.zeros((len(selection.layers), selection.num_experts))
    for layer, row in enumerate(selection.layers):
        values[layer, list(row.ranked)] = row.scores
    totals = values.sum(axis=1, keepdims=True)
    shares = np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)
    image = _heatmap(axes, shares, _SEQUENTIAL, norm=PowerNorm(0.5, vmin=0))
    _outline_selected(axes, selection)
    score = _SCORES[selection.method]
    _panel_title(axes, f"{score} of each expert; the top {selection.top_k} of each layer are outlined")
    _colour_bar(figure, image, axes, "share of the layer's score")
    return figure


def _usage_figure(selection: Selection) -> Any:
    """Share of selections by expert, a heatmap a source, and how the chosen sources differ from the rest."""
    usage = _usage_by_source(selection)
    others = [name for name in usage if name not in selection.sources]
    panels = len(usage) + bool(others)
    figure = look.new_figure(11, panels * (_heatmap_height(selection) + 0.75) + 0.2)
    grid = figure.subplots(panels, 1, squeeze=False)[:, 0]
    highest = max(float(values.max()) for values in usage.values())
    for axes, (name, values) in zip(grid, usage.items(), strict=False):
        image = _heatmap(axes, values, _SEQUENTIAL, vmin=0, vmax=highest)
        _panel_title(axes, f"{name}: experts that {selection.tokens[name]:,} tokens are sent to")
        _colour_bar(figure, image, axes, "share of selections")
    if others:
        _difference_panel(figure, grid[-1], selection, usage, others)
    return figure


def _difference_panel(
    figure: Any, axes: Any, selection: Selection, usage: dict[str, Floats], others: list[str]
) -> None:
    chosen = np.mean([usage[name] for name in selection.sources], axis=0)
    difference = 100 * (chosen - np.mean([usage[name] for name in others], axis=0))
    limit = max(float(np.abs(difference).max()), 1e-9)
    image = _heatmap(axes, difference, _DIVERGING, norm=TwoSlopeNorm(0, -limit, limit))
    _panel_title(axes, f"{' + '.join(selection.sources)} minus {' + '.join(others)}")
    _colour_bar(figure, image, axes, "percentage points", percent=False)


def _variance_figure(selection: Selection) -> Any:
    """Cumulative explained variance by component, and total variance by layer."""
    figure = look.new_figure(11, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    look.style(left, "Variance explained by the leading components", "principal components", "share of variance")
    colours = _layer_colours(len(selection.layers))
    for layer, colour in zip(selection.layers, colours, strict=True):
        ratios = np.cumsum(layer.explained_variance_ratio)
        left.plot(np.arange(1, len(ratios) + 1), ratios, color=colour, linewidth=1.6, marker="o", markersize=3)
    left.set_ylim(0, 1.03)
    left.yaxis.set_major_formatter(_PERCENT)
    left.set_xticks(1 + _ticks(len(selection.layers[0].explained_variance_ratio), 20))
    _layer_bar(figure, left, len(selection.layers))
    look.style(right, "Total variance of router probabilities", "layer", "variance, summed over experts")
    right.bar(range(len(selection.layers)), [layer.total_variance for layer in selection.layers], color=look.BLUE)
    right.grid(visible=False, axis="x")
    right.set_xticks(_ticks(len(selection.layers), 12))
    right.set_xlim(-1, len(selection.layers))
    return figure


def _stability_figure(selection: Selection) -> Any:
    """Scores by rank, share of the selected against the null model, agreement of two halves of the text."""
    figure = look.new_figure(11, 3.9)
    ranks, shares, halves = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _rank_panel(figure, ranks, selection)
    _share_panel(shares, selection)
    _overlap_panel(halves, selection)
    return figure


def _rank_panel(figure: Any, axes: Any, selection: Selection) -> None:
    look.style(axes, "Score by rank", "rank of the expert", "share of the layer's score")
    for layer, colour in zip(selection.layers, _layer_colours(len(selection.layers)), strict=True):
        scores = np.asarray(layer.scores)
        axes.plot(np.arange(1, len(scores) + 1), scores / max(scores.sum(), 1e-300), color=colour, linewidth=1.4)
    axes.axvline(selection.top_k + 0.5, color=look.ORANGE, linestyle="--", linewidth=1.4)
    axes.text(
        selection.top_k + 0.5, 0.97, f" top {selection.top_k}",
        transform=axes.get_xaxis_transform(), color=look.ORANGE, fontsize=9, va="top",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xticks(1 + _ticks(selection.num_experts, 8))
    _layer_bar(figure, axes, len(selection.layers))


def _share_panel(axes: Any, selection: Selection) -> None:
    look.style(axes, f"Score held by the top {selection.top_k}", "layer", "share of the layer's score")
    layers = range(len(selection.layers))
    null = _WITHOUT_STRUCTURE[selection.method]
    axes.plot(layers, [layer.share for layer in selection.layers], label="measured", **look.series(0))
    axes.plot(layers, [layer.null_share for layer in selection.layers], label=null, **_null_line())
    _percent_axis(axes, len(selection.layers))


def _overlap_panel(axes: Any, selection: Selection) -> None:
    look.style(axes, "Split-half agreement", "layer", f"top {selection.top_k} in common")
    overlaps = [np.nan if row.split_half_overlap is None else row.split_half_overlap for row in selection.layers]
    axes.plot(range(len(overlaps)), overlaps, label="measured", **look.series(0))
    axes.axhline(selection.chance_overlap, label="random selections", color=look.ORANGE, linestyle="--")
    _percent_axis(axes, len(selection.layers))


def _percent_axis(axes: Any, layers: int) -> None:
    axes.set_xticks(_ticks(layers, 12))
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.legend(frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 0.0))


def _null_line() -> dict[str, Any]:
    return {"color": look.ORANGE, "marker": "s", "markersize": 4, "linestyle": "--", "linewidth": 1.6}


def _heatmap(axes: Any, values: Floats, colours: Any, **scale: Any) -> Any:
    """Layers downwards, experts to the right."""
    image = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **scale)
    axes.set_xlabel("expert", fontsize=9.5, color=look.INK)
    axes.set_ylabel("layer", fontsize=9.5, color=look.INK)
    axes.tick_params(labelsize=9, colors=look.INK)
    axes.set_xticks(_ticks(values.shape[1], 32))
    axes.set_yticks(_ticks(values.shape[0], 12))
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", color=look.PALE, linewidth=0.5 if values.shape[1] <= 64 else 0.25)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def _panel_title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=look.INK)


def _colour_bar(figure: Any, image: Any, axes: Any, label: str, *, percent: bool = True) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.012, aspect=14, format=_PERCENT if percent else None)
    bar.set_label(label, fontsize=9, color=look.INK)
    bar.ax.tick_params(labelsize=8.5, colors=look.INK)
    bar.outline.set_visible(False)


def _layer_bar(figure: Any, axes: Any, layers: int) -> None:
    """The colour of each layer, as a scale beside the panel."""
    if layers == 1:
        return
    colours = LinearSegmentedColormap.from_list("discrete", _layer_colours(layers), N=layers)
    mappable = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), colours)
    bar = figure.colorbar(mappable, ax=axes, pad=0.02, aspect=22)
    bar.set_label("layer", fontsize=9, color=look.INK)
    bar.minorticks_off()
    bar.set_ticks(_ticks(layers, 12))
    bar.ax.tick_params(labelsize=8.5, colors=look.INK)
    bar.outline.set_visible(False)


def _layer_colours(layers: int) -> list[Any]:
    return [_LAYERS(value) for value in np.linspace(0, 1, layers)] if layers > 1 else [look.BLUE]


def _ticks(count: int, most: int) -> NDArray[np.int64]:
    """Numbers from 0 below `count` at the smallest distance of 1, 2, 4, 8, ... that gives at most `most`."""
    step = 1
    while count > step * most:
        step *= 2
    return np.arange(0, count, step)


def _heatmap_height(selection: Selection) -> float:
    """Inches."""
    return float(np.clip(0.26 * len(selection.layers), 1.2, 5.5))


def _outline_selected(axes: Any, selection: Selection) -> None:
    """A frame just inside the cell of each selected expert."""
    frames = [
        Rectangle((expert - 0.42, layer - 0.42), 0.84, 0.84)
        for layer, row in enumerate(selection.layers)
        for expert in row.selected
    ]
    width = 1.6 if selection.num_experts <= 64 else 0.9
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=look.YELLOW, linewidth=width))


def _usage_by_source(selection: Selection) -> dict[str, Floats]:
    """[layers, experts] by source, the chosen sources first."""
    names = sorted(selection.tokens, key=lambda name: name not in selection.sources)
    return {name: np.asarray([layer.usage_by_source[name] for layer in selection.layers]) for name in names}
