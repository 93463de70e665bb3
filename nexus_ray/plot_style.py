"""The look that all figures share: colours, axes, legends, and how they are saved.

Drawn with matplotlib's object interface and the Agg canvas: no display. Colours are Okabe and
Ito's colour-blind-safe set (Color Universal Design, 2008); lines differ in marker or style too, so that they
can be told apart in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nexus_ray.errors import ConfigError
from nexus_ray.storage import Place, atomic_file

BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
INK, GREY, PALE = "#222222", "#7A7A7A", "#E3E3E3"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLES = ("-", "--", "-.", (0, (1, 1.2)))
_DOTS_PER_INCH = 144
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}


def new_figure(width: float, height: float) -> Figure:
    """A white figure of `width` x `height` inches that lays itself out."""
    padding_inches = 0.09
    layout = ConstrainedLayoutEngine(w_pad=padding_inches, h_pad=padding_inches)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panel_rows(columns: Sequence[int], heights: Sequence[float], width: float = 11) -> tuple[Figure, list[list[Any]]]:
    """A figure with rows of panels, and its axes row by row.

    Args:
        columns: panels of each row.
        heights: of the rows, relative to a small panel.
        width: inches.
    """
    figure = new_figure(width, 1.1 + 2.6 * sum(heights))
    rows = figure.add_gridspec(len(columns), 1, height_ratios=heights)
    axes = []
    for row, count in enumerate(columns):
        cells = rows[row].subgridspec(1, count)
        axes.append([figure.add_subplot(cells[0, column]) for column in range(count)])
    return figure, axes


def style(axes: Any, title: str, x_label: str, y_label: str) -> Any:
    """Give `axes` the look of every panel, with its title and units; returns them."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, fontsize=9.5, color=INK)
    axes.set_ylabel(y_label, fontsize=9.5, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(visible=True, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    if x_label in ("step", "layer"):
        whole_numbers(axes.xaxis)
    return axes


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def series(index: int, *, dashed: bool = False) -> dict[str, Any]:
    """Line number `index` of a plot with a marker at each point."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 5,
        "linestyle": "--" if dashed else "-",
        "linewidth": 1.8,
    }


def curve(index: int) -> dict[str, Any]:
    """Line number `index` of a plot with many points; colours and styles differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "linewidth": 1.9,
    }


def log_when_wide(axes: Any) -> bool:
    """A logarithmic vertical axis when what is drawn is positive and spans more than a factor of ten; whether it is."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    drawn = drawn[np.isfinite(drawn)]
    is_wide = bool(len(drawn) and drawn.min() > 0 and drawn.max() > 10 * drawn.min())
    if is_wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(axes.get_ylabel() + ", log scale")
    return is_wide


def from_zero(axes: Any) -> None:
    """A vertical axis from 0 to a little more than the largest value drawn."""
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1.0)


def legend(axes: Any) -> None:
    """A legend inside the axes, where there is room."""
    axes.legend(frameon=False, fontsize=8.5)


def legend_below(figure: Figure, axes: Any) -> None:
    """The legend of `axes` below the whole figure."""
    legend_of(figure, list(zip(*axes.get_legend_handles_labels(), strict=True)))


def legend_of(figure: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """A legend of these (handle, label) below the whole figure; none without any."""
    if entries:
        handles, labels = zip(*entries, strict=True)
        place = {"loc": "outside lower center", "ncols": min(4, len(labels))}
        figure.legend(handles, labels, frameon=False, fontsize=9, **place)


def colour_bar(image: Any, label: str) -> None:
    """What the colours of an image mean, right of its axes."""
    bar = image.axes.figure.colorbar(image, ax=image.axes, fraction=0.06, pad=0.03)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def check_format(path: Place) -> str:
    """The format that a figure's name asks for.

    Raises:
        ConfigError: it is neither PNG nor SVG.
    """
    found = path.suffix.lower().removeprefix(".")
    if found not in _METADATA:
        raise ConfigError(f"{path}: a figure is .png or .svg, found {path.suffix or 'no suffix'!r}", "e.g. runs.png")
    return found


def save(figure: Figure, path: Place) -> None:
    """Write a PNG or SVG, by the suffix, atomically; the same data give the same bytes.

    Raises:
        ConfigError: another suffix.
        StorageError: the file system refused.
    """
    kind = check_format(path)
    with atomic_file(path) as temporary, rc_context({"svg.hashsalt": "nexus-ray"}):
        figure.savefig(temporary, format=kind, dpi=_DOTS_PER_INCH, metadata=_METADATA[kind])
