"""Expert scores against scikit-learn, and the null model against shuffled data."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from nexus_ray.selection.distribution import describe_scores
from nexus_ray.selection.scores import (
    overlap,
    pca_null_share,
    pca_scores,
    principal_components,
    rank_experts,
    top_share,
    usage_scores,
)


def make_probabilities(tokens: int, experts: int, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + rng.normal(size=experts) * spread
    logits += rng.normal(size=(tokens, 3)) @ rng.normal(size=(3, experts))
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("experts", "components"), [(8, 3), (16, 20), (32, 20)])
def test_pca_scores_equal_sklearn_on_the_raw_probabilities(experts, components):
    data = make_probabilities(2000, experts)
    pca = PCA(n_components=min(components, experts), svd_solver="full").fit(data)
    expected = (np.abs(pca.components_) * pca.explained_variance_ratio_[:, None]).sum(axis=0)
    covariance = np.cov(data, rowvar=False)
    np.testing.assert_allclose(pca_scores(covariance, components), expected, rtol=1e-6, atol=1e-10)
    ours = principal_components(covariance, components)
    np.testing.assert_allclose(ours.explained_variance_ratio, pca.explained_variance_ratio_, rtol=1e-8, atol=1e-12)
    # the probabilities sum to 1, so the last direction has no variance and its vector no meaning
    compared = min(components, experts - 1)
    cosines = np.abs((ours.components[:compared] * pca.components_[:compared]).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_scores_of_constant_probabilities_are_zero_not_nan():
    assert pca_scores(np.zeros((4, 4)), 2).tolist() == [0, 0, 0, 0]
    assert top_share(np.zeros(4), 1) == 0.25
    assert describe_scores(np.zeros(4)).effective_experts == 4


def test_usage_scores_are_shares_of_selections():
    np.testing.assert_allclose(usage_scores(np.array([6, 0, 2])), [0.75, 0, 0.25])


def test_equal_scores_rank_by_number():
    assert rank_experts(np.array([1.0, 3.0, 3.0, 0.0, 3.0])) == [1, 2, 4, 0, 3]


def test_overlap_counts_common_experts():
    assert overlap(np.array([4.0, 3, 2, 1]), np.array([4.0, 1, 3, 2]), 2) == 0.5


@pytest.mark.parametrize(("experts", "top_k", "spread"), [(16, 4, 0.0), (32, 8, 1.0), (64, 24, 1.0), (64, 24, 0.0)])
def test_null_share_is_that_of_shuffled_columns(experts, top_k, spread):
    data = make_probabilities(4000, experts, spread)
    rng = np.random.default_rng(1)
    shuffled = np.stack([rng.permutation(column) for column in data.T], axis=1)
    reference = top_share(pca_scores(np.cov(shuffled, rowvar=False), 20), top_k)
    variances = data.var(axis=0, ddof=1)
    assert pca_null_share(variances, len(data), 20, top_k, seed=0) == pytest.approx(reference, abs=0.04)


def test_noise_is_no_more_concentrated_than_its_null():
    data = np.random.default_rng(2).gamma(2.0, size=(4000, 32)) * np.linspace(1, 2, 32)
    share = top_share(pca_scores(np.cov(data, rowvar=False), 20), 8)
    assert share == pytest.approx(pca_null_share(data.var(axis=0, ddof=1), 4000, 20, 8, seed=0), abs=0.03)


def test_planted_experts_are_ranked_first():
    rng = np.random.default_rng(3)
    planted = [3, 11, 17, 29]
    data = rng.normal(size=(3000, 32)) * 0.01
    data[:, planted] += rng.normal(size=(3000, 1)) * np.array([0.4, -0.3, 0.5, -0.6])
    ranked = rank_experts(pca_scores(np.cov(data, rowvar=False), 20))
    assert set(ranked[:4]) == set(planted)


def test_distribution_statistics_of_known_scores():
    scores = np.array([8.0, 1, 1, 1, 1, 1, 1, 1, 1])
    distribution = describe_scores(scores)
    assert distribution.top_fractions == {"4": pytest.approx(11 / 16), "8": pytest.approx(15 / 16)}
    assert distribution.largest_gap == pytest.approx(7 / 16)
    assert distribution.largest_gap_after == 1
    assert distribution.percentiles["50"] == pytest.approx(1 / 16)
    entropy = -(0.5 * np.log(0.5) + 8 * (1 / 16) * np.log(1 / 16))
    assert distribution.effective_experts == pytest.approx(np.exp(entropy))
    assert distribution.pattern == "graded"


@pytest.mark.parametrize(
    ("scores", "pattern"), [([1.0, 1.1, 0.9, 1.0], "even"), ([1.0, 0.001, 0.001, 0.001], "concentrated")]
)
def test_pattern_follows_the_effective_number_of_experts(scores, pattern):
    assert describe_scores(np.array(scores)).pattern == pattern
