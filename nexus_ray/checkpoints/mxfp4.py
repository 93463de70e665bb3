"""MXFP4: blocks of 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

The format is the OCP Microscaling specification v1.0. Two values lie in a byte, the low nibble first; the scale
byte s means 2^(s - 127), and 255 means NaN. Legend: R any leading dimensions, G blocks in a row, 16 bytes a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nexus_ray.memory import fresh

BLOCK = 32
BLOCK_BYTES = BLOCK // 2
NAN_SCALE = 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MAX_EXPONENT = 2  # of the largest magnitude, 6 = 1.5 * 2^2
_SCALE_BIAS = 127
_VALUES_PER_WORD = 4
# Four values at once, as one element that `index_select` copies whole.
_WORD_TYPES = {torch.bfloat16: torch.int64, torch.float32: torch.complex128}
# Words looked up at a time: their indices (4 bytes each) stay in the cache and in the allocator's heap.
_CHUNK = 1 << 19


@functools.cache
def _word_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[65536] the four values of every pair of bytes, each entry one element of `_WORD_TYPES`."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    word = torch.arange(1 << 16)
    nibbles = torch.stack([word >> shift & 15 for shift in (0, 4, 8, 12)], dim=1)
    return values[nibbles].to(dtype).contiguous().view(_WORD_TYPES[dtype]).flatten().to(device)


@functools.cache
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] the factor that each scale byte means."""
    factors = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - _SCALE_BIAS)
    factors[NAN_SCALE] = torch.nan
    return factors.to(dtype).to(device)


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Unpack `blocks` [R, G, 16] uint8 with `scales` [R, G] uint8 to [R, G * 32].

    Exact in float32 and bfloat16: every product of a four-bit value and a scale is representable, but those that
    overflow to infinity. Two bytes at a time are looked up in a table of their four values.

    Args:
        blocks: packed values.
        scales: one byte a block.
        dtype: float32 or bfloat16.
        out: contiguous [R, G * 32] of `dtype` to write into, so that a loop over experts needs one buffer.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if out is None:
        out = fresh(shape, dtype, blocks.device)
    table = _word_table(dtype, blocks.device)
    words = blocks.reshape(-1).view(torch.uint16)
    found = out.view(-1).view(table.dtype)
    for start in range(0, len(words), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        torch.index_select(table, 0, words[chunk].int(), out=found[chunk])
    factors = _scale_table(dtype, blocks.device).index_select(0, scales.reshape(-1).int())
    out.view(-1, BLOCK).mul_(factors.unsqueeze(-1))
    return out.view(shape)


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
