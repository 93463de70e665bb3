"""Bytes of logits and loss buffers: the part of training that grows with the vocabulary.

The counts follow `training/losses.py`. One unit is a float32 value for each token and vocabulary entry, [n, V];
the logits themselves are in the compute type and stay until the micro-batch's backward pass is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from nexus_ray.config import Config, TrainSourceSection

_FLOAT32 = 4


@dataclass(frozen=True)
class LossBuffers:
    """Bytes of a micro-batch besides its logits.

    Attributes:
        saved: kept until backward.
        forward: further bytes at the worst moment of the forward pass.
        backward: further bytes at the worst moment of the backward pass.
        block: of the largest single buffer.
    """

    saved: int
    forward: int
    backward: int
    block: int


def micro_batches(config: Config) -> list[dict[str, int]]:
    """Sequences by source of each micro-batch of the first worker in one step, in order."""
    names = [name for name, section in config.train.sources.items() for _ in range(section.sequences_per_step)]
    mine = names[:: config.resources.workers]
    size = config.train.micro_batch_sequences
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    return [{name: batch.count(name) for name in dict.fromkeys(batch)} for batch in batches]


def worker_steps(config: Config) -> int:
    """Micro-batches of the worker that has most."""
    sequences = sum(section.sequences_per_step for section in config.train.sources.values())
    return ceil(ceil(sequences / config.resources.workers) / config.train.micro_batch_sequences)


def source_units(section: TrainSourceSection, *, online: bool, cast: bool) -> tuple[int, int, int]:
    """(saved, forward, backward) units of one source's losses.

    Cross-entropy keeps log-probabilities and, while it runs, a float32 copy of the logits; its backward pass holds
    the gradients of log-probabilities and of logits. The top-K divergence is the same, but copies only logits that
    are not float32 (`cast`). The divergence from an online teacher keeps the student's log-probabilities and the
    teacher's probabilities, and forms the teacher's log-probabilities, their difference and its product.
    """
    saved = most = backward = 0
    if section.cross_entropy:
        saved, most, backward = 1, 2, 2
    if section.output_kl:
        kept, working = (2, 3) if online else (1, int(cast))
        saved += kept
        most = max(most, saved + working)
        backward = 2
    return saved, most - saved, backward


def loss_buffers(
    batch: Mapping[str, int], config: Config, *, vocabulary: int, itemsize: int, length: int
) -> LossBuffers:
    """Loss buffers of a micro-batch of `batch` sequences by source."""
    unit = vocabulary * length * _FLOAT32
    online = config.train.mode == "online"
    saved = forward = backward = 0
    for name, sequences in batch.items():
        section = config.train.sources[name]
        units = source_units(section, online=online, cast=itemsize != _FLOAT32)
        saved += units[0] * sequences * unit
        forward = max(forward, units[1] * sequences * unit)
        both = bool(section.cross_entropy and section.output_kl)  # the first one's gradient waits for the second's
        first = both * sequences * length * vocabulary * itemsize
        backward = max(backward, units[2] * sequences * unit + first)
    gradient = sum(batch.values()) * length * vocabulary * itemsize
    return LossBuffers(saved, forward, max(backward, gradient), max(batch.values()) * unit)


def validation_units(config: Config, *, cast: bool) -> int:
    """Units of the source whose losses take most in validation, which also forms each source's cross-entropy."""
    online = config.train.mode == "online"
    sections = config.train.sources.values()
    needs = [source_units(section, online=online, cast=cast) for section in sections]
    return max(2, *(saved + forward for saved, forward, _ in needs))


def online_teacher(batch: Mapping[str, int], config: Config, *, vocabulary: int, itemsize: int, length: int) -> int:
    """Bytes of the teacher's logits that an online micro-batch keeps."""
    if config.train.mode != "online":
        return 0
    sections = config.train.sources
    sequences = sum(count for name, count in batch.items() if sections[name].output_kl or sections[name].router_kl)
    return sequences * length * vocabulary * itemsize
