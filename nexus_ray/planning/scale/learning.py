"""The cost of `train`: steps of the slowest worker, gradients over the network, validation, checkpoints of rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from nexus_ray.planning.losses import micro_batches
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.costs import StageCost, TimePart
from nexus_ray.planning.scale.limits import bound_note
from nexus_ray.planning.scale.run import PlannedRun
from nexus_ray.planning.scale.speed import BatchTime, Speed
from nexus_ray.planning.storage import best_bytes, checkpoint_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step.

    Attributes:
        batches: forward and backward of the worker with most micro-batches.
        bound: what decides the time of its largest micro-batch on a GPU.
        reduce: all-reduce of the gradients, nothing of it hidden behind the backward pass.
        update: of the optimiser.
    """

    batches: float
    bound: str
    reduce: float
    update: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.batches + self.reduce + self.update


def train(run: PlannedRun) -> StageCost:
    """All steps on all workers; those without a sequence in a step wait for the others."""
    section, workers = run.config.train, run.resources("train").workers
    step, busy = step_time(run), min(workers, sequences_per_step(run))
    validations = ceil(section.steps / section.validate_every)
    parts = (
        TimePart("trainer starts", figures.TRAINER_START),
        TimePart("base loads", run.load_seconds),
        TimePart("targets opened", _files(run) * figures.OPEN_FILE),
        TimePart("batches", section.steps * step.batches, scales=True),
        TimePart("gradients reduced", section.steps * step.reduce),
        TimePart("optimiser", section.steps * step.update),
        TimePart("order of sequences", _order(run)),
        TimePart("validation", validations * _validation(run), scales=True),
        TimePart("best weights", validations * best_bytes(run.worker.overlay) / figures.CHECKPOINT),
        TimePart("checkpoints", _checkpoint_seconds(run, step)),
    )
    moved = section.steps * workers * reduced_bytes(run)
    notes = _idle(run, workers, busy) + bound_note(run, step.bound)
    return StageCost("train", parts, busy, run.gpus("train", workers), moved, notes)


def sequences_per_step(run: PlannedRun) -> int:
    """Of all sources: no more workers than this have work."""
    return sum(run.config.sequences_per_step().values())


def step_time(run: PlannedRun) -> StepTime:
    """Of the first worker, which has as many sequences as any."""
    config = run.config.model_copy(update={"resources": run.resources("train")})
    batches = [_micro_batch(run, batch) for batch in micro_batches(config)]
    seconds = sum(forward.seconds + backward.seconds for forward, backward in batches)
    largest = max(batches, key=lambda pair: pair[0].seconds + pair[1].seconds, default=(BatchTime(0), BatchTime(0)))
    return StepTime(seconds, (largest[0] + largest[1]).bound, _reduce(run), _update(run))


def _micro_batch(run: PlannedRun, batch: dict[str, int]) -> tuple[BatchTime, BatchTime]:
    """Forward, with the online teacher's pass, and backward; logits where a source has losses of next tokens."""
    speed, length, online = _speed(run), run.config.data.sequence_length, run.config.train.mode == "online"
    sources = run.config.train.sources
    tokens = sum(batch.values()) * length
    headed = sum(count for name, count in batch.items() if sources[name].cross_entropy or sources[name].output_kl)
    forward = speed.forward(tokens, head=headed * length, model="student")
    taught = sum(count for name, count in batch.items() if sources[name].needs_output or sources[name].router_kl)
    if online and taught:
        forward += speed.forward(taught * length, head=taught * length)
    return forward, speed.backward(tokens, head=headed * length)


def _speed(run: PlannedRun) -> Speed:
    return run.speed("train", run.config.train.micro_batch_sequences)


def reduced_bytes(run: PlannedRun) -> float:
    """Bytes that a worker sends in the all-reduce of a step: a ring, 2 (n - 1) / n of the gradients.

    Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in MPICH", section 4.5.
    """
    workers = run.resources("train").workers
    return 2 * (workers - 1) / workers * run.worker.overlay.trained * _FLOAT32


def _reduce(run: PlannedRun) -> float:
    """Inside a node over its links; between nodes all its workers' rings share its network."""
    sent = reduced_bytes(run)
    if not sent:
        return 0.0
    if not run.on_gpu:
        return sent / run.storage_rate if run.nodes > 1 else 0.0
    between = sent / run.gpu.node_network if run.nodes > 1 else 0.0
    return max(sent / run.gpu.link, between)


def _update(run: PlannedRun) -> float:
    """AdamW is bound by memory; on a CPU it is next to nothing beside the batches and left out."""
    if not run.on_gpu:
        return 0.0
    return run.worker.overlay.trained * figures.UPDATE_BYTES / run.gpu.bandwidth


def _order(run: PlannedRun) -> float:
    """Every worker shuffles each source once an epoch, and once more to choose what validation keeps."""
    seconds, length = 0.0, run.config.data.sequence_length
    for name, per_step in run.config.sequences_per_step().items():
        sequences = max(1, run.text[name].tokens // length)
        epochs = ceil(run.config.train.steps * per_step / sequences)
        seconds += (epochs + 1) * sequences * figures.ORDER
    return seconds


def _validation(run: PlannedRun) -> float:
    """One validation: every source's sequences with logits, shared among the workers."""
    section, length = run.config.train, run.config.data.sequence_length
    mine = ceil(section.validation_sequences * len(section.sources) / run.resources("train").workers)
    size = min(section.micro_batch_sequences, mine)
    batch = _speed(run).forward(size * length, head=size * length, model="student")
    return ceil(mine / size) * batch.seconds


def _checkpoint_seconds(run: PlannedRun, step: StepTime) -> float:
    """Copies to the host, the wait for a write that takes longer than the steps between two, and the last write."""
    section, size = run.config.train, checkpoint_bytes(run.config, run.worker.overlay)
    count = ceil(section.steps / section.checkpoint_every)
    writing = size / figures.CHECKPOINT
    copying = size / figures.PCIE if run.on_gpu else 0.0
    waiting = max(0.0, writing - section.checkpoint_every * step.seconds)
    return count * copying + (count - 1) * waiting + writing


def _files(run: PlannedRun) -> int:
    return sum(source.shards for source in run.text.values())


def _idle(run: PlannedRun, workers: int, busy: int) -> tuple[str, ...]:
    if busy == workers:
        return ()
    return (
        f"a step has {busy:,} sequences, so {workers - busy:,} of {workers:,} workers wait for the others: raise "
        "train.sources.NAME.sequences_per_step, or use fewer workers",
    )
