"""Memory of training: every moment of its different micro-batches, of validation and of the optimiser's step."""

from __future__ import annotations

from math import ceil

import torch

from nexus_ray.planning.activations import layer_working, saved_for_backward
from nexus_ray.planning.losses import (
    LossBuffers,
    loss_buffers,
    micro_batches,
    online_teacher,
    validation_units,
    worker_steps,
)
from nexus_ray.planning.needs import Part, Phase, StageNeeds, phase
from nexus_ray.planning.storage import checkpoint_bytes, target_bytes
from nexus_ray.planning.worker import FLOAT32, Worker, vocabulary_part

_TARGET_TABLES = 64  # files of targets that a worker keeps open, uncompressed


def training_needs(worker: Worker) -> StageNeeds:
    """Training: the worst of its micro-batches at each moment, and the optimiser's step."""
    targets = _open_targets(worker)
    always = (*worker.fixed(), *_state(worker), *(targets if worker.device == "cpu" else ()))
    phases = [phase("optimiser step", *always, *_gradients(worker), _optimiser_working(worker))]
    distinct = {tuple(batch.items()): batch for batch in micro_batches(worker.config)}
    for batch in distinct.values():
        phases += _micro_batch_phases(worker, batch, always)
    phases += _validation(worker, always)
    host = max(worker.overlay_loading(), checkpoint_bytes(worker.overlay)) + sum(part.size for part in targets)
    return worker.stage("train", worker.config.resources.workers, *phases, host=host)


def _validation(worker: Worker, always: tuple[Part, ...]) -> list[Phase]:
    """A full micro-batch without gradients, of the source whose losses take most."""
    config = worker.config
    share = ceil(config.train.validation_sequences * len(config.train.sources) / config.resources.workers)
    sequences = min(config.train.micro_batch_sequences, share)
    logits = worker.logits(sequences)
    teacher = logits if config.train.mode == "online" else 0
    before = vocabulary_part("earlier logits", logits + teacher if share > sequences else 0)
    single = worker.logits(sequences, itemsize=FLOAT32)
    copies = validation_units(config, cast=worker.dtype != torch.float32)
    losses = (
        vocabulary_part("logits", logits),
        vocabulary_part("teacher's logits", teacher),
        vocabulary_part("loss buffers", single, copies, "float32 over the vocabulary"),
    )
    return [
        phase("validation, layers", *always, before, worker.forward(sequences)),
        phase("validation", *always, before, *losses),
    ]


def _micro_batch_phases(worker: Worker, batch: dict[str, int], always: tuple[Part, ...]) -> list[Phase]:
    """The moments of one micro-batch, which holds `batch` sequences by source."""
    config, sequences = worker.config, sum(batch.values())
    terms = {"vocabulary": worker.sizes.vocabulary, "itemsize": worker.dtype.itemsize}
    buffers = loss_buffers(batch, config, **terms, length=config.data.sequence_length)
    teacher = online_teacher(batch, config, **terms, length=config.data.sequence_length)
    several = worker_steps(config) > 1
    earlier = _gradients(worker) if several else _buckets(worker)
    logits = (
        vocabulary_part("logits", worker.logits(sequences)),
        vocabulary_part("teacher's logits", teacher),
    )
    before = vocabulary_part("earlier logits", worker.logits(sequences) + teacher if several else 0)
    work, block = worker.work(sequences), worker.activation_block(sequences)
    saved = saved_for_backward(worker.sizes, work) // worker.devices
    activations = Part("activations", saved, f"{work.tokens:,} tokens, kept for backward", block)
    working = Part("one layer at work", layer_working(worker.sizes, work), block=block)
    return [
        phase("forward", *always, *earlier, activations, *logits, before, working),
        phase("loss", *always, *earlier, activations, *logits, _loss_part(buffers, buffers.forward)),
        phase("loss backward", *always, *earlier, activations, *logits, _loss_part(buffers, buffers.backward)),
        phase("backward", *always, *earlier, activations, *logits, working),
        phase("end of backward", *always, *_gradients(worker), *logits, working),
    ]


def _loss_part(buffers: LossBuffers, working: int) -> Part:
    return Part("loss buffers", buffers.saved + working, "float32 over the vocabulary", buffers.block)


def _open_targets(worker: Worker) -> tuple[Part, ...]:
    """The uncompressed tables of target files that a worker keeps."""
    shards = sum(text.shards for text in worker.text.values())
    if not shards:
        return ()
    size = target_bytes(worker.config, worker.sizes, worker.text) * min(_TARGET_TABLES, shards) // shards
    return (Part("targets", size, f"of up to {_TARGET_TABLES} files of {shards}, uncompressed"),)


def _state(worker: Worker) -> tuple[Part, Part]:
    """Master weights and both moments of AdamW, one device's share."""
    moments = 2 * worker.overlay.trained * FLOAT32 // worker.devices
    return worker.shared_experts(), Part("AdamW moments", moments, "two float32 a parameter")


def _gradients(worker: Worker) -> tuple[Part, ...]:
    gradients = Part("gradients", worker.overlay.trained * FLOAT32 // worker.devices, "float32")
    return (gradients, *_buckets(worker))


def _buckets(worker: Worker) -> tuple[Part, ...]:
    """DDP's communication buffers, as large as the gradients; none for one worker."""
    if worker.config.resources.workers == 1:
        return ()
    return (Part("DDP buckets", worker.overlay.trained * FLOAT32 // worker.devices, "float32"),)


def _optimiser_working(worker: Worker) -> Part:
    """The update in the making: of the largest tensor on a CPU, of all at once on a GPU."""
    if worker.device == "cpu":
        return Part("AdamW update", 2 * worker.overlay.largest * FLOAT32, "of the largest tensor")
    return Part("AdamW update", worker.overlay.trained * FLOAT32 // worker.devices, "of all tensors")
