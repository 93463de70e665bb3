"""The schedules of a training as a table for a person: a small curve of each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nexus_ray.planning.schedules import Schedules

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32


def show_schedules(schedules: Schedules) -> RenderableType:
    """One row a value that changes or is chosen: first, curve from 0 up, last, largest; then merges and the freeze."""
    title = f"\nschedules over {schedules.steps:,} steps"
    table = Table(box=None, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("value")
    table.add_column("first", justify="right")
    table.add_column(f"{'start':<{_WIDTH - 3}}end", no_wrap=True)
    for name in ("last", "largest"):
        table.add_column(name, justify="right")
    for name, values in schedules.rows().items():
        figures = [f"{value:.3g}" for value in (values[0], values[-1], values.max())]
        table.add_row(escape(name), figures[0], sparkline(values), *figures[1:])
    if schedules.merges:
        table.add_row("merges", "", ticks(schedules.merges, schedules.steps), "", "")
    return Group(table, *_notes(schedules))


def sparkline(values: NDArray[np.float64], width: int = _WIDTH) -> str:
    """A curve in `width` characters; the lowest bar is 0 and the highest the largest value."""
    places = np.linspace(0, len(values) - 1, width).round().astype(int)
    top = values.max() or 1.0
    return "".join(_BARS[round((len(_BARS) - 1) * max(0.0, value) / top)] for value in values[places])


def ticks(steps: Sequence[int], total: int, width: int = _WIDTH) -> str:
    """A line of `width` characters with a mark where any of these finished steps is."""
    marked = {(step - 1) * width // total for step in steps}
    return "".join("|" if place in marked else "·" for place in range(width))


def _notes(schedules: Schedules) -> Iterator[Text]:
    if schedules.merges:
        first, count = schedules.merges[0], len(schedules.merges)
        yield Text(f"merged with the anchor {count:,} times, first after step {first:,}")
    if schedules.frozen_at is not None:
        yield Text(f"router biases stay as they are after step {schedules.frozen_at:,}")
