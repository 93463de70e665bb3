"""Passing over correlated experts, and taking as many as reach a share."""

import numpy as np
import pytest

from nexus_ray.selection.redundancy import correlations, count_for_coverage, pass_over_redundant


def test_correlations_equal_numpys_and_are_zero_without_variance():
    data = np.random.default_rng(0).normal(size=(50, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    np.testing.assert_allclose(correlations(np.cov(data, rowvar=False)), np.corrcoef(data, rowvar=False))
    data[:, 2] = 7.0
    assert correlations(np.cov(data, rowvar=False))[2].tolist() == [0, 0, 0, 0]


def test_the_weaker_of_a_correlated_pair_is_passed_over_in_order():
    correlation = np.eye(6)
    for pair in ((0, 1), (2, 3), (1, 5)):
        correlation[pair] = correlation[pair[::-1]] = 0.95
    ranked, passed_over = pass_over_redundant([3, 0, 2, 1, 5, 4], correlation, 0.9)
    # 5 is like 1 only, which was not kept
    assert ranked == [3, 0, 5, 4, 2, 1]
    assert passed_over == [2, 1]


def test_every_prefix_of_what_is_kept_is_free_of_redundancy():
    rng = np.random.default_rng(0)
    correlation = np.corrcoef(rng.normal(size=(6, 24)), rowvar=False)
    ranked, passed_over = pass_over_redundant(rng.permutation(24).tolist(), correlation, 0.6)
    kept = ranked[: len(ranked) - len(passed_over)]
    pairs = correlation[np.ix_(kept, kept)][~np.eye(len(kept), dtype=bool)]
    assert passed_over
    assert pairs.max() <= 0.6
    assert sorted(ranked) == list(range(24))
    assert all(correlation[expert, kept].max() > 0.6 for expert in passed_over)


def test_experts_that_exclude_each_other_are_not_redundant():
    assert pass_over_redundant([0, 1], np.array([[1, -1], [-1, 1.0]]), 0.5) == ([0, 1], [])


def test_without_a_threshold_the_ranking_stays():
    assert pass_over_redundant([1, 0], np.ones((2, 2)), None) == ([1, 0], [])


@pytest.mark.parametrize(
    ("coverage", "count"), [(0.01, 1), (0.5, 1), (0.501, 2), (0.8, 2), (0.9, 3), (0.99, 4), (1.0, 4)]
)
def test_coverage_takes_the_fewest_experts_that_reach_it(coverage, count):
    scores = np.array([0.1, 0.5, 0.1, 0.3])
    assert count_for_coverage(scores, [1, 3, 0, 2], coverage) == count


def test_coverage_follows_the_order_of_the_ranking():
    assert count_for_coverage(np.array([0.1, 0.5, 0.1, 0.3]), [1, 0, 2, 3], 0.8) == 4


def test_coverage_is_of_the_score_of_those_to_choose_from():
    """Expert 3 is passed over, so that 1 has five sevenths of what is left, and all three have all of it."""
    scores = np.array([0.1, 0.5, 0.1, 0.3])
    assert [count_for_coverage(scores, [1, 0, 2], coverage) for coverage in (0.7, 0.8, 1.0)] == [1, 2, 3]


def test_full_coverage_needs_no_expert_without_score():
    assert count_for_coverage(np.array([0.7, 0.3, 0.0]), [0, 1, 2], 1.0) == 2


def test_rounding_takes_no_expert_too_many():
    """In floating point eight tenths add up to a little less than 0.8."""
    assert count_for_coverage(np.full(10, 0.1), list(range(10)), 0.8) == 8


def test_experts_without_any_score_are_equal():
    assert count_for_coverage(np.zeros(8), list(range(8)), 0.5) == 4
