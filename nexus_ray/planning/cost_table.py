"""The cost of a run as a table for a person: one row a stage, then what limits it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nexus_ray.planning.scale.costs import RunCost, StageCost


def show_cost(cost: RunCost) -> RenderableType:
    """Time, the part that more workers do not shorten, GPUs, GPU-hours, bytes and money; notes below."""
    title = "time and cost of each stage"
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("stage")
    for heading in ("time", "fixed", "mostly", "GPUs", "GPU-hours", "moved", *(["cost"] if cost.price else [])):
        table.add_column(heading, justify="right")
    for stage in cost.stages:
        table.add_row(*_cells(stage, cost.price))
    hours = f"{cost.gpu_hours:,.1f}" if cost.gpu_hours else ""
    moved = bytes_text(sum(stage.moved for stage in cost.stages))
    total = ["sum", duration_text(cost.seconds), "", "", "", hours, moved]
    table.add_row(*total, *([money_text(cost.money or 0.0)] if cost.price else []), style="bold")
    return Group(table, *_notes(cost))


def _cells(stage: StageCost, price: float | None) -> list[str]:
    longest = max(stage.parts, key=lambda part: part.seconds)
    held = bool(stage.gpus)
    cells = [stage.stage, duration_text(stage.seconds), duration_text(stage.fixed_seconds), longest.name]
    cells += [f"{stage.gpus:g}" if held else "", f"{stage.gpu_hours:,.2f}" if held else "", bytes_text(stage.moved)]
    return [*cells, *([money_text(stage.money(price)) if held else ""] if price else [])]


def _notes(cost: RunCost) -> Iterator[Text]:
    """What the times rest on, the price, and what limits which stages."""
    yield Text("fixed: what more workers do not shorten; " + cost.assumed)
    if cost.price:
        yield Text(f"cost: {cost.price:g} for one GPU for one hour while a stage holds it (plan.price_per_gpu_hour)")
    notes: dict[str, list[str]] = {}
    for stage in cost.stages:
        for note in stage.notes:
            notes.setdefault(note, []).append(stage.stage)
    for note, stages in notes.items():
        yield Text(f"{', '.join(stages)}: {note}", style="yellow")


def bytes_text(size: float) -> str:
    """Decimal bytes for a person, three digits; nothing for none."""
    for unit, power in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size / 1e3:.3g} kB" if size else ""


def money_text(amount: float) -> str:
    """Money for a person: cents below a hundred."""
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def duration_text(seconds: float) -> str:
    """Seconds for a person: days, hours, minutes or seconds, two digits."""
    for unit, size in (("d", 72 * 3600), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / (24 * 3600 if unit == 'd' else size):,.1f} {unit}"
    return f"{seconds:.2g} s"
