"""The schedules of a training, drawn before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nexus_ray import plot_style as look
from nexus_ray.planning.schedules import Schedules
from nexus_ray.storage import Place


def plot_schedules(schedules: Schedules, path: Place) -> None:
    """Learning rates, and where there are any temperatures and changing weights, with merges and the freeze.

    Args:
        schedules: values of every step.
        path: the figure to write, .png or .svg.
    """
    panels = {
        "Learning rate" if len(schedules.rates) == 1 else "Learning rates": _named(schedules.rates),
        "Temperatures": dict(schedules.temperatures),
        "Weights that change": dict(schedules.weights),
    }
    drawn = {title: values for title, values in panels.items() if values}
    figure, axes = look.panel_rows([len(drawn)], [1.2], width=4 + 3.5 * len(drawn))
    for place, (title, values) in zip(axes[0], drawn.items(), strict=True):
        _panel(place, title, values)
        _marks(place, schedules)
    look.legend_of(figure, _mark_entries(axes[0][0]))
    look.save(figure, path)


def _named(rates: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    shown = {"learning_rate": "shared experts", "router_learning_rate": "router weights"}
    return {shown.get(name, "router biases"): values for name, values in rates.items()}


def _panel(axes: Any, title: str, values: Mapping[str, NDArray[np.float64]]) -> None:
    look.style(axes, title, "step", "")
    for index, (name, row) in enumerate(values.items()):
        shown = np.where(row > 0, row, np.nan) if title == "Learning rates" else row
        axes.plot(np.arange(len(row)) + 1, shown, label=name, **look.curve(index))
    if title == "Learning rates":
        axes.set_yscale("log")
    else:
        look.from_zero(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(values) > 1 or title != "Learning rate":
        look.legend(axes)


_MERGED, _FROZEN = "merged with the anchor", "router biases frozen"


def _marks(axes: Any, schedules: Schedules) -> None:
    if schedules.merges:
        place = {"transform": axes.get_xaxis_transform(), "markersize": 6, "clip_on": False, "zorder": 4}
        axes.plot(schedules.merges, [0.03] * len(schedules.merges), "^", color=look.PURPLE, label=_MERGED, **place)
    if schedules.frozen_at is not None:
        axes.axvline(schedules.frozen_at, color=look.SKY, linestyle=(0, (1, 1.2)), linewidth=1.4, label=_FROZEN)


def _mark_entries(axes: Any) -> list[tuple[Any, str]]:
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    return [(handle, label) for handle, label in entries if label in (_MERGED, _FROZEN)]
