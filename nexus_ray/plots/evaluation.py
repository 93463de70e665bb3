"""Figures of an evaluation: router drift by layer, perplexity with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nexus_ray import plot_style as look
from nexus_ray.evaluation.wording import Outcome, by_role, change, change_interval, classify, number
from nexus_ray.storage import Place

_MODELS = (("base", look.GREY, "o", -0.16), ("student", look.BLUE, "D", 0.16))
_OUTCOME_COLOURS = {Outcome.BETTER: look.GREEN, Outcome.WORSE: look.ORANGE}
_PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
# Panels of the drift figure: where the values are, title, unit.
_TOKEN_DRIFT = (
    ("router_drift", "kl", "Router KL(base || student)", "nats per token"),
    ("router_drift", "tv", "Router total variation", "probability moved"),
    ("router_drift", "top_k_overlap", "Same experts selected", "share of the base's selection"),
)
_LOAD_DRIFT = (
    ("router_load", "total_variation", "Load moved to other experts", "share of selections"),
    ("router_load", "largest_ratio", "Largest change of one expert's load", "factor, up or down"),
    ("router_load", "student_peak", "Busiest expert (base: hollow)", "multiple of an even share"),
)
_SHARES = ("tv", "top_k_overlap", "total_variation")


def plot_drift(evaluation: Mapping[str, Any], path: Place) -> None:
    """Router drift by layer, a line a source: token by token above, in how the experts share the work below.

    Args:
        evaluation: results by source, as in `report.json`.
        path: the PNG to write.
    """
    figure, rows = look.panel_rows((3, 3), (1.15, 1.15), width=12)
    for axes, panel in zip([*rows[0], *rows[1]], _TOKEN_DRIFT + _LOAD_DRIFT, strict=True):
        _drift_panel(axes, evaluation, *panel)
    look.legend_below(figure, rows[0][0])
    look.save(figure, path)


def _drift_panel(axes: Any, evaluation: Mapping[str, Any], group: str, measure: str, title: str, unit: str) -> None:
    look.style(axes, title, "layer", unit)
    for index, (name, result) in enumerate(by_role(evaluation).items()):
        values = result[group][measure]
        line = look.series(index, dashed=result["role"] != "domain")
        axes.plot(range(len(values)), values, label=f"{name} ({result['role']})", **line)
        if measure == "student_peak":
            hollow = {"linestyle": "", "markerfacecolor": "none", "markersize": 9}
            axes.plot(range(len(values)), result[group]["base_peak"], **line | hollow)
    if measure in _SHARES:
        axes.yaxis.set_major_formatter(_PERCENT)
    if group == "router_load" and measure not in _SHARES:
        axes.axhline(1, color=look.GREY, linewidth=1, linestyle=":", zorder=0)
        look.log_when_wide(axes)
    elif measure != "top_k_overlap":
        look.from_zero(axes)


def plot_perplexity(evaluation: Mapping[str, Any], path: Place) -> None:
    """Base and student perplexity of every source with confidence intervals; the change beside each pair.

    Args:
        evaluation: results by source, as in `report.json`.
        path: the PNG to write.
    """
    results = by_role(evaluation)
    figure = look.new_figure(9, 1.6 + 0.75 * len(results))
    axes = look.style(figure.add_subplot(), "Held-out perplexity", "", "")
    for row, result in enumerate(results.values()):
        for model, colour, marker, shift in _MODELS:
            label = model if row == 0 else None
            _whisker(axes, row + shift, result[model], colour=colour, marker=marker, label=label)
        _change_label(axes, row, result["ratio"])
        if row:
            axes.axhline(row - 0.5, color=look.PALE, linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{name}\n({result['role']})" for name, result in results.items()])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    _perplexity_scale(axes, results)
    look.legend_below(figure, axes)
    look.save(figure, path)


def _whisker(axes: Any, row: float, model: Mapping[str, Any], *, colour: str, marker: str, label: str | None) -> None:
    """One model's perplexity, its interval and its value in figures."""
    value, (low, high) = model["token_perplexity"], model["confidence_interval"]
    errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
    line = {"elinewidth": 2.2, "capsize": 4, "capthick": 1.8, "markersize": 6}
    axes.errorbar(value, row, xerr=errors, fmt=marker, color=colour, label=label, zorder=3, **line)
    place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(number(value), (max(high, value), row), color=colour, **place)


def _change_label(axes: Any, row: int, ratio: Mapping[str, Any]) -> None:
    """The change and its interval, right of the axes: green is better, orange worse, grey unclear."""
    interval = ratio["confidence_interval"]
    colour = _OUTCOME_COLOURS.get(classify(interval), look.GREY)
    place = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    head = {"va": "bottom", "fontsize": 11, "fontweight": "bold"}
    axes.text(1.02, row, change(ratio["value"]), color=colour, **head, **place)
    axes.text(1.02, row + 0.05, change_interval(interval), color=look.INK, va="top", fontsize=8.5, **place)


def _perplexity_scale(axes: Any, results: Mapping[str, Any]) -> None:
    """A logarithmic axis when the perplexities span more than a factor of five; room for the figures."""
    values = [result[model]["token_perplexity"] for result in results.values() for model in ("base", "student")]
    wide = max(values) > 5 * min(values)
    axes.set_xlabel(f"perplexity per token{', log scale' if wide else ''} (lower is better)")
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
