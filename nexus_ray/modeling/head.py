"""The LM head a few positions at a time: logits of a whole batch take more memory than the model's layers do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_FLOAT32 = 4
# Float32 logits of a chunk: large enough for matrix products near full speed, small beside the layers' activations. On
# two cores the product with gradients of 80 rows of GPT-OSS logits runs at 180 GFLOP/s, of 160 at 250, of 330 at 310.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
_LEAST_POSITIONS = 16


def chunk_positions(vocabulary: int, device: str) -> int:
    """Positions whose logits are formed together on a device of this type."""
    return max(_LEAST_POSITIONS, CHUNK_BYTES[device] // (vocabulary * _FLOAT32))


def chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Ranges of the rows of `hidden` [positions, hidden] that cover all of them, in order."""
    size = chunk_positions(vocabulary, hidden.device.type)
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """[positions, vocabulary] float32 logits of [positions, hidden] states, computed in the head's type."""
    return torch.nn.functional.linear(hidden.to(head.dtype), head).float()
