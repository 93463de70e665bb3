"""Null models against closed forms, against shuffled data, and against routers without structure."""

import numpy as np
import pytest
import torch
from scipy import stats
from synthetic_routers import moments_of, noise_logits
from test_scores import make_probabilities

from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.nulls import DRAWS, NullShares, equal_experts, independent_experts
from nexus_ray.selection.scores import pca_scores, pca_variance_scores, principal_components, top_share


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_drawn_covariances_have_the_mean_and_variance_of_a_wishart_matrix():
    variances, tokens, draws = np.array([1.0, 4.0, 0.25]), 12, 40_000
    drawn = independent_experts(variances, tokens, draws, generator())
    product = np.outer(variances, variances)
    # of W / n with W ~ Wishart(diag(v), n): Var = v_i v_j (1 + [i = j]) / n
    spread = np.sqrt(product * (1 + np.eye(3)) / (tokens - 1))
    np.testing.assert_allclose(drawn.mean(axis=0), np.diag(variances), atol=5 * spread.max() / np.sqrt(draws))
    np.testing.assert_allclose(drawn.std(axis=0), spread, rtol=0.03)


def test_the_spectrum_follows_the_marchenko_pastur_law():
    experts, tokens = 200, 800
    spectra = principal_components(independent_experts(np.ones(experts), tokens, 20, generator())).variances
    root = np.sqrt(experts / tokens)
    assert spectra[:, 0].mean() == pytest.approx((1 + root) ** 2, rel=0.03)
    assert spectra[:, -1].mean() == pytest.approx((1 - root) ** 2, rel=0.05)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (32, 8), (64, 24)])
@pytest.mark.parametrize("formula", [pca_scores, pca_variance_scores])
def test_independent_experts_have_the_shares_of_shuffled_columns(experts, top_k, formula):
    data = make_probabilities(4000, experts)
    shuffled = [generator(seed).permuted(data, axis=0) for seed in range(8)]
    covariances = np.stack([np.cov(rows, rowvar=False) for rows in shuffled])
    reference = np.mean([top_share(scores, top_k) for scores in formula(principal_components(covariances), 20)])
    drawn = principal_components(independent_experts(data.var(axis=0, ddof=1), len(data), DRAWS, generator()))
    assert NullShares.of_scores(formula(drawn, 20)).mean(top_k) == pytest.approx(reference, abs=0.03)


def test_without_noise_the_best_of_equal_experts_have_top_k_of_experts():
    scores = np.full(16, 0.3)
    null = NullShares.of_scores(equal_experts(scores, scores, (500, 500), DRAWS, generator()))
    np.testing.assert_allclose(null.mean_curve, np.arange(1, 17) / 16)
    assert null.high(4) == pytest.approx(4 / 16)


def test_the_noise_of_equal_experts_is_that_of_the_pooled_score():
    """Scores of halves with known noise: the pooled score varies by sigma / sqrt(n_1 + n_2)."""
    sigma, tokens, experts = 2.0, (900, 100), 4000
    first, second = (10 + generator(seed).normal(0, sigma / np.sqrt(n), experts) for seed, n in enumerate(tokens))
    drawn = equal_experts(first, second, tokens, 200, generator(2))
    assert drawn.std() == pytest.approx(sigma / np.sqrt(sum(tokens)), rel=0.05)
    assert drawn.mean() == pytest.approx(10, abs=0.01)


def test_picking_the_best_raises_the_null_as_the_largest_of_normals_do():
    first, second = (1 + generator(seed).normal(0, 0.1, 64) for seed in (0, 1))
    null = NullShares.of_scores(equal_experts(first, second, (1, 1), 4000, generator(2)))
    noise = np.sqrt(np.mean((first - second) ** 2)) / 2
    best = generator(3).standard_normal((4000, 64)).max(axis=1).mean()
    assert null.mean(1) == pytest.approx((1 + noise * best) / 64, rel=0.01)


def test_scores_of_the_null_are_never_negative():
    drawn = equal_experts(np.zeros(8), np.ones(8), (1, 1), DRAWS, generator())
    assert drawn.min() == 0
    assert (drawn > 0).any()


@pytest.mark.parametrize("name", METHODS)
def test_as_many_structureless_layers_as_announced_exceed_the_95_percent_quantile(name):
    layers, top_k = 150, 8
    moments = moments_of(noise_logits(layers, 32), torch.ones(32))
    exceed = 0
    for layer in range(layers):
        halves = moments.layer(layer)
        pooled = halves.both_halves()
        variances = np.diag(pooled.covariance()[0, 0])
        independent = principal_components(independent_experts(variances, pooled.tokens, DRAWS, generator(layer)))
        null = NullShares.of_scores(METHODS[name].draw_null(halves, independent, 20, generator(layer)))
        share = top_share(METHODS[name].score(pooled, 20), top_k)
        assert share == pytest.approx(null.mean(top_k), abs=0.05)
        exceed += share > null.high(top_k)
    # 7 % for means, whose scores are not quite normal; without the uncertainty of the noise it would be 16 %
    assert exceed <= stats.binom(layers, 0.07).ppf(0.99)
