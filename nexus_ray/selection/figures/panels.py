"""What the figures of a selection share: heatmaps of layers x experts, colour scales, and axes by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nexus_ray import plot_style as look
from nexus_ray.selection.record import LayerSelection, Selection
from nexus_ray.selection.scores import Floats

_PALE_HALF = LinearSegmentedColormap.from_list(
    "pale_half", [(0, "#FFFFFF"), (0.5, "#DCEAF6"), (0.65, "#8CC1E6"), (0.85, look.BLUE), (1, "#0B2A45")]
)
DIVERGING = LinearSegmentedColormap.from_list("orange_to_blue", [look.ORANGE, "#FFFFFF", look.BLUE])
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#8CC5EA", look.BLUE, "#0B1D33"])
_FEW_TICKS = 12
Beyond = Literal["neither", "min", "max", "both"]


def heatmap(axes: Any, values: Floats, colours: Any, **scale: Any) -> Any:
    """Draw [layers, experts] values, layers downwards and experts to the right; returns the image."""
    image = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **scale)
    axes.set_xlabel("expert", fontsize=9.5, color=look.INK)
    axes.set_ylabel("layer", fontsize=9.5, color=look.INK)
    axes.tick_params(labelsize=9, colors=look.INK)
    axes.set_xticks(ticks(values.shape[1], 32))
    axes.set_yticks(ticks(values.shape[0], _FEW_TICKS))
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", color=look.PALE, linewidth=0.5 if values.shape[1] <= 64 else 0.25)
    axes.tick_params(which="minor", length=0)
    hide_frame(axes)
    return image


def share_heatmap(axes: Any, shares: Floats, highest: float) -> Any:
    """Draw [layers, experts] shares of a layer's total, on a scale up to `highest`; returns the image.

    Shares up to the even one, 1 / experts, are pale, so that a layer without preferences stays pale altogether.
    """
    even = 1 / shares.shape[1]
    return heatmap(axes, shares, _PALE_HALF, norm=TwoSlopeNorm(even, 0, max(highest, 2 * even)))


def share_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """The scale of a `share_heatmap`, with a mark at the even share."""
    even, highest = image.norm.vcenter, image.norm.vmax
    bar = colour_bar(figure, image, axes, label)
    marks = [0, even, (even + highest) / 2, highest]
    bar.set_ticks(marks, labels=[f"{100 * mark:.3g} %" for mark in marks])


def hide_frame(axes: Any) -> None:
    """Remove the four sides of the axes."""
    for side in axes.spines.values():
        side.set_visible(False)


def heatmap_height(layers: int, tallest: float) -> float:
    """Height in inches of a heatmap of `layers` rows."""
    return float(np.clip(0.26 * layers, 1.2, tallest))


def panel_title(axes: Any, text: str) -> None:
    """The title of a panel, in the look of all figures."""
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=look.INK)


def colour_bar(
    figure: Any, image: Any, axes: Any, label: str, *, percent: bool = True, beyond: Beyond = "neither"
) -> Any:
    """Put the scale of an image beside its panel, or beside all panels of an array, and return it.

    Args:
        figure: that both are in.
        image: whose colours are explained.
        axes: its panel, or an array of panels.
        label: of the scale, with the unit.
        percent: whether the values are shares.
        beyond: the ends of the scale that some values lie outside of; they get an arrow.
    """
    place = {"pad": 0.012, "aspect": 14} if np.ndim(axes) == 0 else {"pad": 0.015, "aspect": 45, "fraction": 0.03}
    bar = figure.colorbar(image, ax=axes, format=PERCENT if percent else None, extend=beyond, **place)
    _quiet(bar, label)
    return bar


def layer_bar(figure: Any, axes: Any, layers: int) -> None:
    """The colour of each layer, as a scale beside the panel."""
    if layers == 1:
        return
    colours = LinearSegmentedColormap.from_list("discrete", layer_colours(layers), N=layers)
    mappable = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), colours)
    bar = figure.colorbar(mappable, ax=axes, pad=0.02, aspect=22)
    bar.minorticks_off()
    bar.set_ticks(ticks(layers, _FEW_TICKS))
    _quiet(bar, "layer")


def _quiet(bar: Any, label: str) -> None:
    bar.set_label(label, fontsize=9, color=look.INK)
    bar.ax.tick_params(labelsize=8.5, colors=look.INK)
    bar.outline.set_visible(False)


def layer_colours(layers: int) -> list[Any]:
    """A colour a layer, from light to dark."""
    return [_LAYERS(value) for value in np.linspace(0, 1, layers)] if layers > 1 else [look.BLUE]


def layer_axis(axes: Any, layers: int, most: int = _FEW_TICKS) -> None:
    """Whole layer numbers along the bottom, at most so many."""
    axes.set_xticks(ticks(layers, most))
    axes.set_xlim(-0.7, layers - 0.3)


def rank_axis(axes: Any, count: int) -> None:
    """Ticks 1 and the multiples of a power of two, for an axis that counts experts or components from 1."""
    axes.set_xticks(np.maximum(ticks(count + 1, 9), 1))
    axes.set_xlim(0.5 - 0.02 * count, count + 0.5 + 0.02 * count)


def ticks(count: int, most: int) -> NDArray[np.int64]:
    """Numbers from 0 below `count` at the smallest distance of 1, 2, 4, 8, ... that gives at most `most`."""
    step = 1
    while count > step * most:
        step *= 2
    return np.arange(0, count, step)


def by_layer(selection: Selection, value: Callable[[LayerSelection], float | None]) -> Floats:
    """[layers] of a value of each layer; NaN where it is None, so that it is not drawn."""
    values = (value(layer) for layer in selection.layers)
    return np.asarray([np.nan if number is None else number for number in values], dtype=np.float64)


def of_choices(selection: Selection, value: Callable[[LayerSelection], float | None]) -> Floats:
    """The same, NaN too where all experts hold the same weights, so that no choice means anything."""
    return by_layer(selection, lambda layer: value(layer) if layer.cause != "identical" else None)


def layers_with_a_choice(selection: Selection) -> list[int]:
    """Layers whose experts differ: where all hold the same weights a share of the score means nothing."""
    return [index for index, layer in enumerate(selection.layers) if layer.cause != "identical"]


def selected_count(selection: Selection) -> str:
    """How many experts a layer selects: `8`, or `5 to 9` where the layers differ."""
    counts = [len(layer.selected) for layer in selection.layers]
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
