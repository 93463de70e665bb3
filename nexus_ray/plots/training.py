"""One training on one page: losses, schedules, gradient, speed, and the routers layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from nexus_ray import plot_style as look
from nexus_ray.config import LOSSES
from nexus_ray.plots import marks
from nexus_ray.plots.records import SMOOTHING, Curve, Records, curves_of, events, layers_of, raw_and_smooth
from nexus_ray.storage import Place

_PARTS = {
    "cross_entropy": "cross-entropy",
    "output_kl": "output KL",
    "hidden_mse": "hidden states",
    "router_kl": "router KL",
    "load_balancing": "load balancing",
    "router_z": "router z",
}
_HEATS = {
    "kl": ("Router KL(base || student)", "nats", "viridis"),
    "overlap": ("Same experts selected", "share", "cividis"),
    "entropy": ("Router entropy", "nats", "cividis"),
}
_COLUMNS = 3
_HEAT_STEPS = 200  # columns of a heat map: more steps are averaged


@dataclass(frozen=True)
class _Page:
    """What the panels of a page draw from."""

    records: Records
    curves: dict[str, Curve]
    smoothing: float

    def under(self, prefix: str) -> dict[str, Curve]:
        """Curves whose tag begins so, by the rest of it."""
        return {tag.removeprefix(prefix): curve for tag, curve in self.curves.items() if tag.startswith(prefix)}

    def changing(self) -> dict[str, Curve]:
        """Temperatures and weights that are not the same all the time."""
        named = {f"{name} temperature": self.curves.get(f"train/{name}_temperature") for name in ("output", "router")}
        named |= {tag.replace("/", ", "): curve for tag, curve in self.under("weights/").items()}
        return {name: curve for name, curve in named.items() if curve and np.ptp(curve[1]) > 0}


Panel = Callable[[Any, _Page], None]


def plot_training(metrics: Records, path: Place, smoothing: float = SMOOTHING) -> None:
    """Everything that the metrics of one run say, with marks where something happened.

    Args:
        metrics: records of `metrics.jsonl`; must hold at least one step.
        path: the figure to write, .png or .svg.
        smoothing: width of the moving average, as a share of the run; 0: none.
    """
    page = _Page(metrics, curves_of(metrics), smoothing)
    rows = _rows(page)
    figure, axes = look.panel_rows([len(row) for row in rows], [1.35] + [1.0] * (len(rows) - 1))
    for row, places in zip(rows, axes, strict=True):
        for draw, place in zip(row, places, strict=True):
            draw(place, page)
    _event_legend(figure, axes[0][0])
    look.save(figure, path)


def _rows(page: _Page) -> list[list[Panel]]:
    """The panels that there is something to draw in, row by row."""
    large: list[Panel] = [_loss]
    if any(f"train/{part}" in page.curves for part in LOSSES):
        large.append(_parts)
    small = [draw for draw, is_there in _small_panels(page) if is_there]
    heats: list[Panel] = [partial(_heat, measure) for measure in _HEATS if layers_of(page.records, measure)]
    return [row for row in (large, *_balanced(small), heats) if row]


def _balanced(panels: list[Panel]) -> list[list[Panel]]:
    """Rows of at most three panels, of nearly one length."""
    rows = -(-len(panels) // _COLUMNS)
    bounds = [row * len(panels) // rows for row in range(rows + 1)] if rows else []
    return [panels[start:end] for start, end in pairwise(bounds)]


def _small_panels(page: _Page) -> list[tuple[Panel, bool]]:
    return [
        (_validation, bool(page.under("validation/losses/"))),
        (_gradient, "train/gradient_norm" in page.curves),
        (_rates, "train/learning_rate" in page.curves),
        (_changing, bool(page.changing())),
        (_speed, _tokens_per_second(page) is not None),
        (_memory, "train/memory_gib" in page.curves),
    ]


def _loss(axes: Any, page: _Page) -> None:
    look.style(axes, "Loss", "step", "nats per token")
    if "train/loss" in page.curves:
        line = {"color": look.BLUE, "linewidth": 2}
        raw_and_smooth(axes, page.curves["train/loss"], line, "training", page.smoothing)
    if "validation/loss" in page.curves:
        steps, values = page.curves["validation/loss"]
        axes.plot(steps, values, color=look.ORANGE, marker="D", markersize=5, linewidth=1.2, label="validation")
        best = int(np.argmin(values))
        star = {"color": look.YELLOW, "edgecolor": look.INK, "linewidth": 0.7, "zorder": 5}
        axes.scatter(steps[best], values[best], marker="*", s=190, label=f"best, step {steps[best]:.0f}", **star)
    look.log_when_wide(axes)
    look.legend(axes)
    marks.draw_lines(axes, page.records)
    marks.draw_signs(axes, page.records)


def _event_legend(figure: Any, axes: Any) -> None:
    """What the marks of the first panel mean, below the page."""
    known = {text.get_text() for text in axes.get_legend().get_texts()}
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    look.legend_of(figure, [(handle, label) for handle, label in entries if label not in known])


def _parts(axes: Any, page: _Page) -> None:
    look.style(axes, "Parts of the loss, weighted", "step", "nats per token")
    for index, (name, label) in enumerate(_PARTS.items()):
        if curve := page.curves.get(f"train/{name}"):
            raw_and_smooth(axes, curve, look.curve(index + 1), label, page.smoothing)
    _finish(axes, page)


def _validation(axes: Any, page: _Page) -> None:
    look.style(axes, "Next-token loss, validation", "step", "nats per token")
    base = page.under("validation/base_losses/")
    for index, (name, curve) in enumerate(page.under("validation/losses/").items()):
        line = look.series(index)
        axes.plot(*curve, label=name, **line)
        if name in base:
            axes.axhline(base[name][1][-1], color=line["color"], linewidth=1, linestyle=(0, (1, 1.5)))
    if base:
        axes.plot([], [], color=look.GREY, linewidth=1, linestyle=(0, (1, 1.5)), label="base")
    _finish(axes, page)


def _rates(axes: Any, page: _Page) -> None:
    rates = {tag: curve for tag, curve in page.under("train/").items() if tag.endswith("learning_rate")}
    look.style(axes, "Learning rates" if len(rates) > 1 else "Learning rate", "step", "")
    for index, (name, (steps, values)) in enumerate(rates.items()):
        label = name.removesuffix("_learning_rate").replace("_", " ") if name != "learning_rate" else "shared experts"
        axes.plot(steps, np.where(values > 0, values, np.nan), label=label, **look.curve(index))
    if len(rates) > 1:
        axes.set_yscale("log")
        look.legend(axes)
    else:
        look.from_zero(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    marks.draw_lines(axes, page.records)


def _changing(axes: Any, page: _Page) -> None:
    look.style(axes, "Temperatures and weights", "step", "")
    for index, (name, curve) in enumerate(page.changing().items()):
        axes.plot(*curve, label=name, **look.curve(index))
    look.from_zero(axes)
    look.legend(axes)
    marks.draw_lines(axes, page.records)


def _gradient(axes: Any, page: _Page) -> None:
    look.style(axes, "Gradient norm, before clipping", "step", "L2 norm")
    line = {"color": look.GREEN, "linewidth": 1.9}
    raw_and_smooth(axes, page.curves["train/gradient_norm"], line, "", page.smoothing)
    clipped = [(record["step"] + 1, record["gradient_norm"]) for record in page.records if record.get("clipped")]
    if clipped:
        label = f"clipped, {len(clipped)} of {len(events(page.records, 'step'))} steps"
        axes.plot(*zip(*clipped, strict=True), ".", color=look.ORANGE, markersize=5, label=label)
        look.legend(axes)
    if not look.log_when_wide(axes):
        look.from_zero(axes)
    marks.draw_lines(axes, page.records)


def _speed(axes: Any, page: _Page) -> None:
    look.style(axes, "Speed", "step", "tokens per second")
    curve = _tokens_per_second(page)
    assert curve is not None
    raw_and_smooth(axes, curve, {"color": look.BLUE, "linewidth": 1.9}, "", page.smoothing)
    look.from_zero(axes)
    marks.draw_lines(axes, page.records)


def _tokens_per_second(page: _Page) -> Curve | None:
    """As recorded, or from tokens and seconds of each step."""
    if curve := page.curves.get("train/tokens_per_second"):
        return curve
    tokens, seconds = (page.curves.get(f"train/{name}") for name in ("tokens", "seconds"))
    if tokens is None or seconds is None or len(tokens[0]) != len(seconds[0]):
        return None
    return tokens[0], tokens[1] / np.maximum(seconds[1], 1e-9)


def _memory(axes: Any, page: _Page) -> None:
    look.style(axes, "Memory of a worker", "step", "GiB")
    axes.plot(*page.curves["train/memory_gib"], color=look.PURPLE, linewidth=1.9)
    look.from_zero(axes)
    marks.draw_lines(axes, page.records)


def _heat(measure: str, axes: Any, page: _Page) -> None:
    """Layers downwards, steps to the right."""
    title, unit, colours = _HEATS[measure]
    look.style(axes, title, "step", "layer")
    found = layers_of(page.records, measure)
    assert found is not None
    steps, values = found
    groups = np.array_split(np.arange(len(steps)), min(_HEAT_STEPS, len(steps)))
    table = np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
    half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
    extent = (steps[0] - half, steps[-1] + half, len(values) - 0.5, -0.5)
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap=colours, extent=extent)
    axes.grid(visible=False)
    look.whole_numbers(axes.yaxis)
    look.colour_bar(image, unit)


def _finish(axes: Any, page: _Page) -> None:
    look.log_when_wide(axes)
    look.legend(axes)
    marks.draw_lines(axes, page.records)
