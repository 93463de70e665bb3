"""Heatmaps of a selection: the importance of every expert, and which text uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

from nexus_ray import plot_style as look
from nexus_ray.selection.figures.panels import (
    DIVERGING,
    colour_bar,
    heatmap,
    heatmap_height,
    layers_with_a_choice,
    panel_title,
    selected_count,
    share_bar,
    share_heatmap,
)
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import Selection
from nexus_ray.selection.report.sources import ordered_sources
from nexus_ray.selection.scores import Floats

_MANY_EXPERTS = 64  # past it, cells are a few pixels wide


def importance_figure(selection: Selection) -> Any | None:
    """Layers x experts: selected experts have a frame, those passed over for being redundant a cross.

    A layer whose experts all hold the same weights is grey; None when all layers are like that.
    """
    if not layers_with_a_choice(selection):
        return None
    figure = look.new_figure(11, heatmap_height(len(selection.layers), 5.5) + 1.3)
    axes = figure.add_subplot()
    axes.set_facecolor(look.PALE)
    shares = _shares(selection)
    image = share_heatmap(axes, shares, float(np.nanmax(shares)))
    _frame_selected(axes, selection)
    crossed = _cross_passed_over(axes, selection)
    copies = len(layers_with_a_choice(selection)) < len(selection.layers)
    notes = [
        f"frame: the {selected_count(selection)} selected",
        *(["cross: passed over, too much like a better one"] if crossed else []),
        *(["grey: all experts hold the same weights"] if copies else []),
    ]
    panel_title(axes, f"{METHODS[selection.method].title} of each expert ({'; '.join(notes)})")
    share_bar(figure, image, axes, "share of the score")
    return figure


def _shares(selection: Selection) -> Floats:
    """[layers, experts] of each layer's score; NaN where all experts hold the same weights."""
    values = np.full((len(selection.layers), selection.num_experts), np.nan)
    for index in layers_with_a_choice(selection):
        layer = selection.layers[index]
        scores = np.asarray(layer.scores)
        total = scores.sum()
        values[index, list(layer.ranked)] = scores / total if total > 0 else 1 / selection.num_experts
    return values


def _frame_selected(axes: Any, selection: Selection) -> None:
    frames = [
        Rectangle((expert - 0.42, layer - 0.42), 0.84, 0.84)
        for layer in layers_with_a_choice(selection)
        for expert in selection.layers[layer].selected
    ]
    width = 1.6 if selection.num_experts <= _MANY_EXPERTS else 0.9
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=look.YELLOW, linewidth=width))


def _cross_passed_over(axes: Any, selection: Selection) -> bool:
    """Whether there was any."""
    layers = layers_with_a_choice(selection)
    cells = [(expert, layer) for layer in layers for expert in selection.layers[layer].passed_over]
    if cells:
        size = 28 if selection.num_experts <= _MANY_EXPERTS else 9
        axes.scatter(*zip(*cells, strict=True), marker="x", s=size, color=look.ORANGE, linewidth=1.3)
    return bool(cells)


def usage_figure(selection: Selection) -> Any:
    """Share of selections by expert, a heatmap a source, and how the chosen sources differ from the rest."""
    usage = _usage_by_source(selection)
    others = [name for name in usage if name not in selection.sources]
    panels = len(usage) + bool(others)
    height = heatmap_height(len(selection.layers), 5.5 if panels == 1 else 3.6)
    figure = look.new_figure(11, panels * (height + 0.75) + 0.2)
    grid = figure.subplots(panels, 1, squeeze=False)[:, 0]
    highest = max(float(values.max()) for values in usage.values())
    for axes, (name, values) in zip(grid, usage.items(), strict=False):
        image = share_heatmap(axes, values, highest)
        panel_title(axes, f"{name}: experts that {selection.tokens[name]:,} tokens are sent to")
        share_bar(figure, image, axes, "share of selections")
    if others:
        _difference_panel(figure, grid[-1], selection, usage, others)
    return figure


def _usage_by_source(selection: Selection) -> dict[str, Floats]:
    """[layers, experts] by source, the chosen sources first."""
    layers = selection.layers
    return {name: np.asarray([layer.by_source[name].usage for layer in layers]) for name in ordered_sources(selection)}


def _difference_panel(
    figure: Any, axes: Any, selection: Selection, usage: dict[str, Floats], others: list[str]
) -> None:
    chosen, rest = (_pooled(usage, selection, names) for names in (selection.sources, others))
    difference = 100 * (chosen - rest)
    limit = max(float(np.abs(difference).max()), 1e-9)
    image = heatmap(axes, difference, DIVERGING, norm=TwoSlopeNorm(0, -limit, limit))
    panel_title(axes, f"{' + '.join(selection.sources)} minus {' + '.join(others)}")
    colour_bar(figure, image, axes, "percentage points", percent=False)


def _pooled(usage: dict[str, Floats], selection: Selection, names: Sequence[str]) -> Floats:
    """[layers, experts] usage by these sources taken together: every token counts the same."""
    pooled: Floats = np.average([usage[name] for name in names], axis=0, weights=[selection.tokens[n] for n in names])
    return pooled
