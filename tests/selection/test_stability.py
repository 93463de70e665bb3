"""Agreement of two halves of the text, against scipy and brute force."""

from itertools import combinations, product
from math import prod

import numpy as np
import pytest
from scipy import stats

from nexus_ray.selection.scores import rank_experts
from nexus_ray.selection.stability import HalfRanking, compare_halves, overlap_p_value, pooled_overlap_p_value


def halves(first: np.ndarray, second: np.ndarray) -> tuple[HalfRanking, HalfRanking]:
    return HalfRanking(first, rank_experts(first)), HalfRanking(second, rank_experts(second, higher_first=True))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (16, 8), (32, 24), (128, 24), (8, 8)])
def test_p_value_is_scipys_hypergeometric_tail(experts, top_k):
    for common in range(top_k + 1):
        expected = stats.hypergeom(experts, top_k, top_k).sf(common - 1)
        assert overlap_p_value(common, top_k, experts) == pytest.approx(expected, rel=1e-9)


def test_p_value_counts_the_selections_of_a_small_layer():
    choices = [set(choice) for choice in combinations(range(7), 3)]
    for common in range(4):
        as_many = sum(len({0, 1, 2} & choice) >= common for choice in choices)
        assert overlap_p_value(common, 3, 7) == pytest.approx(as_many / len(choices))


def test_the_p_value_of_several_layers_counts_all_ways_to_agree_on_as_many():
    """Layers of 5, 4 and 6 experts of which 2, 1 and 3 are selected: by every number in common that they can have."""
    shapes = [(5, 2), (4, 1), (6, 3)]
    chances = [[stats.hypergeom(experts, k, k).pmf(same) for same in range(k + 1)] for experts, k in shapes]
    for found in product(*(range(k + 1) for _, k in shapes)):
        layers = [(common, k, experts) for common, (experts, k) in zip(found, shapes, strict=True)]
        as_many = [ways for ways in product(*(range(k + 1) for _, k in shapes)) if sum(ways) >= sum(found)]
        expected = sum(prod(chances[layer][same] for layer, same in enumerate(ways)) for ways in as_many)
        assert pooled_overlap_p_value(layers) == pytest.approx(expected)


def test_the_p_value_of_one_layer_is_its_own_and_that_of_many_is_rare():
    assert pooled_overlap_p_value([(3, 4, 8)]) == pytest.approx(overlap_p_value(3, 4, 8))
    assert pooled_overlap_p_value([(4, 4, 8)] * 4) == pytest.approx(70.0**-4)
    assert pooled_overlap_p_value([(0, 4, 8)] * 4) == pytest.approx(1)


def test_overlap_and_held_out_share_of_known_scores():
    first, second = halves(np.array([5.0, 3.0, 1.0, 1.0]), np.array([6.0, 1.0, 2.0, 1.0]))
    found = compare_halves(first, second, 2)
    assert found.overlap == 0.5
    assert found.p_value == pytest.approx(5 / 6)
    assert found.held_out_share == pytest.approx(((6 + 1) / 10 + (5 + 1) / 10) / 2)


def test_exchangeable_experts_hold_out_no_more_than_their_number():
    rng = np.random.default_rng(0)
    found = [compare_halves(*halves(rng.gamma(2, size=32), rng.gamma(2, size=32)), 8) for _ in range(2000)]
    assert np.mean([each.held_out_share for each in found]) == pytest.approx(8 / 32, abs=0.003)
    assert np.mean([each.overlap for each in found]) == pytest.approx(8 / 32, abs=0.01)
    for level in (0.5, 0.2, 0.1):
        assert np.mean([each.p_value <= level for each in found]) <= level


def test_experts_that_a_half_cannot_tell_apart_do_not_count_as_agreed():
    """Two experts are used; the other six of the top eight would agree by their number alone."""
    used = np.zeros(32)
    used[[20, 30]] = 0.5
    found = compare_halves(*halves(used, used), 8)
    assert found.overlap == 2 / 8
    assert found.p_value > 0.05
    assert found.held_out_share == 1.0
