"""Memory of precomputing teacher targets: the base's layers, its head over a few positions, what is encoded."""

from __future__ import annotations

import torch

from nexus_ray.modeling.head import chunk_positions
from nexus_ray.planning.needs import Part, Phase, phase
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.planning.worker import FLOAT32, Worker
from nexus_ray.targets.encoding.chunks import encoded_positions
from nexus_ray.targets.encoding.encodings import OutputEncoding, SampledEncoding
from nexus_ray.targets.format import ROW_GROUP_BYTES

# Float32 buffers of the size of these logits at the worst moment of their encoding; one more where they are cast.
_TOP_K_UNITS, _SAMPLED_UNITS = 1, 7
_COPIES = 2  # of a batch's encoded targets: in pieces and joined; of a row group: as a table and in Parquet


def precompute_phases(worker: Worker) -> list[Phase]:
    """The layers of a batch, then its head and encoding; none where no source needs a teacher."""
    taught = [source for source in worker.targets.values() if source.output or source.router]
    if not taught:
        return []
    sequences = worker.config.targets.batch_sequences
    if not worker.is_first:
        return [phase("layers", *worker.fixed(), worker.forward(sequences))]
    batch = sequences * max(source.sequence_bytes for source in taught)
    written = Part("encoded targets", _COPIES * (batch + ROW_GROUP_BYTES), "of a batch, and a row group", batch)
    states = 2 * worker.work(sequences).tokens * worker.sizes.dimensions.hidden_size * worker.dtype.itemsize
    hidden = Part("hidden states", states, "final ones, and those with targets", worker.activation_block(sequences))
    encoding = [phase("encoding", *worker.fixed(), written, hidden, *_head(worker, source)) for source in taught]
    return [phase("layers", *worker.fixed(), written, worker.forward(sequences)), *encoding]


def _head(worker: Worker, source: SourceTargets) -> tuple[Part, ...]:
    """A chunk's logits in the compute type, beside what encodes them or the next chunk's."""
    if not source.needs_head or source.output is None:
        return ()
    vocabulary, tokens = worker.sizes.vocabulary, worker.work(worker.config.targets.batch_sequences).tokens
    positions = min(chunk_positions(vocabulary, worker.device), tokens)
    encoded = min(positions, encoded_positions(vocabulary, worker.device))
    buffer = encoded * vocabulary * FLOAT32
    logits, following = (count * vocabulary * worker.dtype.itemsize for count in (positions, tokens - positions))
    beside = max(encoding_units(source.output, worker.dtype) * buffer, min(logits, following))
    return (
        Part("logits of a chunk", logits, f"{positions:,} positions", logits),
        Part("encoding", beside, "float32 buffers, or the next chunk's logits", buffer),
    )


def encoding_units(encoding: OutputEncoding, dtype: torch.dtype) -> int:
    """Float32 buffers over the vocabulary at the worst moment of encoding logits of this type."""
    cast = int(dtype != torch.float32)
    return cast + (_SAMPLED_UNITS if isinstance(encoding, SampledEncoding) else _TOP_K_UNITS)
