"""Null models against closed forms, against shuffled data, and against routers without structure.

The rates of structureless layers above their null that docs/selection.md gives are those of the last four tests.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from synthetic_routers import biased_logits, moments_of, noise_logits, statistics_of
from test_scores import make_probabilities

from nexus_ray.config import SelectSection
from nexus_ray.router.moments import RouterMoments, pack_symmetric
from nexus_ray.selection.nulls import (
    DRAWS,
    NullShares,
    effective_freedom,
    equal_experts,
    independent_experts,
    own_variances,
    wishart,
)
from nexus_ray.selection.record import Selection
from nexus_ray.selection.scores import pca_scores, pca_variance_scores, principal_components, top_share
from nexus_ray.selection.selection import select_experts


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def moments_of_rows(*halves: np.ndarray) -> RouterMoments:
    """Moments of probabilities [tokens, experts] themselves, of two halves."""
    experts = halves[0].shape[1]
    count = np.array([len(rows) for rows in halves])
    covariances = np.stack([np.cov(rows, rowvar=False) for rows in halves])
    return replace(
        RouterMoments.empty(1, experts),
        count=count,
        mean=np.stack([rows.mean(axis=0) for rows in halves])[:, None],
        m2=pack_symmetric(covariances * (count - 1)[:, None, None])[:, None],
    )


def test_drawn_covariances_have_the_mean_and_variance_of_a_wishart_matrix():
    variances, freedom, draws = np.array([1.0, 4.0, 0.25]), 11, 40_000
    drawn = wishart(variances, freedom, draws, generator())
    product = np.outer(variances, variances)
    # of W / n with W ~ Wishart(diag(v), n): Var = v_i v_j (1 + [i = j]) / n
    spread = np.sqrt(product * (1 + np.eye(3)) / freedom)
    np.testing.assert_allclose(drawn.mean(axis=0), np.diag(variances), atol=5 * spread.max() / np.sqrt(draws))
    np.testing.assert_allclose(drawn.std(axis=0), spread, rtol=0.03)


def test_the_spectrum_follows_the_marchenko_pastur_law():
    experts, tokens = 200, 800
    spectra = principal_components(wishart(np.ones(experts), tokens, 20, generator())).variances
    root = np.sqrt(experts / tokens)
    assert spectra[:, 0].mean() == pytest.approx((1 + root) ** 2, rel=0.03)
    assert spectra[:, -1].mean() == pytest.approx((1 - root) ** 2, rel=0.05)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (32, 8), (64, 24)])
@pytest.mark.parametrize("formula", [pca_scores, pca_variance_scores])
def test_drawn_covariances_give_the_shares_of_shuffled_columns(experts, top_k, formula):
    data = make_probabilities(4000, experts)
    shuffled = [generator(seed).permuted(data, axis=0) for seed in range(8)]
    covariances = np.stack([np.cov(rows, rowvar=False) for rows in shuffled])
    reference = np.mean([top_share(scores, top_k) for scores in formula(principal_components(covariances), 20)])
    drawn = principal_components(wishart(data.var(axis=0, ddof=1), len(data) - 1, DRAWS, generator()))
    assert NullShares.of_scores(formula(drawn, 20)).mean(top_k) == pytest.approx(reference, abs=0.03)


@pytest.mark.parametrize("experts", [2, 4, 8, 32])
def test_parts_of_their_own_of_equal_weight_have_the_variances_of_the_closed_form(experts):
    variances = generator().uniform(1, 2, experts)
    variances = np.full(2, 1.5) if experts == 2 else variances
    mean = variances.mean() / (1 - 1 / experts)
    own = own_variances(variances, np.full(experts, 1 / experts))
    if experts == 2:
        assert own.sum() == pytest.approx(4 * 1.5)
    else:
        np.testing.assert_allclose(own, (variances - mean / experts) / (1 - 2 / experts))


def test_parts_of_their_own_leave_the_measured_variances_after_what_all_give():
    """Rows p = w + u - w sum(u) of known own variances, whatever the weights."""
    weights, own = np.array([0.5, 0.25, 0.15, 0.1]), np.array([2.0, 1.0, 0.0, 0.5])
    parts = generator().standard_normal((400_000, 4)) * np.sqrt(own)
    rows = weights + parts - weights * parts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    np.testing.assert_allclose(own_variances(rows.var(axis=0), weights), own, atol=0.02)


def test_an_expert_that_varies_less_than_it_gives_to_others_has_no_part_of_its_own():
    own = own_variances(np.array([1.0, 1.0, 0.0, 0.0]), np.full(4, 0.25))
    assert (own[:2] > 0).all()
    assert own[2:].tolist() == [0, 0]
    assert own_variances(np.zeros(3), np.full(3, 1 / 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bias", [0.0, 1.0, 3.0])
def test_independent_experts_sum_to_one_and_keep_their_variances(bias):
    halves = moments_of(biased_logits(1, 8, bias))
    measured = halves.both_halves().covariance()[0, 0]
    drawn = independent_experts(halves, 20_000, generator())
    np.testing.assert_allclose(np.diag(drawn.mean(axis=0)), np.diag(measured), rtol=0.02)
    total = np.ones(8)
    assert np.abs(total @ drawn @ total).max() < 1e-9 * np.trace(measured)


def test_where_experts_cannot_be_independent_they_keep_their_variances_all_the_same():
    """One expert against all others, which rise and fall together: it varies more than all of them."""
    level = generator().uniform(0.2, 0.8, 4000)
    rows = np.column_stack([level, *[(1 - level) / 7] * 7])
    drawn = independent_experts(moments_of_rows(rows[::2], rows[1::2]), 20_000, generator())
    np.testing.assert_allclose(np.diag(drawn.mean(axis=0)), rows.var(axis=0), rtol=0.05)


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("sizes", [(2000, 2000), (3200, 800)])
def test_the_effective_tokens_are_those_that_are_independent(copies, sizes):
    """Independent normal rows, each of them several times."""
    rows = generator().standard_normal((sum(sizes) // copies, 24)).repeat(copies, axis=0)
    found = effective_freedom(moments_of_rows(rows[: sizes[0]], rows[sizes[0] :]))
    assert found == pytest.approx(sum(sizes) / copies, rel=0.2)


def test_without_two_halves_every_token_counts_as_independent():
    rows = generator().standard_normal((50, 4))
    assert effective_freedom(moments_of_rows(rows, rows)) == 99
    lonely = replace(moments_of_rows(rows, rows), count=np.array([50, 0]))
    assert effective_freedom(lonely) == 49


def test_without_noise_the_best_of_equal_experts_have_top_k_of_experts():
    scores, tokens = np.full((2, 16), 0.3), np.full((2, 16), 500)
    null = NullShares.of_scores(equal_experts(scores, tokens, DRAWS, generator()))
    np.testing.assert_allclose(null.mean_curve, np.arange(1, 17) / 16)
    assert null.high(4) == pytest.approx(4 / 16)


def test_the_noise_of_equal_experts_is_that_of_their_own_pooled_scores():
    """Scores of halves with known noise: a pooled score of n tokens varies by sigma / sqrt(n)."""
    sigma, experts = 2.0, 4000
    tokens = np.repeat([[900, 90], [100, 10]], experts // 2, axis=1)
    scores = 10 + generator().normal(0, sigma / np.sqrt(tokens))
    drawn = equal_experts(scores, tokens, 200, generator(2))
    for part, expected in ((slice(None, experts // 2), 1000), (slice(experts // 2, None), 100)):
        assert drawn[:, part].std() == pytest.approx(sigma / np.sqrt(expected), rel=0.05)
        assert drawn[:, part].mean() == pytest.approx(10, abs=0.02)


def test_experts_without_tokens_have_no_score_and_say_nothing_about_the_noise():
    tokens = np.array([[100, 100, 100, 0], [100, 100, 0, 0]])
    scores = np.array([[3.0, 3.0, 3.0, 0.0], [3.0, 3.0, 0.0, 0.0]])
    drawn = equal_experts(scores, tokens, DRAWS, generator())
    assert (drawn[:, 3] == 0).all()
    np.testing.assert_allclose(drawn[:, :3], 3)


def test_picking_the_best_raises_the_null_as_the_largest_of_normals_do():
    scores = 1 + generator().normal(0, 0.1, (2, 64))
    null = NullShares.of_scores(equal_experts(scores, np.ones((2, 64), np.int64), 4000, generator(2)))
    noise = np.sqrt(np.mean(np.square(scores[0] - scores[1]))) / 2
    best = generator(3).standard_normal((4000, 64)).max(axis=1).mean()
    assert null.mean(1) == pytest.approx((1 + noise * best) / 64, rel=0.01)


def test_scores_of_the_null_are_never_negative():
    drawn = equal_experts(np.stack([np.zeros(8), np.ones(8)]), np.ones((2, 8), np.int64), DRAWS, generator())
    assert drawn.min() == 0
    assert (drawn > 0).any()


def selection_of(moments: RouterMoments, method: str, top_k: int) -> Selection:
    return select_experts(statistics_of({"play": moments}), SelectSection(method=method, top_k=top_k), ("play",))


def layers_above(moments: RouterMoments, method: str, top_k: int) -> int:
    """How many layers have a share above their null."""
    return sum(layer.concentrated for layer in selection_of(moments, method, top_k).layers)


@pytest.mark.parametrize("experts", [4, 8, 16, 32])
@pytest.mark.parametrize("bias", [0, 1, 2])
def test_a_softmax_of_independent_logits_is_as_concentrated_as_its_null(experts, bias):
    """Measured for 150 layers of 1024 tokens: 0 to 7.3 % above for `pca`, none for `pca_variance`."""
    layers = 150
    moments = moments_of(biased_logits(layers, experts, bias))
    selection = selection_of(moments, "pca", experts // 4)
    assert sum(layer.concentrated for layer in selection.layers) <= stats.binom(layers, 0.06).ppf(0.99)
    first = [(layer.explained_variance_ratio[0], layer.null_explained_variance_ratio[0]) for layer in selection.layers]
    assert np.mean([measured > null for measured, null in first]) < 0.4
    assert layers_above(moments, "pca_variance", experts // 4) <= stats.binom(layers, 0.05).ppf(0.99)


@pytest.mark.parametrize(("experts", "sharpness"), [(8, 4), (8, 10), (32, 4), (32, 10)])
def test_a_sharp_softmax_of_equally_popular_experts_exceeds_its_null_more_often_but_by_little(experts, sharpness):
    """Logits of standard deviation 4 or 10, so that one expert has nearly all of a token.

    Measured for 150 layers of 1024 tokens: 0 to 60 % above, with a share that is 1.3 points higher at most on average.
    """
    moments = moments_of(sharpness * noise_logits(150, experts))
    for method in ("pca", "pca_variance"):
        layers = selection_of(moments, method, experts // 4).layers
        assert sum(layer.concentrated for layer in layers) <= 0.75 * len(layers)
        assert np.mean([layer.share - layer.null_share for layer in layers]) < 0.015


@pytest.mark.parametrize("experts", [4, 8, 16, 32])
@pytest.mark.parametrize("method", ["usage", "gate_mass", "reap"])
def test_means_of_equal_experts_are_as_concentrated_as_their_null(experts, method):
    """Measured for 150 layers of 1024 tokens: 5.3 to 10.7 % above."""
    layers = 150
    moments = moments_of(noise_logits(layers, experts), torch.ones(experts))
    assert layers_above(moments, method, experts // 4) <= stats.binom(layers, 0.08).ppf(0.99)


@pytest.mark.parametrize("bias", [0, 2, 4])
@pytest.mark.parametrize("experts", [8, 32])
def test_reap_of_equal_outputs_is_as_concentrated_as_its_null_however_unequal_usage_is(experts, bias):
    """Every token adds an exponential amount to each of its experts, some of which get a thousandth of others' tokens.

    Measured for 150 layers of 1024 tokens: 4.0 to 9.3 % above.
    """
    layers = 150
    moments = moments_of(noise_logits(layers, experts) + torch.linspace(0, bias, experts))
    amounts = generator().gamma(np.maximum(moments.selected, 1)) * (moments.selected > 0)
    moments = replace(moments, reap=amounts)
    assert layers_above(moments, "reap", experts // 4) <= stats.binom(layers, 0.08).ppf(0.99)
