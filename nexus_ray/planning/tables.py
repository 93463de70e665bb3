"""A plan as tables for a person, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nexus_ray.planning.base_cache import BaseCache
from nexus_ray.planning.cost_table import duration_text, show_cost
from nexus_ray.planning.needs import GIB, MIB
from nexus_ray.planning.plan import Plan
from nexus_ray.planning.schedule_table import show_schedules
from nexus_ray.planning.verdicts import StageVerdict


def show_plan(plan: Plan) -> RenderableType:
    """Memory by stage and by part, placement, what to change, storage, targets, passes, cost, schedules."""
    memory = Group(*_origin(plan), _parts(plan), _stages(plan), *_placements(plan), *_problems(plan))
    text = Group(_storage(plan), _targets(plan), *_tokens(plan), *_times(plan))
    return Group(memory, text, show_cost(plan.cost), show_schedules(plan.schedules))


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


def _origin(plan: Plan) -> Iterator[Text]:
    """Where sizes come from when the model's files are not here."""
    if plan.sizes.origin != "files":
        yield Text(f"model.path has no tensors yet: shapes from {plan.sizes.origin}", style="yellow")


def _placements(plan: Plan) -> Iterator[RenderableType]:
    """One row a stage on GPUs: where its layers go, and the fewest GPUs it could do with; then why."""
    if not plan.placements:
        return
    table = _table("placement of a worker's layers", "stage", ["GPUs", "layers", "on each", "one would hold", "fewest"])
    lines: dict[str, list[str]] = {}
    for each in plan.placements:
        lines.setdefault(each.why, []).append(each.stage)
        peaks = " | ".join(f"{peak / GIB:.1f}" for peak in each.peaks)
        fewest = "" if each.memory is None else str(each.fewest or "none")
        cells = [str(each.configured), each.split, f"{peaks} GiB", size_text(each.alone), fewest]
        table.add_row(each.stage, *cells)
    yield table
    for why, stages in lines.items():
        yield Text(f"placement of {', '.join(stages)}: {why}")


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
    has = plan.machine.name
    headings = ["at its peak", "workers", "on", "a node's, driver, Ray", "mapped base, shared", has, "fits"]
    table = _table(f"all workers on {has}", "stage", headings)
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
    return f"{plan.machine.total_gpus} x {size_text(min(gpus))}" if gpus else "no GPU"


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
    free = plan.machine.free_disk
    verdict = "fits" if plan.storage_fits else "does not fit: choose another place with run.directory=PATH"
    note = "on shared storage" if free is None else f"{size_text(free)} free: {verdict}"
    table.add_row("sum", size_text(plan.storage_bytes), note)
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
        yield Text(f"all workers together, without starting them; {plan.cost.assumed}")


def _tokens(plan: Plan) -> Iterator[Text]:
    yield Text()
    for name, tokens in plan.tokens.items():
        line = f"{name}: training reads {tokens.trained:,} tokens"
        if tokens.epochs is None:
            line += "; its text is not here: as much is assumed"
        else:
            line += f", {tokens.epochs:.2g} times its text of about {tokens.available:,}"
        yield Text(line)
