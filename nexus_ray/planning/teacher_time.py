"""A token's pass of the frozen base: its floating-point operations, and the time that this machine's cores need.

A layer's parts are timed on this machine (`probe.py`) and put together by formula.
"""

from __future__ import annotations

from functools import cache

import torch

from nexus_ray.config import Config
from nexus_ray.planning.probe import LayerShape, seconds, time_layer, with_threads
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.targets.encoding.chunks import encoded_positions
from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding

_BETWEEN_PARTS = 1.1  # rotations, routing, copies: what `benchmarks/teacher_time.py` shows beside the timed parts


def flop_per_token(sizes: ModelSizes, length: int, *, head: bool) -> int:
    """Floating-point operations of a token in sequences of this length.

    Projections, scores and their use over the whole sequence, as eager attention computes them whatever the mask, the
    router, `experts_per_token` experts, and the LM head where it is needed. Element-wise steps are not counted.
    """
    dimensions, attention = sizes.dimensions, sizes.attention_size
    projections = 4 * dimensions.hidden_size * (attention + sizes.key_value_heads * sizes.head_dim)
    experts = 2 * (
        dimensions.experts_per_token * sizes.expert_parameters() + dimensions.hidden_size * dimensions.experts
    )
    layers = dimensions.layers * (projections + 4 * attention * length + experts)
    return layers + head * head_flop(sizes)


def head_flop(sizes: ModelSizes) -> int:
    """Floating-point operations of the LM head for a token."""
    return 2 * sizes.dimensions.hidden_size * sizes.vocabulary


def seconds_per_token(config: Config, sizes: ModelSizes, sequences: int) -> tuple[float, float]:
    """Of one worker on this machine's cores: (all layers, the LM head)."""
    dimensions = sizes.dimensions
    shape = LayerShape(
        dimensions=dimensions,
        heads=sizes.attention_heads,
        key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        sequences=sequences,
        length=config.data.sequence_length,
        dtype=config.compute_dtype,
        packed=config.model.experts == "packed" and sizes.packed_bytes > 0,
    )
    speed = time_layer(shape, config.resources.cpus_per_worker)
    used = min(dimensions.experts, shape.tokens * dimensions.experts_per_token)
    experts = used * speed.expert / shape.tokens
    attention = sizes.attention_heads * speed.head / shape.length
    return _BETWEEN_PARTS * dimensions.layers * (experts + attention + speed.token), head_flop(sizes) * speed.flop


@cache
def encoding_seconds(encoding: OutputEncoding, threads: int) -> float:
    """Of encoding one position on this machine's cores."""
    if isinstance(encoding, HiddenEncoding):
        return 0.0
    rows = encoded_positions(encoding.vocabulary, "cpu")
    logits = torch.randn(rows, encoding.vocabulary, generator=torch.Generator().manual_seed(0))
    with with_threads(threads), torch.inference_mode():
        if isinstance(encoding, SampledEncoding):
            offsets = torch.linspace(0, 0.99, rows, dtype=torch.float64)
            return seconds(lambda: encoding.encode(logits, offsets)) / rows
        return seconds(lambda: encoding.encode(logits)) / rows
