"""A plan as tables for a person, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nexus_ray.planning.base_cache import BaseCache
from nexus_ray.planning.needs import GIB, MIB
from nexus_ray.planning.plan import Plan
from nexus_ray.planning.schedule_table import show_schedules
from nexus_ray.planning.teacher_time import SUSTAINED_GPU_FLOP
from nexus_ray.planning.verdicts import StageVerdict


def show_plan(plan: Plan) -> RenderableType:
    """Memory by stage and by part, what to change, storage, targets and tokens, the base's passes, schedules."""
    memory = Group(_parts(plan), _stages(plan), *_problems(plan))
    text = Group(_storage(plan), _targets(plan), *_tokens(plan), *_times(plan))
    return Group(memory, text, show_schedules(plan.schedules))


def size_text(size: int) -> str:
    """Bytes for a person: GiB from one up, else MiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.0f} MiB"


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    """Left-aligned first column, right-aligned others; headings may wrap."""
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _parts(plan: Plan) -> Table:
    """One column a stage, one row a part; a stage's column is what one worker holds at its worst moment."""
    stages = plan.stages
    table = _table("memory of one worker at its peak", "part", [stage.needs.stage for stage in stages])
    columns = [{part.name: part.size for part in stage.peak.parts} for stage in stages]
    for name in dict.fromkeys(name for column in columns for name, size in column.items() if size):
        table.add_row(name, *[size_text(column[name]) if column.get(name) else "" for column in columns])
    table.add_row("sum", *[size_text(stage.peak.total) for stage in stages], style="bold")
    return table


def _stages(plan: Plan) -> Table:
    """One row a stage: all workers beside what the machine has."""
    headings = ["at its peak", "workers", "on", "all, driver, Ray", "mapped base, shared", "this machine", "fits"]
    table = _table("all workers on this machine", "stage", headings)
    for stage in plan.stages:
        needs = stage.needs
        mapped = size_text(needs.mapped) if needs.mapped else ""
        where = f"{needs.device} x {needs.devices}" if needs.device == "cuda" else needs.device
        cells = [stage.peak.name, str(needs.processes), where, size_text(stage.node), mapped, _has(plan, stage)]
        table.add_row(needs.stage, *cells, Text("yes", "green") if stage.fits else Text("no", "red"))
    return table


def _has(plan: Plan, stage: StageVerdict) -> str:
    if stage.needs.device == "cpu":
        return size_text(plan.machine.memory)
    gpus = plan.machine.gpus
    return f"{len(gpus)} x {size_text(min(gpus))}" if gpus else "no GPU"


def _problems(plan: Plan) -> Iterator[Text]:
    """One line for every stage that does not fit or will be slow."""
    for stage in plan.stages:
        if not stage.problem:
            continue
        line = f"{stage.needs.stage}: {stage.problem}"
        if stage.change:
            line += f"; it fits with {' '.join(stage.change)}"
        elif not stage.fits and (plan.machine.gpus or stage.needs.device == "cpu"):
            line += "; no setting tried makes it fit: it needs a larger machine, or more of them"
        yield Text(line, style="yellow" if stage.fits else "red")


def _storage(plan: Plan) -> Table:
    table = _table("storage of the run directory", "artefact", ["size"])
    table.add_column("note")
    for part in plan.storage:
        table.add_row(part.name, size_text(part.size), escape(part.note))
    verdict = "fits" if plan.storage_fits else "does not fit: choose another place with run.directory=PATH"
    free = "in an object store" if plan.machine.free_disk is None else f"{size_text(plan.machine.free_disk)} free"
    table.add_row("sum", size_text(plan.storage_bytes), f"{free}: {verdict}")
    if plan.base_cache is not None:
        table.add_row("base, on each node", size_text(plan.base_cache.size), _cache_note(plan.base_cache))
    return table


def _cache_note(cache: BaseCache) -> str:
    """Where a remote base goes; each node that loads it has a disk of its own."""
    verdict = "fits" if cache.fits else "does not fit: point NEXUS_RAY_CACHE at a larger disk"
    state = f"{size_text(cache.missing)} to fetch" if cache.missing else "there"
    return escape(f"in {cache.directory}; here {state}, {size_text(cache.free)} free: {verdict}")


def _targets(plan: Plan) -> Table:
    """One row a source: what the target set holds of it."""
    table = _table("teacher targets, before compression", "source", ["bytes a token", "tokens", "size"])
    table.add_column("form")
    for name, source in plan.targets.items():
        tokens = f"{source.tokens:,}" if source.tokens else "unknown"
        cells = [f"{source.bytes_per_token:,.1f}", tokens, size_text(source.stored_bytes), source.form]
        table.add_row(escape(name), *cells)
    return table


def _times(plan: Plan) -> Iterator[RenderableType]:
    """One row a stage in which the base reads text, and how far the time is to be trusted."""
    table = _table("passes of the base over text", "stage", ["tokens", "TFLOP", "MFLOP a token", "time"])
    for each in plan.times:
        work = [f"{each.flop / 1e12:,.3g}", f"{each.flop / each.tokens / 1e6:,.1f}"]
        table.add_row(each.stage, f"{each.tokens:,}", *work, duration_text(each.seconds))
    yield table
    if all(each.measured for each in plan.times):
        yield Text("all workers together, by a layer's parts timed on this machine; without starting the workers")
    else:
        speed = f"{SUSTAINED_GPU_FLOP / 1e12:.0f} TFLOP/s"
        yield Text(f"all workers together, if each GPU sustains {speed}: an assumption, no GPU was measured")


def duration_text(seconds: float) -> str:
    """Seconds for a person: hours, minutes or seconds, two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"


def _tokens(plan: Plan) -> Iterator[Text]:
    yield Text()
    for name, tokens in plan.tokens.items():
        line = f"{name}: training reads {tokens.trained:,} tokens"
        if tokens.epochs is not None:
            line += f", {tokens.epochs:.2g} times its text of about {tokens.available:,}"
        yield Text(line)
