"""A layer's parts timed one by one on this machine's cores, on random values of the model's shapes.

No weight is read and no model is built: the routed experts are the project's own module, attention is
written out as transformers' eager GPT-OSS computes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.families import MoeDimensions
from nexus_ray.modeling.packed_experts import PackedExperts

_SECONDS = 0.05  # of each part
_MOST_ROWS = 512  # of a product: enough for full speed
_EXPERTS = 4  # at most, with their packed weights
_MOST_SCORES = 1 << 24  # larger blocks take as long a value
_KEPT_BLOCK = 31 << 20
_SCALE = 120  # of MXFP4 blocks: 2^-7


@dataclass(frozen=True)
class LayerShape:
    """A layer and the batches that it meets.

    Attributes:
        dimensions: of the MoE layer.
        heads: query heads.
        key_value_heads: key and value heads.
        head_dim: features of a head.
        sequences: of a batch.
        length: tokens of a sequence.
        dtype: name of the compute type.
        packed: whether experts are unpacked from MXFP4 for every batch.
    """

    dimensions: MoeDimensions
    heads: int
    key_value_heads: int
    head_dim: int
    sequences: int
    length: int
    dtype: str
    packed: bool

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.sequences * self.length

    @property
    def tokens_per_expert(self) -> int:
        """Of an expert that has its even share of a batch, at least one."""
        return max(1, self.tokens * self.dimensions.experts_per_token // self.dimensions.experts)


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds of one worker.

    Attributes:
        expert: one expert's part of a batch.
        head: one attention head over one sequence.
        token: projections, norms and sums of a token.
        flop: one floating-point operation of a projection.
    """

    expert: float
    head: float
    token: float
    flop: float


@cache
def time_layer(shape: LayerShape, threads: int) -> LayerSpeed:
    """Time the parts on so many threads; takes a fraction of a second, a few for the largest models."""
    with with_threads(threads), torch.inference_mode():
        projections, flop = _projections(shape)
        return LayerSpeed(_expert(shape), _attention(shape), projections, flop)


def seconds(compute: Callable[[], object]) -> float:
    """Of one call: the median of as many as fit the time; the first is not counted."""
    # A process that has freed a block as large as this keeps freed memory, as one that runs the model does
    # (mallopt(3), M_MMAP_THRESHOLD); a new one would get every block from the system again.
    torch.empty(_KEPT_BLOCK, dtype=torch.uint8)
    compute()
    started, times = time.perf_counter(), list[float]()
    while not times or time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        compute()
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def _expert(shape: LayerShape) -> float:
    """Of one expert, from a few that take turns, as in a layer: one alone would find everything in the cache."""
    count = min(shape.dimensions.experts, _EXPERTS)
    few = replace(shape.dimensions, experts=count, experts_per_token=1)
    dtype, rows = _dtype(shape), min(shape.tokens_per_expert, _MOST_ROWS)
    experts = PackedExperts(few, _swiglu, packed=shape.packed, dtype=dtype)
    for name, parameter in experts.named_parameters():
        if parameter.dtype == torch.uint8:
            parameter.copy_(torch.full_like(parameter, _SCALE) if "scales" in name else _bytes(parameter))
        else:
            parameter.normal_()
    hidden = _random(dtype, rows * count, few.hidden_size)
    indices, weights = torch.arange(rows * count).unsqueeze(-1) % count, torch.ones(rows * count, 1, dtype=dtype)
    return seconds(lambda: experts(hidden, indices, weights)) / count * shape.tokens_per_expert / rows


def _attention(shape: LayerShape) -> float:
    count = min(shape.sequences * shape.heads, max(1, _MOST_SCORES // shape.length**2))
    query, key, value = (_random(_dtype(shape), count, shape.length, shape.head_dim) for _ in range(3))
    mask, sinks = _random(_dtype(shape), shape.length, shape.length), _random(_dtype(shape), count, shape.length, 1)

    def attend() -> Tensor:
        scores = torch.cat([query @ key.mT * shape.head_dim**-0.5 + mask, sinks], dim=-1)
        scores = (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
        return scores @ value

    return seconds(attend) / count


def _projections(shape: LayerShape) -> tuple[float, float]:
    """(seconds of a token, of a floating-point operation)."""
    dtype, hidden, rows = _dtype(shape), shape.dimensions.hidden_size, min(shape.tokens, _MOST_ROWS)
    states, attended = _random(dtype, rows, hidden), _random(dtype, rows, shape.heads * shape.head_dim)
    inner = [shape.heads * shape.head_dim, *[shape.key_value_heads * shape.head_dim] * 2, shape.dimensions.experts]
    weights = [_random(dtype, width, hidden) for width in inner]
    output = _random(dtype, hidden, attended.shape[1])

    def products() -> None:
        for weight in weights:
            F.linear(states, weight)
        F.linear(attended, output)

    def around() -> Tensor:
        wide = states.float()
        return states + (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

    taken = seconds(products)
    flop = 2 * rows * (sum(weight.numel() for weight in weights) + output.numel())
    return (taken + 2 * seconds(around)) / rows, taken / flop


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=7.0)
    return (up.clamp(min=-7.0, max=7.0) + 1) * gate * torch.sigmoid(1.702 * gate)


def _dtype(shape: LayerShape) -> torch.dtype:
    kind: torch.dtype = getattr(torch, shape.dtype)
    return kind


def _random(dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _bytes(like: Tensor) -> Tensor:
    return torch.randint(0, 256, like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """So many torch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
