"""Curves of a selection, each beside what chance gives: concentration, router variance, stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from nexus_ray import plot_style as look
from nexus_ray.selection.figures.panels import (
    PERCENT,
    by_layer,
    layer_axis,
    layer_bar,
    layer_colours,
    layers_with_a_choice,
    of_choices,
    rank_axis,
    selected_count,
)
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import LayerSelection, Selection
from nexus_ray.selection.scores import Floats, cumulative_shares

_LEAST_SPECTRUM = 1e-6  # share of variance; the last component of probabilities, which sum to 1, is rounding
_WIDE = 100  # ratio of the largest to the smallest share, from which on powers of ten are enough as ticks
_VERDICTS = {
    "stable": (look.GREEN, "o"),
    "partly stable": (look.YELLOW, "^"),
    "not distinguishable from noise": (look.GREY, "X"),
}
_CHANCE = {"color": look.ORANGE, "linestyle": "--", "linewidth": 1.6}


def concentration_figure(selection: Selection) -> Any | None:
    """Share of the score by number of experts, and how far it exceeds the null's; a dot at the selected number.

    Layers whose experts all hold the same weights are left out; None when all are like that.
    """
    layers = layers_with_a_choice(selection)
    if not layers:
        return None
    figure = look.new_figure(11, 4.2)
    held, above = figure.subplots(1, 2)
    score, null_name = METHODS[selection.method].title, METHODS[selection.method].null_name
    look.style(held, f"{score} held by the best experts", "number of experts", "share of the layer's score")
    look.style(
        above,
        f"The same, above that of {null_name}",
        "number of experts",
        "difference of the shares",
    )
    _concentration_curves(held, above, selection, layers)
    held.set_ylim(0, 1.03)
    for axes in (held, above):
        axes.yaxis.set_major_formatter(PERCENT)
        rank_axis(axes, selection.num_experts)
    held.legend(frameon=False, fontsize=8.5, loc="lower right")
    layer_bar(figure, above, len(selection.layers))
    return figure


def _concentration_curves(held: Any, above: Any, selection: Selection, layers: Sequence[int]) -> None:
    """The curves and dots of these layers in both panels."""
    null_name = METHODS[selection.method].null_name
    chosen = [selection.layers[layer] for layer in layers]
    colours = [layer_colours(len(selection.layers))[layer] for layer in layers]
    cumulative = cumulative_shares(np.asarray([layer.scores for layer in chosen]))
    null = np.asarray([layer.null_curve for layer in chosen])
    _layer_lines(held, cumulative, colours)
    _layer_lines(above, cumulative - null, colours)
    _null_band(held, null, null_name)
    counts = np.arange(1, selection.num_experts + 1)
    held.plot(counts, counts / selection.num_experts, color=look.GREY, linestyle=":", label="the same score each")
    above.axhline(0, **_CHANCE)
    label = f"selected ({selected_count(selection)})"
    _selected_dots(held, chosen, [layer.share for layer in chosen], label)
    differences = [layer.share - layer.null_curve[len(layer.selected) - 1] for layer in chosen]
    _selected_dots(above, chosen, differences, label)


def _layer_lines(axes: Any, values: Floats, colours: Sequence[Any]) -> None:
    """[layers, count] values by rank 1, 2, ..., a line a layer."""
    ranks = np.arange(1, values.shape[1] + 1)
    for row, colour in zip(values, colours, strict=True):
        axes.plot(ranks, row, color=colour, linewidth=1.4, marker="o" if len(ranks) <= 4 else "", markersize=3)


def _null_band(axes: Any, values: Floats, null_name: str) -> None:
    """Mean over layers of the null model's [layers, count] values, and their range."""
    ranks = np.arange(1, values.shape[1] + 1)
    axes.fill_between(ranks, values.min(axis=0), values.max(axis=0), color=look.ORANGE, alpha=0.2, linewidth=0)
    axes.plot(ranks, values.mean(axis=0), label=f"{null_name}: mean and range of the layers", **_CHANCE)


def _selected_dots(axes: Any, layers: Sequence[LayerSelection], values: Sequence[float], label: str) -> None:
    counts = [len(layer.selected) for layer in layers]
    axes.scatter(counts, values, s=26, color=look.YELLOW, edgecolor=look.INK, label=label, zorder=3)


