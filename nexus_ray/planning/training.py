"""Memory of training: every moment of its different micro-batches, of validation and of the optimiser's step."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from nexus_ray.planning.activations import layer_saved, layer_working, saved_for_backward
from nexus_ray.planning.losses import loss_buffers, micro_batches
from nexus_ray.planning.needs import Part, Phase, StageNeeds, phase
from nexus_ray.planning.optimiser import update_bytes
from nexus_ray.planning.storage import best_bytes, checkpoint_bytes
from nexus_ray.planning.worker import FLOAT32, Worker
from nexus_ray.targets.reading.reader import CACHE_BYTES
from nexus_ray.training.feeding.feed import READ_AHEAD

_HELD_BATCHES = READ_AHEAD + 1  # micro-batches in the memory of the host, decoded


def training_needs(worker: Worker) -> StageNeeds:
    """Training: the worst of its micro-batches at each moment, and the optimiser's step."""
    targets, _ = _targets(worker)
    checkpoint = checkpoint_bytes(worker.config, worker.overlay) + best_bytes(worker.overlay)
    host = max(worker.overlay_loading(), checkpoint) + sum(part.size for part in targets)
    return worker.stage("train", worker.config.resources.workers, training_phases, host)


def training_phases(worker: Worker) -> list[Phase]:
    """What one device of a training worker holds at different times."""
    always = (*worker.fixed(), *_state(worker), *_always(worker))
    phases = [phase("optimiser step", *always, *_gradients(worker), _optimiser_working(worker))]
    batches = micro_batches(worker.config)
    earlier = _gradients(worker) if len(batches) > 1 else _buckets(worker)
    for batch in {tuple(batch.items()): batch for batch in batches}.values():
        phases += _micro_batch_phases(worker, batch, always, earlier)
    return phases + _validation(worker, always)


def _always(worker: Worker) -> tuple[Part, ...]:
    """Besides weights: on a CPU targets and the copies that are written; on the GPU with the head targets alone."""
    targets, moved = _targets(worker)
    if worker.device == "cuda":
        return (moved,) if worker.is_first else ()
    checkpoint = checkpoint_bytes(worker.config, worker.overlay) + best_bytes(worker.overlay)
    note = "copies, of it and of the best weights, while they are written"
    return (*targets, Part("checkpoint", checkpoint, note, worker.overlay.largest * FLOAT32))


def _micro_batch_phases(
    worker: Worker, batch: dict[str, int], always: tuple[Part, ...], earlier: tuple[Part, ...]
) -> list[Phase]:
    """The moments of one micro-batch, which holds `batch` sequences by source."""
    sequences = sum(batch.values())
    work, block = worker.work(sequences), worker.activation_block(sequences)
    saved = worker.share(saved_for_backward(worker.sizes, work))
    what = "inputs of layers" if work.checkpointed else "kept for backward"
    activations = Part("activations", saved, f"{work.tokens:,} tokens, {what}", block)
    running = layer_working(worker.sizes, work)
    working = Part("one layer at work", running, block=block)
    forward, backward = working, working
    if work.checkpointed:
        forward = replace(working, size=running + worker.stream(sequences))
        backward = replace(working, size=running + layer_saved(worker.sizes, work), note="computed again")
    kept, *losses = _losses(worker, batch)
    return [
        phase("forward", *always, *earlier, activations, kept, forward),
        phase("loss", *always, *earlier, activations, kept, *losses),
        phase("backward", *always, *earlier, activations, kept, backward),
        phase("end of backward", *always, *_gradients(worker), kept, working),
    ]


def _validation(worker: Worker, always: tuple[Part, ...]) -> list[Phase]:
    """A full micro-batch without gradients, of the source whose losses take most."""
    config = worker.config
    share = ceil(config.train.validation_sequences * len(config.train.sources) / config.resources.workers)
    sequences = min(config.train.micro_batch_sequences, share)
    phases = [phase("validation, layers", *always, worker.forward(sequences))]
    for name in config.train.sources:
        phases.append(phase("validation", *always, *_losses(worker, {name: sequences}, validating=True)))
    return phases


def _losses(worker: Worker, batch: dict[str, int], *, validating: bool = False) -> tuple[Part, Part, Part]:
    """What is kept of the losses until backward, and what they need at work."""
    if not worker.is_first:
        return Part("hidden states", 0), Part("logits of a chunk", 0), Part("losses at work", 0)
    itemsize, block = worker.dtype.itemsize, worker.activation_block(sum(batch.values()))
    buffers = loss_buffers(batch, worker.config, worker.sizes, worker.targets, itemsize, validating=validating)
    return (
        Part(
            "hidden states", buffers.kept + buffers.observed, "final ones, their gradients, what the base said", block
        ),
        Part("logits of a chunk", buffers.chunk, "float32 buffers", buffers.block),
        Part("losses at work", buffers.working, block=block),
    )


def _targets(worker: Worker) -> tuple[tuple[Part, Part], Part]:
    """What the host keeps of a target set, row groups as stored and micro-batches decoded; what a GPU has of them."""
    stored = sum(source.stored_bytes for source in worker.targets.values())
    largest = max(
        sum(worker.targets[name].decoded_bytes * count for name, count in batch.items())
        for batch in micro_batches(worker.config)
    )
    host = (
        Part("targets, stored", min(CACHE_BYTES, stored), "row groups in the cache"),
        Part("targets, decoded", _HELD_BATCHES * largest, f"of {_HELD_BATCHES} micro-batches", largest),
    )
    return host, Part("targets, decoded", largest, "of a micro-batch", largest)


def _state(worker: Worker) -> tuple[Part, ...]:
    """Master weights, both moments of AdamW and the anchor of merges, one device's share."""
    note = "two float32 a parameter" if worker.config.train.optimiser.name == "adamw" else "two bytes a parameter"
    moments = Part("AdamW moments", worker.share(worker.overlay.moments), note)
    anchor = checkpoint_bytes(worker.config, worker.overlay) - best_bytes(worker.overlay) - worker.overlay.moments
    return worker.shared_experts(), moments, Part("anchor of merges", worker.share(anchor))


def _gradients(worker: Worker) -> tuple[Part, ...]:
    gradients = Part("gradients", worker.share(worker.overlay.trained * FLOAT32), "float32")
    return (gradients, *_buckets(worker))


def _buckets(worker: Worker) -> tuple[Part, ...]:
    """DDP's communication buffers, as large as the gradients; none for one worker."""
    if worker.config.resources.workers == 1:
        return ()
    return (Part("DDP buckets", worker.share(worker.overlay.trained * FLOAT32), "float32"),)


def _optimiser_working(worker: Worker) -> Part:
    """The update in the making."""
    overlay, name = worker.overlay, worker.config.train.optimiser.name
    size = update_bytes(worker.share(overlay.trained), overlay.largest, name, worker.device)
    return Part("AdamW update", size, "of the largest tensor" if worker.device == "cpu" else "of all tensors")
