"""Scores against scikit-learn on the probabilities themselves, and rankings with a known answer."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from synthetic_routers import TOP_K, moments_of, noise_logits

from nexus_ray.errors import ArtefactError
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.scores import (
    cumulative_shares,
    effective_experts,
    pca_scores,
    pca_variance_scores,
    principal_components,
    rank_experts,
    share_of,
    top_share,
)

SHAPES = [(8, 3), (16, 20), (32, 20)]


def make_probabilities(tokens: int, experts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + rng.normal(size=experts)
    logits += rng.normal(size=(tokens, 3)) @ rng.normal(size=(3, experts))
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def fitted(data: np.ndarray, components: int) -> PCA:
    return PCA(n_components=min(components, data.shape[1]), svd_solver="full").fit(data)


@pytest.mark.parametrize(("experts", "components"), SHAPES)
def test_principal_components_equal_sklearns(experts, components):
    data = make_probabilities(2000, experts)
    pca = fitted(data, components)
    ours = principal_components(np.cov(data, rowvar=False))
    kept = len(pca.components_)
    np.testing.assert_allclose(ours.explained_variance_ratio[:kept], pca.explained_variance_ratio_, 1e-8, 1e-12)
    assert ours.total_variance == pytest.approx(data.var(axis=0, ddof=1).sum())
    # the probabilities sum to 1, so the last direction has no variance and its vector no meaning
    compared = min(components, experts - 1)
    cosines = np.abs((ours.components[:compared] * pca.components_[:compared]).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize(("experts", "components"), SHAPES)
def test_pca_scores_equal_sklearn_on_the_raw_probabilities(experts, components):
    data = make_probabilities(2000, experts)
    pca = fitted(data, components)
    expected = (np.abs(pca.components_) * pca.explained_variance_ratio_[:, None]).sum(axis=0)
    principal = principal_components(np.cov(data, rowvar=False))
    np.testing.assert_allclose(pca_scores(principal, components), expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("experts", "components"), SHAPES)
def test_pca_variance_scores_equal_sklearn_on_the_raw_probabilities(experts, components):
    data = make_probabilities(2000, experts)
    pca = fitted(data, components)
    expected = (np.square(pca.components_) * pca.explained_variance_[:, None]).sum(axis=0)
    principal = principal_components(np.cov(data, rowvar=False))
    np.testing.assert_allclose(pca_variance_scores(principal, components), expected, rtol=1e-6, atol=1e-12)


def test_pca_variance_of_all_components_is_the_experts_variance():
    data = make_probabilities(500, 12)
    principal = principal_components(np.cov(data, rowvar=False))
    np.testing.assert_allclose(pca_variance_scores(principal, 12), data.var(axis=0, ddof=1))
    explained = principal.explained_variance_ratio[:4].sum() * principal.total_variance
    assert pca_variance_scores(principal, 4).sum() == pytest.approx(explained)


def test_many_layers_are_scored_as_one_by_one():
    covariances = np.stack([np.cov(make_probabilities(300, 6, seed), rowvar=False) for seed in range(3)])
    together = pca_scores(principal_components(covariances), 4)
    for scores, covariance in zip(together, covariances, strict=True):
        np.testing.assert_allclose(scores, pca_scores(principal_components(covariance), 4))


def test_methods_of_the_router_equal_counts_token_by_token():
    logits = noise_logits(1, 6) + torch.linspace(0, 1, 6)
    size = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 6.0])
    moments = moments_of(logits, size).both_halves()
    selected, gates, contributions = np.zeros(6), np.zeros(6), np.zeros(6)
    for token in logits[:, :, 0].flatten(0, 1).double().numpy():
        top = np.argsort(-token)[:TOP_K]
        weights = np.exp(token[top]) / np.exp(token[top]).sum()
        selected[top] += 1
        gates[top] += weights
        contributions[top] += weights * size.numpy()[top]
    expected = {"usage": selected / selected.sum(), "gate_mass": gates / gates.sum(), "reap": contributions / selected}
    for name, scores in expected.items():
        np.testing.assert_allclose(METHODS[name].score(moments, components=3), scores, rtol=1e-6)


def test_methods_of_the_spectrum_take_the_covariance_of_the_moments():
    logits = noise_logits(1, 6) + torch.linspace(0, 1, 6)
    data = logits[:, :, 0].flatten(0, 1).double().softmax(-1).numpy()
    principal = principal_components(np.cov(data, rowvar=False))
    moments = moments_of(logits).both_halves()
    for name, scores in (("pca", pca_scores), ("pca_variance", pca_variance_scores)):
        np.testing.assert_allclose(METHODS[name].score(moments, components=2), scores(principal, 2), rtol=1e-4)


def test_reap_without_recorded_outputs_says_how_to_get_them():
    with pytest.raises(ArtefactError, match="no expert output norms") as caught:
        METHODS["reap"].score(moments_of(noise_logits(1, 6)).both_halves(), components=3)
    assert "model.experts=packed" in caught.value.hint


@pytest.mark.parametrize("name", METHODS)
def test_no_method_gives_a_negative_score(name):
    moments = moments_of(noise_logits(1, 12, sequences=2, length=8), torch.ones(12)).both_halves()
    scores = METHODS[name].score(moments, components=20)
    assert scores.shape == (12,)
    assert (scores >= 0).all()


def test_scores_of_constant_probabilities_are_zero_not_nan():
    principal = principal_components(np.zeros((4, 4)))
    assert pca_scores(principal, 2).tolist() == [0, 0, 0, 0]
    assert pca_variance_scores(principal, 2).tolist() == [0, 0, 0, 0]
    assert top_share(np.zeros(4), 1) == 0.25
    assert share_of(np.zeros(4), [0, 2, 3]) == 0.75
    assert effective_experts(np.zeros(4)) == 4


def test_equal_scores_rank_by_number_in_either_direction():
    scores = np.array([1.0, 3.0, 3.0, 0.0, 3.0])
    assert rank_experts(scores) == [1, 2, 4, 0, 3]
    assert rank_experts(scores, higher_first=True) == [4, 2, 1, 0, 3]


def test_cumulative_shares_take_the_best_first_and_end_at_one():
    shares = cumulative_shares(np.array([[1.0, 5.0, 4.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(shares, [[0.5, 0.9, 1.0], [1 / 3, 2 / 3, 1.0]])
    assert share_of(np.array([1.0, 5.0, 4.0]), [0, 2]) == pytest.approx(0.5)