def variance_figure(selection: Selection) -> Any:
    """Cumulative variance explained, the spectrum itself, and the total variance of each layer."""
    figure = look.new_figure(11, 3.9)
    explained, spectrum, total = figure.subplots(1, 3, width_ratios=(1, 1.2, 0.9))
    ratios = np.asarray([layer.explained_variance_ratio for layer in selection.layers])
    null = np.asarray([layer.null_explained_variance_ratio for layer in selection.layers])
    look.style(explained, "Variance explained", "principal components", "cumulative share of variance")
    _layer_lines(explained, np.cumsum(ratios, axis=1), layer_colours(len(ratios)))
    _null_band(explained, np.cumsum(null, axis=1), "independent experts")
    explained.set_ylim(0, 1.03)
    explained.yaxis.set_major_formatter(PERCENT)
    rank_axis(explained, selection.num_experts)
    _spectrum_panel(spectrum, ratios, null)
    layer_bar(figure, spectrum, len(selection.layers))
    look.style(total, "Total variance", "layer", "variance of probabilities, all experts")
    total.bar(range(len(selection.layers)), by_layer(selection, lambda layer: layer.total_variance), color=look.BLUE)
    total.grid(visible=False, axis="x")
    layer_axis(total, len(selection.layers), most=9)
    look.legend_below(figure, explained)
    return figure


def _spectrum_panel(axes: Any, ratios: Floats, null: Floats) -> None:
    look.style(axes, "Spectrum", "principal component", "share of variance, log scale")
    visible, null_visible = (np.where(values > _LEAST_SPECTRUM, values, np.nan) for values in (ratios, null))
    _layer_lines(axes, visible, layer_colours(len(ratios)))
    _null_band(axes, null_visible, "independent experts")
    rank_axis(axes, ratios.shape[1])
    drawn = np.concatenate([values[np.isfinite(values)] for values in (visible, null_visible)])
    if len(drawn):
        _share_axis(axes, float(drawn.min()), float(drawn.max()))


def _share_axis(axes: Any, lowest: float, highest: float) -> None:
    """A logarithmic vertical axis for shares from `lowest` to `highest`, ticks between powers of ten if few."""
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.5, min(1.3, 3 * highest))
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > _WIDE * lowest else (1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_minor_formatter(NullFormatter())


def stability_figure(selection: Selection) -> Any | None:
    """By layer: do the halves of the text agree, and is the selected share more than the null model's?

    Layers whose experts all hold the same weights are left out; None when all are like that.
    """
    if not layers_with_a_choice(selection):
        return None
    figure = look.new_figure(11, 4.3)
    halves, share = figure.subplots(1, 2)
    _overlap_panel(halves, selection)
    _share_panel(share, selection)
    for axes in (halves, share):
        axes.yaxis.set_major_formatter(PERCENT)
        layer_axis(axes, len(selection.layers))
    _legend(figure, halves, share)
    return figure


def _overlap_panel(axes: Any, selection: Selection) -> None:
    look.style(axes, "Selected again from the other half of the text", "layer", "overlap of the two selections")
    overlaps = of_choices(selection, lambda layer: layer.split_half_overlap)
    chance = of_choices(selection, lambda layer: layer.chance_overlap)
    axes.plot(range(len(chance)), chance, marker="_", label="random selections", **_CHANCE)
    _verdict_markers(axes, selection, overlaps)
    axes.set_ylim(0, 1.06)
    if np.isnan(overlaps).all():
        place = {"transform": axes.transAxes, "ha": "center", "va": "center", "fontsize": 10, "color": look.GREY}
        axes.text(0.5, 0.72, "the halves hold too little text to compare", **place)


def _share_panel(axes: Any, selection: Selection) -> None:
    title = f"Score held by the {selected_count(selection)} selected"
    look.style(axes, title, "layer", "share of the layer's score")
    layers = np.arange(len(selection.layers))
    null = of_choices(selection, lambda layer: layer.null_share)
    highest = of_choices(selection, lambda layer: layer.null_share_high)
    errors = [np.zeros_like(null), np.maximum(highest - null, 0)]
    label = f"{METHODS[selection.method].null_name}, to the 95 % bound"
    axes.errorbar(layers, null, yerr=errors, marker="s", markersize=4, capsize=3, label=label, **_CHANCE)
    held_out = of_choices(selection, lambda layer: layer.held_out_share)
    line = {"linestyle": "none", "marker": "D", "markersize": 8, "markerfacecolor": "none", "color": look.BLUE}
    axes.plot(layers, held_out, label="experts of one half, scored on the other", **line)
    _verdict_markers(axes, selection, of_choices(selection, lambda layer: layer.share))


def _verdict_markers(axes: Any, selection: Selection, values: Floats) -> None:
    """Values by layer; colour and marker say the verdict."""
    layers = np.arange(len(values))
    axes.plot(layers, values, color=look.GREY, linewidth=1.2, zorder=2)
    for verdict, (colour, marker) in _VERDICTS.items():
        chosen = np.asarray([layer.verdict == verdict for layer in selection.layers])
        if chosen.any():
            look_of = {"color": colour, "marker": marker, "s": 46, "edgecolor": look.INK, "linewidth": 0.6}
            axes.scatter(layers[chosen], values[chosen], label=verdict, zorder=3, **look_of)


def _legend(figure: Any, *panels: Any) -> None:
    """One legend below the figure for all panels, each entry once, the verdicts first."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    entries = dict(sorted(found.items(), key=lambda entry: entry[0] not in _VERDICTS))
    place = {"loc": "outside lower center", "ncols": 3}
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, **place)
