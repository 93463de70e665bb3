"""Costs of what comes after the training: the evaluation, an export, the start of the service."""

from __future__ import annotations

from math import ceil

from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.costs import StageCost, TimePart
from nexus_ray.planning.scale.limits import bound_note, few_units
from nexus_ray.planning.scale.run import PlannedRun


def evaluate(run: PlannedRun) -> StageCost:
    """Base and student score the same batches of held-out text; a shard is a unit of work."""
    section, resources = run.config.evaluate, run.resources("evaluate")
    tokens, length = sum(run.heldout.values()), run.config.data.sequence_length
    size = tokens / figures.TOKENS_PER_BYTE
    units = max(len(run.heldout), ceil(size / run.config.data.shard_bytes))
    workers = min(resources.workers, units)
    batch, speed = section.batch_sequences * length, run.speed("evaluate", section.batch_sequences)
    passes = speed.forward(batch, head=batch), speed.forward(batch, head=batch, model="student")
    seconds = sum(each.seconds for each in passes) * tokens / batch / units
    parts = (
        TimePart("text hashed", size / figures.HASH, held=False),
        TimePart("pool starts", figures.POOL_START),
        TimePart("base loads", run.load_seconds),
        TimePart("two models score", ceil(units / workers) * seconds, scales=True),
    )
    notes = few_units(units, resources.workers, "shards of held-out text") + bound_note(run, passes[0].bound)
    return StageCost("evaluate", parts, workers, run.gpus("evaluate", workers), 0.0, notes)


def export(run: PlannedRun) -> StageCost:
    """In one process: base shards are hard-linked, one shard is written."""
    stored = run.worker.overlay.stored_bytes
    parts = (TimePart("shard written", stored / run.storage_rate, held=False),)
    return StageCost("export", parts, moved=stored, notes=("where shards cannot be linked, the base is copied too",))


def serve_start(run: PlannedRun) -> StageCost:
    """Until the first answer can be given."""
    replicas = run.config.serve.replicas
    parts = (TimePart("service starts", figures.SERVE_START), TimePart("base loads", run.load_seconds))
    return StageCost("serve start", parts, replicas, run.gpus("serve", replicas))
