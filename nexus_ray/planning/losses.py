"""Micro-batches of training, and the bytes that its losses take beside the model's layers.

Logits are formed for a few positions at a time (`training/losses/chunked.py`), so nothing grows with both the batch
and the vocabulary. One unit is a chunk's float32 logits, [chunk, V].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nexus_ray.config import Config, TrainSourceSection
from nexus_ray.modeling.head import chunk_positions
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.targets.encoding.encodings import HiddenEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.training.feeding.order import worker_groups

_FLOAT32 = 4
_DENSE_UNITS = {"forward_kl": 3, "reverse_kl": 2, "jsd": 4}  # float32 [chunk, V] besides the logits
# Terms without the LM head, in the order in which they are computed: float32 buffers of the size of what they compare
# that are kept for backward, and those at the worst moment, the kept ones among them.
_OTHERS = {"hidden_mse": (1, 3), "router_kl": (2, 7), "load_balancing": (1, 3), "router_z": (1, 2.5)}


@dataclass(frozen=True)
class LossBuffers:
    """Bytes of a micro-batch's losses.

    Attributes:
        kept: until its backward pass is over: final hidden states, their gradients, what an online teacher said.
        chunk: float32 buffers over the vocabulary, of one chunk.
        block: of the largest single one of them.
        working: copies of hidden states, their differences from the teacher's, and router probabilities.
    """

    kept: int
    chunk: int
    block: int
    working: int
    observed: int = 0


def micro_batches(config: Config) -> list[dict[str, int]]:
    """Sequences by source of each micro-batch of the first worker in one step, in order."""
    step = {name: np.arange(count) for name, count in config.sequences_per_step().items()}
    groups = worker_groups(step, 0, config.resources.workers, config.train.micro_batch_sequences)
    return [{name: len(sequences) for name, sequences in group} for group in groups]


def loss_buffers(
    batch: Mapping[str, int],
    config: Config,
    sizes: ModelSizes,
    targets: Mapping[str, SourceTargets],
    itemsize: int,
    *,
    validating: bool = False,
) -> LossBuffers:
    """Loss buffers of a micro-batch of `batch` sequences by source, whose parts are computed one after the other.

    Args:
        batch: sequences of each source.
        config: the run.
        sizes: of the model.
        targets: of its sources.
        itemsize: bytes of the compute type.
        validating: without gradients, and with the cross-entropy of every source.
    """
    length, online = config.data.sequence_length, config.train.mode == "online"
    state = sizes.dimensions.hidden_size * itemsize
    kept = sum(batch.values()) * length * state
    chunk = block = working = observed = 0
    for name, sequences in batch.items():
        section, positions = config.train.sources[name], sequences * (length - 1)
        if (section.cross_entropy or section.output_kl) and not validating:
            kept += positions * state
        if online:
            kept += section.needs_output * positions * state
        unit = min(chunk_positions(sizes.vocabulary, config.compute_device), positions) * sizes.vocabulary * _FLOAT32
        units = chunk_units(config, section, targets[name], validating=validating)
        chunk, block = max(chunk, units * unit), max(block, unit)
        router = _router_values(section, sizes, targets[name], sequences * length, online=online)
        saved, at_work = _others(section, _compared(sizes, sequences, length, router), validating=validating)
        kept += saved + online * router * _FLOAT32
        if _observes_routers(section, online=online, validating=validating):
            observed += sequences * length * sizes.dimensions.layers * sizes.dimensions.experts * itemsize
        working = max(working, positions * state, at_work)
    return LossBuffers(kept, chunk, block, working, observed)


def chunk_units(
    config: Config, section: TrainSourceSection, targets: SourceTargets, *, validating: bool = False
) -> int:
    """Buffers of the size of a chunk's logits, the logits among them, at the worst moment of a source's losses.

    Cross-entropy and a divergence over kept or drawn tokens hold a gradient each. A dense divergence, from hidden
    states that are stored or the online teacher's, holds both log-probabilities and what its form needs besides. A
    source without next-token losses has none.
    """
    cross_entropy = bool(section.cross_entropy) or validating
    if not section.output_kl:
        return 2 * cross_entropy
    dense = config.train.mode == "online" or isinstance(targets.output, HiddenEncoding)
    return 1 + cross_entropy + (_DENSE_UNITS[config.train.output_divergence] if dense else 1)


def _compared(sizes: ModelSizes, sequences: int, length: int, router: int) -> dict[str, int]:
    """Values that each of `_OTHERS` compares: hidden states where a token is predicted, or logits of routers."""
    dimensions = sizes.dimensions
    every = sequences * length * dimensions.layers * dimensions.experts
    hidden = sequences * (length - 1) * dimensions.hidden_size
    return {"hidden_mse": hidden, "router_kl": router, "load_balancing": every, "router_z": every}


def _others(section: TrainSourceSection, compared: Mapping[str, int], *, validating: bool) -> tuple[int, int]:
    """Bytes that a source's terms without the LM head keep until backward, and what they take besides."""
    kept = most = 0
    for term, (saved, units) in _OTHERS.items():
        if getattr(section, term):
            size = compared[term] * _FLOAT32
            most = max(most, kept + int(units * size))
            kept += 0 if validating else saved * size
    return kept, most - kept


def _observes_routers(section: TrainSourceSection, *, online: bool, validating: bool) -> bool:
    """Whether the base's routers are kept for the metrics, no loss being about them."""
    return not section.router_kl and (validating or (online and section.needs_output))


def _router_values(
    section: TrainSourceSection, sizes: ModelSizes, targets: SourceTargets, tokens: int, *, online: bool
) -> int:
    """Router logits that the loss compares, [positions, L', E]."""
    if not section.router_kl:
        return 0
    experts = sizes.dimensions.experts
    router: RouterEncoding | None = targets.router
    if online or router is None:
        return tokens * sizes.dimensions.layers * experts
    return tokens // targets.length * router.positions(targets.length) * len(router.layers) * experts
