"""Costs of what comes before the teacher and the training: nodes with the base, statistics, selection, conversion."""

from __future__ import annotations

import re
from math import ceil

from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.costs import StageCost, TimePart
from nexus_ray.planning.scale.limits import bound_note, driver_parts, few_units
from nexus_ray.planning.scale.run import PlannedRun
from nexus_ray.planning.storage import moments_bytes
from nexus_ray.planning.weights import overlay_width

_EXPERT = 3 * 2880 * 2880  # weights of the expert whose averaging was timed


def base_on_nodes(run: PlannedRun) -> StageCost:
    """Nodes start, and each fetches the base from shared storage into its cache; all at the same time."""
    stored = run.sizes.stored_bytes
    parts = (
        TimePart("nodes start", run.config.plan.node_start_seconds, held=False),
        TimePart("base to each node", stored / run.storage_rate),
    )
    note = (
        f"{run.nodes} nodes read {stored / 1e9:.1f} GB each: the storage must give "
        f"{run.nodes * run.storage_rate / 1e9:,.1f} GB/s in all"
    )
    gpus = float(run.machine.total_gpus)
    return StageCost("base on nodes", parts, run.nodes, gpus, run.nodes * stored, (note,) if run.nodes > 1 else ())


def collect(run: PlannedRun) -> StageCost:
    """Text is listed and candidates are tokenised; units go through the base; the driver merges what they leave."""
    section, resources = run.config.collect, run.resources("collect")
    length, sources = run.config.data.sequence_length, len(section.mixture or run.config.data.sources)
    sequences = ceil(section.tokens / length)
    units = max(sources, ceil(sequences / (section.batch_sequences * section.unit_batches)))
    workers = min(resources.workers, units)
    batch = run.speed("collect", section.batch_sequences).forward(section.batch_sequences * length, head=0)
    candidates = sequences * section.candidates
    tokenised = candidates * length / (figures.TOKENISE * resources.workers * resources.cpus_per_worker)
    moments = moments_bytes(run.sizes)
    parts = (
        *driver_parts(run, passes=2),
        TimePart("Ray starts", figures.RAY_START, held=False),
        TimePart("pools start", 2 * figures.POOL_START),
        TimePart("candidates", tokenised, scales=True),
        TimePart("units handed out", (min(candidates, run.shards) + units) * figures.POOL_ITEM),
        TimePart("base loads", run.load_seconds),
        TimePart("base reads", ceil(units / workers) * section.unit_batches * batch.seconds, scales=True),
        TimePart("moments merged", units * moments * figures.MERGE),
    )
    notes = few_units(units, resources.workers, "units of calibration text") + bound_note(run, batch.bound)
    return StageCost("collect", parts, workers, run.gpus("collect", workers), units * moments, notes)


def select(run: PlannedRun) -> StageCost:
    """In the driver: eigenvalues of every layer, tests, report and figures."""
    layers, experts = run.sizes.dimensions.layers, run.sizes.dimensions.experts
    parts = (
        TimePart("experts ranked", layers * experts**2 * figures.RANK, held=False),
        TimePart("report drawn", layers * figures.SELECT, held=False),
    )
    return StageCost("select", parts)


def convert(run: PlannedRun) -> StageCost:
    """In one process: the chosen experts are read and averaged, and the overlay is written."""
    dimensions, sizes = run.sizes.dimensions, run.sizes
    experts = dimensions.layers * averaged_experts(run)
    made = experts * figures.AVERAGE * sizes.expert_parameters() / _EXPERT
    wider = overlay_width(sizes, run.config) / dimensions.intermediate_size
    parts = (
        TimePart("process starts", figures.CONVERT_START, held=False),
        TimePart("experts averaged", made * max(1.0, wider), held=False),
    )
    notes = ("lstsq also runs the base: not in this figure",) if run.config.convert.initialisation == "lstsq" else ()
    return StageCost("convert", parts, moved=run.worker.overlay.stored_bytes, notes=notes)


def averaged_experts(run: PlannedRun) -> int:
    """Routed experts that each layer's shared expert is made from; a written layer costs one at least."""
    method = run.config.convert.initialisation
    found = re.search(r"top(\d+|K)(_|$)", method)
    if not found:
        return 1
    return run.config.select.top_k if found[1] == "K" else int(found[1])
