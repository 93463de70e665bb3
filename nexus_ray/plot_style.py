"""The look that all figures share: colours, axes, legends, and how they are saved.

Drawn with matplotlib's object interface and the Agg canvas: no display, no global state. Colours are Okabe and
Ito's colour-blind-safe set (Color Universal Design, 2008); lines differ in marker or style too, so that they
can be told apart in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nexus_ray.storage import atomic_file

BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
INK, GREY, PALE = "#222222", "#7A7A7A", "#E3E3E3"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLES = ("-", "--", "-.", (0, (1, 1.2)))
_DOTS_PER_INCH = 144


def new_figure(width: float, height: float) -> Figure:
    """A white figure of `width` x `height` inches that lays itself out."""
    padding_inches = 0.09
    layout = ConstrainedLayoutEngine(w_pad=padding_inches, h_pad=padding_inches)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panel_rows(large: int, small: int) -> tuple[Figure, list[Any]]:
    """A figure with a row of large panels over a row of small ones, and its axes in that order."""
    figure = new_figure(11, 3.7 + (2.6 if small else 0))
    rows = figure.add_gridspec(2 if small else 1, 1, height_ratios=(1.4, 1) if small else (1,))
    cells = _cells(rows[0], large) + (_cells(rows[1], small) if small else [])
    return figure, [figure.add_subplot(cell) for cell in cells]


def _cells(row: Any, columns: int) -> list[Any]:
    grid = row.subgridspec(1, columns)
    return [grid[0, column] for column in range(columns)]


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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


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


def log_when_wide(axes: Any) -> None:
    """A logarithmic vertical axis when what is drawn is positive and spans more than a factor of ten."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    if len(drawn) and drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(axes.get_ylabel() + ", log scale")


def legend(axes: Any) -> None:
    """A legend inside the axes, where there is room."""
    axes.legend(frameon=False, fontsize=8.5)


def legend_below(figure: Figure, axes: Any) -> None:
    """The legend of `axes` below the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": min(4, max(1, len(labels)))}
    figure.legend(handles, labels, frameon=False, fontsize=9, **place)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; the same data give the same bytes."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
