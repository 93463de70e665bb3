"""The cost of `precompute`: the driver names shards, workers make a file of each, the driver collects the records."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.costs import StageCost, TimePart
from nexus_ray.planning.scale.limits import bound_note, driver_parts, few_units
from nexus_ray.planning.scale.run import PlannedRun, limited
from nexus_ray.planning.scale.speed import BatchTime
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.planning.text import SourceText


def precompute(run: PlannedRun) -> StageCost:
    """Every trained source is packed; those whose losses need a teacher are read by it."""
    text, targets = limited(run.config, run.text), run.worker.targets
    resources, taught = run.resources("precompute"), _has_teacher(targets)
    files = sum(source.shards for source in text.values())
    workers = min(resources.workers, files)
    rounds = 2 if run.config.targets.max_tokens else 1  # the first one measures how many tokens a shard has
    load = run.load_seconds if taught else 0.0
    parts = (
        *driver_parts(run, passes=1),
        TimePart("pool starts", rounds * figures.POOL_START),
        TimePart("base loads", rounds * load),
        TimePart("shards handed out", files * figures.POOL_ITEM),
        *_work(run, text),
        TimePart("records and manifest", files * figures.RECORD_FILE, held=False),
    )
    notes = few_units(files, resources.workers, "shards of text")
    if taught:
        notes += bound_note(run, _batch(run, headed=True).bound)
    stored = sum(source.stored_bytes for source in targets.values())
    gpus = run.gpus("precompute", workers) if taught else 0.0
    return StageCost("precompute", parts, workers, gpus, stored, notes)


def _has_teacher(targets: Mapping[str, SourceTargets]) -> bool:
    return any(source.output or source.router for source in targets.values())


def _batch(run: PlannedRun, *, headed: bool) -> BatchTime:
    sequences = run.config.targets.batch_sequences
    tokens = sequences * run.config.data.sequence_length
    return run.speed("precompute", sequences).forward(tokens, head=tokens if headed else 0)


def _work(run: PlannedRun, text: Mapping[str, SourceText]) -> tuple[TimePart, ...]:
    """Tokenising, the teacher and writing: of each source in whole shards, dealt to the workers."""
    resources = run.resources("precompute")
    tokenised = read = written = 0.0
    rate = run.storage_rate / run.workers_per_node("precompute")
    for name, source in text.items():
        target = run.worker.targets[name]
        shards = ceil(source.shards / min(resources.workers, source.shards))  # of the worker with most
        tokens = source.tokens / source.shards
        tokenised += shards * tokens / (figures.TOKENISE * resources.cpus_per_worker)
        written += shards * tokens * target.bytes_per_token / rate
        if target.teacher_tokens:
            batch = _batch(run, headed=target.needs_head)
            batches = tokens / (run.config.targets.batch_sequences * target.length)
            read += shards * (ceil(batches) if run.on_gpu else batches) * batch.seconds
    return (
        TimePart("text tokenised", tokenised, scales=True),
        TimePart("teacher reads", read, scales=True),
        TimePart("targets written", written, scales=True),
    )
