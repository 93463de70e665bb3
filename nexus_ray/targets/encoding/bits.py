"""Integers as bits: in a fixed number of bits each, or, where they are sorted, in Elias-Fano form.

Everything is torch, so bytes are made and read on the device where the numbers are. Bits are filled from the lowest bit
of the first byte; the last byte is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np
import torch
from torch import Tensor

from nexus_ray.errors import ArtefactError

_BYTE = 8
# Shifts work in int32: a value, moved by up to seven bits within its first byte, stays positive.
MOST_BITS = 24


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` integers of `bits` bits."""
    return (count * bits + _BYTE - 1) // _BYTE


def pack(values: Tensor, bits: int) -> Tensor:
    """[..., count] integers below 2^bits as [..., packed_bytes(count, bits)] uint8; at most `MOST_BITS` bits."""
    count, period = values.shape[-1], _period(bits)
    padded = torch.nn.functional.pad(values.int(), (0, -count % period)).unflatten(-1, (-1, period))
    packed = padded.new_zeros(*padded.shape[:-1], period * bits // _BYTE)
    for value, byte, shift in _overlaps(bits):
        packed[..., byte] |= _shift_left(padded[..., value], shift)
    return (packed & 0xFF).to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The [..., count] int64 integers that `pack` was given."""
    period = _period(bits)
    size = period * bits // _BYTE
    padded = torch.nn.functional.pad(packed.int(), (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size))
    values = padded.new_zeros(*padded.shape[:-1], period)
    for value, byte, shift in _overlaps(bits):
        values[..., value] |= _shift_left(padded[..., byte], -shift)
    return (values & ((1 << bits) - 1)).flatten(-2)[..., :count].long()


def low_bits(count: int, universe: int) -> int:
    """Bits of each integer that Elias-Fano stores as they are: those that make the total smallest."""
    widest = max(1, universe - 1).bit_length()
    return min(range(widest + 1), key=lambda low: _sorted_bytes(count, universe, low))


def sorted_bytes(count: int, universe: int) -> int:
    """Bytes of `count` sorted integers below `universe`."""
    return _sorted_bytes(count, universe, low_bits(count, universe))


def pack_sorted(values: Tensor, universe: int) -> Tensor:
    """[..., count] ascending integers below `universe`, repeats allowed, as [..., sorted_bytes] uint8.

    Elias-Fano coding (Elias, 1974; Fano, 1971): the low bits of all integers as `pack` writes them, then whole bytes of
    a bit vector in which the i-th one, from 0, stands at bit (i-th integer >> low bits) + i.
    """
    count = values.shape[-1]
    low = low_bits(count, universe)
    places = (values >> low) + torch.arange(count, device=values.device)
    one_bit = torch.tensor([1 << bit for bit in range(_BYTE)], dtype=torch.uint8, device=values.device)
    ones = one_bit.index_select(0, (places & 7).flatten()).view(places.shape)
    upper = ones.new_zeros(*values.shape[:-1], _upper_bytes(count, universe, low))
    upper.scatter_add_(-1, places >> 3, ones)
    return torch.cat([pack(values & ((1 << low) - 1), low), upper], dim=-1) if low else upper


def unpack_sorted(packed: Tensor, count: int, universe: int) -> Tensor:
    """The [..., count] int64 integers that `pack_sorted` was given.

    Raises:
        ArtefactError: these bytes are not `count` integers below `universe`.
    """
    low = low_bits(count, universe)
    split = packed_bytes(count, low)
    values = _places_of_ones(packed[..., split:], count) - torch.arange(count, device=packed.device) << low
    if low:
        values += unpack(packed[..., :split], count, low)
    if values.numel() and int(values.max()) >= universe:
        raise ArtefactError(f"damaged targets: sorted integers below {universe} hold {int(values.max())}")
    return values


def true_places(mask: Tensor) -> Tensor:
    """Positions of what is true in a flattened bool tensor, ascending; on a CPU NumPy is ten times as fast as torch."""
    flat = mask.flatten()
    return flat.nonzero().squeeze(-1) if flat.is_cuda else torch.from_numpy(np.flatnonzero(flat.numpy()))


def _places_of_ones(packed: Tensor, count: int) -> Tensor:
    """[..., count] positions of the bits that are one."""
    width = packed.shape[-1] * _BYTE
    bits = _to_bits(packed)
    if not bool((bits.sum(-1, dtype=torch.int32) == count).all()):
        raise ArtefactError(f"damaged targets: the bits of sorted integers do not hold {count} of them")
    places = true_places(bits.view(torch.bool)).view(-1, count)
    starts = torch.arange(len(places), device=packed.device).unsqueeze(-1) * width
    return (places - starts).view(*packed.shape[:-1], count)


def _to_bits(packed: Tensor) -> Tensor:
    """[..., bytes] uint8 as [..., bytes * 8] zeros and ones."""
    values = torch.arange(1 << _BYTE, device=packed.device)
    eight = (values.unsqueeze(-1) >> torch.arange(_BYTE, device=packed.device) & 1).to(torch.uint8)
    words = eight.view(torch.int64).squeeze(-1)
    return (
        words.index_select(0, packed.flatten().int())
        .view(torch.uint8)
        .view(*packed.shape[:-1], packed.shape[-1] * _BYTE)
    )


def _sorted_bytes(count: int, universe: int, low: int) -> int:
    return packed_bytes(count, low) + _upper_bytes(count, universe, low)


def _upper_bytes(count: int, universe: int, low: int) -> int:
    return packed_bytes(count + (universe - 1 >> low), 1)


def _period(bits: int) -> int:
    """Integers after which their bits begin at the start of a byte again."""
    return _BYTE // gcd(_BYTE, bits)


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Each (integer, byte) of a period that share bits, and how many bits further up the byte the integer begins."""
    for value in range(_period(bits)):
        first, last = value * bits // _BYTE, (value * bits + bits - 1) // _BYTE
        for byte in range(first, last + 1):
            yield value, byte, value * bits - byte * _BYTE


def _shift_left(values: Tensor, places: int) -> Tensor:
    return values << places if places >= 0 else values >> -places
