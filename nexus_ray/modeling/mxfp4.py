"""MXFP4: blocks of 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

The format is the OCP Microscaling specification v1.0. Two values lie in a byte, the low nibble first; the scale
byte s means 2^(s - 127). Legend: R any leading dimensions, G blocks in a row, 16 bytes a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_MAX_EXPONENT = 2  # of the largest magnitude, 6 = 1.5 * 2^2
_SCALE_BIAS = 127


def _byte_table(dtype: torch.dtype) -> Tensor:
    """[256, 2] both values of every byte."""
    byte = torch.arange(256)
    return torch.stack([_VALUES[byte & 15], _VALUES[byte >> 4]], dim=1).to(dtype)


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack `blocks` [R, G, 16] uint8 with `scales` [R, G] uint8 to [R, G * 32].

    Exact in float32 and bfloat16: every product of a four-bit value and a scale is representable.
    """
    pairs = _byte_table(dtype).to(blocks.device).index_select(0, blocks.reshape(-1).int())
    values = pairs.view(*blocks.shape[:-1], BLOCK)
    exponents = (scales.int() - _SCALE_BIAS).unsqueeze(-1)
    return torch.ldexp(values, exponents).to(dtype).flatten(-2)


def quantise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pack `weights` [R, columns] (columns divisible by 32) to blocks [R, G, 16] and scales [R, G], both uint8.

    The shared exponent is floor(log2 of the block's largest magnitude) - 2; values are rounded to the nearest
    of the grid, ties to the even code, and saturate at 6 times the scale (OCP MX v1.0, section 6.3).
    """
    grouped = weights.float().unflatten(-1, (-1, BLOCK))
    largest = grouped.abs().amax(dim=-1)
    exponents = torch.frexp(largest).exponent - 1 - _MAX_EXPONENT
    exponents = exponents.masked_fill(largest == 0, -_SCALE_BIAS).clamp(-_SCALE_BIAS, _SCALE_BIAS)
    scaled = torch.ldexp(grouped, -exponents.unsqueeze(-1))
    codes = _nearest_code(scaled)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + _SCALE_BIAS).to(torch.uint8)


def _nearest_code(values: Tensor) -> Tensor:
    """Four-bit code of the nearest grid value; halfway goes to the code whose last bit is 0."""
    grid = torch.tensor(_MAGNITUDES, device=values.device)
    midpoints = (grid[1:] + grid[:-1]) / 2
    magnitude = values.abs().contiguous()
    below_or_at = torch.bucketize(magnitude, midpoints)  # a midpoint itself counts to the lower neighbour
    above_or_at = torch.bucketize(magnitude, midpoints, right=True)  # here to the upper one
    code = torch.where(below_or_at % 2 == 0, below_or_at, above_or_at)
    return (code + 8 * torch.signbit(values)).to(torch.uint8)
