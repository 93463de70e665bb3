"""A run as a timeline: a row a stage, a bar each time a command worked at it, and signs where something happened.

The axis is time at work. What lies between two commands, an hour or a week, is a narrow gap with its length written in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from nexus_ray import plot_style as look
from nexus_ray.errors import ConfigError
from nexus_ray.observing.incidents import Incident
from nexus_ray.observing.story import CommandStory, StageSpan, Story, idle_before
from nexus_ray.observing.story_text import duration

_BARS = {
    "done": (look.BLUE, "", "done"),
    "running": (look.GREEN, "", "running"),
    "stopped": (look.YELLOW, "///", "told to stop"),
    "failed": (look.ORANGE, "xxx", "failed"),
    "lost": (look.GREY, "\\\\\\", "the command vanished"),
}
_SIGNS = {
    "worker": ("X", look.INK, "worker died"),
    "warning": ("^", look.PURPLE, "warning"),
    "signal": ("s", look.YELLOW, "told to stop"),
    "failed": ("D", look.ORANGE, "stage failed"),
    "clock": ("P", look.SKY, "the clock jumped"),
}
_UNITS = (
    (2 * 86400.0, 86400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (180.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_GAP = 0.035  # of the time at work: the width of what lies between two commands
_NARROW = 0.045  # of the axis: a bar that leaves no room for its length
_ELSEWHERE = "command"  # row of what happened in no stage


def plot_story(story: Story, path: Path) -> None:
    """Draw the timeline of a run.

    Raises:
        ConfigError: no stage was worked at, or the suffix is neither .png nor .svg.
    """
    rows = _rows(story)
    if not rows:
        raise ConfigError(f"no command has worked at a stage in {story.run}", "leave --plot out")
    starts, whole = _starts(story)
    _, unit, name = next(choice for choice in _UNITS if whole >= choice[0])
    figure = look.new_figure(11, 2.1 + 0.46 * len(rows))
    axes = look.style(figure.add_subplot(), f"What happened in {story.run}", f"{name} at work", "")
    for command, start in zip(story.commands, starts, strict=True):
        _draw_command(axes, command, start / unit, unit, rows, whole / unit)
    _draw_gaps(axes, story, starts, unit, whole)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.45, -1.05 if len(story.commands) > 1 else -0.65)
    axes.set_xlim(-0.01 * whole / unit, 1.01 * whole / unit)
    axes.grid(visible=False, axis="y")
    _legend(figure, axes, story)
    look.save(figure, path)


def _rows(story: Story) -> list[str]:
    """Stages in the order in which they were first worked at."""
    names = [span.stage for command in story.commands for span in command.stages]
    if not names:
        return []
    lost = any(_row_of(incident, command) == _ELSEWHERE for command in story.commands for incident in command.incidents)
    return [*([_ELSEWHERE] if lost else []), *dict.fromkeys(names)]


def _starts(story: Story) -> tuple[list[float], float]:
    """Where each command begins on the axis, in seconds, and how long that is."""
    gap = _GAP * story.seconds
    starts, at = [], 0.0
    for command in story.commands:
        starts.append(at)
        at += command.seconds + gap
    return starts, max(at - gap, 1e-3)


def _draw_command(
    axes: Any, command: CommandStory, start: float, unit: float, rows: Sequence[str], whole: float
) -> None:
    for span in command.stages:
        _draw_span(axes, span, start + span.began / unit, unit, rows.index(span.stage), whole)
        ticks = [start + moment / unit for moment in span.checkpoints]
        axes.plot(ticks, [rows.index(span.stage) + 0.38] * len(ticks), "|", color=look.INK, markersize=5)
    for kind, (marker, colour, _) in _SIGNS.items():
        mine = [incident for incident in command.incidents if incident.kind == kind]
        if not mine:
            continue  # an empty line would stretch the layout to the corner of the figure
        at = [start + incident.moment / unit for incident in mine]
        heights = [rows.index(_row_of(incident, command)) - 0.38 for incident in mine]
        axes.plot(at, heights, marker, color=colour, markersize=7, markeredgecolor="white", zorder=5, clip_on=False)


def _draw_span(axes: Any, span: StageSpan, begin: float, unit: float, row: int, whole: float) -> None:
    colour, hatch, _ = _BARS[span.state]
    width = max(span.seconds / unit, 0.002 * whole)
    bar = {"height": 0.5, "color": colour, "edgecolor": "white", "hatch": hatch, "linewidth": 0.6, "zorder": 3}
    axes.barh(row, width, left=begin, **bar)
    words = duration(span.seconds)
    speed = span.tokens_per_second
    if width > 3 * _NARROW * whole and speed:
        words += f", {speed:,.0f} tokens/s"
    if width > (_NARROW if len(words) < 12 else 3 * _NARROW) * whole:
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0} if hatch else None
        axes.text(
            begin + width / 2, row, words, ha="center", va="center", fontsize=8, color="white", zorder=4, bbox=box
        )
    else:
        axes.text(begin + width + 0.004 * whole, row, words, va="center", fontsize=8, color=look.INK, zorder=4)


def _row_of(incident: Incident, command: CommandStory) -> str:
    """The stage that was at work at a moment."""
    for span in command.stages:
        if span.began <= incident.moment <= span.began + span.seconds + 0.05:
            return span.stage
    return _ELSEWHERE


def _draw_gaps(axes: Any, story: Story, starts: Sequence[float], unit: float, whole: float) -> None:
    """Shade what lies between commands, and number these at the top."""
    top = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 8.5, "color": look.INK}
    for number, (command, start) in enumerate(zip(story.commands, starts, strict=True), start=1):
        if len(story.commands) > 1:
            axes.text((start + command.seconds / 2) / unit, 0.985, str(number), ha="center", fontweight="bold", **top)
    for seconds, start in zip(idle_before(story.commands), starts[1:], strict=True):
        left = (start - _GAP * story.seconds) / unit
        axes.axvspan(left, start / unit, color=look.PALE, zorder=0, linewidth=0)
        words = f"{duration(seconds)} later" if seconds >= 0 else "clock set back"
        middle = (left + start / unit) / 2
        side = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8, "color": look.GREY}
        axes.text(middle, 0.47, words, transform=axes.get_xaxis_transform(), **side)


def _legend(figure: Any, axes: Any, story: Story) -> None:
    """Entries for what was drawn."""
    states = {span.state for command in story.commands for span in command.stages}
    kinds = {incident.kind for command in story.commands for incident in command.incidents}
    bars: list[tuple[Any, str]] = [
        (Patch(facecolor=colour, hatch=hatch, edgecolor="white"), text)
        for state, (colour, hatch, text) in _BARS.items()
        if state in states
    ]
    signs = [_sign(axes, marker, colour, text) for kind, (marker, colour, text) in _SIGNS.items() if kind in kinds]
    if any(span.checkpoints for command in story.commands for span in command.stages):
        signs.append(_sign(axes, "|", look.INK, "checkpoint"))
    look.legend_of(figure, [*bars, *signs])


def _sign(axes: Any, marker: str, colour: str, text: str) -> tuple[Any, str]:
    style: Mapping[str, Any] = {"color": colour, "markersize": 7, "markeredgecolor": colour, "linestyle": ""}
    return axes.plot([], [], marker, **style)[0], text
