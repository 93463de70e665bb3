"""Heatmaps of a selection: the importance of every expert, and which text uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm, TwoSlopeNorm
from matplotlib.patches import Rectangle

from nexus_ray import plot_style as look
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.panels import (
    DIVERGING,
    SEQUENTIAL,
    colour_bar,
    heatmap,
    heatmap_height,
    panel_title,
    selected_count,
)
from nexus_ray.selection.record import Selection
from nexus_ray.selection.scores import Floats

_MANY_EXPERTS = 64  # past it, cells are a few pixels wide


def importance_figure(selection: Selection) -> Any:
    """Layers x experts: selected experts have a frame, those passed over for being redundant a cross."""
    figure = look.new_figure(11, heatmap_height(len(selection.layers), 5.5) + 1.3)
    axes = figure.add_subplot()
    values = np.zeros((len(selection.layers), selection.num_experts))
    for layer, row in enumerate(selection.layers):
        values[layer, list(row.ranked)] = row.scores
    totals = values.sum(axis=1, keepdims=True)
    shares = np.divide(values, totals, out=np.full_like(values, 1 / selection.num_experts), where=totals > 0)
    image = heatmap(axes, shares, SEQUENTIAL, norm=PowerNorm(0.5, vmin=0))
    _frame_selected(axes, selection)
    crossed = _cross_passed_over(axes, selection)
    note = "; a cross: passed over, too much like a better one" if crossed else ""
    panel_title(
        axes,
        f"{METHODS[selection.method].title} of each expert (frame: the {selected_count(selection)} selected{note})",
    )
    colour_bar(figure, image, axes, "share of the layer's score")
    return figure


def _frame_selected(axes: Any, selection: Selection) -> None:
    frames = [
        Rectangle((expert - 0.42, layer - 0.42), 0.84, 0.84)
        for layer, row in enumerate(selection.layers)
        for expert in row.selected
    ]
    width = 1.6 if selection.num_experts <= _MANY_EXPERTS else 0.9
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=look.YELLOW, linewidth=width))


def _cross_passed_over(axes: Any, selection: Selection) -> bool:
    """Whether there was any."""
    cells = [(expert, layer) for layer, row in enumerate(selection.layers) for expert in row.passed_over]
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
        image = heatmap(axes, values, SEQUENTIAL, vmin=0, vmax=highest or 1.0)
        panel_title(axes, f"{name}: experts that {selection.tokens[name]:,} tokens are sent to")
        colour_bar(figure, image, axes, "share of selections")
    if others:
        _difference_panel(figure, grid[-1], selection, usage, others)
    return figure


def _usage_by_source(selection: Selection) -> dict[str, Floats]:
    """[layers, experts] by source, the chosen sources first."""
    names = sorted(selection.tokens, key=lambda name: name not in selection.sources)
    return {name: np.asarray([layer.by_source[name].usage for layer in selection.layers]) for name in names}


def _difference_panel(
    figure: Any, axes: Any, selection: Selection, usage: dict[str, Floats], others: list[str]
) -> None:
    chosen = np.mean([usage[name] for name in selection.sources], axis=0)
    difference = 100 * (chosen - np.mean([usage[name] for name in others], axis=0))
    limit = max(float(np.abs(difference).max()), 1e-9)
    image = heatmap(axes, difference, DIVERGING, norm=TwoSlopeNorm(0, -limit, limit))
    panel_title(axes, f"{' + '.join(selection.sources)} minus {' + '.join(others)}")
    colour_bar(figure, image, axes, "percentage points", percent=False)
