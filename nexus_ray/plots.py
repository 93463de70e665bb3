"""Figures of a run: training curves, router drift, perplexity with intervals, several runs overlaid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from nexus_ray import plot_style as look
from nexus_ray.evaluation.wording import Outcome, by_role, change, change_interval, classify, number

_MODELS = (("base", look.GREY, "o", -0.16), ("student", look.BLUE, "D", 0.16))
_OUTCOME_COLOURS = {Outcome.BETTER: look.GREEN, Outcome.WORSE: look.ORANGE}
_PARTS = {"cross_entropy": "cross-entropy", "output_kl": "output KL", "router_kl": "router KL"}
_DRIFT = {
    "kl": ("Router KL(base || student)", "nats per token"),
    "l1": ("Router L1 distance", "sum of |probability change|"),
    "top_k_overlap": ("Same experts selected", "share of the base's selection"),
}
_SMOOTHING = 0.05  # of the run, the width of the moving average

Records = Sequence[Mapping[str, Any]]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def plot_training(metrics: Records, path: Path) -> None:
    """Loss, its parts, validation by source, learning rate and gradient norm of one run.

    Args:
        metrics: records of `metrics.jsonl`; must hold at least one step.
        path: the PNG to write.
    """
    large = [_loss_panel]
    if any(_has(metrics, "step", part) for part in _PARTS):
        large.append(_parts_panel)
    small: list[Callable[[Any, Records], None]] = []
    if any(record.get("losses") for record in _events(metrics, "validation")):
        small.append(_validation_panel)
    if _has(metrics, "step", "learning_rate"):
        small.append(_learning_rate_panel)
    if _has(metrics, "step", "gradient_norm"):
        small.append(_gradient_panel)
    figure, axes = look.panel_rows(len(large), len(small))
    for draw, place in zip([*large, *small], axes, strict=True):
        draw(place, metrics)
    look.save(figure, path)


def plot_drift(evaluation: Mapping[str, Any], path: Path) -> None:
    """Router drift by layer: KL, L1 and overlap of the selected experts, a line a source.

    Args:
        evaluation: results by source, as in `report.json`.
        path: the PNG to write.
    """
    figure = look.new_figure(11, 3.6)
    for column, (measure, (title, unit)) in enumerate(_DRIFT.items()):
        axes = look.style(figure.add_subplot(1, 3, column + 1), title, "layer", unit)
        for index, (name, result) in enumerate(by_role(evaluation).items()):
            values = result["router_drift"][measure]
            line = look.series(index, dashed=result["role"] != "domain")
            axes.plot(range(len(values)), values, label=f"{name} ({result['role']})", **line)
        if measure == "top_k_overlap":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %"))
        else:
            axes.set_ylim(bottom=0)
    look.legend_below(figure, figure.axes[0])
    look.save(figure, path)


def plot_perplexity(evaluation: Mapping[str, Any], path: Path) -> None:
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


def compare_runs(runs: Mapping[str, Records], path: Path) -> None:
    """Training and validation loss of several runs on the same axes.

    Args:
        runs: metrics by name of the run.
        path: the PNG to write.
    """
    validated = any(_has(metrics, "validation", "loss") for metrics in runs.values())
    figure = look.new_figure(11 if validated else 7, 4.2)
    add = partial(look.style, x_label="step", y_label="nats per token")
    training = add(figure.add_subplot(1, 1 + validated, 1), "Training loss")
    for index, (name, metrics) in enumerate(runs.items()):
        _raw_and_smooth(training, _curve(metrics, "step", "loss"), look.curve(index), name)
    if validated:
        validation = add(figure.add_subplot(1, 2, 2), "Validation loss")
        for index, metrics in enumerate(runs.values()):
            line = look.series(index) | look.curve(index)
            validation.plot(*_curve(metrics, "validation", "loss"), **line)
    for axes in figure.axes:
        look.log_when_wide(axes)
    look.legend_below(figure, training)
    look.save(figure, path)


def _loss_panel(axes: Any, metrics: Records) -> None:
    look.style(axes, "Loss", "step", "nats per token")
    _raw_and_smooth(axes, _curve(metrics, "step", "loss"), {"color": look.BLUE, "linewidth": 2}, "training")
    steps, values = _curve(metrics, "validation", "loss")
    if len(steps):
        axes.plot(steps, values, color=look.ORANGE, marker="D", markersize=5, linewidth=1.2, label="validation")
        best = int(np.argmin(values))
        star = {"color": look.YELLOW, "edgecolor": look.INK, "linewidth": 0.7, "zorder": 5}
        axes.scatter(steps[best], values[best], marker="*", s=190, label=f"best, step {steps[best]:.0f}", **star)
    look.log_when_wide(axes)
    _event_marks(axes, metrics)
    look.legend(axes)


def _event_marks(axes: Any, metrics: Records) -> None:
    """Vertical lines where the run was resumed, ticks at the foot where it was saved."""
    for index, record in enumerate(_events(metrics, "resume")):
        label = "resumed" if index == 0 else None
        axes.axvline(record["step"], color=look.GREY, linestyle=(0, (4, 3)), linewidth=1.1, label=label, zorder=1)
    saved = [record["step"] + 1 for record in _events(metrics, "checkpoint")]
    if saved:
        tick = {"color": look.GREY, "markersize": 9, "transform": axes.get_xaxis_transform()}
        axes.plot(saved, [0.015] * len(saved), "|", label="checkpoint", **tick)


def _parts_panel(axes: Any, metrics: Records) -> None:
    look.style(axes, "Parts of the loss, weighted", "step", "nats per token")
    for index, (name, label) in enumerate(_PARTS.items()):
        if _has(metrics, "step", name):
            _raw_and_smooth(axes, _curve(metrics, "step", name), look.curve(index + 1), label)
    look.log_when_wide(axes)
    look.legend(axes)


def _validation_panel(axes: Any, metrics: Records) -> None:
    look.style(axes, "Next-token loss, validation", "step", "nats per token")
    records = [record for record in _events(metrics, "validation") if record.get("losses")]
    for index, name in enumerate(dict.fromkeys(name for record in records for name in record["losses"])):
        own = [record for record in records if name in record["losses"]]
        steps = [record["step"] + 1 for record in own]
        axes.plot(steps, [record["losses"][name] for record in own], label=name, **look.series(index))
    look.log_when_wide(axes)
    look.legend(axes)


def _learning_rate_panel(axes: Any, metrics: Records) -> None:
    look.style(axes, "Learning rate", "step", "")
    axes.plot(*_curve(metrics, "step", "learning_rate"), color=look.GREEN, linewidth=1.9)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _gradient_panel(axes: Any, metrics: Records) -> None:
    look.style(axes, "Gradient norm, before clipping", "step", "L2 norm")
    _raw_and_smooth(axes, _curve(metrics, "step", "gradient_norm"), {"color": look.GREEN, "linewidth": 1.9}, "")
    axes.set_ylim(bottom=0)


def _raw_and_smooth(axes: Any, points: Curve, line: dict[str, Any], label: str) -> None:
    """A smoothed line over a faint one of the values themselves."""
    steps, values = points
    axes.plot(steps, values, color=line["color"], alpha=0.22, linewidth=0.8)
    axes.plot(steps, _smooth(values), label=label, **line)


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


def _events(metrics: Records, event: str) -> list[Mapping[str, Any]]:
    return [record for record in metrics if record.get("event") == event]


def _curve(metrics: Records, event: str, key: str) -> Curve:
    """(finished steps, values) of the records that have a finite value."""
    points = [
        (record["step"] + 1, float(record[key]))
        for record in _events(metrics, event)
        if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
    ]
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _has(metrics: Records, event: str, key: str) -> bool:
    return len(_curve(metrics, event, key)[0]) > 0


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a share of the run, narrower at both ends."""
    half = max(1, round(len(values) * _SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    smoothed: NDArray[np.float64] = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return smoothed
