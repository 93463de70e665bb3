"""Encoding a few positions at a time: while their logits are in the processor's cache, several passes cost like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FLOAT32 = 4
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_LEAST_POSITIONS = 4


def encoded_positions(vocabulary: int, device: str) -> int:
    """Positions that are encoded together on a device of this type."""
    return max(_LEAST_POSITIONS, _CHUNK_BYTES[device] // (vocabulary * _FLOAT32))


def in_chunks(function: Callable[..., tuple[Tensor, ...]], logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors of `function(logits, *others)`, computed for some rows at a time and put together.

    Args:
        function: makes tensors of as many rows as it is given, each from the same row of its arguments.
        logits: [positions, V].
        others: [positions, ...].
    """
    size = encoded_positions(logits.shape[-1], logits.device.type)
    parts = zip(*(rows.split(size) for rows in (logits, *others)), strict=True)
    return tuple(torch.cat(column) for column in zip(*(function(*part) for part in parts), strict=True))


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits / temperature in float32."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def probabilities(logits: Tensor) -> Tensor:
    """softmax of [positions, V] float32 logits.

    Raises:
        ValueError: a logit is NaN or infinite, or all logits of a position are minus infinity.
    """
    chances = logits.softmax(-1)
    if bool(chances[:, 0].isnan().any()):
        raise ValueError("logits are NaN or infinite")
    return chances
