"""Scoring experts from router moments, and what the scores would be without any structure: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NULL_DRAWS = 8


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of one layer's router probabilities.

    Attributes:
        components: [components, experts] unit vectors, most variance first; the sign is arbitrary.
        explained_variance_ratio: [components] share of the total variance.
        total_variance: sum of the variances of all experts.
    """

    components: Floats
    explained_variance_ratio: Floats
    total_variance: float


def principal_components(covariance: Floats, components: int) -> PrincipalComponents:
    """Eigenvectors of a covariance [experts, experts]: what sklearn's PCA finds in the probabilities themselves.

    More components than experts gives as many as there are experts.
    """
    values, vectors = np.linalg.eigh(covariance)
    values = np.clip(values[::-1], 0.0, None)
    total = float(values.sum())
    ratio = values[:components] / total if total > 0 else np.zeros_like(values[:components])
    return PrincipalComponents(vectors[:, ::-1].T[:components], ratio, total)


def pca_scores(covariance: Floats, components: int) -> Floats:
    """[experts] sum over the first components i of |component_i[e]| * explained_variance_ratio_i (NEXUS v0.1.0).

    The total in the ratio is the variance of all experts, not of the first components only.
    """
    principal = principal_components(covariance, components)
    return principal.explained_variance_ratio @ np.abs(principal.components)


def usage_scores(selected: NDArray[np.int64]) -> Floats:
    """[experts] share of the router's selections, from selection counts [experts]."""
    return selected / max(int(selected.sum()), 1)


def rank_experts(scores: Floats) -> list[int]:
    """Experts by falling score; of equal scores the lower number first."""
    return [int(expert) for expert in np.argsort(-scores, kind="stable")]


def top_share(scores: Floats, top_k: int) -> float:
    """Fraction of the sum of all scores that the best `top_k` have; scores that are all zero count as equal."""
    total = scores.sum()
    if total <= 0:
        return min(top_k / len(scores), 1.0)
    return float(np.sort(scores)[::-1][:top_k].sum() / total)


def pca_null_share(variances: Floats, tokens: int, components: int, top_k: int, seed: int) -> float:
    """`top_share` of the pca score when experts are independent and keep their variances.

    This is what shuffling each expert's probabilities among the tokens would give, without needing them: for
    independent columns the sample covariance of n tokens is Wishart(diag(variances), n - 1) / (n - 1), drawn
    here by its Cholesky factor (Bartlett 1933; Anderson 2003, "Multivariate Statistical Analysis", 7.2) and
    averaged over eight draws. The plain diagonal, the limit of infinite text, is no substitute: its components are
    single experts, so that fewer components than `top_k` would always give 1.

    Args:
        variances: [experts] of the probabilities.
        tokens: number of tokens, more than experts.
        components: principal components in the score.
        top_k: experts selected.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    shares = [
        top_share(pca_scores(_wishart(variances, tokens - 1, generator), components), top_k) for _ in range(_NULL_DRAWS)
    ]
    return float(np.mean(shares))


def _wishart(variances: Floats, freedom: int, generator: np.random.Generator) -> Floats:
    """A draw of Wishart(diag(variances), freedom) / freedom."""
    size = len(variances)
    factor = np.tril(generator.standard_normal((size, size)), -1)
    factor[np.diag_indices(size)] = np.sqrt(generator.chisquare(freedom - np.arange(size)))
    factor *= np.sqrt(variances)[:, None]
    return factor @ factor.T / freedom


def overlap(first: Floats, second: Floats, top_k: int) -> float:
    """Fraction of the best `top_k` by one score that are among the best `top_k` by the other."""
    common = set(rank_experts(first)[:top_k]) & set(rank_experts(second)[:top_k])
    return len(common) / top_k


def effective_experts(scores: Floats) -> float:
    """Exponential of the entropy of the normalised scores: how many equal experts would be as even."""
    total = scores.sum()
    if total <= 0:
        return float(len(scores))
    shares = scores[scores > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
