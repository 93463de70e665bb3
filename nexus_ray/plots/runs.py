"""Several runs on the same axes, a panel a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nexus_ray import plot_style as look
from nexus_ray.config.schema import nearest
from nexus_ray.errors import ConfigError
from nexus_ray.plots import marks
from nexus_ray.plots.records import SMOOTHING, Curve, Records, curves_of, raw_and_smooth
from nexus_ray.storage import Place

_USUAL = ("train/loss", "validation/loss")
_TITLES = {"train/loss": "Training loss", "validation/loss": "Validation loss"}
_COLUMNS = 2
_FEW = 60  # points of a curve that are drawn one by one

Curves = Mapping[str, Mapping[str, Curve]]


def compare_runs(
    runs: Mapping[str, Records], path: Place, *, metrics: Sequence[str] = (), smoothing: float = SMOOTHING
) -> None:
    """The same metrics of several runs on the same axes, with marks of what happened to each.

    Args:
        runs: records of `metrics.jsonl` by name of the run.
        path: the figure to write, .png or .svg.
        metrics: by tag as in TensorBoard; `train/` may be left out. Default: training and validation loss.
        smoothing: width of the moving average, as a share of the run; 0: none.

    Raises:
        ConfigError: no run has such a metric.
    """
    curves = {name: curves_of(records) for name, records in runs.items()}
    tags = [_tag(metric, curves) for metric in metrics] or [tag for tag in _USUAL if _is_in(tag, curves)]
    rows = [tags[start : start + _COLUMNS] for start in range(0, len(tags), _COLUMNS)]
    figure, axes = look.panel_rows([len(row) for row in rows], [1.2] * len(rows), width=11 if len(tags) > 1 else 7)
    panels = [place for row in axes for place in row]
    for place, tag in zip(panels, tags, strict=True):
        _panel(place, tag, curves, runs, smoothing)
    marks.explain_run_signs(panels[0], list(runs.values()))
    look.legend_below(figure, panels[0])
    look.save(figure, path)


def _panel(axes: Any, tag: str, curves: Curves, runs: Mapping[str, Records], smoothing: float) -> None:
    look.style(axes, _TITLES.get(tag, tag), "step", "nats per token" if tag in _TITLES else "")
    for index, name in enumerate(runs):
        if curve := curves[name].get(tag):
            few = len(curve[0]) <= _FEW and not tag.startswith("train/")
            line = look.series(index) | look.curve(index) if few else look.curve(index)
            raw_and_smooth(axes, curve, line, name, 0 if few else smoothing)
        else:
            axes.plot([], [], label=name, **look.curve(index))
    look.log_when_wide(axes)
    for index, name in enumerate(runs):
        marks.draw_run(axes, runs[name], look.curve(index)["color"], index)


def _tag(metric: str, curves: Curves) -> str:
    """The tag that a person means."""
    for tag in (metric, f"train/{metric}"):
        if _is_in(tag, curves):
            return tag
    known = list(dict.fromkeys(tag for tags in curves.values() for tag in tags if "/layer_" not in tag))
    raise ConfigError(f"--metric {metric}: no run has it{nearest(metric, known)}", "layers are NAME/layer_00 and so on")


def _is_in(tag: str, curves: Curves) -> bool:
    return any(tag in tags for tags in curves.values())
