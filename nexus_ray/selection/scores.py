"""Scoring and ranking experts: pure functions on arrays of one layer, or of many at once along leading dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of router probabilities, most variance first.

    Attributes:
        components: [..., experts, experts] unit vectors, one a row; the sign is arbitrary.
        variances: [..., experts] variance along each.
    """

    components: Floats
    variances: Floats

    @property
    def total_variance(self) -> Floats:
        """[...] sum of the variances of all experts."""
        return self.variances.sum(axis=-1)

    @property
    def explained_variance_ratio(self) -> Floats:
        """[..., experts] share of the total variance; zero where there is no variance."""
        total = self.total_variance[..., None]
        return np.divide(self.variances, total, out=np.zeros_like(self.variances), where=total > 0)


def principal_components(covariance: Floats) -> PrincipalComponents:
    """Eigenvectors of covariances [..., experts, experts]: what PCA finds in the probabilities themselves."""
    values, vectors = np.linalg.eigh(covariance)
    return PrincipalComponents(vectors[..., ::-1].swapaxes(-1, -2), np.clip(values[..., ::-1], 0.0, None))


def pca_scores(principal: PrincipalComponents, components: int) -> Floats:
    """[..., experts] sum over the first components i of |component_i[e]| * explained_variance_ratio_i (NEXUS v0.1.0).

    The total in the ratio is the variance of all experts, not of the first components only. More components than
    experts gives as many as there are experts.
    """
    ratio = principal.explained_variance_ratio[..., :components, None]
    return (np.abs(principal.components[..., :components, :]) * ratio).sum(axis=-2)


def pca_variance_scores(principal: PrincipalComponents, components: int) -> Floats:
    """[..., experts] sum over the first components i of component_i[e]^2 * variance_i.

    This is the part of the expert's variance that lies in these components, and with all of them its variance: so
    shares of it add up to the variance they explain (the communalities of factor analysis; Jolliffe 2002,
    "Principal Component Analysis", 7.1).
    """
    variances = principal.variances[..., :components, None]
    return (np.square(principal.components[..., :components, :]) * variances).sum(axis=-2)


def rank_experts(scores: Floats, *, higher_first: bool = False) -> list[int]:
    """Experts by falling score [experts]; of equal scores the lower number first, or the higher."""
    order = np.arange(len(scores))[:: -1 if higher_first else 1]
    return [int(expert) for expert in order[np.argsort(-scores[order], kind="stable")]]


def cumulative_shares(scores: Floats) -> Floats:
    """[..., experts] share of the sum of scores that the best 1, 2, ... have; scores that are all zero are equal."""
    ordered = -np.sort(-scores, axis=-1)
    ordered = np.where(ordered.sum(axis=-1, keepdims=True) > 0, ordered, 1.0)
    cumulative = ordered.cumsum(axis=-1)
    shares: Floats = cumulative / cumulative[..., -1:]
    return shares


def top_share(scores: Floats, top_k: int) -> float:
    """Share of the sum of all scores [experts] that the best `top_k` have; all of it where there are no more."""
    return float(cumulative_shares(scores)[min(top_k, len(scores)) - 1])


def share_of(scores: Floats, experts: list[int]) -> float:
    """Share of the sum of all scores [experts] that the named experts have; scores that are all zero are equal."""
    total = scores.sum()
    return float(scores[experts].sum() / total) if total > 0 else len(experts) / len(scores)


def effective_experts(scores: Floats) -> float:
    """Exponential of the entropy of the normalised scores: how many equal experts would be as even."""
    total = scores.sum()
    if total <= 0:
        return float(len(scores))
    shares = scores[scores > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
