"""Marks of events on panels over steps: lines where a training changed, signs where something happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray import plot_style as look
from nexus_ray.plots.records import Records, events


@dataclass(frozen=True)
class _Sign:
    """A sign at a height between 0 and 1 of the panel; `after` is 1 for what happens when a step is over."""

    marker: str
    label: str
    colour: str
    height: float
    after: int = 1


_LINES = {
    "resume": ("resumed", look.GREY, (0, (4, 3)), 0),
    "bias_frozen": ("router biases frozen", look.SKY, (0, (1, 1.2)), 0),
    "early_stop": ("stopped early", look.ORANGE, "-", 1),
    "stopped": ("stopped", look.INK, "-.", 1),
}
_SIGNS = {
    "checkpoint": _Sign("|", "checkpoint", look.GREY, 0.015),
    "merge": _Sign("^", "merged with the anchor", look.PURPLE, 0.05),
    "warning": _Sign("X", "warning", look.ORANGE, 0.965),
    "skipped": _Sign("x", "step skipped", look.INK, 0.965),
}
_RUN_MARKERS = {"resume": "|", "bias_frozen": "s", "early_stop": "D", "stopped": "D"}
_RUN_SIGNS = {event: sign for event, sign in _SIGNS.items() if event != "checkpoint"} | {
    event: _Sign(_RUN_MARKERS[event], label, colour, 0.0, after) for event, (label, colour, _, after) in _LINES.items()
}
_SIZES = {"|": 9, "x": 7}


def draw_lines(axes: Any, records: Records) -> None:
    """Vertical lines where the training changed, each kind labelled once."""
    for event, (label, colour, style, after) in _LINES.items():
        for index, record in enumerate(events(records, event)):
            line = {"color": colour, "linestyle": style, "linewidth": 1.1, "zorder": 1}
            axes.axvline(record["step"] + after, label=None if index else label, **line)


def draw_signs(axes: Any, records: Records) -> None:
    """Signs where something happened, each kind labelled once."""
    for event, sign in _SIGNS.items():
        _draw_sign(axes, records, event, sign, height=sign.height, colour=sign.colour, label=sign.label)


def draw_run(axes: Any, records: Records, colour: str, row: int) -> None:
    """What happened to one run of several: signs in its colour, a row a run at the foot of the panel."""
    for event, sign in _RUN_SIGNS.items():
        _draw_sign(axes, records, event, sign, height=0.03 + 0.045 * row, colour=colour)


def explain_run_signs(axes: Any, runs: Sequence[Records]) -> None:
    """Entries for the legend of what `draw_run` has drawn, in grey."""
    for event, sign in _RUN_SIGNS.items():
        if any(events(records, event) for records in runs):
            axes.plot([], [], sign.marker, color=look.GREY, label=sign.label, markersize=6)


def _draw_sign(
    axes: Any, records: Records, event: str, sign: _Sign, *, height: float, colour: str, label: str | None = None
) -> None:
    at = [record["step"] + sign.after for record in events(records, event)]
    if not at:
        return
    place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
    size = _SIZES.get(sign.marker, 6)
    axes.plot(at, [height] * len(at), sign.marker, color=colour, label=label, markersize=size, **place)
