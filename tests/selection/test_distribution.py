"""Statistics of how a score is spread, of known scores."""

import numpy as np
import pytest

from nexus_ray.selection.distribution import describe_scores, pattern_label

EVEN_NULL = np.arange(1, 10) / 9


def test_distribution_statistics_of_known_scores():
    scores = np.array([1.0, 1, 8, 1, 1, 1, 1, 1, 1])
    found = describe_scores(scores, EVEN_NULL)
    assert found.top_fractions == {"4": pytest.approx(11 / 16), "8": pytest.approx(15 / 16)}
    assert found.largest_gap == pytest.approx(7)
    assert found.largest_gap_after == 1
    assert found.percentiles["50"] == 1
    entropy = -(0.5 * np.log(0.5) + 8 * (1 / 16) * np.log(1 / 16))
    assert found.effective_experts == pytest.approx(np.exp(entropy))
    assert found.pattern == "moderate concentration"


def test_percentiles_are_of_the_scores():
    found = describe_scores(np.arange(101.0), np.arange(1, 102) / 101)
    assert found.percentiles == {"50": 50, "75": 75, "90": 90, "95": 95, "99": 99}
    assert list(found.top_fractions) == ["4", "8", "16", "32"]


@pytest.mark.parametrize(
    ("share", "label"),
    [
        (1.0, "steep cliff"),
        (0.71, "steep cliff"),
        (0.7, "moderate concentration"),
        (0.51, "moderate concentration"),
        (0.5, "gradual decline"),
        (0.36, "gradual decline"),
        (0.35, "even distribution"),
        (0.03, "even distribution"),
    ],
)
def test_labels_are_the_references(share, label):
    assert pattern_label(share) == label


def test_a_small_layer_gets_the_label_of_few_experts_from_its_null_too():
    """Four of five equal experts have 80 % of the score: that is a property of five, not of the router."""
    found = describe_scores(np.ones(5), np.arange(1, 6) / 5)
    assert found.pattern == found.null_pattern == "steep cliff"


def test_the_null_label_is_of_the_nulls_best_four():
    assert describe_scores(np.array([9.0, 1, 1, 1, 1, 1, 1, 1, 1]), EVEN_NULL).null_pattern == "gradual decline"
    assert describe_scores(np.array([3.0, 1.0]), np.array([0.5, 1.0])).null_pattern == "steep cliff"


def test_scores_that_are_all_zero_are_even():
    found = describe_scores(np.zeros(16), np.arange(1, 17) / 16)
    assert found.effective_experts == 16
    assert found.pattern == "even distribution"
    assert found.largest_gap == 0
