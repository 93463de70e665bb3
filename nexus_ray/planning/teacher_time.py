"""How long passes of the frozen base take: their floating-point operations, and the time that this machine needs.

On a CPU a layer's parts are timed on this machine (`probe.py`) and put together by formula. A GPU that is not here
cannot be measured: there the time is given for a sustained speed that the reader can scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from nexus_ray.config import Config
from nexus_ray.planning.probe import LayerShape, seconds, time_layer, with_threads
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.targets.encoding.chunks import encoded_positions
from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding

SUSTAINED_GPU_FLOP = 100e12  # a second; assumed, not measured
_BETWEEN_PARTS = 1.1  # rotations, routing, copies: what `benchmarks/teacher_time.py` shows beside the timed parts


@dataclass(frozen=True)
class PassTime:
    """The base's passes in one stage.

    Attributes:
        stage: its verb.
        tokens: that the base reads.
        flop: floating-point operations of all of them, two for a multiplication with its addition.
        seconds: expected of all workers side by side, without starting them; on GPUs at `SUSTAINED_GPU_FLOP` each.
        measured: whether the parts of a layer were timed on this machine; else the speed is assumed.
    """

    stage: str
    tokens: int
    flop: float
    seconds: float
    measured: bool


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


def pass_times(config: Config, sizes: ModelSizes, targets: Mapping[str, SourceTargets]) -> tuple[PassTime, ...]:
    """Router statistics and teacher targets; stages without a pass are left out."""
    tokens = sum(part.teacher_tokens for part in targets.values())
    headed = sum(part.teacher_tokens for part in targets.values() if part.needs_head)
    output = next((part.output for part in targets.values() if part.needs_head), None)
    batch = config.collect.batch_sequences
    found = [_pass_time("collect", config.collect.tokens, 0, batch, None, config.for_stage("collect"), sizes)]
    if tokens:
        batch = config.targets.batch_sequences
        seen = config.for_stage("precompute")
        found.append(_pass_time("precompute", tokens, headed, batch, output, seen, sizes))
    return tuple(found)


def _pass_time(
    stage: str,
    tokens: int,
    headed: int,
    sequences: int,
    output: OutputEncoding | None,
    config: Config,
    sizes: ModelSizes,
) -> PassTime:
    """`headed`: of the tokens, those whose logits are formed and encoded as `output`."""
    length, resources = config.data.sequence_length, config.resources
    flop = tokens * flop_per_token(sizes, length, head=False) + headed * head_flop(sizes)
    if config.compute_device == "cuda":
        gpus = resources.workers * min(1, resources.gpus_per_worker or 1)  # those of one worker take turns
        return PassTime(stage, tokens, flop, flop / (SUSTAINED_GPU_FLOP * gpus), measured=False)
    layers, head = _seconds_per_token(config, sizes, sequences)
    if output is not None:
        head += _encoding_seconds(output, resources.cpus_per_worker)
    return PassTime(stage, tokens, flop, (tokens * layers + headed * head) / resources.workers, measured=True)


def _seconds_per_token(config: Config, sizes: ModelSizes, sequences: int) -> tuple[float, float]:
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
def _encoding_seconds(encoding: OutputEncoding, threads: int) -> float:
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
