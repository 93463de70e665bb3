"""Dividing text in two halves: whole shards where that balances, one cut shard where it does not."""

import numpy as np
import pytest

from nexus_ray.router.halves import divide_in_halves, first_half_shares, halves_of_shard


def sizes_of(half: np.ndarray, tokens: np.ndarray) -> list[int]:
    return [int(tokens[half == side].sum()) for side in (0, 1)]


def shards_of(half: np.ndarray, shards: np.ndarray) -> list[set[int]]:
    return [set(shards[half == side].tolist()) for side in (0, 1)]


def test_a_single_shard_is_cut_in_the_middle():
    np.testing.assert_array_equal(divide_in_halves(np.full(5, 7), np.full(5, 64)), [0, 0, 0, 1, 1])


def test_shards_of_unequal_size_are_balanced_whole():
    shards = np.repeat([1, 2, 5, 9], [10, 4, 3, 3])
    half = divide_in_halves(shards, np.full(20, 64))
    assert sizes_of(half, np.full(20, 64)) == [640, 640]
    first, second = shards_of(half, shards)
    assert not first & second


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_large_shard_beside_a_tiny_one_is_cut_so_that_both_halves_are_equal(order):
    sizes = np.asarray([36, 2])[list(order)]
    shards, tokens = np.repeat([3, 4], sizes), np.full(38, 512)
    half = divide_in_halves(shards, tokens)
    assert sizes_of(half, tokens) == [19 * 512] * 2
    assert (np.diff(half) != 0).sum() <= 2, "each half is one piece of the large shard"


def test_nothing_is_cut_where_whole_shards_give_each_half_what_is_wanted():
    shards, tokens = np.repeat([0, 1], [100, 10]), np.full(110, 512)
    assert shards_of(divide_in_halves(shards, tokens, wanted=10 * 512), shards) == [{0}, {1}]
    first, second = shards_of(divide_in_halves(shards, tokens, wanted=11 * 512), shards)
    assert first & second == {0}


def test_sequences_count_by_their_tokens():
    tokens = np.asarray([500, 10, 10, 10, 500, 500])
    half = divide_in_halves(np.asarray([0, 0, 0, 0, 1, 2]), tokens)
    assert len(set(half[:4])) == 1, "balanced by tokens with a cut: 500 + 530 against 500"
    assert sorted(sizes_of(half, tokens)) in ([500, 1030], [530, 1000])


@pytest.mark.parametrize("seed", range(30))
def test_halves_are_balanced_to_a_tenth_or_to_one_sequence(seed):
    rng = np.random.default_rng(seed)
    counts = (rng.pareto(0.7, rng.integers(1, 12)) * 5).astype(int) + 1
    shards = np.repeat(np.arange(len(counts)), np.minimum(counts, 500))
    tokens = rng.integers(1, 513, len(shards))
    half = divide_in_halves(shards, tokens)
    first, second = shards_of(half, shards)
    assert len(first & second) <= 1
    low, high = sorted(sizes_of(half, tokens))
    assert low >= 0.8 * high or high - low <= 2 * 512
    for shard in range(len(counts)):
        assert (np.diff(half[shards == shard]) != 0).sum() <= 1, "a shard is cut in at most one place"


def test_shares_are_of_the_beginning_and_add_up_to_even_halves():
    sizes = np.asarray([1.0, 10.0, 2.0])
    shares = first_half_shares(sizes)
    assert (shares * sizes).sum() == pytest.approx(6.5)
    assert sorted(shares)[:2] == [0, 0]
    np.testing.assert_array_equal(halves_of_shard(np.full(10, 64), float(shares[1])), [0] * 7 + [1] * 3)


def test_no_sequence_at_all_has_no_half():
    assert divide_in_halves(np.zeros(0, np.int32), np.zeros(0, np.int32)).shape == (0,)
