"""Bit packing and Elias-Fano coding against bit strings made one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import gammaln

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.encoding.bits import (
    MOST_BITS,
    low_bits,
    pack,
    pack_sorted,
    packed_bytes,
    sorted_bytes,
    unpack,
    unpack_sorted,
)


def as_bytes(bits: list[int]) -> list[int]:
    padded = bits + [0] * (-len(bits) % 8)
    return [sum(bit << place for place, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)]


def bits_of(value: int, count: int) -> list[int]:
    return [value >> place & 1 for place in range(count)]


def elias_fano(values: list[int], universe: int, low: int) -> list[int]:
    lower = [bit for value in values for bit in bits_of(value, low)]
    upper: list[int] = []
    for value in values:
        zeros = (value >> low) - upper.count(0)
        upper += [0] * zeros + [1]
    upper += [0] * (len(values) + ((universe - 1) >> low) - len(upper))
    return as_bytes(lower) + as_bytes(upper)


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
def test_packing_writes_the_bits_one_after_the_other_lowest_first(bits):
    random = np.random.default_rng(bits)
    for count in (1, 3, 8, 13):
        values = random.integers(0, 1 << bits, (4, count))
        values[0] = (1 << bits) - 1
        packed = pack(torch.from_numpy(values), bits)
        expected = [as_bytes([bit for value in row for bit in bits_of(int(value), bits)]) for row in values]
        assert packed.dtype == torch.uint8
        assert packed.tolist() == expected
        assert packed.shape[-1] == packed_bytes(count, bits)
        assert unpack(packed, count, bits).tolist() == values.tolist()


@pytest.mark.parametrize("seed", range(12))
def test_sorted_integers_are_in_elias_fano_form(seed):
    random = np.random.default_rng(seed)
    universe = int(random.choice([1, 2, 7, 8, 100, 4117, 49152, 201088, 1 << 20]))
    count = int(random.integers(1, 80))
    values = np.sort(random.integers(0, universe, (5, count)), axis=-1)
    values[0], values[1] = 0, universe - 1
    packed = pack_sorted(torch.from_numpy(values), universe)
    low = low_bits(count, universe)
    assert packed.tolist() == [elias_fano([int(value) for value in row], universe, low) for row in values]
    assert packed.shape[-1] == sorted_bytes(count, universe)
    assert unpack_sorted(packed, count, universe).tolist() == values.tolist()


@pytest.mark.parametrize(("count", "universe"), [(4, 32), (12, 4117), (12, 201_088), (64, 201_088), (128, 201_088)])
def test_sorted_integers_take_within_a_bit_of_the_information_bound(count, universe):
    choose = gammaln(universe + count) - gammaln(count + 1) - gammaln(universe)
    bound = choose / np.log(2)  # bits of one multiset of so many
    assert bound <= 8 * sorted_bytes(count, universe) < bound + count + 14  # and what fills two last bytes
    assert sorted_bytes(count, universe) <= packed_bytes(count, (universe - 1).bit_length()) + 1


def test_no_number_of_low_bits_is_better_than_the_chosen_one():
    small = [(count, universe) for count in range(1, 18) for universe in range(1, 70)]
    for count, universe in [(12, 201_088), (64, 4117), *small]:
        sizes = [packed_bytes(count, low) + packed_bytes(count + ((universe - 1) >> low), 1) for low in range(18)]
        assert sorted_bytes(count, universe) == min(sizes)


def test_leading_dimensions_and_integer_types_do_not_matter():
    values = torch.randint(0, 1000, (2, 3, 9), generator=torch.Generator().manual_seed(0)).sort(-1).values
    packed = pack_sorted(values, 1000)
    assert packed.shape == (2, 3, sorted_bytes(9, 1000))
    assert torch.equal(packed, pack_sorted(values.int(), 1000))
    assert torch.equal(unpack_sorted(packed, 9, 1000), values)


def test_nothing_is_packed_as_nothing():
    none = torch.zeros(0, 9, dtype=torch.int64)
    assert unpack_sorted(pack_sorted(none, 1000), 9, 1000).shape == (0, 9)
    assert unpack(pack(none, 5), 9, 5).shape == (0, 9)


def test_a_missing_or_added_integer_is_seen():
    values = torch.tensor([[3, 500, 999]])
    for bit in range(8):
        packed = pack_sorted(values, 1000)
        packed[0, -1] ^= 1 << bit
        with pytest.raises(ArtefactError, match="do not hold 3 of them"):
            unpack_sorted(packed, 3, 1000)


def test_an_integer_beyond_the_universe_is_seen():
    packed = pack_sorted(torch.tensor([[3, 500, 1000]]), 1001)
    assert packed.shape[-1] == sorted_bytes(3, 1000)
    with pytest.raises(ArtefactError, match="integers below 1000 hold 1000"):
        unpack_sorted(packed, 3, 1000)
